package shadow

import (
	"sync"
	"time"
)

const (
	// maxTraces is how many traces are remembered, and maxPerPeer how many of one
	// peer: none makes room for itself by the traces of others.
	maxTraces, maxPerPeer = 16 << 10, 1 << 10
	// grace is for how long after its last call a trace is believed: what an
	// application still does for it comes at once.
	grace = 10 * time.Second
)

// Traces are those for which a peer has said, by an identity that it has proved,
// that they are done for a shadow. An application can say so of any call of its
// own, and would be believed by nobody who copies calls: it would hide them. For
// the same reason a trace is believed only while a call of it is here, and for a
// moment after. The zero value knows none; it is safe for concurrent use.
type Traces struct {
	mu    sync.Mutex // guards the fields below
	of    map[[16]byte]*carried
	peers map[string]int // how many traces are each one's
	swept time.Time
}

// carried is a trace with the calls of it that are here.
type carried struct {
	peer  string
	calls int
	left  time.Time // when there were none any more
}

func (c *carried) over(now time.Time) bool { return c.calls == 0 && now.Sub(c.left) >= grace }

// Begin remembers a trace as long as a call of it is here, and says whether it
// does: not when there are too many. After true, End follows.
func (t *Traces) Begin(peer string, id [16]byte) bool {
	if t == nil {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.of[id]
	if c == nil {
		if t.full(peer) {
			t.sweep(time.Now())
		}
		if t.full(peer) {
			return false
		}
		if t.of == nil {
			t.of, t.peers = map[[16]byte]*carried{}, map[string]int{}
		}
		c = &carried{peer: peer}
		t.of[id] = c
		t.peers[peer]++
	}
	c.calls++
	return true
}

// End says that a call has ended that has begun.
func (t *Traces) End(id [16]byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.of[id]; c != nil {
		c.calls--
		c.left = time.Now()
	}
}

func (t *Traces) full(peer string) bool {
	return len(t.of) >= maxTraces || t.peers[peer] >= maxPerPeer
}

// sweep forgets what is over, at most once a second: it looks at all.
func (t *Traces) sweep(now time.Time) {
	if now.Sub(t.swept) < time.Second {
		return
	}
	t.swept = now
	for id, c := range t.of {
		if !c.over(now) {
			continue
		}
		delete(t.of, id)
		if t.peers[c.peer]--; t.peers[c.peer] == 0 {
			delete(t.peers, c.peer)
		}
	}
}

// Has says whether a trace is believed.
func (t *Traces) Has(id [16]byte) bool {
	if t == nil {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.of[id]
	return c != nil && !c.over(time.Now())
}
