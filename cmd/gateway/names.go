package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport/internal/egress"
	"sallyport/internal/nameserver"
	"sallyport/internal/svid"
	"sallyport/internal/virtual"
)

// openNames makes what answers DNS questions, if anything does.
func (gw *gateway) openNames() error {
	c := gw.cfg.Names
	if !c.enabled() {
		return nil
	}
	book, err := virtual.Open(filepath.Join(gw.cfg.DataDir, "addresses.json"), c.Virtual, c.Virtual6)
	if err != nil {
		return err
	}
	gw.shift.Doors.Beside(func(held bool) {
		pass := book.Adopt
		if held {
			pass = book.Yield
		}
		if err := pass(); err != nil {
			gw.log.Error("virtual addresses are not handed over; programs may have to look names up again", "err", err)
		}
	})
	gw.names, err = nameserver.New(nameserver.Config{
		Book: book, Record: gw.audit.Append, Log: gw.log, Metrics: gw.metrics, Tracer: gw.tracer, PerPattern: c.PerPattern, Label: c.Label, Rate: c.Rate, Real: gw.realAddresses,
	})
	return err
}

// realTime is for how long a host's addresses may be remembered. They are looked
// up and screened anew when they are dialled.
const realTime = 30 * time.Second

// realAddresses are those that the gateway would dial itself.
func (gw *gateway) realAddresses(ctx context.Context, who spiffeid.ID, name string) ([]netip.Addr, time.Duration, error) {
	addrs, err := gw.egress.Addresses(ctx, who, name)
	var ref *egress.Refusal
	switch {
	case errors.Is(err, egress.ErrNoHost):
		return nil, 0, fmt.Errorf("%w: %w", nameserver.ErrAbsent, err)
	case errors.As(err, &ref) && ref.Reason == egress.ReasonBudget:
		return nil, 0, fmt.Errorf("%w: %w", nameserver.ErrBudget, err)
	}
	return addrs, realTime, err
}

// serveNames opens the doors for questions and answers until ctx ends.
func (gw *gateway) serveNames(ctx context.Context, g *errgroup.Group) error {
	if gw.names == nil {
		return nil
	}
	standing := gw.agent.Source().Standing
	for _, d := range []struct {
		field, addr string
		serve       func(net.Listener) error
	}{
		{"names.dot", gw.cfg.Names.DoT, func(ln net.Listener) error {
			return gw.names.ServeTLS(ctx, ln, svid.ServerTLS(gw.agent.Source(), gw.member, nameserver.DoT), standing)
		}},
		{"names.doh", gw.cfg.Names.DoH, func(ln net.Listener) error {
			return gw.names.ServeHTTPS(ctx, ln, svid.ServerTLS(gw.agent.Source(), gw.member), standing)
		}},
	} {
		if d.addr == "" {
			continue
		}
		ln, err := gw.shift.Doors.TCP(d.field, d.addr)
		if err != nil {
			return err
		}
		g.Go(func() error { return d.serve(ln) })
	}
	g.Go(func() error { return gw.names.Run(ctx) })
	return nil
}
