package socket

import (
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"sallyport/internal/meshtest"
)

// TestTune asks the kernel by what a connection goes at both of its ends.
func TestTune(t *testing.T) {
	lc := net.ListenConfig{Control: Tune}
	lc.SetMultipathTCP(false)
	for _, address := range []string{"127.0.0.1:0", "127.9.8.7:0", "[::1]:0", "0.0.0.0:0"} {
		t.Run(address, func(t *testing.T) {
			ln, err := lc.Listen(t.Context(), "tcp", address)
			if err != nil {
				meshtest.Unable(t, err.Error())
			}
			defer ln.Close()
			own := netip.MustParseAddrPort(address).Addr()
			to := netip.MustParseAddrPort(ln.Addr().String())
			if own.IsUnspecified() {
				to = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), to.Port())
			}
			d := net.Dialer{Control: Tune}
			near, err := d.DialContext(t.Context(), "tcp", to.String())
			if err != nil {
				t.Fatal(err)
			}
			defer near.Close()
			far, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer far.Close()
			for _, nc := range []net.Conn{near, far} {
				if got := unsentOf(t, nc); got != unsent {
					t.Errorf("from %s on the kernel may hold %d bytes unsent, want %d", nc.LocalAddr(), got, unsent)
				}
			}
			if got := congestionOf(t, near); got != "reno" {
				t.Errorf("who dialled goes by %s", got)
			}
			plain, err := net.Dial("tcp", to.String())
			if err != nil {
				t.Fatal(err)
			}
			defer plain.Close()
			want := "reno"
			if own.IsUnspecified() { // it may come from afar
				want = congestionOf(t, plain)
			}
			if got := congestionOf(t, far); got != want {
				t.Errorf("who accepted goes by %s, want %s", got, want)
			}
		})
	}
}

func unsentOf(t *testing.T, nc net.Conn) (n int) {
	t.Helper()
	ask(t, nc, func(fd int) (err error) {
		n, err = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT)
		return err
	})
	return n
}

func congestionOf(t *testing.T, nc net.Conn) (name string) {
	t.Helper()
	ask(t, nc, func(fd int) (err error) {
		name, err = unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		return err
	})
	return name
}

// ask asks the kernel something about a connection.
func ask(t *testing.T, nc net.Conn, what func(fd int) error) {
	t.Helper()
	raw, err := nc.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = what(int(fd)) }); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
}
