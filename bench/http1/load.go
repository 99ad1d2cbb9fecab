package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/bench/rig"
)

// An order is what a load process is asked to do.
type order struct {
	Target string        `json:"target"`
	Path   string        `json:"path"`
	Size   int           `json:"size"` // of the answer's body, bytes
	Conns  int           `json:"conns"`
	Trace  bool          `json:"trace"` // send a traceparent
	Warm   time.Duration `json:"warm"`  // not counted
	For    time.Duration `json:"for"`
	Rate   int           `json:"rate"` // requests per second, 0 for as many as go
}

// coldLimit bounds the wait for one answer.
const coldLimit = 20 * time.Second

// A run is the state that the connections of an order share.
type run struct {
	order
	request  []byte
	from, to time.Time
	counting atomic.Bool
	over     atomic.Bool
	requests atomic.Int64
	failed   atomic.Int64
	fault    atomic.Pointer[error]

	mu   sync.Mutex // guards took
	took []float64  // milliseconds

	// At a rate one thread sends for all connections: busy are those that have
	// not been answered, asked says when each request was due.
	busy  []atomic.Bool
	asked []chan time.Time
}

func (o order) run(warm func()) rig.Calls {
	r := &run{order: o, request: o.bytes()}
	// All connections stand before the first counts.
	conns := make([]net.Conn, 0, o.Conns)
	defer func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}()
	for range o.Conns {
		c, err := net.Dial("tcp", o.Target)
		if err != nil {
			return rig.Calls{Failed: 1, Fault: err.Error()}
		}
		conns = append(conns, c)
	}
	r.busy = make([]atomic.Bool, o.Conns)
	for range conns {
		r.asked = append(r.asked, make(chan time.Time, 1))
	}
	// Each is answered once before the others send more: a cold pair makes its
	// own connections meanwhile.
	var first, all sync.WaitGroup
	first.Add(len(conns))
	start := make(chan time.Time)
	for n, c := range conns {
		all.Go(func() {
			if err := r.drive(c, n, &first, start); err != nil {
				r.failed.Add(1)
				r.fault.CompareAndSwap(nil, &err)
			}
		})
	}
	first.Wait()
	now := time.Now()
	for range conns {
		start <- now
	}
	if o.Rate > 0 {
		all.Go(func() { r.pace(conns, now) })
	}
	time.Sleep(o.Warm)
	r.counting.Store(true)
	r.from = time.Now()
	warm()
	time.Sleep(o.For)
	r.counting.Store(false)
	r.to = time.Now()
	r.over.Store(true)
	all.Wait()
	out := rig.Calls{Requests: r.requests.Load(), Failed: r.failed.Load(), Seconds: r.to.Sub(r.from).Seconds()}
	if err := r.fault.Load(); err != nil {
		out.Fault = (*err).Error()
	}
	out.P50, out.P99 = rig.Quantile(r.took, 0.50), rig.Quantile(r.took, 0.99)
	return out
}

// pace sends the requests when they are due, each on a connection that is free.
// It sleeps by the kernel's clock: the timers of Go come up to a millisecond late
// in a process at rest, as much as all that is measured. A request that is late,
// since no connection was free, is timed from when it was due.
func (r *run) pace(conns []net.Conn, from time.Time) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer func() {
		for n, c := range conns {
			if !r.busy[n].Load() {
				_ = c.SetReadDeadline(from) // its reader has nothing to wait for
			}
		}
	}()
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0) // nanoseconds; without it 50 µs
	gap := time.Second / time.Duration(r.Rate)
	for n, due := 0, from; !r.over.Load(); n, due = (n+1)%len(conns), due.Add(gap) {
		sleepUntil(due)
		for tried := 0; !r.busy[n].CompareAndSwap(false, true); n = (n + 1) % len(conns) {
			if tried++; tried%len(conns) == 0 {
				if sleepUntil(time.Now().Add(gap)); r.over.Load() {
					return
				}
			}
		}
		r.asked[n] <- due
		if _, err := conns[n].Write(r.request); err != nil {
			return // its reader says why
		}
	}
}

func sleepUntil(t time.Time) {
	for left := time.Until(t); left > 0; left = time.Until(t) {
		ts := unix.NsecToTimespec(int64(left))
		_ = unix.Nanosleep(&ts, nil)
	}
}

func (o order) bytes() []byte {
	b := fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: origin.mesh.internal\r\nUser-Agent: bench/1\r\nAccept: application/json\r\n", o.Path)
	if o.Trace {
		b = append(b, "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n"...)
	}
	return append(b, "\r\n"...)
}

