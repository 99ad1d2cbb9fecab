package http2

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"sallyport/internal/mux"
)

var (
	errEnded       = errors.New("call was ended in this direction")
	errNoCall      = errors.New("no call to answer")
	errNoHalfClose = errors.New("nothing but a tunnel is closed in one direction")
)

// A Lane carries one call after the other, as HTTP/1.1. One goroutine at a time
// may read it, and one write it; Close and the deadlines are for everybody. It
// must be closed, or it counts as open for ever.
type Lane struct {
	c *Conn

	out   outgoing // only who writes knows it
	woken bool     // in c.in.ready; only the goroutine that reads knows it

	// Guarded by the lock of c.
	id      uint32 // the stream of the call under way; 0: none
	credit  int    // what the peer lets us send on it
	queued  int    // our bytes in c.out.pend
	waits   bool   // its writer waits for room
	inLine  bool   // in c.out.line
	turn    bool   // it has waited there
	thirsts bool   // in c.thirsty
	sent    bool   // we have sent the end
	peerEnd bool   // the peer has
	resting bool   // in c.idle
	known   bool   // of a server: it was accepted
	closed  bool
	cut     func() // see OnCut
	werr    error
	wend    mux.Deadline
	room    sync.Cond // for credit, and for room in the queue

	mu   sync.Mutex // guards the fields below
	got  incoming
	rerr error
	rend mux.Deadline
	more sync.Cond
}

// incoming is what was received of a call and not read.
type incoming struct {
	text    []byte // HTTP/1.1 that is read before in: a head, the lines of a chunk
	store   []byte // where a head is made
	line    [24]byte
	in      mux.Buffer // data that is not read yet
	joined  int        // bytes of data that stand in text
	chunk   int        // bytes of it that belong behind the text that was read
	chunks  bool       // data is read in chunks
	raw     bool       // data is read until the end, which is EOF
	held    bool       // not before the tunnel is open
	told    bool       // of a client: the answer has begun
	begun   bool       // some of it was read
	end     bool       // the peer sends no more
	ended   bool       // and the reader has been told
	tail    []byte     // trailers, lines of HTTP/1.1
	want    int64      // data that content-length still announces; -1: it says nothing
	interim int        // how many interim answers have come

	left     int // what the peer may still send
	consumed int // what was read and not granted anew
	window   int
	starved  bool // the peer has used up the window
}

func (c *Conn) newLane() *Lane {
	l := &Lane{c: c}
	l.room.L, l.more.L = &c.mu, &l.mu
	c.lanes[l] = struct{}{}
	c.open.Store(int64(len(c.lanes)))
	return l
}

// OnCut has f called when the peer breaks a call off, or the connection, which
// should close the lane: at once if it has. It must not block.
func (l *Lane) OnCut(f func()) {
	c := l.c
	c.mu.Lock()
	over := c.err != nil
	if !over {
		l.cut = f
	}
	c.mu.Unlock()
	if over {
		f()
	}
}

// carry has the lane carry the call of a stream. The lock of c is held.
func (l *Lane) carry(id uint32) {
	c := l.c
	l.id, l.credit, l.sent, l.peerEnd, l.resting = id, c.first, false, false, false
	c.streams[id] = l
}

// fresh readies what is received for another call. The lock of l is held.
func (l *Lane) fresh() {
	l.shrink()
	g := &l.got
	g.in.Drop()
	*g = incoming{store: g.store, tail: g.tail[:0], want: -1, left: l.c.cfg.Window, window: l.c.cfg.Window}
}

// forget ends the call of the lane.
func (c *Conn) forget(l *Lane) {
	delete(c.streams, l.id)
	l.id = 0
	c.repay()
	if len(c.streams) == 0 {
		c.empty = time.Now()
		c.withhold()
		c.parting()
	}
}

