package test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/store/postgrestest"
)

// An edition is a version of an application, which may fail or be slow.
type edition struct {
	calls atomic.Int64
	// late counts the calls that began after something.
	late  atomic.Int64
	fails atomic.Bool
	slow  atomic.Int64 // nanoseconds
}

func (e *edition) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.calls.Add(1)
	if strings.HasSuffix(r.URL.Path, "/late") {
		e.late.Add(1)
	}
	if d := time.Duration(e.slow.Load()); d > 0 {
		select {
		case <-time.After(d): // the work that it has
		case <-r.Context().Done():
		}
	}
	if e.fails.Load() && !strings.HasSuffix(r.URL.Path, "/late") {
		w.WriteHeader(http.StatusInternalServerError)
	}
}

// rolling is a world in which payment calls billing, of which v2 is the canary.
type rolling struct {
	*world
	payment *hand
	v1, v2  edition
}

const (
	bill     = "http://billing.mesh.internal/v1/bills/1"
	lateBill = "http://billing.mesh.internal/v1/bills/late"
)

// plans is the file of routes, with a rollout of these steps. A few calls are
// enough for it, also on a machine that is busy.
func plans(steps, judge string) string {
	if !strings.Contains(judge, "latency") {
		judge += ", latency: {ratio: 0}" // what a busy machine makes of it is not the canary's doing
	}
	return fmt.Sprintf(`subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
routes:
  - name: bills
    backends:
      - {subset: v1, weight: 1}
      - {subset: v2, weight: 0}
    rollout:
      canary: {subset: v2}
      steps: %s
      judge: {window: 5s, min_requests: 40, errors: 15%%, confidence: 95%%%s}
`, steps, judge)
}

func (w *rolling) start(t *testing.T) {
	services := fmt.Sprintf("services:\n  - {name: billing, identity: %s, port: 8443}\n", id("/ns/shop/sa/billing"))
	entries := "entries:\n"
	for node, who := range map[string]string{"payment": "payment", "billing": "billing", "next": "billing"} {
		entries += fmt.Sprintf("  - {spiffe_id: %s, parent_id: %s, selectors: [\"child:true\"]}\n", id("/ns/shop/sa/"+who), id("/spire/agent/join_token/"+node))
	}
	if err := os.RemoveAll(filepath.Join(w.policy, "tests")); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"services.yaml": services, "entries.yaml": entries, "guardrails.csv": "", "egress.yaml": "destinations: []\n",
		"access.csv": fmt.Sprintf("p, pay, in, %s, %s, 8443, *, /v1/**, -, allow\n", id("/ns/shop/sa/payment"), id("/ns/shop/sa/billing")),
	} {
		w.put(filepath.Join(w.policy, name), text)
	}
}

// run starts the sidecars.
func (w *rolling) run(change func(conf string) string) {
	w.t.Helper()
	for name, e := range map[string]*edition{"v1": &w.v1, "v2": &w.v2} {
		node := &node{name: map[string]string{"v1": "billing", "v2": "next"}[name]}
		s := httptest.NewServer(e)
		w.t.Cleanup(s.Close)
		w.join(node)
		node.app = s.Listener.Addr().String()
		w.write(node.name, change(w.sidecarConfig(node, w.token(node.name)))+"workload: {labels: \"version="+name+"\"}\n")
		w.startWorkload(node.name)
	}
	pay := &node{name: "payment"}
	w.join(pay)
	w.write("payment", change(w.sidecarConfig(pay, w.token("payment"))))
	w.payment = w.startNode(pay)
	w.awaitReach(w.payment, bill)
}

// plan puts a plan in force.
func (w *rolling) plan(steps, judge string) {
	w.t.Helper()
	before := w.status().Revision
	w.routes(plans(steps, judge))
	w.await("have the plan in force", func() bool {
		s := w.status()
		n := 0
		for _, p := range s.Proxies {
			if p.Connected && p.State == mesh.Synced {
				n++
			}
		}
		return s.Revision > before && n == len(s.Proxies)
	})
}

