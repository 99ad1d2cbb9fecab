package test

import (
	"crypto/tls"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
)

const charges = "http://billing.mesh.internal/v1/charges"

// pair starts payment and billing, and returns when payment reaches billing.
func (w *world) pair() (pay, bill *node, payment, billing *hand) {
	w.t.Helper()
	pay, bill = &node{name: "payment"}, &node{name: "billing"}
	w.join(bill)
	w.join(pay)
	billing, payment = w.startNode(bill), w.startNode(pay)
	w.awaitReach(payment, charges)
	return pay, bill, payment, billing
}

// awaitSynced waits until n proxies are connected and act on the policy in
// force, and returns how things are.
func (w *world) awaitSynced(n int) mesh.IssuerStatus {
	w.t.Helper()
	a := w.admin()
	defer a.Close()
	var st mesh.IssuerStatus
	w.await("see all proxies SYNCED", func() bool {
		ps, err := a.Proxies(w.t.Context())
		if err != nil {
			return false
		}
		if st, err = a.Status(w.t.Context()); err != nil {
			return false
		}
		synced := 0
		for _, p := range ps {
			if p.Connected && p.State == mesh.Synced && p.PolicyRevision == st.PolicyRevision {
				synced++
			}
		}
		return synced == n
	})
	return st
}

func TestIssuerRestart(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, time.Minute)
	issuer := w.startIssuer()
	pay, bill, payment, billing := w.pair()
	before := w.awaitSynced(2)

	issuer.kill()
	for range 10 {
		p := read(t, ask[runReply](payment, "/run", curl(charges)))
		isEcho(t, p, "GET", "/v1/charges", id("/ns/shop/sa/payment"))
	}

	// Proxies that start while nobody answers go on with what is on their
	// disks, for traffic and for the Workload API.
	payment.stop()
	billing.stop()
	billing, payment = w.startNode(bill), w.startNode(pay)
	p := read(t, ask[runReply](payment, "/run", curl(charges)))
	isEcho(t, p, "GET", "/v1/charges", id("/ns/shop/sa/payment"))
	isRefusal(t, read(t, ask[runReply](payment, "/run", curl("-X", "DELETE", charges))))
	kept := ask[svidReply](billing, "/svid", struct{}{})
	if kept.ID != id("/ns/shop/sa/billing") {
		t.Errorf("the Workload API gave %s", kept.ID)
	}

	w.startIssuer()
	if after := w.awaitSynced(2); after.PolicyRevision != before.PolicyRevision || after.PolicyHash != before.PolicyHash {
		t.Errorf("the policy in force was %+v and is %+v", before, after)
	}
	// What was taken from the disk is renewed as soon as somebody can.
	billing.await("get a new SVID", func() bool { return ask[svidReply](billing, "/svid", struct{}{}).Serial != kept.Serial })
}

