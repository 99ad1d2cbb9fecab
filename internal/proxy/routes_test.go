package proxy

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
)

const bothCSV = accessCSV + "p, stock, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/inventory, 8443, *, **, -, allow\n"

// routed is a rig whose calls to billing go by routes.
func routed(t *testing.T, routes string, change ...func(*rig)) *rig {
	t.Helper()
	return newRig(t, app(t, echoHead), append([]func(*rig){func(r *rig) {
		r.routes = "service: billing\n" + routes
		r.inCfg.Name = func() mesh.ServiceName { return "billing" }
		r.inCfg.Host = func(host []byte) bool { return r.snap.Load().RoutesOf("billing").Hosts()[string(host)] }
	}}, change...)...)
}

// ask makes a call and follows no redirect.
func (r *rig) ask(method, path string, fields ...string) (*http.Response, string) {
	r.t.Helper()
	req, err := http.NewRequestWithContext(context.Background(), method, "http://billing.mesh.internal"+path, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		req.Header.Add(name, value)
	}
	c := r.client()
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	resp, err := c.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	resp.Body.Close()
	return resp, string(b)
}

func TestARouteChangesTheRequest(t *testing.T) {
	r := routed(t, `routes:
  - name: all
    matches: [{path: {prefix: /old}}]
    rewrite:
      prefix: /ok/new
      host: shop.test
      headers: {set: {X-Version: "2"}, add: {X-Seen: twice}, remove: [X-Secret]}
    answer: {set: {X-Answer: ours}, remove: [Date]}
  - name: whole
    matches: [{path: {exact: /one}}]
    rewrite: {path: /ok/other}
`)
	resp, got := r.ask("GET", "/old/a/b?x=1", "X-Secret: s", "X-Version: 1", "X-Seen: once", "Sallyport-Host: evil.test")
	if !has(got, "GET /ok/new/a/b?x=1 host=shop.test\n", "X-Version: 2\r\n", "X-Seen: once\r\nX-Seen: twice\r\n") || has(got, "X-Secret") || has(got, "X-Version: 1") || has(got, "evil") || has(got, "Sallyport-Host") {
		t.Errorf("the application got\n%s", got)
	}
	if resp.Header.Get("X-Answer") != "ours" || resp.Header.Get("Date") != "" {
		t.Errorf("the answer says %v", resp.Header)
	}
	if _, got := r.ask("GET", "/one?q"); !has(got, "GET /ok/other?q host=billing.mesh.internal\n") {
		t.Errorf("the application got\n%s", got)
	}
	if _, got := r.ask("GET", "/ok/plain", "X-Secret: s", "Sallyport-Host: shop.test"); !has(got, "GET /ok/plain host=billing.mesh.internal\n", "X-Secret: s") {
		t.Errorf("without a route the application got\n%s", got)
	}
	// What arrives is judged, whatever was asked for.
	if resp, _ := r.ask("GET", "/other/a"); resp.StatusCode != 403 {
		t.Errorf("a path that no row allows: %d", resp.StatusCode)
	}
}

