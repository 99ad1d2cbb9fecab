package main

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/internal/archive"
)

// forged writes what anybody can who has the public key: a backup with a
// manifest and files of choice.
func forged(t *testing.T, m manifest, files ...*tar.Header) (file, key string) {
	t.Helper()
	dir := t.TempDir()
	file, key = filepath.Join(dir, "issuer.age"), filepath.Join(dir, "backup.key")
	public, err := archive.NewAuditor(key)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := archive.Seal(f, public)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	b := &packer{tar.NewWriter(sealed)}
	err = b.bytes(backupManifest, text)
	for _, h := range files {
		h.Typeflag, h.Uid, h.Gid = tar.TypeReg, 65534, 65534
		err = errors.Join(err, b.WriteHeader(h))
	}
	if err := errors.Join(err, b.Close(), sealed.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	return file, key
}

func TestRestoreGoesWhereTheOperatorLetsIt(t *testing.T) {
	base := t.TempDir()
	m := manifest{Version: manifestVersion, TrustDomain: "corp.example", ConfigDir: filepath.Join(base, "etc"), DataDir: filepath.Join(base, "state")}
	file, key := forged(t, m, &tar.Header{Name: "config/issuer.yaml", Mode: 0o4777}, &tar.Header{Name: "state/ca/root.key", Mode: 0o600}, &tar.Header{Name: "state/node.json", Mode: 0o666})
	for _, to := range []destination{{}, {config: m.ConfigDir}, {data: m.DataDir}, {config: m.DataDir, data: m.ConfigDir}} {
		if _, _, err := restoreFrom(file, []string{key}, to); err == nil || !strings.Contains(err.Error(), "belongs into "+m.ConfigDir+" and "+m.DataDir) {
			t.Errorf("%+v: %v", to, err)
		}
	}
	if _, _, err := restoreFrom(file, []string{key}, destination{into: "/"}); err == nil {
		t.Error("into the root it is put wherever it says")
	}
	if list, err := os.ReadDir(base); err != nil || len(list) > 0 {
		t.Fatalf("what was refused left %v (%v)", list, err)
	}
	into := filepath.Join(base, "into")
	for _, to := range []destination{{config: m.ConfigDir, data: m.DataDir}, {into: into}} {
		if _, _, err := restoreFrom(file, []string{key}, to); err != nil {
			t.Fatal(err)
		}
		for name, mode := range map[string]fs.FileMode{"etc": 0o755, "etc/issuer.yaml": 0o644, "state": 0o700, "state/ca": 0o700, "state/ca/root.key": 0o600, "state/node.json": 0o644} {
			st, err := os.Lstat(filepath.Join(to.into, base, name))
			if err != nil {
				t.Fatal(err)
			}
			if got := st.Mode() &^ fs.ModeDir; got != mode {
				t.Errorf("%s has mode %v, want %v", name, got, mode)
			}
			if os.Getuid() == 0 && strings.HasPrefix(name, "state") && ownerOf(st) != 65534 {
				t.Errorf("%s is of %d", name, ownerOf(st))
			}
		}
	}
}

func TestRestoreFollowsNoLink(t *testing.T) {
	base := t.TempDir()
	outside := filepath.Join(base, "outside")
	if err := os.Mkdir(outside, 0o755); err != nil {
		t.Fatal(err)
	}
	p := &place{name: backupState, dir: filepath.Join(base, "state"), mode: 0o700}
	if err := p.begin(); err != nil {
		t.Fatal(err)
	}
	defer p.discard(true)
	one := &tar.Header{Name: "state/a", Mode: 0o600, Uid: 65534, Gid: 65534}
	if err := p.put(strings.NewReader("a"), "a", one); err != nil {
		t.Fatal(err)
	}
	tmp := filepath.Join(base, p.tmp)
	if st, err := os.Lstat(tmp); err != nil || int(ownerOf(st)) != os.Getuid() || st.Mode().Perm() != 0o700 {
		t.Errorf("while files are put into it, the directory is given away (%v)", err)
	}
	if err := os.Symlink(outside, filepath.Join(tmp, "sub")); err != nil {
		t.Fatal(err)
	}
	if err := p.put(strings.NewReader("b"), "sub/b", one); err == nil {
		t.Error("a link was followed")
	}
	if list, err := os.ReadDir(outside); err != nil || len(list) > 0 {
		t.Errorf("outside is %v (%v)", list, err)
	}
}
