package egress

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/internal/audit"
)

// A bypassAsk is a bypass by requests of HTTP to hosts that the gateway asks
// itself: shop.test in the clear, with a credential for /v1/charges, and look.test,
// which is inspected.
type bypassAsk struct {
	// in is the tunnel that it comes by; none for a request on its own.
	in string
	// before are requests that are allowed, on the same connection.
	before, request string
	status          int
	// harmless says that the request is answered, and what must hold then.
	harmless func(res *http.Response, body string, seen *http.Request) error
}

func bypassAsks() (all []bypass) {
	const ok = "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n"
	get := func(target string) string { return "GET " + target + " HTTP/1.1\r\nHost: shop.test\r\n\r\n" }
	add := func(row int, what string, a bypassAsk) { all = append(all, bypass{row: row, what: what, ask: &a}) }
	add(2, "another Host behind the right server name", bypassAsk{in: "look.test:443", request: "GET /v1/a HTTP/1.1\r\nHost: evil.test\r\n\r\n", status: 421})
	add(3, "another Host that is allowed as well", bypassAsk{in: "look.test:443", request: get("/v1/a"), status: 421})
	add(4, "another Host at the address of a name", bypassAsk{in: "shop.test:80", request: "GET /v1/a HTTP/1.1\r\nHost: look.test\r\n\r\n", status: 421})
	add(66, "a second request for another host", bypassAsk{before: ok + "\r\n", request: "GET http://evil.test/v1/a HTTP/1.1\r\nHost: evil.test\r\n\r\n", status: 403})
	add(66, "a second request for another host in a tunnel", bypassAsk{in: "shop.test:80", before: get("/v1/a"), request: "GET /v1/a HTTP/1.1\r\nHost: evil.test\r\n\r\n", status: 421})
	add(68, "the absolute form for another host in a tunnel", bypassAsk{in: "shop.test:80", request: "GET http://evil.test/v1/a HTTP/1.1\r\nHost: evil.test\r\n\r\n", status: 421})
	add(78, "CONNECT inside a tunnel of requests", bypassAsk{in: "shop.test:80", request: "CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n", status: 405})
	for what, head := range map[string]string{"a length and chunks": "Content-Length: 5\r\nTransfer-Encoding: chunked", "two lengths": "Content-Length: 5\r\nContent-Length: 6", "an odd coding": "Transfer-Encoding: xchunked"} {
		add(71, "a request with "+what, bypassAsk{request: ok + head + "\r\n\r\n"})
	}
	for what, line := range map[string]string{"a folded line": "X-A: b\r\n c", "NUL in a field": "X-A: b\x00c", "space before a colon": "X-A : b"} {
		add(72, "a request with "+what, bypassAsk{request: ok + line + "\r\n\r\n", status: 400})
	}
	for what, path := range map[string]string{
		"dots": "/v1/../admin", "escaped dots": "/v1/%2e%2e/admin", "an escaped slash": "/v1/a%2f..%2f..%2fadmin", "an escaped backslash": "/v1/a%5c..%5cadmin",
		"parameters": "/v1/..;/admin", "NUL": "/v1/a%00/admin", "two escapes of dots": "/v1/%252e%252e/../../admin", "another case": "/V1/a", "slashes": "//admin", "an escaped letter": "/%61dmin",
	} {
		add(81, "a path with "+what, bypassAsk{request: get("http://shop.test" + path)})
	}
	add(85, "TRACE where a credential is added", bypassAsk{request: "TRACE http://shop.test/v1/charges HTTP/1.1\r\nHost: shop.test\r\n\r\n", status: 405})
	add(88, "another part of a host that many share", bypassAsk{request: "PUT http://shop.test/v2/other-bucket/x HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 2\r\n\r\nhi", status: 403})
	add(129, "a head as long as a book", bypassAsk{request: ok + "X-Data: " + strings.Repeat("x", 40_000) + "\r\n\r\n", status: 431})
	return append(all, bypassHarmless(ok)...)
}

