package test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	export "go.opentelemetry.io/proto/slim/otlp/collector/trace/v1"
	trace "go.opentelemetry.io/proto/slim/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"sallyport/internal/meshtest"
)

// A collector takes spans as OTLP over HTTP has them.
type collector struct {
	*httptest.Server
	mu    sync.Mutex // guards spans
	spans map[string][]collected
}

// A collected is a span and the service that sent it.
type collected struct {
	*trace.Span
	service string
}

func newCollector(t *testing.T) *collector {
	c := &collector{spans: map[string][]collected{}}
	c.Server = httptest.NewServer(c)
	t.Cleanup(c.Close)
	return c
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	var q export.ExportTraceServiceRequest
	if err != nil || r.URL.Path != "/v1/traces" || r.Header.Get("Content-Type") != "application/x-protobuf" || proto.Unmarshal(body, &q) != nil {
		http.Error(w, "this is no OTLP", http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rs := range q.ResourceSpans {
		service := ""
		for _, a := range rs.Resource.Attributes {
			if a.Key == "service.name" {
				service = a.Value.GetStringValue()
			}
		}
		for _, ss := range rs.ScopeSpans {
			for _, s := range ss.Spans {
				id := fmt.Sprintf("%x", s.TraceId)
				c.spans[id] = append(c.spans[id], collected{s, service})
			}
		}
	}
	w.Header().Set("Content-Type", "application/x-protobuf")
	b, _ := proto.Marshal(&export.ExportTraceServiceResponse{}) // of nothing, which cannot fail
	w.Write(b)
}

// of are the spans of a trace as paths from its root: service and name of each.
func (c *collector) of(id string) (paths []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	by := map[string]collected{}
	for _, s := range c.spans[id] {
		by[string(s.SpanId)] = s
	}
	for _, s := range c.spans[id] {
		path := ""
		for ok := true; ok; s, ok = by[string(s.ParentSpanId)] {
			path = " > " + strings.TrimPrefix(s.service, "ns/") + ":" + s.Name + path
		}
		paths = append(paths, strings.TrimPrefix(path, " > "))
	}
	slices.Sort(paths)
	return paths
}

// One trace shows a call over web, payment, billing and the gateway with every
// hop: each application passes on what it was given, and nothing else.
func TestOneTraceShowsEveryHop(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, within)
	out := w.startOutside("api.stripe.test")
	w.routeOut(out)
	c := newCollector(t)
	tracing := fmt.Sprintf("tracing: {sample: 0%%, otlp: {url: %s/v1/traces}}\n", c.URL)
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
	start := func(name string, n *node, h http.Handler) {
		w.join(n)
		if h != nil {
			back := httptest.NewServer(h)
			t.Cleanup(back.Close)
			n.app = back.Listener.Addr().String()
		}
		w.write(name, w.sidecarConfig(n, w.token(name))+tracing)
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
	}))
	start("payment", pay, hop("payment", func(r *http.Request) []string {
		return curl(append(handed("-H", r), "--fail", "--proxy", "http://"+pay.out, "-X", "POST", "http://billing.mesh.internal/v1/charges/1")...)
	}))
	start("web", web, nil)
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
	if !strings.Contains(w.metrics("web"), `sallyport_trace_spans_total{result="sent"}`) {
		t.Error("what was sent is not counted")
	}
}
