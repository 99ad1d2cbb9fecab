package egress

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"sallyport/internal/audit"
)

// TestRequestsEndWithWhatTheyWereLent has the policy say otherwise how a host is
// asked, while it answers.
func TestRequestsEndWithWhatTheyWereLent(t *testing.T) {
	for name, change := range map[string]func(s *site) string{
		"another credential": func(s *site) string {
			return strings.Replace(s.injected("shop.test"), "secret: shop", "secret: other", 1)
		},
		"none":        func(s *site) string { return s.originated("shop.test") },
		"other paths": func(s *site) string { return strings.Replace(s.injected("shop.test"), "/v1/charges/**", "/v2/**", 1) },
		"another authority": func(s *site) string {
			return strings.Replace(s.injected("shop.test"), indent(s.ca), indent(startSite(s.t, "a.test").ca), 1)
		},
		"nothing of the kind": func(s *site) string { return "" },
	} {
		t.Run(name, func(t *testing.T) {
			w, s, _ := injectWorld(t)
			begun := make(chan struct{})
			s.does(func(rw http.ResponseWriter, r *http.Request) {
				_, _ = io.WriteString(rw, "begins, and "+strings.Repeat("more ", 100))
				_ = http.NewResponseController(rw).Flush()
				close(begun)
				<-r.Context().Done()
			})
			c := w.askOnStream(w.streamsOn(billing))
			if _, err := io.WriteString(c, "GET http://shop.test/v1/charges HTTP/1.1\r\nHost: shop.test\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			<-begun
			w.use(w.policy(asking, s.injected("shop.test")))
			w.gw.Rejudge() // the same, as it is after each change of something else
			if n := w.gw.Tunnels(); n != 1 {
				t.Fatalf("%d requests are left by the same policy", n)
			}
			w.use(w.policy(asking, change(s)))
			w.gw.Rejudge()
			w.until("the end", func(r audit.Record) bool { return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonRevoked) })
		})
	}
}

// TestTunnelsKeepToWhatTheyWereOpenedFor has a host come to be inspected while a
// tunnel for requests in the clear leads there.
func TestTunnelsKeepToWhatTheyWereOpenedFor(t *testing.T) {
	w, s := askWorld(t)
	c := w.askInside(dialStream, "shop.test:443")
	w.use(w.policy(asking, s.inspected("shop.test")))
	if res, _ := c.ask(t, "GET /v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n"); res.StatusCode != 403 || len(s.seen) > 0 {
		t.Errorf("%d, %d requests got there", res.StatusCode, len(s.seen))
	}
	w.until("a refusal", denial(ReasonRevoked))
	w.gw.Rejudge()
	w.until("the end", func(r audit.Record) bool { return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonRevoked) })
}

// TestChangesOfProtocols end what was agreed on under others, and nothing else.
func TestChangesOfProtocols(t *testing.T) {
	const both, h1, h2 = "    alpn: [h2, http/1.1]\n", "    alpn: [http/1.1]\n", "    alpn: [h2]\n"
	for _, tt := range []struct {
		name, tls, was, is string
		stays              bool
	}{
		{"passed through, the same", "probe: true", both, both, true},
		{"passed through, fewer", "probe: true", both, h1, false},
		{"passed through, any", "probe: true", both, "", true},
		{"inspected, the same", "tls: inspect", both, both, true},
		{"inspected, what is usual", "tls: inspect", "", h1, true},
		{"inspected, fewer", "tls: inspect", both, h1, false},
		{"inspected, what is usual instead", "tls: inspect", both, "", false},
		{"made by the gateway, the same", "tls: originate", h2, h2, true},
		{"made by the gateway, another", "tls: originate", h2, h1, false},
		{"made by the gateway, what is usual instead", "tls: originate", h2, "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, s, _ := inspectWorld(t)
			says := func(alpn string) string {
				return strings.Replace(s.originated("shop.test"), "tls: originate", tt.tls, 1) + alpn
			}
			const rows = asking + "p, tunnel, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:shop.test, 443, CONNECT, -, -, allow\n"
			w.use(w.policy(rows, says(tt.was)))
			if tt.tls == "tls: originate" {
				begun := make(chan struct{})
				s.does(func(rw http.ResponseWriter, r *http.Request) {
					_ = http.NewResponseController(rw).Flush()
					close(begun)
					<-r.Context().Done()
				})
				if _, err := io.WriteString(w.askOnStream(w.streamsOn(billing)), "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n"); err != nil {
					t.Fatal(err)
				}
				<-begun
			} else if _, ref := dialStream(w, billing, "shop.test:443"); ref != nil {
				t.Fatalf("refused: %+v", ref)
			}
			w.use(w.policy(rows, says(tt.is)))
			w.gw.Rejudge()
			if tt.stays {
				if n := w.gw.Tunnels(); n != 1 {
					t.Errorf("%d tunnels are left", n)
				}
				return
			}
			w.until("the end", func(r audit.Record) bool { return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonRevoked) })
		})
	}
}
