// Package http2 carries many calls at once over one connection of HTTP/2, at
// either end of it. It knows no policy.
//
// A Lane is a net.Conn of its own inside the connection. What is said on it is
// HTTP/1.1, call after call, so that package http1 and the chains above it
// read, judge and write a call as they do everybody else's; on the wire each
// call is a stream. So a lane of a server reads requests and writes answers, a
// lane of a client the other way round. A field section becomes a head when it
// has been found to hold nothing that HTTP/2 forbids, and http1 looks at it
// again; data becomes a body of known length or in chunks. After an answer of
// 101 to a WebSocket, or of 2xx to CONNECT, bytes pass as they are.
//
// The layers, each on those before it: frame.go, errors.go (frames, codes),
// huffman.go, table.go, decode.go and section.go (field sections as they are
// received), hpack.go (as they are sent), write.go (what is queued by all lanes
// goes out in one write), lane.go (what is read of a lane, its window and its
// deadlines), send.go (HTTP/1.1 to frames), read.go (data to lanes), control.go
// and head.go (the other frames), server.go with answer.go (how calls begin, and
// are answered, at the end that accepts), and client.go (the end that dials).
//
// Run owns two goroutines, one that reads and one that writes what nobody else
// does. Where two locks meet, the Conn's is taken before the Lane's.
package http2

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
	"sallyport/internal/socket"
)

// Proto is the name of the protocol in ALPN.
const Proto = "h2"

// A Config bounds what a peer can make this end hold. The zero value means the
// defaults.
type Config struct {
	// Streams is how many streams the peer may have open at once, or we with it,
	// who take no more than it says either. Default 100.
	Streams int
	// Head is the size of a decoded field section in bytes, each field counted
	// with 32 bytes more. Default 32 KiB.
	Head int
	// Window is what one stream may hold at first of bytes that were received
	// and not read, MaxWindow what it may grow to while the sender runs out of
	// it. Defaults 64 KiB and 256 KiB.
	Window, MaxWindow int
	// Buffer bounds the same for the whole connection. Default 1 MiB. At the end
	// that accepts, what is more than the 64 KiB that the protocol gives every
	// connection comes out of the Budget, once the peer uses it.
	Buffer int
	// Budget bounds by how much the windows of many connections, and of their
	// streams, grow. Optional.
	Budget *mux.Budget
	// First bounds what many connections hold unread of those 64 KiB, at the end
	// that accepts, but for 4 KiB of each. A call whose data finds nothing left of
	// it is reset. Optional.
	First *mux.Budget
	// HeadTimeout is how long a preface, a field section, or any other frame
	// than data may take from its first byte to its last. Default 10 s.
	HeadTimeout time.Duration
	// KeepAlive is after how long of silence the peer is asked for a sign of
	// life; after as long again without one the connection ends. A client asks
	// only when the silence follows something that it has sent: servers take
	// more for a flood. Default 15 s; negative: nobody is asked.
	KeepAlive time.Duration
	// Idle is how long a connection without calls is kept, give or take a
	// KeepAlive. Default 60 s.
	Idle time.Duration
	// WriteTimeout is how long the peer may take nothing at all. Default 60 s.
	WriteTimeout time.Duration
	// Broken is told of each call that the peer breaks off or has us break off;
	// false: that was too much, and the connection ends. It must not block.
	// Optional.
	Broken func() bool
	// Violated is told of what ends a connection, or a stream, by the fault of
	// the peer. It must not block. Optional.
	Violated func(Reason)
}

func (c Config) withDefaults() Config {
	c.Streams = cmp.Or(c.Streams, 100)
	c.Head = cmp.Or(c.Head, 32<<10)
	c.Window = max(cmp.Or(c.Window, 64<<10), firstWindow)
	c.MaxWindow = max(cmp.Or(c.MaxWindow, 256<<10), c.Window)
	c.Buffer = max(cmp.Or(c.Buffer, 1<<20), c.Window)
	c.HeadTimeout = cmp.Or(c.HeadTimeout, 10*time.Second)
	c.KeepAlive = cmp.Or(c.KeepAlive, 15*time.Second)
	c.Idle = cmp.Or(c.Idle, time.Minute)
	c.WriteTimeout = cmp.Or(c.WriteTimeout, time.Minute)
	if c.Broken == nil {
		c.Broken = func() bool { return true }
	}
	if c.Violated == nil {
		c.Violated = func(Reason) {}
	}
	return c
}

const (
	// lingering is how long the end that takes calls waits for the other one
	// to close, once there is none left, and before to hear that it leaves.
	lingering = time.Second
	// lastWords is how long a connection that ends may take to say so.
	lastWords = time.Second
)

