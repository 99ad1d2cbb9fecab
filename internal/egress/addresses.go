package egress

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// Addresses are those of a host that a tunnel to it may be dialled to, for a
// workload that wants to know them. ErrNoHost says that it has none; when all that
// it has are refused, the error is the refusal of the first. Whether the workload
// may reach the host has been judged before; the name counts in its budget, beyond
// which the error is a Refusal for ReasonBudget.
func (g *Gateway) Addresses(ctx context.Context, who spiffeid.ID, name string) ([]netip.Addr, error) {
	s := g.cfg.Snapshot()
	if s == nil {
		return nil, refuse(ReasonNoPolicy, "no policy is loaded")
	}
	host, err := ParseHost(name)
	if err != nil {
		return nil, err
	}
	how, err := routeOf(s, host)
	if err != nil {
		return nil, err
	}
	if how.DNS != mesh.RealAddresses {
		return nil, refuse(ReasonNoPolicy, "the destination of %s does not say dns: real", host)
	}
	if err := g.tunnels.purses.lookUp(who, host, &how, time.Now()); err != nil {
		return nil, err
	}
	var found []netip.Addr
	names := []string{host.String()}
	if len(how.Endpoints) > 0 {
		names = nil
	}
	for _, e := range how.Endpoints {
		if ap, literal := e.AddrPort(); literal {
			found = append(found, ap.Addr().Unmap())
			continue
		}
		name, _ := e.Name()
		names = append(names, name)
	}
	for _, n := range names {
		if g.cfg.Names == nil {
			break
		}
		addrs, lerr := g.cfg.Names.Lookup(ctx, n)
		err = cmp.Or(err, lerr)
		found = append(found, addrs...)
	}
	if len(found) == 0 && err != nil {
		return nil, err
	}
	var pass []netip.Addr
	for _, a := range found {
		if err = g.dialer.Guard.Screen(a, how.Private); err == nil {
			pass = append(pass, a)
		}
	}
	if len(pass) == 0 && err != nil {
		return nil, fmt.Errorf("addresses of %s: %w", host, err)
	}
	return pass, nil
}
