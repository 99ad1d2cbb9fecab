package test

import (
	"fmt"
	"math/rand/v2"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"sallyport/internal/meshtest"
)

// randomRequests is how many messages TestReadersAgreeOnRandomRequests makes.
const randomRequests = 600

// Pieces that are put together at random: most are right, and some are what one
// program reads otherwise than another.
var (
	someMethods  = []string{"GET", "GET", "POST", "POST", "PUT", "HEAD", "OPTIONS", "DELETE", "X-ODD", "get"}
	someTargets  = []string{strictPath, strictPath, strictPath + "?q", "/v1/strict//x/./y", "/v1/strict/%78?%00", "http://billing.mesh.internal" + strictPath, "/v1/strict/x[1]", "/v1/strict/a%2fb", "*", "/v1/strict/..", strictPath + "#f"}
	someVersions = []string{"HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/1.2"}
	someNames    = []string{"A", "B", "X-Forwarded-For", "Connection", "Content-Length", "content-length", "Transfer-Encoding", "Transfer_Encoding", "TE", "Trailer", "Expect", "Upgrade", "Cookie", "Accept", "Keep-Alive", "!odd", "My_Field", "Range", "Via"}
	someValues   = []string{"x", "", "chunked", "close", "keep-alive", "2", "0", "7", "a, b", "trailers", "100-continue", "h2c", "A", "\"q\"", "\xc3\xa4", "a=b; c=d", "identity", "bytes=0-1", ":", "\t "}
	someEnds     = []string{"\r\n", "\r\n", "\r\n", "\r\n", "\r\n", "\r\n", "\r\n", "\r\n", "\r\n", "\r\n", "\r\n", "\n", "\r\n ", "\r\r\n"}
	someBodies   = []string{"", "ab", "ab", "0\r\n\r\n", "2\r\nab\r\n0\r\n\r\n", "2;x=y\r\nab\r\n0\r\nA: b\r\n\r\n", "7\r\n0\r\n\r\nGE\r\n0\r\n\r\n", smuggled}
)

// randomRequest is the message of a number, always the same.
func randomRequest(n uint64) string {
	r := rand.New(rand.NewPCG(n, 7))
	pick := func(list []string) string { return list[r.IntN(len(list))] }
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %s%s%s", pick(someMethods), pick(someTargets), pick(someVersions), "\r\n", strictHost)
	for range r.IntN(5) {
		b.WriteString(pick(someNames) + ":" + pick([]string{" ", "", " \t"}) + pick(someValues) + pick(someEnds))
	}
	body := pick(someBodies)
	switch r.IntN(3) {
	case 0:
		fmt.Fprintf(&b, "Content-Length: %d\r\n", len(body))
	case 1:
		b.WriteString(chunkedField)
	default:
		body = ""
	}
	return b.String() + "\r\n" + body
}

// TestReadersAgreeOnRandomRequests is TestReadersAgree for messages that nobody
// chose. Most are refused; what passes is read by all in the same way.
func TestReadersAgreeOnRandomRequests(t *testing.T) {
	t.Parallel()
	nginx, haproxy := meshtest.Need(t, "nginx"), meshtest.Need(t, "haproxy")
	s := newStrictRig(t, "limits: {head_timeout: 200ms, body_timeout: 200ms}\n")
	direct := httptest.NewServer(readingHandler)
	t.Cleanup(direct.Close)
	at := direct.Listener.Addr().String()
	readers := map[string]string{"nginx": s.w.startNginx(nginx, at), "haproxy": s.w.startHAProxy(haproxy, at)}
	passed := 0
	for n := range uint64(randomRequests) {
		from := s.app.expect(strictCase{})
		request := randomRequest(n)
		got := s.throughIn(t, []string{request, again}, nil)
		// What was cut off is known late, perhaps while the next is on its way.
		arrived := slices.DeleteFunc(s.app.since(from), func(a arrival) bool { return a.err != nil || a.target == againPath })
		if (got.Status == 200) != (len(arrived) == 1) {
			t.Fatalf("message %d was answered %d, and arrived were %+v", n, got.Status, arrived)
		}
		if len(arrived) == 0 {
			continue
		}
		passed++
		ok := true
		want, err := readBy(at, arrived[0].raw)
		if err != nil {
			t.Errorf("message %d: net/http: %v: %q", n, err, arrived[0].raw)
			ok = false
		}
		for reader, addr := range readers {
			if r, err := readBy(addr, arrived[0].raw); err != nil || !r.same(want) {
				t.Errorf("message %d: %s (%v) reads\n%+v\nnet/http\n%+v\nof %q", n, reader, err, r, want, arrived[0].raw)
				ok = false
			}
		}
		readersSum.one(ok)
	}
	if passed < randomRequests/20 || passed > randomRequests*9/10 {
		t.Errorf("%d of %d passed: too few or too many to tell anything", passed, randomRequests)
	}
	t.Logf("%d of %d messages were accepted", passed, randomRequests)
}
