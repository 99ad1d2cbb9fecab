package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/authz"
	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/mux"
	"sallyport/internal/socket"
	"sallyport/internal/telemetry"
)

// A listener accepts connections and knows the open ones.
type listener struct {
	Shared
	// serve handles one connection until it ends. It need not close it.
	serve func(ctx context.Context, c *conn)
	// arrive is told of each connection in the order of arrival, before any
	// goroutine of its own runs. Optional.
	arrive func(c *conn)

	opened   *telemetry.Gauge // the connections in open
	draining atomic.Bool
	inFlight atomic.Int64
	panics   atomic.Int64
	bodies   *mux.Budget // of connections of HTTP/2
	firsts   *mux.Budget // the same, of who has proved no identity
	// calm is with sources that break off what they have begun, calmOf with
	// identities, which are charged in the place of their source once they are
	// proved; nil bears all.
	calm   *mux.Calm[mux.Source]
	calmOf *mux.Calm[spiffeid.ID]
	// vain is with sources of connections that are broken off, whoever has proved to
	// be there: the handshakes of a worn one wait for each other.
	vain  *mux.Calm[mux.Source]
	costs int  // of that, for a connection; a call costs 1
	rests bool // whom it bears no more waits a little, and is not closed

	mu       sync.Mutex // guards the fields below
	open     map[*conn]struct{}
	toldFull time.Time
	resting  *time.Timer // closes what carries no call
}

// A conn is one downstream connection.
type conn struct {
	net.Conn
	// on is the connection that this one is a stream of; nil for one that is not.
	on *conn
	// from is where it comes from, place where it waits until its peer has proved
	// an identity.
	from  mux.Source
	place *mux.Place
	// state orders the end of an idle connection against its next call.
	state atomic.Int32

	mu      sync.Mutex // guards the fields below
	up      net.Conn   // what the call in flight talks to
	cut     bool
	left    bool          // by the client, in the middle of a call
	out     chan struct{} // closed when it has to go while it waits; nil: it does not
	who     *peer         // the peer of an inbound connection, once it is known
	tunnel  bool          // it was upgraded, or leads through a gateway
	call    *authz.Call   // what the inbound call in flight was judged by
	carried bool          // it has had such a call
	through *http1.Tunnel
	shared  shared // what serves it when streams carry its calls
}

// A shared connection has streams or lanes, which carry the calls.
type shared interface {
	// Drain has it end with its last call, of which the peer is told.
	Drain()
}

// The states of a conn.
const (
	idle int32 = iota
	busy
	ended
)

// begin marks the connection as carrying a call; false means that the drain
// has closed it first.
func (c *conn) begin() bool { return c.state.CompareAndSwap(idle, busy) }

// rest marks the connection as idle.
func (c *conn) rest() { c.state.CompareAndSwap(busy, idle) }

// end closes the connection if it carries no call.
func (c *conn) end() bool {
	if !c.state.CompareAndSwap(idle, ended) {
		return false
	}
	c.refuse()
	c.Close()
	return true
}

// bind says what the call talks to from now on, nil for nothing, and what it
// was judged by if it was. It is false when the connection has been severed.
func (c *conn) bind(up net.Conn, call *authz.Call) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.up, c.call = up, call
	c.carried = c.carried || call != nil
	return !c.cut
}

// hasCarried says whether the connection has had a call that was judged. It is not
// look, which would take room on the stack of everybody who waits.
func (c *conn) hasCarried() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.carried
}

// sever closes the connection and what its call talks to, so that whoever
// waits for either wakes.
func (c *conn) sever() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut = true
	if c.up != nil {
		closeNow(c.up)
	}
	c.Close()
}

// hangUp is sever when the client has broken off what is under way. One whose tunnel
// was parted has broken off nothing, and the other end is still being told farewell.
func (c *conn) hangUp() {
	c.mu.Lock()
	parting := c.cut && c.through != nil
	c.left = c.left || !parting
	c.mu.Unlock()
	if !parting {
		c.sever()
	}
}

// hungUp says whether that was so.
func (c *conn) hungUp() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.left
}

