package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/mux"
	"sallyport/internal/telemetry"
	"sallyport/internal/upstream"
)

// A race is an upstream that stands for two: the one that a call was brought to,
// and another that gets the same request when the first has not begun to answer
// after a while. Whoever begins first is the upstream from then on; the other is
// broken off, which says nothing of it.
//
// Only what reads it calls its methods, but for Close.
type race struct {
	d     *door
	x     *call
	first *upstream.Conn
	one   net.Conn        // of first
	ctx   context.Context // of the other one's making
	stop  context.CancelFunc
	sent  []byte // the request, as the first has it
	won   net.Conn
	begun []byte // of the answer, not read yet
	rd    time.Time
	got   chan answer // one of each

	mu     sync.Mutex // guards the fields below
	other  *upstream.Conn
	closed bool
	gone   chan struct{} // closed with it
}

// An answer is how one begins.
type answer struct {
	of  *upstream.Conn
	b   []byte
	err error
}

// hedged is after what time without an answer the call gets a second upstream; 0
// for never.
func (x *call) hedged() time.Duration {
	t := &x.tries
	b := x.req.Body
	switch {
	case !t.safe || t.fault != nil || x.req.Upgrade || !b.Empty() && (b.Framing != http1.Length || b.Length > maxReplay):
		return 0
	case t.pace != nil:
		return t.pace.late()
	}
	return t.hedge
}

// race runs the exchange once with up, or another endpoint. The one that has
// answered, or else up, is lent to the call afterwards.
func (d *door) race(x *call, up *upstream.Conn, due time.Time) {
	k := &race{d: d, x: x, first: up, one: up.NetConn(), got: make(chan answer, 2), gone: make(chan struct{})}
	k.ctx, k.stop = context.WithCancel(x.ctx)
	fc := http1.NewConn(k, x.on.Limits)
	defer fc.Release()
	x.ex.Up, x.ex.Settle = fc, nil
	if !x.conn.bind(k, nil) {
		k.Close()
	}
	x.run(k, due)
	if x.err == nil {
		x.tries.outcome, x.tries.judged = x.outcomeOf(), true // fc knows the trailers
	}
	k.end()
	x.ex.Up = x.up.Conn
}

// Write takes the request.
func (k *race) Write(p []byte) (int, error) {
	k.sent = append(k.sent, p...)
	return k.one.Write(p)
}

// Read waits for who answers first, and then reads what he says.
func (k *race) Read(p []byte) (int, error) {
	if k.won == nil {
		if err := k.run(); err != nil {
			return 0, err
		}
	}
	if len(k.begun) > 0 {
		n := copy(p, k.begun)
		k.begun = k.begun[n:]
		return n, nil
	}
	return k.won.Read(p)
}

// run finds who is first.
func (k *race) run() error {
	go k.listen(k.first, k.one)
	late := time.NewTimer(k.x.tries.second)
	defer late.Stop()
	running := 1
	var failed error
	for {
		select {
		case <-k.gone:
			return net.ErrClosed
		case <-late.C:
			if k.d.cfg.Services.Retry(k.x.to.name) {
				k.d.Metrics.Retries(k.x.dst, telemetry.RetryHedge, true).Inc()
				running++
				// The call may be over, and its place another's, before ask begins.
				go k.ask(upstream.Want{Service: k.x.to.name, Subset: k.x.to.subset, Avoid: k.first.Endpoint(), Again: true,
					Until: k.x.tries.until, Hurried: k.x.tries.asked > 0})
			} else {
				k.d.Metrics.Retries(k.x.dst, telemetry.RetryHedge, false).Inc()
			}
		case a := <-k.got:
			running--
			if a.err == nil {
				if a.err = k.win(a); a.err == nil {
					return nil
				}
			}
			if a.of == k.first || failed == nil {
				failed = a.err // what the first says of itself is what the call came to
			}
			if running == 0 {
				return failed
			}
		}
	}
}

// win makes one the upstream.
func (k *race) win(a answer) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return net.ErrClosed
	}
	if err := a.of.Stands(); err != nil { // nobody has looked since it was lent
		return err
	}
	k.won, k.begun, k.x.up = a.of.NetConn(), a.b, a.of
	if a.of == k.other {
		k.first.Abandon()
	} else if k.other != nil {
		k.other.Abandon()
	}
	k.stop()
	// A deadline that was set for both.
	_ = k.won.SetReadDeadline(k.rd) // a connection that is closed says so when it is read
	return nil
}

// listen waits for the first bytes of an answer.
func (k *race) listen(up *upstream.Conn, nc net.Conn) {
	b := make([]byte, 4<<10)
	n, err := nc.Read(b)
	if n > 0 {
		err = nil
	} else if err == nil {
		err = io.ErrNoProgress
	}
	k.got <- answer{up, b[:n], err}
}

// ask brings the request to another endpoint.
func (k *race) ask(w upstream.Want) {
	up, err := k.d.cfg.Services.Lend(k.ctx, &w)
	if err == nil && !k.enter(up) {
		err = net.ErrClosed
	}
	if err != nil {
		k.got <- answer{err: err}
		return
	}
	nc := up.NetConn()
	if _, err = nc.Write(k.sent); err != nil {
		k.got <- answer{err: err}
		return
	}
	k.listen(up, nc)
}

// enter lets another upstream in, if the race is not over and it is one.
func (k *race) enter(up *upstream.Conn) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed || k.won != nil || up.Endpoint() == k.first.Endpoint() || up.Stands() != nil {
		up.Discard()
		return false
	}
	k.other = up
	_ = up.NetConn().SetDeadline(k.rd)
	return true
}

// end ends the race: who did not win is broken off, and the connection of who did
// is made ready for its next call.
func (k *race) end() {
	k.stop()
	k.mu.Lock()
	defer k.mu.Unlock()
	over := k.closed
	k.closed = true
	if k.won == nil {
		if k.other != nil {
			k.other.Abandon()
		}
		return
	}
	if over {
		k.x.res.UpstreamReusable = false
		return
	}
	up := k.x.up
	_ = k.won.SetDeadline(time.Time{}) // as for the read deadline
	up.Conn.Release()
	up.Conn = http1.NewConn(k.won, k.x.on.Limits)
}

// Close ends what runs.
func (k *race) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil
	}
	k.closed = true
	close(k.gone)
	var err error
	if k.other != nil {
		err = k.other.NetConn().Close()
	}
	return errors.Join(err, k.one.Close())
}

// ConnectionState is that of who stands for both, for those who look whether it
// is to be believed.
func (k *race) ConnectionState() tls.ConnectionState {
	k.mu.Lock()
	defer k.mu.Unlock()
	c := k.won
	if c == nil {
		c = k.one
	}
	return mux.StateOf(c)
}

func (k *race) SetReadDeadline(t time.Time) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.rd = t
	if k.won != nil {
		return k.won.SetReadDeadline(t)
	}
	if k.other != nil {
		_ = k.other.NetConn().SetReadDeadline(t) // the first one says what it is
	}
	return k.one.SetReadDeadline(t)
}

func (k *race) SetWriteDeadline(t time.Time) error { return k.one.SetWriteDeadline(t) }

func (k *race) SetDeadline(t time.Time) error {
	return errors.Join(k.SetReadDeadline(t), k.SetWriteDeadline(t))
}

func (k *race) LocalAddr() net.Addr  { return k.one.LocalAddr() }
func (k *race) RemoteAddr() net.Addr { return k.one.RemoteAddr() }
