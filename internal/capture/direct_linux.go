package capture

import (
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"
)

// A Direct is a TCP connection whose reads and writes are bare system calls.
//
// A socket that does not block needs none of what the runtime does around a
// call that may: giving the processor up, and taking it back. Only where there
// is nothing to read, or no room to write, does the goroutine wait, as with any
// connection. Deadlines, closing and errors are those of net.TCPConn.
type Direct struct {
	*net.TCPConn
	raw syscall.RawConn

	rmu    sync.Mutex // guards r, from and waited; taken before wmu
	r      transfer
	from   lender // where ReadLate has memory from
	waited bool   // that the socket has something to read was waited for

	wmu sync.Mutex // guards w
	w   transfer

	// The methods of the same names, made once.
	read, late, look, ask, write, try func(fd uintptr) bool
}

// A lender lends memory for one read: Lend when something may be there, Back when
// nothing was.
type lender = interface {
	Lend() []byte
	Back()
}

// A transfer is one call of Read or Write.
type transfer struct {
	b   []byte
	n   int
	err syscall.Errno
}

// NewDirect makes nc a Direct. What is no TCP connection comes back as it is.
func NewDirect(nc net.Conn) net.Conn {
	tc, ok := nc.(*net.TCPConn)
	if !ok {
		return nc
	}
	raw, err := tc.SyscallConn()
	if err != nil {
		return nc
	}
	d := &Direct{TCPConn: tc, raw: raw}
	d.read, d.late, d.look, d.ask, d.write, d.try = d.readOnce, d.lateOnce, d.lookOnce, d.askOnce, d.writeAll, d.writeSome
	return d
}

// NetConn is the connection underneath.
func (d *Direct) NetConn() net.Conn { return d.TCPConn }

// Read reads what is there, or waits.
func (d *Direct) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	d.rmu.Lock()
	defer d.rmu.Unlock()
	d.r = transfer{b: p}
	return d.came(d.raw.Read(d.read))
}

// ReadLate is Read into memory that it borrows only once there may be something
// to read.
func (d *Direct) ReadLate(from lender) (int, error) {
	d.rmu.Lock()
	d.r, d.from = transfer{}, from
	err := d.raw.Read(d.late)
	d.from = nil
	n, err := d.came(err)
	d.rmu.Unlock()
	return n, err
}

// came is the end of Read and of ReadLate.
func (d *Direct) came(err error) (int, error) {
	n, e := d.r.n, d.r.err
	d.r.b = nil
	switch {
	case err != nil:
		return 0, d.failed("read", err)
	case e != 0:
		return 0, d.failed("read", os.NewSyscallError("recvfrom", e))
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// Await waits until there is something to read, or the end, without holding
// memory to read it into. A deadline ends it.
func (d *Direct) Await() error {
	d.rmu.Lock()
	defer d.rmu.Unlock()
	d.waited = false
	if err := d.raw.Read(d.look); err != nil {
		return d.failed("read", err)
	}
	return nil
}

// Ask writes all of p on a connection at rest and waits until there is
// something to read. It returns ErrSpent, and has written nothing, when there
// is already. A failure to wait shows in the next Read.
func (d *Direct) Ask(p []byte) (int, error) {
	d.rmu.Lock()
	defer d.rmu.Unlock()
	d.wmu.Lock()
	defer d.wmu.Unlock()
	d.r, d.w, d.waited = transfer{}, transfer{b: p}, false
	if err := d.raw.Read(d.ask); d.r.err == spent {
		d.w.b = nil
		return 0, ErrSpent
	} else if err != nil && !d.waited {
		d.w.b = nil
		return 0, d.failed("write", err)
	}
	if d.w.err == 0 && d.w.n < len(p) {
		return d.finish(d.raw.Write(d.write))
	}
	return d.finish(nil)
}

// Write writes all of p.
func (d *Direct) Write(p []byte) (int, error) {
	d.wmu.Lock()
	defer d.wmu.Unlock()
	d.w = transfer{b: p}
	return d.finish(d.raw.Write(d.write))
}

// TryWrite writes what the socket takes at once, and does not wait for more.
func (d *Direct) TryWrite(p []byte) (int, error) {
	d.wmu.Lock()
	defer d.wmu.Unlock()
	d.w = transfer{b: p}
	return d.finish(d.raw.Write(d.try))
}

// finish is the end of Write, of TryWrite and of Ask.
func (d *Direct) finish(err error) (int, error) {
	n, e := d.w.n, d.w.err
	d.w.b = nil
	switch {
	case err != nil:
		return n, d.failed("write", err)
	case e != 0:
		return n, d.failed("write", os.NewSyscallError("sendto", e))
	}
	return n, nil
}

// failed gives an error as net.TCPConn does.
func (d *Direct) failed(op string, err error) error {
	if o, ok := err.(*net.OpError); ok {
		err = o.Err
	}
	return &net.OpError{Op: op, Net: "tcp", Source: d.LocalAddr(), Addr: d.RemoteAddr(), Err: err}
}

// The calls below say whether they are done; the kernel tells when a socket on
// which one was not is worth another try.

func (d *Direct) readOnce(fd uintptr) bool {
	for {
		n, e := recv(fd, d.r.b, syscall.MSG_DONTWAIT)
		switch e {
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
			return false
		}
		d.r.n, d.r.err = n, e
		return true
	}
}

func (d *Direct) lateOnce(fd uintptr) bool {
	d.r.b = d.from.Lend()
	done := d.readOnce(fd)
	if !done {
		d.from.Back()
	}
	return done
}

func (d *Direct) lookOnce(fd uintptr) bool {
	if d.waited {
		return true
	}
	d.waited = empty(fd)
	return !d.waited
}

// askOnce writes what the socket takes, after a look at whether it is still
// good for that. The look comes behind the moment from which on the runtime
// takes note of what arrives, so that nothing is missed by waiting at once.
func (d *Direct) askOnce(fd uintptr) bool {
	if d.waited {
		return true
	}
	if !empty(fd) {
		d.r.err = spent
		return true
	}
	d.waited = d.writeAll(fd) && d.w.err == 0
	return !d.waited
}

// spent stands for ErrSpent; no system call gives it.
const spent = ^syscall.Errno(0)

// empty says that there is nothing to read, not even an end.
func empty(fd uintptr) bool {
	var b [1]byte
	_, e := recv(fd, b[:], syscall.MSG_DONTWAIT|syscall.MSG_PEEK)
	return e == syscall.EAGAIN
}

func (d *Direct) writeAll(fd uintptr) bool {
	for d.w.n < len(d.w.b) {
		n, e := sendto(fd, d.w.b[d.w.n:])
		switch e {
		case 0:
			d.w.n += n
		case syscall.EINTR:
		case syscall.EAGAIN:
			return false
		default:
			d.w.err = e
			return true
		}
	}
	return true
}

func (d *Direct) writeSome(fd uintptr) bool {
	d.writeAll(fd)
	return true
}

// recv is recv(2) into b, which is not empty.
func recv(fd uintptr, b []byte, flags uintptr) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), flags, 0, 0)
	if e != 0 {
		return 0, e
	}
	if underRace {
		written.Load()
	}
	return int(n), 0
}

// written orders writes before reads for the race detector.
var written atomic.Int64

// sendto is send(2) of b, which is not empty.
func sendto(fd uintptr, b []byte) (int, syscall.Errno) {
	if underRace {
		written.Add(1)
	}
	n, _, e := syscall.RawSyscall6(syscall.SYS_SENDTO, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL, 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}
