package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/upstream"
)

// lending is what it costs to be lent a connection that is kept and to give it
// back: from a pool alone, and from a service with a breaker, a budget of retries,
// a balancer and ejection, which are told what became of the call. The difference
// is what these add. The clock is read once for each, as a proxy has read it when a
// call comes and when its answer begins.
func lending() (out []part) {
	var at time.Time
	out = append(out, part{name: "pool", run: func(b *testing.B) {
		p := upstream.NewLocal(listen(b, 1)[0], http1.Limits{})
		defer p.Close()
		for b.Loop() {
			at = time.Now()
			c, err := p.Get(b.Context(), false)
			if err != nil {
				b.Fatal(err)
			}
			c.Put()
		}
	}, free: true})
	for _, n := range []int{1, 3, 16} {
		out = append(out, part{name: fmt.Sprintf("breaker_budget_balancer_pool_%d", n), over: "pool", run: func(b *testing.B) {
			s, err := service(listen(b, n))
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			want, ctx := &upstream.Want{Service: "billing"}, context.Background()
			for b.Loop() {
				at = time.Now()
				want.At = at
				c, err := s.Lend(ctx, want)
				if err != nil {
					b.Fatal(err)
				}
				c.Report(upstream.OK, at, 0)
				c.Put()
			}
		}, free: true})
	}
	return out
}

// service has endpoints that speak in the clear, as one without an identity does.
func service(at []netip.AddrPort) (*upstream.Services, error) {
	s, err := upstream.New(upstream.Config{
		TLS:        func(spiffeid.ID) *tls.Config { return nil },
		Generation: func() uint64 { return 0 }, Standing: func(tls.ConnectionState) error { return nil },
	})
	if err != nil {
		return nil, err
	}
	snap := &mesh.Snapshot{
		Services: []mesh.Service{{Name: "billing"}},
		Routes:   []mesh.Routes{{Service: "billing", Breaker: &mesh.Breaker{Success: 9000}, Outlier: &mesh.Outlier{}}},
	}
	for _, a := range at {
		snap.Endpoints = append(snap.Endpoints, mesh.Endpoint{Service: "billing", Address: a})
	}
	s.Use(snap)
	return s, nil
}

// listen takes connections at n addresses and keeps them.
func listen(b *testing.B, n int) (at []netip.AddrPort) {
	b.Helper()
	for i := range n {
		ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.%d:0", i+1))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				b.Cleanup(func() { c.Close() })
			}
		}()
		at = append(at, ln.Addr().(*net.TCPAddr).AddrPort())
	}
	return at
}
