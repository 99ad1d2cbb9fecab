package http1

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/meshtest"
)

// An upload that the machine has stalled is given more time for its last write.
func TestMain(m *testing.M) {
	lastGrace = 10 * time.Second
	os.Exit(m.Run())
}

// pipes starts a proxy between two in-memory connections inside a bubble.
func pipes(timeout time.Duration) (client, upstream net.Conn, outcome chan error) {
	return pipesWithin(Limits{}, timeout)
}

func pipesWithin(lim Limits, timeout time.Duration) (client, upstream net.Conn, outcome chan error) {
	client, d := net.Pipe()
	u, upstream := net.Pipe()
	outcome = make(chan error, 1)
	go func() {
		down, up := NewConn(d, lim), NewConn(u, lim)
		r := new(Request)
		err := down.ReadRequest(r)
		if err == nil {
			x := Exchange{Down: down, Up: up, Request: r, Timeout: timeout}
			_, err = x.Run()
		}
		if s := StatusOf(err); s != 0 {
			_, _ = down.WriteError(r, s, []byte("Sallyport-Decision: d-1\r\n"), []byte("{}"))
		}
		d.Close()
		u.Close()
		outcome <- err
	}()
	return client, upstream, outcome
}

func TestSlowHeadIsCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var wg sync.WaitGroup
		defer wg.Wait()
		client, upstream, outcome := pipes(0)
		start := time.Now()
		wg.Go(func() {
			for _, b := range []byte(strings.Repeat("GET / HTTP/1.1", 9)) {
				<-time.After(time.Second)
				if _, err := client.Write([]byte{b}); err != nil {
					return
				}
			}
		})
		resp, err := http.ReadResponse(bufio.NewReader(client), nil)
		if err != nil || resp.StatusCode != 408 || resp.Header.Get("Sallyport-Decision") != "d-1" {
			t.Fatalf("%v, %v", resp, err)
		}
		if d := time.Since(start); d < 10*time.Second || d > 12*time.Second {
			t.Errorf("cut off after %v, want 10 s from the first byte", d)
		}
		client.Close()
		upstream.Close()
		if err := <-outcome; err != ErrHeadTimeout {
			t.Errorf("outcome %v", err)
		}
	})
}

func TestIdleConnectionEndsWithoutAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, upstream, outcome := pipes(0)
		start := time.Now()
		if n, err := client.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("client got %d, %v", n, err)
		}
		if d := time.Since(start); d < 65*time.Second || d > 75*time.Second {
			t.Errorf("closed after %v", d)
		}
		upstream.Close()
		if err := <-outcome; err != ErrIdleTimeout {
			t.Errorf("outcome %v", err)
		}
	})
}

func TestSilentUpstreamIs504(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var wg sync.WaitGroup
		defer wg.Wait()
		client, upstream, outcome := pipes(8 * time.Second)
		wg.Go(func() { _, _ = io.Copy(io.Discard, upstream) })
		start := time.Now()
		_, _ = io.WriteString(client, plainGet)
		resp, err := http.ReadResponse(bufio.NewReader(client), nil)
		if err != nil || resp.StatusCode != 504 {
			t.Fatalf("%v, %v", resp, err)
		}
		if d := time.Since(start); d < 8*time.Second || d > 9*time.Second {
			t.Errorf("gave up after %v, want 8 to 9 s", d)
		}
		client.Close()
		if err := <-outcome; FailedSide(err) != Upstream {
			t.Errorf("outcome %v", err)
		}
	})
}

// TestTimeoutCountsFromTheEndOfTheRequest uploads for longer than the time
// that the upstream has for its answer.
func TestTimeoutCountsFromTheEndOfTheRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var wg sync.WaitGroup
		defer wg.Wait()
		client, upstream, outcome := pipes(5 * time.Second)
		wg.Go(func() {
			req, err := http.ReadRequest(bufio.NewReader(upstream))
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, req.Body)
			<-time.After(4 * time.Second)
			_, _ = io.WriteString(upstream, okAnswer)
		})
		wg.Go(func() {
			_, _ = io.WriteString(client, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
			for range 30 {
				<-time.After(time.Second)
				_, _ = io.WriteString(client, "1\r\nx\r\n")
			}
			_, _ = io.WriteString(client, "0\r\n\r\n")
		})
		resp, err := http.ReadResponse(bufio.NewReader(client), nil)
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("%v, %v", resp, err)
		}
		if err := <-outcome; err != nil {
			t.Errorf("outcome %v", err)
		}
		client.Close()
		upstream.Close()
	})
}

