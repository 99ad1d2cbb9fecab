package http1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/url"
	"path"
	"strings"
	"testing"
)

// FuzzRequest compares with net/http. Whatever this package accepts, net/http
// must accept too and read alike: method, host, path, framing, body, and where
// the next message begins. The same holds for the head as it is forwarded.
//
// Known and wanted differences, where net/http is the laxer or has another
// notion:
//   - the asterisk and authority forms have no path here, net/http has "*"
//     and "";
//   - net/http keeps a path as it came: it is compared after cleaning.
func FuzzRequest(f *testing.F) {
	for _, s := range []string{
		benchRequest, chunkedRequest,
		"GET http://a.example/x?y HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
		"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
		"CONNECT a:443 HTTP/1.0\r\n\r\n",
		"GET /a//b/./%63;d HTTP/1.0\r\nHost: a\r\nConnection: x-hop\r\nX-Hop: y\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n1;a=b\r\nx\r\n0\r\nA: b\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nA_b: c\r\n\r\nabc",
	} {
		f.Add([]byte(s))
	}
	for _, s := range refusals() {
		if len(s.in) < 1<<10 {
			f.Add([]byte(s.in))
		}
	}
	f.Fuzz(agree)
}

// fragments are what FuzzGrammar builds messages of: the pieces with which one
// parser is told something that another reads differently.
var fragments = strings.Split("GET |POST |HEAD |OPTIONS |CONNECT |/|*|http://|a|a:80|A:80|b| HTTP/1.1|HTTP/1.0| HTTP/2.0|\r\n|\n|\r| |\t|,|:|;|"+
	"Host: a\r\n|Host:|Content-Length: 3\r\n|Content-Length:|Content_Length: 1\r\n|Transfer-Encoding: chunked\r\n|Transfer-Encoding:|chunked|identity|"+
	"Connection: |close|keep-alive|upgrade|Upgrade: websocket\r\n|TE: trailers\r\n|Expect: 100-continue\r\n|Trailer: x\r\n|X-Hop: 1\r\n|x-hop|"+
	"0\r\n|\r\n\r\n|3\r\nabc\r\n|1|0|5|+|-|0x|;ext=1|\"|%2f|%2e|%|..|.|?|#|@|[::1]|\\|\x00|\x7f|\x80|_|x: y\r\n|3\r\n|abc", "|")

// FuzzGrammar is FuzzRequest over messages built of fragments.
func FuzzGrammar(f *testing.F) {
	of := func(parts ...string) (b []byte) {
		for _, p := range parts {
			for i, fr := range fragments {
				if fr == p {
					b = append(b, byte(i))
				}
			}
		}
		return b
	}
	f.Add(of("POST ", "/", " HTTP/1.1", "\r\n", "Host: a\r\n", "Transfer-Encoding: chunked\r\n", "\r\n", "3\r\nabc\r\n", "0\r\n", "\r\n"))
	f.Add(of("GET ", "http://", "a:80", "/", ".", "/", "?", "1", " HTTP/1.1", "\r\n", "Host:", "A:80", "\r\n", "Connection: ", "x-hop", ",", "close", "\r\n", "X-Hop: 1\r\n", "Content-Length: 3\r\n", "\r\n", "abc"))
	f.Add(of("CONNECT ", "a:80", " HTTP/1.1", "\r\n", "Host: a\r\n", "\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		var msg []byte
		for _, c := range in {
			msg = append(msg, fragments[int(c)%len(fragments)]...)
		}
		agree(t, msg)
	})
}

