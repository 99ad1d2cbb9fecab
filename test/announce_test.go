package test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// A sidecar that announces somebody else's address as an endpoint of its service
// is refused, and that is recorded; nobody is sent there until the operator of
// the issuer allows the network.
func TestAForeignEndpointIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t, time.Minute)
	issuer := w.startIssuer()
	pay, bill := &node{name: "payment"}, &node{name: "billing"}
	w.join(pay)
	w.join(bill)
	edit := func(file string, change func(string) string) {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		w.rewrite(file, change(string(b)))
	}
	edit(w.path(bill.name, "config.yaml"), func(c string) string {
		return strings.Replace(c, "inbound: {", `inbound: {advertise: "203.0.113.5:15006", `, 1)
	})
	billing, payment := w.startNode(bill), w.startNode(pay)
	billing.await("be told why", func() bool {
		return strings.Contains(billing.out.String(), "endpoint of billing at 203.0.113.5:15006: this proxy comes from 127.0.0.1, not from there; next: ")
	})
	w.awaitAudit("issuer", "the refused endpoint", func(r auditLine) bool {
		return r.Kind == "attest" && r.Decision == "deny" && r.Reason == "endpoint_address" && r.Verb == "announce" &&
			r.Dst == id("/ns/shop/sa/billing") && r.Detail == "service billing at 203.0.113.5:15006" && strings.HasPrefix(r.Peer, "127.0.0.1:")
	})
	if r := ask[runReply](payment, "/run", curl(charges)); !strings.Contains(r.Output, "Sallyport-Refused: no_endpoint") {
		t.Errorf("nobody is there, and the answer is %s", r.Output)
	}
	issuer.stop()
	edit(w.path("issuer", "config.yaml"), func(c string) string { return fmt.Sprintf("%sendpoints: {allow: [203.0.113.0/24]}\n", c) })
	w.startIssuer()
	billing.await("be taken in", func() bool {
		out := billing.out.String()
		return strings.Contains(out[strings.LastIndex(out, "issuer refused"):], `"msg":"connected to issuer","for":"subscribe"`)
	})
}
