package egress

import (
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
	"sallyport/internal/mux"
)

// A crowd counts the connections of each caller, so that none can hold all.
type crowd struct {
	firsts *mux.Budget // of what members hold unread

	mu sync.Mutex // guards what follows
	of map[spiffeid.ID]*member
	// asking are the streams whose request is not answered yet, askingOf those of
	// a caller.
	asking   int
	askingOf map[spiffeid.ID]int
}

// firsts is what the streams of all callers, and all connections of HTTP/2 in tunnels,
// may hold unread of their first windows, half of it those of one caller, for whom
// ownFirst is there whatever others hold.
const firsts, ownFirst = 64 << 20, 256 << 10

// A member is a caller with connections.
type member struct {
	conns  int
	firsts *mux.Budget
}

// connected counts a connection in, unless its caller has too many. What was
// counted in is counted out by parted.
func (g *Gateway) connected(who *caller) bool {
	g.crowd.mu.Lock()
	m := g.crowd.of[who.id]
	if m == nil {
		m = &member{firsts: g.crowd.firsts.Part(firsts/2, ownFirst)}
		g.crowd.of[who.id] = m
	}
	ok := m.conns < g.lim.ConnsPerCaller
	if ok {
		m.conns++
		who.firsts = m.firsts
	}
	g.crowd.mu.Unlock()
	if !ok {
		g.cfg.Metrics.ConnectionsRefused(reporter, "peer").Inc()
		g.refusedConn(&audit.Record{
			Kind: audit.KindTLS, Decision: audit.Deny, Reason: string(ReasonConnCap), Dir: string(mesh.Out), Src: who.id.String(), Peer: who.peer,
			Detail: fmt.Sprintf("%d connections are open, which is the limit of one caller", g.lim.ConnsPerCaller),
		})
	}
	return ok
}

func (g *Gateway) parted(who *caller) {
	g.crowd.mu.Lock()
	defer g.crowd.mu.Unlock()
	m := g.crowd.of[who.id]
	if m.conns--; m.conns == 0 {
		delete(g.crowd.of, who.id)
	}
}

// asks counts a stream in whose request is to be read, unless there are as many
// as there may be connections, which hold the same. It is counted out by answered.
func (g *Gateway) asks(who *caller) bool {
	c := &g.crowd
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.asking >= g.lim.Conns || c.askingOf[who.id] >= g.lim.ConnsPerCaller {
		g.cfg.Metrics.ConnectionsRefused(reporter, "streams").Inc()
		return false
	}
	c.asking++
	c.askingOf[who.id]++
	return true
}

func (g *Gateway) answered(who *caller) {
	c := &g.crowd
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asking--
	if c.askingOf[who.id]--; c.askingOf[who.id] <= 0 {
		delete(c.askingOf, who.id)
	}
}

// What each source may break off before it has brought anything: tunnels, each a
// decision and a connection outside, and handshakes.
const (
	brokenBurst, brokenRate = 500, 200 // per second
	costHandshake           = 5
)

// How many refused connections are recorded one by one: whoever can reach the
// port can cause them, and must not be able to fill the disk.
const (
	refusedBurst = 100
	refusedEvery = 100 * time.Millisecond
)

// A flood lets a burst of records through and then one in each interval. The
// others are counted.
type flood struct {
	mu   sync.Mutex // guards what follows
	full time.Time  // when the burst will be whole again
	held uint64
}

// take reports whether one more record may be written, and how many were not
// since the last one that was.
func (f *flood) take(now time.Time) (held uint64, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.full.Before(now) {
		f.full = now
	}
	if f.full.Sub(now) > (refusedBurst-1)*refusedEvery {
		f.held++
		return 0, false
	}
	f.full = f.full.Add(refusedEvery)
	held, f.held = f.held, 0
	return held, true
}

// more counts one that gets no record of its own.
func (f *flood) more() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held++
}

// rest is what take has counted and nobody has recorded.
func (f *flood) rest() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	held := f.held
	f.held = 0
	return held
}

// refusedConn records a connection that was refused before it asked anything.
// In a flood only their number is recorded.
func (g *Gateway) refusedConn(rec *audit.Record) {
	held, ok := g.flood.take(time.Now())
	if !ok {
		return
	}
	g.refusedMore(held)
	if err := g.cfg.Audit.Append(rec); err != nil {
		g.cfg.Log.Error("record of a refused connection was not written", "err", err)
	}
}

// refusedMore records how many connections were refused without a record of
// their own.
func (g *Gateway) refusedMore(n uint64) {
	if n == 0 {
		return
	}
	rec := &audit.Record{Kind: audit.KindTLS, Decision: audit.Deny, Reason: "flood", Detail: fmt.Sprintf("%d more connections were refused since the record of the last one", n)}
	if err := g.cfg.Audit.Append(rec); err != nil {
		g.cfg.Log.Error("number of refused connections was not written", "n", n, "err", err)
	}
}
