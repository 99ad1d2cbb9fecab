package hop

import (
	"crypto/tls"
	"io"
	"net"
	"sync"
)

// A Socket stands between TLS and its network connection. It reads in large
// pieces, sends what TLS writes record by record in one go when it is told to,
// and holds no memory while nothing is to be read.
//
// It never gives TLS bytes of two records at once. So TLS has read all that
// arrived when the last record has been taken, and whoever reads may wait for
// the next one here.
type Socket struct {
	net.Conn
	waits awaiter // Conn, if it is one

	in    []byte // read ahead: in[r:w]; nil while there is nothing
	r, w  int
	ready bool // it was waited for that there is something to read
	rec   record

	mu     sync.Mutex // guards the fields below
	out    *buffer
	corked bool
}

// An awaiter waits until Read would not.
type awaiter interface {
	Await() error
}

// NewSocket wraps the connection that TLS will be spoken on.
func NewSocket(nc net.Conn) *Socket {
	s := &Socket{Conn: nc}
	s.waits, _ = nc.(awaiter)
	return s
}

// NetConn is the connection underneath.
func (s *Socket) NetConn() net.Conn { return s.Conn }

// The sizes of a Socket's buffers.
const (
	ahead      = 64 << 10
	mostCorked = 256 << 10
)

var aheadPool = sync.Pool{New: func() any { return new([ahead]byte) }}

// Await waits until there is something to read. Only who has read all that TLS
// had may wait so.
func (s *Socket) Await() error {
	if s.r < s.w || s.waits == nil || s.ready {
		return nil
	}
	if err := s.waits.Await(); err != nil {
		return err
	}
	s.ready = true
	return nil
}

// Read is called by one goroutine at a time, as TLS does.
func (s *Socket) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if s.r == s.w {
		if err := s.more(); err != nil {
			return 0, err
		}
	}
	n := s.rec.upTo(s.in[s.r:min(s.w, s.r+len(p))])
	copy(p, s.in[s.r:s.r+n])
	if s.r += n; s.r == s.w && s.w < len(s.in) {
		s.rest() // it was not full: nothing else has come so far
	}
	return n, nil
}

// more reads ahead.
func (s *Socket) more() error {
	if s.in == nil {
		if err := s.Await(); err != nil {
			return err
		}
		s.in = aheadPool.Get().(*[ahead]byte)[:]
	}
	s.ready = false
	n, err := s.Conn.Read(s.in)
	if s.r, s.w = 0, max(n, 0); n <= 0 {
		s.rest()
		if err == nil {
			err = io.ErrNoProgress
		}
		return err
	}
	return nil
}

func (s *Socket) rest() {
	aheadPool.Put((*[ahead]byte)(s.in))
	s.in, s.r, s.w = nil, 0, 0
}

// A record is how far the TLS record that is being read has come.
type record struct {
	header [5]byte
	seen   int // of the header
	left   int // of what follows it
}

// upTo counts the bytes of b that belong to the record, and takes note of them.
func (t *record) upTo(b []byte) (n int) {
	for ; t.seen < len(t.header) && n < len(b); n++ {
		t.header[t.seen] = b[n]
		t.seen++
		t.left = int(t.header[3])<<8 | int(t.header[4])
	}
	if t.seen < len(t.header) {
		return n
	}
	k := min(t.left, len(b)-n)
	if t.left -= k; t.left == 0 {
		*t = record{}
	}
	return n + k
}

// Cork keeps what is written from here on.
func (s *Socket) Cork() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.corked = true
}

// Uncork sends what was kept.
func (s *Socket) Uncork() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.corked = false
	return s.send()
}

// Write passes on or keeps.
func (s *Socket) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.corked {
		return s.Conn.Write(p)
	}
	if s.out == nil {
		s.out = takeBuffer()
	}
	s.out.b = append(s.out.b, p...)
	if len(s.out.b) >= mostCorked {
		return len(p), s.send()
	}
	return len(p), nil
}

func (s *Socket) send() error {
	if s.out == nil {
		return nil
	}
	_, err := s.Conn.Write(s.out.b)
	s.out.giveBack()
	s.out = nil
	return err
}

// A buffer is for what is about to be sent.
type buffer struct{ b []byte }

var bufferPool = sync.Pool{New: func() any { return &buffer{make([]byte, 0, firstBuffer)} }}

const (
	firstBuffer = 4 << 10
	// keepBuffer is the size up to which a buffer is used again.
	keepBuffer = 512 << 10
)

func takeBuffer() *buffer { return bufferPool.Get().(*buffer) }

func (b *buffer) giveBack() {
	if cap(b.b) <= keepBuffer {
		b.b = b.b[:0]
		bufferPool.Put(b)
	}
}

// Quiet makes TLS over a Socket a connection that holds little memory while
// nothing is to be read: its Await says when there is.
func Quiet(tc *tls.Conn) net.Conn {
	s, ok := tc.NetConn().(*Socket)
	if !ok || s.waits == nil {
		return tc
	}
	return &quiet{Conn: tc, sock: s}
}

type quiet struct {
	*tls.Conn
	sock *Socket
	more bool // TLS may have more
}

func (q *quiet) Read(p []byte) (int, error) {
	n, err := q.Conn.Read(p)
	q.more = n == len(p)
	return n, err
}

// Await waits until there is something to read.
func (q *quiet) Await() error {
	if q.more {
		return nil
	}
	return q.sock.Await()
}
