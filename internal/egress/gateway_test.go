//lint:file-ignore SA1019 http2.Transport is the one client that sends CONNECT with a body that goes on

package egress

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/socket"
	"sallyport/internal/svid"
	"sallyport/internal/telemetry"
)

var (
	billing   = meshtest.ID("/ns/shop/sa/billing")
	inventory = meshtest.ID("/ns/shop/sa/inventory")
	gatewayID = meshtest.ID("/ns/mesh/sa/gateway")
)

// access lets billing out to the fake internet; inventory may reach nothing.
const access = `
p, stripe, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:api.stripe.test, *, CONNECT, -, env.sni=same, allow
p, direct, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:direct.test, *, CONNECT, -, env.sni=same, allow
p, nameless, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:nameless.test, *, CONNECT, -, -, allow
p, namely, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:namely.test, *, CONNECT, -, env.sni=same, allow
p, db, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:db.test, *, CONNECT, -, -, allow
p, rebind, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:*.rebind.test, *, CONNECT, -, -, allow
p, down, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:down.test, *, CONNECT, -, -, allow
p, slow, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:slow.test, *, CONNECT, -, -, allow
p, listed, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:127.0.0.1, *, CONNECT, -, -, allow
p, literal, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:1.1.1.1, *, CONNECT, -, -, allow
p, metadata, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:169.254.169.254, *, CONNECT, -, -, allow
`

// world is a gateway on loopback with a fake internet beside it.
type world struct {
	t        testing.TB
	ca       *meshtest.CA
	source   *svid.Source // of the gateway
	caller   *svid.Source // of who was made last
	gw       *Gateway
	addr     string
	audit    *audit.Log
	judge    *authz.Judge
	snap     atomic.Pointer[mesh.Snapshot]
	dns      *dnsServer
	stripe   *tlsServer
	db       *echoServer
	refusing atomic.Bool // the recorder of the gateway fails
	stop     context.CancelFunc
	stopped  chan error
}

func (w *world) Append(r *audit.Record) error {
	if w.refusing.Load() {
		return errors.New("disk is full")
	}
	return w.audit.Append(r)
}

func (w *world) policy(access, extra string) *mesh.Snapshot {
	egress := fmt.Sprintf(`destinations:
  - host: api.stripe.test
    private: [127.0.0.1/32]
    route: {endpoints: ["%[1]s"]}
  - host: direct.test
    private: [127.0.0.1/32]
  - host: nameless.test
    sni: optional
    private: [127.0.0.1/32]
    route: {endpoints: ["%[1]s"]}
  - host: namely.test
    sni: optional
    private: [127.0.0.1/32]
    route: {endpoints: ["%[1]s"]}
  - host: db.test
    proto: tcp
    private: [127.0.0.1/32]
    route: {endpoints: ["%[2]s"]}
  - host: down.test
    proto: tcp
    private: [127.0.0.1/32]
    route: {endpoints: ["127.0.0.1:1"]}
%[3]s`, w.stripe.addr, w.db.addr, extra)
	return meshtest.Snapshot(w.t, map[string]string{"access.csv": access, "egress.yaml": egress})
}

func (w *world) use(s *mesh.Snapshot) {
	w.t.Helper()
	set, err := authz.Compile(s)
	if err != nil {
		w.t.Fatal(err)
	}
	w.snap.Store(s)
	w.judge.Use(set)
}

func newWorld(t testing.TB, change func(*Config)) *world {
	t.Helper()
	return newWorldOf(t, change, func(*Gateway) {})
}

// newWorldOf is newWorld of a Gateway that is changed before it serves.
func newWorldOf(t testing.TB, change func(*Config), before func(*Gateway)) *world {
	t.Helper()
	w := &world{t: t, ca: meshtest.NewCA(t, meshtest.TD), audit: audit.NewMemory(), stopped: make(chan error, 1)}
	w.dns = startDNS(t, func(q dns.Question, m *dns.Msg, _ bool) {
		if q.Qtype != dns.TypeA {
			return
		}
		switch strings.ToLower(q.Name) {
		case "direct.test.":
			rrs(q, m, "@ 60 IN A 127.0.0.1", "@ 60 IN A 10.9.9.9")
		case "private.rebind.test.":
			rrs(q, m, "@ 60 IN A 10.9.9.9")
		case "metadata.rebind.test.":
			rrs(q, m, "@ 60 IN A 169.254.169.254")
		case "self.rebind.test.":
			rrs(q, m, "@ 60 IN A 127.0.0.1")
		case "broken.rebind.test.":
			m.Rcode = dns.RcodeServerFailure
		default:
			m.Rcode = dns.RcodeNameError
		}
	})
	w.stripe = startTLS(t, "api.stripe.test", "direct.test", "nameless.test", "namely.test")
	w.db = startEcho(t)
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	var err error
	if w.judge, err = authz.NewJudge(authz.JudgeConfig{Audit: w.audit, Log: log}); err != nil {
		t.Fatal(err)
	}
	w.source = meshtest.Source(t, w.ca, gatewayID)
	cfg := Config{
		TLS:      svid.ServerTLS(w.source, func(spiffeid.ID) error { return nil }),
		Standing: w.source.Standing,
		Judge:    w.judge,
		Snapshot: w.snap.Load,
		Names:    w.dns.resolver(t, ResolverConfig{Timeout: time.Minute}),
		Audit:    w,
		Log:      log,
	}
	if change != nil {
		change(&cfg)
	}
	// A slow machine is no caller that says nothing.
	cfg.Limits.HandshakeTimeout = cmp.Or(cfg.Limits.HandshakeTimeout, time.Minute)
	cfg.Limits.HelloTimeout = cmp.Or(cfg.Limits.HelloTimeout, time.Minute)
	if w.gw, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	before(w.gw)
	w.use(w.policy(access, ""))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	w.stop = cancel
	go func() { w.stopped <- w.gw.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-w.stopped; err != nil {
			t.Errorf("Serve: %v", err)
		}
		now, done := context.WithCancel(context.Background())
		done()
		w.gw.Drain(now)
		if n := w.gw.Tunnels(); n != 0 {
			t.Errorf("%d tunnels outlive Drain", n)
		}
	})
	return w
}

