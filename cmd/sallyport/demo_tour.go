package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

const (
	envTour = "DEMO_TOUR"

	// tourService is what the routes of billing begin with. What a trial does to
	// an instance must not have it put aside for the next.
	tourService = `service: billing
subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
outlier: {consecutive: 1000}
breaker: {consecutive: 1000}
retry_budget: {share: 100%}
balance: {policy: round_robin}
routes:
`
	// tourReads copies what payment reads to the next version.
	tourReads = `  - name: reads
    matches: [{method: GET, path: {prefix: /v1/charges}}]
    shadows:
      - name: next
        backend: {service: billing-next}
        share: 100%
        compare: true
        noise: {service: billing}
        archive: charges
`
	// tourTries gives each of two tries a quarter of a second.
	tourTries = `  - name: reads
    matches: [{method: GET, path: {prefix: /v1/charges}}]
    timeouts: {request: 5s, backend_request: 250ms}
    retry: {attempts: 1}
`
)

// tourCharges is the route of purchases, of which v1 and v2 have these parts.
func tourCharges(name, rest string) string {
	return fmt.Sprintf(`  - name: %s
    matches: [{method: POST, path: {prefix: /v1/charges}}]
    backends:
      - {subset: v1, weight: 1}
      - {subset: v2, weight: 0}
    sticky: {by: header, name: X-Customer}
    retry: {attempts: 0}
%s`, name, rest)
}

// tourSteps have the second version take over.
const tourSteps = `    rollout:
      canary: {subset: v2}
      steps: [{share: 20%, for: 1s}, {share: 60%, for: 1s}, {share: 100%, for: 1s}]
      # On a machine that does everything at once latency says nothing.
      judge: {window: 5s, min_requests: 20, errors: 15%, confidence: 95%, latency: {ratio: 0}}
`

// tour shows every use of a mesh, hurts the mesh, and asks of each promise
// whether it was kept. It takes at least span.
func tour(span time.Duration) *scenario {
	return &scenario{
		takes:     span,
		workloads: []demoWorkload{nextBilling},
		later:     []demoWorkload{secondBilling},
		prepare: func(d *demo) error {
			i := slices.IndexFunc(d.workloads, func(w demoWorkload) bool { return w.name == "inventory" })
			d.workloads[i].grpc = true
			d.give("web", envTour+"=1")
			return errors.Join(d.login(), d.keepArchive())
		},
		policies: func(d *demo) error {
			set, err := stockDescriptors()
			return errors.Join(err,
				d.admitShadow(),
				d.enrol("billing-2", "billing"),
				d.appendPolicy("access.csv", fmt.Sprintf(`p, pay-refund-1, in, spiffe://%[1]s/ns/shop/sa/payment, spiffe://%[1]s/ns/shop/sa/billing, 8443, POST, /v1/refunds, iss=%[2]s scope~refund, allow
p, web-stock-2, in, spiffe://%[1]s/ns/shop/sa/web, spiffe://%[1]s/ns/shop/sa/inventory, 8443, POST, %[3]s, -, allow
`, demoTrustDomain, demoLogin, stockMethod)),
				daemon.WriteFile(d.policyFile("tokens.yaml"), []byte(d.tokens), 0o600),
				daemon.WriteFile(d.policyFile("routes", "stock.binpb"), set, 0o600),
				daemon.WriteFile(d.policyFile("routes", "inventory.yaml"), []byte("service: inventory\nroutes:\n  - name: faces\n    translate: {to: grpc, descriptors: stock.binpb}\n"), 0o600),
				daemon.WriteFile(d.policyFile("routes", "billing.yaml"), []byte(breakerRoutes), 0o600),
			)
		},
		play: func(ctx context.Context, d *demo, v *verdicts) { d.playTour(ctx, v, time.Now().Add(span)) },
	}
}

