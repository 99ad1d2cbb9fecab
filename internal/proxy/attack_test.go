package proxy

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
)

// echoHead answers with the head that it got.
func echoHead(w http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(w, "%s %s host=%s\n", r.Method, r.RequestURI, r.Host)
	_ = r.Header.Write(w)
}

func TestForgedHeadersAreStripped(t *testing.T) {
	r := newRig(t, app(t, echoHead), func(r *rig) { r.inCfg.Name = func() mesh.ServiceName { return "billing" } })
	forged := []string{
		"X-Forwarded-Client-Cert: By=x;URI=spiffe://demo.sallyport/ns/ops/sa/admin",
		"X_Forwarded_Client_Cert: URI=spiffe://demo.sallyport/ns/ops/sa/admin",
		"x-forwarded_client-cert: URI=spiffe://demo.sallyport/ns/ops/sa/admin",
		"X-Forwarded-For: 10.9.9.9", "X_Forwarded_For: 10.9.9.9", "Forwarded: for=10.9.9.9", "X-Real-IP: 10.9.9.9",
		"X-Envoy-Original-Path: /evil", "Sallyport-Caller: admin", "SALLYPORT_CALLER: admin", "Tracestate: evil=1",
		"Traceparent: not-a-trace", "X-Kept: yes",
	}
	rest := " HTTP/1.1\r\nHost: billing.mesh.internal\r\n" + strings.Join(forged, "\r\n") + "\r\n\r\n"
	out, in := r.dial(), r.dialIn(r.web)
	out.say("GET http://billing.mesh.internal/ok/1" + rest)
	in.say("GET /ok/1" + rest)
	for _, w := range []*wire{out, in} {
		_, got := w.answer("GET")
		for _, bad := range []string{"admin", "9.9.9", "evil", "not-a-trace", "_"} {
			if has(got, bad) {
				t.Errorf("%q came through:\n%s", bad, got)
			}
		}
		cert := "X-Forwarded-Client-Cert: By=" + billing.String() + ";URI=" + web.String()
		if !has(got, cert, "X-Kept: yes", "Traceparent: 00-", "host=billing.mesh.internal\n") || strings.Count(got, "Client-Cert") != 1 || strings.Count(got, "Traceparent") != 1 {
			t.Errorf("the application got\n%s", got)
		}
	}
}

func TestTraceGoesOnWithItsState(t *testing.T) {
	r := newRig(t, app(t, echoHead))
	w := r.dial()
	const id = "0af7651916cd43dd8448eb211c80319c"
	w.say("GET http://billing.mesh.internal/ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\nTraceparent: 00-" + id + "-b7ad6b7169203331-01\r\nTracestate: vendor=1\r\n\r\n")
	_, got := w.answer("GET")
	if !has(got, "Traceparent: 00-"+id, "Tracestate: vendor=1") || has(got, "b7ad6b7169203331") {
		t.Errorf("got\n%s", got)
	}
	if d := decisions(r.inAudit); d[0].Trace != id {
		t.Errorf("the record has trace %s", d[0].Trace)
	}
}

// An application cannot pretend that the mesh has decided something.
func TestAnswersCannotForgeDecisions(t *testing.T) {
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Sallyport-Decision"] = []string{"forged"}
		w.Header()["SALLYPORT_DECISION"] = []string{"forged"}
		w.Header().Set("X-Kept", "yes")
		w.WriteHeader(403)
		_, _ = w.Write([]byte(`{"error":"denied by policy","decision":"forged"}`))
	}))
	w := r.dial()
	w.say(proxied)
	resp, _ := w.answer("GET")
	for name, v := range resp.Header {
		if has(strings.Join(v, " "), "forged") {
			t.Errorf("%s: %q came through", name, v)
		}
	}
	if resp.Header.Get("X-Kept") != "yes" {
		t.Error("another field was lost")
	}
}