// Read reads what the peer has said: at a server a request, at a client the
// answer, as HTTP/1.1.
func (l *Lane) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	l.mu.Lock()
	for {
		if n, data := l.got.take(p); n > 0 {
			l.took(data)
			return n, nil
		}
		if l.rerr == nil && !l.rend.Passed && l.c.server && l.got.ended && !l.got.raw {
			l.mu.Unlock()
			l.rest()
			l.mu.Lock()
			if len(l.got.text) > 0 {
				continue
			}
		}
		if err := l.over(); err != nil {
			l.mu.Unlock()
			if err == os.ErrDeadlineExceeded && !l.stir() {
				l.mu.Lock()
				continue
			}
			return 0, err
		}
		l.c.waiting.Add(1)
		l.more.Wait()
		l.c.waiting.Add(-1)
	}
}

func (l *Lane) over() error {
	switch {
	case l.rerr == net.ErrClosed:
		return l.rerr
	case l.got.ended && l.got.raw:
		return io.EOF
	case l.rerr != nil:
		return l.rerr
	case l.rend.Passed:
		return os.ErrDeadlineExceeded
	}
	return nil
}

// rest offers the lane of a server for the next call.
func (l *Lane) rest() {
	c := l.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if l.id == 0 && !l.resting && !l.closed && l.werr == nil {
		l.resting = true
		c.idle = append(c.idle, l)
	}
}

// stir ends the rest; false when a call has come in the last moment.
func (l *Lane) stir() bool {
	c := l.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if !l.resting {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.got.text) == 0
	}
	l.resting = false
	for i, x := range c.idle {
		if x == l {
			c.idle = append(c.idle[:i], c.idle[i+1:]...)
			break
		}
	}
	return true
}

// take fills p with what there is; data counts the bytes of the body.
func (g *incoming) take(p []byte) (n, data int) {
	for n < len(p) {
		switch {
		case len(g.text) > 0:
			k := copy(p[n:], g.text)
			g.text = g.text[k:]
			n, data, g.joined = n+k, data+g.joined, 0
		case g.held:
			return n, data
		case g.chunk > 0:
			k := g.in.Take(p[n:min(n+g.chunk, len(p))])
			g.chunk -= k
			n, data = n+k, data+k
			if g.chunk == 0 && g.chunks {
				g.text = append(g.line[:0], '\r', '\n')
			}
		case g.ripe() > 0:
			g.chunk = g.ripe()
			if g.chunks {
				g.chunk = min(g.chunk, max(len(p)-n-len(g.line), 1))
				g.text = append(strconv.AppendInt(g.line[:0], int64(g.chunk), 16), '\r', '\n')
			}
		case g.end && !g.ended:
			g.ended = true
			if g.chunks {
				g.store = append(append(append(g.store[:0], "0\r\n"...), g.tail...), '\r', '\n')
				g.text = g.store
			}
		default:
			g.begun = g.begun || n > 0
			return n, data
		}
	}
	g.begun = true
	return n, data
}

// ripe is how much data may be read. A body of known length is over for its
// reader with the last byte, which therefore waits for the end of the stream: the
// lane is then ready for the next call, and a request with more data than it
// announces is not taken for a whole one.
func (g *incoming) ripe() int {
	if g.want == 0 && !g.end && !g.chunks && !g.raw && g.in.Len() > 0 {
		return g.in.Len() - 1
	}
	return g.in.Len()
}

// took counts what was read, and unlocks. When half of the window was, the peer
// gets it anew, and more if it has had to wait.
func (l *Lane) took(n int) {
	g := &l.got
	if g.in.Len() == 0 && g.end {
		l.shrink()
	}
	if n == 0 {
		l.mu.Unlock()
		return
	}
	grant := 0
	g.consumed += n
	if g.consumed >= g.window/2 && !g.end && l.rerr == nil {
		grant = g.consumed
		if g.starved && g.window < l.c.cfg.MaxWindow && l.c.roomy(n) && l.c.cfg.Budget.Take(g.window) {
			grant += g.window
			g.window *= 2
		}
		g.starved, g.consumed = false, 0
		g.left += grant
	}
	l.mu.Unlock()
	l.c.eat(l, n, grant)
}

// roomy says whether less than half of the connection's window is held by what was
// not read, when n bytes more have been.
func (c *Conn) roomy(n int) bool {
	return c.inLeft.Load()+c.eaten.Load()+int64(n) > c.room.Load()/2
}

