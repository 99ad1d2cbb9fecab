package main

import (
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"testing"
)

func TestNewFilesFollowNoLink(t *testing.T) {
	base := t.TempDir()
	etc, outside := filepath.Join(base, "etc"), filepath.Join(base, "outside")
	for _, d := range []string{etc, outside} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// What the owner of etc has put there.
	if err := os.Symlink(outside, filepath.Join(etc, "policies")); err != nil {
		t.Fatal(err)
	}
	n := &newFiles{dir: etc, closed: []string{filepath.Join(base, "state")}, files: []newFile{
		{filepath.Join(etc, "issuer.yaml"), []byte("a"), 0o644}, {filepath.Join(etc, "policies", "access.csv"), []byte("b"), 0o644},
	}}
	if err := n.write(); err == nil {
		t.Error("a link out of the directory was followed")
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("outside is %v (%v)", left, err)
	}
	for _, p := range []string{filepath.Join(etc, "issuer.yaml"), filepath.Join(base, "state")} {
		if _, err := os.Lstat(p); err == nil {
			t.Errorf("%s is left", p)
		}
	}
}

func TestNewFilesAreGivenAway(t *testing.T) {
	id := os.Getuid()
	if id == 0 {
		id = 65534
	}
	base := t.TempDir()
	etc := filepath.Join(base, "above", "etc")
	n := &newFiles{dir: etc, closed: []string{filepath.Join(base, "state", "node")}, owner: &user.User{Uid: strconv.Itoa(id), Gid: strconv.Itoa(os.Getgid())}, files: []newFile{
		{filepath.Join(etc, "issuer.yaml"), []byte("a"), 0o644}, {filepath.Join(etc, "policies", "access.csv"), []byte("b"), 0o600},
	}}
	if err := n.write(); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{
		"above": 0o755, "above/etc": 0o755, "above/etc/issuer.yaml": 0o644, "above/etc/policies": 0o755, "above/etc/policies/access.csv": 0o600,
		"state": 0o755, "state/node": 0o700,
	} {
		st, err := os.Lstat(filepath.Join(base, name))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != mode || int(ownerOf(st)) != id {
			t.Errorf("%s has mode %o and is of %d, want %o and %d", name, st.Mode().Perm(), ownerOf(st), mode, id)
		}
	}
	if list, err := os.ReadDir(etc); err != nil || len(list) != 2 {
		t.Errorf("there are %v (%v)", list, err)
	}
	n.files[0].path, n.files[1].path = filepath.Join(etc, "other.yaml"), filepath.Join(etc, "policies", "other.csv")
	if err := n.write(); err != nil {
		t.Errorf("in directories that are there: %v", err)
	}
}
