package test

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/policyset"
	"sallyport/internal/store"
)

// pin makes a proxy count the signatures of policies itself, from its next start.
func (w *world) pin(name string, keys []string) {
	w.t.Helper()
	file := w.path(name, "config.yaml")
	conf, err := os.ReadFile(file)
	if err != nil {
		w.t.Fatal(err)
	}
	w.rewrite(file, fmt.Sprintf("%spolicy: {signers: {keys: [%q, %q, %q], threshold: 2}}\n", conf, keys[0], keys[1], keys[2]))
}

// pushedIssuer writes the configuration of an issuer that takes what is pushed,
// with more in its policy.
func (w *world) pushedIssuer(more string) {
	w.write("issuer", fmt.Sprintf(`trust_domain: %s
data_dir: %s/issuer
listen: %s
policy: {source: pushed%s}
ca: {x509_ttl: 2m, agent_ttl: 2m, allow_short_ttl: true}
`, trustDomain, w.dir, w.issuer, more))
}

// nacks waits until so many connected proxies refuse what the issuer sends, for a
// reason that it and they have on record.
func (w *world) nacks(reason string, names ...string) {
	w.t.Helper()
	a := w.admin()
	defer a.Close()
	w.await(fmt.Sprintf("see %v refuse: %s", names, reason), func() bool {
		ps, err := a.Proxies(w.t.Context())
		n := 0
		for _, p := range ps {
			if p.Connected && p.State == mesh.Rejected && strings.Contains(p.Reason, reason) {
				n++
			}
		}
		return err == nil && n == len(names)
	})
	w.refused(reason, "policy", "status", "--wait", "--timeout", "5s")
	for _, name := range names {
		w.awaitAudit(name, reason, func(l auditLine) bool {
			return l.Kind == "policy" && l.Decision == "deny" && strings.Contains(l.Detail, reason)
		})
	}
}