// tlsServer is an origin: it echoes what it gets inside TLS.
type tlsServer struct {
	addr  string
	roots *x509.CertPool
	seen  chan string // the server name of each handshake begun

	change atomic.Pointer[func(*tls.Config)]
}

func startTLS(t testing.TB, names ...string) *tlsServer {
	t.Helper()
	web := meshtest.NewCA(t, spiffeid.RequireTrustDomainFromString("web.test"))
	key := meshtest.NewKey(t)
	chain, err := web.Sign(spiffeid.RequireFromString("spiffe://web.test/origin"), key.Public(), time.Hour, names...)
	if err != nil {
		t.Fatal(err)
	}
	s := &tlsServer{roots: x509.NewCertPool(), seen: make(chan string, 64)}
	s.roots.AddCert(web.Root())
	cert := tls.Certificate{PrivateKey: key}
	for _, c := range chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	s.addr = serve(t, func(c net.Conn) {
		cfg := &tls.Config{GetCertificate: func(i *tls.ClientHelloInfo) (*tls.Certificate, error) {
			s.seen <- i.ServerName
			return &cert, nil
		}}
		if f := s.change.Load(); f != nil {
			(*f)(cfg)
		}
		tc := tls.Server(c, cfg)
		if tc.Handshake() != nil {
			return
		}
		_, _ = io.Copy(tc, tc)
		_ = tc.CloseWrite()
		_, _ = io.Copy(io.Discard, tc)
	})
	return s
}

// echoServer sends back what it gets, and ends when the caller has.
type echoServer struct {
	addr string
	hold atomic.Bool // say "bye" and end at once, but go on reading
	got  chan string
}

func startEcho(t testing.TB) *echoServer {
	s := &echoServer{got: make(chan string, 16)}
	s.addr = serve(t, func(c net.Conn) {
		if s.hold.Load() {
			_, _ = io.WriteString(c, "bye")
			_ = c.(*net.TCPConn).CloseWrite()
			b, _ := io.ReadAll(c)
			s.got <- string(b)
			return
		}
		n, _ := io.Copy(c, c)
		_ = c.(*net.TCPConn).CloseWrite()
		s.got <- fmt.Sprint(n)
	})
	return s
}

func serve(t testing.TB, handle func(net.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			stop := context.AfterFunc(t.Context(), func() { c.Close() })
			wg.Go(func() { handle(c); c.Close(); stop() })
		}
	})
	return ln.Addr().String()
}

func (w *world) client(id spiffeid.ID, alpn ...string) *tls.Config {
	w.caller = meshtest.Source(w.t, w.ca, id)
	return svid.ClientTLS(w.caller, gatewayID, alpn...)
}

// tunnel is the client's end, over HTTP/1.1 or HTTP/2.
type clientTunnel interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// refused is the answer to a CONNECT that was not allowed.
type refused struct {
	status int
	id     string
	body   string
}

type dialFunc func(w *world, id spiffeid.ID, authority string) (clientTunnel, *refused)

type conn1 struct {
	*tls.Conn
	br *bufio.Reader
}

func (c *conn1) Read(p []byte) (int, error) { return c.br.Read(p) }

func (w *world) open1(id spiffeid.ID) *conn1 {
	w.t.Helper()
	c, err := tls.Dial("tcp", w.addr, w.client(id, "http/1.1"))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	return &conn1{c, bufio.NewReader(c)}
}

func dial1(w *world, id spiffeid.ID, authority string) (clientTunnel, *refused) {
	w.t.Helper()
	c := w.open1(id)
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", authority, authority)
	res, err := http.ReadResponse(c.br, &http.Request{Method: "CONNECT"})
	if err != nil {
		w.t.Fatal(err)
	}
	return orRefused(w, c, res)
}

func orRefused(w *world, c clientTunnel, res *http.Response) (clientTunnel, *refused) {
	if res.StatusCode == http.StatusOK {
		return c, nil
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return nil, &refused{res.StatusCode, res.Header.Get("Sallyport-Decision"), string(body)}
}

type conn2 struct {
	io.ReadCloser
	pw *io.PipeWriter
}

func (c *conn2) Write(p []byte) (int, error) { return c.pw.Write(p) }
func (c *conn2) CloseWrite() error           { return c.pw.Close() }
func (c *conn2) Close() error                { c.pw.CloseWithError(io.ErrClosedPipe); return c.ReadCloser.Close() }

func dial2(w *world, id spiffeid.ID, authority string) (clientTunnel, *refused) {
	w.t.Helper()
	tr := &http2.Transport{TLSClientConfig: w.client(id, "h2")}
	w.t.Cleanup(tr.CloseIdleConnections)
	return connect2(w, tr, authority)
}

func connect2(w *world, tr *http2.Transport, authority string) (clientTunnel, *refused) {
	w.t.Helper()
	pr, pw := io.Pipe()
	ctx, cancel := context.WithCancel(context.Background())
	w.t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, "CONNECT", "https://"+w.addr, pr)
	if err != nil {
		w.t.Fatal(err)
	}
	req.Host = authority
	res, err := tr.RoundTrip(req)
	if err != nil {
		w.t.Fatal(err)
	}
	return orRefused(w, &conn2{res.Body, pw}, res)
}

// netConn makes a net.Conn of a tunnel for crypto/tls.
type netConn struct {
	net.Conn
	t clientTunnel
}

func (c netConn) Read(p []byte) (int, error)       { return c.t.Read(p) }
func (c netConn) Write(p []byte) (int, error)      { return c.t.Write(p) }
func (c netConn) CloseWrite() error                { return c.t.CloseWrite() }
func (c netConn) Close() error                     { return c.t.Close() }
func (c netConn) SetDeadline(time.Time) error      { return nil }
func (c netConn) SetReadDeadline(time.Time) error  { return nil }
func (c netConn) SetWriteDeadline(time.Time) error { return nil }

