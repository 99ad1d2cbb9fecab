package test

import (
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"sallyport/internal/meshtest"
)

// oddAnswers are what applications say that is legal; those of TestStrictness
// come on top.
func oddAnswers() map[string]string {
	const ok = "HTTP/1.1 200 OK\r\n"
	long := strings.Repeat("a", 100_000)
	return map[string]string{
		"chunk extensions": ok + chunkedField + "\r\n2;a;b=\"c\"\r\nok\r\n0;d\r\n\r\n", "a chunk that looks last": ok + chunkedField + "\r\n7\r\n0\r\n\r\nGE\r\n0\r\n\r\n",
		"many chunks": ok + chunkedField + "\r\n" + strings.Repeat("1\r\na\r\n", 3000) + "0\r\n\r\n", "an answer in it": ok + "Content-Length: 19\r\n\r\nHTTP/1.1 404 No\r\n\r\n",
		"long": ok + "Content-Length: 100000\r\n\r\n" + long, "long until it closes": ok + "\r\n" + long, "no phrase": "HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", "another phrase": "HTTP/1.1 200 \xc3\xa4 : \r\nContent-Length: 2\r\n\r\nok",
		"fields of every form": ok + "A:\r\nB: \t c \t\r\nC: \xc3\xa4\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d\r\nContent-Length: 2\r\n\r\nok", "coding in a value": ok + "X-Note: chunked\r\nContent-Lengths: 9\r\nContent-Length: 2\r\n\r\nok",
		"an error": "HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nno", "not found in chunks": "HTTP/1.1 404 No\r\n" + chunkedField + "\r\n2\r\nno\r\n0\r\n\r\n", "a status of its own": "HTTP/1.1 299 Odd\r\nContent-Length: 0\r\n\r\n", "moved": "HTTP/1.1 302 Found\r\nLocation: /x?y#z\r\nContent-Length: 0\r\n\r\n",
		"encoded content": ok + "Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\nok", "hop fields": ok + "Connection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nContent-Length: 2\r\n\r\nok",
	}
}

// TestReadersAgreeOnAnswers has a real sidecar pass on answers of every form,
// and puts what its client gets, byte for byte, behind nginx and HAProxy: a
// client of theirs gets the answer that a client of the sidecar gets.
func TestReadersAgreeOnAnswers(t *testing.T) {
	t.Parallel()
	nginx, haproxy := meshtest.Need(t, "nginx"), meshtest.Need(t, "haproxy")
	s := newStrictRig(t, "")
	behind := newBareApp(t)
	at := behind.addr
	readers := map[string]string{"nginx": s.w.startNginx(nginx, at), "haproxy": s.w.startHAProxy(haproxy, at)}
	cases := oddAnswers()
	for _, class := range answerClasses() {
		for _, c := range class.cases {
			if c.answer != "" && c.keep && c.status < 500 && strings.HasPrefix(c.say[0], "GET") {
				cases[c.name] = c.answer
			}
		}
	}
	const request = "GET " + strictPath + " HTTP/1.1\r\n" + strictHost + "Connection: close\r\n\r\n"
	for name, answer := range cases {
		ok := t.Run(name, func(t *testing.T) {
			hangUp := strings.Contains(name, "close")
			s.app.expect(strictCase{answer: answer, hangUp: hangUp})
			raw := s.bytesOf(t, request)
			if strings.Contains(raw, " 103 ") {
				return // nginx of before 1.29 takes it for the final answer
			}
			behind.expect(strictCase{answer: raw, hangUp: true})
			want := askAt(t, at, request)
			if want.Err != "" || want.Status < 200 || want.Rest != "" {
				t.Fatalf("net/http reads %+v in %q", want, raw)
			}
			for reader, addr := range readers {
				if got := askAt(t, addr, request); got.Status != want.Status || got.Body != want.Body || got.Rest != "" || !slices.Equal(ownFields(got.Head), ownFields(want.Head)) {
					t.Errorf("%s makes %d %q %.80q (%s) of it, net/http %d %q %.80q: %.200q", reader, got.Status, got.Head, got.Body, got.Err, want.Status, want.Head, want.Body, raw)
				}
			}
		})
		readersSum.one(ok)
	}
}

// bytesOf is all that the sidecar answers.
func (s *strictRig) bytesOf(t *testing.T, request string) string {
	t.Helper()
	c := s.connect(t)
	defer c.Close()
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func askAt(t *testing.T, addr, request string) saidReply {
	t.Helper()
	r, err := say(t.Context(), sayRequest{Address: addr, Say: [][]byte{[]byte(request)}})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// ownFields are the fields of an answer that no proxy makes anew, sorted.
func ownFields(head string) (list []string) {
	for line := range strings.SplitSeq(strings.TrimSuffix(head, "\r\n"), "\r\n") {
		switch name, _, _ := strings.Cut(line, ":"); http.CanonicalHeaderKey(name) {
		case "Server", "Date", "Connection", "Content-Length", "Trailer", "Sum":
		default:
			list = append(list, line)
		}
	}
	slices.Sort(list)
	return list
}
