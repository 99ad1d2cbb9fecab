package http1

import "sync"

// A connection at rest holds no buffers: most of a crowd of connections are at
// rest, and the buffer that was used last is still in the processor's cache.

// An awaiter waits until Read would not, without memory to read into.
type awaiter interface {
	Await() error
}

// A borrower is an awaiter that then reads, into memory that it borrows.
type borrower interface {
	ReadLate(from interface {
		Lend() []byte
		Back()
	}) (int, error)
}

// A scratch is where a write half puts a message together.
type scratch struct{ b []byte }

var (
	inPool  = sync.Pool{New: func() any { return new([bufferSize]byte) }}
	outPool = sync.Pool{New: func() any { return &scratch{make([]byte, 0, outSize)} }}
)

// hold sees that there is a buffer to read into, once there is something to
// read or the read fails.
func (c *Conn) hold() error {
	if c.buf != nil {
		return nil
	}
	if c.waits != nil && !c.asked {
		if err := c.waits.Await(); err != nil {
			return err
		}
	}
	c.asked = false
	c.buf = inPool.Get().(*[bufferSize]byte)[:]
	return nil
}

// Lend is for ReadLate: the read buffer of a connection at rest.
func (c *Conn) Lend() []byte {
	c.buf = inPool.Get().(*[bufferSize]byte)[:]
	return c.buf
}

// Back takes it back.
func (c *Conn) Back() { c.restRead() }

// restRead gives the read buffer back if nothing is in it. The views of the
// head that was read last end with it.
func (c *Conn) restRead() {
	if c.r != c.w {
		return
	}
	c.r, c.w, c.floor = 0, 0, 0
	if len(c.buf) == bufferSize {
		inPool.Put((*[bufferSize]byte)(c.buf))
	}
	c.buf = nil
}

// message is where the next message to write is put together.
func (c *Conn) message() []byte {
	if c.lent == nil {
		c.lent = outPool.Get().(*scratch)
		c.out = c.lent.b
	}
	return c.out[:0]
}

// restWrite gives the write half's buffer back, once all of it is written.
func (c *Conn) restWrite() {
	if c.lent == nil {
		return
	}
	if cap(c.out) <= 4*bufferSize {
		c.lent.b = c.out[:0]
		outPool.Put(c.lent)
	}
	c.lent, c.out = nil, nil
}

// Rest gives the buffers back until the connection is used again; the head that
// was read last is dead afterwards.
func (c *Conn) Rest() {
	c.restRead()
	c.restWrite()
}
