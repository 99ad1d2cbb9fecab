package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sallyport/internal/archive"
	"sallyport/internal/audit"
	"sallyport/internal/daemon"
	"sallyport/internal/shadow"
)

// shadowRoutes copy what payment reads of billing to the next version of it.
const shadowRoutes = `service: billing
routes:
  - name: charges
    matches: [{path: {prefix: /v1/charges}}]
    shadows:
      - name: next
        backend: {service: billing-next}
        share: 100%
        compare: true
        noise: {service: billing}
        archive: charges
`

// shadowTimeout is how long a copy may take.
const shadowTimeout = time.Second

// archivesConfig keeps an archive of them, for an auditor.
const archivesConfig = `shadow: {timeout: %s}
archives:
  charges:
    recipients: [%s]
    rotate_after: 1s
    redact: {json: [card]}
`

// auditorKey is the file of the auditor's private key, which no proxy has.
func (d *demo) auditorKey() string { return filepath.Join(d.dir, "auditor.txt") }

func (d *demo) archiveDir() string { return filepath.Join(d.dir, "payment", "archives", "charges") }

// nextBilling is a version of billing that is nothing but a shadow.
var nextBilling = demoWorkload{
	name: "billing-next", serves: true, config: "shadow: {only: true}\n", env: []string{envVersion + "=next"},
}

// withShadow is what both stories need.
func withShadow(name, about string, play func(context.Context, *demo, *verdicts)) scenario {
	return scenario{
		name: name, about: about, play: play,
		workloads: []demoWorkload{nextBilling},
		prepare:   (*demo).keepArchive,
		policies: func(d *demo) error {
			return errors.Join(d.admitShadow(), daemon.WriteFile(d.policyFile("routes", "billing.yaml"), []byte(shadowRoutes), 0o600))
		},
	}
}

// keepArchive has payment's sidecar keep an archive for an auditor.
func (d *demo) keepArchive() error {
	public, err := archive.NewAuditor(d.auditorKey())
	if err != nil {
		return err
	}
	i := slices.IndexFunc(d.workloads, func(w demoWorkload) bool { return w.name == "payment" })
	d.workloads[i].config += fmt.Sprintf(archivesConfig, shadowTimeout, public)
	return nil
}

// admitShadow makes the next version of billing a service that payment may read.
func (d *demo) admitShadow() error {
	return errors.Join(
		d.enrol("billing-next", "billing-next"),
		d.appendPolicy("services.yaml", fmt.Sprintf("  - {name: billing-next, identity: spiffe://%s/ns/shop/sa/billing-next, port: 8443, protocol: http}\n", demoTrustDomain)),
		d.appendPolicy("access.csv", fmt.Sprintf("p, pay-next-1, in, spiffe://%[1]s/ns/shop/sa/payment, spiffe://%[1]s/ns/shop/sa/billing-next, 8443, GET, /v1/charges/**, -, allow\n", demoTrustDomain)),
	)
}

// shadowScenario: a next version gets copies, and what it would answer
// otherwise is found; that it hangs changes nothing for anybody.
func shadowScenario() scenario {
	return withShadow("shadow", "a next version gets copies, what differs is shown, that it hangs harms nobody", func(ctx context.Context, d *demo, v *verdicts) {
		d.testShadow(ctx, v, 100)
	})
}

// testShadow looks at n calls before the shadow hangs, and at n while it does.
func (d *demo) testShadow(ctx context.Context, v *verdicts, n int) {
	var got map[string]string
	err := until(ctx, "the report knows what differs and what is noise", func() (bool, error) {
		var err error
		got, err = d.differences(ctx)
		return got["body.amount"] == "differs" && got["body.asked"] == "noise", err
	})
	v.say("what the next version answers otherwise is found, noise is told apart", fmt.Sprint(got), err)

	calm := d.timed("payment read", n)
	came, err := d.behave(ctx, "billing-next", manners{Hang: true})
	if err == nil && came == 0 {
		err = errors.New("no copy came")
	}
	before := d.rec.get("payment read")
	hung := d.timed("payment read", n)
	if err == nil {
		err = d.noMoreFailed("payment read", before)
	}
	if err == nil && hung >= shadowTimeout {
		err = fmt.Errorf("a call takes %s as long as it hangs, %s before", hung, calm)
	}
	v.Figures["calm_ms"], v.Figures["hung_ms"] = float64(calm.Microseconds())/1000, float64(hung.Microseconds())/1000
	v.say("that it hangs changes nothing for anybody", fmt.Sprintf("a call took %s before, and %s while it hangs", calm.Round(time.Microsecond), hung.Round(time.Microsecond)), err)
	if _, err := d.behave(ctx, "billing-next", manners{}); err != nil {
		v.add("it comes back", err)
	}
}

