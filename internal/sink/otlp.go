package sink

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"time"

	export "go.opentelemetry.io/proto/slim/otlp/collector/logs/v1"
	common "go.opentelemetry.io/proto/slim/otlp/common/v1"
	logs "go.opentelemetry.io/proto/slim/otlp/logs/v1"
	resource "go.opentelemetry.io/proto/slim/otlp/resource/v1"
	"google.golang.org/protobuf/proto"
)

// OTLPConfig is an OpenTelemetry collector.
type OTLPConfig struct {
	// Protocol is "http", protobuf by POST, or "grpc". Default "http".
	Protocol string `yaml:"protocol"`
	// URL is https, or http on loopback: with the path for http, such as
	// https://otel.corp.example:4318/v1/logs, and without one for grpc, such as
	// https://otel.corp.example:4317. Required.
	URL string `yaml:"url"`
	// Token is sent as bearer token.
	Token Secret `yaml:"token"`
	TLS   `yaml:",inline"`
}

func (c *OTLPConfig) validate() error {
	var errs []error
	example := "https://otel.corp.example:4318/v1/logs"
	switch c.Protocol {
	case "", "http":
	case "grpc":
		example = "https://otel.corp.example:4317"
		if u, err := url.Parse(c.URL); err == nil && (strings.Trim(u.Path, "/") != "" || u.RawQuery != "") {
			errs = append(errs, fmt.Errorf("url: gRPC has no path; write scheme, host and port alone, such as %q", example))
		}
	default:
		errs = append(errs, fmt.Errorf("protocol: %q is neither http nor grpc", c.Protocol))
	}
	return errors.Join(append(errs, validateURL("url", c.URL, example), within("token", c.Token.validate()), c.TLS.validate())...)
}

// leads refuses the path of a collector that takes something else.
func (c *OTLPConfig) leads(path string) error {
	u, err := url.Parse(c.URL)
	if err != nil || c.Protocol == "grpc" {
		return nil //nolint:nilerr // validate says so
	}
	for _, other := range []string{"/v1/logs", "/v1/metrics", "/v1/traces"} {
		if other != path && strings.HasSuffix(strings.TrimSuffix(u.Path, "/"), other) {
			return fmt.Errorf("url: %s is for something else; collectors take this at %s", other, path)
		}
	}
	return nil
}

// lastWithin is how long is sent what is left when a program ends: whoever stops it
// waits for that.
const lastWithin = 2 * time.Second

// outlive is a context that ends so long after ctx.
func outlive(ctx context.Context) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		t := time.AfterFunc(lastWithin, cancel)
		context.AfterFunc(out, func() { t.Stop() })
	})
	return out, func() { stop(); cancel() }
}

func (c *OTLPConfig) open(env Env, _ string) (peer, error) {
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	e, err := c.exporter(env)
	if err != nil {
		return nil, err
	}
	return &otlp{exporter: e, program: env.Program, host: host}, nil
}

func (c *OTLPConfig) exporter(env Env) (exporter, error) {
	if c.Protocol == "grpc" {
		return newOTLPGRPC(c, env)
	}
	return newOTLPHTTP(c, env)
}

// An exporter carries a request to a collector, and the answer. What it makes of
// answers that took nothing is what a peer's deliver says. After close it may be
// used again.
type exporter interface {
	// export carries q by the method of gRPC, which HTTP has in the URL, and reads
	// resp.
	export(ctx context.Context, method string, q, resp proto.Message) error
	close()
}

// otlp is the peer of kind otlp.
type otlp struct {
	exporter
	program, host string
}

func (o *otlp) deliver(ctx context.Context, b *batch) error {
	resp := new(export.ExportLogsServiceResponse)
	if err := o.export(ctx, exportLogs, o.request(b), resp); err != nil {
		return err
	}
	part := resp.GetPartialSuccess()
	if n := part.GetRejectedLogRecords(); n > 0 {
		// The protocol forbids to send the batch again, and does not say which
		// records it speaks of.
		return &partial{refused: int(min(n, int64(len(b.records)))), err: fmt.Errorf("the server rejected %d of %d records: %.200q", n, len(b.records), part.GetErrorMessage())}
	}
	return nil
}

// otlpHTTP carries OTLP by HTTP with protobuf.
type otlpHTTP struct{ post *post }

func newOTLPHTTP(c *OTLPConfig, env Env) (exporter, error) {
	p, err := newPost(c.URL, "application/x-protobuf", c.Token, c.TLS, env)
	if err != nil {
		return nil, err
	}
	return &otlpHTTP{p}, nil
}

func (o *otlpHTTP) export(ctx context.Context, _ string, q, resp proto.Message) error {
	body, err := proto.Marshal(q)
	if err != nil {
		return &refusal{err: err}
	}
	answer, err := o.post.send(ctx, body, nil)
	if err != nil {
		return err
	}
	if err := proto.Unmarshal(answer, resp); err != nil {
		return fmt.Errorf("the server's answer is not OTLP: %w", err)
	}
	return nil
}

func (o *otlpHTTP) close() { o.post.client.CloseIdleConnections() }

func text(key, v string) *common.KeyValue {
	return &common.KeyValue{Key: key, Value: &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: v}}}
}

// request puts a batch into OTLP: the record is the body, what one looks for is
// beside it.
func (o *otlp) request(b *batch) *export.ExportLogsServiceRequest {
	now := uint64(time.Now().UnixNano())
	out := make([]*logs.LogRecord, len(b.records))
	for i := range b.records {
		out[i] = logRecord(&b.records[i], now)
	}
	return &export.ExportLogsServiceRequest{ResourceLogs: []*logs.ResourceLogs{{
		Resource: &resource.Resource{Attributes: []*common.KeyValue{
			text("service.name", "sallyport-"+o.program), text("host.name", o.host), text("sallyport.log", b.log),
		}},
		ScopeLogs: []*logs.ScopeLogs{{Scope: &common.InstrumentationScope{Name: "sallyport/audit"}, LogRecords: out}},
	}}}
}

func logRecord(r *record, now uint64) *logs.LogRecord {
	l := &logs.LogRecord{
		TimeUnixNano: uint64(r.Time.UnixNano()), ObservedTimeUnixNano: now,
		SeverityNumber: logs.SeverityNumber_SEVERITY_NUMBER_INFO, SeverityText: "INFO",
		Body: text("", strings.TrimSuffix(string(r.text), "\n")).Value,
		Attributes: []*common.KeyValue{
			{Key: "sallyport.seq", Value: &common.AnyValue{Value: &common.AnyValue_IntValue{IntValue: int64(r.Seq)}}},
			text("sallyport.kind", string(r.Kind)),
		},
	}
	switch severity(&r.Record) {
	case sevError:
		l.SeverityNumber, l.SeverityText = logs.SeverityNumber_SEVERITY_NUMBER_ERROR, "ERROR"
	case sevWarn:
		l.SeverityNumber, l.SeverityText = logs.SeverityNumber_SEVERITY_NUMBER_WARN, "WARN"
	}
	for _, p := range [...][2]string{
		{"id", r.ID}, {"decision", r.Decision}, {"reason", r.Reason}, {"rule", r.Rule}, {"src", r.Src}, {"dst", r.Dst},
	} {
		if p[1] != "" {
			l.Attributes = append(l.Attributes, text("sallyport."+p[0], p[1]))
		}
	}
	if id, err := hex.DecodeString(r.Trace); err == nil && len(id) == 16 {
		l.TraceId = id
	}
	return l
}
