package telemetry

import (
	"sync"
	"time"
	"weak"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

const (
	// maxSeries bounds the time series of one metric. A caller can invent names
	// (a flood of identities, a route per path); a server that scrapes thousands
	// of proxies cannot pay for them. What is beyond counts under Other.
	maxSeries = 2000
	// idleAfter is how long a series that does not change is still shown. Names
	// that are gone leave, and make room for others.
	idleAfter = 10 * time.Minute
	// sweepEvery is how often a metric that is full looks for room while nobody
	// scrapes it.
	sweepEvery = time.Minute
)

// Other is the label value of all that had no room left.
const Other = "other"

// OtherHost is the end of an edge to a host that no destination lists.
const OtherHost = "host:other"

// labels are the values of the labels of a series, comparable so that a look-up
// allocates nothing.
type labels [9]string

// A handle is what a series counts in.
type handle interface {
	// write puts the state into m; false when there is none to show.
	write(m *dto.Metric, now time.Time) bool
	// mark changes whenever something was counted. Rests says that a series which
	// does not change may be taken for gone.
	mark() (now uint64, rests bool)
}

// A family is one metric with its series: at most maxSeries of them, and one
// Other for each combination of the fixed labels. One that has been idle leaves
// the metric. Whoever still holds its handle may use it again, and it comes back
// with what it had counted.
type family[C any, H interface {
	*C
	handle
}] struct {
	name   string
	desc   *prometheus.Desc
	now    func() time.Time
	names  int // labels in use
	fixed  int // leading labels that keep their value beyond the cap
	capped *Counter

	mu       sync.RWMutex // guards the fields below
	children map[labels]*child[C]
	asleep   map[labels]sleeper[C]
	swept    time.Time
}

type child[C any] struct {
	h     *C
	pairs []*dto.LabelPair
	// Of the last sweep.
	mark  uint64
	since time.Time
}

// A sleeper is a series that is not shown. It is there as long as somebody holds
// its handle.
type sleeper[C any] struct {
	h    weak.Pointer[C]
	mark uint64
}

func newFamily[C any, H interface {
	*C
	handle
}](r *Registry, fixed int, name, help string, names ...string) *family[C, H] {
	f := &family[C, H]{
		name: name, desc: prometheus.NewDesc(name, help, names, nil), now: r.clock, names: len(names), fixed: fixed,
		children: map[labels]*child[C]{}, asleep: map[labels]sleeper[C]{},
	}
	if len(names) > fixed {
		f.capped = r.capped.get(labels{name})
		r.sized = append(r.sized, f)
	}
	r.reg.MustRegister(f)
	return f
}

// get returns the handle of the label values, made on first use.
func (f *family[C, H]) get(l labels) H {
	f.mu.RLock()
	c := f.children[l]
	f.mu.RUnlock()
	if c != nil {
		return c.h
	}
	return f.add(l)
}

// add stands apart from get because its labels escape to the heap.
func (f *family[C, H]) add(l labels) H {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c, ok := f.children[l]; ok {
		return c.h
	}
	if now := f.now(); f.full() && now.Sub(f.swept) >= sweepEvery {
		f.sweep(now)
	}
	if f.full() {
		f.capped.Inc()
		for i := f.fixed; i < f.names; i++ {
			l[i] = Other
		}
		if c, ok := f.children[l]; ok {
			return c.h
		}
	}
	return f.wake(l, nil)
}

// full says that no label that others can fill may have another value. The caller
// holds mu.
func (f *family[C, H]) full() bool { return len(f.children) >= maxSeries && f.names > f.fixed }

// wake shows a series: h, the one that sleeps, or a new one. The caller holds mu.
func (f *family[C, H]) wake(l labels, h *C) H {
	if s, ok := f.asleep[l]; ok {
		delete(f.asleep, l)
		if h == nil {
			h = s.h.Value()
		}
	}
	if h == nil {
		h = new(C)
	}
	f.children[l] = &child[C]{h: h, pairs: prometheus.MakeLabelPairs(f.desc, l[:f.names]), since: f.now()}
	return h
}

// sweep has what is idle leave, and what was used in its sleep come back. The
// caller holds mu.
func (f *family[C, H]) sweep(now time.Time) {
	f.swept = now
	if f.names == f.fixed {
		return
	}
	for l, s := range f.asleep {
		h := s.h.Value()
		if h == nil {
			delete(f.asleep, l)
		} else if mark, _ := H(h).mark(); mark != s.mark {
			f.wake(l, h)
		}
	}
	for l, c := range f.children {
		mark, rests := H(c.h).mark()
		if mark != c.mark || !rests {
			c.mark, c.since = mark, now
		} else if now.Sub(c.since) >= idleAfter {
			f.asleep[l] = sleeper[C]{weak.Make(c.h), c.mark}
			delete(f.children, l)
		}
	}
}

// each looks at every series that is shown.
func (f *family[C, H]) each(look func(labels, *C)) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	for l, c := range f.children {
		look(l, c.h)
	}
}

func (f *family[C, H]) size() (string, int) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.name, len(f.children)
}

// Describe implements prometheus.Collector.
func (f *family[C, H]) Describe(ch chan<- *prometheus.Desc) { ch <- f.desc }

// Collect implements prometheus.Collector.
func (f *family[C, H]) Collect(ch chan<- prometheus.Metric) {
	now := f.now()
	f.mu.Lock()
	f.sweep(now)
	have := make([]*child[C], 0, len(f.children))
	for _, c := range f.children {
		have = append(have, c)
	}
	f.mu.Unlock()
	for _, c := range have {
		m := &dto.Metric{Label: c.pairs}
		if H(c.h).write(m, now) {
			ch <- shown{f.desc, m}
		}
	}
}

// shown is a series as a scrape gets it.
type shown struct {
	desc *prometheus.Desc
	m    *dto.Metric
}

// Desc implements prometheus.Metric.
func (s shown) Desc() *prometheus.Desc { return s.desc }

// Write implements prometheus.Metric.
func (s shown) Write(m *dto.Metric) error {
	m.Label, m.Counter, m.Gauge, m.Histogram = s.m.Label, s.m.Counter, s.m.Gauge, s.m.Histogram
	return nil
}

// sizes shows how near each metric is to its cap.
type sizes struct{ r *Registry }

var (
	sizeDesc  = prometheus.NewDesc("sallyport_series", "Series of a metric whose labels others can fill.", []string{"metric"}, nil)
	limitDesc = prometheus.NewDesc("sallyport_series_limit", "Series that one metric may have; what is beyond counts as other.", nil, nil)
)

// Describe implements prometheus.Collector.
func (s sizes) Describe(ch chan<- *prometheus.Desc) {
	ch <- sizeDesc
	ch <- limitDesc
}

// Collect implements prometheus.Collector.
func (s sizes) Collect(ch chan<- prometheus.Metric) {
	ch <- prometheus.MustNewConstMetric(limitDesc, prometheus.GaugeValue, maxSeries)
	for _, f := range s.r.sized {
		if name, n := f.size(); n > 0 {
			ch <- prometheus.MustNewConstMetric(sizeDesc, prometheus.GaugeValue, float64(n), name)
		}
	}
}
