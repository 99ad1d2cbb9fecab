package mesh

import (
	"os"
	"path/filepath"
	"testing"
	"testing/fstest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func withModes(t *testing.T, text string) *Policies {
	t.Helper()
	m := fstest.MapFS{modesFile: {Data: []byte(text)}}
	for _, f := range []string{accessFile, guardFile, servicesFile} {
		b, err := os.ReadFile(filepath.Join("testdata/good/full", f))
		if err != nil {
			t.Fatal(err)
		}
		m[f] = &fstest.MapFile{Data: b}
	}
	p, err := ParseFS(m, demoDomain)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestModesReachEveryProxy(t *testing.T) {
	p := withModes(t, "access.csv: warn\nguardrails.csv: observe\n")
	s, err := Compile(p, 1, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string]*Snapshot{"whole": s, "sidecar": s.Project(spiffeid.ID{}), "gateway": s.ProjectGateway()} {
		if got.ModeOf(nil) != Warn || got.ModeOf(&Rule{Origin: Origin{File: guardFile}}) != Observe || got.Validate() != nil {
			t.Errorf("%s: %v", name, got.Modes)
		}
		if _, err := DecodeSnapshot(got.Encode()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The mode and the file of a row are part of what was reviewed, and what is
// enforced is the same whether it is written out or not.
func TestModesCountInTheHash(t *testing.T) {
	plain, spelled := withModes(t, ""), withModes(t, "access.csv: enforce\n")
	observed, warned := withModes(t, "guardrails.csv: observe\n"), withModes(t, "guardrails.csv: warn\n")
	if plain.Hash() != spelled.Hash() || plain.Hash() == observed.Hash() || observed.Hash() == warned.Hash() {
		t.Error("the hash does not follow the modes")
	}
	moved := withModes(t, "guardrails.csv: observe\n")
	moved.Rules[0].Origin.File = guardFile
	if moved.Hash() == observed.Hash() {
		t.Error("a row moved to a file that is not enforced has the same hash")
	}
}
