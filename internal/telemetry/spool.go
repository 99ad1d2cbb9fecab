package telemetry

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// A Spool is how much of the audit log waits to be delivered: Bytes of at most
// Limit, the oldest for so long; and how many records were not kept because
// there was no room in the spool, or the disk did not take them.
type Spool struct {
	Bytes, Limit   int64
	Oldest         time.Duration
	NoRoom, NoDisk uint64
}

// AuditSpool shows what state returns, read anew for each scrape. It is called
// once.
func (r *Registry) AuditSpool(state func() Spool) {
	if r != nil {
		r.reg.MustRegister(spools{state})
		r.Saturation("audit", "spool", func() float64 {
			now := state()
			return float64(now.Bytes) / float64(max(now.Limit, 1))
		})
	}
}

type spools struct{ state func() Spool }

var (
	spoolBytes  = prometheus.NewDesc("sallyport_audit_spool_bytes", "Bytes of audit records that wait for the slowest of the sinks and the issuer.", nil, nil)
	spoolLimit  = prometheus.NewDesc("sallyport_audit_spool_limit_bytes", "Bytes of audit records that may wait; beyond it calls are refused.", nil, nil)
	spoolOldest = prometheus.NewDesc("sallyport_audit_spool_oldest_seconds", "How long the oldest audit record that is not delivered everywhere has waited.", nil, nil)
	spoolUnkept = prometheus.NewDesc("sallyport_audit_unkept_total", "Audit records that were not kept, because the spool was full or the disk did not take them.", []string{"cause"}, nil)
)

func (s spools) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{spoolBytes, spoolLimit, spoolOldest, spoolUnkept} {
		ch <- d
	}
}

func (s spools) Collect(ch chan<- prometheus.Metric) {
	now := s.state()
	gauge := func(d *prometheus.Desc, v float64) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v)
	}
	gauge(spoolBytes, float64(now.Bytes))
	gauge(spoolLimit, float64(now.Limit))
	gauge(spoolOldest, now.Oldest.Seconds())
	for cause, n := range map[string]uint64{"spool": now.NoRoom, "disk": now.NoDisk} {
		ch <- prometheus.MustNewConstMetric(spoolUnkept, prometheus.CounterValue, float64(n), cause)
	}
}
