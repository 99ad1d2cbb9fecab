package test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/mccutchen/go-httpbin/v2/httpbin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"sallyport/internal/meshtest"
)

// chargesPath is where billing may be called.
const chargesPath = "/v1/charges"

// A backend is an application that nobody here wrote (go-httpbin) behind a
// network that can be made bad (toxiproxy).
type backend struct {
	t     *testing.T
	proxy *toxiproxy.Proxy
	seen  atomic.Int64
	// answer, when set, answers in the application's place.
	answer atomic.Pointer[http.HandlerFunc]
}

func newBackend(t *testing.T, at string) *backend {
	b := &backend{t: t}
	bin := httpbin.New()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b.seen.Add(1)
		if h := b.answer.Load(); h != nil {
			(*h)(w, r)
			return
		}
		http.StripPrefix(chargesPath, bin).ServeHTTP(w, r)
	}))
	t.Cleanup(s.CloseClientConnections)
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(prometheus.NewRegistry()), zerolog.Nop())
	b.proxy = toxiproxy.NewProxy(server, "billing", at, s.Listener.Addr().String())
	b.listen()
	t.Cleanup(b.proxy.Stop)
	return b
}

func (b *backend) listen() {
	b.t.Helper()
	if err := b.proxy.Start(); err != nil {
		b.t.Fatal(err)
	}
}

// toxic makes the network bad until the end of f.
func (b *backend) toxic(text string, f func()) {
	b.t.Helper()
	x, err := b.proxy.Toxics.AddToxicJson(strings.NewReader(text))
	if err != nil {
		b.t.Fatal(err)
	}
	defer func() {
		if err := b.proxy.Toxics.RemoveToxic(b.t.Context(), x.Name); err != nil {
			b.t.Error(err)
		}
	}()
	f()
}

// with has all calls answered by h until the end of f.
func (b *backend) with(h http.HandlerFunc, f func()) {
	b.answer.Store(&h)
	defer b.answer.Store(nil)
	f()
}

// says answers with these bytes, and then holds the connection.
func says(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.WriteString(c, text)
		_ = c.SetReadDeadline(time.Now().Add(within))
		_, _ = io.Copy(io.Discard, c)
	}
}

// an outcome is what a caller sees, and what the backend does.
type outcome struct {
	code    int // of curl
	status  string
	refused string // Sallyport-Refused
	seen    int64
}

// tried makes a call and says what became of it.
func (b *backend) tried(h *hand, method, path string, more ...string) outcome {
	b.t.Helper()
	was := b.seen.Load()
	line := append([]string{"curl", "-sS", "-i", "--max-time", "20", "-X", method}, more...)
	if method == "POST" {
		line = append(line, "-d", "{}")
	}
	r := ask[runReply](h, "/run", append(line, "http://billing.mesh.internal"+chargesPath+path))
	o := outcome{code: r.Code, seen: b.seen.Load() - was}
	for l := range strings.Lines(r.Output) {
		name, value, ok := strings.Cut(strings.TrimSpace(l), " ")
		switch {
		case !ok && name == "":
			return o
		case strings.HasPrefix(name, "HTTP/1.1") && o.status == "":
			o.status, _, _ = strings.Cut(value, " ")
		case strings.EqualFold(name, "Sallyport-Refused:"):
			o.refused = value
		}
	}
	return o
}

// routes puts routes of billing in force: the issuer reads the file, and the
// caller acts on it.
func (w *world) routes(text string) {
	w.t.Helper()
	dir := filepath.Join(w.policy, "routes")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	// Renamed into place, so that no half of it is read.
	if err := os.WriteFile(filepath.Join(w.dir, "routes.new"), []byte("service: billing\n"+text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(w.dir, "routes.new"), filepath.Join(dir, "billing.yaml")); err != nil {
		w.t.Fatal(err)
	}
}

const patient = `routes:
  - name: all
    timeouts: {request: 7s, backend_request: 2s, connect: 2s}
`

// TestResilience shows what a caller sees of a backend that is bad in each way
// there is, and that no POST reaches one twice: the table of docs/resilience.md.
func TestResilience(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, time.Minute)
	w.routes(patient)
	w.startIssuer()
	bill, pay := &node{name: "billing"}, &node{name: "payment"}
	w.join(bill)
	w.join(pay)
	back := newBackend(t, bill.app)
	w.startWorkload(bill.name) // the application is elsewhere
	payment := w.startNode(pay)
	w.awaitReach(payment, "http://billing.mesh.internal"+chargesPath+"/status/200")
	w.worstCases(t, back, payment)
	w.underLoad(t, back, payment)
	w.opensAndCloses(t, back, payment)
	w.faultsAreMade(t, back, payment)
	w.callsAreLimited(t, back, payment)
}

