package egress

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/hop"
	"sallyport/internal/meshtest"
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
	for name, as := range map[string]func(s, other *site) string{
		"another name": func(s, other *site) string { return strings.Replace(s.probed("shop.test"), s.addr, other.addr, 1) },
		"another authority": func(s, other *site) string {
			return strings.Replace(other.probed("shop.test"), other.addr, s.addr, 1)
		},
		"no TLS": nil, // of the database
	} {
		t.Run(name, func(t *testing.T) {
			s, other := startSite(t, "shop.test"), startSite(t, "evil.test")
			w := newWorld(t, nil)
			reason := ReasonCertificate
			if as == nil {
				reason = ReasonDial
				w.use(w.policy(probing, strings.Replace(s.probed("shop.test"), s.addr, w.db.addr, 1)))
			} else {
				w.use(w.policy(probing, as(s, other)))
			}
			for range 3 {
				if _, ref := dial1(w, billing, "shop.test:443"); ref == nil || ref.status != 502 || ref.id == "" {
					t.Errorf("%+v", ref)
				}
			}
			w.until("the refusal", denial(reason))
			if n := s.connected() + other.connected(); n > 4 {
				t.Errorf("%d connections for three tunnels and one look", n)
			}
			if len(s.seen)+len(other.seen) > 0 {
				t.Error("a request got through")
			}
		})
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

// asks is ask with a host by number. made says that the probe was begun, and has
// ended at once.
func (p *probes) asks(t *testing.T, who spiffeid.ID, n int, made bool) (pr *probe, begun bool, err error) {
	t.Helper()
	pr, begun, err = p.ask(t.Context(), probeKey{host: Host{name: fmt.Sprintf("h%d.test", n)}}, who)
	if err == nil && made {
		if begun {
			pr.over = time.Now().Add(probeLife)
			p.end(pr)
		}
		p.leave(pr)
	}
	return pr, begun, err
}

func TestProbesAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p probes
		first, begun, _ := p.asks(t, billing, 0, false)
		if again, anew, _ := p.asks(t, inventory, 0, false); !begun || anew || again != first {
			t.Fatal("one that is under way is begun again")
		}
		first.over = time.Now().Add(probeLife)
		p.end(first)
		p.leave(first)
		p.leave(first)
		time.Sleep(probeLife - time.Second)
		if _, begun, _ := p.asks(t, billing, 0, true); begun {
			t.Error("it is forgotten within its time")
		}
		time.Sleep(time.Second)
		if _, begun, _ := p.asks(t, billing, 0, true); !begun {
			t.Error("it outlives its time")
		}
	})
}

// workload is one of many.
func workload(n int) spiffeid.ID { return meshtest.ID(fmt.Sprintf("/ns/shop/sa/w%d", n)) }

// TestProbesOfOneDriveOutHisOwn has callers ask for more hosts than are remembered.
func TestProbesOfOneDriveOutHisOwn(t *testing.T) {
	var p probes
	known := func(n int) bool { return p.known[probeKey{host: Host{name: fmt.Sprintf("h%d.test", n)}}] != nil }
	next := 0
	fill := func(who spiffeid.ID, n int) {
		t.Helper()
		for range n {
			if _, _, err := p.asks(t, who, next, true); err != nil {
				t.Fatal(err)
			}
			next++
		}
	}
	fill(inventory, 3)
	fill(billing, 3*maxProbesOf)
	if !known(0) || !known(next-maxProbesOf) || known(next-maxProbesOf-1) || len(p.known) != maxProbesOf+3 {
		t.Errorf("%d are known after one caller has asked for %d", len(p.known), 3*maxProbesOf)
	}
	for n := range maxProbes / maxProbesOf {
		fill(workload(n), maxProbesOf-1)
	}
	fill(workload(1000), 100)
	if !known(0) || !known(next-100) || len(p.known) != maxProbes {
		t.Errorf("%d are known when all have asked for much", len(p.known))
	}
	// Many that have one each: whoever comes drives somebody out, and stays.
	p = probes{}
	for n := range maxProbes + 10 {
		fill(workload(n), 1)
	}
	if len(p.known) != maxProbes || len(p.of) != maxProbes || !known(next-1) {
		t.Errorf("%d are known, of %d callers", len(p.known), len(p.of))
	}
}

