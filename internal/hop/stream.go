package hop

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"sallyport/internal/mux"
)

// errEnded is returned by Write after CloseWrite.
var errEnded = errors.New("stream was ended in this direction")

// A Stream is one connection within a Conn. One goroutine at a time may read
// it, and one write it; Close and the deadlines are for everybody. It must be
// closed, or it counts as open for ever.
type Stream struct {
	c *Conn

	// Guarded by the lock of c.
	id      uint32 // 0 until the first write of who opened it
	credit  int    // what the peer lets us send
	queued  int    // our bytes in c.out.pend
	waits   bool   // its writer waits for room
	inLine  bool   // in c.out.line
	turn    bool   // it has waited there
	ended   bool   // we have sent the end
	peerEnd bool   // the peer has
	known   bool   // it was accepted
	closed  bool
	cut     func() // see OnCut
	spared  bool   // see Spared
	werr    error
	wend    mux.Deadline
	room    sync.Cond // for credit, and for room in the queue

	mu       sync.Mutex // guards the fields below
	in       mux.Buffer // received and not read
	dst      []byte     // where a reader waits for bytes
	from     lender     // who lends that, to a reader that has none yet
	got      int        // how many bytes it has been given there
	awaits   bool       // a reader waits without a place for bytes
	hand     Hand       // who takes what comes next; nil: a reader does
	left     int        // what the peer may still send
	consumed int        // what was read and not granted anew
	window   int
	paid     int  // of First
	starved  bool // the peer has used up the window
	eof      bool
	rerr     error
	rend     mux.Deadline
	more     sync.Cond
}

func newStream(c *Conn) *Stream {
	s := &Stream{c: c, credit: baseWindow, left: baseWindow, window: baseWindow}
	s.room.L, s.more.L = &c.mu, &s.mu
	s.rend.OnPass = s.leave
	return s
}

// Spared is for who OnCut calls: the stream was not broken off by the peer, but by us,
// for want of memory that others hold.
func (s *Stream) Spared() bool { return s.spared }

// OnCut has f called when the peer breaks the stream off, or the connection,
// which should close it: at once if it has. It must not block.
func (s *Stream) OnCut(f func()) {
	c := s.c
	c.mu.Lock()
	over := c.err != nil
	if !over {
		s.cut = f
	}
	c.mu.Unlock()
	if over {
		f()
	}
}

// Read reads what the peer has written. What came before the end of the stream
// is read first, however it ended.
func (s *Stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	s.mu.Lock()
	for s.in.Len() == 0 {
		if err := s.over(); err != nil {
			s.mu.Unlock()
			return 0, err
		}
		s.dst = p
		s.c.waiting.Add(1)
		s.more.Wait()
		s.c.waiting.Add(-1)
		s.dst = nil
		if n := s.got; n > 0 {
			s.got = 0
			s.took(n)
			return n, nil
		}
	}
	n := s.in.Take(p)
	s.took(n)
	return n, nil
}

// A lender lends memory for one read: Lend when something has come, Back when
// nothing was there after all.
type lender = interface {
	Lend() []byte
	Back()
}

// ReadLate is Read into memory that is borrowed once something has come: what
// has is then where it will be read, and nobody holds memory while he waits.
func (s *Stream) ReadLate(from lender) (int, error) {
	s.mu.Lock()
	for s.in.Len() == 0 {
		if err := s.over(); err != nil {
			s.mu.Unlock()
			return 0, err
		}
		s.from = from
		s.c.waiting.Add(1)
		s.more.Wait()
		s.c.waiting.Add(-1)
		s.from, s.dst = nil, nil
		if n := s.got; n > 0 {
			s.got = 0
			s.took(n)
			return n, nil
		}
	}
	n := s.in.Take(from.Lend())
	s.took(n)
	return n, nil
}

// A Hand takes what comes next on a stream in place of a reader, from the
// goroutine of the Conn that reads: it must not block.
type Hand = interface {
	// Claim says whether it is still to take what has come, to which Take is
	// called. Locks are held: Recall comes before it or waits for it.
	Claim() bool
	// Take takes p, which is void afterwards, or leaves it to a reader.
	Take(p []byte) bool
	// Left says that it is for a reader to see what became of the stream: its end,
	// or the deadline. Locks are held.
	Left()
}

// Answer has h take what comes next, once. It is false when there is something
// to read already, or the end.
func (s *Stream) Answer(h Hand) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.in.Len() > 0 || s.over() != nil {
		return false
	}
	s.hand = h
	s.c.waiting.Add(1)
	return true
}

// Recall takes back what Answer has set. What has claimed nothing by then never
// will.
func (s *Stream) Recall() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unhand()
}

