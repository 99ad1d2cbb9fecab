package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sallyport/bench/rig"
)

// method is the call of gRPC that the bench makes.
const method = "/bench.Echo/Unary"

// An order is what a load process is asked to do.
type order struct {
	Target  string        `json:"target"`
	Path    string        `json:"path"`
	Size    int           `json:"size"` // of the answer's body, bytes
	GRPC    bool          `json:"grpc"` // a unary call, with a message of 1 KiB
	Conns   int           `json:"conns"`
	Streams int           `json:"streams"` // at once on each connection
	Trace   bool          `json:"trace"`   // send a traceparent
	Warm    time.Duration `json:"warm"`    // not counted
	For     time.Duration `json:"for"`
	Rate    int           `json:"rate"` // requests per second, 0 for as many as go
}

// coldLimit bounds the wait for one answer.
const coldLimit = 20 * time.Second

// A run is the state that the connections of an order share.
type run struct {
	order
	counting atomic.Bool
	over     atomic.Bool
}

func (o order) run(warm func()) rig.Calls {
	r := &run{order: o}
	cs := make([]*client, 0, o.Conns)
	var all sync.WaitGroup
	fail := func(err error) rig.Calls {
		r.over.Store(true)
		for _, c := range cs {
			_ = c.c.Close()
		}
		all.Wait()
		warm()
		return rig.Calls{Failed: 1, Fault: err.Error()}
	}
	for range o.Conns {
		c, err := r.dial()
		if err != nil {
			return fail(err)
		}
		cs = append(cs, c)
		all.Go(c.work)
	}
	// Each is answered once before the others send more: a cold pair makes its
	// own connections meanwhile.
	for _, c := range cs {
		select {
		case <-c.first:
		case <-time.After(coldLimit):
			return fail(errors.New("no first answer"))
		}
		if err := c.fault(); err != nil {
			return fail(err)
		}
	}
	now := time.Now()
	for n, c := range cs {
		all.Go(func() { c.begin(now, n) })
	}
	time.Sleep(o.Warm)
	r.counting.Store(true)
	from := time.Now()
	warm()
	time.Sleep(o.For)
	r.counting.Store(false)
	to := time.Now()
	r.over.Store(true)
	out := rig.Calls{Seconds: to.Sub(from).Seconds()}
	var took []float64
	for _, c := range cs {
		select {
		case <-c.idle:
		case <-time.After(coldLimit):
			c.end(errors.New("no answer in time"))
		}
		_ = c.c.Close()
		if err := c.fault(); err != nil {
			out.Failed++
			out.Fault = err.Error()
		}
	}
	all.Wait()
	for _, c := range cs {
		out.Requests += c.requests
		took = append(took, c.took...)
	}
	out.P50, out.P99 = rig.Quantile(took, 0.50), rig.Quantile(took, 0.99)
	return out
}

// A client is one connection with its streams.
type client struct {
	*wire
	run   *run
	first chan struct{} // closed with the first answer
	idle  chan struct{} // closed when the run is over and nothing is asked

	mu       sync.Mutex // guards what follows, and the wire
	err      error
	next     uint32
	asked    map[uint32]*question
	free     []*question
	blocks   [][]byte
	waiting  []time.Time // due, but the peer has no room
	requests int64
	took     []float64
	begun    bool
	firstUp  bool
	idleDone bool
}

// A question is a request that is being answered.
type question struct {
	due    time.Time
	status string
	got    int
}

func (r *run) dial() (*client, error) {
	nc, err := net.Dial("tcp", r.Target)
	if err != nil {
		return nil, err
	}
	c := &client{wire: newWire(nc), run: r, first: make(chan struct{}), idle: make(chan struct{}), next: 1, asked: map[uint32]*question{}}
	c.out = append(c.out, http2.ClientPreface...)
	c.hello()
	return c, c.flush()
}

func (c *client) fault() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *client) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stop(err)
}

// stop notes the first failure; the caller holds the lock.
func (c *client) stop(err error) {
	if c.err == nil && !c.idleDone {
		c.err = err
	}
	if !c.firstUp {
		c.firstUp = true
		close(c.first)
	}
	if !c.idleDone {
		c.idleDone = true
		close(c.idle)
	}
}

// work reads answers, and asks anew as long as the run is not over.
func (c *client) work() {
	err := c.serve(c, func(f func() error) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		was := c.settled
		err := f()
		if err == nil && !was && c.settled {
			c.ask(time.Now())
			err = c.flush()
		}
		return err
	})
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	c.end(err)
}

