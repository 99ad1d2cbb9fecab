package proxy

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sallyport/internal/http2"
	"sallyport/internal/svid"
)

// An h2wire is a connection on which a test says every frame itself.
type h2wire struct {
	t *testing.T
	*xhttp2.Framer
	net.Conn
	buf bytes.Buffer
	enc *hpack.Encoder
	dec *hpack.Decoder
}

func newH2wire(t *testing.T, addr string, cfg *tls.Config) *h2wire {
	t.Helper()
	var c net.Conn
	var err error
	if cfg == nil {
		c, err = net.Dial("tcp", addr)
	} else {
		c, err = tls.Dial("tcp", addr, cfg)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	w := &h2wire{t: t, Conn: c, Framer: xhttp2.NewFramer(c, c), dec: hpack.NewDecoder(4096, nil)}
	w.enc = hpack.NewEncoder(&w.buf)
	if _, err := io.WriteString(c, http2.Preface); err != nil {
		t.Fatal(err)
	}
	if err := w.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return w
}

// head sends a field section.
func (w *h2wire) head(id uint32, end bool, fields ...string) {
	w.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = w.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	_ = w.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: w.buf.Bytes(), EndStream: end, EndHeaders: true})
}

// An h2answer is what became of a stream.
type h2answer struct {
	outcome string // the status, "reset 1", "goaway 1" or "closed"
	head    map[string]string
	body    string
	ended   bool // with the head
}

// answer reads until the stream, or the connection, has ended; with head, until
// the head has come.
func (w *h2wire) answer(id uint32, untilHead bool) (a h2answer) {
	for {
		f, err := w.ReadFrame()
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			a.outcome = "closed"
			return a
		case err != nil:
			a.outcome = err.Error()
			return a
		}
		switch f := f.(type) {
		case *xhttp2.HeadersFrame:
			fields, err := w.dec.DecodeFull(f.HeaderBlockFragment())
			if err != nil {
				w.t.Fatal(err)
			}
			if f.StreamID != id {
				continue
			}
			m := map[string]string{}
			for _, fd := range fields {
				m[fd.Name] = fd.Value
			}
			if a.head == nil && m[":status"] != "100" {
				a.head, a.outcome, a.ended = m, m[":status"], f.StreamEnded()
			}
			if f.StreamEnded() || untilHead {
				return a
			}
		case *xhttp2.DataFrame:
			if f.StreamID == id {
				a.body += string(f.Data())
				if f.StreamEnded() || untilHead && a.head == nil {
					return a
				}
			}
		case *xhttp2.RSTStreamFrame:
			if f.StreamID == id {
				a.outcome = fmt.Sprintf("reset %d", f.ErrCode)
				return a
			}
		case *xhttp2.GoAwayFrame:
			a.outcome = fmt.Sprintf("goaway %d", f.ErrCode)
			return a
		}
	}
}

// ask is a request to the service of the rig, and more; fields that begin with
// ':' replace those that are there.
func ask(method, path string, more ...string) []string {
	f := []string{":method", method, ":scheme", "https", ":path", path, ":authority", "billing.mesh.internal"}
	for len(more) > 0 && strings.HasPrefix(more[0], ":") {
		for i := 0; i < len(f); i += 2 {
			if f[i] == more[0] {
				f[i+1] = more[1]
			}
		}
		more = more[2:]
	}
	return append(f, more...)
}

// doorsH2 are both ways to say HTTP/2 to the rig.
func (r *rig) doorsH2(t *testing.T) map[string]func() *h2wire {
	return map[string]func() *h2wire{
		"out": func() *h2wire { return newH2wire(t, r.outAddr, nil) },
		"in":  func() *h2wire { return newH2wire(t, r.inAddr, svid.ClientTLS(r.web, billing, "h2")) },
	}
}

