package proxy

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/meshtest"
	"sallyport/internal/upstream"
)

// pair is a rig whose billing stands at two places, of which one answers at once
// and the other when it is let.
type pair struct {
	*rig
	fast, slow atomic.Int64 // calls that came
	cut        chan struct{}
	let        chan struct{}
}

func newPair(t *testing.T, routes string) *pair {
	p := &pair{cut: make(chan struct{}, 100), let: make(chan struct{})}
	p.rig = newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		p.slow.Add(1)
		_, _ = io.Copy(io.Discard, r.Body) // net/http sees no client leave before
		select {
		case <-r.Context().Done():
			p.cut <- struct{}{}
		case <-p.let:
			fmt.Fprint(w, "slow")
		}
	}), func(r *rig) {
		r.routes = "service: billing\nbalance: {policy: round_robin}\noutlier: {consecutive: 1}\nbreaker: {consecutive: 1}\n" + routes
	})
	at := app(t, func(w http.ResponseWriter, r *http.Request) {
		p.fast.Add(1)
		fmt.Fprint(w, "fast")
	})
	cfg := p.inCfg
	cfg.App = upstream.NewLocal(addrOf(at), http1.Limits{})
	t.Cleanup(cfg.App.Close)
	in, err := NewInbound(cfg)
	if err != nil {
		t.Fatal(err)
	}
	addr, _ := start(t, in.Run)
	p.endpointsExtra = append(p.endpointsExtra, meshtest.Endpoint(t, "billing", addr))
	p.use(p.access)
	return p
}

func TestALateCallIsHedged(t *testing.T) {
	p := newPair(t, "routes: [{name: all, hedge: {after: 20ms}}]\n")
	const calls = 8
	for range calls {
		if resp, body := p.ask("GET", "/ok/1"); resp.StatusCode != 200 || body != "fast" {
			t.Errorf("status %d %q", resp.StatusCode, body)
		}
	}
	if p.fast.Load() != calls {
		t.Errorf("%d of %d calls were answered by who is fast", p.fast.Load(), calls)
	}
	for range p.slow.Load() {
		<-p.cut // each is broken off
	}
	if n := p.metric(`sallyport_retries_total{budget="granted",dst="ns/shop/sa/billing",reason="hedge"}`); n == "" || n == "0" {
		t.Errorf("%q calls count as hedged", n)
	}
	if got := p.services.Troubles(); len(got) > 0 {
		t.Errorf("who was slower has it held against him: %v", got)
	}
}

func TestNotEveryCallIsHedged(t *testing.T) {
	p := newPair(t, "retry_budget: {share: 1%, floor: 1}\nroutes: [{name: all, hedge: {after: 20ms}}]\n")
	close(p.let)
	for range 4 { // by a method that may not be repeated
		resp, err := p.client().Post("http://billing.mesh.internal/ok/1", "text/plain", strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
	}
	if n := p.fast.Load() + p.slow.Load(); n != 4 {
		t.Errorf("4 calls came as %d", n)
	}
	before := p.fast.Load() + p.slow.Load()
	for range 4 {
		for p.services.Retry("billing") { // the budget is spent
		}
		if resp, _ := p.ask("GET", "/ok/1"); resp.StatusCode != 200 {
			t.Errorf("status %d", resp.StatusCode)
		}
	}
	if n := p.fast.Load() + p.slow.Load() - before; n != 4 {
		t.Errorf("without a budget 4 calls came as %d", n)
	}
}

// With a deadline, and nobody who answers, the call ends at it.
func TestAHedgedCallEndsAtItsDeadline(t *testing.T) {
	p := newPair(t, "routes: [{name: all, hedge: {after: 20ms}, timeouts: {request: 2s}, retry: {attempts: 0}}]\n")
	p.endpointsExtra = nil
	p.use(p.access) // the other endpoint is the same
	before := time.Now()
	if resp, _ := p.ask("GET", "/ok/1"); resp.StatusCode != 504 || time.Since(before) < 2*time.Second {
		t.Errorf("status %d after %s", resp.StatusCode, time.Since(before))
	}
	<-p.cut
}

func TestAHedgedCallWithABody(t *testing.T) {
	p := newPair(t, "routes: [{name: all, hedge: {after: 20ms}}]\n")
	for i := range 4 {
		req, err := http.NewRequest("PUT", "http://billing.mesh.internal/ok/1", strings.NewReader(strings.Repeat("x", i*15_000)))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := p.client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 200 {
			t.Errorf("status %d", resp.StatusCode)
		}
	}
	if p.fast.Load() != 4 {
		t.Errorf("%d calls reached who is fast", p.fast.Load())
	}
}
