package http1

import (
	"reflect"
	"strings"
	"testing"
)

// alike reads heads one after the other as they come on a connection, and each
// as if it was the first. Nothing may differ.
func alike(t *testing.T, heads ...string) {
	t.Helper()
	lim := Limits{}.filled()
	var said lines
	r := new(Request)
	for _, h := range heads {
		fresh := new(Request)
		want := fresh.parse([]byte(h), &lim, nil)
		r.reset()
		got := r.parse([]byte(h), &lim, &said)
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("%q\ngot  %v\nwant %v", h, got, want)
		}
		if want != nil {
			if len(said.at) > 0 && len(said.text) == 0 {
				t.Fatalf("%q: lines without text are kept", h)
			}
			continue
		}
		a, b := AppendRequest(nil, r, &Edit{Drop: Reserved}), AppendRequest(nil, fresh, &Edit{Drop: Reserved})
		if string(a) != string(b) || r.Body != fresh.Body || r.KeepAlive != fresh.KeepAlive || r.Expect100 != fresh.Expect100 || !reflect.DeepEqual(r.Fields, fresh.Fields) && len(r.Fields) > 0 {
			t.Fatalf("%q\ngot  %q %+v\nwant %q %+v", h, a, r, b, fresh)
		}
	}
}

var kept = []string{
	"GET / HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nX-Id: 1\r\nCookie: a=b\r\n",
	"GET /x?y HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nX-Id: 22\r\nCookie: a=b\r\n",
	"GET / HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nCookie: a=b\r\n",
	"GET / HTTP/1.1\r\nhost: A\r\nAccept:*/*\r\nX-Id:  1 \r\nCookie: a=b\r\nX: \r\nY:\r\n",
	"GET / HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nConnection: cookie, x-id\r\nX-Id: 1\r\n",
	"GET / HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nConnection: x-id, close\r\nX-Id: 1\r\n",
	"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n",
	"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 4\r\n",
	"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n",
	"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n",
	"GET / HTTP/1.1\r\nHost: a\r\nAccept: */*\nX-Id: 1\r\n",
	"GET / HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n X-Id: 1\r\n",
	"GET / HTTP/1.1\r\nHost: a\r\nContent_Length: 3\r\nX_Id: 1\r\nSallyport-Peer: x\r\n",
	"GET / HTTP/1.1\r\n",
	"GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("X: y\r\n", maxKeptLines+1),
	"GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("y", maxKept) + "\r\n",
}

// TestLinesThatComeAgain has each kind of head follow each other one.
func TestLinesThatComeAgain(t *testing.T) {
	for _, a := range kept {
		for _, b := range kept {
			alike(t, a, a, b, a, b, b)
		}
	}
	alike(t, kept...)
}

// TestALargeHeadIsComparedInItsPlaces has heads that are too large to be kept
// differ from the last one in several lines: what follows must be compared with
// the line at its own place.
func TestALargeHeadIsComparedInItsPlaces(t *testing.T) {
	large := "Fill: " + strings.Repeat("y", maxKept) + "\r\n"
	small := "Pad: " + strings.Repeat("y", 200) + "\r\n"
	for _, tt := range [][2]string{
		{ // the second line is the next one that is kept, and as long as the first
			"GET / HTTP/1.1\r\nA: 0000000000000000\r\nSallyport-Peer: abcd\r\n" + small + "Host: a\r\n",
			"GET / HTTP/1.1\r\nHost: a\r\nSallyport-Peer: abcd\r\n" + large,
		},
		{
			"POST / HTTP/1.1\r\nA: 00000000000000000000000\r\nTransfer-Encoding: chunked\r\n" + small + "Host: a\r\n",
			"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n" + large,
		},
		{ // more changes than there are bytes kept
			"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n",
			"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: Go-http-client/1.1\r\nAuthorization: " + strings.Repeat("y", maxKept) + "\r\nAccept-Encoding: gzip\r\nX: 1\r\nY: 2\r\nZ: 3\r\n",
		},
	} {
		alike(t, tt[0], tt[1], tt[0], tt[1])
		alike(t, tt[0], tt[0], tt[1], tt[1], tt[0])
	}
}

// TestLinesHoldLittle bounds what a connection at rest keeps of its last head.
func TestLinesHoldLittle(t *testing.T) {
	c := NewConn(mem("GET / HTTP/1.1\r\nHost: a\r\nX: "+strings.Repeat("y", 20<<10)+"\r\n\r\n"), Limits{})
	if err := c.ReadRequest(new(Request)); err != nil {
		t.Fatal(err)
	}
	if n := cap(c.said.text) + cap(c.said.at); n != 0 {
		t.Errorf("%d bytes and lines are kept of a large head", n)
	}
}

func FuzzLines(f *testing.F) {
	for i := range kept {
		f.Add(kept[i], kept[(i+1)%len(kept)])
	}
	f.Fuzz(func(t *testing.T, a, b string) { alike(t, a, b, a, a, b) })
}
