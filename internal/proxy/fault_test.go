package proxy

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"sallyport/internal/mesh"
)

// faulty is the text of a route with one fault, in force for an hour.
func faulty(what, more string) string {
	return fmt.Sprintf(`%sroutes:
  - name: all
    retry: {attempts: 0}
    faults:
      - name: trial
        share: 100%%
        since: %s
        until: %s
        callers: ["spiffe://demo.sallyport/ns/shop/sa/web"]
        %s
`, more, time.Now().Add(-time.Minute).UTC().Format(time.RFC3339), time.Now().Add(time.Hour).UTC().Format(time.RFC3339), what)
}

func TestAFaultIsAFakeUpstream(t *testing.T) {
	for _, tt := range []struct {
		name, fault string
		fields      []string
		status      int
		reached     int64
		check       func(t *testing.T, resp *http.Response, body string, took time.Duration)
	}{
		{"a status", "status: 418", nil, 418, 0, func(t *testing.T, resp *http.Response, body string, _ time.Duration) {
			if resp.Header.Get("Sallyport-Fault") != "trial" || !strings.Contains(body, "fault trial") {
				t.Errorf("%v %s", resp.Header, body)
			}
		}},
		{"a status of gRPC", "grpc: RESOURCE_EXHAUSTED", []string{"Content-Type: application/grpc", "TE: trailers"}, 200, 0, func(t *testing.T, resp *http.Response, _ string, _ time.Duration) {
			if resp.Header.Get("Grpc-Status") != "8" {
				t.Errorf("%v", resp.Header)
			}
		}},
		{"a reset", "reset: true", nil, 502, 0, nil},
		{"a delay", "delay: 100ms", nil, 200, 1, func(t *testing.T, _ *http.Response, _ string, took time.Duration) {
			if took < 100*time.Millisecond {
				t.Errorf("after %s", took)
			}
		}},
		{"a delay that the caller does not wait for", "delay: 5m", []string{"Sallyport-Timeout-Ms: 100"}, 504, 0, nil},
		{"little bandwidth", "bandwidth: 100000", nil, 200, 1, func(t *testing.T, _ *http.Response, body string, took time.Duration) {
			if len(body) != 30_000 || took < 200*time.Millisecond {
				t.Errorf("%d bytes after %s", len(body), took)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := &flaky{}
			r := newRig(t, app(t, func(w http.ResponseWriter, q *http.Request) {
				f.ServeHTTP(httptest.NewRecorder(), q)
				_, _ = io.WriteString(w, strings.Repeat("x", 30_000))
			}), func(r *rig) { r.routes = "service: billing\n" + faulty(tt.fault, "") })
			before := time.Now()
			resp, body := r.ask("GET", "/ok/1", tt.fields...)
			if resp.StatusCode != tt.status || f.seen.Load() != tt.reached {
				t.Errorf("status %d, the application saw %d calls; want %d and %d: %s", resp.StatusCode, f.seen.Load(), tt.status, tt.reached, body)
			}
			if tt.check != nil {
				tt.check(t, resp, body, time.Since(before))
			}
			if n := r.metric(`sallyport_requests_total{code="200",dst="ns/shop/sa/billing",flag="",grpc="",proto="http",reporter="outbound",route="billing/all",src="ns/shop/sa/web",tls="mutual"}`); n != "" && n != "0" {
				t.Errorf("%s calls with a fault count as the backend's", n)
			}
		})
	}
}

// What stands above a fault sees it as the real thing.
func TestABreakerOpensForAFault(t *testing.T) {
	f := &flaky{}
	r := newRig(t, app(t, f.ServeHTTP), func(r *rig) {
		r.routes = "service: billing\n" + faulty("status: 503", "breaker: {consecutive: 3, open: 1h, max_open: 1h}\noutlier: {consecutive: 2}\n")
	})
	for i := range 5 {
		want := ""
		if i >= 3 {
			want = "circuit_open"
			await(t, func() bool { return len(r.services.Troubles()) > 0 }) // a call is counted behind its answer
		}
		if resp, _ := r.ask("GET", "/ok/1"); resp.StatusCode != 503 || resp.Header.Get("Sallyport-Refused") != want {
			t.Errorf("call %d: status %d, refused for %q, want %q", i, resp.StatusCode, resp.Header.Get("Sallyport-Refused"), want)
		}
	}
	for _, x := range r.services.Troubles() {
		if x.Kind != "open" || x.Why != "3 consecutive failures" {
			t.Errorf("%+v", x)
		}
	}
	if n := len(r.services.Troubles()); n != 1 {
		t.Errorf("%d troubles, want the breaker alone", n)
	}
}

func TestAFaultIsRecordedAndCanBeStopped(t *testing.T) {
	f := &flaky{}
	r := newRig(t, app(t, f.ServeHTTP), func(r *rig) { r.routes = "service: billing\n" + faulty("status: 418", "") })
	if resp, _ := r.ask("GET", "/ok/1"); resp.StatusCode != 418 {
		t.Fatalf("status %d", resp.StatusCode)
	}
	reasons := func() (list []string) {
		for _, x := range r.outAudit.Records() {
			if x.Rule == "billing/all/trial" {
				list = append(list, x.Reason)
			}
		}
		return list
	}
	if got := fmt.Sprint(reasons()); got != "[fault_begun]" {
		t.Errorf("recorded %s", got)
	}
	if n := r.outbound.StopFaults(); n != 1 {
		t.Errorf("%d faults were stopped", n)
	}
	if resp, _ := r.ask("GET", "/ok/1"); resp.StatusCode != 200 {
		t.Errorf("status %d after the stop", resp.StatusCode)
	}
	if got := fmt.Sprint(reasons()); got != "[fault_begun fault_ended]" {
		t.Errorf("recorded %s", got)
	}
	r.use(r.access) // a new policy begins none
	if resp, _ := r.ask("GET", "/ok/1"); resp.StatusCode != 200 {
		t.Errorf("status %d after a new policy", resp.StatusCode)
	}
}

// What is stopped through the issuer touches nothing, and until the issuer was
// heard nothing begins.
func TestAFaultIsStoppedForAll(t *testing.T) {
	f := &flaky{}
	r := newRig(t, app(t, f.ServeHTTP), func(r *rig) {
		r.routes = "service: billing\n" + faulty("status: 418", "")
		r.outCfg.FaultsWait = true
	})
	status := func(when string, want int) {
		t.Helper()
		if resp, _ := r.ask("GET", "/ok/1"); resp.StatusCode != want {
			t.Errorf("%s: status %d, want %d", when, resp.StatusCode, want)
		}
	}
	status("before the issuer was heard", 200)
	other := []mesh.FaultStop{{Fault: "billing/all/other", Before: time.Now().Add(time.Hour)}, {Fault: "billing/all/trial", Before: time.Now().Add(-time.Hour)}}
	r.outbound.Heed(&mesh.FaultStops{Revision: 1, All: other})
	status("when others are stopped", 418)
	r.outbound.Heed(&mesh.FaultStops{Revision: 2, All: append(other, mesh.FaultStop{Fault: mesh.AllFaults, Before: time.Now()})})
	status("when all are stopped", 200)
	r.use(r.access)
	status("after a new policy", 200)
	reasons := ""
	for _, x := range r.outAudit.Records() {
		if x.Rule == "billing/all/trial" {
			reasons += x.Reason + ":" + x.Detail[:min(len(x.Detail), 11)] + " "
		}
	}
	if !strings.HasPrefix(reasons, "fault_begun:until ") || !strings.HasSuffix(reasons, " fault_ended:stopped thr ") {
		t.Errorf("recorded %s", reasons)
	}
}

func TestRoutesSayHowCallsAreTried(t *testing.T) {
	hung, seen := hang(t, "")
	for _, tt := range []struct {
		name, route string
		status      int
		seen        int64
	}{
		{"the whole call", "timeouts: {request: 2s}", 504, 1},
		{"each try", "timeouts: {backend_request: 1s}", 504, 2},
		{"each try, without retries", "timeouts: {backend_request: 1s}\n    retry: {attempts: 0}", 504, 1},
	} {
		r := newRig(t, hung, func(r *rig) { r.routes = "service: billing\nroutes:\n  - name: all\n    " + tt.route + "\n" })
		was := seen()
		if resp, body := r.ask("GET", "/ok/1"); resp.StatusCode != tt.status || seen()-was != tt.seen {
			t.Errorf("%s: status %d after %d calls, want %d after %d: %s", tt.name, resp.StatusCode, seen()-was, tt.status, tt.seen, body)
		}
	}
	f := &flaky{bad: 3, how: status(500)}
	r := newRig(t, app(t, f.ServeHTTP), func(r *rig) {
		r.routes = "service: billing\nroutes:\n  - name: all\n    retry: {attempts: 3, codes: [500], unsafe: true, backoff: 1ms, max_backoff: 2ms}\n"
	})
	if resp, _ := r.ask("POST", "/ok/1"); resp.StatusCode != 200 || f.seen.Load() != 4 {
		t.Errorf("status %d after %d calls", resp.StatusCode, f.seen.Load())
	}
}

// What a fault holds up goes on when it ends.
func TestAFaultHoldsNothingUpBeyondItsEnd(t *testing.T) {
	for _, what := range []string{"delay: 5m", "bandwidth: 10"} {
		for _, how := range []string{"stopped", "removed", "its time is over"} {
			t.Run(what+" "+how, func(t *testing.T) {
				r := newRig(t, app(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, strings.Repeat("x", 30_000)) }),
					func(r *rig) { r.routes = "service: billing\n" + faulty(what, "") })
				w := r.dial()
				w.say("GET http://billing.mesh.internal/ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")
				var f *fault
				await(t, func() bool {
					f = held(r)
					return f != nil && f.active.Load() == 1
				})
				switch how {
				case "stopped":
					r.outbound.StopFaults()
				case "removed":
					r.routes = ""
					r.use(r.access)
					r.outbound.Prepare(r.snap.Load(), nil)
				default:
					r.outbound.faults.mu.Lock()
					r.outbound.faults.end(f, how)
					r.outbound.faults.mu.Unlock()
				}
				if resp, body := w.answer("GET"); resp.StatusCode != 200 || len(body) != 30_000 {
					t.Errorf("status %d, %d bytes", resp.StatusCode, len(body))
				}
			})
		}
	}
}

