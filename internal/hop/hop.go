// Package hop carries many calls at once over one connection between two of
// our own proxies: the protocol sallyport/1.
//
// A Stream is a net.Conn of its own inside the connection. What is said on it
// is HTTP/1.1, so that both ends read, judge and write a call with the code
// that serves everybody else; the package itself knows bytes only. Streams stay
// open between calls. docs/hop.md has the wire.
//
// What concurrent streams write is sent together: whoever writes takes along
// all that the others have queued, in few TLS records and one system call.
// Each stream has a window, so that one that is not read holds up no other.
//
// Run owns two goroutines, one that reads and one that writes what nobody else
// does. Where two locks meet, the Conn's is taken before the Stream's.
package hop

import (
	"cmp"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/mux"
)

// Proto is the name of the protocol in ALPN.
const Proto = "sallyport/1"

// ErrRefused is returned by a Stream whose peer has acted on nothing that was
// sent since its last answer: the call may be made again, whatever its method.
var ErrRefused = errors.New("stream refused by the peer")

// ErrCancelled is returned by a Stream that the peer has broken off.
var ErrCancelled = errors.New("stream broken off by the peer")

// ErrFull is returned by Open when no further stream fits.
var ErrFull = errors.New("as many streams as the peer takes")

// ErrClosing is returned by Open on a connection that takes no new streams, and
// by the streams of one that was closed at this end.
var ErrClosing = errors.New("connection is closing")

// ErrSilent is the end of a connection whose peer has said nothing for too long.
var ErrSilent = errors.New("peer is silent")

// A Config bounds what a peer can make this end hold. The zero value means the
// defaults.
type Config struct {
	// Streams is how many streams the peer may have open at once. Default 256.
	Streams int
	// MaxWindow is what one stream may hold at most of bytes that were received
	// and not read. It starts at 32 KiB and grows while the sender runs out of
	// it. Default 256 KiB.
	MaxWindow int
	// Extra is by how much all windows of the connection together may grow.
	// Default 1 MiB.
	Extra int
	// Budget bounds the same for many connections. Optional.
	Budget *mux.Budget
	// First is what the streams may hold unread of their first windows, beyond
	// 2 KiB each; one whose data finds nothing left is broken off, of which Hoarded
	// is told. It must not block. Both are optional.
	First   *mux.Budget
	Hoarded func()
	// Broken is told of each call that the peer breaks off; false: that was too
	// much, and the connection ends. It must not block. Optional.
	Broken func() bool
	// KeepAlive is after how long of silence the peer is asked for a sign of
	// life; after as long again without one the connection ends. Default 15 s.
	KeepAlive time.Duration
	// Idle is how long a connection without streams is kept, give or take a
	// KeepAlive. Default 60 s.
	Idle time.Duration
	// WriteTimeout is how long the peer may take nothing at all. Default 60 s.
	WriteTimeout time.Duration
}

func (c Config) withDefaults() Config {
	c.Streams = cmp.Or(c.Streams, 256)
	c.MaxWindow = max(cmp.Or(c.MaxWindow, 256<<10), baseWindow)
	c.Extra = cmp.Or(c.Extra, 1<<20)
	c.KeepAlive = cmp.Or(c.KeepAlive, 15*time.Second)
	c.Idle = cmp.Or(c.Idle, time.Minute)
	c.WriteTimeout = cmp.Or(c.WriteTimeout, time.Minute)
	if c.Hoarded == nil {
		c.Hoarded = func() {}
	}
	if c.Broken == nil {
		c.Broken = func() bool { return true }
	}
	return c
}

// lingering is how long the end that takes streams waits for the other one to
// close, once there is none left.
const lingering = 5 * time.Second

// A Conn is one connection between two proxies. The end that dialled opens
// streams, the other one accepts them.
type Conn struct {
	nc     net.Conn
	waits  interface{ Await() error } // nc, if it waits without memory
	cfg    Config
	accept func(*Stream) bool // nil at the end that opens

	// heard counts the reads, waiting the streams whose reader waits, open the
	// streams; the last is written under mu.
	heard   atomic.Uint64
	waiting atomic.Int64
	open    atomic.Int64
	extra   atomic.Int64 // by how much windows have grown

	in reader

	mu      sync.Mutex // guards the fields below
	streams map[uint32]*Stream
	held    map[*Stream]struct{} // all that are not closed at this end
	last    uint32               // the stream opened last
	limit   int                  // how many streams the peer takes
	leaving bool                 // no new streams: either end has said so
	err     error                // why it ended
	out     writer
	tick    *time.Timer
	seen    uint64    // heard at the last tick
	asked   bool      // a sign of life, at the last tick
	pings   int       // unanswered
	empty   time.Time // since when there is no stream
	parted  bool      // the peer has its time to close
}

// Dialled makes a Conn of a connection that this end has dialled and on which
// both ends agreed on Proto.
func Dialled(nc net.Conn, cfg Config) *Conn { return newConn(nc, cfg, nil) }

// Accepted makes a Conn of a connection that this end has accepted and on which
// both ends agreed on Proto. accept is told of each new stream and must not
// block; on false the stream is refused.
func Accepted(nc net.Conn, cfg Config, accept func(*Stream) bool) *Conn {
	c := newConn(nc, cfg, accept)
	c.out.hello(c.cfg.Streams)
	return c
}