// drive sends requests on one connection, one at a time: the first by itself,
// the others from the start of all until the run is over.
func (r *run) drive(c net.Conn, n int, first *sync.WaitGroup, start <-chan time.Time) error {
	answer := answer{c: c, buf: make([]byte, 32<<10)}
	_ = c.SetDeadline(time.Now().Add(coldLimit))
	_, err := c.Write(r.request)
	if err == nil {
		err = answer.read(r.Size)
	}
	first.Done()
	due := <-start
	if err != nil {
		return err
	}
	_ = c.SetDeadline(due.Add(r.Warm + r.For + coldLimit))
	var took []float64
	defer func() {
		r.mu.Lock()
		r.took = append(r.took, took...)
		r.mu.Unlock()
	}()
	for !r.over.Load() {
		if r.Rate == 0 {
			due = time.Now()
			_, err = c.Write(r.request)
		}
		if err == nil {
			err = answer.read(r.Size)
		}
		if r.Rate > 0 && r.over.Load() && !r.busy[n].Load() {
			return nil // nothing was asked any more
		}
		if err != nil {
			return err
		}
		if r.Rate > 0 {
			due = <-r.asked[n]
		}
		if r.counting.Load() {
			r.requests.Add(1)
			took = append(took, float64(time.Since(due))/1e6)
		}
		r.busy[n].Store(false)
	}
	return nil
}

// An answer reads one answer after another, and checks status and length.
type answer struct {
	c   net.Conn
	buf []byte
	n   int
}

var (
	headEnd  = []byte("\r\n\r\n")
	statusOK = []byte("HTTP/1.1 200")
	lengthIs = []byte("content-length:")
)

func (a *answer) read(size int) error {
	end := -1
	for end < 0 {
		if a.n == len(a.buf) {
			return errors.New("the head is too long")
		}
		n, err := a.c.Read(a.buf[a.n:])
		if err != nil {
			return err
		}
		from := max(0, a.n-3)
		a.n += n
		if end = bytes.Index(a.buf[from:a.n], headEnd); end >= 0 {
			end += from + len(headEnd)
		}
	}
	head := a.buf[:end]
	if !bytes.HasPrefix(head, statusOK) {
		line, _, _ := bytes.Cut(head, []byte("\r\n"))
		return fmt.Errorf("answered %q", line)
	}
	if n := contentLength(head); n != size {
		return fmt.Errorf("the answer has %d bytes, want %d", n, size)
	}
	left := size - (a.n - end)
	a.n = 0
	for left > 0 {
		n, err := a.c.Read(a.buf[:min(left, len(a.buf))])
		if err != nil {
			return err
		}
		left -= n
	}
	if left < 0 {
		return errors.New("more came than the answer has")
	}
	return nil
}

// contentLength is that of a head, -1 when it has none.
func contentLength(head []byte) int {
	for line := range bytes.Lines(head) {
		if len(line) > len(lengthIs) && bytes.EqualFold(line[:len(lengthIs)], lengthIs) {
			n, err := strconv.Atoi(string(bytes.TrimSpace(line[len(lengthIs):])))
			if err == nil {
				return n
			}
		}
	}
	return -1
}

// serveOrigin is the application behind all pairs: it answers /v1/KIB with so
// many KiB.
func serveOrigin(address string) error {
	answers := map[string][]byte{}
	for _, kib := range []int{1, 64} {
		body := bytes.Repeat([]byte{'x'}, kib<<10)
		head := fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", len(body))
		answers[fmt.Sprintf("/v1/%d", kib)] = append(head, body...)
	}
	return rig.Serve(address, func(c net.Conn) { fmt.Fprintln(os.Stderr, "origin:", originConn(c, answers)) })
}

// originConn answers on one connection and returns why it ended.
func originConn(c net.Conn, answers map[string][]byte) error {
	buf, n := make([]byte, 16<<10), 0
	for {
		got, err := c.Read(buf[n:])
		if err != nil {
			return err
		}
		n += got
		if !bytes.HasSuffix(buf[:n], headEnd) {
			if n == len(buf) {
				return errors.New("the head is too long")
			}
			continue
		}
		_, rest, _ := bytes.Cut(buf[:n], []byte(" "))
		path, _, _ := bytes.Cut(rest, []byte(" "))
		a, ok := answers[string(path)]
		if !ok {
			return fmt.Errorf("asked for %q", path)
		}
		if _, err := c.Write(a); err != nil {
			return err
		}
		n = 0
	}
}
