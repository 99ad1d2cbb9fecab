package test

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"filippo.io/age"

	"sallyport/internal/meshtest"
)

// A bills is an application that keeps bills, at some price.
type bills struct {
	price int
	calls atomic.Int64
	// hangs has it answer nothing; amid is closed by the hundredth call from now.
	hangs atomic.Bool
	amid  atomic.Pointer[chan struct{}]
	after atomic.Int64
	// busy has it answer one call that it is not there for.
	busy atomic.Bool

	mu   sync.Mutex // guards seen
	seen []string   // method, path and hash of each body, and what marks it
}

func (b *bills) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n := b.calls.Add(1)
	if amid := b.amid.Load(); amid != nil && b.after.Add(1) == 100 {
		close(*amid)
	}
	if b.hangs.Load() {
		<-r.Context().Done()
		return
	}
	if b.busy.CompareAndSwap(true, false) {
		http.Error(w, "busy", http.StatusServiceUnavailable)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	sum := sha256.Sum256(body)
	b.mu.Lock()
	b.seen = append(b.seen, fmt.Sprintf("%s %s %s %d %x shadow=%s", r.Method, r.Host, r.RequestURI, len(body), sum[:4], r.Header.Get("Sallyport-Shadow")))
	b.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"id": n + int64(b.price)*1_000_000, "price": b.price, "sum": fmt.Sprintf("%x", sum[:4]), "card": map[string]string{"number": "4000-hidden"}})
}

func (b *bills) saw(what string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.ContainsFunc(b.seen, func(s string) bool { return strings.Contains(s, what) })
}

// startBills starts a sidecar in front of an application that the test plays.
func (w *world) startBills(n *node, b *bills, more string) *hand {
	w.t.Helper()
	s := httptest.NewServer(b)
	w.t.Cleanup(s.Close)
	w.join(n)
	n.app = s.Listener.Addr().String()
	w.write(n.name, w.sidecarConfig(n, w.token(n.name))+more)
	return w.startWorkload(n.name)
}

// shadowed is a world in which payment calls billing, which has a shadow, next,
// and a second primary.
type shadowed struct {
	*world
	payment, next         *hand
	first, second, copied bills
	auditor               string // the file of a private key
	spans                 *collector
}

func newShadowed(t *testing.T) *shadowed {
	meshtest.Need(t, "curl")
	w := &shadowed{world: newWorld(t, time.Hour), first: bills{price: 10}, second: bills{price: 10}, copied: bills{price: 11}}
	names := []string{"payment", "billing", "second", "next"}
	var services, entries, access strings.Builder
	for _, n := range names {
		who := id("/ns/shop/sa/" + n)
		fmt.Fprintf(&services, "  - {name: %s, identity: %s, port: 8443, protocol: http}\n", n, who)
		fmt.Fprintf(&entries, "  - {spiffe_id: %s, parent_id: %s, selectors: [\"child:true\"]}\n", who, id("/spire/agent/join_token/"+n))
		if n != "payment" {
			fmt.Fprintf(&access, "p, pay-%s, in, %s, %s, 8443, *, /v1/**, -, allow\n", n, id("/ns/shop/sa/payment"), who)
		}
	}
	fmt.Fprintf(&access, "p, next-back, in, %s, %s, 8443, *, /v1/**, -, allow\n", id("/ns/shop/sa/next"), id("/ns/shop/sa/billing"))
	if err := os.RemoveAll(w.path("policies", "tests")); err != nil {
		t.Fatal(err)
	}
	w.rewrite(w.path("policies", "services.yaml"), "services:\n"+services.String())
	w.rewrite(w.path("policies", "entries.yaml"), "entries:\n"+entries.String())
	w.rewrite(w.path("policies", "access.csv"), access.String())
	w.rewrite(w.path("policies", "guardrails.csv"), "")
	w.rewrite(w.path("policies", "egress.yaml"), "destinations: []\n")
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	w.auditor = w.path("auditor.txt")
	w.put(w.auditor, key.String()+"\n")

	w.spans = newCollector(t)
	tracing := w.spans.config("0%")
	w.startIssuer()
	w.startBills(&node{name: "billing"}, &w.first, tracing)
	w.startBills(&node{name: "second"}, &w.second, "")
	w.next = w.startBills(&node{name: "next"}, &w.copied, "shadow: {only: true}\n"+tracing)
	pay := &node{name: "payment"}
	w.join(pay)
	w.write("payment", w.sidecarConfig(pay, w.token("payment"))+tracing+fmt.Sprintf(`shadow: {timeout: 3s, concurrency: 4, queue: 8}
archives:
  bills: {recipients: [%s], rotate_after: 1s, redact: {json: [card.number]}, upload: {folder: %s}}
`, key.Recipient(), w.path("elsewhere")))
	w.payment = w.startNode(pay)
	w.awaitReach(w.payment, "http://billing.mesh.internal/v1/bills/1")
	return w
}

