package ca

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestTwoIssuersUnderOneRoot lets a second CA take over the root of a first.
func TestTwoIssuersUnderOneRoot(t *testing.T) {
	for _, passphrase := range passphrases() { // of which meshtest.Race leaves one
		first := config(t)
		first.Passphrase = []byte(passphrase)
		a := open(t, first)
		second := config(t)
		second.Passphrase = []byte(passphrase)
		second.RootDir = filepath.Join(t.TempDir(), "root")
		if _, err := Open(t.Context(), second); err == nil || !strings.Contains(err.Error(), "copy root.crt and root.key") {
			t.Errorf("Open without a root = %v, want the next step", err)
		}
		if err := os.Mkdir(second.RootDir, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"root.crt", "root.key"} {
			data, err := os.ReadFile(filepath.Join(first.Dir, name))
			if err == nil {
				err = os.WriteFile(filepath.Join(second.RootDir, name), data, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		b := open(t, second)
		root := a.Bundle().X509[0]
		if !b.Bundle().X509[0].Equal(root) {
			t.Error("the second CA has another root")
		}
		if a.Status().IntermediateSerial == b.Status().IntermediateSerial || a.Status().KeyID == b.Status().KeyID {
			t.Error("the CAs share an intermediate or a JWT key")
		}
		if err := b.current.Load().intermediate.CheckSignatureFrom(root); err != nil {
			t.Errorf("the intermediate of the second: %v", err)
		}
		// The directory is of no use any more.
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(second.RootDir); err != nil {
			t.Fatal(err)
		}
		if again := open(t, second); !again.Bundle().X509[0].Equal(root) {
			t.Error("the second CA has another root after a restart")
		}
		// One whose directory lets others in is refused.
		open := config(t)
		open.RootDir = t.TempDir()
		if err := os.Chmod(open.RootDir, 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), open); err == nil || !strings.Contains(err.Error(), "lets other users in") {
			t.Errorf("Open with a root for all to read = %v", err)
		}
	}
}
