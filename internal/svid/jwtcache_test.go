package svid

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// tokens signs one token after another, each for a minute.
type tokens struct {
	t    *testing.T
	key  crypto.Signer
	n    atomic.Int64
	kid  atomic.Pointer[string]
	down atomic.Bool
	gate chan struct{} // when set, signing waits for it
}

func (m *tokens) MintJWT(_ context.Context, entry string, aud []string) (string, error) {
	n := m.n.Add(1)
	if m.gate != nil {
		<-m.gate
	}
	if m.down.Load() {
		return "", errors.New("issuer is down")
	}
	now := time.Now().Unix()
	return signJWT(m.t, "ES256", m.key, fmt.Sprintf(`{"alg":"ES256","kid":%q}`, *m.kid.Load()),
		fmt.Sprintf(`{"sub":"spiffe://example.org/%s","aud":%q,"iat":%d,"exp":%d,"n":%d}`, entry, aud[0], now, now+60, n)), nil
}

func cached(t *testing.T) (*JWTCache, *tokens, func(entry string, aud ...string) string) {
	t.Helper()
	ca := newCA(t, td)
	m := &tokens{t: t, key: newKey(t)}
	kid := "k1"
	m.kid.Store(&kid)
	src := NewSource()
	if err := src.Set(&State{Bundle: ca.bundle(), JWTKeys: map[string]crypto.PublicKey{"k1": m.key.Public()}}); err != nil {
		t.Fatal(err)
	}
	c := NewJWTCache(m, src)
	return c, m, func(entry string, aud ...string) string {
		t.Helper()
		tok, err := c.MintJWT(t.Context(), entry, aud)
		if err != nil {
			t.Fatal(err)
		}
		return tok
	}
}

func TestJWTCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, m, get := cached(t)
		one := get("a", "x", "y")
		if get("a", "y", "x", "x") != one || m.n.Load() != 1 {
			t.Error("the same set of audiences was signed again")
		}
		if get("a", "x") == one || get("b", "x", "y") == one || m.n.Load() != 3 {
			t.Error("another entry or audience got a token that is not its own")
		}
		time.Sleep(29 * time.Second)
		if get("a", "x", "y") != one {
			t.Error("signed again before half of its life")
		}
		time.Sleep(2 * time.Second)
		two := get("a", "x", "y")
		if two == one {
			t.Error("not signed again after half of its life")
		}
		// The issuer goes: what is valid serves until shortly before its end.
		m.down.Store(true)
		time.Sleep(45 * time.Second)
		if get("a", "x", "y") != two {
			t.Error("a valid token was not served while the issuer is down")
		}
		time.Sleep(6 * time.Second)
		if _, err := c.MintJWT(t.Context(), "a", []string{"x", "y"}); err == nil {
			t.Error("a token about to expire was served")
		}
		// A key that left the bundle takes its tokens along.
		m.down.Store(false)
		three := get("a", "x", "y")
		st := *c.source.Current()
		st.JWTKeys = map[string]crypto.PublicKey{"k2": m.key.Public()}
		if err := c.source.Set(&st); err != nil {
			t.Fatal(err)
		}
		kid := "k2"
		m.kid.Store(&kid)
		if get("a", "x", "y") == three {
			t.Error("a token of a withdrawn key was served")
		}
	})
}

func TestJWTCacheSignsOnceForMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, m, _ := cached(t)
		m.gate = make(chan struct{})
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if _, err := c.MintJWT(t.Context(), "a", []string{"x"}); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := c.MintJWT(ctx, "a", []string{"x"}); !errors.Is(err, context.Canceled) {
			t.Errorf("a caller that left: %v", err)
		}
		close(m.gate)
		wg.Wait()
		if n := m.n.Load(); n != 1 {
			t.Errorf("%d signatures for 50 callers at once", n)
		}
	})
}

func TestJWTCacheIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _, get := cached(t)
		for i := range maxCached + 20 {
			get("a", fmt.Sprint(i))
		}
		if n := len(c.held); n > maxCached {
			t.Errorf("%d tokens kept, want at most %d", n, maxCached)
		}
	})
}

func TestJWTCacheKeepsNothingItCannotRead(t *testing.T) {
	src := newCA(t, td).source(id("/a"))
	c := NewJWTCache(jwtMinter{}, src)
	for range 2 {
		if got, err := c.MintJWT(t.Context(), "e", []string{"x"}); err != nil || got != "token of e for x" {
			t.Errorf("got %q, %v", got, err)
		}
	}
}
