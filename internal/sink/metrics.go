package sink

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	export "go.opentelemetry.io/proto/slim/otlp/collector/metrics/v1"
	common "go.opentelemetry.io/proto/slim/otlp/common/v1"
	metrics "go.opentelemetry.io/proto/slim/otlp/metrics/v1"
	resource "go.opentelemetry.io/proto/slim/otlp/resource/v1"

	"sallyport/internal/daemon"
	"sallyport/internal/telemetry"
)

// MetricsConfig is the section about the metrics: who may read them, and where
// they are sent.
type MetricsConfig struct {
	daemon.MetricsConfig `yaml:",inline"`
	// OTLP is a collector that gets them as well: its URL ends in /v1/metrics for
	// http. Default: none.
	OTLP *OTLPConfig `yaml:"otlp"`
	// Every is how often they are sent, 1s to 1h. Default 1m.
	Every time.Duration `yaml:"every"`
}

// Validate reports every mistake by field name.
func (c MetricsConfig) Validate() error {
	errs := []error{c.MetricsConfig.Validate()}
	if c.OTLP != nil {
		errs = append(errs, within("metrics.otlp", errors.Join(c.OTLP.validate(), c.OTLP.leads("/v1/metrics"))))
		if c.Disabled {
			errs = append(errs, errors.New("metrics.otlp: metrics.disabled has nothing to send; leave one of both out"))
		}
	}
	if c.Every != 0 && (c.Every < time.Second || c.Every > time.Hour) {
		errs = append(errs, fmt.Errorf("metrics.every: %s is not between 1s and 1h", c.Every))
	}
	if c.Every != 0 && c.OTLP == nil {
		errs = append(errs, errors.New("metrics.every: nothing is sent without metrics.otlp; write that too, or leave it out"))
	}
	return errors.Join(errs...)
}

// Metrics sends the metrics of a program to a collector, as they stand, now and
// then.
type Metrics struct {
	exporter
	every   time.Duration
	metrics *telemetry.Registry
	log     *slog.Logger
	service func() string
	program string
	host    string
	// instance tells apart two processes of which one takes over from the other.
	instance string
	started  time.Time
}

