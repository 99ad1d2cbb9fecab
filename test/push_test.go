package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// TestPush pushes signed policies to an issuer that pins two keys, and looks at
// what its proxies act on.
func TestPush(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, time.Minute)
	a, b, c := w.path("a.pem"), w.path("b.pem"), w.path("c.pem")
	pins := []string{w.pinOf(a), w.pinOf(b), w.pinOf(c)}
	w.write("issuer", fmt.Sprintf(`trust_domain: %s
data_dir: %s/issuer
listen: %s
policy: {source: pushed, signers: {keys: [%q, %q], threshold: 2}}
ca: {agent_ttl: 1m, allow_short_ttl: true}
`, trustDomain, w.dir, w.issuer, pins[0], pins[1]))
	issuer := w.start("issuer", nil, "issuer", "run", "--config", w.path("issuer", "config.yaml"))
	w.await("reach the issuer", func() bool { return w.sallyport("policy", "status").Code == 0 })
	if code := w.readiness("issuer"); code == 200 {
		t.Error("an issuer that has no policies is ready")
	}

	w.refused("2 must", "policy", "push", w.policy)
	w.refused("2 must", "policy", "push", w.policy, "--key", a)
	w.refused("2 must", "policy", "push", w.policy, "--key", a+","+c)
	w.ok("policy", "push", w.policy, "--key", a+","+b)
	w.awaitReady(issuer)

	_, _, payment, _ := w.pair()
	// What was refused has used up its revisions: it is signed.
	before := w.awaitSynced(2)
	if before.PolicyRevision != 3 || before.PolicySet == "" {
		t.Fatalf("in force is %+v", before)
	}

	// A bad row and a red case change nothing, whoever looks first.
	access := filepath.Join(w.policy, "access.csv")
	good, err := os.ReadFile(access)
	if err != nil {
		t.Fatal(err)
	}
	w.rewrite(access, string(good)+"p, bad, in\n")
	w.refused("access.csv:", "policy", "push", w.policy, "--key", a+","+b)
	w.rewrite(access, "# nobody may call\n")
	w.refused("", "policy", "push", w.policy, "--key", a+","+b)
	if st := w.awaitSynced(2); st.PolicySet != before.PolicySet {
		t.Errorf("a refused push is in force: %+v", st)
	}

	// Without the cases that say otherwise it is what was asked for.
	if err := os.RemoveAll(filepath.Join(w.policy, "tests")); err != nil {
		t.Fatal(err)
	}
	out := w.ok("policy", "push", w.policy, "--key", a+","+b, "--wait", "--timeout", "30s")
	if !strings.Contains(out, "2 connected proxies, 2 ack, 0 nack") {
		t.Errorf("push --wait says\n%s", out)
	}
	if r := ask[runReply](payment, "/run", curl(charges)); !strings.Contains(r.Output, "denied") && !strings.Contains(r.Output, "403") {
		t.Errorf("a call after its row is gone: %+v", r)
	}

	// Back, under a new revision; not with a key that has not signed it before.
	w.refused("is not signed by "+pins[2], "policy", "rollback", "--key", c)
	w.refused("kept are: 3, 4", "policy", "rollback", "9", "--key", a+","+b)
	out = w.ok("policy", "rollback", "--key", a+","+b, "--wait", "--timeout", "30s")
	if !strings.Contains(out, "revision 5") || !strings.Contains(out, "2 ack, 0 nack") {
		t.Errorf("rollback --wait says\n%s", out)
	}
	w.awaitReach(payment, charges)

	// Another's set that follows on an older one.
	set := w.path("set")
	w.ok("policy", "sign", w.policy, "--key", a+","+b, "--out", set, "--revision", "6", "--previous", before.PolicySet)
	w.refused("stale policy set: it follows on set "+before.PolicySet, "policy", "push", set)

	// A restart keeps all of it.
	issuer.kill()
	issuer = w.startIssuer()
	if st := w.awaitSynced(2); st.PolicyRevision != 5 {
		t.Errorf("after a restart in force is %+v", st)
	}

	// A database that is set back to the first set, which both have signed, gets
	// nothing signed again: neither for a canary group to go back by, nor as
	// what was there before.
	issuer.kill()
	floor := readFile(t, w.path("issuer", "policy.floor"))
	w.putBack(3)
	w.rewrite(w.path("issuer", "policy.floor"), string(floor))
	issuer = w.start("issuer", nil, "issuer", "run", "--config", w.path("issuer", "config.yaml"))
	w.await("hear that the store was set back", func() bool {
		r := w.sallyport("policy", "status")
		return r.Code == 1 && strings.Contains(r.Output, "revision 5 was in force at this issuer: the store was set back")
	})
	if code := w.readiness("issuer"); code == 200 {
		t.Error("an issuer whose database was set back is ready")
	}
	// Whoever owns the issuer sets that back, too.
	issuer.kill()
	if err := os.Remove(w.path("issuer", "policy.floor")); err != nil {
		t.Fatal(err)
	}
	w.startIssuer()
	for _, args := range [][]string{
		{"policy", "push", w.policy, "--canary", "50%"}, {"policy", "push", w.policy}, {"policy", "rollback"},
	} {
		w.refused("here revision 5, set ", append(args, "--key", a+","+b)...)
	}
	w.refused("--in-force says 4", "policy", "rollback", "--in-force", "4", "--key", a+","+b)
	// Who knows that it was set back says so.
	w.ok("policy", "push", w.policy, "--key", a+","+b, "--in-force", before.PolicySet, "--wait", "--timeout", "30s")
}

// rewrite replaces a file.
func (w *world) rewrite(file, text string) {
	w.t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// ok runs the CLI, which must succeed, and returns what it prints.
func (w *world) ok(args ...string) string {
	w.t.Helper()
	r := w.sallyport(args...)
	if r.Code != 0 {
		w.t.Fatalf("sallyport %s: exit %d\n%s", strings.Join(args, " "), r.Code, r.Output)
	}
	return r.Output
}

// refused runs the CLI, which must fail a check and say why.
func (w *world) refused(why string, args ...string) {
	w.t.Helper()
	if r := w.sallyport(args...); r.Code != 1 || !strings.Contains(r.Output, why) {
		w.t.Errorf("sallyport %s: exit %d, want 1 and %q\n%s", strings.Join(args, " "), r.Code, why, r.Output)
	}
}

// pinOf makes the key of somebody who reviews policies, and says what pins it.
func (w *world) pinOf(key string) string { return strings.TrimSpace(w.ok("policy", "key", key)) }
