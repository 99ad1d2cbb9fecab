package test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// envSkew is the directory with the programs of an older version, which
// "make skew-test" builds.
const envSkew = "SKEW_BIN"

// TestSkew has programs of an older version get on with these, each way about:
// they join, renew what proves them, act on the policy and on an edit of it, call
// each other, and go out.
func TestSkew(t *testing.T) {
	if os.Getenv(envSkew) == "" {
		t.Skip("run by make skew-test, which builds the older programs")
	}
	meshtest.Need(t, "curl")
	for name, older := range map[string][]string{
		"older proxies with this issuer":              {"payment", "billing", "gateway"},
		"these proxies with an older issuer":          {"issuer"},
		"an older caller among these":                 {"payment"},
		"an older service and gateway, this caller":   {"billing", "gateway"},
		"an older issuer and gateway, these sidecars": {"issuer", "gateway"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			getOn(t, older)
		})
	}
}

func getOn(t *testing.T, older []string) {
	w := newWorld(t, 10*time.Second)
	w.older = older
	site := w.startOutside("api.stripe.test")
	w.routeOut(site)
	w.startIssuer()
	gateway := w.startGateway()
	pay, bill := &node{name: "payment"}, &node{name: "billing"}
	for _, n := range []*node{bill, pay} {
		w.join(n)
		w.write(n.name, w.sidecarConfig(n, w.token(n.name))+fmt.Sprintf("egress: {gateway: %s, addresses: [%q]}\n", id("/ns/edge/sa/gateway"), gateway))
	}
	billing, payment := w.startNode(bill), w.startNode(pay)
	w.awaitReach(payment, charges)
	get := func(h *hand, args ...string) page {
		t.Helper()
		return read(t, ask[runReply](h, "/run", curl(args...)))
	}
	isEcho(t, get(payment, charges+"/7"), "GET", "/v1/charges/7", id("/ns/shop/sa/payment"))
	decision := isRefusal(t, get(payment, "http://billing.mesh.internal/v1/skew"))
	w.awaitAudit("billing", "the refusal", func(r auditLine) bool { return r.ID == decision && r.Decision == "deny" })
	if p := get(billing, "--cacert", site.ca, "https://api.stripe.test/v1/charges"); p.status != "200" || !strings.Contains(p.body, `"path":"/v1/charges"`) {
		t.Errorf("not the answer of the site: %+v", p)
	}
	w.awaitAudit("gateway", "the tunnel", func(r auditLine) bool { return r.Kind == "egress_open" && r.Src == id("/ns/shop/sa/billing") })

	w.awaitSynced(3)
	w.another("skew") // the row that allows what was refused
	w.awaitReach(payment, "http://billing.mesh.internal/v1/skew")
	w.awaitSynced(3)
	for _, h := range []*hand{payment, billing} {
		first := ask[svidReply](h, "/svid", struct{}{}).Serial
		h.await("have its SVID renewed", func() bool { return ask[svidReply](h, "/svid", struct{}{}).Serial != first })
	}
	isEcho(t, get(payment, charges+"/8"), "GET", "/v1/charges/8", id("/ns/shop/sa/payment"))
}