// shrink gives back by how much the window has grown. The lock of l is held.
func (l *Lane) shrink() {
	if n := l.got.window - l.c.cfg.Window; n > 0 {
		l.c.cfg.Budget.Give(n)
		l.got.window = l.c.cfg.Window
	}
}

// eat grants anew what was read of the connection's window, when it is much,
// and of the lane's.
func (c *Conn) eat(l *Lane, n, grant int) {
	whole := c.eaten.Add(int64(n)) >= c.room.Load()/4
	if !whole && grant == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	was := len(c.out.pend)
	if grant > 0 && l.id != 0 && !l.peerEnd && l.werr == nil {
		c.out.pend = appendWindow(c.out.pend, l.id, grant)
	}
	c.refill()
	if len(c.out.pend) > was {
		if err := c.out.answered(was); err != nil {
			c.endLocked(err)
		}
	}
}

// refill grants the window of the connection anew, if it is much.
func (c *Conn) refill() {
	c.withhold()
	c.repay()
	n := c.eaten.Load()
	if n < c.room.Load()/4 || c.err != nil {
		return
	}
	c.eaten.Add(-n)
	c.inLeft.Add(n)
	c.out.pend = appendWindow(c.out.pend, 0, int(n))
}

// widen has the window of the connection grow when the peer has used half of it:
// a lane that nobody reads must not hold up the others, for as long as there is
// memory for that. The lock of c is held.
func (c *Conn) widen() {
	room := c.room.Load()
	more := int(min(room, int64(c.cfg.Buffer)-room))
	if more <= 0 || c.inLeft.Load() >= room/2 || c.err != nil || !c.cfg.Budget.Take(more) {
		return
	}
	c.widened += more
	c.room.Add(int64(more))
	c.inLeft.Add(int64(more))
	c.out.pend = appendWindow(c.out.pend, 0, more)
	c.out.wake()
}

// withhold gives back what widen has taken while no stream is open: what was read
// is then not granted anew. The lock of c is held.
func (c *Conn) withhold() {
	n := min(int(c.eaten.Load()), c.widened)
	if n <= 0 || len(c.streams) > 0 {
		return
	}
	c.eaten.Add(-int64(n))
	c.room.Add(-int64(n))
	c.widened -= n
	c.cfg.Budget.Give(n)
}

// hoards says that no stream has been open for a beat, and that the peer could
// still send what others have no memory for: what it was granted cannot be taken
// back. The lock of c is held.
func (c *Conn) hoards() bool {
	if c.widened == 0 || len(c.streams) > 0 || time.Since(c.empty) < c.cfg.beat() {
		return false
	}
	free := c.cfg.Budget.Take(firstWindow)
	if free {
		c.cfg.Budget.Give(firstWindow)
	}
	return !free
}

// narrow gives back what widen has taken, when the peer sends no more and nothing
// of what it has sent is left. The lock of c is held.
func (c *Conn) narrow() {
	if c.deaf && len(c.lanes) == 0 {
		c.cfg.Budget.Give(c.widened)
		c.cfg.First.Give(c.paid)
		c.widened, c.paid = 0, 0
	}
}

// discard throws away what was not read, and says how much data that was. The
// lock of l is held.
func (l *Lane) discard() int {
	g := &l.got
	n := g.in.Len() + g.joined
	g.text, g.chunk, g.joined = nil, 0, 0
	g.in.Drop()
	return n
}

// CloseWrite ends what this end sends through a tunnel. The peer reads EOF.
func (l *Lane) CloseWrite() error {
	if !l.out.tunnel {
		return errNoHalfClose
	}
	c := l.c
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case l.werr != nil:
		return l.werr
	case l.sent:
		return nil
	}
	l.finish(nil)
	c.out.wake()
	return nil
}

// Close ends the lane, and the call on it at both ends. It never waits.
func (l *Lane) Close() error { return l.Reset(Cancel) }