func TestExpiryWithoutIssuer(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, 4*time.Second)
	issuer := w.startIssuer()
	_, bill, payment, billing := w.pair()
	issuer.kill()

	// Fail closed: no listener shows an expired SVID or accepts one.
	billing.await("refuse handshakes", func() bool {
		c, err := tls.Dial("tcp", bill.in, &tls.Config{InsecureSkipVerify: true})
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	billing.await("say that it is not ready", func() bool { return w.readiness("billing") == http.StatusServiceUnavailable })
	payment.await("reach billing no more", func() bool {
		return read(t, ask[runReply](payment, "/run", curl(charges))).status != "200"
	})
	if got, err := try[svidReply](payment, "/svid", struct{}{}); err == nil && time.Now().After(got.Expires) {
		t.Errorf("the Workload API gave an expired SVID: %+v", got)
	}

	w.startIssuer()
	w.awaitReach(payment, charges)
	w.awaitReady(billing.proc)
}

// readiness asks a process on its admin socket.
func (w *world) readiness(name string) int {
	c := daemon.AdminClient(w.path(name, "run", "admin.sock"))
	defer c.CloseIdleConnections()
	resp, err := c.Get("http://admin/readyz")
	if err != nil {
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}

func TestTokens(t *testing.T) {
	t.Parallel()
	w := newWorld(t, time.Minute)
	w.startIssuer()

	// refused starts a sidecar in a data_dir of its own that must be refused.
	refused := func(dir, token, sentence, reason string) {
		t.Helper()
		file := w.write(dir, strings.Replace(w.proxyConfig(dir, token), "drain:", "log: {level: error}\ndrain:", 1))
		p := w.start(dir, nil, "sidecar", "run", "--config", file)
		if code := p.end(); code != daemon.Failed {
			t.Errorf("status %d, want %d", code, daemon.Failed)
		}
		out := strings.TrimSpace(p.out.String())
		if !strings.Contains(out, sentence) || strings.Contains(out, "\n") || !strings.Contains(out, "sallyport token create") {
			t.Errorf("not one sentence with %q and the next step:\n%s", sentence, out)
		}
		if strings.Contains(out, token) {
			t.Errorf("the token is shown:\n%s", out)
		}
		w.awaitAudit("issuer", "the refusal "+reason, func(r auditLine) bool {
			return r.Kind == "attest" && r.Decision == "deny" && r.Reason == reason
		})
	}

	token := w.token("payment")
	w.write("payment", w.proxyConfig("payment", token))
	payment := w.startWorkload("payment")
	refused("thief", token, "join token is already used", "token_used")
	refused("guesser", strings.Repeat("5e", 32), "join token is unknown", "token_unknown")

	a := w.admin()
	defer a.Close()
	late, err := a.CreateJoinToken(t.Context(), "late", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	w.await("see the token expire", func() bool { return time.Now().After(late.Expires) })
	refused("late", late.Value, "join token has expired", "token_expired")

	// The state on disk stands for the token from now on.
	payment.stop()
	w.write("payment", w.proxyConfig("payment", ""))
	ask[svidReply](w.startWorkload("payment"), "/svid", struct{}{})

	// Without both it is said what is missing.
	p := w.start("none", nil, "sidecar", "run", "--config", w.write("none", w.proxyConfig("none", "")))
	if code := p.end(); code == 0 || !strings.Contains(p.out.String(), "not attested and has no join token; next: sallyport token create") {
		t.Errorf("status %d and:\n%s", code, p.out)
	}
}

func TestPolicyEdit(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, time.Minute)
	w.startIssuer()
	_, _, payment, _ := w.pair()
	before := w.awaitSynced(2)
	file := filepath.Join(w.policy, "access.csv")
	good := contents(t, file)
	call := curl("http://billing.mesh.internal/v1/report")
	isRefusal(t, read(t, ask[runReply](payment, "/run", call)))

	for _, c := range []struct{ name, row, says string }{
		{"a mistake in a row", "p, oops, in, " + id("/ns/shop/sa/payment") + ", " + id("/ns/shop/sa/billing") + ", 8443, GET, /v1/report, -, alow", "alow"},
		{"a row that a test forbids", "p, oops, in, " + id("/ns/shop/sa/payment") + ", " + id("/ns/shop/sa/billing") + ", 8443, DELETE, /v1/charges/**, -, allow", "payment may not delete a charge"},
	} {
		if err := daemon.WriteFile(file, []byte(good+c.row+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		var out string
		w.await("see the edit refused: "+c.name, func() bool {
			r := w.sallyport("status")
			out = r.Output
			return r.Code == 0 && strings.Contains(out, "REFUSED") && strings.Contains(out, c.says)
		})
		if c.says == "alow" {
			at := "access.csv:" + lineOf(good+c.row, "p, oops")
			if !strings.Contains(out, at) || !strings.Contains(out, c.row) || !strings.Contains(out, "^") {
				t.Errorf("status does not show %q, the row and a caret:\n%s", at, out)
			}
		}
		if st := w.awaitSynced(2); st.PolicyRevision != before.PolicyRevision {
			t.Errorf("%s: revision %d is in force, want %d", c.name, st.PolicyRevision, before.PolicyRevision)
		}
		isRefusal(t, read(t, ask[runReply](payment, "/run", call)))
	}

	row := "p, pay-report-1, in, " + id("/ns/shop/sa/payment") + ", " + id("/ns/shop/sa/billing") + ", 8443, GET, /v1/report, -, allow\n"
	start := time.Now()
	if err := daemon.WriteFile(file, []byte(good+row), 0o600); err != nil {
		t.Fatal(err)
	}
	for w.awaitSynced(2).PolicyRevision == before.PolicyRevision {
	}
	took := time.Since(start)
	t.Logf("the edit was in force everywhere after %s", took.Round(time.Millisecond))
	if took > within/2 {
		t.Errorf("it took %s", took)
	}
	isEcho(t, read(t, ask[runReply](payment, "/run", call)), "GET", "/v1/report", id("/ns/shop/sa/payment"))
	if r := w.sallyport("status"); r.Code != 0 || strings.Contains(r.Output, "REFUSED") {
		t.Errorf("status %d:\n%s", r.Code, r.Output)
	}
}