func (d *demo) playTour(ctx context.Context, v *verdicts, end time.Time) {
	admin, err := control.DialAdmin(d.apiSocket())
	if err != nil {
		v.add("issuer answers", err)
		return
	}
	defer admin.Close()
	if !d.rec.await("web buy", 10, demoReadyWithin) {
		v.add("traffic flows", fmt.Errorf("no ten purchases in %s: %v", demoReadyWithin, d.rec.failures("web buy")))
		return
	}
	// First what callers notice.
	v.of(useBreaker)
	d.testBreaker(ctx, v)
	v.of(useFault)
	d.testFault(ctx, v, 4*time.Second)
	v.of(useNaming)
	d.testJoin(ctx, v)
	v.of(useProgressive)
	_, err = d.routes(ctx, tourService+tourReads+tourCharges("trial", tourSteps))
	v.add("a second version waits for its part", err)
	d.testBadCanary(ctx, v, "trial")
	// From here on no call may fail that should not.
	d.rec.begin()
	w := watchSVIDs(ctx, admin)
	v.of(usePolicy)
	d.testPolicyEdits(ctx, v, admin)
	v.of("")
	d.testIssuerLoss(ctx, v, admin)
	d.testVersions(ctx, v)
	d.testTries(ctx, v)
	v.of(useNaming)
	d.testLeave(v)
	for ctx.Err() == nil && (time.Now().Before(end) || time.Now().Before(end.Add(stepWithin)) && !w.all(d.proxies())) {
		d.rec.await("web buy", 1<<30, min(max(time.Until(end), 200*time.Millisecond), time.Second))
	}
	v.of(useSignals)
	v.add("latency, traffic, errors and saturation of billing are measured", d.signals(ctx))
	v.of(useTracing)
	d.testTrace(v)
	v.of(useMap)
	d.testMap(ctx, v, admin)
	d.testProbes(v)
	v.of(useMTLS)
	d.testRotation(v, w.stop())
	v.of(useCredentials)
	v.add("the record of a refund says in whose name it was asked for", d.recordedRefund())
	d.testAudit(v)
	v.judgeUseCases()
}

// testVersions moves purchases to the second version and back, while what
// payment reads is copied to the next one and archived.
func (d *demo) testVersions(ctx context.Context, v *verdicts) {
	_, err := d.routes(ctx, tourService+tourReads+tourCharges("charges", tourSteps))
	v.of(useCanary)
	v.add("the good one is to take over step by step", err)
	beside, done := newVerdicts(""), make(chan struct{})
	go func() {
		defer close(done)
		beside.of(useShadow)
		d.testShadow(ctx, beside, 50)
		d.testArchive(ctx, beside)
	}()
	d.testCanary(ctx, v, "charges")
	v.of(useProgressive)
	before := d.rec.get("web buy")
	took, err := d.routes(ctx, tourService+tourReads+tourCharges("charges", ""))
	if err == nil {
		err = errors.Join(d.allBy("v1"), d.noMoreFailed("web buy", before))
	}
	v.say("blue and green: one edit moves all purchases back, and none fails", took.Round(time.Millisecond).String(), err)
	<-done
	v.join(beside)
}

// testTries has one of two instances fail, and then hang: payment notices the
// time at most.
func (d *demo) testTries(ctx context.Context, v *verdicts) {
	v.of(useRetries)
	_, err := d.routes(ctx, tourService+tourTries+tourCharges("charges", ""))
	for _, c := range []struct {
		promise string
		calls   int64
		m       manners
	}{
		{"what one instance answers with 503 is asked of the other", 10, manners{Status: http.StatusServiceUnavailable}},
		{"what hangs is given up after its time, and asked of the other", 3, manners{Hang: true}},
	} {
		before := d.rec.get("payment read")
		var first, now int64
		if err == nil {
			first, err = d.behave(ctx, "billing-2", c.m)
		}
		if err == nil {
			err = until(ctx, "enough calls come to it", func() (bool, error) {
				now, err = d.behave(ctx, "billing-2", c.m)
				return now >= first+c.calls, err
			})
		}
		if err == nil {
			err = d.noMoreFailed("payment read", before)
		}
		v.say(c.promise, fmt.Sprintf("%d times, and no call failed", now-first), err)
	}
	_, err = d.behave(ctx, "billing-2", manners{})
	v.add("it comes back", err)
}

// testJoin starts a second instance of billing, which is called by its name.
func (d *demo) testJoin(ctx context.Context, v *verdicts) {
	// The first call may come before the demo has seen that it is ready, and the
	// next one late: by what the first took it is the slower one.
	const read = "payment read by v2"
	start, before := time.Now(), d.rec.get(read).OK
	err := d.join(ctx, "billing-2")
	ready := time.Now()
	if err == nil && !d.rec.awaitThat(stepWithin, func() bool { return d.rec.get(read).OK > before }) {
		err = fmt.Errorf("no call came to it: %+v", d.rec.failures("payment read"))
	}
	v.say("a second billing is called by the same name as soon as it is there",
		fmt.Sprintf("ready after %s, called %s later", ready.Sub(start).Round(time.Millisecond), time.Since(ready).Round(time.Millisecond)), err)
}

