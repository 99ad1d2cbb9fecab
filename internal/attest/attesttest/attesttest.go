// Package attesttest is the suite that every node verifier must pass: forged,
// stale, foreign and replayed evidence is refused.
//
// It is imported by tests only and keeps no goroutine after a test.
package attesttest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// A Verifier is what the suite tests: attest.NodeVerifier.
type Verifier interface {
	Verify(ctx context.Context, payload []byte, key crypto.PublicKey) (spiffeid.ID, []mesh.Selector, error)
}

// A Fixture is a verifier in a fresh world, with evidence for it.
type Fixture struct {
	Verifier Verifier
	// Agent is who Good proves.
	Agent spiffeid.ID
	// Good is right, fresh and unused.
	Good []byte
	// Stale were right once and are too old now.
	Stale [][]byte
	// Foreign are right for another trust domain or another issuer.
	Foreign [][]byte
	// Forged are made without the secret, beside those the suite makes.
	Forged [][]byte
	// SingleUse says that Good is spent by the first key that shows it.
	SingleUse bool
	// PassGrace lets the time go by in which a lost reply is repeated. Nil
	// when there is none.
	PassGrace func()
}

// Key makes a key for which a node may ask a certificate.
func Key(t testing.TB) crypto.PublicKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k.Public()
}

// Run tests the verifier of each fixture that fresh makes.
func Run(t *testing.T, fresh func(t *testing.T) Fixture) {
	t.Run("good evidence names its agent, again after a lost reply", func(t *testing.T) {
		f, k := fresh(t), Key(t)
		for range 2 {
			accept(t, f, f.Good, k)
		}
	})
	t.Run("replayed with another key is refused", func(t *testing.T) {
		f := fresh(t)
		if !f.SingleUse {
			return
		}
		k := Key(t)
		accept(t, f, f.Good, k)
		refuse(t, f, "replay", f.Good, Key(t))
		accept(t, f, f.Good, k) // the thief has not locked the owner out
	})
	t.Run("replayed with the same key after the grace window is refused", func(t *testing.T) {
		f, k := fresh(t), Key(t)
		if f.PassGrace == nil {
			return
		}
		accept(t, f, f.Good, k)
		f.PassGrace()
		refuse(t, f, "late replay", f.Good, k)
	})
	t.Run("forged is refused", func(t *testing.T) {
		f, k := fresh(t), Key(t)
		for _, p := range append(forge(f.Good), f.Forged...) {
			refuse(t, f, "forged", p, k)
		}
		accept(t, f, f.Good, k)
	})
	t.Run("stale is refused", func(t *testing.T) {
		f := fresh(t)
		for _, p := range f.Stale {
			refuse(t, f, "stale", p, Key(t))
		}
	})
	t.Run("foreign is refused", func(t *testing.T) {
		f := fresh(t)
		for _, p := range f.Foreign {
			refuse(t, f, "foreign", p, Key(t))
		}
	})
	t.Run("without a usable key is refused", func(t *testing.T) {
		f := fresh(t)
		refuse(t, f, "nil key", f.Good, nil)
		refuse(t, f, "odd key", f.Good, "not a key")
		accept(t, f, f.Good, Key(t))
	})
	t.Run("a call that was given up does not spend it", func(t *testing.T) {
		f := fresh(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if id, _, err := f.Verifier.Verify(ctx, f.Good, Key(t)); err == nil {
			t.Errorf("accepted as %s after cancel", id)
		}
		accept(t, f, f.Good, Key(t))
	})
	t.Run("of many at once with different keys one wins", func(t *testing.T) { race(t, fresh(t)) })
}

func race(t *testing.T, f Fixture) {
	if !f.SingleUse {
		return
	}
	const n = 16
	var wg sync.WaitGroup
	won := make(chan spiffeid.ID, n)
	for range n {
		k := Key(t)
		wg.Go(func() {
			if id, _, err := f.Verifier.Verify(t.Context(), f.Good, k); err == nil {
				won <- id
			}
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Errorf("%d of %d succeeded, want 1", len(won), n)
	}
}

// forge makes what somebody would who has seen evidence but not the secret.
func forge(good []byte) [][]byte {
	out := [][]byte{nil, {}, {0}, bytes.Repeat([]byte("A"), 1<<20), good[:len(good)-1], append(bytes.Clone(good), good[0]), bytes.ToUpper(append(bytes.Clone(good), 'x'))}
	for i := 0; i < len(good); i += 1 + len(good)/16 {
		p := bytes.Clone(good)
		p[i] ^= 1
		out = append(out, p)
	}
	return out
}

func accept(t *testing.T, f Fixture, payload []byte, key crypto.PublicKey) {
	t.Helper()
	id, _, err := f.Verifier.Verify(t.Context(), payload, key)
	if err != nil || id != f.Agent {
		t.Errorf("good evidence: got %s, %v; want %s", id, err, f.Agent)
	}
}

func refuse(t *testing.T, f Fixture, what string, payload []byte, key crypto.PublicKey) {
	t.Helper()
	id, sel, err := f.Verifier.Verify(t.Context(), payload, key)
	if err == nil {
		t.Errorf("%s evidence (%d bytes) accepted as %s", what, len(payload), id)
	}
	if !id.IsZero() || sel != nil {
		t.Errorf("%s evidence: refusal names %s, %v", what, id, sel)
	}
	if err != nil && len(payload) > 8 && bytes.Contains([]byte(err.Error()), payload) {
		t.Errorf("%s evidence: the refusal repeats it", what)
	}
}
