package upstream

import (
	"fmt"
	"math"
	"net/netip"
	"testing"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
)

// groupOf makes a group of n endpoints that nobody dials.
func testGroup(n int, cfg mesh.Routes) *group {
	s := &Services{known: map[mesh.ServiceName]*standing{}}
	var pools []place
	for i := range n {
		pools = append(pools, place{pool: NewLocal(netip.MustParseAddrPort(fmt.Sprintf("10.0.%d.%d:1", i/250, i%250+1)), http1.Limits{})})
	}
	return s.groupOf("a", cfg, pools)
}

// spread picks often and says what part of the calls each endpoint got. No call
// ends before the next.
func spread(g *group, calls int, now int64, key func(int) uint64) []float64 {
	n, w := map[*endpoint]int{}, new(Want)
	for i := range calls {
		w.Key = key(i)
		e := g.pick(g.view(now), now, w)
		e.begin()
		n[e]++
	}
	var shares []float64
	for _, e := range g.all {
		e.calls.Store(0)
		shares = append(shares, float64(n[e])/float64(calls))
	}
	return shares
}

func noKey(int) uint64 { return 0 }

func TestBalanceSpreadsAlike(t *testing.T) {
	for _, policy := range []string{"", "least_request", "round_robin", "ring_hash"} {
		g := testGroup(5, mesh.Routes{Balance: mesh.Balance{Policy: policy}})
		for i, got := range spread(g, 10_000, at(0), func(i int) uint64 { return mix(uint64(i)) }) {
			if math.Abs(got-0.2) > 0.06 {
				t.Errorf("%q: endpoint %d of five got %.2f of the calls", policy, i, got)
			}
		}
	}
}

func TestPeakEWMAAvoidsWhatIsSlow(t *testing.T) {
	g := testGroup(3, mesh.Routes{})
	for i, e := range g.all {
		e.took(at(0), []time.Duration{time.Millisecond, 2 * time.Millisecond, 50 * time.Millisecond}[i])
	}
	got := spread(g, 5300, at(0), noKey)
	if got[2] > 0.05 || got[0] < got[1] {
		t.Errorf("shares %.3f with answers after 1, 2 and 50 ms", got)
	}
}

func TestAFailureIsNotFast(t *testing.T) {
	var l load
	l.took(at(0), time.Millisecond)
	l.took(at(0.1), penalty)
	if c := l.cost(at(0.1)); c < 4.9e6 {
		t.Errorf("a failure costs %g µs, want 5 s", c)
	}
	if c := l.cost(at(10.1)); math.Abs(float64(c)-5e6/math.E) > 5e4 {
		t.Errorf("ten seconds later it costs %g µs, want 1/e of it", c)
	}
	l.took(at(10.1), time.Millisecond)
	if c := l.cost(at(10.1)); c > 2e6 {
		t.Errorf("a good answer leaves it at %g µs", c)
	}
	for i := range 200_000 {
		l.took(at(10.2+float64(i)/2000), time.Millisecond)
	}
	if c := l.cost(at(110.2)); c > 1100 {
		t.Errorf("many good answers leave it at %g µs", c)
	}
}

func TestEjectedEndpointsGetNoCalls(t *testing.T) {
	var told []Trouble
	g := testGroup(4, mesh.Routes{Outlier: &mesh.Outlier{}})
	g.change = func(x Trouble) { told = append(told, x) }
	for range 5 {
		g.blame(g.all[2], at(0), Failed, 0, false)
	}
	if got := spread(g, 1000, at(29), noKey); got[2] != 0 {
		t.Errorf("an ejected endpoint got %.3f of the calls", got[2])
	}
	if got := spread(g, 1000, at(60), noKey); got[2] == 0 {
		t.Error("an endpoint got no call after its ejection")
	}
	if len(told) != 1 || told[0].Kind != Ejected || told[0].Address != g.all[2].pool.t.addr || told[0].Why != "5 consecutive connect errors" {
		t.Errorf("told %+v", told)
	}
	for _, e := range g.all { // half of four may be aside, whatever they do
		for range 20 {
			g.blame(e, at(61), Failed, 0, true)
		}
	}
	out := 0
	for _, e := range g.all {
		if e.out.Load() > at(61) {
			out++
		}
	}
	if out != 2 {
		t.Errorf("%d of four are ejected, want half", out)
	}
}

func TestPanicUsesAll(t *testing.T) {
	low := mesh.Share(1000)
	for _, tt := range []struct {
		sick  int
		panic *mesh.Share
		used  int
	}{{0, nil, 4}, {2, nil, 2}, {3, nil, 4}, {3, &low, 1}, {4, &low, 4}} {
		g := testGroup(4, mesh.Routes{Balance: mesh.Balance{Panic: tt.panic}})
		for _, e := range g.all[:tt.sick] {
			e.sick.Store(true)
		}
		if v := g.view(at(0)); len(v.use) != tt.used {
			t.Errorf("%d of 4 sick: %d are used, want %d", tt.sick, len(v.use), tt.used)
		}
	}
}

