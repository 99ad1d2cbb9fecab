package proxy

import (
	"container/list"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/telemetry"
)

// An anteroom bounds the connections of peers that have proved nothing yet. Who
// has been there longest must go first: an honest handshake takes milliseconds.
type anteroom struct {
	max     int
	waiting *telemetry.Gauge
	putOut  *telemetry.Counter

	mu   sync.Mutex // guards here
	here list.List  // of *conn, in the order of arrival
}

// enter takes a connection in. The order of calls is the order of arrival: a
// goroutine for each would mix it up, and put out who came last.
func (a *anteroom) enter(c *conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c.place = a.here.PushBack(c)
	if a.here.Len() > a.max {
		longest := a.here.Front()
		a.here.Remove(longest)
		longest.Value.(*conn).Close()
		a.putOut.Inc()
	}
	a.waiting.Set(float64(a.here.Len()))
}

func (a *anteroom) leave(c *conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.here.Remove(c.place) // does nothing when it was put out
	a.waiting.Set(float64(a.here.Len()))
}

// A crowd bounds the connections of one identity, so that none of them can
// take all that there are.
type crowd struct {
	max int

	mu sync.Mutex // guards n
	n  map[spiffeid.ID]int
}

// enter is false when the identity has as many as it may.
func (c *crowd) enter(id spiffeid.ID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n[id] >= c.max {
		return false
	}
	if c.n == nil {
		c.n = map[spiffeid.ID]int{}
	}
	c.n[id]++
	return true
}

func (c *crowd) leave(id spiffeid.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n[id]--; c.n[id] == 0 {
		delete(c.n, id)
	}
}
