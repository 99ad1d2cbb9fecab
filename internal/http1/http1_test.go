package http1

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// memConn is a connection whose input is known in advance. step bounds one
// read, so that every way of cutting the input into pieces can be tried.
type memConn struct {
	in     []byte
	step   int
	out    bytes.Buffer
	closed bool
	mu     sync.Mutex
	fail   error         // what a write returns
	wait   chan struct{} // when set, reads block until it is closed
	until  string        // written bytes that close wait
	woken  bool
}

func (m *memConn) Read(p []byte) (int, error) {
	if m.wait != nil {
		<-m.wait
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return 0, net.ErrClosed
	}
	if len(m.in) == 0 {
		return 0, io.EOF
	}
	if m.step > 0 && len(p) > m.step {
		p = p[:m.step]
	}
	n := copy(p, m.in)
	m.in = m.in[n:]
	return n, nil
}

func (m *memConn) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return 0, net.ErrClosed
	}
	if m.fail != nil {
		return 0, m.fail
	}
	n, err := m.out.Write(p)
	if m.until != "" && strings.Contains(m.out.String(), m.until) {
		m.wake()
	}
	return n, err
}

func (m *memConn) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wake()
	m.closed = true
	return nil
}

func (m *memConn) wake() {
	if m.wait != nil && !m.woken {
		m.woken = true
		close(m.wait)
	}
}

func (m *memConn) written() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.out.String()
}

func (m *memConn) LocalAddr() net.Addr              { return nil }
func (m *memConn) RemoteAddr() net.Addr             { return nil }
func (m *memConn) SetDeadline(time.Time) error      { return nil }
func (m *memConn) SetReadDeadline(time.Time) error  { return nil }
func (m *memConn) SetWriteDeadline(time.Time) error { return nil }

func mem(s string) *memConn { return &memConn{in: []byte(s)} }

// readReq reads one request from text.
func readReq(text string, lim Limits) (*Request, *Conn, error) {
	c := NewConn(mem(text), lim)
	r := new(Request)
	err := c.ReadRequest(r)
	return r, c, err
}

// parsed is readReq for text that must be fine.
func parsed(t *testing.T, text string) (*Request, *Conn) {
	t.Helper()
	r, c, err := readReq(text, Limits{})
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return r, c
}

func wantReason(t *testing.T, err error, status int, reason Reason) {
	t.Helper()
	var pe *ProtocolError
	if !errors.As(err, &pe) {
		t.Fatalf("error is %v, want a protocol error %d %s", err, status, reason)
	}
	if pe.Status != status || pe.Reason != reason {
		t.Errorf("refused with %d %s (%s), want %d %s", pe.Status, pe.Reason, pe.Detail, status, reason)
	}
}

// proxy serves one downstream connection the way the real one does: read,
// refuse or exchange, until the connection may not go on. It reports the last
// result and error.
func proxy(down *Conn, up func() *Conn) (res Result, err error) {
	var r Request
	x := Exchange{Down: down, Request: &r}
	x.ToUp.Drop = Reserved
	for {
		if err = down.ReadRequest(&r); err != nil {
			if s := StatusOf(err); s != 0 {
				_, _ = down.WriteError(nil, s, nil, []byte(`{"error":"refused"}`))
				down.Linger()
			}
			return res, err
		}
		x.Up = up()
		if res, err = x.Run(); err != nil {
			if s := StatusOf(err); s != 0 && !res.ResponseStarted {
				_, _ = down.WriteError(&r, s, nil, []byte(`{"error":"failed"}`))
				down.Linger()
			}
			down.Close()
			x.Up.Close()
			return res, err
		}
		if res.Upgraded {
			return res, nil
		}
		if !res.UpstreamReusable {
			x.Up.Close()
		}
		if !res.DownstreamReusable {
			down.Linger()
			return res, nil
		}
	}
}

// once runs raw client bytes against an upstream that answers with answer.
// It returns what the client got and what the upstream got.
func once(client, answer string) (got, forwarded string, res Result, err error) {
	d, u := mem(client), mem(answer)
	down, up := NewConn(d, Limits{}), NewConn(u, Limits{})
	res, err = proxy(down, func() *Conn { return up })
	return d.written(), u.written(), res, err
}

const okAnswer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

// A refusal is a request that must not pass.
type refusal struct {
	name   string // the number is the row of the corpus
	in     string
	status string
	reason Reason
}