// A Conn is one connection. The end that dialled opens streams, the other one
// accepts them.
type Conn struct {
	nc      net.Conn
	borrows lateReader                 // nc, if it is one
	waits   interface{ Await() error } // nc, if it waits without memory
	cfg     Config
	server  bool
	accept  func(*Lane) bool // of a server

	// heard counts the reads, waiting the lanes whose reader waits, open the
	// lanes; the last is written under mu.
	heard   atomic.Uint64
	waiting atomic.Int64
	open    atomic.Int64
	inLeft  atomic.Int64 // what the peer may still send on the connection
	room    atomic.Int64 // the window of the connection
	eaten   atomic.Int64 // what was read of that and not granted anew

	extended atomic.Bool // the peer takes extended CONNECT
	secure   bool        // TLS is underneath

	in reader

	mu        sync.Mutex // guards the fields below
	streams   map[uint32]*Lane
	lanes     map[*Lane]struct{} // all that are not closed at this end
	idle      []*Lane            // of a server: those whose reader waits for a call
	last      uint32             // the stream opened last
	tableless bool               // the peer knows that our sections need no table
	limit     int                // how many streams the peer takes
	credit    int                // what the peer lets us send on the connection
	first     int                // what it lets us send on a new stream
	thirsty   []*Lane            // those that wait for credit of the connection
	resets    [256]uint32        // the streams that we have reset last
	nresets   int
	lost      uint32 // the last stream that had to make room there
	widened   int    // what the window of the connection has of the budget
	paid      int    // what of First pays for data that is not read
	leaving   leaving
	err       error // why it ended
	out       writer
	tick      *time.Timer
	seen      uint64    // heard at the last tick
	said      uint64    // what was sent until then
	asked     bool      // a sign of life, at the last tick
	empty     time.Time // since when there is no call
	parted    bool      // the peer has its time to close
	deaf      bool      // nobody reads any more

	hearing time.Duration // how long the peer may take to hear that we leave; a field for tests
}

// leaving is how far a connection is on its way to the end.
type leaving uint8

const (
	staying leaving = iota
	warned          // the peer knows; what is on its way from it is still taken
	gone            // no new streams
)

// A lateReader reads into memory that it borrows once there is something to read.
type lateReader interface {
	ReadLate(socket.Lender) (int, error)
}

func newConn(nc net.Conn, cfg Config, accept func(*Lane) bool) *Conn {
	c := &Conn{
		nc: nc, cfg: cfg.withDefaults(), server: accept != nil, accept: accept, limit: firstStreams,
		streams: map[uint32]*Lane{}, lanes: map[*Lane]struct{}{}, empty: time.Now(),
		credit: firstWindow, first: firstWindow, hearing: lingering,
	}
	c.borrows, _ = nc.(lateReader)
	c.waits, _ = nc.(interface{ Await() error })
	_, c.secure = nc.(interface{ ConnectionState() tls.ConnectionState })
	c.out.work.L = &c.mu
	c.in.noise = mux.NewBucket(noiseBurst, noiseRate)
	c.in.block.init(c.cfg.Head)
	c.room.Store(firstWindow)
	if !c.server || c.cfg.Budget == nil {
		c.room.Store(int64(max(c.cfg.Buffer, firstWindow)))
	}
	c.inLeft.Store(c.room.Load())
	c.greet()
	return c
}

// firstStreams is how many streams may be opened before the peer has said.
const firstStreams = 100

// greet queues what an end says first.
func (c *Conn) greet() {
	o := &c.out
	list := []setting{
		{settingWindow, uint32(c.cfg.Window)}, {settingList, uint32(c.cfg.Head)},
	}
	if c.server {
		list = append(list, setting{settingStreams, uint32(c.cfg.Streams)}, setting{settingExtended, 1})
	} else {
		o.pend = append(o.pend, Preface...)
		list = append(list, setting{settingPush, 0})
	}
	o.pend = appendSettings(o.pend, list...)
	if more := int(c.room.Load()) - firstWindow; more > 0 {
		o.pend = appendWindow(o.pend, 0, more)
	}
}

// Run serves the connection until it ends, and closes it. The error is nil when
// that was in order: closed or drained at either end.
func (c *Conn) Run() error {
	c.mu.Lock()
	c.tick = time.AfterFunc(c.cfg.beat(), c.lookAround)
	c.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.write()
	}()
	err := c.read()
	c.mu.Lock()
	c.deaf = true
	c.endLocked(err)
	c.narrow()
	c.mu.Unlock()
	<-done
	c.linger()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tick.Stop()
	if errors.Is(c.err, ErrClosing) || errors.Is(c.err, io.EOF) {
		return nil
	}
	return c.err
}

