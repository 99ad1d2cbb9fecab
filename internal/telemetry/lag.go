package telemetry

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// lags ask each sink when they are scraped: a sink that hangs sets no gauge.
type lags struct {
	records, seconds *prometheus.Desc

	mu    sync.Mutex // guards sinks
	sinks map[string]func() (records, seconds float64)
}

func newLags(r *Registry) *lags {
	l := &lags{
		records: prometheus.NewDesc("sallyport_audit_sink_lag_records", "Audit records that a sink has not taken yet.", []string{"sink"}, nil),
		seconds: prometheus.NewDesc("sallyport_audit_sink_lag_seconds", "How long the oldest audit record waits that is being sent to a sink.", []string{"sink"}, nil),
		sinks:   map[string]func() (float64, float64){},
	}
	r.reg.MustRegister(l)
	return l
}

func (l *lags) add(sink string, lag func() (records, seconds float64)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sinks[sink] = lag
}

// Describe implements prometheus.Collector.
func (l *lags) Describe(ch chan<- *prometheus.Desc) {
	ch <- l.records
	ch <- l.seconds
}

// Collect implements prometheus.Collector.
func (l *lags) Collect(ch chan<- prometheus.Metric) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for name, lag := range l.sinks {
		n, s := lag()
		ch <- prometheus.MustNewConstMetric(l.records, prometheus.GaugeValue, n, name)
		ch <- prometheus.MustNewConstMetric(l.seconds, prometheus.GaugeValue, s, name)
	}
}
