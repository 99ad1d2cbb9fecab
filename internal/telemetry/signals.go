package telemetry

import (
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Signals are the golden signals as one reporter sees them: traffic, errors,
// latency and saturation of the calls that pass it.
type Signals struct {
	r        *Registry
	reporter string
	tls      string
	mu       sync.RWMutex // guards series
	series   map[[4]string]*Series
}

// NewSignals returns the signals of a reporter, such as "inbound", "outbound"
// or "gateway".
func NewSignals(r *Registry, reporter string) *Signals {
	s := &Signals{r: r, reporter: reporter, tls: "mutual", series: make(map[[4]string]*Series)}
	if r != nil {
		r.sweepers.add(s.sweep)
	}
	return s
}

// The protocols that calls are told apart by.
const (
	ProtoHTTP = "http"
	ProtoTCP  = "tcp" // a stream, or a tunnel: one call each
	ProtoGRPC = "grpc"
)

// Series returns the handle for calls of HTTP from src to dst by a route. Both
// are SPIFFE IDs, or words of ours; never what a peer wrote (a Host header, a
// path). Keep the handle: the look-up takes a lock. Beyond the cap it is the one
// handle whose labels are all Other.
func (s *Signals) Series(src, dst, route string) *Series {
	return s.SeriesOf(ProtoHTTP, src, dst, route)
}

// SeriesOf is Series for calls of another protocol.
func (s *Signals) SeriesOf(proto, src, dst, route string) *Series {
	if s == nil || s.r == nil {
		return nil
	}
	key := [4]string{s.r.service(src), s.r.service(dst), route, proto}
	s.mu.RLock()
	x := s.series[key]
	full := len(s.series) >= maxSeries
	s.mu.RUnlock()
	if x != nil {
		return x
	}
	if full {
		key = [4]string{Other, Other, Other, proto}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if x := s.series[key]; x != nil {
		return x
	}
	x = &Series{
		s: s, key: key, since: s.r.clock(),
		inflight: s.r.inflight.get(labels{s.reporter, key[1]}),
		up:       s.r.reqBytes.get(labels{s.reporter, key[0], key[1], key[2]}),
		down:     s.r.respBytes.get(labels{s.reporter, key[0], key[1], key[2]}),
	}
	if proto == ProtoTCP {
		x.opened, x.closed = s.r.tcpOpened.get(labels{s.reporter, key[0], key[1]}), s.r.tcpClosed.get(labels{s.reporter, key[0], key[1]})
	}
	x.codes.Store(new([]codeCounter))
	s.series[key] = x
	return x
}

// sweep forgets the series that are idle. Who holds one may go on with it: what
// it counts in is the same as that of the next one.
func (s *Signals) sweep(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, x := range s.series {
		if n := x.ended(); n != x.mark {
			x.mark, x.since = n, now
		} else if now.Sub(x.since) >= idleAfter {
			delete(s.series, key)
		}
	}
}

// service is what an identity is called in labels: its path, after the trust
// domain if that is another one. What is no identity stays as it is.
func (r *Registry) service(id string) string {
	rest, ok := strings.CutPrefix(id, "spiffe://")
	if !ok {
		return id
	}
	if td, path, found := strings.Cut(rest, "/"); found && (r.home == "" || td == r.home) {
		return path
	}
	return rest
}

// A Series counts the calls of one (src, dst, route). Its methods are safe for
// concurrent use and allocate nothing once a status code was seen. A nil
// Series counts nothing.
type Series struct {
	s        *Signals
	key      [4]string // source, destination, route, protocol
	inflight *Gauge
	up, down *Counter
	// Of TCP alone.
	opened, closed *Counter
	// latency is by class: 0 for codes that are none, 1 to 5 for 1xx to 5xx.
	latency [6]atomic.Pointer[Histogram]
	first   atomic.Pointer[Histogram]
	// codes is replaced as a whole; a service answers with few of them, so that
	// a walk beats a map.
	codes atomic.Pointer[[]codeCounter]
	// Of the last sweep, guarded by the Signals' mu.
	mark  uint64
	since time.Time
}

// A Call is what is counted of one that ended.
type Call struct {
	// Code is its status, 0 when there was none.
	Code int
	// Status is that of gRPC in decimals, empty for other calls.
	Status string
	// Flag says in one word, of a closed set, why a proxy answered in the
	// service's place, or broke off; empty when neither.
	Flag string
	// Took is how long it took, First how long the answer took to begin, 0 when
	// that is not known.
	Took, First time.Duration
	// Up and Down are the bytes of both bodies.
	Up, Down int64
	// Trace is remembered beside its latency if it is kept. Optional.
	Trace *Trace
	// End is when it ended; needed with Trace.
	End time.Time
}

// Ends are what the caller and the service are called in labels.
func (x *Series) Ends() (src, dst string) {
	if x == nil {
		return "", ""
	}
	return x.key[0], x.key[1]
}

type codeCounter struct {
	code         int
	status, flag string
	n            *Counter
}

// Begin counts a call as running until End.
func (x *Series) Begin() {
	if x != nil {
		x.inflight.Add(1)
		x.opened.Inc()
	}
}

// End counts a call that began as no longer running.
func (x *Series) End() {
	if x != nil {
		x.inflight.Add(-1)
		x.closed.Inc()
	}
}

// Observe counts a call that ended.
func (x *Series) Observe(c *Call) {
	if x == nil {
		return
	}
	code := c.Code
	if code < 100 || code > 599 {
		code = 0
	}
	x.counter(code, c.Status, c.Flag).Inc()
	x.observer(code/100).observe(c.Took, c.Trace, c.End)
	if c.First > 0 {
		x.toFirst().observe(c.First, c.Trace, c.End)
	}
	x.up.Add(c.Up)
	x.down.Add(c.Down)
}

func (x *Series) counter(code int, status, flag string) *Counter {
	have := x.codes.Load()
	for i := range *have {
		if c := &(*have)[i]; c.code == code && c.status == status && c.flag == flag {
			return c.n
		}
	}
	text := "none"
	if code != 0 {
		text = strconv.Itoa(code)
	}
	proto := x.key[3]
	if status != "" {
		proto = ProtoGRPC
	}
	n := x.s.r.requests.get(labels{x.s.reporter, proto, text, status, flag, x.s.tls, x.key[0], x.key[1], x.key[2]})
	next := make([]codeCounter, len(*have), len(*have)+1)
	copy(next, *have)
	next = append(next, codeCounter{code, strings.Clone(status), strings.Clone(flag), n})
	// When another call won, its addition stands and ours comes next time.
	x.codes.CompareAndSwap(have, &next)
	return n
}

var classes = [6]string{"err", "1xx", "2xx", "3xx", "4xx", "5xx"}

func (x *Series) observer(class int) *Histogram {
	if o := x.latency[class].Load(); o != nil {
		return o
	}
	o := x.s.r.latency.get(labels{x.s.reporter, classes[class], x.key[0], x.key[1], x.key[2]})
	x.latency[class].Store(o)
	return o
}

func (x *Series) toFirst() *Histogram {
	if o := x.first.Load(); o != nil {
		return o
	}
	o := x.s.r.ttfb.get(labels{x.key[1], x.key[2]})
	x.first.Store(o)
	return o
}

// ended is how many calls have ended.
func (x *Series) ended() (n uint64) {
	for i := range x.latency {
		if h := x.latency[i].Load(); h != nil {
			n += h.count()
		}
	}
	return n
}

// sweepers are told of each scrape.
type sweepers struct {
	mu  sync.Mutex // guards all
	all []func(time.Time)
}

func (s *sweepers) add(f func(time.Time)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, f)
}

func (s *sweepers) sweep(now time.Time) {
	s.mu.Lock()
	all := s.all
	s.mu.Unlock()
	for _, f := range all {
		f(now)
	}
}