// leads says which tunnel the connection is an end of.
func (c *conn) leads(t *http1.Tunnel) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.through = t
}

// part is sever for a connection whose ends can be told, by a code of RFC 6455.
func (c *conn) part(code uint16, within time.Duration) {
	c.mu.Lock()
	c.cut = true
	t := c.through
	c.mu.Unlock()
	if t != nil {
		t.Part(code, within)
	}
	c.sever()
}

// abort closes the connection such that the peer cannot take what it has got
// so far for the whole.
func (c *conn) abort() {
	switch t := c.Conn.(type) {
	case interface{ SetLinger(sec int) error }:
		_ = t.SetLinger(0) // a connection that is closed already needs none
	case *http2.Lane:
		_ = t.Reset(http2.Internal) // it never fails
	}
	c.Close()
}

// run accepts from ln until ctx ends, then lets the calls in flight finish
// within the drain timeout. It serves one listener in its life.
func (l *listener) run(ctx context.Context, ln net.Listener) error {
	l.mu.Lock()
	l.open = map[*conn]struct{}{}
	l.mu.Unlock()
	l.opened = l.Metrics.Connections(l.Reporter, "open")
	defer l.Metrics.Saturation(l.Reporter, "connections", func() float64 { return float64(l.carries()) / float64(l.MaxConns) })()
	defer l.Metrics.Saturation(l.Reporter, "calls", func() float64 { return float64(l.inFlight.Load()) / float64(l.MaxInFlight) })()
	defer l.rested()
	hard, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	var wg sync.WaitGroup
	stop := context.AfterFunc(ctx, func() {
		l.draining.Store(true)
		ln.Close()
	})
	defer stop()
	err := l.accept(ctx, ln, func(c *conn) {
		wg.Add(1)
		go func() {
			defer func() {
				l.survived(c, recover())
				l.forget(c)
				wg.Done()
			}()
			if !l.rest(hard, c) {
				return
			}
			l.serve(hard, c)
		}()
	})
	ln.Close()
	l.yield(true)
	over := func() {
		cut()
		l.severAll()
	}
	timer := time.AfterFunc(l.DrainTimeout, over)
	defer timer.Stop()
	if l.Now != nil {
		defer context.AfterFunc(l.Now, over)()
	}
	wg.Wait()
	return err
}

// yield has the open connections end with the call that they carry, or the next
// one: its answer says so. False takes that back for those that are left.
func (l *listener) yield(on bool) {
	l.draining.Store(on)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.resting != nil {
		l.resting.Stop()
		l.resting = nil
	}
	if !on {
		return
	}
	for c := range l.open {
		c.leave() // the peer must know before its streams end
	}
	for c := range l.open {
		if c.on != nil {
			c.end() // which tells the peer that nothing was acted on
		}
	}
	l.resting = time.AfterFunc(min(l.DrainTimeout/4, restGrace), l.closeIdle)
}

// rested stops what yield has started.
func (l *listener) rested() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.resting != nil {
		l.resting.Stop()
	}
}

// restGrace is how long a connection without a call may wait for one while the
// listener yields. To close it at once could meet a request on its way.
const restGrace = time.Second

// carries is how many connections are open, streams counted with them.
func (l *listener) carries() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.open)
}

// survive keeps a panic to its connection.
func (l *listener) survive(c *conn) { l.survived(c, recover()) }

func (l *listener) survived(c *conn, p any) {
	if p != nil {
		l.panicked(p)
		c.sever()
	}
}

func (l *listener) panicked(p any) {
	l.panics.Add(1)
	l.Log.Error("serving a connection panicked; it was closed", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
}

func (l *listener) accept(ctx context.Context, ln net.Listener, start func(*conn)) error {
	var wait time.Duration
	for {
		nc, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				nc.Close()
			}
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			// Out of descriptors, most likely: what is open goes on, and
			// accepting is tried again.
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			l.Log.Error("accept failed", "err", err, "retry_in", wait)
			select {
			case <-time.After(wait):
			case <-ctx.Done():
			}
			continue
		}
		wait = 0
		if c := (&conn{Conn: nc, from: mux.SourceOf(nc.RemoteAddr())}); l.bears(c) && l.admit(c) {
			if l.arrive != nil {
				l.arrive(c)
			}
			start(c)
		} else {
			nc.Close()
		}
	}
}