// begin asks as many questions at once as the order says, or in time.
func (c *client) begin(now time.Time, n int) {
	c.mu.Lock()
	c.begun = true
	if c.run.Rate == 0 {
		for range c.run.Streams {
			c.ask(now)
		}
		_ = c.flush()
		c.mu.Unlock()
		return
	}
	c.mu.Unlock()
	gap := time.Second * time.Duration(c.run.Conns) / time.Duration(c.run.Rate)
	for due := now.Add(gap * time.Duration(n) / time.Duration(c.run.Conns)); !c.run.over.Load(); due = due.Add(gap) {
		time.Sleep(time.Until(due))
		c.mu.Lock()
		c.ask(due)
		_ = c.flush()
		c.mu.Unlock()
	}
	c.mu.Lock()
	c.rest()
	c.mu.Unlock()
}

// rest says that all is answered.
func (c *client) rest() {
	if c.begun && len(c.asked) == 0 && len(c.waiting) == 0 && c.run.over.Load() && !c.idleDone {
		c.idleDone = true
		close(c.idle)
	}
}

var request = message(1 << 10)

// ask sends one request.
func (c *client) ask(due time.Time) {
	if len(c.asked) >= c.most || c.run.GRPC && c.window < len(request) {
		c.waiting = append(c.waiting, due)
		return
	}
	if len(c.blocks) < 2 {
		c.blocks = append(c.blocks, c.block(c.run.fields()))
	}
	b := c.blocks[len(c.blocks)-1]
	q := &question{}
	if n := len(c.free); n > 0 {
		q, c.free = c.free[n-1], c.free[:n-1]
	}
	*q = question{due: due}
	id := c.next
	c.next += 2
	c.asked[id] = q
	flags := http2.FlagHeadersEndHeaders
	if !c.run.GRPC {
		flags |= http2.FlagHeadersEndStream
	}
	c.frame(len(b), http2.FrameHeaders, flags, id)
	c.out = append(c.out, b...)
	if c.run.GRPC {
		c.frame(len(request), http2.FrameData, http2.FlagDataEndStream, id)
		c.out = append(c.out, request...)
		c.window -= len(request)
	}
}

func (o order) fields() []hpack.HeaderField {
	verb := "GET"
	if o.GRPC {
		verb = "POST"
	}
	f := []hpack.HeaderField{{Name: ":method", Value: verb}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: o.Path}, {Name: ":authority", Value: "origin.mesh.internal"}}
	if o.GRPC {
		f = append(f, hpack.HeaderField{Name: "content-type", Value: "application/grpc"}, hpack.HeaderField{Name: "user-agent", Value: "grpc-bench/1"}, hpack.HeaderField{Name: "te", Value: "trailers"})
	} else {
		f = append(f, hpack.HeaderField{Name: "user-agent", Value: "bench/1"}, hpack.HeaderField{Name: "accept", Value: "application/json"})
	}
	if o.Trace {
		f = append(f, hpack.HeaderField{Name: "traceparent", Value: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"})
	}
	return f
}

func (c *client) opens(id uint32, last bool) error {
	q := c.asked[id]
	if q == nil {
		return fmt.Errorf("an answer on stream %d, where nothing was asked", id)
	}
	if q.status == "" {
		if c.status[0] == '1' {
			return nil
		}
		q.status = c.status
		if last {
			return c.answered(id, q)
		}
		if c.run.GRPC {
			c.grpc = "" // comes behind the body
		}
		return nil
	}
	return c.answered(id, q)
}

func (c *client) takes(id uint32, n int, last bool) error {
	q := c.asked[id]
	if q == nil {
		return fmt.Errorf("a body on stream %d, where nothing was asked", id)
	}
	q.got += n
	if last {
		return c.answered(id, q)
	}
	return nil
}

// answered checks an answer that is whole, and asks anew.
func (c *client) answered(id uint32, q *question) error {
	switch {
	case q.status != strconv.Itoa(200):
		return fmt.Errorf("answered %s", q.status)
	case c.run.GRPC && c.grpc != "0":
		return fmt.Errorf("the answer has grpc-status %q", c.grpc)
	case q.got != c.run.Size:
		return fmt.Errorf("the answer has %d bytes, want %d", q.got, c.run.Size)
	}
	now := time.Now()
	if c.run.counting.Load() {
		c.requests++
		c.took = append(c.took, float64(now.Sub(q.due))/1e6)
	}
	delete(c.asked, id)
	c.free = append(c.free, q)
	switch {
	case !c.firstUp:
		c.firstUp = true
		close(c.first)
	case c.run.over.Load():
		c.waiting = nil
		c.rest()
	case len(c.waiting) > 0:
		due := c.waiting[0]
		c.waiting = c.waiting[1:]
		c.ask(due)
	case c.run.Rate == 0:
		c.ask(now)
	}
	return nil
}

func (c *client) moved(id uint32, n int) error {
	if id == 0 {
		due := c.waiting
		c.waiting = nil
		for _, d := range due {
			c.ask(d)
		}
	}
	return nil
}

func (c *client) broken(id uint32, code http2.ErrCode) error {
	return fmt.Errorf("stream %d was broken off: %v", id, code)
}