// refusals is corpus/http-strictness.md as far as it concerns HTTP/1 requests.
func refusals() []refusal {
	const host = "Host: app.example\r\n"
	get := func(fields string) string { return "GET /x HTTP/1.1\r\n" + host + fields + "\r\n" }
	post := func(fields, body string) string { return "POST /x HTTP/1.1\r\n" + host + fields + "\r\n" + body }
	te := "Transfer-Encoding: chunked\r\n"
	smuggled := "0\r\n\r\nGET /admin HTTP/1.1\r\n" + host + "\r\n"
	long := func(n int) string { return strings.Repeat("a", n) }

	return []refusal{
		{"1 length and chunked", post("Content-Length: 5\r\n"+te, smuggled), "400", ReasonFraming},
		{"1 chunked and length", post(te+"Content-Length: 5\r\n", smuggled), "400", ReasonFraming},
		{"1 chunked and length zero", post(te+"Content-Length: 0\r\n", smuggled), "400", ReasonFraming},
		{"2 xchunked", post("Transfer-Encoding: xchunked\r\n", smuggled), "501", ReasonTransferEncoding},
		{"2 chunked then identity", post("Transfer-Encoding: chunked, identity\r\n", smuggled), "501", ReasonTransferEncoding},
		{"2 identity", post("Transfer-Encoding: identity\r\n", smuggled), "501", ReasonTransferEncoding},
		{"2 gzip then chunked", post("Transfer-Encoding: gzip, chunked\r\n", smuggled), "501", ReasonTransferEncoding},
		{"2 chunked twice in a line", post("Transfer-Encoding: chunked, chunked\r\n", smuggled), "501", ReasonTransferEncoding},
		{"2 chunked twice", post(te+te, smuggled), "400", ReasonDuplicate},
		{"2 empty coding", post("Transfer-Encoding:\r\n", smuggled), "501", ReasonTransferEncoding},
		{"2 coding with comma", post("Transfer-Encoding: chunked,\r\n", smuggled), "501", ReasonTransferEncoding},
		{"2 coding with vertical tab", post("Transfer-Encoding: \x0bchunked\r\n", smuggled), "400", ReasonFieldValue},
		{"2 coding with no-break space", post("Transfer-Encoding: \xa0chunked\r\n", smuggled), "501", ReasonTransferEncoding},
		{"2 space before colon", post("Transfer-Encoding : chunked\r\n", smuggled), "400", ReasonFieldName},
		{"2 tab before colon", post("Transfer-Encoding\t: chunked\r\n", smuggled), "400", ReasonFieldName},
		{"2 chunked in HTTP/1.0", "POST /x HTTP/1.0\r\n" + host + te + "\r\n" + smuggled, "400", ReasonFraming},
		{"4 equal lengths", post("Content-Length: 2\r\nContent-Length: 2\r\n", "ab"), "400", ReasonDuplicate},
		{"4 differing lengths", post("Content-Length: 2\r\nContent-Length: 3\r\n", "abc"), "400", ReasonDuplicate},
		{"4 list of lengths", post("Content-Length: 2, 2\r\n", "ab"), "400", ReasonContentLength},
		{"4 signed length", post("Content-Length: +2\r\n", "ab"), "400", ReasonContentLength},
		{"4 negative length", post("Content-Length: -2\r\n", "ab"), "400", ReasonContentLength},
		{"4 huge length", post("Content-Length: 92233720368547758070\r\n", "ab"), "400", ReasonContentLength},
		{"4 empty length", post("Content-Length:\r\n", "ab"), "400", ReasonContentLength},
		{"4 hexadecimal length", post("Content-Length: 0x2\r\n", "ab"), "400", ReasonContentLength},
		{"4 length with leading zero", post("Content-Length: 02\r\n", "ab"), "400", ReasonContentLength},
		{"4 length with inner space", post("Content-Length: 1 2\r\n", "ab"), "400", ReasonContentLength},
		{"6 folded value", get("A: b\r\n c\r\n"), "400", ReasonFolded},
		{"6 folded coding", post("Transfer-Encoding:\r\n chunked\r\n", smuggled), "501", ReasonTransferEncoding},
		{"6 fold behind request line", "GET /x HTTP/1.1\r\n " + host + "\r\n", "400", ReasonFolded},
		{"7 bare LF throughout", "GET /x HTTP/1.1\nHost: app.example\n\n", "400", ReasonLineEnding},
		{"7 bare LF in one line", get("A: b\nC: d\r\n"), "400", ReasonLineEnding},
		{"7 bare LF ends the head", "GET /x HTTP/1.1\r\n" + host + "\nGET /admin HTTP/1.1\r\n\r\n", "400", ReasonLineEnding},
		{"7 blank line first", "\r\n" + get(""), "400", ReasonStartLine},
		{"8 bare CR in value", get("A: b\rC: d\r\n"), "400", ReasonFieldValue},
		{"8 bare CR in request line", "GET /x\r HTTP/1.1\r\n" + host + "\r\n", "400", ReasonTarget},
		{"8 NUL in value", get("A: b\x00c\r\n"), "400", ReasonFieldValue},
		{"8 NUL in name", get("A\x00: b\r\n"), "400", ReasonFieldName},
		{"8 DEL in value", get("A: b\x7f\r\n"), "400", ReasonFieldValue},
		{"8 empty name", get(": b\r\n"), "400", ReasonFieldName},
		{"8 no colon", get("Abc\r\n"), "400", ReasonFieldName},
		{"8 space in name", get("A b: c\r\n"), "400", ReasonFieldName},
		{"8 non-ASCII name", get("\xc3\xa4: c\r\n"), "400", ReasonFieldName},
		{"9 chunk size with 0x", post(te, "0x2\r\nab\r\n0\r\n\r\n"), "400", ReasonChunk},
		{"9 chunk size overflow", post(te, "ffffffffffffffff2\r\nab\r\n0\r\n\r\n"), "400", ReasonChunk},
		{"9 chunk size negative", post(te, "-2\r\nab\r\n0\r\n\r\n"), "400", ReasonChunk},
		{"9 chunk size with space", post(te, "2 \r\nab\r\n0\r\n\r\n"), "400", ReasonChunk},
		{"9 chunk size empty", post(te, "\r\nab\r\n0\r\n\r\n"), "400", ReasonChunk},
		{"9 bare LF in size line", post(te, "2\nab\r\n0\r\n\r\n"), "400", ReasonChunk},
		{"9 bare CR in extension", post(te, "2;a\rb\r\nab\r\n0\r\n\r\n"), "400", ReasonChunk},
		{"9 bare LF in extension", post(te, "2;a\nab\r\n0\r\n\r\n"), "400", ReasonChunk},
		{"9 no CRLF behind data", post(te, "2\r\nabc0\r\n\r\n"), "400", ReasonChunk},
		{"9 bare LF behind data", post(te, "2\r\nab\n0\r\n\r\n"), "400", ReasonChunk},
		{"9 extension flood", post(te, "1;"+long(17<<10)+"\r\na\r\n0\r\n\r\n"), "400", ReasonChunk},
		{"10 Connection removes Authorization", get("Authorization: Bearer x\r\nConnection: authorization\r\n"), "400", ReasonConnection},
		{"10 Connection removes Cookie", get("Cookie: a=b\r\nConnection: close, Cookie\r\n"), "400", ReasonConnection},
		{"10 second Connection removes Host", get("Connection: close\r\nConnection: Host\r\n"), "400", ReasonConnection},
		{"10 Connection removes X-Forwarded-For", get("Connection: x-forwarded-for\r\n"), "400", ReasonConnection},
		{"10 Connection removes ours", get("Connection: Sallyport_Peer\r\n"), "400", ReasonConnection},
		{"10 Connection removes Content-Length", post("Content-Length: 2\r\nConnection: Content-Length\r\n", "ab"), "400", ReasonConnection},
		{"10 Connection with a bad option", get("Connection: a b\r\n"), "400", ReasonConnection},
		{"10 Connection with many options", get("Connection: " + strings.Repeat("a,", 17) + "\r\n"), "400", ReasonConnection},
		{"11 bad trailer", post(te, "0\r\nA : b\r\n\r\n"), "400", ReasonFieldName},
		{"11 trailer with bare LF", post(te, "0\r\nA: b\n\r\n"), "400", ReasonTrailer},
		{"11 trailers too large", post(te, "0\r\nA: "+long(9<<10)+"\r\n\r\n"), "431", ReasonTrailer},
		{"13 other expectation", post("Expect: 200-ok\r\nContent-Length: 2\r\n", "ab"), "417", ReasonExpect},
		{"14 HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "505", ReasonVersion},
		{"15 CONNECT to a path", "CONNECT /x HTTP/1.1\r\n" + host + "\r\n", "400", ReasonAuthority},
		{"15 CONNECT without port", "CONNECT app.example HTTP/1.1\r\n" + host + "\r\n", "400", ReasonAuthority},
		{"15 CONNECT to a URI", "CONNECT http://app.example:80 HTTP/1.1\r\n" + host + "\r\n", "400", ReasonAuthority},
		{"15 CONNECT with body", "CONNECT app.example:443 HTTP/1.1\r\n" + host + "Content-Length: 1\r\n\r\nx", "400", ReasonFraming},
		{"15 CONNECT with other Host", "CONNECT app.example:443 HTTP/1.1\r\nHost: other.example:443\r\n\r\n", "400", ReasonHost},
		{"15 CONNECT port zero", "CONNECT app.example:0 HTTP/1.1\r\nHost: app.example:0\r\n\r\n", "400", ReasonAuthority},
		{"15 CONNECT port too high", "CONNECT app.example:65536 HTTP/1.1\r\nHost: app.example:65536\r\n\r\n", "400", ReasonAuthority},
		{"15 CONNECT is not forwarded", "CONNECT app.example:443 HTTP/1.1\r\nHost: app.example:443\r\n\r\n", "405", ReasonMethod},
		{"17 opaque target", "GET http:admin/x HTTP/1.1\r\n" + host + "\r\n", "400", ReasonTarget},
		{"17 relative target", "GET admin/x HTTP/1.1\r\n" + host + "\r\n", "400", ReasonTarget},
		{"17 empty target", "GET  HTTP/1.1\r\n" + host + "\r\n", "400", ReasonTarget},
		{"17 query only", "GET ?a=b HTTP/1.1\r\n" + host + "\r\n", "400", ReasonTarget},
		{"17 asterisk with GET", "GET * HTTP/1.1\r\n" + host + "\r\n", "400", ReasonTarget},
		{"17 mailto", "GET mailto:a@b HTTP/1.1\r\n" + host + "\r\n", "400", ReasonTarget},
		{"18 other scheme", "GET ftp://app.example/x HTTP/1.1\r\n" + host + "\r\n", "400", ReasonTarget},
		{"18 userinfo in target", "GET http://u@app.example/x HTTP/1.1\r\n" + host + "\r\n", "400", ReasonAuthority},
		{"18 target against Host", "GET http://other.example/x HTTP/1.1\r\n" + host + "\r\n", "400", ReasonHost},
		{"18 target port against Host", "GET http://app.example:81/x HTTP/1.1\r\n" + host + "\r\n", "400", ReasonHost},
		{"18 target with empty authority", "GET http:///x HTTP/1.1\r\n" + host + "\r\n", "400", ReasonAuthority},
		{"18 two spaces in request line", "GET  /x HTTP/1.1\r\n" + host + "\r\n", "400", ReasonTarget},
		{"18 tab in request line", "GET\t/x HTTP/1.1\r\n" + host + "\r\n", "400", ReasonStartLine},
		{"18 trailing space in request line", "GET /x HTTP/1.1 \r\n" + host + "\r\n", "400", ReasonVersion},
		{"18 lower-case method", "get /x HTTP/1.1\r\n" + host + "\r\n", "400", ReasonMethod},
		{"18 lower-case version", "GET /x http/1.1\r\n" + host + "\r\n", "400", ReasonVersion},
		{"18 HTTP/0.9", "GET /x\r\n\r\n", "400", ReasonStartLine},
		{"18 HTTP/1.2", "GET /x HTTP/1.2\r\n" + host + "\r\n", "505", ReasonVersion},
		{"21 two Authorization", get("Authorization: a\r\nauthorization: b\r\n"), "400", ReasonDuplicate},
		{"21 two Content-Type", get("Content-Type: a\r\nContent-type: a\r\n"), "400", ReasonDuplicate},
		{"21 two traceparent", get("traceparent: a\r\nTraceparent: a\r\n"), "400", ReasonDuplicate},
		{"21 two Host", "GET /x HTTP/1.1\r\n" + host + host + "\r\n", "400", ReasonDuplicate},
		{"21 no Host", "GET /x HTTP/1.1\r\nA: b\r\n\r\n", "400", ReasonHost},
		{"21 no Host in HTTP/1.0", "GET /x HTTP/1.0\r\n\r\n", "400", ReasonHost},
		{"21 empty Host", "GET /x HTTP/1.1\r\nHost:\r\n\r\n", "400", ReasonHost},
		{"21 userinfo in Host", "GET /x HTTP/1.1\r\nHost: u@app.example\r\n\r\n", "400", ReasonHost},
		{"21 path in Host", "GET /x HTTP/1.1\r\nHost: app.example/x\r\n\r\n", "400", ReasonHost},
		{"21 list in Host", "GET /x HTTP/1.1\r\nHost: a.example, b.example\r\n\r\n", "400", ReasonHost},
		{"21 empty port in Host", "GET /x HTTP/1.1\r\nHost: a.example:\r\n\r\n", "400", ReasonHost},
		{"21 trailing dot in Host", "GET /x HTTP/1.1\r\nHost: a.example.\r\n\r\n", "400", ReasonHost},
		{"21 zone in Host", "GET /x HTTP/1.1\r\nHost: [fe80::1%25lo]\r\n\r\n", "400", ReasonHost},
		{"21 open bracket in Host", "GET /x HTTP/1.1\r\nHost: [\r\n\r\n", "400", ReasonHost},
		{"21 escape in Host", "GET /x HTTP/1.1\r\nHost: a%2eexample\r\n\r\n", "400", ReasonHost},
		{"25 encoded slash", "GET /pub%2fadmin HTTP/1.1\r\n" + host + "\r\n", "400", ReasonPath},
		{"25 encoded backslash", "GET /pub%5cadmin HTTP/1.1\r\n" + host + "\r\n", "400", ReasonPath},
		{"25 backslash", "GET /pub\\admin HTTP/1.1\r\n" + host + "\r\n", "400", ReasonPath},
		{"25 encoded NUL", "GET /a%00 HTTP/1.1\r\n" + host + "\r\n", "400", ReasonPath},
		{"25 encoded line feed", "GET /a%0aHost:%20b HTTP/1.1\r\n" + host + "\r\n", "400", ReasonPath},
		{"25 parent segment", "GET /a/../b HTTP/1.1\r\n" + host + "\r\n", "400", ReasonPath},
		{"25 encoded parent segment", "GET /a/%2e%2E/b HTTP/1.1\r\n" + host + "\r\n", "400", ReasonPath},
		{"25 parent segment last", "GET /a/.%2e HTTP/1.1\r\n" + host + "\r\n", "400", ReasonPath},
		{"25 path parameter", "GET /a;b=c/d HTTP/1.1\r\n" + host + "\r\n", "400", ReasonPath},
		{"25 fragment", "GET /a#b HTTP/1.1\r\n" + host + "\r\n", "400", ReasonTarget},
		{"25 broken escape", "GET /a%zz HTTP/1.1\r\n" + host + "\r\n", "400", ReasonPath},
		{"25 cut escape", "GET /a%4 HTTP/1.1\r\n" + host + "\r\n", "400", ReasonPath},
		{"25 non-ASCII", "GET /\xc3\xa4 HTTP/1.1\r\n" + host + "\r\n", "400", ReasonTarget},
		{"30 too many fields", get(strings.Repeat("A: b\r\n", 100)), "431", ReasonTooManyFields},
		{"30 head too large", get("A: " + long(33<<10) + "\r\n"), "431", ReasonHeadTooLarge},
		{"30 head without end", "GET /x HTTP/1.1\r\n" + host + "A: " + long(40<<10), "431", ReasonHeadTooLarge},
		{"30 target too long", "GET /" + long(8<<10) + " HTTP/1.1\r\n" + host + "\r\n", "414", ReasonTargetTooLong},
		{"30 target without end", "GET /" + long(40<<10), "414", ReasonTargetTooLong},
		{"30 method too long", long(0) + strings.Repeat("A", 33) + " / HTTP/1.1\r\n" + host + "\r\n", "501", ReasonMethod},
	}
}

// TestCorpus holds that each refusal is answered with its status, that the
// connection is closed, and that nothing of it reaches the upstream.
func TestCorpus(t *testing.T) {
	for _, tt := range refusals() {
		t.Run(tt.name, func(t *testing.T) {
			d, u := mem(tt.in), &memConn{wait: make(chan struct{})}
			down, up := NewConn(d, Limits{}), NewConn(u, Limits{})
			res, err := proxy(down, func() *Conn { return up })
			got, forwarded := d.written(), u.written()
			if !strings.HasPrefix(got, "HTTP/1.1 "+tt.status+" ") {
				t.Errorf("answered %.40q, want %s", got, tt.status)
			}
			if !strings.Contains(got, "\r\nConnection: close\r\n") && tt.status != "405" {
				t.Errorf("connection stays open: %q", got)
			}
			if strings.Count(got, "HTTP/1.1 ") != 1 {
				t.Errorf("more than one answer: %q", got)
			}
			if forwarded != "" && tt.name[:1] != "9" || res.ResponseStarted {
				t.Errorf("reached the upstream: %q", forwarded)
			}
			if strings.Contains(forwarded, "0\r\n\r\n") {
				t.Errorf("a broken body was completed for the upstream: %q", forwarded)
			}
			var pe *ProtocolError
			if !errors.As(err, &pe) || pe.Reason != tt.reason {
				t.Errorf("error is %v, want reason %s", err, tt.reason)
			}
			if FailedSide(err) == Upstream {
				t.Errorf("%v counts as a failure of the upstream", err)
			}
		})
	}
}

// TestRewrite shows what the upstream is sent for requests that pass.
func TestRewrite(t *testing.T) {
	const host = "Host: app.example\r\n"
	tests := []struct{ name, in, want string }{
		{"plain", "GET /x?a=b HTTP/1.1\r\n" + host + "A: \t b c \t\r\n\r\n",
			"GET /x?a=b HTTP/1.1\r\n" + host + "A: b c\r\n\r\n"},
		{"host in lower case first", "GET / HTTP/1.1\r\nA: b\r\nHOST: App.Example:8080\r\n\r\n",
			"GET / HTTP/1.1\r\nHost: app.example:8080\r\nA: b\r\n\r\n"},
		{"absolute form", "GET HTTP://App.example/x HTTP/1.1\r\n" + host + "\r\n",
			"GET /x HTTP/1.1\r\n" + host + "\r\n"},
		{"absolute form without path", "GET http://app.example?q HTTP/1.1\r\n" + host + "\r\n",
			"GET /?q HTTP/1.1\r\n" + host + "\r\n"},
		{"asterisk", "OPTIONS * HTTP/1.1\r\n" + host + "\r\n", "OPTIONS * HTTP/1.1\r\n" + host + "\r\n"},
		{"asterisk in absolute form", "OPTIONS http://app.example HTTP/1.1\r\n" + host + "\r\n",
			"OPTIONS * HTTP/1.1\r\n" + host + "\r\n"},
		{"HTTP/1.0", "GET / HTTP/1.0\r\n" + host + "Connection: keep-alive\r\n\r\n", "GET / HTTP/1.1\r\n" + host + "\r\n"},
		{"IPv6", "GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", "GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n"},
		{"5 body of a GET", "GET / HTTP/1.1\r\n" + host + "Content-Length: 2\r\n\r\nab",
			"GET / HTTP/1.1\r\n" + host + "Content-Length: 2\r\n\r\nab"},
		{"length zero", "POST / HTTP/1.1\r\n" + host + "Content-Length: 0\r\n\r\n",
			"POST / HTTP/1.1\r\n" + host + "Content-Length: 0\r\n\r\n"},
		{"9 chunk extensions", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: Chunked\r\n\r\n2;a=\"b\"\r\nab\r\n00A;x\r\n0123456789\r\n0;y\r\n\r\n",
			"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\na\r\n0123456789\r\n0\r\n\r\n"},
		{"10 Connection options", "GET / HTTP/1.1\r\n" + host + "A: b\r\nX-Hop: c\r\nConnection: keep-alive\r\nconnection: x-HOP, ,x-none\r\nKeep-Alive: 5\r\nProxy-Connection: x\r\n\r\n",
			"GET / HTTP/1.1\r\n" + host + "A: b\r\n\r\n"},
		{"10 proxy credentials", "GET / HTTP/1.1\r\n" + host + "Proxy-Authorization: Basic x\r\n\r\n", "GET / HTTP/1.1\r\n" + host + "\r\n"},
		{"11 request trailers", "POST / HTTP/1.1\r\n" + host + "Trailer: A, Host\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nA: b\r\nHost: evil\r\nSallyport-Peer: x\r\n\r\n",
			"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"},
		{"12 TE", "GET / HTTP/1.1\r\n" + host + "TE: gzip, trailers;q=0.5, trailers\r\nConnection: TE\r\n\r\n",
			"GET / HTTP/1.1\r\n" + host + "TE: trailers\r\nConnection: TE\r\n\r\n"},
		{"12 TE without trailers", "GET / HTTP/1.1\r\n" + host + "TE: deflate\r\n\r\n", "GET / HTTP/1.1\r\n" + host + "\r\n"},
		{"13 Expect", "POST / HTTP/1.1\r\n" + host + "Expect: 100-Continue\r\nContent-Length: 2\r\n\r\nab",
			"POST / HTTP/1.1\r\n" + host + "Content-Length: 2\r\n\r\nab"},
		{"14 h2c", "GET / HTTP/1.1\r\n" + host + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
			"GET / HTTP/1.1\r\n" + host + "\r\n"},
		{"14 h2c beside websocket", "GET / HTTP/1.1\r\n" + host + "Connection: Upgrade\r\nUpgrade: h2c, websocket\r\n\r\n",
			"GET / HTTP/1.1\r\n" + host + "\r\n"},
		{"14 h2c then websocket", "GET / HTTP/1.1\r\n" + host + "Connection: Upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n\r\n",
			"GET / HTTP/1.1\r\n" + host + "\r\n"},
		{"14 websocket by POST", "POST / HTTP/1.1\r\n" + host + "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
			"POST / HTTP/1.1\r\n" + host + "\r\n"},
		{"14 websocket with body", "GET / HTTP/1.1\r\n" + host + "Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n\r\nx",
			"GET / HTTP/1.1\r\n" + host + "Content-Length: 1\r\n\r\nx"},
		{"14 websocket not in Connection", "GET / HTTP/1.1\r\n" + host + "Upgrade: websocket\r\n\r\n", "GET / HTTP/1.1\r\n" + host + "\r\n"},
		{"14 websocket", "GET /ws HTTP/1.1\r\n" + host + "Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Key: k\r\n\r\n",
			"GET /ws HTTP/1.1\r\n" + host + "Sec-WebSocket-Key: k\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"},
		{"22 underscore names", "POST / HTTP/1.1\r\n" + host + "Content_Length: 9\r\nTransfer_Encoding: x\r\nX_Forwarded_For: x\r\nsallyport_peer: x\r\nMy_Own: y\r\nContent-Length: 1\r\n\r\na",
			"POST / HTTP/1.1\r\n" + host + "My_Own: y\r\nContent-Length: 1\r\n\r\na"},
		{"23 forwarding names", "GET / HTTP/1.1\r\n" + host + "X-Forwarded-For: x\r\nForwarded: for=x\r\nX-Forwarded-Host: x\r\nX-Real-Ip: x\r\n\r\n",
			"GET / HTTP/1.1\r\n" + host + "\r\n"},
		{"24 caller names", "GET / HTTP/1.1\r\n" + host + "X-Forwarded-Client-Cert: x\r\nSallyport-Anything: x\r\nX-Forwarded_Client-Cert: x\r\n\r\n",
			"GET / HTTP/1.1\r\n" + host + "\r\n"},
		{"25 path made canonical", "GET //a/./b//%63/%7euser/x%e4%2e/?q=%2f/../; HTTP/1.1\r\n" + host + "\r\n",
			"GET /a/b/c/~user/x%E4./?q=%2f/../; HTTP/1.1\r\n" + host + "\r\n"},
		{"25 double encoding stays", "GET /%252e%252e/x HTTP/1.1\r\n" + host + "\r\n", "GET /%252e%252e/x HTTP/1.1\r\n" + host + "\r\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, forwarded, _, err := once(tt.in, okAnswer)
			if err != nil && err != io.EOF && FailedSide(err) == Client {
				t.Fatal(err)
			}
			if forwarded != tt.want {
				t.Errorf("forwarded\n%q, want\n%q", forwarded, tt.want)
			}
		})
	}
}

