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
breaker: {consecutive: 1000}
`, now.Add(-time.Minute).Format(time.RFC3339), now.Add(span).Format(time.RFC3339), demoTrustDomain)
}

// faultScenario: half of payment's calls fail for some seconds, by the policy's
// will, and then none; a second fault is stopped by hand.
func faultScenario() scenario {
	return scenario{
		name: "fault", about: "a fault is made, ends by itself, and can be stopped",
		play: func(ctx context.Context, d *demo, v *verdicts) {
			d.testFault(ctx, v, 8*time.Second)
			d.testFaultStop(ctx, v)
		},
	}
}

// touched counts what payment read that a fault of ours answered, and well what
// billing did.
func (d *demo) touched() int { return d.rec.get("payment read by fault").Failed }

func (d *demo) well() int { return d.rec.get("payment read by v1").OK }

// testFault makes a fault that ends by itself after span.
func (d *demo) testFault(ctx context.Context, v *verdicts, span time.Duration) {
	took, err := d.routes(ctx, faultRoutes(span))
	v.say("a fault reaches every proxy", took.Round(time.Millisecond).String(), err)

	was, ok := d.touched(), d.well()
	if !d.rec.awaitThat(stepWithin, func() bool { return d.touched()-was >= 5 && d.well()-ok >= 5 }) && err == nil {
		err = errors.New("there were not five of both within its time")
	}
	v.Figures["calls_touched"], v.Figures["calls_untouched"] = float64(d.touched()-was), float64(d.well()-ok)
	v.say("half of payment's calls are answered by it", fmt.Sprintf("%d, and %d are not", d.touched()-was, d.well()-ok), err)
	v.add("its beginning is recorded", d.awaitRecord(ctx, "payment", isFault("fault_begun")))
	v.add("at its time it ends by itself, and that is recorded", d.awaitRecord(ctx, "payment", isFault("fault_ended")))
	v.add("afterwards no call fails", d.noneTouched())
}

// testFaultStop ends a fault by a word of the operator.
func (d *demo) testFaultStop(ctx context.Context, v *verdicts) {
	_, err := d.routes(ctx, faultRoutes(time.Hour))
	was := d.touched()
	if err == nil && !d.rec.awaitThat(stepWithin, func() bool { return d.touched() > was }) {
		err = errors.New("no call was touched")
	}
	if err == nil {
		_, err = d.operator(ctx, "fault", "stop", "billing/all/trial", "--socket", d.apiSocket())
	}
	if err == nil {
		err = d.noneTouched()
	}
	v.say("one word stops another that would last an hour", "", err)
}

// noneTouched waits for calls that go well, and lets none be touched by a fault but
// one that was under way.
func (d *demo) noneTouched() error {
	start := d.well()
	d.rec.awaitThat(stepWithin, func() bool { return d.well() > start })
	was, start := d.touched(), d.well()
	if !d.rec.awaitThat(stepWithin, func() bool { return d.well() >= start+50 }) {
		return fmt.Errorf("no fifty calls went well: %+v", d.rec.failures("payment read"))
	}
	if n := d.touched() - was; n > 0 {
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
