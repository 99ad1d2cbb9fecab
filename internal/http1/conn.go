// Package http1 is a strict HTTP/1.1 engine for a proxy: it parses heads and
// bodies, writes them anew and drives one exchange between two connections.
// What RFC 9112 does not allow without doubt is refused. It knows no policy and
// keeps no pool. A Conn belongs to one goroutine; Exchange and Tunnel start a
// second one only while two directions must move at once, and join it.
package http1

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	bufferSize = 16 << 10 // first size of a read buffer; most heads and small bodies fit
	roomSize   = 4 << 10  // free space kept behind a head, so that a body can stream past it
	outSize    = 4 << 10
)

// IdleTimeout is how long a connection may wait for a request, by default.
const IdleTimeout = 65 * time.Second

// Limits bound what a peer may send and how long it may take. The zero value
// means the defaults.
type Limits struct {
	// Head is the size of a whole head in bytes, start line included.
	// Default 32 KiB; above it 431.
	Head int
	// Headers is the number of field lines. Default 100; above it 431.
	Headers int
	// Target is the length of a request target in bytes. Default 8 KiB;
	// above it 414.
	Target int
	// Interim is the number of 1xx responses allowed before the final one.
	// Default 8.
	Interim int
	// HeadTimeout is the time from the first byte of a request to the end of
	// its head, absolute. Default 10 s.
	HeadTimeout time.Duration
	// IdleTimeout is how long to wait for the first byte of a request.
	// Default the constant of that name, 65 s.
	IdleTimeout time.Duration
	// ResponseTimeout is how long to wait for the head of a response.
	// Default 60 s.
	ResponseTimeout time.Duration
	// BodyTimeout is how long one read of a body may take. Default 5 min.
	BodyTimeout time.Duration
	// WriteTimeout is how long one write may take. Default 60 s.
	WriteTimeout time.Duration
	// MinRate is the least average rate, in bytes per second, of a request
	// body of known length, after a grace of 5 s. Default 240; negative: none.
	MinRate int
	// ChunkedRate is the least rate, in bytes per second over every 10 s of
	// waiting for the client, of a body of unknown length: of a request as it
	// sends it, of a response as it takes it. Default: none, since such a body may
	// rest by its nature.
	ChunkedRate int
	// AllowParams accepts ';' in a path, which PathText then leaves out. Without
	// it such a request gets 400, because applications disagree on what the path
	// then is.
	AllowParams bool
	// RefuseUnderscore refuses field names that hold '_' (400). Without it
	// only those are dropped that fold to a name with a meaning.
	RefuseUnderscore bool
}

func (l Limits) filled() Limits {
	l.Head = cmp.Or(l.Head, 32<<10)
	l.Headers = cmp.Or(l.Headers, 100)
	l.Target = cmp.Or(l.Target, 8<<10)
	l.Interim = cmp.Or(l.Interim, 8)
	l.HeadTimeout = cmp.Or(l.HeadTimeout, 10*time.Second)
	l.IdleTimeout = cmp.Or(l.IdleTimeout, IdleTimeout)
	l.ResponseTimeout = cmp.Or(l.ResponseTimeout, time.Minute)
	l.BodyTimeout = cmp.Or(l.BodyTimeout, 5*time.Minute)
	l.WriteTimeout = cmp.Or(l.WriteTimeout, time.Minute)
	l.MinRate = cmp.Or(l.MinRate, 240)
	return l
}

// An asker writes on a connection at rest and waits for the answer, which saves
// a futile read and a look at whether the connection is stale. It fails with
// nothing written when it is. A failure to wait shows in the next read.
type asker interface {
	Ask(p []byte) (int, error)
}

// Conn is the buffered HTTP/1.1 side of one network connection. Its read half
// and its write half hold no state in common, so Exchange may lend one half to
// another goroutine; apart from that it belongs to one goroutine.
type Conn struct {
	nc    net.Conn
	ask   asker   // nc, if it is one
	waits awaiter // the same
	late  borrower
	tries tryer
	hands handed
	lim   Limits

	// The read half: unread bytes are buf[r:w]; bytes below floor belong to
	// the views of the head that was read last and stay as they are. At rest
	// there is no buf.
	buf         []byte
	r, w, floor int
	readEnd     time.Time     // the read deadline now set
	trailers    bool          // pass trailers on: true after ReadResponse
	last        []Field       // the trailers that were passed on
	idle        time.Duration // in place of lim.BodyTimeout, for one exchange
	dropped     *NameSet      // but not these
	scrub       *Scrub        // of the body; nil: nothing is taken out
	quit        atomic.Bool   // set from outside: stop reading a body
	ended       atomic.Bool   // the body being copied was read to its end
	said        lines         // of the head that was read last

	asked bool      // it was waited for that there is something to read
	now   time.Time // see Tell

	peeker peeker

	// The write half.
	out      []byte
	lent     *scratch  // of which out is; nil at rest
	writeEnd time.Time // the write deadline now set
}

var connPool = sync.Pool{New: func() any { return new(Conn) }}