func (w *world) worstCases(t *testing.T, back *backend, payment *hand) {
	const (
		get, post, keyed = "GET", "POST", "KEYED" // with an Idempotency-Key
	)
	try := func(method, path string) outcome {
		if method == keyed {
			return back.tried(payment, post, path, "-H", "Idempotency-Key: 7")
		}
		return back.tried(payment, method, path)
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	handled := func(h http.HandlerFunc) func(func()) { return func(f func()) { back.with(h, f) } }
	toxic := func(text string) func(func()) { return func(f func()) { back.toxic(text, f) } }
	for _, tt := range []struct {
		name string
		bad  func(f func())
		path string
		want map[string]outcome
	}{
		{"well", func(f func()) { f() }, "/anything", map[string]outcome{get: {0, "200", "", 1}, post: {0, "200", "", 1}}},
		{"fails with 503", handled(status(503)), "/", map[string]outcome{get: {0, "503", "", 2}, post: {0, "503", "", 1}, keyed: {0, "503", "", 2}}},
		{"fails with 500", handled(status(500)), "/", map[string]outcome{get: {0, "500", "", 1}, post: {0, "500", "", 1}}},
		{"takes too long", func(f func()) { f() }, "/delay/8", map[string]outcome{get: {0, "504", "timeout", 2}, post: {0, "504", "timeout", 1}}},
		{"is far away", toxic(`{"type":"latency","attributes":{"latency":8000}}`), "/anything", map[string]outcome{get: {0, "504", "timeout", 2}, post: {0, "504", "timeout", 1}}},
		{"hangs after the head", handled(says("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")), "/", map[string]outcome{get: {56, "200", "", 1}, post: {56, "200", "", 1}}},
		{"resets", handled(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }), "/", map[string]outcome{get: {0, "502", "upstream", 2}, post: {0, "502", "upstream", 1}}},
		{"sends garbage", handled(says("\x16\x03\x01 this is no HTTP\r\n\r\n")), "/", map[string]outcome{get: {0, "502", "malformed", 1}, post: {0, "502", "malformed", 1}}},
		{"is partitioned", toxic(`{"type":"timeout","stream":"upstream","attributes":{"timeout":0}}`), "/anything", map[string]outcome{get: {0, "504", "timeout", 0}, post: {0, "504", "timeout", 0}}},
		{"refuses", func(f func()) { back.proxy.Stop(); defer back.listen(); f() }, "/anything", map[string]outcome{get: {0, "503", "no_endpoint", 0}, post: {0, "503", "no_endpoint", 0}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.bad(func() {
				for method, want := range tt.want {
					got := try(method, tt.path)
					if method == get && want.seen == 2 && got.seen == 3 {
						// The proxy before the application, too, replaces a
						// connection that was kept and has just ended.
						got.seen = 2
					}
					if got != want {
						t.Errorf("%s: %+v, want %+v", method, got, want)
					}
				}
			})
			w.awaitReach(payment, "http://billing.mesh.internal"+chargesPath+"/status/200")
		})
	}
}

// underLoad holds the retries of many calls to the budget.
func (w *world) underLoad(t *testing.T, back *backend, payment *hand) {
	t.Run("retries stay within the budget", func(t *testing.T) {
		const calls = 400
		back.with(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }, func() {
			was, begun := back.seen.Load(), time.Now()
			r := ask[runReply](payment, "/run", []string{"curl", "-sS", "-o", "/dev/null", "--max-time", "60", fmt.Sprintf("http://billing.mesh.internal%s/[1-%d]", chargesPath, calls)})
			if r.Code != 0 {
				t.Fatalf("curl: %d %s", r.Code, r.Output)
			}
			retries := back.seen.Load() - was - calls
			// A fifth of the calls, ten a second, and the ten seconds of the floor
			// that had gathered before.
			if most := int64(calls/5 + 100 + 10*int(time.Since(begun).Seconds()+1)); retries < 50 || retries > most {
				t.Errorf("%d retries of %d calls in %s, want at most %d", retries, calls, time.Since(begun), most)
			}
		})
	})
}

