package authz

import (
	"container/list"
	"sync"
	"time"
)

const (
	cacheShards = 64
	// cacheBytes bounds the whole cache, by what its tokens are reckoned to
	// take: their text thrice, for claims and maps, and cacheEntry.
	cacheBytes = 64 << 20
	cacheEntry = 1 << 10
)

// A tokenCache keeps tokens that were verified, by the SHA-256 of their exact
// bytes. Failures are not kept: whoever makes tokens up would fill it.
type tokenCache struct {
	shard [cacheShards]cacheShard
}

type cacheShard struct {
	mu    sync.Mutex // guards the rest
	held  map[[32]byte]*list.Element
	order list.List // of *cached, the one used last in front
	bytes int
}

type cached struct {
	key [32]byte
	e   *verified
}

func newTokenCache() *tokenCache {
	c := new(tokenCache)
	for i := range c.shard {
		c.shard[i].held = map[[32]byte]*list.Element{}
	}
	return c
}

// of spreads tokens over the shards. Who makes tokens cannot choose a hash at
// less cost than many signatures of the issuer.
func (c *tokenCache) of(key [32]byte) *cacheShard { return &c.shard[key[0]%cacheShards] }

func cost(e *verified) int { return 3*e.size + cacheEntry }

func (c *tokenCache) get(key [32]byte, now time.Time) *verified {
	s := c.of(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	el := s.held[key]
	if el == nil {
		return nil
	}
	e := el.Value.(*cached).e
	if !now.Before(e.until) {
		s.remove(el)
		return nil
	}
	s.order.MoveToFront(el)
	return e
}

func (c *tokenCache) put(key [32]byte, e *verified, now time.Time) {
	if !now.Before(e.until) {
		return
	}
	s := c.of(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	if el := s.held[key]; el != nil {
		s.remove(el)
	}
	s.held[key] = s.order.PushFront(&cached{key, e})
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