// under has payment call all the while, and says how many calls there were and
// how many were answered well.
func (w *rolling) under(f func()) (made, ok int) {
	w.t.Helper()
	t, stop, ended := w.t, make(chan struct{}), make(chan struct{}) // f may put another world in the place of w's
	halt := sync.OnceFunc(func() { close(stop); <-ended })
	defer halt() // also when f fails the test
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			default:
			}
			r, err := try[loadReply](w.payment, "/load", loadRequest{URL: bill, For: 300 * time.Millisecond, Every: 4 * time.Millisecond})
			if err != nil {
				t.Errorf("load: %v", err)
				return
			}
			made, ok = made+r.Made, ok+r.OK
		}
	}()
	f()
	halt()
	t.Logf("%d calls, %d answered well; v1 %d, v2 %d", made, ok, w.v1.calls.Load(), w.v2.calls.Load())
	return made, ok
}

// delivery is how the rollout stands.
func (w *rolling) delivery() (d mesh.Delivery) {
	w.t.Helper()
	r := w.sallyport("rollout", "status", "billing/bills", "--json")
	if err := json.NewDecoder(strings.NewReader(r.Output)).Decode(&d); err != nil {
		w.t.Fatalf("%v in %s", err, r.Output)
	}
	return d
}

// ends runs a command of the CLI that must end with a code and say something.
func (w *rolling) ends(code int, says string, args ...string) {
	w.t.Helper()
	if r := w.sallyport(append([]string{"rollout"}, args...)...); r.Code != code || !strings.Contains(r.Output, says) {
		w.t.Errorf("rollout %s: exit %d, want %d and %q\n%s", strings.Join(args, " "), r.Code, code, says, r.Output)
	} else {
		w.t.Logf("rollout %s: exit %d\n%s", strings.Join(args, " "), r.Code, r.Output)
	}
}

// nobodyLate says that no call which begins now goes to the canary.
func (w *rolling) nobodyLate() {
	w.t.Helper()
	w.v2.late.Store(0)
	r := ask[loadReply](w.payment, "/load", loadRequest{URL: lateBill, For: time.Second, Every: 2 * time.Millisecond})
	if n := w.v2.late.Load(); n > 0 || r.OK < r.Made || r.OK < 1 {
		w.t.Errorf("after the way back was acknowledged %d of %d calls went to the canary, %d were answered", n, r.Made, r.OK)
	}
}

// audited waits for the record of a step.
func (w *rolling) audited(step, decision, detail string) {
	w.t.Helper()
	w.awaitAudit("issuer", step, func(l auditLine) bool {
		return l.Kind == "policy" && l.Verb == "route rollout "+step && l.Rule == "billing/bills" && l.Decision == decision && strings.Contains(l.Detail, detail)
	})
}

const threeSteps = "[{share: 20%, for: 1s}, {share: 50%, for: 1s}, {share: 100%, for: 1s}]"

