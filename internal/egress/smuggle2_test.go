package egress

import (
	"io"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sallyport/internal/hop"
)

// callRaw has a caller speak HTTP/2 in a tunnel, and says what came of the stream
// that it opens: a status, or "reset" for the end of that or of all.
func callRaw(t *testing.T, w *world, h *hop.Conn, do func(r *rawSite)) string {
	t.Helper()
	tun, ref := w.connectStream(h, "shop.test:80")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	defer tun.Close()
	if _, err := io.WriteString(tun, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	r := &rawSite{Framer: http2.NewFramer(tun, tun)}
	r.AllowIllegalWrites, r.ReadMetaHeaders = true, hpack.NewDecoder(4096, nil)
	r.enc = hpack.NewEncoder(&r.buf)
	_ = r.WriteSettings()
	do(r)
	for {
		f, err := r.ReadFrame()
		if err != nil {
			return "reset"
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			if s := f.PseudoValue("status"); s[0] != '1' {
				return s
			}
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			return "reset"
		}
	}
}

// TestCallsOfHTTP2InTunnels looks at all that hosts of both kinds get of what an
// application speaks that is not asked to.
func TestCallsOfHTTP2InTunnels(t *testing.T) {
	plain := func(method, path string, more ...string) []string {
		return append([]string{":method", method, ":scheme", "http", ":path", path, ":authority", "shop.test"}, more...)
	}
	is := func(head string) string { return head + " HTTP/1.1\r\nHost: shop.test\r\n" }
	for _, tt := range []struct {
		name   string
		fields []string
		body   []string // of frames; nil: the head ends it
		late   []string // trailers
		status string
		h2, h1 string // what the host gets; empty: nothing that is whole
	}{
		{name: "a plain one", fields: plain("GET", "/a?x=1"), status: "204", h2: asHTTP2("GET", "/a?x=1"), h1: is("GET /a?x=1") + "\r\n"},
		{name: "fields", fields: plain("GET", "/a", "x-a", "b", "cookie", "c=1", "cookie", "d=2", "te", "trailers"), status: "204",
			h2: asHTTP2("GET", "/a") + "x-a: b\ncookie: c=1; d=2\nte: trailers\n", h1: is("GET /a") + "x-a: b\r\nCookie: c=1; d=2\r\nTE: trailers\r\nConnection: TE\r\n\r\n"},
		{name: "a host that is the authority", fields: plain("GET", "/a", "host", "shop.test"), status: "204", h2: asHTTP2("GET", "/a"), h1: is("GET /a") + "\r\n"},
		{name: "a host for an authority", fields: []string{":method", "GET", ":scheme", "http", ":path", "/a", "host", "shop.test"}, status: "204", h2: asHTTP2("GET", "/a"), h1: is("GET /a") + "\r\n"},
		{name: "what only a proxy says", fields: plain("GET", "/a", "x-forwarded-host", "evil.test", "x-original-url", "/b", "sallyport-x", "y", "proxy-authorization", "z", "http2-settings", "AA"), status: "204", h2: asHTTP2("GET", "/a"), h1: is("GET /a") + "\r\n"},
		{name: "lengths in another spelling", fields: plain("GET", "/a", "content_length", "5", "transfer_encoding", "chunked"), status: "204", h2: asHTTP2("GET", "/a"), h1: is("GET /a") + "\r\n"},
		{name: "a body of a length", fields: plain("POST", "/a", "content-length", "5"), body: []string{"hel", "lo"}, status: "204", h2: asHTTP2("POST", "/a") + "content-length: 5\n|hello", h1: is("POST /a") + "Content-Length: 5\r\n\r\nhello"},
		{name: "a body without", fields: plain("POST", "/a"), body: []string{"0\r\n\r\nGET /b HTTP/1.1\r\n\r\n"}, status: "204", h2: asHTTP2("POST", "/a") + "|0\r\n\r\nGET /b HTTP/1.1\r\n\r\n",
			h1: is("POST /a") + "Transfer-Encoding: chunked\r\n\r\n18\r\n0\r\n\r\nGET /b HTTP/1.1\r\n\r\n\r\n0\r\n\r\n"},
		{name: "trailers", fields: plain("POST", "/a"), body: []string{"hi"}, late: []string{"x-late", "a", "content-length", "9", "host", "evil.test"}, status: "204", h2: asHTTP2("POST", "/a") + "|hi", h1: is("POST /a") + "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"},
		{name: "a WebSocket", fields: []string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":path", "/a", ":authority", "shop.test", "sec-websocket-version", "13"}, body: []string{}, status: "502", // 204 would be a tunnel
			h2: asHTTP2("GET", "/a") + "sec-websocket-version: 13\nsec-websocket-key: c2FsbHlwb3J0LWgyLXdzIQ==\n", h1: is("GET /a") + "sec-websocket-version: 13\r\nSec-WebSocket-Key: c2FsbHlwb3J0LWgyLXdzIQ==\r\n\r\n"},

		{name: "another authority", fields: []string{":method", "GET", ":scheme", "http", ":path", "/a", ":authority", "evil.test"}, status: "421"},
		{name: "another port", fields: []string{":method", "GET", ":scheme", "http", ":path", "/a", ":authority", "shop.test:443"}, status: "421"},
		{name: "another host", fields: plain("GET", "/a", "host", "evil.test"), status: "400"},
		{name: "two hosts", fields: plain("GET", "/a", "host", "shop.test", "host", "shop.test"), status: "reset"},
		{name: "no authority", fields: []string{":method", "GET", ":scheme", "http", ":path", "/a"}, status: "400"},
		{name: "an authority with a path", fields: []string{":method", "GET", ":scheme", "http", ":path", "/a", ":authority", "shop.test/b"}, status: "400"},
		{name: "an authority with a line end", fields: []string{":method", "GET", ":scheme", "http", ":path", "/a", ":authority", "shop.test\r\nX-A: b"}, status: "reset"},
		{name: "somebody before the host", fields: []string{":method", "GET", ":scheme", "http", ":path", "/a", ":authority", "a@shop.test"}, status: "400"},
		{name: "a tunnel", fields: []string{":method", "CONNECT", ":authority", "evil.test:443"}, body: []string{}, status: "405"},
		{name: "a tunnel to another protocol", fields: []string{":method", "CONNECT", ":protocol", "connect-udp", ":scheme", "http", ":path", "/a", ":authority", "shop.test"}, body: []string{}, status: "reset"},
		{name: "OPTIONS for the server", fields: plain("OPTIONS", "*"), status: "400"},
		{name: "TRACE", fields: plain("TRACE", "/a"), status: "405"},
		{name: "a path with a blank", fields: plain("GET", "/a HTTP/1.1"), status: "reset"},
		{name: "a path with a line end", fields: plain("GET", "/a HTTP/1.1\r\nHost: evil.test\r\n\r\n"), status: "reset"},
		{name: "a path that is a URI", fields: plain("GET", "http://evil.test/a"), status: "reset"},
		{name: "a path that is none", fields: plain("GET", "a"), status: "reset"},
		{name: "an empty path", fields: plain("GET", ""), status: "reset"},
		{name: "a path with dots", fields: plain("GET", "/a/%2e%2e/b"), status: "400"},
		{name: "a method with a blank", fields: plain("GET /b HTTP/1.1\r\nX-A:", "/a"), status: "reset"},
		{name: "two methods", fields: plain("GET", "/a", ":method", "POST"), status: "reset"},
		{name: "two paths", fields: []string{":method", "GET", ":scheme", "http", ":path", "/a", ":path", "/b", ":authority", "shop.test"}, status: "reset"},
		{name: "a pseudo field behind others", fields: []string{":method", "GET", ":scheme", "http", "x-a", "b", ":path", "/a", ":authority", "shop.test"}, status: "reset"},
		{name: "a pseudo field of answers", fields: plain("GET", "/a", ":status", "200"), status: "reset"},
		{name: "a scheme of nobody", fields: []string{":method", "GET", ":scheme", "http\r\nX-A: b", ":path", "/a", ":authority", "shop.test"}, status: "reset"},
		{name: "a name in upper case", fields: plain("GET", "/a", "X-A", "b"), status: "reset"},
		{name: "a name with a colon", fields: plain("GET", "/a", "x-a: b\r\nx-c", "d"), status: "reset"},
		{name: "a line end in a value", fields: plain("GET", "/a", "x-a", "b\r\nTransfer-Encoding: chunked"), status: "reset"},
		{name: "a bare LF in a value", fields: plain("GET", "/a", "x-a", "b\nc"), status: "reset"},
		{name: "a bare CR in a cookie", fields: plain("GET", "/a", "cookie", "b\rc"), status: "reset"},
		{name: "NUL in a value", fields: plain("GET", "/a", "x-a", "\x00"), status: "reset"},
		{name: "connection", fields: plain("GET", "/a", "connection", "x-a"), status: "reset"},
		{name: "transfer-encoding", fields: plain("POST", "/a", "transfer-encoding", "chunked"), body: []string{"0\r\n\r\n"}, status: "reset"},
		{name: "upgrade", fields: plain("GET", "/a", "upgrade", "websocket"), status: "reset"},
		{name: "te of another kind", fields: plain("GET", "/a", "te", "gzip"), status: "reset"},
		{name: "two lengths", fields: plain("POST", "/a", "content-length", "2", "content-length", "2"), body: []string{"hi"}, status: "reset"},
		{name: "a list of lengths", fields: plain("POST", "/a", "content-length", "2, 2"), body: []string{"hi"}, status: "reset"},
		{name: "a length and nothing", fields: plain("POST", "/a", "content-length", "2"), status: "reset"},
		{name: "more than the length", fields: plain("POST", "/a", "content-length", "2"), body: []string{"hi", "GET /b HTTP/1.1\r\n\r\n"}, status: "reset"},
		{name: "less than the length", fields: plain("POST", "/a", "content-length", "20"), body: []string{"hi"}, status: "reset"},
		{name: "a pseudo field in trailers", fields: plain("POST", "/a"), body: []string{"hi"}, late: []string{":path", "/b"}, status: "reset"},
		{name: "a line end in trailers", fields: plain("POST", "/a"), body: []string{"hi"}, late: []string{"x-a", "b\r\n\r\nGET /b HTTP/1.1"}, status: "reset"},
	} {
		for _, alpn := range []string{"h2", "http/1.1"} {
			t.Run(tt.name+" to "+alpn, func(t *testing.T) {
				t.Parallel()
				s := startSite(t, "shop.test")
				var seen func() (string, bool)
				want := tt.h1
				if alpn == "h2" {
					want = tt.h2
					got := startRaw(t, s, func(r *rawSite, id uint32, _ string) { r.head(id, true, ":status", "204") })
					seen = func() (string, bool) {
						for r := range got {
							if !r.part {
								return strings.TrimSuffix(r.head+r.trailers+"|"+r.body, "|"), r.cut
							}
						}
						return "", false
					}
					defer func() {
						n := 0
						for len(got) > 0 {
							if r := <-got; !r.part && !r.cut {
								n++
							}
						}
						checkNone(t, n)
					}()
				} else {
					got := startRaw1(s, func(string) string { return "HTTP/1.1 204 No Content\r\n\r\n" })
					seen = func() (string, bool) { return <-got, false }
					defer func() { checkNone(t, len(got)) }()
				}
				w := newWorld(t, nil)
				w.use(w.policy(access+"p, all, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:shop.test, *, *, **, -, allow\n", s.spoken(alpn)))
				status := callRaw(t, w, w.streamsOn(billing), func(r *rawSite) {
					r.head(1, tt.body == nil, tt.fields...)
					for i, b := range tt.body {
						r.data(1, i == len(tt.body)-1 && tt.late == nil, b)
					}
					if tt.late != nil {
						r.head(1, true, tt.late...)
					}
				})
				if status != tt.status {
					t.Errorf("status %s, want %s", status, tt.status)
				}
				if want == "" {
					return
				}
				if got, cut := seen(); got != want || cut {
					t.Errorf("the host got %q, want %q", got, want)
				}
			})
		}
	}
}

// checkNone looks that a host got nothing that is whole behind what was looked at.
func checkNone(t *testing.T, n int) {
	t.Helper()
	if n > 0 {
		t.Errorf("the host got %d requests more", n)
	}
}
