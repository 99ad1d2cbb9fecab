package audit

import (
	"fmt"

	"golang.org/x/mod/sumdb/note"
)

// A Signer signs how far logs of other kinds have come, in the form of a
// checkpoint: OpenCheckpoint verifies it.
type Signer struct{ key *noteKey }

// OpenSigner reads the key in a file, and makes one when there is none. The name
// of a new key, which is the origin of what it signs, begins with prefix.
func OpenSigner(path, prefix string) (*Signer, error) {
	key, name, err := openKey(path, prefix)
	if err != nil {
		return nil, fmt.Errorf("signing key: %w", err)
	}
	return &Signer{&noteKey{name: name, alg: algEd25519, key: key}}, nil
}

// Origin is the name of the key.
func (s *Signer) Origin() string { return s.key.name }

// Key is the text by which others verify what it signs.
func (s *Signer) Key() string { return s.key.verifier() }

// Sign signs a checkpoint of the signer's origin.
func (s *Signer) Sign(size uint64, root [32]byte) ([]byte, error) {
	c := Checkpoint{Origin: s.key.name, Size: size, Root: root}
	return note.Sign(&note.Note{Text: c.text()}, s.key)
}
