//go:build !linux

package main

import (
	"io"
	"net"
	"net/netip"
	"syscall"
)

func demoSysProcAttr() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

// holdPort finds a free port of the loopback address. Nothing holds it here: if
// another comes before the program that it is for, that program says so.
func holdPort() (netip.AddrPort, io.Closer, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return netip.AddrPort{}, nil, err
	}
	return l.Addr().(*net.TCPAddr).AddrPort(), io.NopCloser(nil), l.Close()
}
