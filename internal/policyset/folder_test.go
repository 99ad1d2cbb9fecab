package policyset

import (
	"io/fs"
	"testing"
	"testing/fstest"
)

func TestASetIsAFileSystem(t *testing.T) {
	s := Set{Files: []File{
		{"access.csv", []byte("a row\n")}, {"candidate/access.csv", nil}, {"candidate/egress.csv", []byte("x")}, {"tests/a/b.yaml", []byte("y")},
	}}
	if err := fstest.TestFS(s.FS(), "access.csv", "candidate/access.csv", "candidate/egress.csv", "tests/a/b.yaml"); err != nil {
		t.Error(err)
	}
	if _, err := fs.ReadFile(s.FS(), "candidate"); err == nil {
		t.Error("a folder was read as a file")
	}
	if err := fstest.TestFS(new(Set).FS()); err != nil {
		t.Errorf("without a file: %v", err)
	}
}
