package egress

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// startRaw1 makes a host of s that speaks HTTP/1.1: it answers by what answer says
// of a path, and tells of each request as it came, head and body, when it ends as
// RFC 9112 has it.
func startRaw1(s *site, answer func(path string) string) <-chan string {
	seen := make(chan string, 256)
	s.addr = serve(s.t, func(c net.Conn) {
		tc := tls.Server(c, &tls.Config{Certificates: s.certs, NextProtos: []string{"http/1.1"}})
		for br := bufio.NewReader(tc); ; {
			var text strings.Builder
			line := func() string {
				l, _ := br.ReadString('\n')
				text.WriteString(l)
				return l
			}
			path, length, chunks := strings.Split(line()+" ", " ")[1], 0, false
			for l := line(); l != "\r\n"; l = line() {
				if l == "" {
					return
				}
				_, _ = fmt.Sscanf(l, "Content-Length: %d", &length)
				chunks = chunks || l == "Transfer-Encoding: chunked\r\n"
			}
			if _, err := io.CopyN(&text, br, int64(length)); err != nil {
				return
			}
			for size := int64(1); chunks && size > 0; {
				var err error
				if size, err = strconv.ParseInt(strings.TrimSpace(line()), 16, 64); err == nil {
					_, err = io.CopyN(&text, br, size+2)
				}
				if err != nil {
					return
				}
			}
			seen <- text.String()
			if _, err := io.WriteString(tc, answer(path)); err != nil {
				return
			}
		}
	})
	return seen
}

