package meshtest

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"
)

// window is how many bytes a connection holds in each direction before a
// write waits, like the buffers of a kernel.
const window = 64 << 10

// Pipe returns the two ends of a connection in memory. Unlike net.Pipe it
// buffers, and each end can close its writing half with CloseWrite.
func Pipe() (a, b *Conn) {
	here := netip.MustParseAddr("127.0.0.1")
	return pipe(netip.AddrPortFrom(here, 1), netip.AddrPortFrom(here, 2))
}

func pipe(from, to netip.AddrPort) (a, b *Conn) {
	l := new(link)
	l.changed.L = &l.mu
	a = &Conn{link: l, local: net.TCPAddrFromAddrPort(from), remote: net.TCPAddrFromAddrPort(to)}
	b = &Conn{link: l, local: a.remote, remote: a.local, peer: a}
	a.peer = b
	return a, b
}

// A link is what both ends share.
type link struct {
	mu      sync.Mutex // guards the state of both ends
	changed sync.Cond
}

// A Conn is one end of a connection in memory.
type Conn struct {
	link          *link
	peer          *Conn
	local, remote net.Addr

	// Guarded by link.mu.
	in          bytes.Buffer // written by the peer, not yet read
	finished    bool         // the peer writes no more
	closed      bool
	read, write deadline
}

// A deadline is past or not, and has a timer that makes it so.
type deadline struct {
	past  bool
	timer *time.Timer
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, c.fail("read", net.ErrClosed)
		case c.read.past:
			return 0, c.fail("read", os.ErrDeadlineExceeded)
		case len(p) == 0:
			return 0, nil
		case c.in.Len() > 0:
			c.link.changed.Broadcast()
			return c.in.Read(p)
		case c.finished:
			return 0, io.EOF
		}
		c.link.changed.Wait()
	}
}

// Write implements net.Conn.
func (c *Conn) Write(p []byte) (n int, err error) {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	for {
		room := window - c.peer.in.Len()
		switch {
		case c.closed:
			return n, c.fail("write", net.ErrClosed)
		case c.write.past:
			return n, c.fail("write", os.ErrDeadlineExceeded)
		case c.peer.closed || c.peer.finished:
			return n, c.fail("write", os.NewSyscallError("write", syscall.EPIPE))
		case len(p) == 0:
			return n, nil
		case room > 0:
			some := p[:min(room, len(p))]
			c.peer.in.Write(some)
			n, p = n+len(some), p[len(some):]
			c.link.changed.Broadcast()
			continue
		}
		c.link.changed.Wait()
	}
}

// CloseWrite ends what the peer reads, as a FIN does.
func (c *Conn) CloseWrite() error {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	if c.closed {
		return c.fail("close", net.ErrClosed)
	}
	c.peer.finished = true
	c.link.changed.Broadcast()
	return nil
}

// Close implements net.Conn.
func (c *Conn) Close() error {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	if c.closed {
		return c.fail("close", net.ErrClosed)
	}
	c.closed, c.peer.finished = true, true
	for _, d := range []*deadline{&c.read, &c.write} {
		if d.timer != nil {
			d.timer.Stop()
		}
	}
	c.link.changed.Broadcast()
	return nil
}

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error { return c.set(t, &c.read, &c.write) }

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.set(t, &c.read) }

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.set(t, &c.write) }

func (c *Conn) set(t time.Time, which ...*deadline) error {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	if c.closed {
		return c.fail("set", net.ErrClosed)
	}
	for _, d := range which {
		if d.timer != nil {
			d.timer.Stop()
		}
		left := time.Until(t)
		d.timer, d.past = nil, !t.IsZero() && left <= 0
		if t.IsZero() || d.past {
			continue
		}
		var timer *time.Timer
		timer = time.AfterFunc(left, func() {
			c.link.mu.Lock()
			defer c.link.mu.Unlock()
			// One that fired while it was being replaced means nothing.
			if d.timer == timer {
				d.past = true
				c.link.changed.Broadcast()
			}
		})
		d.timer = timer
	}
	c.link.changed.Broadcast()
	return nil
}

func (c *Conn) fail(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.local, Addr: c.remote, Err: err}
}