// route puts the shadow in force.
func (w *shadowed) route() {
	w.t.Helper()
	file := w.path("policies", "routes", "billing.yaml")
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		w.t.Fatal(err)
	}
	w.rewrite(file, `service: billing
routes:
  - name: all
    shadows:
      - {name: next, backend: {service: next}, share: 100%, writes: true, compare: true, noise: {service: second}, archive: bills}
`)
}

// get is a call, which must be answered by the first.
func (w *shadowed) get(n int) {
	w.t.Helper()
	p := read(w.t, ask[runReply](w.payment, "/run", curl("-H", "Authorization: Bearer hidden-token", fmt.Sprintf("http://billing.mesh.internal/v1/bills/%d", n))))
	if p.status != "200" || !strings.Contains(p.body, `"price":10`) {
		w.t.Fatalf("%+v", p)
	}
}

// load has payment call for a while, and every call be answered.
func (w *shadowed) load(what string) (p99 time.Duration) {
	w.t.Helper()
	r := ask[loadReply](w.payment, "/load", loadRequest{URL: "http://billing.mesh.internal/v1/bills/2", For: 3 * time.Second, Every: 5 * time.Millisecond})
	if r.OK != r.Made || r.Made < 50 {
		w.t.Errorf("%s: %d of %d calls were answered", what, r.OK, r.Made)
	}
	slices.Sort(r.Took)
	p99 = r.Took[len(r.Took)*99/100]
	w.t.Logf("%s: %d calls, p50 %s, p99 %s", what, r.OK, r.Took[len(r.Took)/2].Round(10*time.Microsecond), p99.Round(10*time.Microsecond))
	return p99
}

// copies are counts of the metric, by outcome.
func (w *shadowed) copies() map[string]string {
	out := map[string]string{}
	for _, m := range copiesLine.FindAllStringSubmatch(w.metrics("payment"), -1) {
		out[m[1]] = m[2]
	}
	return out
}

var copiesLine = regexp.MustCompile(`(?m)^sallyport_shadow_total\{outcome="(\w+)",shadow="next"\} (\S+)$`)

