package rollout

import (
	"errors"
	"strings"
	"testing"
	"time"

	"sallyport/internal/mesh"
)

var (
	good = Calls{calls(1000, 0), calls(1000, 0)}
	bad  = Calls{calls(1000, 200), calls(1000, 0)}
	few  = Calls{calls(10, 0), calls(1000, 0)}
	none = Calls{}
)

// threeSteps are 1 %, 50 % behind which is a gate, and all.
func threeSteps() mesh.Plan {
	return mesh.Plan{
		Canary: mesh.Ref{Subset: "v2"},
		Steps:  []mesh.Step{{Share: 1_00, For: time.Minute}, {Share: 50_00, For: time.Minute, Gate: true}, {Share: mesh.Whole, For: time.Minute}},
		Judge:  mesh.Judging{Patience: 10 * time.Minute},
	}
}

func blueGreen() mesh.Plan {
	return mesh.Plan{Canary: mesh.Ref{Subset: "green"}, Steps: []mesh.Step{{Share: mesh.Whole, For: time.Minute}}, Judge: mesh.Judging{Patience: 10 * time.Minute}}
}

// TestRollout plays stories: at a time, calls are seen or a move is made, and
// then the rollout stands so.
func TestRollout(t *testing.T) {
	type act struct {
		at    time.Duration
		w     Calls
		move  string // Look when empty
		state mesh.DeliveryState
		share mesh.Share
		step  string // of Look
		fails string
	}
	for _, tt := range []struct {
		name string
		plan mesh.Plan
		acts []act
	}{
		{"a good canary goes all the way", threeSteps(), []act{
			{0, none, Start, mesh.Stepping, 1_00, "", ""},
			{30 * time.Second, good, "", mesh.Stepping, 1_00, "", ""},
			{60 * time.Second, good, "", mesh.Stepping, 50_00, Advance, ""},
			{90 * time.Second, good, "", mesh.Stepping, 50_00, "", ""},
			{120 * time.Second, good, "", mesh.Gated, 50_00, Gate, ""},
			{5 * time.Hour, good, "", mesh.Gated, 50_00, "", ""},
			{5 * time.Hour, good, Promote, mesh.Stepping, mesh.Whole, "", ""},
			{5*time.Hour + time.Minute, Calls{calls(2000, 0), none.Others}, "", mesh.Completed, mesh.Whole, Complete, ""},
			{6 * time.Hour, bad, "", mesh.Completed, mesh.Whole, "", ""},
			{6 * time.Hour, none, Start, mesh.Completed, mesh.Whole, "", "abort it first"},
			{6 * time.Hour, none, Abort, mesh.RolledBack, 0, "", ""},
		}},
		{"a bad canary goes back at once", threeSteps(), []act{
			{0, none, Start, mesh.Stepping, 1_00, "", ""},
			{time.Second, bad, "", mesh.RolledBack, 0, RollBack, ""},
			{2 * time.Second, good, "", mesh.RolledBack, 0, "", ""},
			{2 * time.Second, good, Promote, mesh.RolledBack, 0, "", "it is rolled_back"},
			{3 * time.Second, none, Start, mesh.Stepping, 1_00, "", ""},
		}},
		{"it goes back while it waits at a gate", threeSteps(), []act{
			{0, none, Start, mesh.Stepping, 1_00, "", ""},
			{60 * time.Second, good, "", mesh.Stepping, 50_00, Advance, ""},
			{120 * time.Second, good, "", mesh.Gated, 50_00, Gate, ""},
			{130 * time.Second, bad, "", mesh.RolledBack, 0, RollBack, ""},
		}},
		{"it goes back while it is paused", threeSteps(), []act{
			{0, none, Start, mesh.Stepping, 1_00, "", ""},
			{time.Second, none, Pause, mesh.Paused, 1_00, "", ""},
			{time.Hour, good, "", mesh.Paused, 1_00, "", ""},
			{time.Hour, good, Pause, mesh.Paused, 1_00, "", "it is paused"},
			{time.Hour, bad, "", mesh.RolledBack, 0, RollBack, ""},
		}},
		{"a pause is over by start, and the step begins anew", threeSteps(), []act{
			{0, none, Start, mesh.Stepping, 1_00, "", ""},
			{time.Second, none, Pause, mesh.Paused, 1_00, "", ""},
			{time.Hour, good, Start, mesh.Stepping, 1_00, "", ""},
			{time.Hour + time.Second, good, "", mesh.Stepping, 1_00, "", ""},
			{time.Hour + time.Minute, good, "", mesh.Stepping, 50_00, Advance, ""},
		}},
		{"too few calls freeze it, and then somebody decides", threeSteps(), []act{
			{0, none, Start, mesh.Stepping, 1_00, "", ""},
			{0, none, Start, mesh.Stepping, 1_00, "", "is under way"},
			{5 * time.Minute, few, "", mesh.Stepping, 1_00, "", ""},
			{5 * time.Minute, few, Promote, mesh.Stepping, 1_00, "", "each needs 100"},
			{11 * time.Minute, few, "", mesh.Stalled, 1_00, Stall, ""},
			{12 * time.Minute, good, "", mesh.Stalled, 1_00, "", ""},
			{12 * time.Minute, bad, "", mesh.RolledBack, 0, RollBack, ""},
		}},
		{"what is stalled goes on by force", threeSteps(), []act{
			{0, none, Start, mesh.Stepping, 1_00, "", ""},
			{11 * time.Minute, none, "", mesh.Stalled, 1_00, Stall, ""},
			{12 * time.Minute, none, Promote + "!", mesh.Stepping, 50_00, "", ""},
			{13 * time.Minute, none, Promote + "!", mesh.Stepping, mesh.Whole, "", ""},
			{14 * time.Minute, none, Promote + "!", mesh.Completed, mesh.Whole, "", ""},
		}},
		{"enough calls in time after all", threeSteps(), []act{
			{0, none, Start, mesh.Stepping, 1_00, "", ""},
			{10 * time.Minute, few, "", mesh.Stepping, 1_00, "", ""},
			{10*time.Minute + time.Second, good, "", mesh.Stepping, 50_00, Advance, ""},
		}},
		{"blue/green measures blue, swaps and completes", blueGreen(), []act{
			{0, none, Start, mesh.Measuring, 0, "", ""},
			{time.Second, Calls{none.Canary, calls(50, 0)}, "", mesh.Measuring, 0, "", ""},
			{2 * time.Second, Calls{none.Canary, calls(500, 0)}, "", mesh.Stepping, mesh.Whole, Advance, ""},
			{3 * time.Second, Calls{calls(40, 0), none.Others}, "", mesh.Stepping, mesh.Whole, "", ""},
			{62 * time.Second, Calls{calls(1000, 0), none.Others}, "", mesh.Completed, mesh.Whole, Complete, ""},
			{time.Hour, none, Abort, mesh.RolledBack, 0, "", ""},
		}},
		{"green that fails goes back though blue has no calls", blueGreen(), []act{
			{0, none, Start, mesh.Measuring, 0, "", ""},
			{2 * time.Second, Calls{none.Canary, calls(500, 0)}, "", mesh.Stepping, mesh.Whole, Advance, ""},
			{3 * time.Second, Calls{calls(40, 20), none.Others}, "", mesh.RolledBack, 0, RollBack, ""},
		}},
		{"blue that nobody calls is not swapped", blueGreen(), []act{
			{0, none, Start, mesh.Measuring, 0, "", ""},
			{10 * time.Minute, none, "", mesh.Stalled, 0, Stall, ""},
			{11 * time.Minute, none, Start, mesh.Measuring, 0, "", ""},
			{11 * time.Minute, none, Promote + "!", mesh.Stepping, mesh.Whole, "", ""},
		}},
		{"what was never started does not move", threeSteps(), []act{
			{0, none, Pause, "", 0, "", "never started"},
			{0, none, Promote, "", 0, "", "never started"},
			{0, none, Abort, "", 0, "", "never started"},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			begin := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
			d := mesh.Delivery{Service: "billing", Route: "all"}
			for i, a := range tt.acts {
				now, step, err := begin.Add(a.at), "", error(nil)
				var next mesh.Delivery
				switch a.move {
				case "":
					next, step = Look(d, a.w, now)
				case Start:
					next, err = Begin(d, tt.plan, "h", "somebody", now)
				case Pause:
					next, err = Stop(d, "somebody")
				case Abort:
					next, err = Back(d, "somebody", now)
				default:
					next, err = Next(d, a.w, strings.HasSuffix(a.move, "!"), now)
				}
				if (a.fails != "") != (err != nil) || err != nil && (!strings.Contains(err.Error(), a.fails) || !errors.Is(err, mesh.ErrDelivery)) {
					t.Fatalf("act %d: %v, want %q", i, err, a.fails)
				}
				if err == nil {
					d = next
				}
				if d.State != a.state || d.Share != a.share || step != a.step {
					t.Fatalf("act %d: %s with %s by %q, want %s with %s by %q: %+v", i, d.State, d.Share, step, a.state, a.share, a.step, d)
				}
				if !d.Active() && d.State != "" && d.Ended.IsZero() {
					t.Fatalf("act %d: it has no end", i)
				}
			}
		})
	}
}