// agree is the property of FuzzRequest.
func agree(t *testing.T, in []byte) {
	r := new(Request)
	c := NewConn(&memConn{in: in}, Limits{})
	if err := c.ReadRequest(r); err != nil {
		return
	}
	ref, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(in)))
	if err != nil {
		t.Fatalf("accepted here, refused by net/http: %v", err)
	}
	sameRequest(t, r, ref)
	head := AppendRequest(nil, r, &Edit{Drop: Reserved})
	var body bytes.Buffer
	_, rerr, _ := CopyBody(&body, c, r.Body, r.Body.Framing, nil)
	want, err := io.ReadAll(ref.Body)
	if rerr != nil {
		return
	}
	if err != nil {
		t.Fatalf("body accepted here, refused by net/http: %v", err)
	}
	again, err := http.ReadRequest(bufio.NewReader(io.MultiReader(bytes.NewReader(head), &body)))
	if err != nil {
		t.Fatalf("forwarded head refused by net/http: %v\n%q", err, head)
	}
	sameRequest(t, r, again)
	got, err := io.ReadAll(again.Body)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("forwarded body %q (%v), net/http reads %q", got, err, want)
	}
	checkForwarded(t, r, head)
}

// FuzzConversation sends bytes through a whole proxy, upstream connections kept
// alive: net/http must find exactly the requests in what the upstream got that
// the proxy says it forwarded, with nothing before, between or behind them.
func FuzzConversation(f *testing.F) {
	f.Add([]byte(plainGet+benchRequest+chunkedRequest+plainGet), 9)
	f.Add([]byte(chunkedRequest+"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nGETGET"), 1)
	for _, s := range refusals() {
		if len(s.in) < 1<<9 {
			f.Add([]byte(plainGet+s.in+plainGet), 100)
		}
	}
	f.Fuzz(func(t *testing.T, in []byte, step int) {
		d := &memConn{in: in, step: max(1, step&1023)}
		u := &memConn{}
		down, up := NewConn(d, Limits{}), NewConn(u, Limits{})
		r, done := new(Request), 0
		x := Exchange{Down: down, Up: up, Request: r}
		for {
			if err := down.ReadRequest(r); err != nil {
				break
			}
			before := u.out.Len()
			u.in = []byte(okAnswer)
			if r.Verb() == "HEAD" {
				u.in = []byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
			}
			res, err := x.Run()
			if err != nil || !res.DownstreamReusable || !res.UpstreamReusable {
				if err != nil || res.ReqBytes != r.Body.Length && r.Body.Framing == Length {
					u.out.Truncate(before) // cut off: the connection was closed with it
				} else {
					done++
				}
				break
			}
			done++
		}
		br := bufio.NewReader(&u.out)
		for i := range done {
			req, err := http.ReadRequest(br)
			if err == nil {
				_, err = io.Copy(io.Discard, req.Body)
			}
			if err != nil && i < done-1 {
				t.Fatalf("request %d of %d does not read: %v", i+1, done, err)
			}
		}
		if rest, _ := io.ReadAll(br); len(rest) > 0 {
			t.Fatalf("behind %d requests the upstream got %q", done, rest)
		}
	})
}

// sameRequest compares what decides where a request goes and where it ends.
func sameRequest(t *testing.T, r *Request, ref *http.Request) {
	t.Helper()
	if ref.Method != r.Verb() {
		t.Fatalf("method %q, net/http %q", r.Method, ref.Method)
	}
	if r.Form != Authority && !strings.EqualFold(ref.Host, string(r.Authority)) || r.Form == Authority && !strings.EqualFold(ref.URL.Host, string(r.Authority)) {
		t.Fatalf("authority %q, net/http %q", r.Authority, ref.Host)
	}
	chunked := len(ref.TransferEncoding) == 1 && ref.TransferEncoding[0] == "chunked"
	if chunked != (r.Body.Framing == Chunked) {
		t.Fatalf("framing %v, net/http %v", r.Body, ref.TransferEncoding)
	}
	if length := max(r.Body.Length, 0); !chunked && ref.ContentLength != length {
		t.Fatalf("length %d, net/http %d", length, ref.ContentLength)
	}
	if r.Form == Origin || r.Form == Absolute && string(r.Path) != "*" {
		if ref.URL.RawQuery != string(r.RawQuery) {
			t.Fatalf("query %q, net/http %q", r.RawQuery, ref.URL.RawQuery)
		}
		mine, err := url.PathUnescape(string(r.Path))
		if err != nil {
			t.Fatalf("canonical path %q does not decode", r.Path)
		}
		theirs := path.Clean("/" + ref.URL.Path)
		if strings.TrimSuffix(mine, "/") != strings.TrimSuffix(theirs, "/") {
			t.Fatalf("path %q, net/http %q", mine, theirs)
		}
	}
}

