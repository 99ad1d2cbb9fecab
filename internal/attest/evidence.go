package attest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	maxEvidence = 64 << 10 // bytes of a payload or an answer; a chain of five needs 8 KiB
	maxNesting  = 8        // of JSON in evidence
	maxTrust    = 1 << 20  // bytes of a file or a page with keys we trust
	clockSkew   = 30 * time.Second
)

// ErrSeen says that evidence was shown before, by another key.
var ErrSeen = errors.New("evidence was already used by another key")

// Seen remembers evidence that counts for one key only. Safe for concurrent
// use.
type Seen interface {
	// Claim ties what to key until the time is over, for ever if that is zero,
	// durably. It succeeds again for the same key, because the answer may have
	// been lost, and is ErrSeen for any other. Of concurrent calls with
	// different keys at most one succeeds.
	Claim(ctx context.Context, what, key [32]byte, until time.Time) error
}

// MachineClaim is what ties a machine that counts once to its key: it is known
// by the agent that it became. Whoever forgets the agent forgets the claim too.
func MachineClaim(agent spiffeid.ID) [32]byte {
	return sha256.Sum256([]byte("machine\x00" + agent.String()))
}

// claimToken ties a signed token to a public key, claimMachine a machine.
func claimToken(ctx context.Context, s Seen, t *token, key [32]byte, until time.Time) error {
	return claim(ctx, s, sha256.Sum256([]byte("token\x00"+t.signed)), key, until)
}

func claimMachine(ctx context.Context, s Seen, agent spiffeid.ID, key [32]byte) error {
	return claim(ctx, s, MachineClaim(agent), key, time.Time{})
}

func claim(ctx context.Context, s Seen, what, key [32]byte, until time.Time) error {
	err := s.Claim(ctx, what, key, until)
	if errors.Is(err, ErrSeen) {
		return fmt.Errorf("%w: %w", ErrEvidence, err)
	}
	if err != nil {
		return fmt.Errorf("remember the evidence: %w", err)
	}
	return nil
}

// refused makes a final refusal. No part of the evidence belongs into it but
// names that were checked.
func refused(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrEvidence, fmt.Sprintf(format, args...))
}

// begin checks what every kind of evidence has in common and gives the hash of
// the key.
func begin(ctx context.Context, kind string, payload []byte, key crypto.PublicKey) ([32]byte, error) {
	if err := ctx.Err(); err != nil {
		return [32]byte{}, fmt.Errorf("verify %s evidence: %w", kind, err)
	}
	if len(payload) == 0 || len(payload) > maxEvidence {
		return [32]byte{}, refused("%s evidence of %d bytes, want 1 to %d", kind, len(payload), maxEvidence)
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return [32]byte{}, refused("public key is not usable")
	}
	return sha256.Sum256(der), nil
}

// An object is one JSON object, read strictly: names are compared as they
// stand and none comes twice at any depth.
type object map[string]any

func parseObject(b []byte) (object, error) {
	if !utf8.Valid(b) {
		return nil, errors.New("not UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	v, err := parseValue(d, 0)
	if err != nil {
		return nil, err
	}
	o, ok := v.(map[string]any)
	if !ok {
		return nil, errors.New("not a JSON object")
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("bytes after the JSON object")
	}
	return o, nil
}

func parseValue(d *json.Decoder, depth int) (any, error) {
	bad := errors.New("malformed JSON")
	t, err := d.Token()
	if err != nil {
		return nil, bad
	}
	if t != json.Delim('{') && t != json.Delim('[') {
		return t, nil
	}
	if depth == maxNesting {
		return nil, fmt.Errorf("JSON nested deeper than %d", maxNesting)
	}
	fields, list := map[string]any{}, []any{}
	for d.More() {
		name := ""
		if t == json.Delim('{') {
			k, err := d.Token()
			if err != nil {
				return nil, bad
			}
			name, _ = k.(string) // the decoder allows nothing else before a colon
			if _, twice := fields[name]; twice {
				return nil, errors.New("duplicate name in JSON")
			}
		}
		v, err := parseValue(d, depth+1)
		if err != nil {
			return nil, err
		}
		if t == json.Delim('{') {
			fields[name] = v
		} else {
			list = append(list, v)
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, bad
	}
	if t == json.Delim('{') {
		return fields, nil
	}
	return list, nil
}

// only refuses names beside those given.
func (o object) only(names ...string) error {
	for k := range o {
		if !slices.Contains(names, k) {
			return fmt.Errorf("has a name beside %s", strings.Join(names, ", "))
		}
	}
	return nil
}

// text gives a string that must be there and not be empty.
func (o object) text(name string) (string, error) {
	s, ok := o[name].(string)
	if !ok || s == "" {
		return "", fmt.Errorf("%s is missing or not a text", name)
	}
	return s, nil
}

// child gives the object under a name; an empty one when there is none.
func (o object) child(name string) object {
	c, _ := o[name].(map[string]any)
	return c
}

// binary gives the bytes that a string of standard base64 holds.
func (o object) binary(name string) ([]byte, error) {
	s, err := o.text(name)
	if err != nil {
		return nil, err
	}
	return decode64(base64.StdEncoding, s)
}

// decode64 is strict: the decoder of the library skips line ends.
func decode64(e *base64.Encoding, s string) ([]byte, error) {
	if strings.ContainsAny(s, "\r\n") {
		return nil, errors.New("base64 with a line end")
	}
	b, err := e.Strict().DecodeString(s)
	if err != nil {
		return nil, errors.New("malformed base64")
	}
	return b, nil
}

// readSmall reads a file of at most maxTrust bytes.
func readSmall(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxTrust+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxTrust {
		return nil, fmt.Errorf("%s has more than %d bytes", file, maxTrust)
	}
	return b, nil
}

// readCertificates reads a PEM file that holds certificates and nothing else.
func readCertificates(file string) ([]*x509.Certificate, error) {
	b, err := readSmall(file)
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for len(bytes.TrimSpace(b)) > 0 {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: certificate %d is no CERTIFICATE block of PEM", file, len(out)+1)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: certificate %d: %w", file, len(out)+1, err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s holds no certificate", file)
	}
	return out, nil
}
