package test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/store/postgrestest"
)

// pushers makes two keys, and the configuration that pins both.
func (w *world) pushers() (keys, pins string) {
	w.t.Helper()
	a, b := w.path("a.pem"), w.path("b.pem")
	return a + "," + b, fmt.Sprintf("signers: {keys: [%q, %q], threshold: 2}", w.pinOf(a), w.pinOf(b))
}

// report is what policy status -o json says.
type report struct {
	Revision     uint64
	NextRevision uint64 `json:"next_revision"`
	Set          string
	Rollout      mesh.Rollout
	Proxies      []mesh.Proxy
}

// status asks for the report by whatever arguments.
func (w *world) status(args ...string) (r report) {
	w.t.Helper()
	reply := w.sallyport(append([]string{"policy", "status", "-o", "json"}, args...)...)
	if reply.Code > 1 { // 1: somebody refuses it
		w.t.Fatalf("policy status: exit %d\n%s", reply.Code, reply.Output)
	}
	if err := json.NewDecoder(strings.NewReader(reply.Output)).Decode(&r); err != nil {
		w.t.Fatalf("%v in\n%s", err, reply.Output)
	}
	return r
}

// act says if the two proxies act on these revisions, as both they and the
// issuer have it.
func (r report) act(billing, payment uint64) bool {
	n := 0
	for _, p := range r.Proxies {
		want := payment
		if strings.HasSuffix(p.Workload.Path(), "/billing") {
			want = billing
		}
		if p.PolicyRevision == want && p.Wanted == want && p.State == mesh.Synced && p.Connected {
			n++
		}
	}
	return n == 2
}

// another adds a row that lets payment call billing once more.
func (w *world) another(row string) {
	w.t.Helper()
	file := filepath.Join(w.policy, "access.csv")
	rows, err := os.ReadFile(file)
	if err != nil {
		w.t.Fatal(err)
	}
	w.rewrite(file, string(rows)+fmt.Sprintf("p, %s, in, %s, %s, 8443, GET, /v1/%s, -, allow\n", row, id("/ns/shop/sa/payment"), id("/ns/shop/sa/billing"), row))
}

// signedIssuer writes the configuration of an issuer that takes signed sets,
// starts it, and pushes the first.
func (w *world) signedIssuer(pins, keys, more string) *proc {
	w.t.Helper()
	w.write("issuer", fmt.Sprintf(`trust_domain: %s
data_dir: %s
listen: %s
policy: {source: pushed, %s}
%s`, trustDomain, w.path("issuer"), w.issuer, pins, more))
	issuer := w.start("issuer", nil, "issuer", "run", "--config", w.path("issuer", "config.yaml"))
	w.await("reach the issuer", func() bool { return w.sallyport("policy", "status").Code == 0 })
	if keys != "" {
		w.refused("no pushed set is in force", "policy", "push", w.policy, "--key", keys, "--canary", "5%")
		w.ok("policy", "push", w.policy, "--key", keys)
	}
	w.awaitReady(issuer)
	return issuer
}