// until waits for a record that fits, and fails after a while without one.
func (w *world) until(what string, fits func(r audit.Record) bool) audit.Record {
	w.t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	end := time.After(time.Minute)
	for {
		for _, r := range w.audit.Records() {
			if fits(r) {
				return r
			}
		}
		select {
		case <-end:
			w.t.Fatalf("no record: %s; there are %s", what, w.lines())
		case <-tick.C:
		}
	}
}

func (w *world) lines() string {
	var b strings.Builder
	for _, r := range w.audit.Records() {
		fmt.Fprintf(&b, "\n  %s %s id=%s %s %s rule=%s src=%s dst=%s:%d up=%d down=%d %s", r.Kind, r.Decision, r.ID, r.Reason, r.Verb, r.Rule, r.Src, r.Dst, r.Port, r.BytesUp, r.BytesDown, r.Detail)
	}
	return b.String()
}

func kind(k audit.Kind) func(audit.Record) bool {
	return func(r audit.Record) bool { return r.Kind == k }
}

func denial(reason Reason) func(audit.Record) bool {
	return func(r audit.Record) bool { return r.Decision == audit.Deny && r.Reason == string(reason) }
}

func both(t *testing.T, f func(t *testing.T, dial dialFunc)) {
	t.Run("over HTTP/1.1", func(t *testing.T) { f(t, dial1) })
	t.Run("over HTTP/2", func(t *testing.T) { f(t, dial2) })
	t.Run("on a stream of a proxy", func(t *testing.T) { f(t, dialStream) })
}

func TestAllowedTunnelCarriesTLS(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		w := newWorld(t, nil)
		tun, ref := dial(w, billing, "API.stripe.test:443")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		tc := tls.Client(netConn{t: tun}, &tls.Config{ServerName: "api.stripe.test", RootCAs: w.stripe.roots})
		if _, err := io.WriteString(tc, "hello"); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 5)
		if _, err := io.ReadFull(tc, b); err != nil || string(b) != "hello" {
			t.Fatalf("got %q, %v", b, err)
		}
		if err := tc.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		_ = tun.CloseWrite()
		if rest, err := io.ReadAll(tc); err != nil || len(rest) != 0 {
			t.Errorf("got %q, %v at the end", rest, err)
		}
		_, _ = io.Copy(io.Discard, tun) // to go before the end would break it off
		tun.Close()
		open := w.until("open", kind(audit.KindEgressOpen))
		end := w.until("close", kind(audit.KindEgressClose))
		if open.ID == "" || open.ID != end.ID || open.Rule != "stripe" || open.Src != billing.String() ||
			open.Dst != "host:api.stripe.test" || open.Port != 443 || !strings.Contains(open.Detail, w.stripe.addr) {
			t.Errorf("open record %+v", open)
		}
		if end.Reason != "done" || end.BytesUp < 200 || end.BytesDown < 500 || end.Duration <= 0 {
			t.Errorf("close record %+v", end)
		}
	})
}

func TestDNSAnswerIsScreenedAndDialled(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		w := newWorld(t, nil)
		_, port, _ := net.SplitHostPort(w.stripe.addr)
		tun, ref := dial(w, billing, "direct.test:"+port)
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		defer tun.Close()
		tc := tls.Client(netConn{t: tun}, &tls.Config{ServerName: "direct.test", RootCAs: w.stripe.roots})
		if err := tc.Handshake(); err != nil {
			t.Fatal(err)
		}
		if open := w.until("open", kind(audit.KindEgressOpen)); !strings.Contains(open.Detail, "skipped 10.9.9.9") {
			t.Errorf("row 61: record says %q", open.Detail)
		}
	})
}

func TestRefusals(t *testing.T) {
	tests := []struct {
		name      string
		who       spiffeid.ID
		authority string
		status    int
		reason    Reason
	}{
		{"a host without a rule", billing, "evil.test:443", 403, "no_row"},
		{"a caller without a rule", inventory, "api.stripe.test:443", 403, "no_row"},
		{"a host that resolves to a private address", billing, "private.rebind.test:443", 403, ReasonPrivate},
		{"a host that resolves to the metadata address", billing, "metadata.rebind.test:80", 403, ReasonMetadata},
		{"a host that resolves to the gateway", billing, "self.rebind.test:443", 403, ReasonLocal},
		{"a host whose resolver fails", billing, "broken.rebind.test:443", 502, ReasonResolve},
		{"a host that does not exist", billing, "gone.rebind.test:443", 502, ReasonResolve},
		{"a host that does not answer", billing, "down.test:443", 502, ReasonDial},
		{"an address that no destination lists", billing, "1.1.1.1:443", 403, ReasonLiteral},
		{"the metadata address itself", billing, "169.254.169.254:80", 403, ReasonLiteral},
		{"an address without a rule", billing, "9.9.9.9:443", 403, "no_row"},
		{"a mapped address", billing, "[::ffff:9.9.9.9]:443", 403, "no_row"},
		{"a number", billing, "2130706433:443", 400, ReasonName},
		{"a hex number", billing, "0x7f000001:443", 400, ReasonName},
		{"a single label", billing, "localhost:443", 400, ReasonName},
		{"two trailing dots", billing, "api.stripe.test..:443", 400, ""},
		{"a label that ends in a hyphen", billing, "api-.stripe.test:443", 400, ReasonName},
	}
	both(t, func(t *testing.T, dial dialFunc) {
		w := newWorld(t, nil)
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				tun, ref := dial(w, tt.who, tt.authority)
				if tun != nil {
					t.Fatal("a tunnel")
				}
				if ref.status != tt.status || ref.id == "" || !strings.Contains(ref.body, `"decision":"`+ref.id+`"`) {
					t.Fatalf("got %+v, want %d with a decision", ref, tt.status)
				}
				rec := w.until("denial", func(r audit.Record) bool { return r.ID == ref.id && r.Decision == audit.Deny })
				if tt.reason != "" && rec.Reason != string(tt.reason) {
					t.Errorf("recorded %+v, want reason %s", rec, tt.reason)
				}
				if rec.Src != tt.who.String() {
					t.Errorf("recorded for %s", rec.Src)
				}
			})
		}
		for _, r := range w.audit.Records() {
			if r.Kind == audit.KindEgressOpen {
				t.Errorf("opened: %+v", r)
			}
		}
	})
}

