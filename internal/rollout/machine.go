package rollout

import (
	"fmt"
	"time"

	"sallyport/internal/mesh"
)

// What is done with a rollout. The first four are moves that somebody asks for.
const (
	Start     = "start"
	Pause     = "pause"
	Promote   = "promote"
	Abort     = "abort"
	Advance   = "advance"
	Gate      = "gate"
	Stall     = "stall"
	Complete  = "complete"
	RollBack  = "roll_back"
	Supersede = "supersede"
)

// Calls of both sides in one stretch of time.
type Calls struct{ Canary, Others mesh.Calls }

// judged is the rollout with how its canary does now. While the canary has all
// calls it is compared with the others as they did when they last had enough.
func judged(d mesh.Delivery, w Calls) mesh.Delivery {
	j := d.Plan.Judge.WithDefaults()
	if w.Others.N >= uint64(j.Minimum) {
		d.Before = w.Others
	} else if d.Share == mesh.Whole {
		w.Others = d.Before
	}
	d.Verdict = Judge(j, w.Canary, w.Others)
	return d
}

// Look judges a rollout and says what has to be done, and why: nothing while
// step is empty. The way back is open whatever it waits for.
func Look(d mesh.Delivery, w Calls, now time.Time) (next mesh.Delivery, step string) {
	d = judged(d, w)
	j := d.Plan.Judge.WithDefaults()
	if !d.Active() {
		return d, ""
	}
	if d.Verdict.Verdict == mesh.Fail && d.Share > 0 {
		return ended(d, mesh.RolledBack, d.Verdict.Why, now), RollBack
	}
	spent := now.Sub(d.Since)
	switch d.State {
	case mesh.Measuring:
		if d.Before.N >= uint64(j.Minimum) {
			return onward(d, now), Advance
		}
		if spent >= j.Patience {
			return stay(d, mesh.Stalled, fmt.Sprintf("the other backends had %d calls within %s, and %d are needed to compare with", d.Verdict.Others.Calls, j.Window, j.Minimum)), Stall
		}
	case mesh.Stepping:
		at := d.Plan.Steps[d.Step-1]
		switch {
		case spent < at.For:
		case d.Verdict.Verdict == mesh.Pass && at.Gate:
			return stay(d, mesh.Gated, "the step is done; it waits for somebody to promote it"), Gate
		case d.Verdict.Verdict == mesh.Pass && d.Step == len(d.Plan.Steps):
			return ended(d, mesh.Completed, "", now), Complete
		case d.Verdict.Verdict == mesh.Pass:
			return onward(d, now), Advance
		case spent >= at.For+j.Patience:
			return stay(d, mesh.Stalled, d.Verdict.Why), Stall
		}
	}
	return d, ""
}

// Begin starts a rollout by a plan, or goes on with one that was stopped.
func Begin(d mesh.Delivery, plan mesh.Plan, hash, by string, now time.Time) (mesh.Delivery, error) {
	switch {
	case d.Active() && d.State != mesh.Paused && d.State != mesh.Stalled:
		return d, fmt.Errorf("%w: %s/%s is under way (%s): first pause, promote or abort it", mesh.ErrDelivery, d.Service, d.Route, d.State)
	case d.State == mesh.Completed:
		return d, fmt.Errorf("%w: %s/%s is completed, its canary has all calls: abort it first, or edit the route", mesh.ErrDelivery, d.Service, d.Route)
	case d.Active() && d.Step == 0:
		d.State = mesh.Measuring
	case d.Active():
		d.State = mesh.Stepping
	default:
		d = mesh.Delivery{Service: d.Service, Route: d.Route, Revision: d.Revision, Plan: plan, PlanHash: hash, State: mesh.Measuring, By: by, Started: now}
		if plan.Steps[0].Share < mesh.Whole {
			return onward(d, now), nil
		}
	}
	d.Since, d.Why = now, ""
	return d, nil
}

// Stop pauses a rollout: its canary keeps its share.
func Stop(d mesh.Delivery, by string) (mesh.Delivery, error) {
	if !d.Active() || d.State == mesh.Paused {
		return d, notUnderWay(d)
	}
	return stay(d, mesh.Paused, "paused by "+by), nil
}

// Next takes the next step at once. Without force the canary must do well.
func Next(d mesh.Delivery, w Calls, force bool, now time.Time) (mesh.Delivery, error) {
	if !d.Active() {
		return d, notUnderWay(d)
	}
	d = judged(d, w)
	if !force && d.Verdict.Verdict != mesh.Pass {
		return d, fmt.Errorf("%w: %s/%s is not promoted: %s; wait, or promote it with --force", mesh.ErrDelivery, d.Service, d.Route, d.Verdict.Why)
	}
	if d.Step == len(d.Plan.Steps) {
		return ended(d, mesh.Completed, "", now), nil
	}
	return onward(d, now), nil
}

// Back takes all calls from the canary: at once, also after the last step.
func Back(d mesh.Delivery, by string, now time.Time) (mesh.Delivery, error) {
	if !d.Active() && d.State != mesh.Completed {
		return d, notUnderWay(d)
	}
	return ended(d, mesh.RolledBack, "aborted by "+by, now), nil
}

// Lapse ends a rollout whose route was edited: the weights of the file hold.
func Lapse(d mesh.Delivery, now time.Time) mesh.Delivery {
	d.State, d.Why, d.Ended = mesh.Superseded, "the backends or the rollout of the route were edited: the weights of the file hold", now
	return d
}

func notUnderWay(d mesh.Delivery) error {
	state := "it was never started"
	if d.State != "" {
		state = "it is " + string(d.State)
	}
	return fmt.Errorf("%w: %s/%s: %s", mesh.ErrDelivery, d.Service, d.Route, state)
}

// onward begins the next step.
func onward(d mesh.Delivery, now time.Time) mesh.Delivery {
	d.Step++
	d.State, d.Share, d.Since, d.Why = mesh.Stepping, d.Plan.Steps[d.Step-1].Share, now, ""
	return d
}

// stay keeps the share in another state.
func stay(d mesh.Delivery, s mesh.DeliveryState, why string) mesh.Delivery {
	d.State, d.Why = s, why
	return d
}

// ended gives the canary all calls or none.
func ended(d mesh.Delivery, s mesh.DeliveryState, why string, now time.Time) mesh.Delivery {
	d.State, d.Why, d.Ended, d.Share = s, why, now, 0
	if s == mesh.Completed {
		d.Share = mesh.Whole
	}
	return d
}
