package test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// How many connections TestCrowd opens. Those at a door of mutual TLS cost a
// handshake each, so that a bench has ten thousand there, too.
const (
	crowdOut, slowOut   = 9000, 1000
	crowdIn, slowIn     = 1000, 1000
	crowdGate, slowGate = 500, 500
	// roomOut is how many connections payment's sidecar takes.
	roomOut = crowdOut + slowOut + 100
	// plainKB and tlsKB are what a connection at rest may cost a sidecar, or a
	// gateway.
	plainKB, tlsKB = 16, 64
)

// TestCrowd has ten thousand connections at rest and a thousand heads that never
// end at the outbound door of a sidecar, and many at an inbound door and at a
// gateway: calls go on, memory stays within its budget, who is beyond a limit is
// turned away and counted, and afterwards everything is as before.
func TestCrowd(t *testing.T) {
	t.Parallel()
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil || files.Max < 2*roomOut-8000 {
		meshtest.Unable(t, fmt.Sprintf("%d files may be open (%v), which is not enough", files.Max, err))
	}
	s := newStrictRig(t, fmt.Sprintf("limits: {connections: %d, peer_connections: 4000, idle_timeout: 3m, head_timeout: 3m}\n", roomOut))
	gateway := freePort(t)
	s.w.write("gateway", s.w.proxyConfig("gateway", s.w.token("gateway"))+fmt.Sprintf("limits: {idle_timeout: 3m, head_timeout: 3m}\nlisten: %s\nresolvers: [%q]\n", gateway, freePort(t)))
	gate := s.w.start("gateway", nil, "gateway", "run", "--config", s.w.path("gateway", "config.yaml"))
	s.w.awaitReady(gate)
	procs := map[string]*proc{"payment": s.payment.proc, "billing": s.billing, "gateway": gate}
	before := map[string]int{}
	for n, p := range procs {
		before[n] = resident(t, p)
	}
	c := &mob{t: t, tls: s.tls}
	defer c.leave()
	c.come(crowdOut, s.pay.out, false, "")
	c.come(slowOut, s.pay.out, false, "GET http://billing.mesh.internal"+strictPath+" HTTP/1.1\r\nHost: billing.mesh.")
	c.come(crowdIn, s.bill.in, true, "")
	c.come(slowIn, s.bill.in, true, "GET "+strictPath+" HTTP/1.1\r\nHost: billing.mesh.")
	c.come(crowdGate, gateway, true, "")
	c.come(slowGate, gateway, true, "CONNECT api.stripe.test:443 HTTP/1.1\r\nHost: api.stri")

	got := ask[loadReply](s.payment, "/load", loadRequest{URL: "http://billing.mesh.internal" + againPath, For: time.Second, Every: 4 * time.Millisecond})
	if got.OK != got.Made || got.OK == 0 {
		t.Errorf("%d of %d calls were answered", got.OK, got.Made)
	}
	for n, kb := range map[string]int{"payment": (crowdOut + slowOut) * plainKB, "billing": (crowdIn + slowIn) * tlsKB, "gateway": (crowdGate + slowGate) * tlsKB} {
		if held := resident(t, procs[n]) - before[n]; held > kb<<10 {
			t.Errorf("%s holds %d MB for the crowd, want at most %d MB", n, held>>20, kb>>10)
		}
	}
	c.come(200, s.pay.out, false, "")
	c.come(100, gateway, true, "")
	for series, least := range map[string]float64{
		`sallyport_connections_refused_total{reason="total",reporter="outbound"} payment`: 100,
		`sallyport_connections_refused_total{reason="peer",reporter="gateway"} gateway`:   50,
	} {
		series, name, _ := strings.Cut(series, " ")
		s.w.await(series, func() bool { return s.w.value(name, series) >= least })
	}
	c.leave()
	for _, d := range []struct{ name, reporter string }{{"payment", "outbound"}, {"billing", "inbound"}, {"gateway", "gateway"}} {
		s.w.await(d.name+" at rest", func() bool {
			return s.w.value(d.name, fmt.Sprintf(`sallyport_connections{reporter=%q,state="open"}`, d.reporter)) < 50
		})
	}
	// Who breaks off so many at once may have to wait, and the crowd had the SVID of
	// payment.
	s.w.await("calls are answered afterwards", func() bool {
		got := ask[loadReply](s.payment, "/load", loadRequest{URL: "http://billing.mesh.internal" + againPath, For: 200 * time.Millisecond, Every: 4 * time.Millisecond})
		return got.OK == got.Made && got.OK > 0
	})
}

// A mob is connections that do nothing good.
type mob struct {
	t   *testing.T
	tls *tls.Config

	mu   sync.Mutex // guards here
	here []net.Conn
}

// come opens connections, some at a time, and says something on each. What the
// other end thinks of it is seen elsewhere.
func (m *mob) come(n int, addr string, secure bool, say string) {
	m.t.Helper()
	turns := make(chan struct{}, n)
	for range n {
		turns <- struct{}{}
	}
	close(turns)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range turns {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					m.t.Errorf("a connection to %s: %v", addr, err)
					return
				}
				m.mu.Lock()
				m.here = append(m.here, c)
				m.mu.Unlock()
				if secure {
					_ = c.SetDeadline(time.Now().Add(within))
					c = tls.Client(c, m.tls)
					_ = c.(*tls.Conn).Handshake() // it may be turned away
				}
				_, _ = io.WriteString(c, say)
			}
		})
	}
	all.Wait()
}

func (m *mob) leave() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.here {
		c.Close()
	}
	m.here = nil
}

// value is that of a metric of a process; 0 when there is none.
func (w *world) value(name, series string) float64 {
	for line := range strings.Lines(w.metrics(name)) {
		if v, ok := strings.CutPrefix(line, series+" "); ok {
			f, _ := strconv.ParseFloat(strings.TrimSpace(v), 64)
			return f
		}
	}
	return 0
}

var residentLine = regexp.MustCompile(`VmRSS:\s+(\d+) kB`)

// resident is the memory that a process has now.
func resident(t *testing.T, p *proc) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	m := residentLine.FindSubmatch(b)
	if m == nil {
		t.Fatalf("no size in %s", b)
	}
	kb, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return kb << 10
}