// linger closes behind last words that tell of a mistake. A plain close on bytes
// that were not read could destroy them on their way.
func (c *Conn) linger() {
	defer c.nc.Close()
	if !isViolation(c.err) {
		return
	}
	if h, ok := c.nc.(interface{ CloseWrite() error }); !ok || h.CloseWrite() != nil {
		return
	}
	_ = c.nc.SetReadDeadline(time.Now().Add(lastWords))
	_, _ = io.CopyN(io.Discard, c.nc, lingerBytes)
}

func isViolation(err error) bool {
	var v *Violation
	return errors.As(err, &v)
}

// lingerBytes is how much may be on its way to us when we end a connection.
const lingerBytes = 256 << 10

// Live says whether the connection takes new calls, if there is room.
func (c *Conn) Live() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err == nil && c.leaving == staying
}

// Drain has the connection end once its calls have. The peer is told, so that
// it opens no new ones; those that were on their way are taken, later ones are
// refused.
func (c *Conn) Drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leave()
}

// leave begins the end. A server says so twice (RFC 9113 section 6.8): what the
// peer sends before it has heard the first is still taken, and its answer to the
// ping tells when that is.
func (c *Conn) leave() {
	if c.leaving != staying || c.err != nil {
		return
	}
	if !c.server {
		c.leaving = gone
		c.parting()
		return
	}
	c.leaving = warned
	c.out.pend = appendGoaway(c.out.pend, maxStream, NoError)
	c.out.pend = appendPing(c.out.pend, 0, drainWord)
	c.out.wake()
	time.AfterFunc(c.hearing, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.gone()
	})
}

// gone takes no new streams from here on.
func (c *Conn) gone() {
	if c.leaving == gone || c.err != nil {
		return
	}
	c.leaving = gone
	c.out.pend = appendGoaway(c.out.pend, c.last, NoError)
	c.out.wake()
	c.parting()
}

// parting ends a connection that is to end and has no call left. A server
// leaves it to its peer to close, for a while.
func (c *Conn) parting() {
	switch {
	case c.leaving != gone || c.err != nil || len(c.streams) > 0:
	case !c.server:
		c.endLocked(ErrClosing)
	case !c.parted:
		c.parted = true
		time.AfterFunc(lingering, func() { c.end(ErrClosing) })
	}
}

// Close ends the connection and every call at once. It does not wait.
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

// endLocked takes note of the end, tells every lane, and has the writer say
// what is queued and close. The first reason stays.
func (c *Conn) endLocked(err error) {
	if c.err != nil {
		return
	}
	var v *Violation
	switch {
	case errors.As(err, &v):
		c.cfg.Violated(v.Reason)
		c.out.pend = appendGoaway(c.out.pend, c.heardLast(), v.Code)
	case errors.Is(err, ErrClosing) && c.leaving != gone, errors.Is(err, ErrSilent):
		c.out.pend = appendGoaway(c.out.pend, c.heardLast(), NoError)
	case c.leaving == gone && len(c.streams) == 0:
		err = ErrClosing // both ends meant to close, and one was first
	}
	c.err = err
	told := err
	if err == io.EOF {
		told = io.ErrUnexpectedEOF // to a lane the end came without a word
	}
	for l := range c.lanes {
		l.broke(told)
	}
	clear(c.streams)
	// Whoever writes now must come to an end; the writer then has as long again.
	_ = c.nc.SetWriteDeadline(time.Now().Add(lastWords))
	c.out.wake()
}

// heardLast is the last stream of the peer that was acted on.
func (c *Conn) heardLast() uint32 {
	if c.server {
		return c.last
	}
	return 0
}

// The words of our pings.
const (
	pingWord  = 0x73616c6c79706f72
	drainWord = 0x647261696e696e67
)

// beat is how often lookAround runs.
func (c Config) beat() time.Duration {
	if c.KeepAlive < 0 {
		return c.Idle
	}
	return c.KeepAlive
}

// lookAround runs once in a beat. It asks a peer that is silent for a sign
// of life, closes what has no calls for long, and sees to memory for windows.
func (c *Conn) lookAround() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	heard := c.heard.Load()
	switch {
	case heard != c.seen:
		c.seen, c.said, c.asked = heard, c.out.sent, false
	case c.cfg.KeepAlive < 0, !c.server && !c.asked && c.out.sent == c.said:
	case c.asked:
		c.endLocked(ErrSilent)
		return
	default:
		c.asked = true
		c.out.pend = appendPing(c.out.pend, 0, pingWord)
		c.out.wake()
	}
	c.withhold()
	c.repay()
	if c.inLeft.Load() == 0 {
		c.widen() // there may be memory by now; who may send nothing does not ask again
	}
	if len(c.streams) == 0 && time.Since(c.empty) >= c.cfg.Idle || c.hoards() {
		c.leave()
	}
	c.tick.Reset(c.cfg.beat())
}
