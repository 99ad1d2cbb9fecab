package egress

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/hop"
	"sallyport/internal/meshtest"
)

// A site is a host outside that speaks HTTP over TLS.
type site struct {
	t      testing.TB
	addr   string
	ca     string // in PEM
	server *http.Server
	seen   chan *http.Request
	conns  sync.Map
	certs  []tls.Certificate
	tls    atomic.Pointer[tls.Config]

	mu     sync.Mutex // guards answer
	answer http.HandlerFunc
}

func startSite(t testing.TB, names ...string) *site {
	t.Helper()
	web := meshtest.NewCA(t, spiffeid.RequireTrustDomainFromString("web.test"))
	key := meshtest.NewKey(t)
	chain, err := web.Sign(spiffeid.RequireFromString("spiffe://web.test/site"), key.Public(), time.Hour, names...)
	if err != nil {
		t.Fatal(err)
	}
	cert := tls.Certificate{PrivateKey: key}
	for _, c := range chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	s := &site{t: t, seen: make(chan *http.Request, 64), certs: []tls.Certificate{cert}}
	s.speaks("h2", "http/1.1")
	s.ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: web.Root().Raw}))
	s.does(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "served") })
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = ln.Addr().String()
	s.server = &http.Server{
		ErrorLog: log.New(io.Discard, "", 0),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			r.Body = io.NopCloser(bytes.NewReader(body))
			s.seen <- r
			s.mu.Lock()
			answer := s.answer
			s.mu.Unlock()
			answer(w, r)
		}),
		ConnState: func(c net.Conn, st http.ConnState) {
			if st == http.StateNew {
				s.conns.Store(c, true)
			}
		},
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.server.Serve(tls.NewListener(ln, &tls.Config{
			NextProtos:         []string{"h2", "http/1.1"}, // or the server does not speak it
			GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return s.tls.Load(), nil },
		}))
	}()
	t.Cleanup(func() { s.server.Close(); <-done })
	return s
}

// does says what the site answers from now on.
func (s *site) does(f http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = f
}

// connected is how many connections were made to the site.
func (s *site) connected() (n int) {
	s.conns.Range(func(any, any) bool { n++; return true })
	return n
}

// originated describes a site whose TLS the gateway speaks.
func (s *site) originated(host string) string {
	return fmt.Sprintf("  - host: %s\n    tls: originate\n    private: [127.0.0.1/32]\n    route: {endpoints: [%q]}\n    ca: |\n%s", host, s.addr, indent(s.ca))
}

func indent(text string) string {
	return "      " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n      ") + "\n"
}

// asking lets billing ask for some of what the site has.
const asking = access + `
p, ask, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:shop.test, 443, GET|POST, /v1/**, env.sni=same, allow
p, ask-old, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:old.test, *, *, **, -, allow
p, no-keys, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:shop.test, *, *, /v1/keys/**, -, deny
`

// askWorld is a world with a site that the gateway asks itself.
func askWorld(t *testing.T) (*world, *site) {
	t.Helper()
	return askWorldWith(t, Limits{})
}

func askWorldWith(t *testing.T, l Limits) (*world, *site) {
	t.Helper()
	s := startSite(t, "shop.test", "old.test")
	w := newWorld(t, func(c *Config) { c.Limits = l })
	w.use(w.policy(asking, s.originated("shop.test")+s.originated("old.test")))
	return w, s
}

// An askConn is a connection on which requests are made, over either way.
type askConn struct {
	io.ReadWriter
	br *bufio.Reader
}

func (w *world) askOn1() *askConn {
	c := w.open1(billing)
	return &askConn{c, c.br}
}

// askOnStream is a stream of a proxy of our own.
func (w *world) askOnStream(h *hop.Conn) *askConn {
	w.t.Helper()
	s, err := h.Open()
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { s.Close() })
	_ = s.SetDeadline(time.Now().Add(20 * time.Second))
	return &askConn{s, bufio.NewReader(s)}
}