func TestRequestsNeedARowAndADestination(t *testing.T) {
	w := newWorld(t, nil)
	for req, status := range map[string]int{
		"GET http://api.stripe.test/ HTTP/1.1\r\nHost: api.stripe.test\r\n\r\n": 403,
		"GET / HTTP/1.1\r\nHost: api.stripe.test\r\n\r\n":                       403,
		"OPTIONS * HTTP/1.1\r\nHost: api.stripe.test\r\n\r\n":                   400,
		"TRACE / HTTP/1.1\r\nHost: api.stripe.test\r\n\r\n":                     405,
	} {
		c := w.open1(billing)
		io.WriteString(c, req)
		res, err := http.ReadResponse(c.br, nil)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode != status || res.Header.Get("Sallyport-Decision") == "" {
			t.Errorf("%q: %d %v", req, res.StatusCode, res.Header)
		}
		c.Close()
	}
	tr := &http2.Transport{TLSClientConfig: w.client(billing, "h2")}
	defer tr.CloseIdleConnections()
	res, err := (&http.Client{Transport: tr}).Get("https://" + w.addr + "/")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 405 || res.Header.Get("Sallyport-Decision") == "" {
		t.Errorf("over HTTP/2: %d %v", res.StatusCode, res.Header)
	}
	if got := len(w.audit.Records()); got != 5 {
		t.Errorf("%d records, want 5: %s", got, w.lines())
	}
}

func TestBadRequestsAreRefusedAndRecorded(t *testing.T) {
	w := newWorld(t, nil)
	for _, req := range []string{
		"CONNECT /p HTTP/1.1\r\nHost: api.stripe.test:443\r\n\r\n",
		"CONNECT //a HTTP/1.1\r\nHost: api.stripe.test:443\r\n\r\n",
		"CONNECT ok@api.stripe.test:443 HTTP/1.1\r\nHost: api.stripe.test:443\r\n\r\n",
		"CONNECT [::1%25lo]:443 HTTP/1.1\r\nHost: [::1%25lo]:443\r\n\r\n",
		"CONNECT api.stripe.test HTTP/1.1\r\nHost: api.stripe.test\r\n\r\n",
		"CONNECT api.stripe.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n",
		"CONNECT api.stripe.test:443 HTTP/1.1\r\nHost: api.stripe.test:443\r\nHost: evil.test:443\r\n\r\n",
		"CONNECT api.stripe.test:443 HTTP/1.1\r\nHost: api.stripe.test:443\r\nContent-Length: 5\r\n\r\nhello",
		"CONNECT api.stripe.test:443 HTTP/1.1\r\nHost : api.stripe.test:443\r\n\r\n",
		"CONNECT http://api.stripe.test:443/ HTTP/1.1\r\nHost: api.stripe.test:443\r\n\r\n",
	} {
		c := w.open1(billing)
		io.WriteString(c, req)
		res, err := http.ReadResponse(c.br, nil)
		if err != nil {
			t.Fatalf("%q: %v", req, err)
		}
		id := res.Header.Get("Sallyport-Decision")
		if res.StatusCode != 400 || id == "" {
			t.Errorf("%q: %d %v", req, res.StatusCode, res.Header)
			continue
		}
		w.until(req, func(r audit.Record) bool { return r.ID == id && r.Decision == audit.Deny && r.Src == billing.String() })
		c.Close()
	}
}

// sendHello opens a tunnel to host and sends raw, then reads until the end.
func sendHello(t *testing.T, w *world, dial dialFunc, host string, raw []byte, step int) string {
	t.Helper()
	tun, ref := dial(w, billing, host+":443")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	defer tun.Close()
	for len(raw) > 0 {
		n := min(step, len(raw))
		if _, err := tun.Write(raw[:n]); err != nil {
			break // refused before all of it was sent
		}
		raw = raw[n:]
	}
	got, _ := io.ReadAll(io.LimitReader(tun, 100))
	return string(got)
}

func TestFirstBytes(t *testing.T) {
	base := realHello("api.stripe.test")
	name := func(n string) []byte { return records(rebuild(base, sniBytes(n)), 16000) }
	const unrecognized, decode = "\x15\x03\x03\x00\x02\x02\x70", "\x15\x03\x03\x00\x02\x02\x32"
	tests := []struct {
		name  string
		raw   []byte
		step  int
		alert string
		want  Reason
	}{
		{"row 1: another name", name("evil.test"), 1 << 20, unrecognized, ReasonSNI},
		{"row 1: another name in 1-byte writes", name("evil.test"), 1, unrecognized, ReasonSNI},
		{"row 6: no name", records(rebuild(base), 16000), 1 << 20, unrecognized, ReasonNoSNI},
		{"row 7: an address", name("127.0.0.1"), 1 << 20, unrecognized, ReasonSNI},
		{"row 15: NUL", name("api.stripe.test\x00.evil.test"), 1 << 20, unrecognized, ReasonSNI},
		{"row 8: ECH", records(rebuild(base, sniBytes("api.stripe.test"), extensionBytes(extECH, []byte{0})), 16000), 1 << 20, unrecognized, ReasonECH},
		{"row 10: ESNI", records(rebuild(base, sniBytes("api.stripe.test"), extensionBytes(extEncryptedName, []byte{0})), 16000), 1 << 20, unrecognized, ReasonECH},
		{"row 13: too large", records([]byte{1, 1, 0, 0, 3, 3}, 16000), 1 << 20, decode, ReasonHello},
		{"row 18: SSH", []byte("SSH-2.0-OpenSSH_9.9\r\n"), 1 << 20, "", ReasonNotTLS},
		{"row 18: HTTP", []byte("GET / HTTP/1.1\r\n\r\n"), 1 << 20, "", ReasonNotTLS},
	}
	both(t, func(t *testing.T, dial dialFunc) {
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				w := newWorld(t, nil)
				if got := sendHello(t, w, dial, "api.stripe.test", tt.raw, tt.step); got != tt.alert {
					t.Errorf("got %q, want %q", got, tt.alert)
				}
				open := w.until("open", kind(audit.KindEgressOpen))
				deny := w.until("denial", denial(tt.want))
				end := w.until("close", kind(audit.KindEgressClose))
				if deny.ID != open.ID || end.ID != open.ID || end.Reason != string(tt.want) || end.BytesUp != 0 || end.BytesDown != 0 {
					t.Errorf("recorded %s", w.lines())
				}
				select {
				case n := <-w.stripe.seen:
					t.Errorf("the origin saw a hello for %q", n)
				default:
				}
			})
		}
	})
}

