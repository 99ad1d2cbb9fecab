package capture

import (
	"io"
	"net"
	"os"
	"sync"
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

	rmu   sync.Mutex // guards r and await
	r     transfer
	await bool // the look that Await takes was taken

	wmu sync.Mutex // guards w
	w   transfer

	// The methods of the same name, made once.
	read, look, write func(fd uintptr) bool
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
	d.read, d.look, d.write = d.readOnce, d.lookOnce, d.writeAll
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
	err := d.raw.Read(d.read)
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
	d.await = false
	if err := d.raw.Read(d.look); err != nil {
		return d.failed("read", err)
	}
	return nil
}

// Write writes all of p.
func (d *Direct) Write(p []byte) (int, error) {
	d.wmu.Lock()
	defer d.wmu.Unlock()
	d.w = transfer{b: p}
	err := d.raw.Write(d.write)
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

func (d *Direct) lookOnce(fd uintptr) bool {
	if d.await {
		return true // it was waited for, and has come
	}
	var b [1]byte
	_, e := recv(fd, b[:], syscall.MSG_DONTWAIT|syscall.MSG_PEEK)
	d.await = e == syscall.EAGAIN
	return !d.await
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

// recv is recv(2) into b, which is not empty.
func recv(fd uintptr, b []byte, flags uintptr) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), flags, 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}

// sendto is send(2) of b, which is not empty.
func sendto(fd uintptr, b []byte) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(syscall.SYS_SENDTO, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL, 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}
