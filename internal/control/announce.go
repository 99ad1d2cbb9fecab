package control

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"

	"sallyport/internal/mesh"
)

// An Announcement is an endpoint that was refused for its address, for the audit.
type Announcement struct {
	Agent, Workload spiffeid.ID
	Service         mesh.ServiceName
	Address         netip.AddrPort
	// Peer is the remote address of who announced it.
	Peer string
}

// mayStand says whether an endpoint may stand at ip that is announced over a
// connection from another address. Callers go where they are told: an endpoint
// at somebody else's address would have them knock there, though they tell it
// nothing. So a proxy may only name the address that it is seen to come from, or
// one that the operator allows. Who comes from the issuer's own machine may name
// any address of this machine.
//
// A loopback address is another machine at each machine: only the issuer's own
// may name one, whatever is allowed.
func (s *Server) mayStand(ip, from netip.Addr) (bool, error) {
	ip, from = ip.Unmap(), from.Unmap().WithZone("")
	if ip == from {
		return true, nil
	}
	if !ip.IsLoopback() && slices.ContainsFunc(s.cfg.Endpoints, func(p netip.Prefix) bool { return p.Contains(ip) }) {
		return true, nil
	}
	if !from.IsValid() {
		return false, nil
	}
	own, err := s.machine()
	if err != nil {
		return false, fmt.Errorf("read the addresses of this machine: %w", err)
	}
	here := func(a netip.Addr) bool { return a.IsLoopback() || slices.Contains(own, a) }
	return here(from) && here(ip), nil
}

// machineAddresses are those of the interfaces of this machine.
func machineAddresses() ([]netip.Addr, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, a := range list {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				out = append(out, ip.Unmap())
			}
		}
	}
	return out, nil
}

// checkAddress refuses an endpoint at an address that its proxy has not shown to
// have. The refusal is recorded before it is told.
func (s *Server) checkAddress(ctx context.Context, e mesh.Endpoint, workload spiffeid.ID) error {
	from := origin(ctx)
	may, err := s.mayStand(e.Address.Addr(), from)
	if err != nil || may {
		return err
	}
	if wait, ok := s.refusals.take(e.Agent.String(), 1, s.cfg.Now()); !ok {
		return refuse(codes.ResourceExhausted, "agent %s announced too many endpoints that were refused: try again in %s", e.Agent, wait.Round(time.Second)+time.Second)
	}
	s.cfg.Log.Warn("endpoint refused", slog.String("service", string(e.Service)), slog.String("address", e.Address.String()),
		slog.String("agent", e.Agent.String()), slog.String("peer", remote(ctx)))
	if s.cfg.OnAnnounce != nil {
		if err := s.cfg.OnAnnounce(ctx, Announcement{Agent: e.Agent, Workload: workload, Service: e.Service, Address: e.Address, Peer: remote(ctx)}); err != nil {
			return fmt.Errorf("record refused endpoint: %w", err)
		}
	}
	next := fmt.Sprintf("announce that address (inbound.advertise), or have the operator of the issuer allow the other (endpoints.allow: [%q])", netip.PrefixFrom(e.Address.Addr(), e.Address.Addr().BitLen()))
	if e.Address.Addr().Unmap().IsLoopback() {
		next = "a loopback address is only for the issuer's own machine: announce the address that peers dial (inbound.advertise)"
	}
	return refuse(codes.PermissionDenied, "endpoint of %s at %s: this proxy comes from %s, not from there; next: %s", e.Service, e.Address, from, next)
}

// origin is the address that a caller's connection comes from, zero when it has
// none.
func origin(ctx context.Context) netip.Addr {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return netip.Addr{}
	}
	a, err := netip.ParseAddrPort(p.Addr.String())
	if err != nil {
		return netip.Addr{}
	}
	return a.Addr().Unmap().WithZone("")
}
