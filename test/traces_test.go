package test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
	measured "go.opentelemetry.io/proto/slim/otlp/collector/metrics/v1"
	export "go.opentelemetry.io/proto/slim/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/slim/otlp/common/v1"
	trace "go.opentelemetry.io/proto/slim/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"sallyport/internal/meshtest"
)

// A collector takes spans and metrics as OTLP over HTTP has them.
type collector struct {
	*httptest.Server
	mu    sync.Mutex // guards what follows
	spans map[string][]collected
	// metrics are the newest counts of histograms, by service, name and attributes.
	metrics map[string]uint64
}

// A collected is a span and the service that sent it.
type collected struct {
	*trace.Span
	service string
}

func newCollector(t *testing.T) *collector {
	c := &collector{spans: map[string][]collected{}, metrics: map[string]uint64{}}
	c.Server = httptest.NewServer(c)
	t.Cleanup(c.Close)
	return c
}

// config has the spans of a proxy sent here: a share of the traces that begin at
// it, and all that its caller keeps.
func (c *collector) config(sample string) string {
	return fmt.Sprintf("tracing: {sample: %s, otlp: {url: %s/v1/traces}}\n", sample, c.URL)
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	var spans export.ExportTraceServiceRequest
	var points measured.ExportMetricsServiceRequest
	into := map[string]proto.Message{"/v1/traces": &spans, "/v1/metrics": &points}[r.URL.Path]
	if err != nil || into == nil || r.Header.Get("Content-Type") != "application/x-protobuf" || proto.Unmarshal(body, into) != nil {
		http.Error(w, "this is no OTLP", http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.take(&spans)
	c.measure(&points)
	w.Header().Set("Content-Type", "application/x-protobuf")
	b, _ := proto.Marshal(&export.ExportTraceServiceResponse{}) // of nothing, which cannot fail
	w.Write(b)
}

// measure keeps what histograms count. The caller holds the lock.
func (c *collector) measure(q *measured.ExportMetricsServiceRequest) {
	for _, rm := range q.ResourceMetrics {
		service := attr(rm.Resource.Attributes, "service.name")
		for _, sm := range rm.ScopeMetrics {
			for _, m := range sm.Metrics {
				for _, p := range m.GetHistogram().GetDataPoints() {
					c.metrics[strings.Join([]string{service, m.Name, attr(p.Attributes, "sallyport.dst"), attr(p.Attributes, "sallyport.class")}, " ")] = p.Count
				}
			}
		}
	}
}

// counted is what the newest of a histogram says.
func (c *collector) counted(key string) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.metrics[key]
}

// attr is the text or number of an attribute.
func attr(all []*common.KeyValue, key string) string {
	for _, a := range all {
		if n, ok := a.Value.Value.(*common.AnyValue_IntValue); ok && a.Key == key {
			return fmt.Sprint(n.IntValue)
		}
		if a.Key == key {
			return a.Value.GetStringValue()
		}
	}
	return ""
}

// take keeps spans. The caller holds the lock.
func (c *collector) take(q *export.ExportTraceServiceRequest) {
	for _, rs := range q.ResourceSpans {
		service := attr(rs.Resource.Attributes, "service.name")
		for _, ss := range rs.ScopeSpans {
			for _, s := range ss.Spans {
				id := fmt.Sprintf("%x", s.TraceId)
				c.spans[id] = append(c.spans[id], collected{s, service})
			}
		}
	}
}

// each looks at the spans of a trace, with their paths from its root: service and
// name of each.
func (c *collector) each(id string, look func(path string, s *trace.Span)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	by := map[string]collected{}
	for _, s := range c.spans[id] {
		by[string(s.SpanId)] = s
	}
	for _, s := range c.spans[id] {
		path, span := "", s.Span
		for ok := true; ok; s, ok = by[string(s.ParentSpanId)] {
			path = " > " + strings.TrimPrefix(s.service, "ns/") + ":" + s.Name + path
		}
		look(strings.TrimPrefix(path, " > "), span)
	}
}

// of are the paths of a trace.
func (c *collector) of(id string) (paths []string) {
	c.each(id, func(path string, _ *trace.Span) { paths = append(paths, path) })
	slices.Sort(paths)
	return paths
}

// without are those of the paths whose span has not come, or not with the attribute
// KEY=VALUE.
func (c *collector) without(id string, marks map[string]string) (missing []string) {
	found := map[string]bool{}
	c.each(id, func(path string, s *trace.Span) {
		key, value, _ := strings.Cut(marks[path], "=")
		found[path] = found[path] || attr(s.Attributes, key) == value
	})
	for path := range marks {
		if !found[path] {
			missing = append(missing, path)
		}
	}
	return missing
}

// questions are the names that were asked for, by the service that asked.
func (c *collector) questions(service string) (names []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, spans := range c.spans {
		for _, s := range spans {
			if s.Name == "question" && s.service == service {
				names = append(names, attr(s.Attributes, "sallyport.result")+" "+attr(s.Attributes, "dns.question.name"))
			}
		}
	}
	return names
}

// One trace shows a call over web, payment, billing and the gateway with every
// hop: each application passes on what it was given, and nothing else.
func TestOneTraceShowsEveryHop(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, within)
	out := w.startOutside("api.stripe.test")
	w.routeOut(out)
	w.put(filepath.Join(w.policy, "admin.csv"), "p, look, "+looker+", mesh.Tap, **, allow\np, view, "+viewer+", mesh.Status, **, allow\np, view-2, "+viewer+", mesh.Proxies, **, allow\n")
	c := newCollector(t)
	tracing := c.config("0%") + fmt.Sprintf("metrics: {istio_names: true, every: 1s, otlp: {url: %s/v1/metrics}}\n", c.URL)
	w.startIssuer()
	gateway := freePort(t)
	w.write("gateway", w.proxyConfig("gateway", w.token("gateway"))+fmt.Sprintf("listen: %s\nresolvers: [%q]\n", gateway, freePort(t))+tracing)
	w.awaitReady(w.start("gateway", nil, "gateway", "run", "--config", w.path("gateway", "config.yaml")))
	hands := map[string]*hand{}
	handed := func(option string, r *http.Request) []string {
		return []string{option, "Traceparent: " + r.Header.Get("Traceparent")}
	}
	var mu sync.Mutex // guards hands
	hop := func(name string, line func(r *http.Request) []string) http.HandlerFunc {
		return func(rw http.ResponseWriter, r *http.Request) {
			if !strings.HasPrefix(r.URL.Path, "/v1/") {
				return // somebody looks whether it is there
			}
			mu.Lock()
			h := hands[name]
			mu.Unlock()
			reply, err := try[runReply](h, "/run", line(r))
			if err != nil || reply.Code != 0 {
				t.Logf("%s: %v: %+v", name, err, reply)
				http.Error(rw, reply.Output, http.StatusBadGateway)
			}
		}
	}
	start := func(name string, n *node, h http.Handler, more string) {
		w.join(n)
		if h != nil {
			back := httptest.NewServer(h)
			t.Cleanup(back.Close)
			n.app = back.Listener.Addr().String()
		}
		w.write(name, w.sidecarConfig(n, w.token(name))+more+tracing)
		var got *hand
		if h == nil {
			got = w.startNode(n)
		} else {
			got = w.startWorkload(name)
		}
		mu.Lock()
		hands[name] = got
		mu.Unlock()
	}
	bill, pay, web := &node{name: "billing", gateways: gateway}, &node{name: "payment"}, &node{name: "web"}
	start("billing", bill, hop("billing", func(r *http.Request) []string {
		return curl(append(handed("--proxy-header", r), "--fail", "--cacert", out.ca, "--proxy", "http://"+bill.out, "https://api.stripe.test/")...)
	}), "")
	start("payment", pay, hop("payment", func(r *http.Request) []string {
		return curl(append(handed("-H", r), "--fail", "--proxy", "http://"+pay.out, "-X", "POST", "http://billing.mesh.internal/v1/charges/1")...)
	}), "")
	names := freePort(t)
	tracing = strings.Replace(tracing, "sample: 0%", "sample: 100%", 1) // so that questions have spans
	start("web", web, nil, fmt.Sprintf("names: {listen: %q, self_test: off}\n", names))
	w.awaitReach(hands["payment"], "http://billing.mesh.internal/v1/charges/0")
	hands["web"].await("reach payment", func() bool {
		return read(t, ask[runReply](hands["web"], "/run", curl("-X", "POST", "http://payment.mesh.internal/v1/pay"))).status == "200"
	})
	const id = "4bf92f3577b34da6a3ce929d0e0e4736"
	reply := ask[runReply](hands["web"], "/run", curl("--fail", "--proxy", "http://"+web.out, "-X", "POST", "-H", "Traceparent: 00-"+id+"-00f067aa0ba902b7-01", "http://payment.mesh.internal/v1/pay"))
	if reply.Code != 0 {
		t.Fatalf("%+v", reply)
	}
	const (
		atPayment = "shop/sa/web:call ns/shop/sa/payment > shop/sa/web:upstream > shop/sa/payment:serve ns/shop/sa/payment"
		atBilling = atPayment + " > shop/sa/payment:upstream > shop/sa/payment:call ns/shop/sa/billing > shop/sa/payment:upstream > shop/sa/billing:serve ns/shop/sa/billing"
		atGateway = atBilling + " > shop/sa/billing:upstream > shop/sa/billing:call gateway > shop/sa/billing:upstream > gateway:egress"
	)
	want := []string{atPayment + " > shop/sa/payment:policy", atBilling + " > shop/sa/billing:policy", atGateway + " > gateway:policy", atGateway + " > gateway:dial"}
	var got []string
	w.await("collect the whole trace", func() bool {
		got = c.of(id)
		for _, path := range want {
			if !slices.Contains(got, path) {
				return false
			}
		}
		return true
	})
	t.Logf("%d spans of one trace:\n%s", len(got), strings.Join(got, "\n"))
	w.await("count what was sent", func() bool { // the collector has it before its sender has an answer
		return strings.Contains(w.metrics("web"), `sallyport_trace_spans_total{result="sent"}`)
	})
	w.tellsMetrics(t, c)
	w.tapped(t, hands["web"])
	q := new(dns.Msg)
	q.SetQuestion("payment.mesh.internal.", dns.TypeA)
	if m, _, err := (&dns.Client{Timeout: within}).Exchange(q, names); err != nil || len(m.Answer) != 1 {
		t.Fatalf("%v %v", m, err)
	}
	w.await("collect the question", func() bool { return slices.Contains(c.questions("ns/shop/sa/web"), "mesh payment.mesh.internal") })
}

// tellsMetrics sees that the calls are measured at the collector and in the names of
// Istio as they are in ours.
func (w *world) tellsMetrics(t *testing.T, c *collector) {
	for _, want := range []string{
		"ns/shop/sa/web http.client.request.duration ns/shop/sa/payment 2xx",
		"ns/shop/sa/billing http.server.request.duration ns/shop/sa/billing 2xx",
		"gateway sallyport_request_duration_seconds api.stripe.test 2xx",
	} {
		w.await("measure "+want, func() bool { return c.counted(want) > 0 })
	}
	istio := regexp.MustCompile(`istio_requests_total\{[^}]*destination_service="payment.shop"[^}]*reporter="destination"[^}]*response_code="200"[^}]*source_workload="web"[^}]*\} [1-9]`)
	w.await("count calls under Istio's names", func() bool { return istio.MatchString(w.metrics("payment")) })
}
