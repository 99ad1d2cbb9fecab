package socket

import (
	"io"
	"net"
)

// A Source reads a connection in pieces as large as what has come: of TLS on a
// Socket all records that are whole. It belongs to one goroutine, and nobody
// else reads the connection from NewSource on.
type Source struct {
	from  io.Reader
	sock  *Socket // under the TLS of from, else nil
	waits awaiter // from, if it is one

	buf   *buffer // what the last Next gave
	n     int
	large bool  // it filled all that had room
	err   error // comes after what the last Next gave
}

// NewSource returns a Source of a connection. Release gives its buffer back.
func NewSource(from io.Reader) *Source {
	s := &Source{from: from, waits: waiter(from)}
	if s.sock = Under(from); s.sock != nil {
		s.sock.dry = true
	}
	return s
}

// Under finds the Socket below TLS; nil without one.
func Under(c any) *Socket {
	if t, ok := c.(interface{ NetConn() net.Conn }); ok {
		if s, ok := t.NetConn().(*Socket); ok {
			return s
		}
	}
	return nil
}

// Next waits for bytes and gives them; they stand until the next call. While it
// waits it holds no buffer, if it can. A deadline ends the wait, and Next may be
// called again. The end of a connection with TLS on a Socket is io.EOF only if
// the peer has said so, since everybody on the way can close a connection.
func (s *Source) Next() ([]byte, error) {
	s.Release()
	if s.err == nil {
		s.read()
	}
	if s.n > 0 {
		s.large = s.n == len(s.buf.room()) || s.large && s.n > Small
		return s.buf.bytes[:s.n], nil
	}
	s.Release()
	err := s.err
	s.err = nil
	if err == nil {
		err = io.ErrNoProgress
	}
	return nil, err
}

func (s *Source) read() {
	if s.sock != nil {
		s.gather()
		return
	}
	if s.waits != nil {
		if s.err = s.waits.Await(); s.err != nil {
			return
		}
	}
	s.buf = get(s.large)
	s.n, s.err = s.from.Read(s.buf.room())
}

// gather takes records until none is whole, and waits only for the first.
func (s *Source) gather() {
	for s.n == 0 && s.err == nil {
		s.buf = get(s.large)
		for room := s.buf.room(); s.n < len(room) && s.err == nil; {
			var n int
			n, s.err = s.from.Read(room[s.n:])
			s.n += n
		}
		switch {
		case s.err == io.EOF && s.sock.ended:
			s.err = io.ErrUnexpectedEOF
		case isTimeout(s.err):
			s.err = nil // there is no more
			if s.n > 0 {
				return
			}
			s.buf = s.buf.put()
			if err := s.sock.fill(); isTimeout(err) {
				s.err = err
			}
		}
	}
}

// Release gives the buffer back, and with it what the last Next gave.
func (s *Source) Release() { s.buf, s.n = s.buf.put(), 0 }

// A Sink writes to a connection: all records of TLS on a Socket in one go.
type Sink struct {
	to   io.Writer
	sock *Socket
}

// NewSink returns a Sink of a connection.
func NewSink(to io.Writer) Sink {
	return Sink{to: to, sock: Under(to)}
}

// record is what TLS puts into one record.
const record = 16 << 10

// Write writes p.
func (k Sink) Write(p []byte) (int, error) {
	if k.sock == nil || len(p) <= record {
		return k.to.Write(p)
	}
	k.sock.Cork()
	n, err := k.to.Write(p)
	if e := k.sock.Uncork(); err == nil {
		err = e
	}
	return n, err
}
