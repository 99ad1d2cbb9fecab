//go:build !linux

package capture

import (
	"io/fs"
	"net"
	"net/netip"
	"os"
	"syscall"
)

// A Pidfd cannot be had outside Linux.
type Pidfd struct{}

// OpenPidfd fails with ErrNeedsLinux.
func OpenPidfd(int) (*Pidfd, error) { return nil, ErrNeedsLinux }

// AdoptPidfd fails with ErrNeedsLinux.
func AdoptPidfd(int, int) (*Pidfd, error) { return nil, ErrNeedsLinux }

// PID is 0: there is no process.
func (*Pidfd) PID() int { return 0 }

// Alive is false: nothing vouches for the process.
func (*Pidfd) Alive() bool { return false }

// Done is closed.
func (*Pidfd) Done() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

// Signal fails with ErrNeedsLinux.
func (*Pidfd) Signal(syscall.Signal) error { return ErrNeedsLinux }

// Close does nothing.
func (*Pidfd) Close() error { return nil }

// PeerCred fails with ErrNeedsLinux.
func PeerCred(*net.UnixConn) (Cred, error) { return Cred{}, ErrNeedsLinux }

// PeerPidfd fails with ErrNeedsLinux.
func PeerPidfd(*net.UnixConn) (*Pidfd, error) { return nil, ErrNeedsLinux }

// AdoptOrphans fails with ErrNeedsLinux.
func AdoptOrphans() error { return ErrNeedsLinux }

// Reap reports false.
func Reap(int) bool { return false }

// HeldChild leaves the descriptor at -1, which AdoptPidfd refuses.
func HeldChild(pidfd *int, _ bool) *syscall.SysProcAttr {
	*pidfd = -1
	return nil
}

// KillGroup does nothing.
func KillGroup(int) {}

// Inspect fails with ErrNeedsLinux.
func Inspect(int) (Process, error) { return Process{}, ErrNeedsLinux }

// Started fails with ErrNeedsLinux.
func Started(int) (uint64, error) { return 0, ErrNeedsLinux }

// Ancestors fails with ErrNeedsLinux.
func Ancestors(int) ([]int, error) { return nil, ErrNeedsLinux }

// Children fails with ErrNeedsLinux.
func Children(int) (running, zombies []int, err error) { return nil, nil, ErrNeedsLinux }

// HashExe fails with ErrNeedsLinux.
func HashExe(int) ([32]byte, error) { return [32]byte{}, ErrNeedsLinux }

// HashFile fails with ErrNeedsLinux.
func HashFile(string) ([32]byte, error) { return [32]byte{}, ErrNeedsLinux }

// OwnerOf fails with ErrNeedsLinux.
func OwnerOf(_, _ netip.AddrPort, _ ...int) (Process, error) { return Process{}, ErrNeedsLinux }

// Owners cannot be had outside Linux.
type Owners struct{ In *os.File }

// Of fails with ErrNeedsLinux.
func (*Owners) Of(_, _ netip.AddrPort, _ ...int) (Process, error) { return Process{}, ErrNeedsLinux }

// A UnixListener cannot be had outside Linux.
type UnixListener struct{ net.Listener }

// ListenUnix fails with ErrNeedsLinux.
func ListenUnix(string, fs.FileMode) (*UnixListener, error) { return nil, ErrNeedsLinux }

// AdoptUnix fails with ErrNeedsLinux.
func AdoptUnix(*net.UnixListener) (*UnixListener, error) { return nil, ErrNeedsLinux }

// A UnixPeer cannot be had outside Linux.
type UnixPeer struct{ net.Conn }

// NewUnixPeer fails with ErrNeedsLinux.
func NewUnixPeer(*net.UnixConn) (*UnixPeer, error) { return nil, ErrNeedsLinux }

// Cred is that of nobody.
func (*UnixPeer) Cred() Cred { return Cred{} }

// Pidfd fails with ErrNeedsLinux.
func (*UnixPeer) Pidfd() (*Pidfd, error) { return nil, ErrNeedsLinux }

// NewDirect gives nc back: the runtime's own calls serve as well.
func NewDirect(nc net.Conn) net.Conn { return nc }

// Stands fails with ErrNeedsLinux.
func Stands(net.Conn) error { return ErrNeedsLinux }

// OriginalDst reports no other address: no rules of ours are outside Linux.
func OriginalDst(net.Conn) (netip.AddrPort, bool, error) { return netip.AddrPort{}, false, nil }

// KeepSYN does nothing.
func KeepSYN(net.Listener) error { return nil }

// Ends fails with ErrNeedsLinux.
func Ends(net.Conn) (from, to netip.AddrPort, err error) { return from, to, ErrNeedsLinux }

// ForgetProgram does nothing.
func ForgetProgram() error { return nil }

// Datagrams reads and answers the datagrams of a UDP socket.
type Datagrams struct {
	c    *net.UDPConn
	buf  []byte
	n    int
	from netip.AddrPort
	size int
}

// NewDatagrams makes room for one datagram.
func NewDatagrams(c *net.UDPConn, _, size int) (*Datagrams, error) {
	return &Datagrams{c: c, buf: make([]byte, size)}, nil
}

// Read waits for a datagram.
func (d *Datagrams) Read() (n int, err error) {
	d.n, d.from, err = d.c.ReadFromUDPAddrPort(d.buf)
	if err != nil {
		return 0, err
	}
	return 1, nil
}

// At is the buffer of the datagram, and how many bytes of it have come.
func (d *Datagrams) At(int) ([]byte, int) { return d.buf, d.n }

// From is who sent it.
func (d *Datagrams) From(int) netip.AddrPort { return d.from }

// Reply has the first n bytes of the buffer sent to its sender by Send.
func (d *Datagrams) Reply(_, n int) { d.size = n }

// Send sends the reply, which may be lost.
func (d *Datagrams) Send() error {
	if d.size > 0 {
		_, _ = d.c.WriteToUDPAddrPort(d.buf[:d.size], d.from)
		d.size = 0
	}
	return nil
}