// TestRollout has a canary come through and go back, by what real sidecars count
// of real calls.
func TestRollout(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := &rolling{world: newWorld(t, time.Hour)}
	w.start(t)
	w.routes(plans(threeSteps, ""))
	w.startIssuer()
	w.run(func(s string) string { return s })

	w.ends(1, "no rollout of billing/bills was started", "status", "billing/bills")
	w.ends(1, "these have: billing/bills", "start", "billing/other")
	w.ends(0, "ROUTE", "status")

	// A good canary comes through, and nobody's call fails.
	if n := w.v2.calls.Load(); n > 0 {
		t.Errorf("%d calls went to the canary before it was started", n)
	}
	made, ok := w.under(func() { w.ends(0, "completed", "start", "billing/bills", "--watch", "--timeout", "2m") })
	if made != ok || made < 100 {
		t.Errorf("%d of %d calls were answered while a good canary came through", ok, made)
	}
	if d := w.delivery(); d.State != mesh.Completed || d.Share != mesh.Whole || d.Acked != 3 || d.Proxies != 3 {
		t.Errorf("%+v", d)
	}
	was := w.v1.calls.Load()
	ask[loadReply](w.payment, "/load", loadRequest{URL: bill, For: 300 * time.Millisecond, Every: 4 * time.Millisecond})
	if w.v1.calls.Load() > was {
		t.Error("what is completed has not all calls")
	}
	w.audited("start", "allow", "by the user of the admin socket; step 1 of 3, canary billing (v2) has 20%")
	w.audited("advance", "allow", "step 3 of 3, canary billing (v2) has 100%; pass: canary ")
	w.audited("complete", "allow", "pass: canary ")

	// It goes back in an instant, and no call that begins then goes there.
	w.ends(0, "canary billing (v2) has 0%, 3 of 3 proxies act on it", "abort", "billing/bills")
	w.nobodyLate()
	w.audited("abort", "deny", "by the user of the admin socket")
	w.ends(1, "aborted by", "status", "billing/bills")

	t.Run("errors take it back", func(t *testing.T) { w.takenBack(t, threeSteps, "", &w.v2.fails, "the canary fails") })
	t.Run("and while it waits at a gate", w.atTheGate)
	t.Run("latency takes it back", w.tooSlow)
	t.Run("blue and green", w.swapped)
	t.Run("too few calls", w.tooFew)
	t.Run("an edit ends it", w.edited)
}

// takenBack has the canary fail from the beginning.
func (w *rolling) takenBack(t *testing.T, steps, judge string, bad *atomic.Bool, why string) {
	w.t = t
	w.plan(steps, judge+", patience: 1m")
	bad.Store(true)
	defer bad.Store(false)
	made, ok := w.under(func() { w.ends(1, why, "start", "billing/bills", "--watch", "--timeout", "2m") })
	if ok == made || ok < made/2 {
		t.Errorf("%d of %d calls were answered well: want all but those to the canary", ok, made)
	}
	if d := w.delivery(); d.State != mesh.RolledBack || d.Share != 0 || d.Verdict.Verdict != mesh.Fail {
		t.Errorf("%+v", d)
	}
	w.await("have the way back acknowledged", func() bool { d := w.delivery(); return d.Acked == d.Proxies })
	w.nobodyLate()
	w.audited("roll_back", "deny", why)
}

func (w *rolling) atTheGate(t *testing.T) {
	w.t = t
	w.plan("[{share: 30%, for: 1s, gate: true}, {share: 100%, for: 1s}]", ", patience: 3m")
	w.under(func() {
		w.ends(0, "stepping, step 1 of 2", "start", "billing/bills")
		w.await("wait at the gate", func() bool { return w.delivery().State == mesh.Gated })
		w.v2.fails.Store(true)
		defer w.v2.fails.Store(false)
		w.ends(1, "rolled back", "watch", "billing/bills", "--timeout", "1m")
	})
	w.nobodyLate()
	// A pause keeps nobody from going back either.
	w.under(func() {
		w.ends(0, "stepping, step 1 of 2", "start", "billing/bills")
		w.ends(0, "paused by the user of the admin socket", "pause", "billing/bills")
		w.v2.fails.Store(true)
		defer w.v2.fails.Store(false)
		w.ends(1, "rolled back", "watch", "billing/bills", "--timeout", "1m")
	})
}

func (w *rolling) tooSlow(t *testing.T) {
	w.t = t
	w.plan(threeSteps, ", latency: {quantile: 80%, ratio: 2}, patience: 3m")
	w.v2.slow.Store(int64(40 * time.Millisecond))
	defer w.v2.slow.Store(0)
	made, ok := w.under(func() {
		w.ends(1, "more than 2 times as long", "start", "billing/bills", "--watch", "--timeout", "2m")
	})
	if made != ok {
		t.Errorf("%d of %d calls were answered", ok, made)
	}
}

