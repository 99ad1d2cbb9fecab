package test

import (
	"os"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

func TestCurl(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, time.Minute)
	site := w.startOutside("api.stripe.test")
	w.routeOut(site)
	shop := w.startOutside("shop.test")
	look := w.startOutside("look.test")
	w.extend("egress.yaml", shop.originated("shop.test")+strings.Replace(look.originated("look.test"), "tls: originate", "tls: inspect", 1))
	w.extend("access.csv", "p, bill-look-1, out, "+id("/ns/shop/sa/billing")+", host:look.test, 443, GET, /v1/**, env.sni=same, allow\n")
	w.extend("access.csv", "p, bill-shop-1, out, "+id("/ns/shop/sa/billing")+", host:shop.test, 443, GET|POST, /v1/**, env.sni=same, allow\n")
	w.startIssuer()
	gw := w.startGateway()
	pay, bill := &node{name: "payment", gateways: gw}, &node{name: "billing", gateways: gw}
	w.join(bill)
	w.join(pay)
	billing, payment := w.startNode(bill), w.startNode(pay)
	w.awaitReach(payment, "http://billing.mesh.internal/v1/charges")

	t.Run("an allowed call is answered", func(t *testing.T) {
		p := read(t, ask[runReply](payment, "/run", curl("-d", "{}", "http://billing.mesh.internal/v1/charges")))
		isEcho(t, p, "POST", "/v1/charges", id("/ns/shop/sa/payment"))
	})
	t.Run("a denied call is refused with the id that the audit log has", func(t *testing.T) {
		p := read(t, ask[runReply](payment, "/run", curl("-X", "DELETE", "http://billing.mesh.internal/v1/charges/7")))
		decision := isRefusal(t, p)
		w.awaitAudit("billing", "decision "+decision, func(r auditLine) bool {
			return r.ID == decision && r.Kind == "decision" && r.Decision == "deny" &&
				r.Src == id("/ns/shop/sa/payment") && r.Dst == id("/ns/shop/sa/billing")
		})
	})
	t.Run("a service that no rule leads to is refused", func(t *testing.T) {
		decision := isRefusal(t, read(t, ask[runReply](payment, "/run", curl("http://inventory.mesh.internal/v1/stock/9"))))
		w.awaitAudit("payment", "decision "+decision, func(r auditLine) bool { return r.ID == decision && r.Decision == "deny" })
	})
	t.Run("the port of one service needs no proxy", func(t *testing.T) {
		p := read(t, ask[runReply](payment, "/run", curl("--noproxy", "*", "http://"+pay.billing+"/v1/charges/3")))
		isEcho(t, p, "GET", "/v1/charges/3", id("/ns/shop/sa/payment"))
	})
	t.Run("a process that is not the workload is refused", func(t *testing.T) {
		for _, args := range [][]string{
			{"--proxy", "http://" + pay.out, "http://billing.mesh.internal/v1/charges"},
			{"http://" + pay.billing + "/v1/charges"},
		} {
			line := curl(args...)
			decision := isRefusal(t, read(t, command(t, line[0], line[1:]...)))
			w.awaitAudit("payment", "decision "+decision, func(r auditLine) bool { return r.ID == decision && r.Reason == "not_workload" })
		}
	})
	t.Run("a call out goes through the gateway", func(t *testing.T) {
		p := read(t, ask[runReply](billing, "/run", curl("--cacert", site.ca, "https://api.stripe.test/v1/charges")))
		if p.status != "200" || !strings.Contains(p.body, `"path":"/v1/charges"`) {
			t.Errorf("not the answer of the site: %+v", p)
		}
		w.awaitAudit("gateway", "the tunnel", func(r auditLine) bool {
			return r.Kind == "egress_open" && r.Src == id("/ns/shop/sa/billing") && r.Dst == "host:api.stripe.test"
		})
	})
	t.Run("a call out in the clear goes on over TLS", func(t *testing.T) {
		socks := []string{"--noproxy", "", "--proxy", "socks5h://" + bill.out}
		for name, args := range map[string][]string{"by HTTP_PROXY": nil, "by CONNECT": {"--proxytunnel"}, "by SOCKS": socks} {
			p := read(t, ask[runReply](billing, "/run", curl(append(args, "-d", "{}", "http://shop.test/v1/"+strings.Fields(name)[1])...)))
			if p.status != "200" || !strings.Contains(p.body, `"path":"/v1/`+strings.Fields(name)[1]) {
				t.Errorf("%s: not the answer of the site: %+v", name, p)
			}
			for what, refused := range map[string][]string{"path": {"http://shop.test/admin"}, "method": {"-X", "DELETE", "http://shop.test/v1/1"}} {
				decision := isRefusal(t, read(t, ask[runReply](billing, "/run", curl(append(args, refused...)...))))
				w.awaitAudit("gateway", what+" "+name, func(r auditLine) bool {
					return r.ID == decision && r.Kind == "decision" && r.Decision == "deny" && r.Src == id("/ns/shop/sa/billing") && r.Dst == "host:shop.test"
				})
			}
		}
		w.awaitAudit("gateway", "the request", func(r auditLine) bool {
			return r.Kind == "egress_close" && r.Src == id("/ns/shop/sa/billing") && r.Dst == "host:shop.test" && r.Verb == "POST"
		})
		isRefusal(t, read(t, ask[runReply](payment, "/run", curl("http://shop.test/v1/1"))))
	})
	t.Run("a call out is inspected where the policy says so", func(t *testing.T) {
		ca := w.inspection(bill)
		billing.await(ca, func() bool { _, err := os.Stat(ca); return err == nil })
		p := read(t, ask[runReply](billing, "/run", curl("--cacert", ca, "https://look.test/v1/a")))
		if p.status != "200" || !strings.Contains(p.body, `"path":"/v1/a"`) {
			t.Errorf("not the answer of the site: %+v", p)
		}
		isRefusal(t, read(t, ask[runReply](billing, "/run", curl("--cacert", ca, "https://look.test/admin"))))
		if r := ask[runReply](billing, "/run", curl("--cacert", ca, "https://api.stripe.test/v1/charges")); r.Code != 60 { // an authority that curl does not know
			t.Errorf("the gateway stands in for a host that is not inspected: curl ended with %d:\n%s", r.Code, r.Output)
		}
	})
	t.Run("a call out by SOCKS goes through the gateway", func(t *testing.T) {
		socks := []string{"--noproxy", "", "--proxy", "socks5h://" + bill.out, "--cacert", site.ca}
		p := read(t, ask[runReply](billing, "/run", curl(append(socks, "https://api.stripe.test/v1/socks")...)))
		if p.status != "200" || !strings.Contains(p.body, `"path":"/v1/socks"`) {
			t.Errorf("not the answer of the site: %+v", p)
		}
		r := ask[runReply](billing, "/run", curl(append(socks, "https://evil.test/")...))
		if r.Code != 97 || !strings.Contains(r.Output, "(2)") { // CURLE_PROXY, not allowed by ruleset
			t.Errorf("curl to evil.test ended with %d, want 97:\n%s", r.Code, r.Output)
		}
		line := curl(append(socks, "https://api.stripe.test/v1/socks")...)
		if r := command(t, line[0], line[1:]...); r.Code != 97 {
			t.Errorf("another process: curl ended with %d, want 97:\n%s", r.Code, r.Output)
		}
	})
	t.Run("a call out that no rule allows is refused", func(t *testing.T) {
		for _, c := range []struct {
			from *hand
			host string
		}{{billing, "evil.test"}, {payment, "api.stripe.test"}} {
			r := ask[runReply](c.from, "/run", []string{"curl", "-sS", "-i", "--max-time", "20", "https://" + c.host + "/"})
			if r.Code != 56 { // the proxy refused CONNECT
				t.Errorf("curl from %s to %s ended with %d, want 56:\n%s", c.from.name, c.host, r.Code, r.Output)
			}
			head, _, _ := strings.Cut(r.Output, "\r\n\r\n")
			p := read(t, runReply{Output: head})
			if p.status != "403" || p.decision == "" {
				t.Errorf("not a proper refusal: %s", head)
			}
			w.awaitAudit("gateway", "decision "+p.decision, func(r auditLine) bool {
				return r.ID == p.decision && r.Decision == "deny" && r.Dst == "host:"+c.host
			})
		}
	})
	t.Run("every log verifies", func(t *testing.T) {
		for _, name := range []string{"issuer", "gateway", "billing", "payment"} {
			w.awaitVerified(w.path(name, "audit.jsonl"))
		}
	})
}

// awaitReach waits until a service has told the issuer, and the issuer the
// caller, where it is.
func (w *world) awaitReach(h *hand, url string) {
	w.t.Helper()
	h.await("reach "+url, func() bool {
		return read(w.t, ask[runReply](h, "/run", curl(url))).status == "200"
	})
}
