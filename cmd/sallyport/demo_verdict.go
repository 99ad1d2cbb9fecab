package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"context"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// A verdict says whether one promise was kept.
type verdict struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
	// UseCase is the use of a mesh that the promise belongs to, if to one.
	UseCase string `json:"use_case,omitempty"`
}

// verdicts is the outcome of a bounded check, in the form every check prints.
type verdicts struct {
	Name  string `json:"name"`
	OK    bool   `json:"ok"`
	Cases struct {
		Tried   int `json:"tried"`
		Passed  int `json:"passed"`
		Failed  int `json:"failed"`
		Skipped int `json:"skipped"`
	} `json:"cases"`
	Figures  map[string]float64 `json:"figures,omitempty"`
	UseCases []useCase          `json:"use_cases,omitempty"`
	Verdicts []verdict          `json:"verdicts"`

	use string // what is shown now
}

func newVerdicts(name string) *verdicts {
	return &verdicts{Name: name, OK: true, Figures: map[string]float64{}}
}

// add records a promise: kept when err is nil.
func (v *verdicts) add(name string, err error) { v.say(name, "", err) }

func (v *verdicts) say(name, detail string, err error) {
	v.Cases.Tried++
	if err != nil {
		v.OK = false
		v.Cases.Failed++
		detail = err.Error()
	} else {
		v.Cases.Passed++
	}
	v.Verdicts = append(v.Verdicts, verdict{Name: name, OK: err == nil, Detail: detail, UseCase: v.use})
}

// print writes the verdicts for people or as one line of JSON, and returns an
// error with the exit code of a failed check unless every promise was kept.
func (v *verdicts) print(w io.Writer, asJSON bool) error {
	if asJSON {
		if err := json.NewEncoder(w).Encode(v); err != nil {
			return err
		}
	} else {
		for _, x := range v.Verdicts {
			mark := "kept  "
			if !x.OK {
				mark = "BROKEN"
			}
			fmt.Fprintf(w, "  %s  %-45s %s\n", mark, x.Name, x.Detail)
		}
		for _, u := range v.UseCases {
			mark := "shown "
			if !u.OK {
				mark = "BROKEN"
			}
			fmt.Fprintf(w, "  %s  %-25s %d promises\n", mark, u.Name, u.Promises)
		}
	}
	if !v.OK {
		return &daemon.ExitError{Code: daemon.Failed, Err: fmt.Errorf("%d of %d promises broken", v.Cases.Failed, v.Cases.Tried)}
	}
	return nil
}

// testProbes judges what the programs saw while they ran.
func (d *demo) testProbes(v *verdicts) {
	for _, p := range []struct {
		use, promise string
		probes       []string
	}{
		{useAccess, "payment may POST /v1/charges on billing", []string{"web buy"}},
		{useAccess, "payment may not reach inventory", []string{"payment inventory"}},
		{useAccess, "batch may read billing's report and not write", []string{"batch report", "batch write"}},
		{useMTLS, "no handshake without an SVID", []string{"attacker handshake"}},
		{useAccess, "a sidecar serves its own workload only", []string{"attacker borrow"}},
		{useTranslation, "web asks a service of gRPC with GET and JSON", []string{"web stock"}},
		{useCredentials, "a refund needs a token of the login, and whose it is", []string{"payment refund", "payment refund without", "payment refund forged"}},
	} {
		v.of(p.use)
		var err error
		n := 0
		for _, key := range p.probes {
			t := d.rec.get(key)
			n += t.OK
			if t.OK == 0 {
				err = errors.Join(err, fmt.Errorf("%s never went as it should: %+v", key, t.Last))
			}
			if t.Failed > 0 {
				err = errors.Join(err, fmt.Errorf("%s went wrong %d times: %+v", key, t.Failed, d.rec.failures(key)))
			}
		}
		v.say(p.promise, fmt.Sprintf("%d times", n), err)
	}
	v.of("")
	var err error
	if n := d.net.Sites["api.stripe.test"].Connections.Load(); n == 0 {
		err = errors.New("nobody came to api.stripe.test")
	}
	v.say("billing reaches api.stripe.test through the gateway", fmt.Sprintf("%d connections", d.net.Sites["api.stripe.test"].Connections.Load()), err)
	err = nil
	for _, app := range []string{"web", "payment", "billing"} {
		if t := d.rec.get(app + " evil"); t.OK == 0 || t.Failed > 0 {
			err = errors.Join(err, fmt.Errorf("%s: refused %d, not refused %d", app, t.OK, t.Failed))
		}
	}
	if n := d.net.Sites["evil.test"].Connections.Load(); n > 0 {
		err = errors.Join(err, fmt.Errorf("%d connections came to evil.test", n))
	}
	v.say("nothing reaches evil.test", "0 connections", err)
}

func (d *demo) testRotation(v *verdicts, rotations map[string]int) {
	var err error
	least := 1 << 30
	for _, name := range d.proxies() {
		n := rotations[name]
		least = min(least, n)
		if n == 0 {
			err = errors.Join(err, fmt.Errorf("the SVID of %s was never renewed", name))
		}
	}
	buys := d.rec.get("web buy")
	if buys.Failed > 0 {
		err = errors.Join(err, fmt.Errorf("%d purchases failed: %+v", buys.Failed, d.rec.failures("web buy")))
	}
	v.Figures["requests"], v.Figures["requests_failed"] = float64(buys.OK+buys.Failed), float64(buys.Failed)
	v.say("SVIDs rotate with no failed request", fmt.Sprintf("at least %d rotations each, %d purchases, %d failed", least, buys.OK, buys.Failed), err)
}

