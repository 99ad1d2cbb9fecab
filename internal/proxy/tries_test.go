package proxy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/meshtest"
	"sallyport/internal/upstream"
)

// flaky answers the first calls badly, then well, and counts those that reach it.
type flaky struct {
	bad  int64 // how many
	how  func(w http.ResponseWriter, r *http.Request)
	seen atomic.Int64
	last atomic.Pointer[http.Request]
}

func (f *flaky) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	n := f.seen.Add(1)
	f.last.Store(r.Clone(context.Background()))
	if n <= f.bad {
		f.how(w, r)
		return
	}
	fmt.Fprintf(w, "%d bytes, %v", len(body), err)
}

func status(code int, fields ...string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(fields); i += 2 {
			w.Header().Set(fields[i], fields[i+1])
		}
		w.WriteHeader(code)
	}
}

func reset(w http.ResponseWriter, _ *http.Request) { panic(http.ErrAbortHandler) }

// What is tried again without being told to: each line is a promise of
// docs/resilience.md.
func TestSafeCallsAreTriedAgain(t *testing.T) {
	for _, tt := range []struct {
		name, method string
		fields       string // "Name: value"
		body         int
		bad          int64
		how          func(http.ResponseWriter, *http.Request)
		status       int
		seen         int64
	}{
		{"a GET after 503", "GET", "", 0, 1, status(503), 200, 2},
		{"a GET after 502", "GET", "", 0, 1, status(502), 200, 2},
		{"a GET after 500", "GET", "", 0, 1, status(500), 500, 1},
		{"a GET after two 503", "GET", "", 0, 2, status(503), 503, 2},
		{"a PUT of 60 KB after 503", "PUT", "", 60 << 10, 1, status(503), 200, 2},
		{"a PUT of 70 KB after 503", "PUT", "", 70 << 10, 1, status(503), 503, 1},
		{"a POST after 503", "POST", "", 10, 1, status(503), 503, 1},
		{"a POST with a key after 503", "POST", "Idempotency-Key: k1", 10, 1, status(503), 200, 2},
		{"a PATCH after 504", "PATCH", "", 10, 1, status(504), 504, 1},
		{"a GET that was cut off", "GET", "", 0, 1, reset, 200, 2},
		{"a POST that was cut off", "POST", "", 10, 1, reset, 502, 1},
		{"a GET that shall wait for long", "GET", "", 0, 1, status(503, "Retry-After", "7"), 503, 1},
		{"a DELETE after 429", "DELETE", "", 0, 1, status(429), 429, 1},
		{"what an application says of itself in our fields", "POST", "", 10, 1, status(503, "Sallyport-Refused", "no_endpoint"), 503, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := &flaky{bad: tt.bad, how: tt.how}
			r := newRig(t, app(t, f.ServeHTTP))
			req, err := http.NewRequest(tt.method, "http://billing.mesh.internal/ok/1", strings.NewReader(strings.Repeat("x", tt.body)))
			if err != nil {
				t.Fatal(err)
			}
			if name, value, ok := strings.Cut(tt.fields, ": "); ok {
				req.Header.Set(name, value)
			}
			resp, err := r.client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != tt.status || f.seen.Load() != tt.seen {
				t.Errorf("status %d after %d calls, want %d after %d: %s", resp.StatusCode, f.seen.Load(), tt.status, tt.seen, body)
			}
			if want := fmt.Sprintf("%d bytes, <nil>", tt.body); resp.StatusCode == 200 && string(body) != want {
				t.Errorf("the body came as %s, want %s", body, want)
			}
			want := ""
			if tt.seen == 2 {
				want = "2"
			}
			if got := f.last.Load().Header.Get("Sallyport-Attempt"); got != want {
				t.Errorf("the last call says that it is try %q, want %q", got, want)
			}
		})
	}
}