func TestHostIsThatOfTheService(t *testing.T) {
	name := atomic.Value{}
	name.Store("billing")
	r := newRig(t, app(t, echoHead), func(r *rig) {
		r.inCfg.Name = func() mesh.ServiceName { return mesh.ServiceName(name.Load().(string)) }
	})
	w := r.dialIn(r.web)
	for _, c := range []struct {
		host   string
		status int
		want   string
	}{
		{"billing.mesh.internal", 200, "host=billing.mesh.internal\n"},
		{"billing.mesh.internal:8443", 200, "host=billing.mesh.internal\n"},
		{"admin.localhost", 200, "host=billing.mesh.internal\n"},
		{"127.0.0.1:15006", 200, "host=billing.mesh.internal\n"},
		{"inventory.mesh.internal", 421, "another service"},
		{"a.billing.mesh.internal", 421, "another service"},
	} {
		w.say("GET /ok/1 HTTP/1.1\r\nHost: " + c.host + "\r\n\r\n")
		if resp, body := w.answer("GET"); resp.StatusCode != c.status || !has(body, c.want) {
			t.Errorf("%s: got %d %s", c.host, resp.StatusCode, body)
		}
	}
	name.Store("invoices")
	w.say(okRequest)
	if resp, _ := w.answer("GET"); resp.StatusCode != 421 {
		t.Errorf("after the service was renamed: %d", resp.StatusCode)
	}
}

func TestInboundServesPathsOnly(t *testing.T) {
	var reached atomic.Int32
	r := newRig(t, app(t, func(http.ResponseWriter, *http.Request) { reached.Add(1) }))
	for _, c := range []struct {
		name, request string
		status        int
	}{
		{"CONNECT", "CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n", 405},
		{"TRACE", "TRACE /ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n", 405},
		{"asterisk", "OPTIONS * HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n", 405},
		{"two lengths", "POST /ok/1 HTTP/1.1\r\nHost: b\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		{"encoded slash", "GET /ok/..%2fsecret HTTP/1.1\r\nHost: b\r\n\r\n", 400},
		{"dot segments", "GET /ok/../secret HTTP/1.1\r\nHost: b\r\n\r\n", 400},
		{"opaque target", "GET http:admin/x HTTP/1.1\r\nHost: b\r\n\r\n", 400},
		{"quote in path", "GET /ok/\"x HTTP/1.1\r\nHost: b\r\n\r\n", 400},
		{"no host", "GET /ok/1 HTTP/1.1\r\n\r\n", 400},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := r.dialIn(r.web)
			w.say(c.request)
			resp, body := w.answer("GET")
			if resp.StatusCode != c.status || !json.Valid([]byte(body)) {
				t.Errorf("got %d %s", resp.StatusCode, body)
			}
			if c.status == 405 && resp.Header.Get("Allow") == "" {
				t.Error("a 405 without Allow")
			}
		})
	}
	if n := reached.Load(); n != 0 {
		t.Errorf("the application got %d calls", n)
	}
}

// A second request inside a body must not be one to the application.
func TestSmuggledRequestIsABody(t *testing.T) {
	paths := make(chan string, 4)
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		var b bytes.Buffer
		_, _ = b.ReadFrom(r.Body)
		paths <- r.URL.Path + " " + b.String()
	}))
	inner := "GET /secret HTTP/1.1\r\nHost: b\r\n\r\n"
	w := r.dialIn(r.web)
	w.say(fmt.Sprintf("GET /ok/1 HTTP/1.1\r\nHost: b\r\nContent-Length: %d\r\n\r\n%s"+okRequest, len(inner), inner))
	for range 2 {
		if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
			t.Errorf("got %s", resp.Status)
		}
	}
	if a, b := <-paths, <-paths; a != "/ok/1 "+inner || b != "/ok/1 " {
		t.Errorf("the application saw %q and %q", a, b)
	}
}