func TestShadow(t *testing.T) {
	t.Parallel()
	w := newShadowed(t)
	without := w.load("without a shadow")
	w.route()
	w.await("have a copy", func() bool { w.get(1); return w.copied.calls.Load() > 0 })

	t.Run("differences are found and noise is learned", func(t *testing.T) {
		var e struct {
			Endpoints []struct {
				Learned int
				Fields  []struct{ Field, Verdict string }
			}
		}
		w.await("learn what differs", func() bool {
			w.get(7)
			r := w.sallyport("shadow", "report", "--proxy", w.path("payment", "run", "admin.sock"), "-o", "json")
			var told []json.RawMessage
			if r.Code != 0 || json.Unmarshal([]byte(r.Output), &told) != nil || len(told) != 1 {
				t.Fatalf("%d %s", r.Code, r.Output)
			}
			return json.Unmarshal(told[0], &e) == nil && len(e.Endpoints) > 0 && e.Endpoints[0].Learned >= 5
		})
		got := map[string]string{}
		for _, f := range e.Endpoints[0].Fields {
			got[f.Field] = f.Verdict
		}
		if len(got) != 2 || got["body.price"] != "differs" || got["body.id"] != "noise" {
			t.Errorf("differences: %v", got)
		}
	})
	t.Run("bodies beyond a mebibyte are copied, with the Host of the primary", func(t *testing.T) {
		file := w.path("large")
		large := bytes.Repeat([]byte("0123456789abcde\n"), 3<<16)
		w.put(file, string(large))
		p := read(t, ask[runReply](w.payment, "/run", curl("-X", "POST", "--data-binary", "@"+file, "http://billing.mesh.internal/v1/bills?x=1")))
		sum := sha256.Sum256(large)
		if !strings.Contains(p.body, fmt.Sprintf(`"sum":"%x"`, sum[:4])) {
			t.Errorf("the primary got something else: %+v", p)
		}
		want := fmt.Sprintf("POST billing.mesh.internal /v1/bills?x=1 %d %x shadow=1", len(large), sum[:4])
		w.await("see the copy of the large body", func() bool { return w.copied.saw(want) })
	})
	t.Run("one trace has each try and the copy, and says which is which", w.traced)
	t.Run("a workload that is all shadow writes nowhere", func(t *testing.T) {
		p := read(t, ask[runReply](w.next, "/run", curl("-d", "x", "http://billing.mesh.internal/v1/bills")))
		decision := isRefusal(t, p)
		w.awaitAudit("next", "the refusal", func(r auditLine) bool { return r.ID == decision && r.Reason == "shadow_write" })
		if p := read(t, ask[runReply](w.next, "/run", curl("http://billing.mesh.internal/v1/bills/3"))); p.status != "200" {
			t.Errorf("it cannot even read: %+v", p)
		}
	})
	t.Run("the archive", w.archive)
	t.Run("one that hangs changes nothing", func(t *testing.T) {
		w.copied.hangs.Store(true)
		with := w.load("a shadow that hangs, 100 %")
		t.Logf("p99 with it %.2f of that without", float64(with)/float64(without))
		w.await("count what was dropped", func() bool { c := w.copies(); return c["queue_full"] != "" && c["timeout"] != "" })
		w.nobodyWaits(t)
		w.copied.hangs.Store(false)
	})
	t.Run("one that answers changes nothing", func(t *testing.T) {
		with := w.load("a shadow that answers, 100 %")
		t.Logf("p99 with it %.2f of that without", float64(with)/float64(without))
	})
	t.Run("one that dies changes nothing", func(t *testing.T) {
		amid := make(chan struct{})
		w.first.amid.Store(&amid)
		done := make(chan struct{})
		go func() {
			defer close(done)
			<-amid
			w.next.kill()
		}()
		w.load("a shadow that dies, 100 %")
		w.await("count what was not reached", func() bool { c := w.copies(); return c["unreachable"] != "" || c["failed"] != "" })
		<-done
		t.Logf("outcomes: %v", w.copies())
	})
}

// traced follows a call that was tried twice and copied.
func (w *shadowed) traced(t *testing.T) {
	const trace = "4bf92f3577b34da6a3ce929d0e0e4737"
	w.first.busy.Store(true)
	p := read(t, ask[runReply](w.payment, "/run", curl("-H", "Traceparent: 00-"+trace+"-00f067aa0ba902b7-01", "http://billing.mesh.internal/v1/bills/9")))
	if p.status != "200" {
		t.Fatalf("%+v", p)
	}
	const call = "shop/sa/payment:call ns/shop/sa/billing"
	marks := map[string]string{ // by path, an attribute that it must have
		call + " > shop/sa/payment:upstream > shop/sa/billing:serve ns/shop/sa/billing":                      "http.response.status_code=503",
		call + " > shop/sa/payment:retry":                                                                    "http.request.resend_count=1",
		call + " > shop/sa/payment:retry > shop/sa/billing:serve ns/shop/sa/billing":                         "http.response.status_code=200",
		call + " > shop/sa/payment:shadow next":                                                              "sallyport.shadow=true",
		call + " > shop/sa/payment:shadow next > shop/sa/next:serve ns/shop/sa/next":                         "sallyport.shadow=true",
		call + " > shop/sa/payment:shadow next > shop/sa/next:serve ns/shop/sa/next > shop/sa/next:upstream": "http.response.status_code=200",
	}
	defer func() {
		t.Logf("spans of one trace:\n%s\nmissing: %q", strings.Join(w.spans.of(trace), "\n"), w.spans.without(trace, marks))
	}()
	w.await("collect the tries and the copy", func() bool { return len(w.spans.without(trace, marks)) == 0 })
}