// askInside opens a tunnel in which requests are made.
func (w *world) askInside(dial dialFunc, authority string) *askConn {
	w.t.Helper()
	tun, ref := dial(w, billing, authority)
	if ref != nil {
		w.t.Fatalf("CONNECT %s: %+v", authority, ref)
	}
	return &askConn{tun, bufio.NewReader(tun)}
}

func (c *askConn) ask(t testing.TB, request string) (*http.Response, string) {
	t.Helper()
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	method, _, _ := strings.Cut(request, " ")
	res, err := http.ReadResponse(c.br, &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%s: %v", strings.Split(request, "\r\n")[0], err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body)
}

func TestRequestsGoOnOverTLS(t *testing.T) {
	const absolute, inside = "GET http://shop.test/v1/a?x=1 HTTP/1.1\r\nHost: shop.test\r\n", "GET /v1/a?x=1 HTTP/1.1\r\nHost: shop.test\r\n"
	const more = "X-Mine: yes\r\nSallyport-Hop: no\r\nX-Forwarded-For: 10.0.0.1\r\nX-HTTP-Method-Override: DELETE\r\n" +
		"X-Original-URL: /admin\r\nX-Original-URI: /admin\r\nX_Rewrite_URL: /admin\r\nX-HTTP-Path-Override: /admin\r\nX-Forwarded-Prefix: /admin\r\n" +
		"X-Host: evil.test\r\nX-Original-Host: evil.test\r\nX-HTTP-Host-Override: evil.test\r\nX-Forwarded-Host: evil.test\r\nEgress-Origin: explicit\r\nProxy-Authorization: Basic x\r\n\r\n"
	for name, way := range map[string]struct {
		open    func(w *world) *askConn
		request string
	}{
		"on a connection":              {(*world).askOn1, absolute},
		"on a stream":                  {func(w *world) *askConn { return w.askOnStream(w.streamsOn(billing)) }, absolute},
		"in a tunnel":                  {func(w *world) *askConn { return w.askInside(dial1, "shop.test:80") }, inside},
		"in a tunnel of HTTP/2":        {func(w *world) *askConn { return w.askInside(dial2, "shop.test:80") }, inside},
		"in a tunnel on a stream":      {func(w *world) *askConn { return w.askInside(dialStream, "shop.test:80") }, inside},
		"absolutely, inside a tunnel":  {func(w *world) *askConn { return w.askInside(dialStream, "shop.test:80") }, absolute},
		"in a tunnel to the TLS port":  {func(w *world) *askConn { return w.askInside(dialStream, "shop.test:443") }, strings.Replace(inside, "Host: shop.test", "Host: shop.test:443", 1)},
		"on a stream, with an address": {func(w *world) *askConn { return w.askOnStream(w.streamsOn(billing)) }, strings.ReplaceAll(absolute, "shop.test", "SHOP.test:80")},
	} {
		t.Run(name, func(t *testing.T) {
			w, s := askWorld(t)
			s.does(func(rw http.ResponseWriter, _ *http.Request) {
				rw.Header().Set("Alt-Svc", `h3="evil.test:443"`)
				rw.Header().Set("Sallyport-Decision", "forged")
				rw.Header().Set("X-Theirs", "yes")
				_, _ = io.WriteString(rw, "served")
			})
			c := way.open(w)
			for i := range 3 { // they share one connection to the site
				res, body := c.ask(t, way.request+more)
				if res.StatusCode != 200 || body != "served" || res.Header.Get("X-Theirs") != "yes" || res.Header.Get("Alt-Svc") != "" || res.Header.Get("Sallyport-Decision") != "" {
					t.Fatalf("request %d: %d %q %v", i, res.StatusCode, body, res.Header)
				}
				r := <-s.seen
				if r.Host != "shop.test" || r.RequestURI != "/v1/a?x=1" || r.Method != "GET" || r.TLS == nil || r.TLS.ServerName != "shop.test" {
					t.Errorf("the site saw %s %s for %s", r.Method, r.RequestURI, r.Host)
				}
				if len(r.Header) != 1 || r.Header.Get("X-Mine") != "yes" {
					t.Errorf("the site saw the fields %v", r.Header)
				}
			}
			if n := s.connected(); n != 1 {
				t.Errorf("%d connections were made, want 1", n)
			}
			rec := w.until("the end", kind(audit.KindEgressClose))
			if rec.ID == "" || rec.Rule != "ask" || rec.Port != 443 || rec.Verb != "GET" || rec.Path != "/v1/a" || rec.BytesDown != 6 || rec.Reason != string(ReasonDone) ||
				!strings.HasPrefix(rec.Detail, "status 200 to 127.0.0.1:") {
				t.Errorf("recorded %+v", rec)
			}
		})
	}
}

func TestRequestBodiesGoOn(t *testing.T) {
	w, s := askWorld(t)
	s.does(func(rw http.ResponseWriter, r *http.Request) { _, _ = io.Copy(rw, r.Body) })
	c := w.askOnStream(w.streamsOn(billing))
	large := strings.Repeat("0123456789abcdef", 20_000)
	for name, req := range map[string]string{
		"small":   "Content-Length: 5\r\n\r\nhello",
		"large":   fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(large), large),
		"chunked": "Transfer-Encoding: chunked\r\n\r\n5;ext=dropped\r\nhello\r\n0\r\nX-Trailer: dropped\r\n\r\n",
	} {
		res, body := c.ask(t, "POST http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n"+req)
		if r := <-s.seen; res.StatusCode != 200 || body != "hello" && body != large || len(r.Trailer) != 0 {
			t.Errorf("%s: %d, %d bytes, trailers %v", name, res.StatusCode, len(body), r.Trailer)
		}
	}
}