// differences are the verdicts on fields, by field.
func (d *demo) differences(ctx context.Context) (map[string]string, error) {
	var r shadow.Report
	if err := askProxy(ctx, d.adminSocket("payment"), "shadow", &r); err != nil {
		return nil, err
	}
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	var told struct {
		Endpoints []struct {
			Fields []struct{ Field, Verdict string }
		}
	}
	if err := json.Unmarshal(b, &told); err != nil {
		return nil, err
	}
	got := map[string]string{}
	for _, e := range told.Endpoints {
		for _, f := range e.Fields {
			got[f.Field] = f.Verdict
		}
	}
	return got, nil
}

// timed is the median of how long the next n calls of a probe take.
func (d *demo) timed(key string, n int) time.Duration {
	var took []time.Duration
	stop := d.rec.listen(func(e demoEvent) {
		if e.App+" "+e.Probe == key {
			took = append(took, e.Took)
		}
	})
	d.rec.await(key, n, stepWithin)
	stop()
	slices.Sort(took)
	return append(took, 0)[len(took)/2]
}

// archiveScenario: copies are kept for an auditor, who alone can read them, and
// made again.
func archiveScenario() scenario {
	return withShadow("archive", "copies are kept for an auditor, checked, decrypted and made again", func(ctx context.Context, d *demo, v *verdicts) {
		d.testArchive(ctx, v)
	})
}

func (d *demo) testArchive(ctx context.Context, v *verdicts) {
	dir, key := d.archiveDir(), d.auditorKey()
	v.add("the archive grows by closed segments", until(ctx, "there are a hundred records in closed segments", func() (bool, error) {
		out, err := d.operator(ctx, "archive", "list", dir, "-o", "json")
		var segments []struct{ Records int }
		if err == nil {
			err = json.Unmarshal([]byte(out), &segments)
		}
		n := 0
		for _, s := range segments {
			n += s.Records
		}
		return n >= 100, err
	}))
	var signer, out string
	err := until(ctx, "the audit log tells who signs the archive", func() (bool, error) {
		var err error
		signer, err = d.archiveSigner()
		return signer != "", err
	})
	if err == nil {
		_, err = d.operator(ctx, "archive", "verify", dir, "--key", signer)
	}
	v.say("it verifies by the key that stands in the audit log", "", err)

	records, err := d.operator(ctx, "archive", "decrypt", dir, "-i", key)
	n := strings.Count(records, "\n")
	switch {
	case err != nil:
	case n == 0:
		err = errors.New("nothing was in it")
	case strings.Contains(records, "4000-0000"):
		err = errors.New("the number of a card is in it")
	case !strings.Contains(records, "100.00"):
		err = errors.New("the next version's answers are not in it")
	}
	v.say("the auditor's key reads it, and no card is in it", fmt.Sprintf("%d records", n), err)
	v.Figures["records"] = float64(n)

	before, err := d.behave(ctx, "billing-next", manners{})
	if err == nil {
		_, err = d.operator(ctx, "archive", "replay", dir, "-i", key, "--target", "http://"+d.app["billing-next"].String(), "--count", "20", "--rate", "50")
	}
	after, e := d.behave(ctx, "billing-next", manners{})
	if err = errors.Join(err, e); err == nil && after-before < 20 {
		err = fmt.Errorf("%d calls came", after-before)
	}
	v.say("the calls in it are made again", fmt.Sprintf("%d calls", after-before), err)
	out, err = d.operator(ctx, "archive", "diff", dir, "-i", key)
	if err == nil && !strings.Contains(out, "body.amount") {
		err = fmt.Errorf("the amount does not show: %.300s", out)
	}
	v.say("and what differs is found in it, too", "", err)
}

// archiveSigner is the key that signs the archive, as the audit log has it; ""
// as long as it has not.
func (d *demo) archiveSigner() (signer string, err error) {
	_, err = d.recorded("payment", func(r audit.Record) bool {
		if _, k, ok := strings.Cut(r.Detail, "head by "); ok && r.Kind == audit.KindArchive {
			signer, _, _ = strings.Cut(k, " ")
		}
		return false
	})
	return signer, err
}