// A call that looked before two changes goes by what it saw, and brings nothing
// of it back.
func TestAnOvertakenPolicyStaysOvertaken(t *testing.T) {
	r := newRig(t, app(t, hello), func(r *rig) { r.routes = "service: billing\n" + faulty("status: 503", "") })
	first := r.snap.Load()
	begun := r.outbound.policyOf(first)
	lasting := held(r)
	if lasting == nil || !lasting.live.Load() {
		t.Fatal("the fault has not begun")
	}
	now := func() *policy {
		r.use(r.access)
		return r.outbound.policyOf(r.snap.Load())
	}
	now()
	now()
	late := r.outbound.policyOf(first)
	if late == begun || late.snap != first || late.faults[0][0] != lasting {
		t.Errorf("an overtaken policy has other faults: %+v", late.faults)
	}
	r.routes = ""
	last := now()
	late = r.outbound.policyOf(first)
	if f := late.faults[0][0]; f.live.Load() || lasting.live.Load() || held(r) != nil {
		t.Error("a fault is back that the policy has no more")
	}
	if kept := r.outbound.kept.Load(); kept[0] != last {
		t.Error("an overtaken policy is in force again")
	}
}

func held(r *rig) *fault {
	r.outbound.faults.mu.Lock()
	defer r.outbound.faults.mu.Unlock()
	return r.outbound.faults.known["billing/all/trial"]
}