// TestPins takes over the issuer of proxies that pin keys, in every way but one:
// it has not the keys of those who review policies.
func TestPins(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, time.Minute)
	a, b, c := w.path("a.pem"), w.path("b.pem"), w.path("c.pem")
	pins := []string{w.pinOf(a), w.pinOf(b), w.pinOf(c)}
	honest := fmt.Sprintf(", signers: {keys: [%q, %q, %q], threshold: 2}", pins[0], pins[1], pins[2])
	w.pushedIssuer(honest)
	issuer := w.start("issuer", nil, "issuer", "run", "--config", w.path("issuer", "config.yaml"))
	w.await("reach the issuer", func() bool { return w.sallyport("policy", "status").Code == 0 })
	w.ok("policy", "push", w.policy, "--key", a+","+b)
	w.awaitReady(issuer)

	pay, bill := &node{name: "payment"}, &node{name: "billing"}
	for _, n := range []*node{bill, pay} {
		w.join(n)
		w.pin(n.name, pins)
	}
	w.write("gateway", w.proxyConfig("gateway", w.token("gateway"))+fmt.Sprintf("listen: %s\nresolvers: [%q]\n", freePort(t), freePort(t)))
	w.pin("gateway", pins)
	w.awaitReady(w.start("gateway", nil, "gateway", "run", "--config", w.path("gateway", "config.yaml")))
	w.startNode(bill)
	payment := w.startNode(pay)
	w.awaitReach(payment, charges)
	first := w.awaitSynced(3)
	everybody := []string{"billing", "gateway", "payment"}

	// What is signed by two of three is in force, and they have looked themselves.
	access := filepath.Join(w.policy, "access.csv")
	w.extend("access.csv", "p, pay-rep-1, in, "+id("/ns/shop/sa/payment")+", "+id("/ns/shop/sa/billing")+", 8443, GET, /v1/report, -, allow\n")
	w.ok("policy", "push", w.policy, "--key", b+","+c, "--wait", "--timeout", "30s")
	if out := w.ok("policy", "status"); strings.Count(out, "ack, signatures counted") != 3 {
		t.Errorf("policy status says\n%s", out)
	}
	const report = "http://billing.mesh.internal/v1/report"
	wipe := curl("-X", "DELETE", charges+"/7")
	status := func(p *hand, args []string) string {
		t.Helper()
		return read(t, ask[runReply](p, "/run", args)).status
	}
	stands := func() {
		t.Helper()
		if got := status(payment, curl(report)); got != "200" {
			t.Errorf("a call that the last good set allows: %s", got)
		}
		if got := status(payment, wipe); got != "403" {
			t.Errorf("a call that no good set allows: %s", got)
		}
	}
	w.awaitReach(payment, report)
	stands()

	// One of the three has the issuer, and pushes alone.
	if err := os.RemoveAll(filepath.Join(w.policy, "tests")); err != nil {
		t.Fatal(err)
	}
	w.extend("access.csv", "p, evil, in, **, **, *, *, **, -, allow\n")
	issuer.kill()
	w.pushedIssuer(fmt.Sprintf(", signers: {keys: [%q, %q, %q], threshold: 1}", pins[0], pins[1], pins[2]))
	issuer = w.startIssuer()
	w.ok("policy", "push", w.policy, "--key", a)
	few := "1 of the 3 pinned keys have signed, 2 must"
	w.nacks(few, everybody...)
	stands()

	t.Run("a proxy that starts again has the last good set", func(t *testing.T) {
		payment.kill()
		payment = w.startNode(pay)
		w.awaitReach(payment, report)
		stands()
	})
	stock := &node{name: "inventory"}
	w.join(stock)
	w.pin("inventory", pins)
	fresh := w.start("inventory", nil, "sidecar", "run", "--config", w.path("inventory", "config.yaml"))
	everybody = append(everybody, "inventory")
	w.nacks(few, everybody...)
	closed := func() {
		t.Helper()
		if conn, err := net.Dial("tcp", stock.in); err == nil {
			conn.Close()
			t.Error("a fresh proxy without a good set listens")
		}
		if code := w.readiness("inventory"); code == 200 {
			t.Error("a fresh proxy without a good set is ready")
		}
	}
	closed()

	// The database is put back to the first set, which was signed.
	issuer.kill()
	w.putBack(1)
	w.pushedIssuer(honest)
	issuer = w.startIssuer()
	w.nacks("has revision 1, which is lower than 2", "billing", "gateway", "payment")
	stands()
	fresh.stop() // it never saw another, so it takes the first

	// An issuer that pins nothing has nothing to show.
	issuer.kill()
	w.pushedIssuer("")
	issuer = w.startIssuer()
	w.nacks("names no signed set", "billing", "gateway", "payment")
	stands()

	// The right ones mend it, above everything that was in force.
	issuer.kill()
	w.pushedIssuer(honest)
	w.startIssuer()
	set := w.path("set")
	w.rewrite(access, strings.ReplaceAll(string(readFile(t, access)), "p, evil", "# p, evil"))
	w.ok("policy", "sign", w.policy, "--key", a+","+c, "--out", set, "--revision", "9", "--previous", first.PolicySet)
	w.ok("policy", "push", set)
	w.awaitSynced(3)
	w.awaitReach(payment, report)
	stands()
	for _, name := range []string{"billing", "gateway", "payment"} {
		if kept, err := os.ReadDir(w.path(name, "sets")); err != nil || len(kept) > 3 || !slices.ContainsFunc(kept, func(f os.DirEntry) bool { return strings.HasPrefix(f.Name(), fmt.Sprintf("%020d-", 9)) }) {
			t.Errorf("%s keeps %v, %v", name, kept, err)
		}
	}
}

func readFile(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// putBack puts a set that the issuer keeps in force again in its database, and
// has the issuer forget that it knew a newer one.
func (w *world) putBack(revision uint64) {
	w.t.Helper()
	if err := os.Remove(w.path("issuer", "policy.floor")); err != nil {
		w.t.Error(err)
	}
	s, err := store.OpenSQLite(w.t.Context(), w.path("issuer", "issuer.db"))
	if err != nil {
		w.t.Fatal(err)
	}
	defer s.Close()
	rec, err := s.Get(w.t.Context(), store.KindPolicy, fmt.Sprintf("set/%020d", revision))
	if err != nil {
		w.t.Fatal(err)
	}
	set, err := policyset.Parse(rec.Value)
	if err != nil {
		w.t.Fatal(err)
	}
	p, err := set.Policies()
	if err != nil {
		w.t.Fatal(err)
	}
	value, err := json.Marshal(map[string]any{
		"revision": set.Revision, "hash": p.Hash(), "at": set.Created, "policies": json.RawMessage(p.Encode()), "set": set.Hash(),
	})
	if err == nil {
		_, err = s.Write(w.t.Context(), store.Op{Kind: store.KindPolicy, Key: "current", Value: value})
	}
	if err != nil {
		w.t.Fatal(err)
	}
}
