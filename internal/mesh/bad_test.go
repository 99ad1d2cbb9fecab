package mesh

import (
	"errors"
	"flag"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the messages in testdata/bad anew")

// badCases are the files and folders in testdata/bad, each with one mistake.
func badCases(t *testing.T) map[string]fs.FS {
	t.Helper()
	entries, err := os.ReadDir("testdata/bad")
	if err != nil {
		t.Fatal(err)
	}
	cases := map[string]fs.FS{}
	for _, e := range entries {
		name := e.Name()
		file := filepath.Join("testdata/bad", name)
		switch ext := path.Ext(name); {
		case e.IsDir():
			cases[name] = os.DirFS(file)
		case ext == ".csv" || ext == ".yaml":
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			cases[name] = full(t, name, ext, b)
		}
	}
	return cases
}

// full is the good folder with one of its files replaced by a bad one.
func full(t *testing.T, name, ext string, b []byte) fs.FS {
	t.Helper()
	kind, _, _ := strings.Cut(name, "-")
	m := fstest.MapFS{}
	for _, f := range []string{accessFile, servicesFile} {
		g, err := os.ReadFile(filepath.Join("testdata/good/full", f))
		if err != nil {
			t.Fatal(err)
		}
		m[f] = &fstest.MapFile{Data: g}
	}
	if kind == "tests" || kind == "routes" {
		kind += "/a"
	}
	m[kind+ext] = &fstest.MapFile{Data: b}
	return m
}

func TestBadFilesSayTheirOneMistake(t *testing.T) {
	cases := badCases(t)
	if len(cases) < 45 {
		t.Errorf("only %d bad files", len(cases))
	}
	for name, fsys := range cases {
		t.Run(name, func(t *testing.T) {
			_, err := ParseFS(fsys, demoDomain)
			errs, ok := errors.AsType[Errors](err)
			if !ok {
				t.Fatalf("got %v, want Errors", err)
			}
			if len(errs) != 1 {
				t.Errorf("got %d mistakes, want 1:\n%v", len(errs), errs)
			}
			want := filepath.Join("testdata/bad", strings.TrimSuffix(name, path.Ext(name))+".want")
			got := errs.Error() + "\n"
			if *update {
				if err := os.WriteFile(want, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			b, err := os.ReadFile(want)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(b), got); diff != "" {
				t.Errorf("message (-want +got):\n%s", diff)
			}
		})
	}
}

func TestGoodFoldersParse(t *testing.T) {
	entries, err := os.ReadDir("testdata/good")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		t.Run(e.Name(), func(t *testing.T) {
			p, err := ParseDir(filepath.Join("testdata/good", e.Name()), demoDomain)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Compile(p, 1, 1, nil); err != nil {
				t.Error(err)
			}
		})
	}
}