func TestLapse(t *testing.T) {
	d, err := Begin(mesh.Delivery{}, threeSteps(), "h", "somebody", time.Unix(1, 0))
	if err != nil {
		t.Fatal(err)
	}
	if d = Lapse(d, time.Unix(2, 0)); d.State != mesh.Superseded || d.Active() || d.Share != 1_00 {
		t.Errorf("%+v", d)
	}
	if d, err = Begin(d, threeSteps(), "h2", "somebody", time.Unix(3, 0)); err != nil || d.State != mesh.Stepping || d.PlanHash != "h2" || !d.Ended.IsZero() {
		t.Errorf("%+v %v", d, err)
	}
}

func TestTallyCountsTheWindow(t *testing.T) {
	y, one := newTally(12*time.Second), mesh.Calls{N: 1}
	begin := time.Unix(1_000_000, 0)
	for i := range 100 {
		y.add(begin.Add(time.Duration(i)*time.Second), i%2 == 0, one)
	}
	now := begin.Add(99 * time.Second)
	if len(y.parts) > slots+1 {
		t.Errorf("%d parts are kept", len(y.parts))
	}
	if w := since(y.parts, y.width, begin, now); w.Canary.N+w.Others.N != 12 || w.Canary.N != 6 {
		t.Errorf("in the window: %+v", w)
	}
	if w := since(y.parts, y.width, now.Add(-2500*time.Millisecond), now); w.Canary.N+w.Others.N != 3 {
		t.Errorf("since the step began: %+v", w)
	}
	if w := since(y.parts, y.width, begin, now.Add(time.Minute)); w.Canary.N+w.Others.N != 0 {
		t.Errorf("a minute later: %+v", w)
	}
	y.add(now.Add(-time.Hour), false, one) // a clock that goes back
	if len(y.parts) > slots+1 {
		t.Errorf("%d parts are kept", len(y.parts))
	}
}
