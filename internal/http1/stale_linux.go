package http1

import (
	"net"
	"syscall"
)

// Stale says that a pooled connection must not be used: the peer has closed
// it, or has sent bytes that nobody asked for and that would be taken for the
// next response. It never blocks; a connection without a descriptor is
// trusted.
func (c *Conn) Stale() bool {
	if c.w > c.r {
		return true
	}
	nc := c.nc
	for {
		in, ok := nc.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		nc = in.NetConn()
	}
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	stale := true
	err = raw.Control(func(fd uintptr) {
		var b [1]byte
		_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		stale = err != syscall.EAGAIN
	})
	return stale || err != nil
}