// NewConn wraps nc. Release ends it.
func NewConn(nc net.Conn, lim Limits) *Conn {
	c := connPool.Get().(*Conn)
	c.nc, c.lim = nc, lim.filled()
	c.ask, _ = nc.(asker)
	c.waits, _ = nc.(awaiter)
	c.late, _ = nc.(borrower)
	c.tries, _ = nc.(tryer)
	c.hands, _ = nc.(handed)
	return c
}

// Release gives everything back; the Conn and every view from it are dead
// afterwards. It does not close the network connection.
func (c *Conn) Release() {
	c.r = c.w
	c.Rest()
	*c = Conn{}
	connPool.Put(c)
}

// NetConn is the connection underneath.
func (c *Conn) NetConn() net.Conn { return c.nc }

// Close closes the network connection at once. It may be called from any
// goroutine to abort what the owner does.
func (c *Conn) Close() error { return c.nc.Close() }

// duplex says that nothing but one call is on what the client sees of the
// connection, so that it learns nothing of the next one.
func (c *Conn) duplex() bool {
	_, ok := c.nc.(interface{ Duplex() })
	return ok
}

// Buffered is the number of bytes received and not yet read.
func (c *Conn) Buffered() int { return c.w - c.r }

// Linger closes after an answer that the peer may still be sending against:
// it shuts the sending side, discards up to 256 KiB for at most one second,
// then closes. A plain Close there would reset the connection and could
// destroy the answer before the peer has read it (RFC 9112 section 9.6).
func (c *Conn) Linger() error {
	if err := c.closeWrite(); err != nil {
		return c.nc.Close()
	}
	c.readEnd = time.Now().Add(time.Second)
	if c.nc.SetReadDeadline(c.readEnd) == nil {
		for left := 256 << 10; left > 0; {
			n, err := c.throw()
			if left -= n; err != nil {
				break
			}
		}
	}
	return c.nc.Close()
}

// throw reads once, into memory that it takes only when there is something to
// read: the views of the head stay as they are, and who waits costs nothing.
func (c *Conn) throw() (int, error) {
	if c.waits != nil {
		if err := c.waits.Await(); err != nil {
			return 0, err
		}
	}
	b := inPool.Get().(*[bufferSize]byte)
	defer inPool.Put(b)
	return c.nc.Read(b[:])
}

var errNoHalfClose = errors.New("connection cannot close one direction")

func (c *Conn) closeWrite() error {
	if h, ok := c.nc.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return errNoHalfClose
}

// Asks says that whether the connection is stale shows when an Exchange uses
// it, before anything is sent: nobody need look before.
func (c *Conn) Asks() bool { return c.ask != nil }

// Tell tells what the clock has just said to whoever asks it next, for the
// connection's next deadline: it is not looked at for each.
func (c *Conn) Tell(now time.Time) { c.now = now }

// Now is the time that was told, once, or else that of the clock.
func (c *Conn) Now() time.Time {
	if c.now.IsZero() {
		return time.Now() // without a write: one may read and another write the connection
	}
	now := c.now
	c.now = time.Time{}
	return now
}

// Write writes all of p under the coarse write deadline.
func (c *Conn) Write(p []byte) (int, error) {
	if err := c.writeWithin(); err != nil {
		return 0, err
	}
	return c.nc.Write(p)
}

// request writes p, all of a request, on a connection at rest.
func (c *Conn) request(p []byte) (int, error) {
	if c.ask == nil {
		return c.Write(p)
	}
	if c.w > c.r {
		return 0, errSpent
	}
	if err := c.writeWithin(); err != nil {
		return 0, err
	}
	n, err := c.ask.Ask(p)
	c.asked = err == nil
	return n, err
}

var errSpent = errors.New("connection has said what nobody asked for, or was closed by the peer")

// writeWithin sees to a write deadline between d and d+d/8 from now.
func (c *Conn) writeWithin() error {
	d := c.lim.WriteTimeout
	if d <= 0 {
		return nil
	}
	now := c.Now()
	if left := c.writeEnd.Sub(now); left >= d && left <= d+d/8 {
		return nil
	}
	return c.writeUntil(now.Add(d + d/8))
}

func (c *Conn) writeUntil(t time.Time) error {
	c.writeEnd = t
	return c.nc.SetWriteDeadline(t)
}

// readWithin sees to a read deadline between d and d+d/8 from now. Deadlines
// are coarse so that a busy connection does not set one for every message.
func (c *Conn) readWithin(d time.Duration) { c.readFrom(time.Now(), d) }

// readFrom is readWithin at this time.
func (c *Conn) readFrom(now time.Time, d time.Duration) {
	if left := c.readEnd.Sub(now); left >= d && left <= d+d/8 {
		return
	}
	c.readUntil(now.Add(d + d/8))
}

func (c *Conn) readUntil(t time.Time) {
	c.readEnd = t
	// A failure here means a closed connection, which the next read reports.
	_ = c.nc.SetReadDeadline(t)
}

var errFull = errors.New("read buffer is full")