// TestProbesUnderWayAreBounded refuses what is too much at once.
func TestProbesUnderWayAreBounded(t *testing.T) {
	var p probes
	next := 0
	begin := func(who spiffeid.ID) (*probe, error) {
		next++
		pr, _, err := p.asks(t, who, next, false)
		return pr, err
	}
	refused := func(err error) bool { return err != nil && reasonOf(err) == ReasonProbeCap }
	var mine []*probe
	for range maxProbingOf {
		pr, err := begin(billing)
		if err != nil {
			t.Fatal(err)
		}
		mine = append(mine, pr)
	}
	if _, err := begin(billing); !refused(err) {
		t.Errorf("one more of the caller: %v", err)
	}
	if _, _, err := p.asks(t, billing, 1, false); err != nil {
		t.Errorf("one that is under way already: %v", err)
	}
	for n := range maxProbing/2/maxProbingOf - 1 {
		for range maxProbingOf {
			if _, err := begin(workload(n)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for n := range maxProbing / 2 / fewProbing { // now that half are taken
		for range fewProbing {
			if _, err := begin(workload(100 + n)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := begin(workload(100 + n)); !refused(err) {
			t.Errorf("one more of a caller while half are taken: %v", err)
		}
	}
	if _, err := begin(inventory); !refused(err) {
		t.Errorf("one more of all: %v", err)
	}
	p.leave(mine[1])
	if _, err := begin(billing); !refused(err) {
		t.Errorf("while one that was left still ends: %v", err)
	}
	p.end(mine[1])
	if _, err := begin(billing); !refused(err) {
		t.Errorf("one more of who has many when one has ended: %v", err)
	}
	if _, err := begin(inventory); err != nil {
		t.Errorf("one of another when one has ended: %v", err)
	}
}

// TestProbesEndWithWhoWaits breaks one off when the last has left, and no sooner.
func TestProbesEndWithWhoWaits(t *testing.T) {
	var p probes
	first, _, _ := p.asks(t, billing, 0, false)
	_, _, _ = p.asks(t, inventory, 0, false)
	p.leave(first)
	if err := first.ctx.Err(); err != nil {
		t.Fatalf("while one waits: %v", err)
	}
	p.leave(first)
	if first.ctx.Err() == nil {
		t.Error("it goes on for nobody")
	}
	second, begun, _ := p.asks(t, billing, 0, false)
	if !begun {
		t.Error("what was broken off is waited for")
	}
	p.end(first)
	if len(p.known) != 0 || p.going[first.key] != second {
		t.Error("what was broken off is known")
	}
	p.end(second)
	p.leave(second)
	if p.n != 0 || len(p.going) != 0 || len(p.known) != 1 || len(p.of) != 1 {
		t.Errorf("what is left: %+v", &p)
	}
}

// TestProbesEndWithTheirTunnels has a host say nothing, and its caller go.
func TestProbesEndWithTheirTunnels(t *testing.T) {
	came, gone := make(chan bool, 8), make(chan bool, 8)
	addr := serve(t, func(c net.Conn) {
		if n, _ := c.Read(make([]byte, 1)); n > 0 { // else it is the tunnel, which waits
			came <- true
			_, _ = io.Copy(io.Discard, c)
			gone <- true
		}
	})
	w := newWorld(t, nil)
	w.use(w.policy(probing, fmt.Sprintf("  - host: shop.test\n    probe: true\n    private: [127.0.0.1/32]\n    route: {endpoints: [%q]}\n", addr)))
	for name, end := range map[string]func(*hop.Stream){
		"the caller goes":       func(s *hop.Stream) { s.Close() },
		"its row is taken away": func(*hop.Stream) { w.use(w.policy(access, "")); w.gw.Rejudge() },
	} {
		w.use(w.policy(probing, fmt.Sprintf("  - host: shop.test\n    probe: true\n    private: [127.0.0.1/32]\n    route: {endpoints: [%q]}\n", addr)))
		s, err := w.streamsOn(billing).Open()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(s, "CONNECT shop.test:443 HTTP/1.1\r\nHost: shop.test:443\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		<-came
		end(s)
		<-gone
		w.gw.probes.mu.Lock()
		if n := len(w.gw.probes.known) + len(w.gw.probes.going); n != 0 {
			t.Errorf("%s: %d probes are remembered of a host that was not heard", name, n)
		}
		w.gw.probes.mu.Unlock()
	}
}

// TestProbesOfferTheProtocols of the destination, and look again when it has others.
func TestProbesOfferTheProtocols(t *testing.T) {
	s := startSite(t, "shop.test")
	agreed := make(chan string, 8)
	s.tls.Store(&tls.Config{Certificates: s.certs, MaxVersion: tls.VersionTLS12, NextProtos: []string{"x-own", "http/1.1"}, VerifyConnection: func(cs tls.ConnectionState) error {
		agreed <- cs.NegotiatedProtocol
		return nil
	}})
	w := newWorld(t, nil)
	for _, tt := range []struct{ alpn, want string }{{"", ""}, {"    alpn: [http/1.1]\n", "http/1.1"}, {"    alpn: [x-own, http/1.1]\n", "x-own"}} {
		w.use(w.policy(probing, s.probed("shop.test")+tt.alpn))
		tun, ref := dial1(w, billing, "shop.test:443")
		if ref != nil {
			t.Fatalf("%q: refused: %+v", tt.alpn, ref)
		}
		tun.Close()
		select {
		case got := <-agreed:
			if got != tt.want {
				t.Errorf("%q: the probe spoke %q", tt.alpn, got)
			}
		default:
			t.Errorf("%q: nobody has looked", tt.alpn)
		}
	}
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