// An application that does not read the body of a GET takes it for the next
// request, so there is none on its connection.
func TestBodyOfAGETEndsTheConnection(t *testing.T) {
	accepted := make(chan struct{}, 8)
	r := newRig(t, rawApp(t, func(c net.Conn, br *bufioReader) {
		accepted <- struct{}{}
		for skipHead(br) == nil { // and the body is taken for what comes next
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	}))
	w := r.dialIn(r.web)
	for _, method := range []string{"GET", "POST", "DELETE", "GET"} {
		w.say(method + " /ok/1 HTTP/1.1\r\nHost: b\r\nContent-Length: 1\r\n\r\nx")
		if resp, body := w.answer(method); resp.StatusCode != 200 || body != "ok" {
			t.Errorf("%s got %s %q", method, resp.Status, body)
		}
	}
	if n := len(accepted); n != 3 { // POST and DELETE shared one
		t.Errorf("the application got %d connections, want 3", n)
	}
}

// Bytes that an application sends after its answer belong to no call. The next
// call is made when they have arrived; later ones could not be told apart.
func TestAnswersAreNotQueued(t *testing.T) {
	sent := make(chan struct{}, 1)
	r := newRig(t, rawApp(t, func(c net.Conn, br *bufioReader) {
		for {
			if skipHead(br) != nil {
				return
			}
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
			sent <- struct{}{}
		}
	}))
	w := r.dialIn(r.web)
	for range 5 {
		w.say(okRequest)
		if _, body := w.answer("GET"); body != "ok" {
			t.Fatalf("got %q", body)
		}
		<-sent
	}
}

func TestPanicEndsOneConnection(t *testing.T) {
	r := newParts(t, app(t, hello))
	var armed atomic.Bool
	last := &r.inbound.chain[len(r.inbound.chain)-1]
	enter := last.enter
	last.enter = func(x *call) *refusal {
		if armed.Swap(false) {
			panic("a mistake of ours")
		}
		return enter(x)
	}
	r.inAddr, _ = start(t, r.inbound.Run)
	r.use(r.access)
	other := r.dialIn(r.web)
	other.say(okRequest)
	other.answer("GET")
	armed.Store(true)
	w := r.dialIn(r.web)
	w.say(okRequest)
	if got := w.ended(); got != "" {
		t.Errorf("a call that panicked got %q", got)
	}
	other.say(okRequest)
	if resp, _ := other.answer("GET"); resp.StatusCode != 200 {
		t.Errorf("another connection got %s", resp.Status)
	}
	await(t, func() bool { return r.inbound.inFlight.Load() == 0 })
	if r.inbound.panics.Load() != 1 || !has(r.log.String(), "a mistake of ours") {
		t.Error("nothing was said or counted")
	}
}

func TestPanicOutsideOfACall(t *testing.T) {
	r := newRig(t, app(t, hello), func(r *rig) {
		judge := r.inCfg.PeerID
		var n atomic.Int32
		r.inCfg.PeerID = func(cs tls.ConnectionState) (id spiffeID, err error) {
			if n.Add(1) == 1 {
				panic("a mistake of ours")
			}
			return judge(cs)
		}
	})
	if got := r.dialIn(r.web).ended(); got != "" {
		t.Errorf("got %q", got)
	}
	w := r.dialIn(r.web)
	w.say(okRequest)
	if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
		t.Errorf("the next connection got %s", resp.Status)
	}
	if r.inbound.unproved.Len() != 0 {
		t.Error("the anteroom is not empty")
	}
}

func TestOverloadIsRefusedBeforeItIsJudged(t *testing.T) {
	enter, leave := make(chan struct{}), make(chan struct{})
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		enter <- struct{}{}
		<-leave
	}), func(r *rig) { r.inCfg.MaxInFlight = 1 })
	a, b := r.dialIn(r.web), r.dialIn(r.web)
	a.say(okRequest)
	<-enter
	b.say(okRequest)
	resp, body := b.answer("GET")
	if resp.StatusCode != 503 || !has(body, "too many calls") || len(decisions(r.inAudit)) != 1 {
		t.Errorf("got %d %s, %d decisions", resp.StatusCode, body, len(decisions(r.inAudit)))
	}
	close(leave)
	a.answer("GET")
	for r.inbound.inFlight.Load() != 0 { // the answer is a moment earlier than the place
		runtime.Gosched()
	}
	go func() { <-enter }()
	b.say(okRequest)
	if resp, _ := b.answer("GET"); resp.StatusCode != 200 {
		t.Errorf("afterwards: %s", resp.Status)
	}
}