func (w *world) opensAndCloses(t *testing.T, back *backend, payment *hand) {
	t.Run("the breaker opens and closes", func(t *testing.T) {
		w.routes(patient + "    retry: {attempts: 0}\nbreaker: {consecutive: 3, open: 1s, max_open: 1s}\n")
		back.with(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }, func() {
			w.await("open the breaker", func() bool { return back.tried(payment, "GET", "/").refused == "circuit_open" })
			was, begun := back.seen.Load(), time.Now()
			for range 5 {
				back.tried(payment, "POST", "/")
			}
			if n := back.seen.Load() - was; n > 2+int64(time.Since(begun).Seconds()) { // one a second is a probe
				t.Errorf("an open breaker let %d calls pass", n)
			}
			if r := w.onAdmin("payment", "/troubles"); !strings.Contains(r, `"kind":"open"`) || !strings.Contains(r, "consecutive failures") {
				t.Errorf("the sidecar says of its troubles: %s", r)
			}
			w.await("tell the operator who calls billing no more", func() bool {
				return strings.HasPrefix(w.sallyport("ejections").Output, "billing: 1 of 2 sidecars have cut it off since ")
			})
		})
		w.await("close the breaker", func() bool { return back.tried(payment, "GET", "/status/200").status == "200" })
		if r := w.onAdmin("payment", "/troubles"); r != "[]\n" {
			t.Errorf("the sidecar says of its troubles: %s", r)
		}
	})
}

func (w *world) faultsAreMade(t *testing.T, back *backend, payment *hand) {
	t.Run("a fault is made, recorded and stopped", func(t *testing.T) {
		now := time.Now().UTC()
		w.routes(patient + fmt.Sprintf("    retry: {attempts: 0}\n    faults:\n      - {name: trial, share: 100%%, status: 418, since: %s, until: %s, callers: [%q]}\n",
			now.Add(-time.Minute).Format(time.RFC3339), now.Add(time.Hour).Format(time.RFC3339), id("/ns/shop/sa/payment")))
		w.await("make the fault", func() bool { return back.tried(payment, "GET", "/anything") == outcome{0, "418", "", 0} })
		w.awaitAudit("payment", "the beginning of the fault", func(l auditLine) bool { return l.Reason == "fault_begun" && l.Rule == "billing/all/trial" })
		if r := w.sallyport("fault", "list"); r.Code != 0 || !strings.Contains(r.Output, "billing/all/trial  active  status 418") {
			t.Errorf("list the faults: %d %s", r.Code, r.Output)
		}
		if r := w.sallyport("fault", "stop", "billing/all/trial", "--wait", "1m"); r.Code != 0 || !strings.Contains(r.Output, "2 of 2 connected sidecars act on it") {
			t.Errorf("stop the fault: %d %s", r.Code, r.Output)
		}
		if got, want := back.tried(payment, "GET", "/anything"), (outcome{0, "200", "", 1}); got != want {
			t.Errorf("after the stop: %+v, want %+v", got, want)
		}
		w.awaitAudit("payment", "the end of the fault", func(l auditLine) bool { return l.Reason == "fault_ended" })
		w.awaitAudit("issuer", "the stop", func(l auditLine) bool { return l.Reason == "fault_stopped" && l.Rule == "billing/all/trial" })
		if r := w.sallyport("fault", "list"); !strings.Contains(r.Output, "billing/all/trial  stopped by the user of the admin socket") {
			t.Errorf("list the faults: %d %s", r.Code, r.Output)
		}
		// The switch of one sidecar needs no issuer.
		line := append([]string{"curl", "-sS", "-X", "POST", "--unix-socket", w.path("payment", "run", "admin.sock")}, "http://admin/faults/stop")
		if r := command(t, line[0], line[1:]...); r.Code != 0 || !strings.HasPrefix(r.Output, "0 faults stopped") {
			t.Errorf("stop the faults of one: %d %s", r.Code, r.Output)
		}
	})
}

// callsAreLimited has a limit that is shared.
func (w *world) callsAreLimited(t *testing.T, back *backend, payment *hand) {
	t.Run("calls beyond a shared limit are refused", func(t *testing.T) {
		w.routes(patient + "    limit: {rate: 1, shared: true}\n")
		w.await("refuse a call", func() bool { return back.tried(payment, "GET", "/status/200").status == "429" })
		w.awaitAudit("payment", "the refusal", func(l auditLine) bool { return l.Reason == "limit" })
		w.routes(patient)
		w.await("refuse none", func() bool {
			for range 10 {
				if back.tried(payment, "GET", "/status/200").status != "200" {
					return false
				}
			}
			return true
		})
	})
}

// onAdmin asks the admin socket of a process.
func (w *world) onAdmin(name, path string) string {
	w.t.Helper()
	return command(w.t, "curl", "-sS", "--unix-socket", w.path(name, "run", "admin.sock"), "http://admin"+path).Output
}