func TestHelloInPieces(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		// Thousands of pieces take a slow machine long.
		w := newWorld(t, func(c *Config) { c.Limits.HelloTimeout = time.Minute })
		raw := records(rebuild(realHello("api.stripe.test"), sniBytes("api.stripe.test"), extensionBytes(0xfafa, make([]byte, 3000))), 7)
		got := sendHello(t, w, dial, "api.stripe.test", raw, 1)
		if !strings.HasPrefix(got, "\x16\x03\x03") || <-w.stripe.seen != "api.stripe.test" {
			t.Errorf("row 11: got %q", got)
		}
		end := w.until("close", kind(audit.KindEgressClose))
		if end.BytesUp != int64(len(raw)) {
			t.Errorf("%d bytes up, sent %d", end.BytesUp, len(raw))
		}
	})
}

func TestOptionalServerName(t *testing.T) {
	w := newWorld(t, nil)
	base := realHello("x.test")
	if got := sendHello(t, w, dial1, "nameless.test", records(rebuild(base), 16000), 1<<20); !strings.HasPrefix(got, "\x16\x03\x03") {
		t.Errorf("without a name: %q", got)
	}
	sendHello(t, w, dial1, "nameless.test", records(rebuild(base, sniBytes("evil.test")), 16000), 1<<20)
	w.until("another name", denial(ReasonSNI))
	sendHello(t, w, dial1, "namely.test", records(rebuild(base), 16000), 1<<20)
	w.until("a rule that asks for the name", func(r audit.Record) bool {
		return r.Decision == audit.Deny && r.Reason == "cond" && r.Dst == "host:namely.test"
	})
	w.until("its close", func(r audit.Record) bool {
		return r.Kind == audit.KindEgressClose && r.Dst == "host:namely.test" && r.Reason == string(ReasonNoSNI) && r.BytesUp == 0
	})
}

func TestSlowHello(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		w := newWorld(t, func(c *Config) { c.Limits.HelloTimeout = 50 * time.Millisecond })
		tun, ref := dial(w, billing, "api.stripe.test:443")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		defer tun.Close()
		tun.Write([]byte{22, 3, 1})
		if b, _ := io.ReadAll(tun); len(b) != 0 {
			t.Errorf("row 16: got %q", b)
		}
		w.until("denial", denial(ReasonHelloTime))
		w.until("close", kind(audit.KindEgressClose))
	})
}

func TestHelloPipelinedWithConnect(t *testing.T) {
	w := newWorld(t, nil)
	c := w.open1(billing)
	hello := records(realHello("api.stripe.test"), 16000)
	c.Write(append([]byte("CONNECT api.stripe.test:443 HTTP/1.1\r\nHost: api.stripe.test:443\r\n\r\n"), hello...))
	res, err := http.ReadResponse(c.br, &http.Request{Method: "CONNECT"})
	if err != nil || res.StatusCode != 200 {
		t.Fatalf("row 77: %v, %v", res, err)
	}
	if b, err := c.br.Peek(3); err != nil || string(b) != "\x16\x03\x03" {
		t.Errorf("row 77: got %q, %v", b, err)
	}
	if n := <-w.stripe.seen; n != "api.stripe.test" {
		t.Errorf("the origin saw %q", n)
	}
	c = w.open1(billing)
	c.Write(append([]byte("CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n"), hello...))
	res, err = http.ReadResponse(c.br, nil)
	if err != nil || res.StatusCode != 403 || !res.Close {
		t.Errorf("refused with bytes behind it: %v, %v", res, err)
	}
}

func TestRefusedConnectionMayAskAgain(t *testing.T) {
	w := newWorld(t, nil)
	c := w.open1(billing)
	for range 3 {
		io.WriteString(c, "CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n")
		res, err := http.ReadResponse(c.br, nil)
		if err != nil || res.StatusCode != 403 {
			t.Fatalf("%v, %v", res, err)
		}
		io.Copy(io.Discard, res.Body)
	}
	io.WriteString(c, "CONNECT db.test:5432 HTTP/1.1\r\nHost: db.test:5432\r\n\r\n")
	res, err := http.ReadResponse(c.br, &http.Request{Method: "CONNECT"})
	if err != nil || res.StatusCode != 200 {
		t.Fatalf("%v, %v", res, err)
	}
	io.WriteString(c, "ping")
	if b, err := c.br.Peek(4); string(b) != "ping" {
		t.Errorf("got %q, %v", b, err)
	}
}

func TestStreamsAreJudgedOneByOne(t *testing.T) {
	w := newWorld(t, nil)
	tr := &http2.Transport{TLSClientConfig: w.client(billing, "h2")}
	defer tr.CloseIdleConnections()
	for range 2 {
		tun, ref := connect2(w, tr, "db.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		defer tun.Close()
		if _, ref := connect2(w, tr, "evil.test:443"); ref == nil || ref.status != 403 {
			t.Errorf("row 79: %+v", ref)
		}
	}
}

func TestBytesAreCountedExactly(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		for _, size := range []int{0, 1, socket.Small - 1, socket.Small, socket.Small + 1, socket.Large, 3*socket.Large + 17, 5 << 20} {
			t.Run(fmt.Sprint(size), func(t *testing.T) {
				w := newWorld(t, nil)
				tun, ref := dial(w, billing, "db.test:5432")
				if ref != nil {
					t.Fatalf("refused: %+v", ref)
				}
				defer tun.Close()
				sent := bytes.Repeat([]byte("sallyport"), size/9+1)[:size]
				go func() {
					tun.Write(sent)
					tun.CloseWrite()
				}()
				got, err := io.ReadAll(tun)
				if err != nil || !bytes.Equal(got, sent) {
					t.Fatalf("%d bytes came back of %d, %v", len(got), size, err)
				}
				tun.Close()
				end := w.until("close", kind(audit.KindEgressClose))
				if end.BytesUp != int64(size) || end.BytesDown != int64(size) || end.Reason != "done" {
					t.Errorf("recorded %d up, %d down, %s; want %d", end.BytesUp, end.BytesDown, end.Reason, size)
				}
				if n := <-w.db.got; n != fmt.Sprint(size) {
					t.Errorf("the destination counted %s", n)
				}
			})
		}
	})
}

