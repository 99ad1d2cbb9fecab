package http1

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"testing"
)

func TestNameSet(t *testing.T) {
	s := NewNameSet("Sallyport-*", "X-Real-Ip", "*", "")
	for name, want := range map[string]bool{
		"sallyport-peer": true, "SALLYPORT_PEER": true, "sallyport-": true, "sallyport": false,
		"x-real-ip": true, "X_REAL-ip": true, "x-real-ipx": false, "x-real": false, "": false, "other": false,
	} {
		if got := s.Has([]byte(name)); got != want {
			t.Errorf("Has(%q) = %v, want %v", name, got, want)
		}
	}
	var none *NameSet
	if none.Has([]byte("a")) {
		t.Error("the nil set holds a name")
	}
}

func TestClassifyKnowsEachName(t *testing.T) {
	for name, want := range map[string]kind{
		"TE": kindTE, "Host": kindHost, "Expect": kindExpect, "Cookie": kindCookie, "Upgrade": kindUpgrade,
		"Trailer": kindTrailer, "Connection": kindConnection, "Keep-Alive": kindHop, "Traceparent": kindTraceparent,
		"Content-Type": kindContentType, "Authorization": kindAuthorization, "Content-Length": kindContentLength,
		"HTTP2-Settings": kindHop, "Proxy-Connection": kindHop, "Transfer-Encoding": kindTransferEncoding,
		"Proxy-Authenticate": kindHop, "Proxy-Authorization": kindHop, "Accept": kindOther, "Hosts": kindOther,
	} {
		if got := classify([]byte(name)); got != want {
			t.Errorf("classify(%q) = %d, want %d", name, got, want)
		}
	}
}

func TestGet(t *testing.T) {
	r, _ := parsed(t, "GET / HTTP/1.1\r\nHost: a\r\nX-One: 1\r\nx-one: 2\r\nEmpty:\r\n\r\n")
	if got := r.Get("X-ONE"); string(got) != "1" {
		t.Errorf("first X-One is %q", got)
	}
	if got := r.Get("empty"); got == nil || len(got) != 0 {
		t.Errorf("an empty field reads as %v", got)
	}
	if got := r.Get("absent"); got != nil {
		t.Errorf("an absent field reads as %q", got)
	}
}

func TestTextsAreShared(t *testing.T) {
	const in = "GET /some/path HTTP/1.1\r\nHost: app.example\r\n\r\n"
	c, r := NewConn(mem(in+in), Limits{}), new(Request)
	for range 2 {
		if err := c.ReadRequest(r); err != nil || r.PathText() != "/some/path" || r.AuthorityText() != "app.example" {
			t.Fatal(err, r.PathText(), r.AuthorityText())
		}
	}
	if n := testing.AllocsPerRun(100, func() { _, _, _ = r.PathText(), r.AuthorityText(), r.Verb() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestReasonsAreLabels(t *testing.T) {
	seen := map[string]bool{}
	for r := ReasonNone; r < reasonCount; r++ {
		if s := r.String(); s == "" || seen[s] {
			t.Errorf("reason %d reads %q", r, s)
		} else {
			seen[s] = true
		}
	}
	if reasonCount.String() != "unknown" {
		t.Error("a reason outside the set has a text")
	}
}

func TestStatusOf(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{io.EOF, 0},
		{ErrIdleTimeout, 0},
		{ErrHeadTimeout, 408},
		{refuse(ReasonPath, "x"), 400},
		{&SideError{Client, "read", refuse(ReasonChunk, "x")}, 400},
		{&SideError{Upstream, "read", refuse(ReasonChunk, "x")}, 502},
		{&SideError{Client, "read", ErrSlowBody}, 408},
		{&SideError{Client, "read", io.ErrUnexpectedEOF}, 0},
		{&SideError{Upstream, "read", io.ErrUnexpectedEOF}, 502},
		{fmt.Errorf("try 2: %w", &SideError{Upstream, "read", ErrIdleTimeout}), 504},
		{errors.New("other"), 0},
	} {
		if got := StatusOf(tt.err); got != tt.want {
			t.Errorf("StatusOf(%v) = %d, want %d", tt.err, got, tt.want)
		}
	}
}

// TestValidValue tries each byte at each place against the plain rule.
func TestValidValue(t *testing.T) {
	for n := range 20 {
		for at := range n {
			for _, around := range []byte{' ', 'a', 0x80, 0xff, '\t'} {
				for c := range 256 {
					b := bytes.Repeat([]byte{around}, n)
					b[at] = byte(c)
					want := c == '\t' || c >= 0x20 && c != 0x7f
					if got := validValue(b); got != want {
						t.Fatalf("validValue(%q) = %v", b, got)
					}
				}
			}
		}
	}
}
