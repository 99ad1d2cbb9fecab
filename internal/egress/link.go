package egress

import (
	"io"
	"net"
	"sync/atomic"

	"sallyport/internal/record"
)

// A link is a connection to a place: of TCP, or one that a proxy makes inside of TLS.
type link interface {
	net.Conn
	CloseWrite() error
	// SetLinger with 0 has Close break the connection off.
	SetLinger(sec int) error
}

// A sealed link lies inside the TLS of a proxy, who must say so when that is at its
// end: who can cut a connection must not make an end of it.
type sealed struct {
	*record.Conn
	tcp  *net.TCPConn
	over atomic.Bool // the other end has said that it sends no more
}

// Read reads what the proxy passes on.
func (s *sealed) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if err == io.EOF {
		s.over.Store(true)
	}
	return n, err
}

// CloseWrite says that no more bytes come. Who has said so itself may be gone.
func (s *sealed) CloseWrite() error {
	if err := s.Conn.CloseWrite(); err != nil && !s.over.Load() {
		return err
	}
	return nil
}

// SetLinger is that of TCP.
func (s *sealed) SetLinger(sec int) error { return s.tcp.SetLinger(sec) }

// Close closes at once: who has not called CloseWrite breaks off.
func (s *sealed) Close() error {
	err := s.tcp.Close()
	_ = s.Conn.Close() // which has nobody to say farewell to
	return err
}
