package audit

import (
	"path/filepath"
	"testing"
)

func TestSignerIsOpenedByItsKeyAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	a, err := OpenSigner(path, "archive-")
	if err != nil {
		t.Fatal(err)
	}
	again, err := OpenSigner(path, "archive-")
	if err != nil || again.Key() != a.Key() {
		t.Fatalf("another key after a restart: %v", err)
	}
	other, err := OpenSigner(path+"2", "archive-")
	if err != nil {
		t.Fatal(err)
	}
	signed, err := a.Sign(7, [32]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	if c, err := OpenCheckpoint(signed, a.Key()); err != nil || c != (Checkpoint{a.Origin(), 7, [32]byte{1}}) {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := OpenCheckpoint(signed, other.Key()); err == nil {
		t.Error("another key opens it")
	}
}