// unhand gives the Hand that was set. The lock is held.
func (s *Stream) unhand() Hand {
	h := s.hand
	if h != nil {
		s.hand = nil
		s.c.waiting.Add(-1)
	}
	return h
}

// leave tells the Hand that was set. The lock is held.
func (s *Stream) leave() {
	if h := s.unhand(); h != nil {
		h.Left()
	}
}

// Await waits until there is something to read, or the end, without a buffer to
// read it into. A deadline ends it.
func (s *Stream) Await() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.in.Len() == 0 && s.over() == nil {
		s.awaits = true
		s.c.waiting.Add(1)
		s.more.Wait()
		s.c.waiting.Add(-1)
		s.awaits = false
	}
	if err := s.over(); s.in.Len() == 0 && err == os.ErrDeadlineExceeded { //nolint:errorlint // made in over
		return err
	}
	return nil
}

func (s *Stream) over() error {
	switch {
	case s.rerr == net.ErrClosed:
		return s.rerr
	case s.eof: // all is here, whatever became of the stream since
		return io.EOF
	case s.rerr != nil:
		return s.rerr
	case s.rend.Passed:
		return os.ErrDeadlineExceeded
	}
	return nil
}

// took counts what was read, and unlocks. When half of the window was, the peer
// gets it anew, and more if it has had to wait.
func (s *Stream) took(n int) {
	s.consumed += n
	s.repay()
	if s.consumed < s.window/2 || s.eof || s.rerr != nil {
		s.mu.Unlock()
		return
	}
	grant := s.consumed
	if s.starved && s.window < s.c.cfg.MaxWindow && s.c.grow(s.window) {
		grant += s.window
		s.window *= 2
	}
	s.starved, s.consumed = false, 0
	s.left += grant
	s.mu.Unlock()
	s.grant(grant)
}

// grow takes from what all windows together may grow.
func (c *Conn) grow(n int) bool {
	if c.extra.Add(int64(n)) > int64(c.cfg.Extra) || !c.cfg.Budget.Take(n) {
		c.extra.Add(-int64(n))
		return false
	}
	return true
}

func (s *Stream) grant(n int) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.werr != nil || s.closed || s.peerEnd {
		return
	}
	if err := c.say(windowFrame(s.id, n)); err != nil {
		c.endLocked(err)
	}
}

// deliver takes what the peer has sent: to where a reader waits, else into the
// buffer, for which the window is the bound.
func (s *Stream) deliver(p []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(p) > s.left {
		return violated(Overrun)
	}
	if s.left -= len(p); s.left == 0 {
		s.starved = true
	}
	if s.rerr != nil {
		return nil // nobody will read it
	}
	if h := s.unhand(); h != nil && h.Claim() {
		return s.handTo(h, p)
	}
	if s.from != nil && s.dst == nil {
		s.dst = s.from.Lend()
	}
	if s.dst != nil && s.in.Len() == 0 && s.got < len(s.dst) {
		n := copy(s.dst[s.got:], p)
		s.got += n
		p = p[n:]
	}
	if len(p) > 0 {
		if err := s.keep(p); err != nil {
			return err
		}
	}
	s.more.Signal()
	return nil
}

// handTo gives p to h, and to a reader if h does not take it. It gives the lock
// up: once h has taken p, the stream may carry the next call.
func (s *Stream) handTo(h Hand, p []byte) error {
	s.consumed += len(p)
	s.mu.Unlock()
	took := h.Take(p)
	s.mu.Lock()
	switch {
	case !took:
		s.consumed -= len(p)
		if s.rerr == nil {
			if err := s.keep(p); err != nil {
				return err
			}
			s.more.Signal()
		}
	case s.consumed >= s.window/2:
		s.took(0) // unlocks
		s.mu.Lock()
	}
	return nil
}

// Write queues p and sees that it is sent. It waits while the peer lets nothing
// more be sent.
func (s *Stream) Write(p []byte) (n int, err error) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(p) > 0 {
		k, err := s.sendable(len(p))
		if err != nil {
			return n, err
		}
		s.queue(p[:k], 0)
		n += k
		p = p[k:]
	}
	if !c.out.flushing && len(c.out.pend) > 0 {
		c.flush()
	}
	return n, nil
}

// sendable waits until some of n bytes can be queued.
func (s *Stream) sendable(n int) (int, error) {
	c := s.c
	for {
		var err error
		switch {
		case s.werr != nil:
			err = s.werr
		case s.ended:
			err = errEnded
		case s.wend.Passed:
			err = os.ErrDeadlineExceeded
		}
		if err != nil {
			if s.turn {
				s.turn = false
				c.out.turns()
			}
			return 0, err
		}
		if s.credit > 0 {
			if k := min(n, s.credit, s.mayQueue(n)-s.queued); k > 0 {
				s.turn = false
				return k, nil
			}
		}
		if !c.out.flushing && len(c.out.pend) > 0 {
			c.flush()
			continue
		}
		s.waits = true
		s.room.Wait()
		s.waits = false
	}
}