func TestDestinationEndsFirst(t *testing.T) {
	t.Run("over HTTP/1.1 the caller goes on", func(t *testing.T) {
		w := newWorld(t, nil)
		w.db.hold.Store(true)
		tun, ref := dial1(w, billing, "db.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		if b, err := io.ReadAll(tun); err != nil || string(b) != "bye" {
			t.Fatalf("got %q, %v", b, err)
		}
		io.WriteString(tun, "still ")
		io.WriteString(tun, "here")
		tun.CloseWrite()
		if got := <-w.db.got; got != "still here" {
			t.Errorf("the destination got %q", got)
		}
		if end := w.until("close", kind(audit.KindEgressClose)); end.BytesUp != 10 || end.BytesDown != 3 || end.Reason != "done" {
			t.Errorf("recorded %+v", end)
		}
	})
	t.Run("over HTTP/2 the tunnel ends", func(t *testing.T) {
		w := newWorld(t, nil)
		w.db.hold.Store(true)
		tun, ref := dial2(w, billing, "db.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		defer tun.Close()
		if b, err := io.ReadAll(tun); err != nil || string(b) != "bye" {
			t.Fatalf("got %q, %v", b, err)
		}
		if end := w.until("close", kind(audit.KindEgressClose)); end.BytesDown != 3 || end.Reason != "done" {
			t.Errorf("recorded %+v", end)
		}
	})
}

func TestRejudgeClosesLosers(t *testing.T) {
	const without = `
p, db, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:db.test, *, CONNECT, -, -, allow
`
	both(t, func(t *testing.T, dial dialFunc) {
		w := newWorld(t, nil)
		loser, ref := dial(w, billing, "nameless.test:443")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		defer loser.Close()
		tc := tls.Client(netConn{t: loser}, &tls.Config{ServerName: "nameless.test", RootCAs: w.stripe.roots})
		if err := tc.Handshake(); err != nil {
			t.Fatal(err)
		}
		winner, ref := dial(w, billing, "db.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		defer winner.Close()
		w.gw.Rejudge()
		if _, err := io.WriteString(tc, "x"); err != nil {
			t.Fatalf("an unchanged policy ended it: %v", err)
		}
		w.use(w.policy(without, ""))
		began := time.Now()
		w.gw.Rejudge()
		if _, err := io.Copy(io.Discard, tc); err == nil {
			t.Error("row 131: the loser ended in order; it should break off")
		}
		if took := time.Since(began); took > 20*time.Second {
			t.Errorf("row 131: it took %v", took)
		}
		end := w.until("close", kind(audit.KindEgressClose))
		if end.Reason != "revoked" || end.Dst != "host:nameless.test" || end.BytesUp == 0 {
			t.Errorf("recorded %+v", end)
		}
		io.WriteString(winner, "ping")
		b := make([]byte, 4)
		if _, err := io.ReadFull(winner, b); err != nil || string(b) != "ping" {
			t.Errorf("the winner got %q, %v", b, err)
		}
		if n := w.gw.Tunnels(); n != 1 {
			t.Errorf("%d tunnels live, want 1", n)
		}
	})
}

func TestRejudgeFollowsTheDestination(t *testing.T) {
	w := newWorld(t, nil)
	tun, ref := dial1(w, billing, "db.test:5432")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	s := *w.snap.Load()
	s.Destinations = nil
	for _, d := range w.snap.Load().Destinations {
		if d.Host == "db.test" {
			d.Private = nil
		}
		s.Destinations = append(s.Destinations, d)
	}
	w.use(&s)
	w.gw.Rejudge()
	if _, err := io.Copy(io.Discard, tun); err == nil {
		t.Error("a tunnel to an address that is no longer listed ended in order")
	}
	if end := w.until("close", kind(audit.KindEgressClose)); end.Reason != "revoked" {
		t.Errorf("recorded %+v", end)
	}
}

func TestNoPolicy(t *testing.T) {
	w := newWorld(t, nil)
	tun, ref := dial1(w, billing, "db.test:5432")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	w.snap.Store(nil)
	w.gw.Rejudge()
	if _, err := io.Copy(io.Discard, tun); err == nil {
		t.Error("a tunnel outlives the policy")
	}
	if _, ref := dial1(w, billing, "db.test:5432"); ref == nil || ref.status != 403 {
		t.Errorf("without a policy: %+v", ref)
	}
	w.until("denial", denial(ReasonNoPolicy))
}

func TestAuditFailureRefuses(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		w := newWorld(t, nil)
		w.refusing.Store(true)
		if _, ref := dial(w, billing, "db.test:5432"); ref == nil || ref.status != 503 {
			t.Errorf("an unrecorded tunnel: %+v", ref)
		}
		if _, ref := dial(w, billing, "localhost:5432"); ref == nil || ref.status != 503 {
			t.Errorf("an unrecorded refusal: %+v", ref)
		}
		if n := w.gw.Tunnels(); n != 0 {
			t.Errorf("%d tunnels live", n)
		}
	})
}

