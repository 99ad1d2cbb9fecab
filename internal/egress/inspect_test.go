package egress

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
)

// inspected describes a site whose TLS ends at the gateway.
func (s *site) inspected(host string) string {
	return strings.Replace(s.originated(host), "tls: originate", "tls: inspect", 1)
}

// inspectorWorld has an Inspector, which inspects nothing yet, and a pool for whom
// its workloads trust.
func inspectorWorld(t *testing.T, limits ...Limits) (*world, *x509.CertPool) {
	t.Helper()
	i, err := OpenInspector(filepath.Join(t.TempDir(), "inspection.key"))
	if err != nil {
		t.Fatal(err)
	}
	return newWorld(t, func(c *Config) {
		c.Inspector = i
		for _, l := range limits {
			c.Limits = l
		}
	}), x509.NewCertPool()
}

// inspect puts a policy in force, and the certificate of those it has inspected into
// the pool.
func (w *world) inspect(access, hosts string, roots *x509.CertPool) {
	w.t.Helper()
	w.use(w.policy(access, hosts))
	i := w.gw.cfg.Inspector
	if err := i.Use(w.snap.Load()); err != nil {
		w.t.Fatal(err)
	}
	if !roots.AppendCertsFromPEM(i.PEM()) {
		w.t.Fatal("no certificate to trust")
	}
}

// inspectWorld has a site that is inspected, and gives what its workloads trust.
func inspectWorld(t *testing.T, limits ...Limits) (*world, *site, *x509.CertPool) {
	t.Helper()
	s := startSite(t, "shop.test")
	w, roots := inspectorWorld(t, limits...)
	w.inspect(asking, s.inspected("shop.test"), roots)
	return w, s, roots
}

// askTLS speaks TLS inside a tunnel.
func (w *world) askTLS(dial dialFunc, authority string, cfg *tls.Config) (*askConn, error) {
	w.t.Helper()
	tun, ref := dial(w, billing, authority)
	if ref != nil {
		w.t.Fatalf("CONNECT: %+v", ref)
	}
	tc := tls.Client(netConn{t: tun}, cfg)
	if err := tc.HandshakeContext(w.t.Context()); err != nil {
		return nil, err
	}
	return &askConn{tc, bufio.NewReader(tc)}, nil
}

func TestInspectedRequestsAreJudgedOneByOne(t *testing.T) {
	for name, dial := range map[string]dialFunc{"HTTP/1.1": dial1, "HTTP/2": dial2, "streams": dialStream} {
		t.Run(name, func(t *testing.T) {
			w, s, roots := inspectWorld(t)
			c, err := w.askTLS(dial, "shop.test:443", &tls.Config{RootCAs: roots, ServerName: "shop.test", NextProtos: []string{"h2", "http/1.1"}})
			if err != nil {
				t.Fatal(err)
			}
			res, body := c.ask(t, "GET /v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n")
			if r := <-s.seen; res.StatusCode != 200 || body != "served" || r.Host != "shop.test" || r.URL.Path != "/v1/a" {
				t.Errorf("%d %q, the site saw %s %s", res.StatusCode, body, r.Host, r.URL)
			}
			if res, _ := c.ask(t, "GET /admin HTTP/1.1\r\nHost: shop.test\r\n\r\n"); res.StatusCode != 403 {
				t.Errorf("a path that no row allows: %d", res.StatusCode)
			}
			if res, _ := c.ask(t, "GET /v1/a HTTP/1.1\r\nHost: evil.test\r\n\r\n"); res.StatusCode != 421 {
				t.Errorf("another host behind the right name: %d", res.StatusCode)
			}
			w.until("the path", denial("no_row"))
			w.until("the host", denial(ReasonMisdirected))
			if len(s.seen) > 0 || s.connected() != 1 {
				t.Errorf("the site got %d requests more, on %d connections", len(s.seen), s.connected())
			}
		})
	}
}