func newConn(nc net.Conn, cfg Config, accept func(*Stream) bool) *Conn {
	c := &Conn{
		nc: nc, cfg: cfg.withDefaults(), accept: accept, limit: firstStreams,
		streams: map[uint32]*Stream{}, held: map[*Stream]struct{}{}, empty: time.Now(),
	}
	c.waits, _ = nc.(interface{ Await() error })
	c.out.work.L = &c.mu
	c.in.noise, c.in.opens = mux.NewBucket(noiseBurst, noiseRate), mux.NewBucket(opensBurst, opensRate)
	return c
}

// Run serves the connection until it ends, and closes it. The error is nil when
// that was in order: closed or drained at either end.
func (c *Conn) Run() error {
	c.mu.Lock()
	c.tick = time.AfterFunc(c.cfg.KeepAlive, c.lookAround)
	c.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.write()
	}()
	c.end(c.read())
	<-done
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tick.Stop()
	if errors.Is(c.err, ErrClosing) || errors.Is(c.err, io.EOF) {
		return nil
	}
	return c.err
}

// Open makes a new stream. The peer learns of it with the first bytes written.
func (c *Conn) Open() (*Stream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil || c.leaving:
		return nil, ErrClosing
	case c.last+uint32(len(c.held)) >= maxStream:
		c.leave() // numbers are not used again
		return nil, ErrClosing
	case len(c.held) >= c.limit:
		return nil, ErrFull
	}
	return c.hold(), nil
}

// forget takes a stream out of those that frames are for.
func (c *Conn) forget(s *Stream) {
	delete(c.streams, s.id)
	if len(c.streams) == 0 {
		c.parting()
	}
}

// hold makes a stream that counts until it is closed at this end.
func (c *Conn) hold() *Stream {
	s := newStream(c)
	c.held[s] = struct{}{}
	c.open.Store(int64(len(c.held)))
	return s
}

// release ends the count of a stream.
func (c *Conn) release(s *Stream) {
	delete(c.held, s)
	c.open.Store(int64(len(c.held)))
	if len(c.held) == 0 {
		c.empty = time.Now()
		c.parting()
	}
}

// Room says how many more streams can be opened now.
func (c *Conn) Room() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil || c.leaving {
		return 0
	}
	return c.limit - len(c.held)
}

// Live says whether the connection takes new streams, if there is room.
func (c *Conn) Live() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err == nil && !c.leaving
}

// Drain has the connection end once its streams have. The peer is told, so that
// it opens no new ones; those that it opens all the same are refused.
func (c *Conn) Drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leave()
}

func (c *Conn) leave() {
	if c.leaving || c.err != nil {
		return
	}
	c.leaving = true
	c.out.control(goawayFrame(goDrain))
	c.out.wake()
	c.parting()
}

// parting ends a connection that is to end and has no stream left. The end that
// takes streams leaves it to the other one to close: what that may just be
// opening must hear that it was refused. That end in turn does not wait for who
// holds streams that are over.
func (c *Conn) parting() {
	switch {
	case !c.leaving || c.err != nil:
	case c.accept == nil && len(c.streams) == 0:
		c.endLocked(ErrClosing)
	case c.accept != nil && len(c.held) == 0 && !c.parted:
		c.parted = true
		time.AfterFunc(lingering, func() { c.end(ErrClosing) })
	}
}

// Close ends the connection and every stream at once. It does not wait.
func (c *Conn) Close() { c.end(ErrClosing) }

// Sever is Close without last words to the peer.
func (c *Conn) Sever() {
	c.end(ErrClosing)
	mux.Sever(c.nc)
}

// ConnectionState is that of the TLS connection.
func (c *Conn) ConnectionState() tls.ConnectionState { return mux.StateOf(c.nc) }

func (c *Conn) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endLocked(err)
}

// endLocked takes note of the end, tells every stream, and has the writer say
// what is queued and close. The first reason stays.
func (c *Conn) endLocked(err error) {
	if c.err != nil {
		return
	}
	var v *Violation
	if errors.As(err, &v) {
		c.out.control(goawayFrame(goViolation))
	} else if c.leaving && len(c.held) == 0 {
		err = ErrClosing // both ends meant to close, and one was first
	}
	c.err = err
	told := err
	if err == io.EOF {
		told = io.ErrUnexpectedEOF // to a stream the end came without a word
	}
	for s := range c.held {
		s.broke(told)
	}
	clear(c.streams)
	// Whoever writes now must come to an end; the writer then has as long again.
	_ = c.nc.SetWriteDeadline(time.Now().Add(lastWords))
	c.out.wake()
}

// lastWords is how long a connection that ends may take to say so.
const lastWords = time.Second

// lookAround runs once in a KeepAlive. It asks a peer that is silent for a sign
// of life, and closes what has no streams for long.
func (c *Conn) lookAround() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	heard := c.heard.Load()
	switch {
	case heard != c.seen:
		c.seen, c.asked = heard, false
	case c.asked:
		c.endLocked(ErrSilent)
		return
	default:
		c.asked = true
		c.pings++
		c.out.control(pingFrame())
		c.out.wake()
	}
	if len(c.held) == 0 && time.Since(c.empty) >= c.cfg.Idle {
		c.leave()
	}
	c.tick.Reset(c.cfg.KeepAlive)
}