// Reset is Close with a code that says why, if the answer is not whole. Of a
// call that nobody has begun to read the peer learns that it may be made again.
func (l *Lane) Reset(code Code) error {
	c := l.c
	c.mu.Lock()
	if l.closed {
		c.mu.Unlock()
		return nil
	}
	l.closed, l.resting = true, false
	l.wend.Stop()
	l.broke(net.ErrClosed)
	l.mu.Lock()
	l.rend.Stop()
	l.rerr = net.ErrClosed
	unread := l.discard()
	l.shrink()
	if !l.got.begun && c.server {
		code = RefusedStream
	}
	l.mu.Unlock()
	if l.id != 0 {
		if l.sent && c.server {
			code = NoError
		}
		c.reset(l.id, code)
		c.forget(l)
		if !c.server {
			c.out.earned += 2 // a head and trailers may be on their way
		}
	}
	c.unqueue(l)
	delete(c.lanes, l)
	c.open.Store(int64(len(c.lanes)))
	c.narrow()
	c.mu.Unlock()
	if unread > 0 {
		c.eat(l, unread, 0)
	}
	return nil
}

// unqueue takes a lane out of where it waits: what it waits for may never come,
// and there is no end to lanes.
func (c *Conn) unqueue(l *Lane) {
	is := func(x *Lane) bool { return x == l }
	if l.inLine {
		l.inLine = false
		c.out.line = slices.DeleteFunc(c.out.line, is)
	}
	if l.thirsts {
		l.thirsts = false
		c.thirsty = slices.DeleteFunc(c.thirsty, is)
	}
}

// reset queues the end of a stream, whose late frames will be no mistake.
func (c *Conn) reset(id uint32, code Code) {
	was := len(c.out.pend)
	c.out.pend = appendReset(c.out.pend, id, code)
	at := &c.resets[c.nresets%len(c.resets)]
	c.lost = max(c.lost, *at)
	*at = id
	c.nresets++
	if err := c.out.answered(was); err != nil {
		c.endLocked(err)
	}
}

// wasReset says whether we have reset a stream of late.
func (c *Conn) wasReset(id uint32) bool {
	for _, r := range c.resets {
		if r == id {
			return true
		}
	}
	return false
}

// settleReset takes note that the peer, too, has done with a stream that we have
// reset: what comes after that is a mistake.
func (c *Conn) settleReset(id uint32) {
	for i, r := range c.resets {
		if r == id {
			c.resets[i] = 0
		}
	}
}

// broke ends the lane with an error; the lock of the Conn is held.
func (l *Lane) broke(err error) {
	if l.werr == nil {
		l.werr = err
	}
	l.room.Broadcast()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rerr == nil {
		l.rerr = err
	}
	l.more.Broadcast()
}

// Stale says that a lane at rest must not be used for another call: it has
// ended, or its connection takes no more.
func (l *Lane) Stale() bool {
	c := l.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leaving != staying || l.werr != nil || l.id != 0 {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.got.text) > 0 || l.got.in.Len() > 0 || l.rerr != nil
}

// Duplex says that a call can end whatever of its request is still to come.
func (l *Lane) Duplex() {}

// Conn is the connection that the lane is in.
func (l *Lane) Conn() *Conn { return l.c }

// ConnectionState is that of the TLS connection underneath.
func (l *Lane) ConnectionState() tls.ConnectionState { return l.c.ConnectionState() }

// LocalAddr is that of the connection.
func (l *Lane) LocalAddr() net.Addr { return l.c.nc.LocalAddr() }

// RemoteAddr is that of the connection.
func (l *Lane) RemoteAddr() net.Addr { return l.c.nc.RemoteAddr() }

// SetDeadline sets both deadlines.
func (l *Lane) SetDeadline(t time.Time) error {
	return errors.Join(l.SetReadDeadline(t), l.SetWriteDeadline(t))
}

// SetReadDeadline ends what waits in Read then.
func (l *Lane) SetReadDeadline(t time.Time) error {
	l.rend.Set(&l.more, t)
	return nil
}

// SetWriteDeadline ends what waits in Write then.
func (l *Lane) SetWriteDeadline(t time.Time) error {
	l.wend.Set(&l.room, t)
	return nil
}