// NewMetrics prepares to send what env.Metrics has. It contacts nobody. Service is
// what the workload is called, as far as that is known. Without a collector it is
// nil.
func NewMetrics(c MetricsConfig, env Env, service func() string) (*Metrics, error) {
	if c.OTLP == nil {
		return nil, nil
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	e, err := c.OTLP.exporter(env)
	if err != nil {
		return nil, fmt.Errorf("metrics.otlp: %w", err)
	}
	return &Metrics{
		exporter: e, every: cmp.Or(c.Every, time.Minute), metrics: env.Metrics, log: env.Log, service: service, program: env.Program, host: host,
		instance: fmt.Sprintf("%s-%d", host, os.Getpid()), started: time.Now(),
	}, nil
}

const (
	// pointsAtOnce bounds a message, well below what collectors take.
	pointsAtOnce = 1000
	// metricsWithin bounds what one time takes. What was not sent is not kept: the
	// next time says all of it, and more.
	metricsWithin = 10 * time.Second
)

// Run sends until ctx ends, and then once more.
func (m *Metrics) Run(ctx context.Context) error {
	if m == nil {
		return nil
	}
	defer m.close()
	end, over := outlive(ctx)
	defer over()
	var told time.Time
	for ctx.Err() == nil {
		daemon.Pause(ctx, m.every)
		one, cancel := context.WithTimeout(end, metricsWithin)
		err := m.send(one)
		cancel()
		if err == nil {
			continue
		}
		m.close()
		if now := time.Now(); now.Sub(told) >= spansTell {
			told = now
			m.log.Warn("metrics not sent", "err", err)
		}
	}
	return nil
}

func (m *Metrics) send(ctx context.Context) error {
	all, err := m.metrics.Gather()
	if err != nil {
		m.metrics.MetricsExports("failed").Inc()
		return err
	}
	for _, part := range m.parts(all, time.Now()) {
		resp := new(export.ExportMetricsServiceResponse)
		err := m.export(ctx, exportMetrics, &export.ExportMetricsServiceRequest{ResourceMetrics: []*metrics.ResourceMetrics{{
			Resource:     &resource.Resource{Attributes: append(resourceOf(m.service(), m.program, m.host), text("service.instance.id", m.instance))},
			ScopeMetrics: []*metrics.ScopeMetrics{{Scope: &common.InstrumentationScope{Name: "sallyport"}, Metrics: part}},
		}}}, resp)
		if err != nil {
			m.metrics.MetricsExports("failed").Inc()
			return err
		}
		if p := resp.GetPartialSuccess(); p.GetRejectedDataPoints() > 0 {
			m.metrics.MetricsExports("refused").Inc()
			return fmt.Errorf("the collector rejected %d points: %.200q", p.GetRejectedDataPoints(), p.GetErrorMessage())
		}
	}
	m.metrics.MetricsExports("sent").Inc()
	return nil
}

// parts are the metrics in pieces that go into a message. Those that say the same
// under Istio's names are left out, and so are summaries, which nobody can add up.
func (m *Metrics) parts(all []*dto.MetricFamily, now time.Time) (out [][]*metrics.Metric) {
	from, at := uint64(m.started.UnixNano()), uint64(now.UnixNano())
	var part []*metrics.Metric
	room := pointsAtOnce
	for _, f := range all {
		if f.GetType() == dto.MetricType_SUMMARY || strings.HasPrefix(f.GetName(), "istio_") {
			continue
		}
		by := map[string]*metrics.Metric{} // of this part, by name
		for _, x := range f.Metric {
			if room == 0 {
				out, part, room = append(out, part), nil, pointsAtOnce
				clear(by)
			}
			room--
			name := nameOf(f.GetName(), x)
			if by[name] == nil {
				by[name] = &metrics.Metric{Name: name, Description: f.GetHelp(), Unit: unitOf(f.GetName())}
				part = append(part, by[name])
			}
			addPoint(by[name], f.GetType(), x, from, at)
		}
	}
	if len(part) > 0 {
		out = append(out, part)
	}
	return out
}

// nameOf is what a series is called: where OpenTelemetry has a name for the same,
// that one.
func nameOf(name string, x *dto.Metric) string {
	if name != "sallyport_request_duration_seconds" {
		return name
	}
	for _, l := range x.Label {
		switch {
		case l.GetName() != "reporter":
		case l.GetValue() == "inbound":
			return "http.server.request.duration"
		case l.GetValue() == "outbound":
			return "http.client.request.duration"
		}
	}
	return name
}

func unitOf(name string) string {
	name = strings.TrimSuffix(name, "_total")
	switch {
	case strings.HasSuffix(name, "_seconds"):
		return "s"
	case strings.HasSuffix(name, "_bytes"):
		return "By"
	}
	return "1"
}

// attributes are called as those of spans are.
var attributes = map[string]string{"route": "http.route", "code": "http.response.status_code", "grpc": "rpc.response.status_code"}

func attributesOf(labels []*dto.LabelPair) (out []*common.KeyValue) {
	for _, l := range labels {
		if l.GetValue() == "" {
			continue
		}
		key, known := attributes[l.GetName()]
		if !known {
			key = "sallyport." + l.GetName()
		}
		if n, err := strconv.ParseInt(l.GetValue(), 10, 64); err == nil && l.GetName() == "code" {
			out = append(out, &common.KeyValue{Key: key, Value: &common.AnyValue{Value: &common.AnyValue_IntValue{IntValue: n}}})
			continue
		}
		out = append(out, text(key, l.GetValue()))
	}
	return out
}

func addPoint(m *metrics.Metric, typ dto.MetricType, x *dto.Metric, from, at uint64) {
	attrs := attributesOf(x.Label)
	switch typ {
	case dto.MetricType_HISTOGRAM:
		if m.Data == nil {
			m.Data = &metrics.Metric_Histogram{Histogram: &metrics.Histogram{AggregationTemporality: metrics.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE}}
		}
		p := histogramPoint(x.GetHistogram())
		p.Attributes, p.StartTimeUnixNano, p.TimeUnixNano = attrs, from, at
		m.GetHistogram().DataPoints = append(m.GetHistogram().DataPoints, p)
	case dto.MetricType_COUNTER:
		if m.Data == nil {
			m.Data = &metrics.Metric_Sum{Sum: &metrics.Sum{IsMonotonic: true, AggregationTemporality: metrics.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE}}
		}
		m.GetSum().DataPoints = append(m.GetSum().DataPoints, numberPoint(attrs, x.GetCounter().GetValue(), from, at))
	default:
		if m.Data == nil {
			m.Data = &metrics.Metric_Gauge{Gauge: &metrics.Gauge{}}
		}
		m.GetGauge().DataPoints = append(m.GetGauge().DataPoints, numberPoint(attrs, x.GetGauge().GetValue(), 0, at))
	}
}

func numberPoint(attrs []*common.KeyValue, v float64, from, at uint64) *metrics.NumberDataPoint {
	return &metrics.NumberDataPoint{Attributes: attrs, StartTimeUnixNano: from, TimeUnixNano: at, Value: &metrics.NumberDataPoint_AsDouble{AsDouble: v}}
}

// histogramPoint has the classic buckets, each by itself.
func histogramPoint(h *dto.Histogram) *metrics.HistogramDataPoint {
	sum := h.GetSampleSum()
	out := &metrics.HistogramDataPoint{Sum: &sum}
	for _, b := range h.Bucket {
		// A call may be counted while the buckets are read: each stands by what is
		// below it.
		n := b.GetCumulativeCount()
		out.BucketCounts = append(out.BucketCounts, n-min(out.Count, n))
		out.Count = max(out.Count, n)
		if !math.IsInf(b.GetUpperBound(), 1) {
			out.ExplicitBounds = append(out.ExplicitBounds, b.GetUpperBound())
		}
		if e := b.GetExemplar(); e != nil {
			out.Exemplars = append(out.Exemplars, exemplarOf(e))
		}
	}
	if len(out.BucketCounts) == len(out.ExplicitBounds) { // a source may leave the last one out
		out.BucketCounts = append(out.BucketCounts, h.GetSampleCount()-min(out.Count, h.GetSampleCount()))
		out.Count = max(out.Count, h.GetSampleCount())
	}
	return out
}

func exemplarOf(e *dto.Exemplar) *metrics.Exemplar {
	out := &metrics.Exemplar{TimeUnixNano: uint64(e.GetTimestamp().AsTime().UnixNano()), Value: &metrics.Exemplar_AsDouble{AsDouble: e.GetValue()}}
	for _, l := range e.Label {
		if id, err := hex.DecodeString(l.GetValue()); err == nil && l.GetName() == "trace_id" {
			out.TraceId = id
		}
	}
	return out
}
