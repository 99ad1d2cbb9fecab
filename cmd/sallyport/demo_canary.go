package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// canaryRoutes keep customers on the version that they have come to, and say by
// what steps the second one takes over, and by what it is judged.
const canaryRoutes = `service: billing
subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
routes:
  - name: charges
    backends:
      - {subset: v1, weight: 1}
      - {subset: v2, weight: 0}
    sticky: {by: header, name: X-Customer}
    retry: {attempts: 0}
    rollout:
      canary: {subset: v2}
      steps: [{share: 20%, for: 2s}, {share: 60%, for: 2s}, {share: 100%, for: 1s}]
      # On a machine that does everything at once latency says nothing.
      judge: {window: 5s, min_requests: 20, errors: 15%, confidence: 95%, latency: {ratio: 0}}
`

// secondBilling is version 2 of billing, under the same identity.
var secondBilling = demoWorkload{
	name: "billing-2", serves: true, config: "workload:\n  labels: version=v2\n", env: []string{envVersion + "=v2"},
}

// canaried is what both stories need: a second instance of billing, of version 2.
func canaried(name, about string, play func(context.Context, *demo, *verdicts)) scenario {
	return scenario{
		name: name, about: about, play: play,
		workloads: []demoWorkload{secondBilling},
		policies: func(d *demo) error {
			return errors.Join(
				d.enrol("billing-2", "billing"),
				daemon.WriteFile(d.policyFile("routes", "billing.yaml"), []byte(canaryRoutes), 0o600),
			)
		},
	}
}

// rollout runs a command about the rollout of a route of billing, on the issuer
// of the demo.
func (d *demo) rollout(ctx context.Context, route string, args ...string) (string, error) {
	return d.operator(ctx, append(append([]string{"rollout"}, args...), "billing/"+route, "--socket", d.apiSocket())...)
}

// awaitDelivery waits until the rollout of a route is in that state, and every
// proxy acts on it.
func (d *demo) awaitDelivery(ctx context.Context, route string, state mesh.DeliveryState) error {
	admin, err := control.DialAdmin(d.apiSocket())
	if err != nil {
		return err
	}
	defer admin.Close()
	return until(ctx, "the rollout is "+string(state)+" everywhere", func() (bool, error) {
		list, err := admin.Rollouts(ctx)
		return slices.ContainsFunc(list, func(r mesh.Delivery) bool {
			return r.Route == route && r.State == state && r.Proxies > 0 && r.Acked == r.Proxies
		}), err
	})
}

// allBy waits for purchases, all of which must be by one version. Those under
// way do not count.
func (d *demo) allBy(version string) error {
	if !d.rec.await("web buy by "+version, 3, stepWithin) {
		return fmt.Errorf("no purchases were by %s: %+v", version, d.rec.failures("web buy"))
	}
	all, by := d.rec.get("web buy"), d.rec.get("web buy by "+version)
	d.rec.await("web buy by "+version, 50, stepWithin)
	all2, by2 := d.rec.get("web buy"), d.rec.get("web buy by "+version)
	if n, m := all2.OK+all2.Failed-all.OK-all.Failed, by2.OK-by.OK; m < 50 || n > m+1 { // one may come between two looks
		return fmt.Errorf("%d of %d purchases were by %s", m, n, version)
	}
	return nil
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

// canaryScenario: version 2 takes over step by step, and no purchase fails.
func canaryScenario() scenario {
	return canaried("canary", "a good version takes over step by step", func(ctx context.Context, d *demo, v *verdicts) {
		d.testCanary(ctx, v, "charges")
	})
}

func (d *demo) testCanary(ctx context.Context, v *verdicts, route string) {
	bought, came := d.rec.get("web buy"), d.rec.get("web buy by v2").OK
	var err error
	if came > 0 {
		err = fmt.Errorf("%d purchases were by it", came)
	}
	v.say("before it starts nobody is on version 2", fmt.Sprintf("%d purchases", bought.OK), err)
	moved := map[string]bool{} // customers that are on version 2
	back := 0
	stop := d.rec.listen(func(e demoEvent) {
		switch {
		case e.Probe != "buy" || !e.OK:
		case e.By == "v2":
			moved[e.For] = true
		case moved[e.For]:
			back++
		}
	})
	out, err := d.rollout(ctx, route, "start", "--watch", "--timeout", "1m")
	if err == nil {
		err = d.awaitDelivery(ctx, route, mesh.Completed)
	}
	v.say("its share grows by the steps until it has all", lastLine(out), err)
	v.add("then all purchases are by version 2", d.allBy("v2"))
	stop()
	if err = nil; back > 0 {
		err = fmt.Errorf("%d purchases of customers that were on version 2 went to version 1", back)
	}
	v.say("no customer was moved back on the way", fmt.Sprintf("%d customers", len(moved)), err)
	v.add("no purchase failed", d.noMoreFailed("web buy", bought))
}

// noMoreFailed says what of a probe has failed since it was counted.
func (d *demo) noMoreFailed(key string, before probeTally) error {
	if n := d.rec.get(key).Failed - before.Failed; n > 0 {
		return fmt.Errorf("%d calls failed: %+v", n, d.rec.failures(key))
	}
	return nil
}

// badCanaryScenario: version 2 fails, and all customers are taken from it at
// once, by nobody's hand.
func badCanaryScenario() scenario {
	return canaried("bad-canary", "a bad version is rolled back by itself", func(ctx context.Context, d *demo, v *verdicts) {
		d.testBadCanary(ctx, v, "charges")
	})
}

func (d *demo) testBadCanary(ctx context.Context, v *verdicts, route string) {
	failed := d.rec.get("web buy").Failed
	_, err := d.behave(ctx, "billing-2", manners{Status: http.StatusInternalServerError})
	out := ""
	if err == nil {
		out, err = d.rollout(ctx, route, "start", "--watch", "--timeout", "1m")
	}
	if err == nil {
		err = d.awaitDelivery(ctx, route, mesh.RolledBack)
	}
	v.say("it is rolled back by itself", lastLine(out), err)
	v.add("afterwards no purchase comes to it", d.allBy("v1"))
	hurt := d.rec.get("web buy").Failed - failed
	v.Figures["purchases_failed"] = float64(hurt)
	_, err = d.behave(ctx, "billing-2", manners{})
	v.say("few customers have noticed", fmt.Sprintf("%d purchases failed", hurt), err)
}