func TestOwnZoneComesFirst(t *testing.T) {
	for _, tt := range []struct {
		near, sick int // the first are near, the first of those sick
		used       int
	}{{0, 0, 6}, {3, 0, 3}, {3, 1, 2}, {3, 2, 4}, {6, 0, 6}} {
		g := testGroup(6, mesh.Routes{Balance: mesh.Balance{Zone: "prefer"}})
		for i, e := range g.all {
			e.near = i < tt.near
			e.sick.Store(i < tt.sick)
		}
		if v := g.view(at(0)); len(v.use) != tt.used {
			t.Errorf("%d near, %d of them sick: %d are used, want %d", tt.near, tt.sick, len(v.use), tt.used)
		}
	}
}

func TestSlowStart(t *testing.T) {
	g := testGroup(4, mesh.Routes{Balance: mesh.Balance{Policy: "least_request", SlowStart: 10 * time.Second}})
	g.all[0].born = at(0)
	for _, tt := range []struct{ at, low, high float64 }{{0.1, 0.02, 0.05}, {5, 0.12, 0.17}, {11, 0.24, 0.26}} {
		if got := spread(g, 4000, at(tt.at), noKey); got[0] < tt.low || got[0] > tt.high {
			t.Errorf("after %g s of ten a new endpoint gets %.3f of the calls", tt.at, got[0])
		}
	}
}

func TestRingKeepsKeys(t *testing.T) {
	g, less := testGroup(10, mesh.Routes{Balance: mesh.Balance{Policy: "ring_hash"}}), testGroup(9, mesh.Routes{Balance: mesh.Balance{Policy: "ring_hash"}})
	moved := 0
	const keys = 2000
	for i := range keys {
		w := &Want{Key: Hash(fmt.Sprint("user-", i))}
		a, b := g.pick(g.view(at(0)), at(0), w), less.pick(less.view(at(0)), at(0), w)
		if a.pool.t.addr != b.pool.t.addr {
			moved++
			if a != g.all[9] {
				t.Fatal("a key moved from an endpoint that stays")
			}
		}
	}
	if moved == 0 || moved > keys/5 {
		t.Errorf("%d of %d keys moved when one of ten went", moved, keys)
	}
}

func TestRingBoundsTheLoad(t *testing.T) {
	g := testGroup(4, mesh.Routes{Balance: mesh.Balance{Policy: "ring_hash"}})
	for _, got := range spread(g, 1000, at(0), noKey) { // all with one key
		if got > 0.32 {
			t.Errorf("one endpoint got %.3f of the calls, 125 %% of its share is 0.3125", got)
		}
	}
}

func TestAStandingOutlivesWhatChangesNothing(t *testing.T) {
	s := &Services{known: map[mesh.ServiceName]*standing{}}
	p := NewLocal(netip.MustParseAddrPort("10.0.0.1:1"), http1.Limits{})
	g := s.groupOf("a", mesh.Routes{Breaker: &mesh.Breaker{}}, []place{{pool: p}})
	s.known["a"] = g.standing
	if h := s.groupOf("a", mesh.Routes{Breaker: &mesh.Breaker{}, Origin: mesh.Origin{Line: 3}}, []place{{pool: p}}); h.standing != g.standing || h.all[0] != g.all[0] || h.all[0].born != 0 {
		t.Error("what was known was forgotten")
	}
	if h := s.groupOf("a", mesh.Routes{Breaker: &mesh.Breaker{Consecutive: 2}}, []place{{pool: p}}); h.standing == g.standing {
		t.Error("what was set anew was not taken")
	}
}

// BenchmarkPerCall is all that choosing an endpoint and judging a service adds
// to a call that goes well.
func BenchmarkPerCall(b *testing.B) {
	for _, n := range []int{1, 3, 100} {
		b.Run(fmt.Sprint(n, " endpoints"), func(b *testing.B) {
			g := testGroup(n, mesh.Routes{Breaker: &mesh.Breaker{Success: 9000}, Outlier: &mesh.Outlier{}})
			c, w, now := new(Conn), new(Want), at(0)
			b.ReportAllocs()
			for b.Loop() {
				now += 20_000
				if !g.capacity.enter() {
					b.Fatal("full")
				}
				probe, ok := g.breaker.enter(now)
				if !ok {
					b.Fatal("open")
				}
				g.mark(now)
				e := g.pick(g.view(now), now, w)
				e.begin()
				c.lease = lease{by: g.standing, on: e, at: now, probe: probe}
				c.Report(OK, time.Unix(0, now+int64(time.Millisecond)), 0)
				c.leave()
			}
		})
	}
}
