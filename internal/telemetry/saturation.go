package telemetry

import (
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// saturation shows how much of what is bounded is in use: 1 is all of it.
type saturation struct {
	desc *prometheus.Desc
	now  func() time.Time

	mu   sync.Mutex // guards the fields below
	asks map[*saturated]struct{}
	// Of the scrape before.
	at   time.Time
	cpu  time.Duration
	load float64
}

// A saturated is one thing that is bounded.
type saturated struct {
	reporter, resource string
	ask                func() float64
}

func newSaturation(r *Registry) *saturation {
	s := &saturation{
		desc: prometheus.NewDesc("sallyport_saturation", "How much is in use of what is bounded, 1 is all: calls and connections of a reporter, tunnels, the audit spool, and of the process cpu (of the cores that it may use, since the last scrape) and fds.", []string{"reporter", "resource"}, nil),
		now:  r.clock, asks: map[*saturated]struct{}{}, at: r.clock(), cpu: CPUTime(),
	}
	r.reg.MustRegister(s)
	return s
}

// Saturation shows how much of a resource is in use, as ask says at each scrape,
// until the function that it returns is called. Of several with the same names
// the fullest counts.
func (r *Registry) Saturation(reporter, resource string, ask func() float64) (stop func()) {
	if r == nil {
		return func() {}
	}
	s, x := r.saturated, &saturated{reporter, resource, ask}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asks[x] = struct{}{}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.asks, x)
	}
}

// Describe implements prometheus.Collector.
func (s *saturation) Describe(ch chan<- *prometheus.Desc) { ch <- s.desc }

// Collect implements prometheus.Collector.
func (s *saturation) Collect(ch chan<- prometheus.Metric) {
	s.mu.Lock()
	asks := make([]*saturated, 0, len(s.asks))
	for x := range s.asks {
		asks = append(asks, x)
	}
	cpu := s.cpuLoad()
	s.mu.Unlock()
	most := map[[2]string]float64{{"process", "cpu"}: cpu}
	if fds, ok := fdLoad(); ok {
		most[[2]string{"process", "fds"}] = fds
	}
	for _, x := range asks { // not under the lock: they may take locks of their own
		k := [2]string{x.reporter, x.resource}
		most[k] = max(most[k], x.ask())
	}
	for k, v := range most {
		ch <- prometheus.MustNewConstMetric(s.desc, prometheus.GaugeValue, v, k[0], k[1])
	}
}

// leastSpan is how long the load must be measured to mean something. Two
// scrapers that come one after the other see the same.
const leastSpan = time.Second

// cpuLoad is how busy the process was since the scrape before. The caller holds
// mu.
func (s *saturation) cpuLoad() float64 {
	now, cpu := s.now(), CPUTime()
	if span := now.Sub(s.at); span >= leastSpan {
		s.load = (cpu - s.cpu).Seconds() / span.Seconds() / float64(runtime.GOMAXPROCS(0))
		s.at, s.cpu = now, cpu
	}
	return s.load
}

// CPUTime is what the process has computed.
func CPUTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func fdLoad() (float64, bool) {
	var lim syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim) != nil || lim.Cur == 0 {
		return 0, false
	}
	fds, err := os.ReadDir("/proc/self/fd")
	return float64(len(fds)) / float64(lim.Cur), err == nil
}
