package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// TestResilienceSharedLimit has several sidecars share one limit, by their issuer,
// and holds what all let pass to it, and to the error that docs/resilience.md
// states: once the limit, in the second in which it moves.
func TestResilienceSharedLimit(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	const rate = 60 // calls a second of all together
	w := newWorld(t, time.Hour)
	callers := []string{"web-1", "web-2", "web-3"} // one workload, three times
	who, billing := id("/ns/shop/sa/web"), id("/ns/shop/sa/billing")
	entries := fmt.Sprintf("entries:\n  - {spiffe_id: %s, parent_id: %s, selectors: [\"child:true\"]}\n", billing, id("/spire/agent/join_token/billing"))
	for _, name := range callers {
		entries += fmt.Sprintf("  - {spiffe_id: %s, parent_id: %s, selectors: [\"child:true\"]}\n", who, id("/spire/agent/join_token/"+name))
	}
	if err := os.RemoveAll(w.path("policies", "tests")); err != nil {
		t.Fatal(err)
	}
	w.rewrite(w.path("policies", "services.yaml"), fmt.Sprintf("services:\n  - {name: billing, identity: %s, port: 8443, protocol: http}\n", billing))
	w.rewrite(w.path("policies", "entries.yaml"), entries)
	w.rewrite(w.path("policies", "access.csv"), fmt.Sprintf("p, web-bill, in, %s, %s, 8443, *, /v1/**, -, allow\n", who, billing))
	w.rewrite(w.path("policies", "guardrails.csv"), "")
	w.rewrite(w.path("policies", "egress.yaml"), "destinations: []\n")
	file := w.path("policies", "routes", "billing.yaml")
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	w.rewrite(file, fmt.Sprintf("service: billing\nroutes:\n  - name: few\n    matches: [{path: {prefix: /v1/few}}]\n    limit: {rate: %d, burst: %d, shared: true}\n", rate, rate/10))
	w.startIssuer()
	var app bills
	w.startBills(&node{name: "billing"}, &app, "")
	hands := make([]*hand, len(callers))
	for i, name := range callers {
		n := &node{name: name}
		w.join(n)
		hands[i] = w.startNode(n)
		w.awaitReach(hands[i], "http://billing.mesh.internal/v1/bills/1")
	}

	// together has some of them call far more often than all may, and says how many
	// calls of each were answered.
	together := func(hands []*hand, d time.Duration) (ok []int, made int) {
		replies := make([]loadReply, len(hands))
		var wg sync.WaitGroup
		for i, h := range hands {
			wg.Go(func() {
				replies[i] = ask[loadReply](h, "/load", loadRequest{URL: "http://billing.mesh.internal/v1/few/1", For: d, Every: 5 * time.Millisecond})
			})
		}
		wg.Wait()
		for _, r := range replies {
			ok, made = append(ok, r.OK), made+r.Made
		}
		return ok, made
	}
	together(hands, 2*time.Second) // each learns what the others need

	t.Run("all together let the limit pass", func(t *testing.T) {
		was, begun := app.calls.Load(), time.Now()
		ok, made := together(hands, 4*time.Second)
		seen, most := int(app.calls.Load()-was), int(rate*time.Since(begun).Seconds())+rate/10+rate
		t.Logf("%d of %d calls pass in %s, %v of each; at most %d may", seen, made, time.Since(begun).Round(time.Millisecond), ok, most)
		if seen > most {
			t.Errorf("%d calls pass, at most %d may", seen, most)
		}
		for i, n := range ok {
			if n == 0 {
				t.Errorf("none of the calls of %s passes", callers[i])
			}
		}
	})
	t.Run("one alone has what the others do not need", func(t *testing.T) {
		w.await("let more pass than a third of the limit", func() bool {
			begun := time.Now()
			ok, _ := together(hands[:1], time.Second)
			return float64(ok[0]) > 1.5*rate/float64(len(hands))*time.Since(begun).Seconds()
		})
	})
	t.Run("callers are told", func(t *testing.T) {
		r := ask[runReply](hands[0], "/run", curl("-i", "http://billing.mesh.internal/v1/few/1"))
		if text := strings.ToLower(r.Output); !strings.Contains(text, fmt.Sprintf(`ratelimit-policy: "billing/few";q=%d;w=1`, rate)) || !strings.Contains(text, `ratelimit: "billing/few";r=`) {
			t.Errorf("the answer says nothing of the limit: %s", r.Output)
		}
	})
}
