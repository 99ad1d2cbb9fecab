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
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sallyport/internal/audit"
	"sallyport/internal/hop"
)

// A rawSite is a host that speaks HTTP/2, and keeps to none of its rules but where a
// test has it.
type rawSite struct {
	*http2.Framer
	buf bytes.Buffer
	enc *hpack.Encoder
}

// A rawRequest is what a rawSite has got on a stream.
type rawRequest struct {
	head, trailers, body string
	part                 bool // there is more to come
	cut                  bool // the stream was reset before its end
}

// head sends a field section: names and values by turns.
func (s *rawSite) head(id uint32, end bool, fields ...string) {
	s.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = s.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	_ = s.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: s.buf.Bytes(), EndStream: end, EndHeaders: true})
}

func (s *rawSite) data(id uint32, end bool, text string) { _ = s.WriteData(id, end, []byte(text)) }

// startRaw makes a rawSite of s: it answers each request that is whole, by its path.
// What it gives has room for the requests of one test.
func startRaw(t *testing.T, s *site, answer func(r *rawSite, id uint32, path string)) <-chan rawRequest {
	seen := make(chan rawRequest, 256)
	s.addr = serve(t, func(c net.Conn) {
		tc := tls.Server(c, &tls.Config{Certificates: s.certs, NextProtos: []string{"h2"}})
		if _, err := io.ReadFull(tc, make([]byte, len(http2.ClientPreface))); err != nil {
			return
		}
		r := &rawSite{Framer: http2.NewFramer(tc, tc)}
		r.AllowIllegalWrites, r.ReadMetaHeaders = true, hpack.NewDecoder(4096, nil)
		r.enc = hpack.NewEncoder(&r.buf)
		_ = r.WriteSettings()
		calls := map[uint32]*rawRequest{}
		for {
			f, err := r.ReadFrame()
			if err != nil {
				if _, stream := err.(http2.StreamError); stream {
					t.Errorf("the gateway sent what HTTP/2 forbids: %v", r.ErrorDetail())
				}
				return
			}
			call, end := calls[f.Header().StreamID], false
			switch f := f.(type) {
			case *http2.SettingsFrame:
				if !f.IsAck() {
					_ = r.WriteSettingsAck()
				}
				continue
			case *http2.MetaHeadersFrame:
				var text strings.Builder
				for _, h := range f.Fields {
					fmt.Fprintf(&text, "%s: %s\n", h.Name, h.Value)
				}
				if end = f.StreamEnded(); call != nil {
					call.trailers = text.String()
				} else {
					call = &rawRequest{head: text.String()}
					calls[f.StreamID] = call
				}
			case *http2.DataFrame:
				first := call.body == ""
				call.body += string(f.Data())
				if end = f.StreamEnded(); first && !end {
					seen <- rawRequest{part: true}
				}
			case *http2.RSTStreamFrame:
				if call != nil {
					call.cut = true
					seen <- *call
				}
			}
			if end {
				delete(calls, f.Header().StreamID)
				seen <- *call
				_, path, _ := strings.Cut(call.head, ":path: ")
				path, _, _ = strings.Cut(path, "\n")
				answer(r, f.Header().StreamID, path)
			}
		}
	})
	return seen
}

// smuggleWorld lets billing send anything to a rawSite.
func smuggleWorld(t *testing.T, answer func(r *rawSite, id uint32, path string)) (*world, *hop.Conn, <-chan rawRequest) {
	s := startSite(t, "shop.test")
	seen := startRaw(t, s, answer)
	w := newWorld(t, nil)
	w.use(w.policy(access+"p, all, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:shop.test, *, *, **, -, allow\n", s.spoken("h2")))
	return w, w.streamsOn(billing), seen
}

// asHTTP2 are the pseudo fields of a request.
func asHTTP2(method, path string) string {
	return ":method: " + method + "\n:scheme: https\n:path: " + path + "\n:authority: shop.test\n"
}