// The limits that close connections, as they are counted.
const (
	limitTotal      = "total"
	limitPeer       = "peer"
	limitHandshakes = "handshakes"
	limitResets     = "resets"
)

// What each source may break off: calls, connections in the middle of one, and
// handshakes. A workload is held to less at its own door, so that it is stopped
// there before its proxy is at that of a peer, for all on the connection.
const (
	brokenBurst, brokenRate = 2000, 1000 // per second
	ownBurst, ownRate       = 1000, 500
	// restOfOwn is how long a new connection waits, see rest.
	restOfOwn = 20 * time.Millisecond
	// costHandshake is what a connection with a handshake costs, in calls.
	costHandshake = 10
)

// bears says whether new connections of a source are taken: not while it breaks
// off so much that the others would notice.
func (l *listener) bears(c *conn) bool {
	if l.rests || !l.calm.Over(c.from) {
		return true
	}
	l.turnAway(limitResets, "from", netip.Prefix(c.from))
	return false
}

// rest has a new connection of a workload that floods its own door wait, since
// all its connections have one source; false when it was reset meanwhile, which
// has then cost next to nothing.
func (l *listener) rest(ctx context.Context, c *conn) bool {
	if !l.rests || !l.calm.Over(c.from) {
		return true
	}
	if c.outlasts(ctx, restOfOwn) {
		return true
	}
	l.brokenOff(c, l.costs)
	return false
}

// outlasts has the connection wait; false when it was reset meanwhile, or expelled.
func (c *conn) outlasts(ctx context.Context, wait time.Duration) bool {
	out := make(chan struct{})
	c.mu.Lock()
	c.out = out
	c.mu.Unlock()
	if socket.Gone(c.Conn) { // perhaps expelled before it waited
		return false
	}
	select {
	case <-time.After(wait):
	case <-ctx.Done():
	case <-out:
	}
	c.mu.Lock()
	c.out = nil
	c.mu.Unlock()
	return !socket.Gone(c.Conn)
}

// expel closes the connection, and ends its wait.
func (c *conn) expel() {
	c.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.out != nil {
		close(c.out)
		c.out = nil
	}
}

// brokenOff takes note of something that the peer has broken off; false when that
// is too much. It is charged to whoever is proved to have done it: neighbours at
// its address have not.
func (l *listener) brokenOff(c *conn, cost int) bool {
	if who := c.look().who; who != nil && l.calmOf != nil {
		return l.calmOf.Spend(who.id, cost)
	}
	return l.calm.Spend(c.from, cost)
}

// fullEvery is how often a listener that is full says so.
const fullEvery = 10 * time.Second

// admit takes the connection into the open ones unless there are too many.
func (l *listener) admit(c *conn) bool {
	l.mu.Lock()
	room := len(l.open) < l.MaxConns
	if room {
		l.open[c] = struct{}{}
		l.opened.Add(1)
	}
	l.mu.Unlock()
	if !room {
		l.turnAway(limitTotal, "limit", l.MaxConns)
	}
	return room
}

// turnAway counts a connection that a limit closes, and says so now and then.
func (l *listener) turnAway(limit string, about ...any) {
	l.Metrics.ConnectionsRefused(l.Reporter, limit).Inc()
	l.mu.Lock()
	now := time.Now()
	tell := now.Sub(l.toldFull) >= fullEvery
	if tell {
		l.toldFull = now
	}
	l.mu.Unlock()
	if tell {
		l.Log.Warn("too many connections, new ones are closed", append([]any{"of", limit}, about...)...)
	}
}

func (l *listener) forget(c *conn) {
	c.Close()
	l.mu.Lock()
	delete(l.open, c)
	l.opened.Add(-1)
	l.mu.Unlock()
}