// TestCanary lets one of two sidecars, which count signatures themselves, try
// policies first: they are promoted by time, by hand and over a crash of the
// issuer, and taken back by hand, by a refusal and by the loss of the sidecar.
func TestCanary(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, time.Minute)
	keys, pins := w.pushers()
	issuer := w.signedIssuer(pins, keys, "ca: {agent_ttl: 1m, allow_short_ttl: true}\n")
	hands := map[string]*hand{}
	for _, name := range []string{"billing", "payment"} {
		n := &node{name: name, in: freePort(t), app: freePort(t), out: freePort(t), billing: freePort(t)}
		w.write(name, w.sidecarConfig(n, w.token(name))+"policy: {"+pins+"}\n")
		hands[name] = w.startNode(n)
	}
	payment := hands["payment"]
	w.awaitReach(payment, charges)
	push := func(more ...string) []string {
		return append([]string{"policy", "push", w.policy, "--key", keys, "--canary", id("/ns/shop/sa/billing")}, more...)
	}
	reaches := func(row string) bool {
		r := ask[runReply](payment, "/run", curl("http://billing.mesh.internal/v1/"+row))
		return strings.Contains(r.Output, " 200 ")
	}
	acts := func(billing, payment uint64) {
		t.Helper()
		w.await(fmt.Sprintf("act on %d and %d", billing, payment), func() bool { return w.status().act(billing, payment) })
	}

	// By hand: it waits, and stands in the way of others.
	w.another("second")
	w.ok(push("--bake", "0", "--wait")...)
	acts(2, 1)
	if !reaches("second") {
		t.Error("the canary does not act on what it tries")
	}
	st := w.status()
	if ro := st.Rollout; ro.State != mesh.Baking || ro.Revision != 2 || ro.Fallback != 3 || ro.Members != 1 || ro.Acked != 1 || st.Revision != 1 || st.NextRevision != 4 {
		t.Errorf("while it is tried: %+v", st)
	}
	w.refused("revision 2 is tried by the canary group", "policy", "push", w.policy, "--key", keys)
	w.refused("revision 2 is tried by the canary group", push()...)

	// A crash forgets nothing. Back needs no key.
	issuer.kill()
	w.startIssuer()
	acts(2, 1)
	if out := w.ok("policy", "rollback", "--wait", "--timeout", "30s"); !strings.Contains(out, "revision 3 is in force on the issuer") || !strings.Contains(out, "taken back") {
		t.Errorf("rollback says\n%s", out)
	}
	acts(3, 3)
	if reaches("second") {
		t.Error("what was taken back is in force")
	}

	// By time.
	out := w.ok(push("--bake", "3s", "--wait", "--timeout", "30s")...)
	if !strings.Contains(out, "revision 4 is tried by the canary group") || !strings.Contains(out, "promoted") {
		t.Errorf("push --wait says\n%s", out)
	}
	acts(4, 4)
	if !reaches("second") {
		t.Error("what was promoted is not in force")
	}

	// By a refusal: the sidecar cannot keep the set.
	sets := w.path("billing", "sets")
	if err := os.Rename(sets, sets+".away"); err != nil {
		t.Fatal(err)
	}
	w.put(sets, "")
	w.another("third")
	w.refused("revision 6 is taken back: "+id("/ns/shop/sa/billing")+" refuses revision 6: policy set not kept on disk", push("--wait", "--timeout", "5s")...)
	if err := os.Remove(sets); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(sets+".away", sets); err != nil {
		t.Fatal(err)
	}
	w.ok(push("--bake", "0")...)
	acts(8, 7)
	w.ok("policy", "promote", "--wait", "--timeout", "30s")
	acts(8, 8)

	// By the loss of the sidecar. Whoever is left goes back by a new revision.
	w.another("fourth")
	w.ok(push("--bake", "5m")...)
	acts(10, 8)
	hands["billing"].kill()
	w.refused("revision 10 is taken back: "+id("/ns/shop/sa/billing")+" is lost: not connected since", "policy", "status", "--wait")
	if st := w.status(); st.Revision != 11 {
		t.Errorf("in force is %+v", st)
	}
	for _, step := range []string{"try", "promote", "take_back"} {
		w.awaitAudit("issuer", "the step "+step, func(l auditLine) bool { return l.Kind == "policy" && l.Verb == "rollout "+step })
	}
}