func TestARouteAnswersItself(t *testing.T) {
	r := routed(t, `routes:
  - name: moved
    matches: [{path: {prefix: /old}}]
    redirect: {prefix: /new, status: 308}
  - name: away
    matches: [{path: {exact: /away}}]
    redirect: {scheme: https, host: shop.test, port: 8443}
  - name: port
    matches: [{path: {exact: /port}}]
    redirect: {port: 444, path: /}
  - name: closed
    matches: [{path: {prefix: /closed}}]
    respond: {status: 503, body: "closed\n"}
    answer: {set: {Retry-After: "60"}}
  - name: empty
    matches: [{path: {exact: /empty}}]
    respond: {status: 204}
`)
	for _, tt := range []struct {
		path, location, body string
		status               int
	}{
		{"/old/a?b=c", "/new/a?b=c", "", 308},
		{"/old", "/new", "", 308},
		{"/away?x", "https://shop.test:8443/away?x", "", 302},
		{"/port", "//billing.mesh.internal:444/", "", 302},
		{"/closed/x", "", "closed\n", 503},
		{"/empty", "", "", 204},
	} {
		resp, body := r.ask("GET", tt.path)
		if resp.StatusCode != tt.status || body != tt.body || resp.Header.Get("Location") != tt.location {
			t.Errorf("%s: %d %q, location %q", tt.path, resp.StatusCode, body, resp.Header.Get("Location"))
		}
	}
	if resp, _ := r.ask("GET", "/closed"); resp.Header.Get("Retry-After") != "60" || resp.Header.Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Errorf("the answer says %v", resp.Header)
	}
	if n := len(decisions(r.inAudit)); n != 0 {
		t.Errorf("%d calls reached the service", n)
	}
	// The connection carries the next call.
	w := r.dial()
	for range 2 {
		w.say("GET http://billing.mesh.internal/closed HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")
		if resp, _ := w.answer("GET"); resp.StatusCode != 503 || resp.Close {
			t.Errorf("got %+v", resp)
		}
	}
	if !strings.Contains(r.exposed(), `route="billing/closed"`) {
		t.Error("no series has the route")
	}
}

func TestAnswersToScriptsOfOtherOrigins(t *testing.T) {
	r := routed(t, `routes:
  - name: shop
    matches: [{path: {prefix: /ok}, method: POST}]
    cors:
      allow_origins: ["https://shop.test", "https://*.shop.test"]
      allow_methods: [POST]
      allow_headers: [X-Cart]
      expose_headers: [X-Total]
      allow_credentials: true
      max_age: 10m
  - name: open
    matches: [{path: {prefix: /ok/open}}]
    cors: {allow_origins: ["*"]}
`)
	ask := func(method, path, origin, about string) http.Header {
		t.Helper()
		fields := []string{"Origin: " + origin}
		if about != "" {
			fields = append(fields, "Access-Control-Request-Method: "+about)
		}
		resp, body := r.ask(method, path, fields...)
		if resp.StatusCode != 200 || about != "" && body != "" && resp.Header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%s %s of %s: %d %q", method, path, origin, resp.StatusCode, body)
		}
		return resp.Header
	}
	for _, origin := range []string{"https://shop.test", "https://eu.shop.test"} {
		h := ask("OPTIONS", "/ok/x", origin, "POST")
		want := map[string]string{"Access-Control-Allow-Origin": origin, "Access-Control-Allow-Credentials": "true", "Access-Control-Allow-Methods": "POST",
			"Access-Control-Allow-Headers": "X-Cart", "Access-Control-Max-Age": "600", "Vary": "Origin"}
		for name, value := range want {
			if h.Get(name) != value {
				t.Errorf("%s: %s is %q, want %q", origin, name, h.Get(name), value)
			}
		}
		if h := ask("POST", "/ok/x", origin, ""); h.Get("Access-Control-Allow-Origin") != origin || h.Get("Access-Control-Expose-Headers") != "X-Total" {
			t.Errorf("%s: the answer says %v", origin, h)
		}
	}
	for _, origin := range []string{"https://evil.test", "https://a.b.shop.test", "https://.shop.test", "http://shop.test", "https://evil/.shop.test", "null"} {
		for _, about := range []string{"", "POST"} {
			method := "POST"
			if about != "" {
				method = "OPTIONS"
			}
			if h := ask(method, "/ok/x", origin, about); h.Get("Access-Control-Allow-Origin") != "" || h.Get("Access-Control-Allow-Credentials") != "" {
				t.Errorf("%s may call: %v", origin, h)
			}
		}
	}
	if h := ask("GET", "/ok/open", "https://any.test", ""); h.Get("Access-Control-Allow-Origin") != "*" || h.Get("Vary") != "" {
		t.Errorf("an open route says %v", h)
	}
	// A question about a method that no such route has goes to the application.
	if _, body := r.ask("OPTIONS", "/ok/x", "Origin: https://shop.test", "Access-Control-Request-Method: DELETE"); !has(body, "OPTIONS /ok/x") {
		t.Errorf("the application was not asked: %q", body)
	}
}

