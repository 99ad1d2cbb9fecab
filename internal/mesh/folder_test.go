package mesh

import (
	"os"
	"path/filepath"
	"testing"
	"time"

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
			files, err := f.Read()
			if err != nil {
				t.Fatal(err)
			}
			got, err := f.Parse(files)
			sum := files.Sum()
			if p, again := f.ParseFS(os.DirFS(dir)); (again == nil) != (err == nil) || err == nil && p.Hash() != got.Hash() {
				t.Errorf("%s: as the files of a set: %v", step.name, again)
			}
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
	parse := func() (*Policies, Sum) {
		t.Helper()
		files, err := f.Read()
		if err != nil {
			t.Fatal(err)
		}
		p, err := f.Parse(files)
		if err != nil {
			t.Fatal(err)
		}
		return p, files.Sum()
	}
	parse()
	if len(f.known.entries) != 1 || f.known.entries[0].SPIFFEID.Path() != "/d" {
		t.Errorf("entries of the last good file are not kept: %+v", f.known.entries)
	}
	if err := os.Remove(filepath.Join(dir, entriesFile)); err != nil {
		t.Fatal(err)
	}
	if p, sum := parse(); len(p.Entries) != 0 || sums[sum] != "" {
		t.Errorf("without the file: %d entries, sum of %q", len(p.Entries), sums[sum])
	}
}

// TestAFileWrittenInPlaceIsTold apart from one that was moved there whole.
func TestAFileWrittenInPlaceIsTold(t *testing.T) {
	f := &Folder{Dir: t.TempDir(), TrustDomain: demoDomain}
	read := func() *Files {
		t.Helper()
		files, err := f.Read()
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(f.Dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	move := func(name, text string) {
		t.Helper()
		write(".new", text)
		long := time.Now().Add(-time.Hour)
		if err := os.Chtimes(filepath.Join(f.Dir, ".new"), long, long); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(f.Dir, ".new"), filepath.Join(f.Dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	write(accessFile, "# one\n")
	write(guardFile, "# two\n")
	before := read()
	if !before.Rewritten(nil, 30*time.Second) {
		t.Error("files that nobody knew count as whole")
	}
	for _, step := range []struct {
		name string
		do   func()
		want bool
	}{
		{"nothing", func() {}, false},
		{"the same bytes in place", func() { write(accessFile, "# one\n") }, false},
		{"moved", func() { move(accessFile, "# three\n") }, false},
		{"moved, and written a moment ago", func() {
			move(accessFile, "# three and a half\n")
			if err := os.Chtimes(filepath.Join(f.Dir, accessFile), time.Now(), time.Now()); err != nil {
				t.Fatal(err)
			}
		}, true},
		{"written", func() { write(guardFile, "") }, true},
		{"moved and written", func() { move(accessFile, "# four\n"); write(guardFile, "# five\n") }, true},
		{"a new file", func() { write(entriesFile, "entries: []\n") }, true},
		{"a file less", func() {
			if err := os.Remove(filepath.Join(f.Dir, guardFile)); err != nil {
				t.Fatal(err)
			}
		}, true},
	} {
		step.do()
		now := read()
		if got := now.Rewritten(before, 30*time.Second); got != step.want {
			t.Errorf("%s: rewritten is %t", step.name, got)
		}
		before = now
	}
}