// nobodyWaits shows, without a clock, that no call is held up by its copy: while the
// shadow answers nothing, more calls than can be copied at once are answered, one
// after the other, and each copy is accounted for.
func (w *shadowed) nobodyWaits(t *testing.T) {
	const calls = 40 // 4 are copied at once, and 8 may wait for that
	was, primary := w.copies(), w.first.calls.Load()
	for n := range calls {
		w.get(n)
	}
	if n := w.first.calls.Load() - primary; n != calls {
		t.Errorf("the primary got %d of %d calls", n, calls)
	}
	count := func(c map[string]string, outcome string) (n int) {
		n, _ = strconv.Atoi(c[outcome]) // none: 0
		return n
	}
	w.await("account for each copy", func() bool {
		now, n := w.copies(), 0
		for outcome := range now {
			n += count(now, outcome) - count(was, outcome)
		}
		return n >= calls
	})
	if now := w.copies(); count(now, "answered") != count(was, "answered") {
		t.Errorf("%s copies were answered by a shadow that hangs, %s before", now["answered"], was["answered"])
	}
}

// archive looks at what was kept as an auditor does.
func (w *shadowed) archive(t *testing.T) {
	dir := w.path("payment", "archives", "bills")
	w.await("close a segment", func() bool {
		w.get(8)
		files, _ := filepath.Glob(filepath.Join(w.path("elsewhere"), "bills", "*.age"))
		return len(files) > 1
	})
	w.await("close the last segment", func() bool {
		_, err := os.Stat(filepath.Join(dir, "open.age"))
		return os.IsNotExist(err)
	})
	key := ""
	for _, r := range w.audit("payment") {
		if _, k, ok := strings.Cut(r.Detail, "head by "); r.Kind == "archive" && ok {
			key = cmp.Or(k, key)
		}
	}
	if key == "" {
		t.Fatal("the audit log does not know of the archive")
	}
	for _, d := range []string{dir, filepath.Join(w.path("elsewhere"), "bills")} {
		w.await("have all of "+d, func() bool { return w.sallyport("archive", "verify", d, "--key", key).Code == 0 })
	}
	r := w.sallyport("archive", "decrypt", dir, "-i", w.auditor)
	if r.Code != 0 || strings.Contains(r.Output, "hidden") {
		t.Fatalf("decrypt ends with %d, or shows what it must not: %.500s", r.Code, r.Output)
	}
	var rec struct {
		Trace, Src, Dst, Name  string
		Request                struct{ Method, Path string }
		Primary, Shadow        struct{ Status int }
		PrimaryMicros, Missing int
		Differs                []string
	}
	line, _, _ := strings.Cut(r.Output, "\n")
	if err := json.Unmarshal([]byte(line), &rec); err != nil || len(rec.Trace) != 32 || rec.Src != id("/ns/shop/sa/payment") || rec.Dst != id("/ns/shop/sa/billing") ||
		rec.Name != "next" || rec.Request.Method != "GET" || rec.Primary.Status != 200 || rec.Shadow.Status != 200 || !slices.Contains(rec.Differs, "body.price") {
		t.Errorf("a record is %s, %v", line, err)
	}
	if r := w.sallyport("archive", "diff", dir, "-i", w.auditor, "--ignore", "body.id"); r.Code != 1 || !strings.Contains(r.Output, "body.price") {
		t.Errorf("diff: %d %s", r.Code, r.Output)
	}
	again := httptest.NewServer(&bills{price: 10})
	defer again.Close()
	if r := w.sallyport("archive", "replay", dir, "-i", w.auditor, "--target", again.URL, "--rate", "500", "--count", "5", "--ignore", "id", "--ignore", "card.number"); r.Code != 0 || !strings.Contains(r.Output, "5 calls sent, 0 failed") {
		t.Errorf("replay: %d %s", r.Code, r.Output)
	}
	copyOf := w.path("tampered")
	if err := os.CopyFS(copyOf, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	segs, _ := filepath.Glob(filepath.Join(copyOf, "0*.age"))
	b, err := os.ReadFile(segs[0])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	w.put(segs[0], string(b))
	if r := w.sallyport("archive", "verify", copyOf, "--key", key); r.Code != 1 {
		t.Errorf("a changed segment passes: %s", r.Output)
	}
}
