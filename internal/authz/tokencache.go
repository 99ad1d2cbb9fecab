package authz

import (
	"bytes"
	"container/list"
	"crypto/sha256"
	"sync"
	"time"
)

const (
	cacheShards = 64
	// cacheBytes bounds the whole cache, by what its tokens are reckoned to
	// take: their text four times, for itself, claims and maps, and cacheEntry.
	cacheBytes = 64 << 20
	cacheEntry = 1 << 10
)

// A tokenCache keeps tokens that were verified, by their exact bytes. Of the
// signature, the part that makes a token worth stealing, it holds only the
// SHA-256, by which a token is found; the rest is compared as it stands, which
// costs less than hashing it would. Failures are not kept: whoever makes
// tokens up would fill it.
type tokenCache struct {
	shard [cacheShards]cacheShard
}

type cacheShard struct {
	mu    sync.Mutex // guards the rest
	held  map[tokenKey]*list.Element
	order list.List // of *cached, the one used last in front
	bytes int
}

// A tokenKey is the SHA-256 of the signature, as it is written.
type tokenKey [sha256.Size]byte

type cached struct {
	key    tokenKey
	signed string // the text before the signature
	e      *verified
}

// cut takes a token apart into what is signed and the key of its signature.
func cut(text []byte) (signed []byte, key tokenKey) {
	i := bytes.LastIndexByte(text, '.') + 1
	return text[:i], sha256.Sum256(text[i:])
}

func newTokenCache() *tokenCache {
	c := new(tokenCache)
	for i := range c.shard {
		c.shard[i].held = map[tokenKey]*list.Element{}
	}
	return c
}

// of spreads tokens over the shards. Who makes tokens cannot choose a hash at
// less cost than many signatures of the issuer.
func (c *tokenCache) of(key tokenKey) *cacheShard { return &c.shard[key[0]%cacheShards] }

func cost(e *verified) int { return 4*e.size + cacheEntry }

func (c *tokenCache) get(text []byte, now time.Time) *verified {
	signed, key := cut(text)
	s := c.of(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	el := s.held[key]
	if el == nil {
		return nil
	}
	known := el.Value.(*cached)
	if known.signed != string(signed) {
		return nil // an old signature under a new text
	}
	if !now.Before(known.e.until) {
		s.remove(el)
		return nil
	}
	s.order.MoveToFront(el)
	return known.e
}

// put keeps a token that was verified just now.
func (c *tokenCache) put(text []byte, e *verified, now time.Time) {
	if !now.Before(e.until) {
		return
	}
	signed, key := cut(text)
	s := c.of(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	if el := s.held[key]; el != nil {
		s.remove(el)
	}
	s.held[key] = s.order.PushFront(&cached{key, string(signed), e})
	s.bytes += cost(e)
	for s.bytes > cacheBytes/cacheShards {
		s.remove(s.order.Back())
	}
}

// remove is called with the lock held.
func (s *cacheShard) remove(el *list.Element) {
	old := s.order.Remove(el).(*cached)
	delete(s.held, old.key)
	s.bytes -= cost(old.e)
}