func TestRequestsAreRefusedOneByOne(t *testing.T) {
	get := func(target, host string) string {
		return "GET " + target + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n"
	}
	for name, tt := range map[string]struct {
		in      string // the tunnel; none for a bare stream
		request string
		status  int
		reason  string
	}{
		"a path that no row allows":   {"", get("http://shop.test/v2", "shop.test"), 403, "no_row"},
		"a method that no row allows": {"", "DELETE http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n", 403, "no_row"},
		"a path that a row denies":    {"", get("http://shop.test/v1/keys/1", "shop.test"), 403, "rule"},
		"dots that hide it":           {"", get("http://shop.test/v1/a/../keys/1", "shop.test"), 400, "request"},
		"an escape that hides it":     {"", get("http://shop.test/v1/%6beys/1", "shop.test"), 403, "rule"},
		"an escaped slash":            {"", get("http://shop.test/v1/a%2f..%2fkeys", "shop.test"), 400, "request"},
		"parameters":                  {"", get("http://shop.test/v1/a;x/b", "shop.test"), 400, "request"},
		"another host":                {"", get("http://evil.test/v1/a", "evil.test"), 403, "no_row"},
		"another port":                {"", get("http://shop.test:8080/v1/a", "shop.test:8080"), 403, "no_row"},
		"a Host that differs":         {"", get("http://shop.test/v1/a", "evil.test"), 400, "request"},
		"an address":                  {"", get("http://127.0.0.1/v1/a", "127.0.0.1"), 403, "no_row"},
		"the other scheme":            {"", get("https://shop.test/v1/a", "shop.test"), 400, "request"},
		"TRACE":                       {"", "TRACE http://old.test/ HTTP/1.1\r\nHost: old.test\r\n\r\n", 405, "method"},
		"no host of requests":         {"", "GET http://rows.test/ HTTP/1.1\r\nHost: rows.test\r\n\r\n", 405, "method"},
		"the server as a whole":       {"", "OPTIONS * HTTP/1.1\r\nHost: shop.test\r\n\r\n", 400, "request"},
		"a path inside":               {"shop.test:80", get("/v2", "shop.test"), 403, "no_row"},
		"another host inside":         {"shop.test:80", get("/v1/a", "old.test"), 421, "misdirected"},
		"another port inside":         {"shop.test:80", get("/v1/a", "shop.test:81"), 421, "misdirected"},
		"another host, absolutely":    {"shop.test:80", get("http://old.test/v1/a", "old.test"), 421, "misdirected"},
		"CONNECT inside":              {"shop.test:80", "CONNECT old.test:80 HTTP/1.1\r\nHost: old.test:80\r\n\r\n", 405, "method"},
		"TLS inside":                  {"shop.test:80", "\x16\x03\x01\x00\x05hello\r\n\r\n", 400, "request"},
	} {
		t.Run(name, func(t *testing.T) {
			w, s := askWorld(t)
			w.use(w.policy(asking+"p, rows, out, **, host:rows.test, *, *, **, -, allow\n", s.originated("shop.test")+s.originated("old.test")))
			var c *askConn
			if tt.in != "" {
				c = w.askInside(dialStream, tt.in)
			} else {
				c = w.askOnStream(w.streamsOn(billing))
			}
			res, _ := c.ask(t, tt.request)
			if res.StatusCode != tt.status || res.Header.Get("Sallyport-Decision") == "" {
				t.Errorf("answered %d %v, want %d", res.StatusCode, res.Header, tt.status)
			}
			recs := slices.DeleteFunc(w.audit.Records(), func(r audit.Record) bool { return r.Decision == audit.Allow })
			if len(recs) != 1 || recs[0].Reason != tt.reason || recs[0].Src != billing.String() || recs[0].ID != res.Header.Get("Sallyport-Decision") {
				t.Errorf("want one record of %s: %s", tt.reason, w.lines())
			}
			if n := s.connected(); n != 0 {
				t.Errorf("the site got %d connections", n)
			}
		})
	}
}

