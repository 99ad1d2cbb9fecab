package proxy

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/http1"
	"sallyport/internal/meshtest"
)

// metric reads one series as a scraper sees it; "" when there is none.
func (r *rig) metric(series string) string {
	w := httptest.NewRecorder()
	r.metrics.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	for line := range strings.Lines(w.Body.String()) {
		if v, ok := strings.CutPrefix(line, series+" "); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// One identity cannot take the connections of the others.
func TestOnePeerHasItsShareOfConnections(t *testing.T) {
	r := newRig(t, app(t, hello), func(r *rig) { r.inCfg.MaxConns, r.inCfg.MaxPerPeer = 8, 2 })
	hold := func(w *wire) {
		t.Helper()
		w.say(okRequest)
		w.answer("GET")
	}
	a, b := r.dialIn(r.web), r.dialIn(r.web)
	hold(a)
	hold(b)
	for range 3 {
		if got := r.dialIn(r.web).ended(); got != "" {
			t.Errorf("one too many got %q", got)
		}
	}
	other := r.dialIn(meshtest.Source(t, r.ca, meshtest.ID("/ns/shop/sa/batch")))
	other.say(okRequest)
	if resp, _ := other.answer("GET"); resp.StatusCode != 403 { // it is let in, and judged
		t.Errorf("another peer got %s", resp.Status)
	}
	if n := r.metric(`sallyport_connections_refused_total{reason="peer",reporter="inbound"}`); n != "3" {
		t.Errorf("counted %s", n)
	}
	if !has(r.log.String(), "too many connections", "of=peer", web.String()) {
		t.Errorf("log: %s", r.log)
	}
	a.Close()
	await(t, func() bool { return r.metric(`sallyport_connections{reporter="inbound",state="open"}`) == "2" })
	hold(r.dialIn(r.web))
	if n := r.metric(`sallyport_connections{reporter="inbound",state="proving"}`); n != "0" {
		t.Errorf("%s are proving", n)
	}
}

// What is refused before it is judged is counted by its reason.
func TestRefusedRequestsAreCounted(t *testing.T) {
	r := newRig(t, app(t, hello), func(r *rig) {
		r.inCfg.Limits = http1.Limits{Head: 2 << 10, Headers: 10, Target: 1 << 10, HeadTimeout: 50 * time.Millisecond, BodyTimeout: 50 * time.Millisecond, RefuseUnderscore: true}
	})
	post := "POST /ok/1 HTTP/1.1\r\nHost: b\r\n"
	for _, c := range []struct {
		reason, request string
		status          int
	}{
		{"head_too_large", "GET /ok/1 HTTP/1.1\r\nHost: b\r\nA: " + strings.Repeat("a", 3<<10) + "\r\n\r\n", 431},
		{"too_many_fields", "GET /ok/1 HTTP/1.1\r\nHost: b\r\n" + strings.Repeat("A: b\r\n", 10) + "\r\n", 431},
		{"target_too_long", "GET /ok/" + strings.Repeat("a", 1<<10) + " HTTP/1.1\r\nHost: b\r\n\r\n", 414},
		{"field_name", "GET /ok/1 HTTP/1.1\r\nHost: b\r\nMy_Field: b\r\n\r\n", 400},
		{"framing", post + "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
		{"chunk", post + "Transfer-Encoding: chunked\r\n\r\nz\r\n", 400},
		{"head_timeout", "GET /ok/1 HTTP/1.1\r\n", 408},
		{"body_timeout", post + "Content-Length: 2\r\n\r\na", 408},
	} {
		w := r.dialIn(r.web)
		w.say(c.request)
		if resp, body := w.answer("GET"); resp.StatusCode != c.status {
			t.Errorf("%s: got %d %s", c.reason, resp.StatusCode, body)
		}
		_, _ = io.Copy(io.Discard, w)
		if n := r.metric(fmt.Sprintf(`sallyport_requests_refused_total{reason=%q,reporter="inbound"}`, c.reason)); n != "1" {
			t.Errorf("%s: counted %q", c.reason, n)
		}
	}
}

// One identity cannot take the places of all calls either, by answers that it
// does not take.
func TestOnePeerHasItsShareOfCalls(t *testing.T) {
	enter, leave := make(chan struct{}, 4), make(chan struct{})
	r := newRig(t, app(t, func(http.ResponseWriter, *http.Request) {
		enter <- struct{}{}
		<-leave
	}), func(r *rig) { r.inCfg.MaxInFlight = 4 })
	var held []*wire
	for range 2 {
		w := r.dialIn(r.web)
		w.say(okRequest)
		<-enter
		held = append(held, w)
	}
	third := r.dialIn(r.web)
	third.say(okRequest)
	if resp, body := third.answer("GET"); resp.StatusCode != 503 || !has(body, "of this caller") {
		t.Errorf("one too many got %s %s", resp.Status, body)
	}
	other := r.dialIn(meshtest.Source(t, r.ca, meshtest.ID("/ns/shop/sa/batch")))
	other.say(okRequest)
	if resp, _ := other.answer("GET"); resp.StatusCode != 403 { // it is let in, and judged
		t.Errorf("another peer got %s", resp.Status)
	}
	close(leave)
	for _, w := range held {
		if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
			t.Errorf("a call in flight got %s", resp.Status)
		}
	}
	await(t, func() bool { return r.inbound.inFlight.Load() == 0 })
	third = r.dialIn(r.web)
	third.say(okRequest)
	if resp, _ := third.answer("GET"); resp.StatusCode != 200 {
		t.Errorf("afterwards: %s", resp.Status)
	}
}

// Who does not read a refusal holds no place of a call: the place is given up
// before the refusal is written.
func TestARefusalHoldsNoPlace(t *testing.T) {
	l := &listener{Shared: Shared{Log: quiet, Audit: audit.NewMemory()}.withDefaults()}
	near, far := net.Pipe() // on which a write waits for its reader
	defer far.Close()
	share := new(member)
	x := &call{ctx: t.Context(), on: l, conn: &conn{Conn: near}, down: http1.NewConn(near, http1.Limits{}), of: share}
	share.calls.Add(1)
	x.req.KeepAlive = true
	written := make(chan struct{})
	way := chain{
		{"in-flight limit", "", l.enterFlight, l.leaveFlight},
		{"judge", "", func(*call) *refusal { return &refusal{status: 403, reason: "policy", decision: "d-1"} }, nil},
	}
	go func() {
		defer close(written)
		way.run(x)
	}()
	await(t, func() bool { return l.inFlight.Load() == 0 && share.calls.Load() == 0 })
	select {
	case <-written:
		t.Error("nobody has read the refusal, and it is written")
	default:
	}
	go func() { _, _ = io.Copy(io.Discard, far) }()
	<-written
	if n := l.inFlight.Load(); n != 0 {
		t.Errorf("%d calls are in flight", n)
	}
}