// bypassHarmless are answered; what matters is what of them gets through.
func bypassHarmless(ok string) (all []bypass) {
	add := func(row int, what, request string, f func(res *http.Response, body string, seen *http.Request) error) {
		all = append(all, bypass{row: row, what: what, ask: &bypassAsk{request: request, harmless: f}})
	}
	add(30, "Alt-Svc in an answer", ok+"\r\n", func(res *http.Response, _ string, _ *http.Request) error {
		if v := res.Header.Get("Alt-Svc"); v != "" {
			return fmt.Errorf("Alt-Svc: %s came through", v)
		}
		return nil
	})
	add(65, "a redirect to another host", ok+"X-Want: redirect\r\n\r\n", func(res *http.Response, _ string, _ *http.Request) error {
		if res.StatusCode != 302 || res.Header.Get("Location") != "https://evil.test/" {
			return fmt.Errorf("%d to %s: it was followed or changed", res.StatusCode, res.Header.Get("Location"))
		}
		return nil
	})
	upgrade := func(_ *http.Response, _ string, seen *http.Request) error {
		if seen.Header.Get("Upgrade") != "" || seen.Header.Get("Http2-Settings") != "" {
			return fmt.Errorf("the host was asked to upgrade: %v", seen.Header)
		}
		return nil
	}
	add(75, "h2c by upgrade", ok+"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", upgrade)
	add(76, "a WebSocket", ok+"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", upgrade)
	add(81, "a method in a field", ok+"X-HTTP-Method-Override: DELETE\r\n\r\n", func(_ *http.Response, _ string, seen *http.Request) error {
		if v := seen.Header.Get("X-Http-Method-Override"); v != "" {
			return fmt.Errorf("the host was told to take it for %s", v)
		}
		return nil
	})
	add(84, "data in trailers and extensions", "POST http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\nTransfer-Encoding: chunked\r\nTrailer: X-Data\r\n\r\n2;data=secret\r\nhi\r\n0\r\nX-Data: secret\r\n\r\n",
		func(_ *http.Response, _ string, seen *http.Request) error {
			if v := seen.Trailer.Get("X-Data"); v != "" {
				return fmt.Errorf("the host got the trailer %s", v)
			}
			return nil
		})
	const charges = "GET http://shop.test/v1/charges HTTP/1.1\r\nHost: shop.test\r\n"
	add(86, "an answer that shows the credential", charges+"X-Want: echo\r\n\r\n", func(res *http.Response, body string, seen *http.Request) error {
		if seen.Header.Get("Authorization") != "Bearer "+credential || strings.Contains(fmt.Sprint(res.Header, body), credential) {
			return fmt.Errorf("the host got %q and the workload %q %v", seen.Header.Get("Authorization"), body, res.Header)
		}
		return nil
	})
	add(86, "a credential of the workload's own", charges+"Authorization: Bearer mine\r\n\r\n", func(_ *http.Response, _ string, seen *http.Request) error {
		if got := strings.Join(seen.Header.Values("Authorization"), ","); got != "Bearer "+credential {
			return fmt.Errorf("the host got %q", got)
		}
		return nil
	})
	add(87, "a path that the credential is not for", ok+"\r\n", func(_ *http.Response, _ string, seen *http.Request) error {
		if v := seen.Header.Get("Authorization"); v != "" {
			return fmt.Errorf("the host got %q", v)
		}
		return nil
	})
	return all
}

// bypassSite answers as a host may that works against the mesh.
func bypassSite(rw http.ResponseWriter, r *http.Request) {
	rw.Header().Set("Alt-Svc", `h3="evil.test:443"`)
	switch r.Header.Get("X-Want") {
	case "redirect":
		rw.Header().Set("Location", "https://evil.test/")
		rw.WriteHeader(302)
	case "echo":
		rw.Header().Set("X-Echo", r.Header.Get("Authorization"))
		_, _ = io.WriteString(rw, "you sent "+r.Header.Get("Authorization"))
	}
}

// tryAsk is try for one of them.
func (b bypass) tryAsk(t *testing.T, dial dialFunc) error {
	dir := t.TempDir()
	file := filepath.Join(dir, "secret")
	if err := os.WriteFile(file, []byte(credential), 0o600); err != nil {
		return err
	}
	i, err := OpenInspector(filepath.Join(dir, "key"))
	if err != nil {
		return err
	}
	s := startSite(t, "shop.test", "look.test")
	s.does(bypassSite)
	w := newWorld(t, func(c *Config) {
		c.Inspector, c.Secrets = i, NewSecrets(map[string]SecretSource{"shop": {File: file}})
	})
	w.use(w.policy(asking+"p, look, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:look.test, 443, GET|POST, /v1/**, -, allow\n", s.injected("shop.test")+s.inspected("look.test")))
	if err := i.Use(w.snap.Load()); err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(i.PEM())
	c, err := b.ask.open(w, dial, roots)
	if err != nil {
		return err
	}
	if b.ask.before != "" {
		if res, _ := c.ask(t, b.ask.before); res.StatusCode != 200 {
			return fmt.Errorf("what is allowed was answered with %d", res.StatusCode)
		}
		<-s.seen
	}
	res, body := c.ask(t, b.ask.request)
	if f := b.ask.harmless; f != nil {
		return f(res, body, <-s.seen)
	}
	id := res.Header.Get(decisionHeader)
	if res.StatusCode < 400 || res.StatusCode >= 500 && res.StatusCode != 501 || id == "" || b.ask.status != 0 && res.StatusCode != b.ask.status {
		return fmt.Errorf("answered %s, want %d", res.Status, b.ask.status)
	}
	denied := 0
	for _, r := range w.audit.Records() {
		if r.Decision == audit.Deny {
			denied++
			if r.ID != id || r.Src != billing.String() || r.Reason == "" {
				return fmt.Errorf("recorded %+v", r)
			}
		}
	}
	if denied != 1 || len(s.seen) > 0 {
		return fmt.Errorf("%d records of refusals, the host got %d requests: %s", denied, len(s.seen), w.lines())
	}
	return nil
}

// open makes the connection that the requests go on.
func (a *bypassAsk) open(w *world, dial dialFunc, roots *x509.CertPool) (*askConn, error) {
	host, _, _ := strings.Cut(a.in, ":")
	switch {
	case a.in == "":
		return w.askOnStream(w.streamsOn(billing)), nil
	case host == "look.test":
		return w.askTLS(dial, a.in, &tls.Config{RootCAs: roots, ServerName: host})
	}
	return w.askInside(dial, a.in), nil
}
