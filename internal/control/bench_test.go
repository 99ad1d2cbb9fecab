package control

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"sallyport/internal/mesh"
)

// stamped is a Handler that says when a snapshot arrived.
type stamped chan time.Time

func (s stamped) OnSnapshot(context.Context, *mesh.Snapshot) error  { s <- time.Now(); return nil }
func (s stamped) OnCandidate(context.Context, *mesh.Snapshot) error { return nil }

func (s stamped) OnSyncNow(context.Context)                     {}
func (s stamped) OnRevoked(context.Context, []mesh.RevokedSVID) {}

// BenchmarkPush measures from a change in the registry to its arrival at the
// last of 100 subscribers on one mutual TLS connection.
func BenchmarkPush(b *testing.B) {
	const n = 100
	r := newRig(b, newCA(b, td), func(c *ServerConfig) { c.StreamsPerAgent = n })
	go func() {
		for range r.reg.reported {
		}
	}()
	c, _ := r.joined("node-b")
	ctx, cancel := context.WithCancel(context.Background())
	got := make(stamped, n)
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() { _ = c.Subscribe(ctx, Hello{Kind: KindSidecar, Workload: billing}, got) })
	}
	defer wg.Wait()
	defer cancel()
	for range n {
		<-got
	}
	verbs := []string{"GET", "POST"}
	var took []time.Duration
	rev := uint64(10)
	for b.Loop() {
		rev++
		next := snapshot(b, rev, rev, verbs[rev%2])
		t0 := time.Now()
		r.reg.change(func() { r.reg.snap = next })
		for range n {
			took = append(took, (<-got).Sub(t0))
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
}

// BenchmarkFetchSet is what a proxy that pins keys costs its issuer, and itself,
// for each push.
func BenchmarkFetchSet(b *testing.B) {
	for _, size := range []int{200 << 10, maxSet} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			all := sets{"a": bytes.Repeat([]byte("x"), size)}
			r := newRig(b, newCA(b, td), all.with)
			c, _ := r.joined("node-b")
			l, err := c.acquire()
			if err != nil {
				b.Fatal(err)
			}
			defer c.release(l)
			h := billingHello()
			b.SetBytes(int64(size))
			for b.Loop() {
				r.srv.work.mu.Lock()
				r.srv.work.left = nil // what a node may ask for is not what is measured
				r.srv.work.mu.Unlock()
				if _, err := c.fetchSet(b.Context(), l, &h, "a"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
