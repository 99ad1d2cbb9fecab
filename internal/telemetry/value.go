package telemetry

import (
	"math"
	"sync/atomic"
	"time"

	dto "github.com/prometheus/client_model/go"
)

// A Counter only goes up. A nil Counter counts nothing.
type Counter struct{ n atomic.Uint64 }

// Add adds n; a negative n is a mistake and adds nothing.
func (c *Counter) Add(n int64) {
	if c != nil && n > 0 {
		c.n.Add(uint64(n))
	}
}

// Inc adds one.
func (c *Counter) Inc() {
	if c != nil {
		c.n.Add(1)
	}
}

func (c *Counter) write(m *dto.Metric, _ time.Time) bool {
	v := float64(c.n.Load())
	m.Counter = &dto.Counter{Value: &v}
	return true
}

func (c *Counter) mark() (uint64, bool) { return c.n.Load(), true }

// A Gauge goes up and down. A nil Gauge keeps nothing. Whoever uses Set does not
// use Add.
type Gauge struct {
	set atomic.Uint64 // bits of a float
	n   atomic.Int64
}

// Set stores v.
func (g *Gauge) Set(v float64) {
	if g != nil {
		g.set.Store(math.Float64bits(v))
	}
}

// Add adds n, which may be negative.
func (g *Gauge) Add(n int64) {
	if g != nil {
		g.n.Add(n)
	}
}

func (g *Gauge) value() float64 { return math.Float64frombits(g.set.Load()) + float64(g.n.Load()) }

func (g *Gauge) write(m *dto.Metric, _ time.Time) bool {
	v := g.value()
	m.Gauge = &dto.Gauge{Value: &v}
	return true
}

// mark lets a gauge that stands at anything but zero stay: a tunnel may be open
// for a day.
func (g *Gauge) mark() (uint64, bool) {
	v := g.value()
	return math.Float64bits(v), v == 0
}

// An Expiry is a moment shown as the seconds that remain until it: an alert
// needs no arithmetic, and a stopped clock in a proxy shows. A nil Expiry keeps
// nothing.
type Expiry struct{ at atomic.Int64 }

// Set stores the moment; the zero time means that there is none yet.
func (e *Expiry) Set(t time.Time) {
	if e == nil {
		return
	}
	if t.IsZero() {
		e.at.Store(0)
		return
	}
	e.at.Store(t.UnixNano())
}

func (e *Expiry) write(m *dto.Metric, now time.Time) bool {
	at := e.at.Load()
	if at == 0 {
		return false
	}
	left := time.Unix(0, at).Sub(now).Seconds()
	m.Gauge = &dto.Gauge{Value: &left}
	return true
}

func (e *Expiry) mark() (uint64, bool) { return uint64(e.at.Load()), false }
