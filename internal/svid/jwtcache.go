package svid

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// maxCached bounds the tokens that are kept: a workload asks for a handful
	// of audiences, and one that asks for more costs only itself.
	maxCached = 512
	// minLeft is the least life of a token that is handed out while the issuer
	// does not answer: less would expire on its way.
	minLeft = 10 * time.Second
)

// A JWTCache keeps the JWT-SVIDs that a JWTMinter signed, by entry and set of
// audiences, and has a new one signed from half of its life on. While that
// fails, the old one serves until shortly before its end. A token whose key is
// no longer in the bundle is dropped at once. It is safe for concurrent use
// and holds no goroutine.
type JWTCache struct {
	minter JWTMinter
	source *Source

	mu   sync.Mutex // guards held
	held map[string]*heldJWT
}

// A heldJWT is one place of the cache. turn holds a token while somebody has
// it signed, so that many callers lead to one request.
type heldJWT struct {
	turn chan struct{}

	// The rest belongs to who has the turn, but for end.
	token, kid string
	half       time.Time

	end time.Time // guarded by the cache's mu
}

// NewJWTCache puts a cache before m. The source says which keys are trusted.
func NewJWTCache(m JWTMinter, source *Source) *JWTCache {
	return &JWTCache{minter: m, source: source, held: map[string]*heldJWT{}}
}

// MintJWT is JWTMinter.
func (c *JWTCache) MintJWT(ctx context.Context, entryID string, audience []string) (string, error) {
	set := slices.Clone(audience)
	slices.Sort(set)
	set = slices.Compact(set)
	now := c.source.now()
	h := c.place(entryID+"\x00"+strings.Join(set, "\x00"), now)
	select {
	case h.turn <- struct{}{}:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	defer func() { <-h.turn }()
	now = c.source.now()
	good := h.token != "" && c.trusted(h.kid)
	if good && now.Before(h.half) {
		return h.token, nil
	}
	token, err := c.minter.MintJWT(ctx, entryID, set)
	if err != nil {
		if good && now.Before(c.endOf(h).Add(-minLeft)) {
			return h.token, nil
		}
		return "", err
	}
	kid, issued, end, err := tokenLife(token)
	if err != nil || !now.Before(end) {
		return token, nil //nolint:nilerr // what cannot be read is passed on and not kept
	}
	if issued.IsZero() || issued.After(now) {
		issued = now
	}
	h.token, h.kid, h.half = token, kid, issued.Add(end.Sub(issued)/2)
	c.mu.Lock()
	h.end = end
	c.mu.Unlock()
	return token, nil
}

func (c *JWTCache) endOf(h *heldJWT) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return h.end
}

// place finds or makes the place of a token. A full cache lets go of what has
// expired, or else of what expires first.
func (c *JWTCache) place(key string, now time.Time) *heldJWT {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h := c.held[key]; h != nil {
		return h
	}
	if len(c.held) >= maxCached {
		var first string
		for k, h := range c.held {
			if !now.Before(h.end) {
				delete(c.held, k)
			} else if first == "" || h.end.Before(c.held[first].end) {
				first = k
			}
		}
		if len(c.held) >= maxCached {
			delete(c.held, first)
		}
	}
	h := &heldJWT{turn: make(chan struct{}, 1)}
	c.held[key] = h
	return h
}

// trusted reports whether verifiers that know our bundle still accept the key.
func (c *JWTCache) trusted(kid string) bool {
	st := c.source.Current()
	return st != nil && st.JWTKeys[kid] != nil
}

// tokenLife reads a token of our own issuer, without checking it.
func tokenLife(token string) (kid string, issued, end time.Time, err error) {
	t, err := jwtSVID.Parse(token)
	if err != nil {
		return "", issued, end, fmt.Errorf("read JWT: %w", err)
	}
	if issued, _, err = t.Claims.Time("iat"); err != nil {
		return "", issued, end, err
	}
	end, has, err := t.Claims.Time("exp")
	if err == nil && !has {
		err = errors.New("exp is missing")
	}
	return t.KeyID, issued, end, err
}