// TestRequestsBecomeHTTP2 looks at all that a host gets of a request.
func TestRequestsBecomeHTTP2(t *testing.T) {
	_, h, seen := smuggleWorld(t, func(r *rawSite, id uint32, _ string) { r.head(id, true, ":status", "204") })
	const line, host = " HTTP/1.1\r\nHost: shop.test\r\n", "GET http://shop.test/a HTTP/1.1\r\nHost: shop.test\r\n"
	for _, tt := range []struct{ name, request, head, body string }{
		{"a plain one", host + "\r\n", asHTTP2("GET", "/a"), ""},
		{"names in upper case", host + "X-Mine: Yes\r\nACCEPT: */*\r\n\r\n", asHTTP2("GET", "/a") + "x-mine: Yes\naccept: */*\n", ""},
		{"odd names", host + "!#$%&'*+.^`|~: a\r\n\r\n", asHTTP2("GET", "/a") + "!#$%&'*+.^`|~: a\n", ""},
		{"blanks around a value, and within", host + "X-A: \t b \t c \t\r\nX-B:\r\n\r\n", asHTTP2("GET", "/a") + "x-a: b \t c\nx-b: \n", ""},
		{"bytes above ASCII", host + "X-A: \x80\xff\r\n\r\n", asHTTP2("GET", "/a") + "x-a: \x80\xff\n", ""},
		{"cookies", host + "Cookie: a=1\r\nCookie: b=2\r\n\r\n", asHTTP2("GET", "/a") + "cookie: a=1\ncookie: b=2\n", ""},
		{"another spelling of the authority", "GET http://SHOP.Test:80/a HTTP/1.1\r\nHost: Shop.TEST:80\r\n\r\n", asHTTP2("GET", "/a"), ""},
		{"no path, and a query", "GET http://shop.test?x=//a/../b&y=%0d%0aHost:%20c" + line + "\r\n", asHTTP2("GET", "/?x=//a/../b&y=%0d%0aHost:%20c"), ""},
		{"a path that is not canonical", "GET http://shop.test//a/%63" + line + "\r\n", asHTTP2("GET", "/a/c"), ""},

		{"fields of the connection", host + "Connection: keep-alive, X-Hop, Upgrade, HTTP2-Settings, TE\r\nKeep-Alive: timeout=5\r\nProxy-Connection: close\r\nX-Hop: a\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nTE: gzip;q=0.5\r\n\r\n", asHTTP2("GET", "/a"), ""},
		{"the end of the connection", host + "Connection: close\r\n\r\n", asHTTP2("GET", "/a"), ""},
		{"fields of the connection in another spelling", host + "Transfer_Encoding: chunked\r\nContent_Length: 5\r\nKeep_Alive: 1\r\nUp_grade: h2c\r\n\r\n", asHTTP2("GET", "/a") + "up_grade: h2c\n", ""},
		{"trailers that are asked for", host + "Connection: TE\r\nTE: gzip, trailers\r\n\r\n", asHTTP2("GET", "/a") + "te: trailers\n", ""},
		{"what only a proxy says", host + "X-Forwarded-Host: evil.test\r\nForwarded: host=evil.test\r\nX_Original_URL: /b\r\nProxy-Authorization: Basic x\r\n\r\n", asHTTP2("GET", "/a"), ""},
		{"an upgrade to a WebSocket", host + "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n", asHTTP2("GET", "/a") + "sec-websocket-version: 13\n", ""},
		{"a proof that nobody asked for", host + "Sec-WebSocket-Accept: x\r\n\r\n", asHTTP2("GET", "/a"), ""},

		{"a body of a length", "POST http://shop.test/a" + line + "Content-Length: 5\r\n\r\nhello", asHTTP2("POST", "/a") + "content-length: 5\n", "hello"},
		{"an empty body", "POST http://shop.test/a" + line + "Content-Length: 0\r\n\r\n", asHTTP2("POST", "/a") + "content-length: 0\n", ""},
		{"a body of a GET that looks like a request", "GET http://shop.test/a" + line + "Content-Length: 26\r\n\r\nGET /b HTTP/1.1\r\nHost: c\r\n", asHTTP2("GET", "/a") + "content-length: 26\n", "GET /b HTTP/1.1\r\nHost: c\r\n"},
		{"a body in chunks", "POST http://shop.test/a" + line + "Transfer-Encoding: chunked\r\n\r\n5;x=\"y\"\r\nhello\r\n0006\r\n world\r\n0\r\n\r\n", asHTTP2("POST", "/a"), "hello world"},
		{"trailers", "POST http://shop.test/a" + line + "Trailer: X-Late\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Late: a\r\nHost: evil.test\r\nContent-Length: 9\r\n\r\n", asHTTP2("POST", "/a"), "hi"},
		{"a wait for 100", "POST http://shop.test/a" + line + "Expect: 100-continue\r\nContent-Length: 2\r\n\r\nhi", asHTTP2("POST", "/a") + "content-length: 2\n", "hi"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := askOn(t, h)
			if _, err := io.WriteString(c, tt.request); err != nil {
				t.Fatal(err)
			}
			res := finalOf(t, c)
			if res.StatusCode != 204 {
				t.Fatalf("status %d", res.StatusCode)
			}
			got := <-seen
			for got.part {
				got = <-seen
			}
			if got.head != tt.head || got.body != tt.body || got.trailers != "" || got.cut {
				t.Errorf("the host got %+v, want %q, %q", got, tt.head, tt.body)
			}
		})
	}
}

