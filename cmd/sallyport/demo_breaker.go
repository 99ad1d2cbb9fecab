package main

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"sallyport/internal/daemon"
	"sallyport/internal/upstream"
)

// breakerRoutes cut billing off quickly, and try it again quickly.
const breakerRoutes = `service: billing
breaker: {consecutive: 5, open: 1s, max_open: 2s}
`

// breakerScenario: billing fails, is cut off, and is called again once it is well.
func breakerScenario() scenario {
	return scenario{
		name: "breaker", about: "a failing service is cut off and taken back",
		policies: func(d *demo) error {
			return daemon.WriteFile(d.policyFile("routes", "billing.yaml"), []byte(breakerRoutes), 0o600)
		},
		play: func(ctx context.Context, d *demo, v *verdicts) { d.testBreaker(ctx, v) },
	}
}

func (d *demo) testBreaker(ctx context.Context, v *verdicts) {
	before, err := d.behave(ctx, "billing", manners{Status: http.StatusInternalServerError})
	if err == nil && !d.rec.awaitThat(stepWithin, func() bool { return d.rec.get("payment read by circuit_open").Failed > 0 }) {
		err = fmt.Errorf("no call was refused with circuit_open: %+v", d.rec.failures("payment read"))
	}
	v.say("a service that keeps failing is cut off", "", err)

	var ts []upstream.Trouble
	err = until(ctx, "payment's sidecar holds an open breaker against billing", func() (bool, error) {
		ts = nil
		err := askProxy(ctx, d.adminSocket("payment"), "troubles", &ts)
		for _, t := range ts {
			if t.Kind == upstream.Open && t.Service == "billing" {
				return true, err
			}
		}
		return false, err
	})
	v.say("the sidecar says since when and why", fmt.Sprintf("%d troubles, %s", len(ts), whyOf(ts)), err)

	d.testOpen(ctx, v, before)

	_, err = d.behave(ctx, "billing", manners{})
	start := time.Now()
	if err == nil && !d.rec.await("web buy", 20, stepWithin) {
		err = fmt.Errorf("no purchases after billing was well: %+v", d.rec.failures("web buy"))
	}
	v.say("one good call closes it again", "20 purchases within "+time.Since(start).Round(time.Millisecond).String(), err)
	v.add("and nothing is held against it", until(ctx, "no trouble is left", func() (bool, error) {
		ts = nil
		err := askProxy(ctx, d.adminSocket("payment"), "troubles", &ts)
		return len(ts) == 0, err
	}))
}

func whyOf(ts []upstream.Trouble) string {
	for _, t := range ts {
		if t.Kind == upstream.Open {
			return t.Why
		}
	}
	return ""
}

// testOpen compares what was asked while the breaker was open with what came.
func (d *demo) testOpen(ctx context.Context, v *verdicts, before int64) {
	refused := d.rec.get("payment read by circuit_open").Failed
	var err error
	if !d.rec.awaitThat(stepWithin, func() bool { return d.rec.get("payment read by circuit_open").Failed >= refused+100 }) {
		err = fmt.Errorf("only %d calls were refused", d.rec.get("payment read by circuit_open").Failed-refused)
	}
	came, e := d.behave(ctx, "billing", manners{Status: http.StatusInternalServerError})
	v.Figures["calls_refused"] = float64(d.rec.get("payment read by circuit_open").Failed)
	v.Figures["calls_reached"] = float64(came - before)
	if err == nil && e == nil && came-before > 60 {
		err = fmt.Errorf("%d calls reached it all the same", came-before)
	}
	v.say("while it is open, single calls only find out", fmt.Sprintf("%.0f refused at once, %d reached billing", v.Figures["calls_refused"], came-before), err)
}
