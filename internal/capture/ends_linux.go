package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// KeepSYN has the kernel keep the packet that opens each connection to ln, for
// Ends to read.
func KeepSYN(ln net.Listener) error {
	sc, ok := ln.(syscall.Conn)
	if !ok {
		return fmt.Errorf("keep what opens a connection: %T has no socket", ln)
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return fmt.Errorf("keep what opens a connection: %w", err)
	}
	var cause error
	err = rc.Control(func(fd uintptr) { cause = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_SAVE_SYN, 1) })
	if err = errors.Join(err, cause); err != nil {
		return fmt.Errorf("keep what opens a connection: %w", err)
	}
	return nil
}

// Ends tells between which addresses the other end of a connection has it, which
// is by what Owners know it. Rules of the kernel may have brought it here from
// where it was going; and the kernel gives one that would then be the same as
// another a port that its sender knows nothing of. Rules of ours write the port it
// was sent from into the packet that opens it, and nobody else can.
//
// It can be asked once: the kernel forgets that packet with the answer. A
// connection that was brought here, and of which the kernel has kept no such
// packet, is ErrNoOwner: it came by a SYN cookie. One whose packet says nothing,
// since the rules in force are of another version, is taken to come from the port
// from which it seems to.
func Ends(c net.Conn) (from, to netip.AddrPort, err error) {
	local, ok1 := c.LocalAddr().(*net.TCPAddr)
	remote, ok2 := c.RemoteAddr().(*net.TCPAddr)
	if !ok1 || !ok2 {
		return from, to, fmt.Errorf("%s is no TCP connection", c.RemoteAddr())
	}
	to, brought, err := OriginalDst(c)
	if err != nil {
		return from, to, err
	}
	if !brought {
		to = unmap(local.AddrPort())
	}
	from = unmap(remote.AddrPort())
	var buf [256]byte // two headers with all options are 120
	syn, err := openedBy(c, buf[:])
	if err != nil {
		return from, to, err
	}
	if len(syn) == 0 {
		if brought {
			err = fmt.Errorf("connection from %s to %s came by a SYN cookie: %w", from, to, ErrNoOwner)
		}
		return from, to, err
	}
	port, err := sentFrom(syn)
	if err != nil {
		return from, to, fmt.Errorf("connection from %s to %s: %w", from, to, err)
	}
	if port != 0 {
		from = netip.AddrPortFrom(from.Addr(), port)
	}
	return from, to, nil
}

// Stands is nil while the other end of a connection is there: it may say no more,
// but it has not broken off. Who has may have been followed, between the same
// addresses, by somebody whom Owners then name: to believe them, ask them first
// and this afterwards.
func Stands(c net.Conn) error {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return fmt.Errorf("%T has no socket", c)
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return fmt.Errorf("state of the connection: %w", err)
	}
	var state byte // tcp_info begins with it
	var cause error
	err = rc.Control(func(fd uintptr) {
		_, cause = getsockopt(fd, unix.IPPROTO_TCP, unix.TCP_INFO, unsafe.Pointer(&state), 1)
	})
	if err = errors.Join(err, cause); err != nil {
		return fmt.Errorf("state of the connection: %w", err)
	}
	if state != tcpEstablished && state != tcpCloseWait {
		return fmt.Errorf("connection from %s was broken off: %w", c.RemoteAddr(), ErrNoOwner)
	}
	return nil
}

// openedBy gives the headers of the packet that opened a connection, in buf, if
// the kernel has kept them.
func openedBy(c net.Conn, buf []byte) ([]byte, error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil, nil
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("what opened the connection: %w", err)
	}
	var n uintptr
	var cause error
	err = rc.Control(func(fd uintptr) {
		n, cause = getsockopt(fd, unix.IPPROTO_TCP, unix.TCP_SAVED_SYN, unsafe.Pointer(&buf[0]), uintptr(len(buf)))
	})
	if err = errors.Join(err, cause); err != nil {
		return nil, fmt.Errorf("what opened the connection: %w", err)
	}
	return buf[:n], nil
}

// sentFrom reads the stamp of rules of ours, in the headers of IP and TCP: the
// port that the packet was sent from and the one it came to, in the place of an
// acknowledgment, which such a packet has not. 0 stands for no stamp.
func sentFrom(syn []byte) (uint16, error) {
	tcp, err := overIP(syn)
	if err != nil {
		return 0, err
	}
	if len(tcp) < 20 {
		return 0, fmt.Errorf("the packet that opened it has %d bytes of TCP", len(tcp))
	}
	stamp := tcp[8:12]
	port := binary.BigEndian.Uint16(stamp)
	switch {
	case binary.BigEndian.Uint32(stamp) == 0:
		return 0, nil
	case port == 0 || [2]byte(stamp[2:]) != [2]byte(tcp[2:]):
		return 0, errors.New("the packet that opened it bears a stamp which is not that of our rules")
	}
	return port, nil
}

// overIP is what follows the header of IP. Options of IPv6 are none of what a
// workload may send.
func overIP(b []byte) ([]byte, error) {
	skip := 0
	switch {
	case len(b) >= 20 && b[0]>>4 == 4 && b[9] == unix.IPPROTO_TCP:
		skip = int(b[0]&15) * 4
	case len(b) >= 40 && b[0]>>4 == 6 && b[6] == unix.IPPROTO_TCP:
		skip = 40
	}
	if skip < 20 || skip > len(b) {
		return nil, errors.New("the packet that opened it is not one of TCP over IP")
	}
	return b[skip:], nil
}