// askOn opens a stream that lasts as long as t.
func askOn(t *testing.T, h *hop.Conn) *askConn {
	t.Helper()
	s, err := h.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	_ = s.SetDeadline(time.Now().Add(time.Minute))
	return &askConn{s, bufio.NewReader(s)}
}

// finalOf reads answers until one that is not interim.
func finalOf(t *testing.T, c *askConn) *http.Response {
	t.Helper()
	for {
		res, err := http.ReadResponse(c.br, nil)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode >= 200 {
			return res
		}
	}
}

// TestWhatIsNoRequestGoesNowhere over HTTP/2, which could carry it.
func TestWhatIsNoRequestGoesNowhere(t *testing.T) {
	w, h, seen := smuggleWorld(t, func(r *rawSite, id uint32, _ string) { r.head(id, true, ":status", "204") })
	const get, host = "GET http://shop.test/a HTTP/1.1\r\n", "Host: shop.test\r\n"
	for name, request := range map[string]string{
		"a pseudo field":                      get + host + ":path: /admin\r\n\r\n",
		"a pseudo field behind a bare LF":     get + host + "X-A: b\n:path: /admin\r\n\r\n",
		"a bare CR in a value":                get + host + "X-A: b\r:path: /admin\r\n\r\n",
		"NUL in a value":                      get + host + "X-A: b\x00c\r\n\r\n",
		"DEL in a value":                      get + host + "X-A: b\x7f\r\n\r\n",
		"a folded line":                       get + host + "X-A: b\r\n :path: /admin\r\n\r\n",
		"a blank before the colon":            get + host + "X-A : b\r\n\r\n",
		"a name with a blank":                 get + host + "X A: b\r\n\r\n",
		"no name":                             get + host + ": b\r\n\r\n",
		"a blank in the target":               "GET http://shop.test/a HTTP/1.1 /b HTTP/1.1\r\n" + host + "\r\n",
		"a control byte in the target":        "GET http://shop.test/a?\x0b HTTP/1.1\r\n" + host + "\r\n",
		"a line end in the path":              "GET http://shop.test/a%0d%0ab HTTP/1.1\r\n" + host + "\r\n",
		"a fragment":                          "GET http://shop.test/a#b HTTP/1.1\r\n" + host + "\r\n",
		"somebody before the host":            "GET http://a@shop.test/a HTTP/1.1\r\n" + host + "\r\n",
		"a method in lower case":              "get http://shop.test/a HTTP/1.1\r\n" + host + "\r\n",
		"a method with a colon":               ":GET http://shop.test/a HTTP/1.1\r\n" + host + "\r\n",
		"another Host":                        get + "Host: evil.test\r\n\r\n",
		"two Hosts":                           get + host + host + "\r\n",
		"a Host with another port":            get + "Host: shop.test:8443\r\n\r\n",
		"no Host":                             get + "\r\n",
		"a length and chunks":                 get + host + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"two lengths":                         get + host + "Content-Length: 0\r\nContent-Length: 0\r\n\r\n",
		"a list of lengths":                   get + host + "Content-Length: 0, 0\r\n\r\n",
		"a length with a sign":                get + host + "Content-Length: +0\r\n\r\n",
		"chunks that are not the last coding": get + host + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
		"chunks in HTTP/1.0":                  "GET http://shop.test/a HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"a chunk without its end":             "POST http://shop.test/a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n2\r\nhi0\r\n\r\n",
		"a chunk of a size with a sign":       "POST http://shop.test/a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n+2\r\nhi\r\n0\r\n\r\n",
		"a chunk line that ends in LF":        "POST http://shop.test/a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n2\nhi\r\n0\r\n\r\n",
		"a pseudo field in the trailers":      "POST http://shop.test/a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n:path: /b\r\n\r\n",
		"a connection that takes a length":    get + host + "Connection: Content-Length\r\nContent-Length: 2\r\n\r\nhi",
		"a connection that takes the Host":    get + host + "Connection: Host\r\n\r\n",
		"OPTIONS for the server":              "OPTIONS * HTTP/1.1\r\n" + host + "\r\n",
		"OPTIONS for the server, in full":     "OPTIONS http://shop.test HTTP/1.1\r\n" + host + "\r\n",
		"HTTP/2 without more ado":             http2.ClientPreface,
		"HTTP/2 in the version":               "GET http://shop.test/a HTTP/2.0\r\n" + host + "\r\n",
		"TRACE":                               "TRACE http://shop.test/a HTTP/1.1\r\n" + host + "\r\n",
		"https":                               "GET https://shop.test/a HTTP/1.1\r\n" + host + "\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			before := len(w.audit.Records())
			c := askOn(t, h)
			if _, err := io.WriteString(c, request); err != nil {
				t.Fatal(err)
			}
			res := finalOf(t, c)
			if res.StatusCode < 400 || res.StatusCode > 599 {
				t.Errorf("status %d", res.StatusCode)
			}
			if b, err := io.ReadAll(res.Body); err != nil || bytes.Contains(b, []byte("HTTP/1.1")) {
				t.Errorf("%q, %v", b, err)
			}
			if c.br.Buffered() > 0 {
				t.Error("there is another answer")
			}
			told := func(r audit.Record) bool { return r.Decision == audit.Deny || r.Kind == audit.KindEgressClose }
			if !slices.ContainsFunc(w.audit.Records()[before:], told) {
				t.Errorf("nothing is recorded: %s", w.lines())
			}
		})
	}
	for len(seen) > 0 {
		if got := <-seen; !got.cut && !got.part {
			t.Errorf("the host got %+v", got)
		}
	}
}