// TestTunnelsToWhatIsAsked are refused at once when nothing may be asked there.
func TestTunnelsToWhatIsAsked(t *testing.T) {
	w, s := askWorld(t)
	for _, dial := range []dialFunc{dial1, dial2, dialStream} {
		if _, ref := dial(w, inventory, "shop.test:80"); ref == nil || ref.status != 403 || ref.id == "" {
			t.Errorf("a stranger: %+v", ref)
		}
		if _, ref := dial(w, billing, "shop.test:8080"); ref == nil || ref.status != 403 || ref.id == "" {
			t.Errorf("another port: %+v", ref)
		}
	}
	if n := s.connected(); n != 0 {
		t.Errorf("the site got %d connections", n)
	}
}

func TestHostsMustProveTheirName(t *testing.T) {
	w, s := askWorld(t)
	other := startSite(t, "evil.test")
	for name, extra := range map[string]string{
		"another name":      strings.Replace(s.originated("shop.test"), s.addr, other.addr, 1),
		"another authority": strings.Replace(other.originated("shop.test"), other.addr, s.addr, 1),
	} {
		w.use(w.policy(asking, extra))
		res, _ := w.askOnStream(w.streamsOn(billing)).ask(t, "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n")
		if res.StatusCode != 502 || res.Header.Get("Sallyport-Decision") == "" {
			t.Errorf("%s: %d", name, res.StatusCode)
		}
		w.until(name, denial(ReasonCertificate))
	}
	if len(s.seen)+len(other.seen) > 0 {
		t.Error("a request got through")
	}
}