// checkForwarded looks at a head on its way out, byte by byte.
func checkForwarded(t *testing.T, r *Request, head []byte) {
	t.Helper()
	again := new(Request)
	if err := NewConn(&memConn{in: head}, Limits{Head: 128 << 10, Target: 32 << 10}).ReadRequest(again); err != nil {
		t.Fatalf("own head refused: %v\n%q", err, head)
	}
	if !bytes.Equal(again.Path, r.Path) || !bytes.Equal(again.Authority, r.Authority) || again.Body != r.Body {
		t.Fatalf("own head reads differently: %q", head)
	}
	if !again.KeepAlive || again.Expect100 || again.Upgrade != r.Upgrade {
		t.Fatalf("hop-by-hop meaning passed on: %q", head)
	}
	for i := range again.Fields {
		if Reserved.Has(again.Fields[i].Name) {
			t.Fatalf("reserved field passed on: %q", head)
		}
	}
}

// FuzzResponse compares response heads and bodies with net/http.
func FuzzResponse(f *testing.F) {
	for _, s := range []string{
		benchAnswer, chunkedAnswer, okAnswer,
		"HTTP/1.0 200 OK\r\n\r\nuntil the end",
		"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n",
		"HTTP/1.1 204\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTrailer: A\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nA: b\r\n\r\n",
		"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
	} {
		f.Add([]byte(s), false)
		f.Add([]byte(s), true)
	}
	f.Fuzz(func(t *testing.T, in []byte, head bool) {
		method := "GET"
		if head {
			method = "HEAD"
		}
		r := new(Response)
		c := NewConn(&memConn{in: in}, Limits{})
		if err := c.ReadResponse(r, method); err != nil {
			return
		}
		ref, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(in)), &http.Request{Method: method})
		if err != nil {
			t.Fatalf("accepted here, refused by net/http: %v", err)
		}
		if ref.StatusCode != r.Status {
			t.Fatalf("status %d, net/http %d", r.Status, ref.StatusCode)
		}
		if r.Status < 200 {
			return // net/http reads a body behind 1xx
		}
		out := Body{Framing: r.Body.Framing, Length: r.Body.Length}
		if out.Framing == UntilClose {
			out.Framing = Chunked
		}
		msg := AppendResponse(nil, r, out, nil)
		var body bytes.Buffer
		_, rerr, _ := CopyBody(&body, c, r.Body, out.Framing, nil)
		want, err := io.ReadAll(ref.Body)
		if rerr != nil {
			return
		}
		if err != nil {
			t.Fatalf("body accepted here, refused by net/http: %v", err)
		}
		again, err := http.ReadResponse(bufio.NewReader(io.MultiReader(bytes.NewReader(msg), &body)), &http.Request{Method: method})
		if err != nil {
			t.Fatalf("forwarded head refused by net/http: %v\n%q", err, msg)
		}
		got, err := io.ReadAll(again.Body)
		if err != nil || !bytes.Equal(got, want) || again.StatusCode != r.Status {
			t.Fatalf("forwarded %d %q (%v), net/http reads %q", again.StatusCode, got, err, want)
		}
	})
}

