package proxy

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"

	"sallyport/internal/meshtest"
)

// One percent of the calls is one percent of them, to a fifth of a percent of
// 100,000 that really pass.
func TestOnePercentOfTheCalls(t *testing.T) {
	n, near := 100_000, 0.002
	if meshtest.Race {
		n, near = 5_000, 0.01
	}
	r := routed(t, `routes:
  - name: canary
    backends: [{service: inventory, weight: 9900}, {weight: 100}]
`, func(r *rig) { r.access = bothCSV })
	const conns = 16
	var elsewhere atomic.Int64 // at inventory, where nobody answers
	var all sync.WaitGroup
	fails := make(chan error, conns)
	for range conns {
		all.Go(func() {
			m, err := refusedOf(r.outAddr, n/conns)
			if elsewhere.Add(m); err != nil {
				fails <- err
			}
		})
	}
	all.Wait()
	close(fails)
	for err := range fails {
		t.Error(err)
	}
	part := 1 - float64(elsewhere.Load())/float64(n/conns*conns)
	t.Logf("%.3f %% of %d calls went to the canary", 100*part, n)
	if math.Abs(part-0.01) > near {
		t.Errorf("%.3f %% of the calls went to the canary, want 1 %%", 100*part)
	}
}

// refusedOf makes n calls and says how many were answered with 503, all others
// with 200.
func refusedOf(addr string, n int) (refused int64, err error) {
	var c net.Conn
	var in *bufio.Reader
	for range n {
		if c == nil {
			if c, err = net.Dial("tcp", addr); err != nil {
				return refused, err
			}
			in = bufio.NewReader(c)
		}
		_, err := io.WriteString(c, "GET http://billing.mesh.internal/ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")
		if err != nil {
			return refused, err
		}
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			return refused, err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		switch {
		case err != nil:
			return refused, err
		case resp.StatusCode == http.StatusServiceUnavailable && resp.Header.Get("Sallyport-Refused") == "no_endpoint":
			refused++
		case resp.StatusCode != http.StatusOK:
			return refused, fmt.Errorf("a call was answered with %s", resp.Status)
		}
		if resp.Close {
			if err := c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
				return refused, err
			}
			c = nil
		}
	}
	if c != nil {
		return refused, c.Close()
	}
	return refused, nil
}
