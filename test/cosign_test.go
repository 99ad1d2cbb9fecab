package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// awaitVerified waits until all of a log is confirmed by what the issuer has
// signed. A verdict that fails is final.
func (w *world) awaitVerified(log string) string {
	w.t.Helper()
	var r runReply
	w.await("confirm "+log, func() bool {
		if r = w.sallyport("audit", "verify", log); r.Code == 1 || r.Code == 2 {
			w.t.Fatalf("%s:\n%s", log, r.Output)
		}
		return r.Code == 0
	})
	return r.Output
}

// TestIssuerWitnessesAuditLogs puts a node back to an earlier day, as whoever
// owns it can, and holds the issuer to noticing.
func TestIssuerWitnessesAuditLogs(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, time.Minute)
	w.startIssuer()
	_, bill, payment, billing := w.pair()
	if out := w.awaitVerified(w.path("billing", "audit.jsonl")); !strings.Contains(out, id("/ns/shop/sa/billing")+" on ") {
		t.Errorf("it does not say whose log it is:\n%s", out)
	}
	w.awaitVerified(w.path("issuer", "audit.jsonl"))
	mirrors, err := filepath.Glob(w.path("issuer", "received", "*billing*.jsonl"))
	if err != nil || len(mirrors) != 1 {
		t.Fatal(mirrors, err)
	}
	w.await("find the issuer's copy whole", func() bool { return w.sallyport("audit", "verify", mirrors[0]).Code == 0 })

	proof := w.path("proof.json")
	r := w.sallyport("audit", "prove", "1", "--log", w.path("billing", "audit.jsonl"))
	if err := os.WriteFile(proof, []byte(r.Output), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := w.sallyport("audit", "check", proof, "--workload", id("/ns/shop/sa/billing")); r.Code != 0 {
		t.Errorf("the proof of record 1: %s", r.Output)
	}
	if r := w.sallyport("audit", "check", proof, "--workload", id("/ns/shop/sa/payment")); r.Code != 1 {
		t.Errorf("the proof is taken for payment's: %s", r.Output)
	}

	for _, tt := range [][]string{{"prove", "1", "--log", mirrors[0]}, {"check", proof, "--workload", id("/ns/shop/sa/billing")}} {
		r := w.sallyport(append([]string{"audit"}, tt...)...)
		if r.Code != 0 {
			t.Errorf("%v of the issuer's copy: %s", tt, r.Output)
		}
		if tt[0] == "prove" {
			if err := os.WriteFile(proof, []byte(r.Output), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	received := filepath.Dir(mirrors[0])
	w.await("find all of the issuer's copies whole", func() bool { return w.sallyport("audit", "verify", received).Code == 0 })
	if r := w.sallyport("audit", "query", received, "--kind", "rollup"); r.Code != 0 {
		t.Errorf("query of the copies: %s", r.Output)
	}

	billing.stop()
	w.awaitVerified(w.path("billing", "audit.jsonl"))
	old := w.path("old")
	if err := os.Mkdir(old, 0o700); err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob(w.path("billing", "audit*"))
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		if r := command(t, "cp", "-a", name, old); r.Code != 0 {
			t.Fatal(r.Output)
		}
	}
	billing = w.startNode(bill)
	w.awaitReach(payment, charges)
	w.refuse(payment)
	w.await("have more of billing's log signed", func() bool {
		return strings.Contains(w.sallyport("audit", "verify", filepath.Join(old, "audit.jsonl")).Output, "its end was cut off")
	})
	billing.kill()
	for _, name := range names {
		if r := command(t, "rm", "-rf", name); r.Code != 0 {
			t.Fatal(r.Output)
		}
		if r := command(t, "cp", "-a", filepath.Join(old, filepath.Base(name)), name); r.Code != 0 {
			t.Fatal(r.Output)
		}
	}
	w.startNode(bill)
	w.awaitAudit("issuer", "the alarm", func(l auditLine) bool {
		return l.Kind == "gap" && l.Src == id("/ns/shop/sa/billing") && (l.Reason == "log_cut" || l.Reason == "log_forked")
	})
	if r := w.sallyport("audit", "verify", w.path("billing", "audit.jsonl")); r.Code != 1 {
		t.Errorf("exit code %d, want 1:\n%s", r.Code, r.Output)
	}
}

// refuse makes a call that billing refuses, which is recorded in full.
func (w *world) refuse(payment *hand) {
	w.t.Helper()
	if got := read(w.t, ask[runReply](payment, "/run", curl("http://billing.mesh.internal/admin"))).status; got != "403" {
		w.t.Fatalf("status %s, want 403", got)
	}
}
