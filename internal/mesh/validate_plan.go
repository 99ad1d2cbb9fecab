package mesh

import (
	"cmp"
	"slices"
	"time"
)

// Bounds of a plan.
const (
	maxSteps  = 100
	maxStep   = 7 * 24 * time.Hour
	maxWindow = time.Hour
)

// plan checks how the calls of a route move to its canary.
func (c *routeChecker) plan(r *Route) {
	p := r.Plan
	if p == nil || c.tcp || r.Redirect != nil || r.Respond != nil { // which fits refuses
		return
	}
	if c.file.Host != "" {
		c.say("rollout:", "rollout: %s is no service of the mesh", c.file.Host)
		return
	}
	canary := r.canaryOf(c.file.Service)
	rest := uint64(0)
	for i, b := range r.Backends {
		if b.Priority != r.Backends[0].Priority {
			c.say("rollout:", "rollout: the backends have priorities, which shares do not know")
			break
		}
		if i != canary {
			rest += uint64(b.Weight)
		}
	}
	switch {
	case p.Canary == (Ref{}):
		c.say("rollout:", "rollout: canary is missing: which of the backends? name its subset or service")
	case canary < 0:
		c.say("canary:", "rollout: canary %s is none of the backends of the route: write it there, with weight: 0", c.nameOf(Backend{Service: p.Canary.Service, Subset: p.Canary.Subset}))
	case rest == 0:
		c.say("backends:", "rollout: no backend but the canary has a weight: there is nothing to compare it with, or to go back to")
	}
	c.steps(p.Steps)
	c.judging(p.Judge)
}

func (c *routeChecker) steps(steps []Step) {
	if len(steps) == 0 {
		c.say("rollout:", "rollout: steps are missing: a list of share and for, the last one with share: 100%%")
		return
	}
	if len(steps) > maxSteps {
		c.say("steps:", "rollout: %d steps are more than %d", len(steps), maxSteps)
	}
	for i, s := range steps {
		switch {
		case s.Share == 0:
			c.say("steps:", "rollout: step %d has no share", i+1)
		case i > 0 && s.Share <= steps[i-1].Share:
			c.say("steps:", "rollout: step %d has a share of %s after %s: shares rise", i+1, s.Share, steps[i-1].Share)
		}
		if s.For == 0 {
			c.say("steps:", "rollout: step %d: for is missing: how long at least?", i+1)
		}
		within(c, "rollout.for", s.For, 0, maxStep)
	}
	if last := steps[len(steps)-1]; last.Share != Whole {
		c.say("steps:", "rollout: the last step has a share of %s: write 100%%, where the canary has all calls", last.Share)
	} else if last.Gate {
		c.say("gate:", "rollout: a gate at the last step keeps nothing back: write it at the step before")
	}
}

func (c *routeChecker) judging(j Judging) {
	j = j.WithDefaults()
	within(c, "judge.window", j.Window, time.Second, maxWindow)
	within(c, "judge.min_requests", j.Minimum, 10, 1_000_000)
	within(c, "judge.patience", j.Patience, time.Second, maxStep)
	if j.Confidence < 80_00 || j.Confidence > 99_99 {
		c.say("confidence:", "judge.confidence: %s is not from 80%% to 99.99%%", j.Confidence)
	}
	if j.Errors > 50_00 {
		c.say("errors:", "judge.errors: %s is more than 50%%: half of all calls may not fail more", j.Errors)
	}
	if q := j.Latency.Quantile; q < 50_00 || q > 99_90 {
		c.say("quantile:", "judge.latency.quantile: %s is not from 50%% to 99.9%%", q)
	}
	// Written so that what is not a number is out of range too.
	if r := j.Latency.Ratio; r != 0 && !(r >= 1.05 && r <= 100) {
		c.say("ratio:", "judge.latency.ratio: %v is neither 0 nor from 1.05 to 100", r)
	}
}

// shares checks that each is of a route that has a plan.
func (v *validator) shares(list []CanaryShare) {
	for i, s := range list {
		ok := s.Share <= Whole && (i == 0 || compareShares(list[i-1], s) < 0)
		ok = ok && slices.ContainsFunc(v.p.Routes, func(f Routes) bool {
			return f.Service == s.Service && s.Service != "" && slices.ContainsFunc(f.Routes, func(r Route) bool { return r.Name == s.Route && r.Plan != nil })
		})
		if !ok {
			v.errs = append(v.errs, &Problem{Msg: "the share of the canary of " + clip(cmp.Or(string(s.Service), "nobody")) + "/" + clip(s.Route) + " is out of place: no such route has a rollout, or it is written twice"})
		}
	}
}
