package proxy

import (
	"context"
	"encoding/hex"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"sallyport/internal/telemetry"
)

// traced is a rig both of whose sidecars keep what cfg says.
func traced(t *testing.T, handler http.Handler, cfg telemetry.TracerConfig, change ...func(*rig)) (*rig, *telemetry.Tracer) {
	t.Helper()
	tr := telemetry.NewTracer(cfg)
	r := newRig(t, app(t, handler.ServeHTTP), append(change, func(r *rig) { r.inCfg.Tracer, r.outCfg.Tracer = tr, tr })...)
	return r, tr
}

// awaitSpans waits for so many spans.
func awaitSpans(t *testing.T, tr *telemetry.Tracer, n int) (all []*telemetry.Span) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for len(all) < n && ctx.Err() == nil {
		all = append(all, tr.Next(ctx, 100, 10*time.Millisecond)...)
	}
	if len(all) != n {
		t.Fatalf("%d spans, want %d: %s", len(all), n, tree(all))
	}
	return all
}

// tree shows spans by name and parent.
func tree(all []*telemetry.Span) string {
	name := map[[8]byte]string{}
	for _, s := range all {
		name[s.Trace.Span] = s.Name
	}
	var out []string
	for _, s := range all {
		out = append(out, fmt.Sprintf("%s<%s", s.Name, name[s.Parent]))
	}
	return strings.Join(out, " ")
}

func find(t *testing.T, all []*telemetry.Span, name string) *telemetry.Span {
	t.Helper()
	for _, s := range all {
		if s.Name == name {
			return s
		}
	}
	t.Fatalf("no span %q: %s", name, tree(all))
	return nil
}

func (f *flaky) header(name string) string { return f.last.Load().Header.Get(name) }

const (
	callBilling  = "call ns/shop/sa/billing"
	serveBilling = "serve ns/shop/sa/billing"
)

func TestACallHasASpanForEachPart(t *testing.T) {
	back := &flaky{}
	r, tr := traced(t, back, telemetry.TracerConfig{Sample: 1})
	if resp, _ := r.ask("GET", "/ok/1"); resp.StatusCode != 200 {
		t.Fatalf("got %d", resp.StatusCode)
	}
	all := awaitSpans(t, tr, 6)
	call, served := find(t, all, callBilling), find(t, all, serveBilling)
	policy := find(t, all, "policy")
	if policy.Parent != served.Trace.Span || policy.Trace.ID != call.Trace.ID {
		t.Errorf("the judgement is not part of the served call: %s", tree(all))
	}
	var near, far *telemetry.Span
	for _, s := range all {
		if s.Name == "upstream" && s.Parent == call.Trace.Span {
			near = s
		} else if s.Name == "upstream" && s.Parent == served.Trace.Span {
			far = s
		}
	}
	if near == nil || far == nil || served.Parent != near.Trace.Span {
		t.Fatalf("the call served has not the try as its parent: %s", tree(all))
	}
	if got := back.header("traceparent"); got != "00-"+call.Trace.String()+"-"+hex.EncodeToString(far.Trace.Span[:])+"-01" {
		t.Errorf("the application has traceparent %s", got)
	}
	if call.Kind != telemetry.Client || served.Kind != telemetry.Server || call.Failed || served.End.Before(served.Start) {
		t.Errorf("%+v\n%+v", call, served)
	}
}

func TestEachRetryHasASpan(t *testing.T) {
	r, tr := traced(t, &flaky{bad: 1, how: status(503)}, telemetry.TracerConfig{Sample: 1})
	if resp, _ := r.ask("GET", "/ok/1"); resp.StatusCode != 200 {
		t.Fatalf("got %d", resp.StatusCode)
	}
	var all []*telemetry.Span
	await(t, func() bool { // the caller's are the last; how often the other side connects anew is up to it
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		all = append(all, tr.Next(ctx, 100, 0)...)
		return strings.Contains(tree(all), "retry<"+callBilling)
	})
	call, again := find(t, all, callBilling), find(t, all, "retry")
	if again.Parent != call.Trace.Span || again.Failed {
		t.Errorf("%+v", again)
	}
	resend := false
	for _, a := range again.Attrs {
		resend = resend || a.Key == "http.request.resend_count" && a.N == 1
	}
	if !resend {
		t.Errorf("the retry is not marked: %v", again.Attrs)
	}
}

