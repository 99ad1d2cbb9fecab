package upstream

import (
	"strings"
	"testing"
	"time"

	"sallyport/internal/mesh"
)

// at is a moment of a test, in seconds after its beginning.
func at(seconds float64) int64 { return int64(1e18 + seconds*1e9) }

// tell has n calls end alike.
func tell(t *testing.T, b *breaker, n int, now int64, o Outcome, took time.Duration) {
	t.Helper()
	for range n {
		probe, ok := b.enter(now)
		if !ok {
			t.Fatal("a call did not pass")
		}
		b.done(now, o, took, 0, probe)
	}
}

func isOpen(b *breaker) bool { return b.open.Load() }

func TestBreakerOpensAfterFailuresInARow(t *testing.T) {
	b := newBreaker(mesh.Breaker{Consecutive: 5})
	tell(t, b, 4, at(0), Failed, 0)
	tell(t, b, 1, at(0), OK, 0)
	tell(t, b, 4, at(0), Failed, 0)
	tell(t, b, 20, at(0), Limited, 0) // no failures in a row
	tell(t, b, 20, at(0), Ignored, 0)
	if isOpen(b) {
		t.Fatal("opened before the fifth failure in a row")
	}
	tell(t, b, 1, at(0), Failed, 0)
	if _, ok := b.enter(at(0)); ok || !isOpen(b) {
		t.Fatal("did not open at the fifth failure in a row")
	}
	if _, since, why := b.state(); since != at(0) || why != "5 consecutive failures" {
		t.Errorf("since %d: %q", since, why)
	}
}

func TestBreakerOpensByItsRatio(t *testing.T) {
	for _, tt := range []struct {
		name  string
		cfg   mesh.Breaker
		calls func(t *testing.T, b *breaker)
		open  bool
		why   string
	}{
		{"too few calls", mesh.Breaker{Success: 5000, Minimum: 10, Consecutive: 100}, func(t *testing.T, b *breaker) {
			tell(t, b, 9, at(0), Failed, 0)
		}, false, ""},
		{"below", mesh.Breaker{Success: 5000, Minimum: 10, Consecutive: 100}, func(t *testing.T, b *breaker) {
			tell(t, b, 4, at(0), OK, 0)
			tell(t, b, 6, at(1), Failed, 0)
		}, true, "6 of 10 calls failed"},
		{"at the ratio", mesh.Breaker{Success: 5000, Minimum: 10, Consecutive: 100}, func(t *testing.T, b *breaker) {
			tell(t, b, 5, at(0), OK, 0)
			tell(t, b, 5, at(1), Failed, 0)
		}, false, ""},
		{"limited calls count", mesh.Breaker{Success: 5000, Minimum: 10}, func(t *testing.T, b *breaker) {
			tell(t, b, 4, at(0), OK, 0)
			tell(t, b, 6, at(1), Limited, 0)
		}, true, "6 of 10 calls failed"},
		{"what is older than the window does not", mesh.Breaker{Success: 5000, Minimum: 10, Consecutive: 100}, func(t *testing.T, b *breaker) {
			tell(t, b, 9, at(0), Failed, 0)
			tell(t, b, 4, at(12), Failed, 0)
			tell(t, b, 8, at(12), OK, 0)
		}, false, ""},
		{"slow calls", mesh.Breaker{Slow: time.Second, SlowShare: 5000, Minimum: 10}, func(t *testing.T, b *breaker) {
			tell(t, b, 4, at(0), OK, time.Millisecond)
			tell(t, b, 6, at(0), OK, 2*time.Second)
		}, true, "6 of 10 calls took longer than 1s"},
		{"few slow calls", mesh.Breaker{Slow: time.Second, SlowShare: 5000, Minimum: 10}, func(t *testing.T, b *breaker) {
			tell(t, b, 5, at(0), OK, time.Millisecond)
			tell(t, b, 5, at(0), OK, 2*time.Second)
		}, false, ""},
	} {
		b := newBreaker(tt.cfg)
		tt.calls(t, b)
		if _, _, why := b.state(); isOpen(b) != tt.open || why != tt.why {
			t.Errorf("%s: open %t, because of %q", tt.name, isOpen(b), why)
		}
	}
}