func TestInspectionIsBoundToTheName(t *testing.T) {
	w, s, roots := inspectWorld(t)
	for name, tt := range map[string]struct {
		cfg    *tls.Config
		reason Reason
	}{
		"another name":        {&tls.Config{ServerName: "evil.test", RootCAs: roots}, ReasonSNI},
		"no name":             {&tls.Config{InsecureSkipVerify: true}, ReasonNoSNI},
		"a caller that knows": {&tls.Config{ServerName: "shop.test", RootCAs: x509.NewCertPool()}, ReasonInspect},
	} {
		if _, err := w.askTLS(dialStream, "shop.test:443", tt.cfg); err == nil {
			t.Errorf("%s: the handshake succeeded", name)
		}
		w.until(name, denial(tt.reason))
	}
	c := w.askOnStream(w.streamsOn(billing))
	if res, _ := c.ask(t, "GET http://shop.test:443/v1/a HTTP/1.1\r\nHost: shop.test:443\r\n\r\n"); res.StatusCode != 405 {
		t.Errorf("in the clear: %d", res.StatusCode)
	}
	if n := s.connected(); n != 0 {
		t.Errorf("the site got %d connections", n)
	}
	w.use(w.policy(access, s.inspected("shop.test")))
	if _, ref := dialStream(w, billing, "shop.test:443"); ref == nil || ref.status != 403 {
		t.Errorf("without a row: %+v", ref)
	}
}

// TestTheInspectorSpeaksForNobodyElse has its key sign for another name, as whoever
// has stolen it would.
func TestTheInspectorSpeaksForNobodyElse(t *testing.T) {
	file := filepath.Join(t.TempDir(), "inspection.key")
	i, err := OpenInspector(file)
	if err != nil {
		t.Fatal(err)
	}
	again, err := OpenInspector(file)
	if err != nil {
		t.Fatal(err)
	}
	snap := meshtest.Snapshot(t, map[string]string{"egress.yaml": "destinations:\n  - {host: shop.test, tls: inspect}\n  - {host: '*.wild.test', tls: inspect}\n  - {host: other.test}\n"})
	for _, x := range []*Inspector{i, again} {
		if err := x.Use(snap); err != nil {
			t.Fatal(err)
		}
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(i.PEM())
	for name, want := range map[string]bool{"shop.test": true, "a.wild.test": true, "wild.test": false, "other.test": false, "evilshop.test": false} {
		c, err := again.leaf(name) // of another gateway with the same key
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name}); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := i.Use(&mesh.Snapshot{}); err != nil || i.PEM() != nil {
		t.Errorf("without inspected hosts there is %q, %v", i.PEM(), err)
	}
}

func TestWorkloadsAreToldWhomToTrust(t *testing.T) {
	w, _, _ := inspectWorld(t)
	for name, c := range map[string]*askConn{"a connection": w.askOn1(), "a stream": w.askOnStream(w.streamsOn(inventory))} {
		for range 2 {
			res, body := c.ask(t, "GET /ca.pem HTTP/1.1\r\nHost: "+InspectionHost+"\r\n\r\n")
			if res.StatusCode != http.StatusOK || body != string(w.gw.cfg.Inspector.PEM()) {
				t.Errorf("%s: %d %q", name, res.StatusCode, body)
			}
		}
	}
	if n := len(w.audit.Records()); n != 0 {
		t.Errorf("%d records: %s", n, w.lines())
	}
}

// TestSlowHellosToTheInspector end in time.
func TestSlowHellosToTheInspector(t *testing.T) {
	w, _, _ := inspectWorld(t, Limits{HelloTimeout: 50 * time.Millisecond})
	tun, ref := dialStream(w, billing, "shop.test:443")
	if ref != nil {
		t.Fatalf("%+v", ref)
	}
	_, _ = tun.Write([]byte{22, 3, 1}) // its time may be over already
	w.until("the end", func(r audit.Record) bool { return r.Reason == string(ReasonHelloTime) })
	if _, err := tun.Read(make([]byte, 1)); err == nil || errors.Is(err, net.ErrClosed) {
		t.Errorf("the tunnel ended with %v", err)
	}
}

// TestHandshakesThatComeToNothing are recorded for what they are.
func TestHandshakesThatComeToNothing(t *testing.T) {
	w, _, roots := inspectWorld(t, Limits{HelloTimeout: 3 * time.Second})
	tun, ref := dialStream(w, billing, "shop.test:443")
	if ref != nil {
		t.Fatalf("%+v", ref)
	}
	cfg := &tls.Config{RootCAs: roots, ServerName: "shop.test"}
	if err := tls.Client(&deafConn{netConn{t: tun}}, cfg).HandshakeContext(t.Context()); err == nil {
		t.Error("who reads nothing has shaken hands")
	}
	w.until("who says nothing after the hello", func(r audit.Record) bool {
		return r.Reason == string(ReasonHelloTime) && strings.Contains(r.Detail, "the handshake with the gateway was not over")
	})
	old := cfg.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS11, tls.VersionTLS11
	if _, err := w.askTLS(dialStream, "shop.test:443", old); err == nil {
		t.Error("TLS 1.1 is spoken")
	}
	w.until("who speaks TLS 1.1", func(r audit.Record) bool {
		return r.Reason == string(ReasonInspect) && strings.Contains(r.Detail, "in the place of the host failed: tls: client offered only unsupported versions")
	})
}