// An application that takes no connections has acted on nothing: the call goes
// to another endpoint whatever its method.
func TestWhatNobodyActedOnIsTriedElsewhere(t *testing.T) {
	f := &flaky{}
	r := newRig(t, app(t, f.ServeHTTP))
	cfg := r.inCfg
	cfg.App = upstream.NewLocal(netip.MustParseAddrPort("127.0.0.1:1"), http1.Limits{})
	in, err := NewInbound(cfg)
	if err != nil {
		t.Fatal(err)
	}
	addr, _ := start(t, in.Run)
	r.endpointsExtra = append(r.endpointsExtra, meshtest.Endpoint(t, "billing", addr))
	r.use(r.access)
	for i := range 40 {
		resp, err := r.client().Post("http://billing.mesh.internal/ok/1", "text/plain", strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 200 {
			t.Fatalf("call %d: status %d", i, resp.StatusCode)
		}
	}
	if n := f.seen.Load(); n != 40 {
		t.Errorf("the application saw %d calls, want each once", n)
	}
}

func TestRetriesStayWithinTheBudget(t *testing.T) {
	f := &flaky{bad: 1 << 40, how: status(503)}
	r := newRig(t, app(t, f.ServeHTTP))
	c := r.client()
	const calls = 600
	began := time.Now()
	for range calls {
		resp, err := c.Get("http://billing.mesh.internal/ok/1")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
	}
	// The floor of ten seconds, and 20 %, and what the test has taken of the floor.
	retries := f.seen.Load() - calls
	if most := 100 + calls/5 + 10*int64(time.Since(began)/time.Second+1); retries < 100 || retries > most {
		t.Errorf("%d retries of %d calls, want up to %d", retries, calls, most)
	}
	if n := r.metric(`sallyport_retries_total{budget="spent",dst="ns/shop/sa/billing",reason="status"}`); n == "" || n == "0" {
		t.Errorf("the retries that were withheld count as %q", n)
	}
}

// A status of gRPC is retried wherever it stands, as long as no message came
// before it.
func TestStatusesOfGRPCAreRetried(t *testing.T) {
	const head = "HTTP/1.1 200 OK\r\nContent-Type: application/grpc\r\n"
	const chunked = head + "Transfer-Encoding: chunked\r\nTrailer: Grpc-Status\r\n\r\n"
	const good = chunked + "5\r\n\x00\x00\x00\x00\x00\r\n0\r\nGrpc-Status: 0\r\n\r\n"
	for _, tt := range []struct {
		name, first, fields string
		want, seen          int64
	}{
		{"in the head", head + "Grpc-Status: 14\r\nContent-Length: 0\r\n\r\n", "", 0, 2},
		{"in the trailers", chunked + "0\r\nGrpc-Status: 14\r\n\r\n", "", 0, 2},
		{"one that says nothing of the service", chunked + "0\r\nGrpc-Status: 10\r\n\r\n", "", 0, 2},
		{"behind a message", chunked + "5\r\n\x00\x00\x00\x00\x00\r\n0\r\nGrpc-Status: 14\r\n\r\n", "", 14, 1},
		{"one that is not named", chunked + "0\r\nGrpc-Status: 13\r\n\r\n", "", 13, 1},
		{"that is good", chunked + "0\r\nGrpc-Status: 0\r\n\r\n", "", 0, 1},
		{"of a call that may not be repeated", chunked + "0\r\nGrpc-Status: 14\r\n\r\n", "-", 14, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var seen atomic.Int64
			addr := rawApp(t, func(c net.Conn, r *bufio.Reader) {
				for {
					req, err := http.ReadRequest(r)
					if err != nil {
						return
					}
					_, _ = io.Copy(io.Discard, req.Body)
					say := tt.first
					if seen.Add(1) > 1 {
						say = good
					}
					for _, part := range strings.SplitAfter(say, "\r\n\r\n") { // the head by itself
						if _, err := io.WriteString(c, part); err != nil {
							return
						}
					}
				}
			})
			r := newRig(t, addr, func(r *rig) {
				r.routes = "service: billing\nroutes: [{name: all, retry: {grpc: [UNAVAILABLE, ABORTED]}}]\n"
			})
			req, err := http.NewRequest("POST", "http://billing.mesh.internal/ok/G", strings.NewReader("\x00\x00\x00\x00\x00"))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/grpc")
			req.Header.Set("TE", "trailers")
			if tt.fields == "" {
				req.Header.Set("Idempotency-Key", "k")
			}
			resp, err := r.client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			got := resp.Trailer.Get("Grpc-Status") + resp.Header.Get("Grpc-Status")
			if got != fmt.Sprint(tt.want) || seen.Load() != tt.seen {
				t.Errorf("status %q after %d calls, want %d after %d", got, seen.Load(), tt.want, tt.seen)
			}
		})
	}
}