func TestHalfOpenBreakerLetsOneCallPass(t *testing.T) {
	b := newBreaker(mesh.Breaker{Consecutive: 1, Open: time.Second, MaxOpen: 3 * time.Second})
	tell(t, b, 1, at(0), Failed, 0)
	if _, ok := b.enter(at(0.4)); ok {
		t.Fatal("passed within half of the first wait")
	}
	probe, ok := b.enter(at(1.1))
	if !ok || !probe {
		t.Fatal("no probe after the wait")
	}
	if _, ok := b.enter(at(1.2)); ok {
		t.Fatal("a second call passed beside the probe")
	}
	b.done(at(1.3), Ignored, 0, 0, true)
	if probe, ok = b.enter(at(1.3)); !ok || !probe {
		t.Fatal("a probe that says nothing was not followed by another")
	}
	b.done(at(1.3), Limited, 0, 0, true)
	if _, ok := b.enter(at(2.2)); ok {
		t.Fatal("the second wait is not longer than the first")
	}
	if probe, ok = b.enter(at(3.4)); !ok {
		t.Fatal("no probe after the second wait")
	}
	b.done(at(3.4), Failed, 0, 0, probe)
	if probe, ok = b.enter(at(6.5)); !ok {
		t.Fatal("waits for more than MaxOpen")
	}
	b.done(at(6.5), OK, 0, 0, probe)
	if isOpen(b) {
		t.Fatal("open after a probe that went well")
	}
	tell(t, b, 1, at(7), Failed, 0)
	if _, ok := b.enter(at(8.1)); !ok {
		t.Fatal("the wait does not begin anew once the breaker has closed")
	}
}

func TestAProbeThatLastsHoldsNobodyUp(t *testing.T) {
	b := newBreaker(mesh.Breaker{Consecutive: 1})
	tell(t, b, 1, at(0), Failed, 0)
	if _, ok := b.enter(at(2)); !ok {
		t.Fatal("no probe")
	}
	if _, ok := b.enter(at(8)); !ok {
		t.Fatal("no second probe while the first lasts")
	}
}

// TestQuietReports says which reports may be made where nothing may be waited for.
func TestQuietReports(t *testing.T) {
	plain := newBreaker(mesh.Breaker{Consecutive: 5})
	slow := newBreaker(mesh.Breaker{Consecutive: 5, Slow: time.Second, SlowShare: 5000})
	for _, tt := range []struct {
		name    string
		breaker *breaker
		probe   bool
		o       Outcome
		took    time.Duration
		want    bool
	}{
		{"well", plain, false, OK, time.Hour, true},
		{"well, without a breaker", nil, false, OK, time.Hour, true},
		{"a probe", plain, true, OK, 0, false},
		{"failed", plain, false, Failed, 0, false},
		{"failed, without a breaker", nil, false, Failed, 0, false},
		{"limited", plain, false, Limited, 0, false},
		{"in time", slow, false, OK, time.Second, true},
		{"slow", slow, false, OK, time.Second + 1, false},
	} {
		c := &Conn{lease: lease{by: &standing{breaker: tt.breaker}, at: 1, probe: tt.probe}}
		if got := c.Quiet(tt.o, time.Unix(0, 1+int64(tt.took))); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestBreakerHonoursRetryAfter(t *testing.T) {
	for asked, want := range map[time.Duration]float64{30 * time.Second: 30, time.Hour: 300} {
		b := newBreaker(mesh.Breaker{Consecutive: 1})
		probe, _ := b.enter(at(0))
		b.done(at(0), Failed, 0, asked, probe)
		if _, ok := b.enter(at(want - 0.1)); ok {
			t.Errorf("asked for %s: passed before %g s", asked, want)
		}
		if _, ok := b.enter(at(want + 0.1)); !ok {
			t.Errorf("asked for %s: did not pass after %g s", asked, want)
		}
	}
}

func TestBudgetIsAShareAndAFloor(t *testing.T) {
	b := newBudget(mesh.Budget{})
	spend := func(now int64) (n int) {
		for b.spend(now) {
			n++
		}
		return n
	}
	if n := spend(at(0)); n != 100 {
		t.Errorf("%d retries without any call, want 10 a second", n)
	}
	for range 1000 {
		b.call(at(1))
	}
	if n := spend(at(1)); n != 200 {
		t.Errorf("%d retries of 1,000 calls, want 20 %%", n)
	}
	if n := spend(at(9)); n != 0 {
		t.Errorf("%d more within the window", n)
	}
	if n := spend(at(25)); n != 100 {
		t.Errorf("%d after all has left the window, want the floor", n)
	}
	if n := newBudget(mesh.Budget{Share: 5000, Floor: 1}); n.left(at(0)) != 10 {
		t.Errorf("%d left with a floor of one a second, want 10 in ten seconds", n.left(at(0)))
	}
}

func TestOutlierIsSuspectedByItsCalls(t *testing.T) {
	cfg := outlierDefaults(mesh.Outlier{Success: 8000, Minimum: 10})
	for _, tt := range []struct {
		name  string
		calls string // one letter a call
		want  string
	}{
		{"failures in a row", "FFFFF", "5 consecutive failures"},
		{"not in a row", "FFFFOFFFF", ""},
		{"own overflow and cancellations", "FFFFIIIIII", ""},
		{"limits are not in a row", "LLLLLLLLL", ""},
		{"but count in the ratio", "OOOOOOOLLL", "3 of 10 calls failed"},
	} {
		r := &history{window: counts{width: int64(time.Second)}}
		var why string
		for _, c := range tt.calls {
			why = r.suspect(&cfg, at(0), Outcome(strings.IndexRune("IOFL", c)), true)
		}
		if why != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, why, tt.want)
		}
	}
}

