// Package socket stands between a protocol and the kernel, so that bytes cross
// in few and large pieces: it reads ahead, holds records of TLS back to send
// them in one go, and waits without holding a buffer. It knows no protocol but
// that TLS may be spoken on top, and starts no goroutine.
package socket

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"
)

// A Socket stands between TLS and a network connection.
type Socket struct {
	net.Conn

	// What was read ahead: in[r:w]. One goroutine at a time reads, as TLS does.
	in    *buffer // nil while there is nothing
	r, w  int
	large bool    // the last read took all that had room
	dry   bool    // what is asked for is there or is not: only fill waits
	err   error   // the connection's end, once it has been read
	ended bool    // whoever reads has been told of the end
	waits awaiter // Conn, if it is one
	ready bool    // it was waited for that there is something to read
	// head is that of the record which is being read, rest what is left of it.
	head [5]byte
	have int
	rest int

	mu     sync.Mutex // guards the fields below
	out    *buffer    // nil while nothing is held back
	held   int
	corked bool
}

// New wraps the connection that TLS will be spoken on.
func New(nc net.Conn) *Socket {
	return &Socket{Conn: nc, waits: waiter(nc)}
}

// An awaiter waits until Read would not, without memory to read into.
type awaiter interface{ Await() error }

func waiter(c any) awaiter {
	w, _ := c.(awaiter)
	return w
}

// NetConn is the connection underneath.
func (s *Socket) NetConn() net.Conn { return s.Conn }

// Buffered is the number of bytes that were read and that TLS has not asked for.
func (s *Socket) Buffered() int { return s.w - s.r }

// Read is called by one goroutine at a time, as TLS does. It gives no more than
// one record, so that Buffered counts all that comes after it.
func (s *Socket) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if s.r == s.w {
		if s.dry && s.err == nil {
			return 0, os.ErrDeadlineExceeded // TLS goes on after that
		}
		if err := s.fill(); err != nil {
			s.ended = s.ended || err == io.EOF
			return 0, err
		}
	}
	n := copy(p, s.in.bytes[s.r:s.r+s.record(s.in.bytes[s.r:min(s.w, s.r+len(p))])])
	if s.r += n; s.r == s.w {
		s.in = s.in.put()
	}
	return n, nil
}

// record is how many bytes of b belong to the record that is being read.
func (s *Socket) record(b []byte) int {
	n := 0
	if s.rest == 0 {
		n = copy(s.head[s.have:], b)
		if s.have += n; s.have < len(s.head) {
			return n
		}
		s.have, s.rest = 0, int(s.head[3])<<8|int(s.head[4])
	}
	more := min(s.rest, len(b)-n)
	s.rest -= more
	return n + more
}

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

// fill waits for bytes and takes all that are there. While it waits it holds no
// buffer, if the connection can tell when there is something.
func (s *Socket) fill() error {
	if s.err != nil || s.r < s.w {
		return s.err
	}
	s.r, s.w = 0, 0
	if err := s.Await(); err != nil {
		return s.ends(err)
	}
	s.ready = false
	s.in = get(s.large)
	n, err := s.Conn.Read(s.in.bytes)
	if n > 0 {
		s.w, s.large = n, n == len(s.in.bytes) || s.large && n > Small
		return nil
	}
	s.in = s.in.put()
	if err == nil {
		err = io.ErrNoProgress
	}
	return s.ends(err)
}

// ends keeps what ends the connection. A deadline does not.
func (s *Socket) ends(err error) error {
	if !isTimeout(err) {
		s.err = err
	}
	return err
}

func isTimeout(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded)
}

// Cork keeps what is written from here on.
func (s *Socket) Cork() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.out = get(true); len(s.out.bytes) == Small {
		s.out = s.out.put() // then each record goes by itself
	}
	s.corked = s.out != nil
}

// Uncork sends what was kept.
func (s *Socket) Uncork() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.corked = false
	err := s.send()
	s.out = s.out.put()
	return err
}

// Write passes on or keeps.
func (s *Socket) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.corked {
		return s.Conn.Write(p)
	}
	if len(p) > len(s.out.bytes)-s.held {
		if err := s.send(); err != nil {
			return 0, err
		}
		if len(p) > len(s.out.bytes) {
			return s.Conn.Write(p)
		}
	}
	s.held += copy(s.out.bytes[s.held:], p)
	return len(p), nil
}

func (s *Socket) send() error {
	if s.held == 0 {
		return nil
	}
	_, err := s.Conn.Write(s.out.bytes[:s.held])
	s.held = 0
	return err
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
