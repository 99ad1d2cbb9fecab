package http1

import (
	"net"
	"syscall"
)

// peeker looks at what the kernel holds for a connection, without allocating.
type peeker struct {
	raw   syscall.RawConn
	ahead interface{ Buffered() int } // holds what was read for TLS; nil: nothing does
	look  func(fd uintptr)
	b     [1]byte
	stale bool
}

func (p *peeker) peek(fd uintptr) {
	_, _, err := syscall.Recvfrom(int(fd), p.b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	p.stale = err != syscall.EAGAIN
}

// Stale says that a pooled connection must not be used: the peer has closed
// it, or has sent bytes that nobody asked for and that would be taken for the
// next response. It never blocks; a connection without a descriptor is
// trusted.
func (c *Conn) Stale() bool {
	if s, ok := c.nc.(interface{ Stale() bool }); c.w > c.r || ok {
		return c.w > c.r || s.Stale()
	}
	p := &c.peeker
	if p.look == nil {
		p.look = p.peek
		p.find(c.nc)
	}
	if p.ahead != nil && p.ahead.Buffered() > 0 {
		return true
	}
	if p.raw == nil {
		return false
	}
	p.stale = true
	return p.raw.Control(p.look) != nil || p.stale
}

// find finds the descriptor under nc, through TLS too.
func (p *peeker) find(nc net.Conn) {
	for {
		if a, ok := nc.(interface{ Buffered() int }); ok {
			p.ahead = a
		}
		in, ok := nc.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		nc = in.NetConn()
	}
	if sc, ok := nc.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			p.raw = raw
		}
	}
}
