package sink

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	export "go.opentelemetry.io/proto/slim/otlp/collector/metrics/v1"
	metrics "go.opentelemetry.io/proto/slim/otlp/metrics/v1"
	"google.golang.org/protobuf/proto"

	"sallyport/internal/daemon"
	"sallyport/internal/telemetry"
)

// A taker is a collector of metrics in memory.
type taker struct {
	err  error
	got  []*export.ExportMetricsServiceRequest
	took chan struct{}
	shut bool
}

func (k *taker) export(_ context.Context, method string, q, _ proto.Message) error {
	if method == exportMetrics && k.err == nil {
		k.got = append(k.got, proto.Clone(q).(*export.ExportMetricsServiceRequest))
	}
	if k.took != nil {
		k.took <- struct{}{}
	}
	return k.err
}

func (k *taker) close() { k.shut = true }

func newTestMetrics(r *telemetry.Registry, k *taker) *Metrics {
	return &Metrics{exporter: k, every: time.Second, metrics: r, log: slog.New(slog.DiscardHandler), service: func() string { return "ns/shop/sa/web" }, program: "sidecar", host: "h", instance: "h-1", started: time.Unix(1, 0)}
}

func TestMetricsAreWhatIsCounted(t *testing.T) {
	r := telemetry.NewRegistry().Home("mesh.test")
	r.IstioNames()
	trace := telemetry.NewTrace()
	trace.Sampled = true
	s := telemetry.NewSignals(r, "inbound").Series("spiffe://mesh.test/web", "spiffe://mesh.test/payment", "charges")
	s.Observe(&telemetry.Call{Code: 200, Took: 7 * time.Millisecond, Trace: &trace, End: time.Unix(2, 0)})
	s.Observe(&telemetry.Call{Code: 200, Took: time.Minute})
	telemetry.NewSignals(r, "outbound").Series("web", "payment", "").Observe(&telemetry.Call{Code: 404, Took: time.Millisecond})
	for i := range 1500 {
		r.Authz(strings.Repeat("r", i), "allow").Inc()
	}
	k := &taker{}
	if err := newTestMetrics(r, k).send(t.Context()); err != nil {
		t.Fatal(err)
	}
	by, points := map[string][]*metrics.Metric{}, 0
	for _, q := range k.got {
		if proto.Size(q) > 4<<20 {
			t.Errorf("a message of %d bytes is more than gRPC takes", proto.Size(q))
		}
		for _, m := range q.ResourceMetrics[0].ScopeMetrics[0].Metrics {
			by[m.Name] = append(by[m.Name], m)
			points += len(m.GetSum().GetDataPoints())
			if strings.HasPrefix(m.Name, "istio_") || m.Name == "sallyport_request_duration_seconds" {
				t.Errorf("%s says twice what another says", m.Name)
			}
		}
	}
	if len(k.got) != 2 || points < 1503 {
		t.Errorf("%d messages with %d points of counters", len(k.got), points)
	}
	served := by["http.server.request.duration"]
	if len(served) != 1 || len(by["http.client.request.duration"]) != 1 {
		t.Fatalf("there are %v", slices.Sorted(maps.Keys(by)))
	}
	p := served[0].GetHistogram().DataPoints[0]
	attrs := map[string]string{}
	for _, a := range p.Attributes {
		attrs[a.Key] = a.Value.GetStringValue()
	}
	if want := map[string]string{"sallyport.src": "web", "sallyport.dst": "payment", "sallyport.reporter": "inbound", "http.route": "charges", "sallyport.class": "2xx"}; !maps.Equal(attrs, want) {
		t.Errorf("attributes %v, want %v", attrs, want)
	}
	if p.Count != 2 || p.GetSum() != 60.007 || len(p.BucketCounts) != len(p.ExplicitBounds)+1 || p.BucketCounts[1] != 1 || p.BucketCounts[len(p.BucketCounts)-1] != 1 {
		t.Errorf("%v", p)
	}
	if len(p.Exemplars) != 1 || string(p.Exemplars[0].TraceId) != string(trace.ID[:]) {
		t.Errorf("exemplars %v", p.Exemplars)
	}
	if u := served[0].Unit; u != "s" {
		t.Errorf("unit %q", u)
	}
	for _, pt := range by["sallyport_requests_total"][0].GetSum().DataPoints {
		for _, a := range pt.Attributes {
			if a.Key == "http.response.status_code" && a.Value.GetIntValue() < 200 {
				t.Errorf("code %v is no number", a.Value)
			}
		}
	}
}

