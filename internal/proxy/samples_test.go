package proxy

import (
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/mesh"
)

const canaryRoutes = `subsets: [{name: v2, labels: {version: v2}}]
routes:
  - name: all
    backends: [{weight: 1}, {subset: v2, weight: 0}]
    rollout:
      canary: {subset: v2}
      steps: [{share: 50%%, for: 1m}, {share: 100%%, for: 1m}]
%s`

// shares has a rollout give the canary, which is nowhere, its share.
func (r *rig) shares(share mesh.Share, watch bool) {
	snap := *r.snap.Load()
	snap.Shares = []mesh.CanaryShare{{Service: "billing", Route: "all", Share: share, Watch: watch}}
	r.snap.Store(&snap)
}

// counts are samples in short.
func counts(list []mesh.Sample) string {
	out := [2]mesh.Calls{}
	for _, s := range list {
		if s.Service != "billing" || s.Route != "all" {
			return fmt.Sprintf("of %s/%s", s.Service, s.Route)
		}
		i := 0
		if s.Canary {
			i = 1
		}
		out[i].Add(s.Calls)
	}
	text := ""
	for _, c := range out {
		took := uint32(0)
		for _, n := range c.Took {
			took += n
		}
		text += fmt.Sprintf("%d-%d-%d ", c.N, c.Failed, took)
	}
	return text
}

// counted waits for what is to be counted: a call counts when its client has the
// answer already.
func (r *rig) counted(want string, list ...mesh.Sample) (got string) {
	r.t.Helper()
	end, look := time.After(time.Minute), time.NewTicker(time.Millisecond)
	defer look.Stop()
	for {
		list = append(list, r.outbound.Samples()...)
		if got = counts(list); got == want {
			return got
		}
		select {
		case <-look.C:
		case <-end:
			return got
		}
	}
}

func TestCallsOfARolloutAreCounted(t *testing.T) {
	var answer atomic.Int64
	answer.Store(200)
	r := newRig(t, app(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(int(answer.Load())) }), func(r *rig) {
		r.routes = "service: billing\n" + fmt.Sprintf(canaryRoutes, "")
	})
	expect := func(when, want string) {
		t.Helper()
		if got := r.counted(want); got != want {
			t.Errorf("%s: others and canary %s, want %s", when, got, want)
		}
	}
	calls := func(n, status int) {
		t.Helper()
		for range n {
			if resp, body := r.ask("GET", "/ok/1"); resp.StatusCode != status {
				t.Fatalf("status %d, want %d: %s", resp.StatusCode, status, body)
			}
		}
	}
	calls(3, 200)
	expect("before it is started", "0-0-0 0-0-0 ")
	r.shares(0, true)
	calls(5, 200)
	expect("the canary has no share", "5-0-5 0-0-0 ")
	expect("what was told", "0-0-0 0-0-0 ")
	answer.Store(500)
	calls(2, 500)
	answer.Store(404)
	calls(1, 404)
	answer.Store(503)
	calls(1, 503) // and a further try
	expect("failures, and what is the caller's own", "5-4-1 0-0-0 ")
	answer.Store(200)
	r.shares(mesh.Whole, true)
	calls(4, 503)
	expect("a canary that cannot be reached", "0-0-0 4-4-0 ")
	r.shares(0, true)
	calls(1, 200)
	expect("back in an instant", "1-0-1 0-0-0 ")
	calls(1, 200)
	r.shares(mesh.Whole, false)
	calls(1, 503)
	expect("when nobody asks any more", "0-0-0 0-0-0 ")
}

func TestFaultsOfOursAreNoneOfTheCanary(t *testing.T) {
	f := &flaky{}
	r := newRig(t, app(t, f.ServeHTTP), func(r *rig) {
		since, until := time.Now().Add(-time.Minute).UTC().Format(time.RFC3339), time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
		r.routes = "service: billing\n" + fmt.Sprintf(canaryRoutes, `    faults: [{name: trial, status: 500, share: 100%, callers: ["spiffe://demo.sallyport/ns/shop/sa/web"], matches: [{headers: [{name: x-fault, present: true}]}], since: `+since+", until: "+until+"}]\n")
	})
	r.shares(0, true)
	for range 3 {
		if resp, _ := r.ask("GET", "/ok/1", "X-Fault: 1"); resp.StatusCode != 500 {
			t.Fatalf("status %d: no fault", resp.StatusCode)
		}
	}
	r.ask("GET", "/ok/1")
	if got := r.counted("1-0-1 0-0-0 "); got != "1-0-1 0-0-0 " {
		t.Errorf("others and canary %s", got)
	}
}

// What is counted while it is being told is in one report, and in one only.
func TestSamplesAreToldOnce(t *testing.T) {
	r := newRig(t, app(t, func(http.ResponseWriter, *http.Request) {}), func(r *rig) {
		r.routes = "service: billing\n" + fmt.Sprintf(canaryRoutes, "")
	})
	r.shares(0, true)
	var mu sync.Mutex // guards list
	var list []mesh.Sample
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 25 {
				r.ask("GET", "/ok/1")
				told := r.outbound.Samples()
				mu.Lock()
				list = append(list, told...)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if got := r.counted("100-0-100 0-0-0 ", list...); got != "100-0-100 0-0-0 " {
		t.Errorf("others and canary %s of 100", got)
	}
}