func TestTooManyConnectionsAreClosed(t *testing.T) {
	r := newRig(t, app(t, hello), func(r *rig) { r.outCfg.MaxConns = 1 })
	a := r.dial()
	a.say(proxied)
	a.answer("GET")
	for range 3 {
		b := r.dial()
		if got := b.ended(); got != "" {
			t.Errorf("one too many got %q", got)
		}
	}
	if n := r.metric(`sallyport_connections_refused_total{reason="total",reporter="outbound"}`); n != "3" {
		t.Errorf("counted %s", n)
	}
	if strings.Count(r.log.String(), "too many connections") != 1 {
		t.Errorf("log: %s", r.log)
	}
	a.say(proxied)
	if resp, _ := a.answer("GET"); resp.StatusCode != 200 {
		t.Errorf("the first got %s", resp.Status)
	}
}

// Peers that connect and prove nothing cannot keep an honest one out.
func TestHandshakeFloodDoesNotKeepOthersOut(t *testing.T) {
	r := newRig(t, app(t, hello), func(r *rig) { r.inCfg.MaxHandshakes = 4 })
	var idle []net.Conn
	for range 20 {
		c, err := net.Dial("tcp", r.inAddr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		idle = append(idle, c)
	}
	w := r.dialIn(r.web)
	w.say(okRequest)
	if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
		t.Errorf("got %s", resp.Status)
	}
	if _, err := bufio.NewReader(idle[0]).ReadByte(); err == nil {
		t.Error("the one that waits longest is still there")
	}
	if n := r.metric(`sallyport_connections_refused_total{reason="handshakes",reporter="inbound"}`); n != "17" { // 21 came
		t.Errorf("counted %s", n)
	}
	for _, rec := range r.inAudit.Records() {
		if rec.Kind == audit.KindTLS {
			t.Errorf("a connection that only ended was recorded: %+v", rec)
		}
	}
}

func TestJudgeThatFailsDenies(t *testing.T) {
	r := newRig(t, app(t, hello), func(r *rig) {
		j, err := authz.NewJudge(authz.JudgeConfig{Audit: recorder(func(*audit.Record) error { panic("broken") }), Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		r.judge, r.inCfg.Judge = j, j
	})
	w := r.dialIn(r.web)
	w.say(okRequest)
	if resp, body := w.answer("GET"); resp.StatusCode != 503 || has(body, "unrecorded") || resp.Header.Get("Sallyport-Decision") != "" {
		t.Errorf("got %d %s", resp.StatusCode, body)
	}
}

// Who is slow to send holds no connection to the application, and not his own
// for long.
func TestSlowClients(t *testing.T) {
	var accepted atomic.Int32
	slow := http1.Limits{HeadTimeout: 20 * time.Millisecond, BodyTimeout: 20 * time.Millisecond, IdleTimeout: 2 * time.Second}
	r := newRig(t, rawApp(t, func(net.Conn, *bufioReader) { accepted.Add(1) }), func(r *rig) { r.inCfg.Limits, r.outCfg.Limits = slow, slow })
	for name, request := range map[string]string{
		"head":         "GET /ok/1 HTTP/1.1\r\nHost: billing.mesh",
		"body":         "POST /ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\nContent-Length: 5\r\n\r\n123",
		"chunked body": "POST /ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\nTransfer-Encoding: chunked\r\n\r\n",
	} {
		w := r.dialIn(r.web)
		w.say(request)
		if resp, body := w.answer("GET"); resp.StatusCode != 408 || !resp.Close || !json.Valid([]byte(body)) {
			t.Errorf("%s: got %d %s", name, resp.StatusCode, body)
		}
		if rest := w.ended(); rest != "" {
			t.Errorf("%s: then came %q", name, rest)
		}
	}
	if rest := r.dial().ended(); rest != "" {
		t.Errorf("a client that says nothing got %q", rest)
	}
	if n := accepted.Load(); n != 0 {
		t.Errorf("the application got %d connections", n)
	}
}
