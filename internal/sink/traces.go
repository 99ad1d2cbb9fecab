package sink

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	export "go.opentelemetry.io/proto/slim/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/slim/otlp/common/v1"
	resource "go.opentelemetry.io/proto/slim/otlp/resource/v1"
	trace "go.opentelemetry.io/proto/slim/otlp/trace/v1"

	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
)

// TracesConfig says which traces are kept, and where their spans go. Without OTLP
// none is, and traces pass.
type TracesConfig struct {
	// OTLP is the collector: its URL ends in /v1/traces for http.
	OTLP *OTLPConfig `yaml:"otlp"`
	// Sample is the share of traces that begin here which are kept. A trace that a
	// caller keeps is kept, and so are errors, denials, retries and what is slow,
	// as far as this program has seen them. Default 1%.
	Sample *mesh.Share `yaml:"sample"`
	// Slow is how long a call takes at least that is kept in any case. Default 1 s.
	Slow time.Duration `yaml:"slow"`
	// PerSecond bounds the spans that are kept. Default 1000.
	PerSecond int `yaml:"per_second"`
	// RestartFrom are the callers, as SPIFFE IDs or patterns as in a row, whose
	// word about traces is not taken, such as a load balancer that passes on what
	// the world says: a new trace begins, and is linked to theirs.
	RestartFrom []string `yaml:"restart_from"`
}

// Validate reports every mistake by field name.
func (c TracesConfig) Validate() error {
	var errs []error
	if c.OTLP != nil {
		errs = append(errs, within("tracing.otlp", errors.Join(c.OTLP.validate(), c.OTLP.leads("/v1/traces"))))
	}
	if c.Slow < 0 || c.Slow > time.Hour {
		errs = append(errs, fmt.Errorf("tracing.slow: %s is not between 0s and 1h", c.Slow))
	}
	if c.PerSecond < 0 || c.PerSecond > 1e6 {
		errs = append(errs, fmt.Errorf("tracing.per_second: %d is not between 0 and 1000000", c.PerSecond))
	}
	for i, p := range c.RestartFrom {
		if err := mesh.CheckIDPattern(p); err != nil {
			errs = append(errs, fmt.Errorf("tracing.restart_from[%d]: %w", i, err))
		}
	}
	return errors.Join(errs...)
}

// Tracer makes what keeps the spans; nil when no collector is configured.
func (c TracesConfig) Tracer(m *telemetry.Registry) *telemetry.Tracer {
	if c.OTLP == nil {
		return nil
	}
	sample := mesh.Share(mesh.Whole / 100)
	if c.Sample != nil {
		sample = *c.Sample
	}
	return telemetry.NewTracer(telemetry.TracerConfig{Sample: float64(sample) / mesh.Whole, Slow: c.Slow, PerSecond: c.PerSecond, Metrics: m})
}

// Traces sends the spans of a program to a collector, in batches.
type Traces struct {
	exporter
	tracer  *telemetry.Tracer
	metrics *telemetry.Registry
	log     *slog.Logger
	service func() string
	program string
	host    string
}

// NewTraces prepares to send what tracer keeps. It contacts nobody. Service is what
// the workload is called, as far as that is known. Without a collector it is nil.
func NewTraces(c TracesConfig, tracer *telemetry.Tracer, env Env, service func() string) (*Traces, error) {
	if c.OTLP == nil {
		return nil, nil
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	e, err := c.OTLP.exporter(env)
	if err != nil {
		return nil, fmt.Errorf("tracing.otlp: %w", err)
	}
	return &Traces{exporter: e, tracer: tracer, metrics: env.Metrics, log: env.Log, service: service, program: env.Program, host: host}, nil
}

const (
	spansAtOnce = 512
	spansWait   = time.Second
	// spansWithin bounds one attempt, spansTries how many there are: traces are
	// for looking at, and newer ones wait meanwhile.
	spansWithin = 5 * time.Second
	spansTries  = 3
	spansPause  = time.Second
	spansTell   = time.Minute
)

// Run sends until ctx ends, and then what is left, once.
func (t *Traces) Run(ctx context.Context) error {
	if t == nil {
		return nil
	}
	defer t.close()
	end, over := outlive(ctx)
	defer over()
	var told time.Time
	for {
		batch := t.tracer.Next(ctx, spansAtOnce, spansWait)
		if len(batch) == 0 && ctx.Err() != nil {
			return nil
		}
		if err := t.send(ctx, end, batch); err != nil {
			t.metrics.Spans("failed").Add(int64(len(batch)))
			if now := time.Now(); now.Sub(told) >= spansTell {
				told = now
				t.log.Warn("spans not sent", "spans", len(batch), "err", err)
			}
		}
	}
}

func (t *Traces) send(ctx, end context.Context, batch []*telemetry.Span) error {
	q := t.request(batch)
	for try := 1; ; try++ {
		resp := new(export.ExportTraceServiceResponse)
		one, cancel := context.WithTimeout(end, spansWithin)
		err := t.export(one, exportTraces, q, resp)
		cancel()
		if err == nil {
			refused := min(resp.GetPartialSuccess().GetRejectedSpans(), int64(len(batch)))
			t.metrics.Spans("refused").Add(refused)
			t.metrics.Spans("sent").Add(int64(len(batch)) - refused)
			return nil
		}
		t.close()
		if no := (*refusal)(nil); errors.As(err, &no) || try == spansTries || ctx.Err() != nil {
			return err
		}
		select {
		case <-time.After(spansPause):
		case <-ctx.Done():
		}
	}
}

func (t *Traces) request(batch []*telemetry.Span) *export.ExportTraceServiceRequest {
	out := make([]*trace.Span, len(batch))
	for i, s := range batch {
		out[i] = spanOf(s)
	}
	return &export.ExportTraceServiceRequest{ResourceSpans: []*trace.ResourceSpans{{
		Resource:   &resource.Resource{Attributes: resourceOf(t.service(), t.program, t.host)},
		ScopeSpans: []*trace.ScopeSpans{{Scope: &common.InstrumentationScope{Name: "sallyport"}, Spans: out}},
	}}}
}

func resourceOf(service, program, host string) []*common.KeyValue {
	return []*common.KeyValue{text("service.name", service), text("host.name", host), text("sallyport.program", program)}
}

func spanOf(s *telemetry.Span) *trace.Span {
	out := &trace.Span{
		TraceId: s.Trace.ID[:], SpanId: s.Trace.Span[:], Name: s.Name, Kind: trace.Span_SpanKind(s.Kind),
		StartTimeUnixNano: uint64(s.Start.UnixNano()), EndTimeUnixNano: uint64(s.End.UnixNano()), Status: &trace.Status{},
	}
	if s.Trace.Sampled {
		out.Flags = 1
	}
	if s.Parent != [8]byte{} {
		out.ParentSpanId = s.Parent[:]
	}
	if s.Link.ID != [16]byte{} {
		out.Links = []*trace.Span_Link{{TraceId: s.Link.ID[:], SpanId: s.Link.Span[:]}}
	}
	if s.Failed {
		out.Status.Code = trace.Status_STATUS_CODE_ERROR
	}
	for _, a := range s.Attrs {
		if a.Text != "" {
			out.Attributes = append(out.Attributes, text(a.Key, a.Text))
		} else {
			out.Attributes = append(out.Attributes, &common.KeyValue{Key: a.Key, Value: &common.AnyValue{Value: &common.AnyValue_IntValue{IntValue: a.N}}})
		}
	}
	return out
}
