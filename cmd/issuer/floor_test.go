package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/internal/policyset"
	"sallyport/internal/registry"
)

func TestFloor(t *testing.T) {
	dir, hash := t.TempDir(), strings.Repeat("ab", 32)
	in := &issuer{cfg: &Config{DataDir: dir}}
	in.cfg.Policy.Signers.Keys = []policyset.Key{"ed25519:"}
	if f, err := in.openFloor(); err != nil || f != (registry.Floor{}) {
		t.Errorf("before any: %+v, %v", f, err)
	}
	want := registry.Floor{Revision: 7, Set: hash}
	in.keepFloor(want)
	if f, err := in.openFloor(); err != nil || f != want {
		t.Errorf("after one: %+v, %v", f, err)
	}
	for _, bad := range []string{"", "7\n", "7 " + hash, "0 " + hash + "\n", "x " + hash + "\n", "7 " + hash[1:] + "\n", "7 " + hash + "\n7\n", "99999999999999999 " + hash + "\n"} {
		if err := os.WriteFile(filepath.Join(dir, floorFile), []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if f, err := in.openFloor(); err == nil || !strings.Contains(err.Error(), floorFile) {
			t.Errorf("%q is taken for %+v: %v", bad, f, err)
		}
	}
	in.cfg.Policy.Signers.Keys = nil
	if f, err := in.openFloor(); err != nil || f != (registry.Floor{}) {
		t.Errorf("without pinned keys: %+v, %v", f, err)
	}
}
