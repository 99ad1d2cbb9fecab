package attest

import (
	"context"
	"crypto/sha256"
	"errors"
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
		return "", errors.New("token is unknown")
	case !t.used.IsZero() && (t.key != key || now.Sub(t.used) > 5*time.Minute):
		return "", errors.New("token was used")
	case t.used.IsZero() && !now.Before(t.expires):
		return "", errors.New("token has expired")
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
}
