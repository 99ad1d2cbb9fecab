package test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/meshtest"
)

// TestSpoolFull takes the only sink of a sidecar away until its spool is full:
// calls that must be recorded are refused, and once the sink is back they are
// taken again without a restart, and a gap record counts exactly the refused.
func TestSpoolFull(t *testing.T) {
	t.Parallel()
	w := newWorld(t, time.Minute)
	w.startIssuer()
	w.serveBilling("audit: full")
	peer := &webPeer{t: t, addr: freePort(t), section: "http: {url: \"http://%s/in\"}", take: takeNDJSON}
	pay, billing := &node{name: "payment"}, &node{name: "billing"}
	w.join(billing)
	w.join(pay)
	w.write("billing", w.sidecarConfig(billing, w.token("billing"))+
		"audit:\n  spool: {max_bytes: 65536}\n  sinks:\n    - {name: http, "+peer.config()+"}\n")
	peer.start()
	t.Cleanup(func() { peer.stop() })
	w.startNode(billing)
	payment := w.startNode(pay)
	load := func(d time.Duration) loadReply {
		return ask[loadReply](payment, "/load", loadRequest{URL: "http://billing.mesh.internal/v1/charges", For: d, Every: 2 * time.Millisecond})
	}
	w.await("reach billing", func() bool { return load(time.Millisecond).OK > 0 })

	peer.stop()
	var refused int
	for range 20 {
		if r := load(time.Second); r.OK < r.Made {
			refused = r.Made - r.OK
			break
		}
	}
	if refused == 0 {
		t.Fatal("no call was refused while nothing is delivered")
	}
	peer.start()
	w.await("be served again", func() bool {
		r := load(time.Millisecond)
		refused += r.Made - r.OK
		return r.OK > 0 && r.OK == r.Made
	})
	counted := func() int { return w.refusedOf("billing") }
	w.await("find every refusal counted", func() bool { return counted() >= refused })
	if n := counted(); n != refused {
		t.Errorf("gap records count %d refusals, the caller saw %d", n, refused)
	}
	t.Logf("%d calls refused and counted", refused)
	w.awaitVerified(w.path("billing", "audit.jsonl"))
}

// refusedOf sums what the gap records of a log count as refused.
func (w *world) refusedOf(name string) (n int) {
	w.t.Helper()
	if err := audit.Each(w.path(name, "audit.jsonl"), func(_ []byte, r *audit.Record) error {
		if r.Kind == audit.KindGap && r.Reason == "refused" {
			n += int(r.Count)
		}
		return nil
	}); err != nil {
		w.t.Fatal(err)
	}
	return n
}

// TestGatewaySpoolFull takes the only sink of a gateway away until its spool is
// full: no tunnel is opened that cannot be recorded, and each that was refused is
// counted once there is room again.
func TestGatewaySpoolFull(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, 10*time.Minute)
	site := w.startOutside("api.stripe.test")
	w.routeOut(site)
	w.startIssuer()
	peer := &webPeer{t: t, addr: freePort(t), section: "http: {url: \"http://%s/in\"}", take: takeNDJSON}
	addr := freePort(t)
	w.write("gateway", w.proxyConfig("gateway", w.token("gateway"))+fmt.Sprintf("listen: %s\nresolvers: [%q]\n", addr, freePort(t))+
		"audit:\n  spool: {max_bytes: 65536}\n  sinks:\n    - {name: http, "+peer.config()+"}\n")
	peer.start()
	t.Cleanup(func() { peer.stop() })
	w.awaitReady(w.start("gateway", nil, "gateway", "run", "--config", w.path("gateway", "config.yaml")))
	bill := &node{name: "billing", gateways: addr}
	w.join(bill)
	billing := w.startNode(bill)
	refused, last := 0, ""
	// status is what the gateway answers, or the site behind it.
	status := func() string {
		r := ask[runReply](billing, "/run", []string{"curl", "-sS", "-i", "--max-time", "20", "--cacert", site.ca, "https://api.stripe.test/"})
		head, _, _ := strings.Cut(r.Output, "\r\n\r\n")
		p := read(t, runReply{Output: head})
		if p.status == "503" {
			refused++
			if strings.Contains(p.decision, "-r") { // the first is of a tunnel that was allowed and then not opened
				last = p.decision
			}
		}
		return p.status
	}
	w.await("reach the site", func() bool { return status() == "200" })
	peer.stop()
	opened := 0
	for ; opened < 500 && status() == "200"; opened++ {
	}
	for range 5 {
		if s := status(); s != "503" {
			t.Errorf("a tunnel was answered %s while nothing can be recorded", s)
		}
	}
	peer.start()
	w.await("be let out again", func() bool { return status() == "200" })
	w.await("find every refusal counted", func() bool { return w.refusedOf("gateway") >= refused })
	if n := w.refusedOf("gateway"); n != refused || refused < 6 {
		t.Errorf("gap records count %d refusals, the caller saw %d", n, refused)
	}
	t.Logf("%d tunnels opened until the spool was full, %d refused and counted", opened, refused)
	w.awaitVerified(w.path("gateway", "audit.jsonl"))
	w.await("hear why "+last+" from the issuer", func() bool { return strings.Contains(w.sallyport("why", last).Output, "refusals r") })
}