// testPolicyEdits breaks the policy, then changes it well.
func (d *demo) testPolicyEdits(ctx context.Context, v *verdicts, admin *control.Admin) {
	file := filepath.Join(d.dir, "policies", "access.csv")
	good, err := os.ReadFile(file)
	if err != nil {
		v.add("a policy mistake is refused", err)
		return
	}
	before, err := admin.Status(ctx)
	if err != nil {
		v.add("a policy mistake is refused", err)
		return
	}
	bad := append(append([]byte{}, good...), "p, oops, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, GET, /v1/report, -, alow\n"...)
	line := strings.Count(string(bad), "\n")
	err = daemon.WriteFile(file, bad, 0o600)
	var st mesh.IssuerStatus
	if err == nil {
		st, err = awaitStatus(ctx, admin, func(s mesh.IssuerStatus) bool { return s.LastRefusal != "" })
	}
	if want := fmt.Sprintf("access.csv:%d:", line); err == nil && (!strings.Contains(st.LastRefusal, want) || !strings.Contains(st.LastRefusal, "^")) {
		err = fmt.Errorf("the refusal does not show %q and a caret: %s", want, st.LastRefusal)
	}
	if err == nil && st.PolicyRevision != before.PolicyRevision {
		err = errors.New("the policy in force changed")
	}
	v.say("a policy mistake is refused with line and caret, the old stays", firstLine(st.LastRefusal), err)

	better := append(append([]byte{}, good...), "p, web-bill-report, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, GET, /v1/report, -, allow\n"...)
	start := time.Now()
	if err = daemon.WriteFile(file, better, 0o600); err == nil {
		err = d.awaitSynced(ctx, admin, before.PolicyRevision+1, 5*time.Second)
	}
	took := time.Since(start)
	if err == nil && took > time.Second {
		err = fmt.Errorf("it took %s", took)
	}
	v.Figures["policy_push_ms"] = float64(took.Milliseconds())
	v.say("a good policy edit reaches every proxy in under a second", took.Round(time.Millisecond).String(), err)
}

// testIssuerLoss kills the issuer under traffic and starts it again on the
// same database.
func (d *demo) testIssuerLoss(ctx context.Context, v *verdicts, admin *control.Admin) {
	p := d.proc["issuer"]
	failed := d.rec.get("web buy").Failed
	p.kill()
	var err error
	if !d.rec.await("web buy", 15, 10*time.Second) || d.rec.get("web buy").Failed > failed {
		err = fmt.Errorf("purchases failed without the issuer: %+v", d.rec.failures("web buy"))
	}
	v.say("SIGKILL of the issuer leaves traffic running", "15 purchases without it", err)

	start := time.Now()
	if err = p.start(d.rec.event); err == nil {
		err = d.awaitReady(ctx, "issuer")
	}
	var st mesh.IssuerStatus
	if err == nil {
		// The first dials may still find the dead socket.
		st, err = awaitStatus(ctx, admin, func(s mesh.IssuerStatus) bool { return s.PolicyRevision > 0 })
	}
	if err == nil {
		err = d.awaitSynced(ctx, admin, st.PolicyRevision, demoReadyWithin)
	}
	v.say("its restart on the same database re-syncs all", fmt.Sprintf("%d proxies in %s", len(d.proxies()), time.Since(start).Round(time.Millisecond)), err)
}

// testAudit verifies the chain of every audit log.
func (d *demo) testAudit(v *verdicts) {
	var err error
	records := uint64(0)
	for _, name := range append([]string{"issuer"}, d.proxies()...) {
		f, e := os.Open(d.auditFile(name))
		if e != nil {
			err = errors.Join(err, e)
			continue
		}
		rep, e := audit.Verify(f)
		f.Close()
		if e != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", name, e))
		}
		records += rep.Records
	}
	v.say("every audit log verifies", fmt.Sprintf("%d records", records), err)
}

// awaitStatus asks until the issuer's status is as wanted.
func awaitStatus(ctx context.Context, admin *control.Admin, good func(mesh.IssuerStatus) bool) (mesh.IssuerStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		st, err := admin.Status(ctx)
		if err == nil && good(st) {
			return st, nil
		}
		select {
		case <-ctx.Done():
			return st, fmt.Errorf("the issuer's status did not come to be as wanted: %+v %w", st, errors.Join(err, ctx.Err()))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// awaitSynced waits until every proxy has acknowledged the policy revision.
func (d *demo) awaitSynced(ctx context.Context, admin *control.Admin, revision uint64, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		ps, err := admin.Proxies(ctx)
		synced := 0
		for _, p := range ps {
			if p.Connected && p.State == mesh.Synced && p.PolicyRevision >= revision {
				synced++
			}
		}
		if synced == len(d.proxies()) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d proxies have revision %d: %+v %w", synced, len(d.proxies()), revision, ps, errors.Join(err, ctx.Err()))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func firstLine(s string) string {
	l, _, _ := strings.Cut(s, "\n")
	return l
}
