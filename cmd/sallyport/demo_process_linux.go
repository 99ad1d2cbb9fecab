package main

import (
	"io"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

func demoSysProcAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// holdPort binds a socket to a free port of the loopback address, and leaves it
// there without listening: until it is closed the kernel gives the port to nobody
// who asks for any, and those who name it may listen, as all with SO_REUSEADDR may
// beside a socket that does not (socket(7)).
func holdPort() (netip.AddrPort, io.Closer, error) {
	fail := func(call string, err error) (netip.AddrPort, io.Closer, error) {
		return netip.AddrPort{}, nil, os.NewSyscallError(call, err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail("socket", err)
	}
	held := os.NewFile(uintptr(fd), "port")
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		held.Close()
		return fail("setsockopt", err)
	}
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: loopback.As4()}); err != nil {
		held.Close()
		return fail("bind", err)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		held.Close()
		return fail("getsockname", err)
	}
	return netip.AddrPortFrom(loopback, uint16(at.(*unix.SockaddrInet4).Port)), held, nil
}
