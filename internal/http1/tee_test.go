package http1

import (
	"strings"
	"sync"
	"testing"
)

// A recorder is a Tee that keeps what it sees.
type recorder struct {
	mu                     sync.Mutex
	sent, hinted, answered strings.Builder
	tries                  int
}

func (r *recorder) Again() {
	r.tries++
	r.sent.Reset()
	r.hinted.Reset()
	r.answered.Reset()
}

func (r *recorder) Sent(b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sent.Write(b)
}

func (r *recorder) Hinted(b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hinted.Write(b)
}

func (r *recorder) Answered(b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answered.Write(b)
}

// What a Tee sees is what went over both connections, whatever way it took.
func TestTeeSeesWhatWasWritten(t *testing.T) {
	long := strings.Repeat("0123456789", 20_000)
	for _, tt := range []struct{ name, request, answer string }{
		{"no body", plainGet, okAnswer},
		{"a small body", "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab", chunkedAnswer},
		{"a small body in chunks", "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2;x\r\nab\r\n0\r\n\r\n", okAnswer},
		{"a long body", "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n" + long, "HTTP/1.1 200 OK\r\n\r\n" + long},
		{"a long body in chunks", "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n30d40\r\n" + long + "\r\n0\r\n\r\n", okAnswer},
		{"a hint before the answer", plainGet, "HTTP/1.1 103 Early Hints\r\nLink: b\r\n\r\n" + okAnswer},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, u := mem(tt.request), mem(tt.answer)
			down, up, r := NewConn(d, Limits{}), NewConn(u, Limits{}), new(Request)
			if err := down.ReadRequest(r); err != nil {
				t.Fatal(err)
			}
			tee := &recorder{}
			x := Exchange{Down: down, Up: up, Request: r, Tee: tee}
			res, err := x.Run()
			early := strings.Contains(tt.request, long) // the answer is there before the body is
			if err != nil || !res.Whole && !early || tee.tries != 1 {
				t.Fatalf("%+v, %v, %d tries", res, err, tee.tries)
			}
			if got, want := tee.sent.String(), u.written(); got != want {
				t.Errorf("saw %.200q sent, want %.200q", got, want)
			}
			hint := ""
			if strings.HasPrefix(tt.answer, "HTTP/1.1 103") {
				hint = "HTTP/1.1 103 Early Hints\r\nLink: b\r\n\r\n"
			}
			if got, want := tee.hinted.String()+"|"+tee.answered.String(), hint+"|"+strings.TrimPrefix(d.written(), hint); got != want {
				t.Errorf("saw %.200q answered, want %.200q", got, want)
			}
		})
	}
}

func TestTeeOfATryThatFails(t *testing.T) {
	d := mem("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab")
	down, r := NewConn(d, Limits{}), new(Request)
	if err := down.ReadRequest(r); err != nil {
		t.Fatal(err)
	}
	tee := &recorder{}
	x := Exchange{Down: down, Up: NewConn(mem(""), Limits{}), Request: r, Tee: tee}
	if _, err := x.Run(); err == nil {
		t.Fatal("nothing is an answer")
	}
	u := mem(okAnswer)
	x.Up = NewConn(u, Limits{})
	if _, err := x.Run(); err != nil {
		t.Fatal(err)
	}
	if got, want := tee.sent.String(), u.written(); got != want || tee.tries != 2 {
		t.Errorf("after %d tries saw %q, want %q", tee.tries, got, want)
	}
}