// mayQueue is how much of n bytes the stream may have queued. In a crowd it
// waits for its turn.
func (s *Stream) mayQueue(n int) int {
	o := &s.c.out
	switch {
	case len(o.pend) == 0 && !o.flushing, len(o.pend) < gather && len(o.line) == 0:
		return gather
	case s.turn || n <= tiny || len(o.pend) < crowded && len(o.line) == 0:
		return share
	}
	if !s.inLine {
		s.inLine = true
		o.line = append(o.line, s)
	}
	return 0
}

// queue appends a data frame to what is pending.
func (s *Stream) queue(p []byte, flags uint8) {
	c := s.c
	if s.id == 0 {
		c.last++
		s.id = c.last
		c.streams[s.id] = s
		flags |= flagOpen
	}
	if s.queued == 0 && len(p) > 0 {
		c.out.batch = append(c.out.batch, s)
	}
	s.credit -= len(p)
	s.queued += len(p)
	c.out.pend = append(appendHeader(c.out.pending(headerSize+len(p)), len(p), kindData, flags, s.id), p...)
}

// CloseWrite ends what this end sends. The peer reads EOF behind it.
func (s *Stream) CloseWrite() error {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case s.werr != nil:
		return s.werr
	case s.ended:
		return nil
	}
	s.queue(nil, flagEnd)
	s.ended = true
	s.room.Signal()
	if s.peerEnd {
		c.forget(s)
	}
	c.out.wake()
	return nil
}

// Close ends the stream both ways at once. A peer that has not got the end yet
// learns that what it has is not the whole. It never waits.
func (s *Stream) Close() error { return s.close(resetCancel) }

// Refuse is Close of who accepted the stream, with the assurance that nothing
// was acted on since the last answer.
func (s *Stream) Refuse() error { return s.close(resetRefused) }

func (s *Stream) close(code uint32) error {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	s.wend.Stop()
	s.broke(net.ErrClosed)
	if c.streams[s.id] == s {
		if err := c.say(resetFrame(s.id, code)); err != nil {
			c.endLocked(err)
		}
		c.forget(s)
	}
	c.release(s)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rend.Stop()
	s.rerr = net.ErrClosed
	s.in.Drop()
	s.repay()
	if n := s.window - baseWindow; n > 0 {
		c.extra.Add(-int64(n))
		c.cfg.Budget.Give(n)
		s.window = baseWindow
	}
	return nil
}

// broke ends the stream with an error; the lock of the Conn is held.
func (s *Stream) broke(err error) {
	if s.werr == nil {
		s.werr = err
	}
	s.room.Signal()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rerr == nil {
		s.rerr = err
	}
	s.more.Signal()
	s.leave()
}

// working says whether somebody does something other than wait for the peer.
func (s *Stream) working() bool {
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dst == nil && s.from == nil && !s.awaits || s.got > 0 || s.in.Len() > 0
}

// atEnd notes that the peer sends no more; the lock of the Conn is held.
func (s *Stream) atEnd() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.eof = true
	s.more.Broadcast()
	s.leave()
}

// Stale says that a stream at rest must not be used for another call: it has
// ended, something came that nobody asked for, or its connection takes no more.
func (s *Stream) Stale() bool {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leaving || s.werr != nil {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.in.Len() > 0 || s.eof || s.rerr != nil
}

// Conn is the connection that the stream is in.
func (s *Stream) Conn() *Conn { return s.c }

// ConnectionState is that of the TLS connection underneath.
func (s *Stream) ConnectionState() tls.ConnectionState { return s.c.ConnectionState() }

// LocalAddr is that of the connection.
func (s *Stream) LocalAddr() net.Addr { return s.c.nc.LocalAddr() }

// RemoteAddr is that of the connection.
func (s *Stream) RemoteAddr() net.Addr { return s.c.nc.RemoteAddr() }

// SetDeadline sets both deadlines.
func (s *Stream) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

// SetReadDeadline ends what waits in Read then.
func (s *Stream) SetReadDeadline(t time.Time) error {
	s.rend.Set(&s.more, t)
	return nil
}

// SetWriteDeadline ends what waits in Write then.
func (s *Stream) SetWriteDeadline(t time.Time) error {
	s.wend.Set(&s.room, t)
	return nil
}