// TestInspectedRequestsBecomeHTTP1 looks at each byte that a host gets of what comes
// in TLS that ends at the gateway.
func TestInspectedRequestsBecomeHTTP1(t *testing.T) {
	w, s, roots := inspectWorld(t)
	seen := startRaw1(s, func(string) string { return "HTTP/1.1 204 No Content\r\n\r\n" })
	w.use(w.policy(access+"p, all, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:shop.test, *, *, **, -, allow\n", s.inspected("shop.test")))
	if err := w.gw.cfg.Inspector.Use(w.snap.Load()); err != nil {
		t.Fatal(err)
	}
	const host, got = "Host: shop.test\r\n", " HTTP/1.1\r\nHost: shop.test\r\n"
	for _, tt := range []struct{ name, request, want string }{
		{"a plain one", "GET /a HTTP/1.1\r\n" + host + "\r\n", "GET /a" + got + "\r\n"},
		{"the absolute form", "GET http://shop.test/a HTTP/1.1\r\n" + host + "\r\n", "GET /a" + got + "\r\n"},
		{"another spelling of the host", "GET /a HTTP/1.1\r\nHost: SHOP.test:443\r\n\r\n", "GET /a" + got + "\r\n"},
		{"HTTP/1.0", "GET /a HTTP/1.0\r\n" + host + "Connection: keep-alive\r\n\r\n", "GET /a" + got + "\r\n"},
		{"an upgrade to h2c", "GET /a HTTP/1.1\r\n" + host + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n", "GET /a" + got + "\r\n"},
		{"an upgrade to a WebSocket", "GET /a HTTP/1.1\r\n" + host + "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n", "GET /a" + got + "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"},
		{"fields of the connection", "GET /a HTTP/1.1\r\n" + host + "Connection: close, X-Hop\r\nX-Hop: a\r\nKeep-Alive: 1\r\nTransfer_Encoding: chunked\r\n\r\n", "GET /a" + got + "\r\n"},
		{"a body that looks like a request", "POST /a HTTP/1.1\r\n" + host + "Content-Length: 26\r\n\r\nGET /b HTTP/1.1\r\nHost: c\r\n", "POST /a" + got + "Content-Length: 26\r\n\r\nGET /b HTTP/1.1\r\nHost: c\r\n"},
		{"chunks", "POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTrailer: X-Late\r\n\r\n2;a=b\r\nhi\r\n0\r\nX-Late: a\r\n\r\n", "POST /a" + got + "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"},

		{"another host", "GET /a HTTP/1.1\r\nHost: evil.test\r\n\r\n", ""},
		{"another port", "GET /a HTTP/1.1\r\nHost: shop.test:80\r\n\r\n", ""},
		{"another host in the target", "GET http://evil.test/a HTTP/1.1\r\nHost: evil.test\r\n\r\n", ""},
		{"two hosts", "GET http://shop.test/a HTTP/1.1\r\nHost: evil.test\r\n\r\n", ""},
		{"a length and chunks", "POST /a HTTP/1.1\r\n" + host + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ""},
		{"a line that is folded", "GET /a HTTP/1.1\r\n" + host + "X-A: b\r\n Content-Length: 5\r\n\r\n", ""},
		{"a bare CR", "GET /a HTTP/1.1\r\n" + host + "X-A: b\rContent-Length: 5\r\n\r\n", ""},
		{"a bare LF", "GET /a HTTP/1.1\r\n" + host + "X-A: b\nContent-Length: 5\r\n\r\n", ""},
	} {
		for name, dial := range map[string]dialFunc{"HTTP/1.1": dial1, "HTTP/2": dial2, "streams": dialStream} {
			t.Run(tt.name+" over "+name, func(t *testing.T) {
				c, err := w.askTLS(dial, "shop.test:443", &tls.Config{RootCAs: roots, ServerName: "shop.test"})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.WriteString(c, tt.request); err != nil {
					t.Fatal(err)
				}
				res := finalOf(t, c)
				switch {
				case tt.want == "" && (res.StatusCode < 400 || len(seen) > 0):
					t.Errorf("status %d, and the host got %d requests", res.StatusCode, len(seen))
				case tt.want == "":
				case res.StatusCode != 204:
					t.Fatalf("status %d", res.StatusCode)
				default:
					if text := <-seen; text != tt.want {
						t.Errorf("the host got %q, want %q", text, tt.want)
					}
				}
			})
		}
	}
}

// TestAnswersOfHTTP1 looks at what a workload gets of an answer, and of what a host
// lets come behind it: nothing of that is the answer to another request.
func TestAnswersOfHTTP1(t *testing.T) {
	const smuggled = "HTTP/1.1 200 OK\r\nContent-Length: 8\r\nX-A: b\r\n\r\nsmuggled"
	type answer struct {
		text       string
		status     int
		head, body string
		cut        bool
	}
	all := map[string]answer{
		"a plain one":                      {text: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", status: 200, head: "Content-Length: 2\n", body: "hi"},
		"another behind it":                {text: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi" + smuggled, status: 200, head: "Content-Length: 2\n", body: "hi"},
		"another behind 204":               {text: "HTTP/1.1 204 No Content\r\n\r\n" + smuggled, status: 204},
		"another behind 304":               {text: "HTTP/1.1 304 Not Modified\r\nContent-Length: 8\r\n\r\n" + smuggled, status: 304, head: "Content-Length: 8\n"},
		"another behind chunks":            {text: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n" + smuggled, status: 200, body: "hi"},
		"fields of the connection":         {text: "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: X-Hop, Upgrade\r\nX-Hop: a\r\nUpgrade: h2c\r\nKeep-Alive: 1\r\nAlt-Svc: h3\r\nContent_Length: 9\r\n\r\n", status: 200, head: "Content-Length: 0\n"},
		"a connection that takes a length": {text: "HTTP/1.1 200 OK\r\nConnection: Content-Length\r\nContent-Length: 2\r\n\r\nhi", status: 502},
		"a length and chunks":              {text: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", status: 502},
		"two lengths":                      {text: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi", status: 502},
		"chunks that are not the last":     {text: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", status: 502},
		"204 with a length":                {text: "HTTP/1.1 204 No Content\r\nContent-Length: 8\r\n\r\nsmuggled", status: 502},
		"an interim one with chunks":       {text: "HTTP/1.1 103 Early Hints\r\nTransfer-Encoding: chunked\r\n\r\n" + smuggled, status: 502},
		"101":                              {text: "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" + rightProof + "\r\n" + smuggled, status: 502},
		"101 to something else":            {text: "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + smuggled, status: 502},
		"a folded line":                    {text: "HTTP/1.1 200 OK\r\nX-A: b\r\n c\r\nContent-Length: 0\r\n\r\n", status: 502},
		"a bare CR":                        {text: "HTTP/1.1 200 OK\r\nX-A: b\rX-C: d\r\nContent-Length: 0\r\n\r\n", status: 502},
		"a bare LF":                        {text: "HTTP/1.1 200 OK\nContent-Length: 0\n\n", status: 502},
		"NUL":                              {text: "HTTP/1.1 200 OK\r\nX-A: \x00\r\nContent-Length: 0\r\n\r\n", status: 502},
		"HTTP/2":                           {text: "HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n", status: 502},
		"a chunk that is too long":         {text: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi, and more\r\n0\r\n\r\n", status: 502, cut: true},
	}
	names := slices.Sorted(maps.Keys(all))
	w, s := askWorld(t)
	startRaw1(s, func(path string) string {
		var n int
		if _, err := fmt.Sscanf(path, "/%d", &n); err != nil {
			return "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnext"
		}
		return all[names[n]].text
	})
	w.use(w.policy(access+"p, all, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:shop.test, *, *, **, -, allow\n", s.originated("shop.test")))
	h := w.streamsOn(billing)
	for n, name := range names {
		t.Run(name, func(t *testing.T) {
			tt, c := all[name], askOn(t, h)
			if _, err := fmt.Fprintf(c, "GET http://shop.test/%d HTTP/1.1\r\nHost: shop.test\r\n\r\n", n); err != nil {
				t.Fatal(err)
			}
			res, err := http.ReadResponse(c.br, nil)
			if tt.cut && err != nil {
				return // nothing of it came
			}
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(res.Body)
			if res.StatusCode != tt.status && !tt.cut {
				t.Fatalf("status %d, want %d", res.StatusCode, tt.status)
			}
			if bytes.Contains(b, []byte("smuggled")) || res.Header.Get("X-A") != "" {
				t.Errorf("something got through: %q %v", b, res.Header)
			}
			if tt.status == 502 {
				return
			}
			if err != nil || string(b) != tt.body || fieldsOf(res.Header) != tt.head {
				t.Errorf("got %q, %v, with %q", b, err, fieldsOf(res.Header))
			}
			for range 2 {
				if res, body := c.ask(t, "GET http://shop.test/next HTTP/1.1\r\nHost: shop.test\r\n\r\n"); res.StatusCode != 200 || body != "next" {
					t.Errorf("behind it: %d %q", res.StatusCode, body)
				}
			}
		})
	}
}
