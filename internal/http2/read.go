package http2

import (
	"errors"
	"os"
	"strconv"
	"sync"
	"time"

	"sallyport/internal/mux"
)

// readBuffer has room for a frame that is not data, and for many small ones.
const readBuffer = 32 << 10

var readPool = sync.Pool{New: func() any { return new([readBuffer]byte) }}

// noiseBurst and noiseRate bound what costs us more than it costs the peer:
// calls broken off, pings, settings, frames without content.
const (
	noiseBurst = 1000
	noiseRate  = 1000 // per second
)

// A reader is what only the goroutine that reads knows.
type reader struct {
	buf      []byte // nil while nothing comes, if the connection can wait without
	lane     *Lane  // whose data frame is being read; nil: it is thrown away
	left     int    // payload bytes of it still to come
	pad      int    // bytes of padding behind that
	end      bool   // it ends its direction
	greeted  bool   // the preface has come
	settled  bool   // the first SETTINGS have
	hurried  bool   // a read deadline is set
	noise    mux.Bucket
	ready    []*Lane // what they wait for has come
	calls    []*Lane // which nobody knows of yet
	fragment []byte  // of a field section that is not whole
	opener   header  // of its first frame; stream 0: there is none
	more     int     // how many frames have continued it
	block    section
}

// read takes frames in until the connection ends. While nothing comes it holds
// no buffer.
func (c *Conn) read() error {
	in := &c.in
	defer in.release()
	r, w := 0, 0
	for {
		n, err := c.frames(in.buf[r:w])
		c.wakeReady()
		if err = c.announce(err); err != nil {
			return err
		}
		if r += n; r == w {
			r, w = 0, 0
		} else {
			w = copy(in.buf, in.buf[r:w]) // less than a frame that is not data
			r = 0
		}
		c.hurry(w > 0, n > 0)
		if n, err = c.fill(w); n > 0 {
			c.heard.Add(1)
		} else if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) && c.in.hurried {
				return violated(EnhanceYourCalm, SlowSection)
			}
			return err
		}
		w += n
	}
}

// fill reads behind what is there, w bytes.
func (c *Conn) fill(w int) (int, error) {
	in := &c.in
	if w > 0 {
		return c.nc.Read(in.buf[w:])
	}
	if c.borrows != nil {
		in.release()
		return c.borrows.ReadLate(in)
	}
	if c.waits != nil {
		in.release()
		if err := c.waits.Await(); err != nil {
			return 0, err
		}
	}
	return c.nc.Read(in.Lend())
}

// Lend gives the buffer to read into.
func (in *reader) Lend() []byte {
	if in.buf == nil {
		in.buf = readPool.Get().(*[readBuffer]byte)[:]
	}
	return in.buf
}

// Back takes it back when nothing was there.
func (in *reader) Back() { in.release() }

func (in *reader) release() {
	if in.buf != nil {
		readPool.Put((*[readBuffer]byte)(in.buf))
		in.buf = nil
	}
}

// hurry gives what has begun a time to end: the preface, a frame, a field
// section. Data has the time that the reader of its lane gives it. progress says
// that it is another frame than before.
func (c *Conn) hurry(begun, progress bool) {
	in := &c.in
	greeting := !in.settled || in.opener.stream != 0
	begun = begun || greeting
	if begun == in.hurried && (!begun || greeting || !progress) {
		return
	}
	in.hurried = begun
	until := time.Time{}
	if begun {
		until = time.Now().Add(c.cfg.HeadTimeout)
	}
	_ = c.nc.SetReadDeadline(until) // a failure shows in the read
}

// wakeReady tells the readers of lanes what has come for them, once for all
// that came together.
func (c *Conn) wakeReady() {
	in := &c.in
	for i, l := range in.ready {
		l.woken = false
		l.more.Broadcast()
		in.ready[i] = nil
	}
	in.ready = in.ready[:0]
}

// wakes has wakeReady see to a lane.
func (in *reader) wakes(l *Lane) {
	if !l.woken {
		l.woken = true
		in.ready = append(in.ready, l)
	}
}

