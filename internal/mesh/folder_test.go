package mesh

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// What a Folder remembers of one reading must not show in the next.
func TestAFolderReadAgainIsAsReadAfresh(t *testing.T) {
	dir, td := t.TempDir(), spiffeid.RequireTrustDomainFromString("corp.example")
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	entry := func(name string) string {
		return `entries: [{spiffe_id: "spiffe://corp.example/` + name + `", parent_id: "spiffe://corp.example/spire/agent/join_token/n", selectors: ["unix:uid:1"], dns_names: [a.example]}]`
	}
	f := &Folder{Dir: dir, TrustDomain: td}
	sums := map[Sum]string{}
	for _, step := range []struct{ name, file, text string }{
		{"the first reading", accessFile, ""},
		{"entries", entriesFile, entry("a")},
		{"another file changed", accessFile, "p, r, in, spiffe://corp.example/a, spiffe://corp.example/b, *, *, /**, -, allow\n"},
		{"other entries", entriesFile, entry("b")},
		{"a mistake in the entries", entriesFile, `entries: [{spiffe_id: "spiffe://corp.example/a", selector: []}]`},
		{"the mistake mended", entriesFile, entry("c")},
		{"a comment", entriesFile, "# why\n" + entry("a")},
		{"no entry", entriesFile, "entries: []\n"},
	} {
		write(step.file, step.text)
		want, wantErr := ParseFS(os.DirFS(dir), td)
		for range 2 {
			got, sum, err := f.Parse()
			if (err == nil) != (wantErr == nil) || err != nil && err.Error() != wantErr.Error() {
				t.Errorf("%s: %v, want %v", step.name, err, wantErr)
			}
			if err == nil && (got.Hash() != want.Hash() || !cmp.Equal(string(got.Encode()), string(want.Encode()))) {
				t.Errorf("%s: differs from a fresh reading:\n%s", step.name, cmp.Diff(string(want.Encode()), string(got.Encode())))
			}
			if err == nil && len(got.Entries) > 0 {
				got.Entries[0].SPIFFEID = spiffeid.ID{} // the caller's own
			}
			if was, again := sums[sum]; again && was != step.name {
				t.Errorf("%s has the sum of %s", step.name, was)
			}
			sums[sum] = step.name
		}
	}
	write(entriesFile, entry("d"))
	if _, _, err := f.Parse(); err != nil {
		t.Fatal(err)
	}
	if len(f.known.entries) != 1 || f.known.entries[0].SPIFFEID.Path() != "/d" {
		t.Errorf("entries of the last good file are not kept: %+v", f.known.entries)
	}
	if err := os.Remove(filepath.Join(dir, entriesFile)); err != nil {
		t.Fatal(err)
	}
	if p, sum, err := f.Parse(); err != nil || len(p.Entries) != 0 || sums[sum] != "" {
		t.Errorf("without the file: %d entries, %v, sum of %q", len(p.Entries), err, sums[sum])
	}
}