// A collector that is down costs what it would have taken this once; at the end
// all is sent once more.
func TestMetricsGoOnAfterFailures(t *testing.T) {
	r := telemetry.NewRegistry()
	k := &taker{err: errors.New("down"), took: make(chan struct{})}
	m := newTestMetrics(r, k)
	m.every = time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- m.Run(ctx) }()
	<-k.took
	<-k.took
	cancel()
	for ended := false; !ended; {
		select {
		case <-k.took:
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			ended = true
		}
	}
	k.took, k.err = nil, nil
	if !k.shut {
		t.Error("the connections stay open")
	}
	if err := m.send(t.Context()); err != nil || len(k.got) == 0 {
		t.Errorf("%v, %d messages", err, len(k.got))
	}
}

func TestMetricsConfigIsChecked(t *testing.T) {
	for _, tt := range []struct {
		c    MetricsConfig
		want string
	}{
		{MetricsConfig{OTLP: &OTLPConfig{URL: "http://a.test"}}, "metrics.otlp: url: must be https"},
		{MetricsConfig{Every: time.Millisecond}, "metrics.every"},
		{MetricsConfig{Every: time.Minute}, "metrics.every: nothing is sent without metrics.otlp"},
		{MetricsConfig{OTLP: &OTLPConfig{URL: "https://a.test/v1/logs"}}, "metrics.otlp: url: /v1/logs is for something else; collectors take this at /v1/metrics"},
		{MetricsConfig{OTLP: &OTLPConfig{URL: "https://a.test/otel/v1/traces/"}}, "metrics.otlp: url: /v1/traces is for something else"},
		{MetricsConfig{MetricsConfig: daemon.MetricsConfig{Disabled: true}, OTLP: &OTLPConfig{URL: "https://a.test/v1/metrics"}}, "metrics.otlp: metrics.disabled"},
		{MetricsConfig{MetricsConfig: daemon.MetricsConfig{Disabled: true, IstioNames: true}}, "metrics.istio_names"},
	} {
		if err := tt.c.Validate(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %s", tt.c, err, tt.want)
		}
	}
	if m, err := NewMetrics(MetricsConfig{}, Env{}, nil); m != nil || err != nil {
		t.Errorf("%v %v", m, err)
	}
	// So are the collectors of the others; a path of one's own is.
	for want, err := range map[string]error{
		"tracing.otlp: url: /v1/metrics is for something else; collectors take this at /v1/traces": TracesConfig{OTLP: &OTLPConfig{URL: "https://a.test/v1/metrics"}}.Validate(),
		"otlp: url: /v1/traces is for something else; collectors take this at /v1/logs":            Config{Name: "a", OTLP: &OTLPConfig{URL: "https://a.test/v1/traces"}}.Validate(),
	} {
		if err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
	for _, c := range []MetricsConfig{{OTLP: &OTLPConfig{URL: "https://a.test/v1/metrics"}, Every: time.Minute}, {OTLP: &OTLPConfig{URL: "https://a.test/own"}}, {OTLP: &OTLPConfig{URL: "https://a.test:4317", Protocol: "grpc"}}} {
		if err := c.Validate(); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// deaf is a collector that answers nothing.
type deaf struct{ asked chan struct{} }

func (d *deaf) export(ctx context.Context, _ string, _, _ proto.Message) error {
	select {
	case d.asked <- struct{}{}:
	default:
	}
	<-ctx.Done()
	return ctx.Err()
}

func (d *deaf) close() {}

// Whoever stops a program waits no longer than a moment for a collector that answers
// nothing, however much is left to send, and whenever the program is stopped.
func TestADeafCollectorHoldsNoExitUp(t *testing.T) {
	for _, during := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			d := &deaf{asked: make(chan struct{}, 1)}
			r := telemetry.NewRegistry()
			m := newTestMetrics(r, &taker{})
			m.exporter, m.every = d, time.Hour
			tracer := telemetry.NewTracer(telemetry.TracerConfig{Sample: 1, Metrics: r})
			traces := &Traces{exporter: d, tracer: tracer, metrics: r, log: m.log, service: m.service}
			if during {
				m.every = time.Second
				for range 3 * spansAtOnce {
					tracer.Keep(telemetry.Span{Name: "x"})
				}
			}
			for name, run := range map[string]func(context.Context) error{"metrics": m.Run, "traces": traces.Run} {
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error)
				go func() { done <- run(ctx) }()
				if during {
					<-d.asked
				}
				synctest.Wait()
				began := time.Now()
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took > lastWithin {
					t.Errorf("%s, while something is sent %t: the exit takes %s", name, during, took)
				}
				select {
				case <-d.asked:
				default:
				}
			}
		})
	}
}
