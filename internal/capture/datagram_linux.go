package capture

import (
	"encoding/binary"
	"net"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Datagrams reads and answers the datagrams of a UDP socket, as many with one
// system call as there are. It is not safe for concurrent use.
type Datagrams struct {
	raw     syscall.RawConn
	bufs    [][]byte
	from    []unix.RawSockaddrInet6 // of IPv4, too: it is the longer one
	in, out []mmsghdr
	inv     []unix.Iovec
	outv    []unix.Iovec
	n, outs int
	err     syscall.Errno

	// The methods of the same names, made once.
	read, write func(fd uintptr) bool
}

// mmsghdr is that of sendmmsg(2).
type mmsghdr struct {
	unix.Msghdr
	n uint32
}

// NewDatagrams makes room for so many datagrams of at most size bytes each.
func NewDatagrams(c *net.UDPConn, most, size int) (*Datagrams, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	d := &Datagrams{
		raw: raw, bufs: make([][]byte, most), from: make([]unix.RawSockaddrInet6, most),
		in: make([]mmsghdr, most), out: make([]mmsghdr, most), inv: make([]unix.Iovec, most), outv: make([]unix.Iovec, most),
	}
	room := make([]byte, most*size)
	for i := range d.bufs {
		d.bufs[i] = room[i*size : (i+1)*size : (i+1)*size]
		d.inv[i].Base = &d.bufs[i][0]
		d.inv[i].SetLen(size)
		for _, m := range []struct {
			h *mmsghdr
			v *unix.Iovec
		}{{&d.in[i], &d.inv[i]}, {&d.out[i], &d.outv[i]}} {
			m.h.Iov = m.v
			m.h.SetIovlen(1)
		}
	}
	d.read, d.write = d.readOnce, d.writeAll
	return d, nil
}

// Read waits for datagrams and returns how many have come.
func (d *Datagrams) Read() (int, error) {
	for i := range d.in {
		d.in[i].Name, d.in[i].Namelen = (*byte)(unsafe.Pointer(&d.from[i])), uint32(unsafe.Sizeof(d.from[i]))
	}
	if err := d.raw.Read(d.read); err != nil {
		return 0, err
	}
	if d.err != 0 {
		return 0, d.err
	}
	return d.n, nil
}

func (d *Datagrams) readOnce(fd uintptr) bool {
	for {
		n, _, err := syscall.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&d.in[0])), uintptr(len(d.in)), unix.MSG_DONTWAIT, 0, 0)
		switch err {
		case syscall.EINTR:
		case syscall.EAGAIN:
			return false
		default:
			d.n, d.err = int(n), err
			return true
		}
	}
}

// At is the buffer of a datagram, and how many bytes of it have come: 0 of one
// that was longer.
func (d *Datagrams) At(i int) (buf []byte, n int) {
	if d.in[i].Flags&unix.MSG_TRUNC != 0 {
		return d.bufs[i], 0
	}
	return d.bufs[i], int(d.in[i].n)
}

// From is who sent a datagram.
func (d *Datagrams) From(i int) netip.AddrPort {
	a := &d.from[i]
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&a.Port))[:])
	if a.Family == unix.AF_INET {
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(a))
		return netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), port)
}

// Reply has the first n bytes of a datagram's buffer sent to its sender by Send.
func (d *Datagrams) Reply(i, n int) {
	o := &d.out[d.outs]
	o.Name, o.Namelen = d.in[i].Name, d.in[i].Namelen
	d.outv[d.outs].Base = &d.bufs[i][0]
	d.outv[d.outs].SetLen(n)
	d.outs++
}

// Send sends the replies. One that the kernel does not take is lost, as any
// datagram may be.
func (d *Datagrams) Send() error {
	if d.outs == 0 {
		return nil
	}
	d.n = 0
	err := d.raw.Write(d.write)
	d.outs = 0
	return err
}

func (d *Datagrams) writeAll(fd uintptr) bool {
	for d.n < d.outs {
		n, _, err := syscall.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&d.out[d.n])), uintptr(d.outs-d.n), unix.MSG_DONTWAIT, 0, 0)
		switch err {
		case 0:
			d.n += int(n)
		case syscall.EINTR:
		case syscall.EAGAIN:
			return false
		default:
			d.n++
		}
	}
	return true
}
