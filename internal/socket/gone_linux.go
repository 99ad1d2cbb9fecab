package socket

import (
	"net"
	"syscall"
)

// Gone says that the peer has reset the connection, whatever of it is still to be
// read. It takes the news from who asks next.
func Gone(nc net.Conn) bool {
	c, ok := nc.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	reset := false
	err = raw.Control(func(fd uintptr) {
		code, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR)
		reset = err != nil || code != 0
	})
	return reset || err != nil
}
