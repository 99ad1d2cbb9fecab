package test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestDrain ends one of two instances of everything under load, and starts it
// again, several times: nothing fails.
func TestDrain(t *testing.T) {
	t.Parallel()
	s := newStage(t, time.Minute, "billing-2", "inventory-2", "gateway-2")
	s.await("every way", func() bool { return s.reaches() })
	done := s.load()
	drains := 0
	for range 2 {
		for _, n := range []string{"billing", "inventory", "gateway", "billing-2", "inventory-2", "gateway-2"} {
			if code := s.procs[n].stop(); code != 0 {
				t.Errorf("%s ended with status %d:\n%s", n, code, s.procs[n].out)
			}
			drains++
			s.begin(n)
			s.awaitReady(s.procs[n])
			s.await("know "+n+" again", func() bool { return s.reaches() })
		}
	}
	all := done()
	t.Logf("%d drains", drains)
	noneFailed(t, all)
}

// A drain goes through its steps in order: what is ready no more still serves,
// then nothing new is taken, and what is open may end by itself.
func TestDrainStepByStep(t *testing.T) {
	t.Parallel()
	s := newStage(t, time.Minute)
	s.await("every way", func() bool { return s.reaches() })
	admin := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", s.path("payment", "run", "admin.sock"))
	}}}
	defer admin.CloseIdleConnections() // its connection stays open all the while
	ready := func() bool {
		resp, err := admin.Get("http://admin/readyz")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		_, _ = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode == http.StatusOK
	}
	restart := func(drain string) {
		s.procs["payment"].stop()
		conf := s.proxyConfig("payment", "")
		s.write("payment", strings.Replace(conf, "drain: {timeout: 25s, outbound: 3s}", "drain: "+drain, 1)+fmt.Sprintf("outbound:\n  listen: %s\n  upstreams:\n    - {service: inventory, listen: %q}\n", s.out, s.stream))
		s.begin("payment")
		s.awaitReady(s.procs["payment"])
		s.await("the way to inventory", func() bool { return s.useStream(0) == nil })
	}
	open := func() (net.Conn, *bufio.Reader) {
		t.Helper()
		c, err := net.Dial("tcp", s.stream)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(within))
		r := bufio.NewReader(c)
		speaks(t, c, r)
		return c, r
	}

	t.Run("it serves on while others hear that it is not ready", func(t *testing.T) {
		restart("{wait: 1h, timeout: 1m, outbound: 1ms}")
		c, r := open()
		p := s.procs["payment"]
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		s.await("be ready no more", func() bool { return !ready() })
		speaks(t, c, r)
		if err := s.useStream(0); err != nil {
			t.Errorf("a new stream while it waits: %v", err)
		}
		_ = p.cmd.Process.Signal(syscall.SIGTERM) // now
		if code := p.end(); code != 0 {
			t.Errorf("the second signal ended it with status %d", code)
		}
		if _, err := r.ReadByte(); err == nil {
			t.Error("the stream outlived the process")
		}
	})
	t.Run("it takes nothing new while what is open ends", func(t *testing.T) {
		restart("{timeout: 1h, outbound: 1ms}")
		c, r := open()
		p := s.procs["payment"]
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		s.await("close its port", func() bool {
			c, err := net.Dial("tcp", s.stream)
			if err == nil {
				c.Close()
			}
			return err != nil
		})
		speaks(t, c, r)
		select {
		case <-p.done:
			t.Error("it ended with a stream open")
		default:
		}
		c.Close()
		if code := p.end(); code != 0 {
			t.Errorf("it ended with status %d", code)
		}
	})
	t.Run("a second signal cuts what is open", func(t *testing.T) {
		restart("{timeout: 1h, outbound: 1h}")
		_, r := open()
		p := s.procs["payment"]
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		s.await("be ready no more", func() bool { return !ready() })
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		if code := p.end(); code != 0 {
			t.Errorf("it ended with status %d", code)
		}
		if _, err := r.ReadByte(); err == nil {
			t.Error("the stream outlived the process")
		}
	})
	t.Run("the way out stays open until the application has closed its connections", func(t *testing.T) {
		restart("{timeout: 1h, outbound: 1h}")
		c, r := open()
		p := s.procs["payment"]
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		s.await("be ready no more", func() bool { return !ready() })
		if err := s.useStream(0); err != nil {
			t.Errorf("a new stream of an application that is not done: %v", err)
		}
		speaks(t, c, r)
		c.Close()
		if code := p.end(); code != 0 {
			t.Errorf("it ended with status %d", code)
		}
	})
	t.Run("POST /drain is the first signal", func(t *testing.T) {
		restart("{timeout: 1h, outbound: 1h}")
		c, r := open()
		resp, err := admin.Post("http://admin/drain", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		s.await("be ready no more", func() bool { return !ready() })
		speaks(t, c, r)
		c.Close()
		if code := s.procs["payment"].end(); code != 0 {
			t.Errorf("it ended with status %d", code)
		}
	})
}

// speaks says a line on a stream and hears it again.
func speaks(t *testing.T, c net.Conn, r *bufio.Reader) {
	t.Helper()
	if _, err := io.WriteString(c, "still here\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := r.ReadString('\n'); err != nil || line != "still here\n" {
		t.Fatalf("the stream says %q, %v", line, err)
	}
}

// A connection is told of the drain by the answer to a call: no request meets one
// that closes.
func TestDrainTellsIdleConnections(t *testing.T) {
	t.Parallel()
	s := newStage(t, time.Minute)
	s.await("every way", func() bool { return s.reaches() })
	through := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: s.out}), MaxConnsPerHost: 1}
	defer through.CloseIdleConnections()
	c := &http.Client{Transport: through, Timeout: within}
	call := func() (closes bool) {
		resp, err := c.Post("http://billing.mesh.internal/v1/charges", "text/plain", strings.NewReader("x"))
		if err := answered(resp, err); err != nil {
			t.Fatal(err)
		}
		return resp.Close
	}
	if call() {
		t.Error("the connection ends before the drain")
	}
	p := s.procs["payment"]
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	calls := 0
	s.await("hear of the end", func() bool { calls++; return call() })
	t.Logf("%d calls after the signal, 0 failed", calls)
	if code := p.end(); code != 0 {
		t.Errorf("it ended with status %d", code)
	}
}
