package test

import (
	"strings"
	"testing"
)

// Operators elsewhere: one may look at calls, the other at how proxies stand.
const (
	looker = "spiffe://" + trustDomain + "/ns/ops/sa/looker"
	viewer = "spiffe://" + trustDomain + "/ns/ops/sa/viewer"
)

// tapped looks at calls as an operator does, while web makes them: at the sidecar of
// web, at the gateway, and at both from another machine.
func (w *world) tapped(t *testing.T, web *hand) {
	identity := map[string][]string{}
	for _, who := range []string{looker, viewer} {
		dir := w.path(strings.ReplaceAll(who[len("spiffe://"):], "/", "-"))
		if r := w.sallyport("svid", "mint", who, "--ttl", "10m", "--write", dir); r.Code != 0 {
			t.Fatalf("mint %s: %+v", who, r)
		}
		identity[who] = []string{"--address", w.issuer, "--identity", dir}
	}
	atWeb := []string{`"reporter":"outbound"`, `"method":"POST"`, `"path":"/v1/pay"`, `"status":200`, `["Authorization","[hidden]"]`, `["X-Customer","[hidden]"]`, `["Accept","*/*"]`}
	out := []string{`"reporter":"gateway"`, `"src":"` + id("/ns/shop/sa/billing") + `"`, `"dst":"host:api.stripe.test"`, `"method":"CONNECT"`, `"status":200`, `"trace_id":"`}
	ofWeb := []string{"--reporter", "outbound", "--dst", id("/ns/shop/sa/payment"), "--path", "/v1/p", "--status", "200", "--headers"}
	ofOut := []string{"--dst", "host:api.stripe.test", "--method", "CONNECT"}
	for _, tt := range []struct {
		name string
		args []string
		want []string
	}{
		{"the sidecar of web, here", append([]string{w.path("web", "run", "admin.sock")}, ofWeb...), atWeb},
		{"the gateway, here", append([]string{w.path("gateway", "run", "admin.sock")}, ofOut...), out},
		{"the sidecar of web, by the issuer's socket", append([]string{id("/ns/shop/sa/web")}, ofWeb...), atWeb},
		{"the gateway, from afar", append(append([]string{id("/ns/edge/sa/gateway")}, ofOut...), identity[looker]...), out},
	} {
		var shown runReply
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			shown = w.sallyport(append([]string{"tap", "-n", "1", "-o", "json"}, tt.args...)...)
		}()
		w.await("see a call at "+tt.name, func() bool {
			ask[runReply](web, "/run", curl("-X", "POST", "-H", "Authorization: Bearer hidden-token", "-H", "X-Customer: hidden-too", "http://payment.mesh.internal/v1/pay?card=hidden-query"))
			select {
			case <-ended:
				return true
			default:
				return false
			}
		})
		for _, want := range tt.want {
			if !strings.Contains(shown.Output, want) {
				t.Errorf("%s: %s is not shown", tt.name, want)
			}
		}
		if shown.Code != 0 || strings.Contains(shown.Output, "hidden-") {
			t.Errorf("%s: tap ends with %d and shows\n%s", tt.name, shown.Code, shown.Output)
		}
	}
	for _, name := range []string{"web", "gateway"} {
		w.awaitAudit(name, "who looked here", func(r auditLine) bool {
			return r.Kind == "admin" && r.Verb == "tap" && strings.HasPrefix(r.Peer, "uid ")
		})
	}
	w.awaitAudit("gateway", "who looked from afar", func(r auditLine) bool {
		return r.Kind == "admin" && r.Verb == "tap" && r.Peer == looker && strings.Contains(r.Detail, "method=CONNECT")
	})
	refused := w.sallyport(append([]string{"tap", id("/ns/edge/sa/gateway"), "-n", "1"}, identity[viewer]...)...)
	if refused.Code != 1 || !strings.Contains(refused.Output, "has no right to it; a row of admin.csv gives it, for the method mesh.Tap") {
		t.Errorf("a viewer taps: %+v", refused)
	}
	w.awaitAudit("issuer", "both", func(r auditLine) bool {
		return r.Verb == "mesh.Tap" && r.Decision == "deny" && r.Src == viewer
	})
	w.awaitAudit("issuer", "both", func(r auditLine) bool {
		return r.Verb == "mesh.Tap" && r.Decision == "allow" && r.Src == looker
	})
}