// deaf takes connections to which nothing can be said.
type deaf struct{ net.Listener }

type deafConn struct{ net.Conn }

func (l deaf) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return deafConn{c}, err
}

func (deafConn) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// Every call that holds a fault leaves it, once.
func TestAFaultIsLeftOnce(t *testing.T) {
	t.Run("by a stream behind a call on its connection", func(t *testing.T) {
		r := newRig(t, greeter(t), func(r *rig) { r.routes = "service: billing\n" + faulty("status: 418", "") })
		w := r.dial()
		w.say("GET http://billing.mesh.internal/ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")
		if resp, _ := w.answer("GET"); resp.StatusCode != 418 {
			t.Fatalf("status %d", resp.StatusCode)
		}
		f := held(r)
		r.served, r.routes = streamYAML, ""
		r.use(streamCSV)
		w.say("CONNECT billing.mesh.internal:5432 HTTP/1.1\r\nHost: billing.mesh.internal:5432\r\n\r\n")
		_, _ = w.r.ReadString('\n')
		_, _ = w.r.ReadString('\n')
		w.greeted()
		w.Close()
		if err := r.stopOut(); err != nil {
			t.Error(err)
		}
		if n := f.active.Load(); n != 0 {
			t.Errorf("%d calls hold it", n)
		}
	})
	t.Run("by a stream whose client is gone", func(t *testing.T) {
		r, _ := streamRig(t, greeter(t), "", func(r *rig) { r.routes = "service: billing\n" + faulty("bandwidth: 1000000", "") })
		addr, stop := start(t, func(ctx context.Context, ln net.Listener) error { return r.outbound.Run(ctx, deaf{ln}) })
		w := newWire(t, addr, nil)
		w.say("CONNECT billing.mesh.internal:5432 HTTP/1.1\r\nHost: billing.mesh.internal:5432\r\n\r\n")
		if b, err := io.ReadAll(w.r); len(b) > 0 {
			t.Errorf("heard %q, %v", b, err)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
		if f := held(r); f == nil || f.active.Load() != 0 {
			t.Errorf("%d calls hold it", f.active.Load())
		}
	})
}
