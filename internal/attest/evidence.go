package attest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/jose"
)

const (
	maxEvidence = 64 << 10 // bytes of a payload or an answer; a chain of five needs 8 KiB
	maxTrust    = 1 << 20  // bytes of a file or a page with keys we trust
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
func claimToken(ctx context.Context, s Seen, t *jose.Token, key [32]byte, until time.Time) error {
	return claim(ctx, s, sha256.Sum256(fmt.Appendf(nil, "token\x00%s", t.ID())), key, until)
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

// binary gives the bytes that a string of standard base64 holds.
func binary(o jose.Object, name string) ([]byte, error) {
	s, err := o.Text(name)
	if err != nil {
		return nil, err
	}
	return jose.Decode64(base64.StdEncoding, s)
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
