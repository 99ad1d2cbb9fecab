package hop

import (
	"net"
	"sync"
)

// A Socket stands between TLS and the network connection of a Conn. It reads in
// large pieces and sends what TLS writes record by record in one go. Until a
// Conn takes it over, it only passes on.
type Socket struct {
	net.Conn

	in   []byte // read ahead: in[r:w]; nil before Buffer
	r, w int

	mu     sync.Mutex // guards the fields below
	out    []byte
	corked bool
}

// NewSocket wraps the connection that TLS will be spoken on.
func NewSocket(nc net.Conn) *Socket { return &Socket{Conn: nc} }

// NetConn is the connection underneath.
func (s *Socket) NetConn() net.Conn { return s.Conn }

// most of a Socket's buffers.
const (
	firstAhead = 4 << 10
	mostAhead  = 64 << 10
	mostCorked = 256 << 10
)

// Buffer begins to read ahead. Nobody may read meanwhile.
func (s *Socket) Buffer() { s.in = make([]byte, firstAhead) }

// Read is called by one goroutine at a time, as TLS does. A large piece is read
// where it belongs.
func (s *Socket) Read(p []byte) (int, error) {
	if s.r == s.w {
		if len(p) >= len(s.in) {
			return s.Conn.Read(p)
		}
		n, err := s.Conn.Read(s.in)
		if n <= 0 {
			return n, err
		}
		s.r, s.w = 0, n
	}
	n := copy(p, s.in[s.r:s.w])
	if s.r += n; s.r == s.w && s.w == len(s.in) && len(s.in) < mostAhead {
		s.in = make([]byte, 2*len(s.in)) // it was full: there is more to come
	}
	return n, nil
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
	s.out = append(s.out, p...)
	if len(s.out) >= mostCorked {
		return len(p), s.send()
	}
	return len(p), nil
}

func (s *Socket) send() error {
	if len(s.out) == 0 {
		return nil
	}
	_, err := s.Conn.Write(s.out)
	if s.out = s.out[:0]; cap(s.out) > 2*mostCorked {
		s.out = nil
	}
	return err
}