func TestLimitsAndOptions(t *testing.T) {
	_, _, err := readReq("GET /a;b=c HTTP/1.1\r\nHost: x\r\n\r\n", Limits{AllowParams: true})
	if err != nil {
		t.Errorf("parameters were allowed, yet: %v", err)
	}
	for path, bare := range map[string]string{
		"/a;b=c": "/a", "/a;b=c/d": "/a/d", "/a;/": "/a/", "/a;b;c/d;e/f": "/a/d/f", "/%61;%2e/./b": "/a/b", "/a%3Bb": "/a%3Bb", "/...;x": "/...",
	} {
		r, _, err := readReq("GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n", Limits{AllowParams: true})
		if err != nil || r.PathText() != bare {
			t.Errorf("%s: judged as %q (%v), want %q", path, r.PathText(), err, bare)
		}
	}
	for _, path := range []string{"/;", "/a/;b", "/a/;/b", "/.;", "/%2e%2e;x/b", "/a;%2f", "/a;/../b"} {
		if _, _, err := readReq("GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n", Limits{AllowParams: true}); err == nil {
			t.Errorf("%s was taken", path)
		}
	}
	_, _, err = readReq("GET /..;/b HTTP/1.1\r\nHost: x\r\n\r\n", Limits{AllowParams: true})
	wantReason(t, err, 400, ReasonPath)
	_, _, err = readReq("GET / HTTP/1.1\r\nHost: x\r\nA_b: c\r\n\r\n", Limits{RefuseUnderscore: true})
	wantReason(t, err, 400, ReasonFieldName)
	_, _, err = readReq("GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n\r\n", Limits{Headers: 1})
	wantReason(t, err, 431, ReasonTooManyFields)
	_, _, err = readReq("GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n\r\n", Limits{Head: 20})
	wantReason(t, err, 431, ReasonHeadTooLarge)
}

