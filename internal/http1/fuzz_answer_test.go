package http1

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// FuzzAnswer sends whatever an upstream says through a whole exchange. When it
// is passed on, net/http must read of what the client got what it reads of what
// the upstream said: status, body, fields, and not a byte behind it on a
// connection that goes on.
//
// Known and wanted differences: fields of the hop are not passed on, and those
// of the framing are made anew.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{
		benchAnswer, chunkedAnswer, okAnswer, okAnswer + okAnswer,
		"HTTP/1.0 200 OK\r\n\r\nuntil the end",
		"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n",
		"HTTP/1.1 204\r\n\r\nGET",
		"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + okAnswer,
		"HTTP/1.1 200 OK\r\nTrailer: A\r\nTransfer-Encoding: chunked\r\n\r\n2;x\r\nab\r\n0\r\nA: b\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nhello\r\n3\r\nyou\r\n0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nConnection: a, close\r\nA: 1\r\nSet-Cookie: b\r\nSet-Cookie: c\r\nContent-Length: 2\r\n\r\nok",
	} {
		for kind := range uint8(3) {
			f.Add([]byte(s), kind, 1000)
			f.Add([]byte(s), kind, 1)
		}
	}
	f.Fuzz(func(t *testing.T, in []byte, kind uint8, step int) {
		method, version := "GET", "1.1"
		switch kind % 3 {
		case 1:
			method = "HEAD"
		case 2:
			version = "1.0"
		}
		d := mem(method + " / HTTP/" + version + "\r\nHost: a\r\n\r\n")
		down, up := NewConn(d, Limits{}), NewConn(&memConn{in: in, step: max(1, step&1023)}, Limits{})
		r := new(Request)
		if err := down.ReadRequest(r); err != nil {
			t.Fatal(err)
		}
		x := Exchange{Down: down, Up: up, Request: r}
		res, err := x.Run()
		if err != nil {
			return
		}
		hop := hopNames(in)
		said, _ := finalOf(t, method, in, hop)
		got, rest := finalOf(t, method, d.out.Bytes(), hop)
		if got.status != said.status || !bytes.Equal(got.body, said.body) || !slices.Equal(got.fields, said.fields) || got.err != nil {
			t.Fatalf("the upstream said %+v, the client got %+v", said, got)
		}
		if len(rest) > 0 {
			t.Fatalf("behind the answer the client got %q", rest)
		}
		if res.UpstreamReusable && said.err != nil {
			t.Fatalf("the upstream broke off (%v), yet its connection is used again", said.err)
		}
	})
}

// An answerRead is what net/http reads of a final response.
type answerRead struct {
	status int
	fields []string
	body   []byte
	err    error // of the body
}

// hopNames are the fields that a Connection line names; net/http takes that line
// away. Lines of a body that look like one only make the comparison weaker.
func hopNames(b []byte) map[string]bool {
	hop := map[string]bool{}
	for line := range strings.SplitSeq(string(b), "\r\n") {
		if name, v, _ := strings.Cut(line, ":"); strings.EqualFold(name, "connection") {
			for name := range strings.SplitSeq(v, ",") {
				hop[http.CanonicalHeaderKey(strings.TrimSpace(name))] = true
			}
		}
	}
	return hop
}

// finalOf reads the final response and gives what stands behind it. Fields in
// hop are left out.
func finalOf(t *testing.T, method string, b []byte, hop map[string]bool) (a answerRead, rest []byte) {
	t.Helper()
	br := bufio.NewReader(bytes.NewReader(b))
	for {
		resp, err := http.ReadResponse(br, &http.Request{Method: method})
		if err != nil {
			t.Fatalf("net/http does not read %q: %v", b, err)
		}
		if resp.StatusCode < 200 {
			continue
		}
		a.status = resp.StatusCode
		a.body, a.err = io.ReadAll(resp.Body)
		for name, values := range resp.Header {
			if k := classify([]byte(name)); hop[name] || !k.forwards() || strings.Contains(name, "_") && foldsToKnown([]byte(name)) {
				continue
			}
			for _, v := range values {
				a.fields = append(a.fields, name+": "+v)
			}
		}
		slices.Sort(a.fields)
		rest, _ = io.ReadAll(br)
		return a, rest
	}
}
