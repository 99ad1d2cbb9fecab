package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sallyport/internal/audit"
)

// faultRoutes make one fault in billing's place for half of payment's calls.
func faultRoutes(span time.Duration) string {
	now := time.Now().UTC()
	return fmt.Sprintf(`service: billing
routes:
  - name: all
    retry: {attempts: 0}
    faults:
      - name: trial
        share: 50%%
        status: 503
        since: %s
        until: %s
        callers: [spiffe://%s/ns/shop/sa/payment]
breaker: {consecutive: 1000, success: 1%%}
`, now.Add(-time.Minute).Format(time.RFC3339), now.Add(span).Format(time.RFC3339), demoTrustDomain)
}

// faultScenario: half of payment's calls fail for some seconds, by the policy's
// will, and then none; a second fault is stopped by hand.
func faultScenario() scenario {
	return scenario{
		name: "fault", about: "a fault is made, ends by itself, and can be stopped",
		play: func(ctx context.Context, d *demo, v *verdicts) {
			fault := func() int { return d.rec.get("payment read by fault").Failed }
			well := func() int { return d.rec.get("payment read by v1").OK }
			took, err := d.routes(ctx, faultRoutes(8*time.Second))
			v.say("a fault reaches every proxy", took.Round(time.Millisecond).String(), err)

			was, ok := fault(), well()
			if !d.rec.awaitThat(stepWithin, func() bool { return fault()-was >= 20 && well()-ok >= 20 }) && err == nil {
				err = errors.New("there were not twenty of both within its time")
			}
			v.Figures["calls_touched"], v.Figures["calls_untouched"] = float64(fault()-was), float64(well()-ok)
			v.say("half of payment's calls are answered by it", fmt.Sprintf("%d, and %d are not", fault()-was, well()-ok), err)
			v.add("its beginning is recorded", d.awaitRecord(ctx, "payment", isFault("fault_begun")))
			v.add("at its time it ends by itself, and that is recorded", d.awaitRecord(ctx, "payment", isFault("fault_ended")))
			v.add("afterwards no call fails", d.noneBy(fault, well))

			_, err = d.routes(ctx, faultRoutes(time.Hour))
			was = fault()
			if err == nil && !d.rec.awaitThat(stepWithin, func() bool { return fault() > was }) {
				err = errors.New("no call was touched")
			}
			if err == nil {
				_, err = d.operator(ctx, "fault", "stop", "billing/all/trial", "--socket", d.apiSocket())
			}
			if err == nil {
				err = d.noneBy(fault, well)
			}
			v.say("one word stops another that would last an hour", "", err)
		},
	}
}

// noneBy waits for calls that go well, and lets none be touched by a fault but
// one that was under way.
func (d *demo) noneBy(fault, well func() int) error {
	start := well()
	d.rec.awaitThat(stepWithin, func() bool { return well() > start })
	was, start := fault(), well()
	if !d.rec.awaitThat(stepWithin, func() bool { return well() >= start+50 }) {
		return fmt.Errorf("no fifty calls went well: %+v", d.rec.failures("payment read"))
	}
	if n := fault() - was; n > 0 {
		return fmt.Errorf("%d calls were touched", n)
	}
	return nil
}

// awaitRecord waits until a proxy's audit log has a record.
func (d *demo) awaitRecord(ctx context.Context, name string, wanted func(audit.Record) bool) error {
	return until(ctx, "it is recorded", func() (bool, error) {
		n, err := d.recorded(name, wanted)
		return n > 0, err
	})
}

// isFault is for the records of faults with a reason.
func isFault(reason string) func(audit.Record) bool {
	return func(r audit.Record) bool { return r.Reason == reason }
}
