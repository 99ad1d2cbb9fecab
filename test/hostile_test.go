package test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"
)

// hostile tells what TestUnderAttack measured; it is printed with the others.
var hostile = &conformSum{conformResult: conformResult{Name: "under attack", OK: true, Figures: map[string]float64{}}}

const (
	slowClients = 1000
	deafClients = 20
	resets      = 500
	// mostMemory is what billing's sidecar may hold while they are there: some
	// 60 KB for each connection of TLS, and what it needs itself.
	mostMemory = 256 << 20
)

// TestUnderAttack has a peer with an SVID do what it can to a sidecar: hold a
// thousand connections with heads that never end, ask for much and read none of
// it, and reset connections in bursts. Beside that a workload goes on calling.
func TestUnderAttack(t *testing.T) {
	t.Parallel()
	s := newStrictRig(t, "limits: {idle_timeout: 1m, head_timeout: 1m}\n")
	s.app.expect(strictCase{answer: "HTTP/1.1 200 OK\r\nContent-Length: 20000000\r\n\r\n" + string(make([]byte, 20_000_000))})
	calls := func(what string) []time.Duration {
		t.Helper()
		got := ask[loadReply](s.payment, "/load", loadRequest{URL: "http://billing.mesh.internal" + againPath, For: 2 * time.Second, Every: 4 * time.Millisecond})
		if got.OK != got.Made || got.OK == 0 {
			t.Errorf("%s: %d of %d calls were answered", what, got.OK, got.Made)
		}
		hostile.tell(got)
		slices.Sort(got.Took)
		return got.Took
	}
	before := calls("before")

	var open sync.WaitGroup
	done := make(chan struct{})
	defer open.Wait()
	defer close(done)
	hold := func(say string) error {
		c, err := tls.Dial("tcp", s.bill.in, s.tls)
		if err != nil {
			return err
		}
		open.Go(func() { <-done; c.Close() })
		_, err = io.WriteString(c, say)
		return err
	}
	for range slowClients {
		if err := hold("GET " + strictPath + " HTTP/1.1\r\nHost: billing.mesh."); err != nil {
			t.Fatalf("a slow client: %v", err)
		}
	}
	slow := calls("with slow clients")
	for range deafClients {
		if err := hold(strictGet("")[0]); err != nil {
			t.Fatalf("a client that reads nothing: %v", err)
		}
	}
	deaf := calls("with clients that read nothing")
	open.Go(func() { s.reset(t, done) })
	reset := calls("in a burst of resets")

	most := s.w.residentMost(t, s.billing)
	hostile.figure("billing_rss_mb", float64(most>>20))
	if most > mostMemory {
		t.Errorf("the sidecar held %d MB, want at most %d", most>>20, mostMemory>>20)
	}
	for name, took := range map[string][]time.Duration{"before": before, "slow": slow, "deaf": deaf, "reset": reset} {
		for _, p := range []int{50, 99} {
			hostile.figure(fmt.Sprintf("%s_p%d_ms", name, p), float64(took[len(took)*p/100].Microseconds())/1000)
		}
	}
}

// reset makes connections and resets them, with half a request sent.
func (s *strictRig) reset(t *testing.T, done <-chan struct{}) {
	for range resets {
		select {
		case <-done:
			return
		default:
		}
		raw, err := net.Dial("tcp", s.bill.in)
		if err != nil {
			t.Errorf("a connection to reset: %v", err)
			return
		}
		_ = raw.(*net.TCPConn).SetLinger(0)
		c := tls.Client(raw, s.tls)
		_, _ = io.WriteString(c, strictPost("Content-Length: 100000\r\n", "a")[0])
		raw.Close()
	}
}

// tell counts the calls of a load.
func (s *conformSum) tell(r loadReply) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.OK = s.OK && r.OK == r.Made
	s.Cases.Tried += r.Made
	s.Cases.Passed += r.OK
	s.Cases.Failed += r.Made - r.OK
}

func (s *conformSum) figure(name string, v float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Figures[name] = v
}

var peakLine = regexp.MustCompile(`VmHWM:\s+(\d+) kB`)

// residentMost is the most memory that a process has had.
func (w *world) residentMost(t *testing.T, p *proc) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	m := peakLine.FindSubmatch(b)
	if m == nil {
		t.Fatalf("no peak in %s", b)
	}
	kb, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return kb << 10
}
