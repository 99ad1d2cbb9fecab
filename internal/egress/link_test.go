package egress

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"sallyport/internal/audit"
	"sallyport/internal/meshtest"
)

// startSealed is a proxy that is spoken to over TLS, with the certificates of a site.
func startSealed(t *testing.T, answer string, cfg *tls.Config) *parentProxy {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return serveParent(t, tls.NewListener(ln, cfg), &parentProxy{answer: answer})
}

// sealedBy is slow.test behind a proxy, at a name that leads to it.
func sealedBy(w *world, name string, p *parentProxy, ca string) string {
	_, port, _ := net.SplitHostPort(p.addr)
	if ca != "" {
		ca = "\n          ca: |\n" + strings.ReplaceAll(indent(ca), "      ", "            ")
	}
	return fmt.Sprintf("  - host: slow.test\n    proto: tcp\n    private: [127.0.0.1/32]\n    route:\n      endpoints: [%q]\n      proxies:\n        - address: \"https://%s:%s\"\n          credentials: parent%s\n", w.db.addr, name, port, strings.TrimRight(ca, "\n"))
}

// TestTunnelsGoThroughAProxyOverTLS has tunnels, each way of its caller ended by
// itself.
func TestTunnelsGoThroughAProxyOverTLS(t *testing.T) {
	s := startSite(t, "direct.test")
	p := startSealed(t, "", &tls.Config{Certificates: s.certs})
	w := parentWorld(t, "timeouts: {idle: 1m}")
	w.use(w.policy(access, sealedBy(w, "direct.test", p, s.ca)))
	both(t, func(t *testing.T, dial dialFunc) {
		tun, ref := dial(w, billing, "slow.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v %s", ref, w.lines())
		}
		defer tun.Close()
		echoes(t, tun)
		req := <-p.asks
		if user, password, ok := basicOf(req); req.Host != w.db.addr || !ok || user != "gateway" || password != "let-me-out" {
			t.Errorf("asked for %s by %s %s", req.Host, user, password)
		}
		if err := tun.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(tun); err != nil || len(b) > 0 {
			t.Errorf("the tunnel ended with %q, %v", b, err)
		}
	})
	w.untilEnds(3, func(r audit.Record) bool { return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonDone) })
}

// TestAProxyMustProveItsName before it is told who we are.
func TestAProxyMustProveItsName(t *testing.T) {
	s, other := startSite(t, "direct.test"), startSite(t, "direct.test")
	trusted := &tls.Config{Certificates: s.certs}
	for name, tt := range map[string]struct {
		cfg      *tls.Config
		name, ca string
		reason   Reason
	}{
		"its certificate is another's": {trusted, "127.0.0.1", s.ca, ReasonCertificate},
		"nobody knows its authority":   {trusted, "direct.test", other.ca, ReasonCertificate},
		"nor does the system":          {trusted, "direct.test", "", ReasonCertificate},
		"it speaks an old TLS":         {&tls.Config{Certificates: s.certs, MaxVersion: tls.VersionTLS12}, "direct.test", s.ca, ReasonDial},
		"it speaks no TLS":             {nil, "direct.test", s.ca, ReasonDial},
	} {
		t.Run(name, func(t *testing.T) {
			p := (*parentProxy)(nil)
			if tt.cfg == nil {
				p = startParent(t, "HTTP/1.1 200 OK\r\n\r\n")
			} else {
				p = startSealed(t, "HTTP/1.1 200 OK\r\n\r\n", tt.cfg)
			}
			w := parentWorld(t, "timeouts: {idle: 1m}")
			w.use(w.policy(access, sealedBy(w, tt.name, p, tt.ca)))
			_, ref := dial1(w, billing, "slow.test:5432")
			if ref == nil || ref.status != 502 || len(p.asks) > 0 {
				t.Errorf("%+v, %d questions to the proxy%s", ref, len(p.asks), w.lines())
			}
			w.until("the refusal", denial(tt.reason))
		})
	}
}

// TestAProxyOverTLSThatBreaksOff is no orderly end of the host.
func TestAProxyOverTLSThatBreaksOff(t *testing.T) {
	s := startSite(t, "direct.test")
	cut := make(chan net.Conn, 1)
	ln := tls.NewListener(meshtest.Listen(t, ""), &tls.Config{Certificates: s.certs})
	p := serveParent(t, ln, &parentProxy{answer: "HTTP/1.1 200 OK\r\n\r\nhalf of an answ", broken: cut})
	w := parentWorld(t, "timeouts: {idle: 1m}")
	w.use(w.policy(access, sealedBy(w, "direct.test", p, s.ca)))
	tun, ref := dialStream(w, billing, "slow.test:5432")
	if ref != nil {
		t.Fatalf("refused: %+v %s", ref, w.lines())
	}
	defer tun.Close()
	if _, err := io.ReadFull(tun, make([]byte, len("half of an answ"))); err != nil {
		t.Fatal(err)
	}
	(<-cut).(*tls.Conn).NetConn().Close()
	if _, err := tun.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("the tunnel ended with %v", err)
	}
	w.until("the end", func(r audit.Record) bool { return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonReset) })
}

// TestRejudgeFollowsTheAuthorityOfAProxy ends what went through one that is believed
// by another authority now.
func TestRejudgeFollowsTheAuthorityOfAProxy(t *testing.T) {
	s, other := startSite(t, "direct.test"), startSite(t, "direct.test")
	p := startSealed(t, "", &tls.Config{Certificates: s.certs})
	w := parentWorld(t, "timeouts: {idle: 1m}")
	w.use(w.policy(access, sealedBy(w, "direct.test", p, s.ca)))
	tun, ref := dial1(w, billing, "slow.test:5432")
	if ref != nil {
		t.Fatalf("refused: %+v %s", ref, w.lines())
	}
	defer tun.Close()
	echoes(t, tun)
	w.use(w.policy(access, sealedBy(w, "direct.test", p, other.ca)))
	w.gw.Rejudge()
	if end := w.until("close", kind(audit.KindEgressClose)); end.Reason != string(ReasonRevoked) {
		t.Errorf("recorded %+v", end)
	}
}

// TestRequestsGoThroughAProxyOverTLS in TLS of their own inside.
func TestRequestsGoThroughAProxyOverTLS(t *testing.T) {
	door := startSite(t, "direct.test")
	p := startSealed(t, "", &tls.Config{Certificates: door.certs})
	_, port, _ := net.SplitHostPort(p.addr)
	w, s := routedWorldWith(t, "\tendpoints: [%q] # %q\n\tproxies: [\"https://direct.test:"+port+"\"]\n", func(c *Config) {
		c.Roots = x509.NewCertPool()
		c.Roots.AppendCertsFromPEM([]byte(door.ca))
	})
	h := w.streamsOn(billing)
	for n := range 3 {
		if res, body := w.askOnStream(h).ask(t, "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n"); res.StatusCode != 200 || body != "served" {
			t.Fatalf("%d %q%s", res.StatusCode, body, w.lines())
		}
		w.untilEnds(n+1, kind(audit.KindEgressClose)) // when the connection is kept
	}
	if len(s[0].seen) != 3 || len(p.asks) != 1 {
		t.Errorf("the site has had %d requests, the proxy %d", len(s[0].seen), len(p.asks))
	}
}