func (w *rolling) swapped(t *testing.T) {
	w.t = t
	w.plan("[{share: 100%, for: 1s}]", "")
	made, ok := w.under(func() {
		w.ends(0, "completed", "start", "billing/bills", "--watch", "--timeout", "2m")
		w.ends(0, "canary billing (v2) has 0%", "abort", "billing/bills")
	})
	if made != ok {
		t.Errorf("%d of %d calls were answered while green took over, and back", ok, made)
	}
	w.nobodyLate()
}

func (w *rolling) tooFew(t *testing.T) {
	w.t = t
	w.plan("[{share: 50%, for: 1s}, {share: 100%, for: 1s}]", ", patience: 5s")
	w.ends(4, "is not over after 1s", "start", "billing/bills", "--watch", "--timeout", "1s")
	w.ends(4, "has stalled: the canary has 0 calls and the others 0", "watch", "billing/bills")
	if d := w.delivery(); d.State != mesh.Stalled || d.Share != 50_00 || d.Step != 1 {
		t.Errorf("%+v", d)
	}
	w.audited("stall", "deny", "insufficient")
	w.ends(1, "is not promoted", "promote", "billing/bills")
	w.ends(0, "stepping, step 2 of 2", "promote", "billing/bills", "--force")
}

func (w *rolling) edited(t *testing.T) {
	w.t = t
	w.plan("[{share: 30%, for: 1h}, {share: 100%, for: 1s}]", "")
	w.await("have the edit end the last one", func() bool { return w.delivery().State == mesh.Superseded })
	w.ends(0, "stepping, step 1 of 2", "start", "billing/bills")
	w.plan("[{share: 40%, for: 1h}, {share: 100%, for: 1s}]", "")
	w.ends(1, "superseded", "watch", "billing/bills", "--timeout", "30s")
	w.nobodyLate()
}

// TestRolloutTakeover kills the issuer that conducts a rollout: another one of
// the same database goes on with it where it stood.
func TestRolloutTakeover(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	at := postgrestest.Start(t).Database(t)
	w := &rolling{world: newWorld(t, time.Hour)}
	w.start(t)
	w.routes(plans("[{share: 30%, for: 3s, gate: true}, {share: 60%, for: 1s}, {share: 100%, for: 1s}]", ", patience: 5m"))
	w.shares(at, time.Hour, "")
	first := w.startIssuer()
	second := w.beside("second")
	second.shares(at, time.Hour, ", root_dir: "+w.copyRoot())
	other := second.startIssuer()
	w.run(func(conf string) string {
		return strings.Replace(conf, fmt.Sprintf("[%q]", w.issuer), fmt.Sprintf("[%q, %q]", second.issuer, w.issuer), 1)
	})
	const leads = "this issuer conducts the rollouts of routes"
	made, ok := w.under(func() {
		w.ends(0, "stepping, step 1 of 3", "start", "billing/bills")
		w.await("have one issuer lead", func() bool {
			return strings.Contains(first.out.String(), leads) || strings.Contains(other.out.String(), leads)
		})
		left, dies := w.world, other
		if !strings.Contains(other.out.String(), leads) {
			left, dies = second, first
		} else if strings.Contains(first.out.String(), leads) {
			t.Error("both issuers lead")
		}
		dies.kill()
		w.world = left
		w.await("have the other issuer lead", func() bool {
			return strings.Contains(first.out.String(), leads) && strings.Contains(other.out.String(), leads)
		})
		w.await("go on to the gate", func() bool { return w.delivery().State == mesh.Gated })
		if d := w.delivery(); d.Step != 1 || d.Share != 30_00 {
			t.Errorf("it did not go on where it stood: %+v", d)
		}
		w.ends(0, "stepping, step 2 of 3", "promote", "billing/bills", "--force")
		w.ends(0, "completed", "watch", "billing/bills", "--timeout", "2m")
	})
	if made != ok || made < 50 {
		t.Errorf("%d of %d calls were answered while the issuer was killed", ok, made)
	}
}
