package attest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/attest/attesttest"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// memTokens is the contract of Tokens in its shortest form.
type memTokens struct {
	mu     sync.Mutex // guards tokens
	tokens map[[32]byte]*memToken
}

type memToken struct {
	agent   string
	expires time.Time
	key     [32]byte
	used    time.Time
}

func (m *memTokens) add(text, agent string, expires time.Time) []byte {
	m.tokens[sha256.Sum256([]byte(text))] = &memToken{agent: agent, expires: expires}
	return []byte(text)
}

func (m *memTokens) Redeem(ctx context.Context, token, key [32]byte, now time.Time) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.tokens[token]
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case t == nil:
		return "", fmt.Errorf("token is unknown: %w", ErrEvidence)
	case !t.used.IsZero() && (t.key != key || now.Sub(t.used) > 5*time.Minute):
		return "", fmt.Errorf("token was used: %w", ErrEvidence)
	case t.used.IsZero() && !now.Before(t.expires):
		return "", fmt.Errorf("token has expired: %w", ErrEvidence)
	case t.used.IsZero():
		t.key, t.used = key, now
	}
	return t.agent, nil
}

func TestJoinToken(t *testing.T) {
	attesttest.Run(t, func(t *testing.T) attesttest.Fixture {
		now := time.Now()
		m := &memTokens{tokens: map[[32]byte]*memToken{}}
		v := NewJoinToken(td, m).(*joinToken)
		v.now = func() time.Time { return now }
		return attesttest.Fixture{
			Verifier:  v,
			Agent:     spiffeid.RequireFromString("spiffe://example.org/spire/agent/join_token/node-1"),
			Good:      m.add("3f6a9c0d51b24e7788aa00112233445566778899aabbccddeeff001122334455", "node-1", now.Add(time.Hour)),
			Stale:     [][]byte{m.add("stale-token-of-yesterday", "node-1", now.Add(-time.Second))},
			Foreign:   [][]byte{[]byte("a-token-of-another-issuer")},
			Forged:    [][]byte{[]byte("node-1"), m.add("bad-name-token", "../../server", now.Add(time.Hour))},
			SingleUse: true,
			PassGrace: func() { now = now.Add(6 * time.Minute) },
		}
	})
}

func TestOutageIsNotARefusal(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err := NewJoinToken(td, &memTokens{}).Verify(ctx, []byte("x"), attesttest.Key(t))
	if err == nil || errors.Is(err, ErrEvidence) {
		t.Errorf("got %v, want an error that may be tried again", err)
	}
	full := errors.New("disk is full")
	_, _, err = NewJoinToken(td, brokenTokens{full}).Verify(t.Context(), []byte("x"), attesttest.Key(t))
	if !errors.Is(err, full) || errors.Is(err, ErrEvidence) {
		t.Errorf("got %v, want the store's own error, which may be tried again", err)
	}
}

type brokenTokens struct{ err error }

func (b brokenTokens) Redeem(context.Context, [32]byte, [32]byte, time.Time) (string, error) {
	return "", b.err
}
