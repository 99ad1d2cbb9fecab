package proxy

import (
	"testing"
	"time"

	"sallyport/internal/mesh"
)

func TestAPaceFollowsTheCalls(t *testing.T) {
	p := newPace(&mesh.Hedge{Of: 9500, Max: 80 * time.Millisecond})
	add := func(n int, took func(i int) time.Duration) {
		for i := range n {
			p.add(took(i))
		}
	}
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	for _, tt := range []struct {
		name      string
		n         int
		took      func(i int) time.Duration
		low, high time.Duration
	}{
		{"too few are known", 63, func(int) time.Duration { return ms(3) }, ms(80), ms(80)},
		{"1 to 20 ms", 512, func(i int) time.Duration { return ms(1 + i%20) }, ms(19), ms(20)},
		{"one of twenty-five is slow", 512, func(i int) time.Duration {
			if i%25 == 0 {
				return time.Second
			}
			return ms(5)
		}, ms(5), ms(5)},
		{"one of ten is slow", 512, func(i int) time.Duration {
			if i%10 == 0 {
				return ms(60)
			}
			return ms(5)
		}, ms(60), ms(60)},
		{"all are slow", 512, func(int) time.Duration { return time.Second }, ms(80), ms(80)},
		{"all are at once", 512, func(int) time.Duration { return 0 }, ms(1), ms(1)},
	} {
		add(tt.n, tt.took)
		if got := p.late(); got < tt.low || got > tt.high {
			t.Errorf("%s: %s, want %s to %s", tt.name, got, tt.low, tt.high)
		}
	}
}

// A policy that leaves the hedge of a route as it is knows its pace.
func TestAPaceOutlivesAPolicy(t *testing.T) {
	const routes = "routes: [{name: all, hedge: {of: 90%, max: 50ms}}]\n"
	r := routed(t, routes)
	paceOf := func() *pace {
		t.Helper()
		if resp, body := r.ask("GET", "/ok/1"); resp.StatusCode != 200 {
			t.Fatalf("%d %s", resp.StatusCode, body)
		}
		return r.outbound.kept.Load()[0].paces[paceKey{"billing", "all"}]
	}
	was := paceOf()
	if n := was.n.Load(); n != 1 {
		t.Errorf("%d calls are known after one", n)
	}
	r.use(r.access)
	if now := paceOf(); now != was || now.n.Load() != 2 {
		t.Error("what was known was forgotten")
	}
	r.routes = "service: billing\nroutes: [{name: all, hedge: {of: 95%, max: 50ms}}]\n"
	r.use(r.access)
	if now := paceOf(); now == was {
		t.Error("another share goes on with what was known for the one before")
	}
}
