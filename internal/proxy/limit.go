package proxy

import (
	"sync"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/authz"
	"sallyport/internal/mux"
	"sallyport/internal/telemetry"
)

// An anteroom has the connections of peers that have proved nothing yet.
type anteroom struct {
	*mux.Anteroom
	waiting *telemetry.Gauge
	putOut  *telemetry.Counter
}

// enter takes a connection in. The order of calls is the order of arrival: a
// goroutine for each would mix it up, and put out who came last.
func (a *anteroom) enter(c *conn) {
	var crowded bool
	if c.place, crowded = a.Enter(c.from, c.expel); crowded {
		a.putOut.Inc()
	}
	a.waiting.Set(float64(a.Len()))
}

func (a *anteroom) leave(c *conn) {
	a.Leave(c.place)
	a.waiting.Set(float64(a.Len()))
}

// A crowd bounds the connections and the calls of one identity, so that none of
// them can take all that there are.
type crowd struct {
	max      int   // connections
	maxCalls int64 // in flight
	firsts   *mux.Budget

	mu sync.Mutex // guards of, and the connections of members
	of map[spiffeid.ID]*member
}

// A member is one identity with connections.
type member struct {
	conns int
	calls atomic.Int64
	// firsts is what its connections of HTTP/2 and its streams may hold unread.
	firsts *mux.Budget
	// judge has the rules of the identity, which all of its connections share:
	// they are many times what else a connection needs.
	judge atomic.Pointer[portJudge]
}

// A portJudge judges calls to one port.
type portJudge struct {
	port  uint16
	judge *authz.Conn
}

// judgeOf gives the judge of calls to the port, made anew when that has changed.
func (m *member) judgeOf(port uint16, anew func() *authz.Conn) *authz.Conn {
	j := m.judge.Load()
	if j == nil || j.port != port {
		j = &portJudge{port, anew()}
		m.judge.Store(j)
	}
	return j.judge
}

// enter counts a connection; nil when the identity has as many as it may.
func (c *crowd) enter(id spiffeid.ID) *member {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.of[id]
	if m == nil {
		if c.of == nil {
			c.of = map[spiffeid.ID]*member{}
		}
		m = &member{firsts: c.firsts.Part(firsts/2, ownFirst)}
		c.of[id] = m
	}
	if m.conns >= c.max {
		return nil
	}
	m.conns++
	return m
}

func (c *crowd) leave(id spiffeid.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.of[id]
	if m.conns--; m.conns == 0 {
		delete(c.of, id)
	}
}