// The half of corpus/http-strictness.md that HTTP/2 has: rows 4, 19, 32 and 33,
// and the rows of HTTP/1.1 that could come in by another door. A case says what
// becomes of it; unless that is an answer of the application's, nothing of it
// reaches the application.
func TestStrictnessHTTP2(t *testing.T) {
	type strictCase struct {
		name   string
		fields []string
		data   []string // pieces of the body; none: the head ends the request
		want   string
	}
	const malformed = "reset 1"
	long := strings.Repeat("a", 9000)
	many := ask("GET", "/ok/1")
	for i := range 110 {
		many = append(many, fmt.Sprintf("x-%d", i), "v")
	}
	large := ask("GET", "/ok/1")
	for range 20 {
		large = append(large, "x", long[:2000])
	}
	cases := []strictCase{
		{"4 two lengths that agree", ask("POST", "/ok/1", "content-length", "2", "content-length", "2"), []string{"ab"}, malformed},
		{"4 two lengths that differ", ask("POST", "/ok/1", "content-length", "2", "content-length", "3"), []string{"ab"}, malformed},
		{"4 a list of lengths", ask("POST", "/ok/1", "content-length", "2, 2"), []string{"ab"}, malformed},
		{"4 a length with a sign", ask("POST", "/ok/1", "content-length", "+2"), []string{"ab"}, malformed},
		{"4 a length that no body has", ask("POST", "/ok/1", "content-length", "99999999999999999999"), []string{"ab"}, malformed},
		{"4 more data than length", ask("POST", "/ok/1", "content-length", "2"), []string{"ab", "GET /ok/2 HTTP/1.1\r\n\r\n"}, malformed},
		{"4 less data than length", ask("POST", "/ok/1", "content-length", "20"), []string{"ab"}, malformed},
		{"4 a length and no data", ask("POST", "/ok/1", "content-length", "2"), nil, malformed},
		{"4 a length that is true", ask("POST", "/ok/1", "content-length", "4"), []string{"ab", "cd"}, "200"},
		{"1 a coding", ask("POST", "/ok/1", "transfer-encoding", "chunked"), []string{"0\r\n\r\n"}, malformed},
		{"1 a length and a coding", ask("POST", "/ok/1", "content-length", "5", "transfer-encoding", "chunked"), []string{"0\r\n\r\n"}, malformed},
		{"1 chunks in the data are data", ask("POST", "/ok/1"), []string{"0\r\n\r\nGET /no HTTP/1.1\r\nHost: a\r\n\r\n"}, "200"},
		{"8 a line break in a value", ask("GET", "/ok/1", "x", "a\r\nx-evil: b"), nil, malformed},
		{"8 a bare LF in a value", ask("GET", "/ok/1", "x", "a\nb"), nil, malformed},
		{"8 NUL in a value", ask("GET", "/ok/1", "x", "a\x00b"), nil, malformed},
		{"8 a blank in a name", ask("GET", "/ok/1", "x y", "a"), nil, malformed},
		{"8 a colon in a name", ask("GET", "/ok/1", "x:y", "a"), nil, malformed},
		{"8 a line break in a name", ask("GET", "/ok/1", "x\r\nhost", "a"), nil, malformed},
		{"8 a name in upper case", ask("GET", "/ok/1", "X-Upper", "a"), nil, malformed},
		{"8 no name", ask("GET", "/ok/1", "", "a"), nil, malformed},
		{"8 a line break in the path", ask("GET", "/ok/1", ":path", "/ok/1 HTTP/1.1\r\nX: y"), nil, malformed},
		{"8 a blank in the path", ask("GET", "/ok/1", ":path", "/ok/1 HTTP/1.1"), nil, malformed},
		{"8 a line break in the authority", ask("GET", "/ok/1", ":authority", "billing.mesh.internal\r\nx: y"), nil, malformed},
		{"8 a line break in the method", ask("GET /no HTTP/1.1\r\nX:", "/ok/1"), nil, malformed},
		{"10 Connection", ask("GET", "/ok/1", "connection", "authorization"), nil, malformed},
		{"10 Upgrade", ask("GET", "/ok/1", "upgrade", "h2c"), nil, malformed},
		{"10 Proxy-Connection", ask("GET", "/ok/1", "proxy-connection", "keep-alive"), nil, malformed},
		{"12 another TE", ask("GET", "/ok/1", "te", "gzip"), nil, malformed},
		{"12 TE: trailers", ask("GET", "/ok/1", "te", "trailers"), nil, "200"},
		{"17 a path that is none", ask("GET", "/ok/1", ":path", "ok/1"), nil, malformed},
		{"17 no path", ask("GET", "/ok/1", ":path", ""), nil, malformed},
		{"18 an absolute path", ask("GET", "/ok/1", ":path", "http://billing.mesh.internal/ok/1"), nil, malformed},
		{"18 another scheme", ask("GET", "/ok/1", ":scheme", "ftp"), nil, malformed},
		{"18 a user in the authority", ask("GET", "/ok/1", ":authority", "me@billing.mesh.internal"), nil, "400"},
		{"18 the asterisk for GET", ask("GET", "/ok/1", ":path", "*"), nil, malformed},
		{"19 Host differs from the authority", ask("GET", "/ok/1", "host", "inventory.mesh.internal"), nil, "400"},
		{"19 Host is the authority", ask("GET", "/ok/1", "host", "billing.mesh.internal"), nil, "200"},
		{"19 two Hosts", ask("GET", "/ok/1", "host", "billing.mesh.internal", "host", "billing.mesh.internal"), nil, malformed},
		{"19 Host alone", append(ask("GET", "/ok/1")[:6:6], "host", "billing.mesh.internal"), nil, "200"},
		{"19 neither", ask("GET", "/ok/1")[:6], nil, "400"},
		{"21 two Authorizations", ask("GET", "/ok/1", "authorization", "a", "authorization", "b"), nil, "400"},
		{"25 an escaped slash", ask("GET", "/ok%2f1"), nil, "400"},
		{"25 a fragment", ask("GET", "/ok/1#x"), nil, "400"},
		{"25 NUL in the path", ask("GET", "/ok/%00"), nil, "400"},
		{"30 a path beyond the limit", ask("GET", "/ok/"+long), nil, "414"},
		{"30 more fields than the limit", many, nil, "431"},
		{"30 a head beyond the limit", large, nil, "431"},
		{"33 another protocol", append(ask("CONNECT", "/ok/1"), ":protocol", "connect-udp"), nil, malformed},
		{"33 a protocol without CONNECT", append(ask("GET", "/ok/1"), ":protocol", "websocket"), nil, malformed},
		{"15 CONNECT with a path", ask("CONNECT", "/ok/1"), nil, malformed},
		{"pseudo field twice", append([]string{":method", "GET"}, ask("GET", "/ok/1")...), nil, malformed},
		{"pseudo field of an answer", append([]string{":status", "200"}, ask("GET", "/ok/1")...), nil, malformed},
		{"pseudo field that does not exist", append([]string{":user", "root"}, ask("GET", "/ok/1")...), nil, malformed},
		{"pseudo field behind another", append(ask("GET", "/ok/1"), "x", "y", ":path", "/no"), nil, malformed},
	}
	var mu sync.Mutex
	var seen []string
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		mu.Lock()
		seen = append(seen, fmt.Sprintf("%s %s %s %q", r.Method, r.Host, r.RequestURI, b))
		mu.Unlock()
		_, _ = io.WriteString(w, "ok")
	}), withH2)
	for door, dial := range r.doorsH2(t) {
		for _, tt := range cases {
			t.Run(tt.name+" "+door, func(t *testing.T) {
				mu.Lock()
				seen = nil
				mu.Unlock()
				w := dial()
				w.head(1, len(tt.data) == 0, tt.fields...)
				for i, d := range tt.data {
					_ = w.WriteData(1, i == len(tt.data)-1, []byte(d))
				}
				if got := w.answer(1, false); got.outcome != tt.want {
					t.Errorf("got %s, want %s: %+v", got.outcome, tt.want, got)
				}
				// Nobody else on the connection suffers.
				w.head(3, true, ask("GET", "/ok/last")...)
				if got := w.answer(3, false); got.outcome != "200" {
					t.Errorf("the next call got %+v", got)
				}
				mu.Lock()
				defer mu.Unlock()
				want := 1
				if tt.want == "200" {
					want = 2
				}
				if len(seen) != want || !strings.HasSuffix(seen[want-1], `/ok/last ""`) || want == 2 && tt.data != nil && !strings.HasSuffix(seen[0], fmt.Sprintf("%q", strings.Join(tt.data, ""))) {
					t.Errorf("the application has seen %q", seen)
				}
			})
		}
	}
}