// frames takes in what b holds and says how much that was.
func (c *Conn) frames(b []byte) (n int, err error) {
	in := &c.in
	if c.server && !in.greeted {
		k := min(len(b), len(Preface))
		if string(b[:k]) != Preface[:k] {
			return 0, violated(Protocol, BadPreface)
		}
		if k < len(Preface) {
			return 0, nil
		}
		in.greeted = true
		n = k
	}
	for {
		if k := min(in.left, len(b)-n); k > 0 {
			c.mu.Lock()
			err := c.data(b[n : n+k])
			c.mu.Unlock()
			if err != nil {
				return n, err
			}
			n += k
			continue
		}
		if k := min(in.pad, len(b)-n); in.left == 0 && k > 0 {
			in.pad -= k
			n += k
			continue
		}
		if in.left > 0 || in.pad > 0 || len(b)-n < headerSize {
			return n, nil
		}
		h := parseHeader(b[n:])
		if err := c.fits(h); err != nil {
			return n, err
		}
		rest := b[n+headerSize:]
		if h.kind == kindData {
			k, err := c.begin(h, rest)
			if err != nil || k < 0 {
				return n, err
			}
			n += headerSize + k
			continue
		}
		if len(rest) < h.length {
			return n, nil
		}
		if err := c.noted(h, rest[:h.length]); err != nil {
			return n, err
		}
		n += headerSize + h.length
	}
}

// fits looks whether a frame may stand where it does.
func (c *Conn) fits(h header) error {
	in := &c.in
	switch {
	case !in.settled && (h.kind != kindSettings || h.flags&flagAck != 0):
		return violated(Protocol, BadPreface)
	case (in.opener.stream != 0) != (h.kind == kindContinuation), in.opener.stream != 0 && h.stream != in.opener.stream:
		return violated(Protocol, BadKind)
	case h.kind == kindPush:
		return violated(Protocol, BadKind)
	}
	return h.check()
}

// noisy counts what a peer must not do without end.
func (c *Conn) noisy() error {
	if c.in.noise.Spend() {
		return nil
	}
	return violated(EnhanceYourCalm, Flood)
}

// broken is noisy for a call that the peer has broken off, or that we had to.
func (c *Conn) broken() error {
	if c.cfg.Broken() {
		return c.noisy()
	}
	return violated(EnhanceYourCalm, Flood)
}

// earn gives the peer something back for what it has been sent. The lock of c is
// held.
func (c *Conn) earn() {
	c.in.noise.Earn(c.out.earned)
	c.out.earned = 0
}

