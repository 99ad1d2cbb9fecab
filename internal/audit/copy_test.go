package audit

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Each record of a copy is proved by the head that the issuer has signed, and
// only by a head that fits.
func TestProveCopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "log")
		l := openAt(t, path)
		tree := treeAt(t, l)
		heads := &memHeads{}
		w, err := OpenWitness(t.TempDir(), heads)
		if err != nil {
			t.Fatal(err)
		}
		workload, agent := spiffeid.RequireFromString("spiffe://corp.example/billing"), spiffeid.RequireFromString("spiffe://corp.example/spire/agent/join_token/n1")
		name := LogName(workload, agent)
		var signed []Head
		for size := uint64(0); size < 37; {
			mustAppend(t, l, 1)
			if err := l.Sync(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := tree.Update(); err != nil {
				t.Fatal(err)
			}
			q, _, err := tree.Ask(name, size)
			if err != nil {
				t.Fatal(err)
			}
			if _, size, err = w.Cosign(t.Context(), name, q); err != nil {
				t.Fatal(err)
			}
			raw, _, _ := heads.Load(t.Context(), name)
			h, err := ParseHead(raw)
			if err != nil {
				t.Fatal(err)
			}
			signed = append(signed, h)
		}
		own, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		copied := filepath.Join(t.TempDir(), CopyName(workload, agent))
		if err := os.WriteFile(copied, own, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, h := range signed {
			for seq := uint64(1); seq <= h.Size; seq++ {
				p, err := ProveCopy(copied, seq, []Head{h})
				if err != nil {
					t.Fatal(err)
				}
				got, err := p.Check([]string{w.Key()})
				if err != nil || got.Record.Seq != seq || got.Owner.Workload != workload || got.Signed.IsZero() {
					t.Fatalf("record %d of %d: %+v %v", seq, h.Size, got, err)
				}
			}
		}
		last := signed[len(signed)-1]
		if p, err := ProveCopy(copied, 3, signed); err != nil || p.Checkpoint != string(last.Note) {
			t.Errorf("not on the newest head: %v", err)
		}
		if got, owner := HeadsOf([]Head{{Name: "sallyport-audit/corp.example/@issuer"}, last}, filepath.Base(copied)); len(got) != 1 || owner.Agent != agent {
			t.Errorf("heads of the copy: %v %v", got, owner)
		}
		for name, bad := range map[string][]byte{
			"changed": []byte(strings.Replace(string(own), `"verb":"POST"`, `"verb":"GET"`, 1)),
			"cut":     own[:len(own)/2],
		} {
			if err := os.WriteFile(copied, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := ProveCopy(copied, 3, []Head{last}); err == nil {
				t.Errorf("a copy that was %s proves something", name)
			}
		}
	})
}