func TestRedirectsStayWhereTheyMayBeFollowed(t *testing.T) {
	w, s := askWorld(t)
	c := w.askOnStream(w.streamsOn(billing))
	for to, want := range map[string]string{
		"https://shop.test/v1/b?x=1":      "http://shop.test/v1/b?x=1",
		"https://old.test:443/v1/b":       "http://old.test/v1/b",
		"https://old.test:8443/v1/b":      "http://old.test:8443/v1/b",
		"https://api.stripe.test/v1":      "https://api.stripe.test/v1",
		"https://evil.test/":              "https://evil.test/",
		"https://me@shop.test/v1":         "https://me@shop.test/v1",
		"http://evil.test/":               "http://evil.test/",
		"/v1/c":                           "/v1/c",
		"//evil.test/v1":                  "//evil.test/v1",
		"https://shop.test/v1/\"quoted\"": "http://shop.test/v1/%22quoted%22",
	} {
		s.does(func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header()["Location"] = []string{to}
			rw.WriteHeader(302)
		})
		res, _ := c.ask(t, "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n")
		<-s.seen
		if got := res.Header.Values("Location"); res.StatusCode != 302 || len(got) != 1 || got[0] != want {
			t.Errorf("%s: %d %q, want %q", to, res.StatusCode, got, want)
		}
	}
}

// TestAnswersEndWithTheirRow has a change of policy break off what a host still
// sends, and leave the connection of the caller to its other streams.
func TestAnswersEndWithTheirRow(t *testing.T) {
	w, s := askWorld(t)
	begun := make(chan struct{})
	s.does(func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(rw, "begins")
		_ = http.NewResponseController(rw).Flush()
		close(begun)
		<-r.Context().Done()
	})
	h := w.streamsOn(billing)
	c := w.askOnStream(h)
	if _, err := io.WriteString(c, "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-begun
	res, err := http.ReadResponse(c.br, nil)
	if err != nil {
		t.Fatal(err)
	}
	w.use(w.policy(access, s.originated("shop.test")))
	w.gw.Rejudge()
	if _, err := io.ReadAll(res.Body); err == nil {
		t.Error("the answer seems to be whole")
	}
	w.until("the end", func(r audit.Record) bool { return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonRevoked) })
	if tun, ref := w.connectStream(h, "db.test:5432"); ref != nil {
		t.Errorf("another stream: %+v", ref)
	} else {
		echoes(t, tun)
	}
}

// TestRequestsThatAreBrokenOff end at the host too, before it has answered.
func TestRequestsThatAreBrokenOff(t *testing.T) {
	w, s := askWorld(t)
	ended := make(chan bool, 1)
	s.does(func(_ http.ResponseWriter, r *http.Request) {
		<-r.Context().Done()
		ended <- true
	})
	c := w.askOnStream(w.streamsOn(billing))
	if _, err := io.WriteString(c, "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-s.seen
	c.ReadWriter.(io.Closer).Close()
	<-ended
	w.until("its end", func(r audit.Record) bool {
		return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonReset)
	})
}

// TestKeptConnectionsThatAreGone has the site close what the gateway kept.
func TestKeptConnectionsThatAreGone(t *testing.T) {
	w, s := askWorld(t)
	c := w.askOnStream(w.streamsOn(billing))
	for range 3 {
		if res, body := c.ask(t, "POST http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 2\r\n\r\nhi"); res.StatusCode != 200 || body != "served" {
			t.Fatalf("%d %q", res.StatusCode, body)
		}
		<-s.seen
		s.conns.Range(func(c, _ any) bool { c.(net.Conn).Close(); return true })
	}
	if n := s.connected(); n != 3 {
		t.Errorf("%d connections were made, want 3", n)
	}
}

// TestDrainEndsStreamsThatWait tells a proxy that its streams take no further
// request, and does not wait for one.
func TestDrainEndsStreamsThatWait(t *testing.T) {
	w, s := askWorld(t)
	stream, err := w.streamsOn(billing).Open()
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	c := &askConn{stream, bufio.NewReader(stream)}
	c.ask(t, "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n")
	<-s.seen
	w.gw.Yield(true)
	if _, err := stream.Read(make([]byte, 1)); !errors.Is(err, hop.ErrRefused) {
		t.Errorf("the stream ended with %v, want %v", err, hop.ErrRefused)
	}
}

