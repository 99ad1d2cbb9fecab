package mesh

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Encode writes the snapshot as canonical JSON: equal snapshots have equal
// bytes.
func (s *Snapshot) Encode() []byte {
	c := *s
	c.Services = orEmpty(c.Services)
	c.Endpoints = orEmpty(c.Endpoints)
	c.Rules = orEmpty(c.Rules)
	c.Memberships = orEmpty(c.Memberships)
	c.Destinations = orEmpty(c.Destinations)
	return mustJSON(&c)
}

func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

// ContentHash is the SHA-256, in hex, of what the snapshot says without the
// numbers of its revisions and the hash of the whole set. A proxy that holds
// this content needs only the numbers.
func (s *Snapshot) ContentHash() string {
	c := *s
	c.Revision, c.PolicyRevision, c.PolicyHash = 0, 0, ""
	return hashJSON(json.RawMessage(c.Encode()))
}

// DecodeSnapshot reads what Encode wrote. It accepts nothing but canonical
// bytes, so that a snapshot and its hash cannot mean different things to two
// readers. It checks the form; Snapshot.Validate checks the rows.
func DecodeSnapshot(b []byte) (*Snapshot, error) {
	s := new(Snapshot)
	if err := decodeStrict(b, s); err != nil {
		return nil, fmt.Errorf("decode snapshot: %w", err)
	}
	if !bytes.Equal(s.Encode(), b) {
		return nil, errors.New("decode snapshot: not in canonical form")
	}
	return s, nil
}

// Encode writes the reviewed set as JSON, origins included.
func (p *Policies) Encode() []byte { return mustJSON(p) }

// DecodePolicies reads what Policies.Encode wrote.
func DecodePolicies(b []byte) (*Policies, error) {
	p := new(Policies)
	if err := decodeStrict(b, p); err != nil {
		return nil, fmt.Errorf("decode policies: %w", err)
	}
	return p, nil
}

func decodeStrict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more follows the end")
	}
	return nil
}