func TestEjectionsGrowAndShrink(t *testing.T) {
	cfg := outlierDefaults(mesh.Outlier{})
	r := &history{window: counts{width: int64(time.Second)}}
	for _, tt := range []struct{ at, until float64 }{
		{0, 30}, {30, 30 + 60}, {90, 90 + 90}, {180 + 20, 200 + 60}, {400, 400 + 30},
	} {
		r.eject(&cfg, at(tt.at), "")
		if got := r.out.Load(); got != at(tt.until) {
			t.Errorf("ejected at %g until %g, want %g", tt.at, float64(got-at(0))/1e9, tt.until)
		}
	}
	for range 20 {
		r.eject(&cfg, r.out.Load(), "")
	}
	if d := time.Duration(r.out.Load() - r.since); d != 300*time.Second {
		t.Errorf("ejected for %s at last, want five minutes", d)
	}
}

func TestOneEndpointAlwaysStaysAndOneAlwaysMayGo(t *testing.T) {
	for _, tt := range []struct {
		n, out int
		share  mesh.Share
		want   bool
	}{
		{1, 0, 10000, false}, {2, 0, 100, true}, {2, 1, 10000, false}, {3, 0, 5000, true}, {3, 1, 5000, false},
		{10, 4, 5000, true}, {10, 5, 5000, false}, {10, 8, 10000, true}, {10, 9, 10000, false},
	} {
		if got := mayEject(tt.n, tt.out, tt.share); got != tt.want {
			t.Errorf("%d of %d aside, at most %d: one more %t", tt.out, tt.n, tt.share, got)
		}
	}
}

func TestAdaptiveCapacityFollowsLatency(t *testing.T) {
	c := newCapacity(mesh.Capacity{Adaptive: true, Calls: 200})
	run := func(from float64, steps int, took time.Duration, o Outcome) int32 {
		for i := range steps {
			c.calls.Store(c.bound.Load())
			for k := range 25 {
				c.took(at(from+float64(i)*0.3+float64(k)*0.011), took, o)
			}
		}
		return c.bound.Load()
	}
	grown := run(0, 40, 10*time.Millisecond, OK)
	if grown <= 20 {
		t.Fatalf("the bound is %d after calls that took as long as always, want more than 20", grown)
	}
	if slow := run(20, 20, 60*time.Millisecond, OK); slow >= grown/2 {
		t.Errorf("the bound is %d when calls take six times as long, was %d", slow, grown)
	}
	if bad := run(40, 60, time.Millisecond, Failed); bad != leastCalls {
		t.Errorf("the bound is %d when all fail, want %d", bad, leastCalls)
	}
	if again := run(70, 300, 10*time.Millisecond, OK); again <= grown || again > 200 {
		t.Errorf("the bound is %d after a long time of good answers, want up to 200", again)
	}
}

func TestCapacityIsHeld(t *testing.T) {
	c := newCapacity(mesh.Capacity{Calls: 2})
	got := 0
	for range 5 {
		if c.enter() {
			got++
		}
	}
	if got != 2 {
		t.Fatalf("%d calls at once, want 2", got)
	}
	c.leave()
	if !c.enter() {
		t.Error("a place that was left is not given again")
	}
	if c := newCapacity(mesh.Capacity{}); c.bound.Load() != 0 {
		t.Error("bounded without being told")
	}
}
