package telemetry

import (
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Signals are the golden signals as one reporter sees them: traffic, errors,
// latency and saturation of the calls that pass it.
type Signals struct {
	r        *Registry
	reporter string
	mu       sync.RWMutex // guards series
	series   map[[4]string]*Series
}

// NewSignals returns the signals of a reporter, such as "inbound", "outbound"
// or "gateway".
func NewSignals(r *Registry, reporter string) *Signals {
	return &Signals{r: r, reporter: reporter, series: make(map[[4]string]*Series)}
}

// Series returns the handle for calls of HTTP from src to dst by a route. The names
// are those of services as their SPIFFE IDs give them, never what a peer wrote
// (a Host header, a path). Keep the handle: the look-up takes a lock. Beyond
// the cap it is the one handle whose labels are all Other.
func (s *Signals) Series(src, dst, route string) *Series {
	return s.SeriesOf(ProtoHTTP, src, dst, route)
}

// The protocols that calls are told apart by.
const (
	ProtoHTTP = "http"
	ProtoTCP  = "tcp" // a stream, or a tunnel: one call each
)

// SeriesOf is Series for calls of another protocol.
func (s *Signals) SeriesOf(proto, src, dst, route string) *Series {
	if s == nil || s.r == nil {
		return nil
	}
	key := [4]string{src, dst, route, proto}
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
		s: s, key: key,
		inflight: s.r.inflight.get(labels{s.reporter, key[1]}),
		up:       s.r.reqBytes.get(labels{s.reporter, key[0], key[1], key[2]}),
		down:     s.r.respBytes.get(labels{s.reporter, key[0], key[1], key[2]}),
	}
	x.codes.Store(new([]codeCounter))
	s.series[key] = x
	return x
}

// A Series counts the calls of one (src, dst, route). Its methods are safe for
// concurrent use and allocate nothing once a status code was seen. A nil
// Series counts nothing.
type Series struct {
	s        *Signals
	key      [4]string // source, destination, route, protocol
	inflight *Gauge
	up, down *Counter
	// latency is by class: 0 for codes that are none, 1 to 5 for 1xx to 5xx.
	latency [6]atomic.Pointer[prometheus.Observer]
	// codes is replaced as a whole; a service answers with few of them, so that
	// a walk beats a map.
	codes atomic.Pointer[[]codeCounter]
}

type codeCounter struct {
	code int
	n    *Counter
}

// Begin counts a call as running until End.
func (x *Series) Begin() {
	if x != nil {
		x.inflight.Add(1)
	}
}

// End counts a call that began as no longer running.
func (x *Series) End() {
	if x != nil {
		x.inflight.Add(-1)
	}
}

// Observe counts a call that ended: its status code (0 when there was none),
// how long it took, and the bytes of both bodies.
func (x *Series) Observe(code int, d time.Duration, up, down int64) {
	if x == nil {
		return
	}
	if code < 100 || code > 599 {
		code = 0
	}
	x.counter(code).Inc()
	x.observer(code / 100).Observe(d.Seconds())
	x.up.Add(up)
	x.down.Add(down)
}

func (x *Series) counter(code int) *Counter {
	have := x.codes.Load()
	for _, c := range *have {
		if c.code == code {
			return c.n
		}
	}
	text := "none"
	if code != 0 {
		text = strconv.Itoa(code)
	}
	n := x.s.r.requests.get(labels{x.s.reporter, x.key[3], text, x.key[0], x.key[1], x.key[2]})
	next := make([]codeCounter, len(*have), len(*have)+1)
	copy(next, *have)
	next = append(next, codeCounter{code, n})
	// When another call won, its addition stands and ours comes next time.
	x.codes.CompareAndSwap(have, &next)
	return n
}

var classes = [6]string{"none", "1xx", "2xx", "3xx", "4xx", "5xx"}

func (x *Series) observer(class int) prometheus.Observer {
	if o := x.latency[class].Load(); o != nil {
		return *o
	}
	o := x.s.r.latency.get(labels{x.s.reporter, classes[class], x.key[0], x.key[1], x.key[2]})
	x.latency[class].Store(&o)
	return o
}
