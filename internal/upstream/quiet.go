package upstream

import (
	"crypto/tls"
	"net"
	"syscall"
)

// quiet reports that nothing has arrived on an idle connection: neither the
// peer's close nor bytes that belong to no call. A connection that is not
// quiet must not be used again (RFC 9112 section 9.6).
func quiet(c net.Conn) bool {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	sc, ok := c.(syscall.Conn)
	if !ok {
		return true // an in-memory connection of a test
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	still := false
	err = rc.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, errno := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		still = errno == syscall.EAGAIN
		return true
	})
	return err == nil && still
}