func TestStrangersCannotShakeHands(t *testing.T) {
	w := newWorld(t, nil)
	foreign := meshtest.NewCA(t, meshtest.TD)
	server := w.client(billing) // verifies the gateway
	configs := map[string]*tls.Config{
		"no certificate": {InsecureSkipVerify: true},
		"a foreign CA":   svid.ClientTLS(meshtest.Source(t, foreign, billing), gatewayID),
		"TLS 1.2":        {InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, GetClientCertificate: server.GetClientCertificate},
	}
	configs["a foreign CA"].VerifyConnection = nil
	for name, cfg := range configs {
		t.Run(name, func(t *testing.T) {
			c, err := tls.Dial("tcp", w.addr, cfg)
			if err == nil {
				_ = c.SetDeadline(time.Now().Add(time.Minute))
				fmt.Fprintf(c, "CONNECT db.test:5432 HTTP/1.1\r\nHost: db.test:5432\r\n\r\n")
				if b, err := io.ReadAll(c); err == nil || len(b) > 0 {
					t.Errorf("got %q, %v", b, err)
				}
				c.Close()
			}
		})
	}
	w.until("one for each handshake", func(r audit.Record) bool {
		return r.Kind == audit.KindTLS && r.Decision == audit.Deny && r.Seq == 3
	})
}

func TestExpiredSVIDOpensNothingMore(t *testing.T) {
	w := newWorld(t, nil)
	who := &caller{id: billing, until: time.Now().Add(-time.Second), peer: "192.0.2.1:1"}
	if _, ans := w.gw.open(t.Context(), who, "db.test:5432", "", spans{}); ans == nil || ans.status != 403 {
		t.Errorf("got %+v", ans)
	}
	w.until("denial", denial(ReasonIdentity))
}

func TestTunnelLimits(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.TunnelsPerCaller = 2; c.Limits.Tunnels = 2 })
	var tuns []clientTunnel
	for range 2 {
		tun, ref := dial1(w, billing, "db.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		tuns = append(tuns, tun)
	}
	if _, ref := dial1(w, billing, "db.test:5432"); ref == nil || ref.status != 429 {
		t.Errorf("row 137: %+v", ref)
	}
	w.until("denial", denial(ReasonTunnelCap))
	tuns[0].Close()
	w.until("close", kind(audit.KindEgressClose))
	tun, ref := dial1(w, billing, "db.test:5432")
	if ref != nil {
		t.Fatalf("a freed place is not given again: %+v", ref)
	}
	tun.Close()
}

func TestHandshakeLimits(t *testing.T) {
	w := newWorld(t, func(c *Config) {
		c.Limits.Handshakes = 2
		c.Limits.HandshakeTimeout = 3 * time.Second // for the honest one below, too
	})
	var idle []net.Conn
	for range 3 {
		c, err := net.Dial("tcp", w.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		idle = append(idle, c)
	}
	for _, c := range idle {
		c.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("row 16: a connection without identity is kept")
		}
	}
	tun, ref := dial1(w, billing, "db.test:5432")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	tun.Close()
}

// A flood of connections that prove nothing puts out its own, not who comes last,
// and is counted.
func TestHandshakeFloodPutsOutTheOldest(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.Handshakes, c.Metrics = 4, telemetry.NewRegistry() })
	var flood []net.Conn
	for range 12 {
		c, err := net.Dial("tcp", w.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		flood = append(flood, c)
	}
	for _, c := range flood[:8] {
		c.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("one of the oldest is kept")
		}
	}
	tun, ref := dial1(w, billing, "db.test:5432") // while the others are there
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	tun.Close()
	rec := httptest.NewRecorder()
	w.gw.cfg.Metrics.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	if text := rec.Body.String(); !strings.Contains(text, `sallyport_connections_refused_total{reason="handshakes",reporter="gateway"} 9`) {
		t.Errorf("not counted:\n%s", text)
	}
}

// A flood from one address leaves those of others alone, however long they take.
func TestHandshakeFloodStaysWithItsSource(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.Handshakes, c.Metrics = 4, telemetry.NewRegistry() })
	slow, err := net.Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}
	for range 40 {
		c, err := d.Dial("tcp", w.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	w.until("the flood", func(audit.Record) bool {
		rec := httptest.NewRecorder()
		w.gw.cfg.Metrics.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
		return strings.Contains(rec.Body.String(), `sallyport_connections_refused_total{reason="handshakes",reporter="gateway"} 37`)
	})
	_ = slow.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := slow.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the first one has ended: %v", err)
	}
}

func TestIdleAndOldTunnelsEnd(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		for name, change := range map[Reason]func(*Config){
			ReasonIdle: func(c *Config) { c.Limits.Idle = 60 * time.Millisecond },
			ReasonLife: func(c *Config) { c.Limits.Life = 60 * time.Millisecond },
		} {
			t.Run(string(name), func(t *testing.T) {
				w := newWorld(t, change)
				tun, ref := dial(w, billing, "db.test:5432")
				if ref != nil {
					t.Fatalf("refused: %+v", ref)
				}
				defer tun.Close()
				if _, err := io.Copy(io.Discard, tun); err == nil {
					t.Error("it ended in order; it should break off")
				}
				if end := w.until("close", kind(audit.KindEgressClose)); end.Reason != string(name) {
					t.Errorf("recorded %+v", end)
				}
			})
		}
	})
}

func TestDrainWaitsAndThenCloses(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		w := newWorld(t, nil)
		tun, ref := dial(w, billing, "db.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		defer tun.Close()
		idle := w.open1(billing)
		w.stop()
		w.stopped <- <-w.stopped
		ctx, cancel := context.WithCancel(t.Context())
		drained := make(chan struct{})
		go func() { w.gw.Drain(ctx); close(drained) }()
		if _, err := io.ReadAll(idle); errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("an idle connection is kept: %v", err)
		}
		io.WriteString(tun, "ping")
		b := make([]byte, 4)
		if _, err := io.ReadFull(tun, b); err != nil || string(b) != "ping" {
			t.Fatalf("while draining: %q, %v", b, err)
		}
		if _, err := net.Dial("tcp", w.addr); err == nil {
			t.Error("new connections are accepted while draining")
		}
		cancel()
		<-drained
		if end := w.until("close", kind(audit.KindEgressClose)); end.Reason != "shutdown" {
			t.Errorf("recorded %+v", end)
		}
	})
}

