package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"syscall"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control"
	"sallyport/internal/mesh"
	"sallyport/internal/proxy"
	"sallyport/internal/upstream"
)

// changed tells the operator, in the log and the metrics, of an endpoint that is
// put aside and of a service that is cut off or served again.
func (s *sidecar) changed(t upstream.Trouble) {
	switch t.Kind {
	case upstream.Ejected:
		s.metrics.Ejections(t.Dst, t.Cause).Inc()
		s.log.Warn("endpoint put aside", "service", t.Service, "address", t.Address, "until", t.Until, "why", t.Why)
	case upstream.Unhealthy:
		s.log.Warn("endpoint does not answer its health check", "service", t.Service, "address", t.Address, "why", t.Why)
	case upstream.Healthy:
		s.log.Info("endpoint answers its health check again", "service", t.Service, "address", t.Address)
	case upstream.Open:
		s.metrics.BreakerOpen(t.Dst).Set(1)
		s.log.Warn("service cut off", "service", t.Service, "why", t.Why)
	case upstream.Closed:
		s.metrics.BreakerOpen(t.Dst).Set(0)
		s.log.Info("service is called again", "service", t.Service)
	}
}

// dialled counts the connections that are made to others.
func (s *sidecar) dialled(to spiffeid.ID, err error) {
	result := "ok"
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		result = "timeout"
	case errors.Is(err, syscall.ECONNREFUSED):
		result = "refused"
	case err != nil:
		result = "failed"
	}
	s.metrics.UpstreamConnects(to.String(), result).Inc()
}

// samples are the calls of rollouts that the issuer judges.
func (s *sidecar) samples() []mesh.Sample {
	if out := s.outbound.Load(); out != nil {
		return out.Samples()
	}
	return nil
}

// troubles are what this proxy holds against services now.
func (s *sidecar) troubles() []upstream.Trouble {
	return append(s.services.Troubles(), s.streams.Troubles()...)
}

// steering is what the issuer learns of the calls that pass here, and what it has
// to say of them.
func (s *sidecar) steering() *control.Steering {
	return &control.Steering{Traffic: s.traffic, Stop: s.heed, Share: func(totals []mesh.Total) {
		if out := s.outbound.Load(); out != nil {
			out.Share(totals)
		}
	}}
}

func (s *sidecar) traffic() *mesh.Traffic {
	t := &mesh.Traffic{}
	for _, x := range s.troubles() {
		t.Ejections = append(t.Ejections, mesh.Ejection{Service: x.Service, Address: x.Address, Kind: x.Kind, Since: x.Since.UTC(), Why: x.Why})
	}
	if out := s.outbound.Load(); out != nil {
		t.Demands = out.Demands()
	}
	return t
}

// heed stops faults. What is said before there is a way out is kept for it.
func (s *sidecar) heed(stops *mesh.FaultStops) {
	s.stops.Store(stops)
	if out := s.outbound.Load(); out != nil {
		out.Heed(stops)
	}
}

func (s *sidecar) serveTroubles(w http.ResponseWriter, _ *http.Request) {
	list := s.troubles()
	if list == nil {
		list = []upstream.Trouble{}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(list) // whoever asked has gone
}

// stopFaults is the switch for whoever is paged: no policy need be pushed.
func (s *sidecar) stopFaults(w http.ResponseWriter, _ *http.Request) {
	n := 0
	if out := s.outbound.Load(); out != nil {
		n = out.StopFaults()
	}
	s.log.Warn("faults stopped by hand", "faults", n)
	fmt.Fprintf(w, "%d faults stopped; none begins before the sidecar is started again\n", n)
}

// gatewaySnapshot puts the configured gateways into the form of endpoints.
func gatewaySnapshot(c EgressConfig) *mesh.Snapshot {
	snap := &mesh.Snapshot{Services: []mesh.Service{{Name: proxy.GatewayName, ID: c.Gateway}}}
	for _, a := range c.Addresses {
		snap.Endpoints = append(snap.Endpoints, mesh.Endpoint{Service: proxy.GatewayName, Address: a})
	}
	return snap
}

// advertised is where peers reach this sidecar.
func (s *sidecar) advertised() netip.AddrPort {
	in := s.cfg.Inbound
	if in.Advertise.IsValid() || in.Listen == "" {
		return in.Advertise
	}
	a, err := netip.ParseAddrPort(in.Listen)
	if err != nil || a.Addr().IsUnspecified() {
		return netip.AddrPort{}
	}
	return a
}