// A deafConn waits with its first read until the connection is broken off.
type deafConn struct{ netConn }

func (c *deafConn) Read(p []byte) (int, error) {
	for {
		if _, err := c.netConn.Read(p); err != nil {
			return 0, err
		}
	}
}

// TestInspectionKeysAreNobodyElses are not used when others may have read them.
func TestInspectionKeysAreNobodyElses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "inspection.key")
	if _, err := OpenInspector(file); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o622} {
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenInspector(file); err == nil || !strings.Contains(err.Error(), "mode") {
			t.Errorf("%04o: %v", mode, err)
		}
	}
}

// TestTheInspectorRenewsItself has the same policy in force for long.
func TestTheInspectorRenewsItself(t *testing.T) {
	file := filepath.Join(t.TempDir(), "inspection.key")
	snap := meshtest.Snapshot(t, map[string]string{"egress.yaml": "destinations:\n  - {host: shop.test, tls: inspect}\n"})
	synctest.Test(t, func(t *testing.T) {
		i, err := OpenInspector(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := i.Use(snap); err != nil {
			t.Fatal(err)
		}
		first := string(i.PEM())
		<-time.After(inspectorLife / 3)
		if string(i.PEM()) != first {
			t.Error("it is another after a third of its time")
		}
		<-time.After(inspectorLife)
		c, err := i.leaf("shop.test")
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(i.PEM())
		if _, err := c.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: "shop.test", CurrentTime: time.Now()}); err != nil || string(i.PEM()) == first {
			t.Errorf("after its time: %v", err)
		}
	})
}

// TestWhomToTrustIsForWhoProvesWhoHeIs refuses an SVID that has lost its authority.
func TestWhomToTrustIsForWhoProvesWhoHeIs(t *testing.T) {
	w, _, _ := inspectWorld(t)
	c := w.askOnStream(w.streamsOn(billing))
	const request = "GET /ca.pem HTTP/1.1\r\nHost: " + InspectionHost + "\r\n\r\n"
	if res, _ := c.ask(t, request); res.StatusCode != 200 {
		t.Fatalf("%d", res.StatusCode)
	}
	w.gw.mu.Lock()
	for conn := range w.gw.conns {
		conn.who.disproved.Store(true)
	}
	w.gw.mu.Unlock()
	if res, body := c.ask(t, request); res.StatusCode != 403 || strings.Contains(body, "CERTIFICATE") {
		t.Errorf("%d %q", res.StatusCode, body)
	}
	w.until("the refusal", denial(ReasonIdentity))
}

// TestInspectedHellosOffer what the destination lists, and what every gateway
// speaks with callers.
func TestInspectedHellosOffer(t *testing.T) {
	for _, tt := range []struct {
		alpn  string
		offer []string
		ok    bool
	}{
		{"", []string{"h2", "http/1.1"}, true},
		{"", []string{"x-own", "http/1.1"}, true},
		{"[h2, http/1.1]", []string{"h2", "http/1.1"}, true},
		{"[h2]", []string{"http/1.1"}, true},
		{"[h2]", []string{"h2", "http/1.1"}, true},
		{"[http/1.1]", nil, true},
		{"[http/1.1]", []string{"http/1.1"}, true},
		{"[http/1.1]", []string{"h2", "http/1.1"}, false},
		{"[h2]", []string{"x-own", "http/1.1"}, false},
		{"[h2, http/1.1]", []string{"acme-tls/1"}, false},
		{"", []string{"h2"}, false},
	} {
		w, s, roots := inspectWorld(t)
		if tt.alpn != "" {
			w.use(w.policy(asking, s.inspected("shop.test")+"    alpn: "+tt.alpn+"\n"))
		}
		_, err := w.askTLS(dialStream, "shop.test:443", &tls.Config{RootCAs: roots, ServerName: "shop.test", NextProtos: tt.offer})
		if (err == nil) != tt.ok || !tt.ok && !strings.Contains(err.Error(), "no application protocol") {
			t.Errorf("alpn %q, offered %q: %v", tt.alpn, tt.offer, err)
		}
		if !tt.ok {
			w.until("the refusal", denial(ReasonALPN))
		}
	}
}