// FuzzChunked checks that the decoder does not depend on how its input is cut,
// that what it accepts net/http accepts with the same data, and that what it
// writes reads back.
func FuzzChunked(f *testing.F) {
	f.Add([]byte("5\r\nhello\r\n0\r\n\r\n"), 1)
	f.Add([]byte("3;a=b\r\nyou\r\n0\r\nA: b\r\n\r\nGET"), 3)
	f.Add([]byte("00a\r\n0123456789\r\n0;x\r\n\r\n"), 7)
	f.Fuzz(func(t *testing.T, in []byte, step int) {
		step = max(1, step&63)
		var whole, cut decoder
		data, n, err := whole.feed(nil, in, false)
		var framed []byte
		at := 0
		var cutErr error
		for at < len(in) && cutErr == nil && !cut.done() {
			var k int
			framed, k, cutErr = cut.feed(framed, in[at:min(at+step, len(in))], true)
			at += k
		}
		if (err == nil) != (cutErr == nil) || whole.done() != cut.done() || err == nil && at != n {
			t.Fatalf("whole: %d bytes, %v; in pieces of %d: %d bytes, %v", n, err, step, at, cutErr)
		}
		if err != nil || !whole.done() {
			return
		}
		lim := Limits{}.filled()
		if framed, err = cut.appendLast(framed, true, nil, &lim); err != nil {
			return
		}
		const top = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
		for _, body := range [][]byte{in, framed} {
			ref, err := http.ReadRequest(bufio.NewReader(io.MultiReader(strings.NewReader(top), bytes.NewReader(body))))
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(ref.Body); err != nil || !bytes.Equal(got, data) {
				t.Fatalf("net/http reads %q (%v), here %q, from %q", got, err, data, body)
			}
		}
	})
}

// FuzzPath checks that a canonical path is a fixed point, holds nothing that
// was to be refused, and means what the original meant.
func FuzzPath(f *testing.F) {
	for _, s := range []string{"/", "/a/b", "//a/./b//", "/%61%2e%2E", "/a%20b/[x]|^", "/.;a/..", "/%2e/", "/a;b", "/a;b/;c", "/a;b;/.;/c;%2e", "/%252f"} {
		f.Add(s, false)
		f.Add(s, true)
	}
	f.Fuzz(func(t *testing.T, in string, params bool) {
		out, err := CleanPath([]byte("kept"), []byte(in), params)
		if err != nil {
			var pe *ProtocolError
			if !errors.As(err, &pe) || string(out) != "kept" {
				t.Fatalf("refused with %v, left %q", err, out)
			}
			return
		}
		p := string(out[4:])
		if plainPath([]byte(in)) == len(in) && p != in {
			t.Fatalf("%q is plain, yet became %q", in, p)
		}
		if again, err := CleanPath(nil, []byte(p), params); err != nil || string(again) != p {
			t.Fatalf("%q is no fixed point: %q, %v", p, again, err)
		}
		bare := string(appendBare(nil, []byte(p)))
		if again, err := CleanPath(nil, []byte(bare), false); err != nil || string(again) != bare {
			t.Fatalf("%q, judged as %q, is not canonical: %q, %v", p, bare, again, err)
		}
		if !params && strings.Contains(p, ";") || strings.Contains(p, "//") || strings.ContainsAny(p, "\\?# \x00\x7f") {
			t.Fatalf("%q holds what is refused", p)
		}
		plain, err := url.PathUnescape(p)
		if err != nil {
			t.Fatalf("%q does not decode: %v", p, err)
		}
		for seg := range strings.SplitSeq(plain, "/") {
			if seg == "." || seg == ".." {
				t.Fatalf("%q holds a dot segment", p)
			}
		}
		orig, err := url.PathUnescape(in)
		if err != nil {
			t.Fatalf("%q was accepted but does not decode: %v", in, err)
		}
		if path.Clean(orig) != path.Clean(plain) || strings.Count(orig, "/") < strings.Count(plain, "/") {
			t.Fatalf("%q became %q", in, p)
		}
	})
}
