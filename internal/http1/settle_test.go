package http1

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// edge is a client's connection that can be waited for and written without.
type edge struct {
	mu     sync.Mutex // guards the fields below
	more   sync.Cond
	in     []byte
	out    strings.Builder
	closed bool
	past   bool // the deadline
	waits  int  // how often it was waited for
	room   int  // how much TryWrite takes
}

func newEdge(in string) *edge {
	e := &edge{in: []byte(in), room: 1 << 20}
	e.more.L = &e.mu
	return e
}

func (e *edge) Await() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.waits++
	e.more.Broadcast()
	for len(e.in) == 0 && !e.closed {
		if e.past {
			return os.ErrDeadlineExceeded
		}
		e.more.Wait()
	}
	return nil
}

// sends has the client send, once it is waited for the n-th time.
func (e *edge) sends(n int, text string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for e.waits < n {
		e.more.Wait()
	}
	e.in = append(e.in, text...)
	e.closed = text == ""
	e.more.Broadcast()
}

func (e *edge) Read(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.in) == 0 {
		return 0, io.EOF
	}
	n := copy(p, e.in)
	e.in = e.in[n:]
	return n, nil
}

func (e *edge) Write(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.out.Write(p)
}

func (e *edge) TryWrite(p []byte) (int, error) { return e.Write(p[:min(len(p), e.room)]) }

func (e *edge) SetReadDeadline(t time.Time) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.past = !t.IsZero() && t.Before(time.Now())
	e.more.Broadcast()
	return nil
}

func (e *edge) said() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.out.String()
}

func (e *edge) Close() error                     { return nil }
func (e *edge) LocalAddr() net.Addr              { return nil }
func (e *edge) RemoteAddr() net.Addr             { return nil }
func (e *edge) SetDeadline(time.Time) error      { return nil }
func (e *edge) SetWriteDeadline(time.Time) error { return nil }

// shared is a connection that somebody else reads.
type shared struct {
	*edge
	hand interface {
		Claim() bool
		Take(p []byte) bool
		Left()
	}
	asked chan struct{} // closed when there is a hand
}

func (s *shared) Answer(h interface {
	Claim() bool
	Take(p []byte) bool
	Left()
}) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hand = h
	close(s.asked)
	return true
}

func (s *shared) Recall() {}

// Read waits for the next piece.
func (s *shared) Read(p []byte) (int, error) {
	s.mu.Lock()
	for len(s.in) == 0 && !s.closed {
		s.more.Wait()
	}
	s.mu.Unlock()
	return s.edge.Read(p)
}

// come has what the upstream sends next arrive.
func (s *shared) come(text string) {
	p := []byte(text)
	took := s.hand.Claim() && s.hand.Take(p)
	clear(p) // it is void
	if !took {
		s.sends(0, text)
	}
}

