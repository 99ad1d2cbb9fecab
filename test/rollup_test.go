package test

import (
	"bufio"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/audit"
)

// A tallyman calls billing on one connection after the other and counts what it
// was answered.
type tallyman struct {
	*thief
	addr     string
	made     int
	answered map[string]uint64 // by "allow 2xx" and "deny 4xx"
}

// once makes a call, every tenth of which is refused, on the connection given or
// a new one. It gives the connection back while that is good.
func (c *tallyman) once(conn net.Conn, br *bufio.Reader) (net.Conn, *bufio.Reader) {
	if conn == nil {
		var err error
		if conn, err = c.dial(c.addr); err != nil {
			return nil, nil
		}
		br = bufio.NewReader(conn)
	}
	path, class := fmt.Sprintf("/v1/charges/%d", c.made), "allow 2xx"
	if c.made%10 == 9 {
		path, class = "/v1/nothing", "deny 4xx"
	}
	c.made++
	status, err := call(conn, br, "GET "+path+" HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n", "GET")
	if err != nil {
		conn.Close()
		return nil, nil
	}
	if want := class[len(class)-len("4xx"):]; audit.Class(status) != want {
		c.w.t.Errorf("%s got status %d, want %s", path, status, want)
	}
	c.answered[class]++
	return conn, br
}

// tally has callers call at once until stop, and adds up what they counted.
func (w *world) tally(caller *thief, addr string, callers int, stop func(answered uint64) bool) (made int, answered map[string]uint64) {
	var wg sync.WaitGroup
	var n atomic.Uint64
	all := make([]*tallyman, callers)
	for i := range all {
		c := &tallyman{thief: caller, addr: addr, answered: map[string]uint64{}}
		all[i] = c
		wg.Go(func() {
			var conn net.Conn
			var br *bufio.Reader
			for !stop(n.Load()) {
				if conn, br = c.once(conn, br); conn == nil {
					return // the sidecar is gone
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	answered = map[string]uint64{}
	for _, c := range all {
		made += c.made
		for class, n := range c.answered {
			answered[class] += n
		}
	}
	return made, answered
}

// requestMetric reads how many calls a sidecar has counted on the way in, as
// the audit names them.
func (w *world) requestMetric(name string) map[string]uint64 {
	w.t.Helper()
	out := map[string]uint64{}
	for line := range strings.Lines(w.metrics(name)) {
		if !strings.HasPrefix(line, "sallyport_requests_total{") || !strings.Contains(line, `reporter="inbound"`) {
			continue
		}
		_, value, _ := strings.Cut(strings.TrimSpace(line), "} ")
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil {
			w.t.Fatal(err)
		}
		switch {
		case strings.Contains(line, `code="200"`):
			out["allow 2xx"] += n
		case strings.Contains(line, `code="403"`):
			out["deny 4xx"] += n
		default:
			w.t.Errorf("calls that nobody made: %s", line)
		}
	}
	return out
}

// awaitMetric is requestMetric once it counts as many: a call counts when it has
// been answered.
func (w *world) awaitMetric(name string, want map[string]uint64) (got map[string]uint64) {
	w.t.Helper()
	w.await("see the metric count every call", func() bool {
		got = w.requestMetric(name)
		return got["allow 2xx"] >= want["allow 2xx"] && got["deny 4xx"] >= want["deny 4xx"]
	})
	return got
}

// rollups adds up the roll-ups in a log, and the records that stand for
// themselves.
func (w *world) rollups(name string) map[string]uint64 {
	w.t.Helper()
	out := map[string]uint64{}
	err := audit.Each(w.path(name, "audit.jsonl"), func(_ []byte, r *audit.Record) error {
		switch {
		case r.Kind == audit.KindRollup && r.Detail == "":
			out[r.Decision+" "+r.Class] += r.Count
		case r.Kind == audit.KindDecision && r.Count > 0:
			w.t.Errorf("a call was not rolled up: %+v", r)
		case r.Kind == audit.KindGap:
			w.t.Errorf("a gap: %+v", r)
		}
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

// TestRollupsAreTheRequests has many callers call at once, kills the sidecar in
// the middle with SIGKILL, and holds the audit to the metric and to what the
// callers counted.
func TestRollupsAreTheRequests(t *testing.T) {
	t.Parallel()
	const callers, calls = 8, 4000
	w := newWorld(t, 10*time.Minute)
	w.startIssuer()
	bill := &node{name: "billing"}
	w.join(bill)
	billing := w.startNode(bill)
	w.awaitSynced(1)
	caller := w.steal("payment")
	until := func(n uint64) func(uint64) bool { return func(done uint64) bool { return done >= n } }

	// The first life, as far as it is quiet: nobody has counted otherwise.
	_, quiet := w.tally(caller, bill.in, callers, until(calls))
	same(t, "the metric of the first life", w.awaitMetric("billing", quiet), quiet)

	// And its end: each caller may have been in the middle of a call.
	kill := sync.OnceFunc(func() { _ = billing.cmd.Process.Kill() })
	made, cut := w.tally(caller, bill.in, callers, func(done uint64) bool {
		if done > calls/2 {
			kill()
		}
		return false
	})
	billing.kill()
	w.write(bill.name, w.sidecarConfig(bill, ""))
	billing = w.startNode(bill)
	first := w.rollups("billing") // a start tells what was left
	made += int(quiet["allow 2xx"] + quiet["deny 4xx"])
	answered, sum := uint64(0), uint64(0)
	for _, class := range []string{"allow 2xx", "deny 4xx"} {
		n := quiet[class] + cut[class]
		answered += n
		had := first[class]
		if class == "allow 2xx" {
			had += first["allow lost"] // answered, and not yet noted how
		}
		if had < n || had > n+callers {
			t.Errorf("%s: %d in the audit, callers were answered %d", class, had, n)
		}
	}
	for _, n := range first {
		sum += n
	}
	if sum > uint64(made) || first["allow lost"] > callers {
		t.Errorf("%d calls in the audit (%v), %d were made", sum, first, made)
	}
	t.Logf("killed: %d calls made, %d answered, %d in the audit: %v", made, answered, sum, first)

	// The second life.
	_, second := w.tally(caller, bill.in, callers, until(calls))
	metric := w.awaitMetric("billing", second)
	billing.stop() // in order, and so everything is told
	told := w.rollups("billing")
	for class := range first {
		if told[class] -= first[class]; told[class] == 0 {
			delete(told, class)
		}
	}
	same(t, "the metric of the second life", metric, second)
	same(t, "the audit of the second life", told, second)
	t.Logf("after it: the callers counted %v, the metric %v, the audit %v", second, metric, told)
	w.startNode(bill) // which brings the rest to the issuer
	w.awaitVerified(w.path("billing", "audit.jsonl"))
}

func same(t *testing.T, what string, got, want map[string]uint64) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}