// TestRequestsThatAreCutOff are not whole for the host either.
func TestRequestsThatAreCutOff(t *testing.T) {
	_, h, seen := smuggleWorld(t, func(*rawSite, uint32, string) {})
	long := strings.Repeat("x", 20_000)
	for name, request := range map[string]string{
		"of a length": "Content-Length: 20001\r\n\r\n" + long,
		"in chunks":   "Transfer-Encoding: chunked\r\n\r\n4e20\r\n" + long + "\r\n",
		"in a chunk":  "Transfer-Encoding: chunked\r\n\r\n4e21\r\n" + long,
	} {
		s, err := h.Open()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(s, "POST http://shop.test/a HTTP/1.1\r\nHost: shop.test\r\n"+request); err != nil {
			t.Fatal(err)
		}
		if got := <-seen; !got.part {
			t.Errorf("%s: the host got %d bytes, cut off: %v", name, len(got.body), got.cut)
			continue
		}
		s.Close()
		got := <-seen
		for got.part {
			got = <-seen
		}
		if !got.cut {
			t.Errorf("%s: the host got a whole request of %d bytes", name, len(got.body))
		}
	}
}

// An answer2 is one over HTTP/2, and what becomes of it.
type answer2 struct {
	do       func(r *rawSite, id uint32)
	status   int // 502: nothing of it gets through
	head     string
	body     string
	trailers string
	cut      bool // the body ends too soon, for all to see
}

