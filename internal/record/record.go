// Package record carries bytes in the records of TLS 1.3 (RFC 8446 section 5).
//
// The handshake is that of crypto/tls. When it is over, the secrets of both
// directions are all that is kept of it, and records are read and written here: all that have
// come in one call, and as many as there is to send in another. A connection at
// rest holds no buffer. What a peer may not say ends the connection with an
// alert; the end of the bytes is the end only if the peer has said so.
//
// Only the handshake has a goroutine, which ends with it. Where two locks meet,
// rmu is taken first, and wmu only if it is free.
package record

import (
	"crypto/tls"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/mux"
	"sallyport/internal/socket"
)

const (
	headerSize = 5
	// maxPlain is how many bytes a record carries.
	maxPlain = 16 << 10
	// overhead is what a record adds: its header, the type, and the tag.
	overhead = headerSize + 1 + tagSize
	// maxCipher is what a record may have after its header.
	maxCipher = maxPlain + 1 + tagSize
)

// The types of records.
const (
	typeAlert     = 21
	typeHandshake = 22
	typeData      = 23
)

// A Conn is a connection of TLS 1.3 after its handshake. It is a net.Conn: one
// goroutine reads and one writes, others may close it and set deadlines.
type Conn struct {
	nc    net.Conn
	late  lateReader // nc, if it is one
	state *tls.ConnectionState
	suite *suite

	closed atomic.Bool
	dead   atomic.Bool // an alert has ended it: nothing more is sent
	rekey  atomic.Bool // the peer asked for a KeyUpdate before our next bytes
	ask    atomic.Bool // the peer is to be asked for one

	rmu sync.Mutex // guards in
	in  reader
	wmu sync.Mutex // guards out
	out writer
}

// A lateReader reads into memory that it borrows once there is something to
// read.
type lateReader interface {
	ReadLate(socket.Lender) (int, error)
}

// A reader is the half that reads.
type reader struct {
	keys
	client bool // the peer is a server

	// What has come and nobody has read is in buf: plain[p:q] decrypted, before
	// [r:w] as it came. At rest there is no buf.
	buf        *socket.Buffer
	p, q, r, w int
	large      bool // the last read took all that had room
	err        error

	// head is that of a handshake message which is being read, have of it has
	// come, and skip is left of a body that says nothing to us.
	head [4]byte
	have int
	skip int

	useless int // records in a row without data
	tickets int
	updates mux.Bucket
}

// A writer is the half that writes.
type writer struct {
	keys
	err error // why nothing more can be written
}

func newConn(nc net.Conn) *Conn {
	c := &Conn{nc: nc}
	c.late, _ = nc.(lateReader)
	return c
}

// ConnectionState is what the handshake has found out: version, suite, key
// exchange, protocol, and the certificates of the peer, which many connections
// share. It exports no keying material.
func (c *Conn) ConnectionState() tls.ConnectionState { return *c.state }

// State is ConnectionState without the copy. It must not be changed.
func (c *Conn) State() *tls.ConnectionState { return c.state }

// NetConn is the connection underneath. Who closes that breaks the connection off
// without a farewell; Close must follow.
func (c *Conn) NetConn() net.Conn { return c.nc }

// LocalAddr is that of the connection underneath.
func (c *Conn) LocalAddr() net.Addr { return c.nc.LocalAddr() }

// RemoteAddr is that of the connection underneath.
func (c *Conn) RemoteAddr() net.Addr { return c.nc.RemoteAddr() }

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error { return c.nc.SetDeadline(t) }

// SetReadDeadline bounds Read and Await, which may be called again after it has
// passed.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.nc.SetReadDeadline(t) }

// SetWriteDeadline bounds Write. After it has ended one, nothing can be written
// any more: some of a record may be on its way.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.nc.SetWriteDeadline(t) }

// farewell is how long last words may take.
const farewell = time.Second

// Rest has the connection take less room until something is read or written: its
// keys are made anew then, in some microseconds. Nobody reads meanwhile.
func (c *Conn) Rest() {
	c.rmu.Lock()
	c.in.rest()
	c.rmu.Unlock()
	c.wmu.Lock()
	c.out.rest()
	c.wmu.Unlock()
}

// Close says farewell, if nobody is writing, and closes the connection.
func (c *Conn) Close() error {
	if !c.closed.CompareAndSwap(false, true) {
		return net.ErrClosed
	}
	if c.wmu.TryLock() {
		c.lastWord(alertCloseNotify)
		c.wmu.Unlock()
	}
	err := c.nc.Close() // who reads or writes comes to an end
	c.rmu.Lock()
	c.in.drop()
	c.in.p, c.in.q = 0, 0
	c.in.err = net.ErrClosed
	c.in.wipe()
	c.rmu.Unlock()
	c.wmu.Lock()
	c.out.err = net.ErrClosed
	c.out.wipe()
	c.wmu.Unlock()
	return err
}