// fill reads once. It returns an error only when no byte came.
func (c *Conn) fill() error {
	if c.buf == nil && c.late != nil && !c.asked {
		n, err := c.late.ReadLate(c)
		return c.filled(n, err)
	}
	if err := c.hold(); err != nil {
		return err
	}
	switch {
	case c.r == c.w:
		c.r, c.w = c.floor, c.floor
	case c.w == len(c.buf) && c.r > c.floor:
		c.w = c.floor + copy(c.buf[c.floor:], c.buf[c.r:c.w])
		c.r = c.floor
	}
	if c.w == len(c.buf) {
		return errFull
	}
	n, err := c.nc.Read(c.buf[c.w:])
	return c.filled(n, err)
}

// filled is the end of a read.
func (c *Conn) filled(n int, err error) error {
	if n > 0 {
		c.w += n
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// Begins waits until it can be told whether what is received first is this text,
// and leaves it there. Errors are as for ReadRequest.
func (c *Conn) Begins(text string) (bool, error) {
	for armed := false; ; {
		have := c.buf[c.r:c.w]
		k := min(len(have), len(text))
		switch {
		case string(have[:k]) != text[:k]:
			return false, nil
		case k == len(text):
			return true, nil
		case k == 0:
			c.readWithin(c.lim.IdleTimeout)
		case !armed:
			armed = true
			c.readUntil(time.Now().Add(c.lim.HeadTimeout))
		}
		if err := c.fill(); err != nil {
			return false, headError(err, k > 0)
		}
	}
}

// Unread is a copy of what was received and not read.
func (c *Conn) Unread() []byte { return bytes.Clone(c.buf[c.r:c.w]) }

// head waits for a complete head and returns it without the last CRLF, so
// that it ends in the CRLF of its last line. With arm, the first byte starts
// the absolute head deadline.
func (c *Conn) head(arm bool) ([]byte, error) {
	c.floor = 0
	if c.r == c.w {
		c.r, c.w = 0, 0
	}
	seen := 0 // bytes from c.r on that hold no complete blank line
	for {
		if n := headEnd(c.buf[c.r:c.w], max(seen-3, 0)); n > 0 {
			return c.takeHead(n)
		}
		had := c.w - c.r
		if bareLF(c.buf[c.r+max(seen-1, 0):c.w], seen > 0) {
			return nil, refuse(ReasonLineEnding, "a line ends in a bare LF; lines end in CRLF")
		}
		if had >= c.lim.Head {
			return nil, c.tooLarge()
		}
		if had > 0 && arm {
			arm = false
			c.readUntil(time.Now().Add(c.lim.HeadTimeout))
		}
		seen = had
		if c.w == len(c.buf) && c.r == 0 && c.buf != nil {
			c.grow(min(2*len(c.buf), c.lim.Head+roomSize))
		}
		if err := c.fill(); err != nil {
			return nil, headError(err, had > 0)
		}
	}
}

// headEnd is how many bytes of b are a head with its blank line, 0 when that has
// not come. It does not begin before from.
func headEnd(b []byte, from int) int {
	for i := from; ; {
		n := bytes.IndexByte(b[i:], '\n')
		if n < 0 {
			return 0
		}
		i += n + 1
		if i >= from+2 && i+1 < len(b) && b[i-2] == '\r' && b[i] == '\r' && b[i+1] == '\n' {
			return i + 2
		}
	}
}

// takeHead consumes a head of n bytes and keeps room behind it.
func (c *Conn) takeHead(n int) ([]byte, error) {
	if n > c.lim.Head {
		return nil, c.tooLarge()
	}
	if len(c.buf)-c.r-n < roomSize {
		if c.r > 0 {
			c.w = copy(c.buf, c.buf[c.r:c.w])
			c.r = 0
		}
		if len(c.buf)-n < roomSize {
			c.grow(n + roomSize)
		}
	}
	h := c.buf[c.r : c.r+n-2]
	c.r += n
	c.floor = c.r
	return h, nil
}

func (c *Conn) grow(size int) {
	if size <= len(c.buf) {
		return
	}
	b := make([]byte, size)
	c.w = copy(b, c.buf[c.r:c.w])
	c.r, c.buf = 0, b
}

// tooLarge tells a head without end from a request line without end.
func (c *Conn) tooLarge() error {
	if i := bytes.IndexByte(c.buf[c.r:c.w], '\n'); i < 0 || i > c.lim.Target {
		return refuseAs(http.StatusRequestURITooLong, ReasonTargetTooLong, "the request line is longer than the limit")
	}
	return refuseAs(http.StatusRequestHeaderFieldsTooLarge, ReasonHeadTooLarge, "the head is larger than the limit")
}

func headError(err error, begun bool) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded) && begun:
		return ErrHeadTimeout
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ErrIdleTimeout
	case errors.Is(err, io.EOF) && begun:
		return io.ErrUnexpectedEOF
	}
	return err
}

// bareLF finds an LF without CR before it. With prior, b[0] was looked at
// already and stands there to be seen before b[1].
func bareLF(b []byte, prior bool) bool {
	from := 0
	if prior {
		from = 1
	}
	for from < len(b) {
		i := bytes.IndexByte(b[from:], '\n')
		if i < 0 {
			return false
		}
		if from+i == 0 || b[from+i-1] != '\r' {
			return true
		}
		from += i + 1
	}
	return false
}