// hang is an application that answers nothing.
func hang(t *testing.T, said string) (string, func() int64) {
	var n atomic.Int64
	addr := rawApp(t, func(c net.Conn, r *bufio.Reader) {
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			n.Add(1)
			_, _ = io.Copy(io.Discard, req.Body)
			if _, err := io.WriteString(c, said); err != nil {
				return
			}
		}
	})
	return addr, n.Load
}

func TestACallEndsAtItsDeadline(t *testing.T) {
	addr, seen := hang(t, "")
	r := newRig(t, addr)
	for _, method := range []string{"GET", "POST"} {
		req, err := http.NewRequest(method, "http://billing.mesh.internal/ok/1", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Sallyport-Timeout-Ms", "2000")
		was, before := seen(), time.Now()
		resp, err := r.client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if took := time.Since(before); resp.StatusCode != 504 || took < 1900*time.Millisecond {
			t.Errorf("%s: status %d after %s, want 504 after 2 s", method, resp.StatusCode, took)
		}
		if n := seen() - was; n != 1 {
			t.Errorf("%s: the application saw %d calls", method, n)
		}
		if got := resp.Header.Get("Sallyport-Refused"); got != "timeout" {
			t.Errorf("%s: refused for %q", method, got)
		}
	}
}

// How long a caller is ready to wait says nothing of the service; what a route
// gives its calls does.
func TestOnlyARoutesDeadlineIsHeldAgainstTheService(t *testing.T) {
	for _, tt := range []struct {
		name, app, routes string
		fields            []string
		open              bool
	}{
		{"of the caller", "", "", []string{"Sallyport-Timeout-Ms: 100"}, false},
		{"of a caller of gRPC", "", "", []string{"Grpc-Timeout: 100m"}, false},
		{"of the caller, which the service keeps by itself", "HTTP/1.1 200 OK\r\nContent-Type: application/grpc\r\nGrpc-Status: 4\r\nContent-Length: 0\r\n\r\n", "", []string{"Grpc-Timeout: 1n"}, false},
		{"of the service, long before that of the caller", "HTTP/1.1 200 OK\r\nContent-Type: application/grpc\r\nGrpc-Status: 4\r\nContent-Length: 0\r\n\r\n", "", []string{"Grpc-Timeout: 1H"}, true},
		{"of the route", "", "routes: [{name: all, timeouts: {request: 100ms}}]\n", nil, true},
		{"of the route, before that of the caller", "", "routes: [{name: all, timeouts: {request: 100ms}}]\n", []string{"Sallyport-Timeout-Ms: 60000"}, true},
		{"of one try", "", "routes: [{name: all, timeouts: {backend_request: 100ms}, retry: {attempts: 0}}]\n", []string{"Sallyport-Timeout-Ms: 60000"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr, _ := hang(t, tt.app)
			r := newRig(t, addr, func(r *rig) {
				r.routes = "service: billing\nbreaker: {consecutive: 2, open: 1h, max_open: 1h}\n" + tt.routes
			})
			for range 2 {
				r.ask("POST", "/ok/1", append(tt.fields, "Content-Type: application/grpc")...)
			}
			if tt.open { // a client has its answer before that is reported
				await(t, func() bool { return len(r.services.Troubles()) > 0 })
				return
			}
			if err := r.stopOut(); err != nil { // with all that is under way
				t.Fatal(err)
			}
			if got := r.services.Troubles(); len(got) > 0 {
				t.Errorf("the service is cut off: %v", got)
			}
		})
	}
}

func TestAnAnswerIsCutAtItsDeadline(t *testing.T) {
	addr, _ := hang(t, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf of")
	r := newRig(t, addr)
	req, err := http.NewRequest("GET", "http://billing.mesh.internal/ok/1", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Sallyport-Timeout-Ms", "2000")
	resp, err := r.client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("the client takes %q for the whole answer", b)
	}
}

func TestTheApplicationLearnsWhatIsLeft(t *testing.T) {
	f := &flaky{}
	r := newRig(t, app(t, f.ServeHTTP))
	for _, tt := range []struct{ name, value, grpc string }{
		{"Sallyport-Timeout-Ms", "30000", ""},
		{"Grpc-Timeout", "30S", "application/grpc"},
	} {
		req, err := http.NewRequest("POST", "http://billing.mesh.internal/ok/1", strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set(tt.name, tt.value)
		req.Header.Set("Content-Type", tt.grpc)
		resp, err := r.client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		h := f.last.Load().Header
		if n, ok := number([]byte(h.Get("Sallyport-Timeout-Ms"))); !ok || n < 20000 || n > 30000 || len(h.Values("Sallyport-Timeout-Ms")) != 1 {
			t.Errorf("%s: the application is told %q", tt.name, h.Values("Sallyport-Timeout-Ms"))
		}
		if got := h.Values("Grpc-Timeout"); tt.grpc != "" && (len(got) != 1 || !strings.HasSuffix(got[0], "m")) {
			t.Errorf("%s: gRPC is told %q", tt.name, got)
		}
	}
}

func TestTimeoutsAreReadStrictly(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"20S": 20 * time.Second, "1H": time.Hour, "5M": 5 * time.Minute, "100m": 100 * time.Millisecond, "7u": 7 * time.Microsecond, "9n": 9,
		"": 0, "S": 0, "20": 0, "20s": 0, "-1S": 0, "123456789m": 0, "25H": 0, "1.5S": 0, " 1S": 0, "99999999H": 0, "0S": 1,
	} {
		if got := grpcTimeout([]byte(text)); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
	for text, want := range map[string]time.Duration{
		"1": time.Millisecond, "86400000": 24 * time.Hour, "86400001": 0, "0": 0, "-5": 0, "1e3": 0, "": 0, "100000000": 0,
	} {
		r := &http1.Request{Fields: []http1.Field{{Name: []byte("Sallyport-Timeout-Ms"), Value: []byte(text)}}}
		if got := asked(r, false); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

func FuzzTimeouts(f *testing.F) {
	f.Add("20S")
	f.Add("99999999H")
	f.Fuzz(func(t *testing.T, s string) {
		if d := grpcTimeout([]byte(s)); d < 0 || d > longest {
			t.Errorf("%q: %s", s, d)
		}
		if d := retryAfter([]byte(s)); d < 0 {
			t.Errorf("%q: %s", s, d)
		}
	})
}

func TestWhatAnAnswerSaysOfTheService(t *testing.T) {
	for _, tt := range []struct {
		status, code int
		refused      string
		want         upstream.Outcome
	}{
		{200, 0, "", upstream.OK}, {404, 0, "", upstream.OK}, {403, 0, "", upstream.OK}, {429, 0, "", upstream.Limited},
		{500, 0, "", upstream.Failed}, {503, 0, "", upstream.Failed}, {503, 0, "overload", upstream.Limited}, {503, 0, "no_endpoint", upstream.Failed},
		{200, 14, "", upstream.Failed}, {200, 8, "", upstream.Limited}, {200, 5, "", upstream.OK}, {200, 13, "", upstream.Failed}, {200, 14, "overload", upstream.Limited},
	} {
		if got := outcomeOf(tt.status, tt.code, tt.refused); got != tt.want {
			t.Errorf("%+v: %d", tt, got)
		}
	}
}

func TestACutterThatIsLateCutsNothing(t *testing.T) {
	var c cutter
	a, b := net.Pipe()
	defer b.Close()
	c.arm(a, time.Now().Add(time.Hour))
	if c.disarm() {
		t.Error("fired")
	}
	c.fire() // as a timer that was stopped too late
	c.arm(a, time.Now().Add(time.Hour))
	c.fire() // for the try before
	if err := a.SetDeadline(time.Time{}); err != nil {
		t.Errorf("cut before it was due: %v", err)
	}
	if c.disarm() {
		t.Error("fired")
	}
	c.arm(a, time.Now().Add(-time.Second))
	c.fire()
	if !c.disarm() {
		t.Error("did not fire")
	}
}