func TestWhatGoesBadlyIsKept(t *testing.T) {
	for _, tt := range []struct {
		name, path string
		back       http.HandlerFunc
		slow       time.Duration
		spans      int
	}{
		{"well", "/ok/1", status(200), time.Hour, 0},
		{"an error", "/ok/1", status(500), time.Hour, 2},
		{"a denial, by who denies", "/secret", status(200), time.Hour, 1},
		{"slow", "/ok/1", status(200), time.Nanosecond, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, tr := traced(t, tt.back, telemetry.TracerConfig{Slow: tt.slow})
			r.ask("GET", tt.path)
			if tt.spans == 0 { // the other one is the last to be counted
				await(t, func() bool {
					return strings.Contains(r.exposed(), `sallyport_request_duration_seconds_count{class="2xx",dst="ns/shop/sa/billing",reporter="outbound"`)
				})
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				if all := tr.Next(ctx, 10, 0); len(all) > 0 {
					t.Errorf("kept %s", tree(all))
				}
				return
			}
			for _, s := range awaitSpans(t, tr, tt.spans) {
				if s.Failed == (tt.slow == time.Nanosecond) {
					t.Errorf("%s: failed %v", s.Name, s.Failed)
				}
			}
		})
	}
}

func TestTracesPassInBothForms(t *testing.T) {
	const id, span = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	back := &flaky{}
	r := newRig(t, app(t, back.ServeHTTP))
	for _, tt := range []struct {
		name   string
		fields []string
		want   map[string]string // by field, a prefix; "" for absent
	}{
		{"W3C", []string{"Traceparent: 00-" + id + "-" + span + "-01", "Tracestate: a=b", "Baggage: k=v"},
			map[string]string{"Traceparent": "00-" + id, "B3": "", "X-B3-TraceId": "", "Tracestate": "a=b", "Baggage": "k=v"}},
		{"B3 in one field", []string{"B3: " + id + "-" + span + "-1"},
			map[string]string{"Traceparent": "00-" + id, "B3": id + "-", "X-B3-TraceId": ""}},
		{"B3 in several", []string{"X-B3-TraceId: " + id, "X-B3-SpanId: " + span, "X-B3-Sampled: 1", "X-B3-ParentSpanId: " + span},
			map[string]string{"Traceparent": "00-" + id, "B3": "", "X-B3-TraceId": id, "X-B3-Sampled": "1", "X-B3-ParentSpanId": ""}},
		{"both", []string{"Traceparent: 00-" + id + "-" + span + "-00", "B3: 11111111111111112222222222222222-" + span + "-1"},
			map[string]string{"Traceparent": "00-" + id, "B3": id}},
		{"a broken B3", []string{"B3: what"}, map[string]string{"Traceparent": "00-", "B3": ""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if resp, _ := r.ask("GET", "/ok/1", tt.fields...); resp.StatusCode != 200 {
				t.Fatalf("got %d", resp.StatusCode)
			}
			for field, want := range tt.want {
				if got := back.header(field); !strings.HasPrefix(got, want) || want == "" && got != "" {
					t.Errorf("the application has %s: %q, want %q", field, got, want)
				}
			}
			if strings.Contains(back.header("Traceparent")+back.header("B3")+back.header("X-B3-SpanId"), span) {
				t.Error("the span is still the caller's")
			}
		})
	}
}

func TestATraceFromAnUntrustedCallerRestarts(t *testing.T) {
	const id = "4bf92f3577b34da6a3ce929d0e0e4736"
	back := &flaky{}
	r, tr := traced(t, back, telemetry.TracerConfig{Sample: 1}, func(r *rig) { r.inCfg.RestartTrace = []string{web.String()} })
	r.ask("GET", "/ok/1", "Traceparent: 00-"+id+"-00f067aa0ba902b7-01", "Tracestate: a=b")
	all := awaitSpans(t, tr, 6)
	served := find(t, all, serveBilling)
	if served.Trace.String() == id || served.Link.String() != id || served.Parent != [8]byte{} {
		t.Errorf("trace %s, parent %x, linked to %s", served.Trace, served.Parent, served.Link)
	}
	if got := back.header("traceparent"); !strings.Contains(got, served.Trace.String()) || back.header("tracestate") != "" {
		t.Errorf("the application has %q and %q", got, back.header("tracestate"))
	}
}