func answers2() map[string]answer2 {
	head := func(status int, want, body string, fields ...string) answer2 {
		return answer2{status: status, head: want, body: body, do: func(r *rawSite, id uint32) {
			r.head(id, body == "", append([]string{":status", fmt.Sprint(status)}, fields...)...)
			if body != "" {
				r.data(id, true, body)
			}
		}}
	}
	refused := func(end bool, fields ...string) answer2 {
		return answer2{status: 502, do: func(r *rawSite, id uint32) { r.head(id, end, fields...) }}
	}
	const ok, length = ":status", "content-length"
	all := map[string]answer2{
		"a plain one":                   head(200, "Content-Length: 0\nX-A: b\n", "", "x-a", "b"),
		"one with a body":               head(200, "X-A: b\n", "hello", "x-a", "b"),
		"one of a length":               head(200, "Content-Length: 5\n", "hello", length, "5"),
		"a body that looks like more":   head(200, "Content-Length: 38\n", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", length, "38"),
		"a body that looks like chunks": head(200, "", "0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"),
		"a status that nobody knows":    head(599, "Content-Length: 0\n", ""),
		"fields for nobody":             head(200, "Content-Length: 0\n", "", "te", "trailers", "host", "evil.test", "cookie", "a=b", "expect", "100-continue", "proxy-authenticate", "x"),
		"what only the mesh says":       head(200, "Content-Length: 0\n", "", "sallyport-decision", "x", "alt-svc", "h3", "proxy-status", "x", "sallyport_decision", "y"),
		"lengths in another spelling":   head(200, "", "hello", "content_length", "2", "transfer_encoding", "identity"),
		"bytes above ASCII":             head(200, "Content-Length: 0\nX-A: \x80\xff\n", "", "x-a", "\x80\xff"),
		"a proof that nobody asked for": head(200, "Content-Length: 0\nSec-Websocket-Accept: x\n", "", "sec-websocket-accept", "x"),

		"a line end in a value":        refused(true, ok, "200", "x-a", "b\r\nset-cookie: c=d"),
		"a bare CR in a value":         refused(true, ok, "200", "x-a", "b\rc"),
		"a bare LF in a value":         refused(true, ok, "200", "x-a", "b\nc"),
		"a head in a value":            refused(true, ok, "200", "x-a", "b\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
		"NUL in a value":               refused(true, ok, "200", "x-a", "b\x00"),
		"blanks around a value":        refused(true, ok, "200", "x-a", " b"),
		"a line end in a name":         refused(true, ok, "200", "x-a: b\r\nx-c", "d"),
		"a colon in a name":            refused(true, ok, "200", "x-a:b", "c"),
		"a name in upper case":         refused(true, ok, "200", "X-A", "b"),
		"no name":                      refused(true, ok, "200", "", "b"),
		"a line end in the status":     refused(true, ok, "200\r\nx-a: b"),
		"a status with a phrase":       refused(true, ok, "200 OK"),
		"no status":                    refused(true, "x-a", "b"),
		"two statuses":                 refused(true, ok, "200", ok, "200"),
		"a status behind others":       refused(true, "x-a", "b", ok, "200"),
		"a pseudo field of requests":   refused(true, ok, "200", ":path", "/"),
		"a pseudo field of nobody":     refused(true, ok, "200", ":sneaky", "/"),
		"101":                          refused(false, ok, "101", "upgrade", "websocket"),
		"101 without more":             refused(false, ok, "101"),
		"connection":                   refused(true, ok, "200", "connection", "close"),
		"keep-alive":                   refused(true, ok, "200", "keep-alive", "timeout=5"),
		"proxy-connection":             refused(true, ok, "200", "proxy-connection", "close"),
		"transfer-encoding":            refused(false, ok, "200", "transfer-encoding", "chunked"),
		"upgrade":                      refused(true, ok, "200", "upgrade", "h2c"),
		"te of another kind":           refused(true, ok, "200", "te", "gzip"),
		"two lengths":                  refused(false, ok, "200", length, "5", length, "5"),
		"a list of lengths":            refused(false, ok, "200", length, "5, 5"),
		"a length with a sign":         refused(false, ok, "200", length, "+5"),
		"a length in hexadecimal":      refused(false, ok, "200", length, "0x5"),
		"a length without a body":      refused(true, ok, "200", length, "5"),
		"204 with a length":            refused(true, ok, "204", length, "5"),
		"an interim one with a length": refused(false, ok, "103", length, "5"),
		"an interim one that ends":     refused(true, ok, "103"),
		"two types":                    refused(true, ok, "200", "content-type", "a/b", "content-type", "c/d"),
		"data before the head": {status: 502, do: func(r *rawSite, id uint32) {
			r.data(id, false, "HTTP/1.1 200 OK\r\n\r\n")
		}},
		"a promise": {status: 502, do: func(r *rawSite, id uint32) {
			_ = r.WritePushPromise(http2.PushPromiseParam{StreamID: id, PromiseID: 2, BlockFragment: []byte{0x88}, EndHeaders: true})
		}},
		"nine interim ones": {status: 502, do: func(r *rawSite, id uint32) {
			for range 9 {
				r.head(id, false, ok, "102")
			}
		}},
	}
	maps.Copy(all, answers2InParts())
	return all
}

// answers2InParts have a body, or trailers, that do not fit their head.
func answers2InParts() map[string]answer2 {
	const ok, length = ":status", "content-length"
	parts := func(a answer2, do func(r *rawSite, id uint32)) answer2 { a.do = do; return a }
	return map[string]answer2{
		"an interim one first": parts(answer2{status: 200, head: "Content-Length: 2\n", body: "hi"}, func(r *rawSite, id uint32) {
			r.head(id, false, ok, "103", "link", "</a>", "alt-svc", "h3")
			r.head(id, false, ok, "200", length, "2")
			r.data(id, true, "hi")
		}),
		"trailers": parts(answer2{status: 200, body: "hi", trailers: "Grpc-Status: 0\n"}, func(r *rawSite, id uint32) {
			r.head(id, false, ok, "200")
			r.data(id, false, "hi")
			r.head(id, true, "grpc-status", "0", "content-length", "7", "host", "evil.test", "set-cookie", "a=b", "alt-svc", "h3", "sallyport-x", "y", "location", "/b")
		}),
		"trailers behind a length": parts(answer2{status: 200, head: "Content-Length: 2\n", body: "hi"}, func(r *rawSite, id uint32) {
			r.head(id, false, ok, "200", length, "2")
			r.data(id, false, "hi")
			r.head(id, true, "x-late", "a")
		}),
		"a length of which nothing comes": parts(answer2{status: 200, head: "Content-Length: 5\n", cut: true}, func(r *rawSite, id uint32) {
			r.head(id, false, ok, "200", length, "5")
			r.data(id, true, "")
		}),
		"less than the length": parts(answer2{status: 200, head: "Content-Length: 5\n", cut: true}, func(r *rawSite, id uint32) {
			r.head(id, false, ok, "200", length, "5")
			r.data(id, true, "hi")
		}),
		"more than the length": parts(answer2{status: 200, head: "Content-Length: 2\n", cut: true}, func(r *rawSite, id uint32) {
			r.head(id, false, ok, "200", length, "2")
			r.data(id, true, "hi, and HTTP/1.1 200 OK\r\n\r\n")
		}),
		"more than the length, later": parts(answer2{status: 200, head: "Content-Length: 2\n", cut: true}, func(r *rawSite, id uint32) {
			r.head(id, false, ok, "200", length, "2")
			r.data(id, false, "hi")
			r.data(id, true, "HTTP/1.1 200 OK\r\n\r\n")
		}),
		"a reset": parts(answer2{status: 200, cut: true}, func(r *rawSite, id uint32) {
			r.head(id, false, ok, "200")
			r.data(id, false, "hi")
			_ = r.WriteRSTStream(id, http2.ErrCodeNo)
		}),
		"a second head": parts(answer2{status: 200, cut: true}, func(r *rawSite, id uint32) {
			r.head(id, false, ok, "200")
			r.data(id, false, "hi")
			r.head(id, true, ok, "200")
		}),
		"a head instead of trailers": parts(answer2{status: 200, cut: true}, func(r *rawSite, id uint32) {
			r.head(id, false, ok, "200")
			r.data(id, false, "hi")
			r.head(id, true, "x-a", "b\r\n\r\nHTTP/1.1 200 OK")
		}),
		"a field of the connection in trailers": parts(answer2{status: 200, cut: true}, func(r *rawSite, id uint32) {
			r.head(id, false, ok, "200")
			r.data(id, false, "hi")
			r.head(id, true, "transfer-encoding", "chunked")
		}),
	}
}

// TestAnswersOfHTTP2 looks at all that a workload gets of an answer, and of what
// comes behind it.
func TestAnswersOfHTTP2(t *testing.T) {
	all := answers2()
	names := slices.Sorted(maps.Keys(all))
	_, h, _ := smuggleWorld(t, func(r *rawSite, id uint32, path string) {
		var n int
		if _, err := fmt.Sscanf(path, "/%d", &n); err == nil {
			all[names[n]].do(r, id)
			return
		}
		r.head(id, false, ":status", "200", "content-length", "4")
		r.data(id, true, "next")
	})
	for n, name := range names {
		t.Run(name, func(t *testing.T) {
			tt, c := all[name], askOn(t, h)
			if _, err := fmt.Fprintf(c, "GET http://shop.test/%d HTTP/1.1\r\nHost: shop.test\r\nTE: trailers\r\nConnection: TE\r\n\r\n", n); err != nil {
				t.Fatal(err)
			}
			res := finalOf(t, c)
			b, err := io.ReadAll(res.Body)
			if res.StatusCode != tt.status {
				t.Fatalf("status %d, want %d", res.StatusCode, tt.status)
			}
			if tt.status == 502 {
				if !strings.HasPrefix(string(b), `{"error":`) || len(res.Header["X-A"])+len(res.Header["Set-Cookie"]) > 0 {
					t.Errorf("something got through: %q %v", b, res.Header)
				}
				return
			}
			if (err != nil) != tt.cut || !tt.cut && string(b) != tt.body || fieldsOf(res.Header) != tt.head || fieldsOf(res.Trailer) != tt.trailers {
				t.Errorf("got %q, %v, with %q and the trailers %q", b, err, fieldsOf(res.Header), fieldsOf(res.Trailer))
			}
			if tt.cut {
				if rest, _ := io.ReadAll(c.br); bytes.Contains(rest, []byte("HTTP/1.1")) {
					t.Errorf("behind it came %q", rest)
				}
				return
			}
			if res, body := c.ask(t, "GET http://shop.test/next HTTP/1.1\r\nHost: shop.test\r\n\r\n"); res.StatusCode != 200 || body != "next" {
				t.Errorf("behind it: %d %q", res.StatusCode, body)
			}
		})
	}
}

// fieldsOf are fields, sorted.
func fieldsOf(h http.Header) string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(h)) {
		for _, v := range h[name] {
			fmt.Fprintf(&b, "%s: %s\n", name, v)
		}
	}
	return b.String()
}
