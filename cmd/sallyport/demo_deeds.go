package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/policies"
)

// demoPartner is a host outside that nobody may reach, until a row says so.
const demoPartner = "api.partner.test"

// A deed is something that can be done to the running demo: by its key, or as a
// step of the guided tour.
type deed struct {
	key  byte
	name string
	// happens and look are a line each: what is done, and where it shows.
	happens, look string
	// do does it, sees that what it promises is so, puts things back, and says what
	// it saw.
	do func(d *demo, ctx context.Context) (saw string, err error)
}

// deeds are in the order of the tour.
func deeds() []deed {
	return []deed{
		{'p', "policy edit", "A row with a mistake is written to access.csv, and then a good one.",
			"The mistake is refused by line and caret; the good one is in force everywhere at once.", (*demo).editPolicy},
		{'e', "egress allow", "web may not reach " + demoPartner + ": sallyport egress allow writes a row with an end; then it goes again.",
			"The page, under Denied and Egress: refused, let through, refused.", (*demo).allowEgress},
		{'f', "fault", "For four seconds half of what payment reads of billing is answered by 503, by the policy's will.",
			"The page, under Services: errors of billing rise, and end by themselves.", (*demo).makeFault},
		{'c', "canary", "Version 2 of billing starts, and takes over step by step: 20 %, 60 %, all.",
			"The page, under Rollouts: the share, and by what it is judged. No purchase fails.", (*demo).rollOut},
		{'b', "bad canary", "The same with a version 2 that fails.",
			"The page, under Rollouts: it is rolled back by nobody's hand, and few customers have noticed.", (*demo).rollOutBad},
		{'r', "rotate CA", "The root of the trust domain is replaced while everybody works.",
			"The page, under CA: each gate waits until every proxy confirms.", (*demo).rotateRoot},
		{'k', "kill", "The issuer is killed, and started again after fifteen purchases.",
			"The decisions go on without it: it is never on the path of a call. The page comes back with it.", (*demo).killIssuer},
	}
}

// openToDeeds is what deeds need of the policies: a second billing may come, and
// there is a host that nobody may reach yet.
func (d *demo) openToDeeds() error {
	return errors.Join(
		d.enrol("billing-2", "billing"),
		d.appendPolicy("egress.yaml", fmt.Sprintf("  - host: %s\n    proto: tls\n    sni: strict\n    private: [127.0.0.1/32]\n    route: {endpoints: [%q]}\n", demoPartner, d.net.Sites[demoPartner].Addr.String())),
	)
}

func (d *demo) editPolicy(ctx context.Context) (string, error) {
	old, err := os.ReadFile(d.policyFile("access.csv"))
	if err != nil {
		return "", err
	}
	row := fmt.Sprintf("p, web-rep-1, in, spiffe://%[1]s/ns/shop/sa/web, spiffe://%[1]s/ns/shop/sa/billing, 8443, GET, /v1/report, -, ", demoTrustDomain)
	admin, err := control.DialAdmin(d.apiSocket())
	if err != nil {
		return "", err
	}
	defer admin.Close()
	if err := daemon.WriteFile(d.policyFile("access.csv"), append(slices.Clone(old), row+"alow\n"...), 0o600); err != nil {
		return "", err
	}
	st, err := awaitStatus(ctx, admin, func(s mesh.IssuerStatus) bool { return strings.Contains(s.LastRefusal, "access.csv:") })
	if err != nil {
		return "", err
	}
	refusal := firstLine(st.LastRefusal)
	start := time.Now()
	if _, err := d.edit(ctx, "access.csv", append(slices.Clone(old), row+"allow\n"...)); err != nil {
		return "", err
	}
	took := time.Since(start).Round(time.Millisecond)
	_, err = d.edit(ctx, "access.csv", old)
	return fmt.Sprintf("refused: %s; the good row was in force in %d proxies after %s, and was taken back", refusal, len(d.proxies()), took), err
}

func (d *demo) allowEgress(ctx context.Context) (string, error) {
	old, err := os.ReadFile(d.policyFile("access.csv"))
	if err != nil {
		return "", err
	}
	refused := d.rec.get("web partner").Failed
	if !d.rec.awaitThat(stepWithin, func() bool { return d.rec.get("web partner").Failed > refused }) {
		return "", errors.New("web was not refused before")
	}
	row, err := d.operator(ctx, "egress", "allow", "spiffe://"+demoTrustDomain+"/ns/shop/sa/web", demoPartner,
		"--until", "10m", "--reason", "the demo shows it", "--policies", d.policyFile())
	if err != nil {
		return "", err
	}
	if !d.rec.await("web partner", 2, stepWithin) {
		err = fmt.Errorf("web does not reach it: %+v", d.rec.failures("web partner"))
	}
	_, back := d.edit(ctx, "access.csv", old)
	refused = d.rec.get("web partner").Failed
	if back == nil && !d.rec.awaitThat(stepWithin, func() bool { return d.rec.get("web partner").Failed > refused }) {
		back = errors.New("web still reaches it without the row")
	}
	return "let through by: " + firstLine(row), errors.Join(err, back)
}

