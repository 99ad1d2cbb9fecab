package egress

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/audit"
)

const probing = access + `
p, shop, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:shop.test, 443, CONNECT, -, -, allow
`

// probed describes a site whose TLS passes through, once its certificate was seen.
func (s *site) probed(host string) string {
	return strings.Replace(s.originated(host), "tls: originate", "probe: true", 1)
}

// speaksTLS makes a handshake in a tunnel.
func (s *site) speaksTLS(t *testing.T, tun clientTunnel, protocols ...string) (*tls.Conn, error) {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(s.ca))
	tc := tls.Client(netConn{t: tun}, &tls.Config{ServerName: "shop.test", RootCAs: roots, NextProtos: protocols})
	return tc, tc.HandshakeContext(t.Context())
}

// TestHostsAreProbed opens tunnels to a host after one look at its certificate.
func TestHostsAreProbed(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		s := startSite(t, "shop.test")
		w := newWorld(t, nil)
		w.use(w.policy(probing, s.probed("shop.test")))
		for range 3 {
			tun, ref := dial(w, billing, "shop.test:443")
			if ref != nil {
				t.Fatalf("refused: %+v", ref)
			}
			if _, err := s.speaksTLS(t, tun); err != nil {
				t.Error(err)
			}
			tun.Close()
		}
		w.until("the certificate", func(r audit.Record) bool {
			return r.Kind == audit.KindEgressOpen && strings.Contains(r.Detail, `certificate of "`)
		})
		if n := s.connected(); n != 4 {
			t.Errorf("%d connections for three tunnels and one look", n)
		}
	})
}

// TestHostsMustStandTheProbe refuses tunnels to who has no certificate for the
// name, and asks it once for many.
func TestHostsMustStandTheProbe(t *testing.T) {
	s, other := startSite(t, "shop.test"), startSite(t, "evil.test")
	for name, extra := range map[string]string{
		"another name":      strings.Replace(s.probed("shop.test"), s.addr, other.addr, 1),
		"another authority": strings.Replace(other.probed("shop.test"), other.addr, s.addr, 1),
		"no TLS":            "", // of the database
	} {
		w := newWorld(t, nil)
		if extra == "" {
			extra = strings.Replace(s.probed("shop.test"), s.addr, w.db.addr, 1)
		}
		w.use(w.policy(probing, extra))
		before := s.connected() + other.connected()
		for range 3 {
			if _, ref := dial1(w, billing, "shop.test:443"); ref == nil || ref.status != 502 || ref.id == "" {
				t.Errorf("%s: %+v", name, ref)
			}
		}
		reason := ReasonCertificate
		if name == "no TLS" {
			reason = ReasonDial
		} else if n := s.connected() + other.connected() - before; n > 4 {
			t.Errorf("%s: %d connections for three tunnels and one look", name, n)
		}
		w.until(name, denial(reason))
	}
	if len(s.seen)+len(other.seen) > 0 {
		t.Error("a request got through")
	}
}

// TestRejudgeAsksForTheProbe ends a tunnel whose host nobody has looked at, when it
// comes to be asked for.
func TestRejudgeAsksForTheProbe(t *testing.T) {
	s := startSite(t, "shop.test")
	w := newWorld(t, nil)
	w.use(w.policy(probing, strings.Replace(strings.Split(s.probed("shop.test"), "    ca:")[0], "    probe: true\n", "", 1)))
	tun, ref := dial1(w, billing, "shop.test:443")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	defer tun.Close()
	w.gw.Rejudge()
	if n := w.gw.Tunnels(); n != 1 {
		t.Fatalf("%d tunnels while nothing has changed", n)
	}
	w.use(w.policy(probing, s.probed("shop.test")))
	w.gw.Rejudge()
	w.until("its end", func(r audit.Record) bool { return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonRevoked) })
}

func TestProbesAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p probes
		key := func(n int) probeKey { return probeKey{host: Host{name: fmt.Sprintf("h%d.test", n)}} }
		first, found := p.fresh(key(0), time.Now())
		if again, there := p.fresh(key(0), time.Now()); found || !there || again != first {
			t.Fatal("one that is under way is begun again")
		}
		first.over = time.Now().Add(probeLife)
		close(first.done)
		time.Sleep(probeLife - time.Second)
		if _, found := p.fresh(key(0), time.Now()); !found {
			t.Error("it is forgotten within its time")
		}
		time.Sleep(time.Second)
		if _, found := p.fresh(key(0), time.Now()); found {
			t.Error("it outlives its time")
		}
		for n := range 2 * maxProbes {
			p.fresh(key(n), time.Now())
		}
		if len(p.of) > maxProbes {
			t.Errorf("%d are remembered", len(p.of))
		}
	})
}

// TestProtocolsOfTheHello lets through what a destination lists, and nothing else.
func TestProtocolsOfTheHello(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		s := startSite(t, "shop.test")
		w := newWorld(t, nil)
		w.use(w.policy(probing, s.probed("shop.test")+"    alpn: [http/1.1, x-own]\n"))
		try := func(protocols ...string) error {
			tun, ref := dial(w, billing, "shop.test:443")
			if ref != nil {
				t.Fatalf("refused: %+v", ref)
			}
			defer tun.Close()
			_, err := s.speaksTLS(t, tun, protocols...)
			return err
		}
		for _, offer := range [][]string{nil, {"http/1.1"}, {"x-own", "http/1.1"}} {
			if err := try(offer...); err != nil {
				t.Errorf("%q: %v", offer, err)
			}
		}
		for _, offer := range [][]string{{"h2"}, {"http/1.1", "h2"}, {"HTTP/1.1"}} {
			if err := try(offer...); err == nil || !strings.Contains(err.Error(), "no application protocol") {
				t.Errorf("%q: %v", offer, err)
			}
		}
		w.until("the refusal", denial(ReasonALPN))
		for _, r := range w.audit.Records() {
			if r.Kind == audit.KindEgressClose && r.Reason == string(ReasonALPN) && r.BytesUp != 0 {
				t.Errorf("%d bytes got through", r.BytesUp)
			}
		}
	})
}

// TestGREASEOfBrowsers lets a hello through that carries what may be an encrypted
// name, behind the name that was allowed, where the destination says so.
func TestGREASEOfBrowsers(t *testing.T) {
	base := realHello("shop.test")
	// An outer hello (RFC 9849, 5): suite, config, key share of 32 bytes, payload.
	outer := slices.Concat([]byte{0, 0, 1, 0, 1, 7, 0, 32}, make([]byte, 32), []byte{0, 144}, make([]byte, 144))
	grease := records(rebuild(base, sniBytes("shop.test"), extensionBytes(extECH, outer)), 16000)
	s := startSite(t, "shop.test")
	w := newWorld(t, nil)
	for _, tt := range []struct{ ech, starts string }{{"", "\x15\x03\x03\x00\x02\x02\x70"}, {"    ech: allow-grease\n", "\x16\x03\x03"}} {
		w.use(w.policy(probing, s.probed("shop.test")+tt.ech))
		if got := sendHello(t, w, dial1, "shop.test", grease, 1<<20); !strings.HasPrefix(got, tt.starts) {
			t.Errorf("with %q: %q", tt.ech, got)
		}
	}
	w.until("the refusal", denial(ReasonECH))
	w, s, _ = inspectWorld(t)
	w.use(w.policy(asking, s.inspected("shop.test")+"    ech: allow-grease\n"))
	if got := sendHello(t, w, dial1, "shop.test", grease, 1<<20); !strings.HasPrefix(got, "\x16\x03\x03") {
		t.Errorf("inspected: %q", got)
	}
}