// closeIdle closes the connections that carry no call now. One that has just
// received a request is not idle any more and gets its answer.
func (l *listener) closeIdle() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.draining.Load() {
		return // somebody took it back
	}
	for c := range l.open {
		if !c.end() {
			c.leave() // it may have come to be shared meanwhile
		}
	}
}

func (l *listener) severAll() {
	var wg sync.WaitGroup
	var last []*conn // streams say farewell on them
	for _, c := range l.conns() {
		if c.isShared() {
			last = append(last, c)
			continue
		}
		wg.Go(func() { c.part(http1.CloseGoingAway, l.partTime) })
	}
	wg.Wait()
	for _, c := range last {
		c.sever()
	}
}

// calls takes one request after the other from x's connection through the
// chain, until the connection may carry no more. Idle says that no request came
// in time, and nothing else: it could still carry one.
func (l *listener) calls(x *call, way chain) (idle bool) {
	// A drain that begins while a call is in flight is told with its answer: a
	// client that saw only the end could have sent the next request into it.
	x.ex.Accept = func(*http1.Response) bool {
		x.ex.ToDown.Close = x.ex.ToDown.Close || l.draining.Load()
		return x.accept == nil || x.accept(x)
	}
	x.way = way
	for {
		if err := x.down.ReadRequest(&x.req); err != nil {
			if errors.Is(err, http1.ErrIdleTimeout) {
				return true
			}
			l.unreadable(x, err)
			l.leftOff(x.conn, err)
			return false
		}
		if !x.conn.begin() {
			x.conn.refuse()
			return false
		}
		x.reset()
		way.run(x)
		x.conn.rest()
		if x.err != nil && http1.FailedSide(x.err) != http1.Upstream && !x.tunnel {
			l.leftOff(x.conn, x.err)
		}
		switch {
		case x.settled: // long ago: what has come since is the next request, whatever began meanwhile
		case x.tunnel:
			return false // both ends are closed
		case x.broken:
			x.conn.abort()
			return false
		case !x.keep:
			_ = x.down.Linger() // the answer is out; the client may be gone
			return false
		case l.draining.Load() && x.down.Stale():
			_ = x.down.Linger() // more is coming, which must not cost the answer
			return false
		case l.draining.Load():
			_ = x.down.Close()
			return false
		}
	}
}

// leftOff takes note of a client that has reset its connection, or ended it in
// the middle of a call. Who broke a stream off was noted there. A connection that has
// had calls and just ends, as when its machine does, was not in vain.
func (l *listener) leftOff(c *conn, err error) {
	if c.on != nil {
		return
	}
	reset := errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
	if !reset && !errors.Is(err, io.ErrUnexpectedEOF) {
		return
	}
	l.brokenOff(c, l.costs)
	if reset || !c.hasCarried() {
		l.vain.Spend(c.from, l.costs)
	}
}

// unreadable answers and counts a request that could not be read.
func (l *listener) unreadable(x *call, err error) {
	status := http1.StatusOf(err)
	if status == 0 {
		x.conn.refuse() // nothing, or not all of a request: there is nobody to answer
		return
	}
	reason := "the request head did not arrive in time"
	if p := (*http1.ProtocolError)(nil); errors.As(err, &p) {
		reason = p.Detail
	}
	x.unread.Observe(&telemetry.Call{Code: status, Flag: "unread"})
	l.Metrics.RequestsRefused(l.Reporter, unreadReason(err)).Inc()
	if x.socks {
		x.answerSOCKS(status)
		return
	}
	if _, err := x.down.WriteError(nil, status, nil, errorBody(reason, "")); err == nil {
		_ = x.down.Linger() // best effort, the connection ends anyway
	}
}

// unreadReason says in one word why a request was refused unread.
func unreadReason(err error) string {
	switch p := (*http1.ProtocolError)(nil); {
	case errors.As(err, &p):
		return p.Reason.String()
	case errors.Is(err, http1.ErrHeadTimeout):
		return "head_timeout"
	case errors.Is(err, http1.ErrSlowBody):
		return "slow_body"
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "body_timeout"
	}
	return "broken_off"
}