func TestARouteLeadsToAnotherService(t *testing.T) {
	r := routed(t, `routes:
  - name: canary
    matches: [{headers: [{name: x-canary, exact: "1"}]}]
    backends: [{service: inventory}]
`, func(r *rig) { r.access = bothCSV })
	if _, got := r.ask("GET", "/ok/1"); !has(got, "host=billing.mesh.internal") {
		t.Errorf("the application got\n%s", got)
	}
	// Nobody serves inventory here, which is told by its name.
	resp, _ := r.ask("GET", "/ok/1", "X-Canary: 1")
	if resp.StatusCode != 503 {
		t.Errorf("got %d", resp.StatusCode)
	}
	if all := r.exposed(); !strings.Contains(all, `dst="ns/shop/sa/inventory"`) {
		t.Error("the call does not count as one to inventory")
	}
	// A route gives nobody what the rows do not.
	r.use(accessCSV)
	if resp, body := r.ask("GET", "/ok/1", "X-Canary: 1"); resp.StatusCode != 503 && resp.StatusCode != 403 {
		t.Errorf("got %d %s", resp.StatusCode, body)
	}
}

// A peer refuses what was sent to it for another service: the identity that is
// met is that of the backend.
func TestABackendIsMetUnderItsOwnIdentity(t *testing.T) {
	r := routed(t, "routes:\n  - name: all\n    backends: [{service: inventory}]\n", func(r *rig) { r.access = bothCSV })
	r.endpointsExtra = []mesh.Endpoint{meshtest.Endpoint(t, "inventory", r.inAddr)} // where billing answers
	r.use(bothCSV)
	if resp, _ := r.ask("GET", "/ok/1"); resp.StatusCode != 503 || len(decisions(r.inAudit)) != 0 {
		t.Errorf("got %d, %d calls judged", resp.StatusCode, len(decisions(r.inAudit)))
	}
}

// Calls change over to new routes without a failure.
func TestNewRoutesAreTakenAtOnce(t *testing.T) {
	r := routed(t, "routes:\n  - name: a\n    answer: {set: {X-Route: a}}\n")
	w := r.dial()
	for i := range 50 {
		name := fmt.Sprintf("r%d", i)
		r.routes = "service: billing\nroutes:\n  - name: " + name + "\n    answer: {set: {X-Route: " + name + "}}\n"
		r.use(accessCSV)
		w.say("GET http://billing.mesh.internal/ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")
		if resp, _ := w.answer("GET"); resp.StatusCode != 200 || resp.Header.Get("X-Route") != name {
			t.Fatalf("%s: %d by %q", name, resp.StatusCode, resp.Header.Get("X-Route"))
		}
	}
}

func TestRoutesThatMeanNothingCarryNoCall(t *testing.T) {
	r := routed(t, "routes:\n  - name: a\n")
	snap := *r.snap.Load()
	snap.Routes = []mesh.Routes{{Service: "billing", Routes: []mesh.Route{{Name: "a b"}}}}
	r.snap.Store(&snap)
	if resp, _ := r.ask("GET", "/ok/1"); resp.StatusCode != 503 || len(decisions(r.inAudit)) != 0 {
		t.Errorf("got %d", resp.StatusCode)
	}
}

func TestARegionIsThatOfAnAddressThatIsBelieved(t *testing.T) {
	routes := `routes:
  - name: eu
    matches: [{region: {in: [eu], ranges: {eu: [10.1.0.0/16]}}}]
    answer: {set: {X-Route: eu}}
`
	for _, trusted := range []bool{false, true} {
		r := routed(t, routes, func(r *rig) { r.outCfg.KeepForwardedFor = trusted })
		resp, _ := r.ask("GET", "/ok/1", "X-Forwarded-For: 10.2.0.1, 10.1.0.7")
		if got := resp.Header.Get("X-Route") == "eu"; got != trusted {
			t.Errorf("of a load balancer %v: the route was taken: %v", trusted, got)
		}
	}
}

func (r *rig) exposed() string {
	w := httptest.NewRecorder()
	r.metrics.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	return w.Body.String()
}
