package socket

import (
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// unsent is how much of what is written the kernel may hold unsent for a connection,
// give or take a segment. More of it would not be sent sooner: who is behind it on a
// connection of many calls waits for all of it, and a peer that reads nothing could
// have the kernel hold megabytes. What is on its way counts for itself.
const unsent = 128 << 10

// Tune is for the Control of a net.Dialer or net.ListenConfig: it bounds what the
// kernel holds unsent, of what a listener accepts too. A socket on loopback, and what
// it accepts, also goes by the plainest congestion control that there is, Reno, which
// every kernel has and lets everybody choose: what does not leave the host meets no
// congestion, and to measure and to pace for it, as BBR does, costs processor time. It
// never fails: without any of this, it only takes longer.
func Tune(_, address string, c syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	near := err == nil && ap.Addr().Unmap().IsLoopback()
	_ = c.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsent)
		if near {
			_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno")
		}
	})
	return nil
}