// testLeave ends it again under traffic.
func (d *demo) testLeave(v *verdicts) {
	before := d.rec.get("payment read")
	err := d.leave("billing-2")
	if err == nil && !d.rec.await("payment read by v1", 50, stepWithin) {
		err = errors.New("no calls come to the one that is left")
	}
	if err == nil {
		err = d.noMoreFailed("payment read", before)
	}
	v.add("when it leaves, no call to billing fails", err)
}

// testTrace looks at what the programs were told of one purchase.
func (d *demo) testTrace(v *verdicts) {
	seen := d.rec.get("web buy").Last.Seen
	err := fmt.Errorf("billing and payment were told %q", seen)
	traces, spans := map[string]bool{}, map[string]bool{}
	for _, s := range seen {
		if f := strings.Split(s, "-"); len(f) == 4 {
			traces[f[1]], spans[f[2]] = true, true
		}
	}
	if len(seen) == 2 && len(traces) == 1 && len(spans) == 2 {
		err = nil
	}
	v.say("a purchase is one trace, with a span for each hop", strings.Join(seen, " "), err)
	n, err := d.recorded("payment", func(r audit.Record) bool { return r.Decision == audit.Deny && len(r.Trace) == 32 })
	if err == nil && n == 0 {
		err = errors.New("no denial has one")
	}
	v.say("the record of a denial names its trace", fmt.Sprintf("%d records", n), err)
}

// testMap asks the issuer who calls whom.
func (d *demo) testMap(ctx context.Context, v *verdicts, admin *control.Admin) {
	var edges []mesh.Edge
	drawn := func(src, dst string, good func(mesh.Edge) bool) bool {
		return slices.ContainsFunc(edges, func(e mesh.Edge) bool {
			return path.Base(e.Src) == src && path.Base(e.Dst) == dst && e.MTLS && good(e)
		})
	}
	allowed := func(e mesh.Edge) bool { return e.Allowed > 0 }
	err := until(ctx, "the issuer's map has every edge", func() (bool, error) {
		got, err := admin.Edges(ctx, time.Time{}, time.Time{})
		edges = got.Edges
		return drawn("web", "payment", allowed) && drawn("payment", "billing", allowed) &&
			drawn("batch", "billing", func(e mesh.Edge) bool { return e.Denied > 0 }), err
	})
	v.say("the map has who calls whom, over mutual TLS, and what was refused", fmt.Sprintf("%d edges", len(edges)), err)
}

// recordedRefund looks for the one refund that was recorded whole, and for those
// that were refused.
func (d *demo) recordedRefund() error {
	inName, err := d.recorded("billing", func(r audit.Record) bool {
		return r.Rule == "pay-refund-1" && r.Decision == audit.Allow && strings.Contains(r.Detail, "alice")
	})
	if err != nil {
		return err
	}
	forged, err := d.recorded("billing", func(r audit.Record) bool { return r.Reason == "token_signature" })
	if err == nil && (inName == 0 || forged == 0) {
		err = fmt.Errorf("%d records in the name of alice, %d of forged tokens", inName, forged)
	}
	return err
}

// signals looks for the golden signals of billing, by what its sidecar counts.
func (d *demo) signals(ctx context.Context) error {
	for _, m := range []struct{ metric, label string }{
		{"sallyport_request_duration_seconds_count", `class="2xx"`},
		{"sallyport_requests_total", `code="200"`},
		{"sallyport_requests_total", `code="403"`},
	} {
		n, err := d.metric(ctx, "billing", m.metric, m.label)
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("%s{%s} counts nothing", m.metric, m.label)
		}
	}
	_, err := d.metric(ctx, "billing", "sallyport_inflight", "")
	return err
}

// metric adds up the series of a metric that have a label.
func (d *demo) metric(ctx context.Context, name, metric, label string) (sum float64, err error) {
	_, body, err := askAdmin(ctx, 10*time.Second, http.MethodGet, d.adminSocket(name), "/metrics")
	if err != nil {
		return 0, err
	}
	found := false
	for line := range strings.Lines(string(body)) {
		series, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "} ")
		if !ok || !strings.HasPrefix(series, metric+"{") || !strings.Contains(series, label) {
			continue
		}
		n, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", series, err)
		}
		sum, found = sum+n, true
	}
	if !found {
		err = fmt.Errorf("%s has no %s{%s}", name, metric, label)
	}
	return sum, err
}