func TestSlowBodyIsCutOff(t *testing.T) {
	for _, length := range []string{"4000", "4000000"} {
		synctest.Test(t, func(t *testing.T) {
			var wg sync.WaitGroup
			defer wg.Wait()
			client, upstream, outcome := pipes(0)
			wg.Go(func() { _, _ = io.Copy(io.Discard, upstream) })
			start := time.Now()
			wg.Go(func() {
				_, _ = io.WriteString(client, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: "+length+"\r\n\r\n")
				for {
					<-time.After(time.Second)
					if _, err := client.Write([]byte("x")); err != nil {
						return
					}
				}
			})
			resp, err := http.ReadResponse(bufio.NewReader(client), nil)
			if err != nil || resp.StatusCode != 408 {
				t.Fatalf("%v, %v", resp, err)
			}
			if d := time.Since(start); d > 30*time.Second {
				t.Errorf("cut off after %v", d)
			}
			client.Close()
			upstream.Close()
			if err := <-outcome; !errors.Is(err, ErrSlowBody) || FailedSide(err) != Client {
				t.Errorf("outcome %v", err)
			}
		})
	}
}

func TestSteadyBodyMayTakeLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var wg sync.WaitGroup
		defer wg.Wait()
		client, upstream, outcome := pipes(time.Second)
		wg.Go(func() {
			_, _ = io.WriteString(client, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 60000\r\n\r\n")
			for range 60 {
				<-time.After(time.Second)
				_, _ = io.WriteString(client, strings.Repeat("x", 1000))
			}
		})
		wg.Go(func() {
			req, err := http.ReadRequest(bufio.NewReader(upstream))
			if err == nil {
				_, _ = io.Copy(io.Discard, req.Body)
				_, _ = io.WriteString(upstream, okAnswer)
			}
		})
		resp, err := http.ReadResponse(bufio.NewReader(client), nil)
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("%v, %v", resp, err)
		}
		if err := <-outcome; err != nil {
			t.Errorf("outcome %v", err)
		}
		client.Close()
		upstream.Close()
	})
}

// TestExpectIsAnsweredHere has a client that sends its body only after 100.
func TestExpectIsAnsweredHere(t *testing.T) {
	for _, framing := range []string{"Content-Length: 3", "Content-Length: 20000", "Transfer-Encoding: chunked"} {
		synctest.Test(t, func(t *testing.T) {
			var wg sync.WaitGroup
			defer wg.Wait()
			client, upstream, outcome := pipes(time.Second)
			got := make(chan int64, 1)
			wg.Go(func() {
				req, err := http.ReadRequest(bufio.NewReader(upstream))
				if err != nil || req.Header.Get("Expect") != "" {
					got <- -1
					return
				}
				n, _ := io.Copy(io.Discard, req.Body)
				_, _ = io.WriteString(upstream, okAnswer)
				got <- n
			})
			_, _ = io.WriteString(client, "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n"+framing+"\r\n\r\n")
			b := make([]byte, len(continueHead))
			if _, err := io.ReadFull(client, b); err != nil || string(b) != continueHead {
				t.Fatalf("%q, %v", b, err)
			}
			body, want := "3\r\nabc\r\n0\r\n\r\n", int64(3)
			switch framing {
			case "Content-Length: 3":
				body = "abc"
			case "Content-Length: 20000":
				body, want = strings.Repeat("a", 20000), 20000
			}
			wg.Go(func() { _, _ = io.WriteString(client, body) })
			resp, err := http.ReadResponse(bufio.NewReader(client), nil)
			if err != nil || resp.StatusCode != 200 {
				t.Fatalf("%v, %v", resp, err)
			}
			if n := <-got; n != want {
				t.Errorf("upstream got %d body bytes, want %d", n, want)
			}
			if err := <-outcome; err != nil {
				t.Errorf("outcome %v", err)
			}
			client.Close()
			upstream.Close()
		})
	}
}