// usualRoutes puts the routes of billing back.
func (d *demo) usualRoutes(ctx context.Context) error {
	b, err := fs.ReadFile(policies.FS, "routes/billing.yaml")
	if err == nil {
		_, err = d.routes(ctx, string(b))
	}
	return err
}

func (d *demo) makeFault(ctx context.Context) (string, error) {
	const span = 4 * time.Second
	was := d.touched()
	if _, err := d.routes(ctx, faultRoutes(span)); err != nil {
		return "", errors.Join(err, d.usualRoutes(ctx))
	}
	err := until(ctx, "calls are touched", func() (bool, error) { return d.touched() >= was+10, nil })
	if err == nil {
		n := 0
		err = until(ctx, "it ends", func() (bool, error) { // no call in a stretch of time, in which many are made
			before, well := d.touched(), d.well()
			d.rec.awaitThat(stepWithin, func() bool { return d.well() >= well+50 })
			n = d.touched()
			return n == before, nil
		})
	}
	return fmt.Sprintf("%d calls of payment were answered by the fault, then none", d.touched()-was), errors.Join(err, d.usualRoutes(ctx))
}

// secondVersion has version 2 of billing wait for its part of the calls, and done
// takes it away again.
func (d *demo) secondVersion(ctx context.Context) (route string, done func() error, err error) {
	d.rollouts++
	route = fmt.Sprintf("charges-%d", d.rollouts)
	done = func() error {
		err := d.usualRoutes(ctx)
		if d.proc["billing-2"] != nil {
			err = errors.Join(err, d.leave("billing-2"))
		}
		return err
	}
	if _, err = d.routes(ctx, strings.Replace(canaryRoutes, "name: charges", "name: "+route, 1)); err == nil {
		err = d.join(ctx, "billing-2")
	}
	return route, done, err
}

func (d *demo) rollOut(ctx context.Context) (string, error) {
	bought := d.rec.get("web buy")
	route, done, err := d.secondVersion(ctx)
	if err == nil {
		_, err = d.rollout(ctx, route, "start", "--watch", "--timeout", "1m")
	}
	if err == nil {
		err = errors.Join(d.awaitDelivery(ctx, route, mesh.Completed), d.allBy("v2"))
	}
	if err == nil {
		err = d.noMoreFailed("web buy", bought)
	}
	n := d.rec.get("web buy by v2").OK
	return fmt.Sprintf("version 2 has all; %d purchases were by it, and none failed; it is taken back", n), errors.Join(err, done())
}

func (d *demo) rollOutBad(ctx context.Context) (string, error) {
	failed := d.rec.get("web buy").Failed
	route, done, err := d.secondVersion(ctx)
	if err == nil {
		_, err = d.behave(ctx, "billing-2", manners{Status: http.StatusInternalServerError})
	}
	if err == nil {
		_, err = d.rollout(ctx, route, "start", "--watch", "--timeout", "1m")
	}
	if err == nil {
		err = errors.Join(d.awaitDelivery(ctx, route, mesh.RolledBack), d.allBy("v1"))
	}
	hurt := d.rec.get("web buy").Failed - failed
	if err == nil { // it gets its share once more, before it goes
		_, err = d.behave(ctx, "billing-2", manners{})
	}
	return fmt.Sprintf("rolled back by itself; %d purchases failed", hurt), errors.Join(err, done())
}

func (d *demo) rotateRoot(ctx context.Context) (string, error) {
	admin, err := control.DialAdmin(d.apiSocket())
	if err != nil {
		return "", err
	}
	defer admin.Close()
	signs := func(st control.RootStatus) string {
		for _, a := range st.Authorities {
			if a.Kind == control.KindX509 && a.Signs {
				return a.ID
			}
		}
		return ""
	}
	before, err := admin.Roots(ctx)
	if err != nil {
		return "", err
	}
	if before.Phase != "steady" {
		return fmt.Sprintf("the last one still goes on: %s, %d of %d confirm", before.Phase, before.Confirmed, before.Live), nil
	}
	bought := d.rec.get("web buy")
	if _, err := admin.MoveRoots(ctx, control.MoveRotate, false, true); err != nil {
		return "", err
	}
	now := before
	err = until(ctx, "another root signs", func() (ok bool, err error) {
		now, err = admin.Roots(ctx)
		return err == nil && signs(now) != "" && signs(now) != signs(before), err
	})
	if err == nil && !d.rec.await("web buy", 20, stepWithin) {
		err = errors.New("nobody buys any more")
	}
	return fmt.Sprintf("%.12s signs in place of %.12s, which goes once nobody shows it any more", signs(now), signs(before)), errors.Join(err, d.noMoreFailed("web buy", bought))
}

func (d *demo) killIssuer(ctx context.Context) (string, error) {
	p, bought := d.proc["issuer"], d.rec.get("web buy")
	p.kill()
	var err error
	if !d.rec.await("web buy", 15, stepWithin) {
		err = errors.New("nobody buys without it")
	}
	err = errors.Join(err, d.noMoreFailed("web buy", bought), p.start(d.rec.event))
	if err != nil {
		return "", err
	}
	if err := d.awaitReady(ctx, "issuer"); err != nil {
		return "", err
	}
	link, err := d.pageLink(ctx)
	return "15 purchases without the issuer; the page has a new link: " + link, err
}
