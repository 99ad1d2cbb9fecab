package main

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"sallyport/bench/rig"
)

// An order is what a load process is asked to do.
type order struct {
	Target string        `json:"target"`
	Origin string        `json:"origin"` // asked for what has arrived there
	Up     bool          `json:"up"`     // from the client to the origin
	Pings  bool          `json:"pings"`  // a byte and its echo, one after the other
	Conns  int           `json:"conns"`
	Warm   time.Duration `json:"warm"` // not counted
	For    time.Duration `json:"for"`
}

// A report is what arrived between warming up and the end.
type report struct {
	Bytes   int64   `json:"bytes"`
	Pings   int64   `json:"pings"`
	Fault   string  `json:"fault,omitempty"`
	Seconds float64 `json:"seconds"`
}

// What the first byte of a connection asks the origin for.
const (
	askDown  = 'd' // bytes without end
	askUp    = 'u' // nothing: it takes them
	askEcho  = 'e'
	askCount = '?' // what it has taken so far
)

const (
	piece = 256 << 10
	// within bounds the wait for the end of a connection.
	within = 20 * time.Second
)

var zeros = make([]byte, piece)

// pour sends until the peer or the deadline ends it.
func pour(c net.Conn) error {
	for {
		if _, err := c.Write(zeros); err != nil {
			return err
		}
	}
}

// drain takes bytes without looking at them: the kernel drops them, so that the
// load costs little beside the proxies.
func drain(c *net.TCPConn, taken *atomic.Int64) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	sink := make([]byte, 1<<20)
	for {
		var n int
		var rerr error
		if err := raw.Read(func(fd uintptr) bool {
			n, _, rerr = syscall.Recvfrom(int(fd), sink, syscall.MSG_TRUNC)
			return rerr != syscall.EAGAIN
		}); err != nil {
			return err
		}
		if rerr != nil {
			return rerr
		}
		if n == 0 {
			return io.EOF
		}
		taken.Add(int64(n))
	}
}

func (o order) run(warm func()) report {
	var taken, pings atomic.Int64
	conns := make([]*net.TCPConn, 0, o.Conns)
	var all sync.WaitGroup
	var first atomic.Pointer[error]
	var over atomic.Bool
	fail := func(err error) {
		if !over.Load() {
			first.CompareAndSwap(nil, &err)
		}
	}
	for range o.Conns {
		c, err := net.Dial("tcp", o.Target)
		if err != nil {
			fail(err)
			break
		}
		conns = append(conns, c.(*net.TCPConn))
	}
	for _, c := range conns {
		all.Go(func() { fail(o.drive(c, &taken, &pings)) })
	}
	count := func() (int64, int64) {
		if !o.Up {
			return taken.Load(), pings.Load()
		}
		n, err := counted(o.Origin)
		if err != nil {
			fail(err)
		}
		return n, 0
	}
	time.Sleep(o.Warm)
	bytes, echoes := count()
	from := time.Now()
	warm()
	time.Sleep(o.For)
	b, e := count()
	r := report{Bytes: b - bytes, Pings: e - echoes, Seconds: time.Since(from).Seconds()}
	over.Store(true)
	for _, c := range conns {
		_ = c.SetLinger(0)
		_ = c.Close()
	}
	all.Wait()
	if err := first.Load(); err != nil {
		r.Fault = (*err).Error()
	}
	return r
}

// drive keeps one connection busy until it is closed.
func (o order) drive(c *net.TCPConn, taken, pings *atomic.Int64) error {
	what := byte(askDown)
	switch {
	case o.Pings:
		what = askEcho
	case o.Up:
		what = askUp
	}
	if _, err := c.Write([]byte{what}); err != nil {
		return err
	}
	switch {
	case o.Pings:
		b := []byte{'x'}
		for {
			if _, err := c.Write(b); err != nil {
				return err
			}
			if _, err := io.ReadFull(c, b); err != nil {
				return err
			}
			pings.Add(1)
		}
	case o.Up:
		return pour(c)
	}
	return drain(c, taken)
}

// counted asks the origin, past the proxies.
func counted(origin string) (int64, error) {
	c, err := net.Dial("tcp", origin)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(within)); err != nil {
		return 0, err
	}
	if _, err := c.Write([]byte{askCount}); err != nil {
		return 0, err
	}
	var b [8]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return 0, err
	}
	n := int64(0)
	for _, x := range b {
		n = n<<8 | int64(x)
	}
	return n, nil
}

// serveOrigin is the application behind all pairs.
func serveOrigin(address string) error {
	var taken atomic.Int64
	return rig.Serve(address, func(c net.Conn) {
		if err := originConn(c.(*net.TCPConn), &taken); err != nil && !errors.Is(err, io.EOF) {
			_, _ = os.Stderr.WriteString("origin: " + err.Error() + "\n")
		}
	})
}

func originConn(c *net.TCPConn, taken *atomic.Int64) error {
	var what [1]byte
	if _, err := io.ReadFull(c, what[:]); err != nil {
		return err
	}
	switch what[0] {
	case askDown:
		return pour(c)
	case askUp:
		return drain(c, taken)
	case askCount:
		n := taken.Load()
		var b [8]byte
		for i := range b {
			b[i] = byte(n >> (8 * (7 - i)))
		}
		_, err := c.Write(b[:])
		return err
	}
	_, err := io.Copy(c, c)
	return err
}
