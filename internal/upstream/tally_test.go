package upstream

import (
	"net/netip"
	"testing"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
)

// called has n calls to an endpoint begin and end at a moment.
func called(g *group, e *endpoint, n int, now int64, o Outcome) {
	for range n {
		begun(g, e, now, o).leave()
	}
}

// begun is a call of which is told what became of it, and which has not ended.
func begun(g *group, e *endpoint, now int64, o Outcome) *Conn {
	g.mark(now)
	e.begin()
	c := &Conn{lease: lease{by: g.standing, on: e, at: now}}
	c.Report(o, time.Unix(0, now), 0)
	return c
}

// What goes well is counted where it was, and counts for the budget and the breaker
// as what does not.
func TestCallsThatGoWellCount(t *testing.T) {
	g := testGroup(3, mesh.Routes{Breaker: &mesh.Breaker{Success: 5000, Consecutive: 1000}})
	for i, e := range g.all {
		called(g, e, 100*(i+1), at(float64(i)), OK)
	}
	if n := g.budget.left(at(2)); n != 100+600/5 {
		t.Errorf("%d retries of 600 calls that went well, want 220", n)
	}
	called(g, g.all[0], 599, at(2), Failed)
	if isOpen(g.breaker) {
		t.Fatal("the breaker is open while half of the calls have gone well")
	}
	if n := g.budget.left(at(2)); n != 100+1199/5 {
		t.Errorf("%d retries of 1,199 calls, want 339", n)
	}
	if n := g.budget.left(at(11)); n != 100+(300+599)/5 {
		t.Errorf("%d retries when a part has left the window, want 279", n)
	}
	called(g, g.all[0], 2, at(9), Failed)
	if _, _, why := g.breaker.state(); why != "601 of 1201 calls failed" {
		t.Errorf("open because of %q", why)
	}
}

// Endpoints come and go; what they have shown of their service stays.
func TestWhatAnEndpointHasShownOutlivesIt(t *testing.T) {
	s := &Services{known: map[mesh.ServiceName]*standing{}}
	one, two := NewLocal(netip.MustParseAddrPort("10.0.0.1:1"), http1.Limits{}), NewLocal(netip.MustParseAddrPort("10.0.0.2:1"), http1.Limits{})
	g := s.groupOf("a", mesh.Routes{}, []place{{pool: one}, {pool: two}})
	s.known["a"] = g.standing
	called(g, g.all[0], 50, at(0), OK)
	called(g, g.all[1], 50, at(0), OK)
	g = s.groupOf("a", mesh.Routes{}, []place{{pool: two}})
	if n := g.budget.left(at(1)); n != 120 {
		t.Errorf("%d retries of 100 calls, want 120", n)
	}
	called(g, g.all[0], 50, at(1), OK)
	if n := g.budget.left(at(1)); n != 130 {
		t.Errorf("%d retries of 150 calls, want 130", n)
	}
}

// A stream counts when it has begun, and not again when it ends.
func TestWhatLastsCountsAtOnce(t *testing.T) {
	g := testGroup(1, mesh.Routes{})
	now := time.Now().UnixNano()
	for _, tt := range []struct {
		name  string
		after func(c *Conn)
		left  int64
	}{
		{"a call that has not ended", func(*Conn) {}, 100},
		{"one that lasts", func(c *Conn) { c.Lasts() }, 120},
		{"one that has lasted", func(c *Conn) { c.Lasts(); c.leave() }, 140},
	} {
		for range 100 {
			tt.after(begun(g, g.all[0], now, OK))
		}
		if n := g.budget.left(time.Now().UnixNano()); n != tt.left {
			t.Errorf("%s: %d retries, want %d", tt.name, n, tt.left)
		}
	}
	if n := g.all[0].pending(); n != 200 {
		t.Errorf("%d calls are under way, want 200", n)
	}
}

// The window of what fails, too, is not disturbed by what is told late: an answer
// that lasts is told of with the time at which it began.
func TestWhatIsToldLateTakesNothingBack(t *testing.T) {
	c := counts{width: int64(time.Second)}
	for range 5 {
		c.add(at(20), true, false)
	}
	c.add(at(10), true, false) // the same slot, ten buckets ago
	if all, _, _ := c.sum(at(20)); all != 6 {
		t.Errorf("%d calls are counted, want 6", all)
	}
}

// Nothing of this is waited for, or allocated.
func TestAWellCallAllocatesNothing(t *testing.T) {
	g := testGroup(3, mesh.Routes{Breaker: &mesh.Breaker{Success: 9000}, Outlier: &mesh.Outlier{}})
	c, w, now := new(Conn), new(Want), at(0)
	if n := testing.AllocsPerRun(1000, func() {
		now += int64(time.Millisecond)
		g.mark(now)
		e := g.pick(g.view(now), now, w)
		e.begin()
		c.lease = lease{by: g.standing, on: e, at: now}
		c.Report(OK, time.Unix(0, now), 0)
		c.leave()
	}); n != 0 {
		t.Errorf("%.0f allocations", n)
	}
}