func TestWriteError(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		keep     bool
		body     string
	}{
		{"no body", plainGet, true, `{"a":1}`},
		{"HEAD", "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", true, ""},
		{"body at hand", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", true, `{"a":1}`},
		{"chunks at hand", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", true, `{"a":1}`},
		{"body to come", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nabc", false, `{"a":1}`},
		{"chunks to come", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", false, `{"a":1}`},
		{"waits for 100", "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n", false, `{"a":1}`},
		{"client closes", "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", false, `{"a":1}`},
		{"HTTP/1.0", "GET / HTTP/1.0\r\nHost: a\r\n\r\n", false, `{"a":1}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			next := ""
			if tt.keep {
				next = plainGet
			}
			d := mem(tt.in + next)
			c, r := NewConn(d, Limits{}), new(Request)
			if err := c.ReadRequest(r); err != nil {
				t.Fatal(err)
			}
			keep, err := c.WriteError(r, 403, []byte("Sallyport-Decision: d-1\r\n"), []byte(`{"a":1}`))
			if err != nil || keep != tt.keep {
				t.Errorf("keep %v, %v; want %v", keep, err, tt.keep)
			}
			resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(d.written())), &http.Request{Method: r.Verb()})
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != 403 || resp.Close == keep || string(body) != tt.body || resp.ContentLength != 7 ||
				resp.Header.Get("Sallyport-Decision") != "d-1" || resp.Header.Get("Content-Type") != "application/json" {
				t.Errorf("client got %q", d.written())
			}
			if keep {
				if err := c.ReadRequest(r); err != nil || string(r.Path) != "/x" {
					t.Errorf("next request: %v", err)
				}
			}
		})
	}
}

func TestStale(t *testing.T) {
	a, b := meshtest.TCP(t)
	c := NewConn(a, Limits{})
	if n := testing.AllocsPerRun(100, func() { c.Stale() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if c.Stale() {
		t.Error("a quiet connection counts as stale")
	}
	if _, err := b.Write([]byte("HTTP/1.1 408 Request Timeout\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	waitReadable(t, a)
	if !c.Stale() {
		t.Error("bytes that nobody asked for went unseen")
	}
	a, b = meshtest.TCP(t)
	c = NewConn(a, Limits{})
	b.Close()
	waitReadable(t, a)
	if !c.Stale() {
		t.Error("a closed connection went unseen")
	}
}

// waitReadable returns once the kernel has something to read on c.
func waitReadable(t *testing.T, c net.Conn) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	first := true
	if err := raw.Read(func(uintptr) bool {
		if first {
			first = false
			return !NewConn(c, Limits{}).quiet()
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
}

func (c *Conn) quiet() bool { return !c.Stale() }

func TestLingerKeepsTheViews(t *testing.T) {
	client, server := meshtest.TCP(t)
	c, r := NewConn(server, Limits{}), new(Request)
	_, _ = io.WriteString(client, "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9000\r\n\r\n"+strings.Repeat("y", 9000))
	if err := c.ReadRequest(r); err != nil {
		t.Fatal(err)
	}
	client.Close()
	_ = c.Linger()
	if string(r.Path) != "/x" || r.Verb() != "POST" {
		t.Errorf("after Linger the request reads %q %q", r.Method, r.Path)
	}
}

func TestLingerLetsTheAnswerArrive(t *testing.T) {
	client, server := meshtest.TCP(t)
	go func() {
		c := NewConn(server, Limits{})
		r := new(Request)
		_ = c.ReadRequest(r)
		_, _ = c.WriteError(nil, 400, nil, []byte("{}"))
		_ = c.Linger()
	}()
	_, _ = io.WriteString(client, "BAD\r\n\r\n"+strings.Repeat("x", 100<<10))
	resp, err := http.ReadResponse(bufio.NewReader(client), nil)
	if err != nil || resp.StatusCode != 400 {
		t.Fatalf("%v, %v", resp, err)
	}
}

// A silent is a connection that waits without memory, on which nothing comes.
type silent struct{ net.Conn }

func (silent) Await() error                    { return os.ErrDeadlineExceeded }
func (silent) CloseWrite() error               { return nil }
func (silent) Close() error                    { return nil }
func (silent) SetReadDeadline(time.Time) error { return nil }
func (silent) Read([]byte) (int, error)        { panic("a buffer was taken to wait with") }

func TestLingerWaitsWithoutMemory(t *testing.T) {
	if err := NewConn(silent{}, Limits{}).Linger(); err != nil {
		t.Error(err)
	}
}