// TestPushFromAfar pushes over mutual TLS to whom a row of the pushed admin.csv
// gives the right.
func TestPushFromAfar(t *testing.T) {
	t.Parallel()
	w := newWorld(t, time.Minute)
	keys, pins := w.pushers()
	pusher, looker := id("/ns/ops/sa/pusher"), id("/ns/ops/sa/looker")
	w.put(filepath.Join(w.policy, "admin.csv"), "p, ci-push, "+pusher+", mesh.*, **, allow\np, ci-look, "+looker+", mesh.Status, **, allow\np, ci-see, "+looker+", mesh.Proxies, **, allow\n")
	w.signedIssuer(pins, keys, "ca: {agent_ttl: 1m, allow_short_ttl: true}\n")
	from := func(who string, args ...string) []string {
		dir := w.path(filepath.Base(who))
		if _, err := os.Stat(dir); err != nil {
			w.ok("svid", "mint", who, "--write", dir)
		}
		return append(args, "--address", w.issuer, "--identity", dir)
	}
	w.another("second")
	out := w.ok(from(pusher, "policy", "push", w.policy, "--key", keys, "--wait")...)
	if !strings.Contains(out, "revision 2 is in force on the issuer") {
		t.Errorf("push says\n%s", out)
	}
	w.awaitAudit("issuer", "the push with who it was by", func(l auditLine) bool {
		return l.Kind == "admin" && l.Verb == "mesh.PushPolicy" && l.Src == pusher && l.Decision == "allow" && l.Rule == "ci-push"
	})
	if there, here := w.status(from(looker)...), w.status(); there.Revision != 2 || there.Set != here.Set {
		t.Errorf("from afar it is %+v, on the socket %+v", there, here)
	}
	w.another("third")
	w.refused("mesh.PushPolicy", from(looker, "policy", "push", w.policy, "--key", keys)...)
	w.refused("has no right to it", from(id("/ns/ops/sa/nobody"), "policy", "push", w.policy, "--key", keys)...)
	w.refused("on its own socket only", from(pusher, "ca", "status")...)
	// The right is to push, not to sign.
	w.refused("2 must", from(pusher, "policy", "push", w.policy)...)
	if st := w.status(); st.Revision != 2 {
		t.Errorf("after the refusals in force is %+v", st)
	}
	if r := w.sallyport("policy", "status", "--address", freePort(t), "--identity", w.path("pusher")); r.Code != 3 {
		t.Errorf("nobody at the address: exit %d\n%s", r.Code, r.Output)
	}
}

// TestPushAtTwoIssuers pushes at one of two issuers on one database, and kills
// it while it takes a push and while it conducts a rollout.
func TestPushAtTwoIssuers(t *testing.T) {
	t.Parallel()
	server := postgrestest.Start(t)
	first := newWorld(t, time.Minute)
	keys, pins := first.pushers()
	at := fmt.Sprintf("database: {url: %q}\nca: {agent_ttl: 1m, allow_short_ttl: true", server.Database(t))
	issuer := first.signedIssuer(pins, keys, at+"}\n")
	second := first.beside("second")
	second.signedIssuer(pins, "", at+", root_dir: "+first.copyRoot()+"}\n")
	first.twoIssuersPair(second)
	both := func(billing, payment uint64) {
		t.Helper()
		for _, w := range []*world{first, second} {
			w.await(fmt.Sprintf("act on %d and %d at %s", billing, payment, w.dir), func() bool { return w.status().act(billing, payment) })
		}
		if a, b := first.status(), second.status(); a.Revision != b.Revision || a.Set != b.Set || a.NextRevision != b.NextRevision || a.Rollout.State != b.Rollout.State {
			t.Errorf("the issuers say %+v and %+v", a, b)
		}
	}
	both(1, 1)
	first.another("second")
	first.ok("policy", "push", first.policy, "--key", keys, "--wait", "--timeout", "30s")
	both(2, 2)

	// A rollout is the same at both; who began it dies, and the other ends it.
	first.another("third")
	first.ok("policy", "push", first.policy, "--key", keys, "--canary", id("/ns/shop/sa/billing"), "--bake", "8s")
	both(3, 2)
	issuer.kill()
	second.await("promote what the first began", func() bool { return second.status().act(3, 3) })
	issuer = first.startIssuer()
	both(3, 3)

	// Killed while it takes a push, it has taken all of it or nothing.
	taken := 0
	for round := range 6 {
		first.another(fmt.Sprintf("row%d", round))
		before := second.status()
		ended := make(chan runReply, 1)
		go func() { ended <- first.sallyport("policy", "push", first.policy, "--key", keys) }()
		if round%2 == 0 {
			// As soon as somebody else can see it; otherwise before.
			second.await("see the push", func() bool { return second.status().Revision != before.Revision })
		}
		issuer.kill()
		reply := <-ended
		after := second.status()
		switch {
		case after.Revision == before.Revision && after.Set == before.Set && reply.Code != 0:
		case after.Revision >= before.NextRevision && after.Set != before.Set:
			taken++
		default:
			t.Errorf("round %d: exit %d, from %+v to %+v\n%s", round, reply.Code, before, after, reply.Output)
		}
		issuer = first.startIssuer()
		both(after.Revision, after.Revision)
	}
	t.Logf("6 pushes with a kill -9, %d taken, none by half", taken)
}
