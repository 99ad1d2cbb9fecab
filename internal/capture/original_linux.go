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

// soOriginalDst is SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST of
// linux/netfilter_ipv4.h and netfilter_ipv6/ip6_tables.h.
const soOriginalDst = 80

// OriginalDst tells where a connection was going before rules of the kernel
// brought it here. ok is false for one that was made for the address at which
// it arrived. A connection of MPTCP cannot be asked, which is an error: do not
// listen with it.
func OriginalDst(c net.Conn) (dst netip.AddrPort, ok bool, err error) {
	local, isTCP := c.LocalAddr().(*net.TCPAddr)
	sc, isFile := c.(syscall.Conn)
	if !isTCP || !isFile {
		return dst, false, nil
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return dst, false, fmt.Errorf("original destination: %w", err)
	}
	here := unmap(local.AddrPort())
	var cause error
	if err = rc.Control(func(fd uintptr) {
		if here.Addr().Is4() {
			dst, cause = originalDst4(fd)
		} else {
			dst, cause = originalDst6(fd)
		}
	}); err != nil {
		return dst, false, fmt.Errorf("original destination: %w", err)
	}
	switch {
	case errors.Is(cause, unix.ENOENT), errors.Is(cause, unix.ENOPROTOOPT):
		return netip.AddrPort{}, false, nil // the kernel follows no connection, or not this one
	case cause != nil:
		return netip.AddrPort{}, false, fmt.Errorf("original destination: %w", cause)
	}
	return dst, dst != here, nil
}

func originalDst4(fd uintptr) (netip.AddrPort, error) {
	var sa unix.RawSockaddrInet4
	if err := originalDst(fd, unix.SOL_IP, unsafe.Pointer(&sa), unsafe.Sizeof(sa)); err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), port(&sa.Port)), nil
}

func originalDst6(fd uintptr) (netip.AddrPort, error) {
	var sa unix.RawSockaddrInet6
	if err := originalDst(fd, unix.SOL_IPV6, unsafe.Pointer(&sa), unsafe.Sizeof(sa)); err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), port(&sa.Port)), nil
}

func originalDst(fd uintptr, level int, p unsafe.Pointer, size uintptr) error {
	n, err := getsockopt(fd, level, soOriginalDst, p, size)
	if err == nil && n != size {
		err = fmt.Errorf("an answer of %d bytes, want %d", n, size)
	}
	return err
}

func getsockopt(fd uintptr, level, name int, p unsafe.Pointer, size uintptr) (uintptr, error) {
	n := uint32(size)
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, uintptr(level), uintptr(name), uintptr(p), uintptr(unsafe.Pointer(&n)), 0); errno != 0 {
		return 0, errno
	}
	return uintptr(n), nil
}

// port reads a port that stands in the order of the network.
func port(p *uint16) uint16 {
	return binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(p))[:])
}