func TestAnswerIsSettledWhereItIsRead(t *testing.T) {
	whole := "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	for _, tt := range []struct {
		name    string
		pieces  []string
		room    int
		settled bool
		want    string // what the client gets, if not the answer
		err     string
		accept  func(x *Exchange) bool
	}{
		{name: "whole", pieces: []string{whole}, settled: true},
		{name: "without a body", pieces: []string{"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n"}, settled: true},
		{name: "the end of its connection", pieces: []string{"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"}, settled: true, want: whole},
		{name: "in pieces", pieces: []string{whole[:9], whole[9:30], whole[30:]}},
		{name: "a body that is to come", pieces: []string{whole[:len(whole)-1], "k"}},
		{name: "more than the answer", pieces: []string{whole + "x"}, want: whole},
		{name: "an interim one before", pieces: []string{"HTTP/1.1 103 Early Hints\r\n\r\n" + whole}, want: "HTTP/1.1 103 Early Hints\r\n\r\n" + whole},
		{name: "chunks", pieces: []string{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"}},
		{name: "to be refused", pieces: []string{"HTTP/1.1 200 OK\nContent-Length: 2\n\nok"}, want: "", err: "read"},
		{name: "a client that takes little", pieces: []string{whole}, room: 7},
		{name: "a client that takes nothing", pieces: []string{whole}, room: -1},
		{name: "the last on its connection", pieces: []string{whole}, want: strings.Replace(whole, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1), accept: func(x *Exchange) bool {
			x.ToDown.Close = true
			return true
		}},
		{name: "for the owner", pieces: []string{whole}, accept: func(x *Exchange) bool {
			x.Settle = nil
			return true
		}},
		{name: "not accepted", pieces: []string{whole}, err: "accept", accept: func(*Exchange) bool { return false }},
		{name: "the end instead", pieces: []string{""}, err: "read"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nc, far := newEdge(plainGet), &shared{edge: newEdge(""), asked: make(chan struct{})}
			if tt.room != 0 {
				nc.room = max(tt.room, 0)
			}
			down, r := NewConn(nc, Limits{}), new(Request)
			if err := down.ReadRequest(r); err != nil {
				t.Fatal(err)
			}
			over := make(chan Result, 1)
			x := &Exchange{Down: down, Up: NewConn(far, Limits{}), Request: r, Settle: func(res Result) { over <- res }}
			asked := 0
			if tt.accept != nil {
				x.Accept = func(*Response) bool {
					asked++
					return tt.accept(x)
				}
			}
			go func() {
				<-far.asked
				for _, p := range tt.pieces {
					if p == "" {
						far.hand.Left()
						far.sends(0, "")
						return
					}
					far.come(p)
				}
				if tt.settled {
					<-over
					nc.sends(2, plainGet)
				}
			}()
			_, err := x.Run()
			want := strings.Join(tt.pieces, "")
			if tt.want != "" || tt.err != "" {
				want = tt.want
			}
			if got := nc.said(); got != want {
				t.Errorf("the client has got %q, want %q", got, want)
			}
			if tt.accept != nil && asked != 1 {
				t.Errorf("it was asked %d times whether it is accepted", asked)
			}
			switch {
			case tt.err == "accept":
				if err != ErrNotAccepted || x.Response.Status != 200 {
					t.Errorf("got %v", err)
				}
			case tt.settled:
				if err != ErrSettled {
					t.Fatalf("got %v, want that it is settled", err)
				}
				if down.buf != nil || down.out != nil {
					t.Error("a buffer is held at rest")
				}
				if err := down.ReadRequest(r); err != nil || string(r.Path) != "/x" {
					t.Errorf("the next request: %v", err)
				}
			case tt.err != "":
				if se := (*SideError)(nil); !errors.As(err, &se) || se.Op != tt.err || se.Side != Upstream {
					t.Errorf("got %v", err)
				}
			case err != nil:
				t.Errorf("got %v", err)
			}
		})
	}
}

// TestClientIsHeardBeforeTheAnswer has the client send on while the answer is
// still to come.
func TestClientIsHeardBeforeTheAnswer(t *testing.T) {
	nc, far := newEdge(plainGet), &shared{edge: newEdge(""), asked: make(chan struct{})}
	down, r := NewConn(nc, Limits{}), new(Request)
	if err := down.ReadRequest(r); err != nil {
		t.Fatal(err)
	}
	x := &Exchange{Down: down, Up: NewConn(far, Limits{}), Request: r, Settle: func(Result) { t.Error("it was settled") }}
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		nc.sends(2, plainGet)
		far.sends(1, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") // once the owner reads
		if far.hand.Claim() {
			t.Error("it is still to be claimed")
		}
	}()
	if res, err := x.Run(); err != nil || !res.DownstreamReusable {
		t.Fatalf("%v, %+v", err, res)
	}
	if err := down.ReadRequest(r); err != nil {
		t.Errorf("the next request: %v", err)
	}
	<-asked
}

// TestPanicIsTheOwners keeps a panic away from who reads for many.
func TestPanicIsTheOwners(t *testing.T) {
	nc, far := newEdge(plainGet), &shared{edge: newEdge(""), asked: make(chan struct{})}
	down, r := NewConn(nc, Limits{}), new(Request)
	if err := down.ReadRequest(r); err != nil {
		t.Fatal(err)
	}
	x := &Exchange{Down: down, Up: NewConn(far, Limits{}), Request: r, Settle: func(Result) { panic("here") }}
	go func() {
		<-far.asked
		far.come("HTTP/1.1 204 No Content\r\n\r\n")
	}()
	defer func() {
		if p := recover(); p != "here" {
			t.Errorf("got the panic %v", p)
		}
	}()
	_, err := x.Run()
	t.Errorf("got %v and no panic", err)
}