// TestPipelinedRequestsAreJudgedOneByOne has two come in one piece.
func TestPipelinedRequestsAreJudgedOneByOne(t *testing.T) {
	w, s := askWorld(t)
	c := w.askOnStream(w.streamsOn(billing))
	const first = "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n"
	res, body := c.ask(t, first+strings.Replace(first, "/v1/a", "/admin", 1))
	if r := <-s.seen; res.StatusCode != 200 || body != "served" || r.URL.Path != "/v1/a" {
		t.Fatalf("the first: %d %q", res.StatusCode, body)
	}
	if res, err := http.ReadResponse(c.br, nil); err != nil || res.StatusCode != 403 || len(s.seen) > 0 {
		t.Errorf("the second: %+v, %v", res, err)
	}
}

// TestBudgetsHoldWithinARequest has one request use more than there is.
func TestBudgetsHoldWithinARequest(t *testing.T) {
	w, s := askWorld(t)
	w.use(w.policy(asking, s.originated("shop.test")+"    budget: {down: 100000}\n"))
	s.does(func(rw http.ResponseWriter, r *http.Request) {
		for piece := make([]byte, 32<<10); r.Context().Err() == nil; {
			if _, err := rw.Write(piece); err != nil {
				return
			}
		}
	})
	c := w.askOnStream(w.streamsOn(billing))
	if _, err := io.WriteString(c, "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(c.br, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, res.Body); err == nil || n > 1<<20 {
		t.Errorf("%d bytes came, %v", n, err)
	}
	w.until("the end", func(r audit.Record) bool { return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonBudget) })
}

// TestHintsAreOfTheBudget has a host say much before its answer.
func TestHintsAreOfTheBudget(t *testing.T) {
	for _, alpn := range []string{"http/1.1", "h2"} {
		for budget, fits := range map[int]bool{100_000: false, 1_000_000: true} {
			w, s := askWorld(t)
			w.use(w.policy(asking, s.spoken(alpn)+fmt.Sprintf("    budget: {down: %d}\n", budget)))
			s.does(func(rw http.ResponseWriter, _ *http.Request) {
				rw.Header().Set("Link", strings.Repeat("x", 2500))
				for range 8 {
					rw.WriteHeader(http.StatusEarlyHints)
				}
				rw.Header().Del("Link")
				_, _ = io.WriteString(rw, "served")
			})
			c := w.askOnStream(w.streamsOn(billing))
			if _, err := io.WriteString(c, "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			hints := 0
			res, err := http.ReadResponse(c.br, nil)
			for ; err == nil && res.StatusCode == http.StatusEarlyHints; res, err = http.ReadResponse(c.br, nil) {
				hints++
			}
			switch {
			case err != nil:
				t.Errorf("%s, a budget of %d: %v after %d hints", alpn, budget, err, hints)
			case fits && (res.StatusCode != 200 || hints != 8), !fits && res.StatusCode != 429:
				t.Errorf("%s, a budget of %d: status %d after %d hints", alpn, budget, res.StatusCode, hints)
			case !fits:
				w.until("the end", func(r audit.Record) bool { return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonBudget) })
			}
		}
	}
}

// TestHeadsStayTaken has requests whose heads are large and whose bodies are not use
// up a budget.
func TestHeadsStayTaken(t *testing.T) {
	w, s := askWorld(t)
	w.use(w.policy(asking, s.originated("shop.test")+"    budget: {up: 500000}\n"))
	s.does(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(http.StatusNoContent) })
	c, long := w.askOnStream(w.streamsOn(billing)), strings.Repeat("x", 7000)
	for n := range 20 { // 140 KB, of the 50 KB that are the first part
		if _, err := io.WriteString(c, "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\nX-Long: "+long+"\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(c.br, nil)
		if err != nil || res.StatusCode == http.StatusTooManyRequests {
			if n < 5 {
				t.Errorf("request %d: %v", n, err)
			}
			w.until("the refusal", func(r audit.Record) bool { return r.Reason == string(ReasonBudget) })
			return
		}
	}
	t.Error("twenty such requests pass")
}