// begin looks at the header of a data frame, and at the length of its padding;
// k is -1 when that has not come yet. What has come of its data is taken in.
func (c *Conn) begin(h header, rest []byte) (k int, err error) {
	in := &c.in
	in.left, in.pad, in.end = h.length, 0, h.flags&flagEnd != 0
	if h.flags&flagPadded != 0 {
		switch {
		case h.length == 0:
			return 0, violated(FrameSize, BadLength)
		case len(rest) == 0:
			in.left = 0
			return -1, nil
		}
		k = 1
		in.pad = int(rest[0])
		if in.left -= 1 + in.pad; in.left < 0 {
			return 0, violated(Protocol, BadPadding)
		}
	}
	if c.inLeft.Add(-int64(h.length)) < 0 {
		return 0, violated(FlowControl, Overrun)
	}
	if in.left == 0 && !in.end {
		if err := c.noisy(); err != nil {
			return 0, err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.widen()
	if in.lane, err = c.find(h); err != nil {
		return 0, err
	}
	if l := in.lane; l != nil && !c.afford() {
		in.lane = nil
		if err := c.fault(l, EnhanceYourCalm, Hoarded); err != nil {
			return 0, err
		}
	}
	if over := h.length - in.left; over > 0 {
		c.wasted(in.lane, over)
	}
	switch n := min(in.left, len(rest)-k); {
	case n > 0:
		return k + n, c.data(rest[k : k+n])
	case in.left == 0 && in.end && in.lane != nil:
		return k, c.peerEnded(in.lane)
	}
	return k, nil
}

// wasted grants anew what nobody will read. The lock of c is held.
func (c *Conn) wasted(l *Lane, n int) {
	c.eaten.Add(int64(n))
	if l != nil && l.id != 0 {
		l.mu.Lock()
		if l.got.left -= n; l.got.left >= 0 {
			l.got.consumed += n
		}
		l.mu.Unlock()
	}
	was := len(c.out.pend)
	if c.refill(); len(c.out.pend) > was {
		c.out.wake()
	}
}

// find gives the lane of a data frame; nil when nobody reads it any more. The
// lock of c is held.
func (c *Conn) find(h header) (*Lane, error) {
	l := c.streams[h.stream]
	switch {
	case l != nil && !l.peerEnd:
		return l, nil
	case l != nil:
		return nil, c.fault(l, StreamClosed, AfterEnd)
	case c.isIdle(h.stream):
		return nil, violated(Protocol, BadStream)
	case c.wasReset(h.stream): // this was on its way when we ended the call
		if h.flags&flagEnd != 0 {
			c.settleReset(h.stream)
		}
		return nil, nil
	case !c.server:
		return nil, nil
	case h.stream <= c.lost: // or this was
		return nil, c.noisy()
	}
	return nil, violated(StreamClosed, AfterEnd)
}

// isIdle says whether a stream has not been opened yet. Only clients open any.
func (c *Conn) isIdle(id uint32) bool { return id%2 == 0 || id > c.last }

// data takes in payload of the data frame that is being read. The lock of c is
// held.
func (c *Conn) data(p []byte) error {
	in := &c.in
	in.left -= len(p)
	l := in.lane
	if l == nil {
		c.wasted(nil, len(p))
		return nil
	}
	code, reason := l.deliver(p, in.left == 0, in.left == 0 && in.end)
	switch {
	case reason == errGone:
		c.wasted(nil, len(p))
	case reason != "":
		c.wasted(nil, len(p))
		in.lane = nil
		return c.fault(l, code, reason)
	case in.left == 0 && in.end:
		return c.peerEnded(l)
	default:
		in.wakes(l)
	}
	return nil
}

// errGone is no reason: what comes for a lane that nobody reads any more is
// thrown away.
const errGone Reason = "gone"

// deliver takes in what the peer has sent; the window is the bound. With whole a
// frame ends with it, with last the body.
func (l *Lane) deliver(p []byte, whole, last bool) (Code, Reason) {
	l.mu.Lock()
	defer l.mu.Unlock()
	g := &l.got
	switch g.left -= len(p); {
	case g.left < 0:
		return FlowControl, Overrun
	case !l.c.server && !g.told:
		return Protocol, Malformed // data before the head of its answer
	}
	g.starved = g.starved || g.left == 0
	if g.want >= 0 {
		if int64(len(p)) > g.want {
			return Protocol, BadSize
		}
		g.want -= int64(len(p))
	}
	if l.rerr != nil {
		return 0, errGone
	}
	if !whole || !g.joins(p, last) {
		g.in.Add(p)
	}
	return 0, ""
}

// joins puts a small body, or chunk, that has come whole behind its head, if
// nobody has begun to read that.
func (g *incoming) joins(p []byte, last bool) bool {
	switch {
	case g.begun || g.held || len(g.text) == 0 || g.joined+g.in.Len() > 0 || len(g.store)+len(p) > maxJoined:
		return false
	case !g.chunks:
		if !last || g.want > 0 {
			return false
		}
		g.store = append(g.store, p...)
	default:
		g.store = append(strconv.AppendInt(g.store, int64(len(p)), 16), "\r\n"...)
		g.store = append(append(g.store, p...), "\r\n"...)
		if last {
			g.store = append(g.store, "0\r\n\r\n"...)
		}
	}
	g.text, g.joined, g.ended = g.store, len(p), last
	return true
}

// maxJoined bounds a head with its body: a lane keeps the memory for the next.
const maxJoined = 2 << 10

// peerEnded is the end of what the peer sends in a call. The lock of c is held.
func (c *Conn) peerEnded(l *Lane) error {
	if l.id == 0 {
		return nil // it was ended meanwhile
	}
	l.mu.Lock()
	short := l.got.want > 0
	l.got.end = l.got.end || !short
	l.mu.Unlock()
	if short {
		return c.fault(l, Protocol, BadSize)
	}
	l.ends()
	c.in.wakes(l)
	return nil
}

// ends takes note that the peer sends no more of the call. The lock of c is held.
func (l *Lane) ends() {
	if l.peerEnd = true; l.sent {
		l.c.forget(l)
	}
}

// fault ends a call by the fault of the peer. Who makes us end many pays for it
// as for those that he breaks off himself. It gives the lock up for what OnCut set.
func (c *Conn) fault(l *Lane, code Code, reason Reason) error {
	if l.id == 0 {
		return nil
	}
	c.cfg.Violated(reason)
	c.reset(l.id, code)
	c.cut(l, &ResetError{code})
	if reason == Hoarded && !c.cfg.First.Spent(maxPayload+portion) { // the most that he may have been refused
		return c.noisy() // others have the memory
	}
	return c.broken()
}

// cut ends the call of a lane, and the lane.
func (c *Conn) cut(l *Lane, err error) {
	l.broke(err) // first: with the last call the connection may end
	c.forget(l)
	f := l.cut
	if c.server && !l.known {
		f = func() { l.Close() }
	}
	if f != nil {
		c.mu.Unlock()
		f()
		c.mu.Lock()
	}
}