func TestEndOfConnection(t *testing.T) {
	if _, _, err := readReq("", Limits{}); err != io.EOF {
		t.Errorf("nothing sent: %v, want io.EOF", err)
	}
	if _, _, err := readReq("GET / HT", Limits{}); err != io.ErrUnexpectedEOF {
		t.Errorf("head cut off: %v, want io.ErrUnexpectedEOF", err)
	}
	c := NewConn(&timeoutConn{}, Limits{})
	if err := c.ReadRequest(new(Request)); err != ErrIdleTimeout {
		t.Errorf("nothing in time: %v, want ErrIdleTimeout", err)
	}
	c = NewConn(&timeoutConn{in: "GET / HT"}, Limits{})
	if err := c.ReadRequest(new(Request)); err != ErrHeadTimeout {
		t.Errorf("half a head in time: %v, want ErrHeadTimeout", err)
	}
}

// timeoutConn gives its input and then a timeout.
type timeoutConn struct {
	memConn
	in string
}

func (c *timeoutConn) Read(p []byte) (int, error) {
	n := copy(p, c.in)
	if c.in = c.in[n:]; n == 0 {
		return 0, os.ErrDeadlineExceeded
	}
	return n, nil
}

// TestPieces cuts a pipelined conversation at every place: the result may not
// depend on how the bytes arrive.
func TestPieces(t *testing.T) {
	in := "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" +
		"POST /b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\ndef\r\n0\r\nT: u\r\n\r\n" +
		"GET /c HTTP/1.1\r\nHost: x\r\n\r\n"
	answers := []string{"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1",
		"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n2\r\n0\r\nV: w\r\n\r\n",
		"HTTP/1.1 103 Early Hints\r\nLink: y\r\n\r\nHTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n"}
	for step := 1; step < 40; step++ {
		d := mem(in)
		d.step = step
		var ups []*memConn
		_, err := proxy(NewConn(d, Limits{}), func() *Conn {
			u := mem(answers[len(ups)])
			u.step = step
			u.wait = make(chan struct{}) // the answer comes after the request
			u.until = []string{"abc", "0\r\n\r\n", "\r\n\r\n"}[len(ups)]
			ups = append(ups, u)
			return NewConn(u, Limits{})
		})
		if err != io.EOF {
			t.Fatalf("step %d: %v", step, err)
		}
		data := dechunk(t, ups[0].written()+ups[1].written()+ups[2].written())
		if !strings.Contains(data, "/a HTTP/1.1|Host: x|Content-Length: 3||abcPOST") || !strings.Contains(data, "chunked||defGET /c") {
			t.Fatalf("step %d: upstream got %q", step, data)
		}
		want := "HTTP/1.1 200 OK|Content-Length: 1||1HTTP/1.1 200 |Transfer-Encoding: chunked||1|2|0|V: w||HTTP/1.1 103 Early Hints|Link: y||HTTP/1.1 304 Not Modified|Content-Length: 7||"
		if got := strings.ReplaceAll(d.written(), "\r\n", "|"); got != want {
			t.Fatalf("step %d: client got\n%q, want\n%q", step, got, want)
		}
	}
}

// dechunk joins the chunks of the one chunked body in s.
func dechunk(t *testing.T, s string) string {
	t.Helper()
	head, body, ok := strings.Cut(s, "chunked\r\n\r\n")
	if !ok {
		t.Fatalf("no chunked body in %q", s)
	}
	var d decoder
	out, n, err := d.feed(nil, []byte(body), false)
	if err != nil || !d.done() {
		t.Fatalf("chunked body is broken: %v in %q", err, body)
	}
	return strings.ReplaceAll(head+"chunked\r\n\r\n", "\r\n", "|") + string(out) + body[n:]
}