func TestDialNeedsTheGrant(t *testing.T) {
	w := newWorld(t, nil)
	host, _ := ParseHost("db.test")
	how, _ := w.snap.Load().DestinationOf("db.test")
	target := Target{Host: host, Port: 5432, How: how}
	_, _, _, err := w.gw.dialer.Dial(t.Context(), authz.Grant{}, target)
	check(t, err, ReasonGrant)
	grant, err := w.judge.Judge(&authz.Call{Dir: mesh.Out, Src: billing, Dst: "host:db.test", Port: 5432, Verb: "CONNECT", Path: "-"})
	if err != nil {
		t.Fatal(err)
	}
	target.Port = 5433
	_, _, _, err = w.gw.dialer.Dial(t.Context(), grant, target)
	check(t, err, ReasonGrant)
	target.Port = 5432
	c, _, _, err := w.gw.dialer.Dial(t.Context(), grant, target)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestControlScreensOnceMore(t *testing.T) {
	d := &Dialer{Guard: new(Guard)}
	for _, a := range []string{"127.0.0.1:9", "[::ffff:127.0.0.1]:9", "169.254.169.254:80"} {
		_, err := d.connect(t.Context(), netip.MustParseAddrPort(a), nil)
		var ref *Refusal
		if !errors.As(err, &ref) {
			t.Errorf("%s: %v", a, err)
		}
	}
}

type panicky struct{}

func (panicky) Lookup(context.Context, string) ([]netip.Addr, error) { panic("resolver is broken") }

func TestPanicEndsOneCallOnly(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Names = panicky{} })
	c := w.open1(billing)
	io.WriteString(c, "CONNECT a.rebind.test:443 HTTP/1.1\r\nHost: a.rebind.test:443\r\n\r\n")
	if b, _ := io.ReadAll(c); len(b) != 0 {
		t.Errorf("over HTTP/1.1: got %q", b)
	}
	tr := &http2.Transport{TLSClientConfig: w.client(billing, "h2")}
	defer tr.CloseIdleConnections()
	req, _ := http.NewRequest("CONNECT", "https://"+w.addr, http.NoBody)
	req.Host = "a.rebind.test:443"
	if res, err := tr.RoundTrip(req); err == nil {
		t.Errorf("over HTTP/2: got %v", res.Status)
	}
	if n := w.gw.Tunnels(); n != 0 {
		t.Errorf("%d tunnels live", n)
	}
	tun, ref := connect2(w, tr, "db.test:5432")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	tun.Close()
}

// rawStream sends one HTTP/2 request as its header fields stand, and returns
// the status, or "reset".
func rawStream(t *testing.T, w *world, fields ...string) string {
	t.Helper()
	c, err := tls.Dial("tcp", w.addr, w.client(billing, "h2"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	io.WriteString(c, http2.ClientPreface)
	f := http2.NewFramer(c, c)
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	f.WriteSettings()
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for i := 0; i < len(fields); i += 2 {
		enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			return err.Error()
		}
		switch fr := fr.(type) {
		case *http2.MetaHeadersFrame:
			return fr.PseudoValue("status")
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			return "reset"
		}
	}
}

func TestOddStreams(t *testing.T) {
	w := newWorld(t, nil)
	tests := []struct {
		name   string
		fields []string
		want   string
	}{
		{"a plain CONNECT", []string{":method", "CONNECT", ":authority", "db.test:5432"}, "200"},
		{"row 73: host beside :authority", []string{":method", "CONNECT", ":authority", "db.test:5432", "host", "evil.test:443"}, "400"},
		{"row 73: host instead of :authority", []string{":method", "CONNECT", "host", "db.test:5432"}, "reset"},
		{"a path", []string{":method", "CONNECT", ":authority", "db.test:5432", ":scheme", "https", ":path", "/"}, "reset"},
		{"extended CONNECT", []string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "https", ":path", "/", ":authority", "db.test:5432"}, "reset"},
		{"two authorities", []string{":method", "CONNECT", ":authority", "db.test:5432", ":authority", "evil.test:443"}, "reset"},
		{"userinfo", []string{":method", "CONNECT", ":authority", "a@db.test:5432"}, "400"},
		{"no port", []string{":method", "CONNECT", ":authority", "db.test"}, "400"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := rawStream(t, w, tt.fields...); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestConfigMistakes(t *testing.T) {
	_, err := New(Config{TLS: &tls.Config{}, Limits: Limits{Tunnels: -1}})
	for _, want := range []string{"tls:", "judge:", "snapshot:", "standing:", "audit:", "log:", "limits: tunnels:"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
}

// BenchmarkTunnel measures what goes up through a tunnel and comes back.
func BenchmarkTunnel(b *testing.B) {
	for name, dial := range map[string]dialFunc{"http1": dial1, "http2": dial2, "streams": dialStream} {
		b.Run(name, func(b *testing.B) {
			w := newWorld(b, nil)
			tun, ref := dial(w, billing, "db.test:5432")
			if ref != nil {
				b.Fatalf("refused: %+v", ref)
			}
			defer tun.Close()
			chunk := make([]byte, 256<<10)
			b.SetBytes(int64(len(chunk)))
			b.ReportAllocs()
			back := make(chan error, 1)
			want := int64(0)
			go func() {
				n, err := io.Copy(io.Discard, tun)
				if err == nil && n != want {
					err = fmt.Errorf("%d bytes came back of %d", n, want)
				}
				back <- err
			}()
			for b.Loop() {
				if _, err := tun.Write(chunk); err != nil {
					b.Fatal(err)
				}
				want += int64(len(chunk))
			}
			tun.CloseWrite()
			if err := <-back; err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkConnect measures a judged, dialled and recorded tunnel, from
// CONNECT to its first byte, on a new HTTP/2 stream.
func BenchmarkConnect(b *testing.B) {
	w := newWorld(b, func(c *Config) { c.Limits.TunnelsPerCaller = 4096 })
	tr := &http2.Transport{TLSClientConfig: w.client(billing, "h2")}
	defer tr.CloseIdleConnections()
	b.ReportAllocs()
	for b.Loop() {
		tun, ref := connect2(w, tr, "db.test:5432")
		if ref != nil {
			b.Fatalf("refused: %+v", ref)
		}
		io.WriteString(tun, "x")
		io.ReadFull(tun, make([]byte, 1))
		tun.CloseWrite()
		io.Copy(io.Discard, tun)
		tun.Close()
		<-w.db.got
	}
}
