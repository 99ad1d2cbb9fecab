// Package socket stands between a protocol and the kernel, so that bytes cross
// in few and large pieces: it keeps the large buffers of a process within bounds,
// and reads without holding one while nothing comes. It knows no protocol and
// starts no goroutine.
package socket

import "io"

// A Lender lends memory for one read. It is an alias, for those who implement
// ReadLate without this package.
type Lender = interface {
	// Lend is called when something may be there to read.
	Lend() []byte
	// Back is called when nothing was: the next Lend follows when something is.
	Back()
}

// A Source reads a connection in pieces as large as what has come. It belongs to
// one goroutine, and nobody else reads the connection from NewSource on.
type Source struct {
	from io.Reader
	// One of these is from, if it can wait without memory.
	late  interface{ ReadLate(Lender) (int, error) }
	waits interface{ Await() error }

	buf   *Buffer // what the last Next gave
	large bool    // it filled all that had room
	err   error   // comes after what the last Next gave
}

// NewSource returns a Source of a connection. Release gives its buffer back.
func NewSource(from io.Reader) *Source {
	s := &Source{from: from}
	s.late, _ = from.(interface{ ReadLate(Lender) (int, error) })
	s.waits, _ = from.(interface{ Await() error })
	return s
}

// Next waits for bytes and gives them; they stand until the next call. While it
// waits it holds no buffer, if it can. A deadline ends the wait, and Next may be
// called again.
func (s *Source) Next() ([]byte, error) {
	s.Release()
	n, err := 0, s.err
	if s.err = nil; err == nil {
		n, err = s.read()
	}
	if n > 0 {
		s.err = err
		s.large = n == len(s.buf.room()) || s.large && n > Small
		return s.buf.Bytes[:n], nil
	}
	s.Release()
	if err == nil {
		err = io.ErrNoProgress
	}
	return nil, err
}

func (s *Source) read() (int, error) {
	if s.late != nil {
		return s.late.ReadLate((*lender)(s))
	}
	if s.waits != nil {
		if err := s.waits.Await(); err != nil {
			return 0, err
		}
	}
	return s.from.Read((*lender)(s).Lend())
}

// Release gives the buffer back, and with it what the last Next gave.
func (s *Source) Release() { s.buf = s.buf.Put() }

type lender Source

func (l *lender) Lend() []byte {
	l.buf = Get(l.large)
	return l.buf.room()
}

func (l *lender) Back() { l.buf = l.buf.Put() }
