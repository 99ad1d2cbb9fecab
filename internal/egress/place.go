package egress

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/route"
	"sallyport/internal/telemetry"
	"sallyport/internal/upstream"
)

// A place is where a connection leads.
type place struct {
	addr netip.AddrPort
	// outlet is the endpoint, as the destination has it; empty where the host
	// itself was looked up.
	outlet string
	// parent is the proxy that it goes through, which is at via; none when it has no
	// address.
	parent mesh.Parent
	via    netip.AddrPort
}

func (p place) String() string {
	if p.via.IsValid() {
		return p.addr.String() + " through " + p.via.String()
	}
	return p.addr.String()
}

// choices are the endpoints of t in the order in which they are tried: one after
// the other where they have weights, else all at once. An empty one is the host
// itself.
func (t *Target) choices() [][]mesh.Outlet {
	how := &t.How
	if !how.Weighted() {
		return [][]mesh.Outlet{how.Endpoints}
	}
	var out [][]mesh.Outlet
	for _, e := range route.Order(how.Endpoints, rand.Uint64()) {
		out = append(out, []mesh.Outlet{e})
	}
	return out
}

// A stop is what a choice has come to: places that the Guard has let pass, the best
// of which has that rank.
type stop struct {
	places []place
	rank   int
	best   int // how many have it
}

// A walk looks for a connection, from choice to choice.
type walk struct {
	d    *Dialer
	t    *Target
	have func([]place) bool

	later   []stop // that are not well
	skipped []string
	refused error // why the first address was skipped
	err     error // of the last try
	over    bool
	conn    link // nil when have has one
	at      place
}

// visit finds and screens the addresses of a choice, and dials them if they are
// well.
func (w *walk) visit(ctx context.Context, list []mesh.Outlet) {
	ctx, cancel := context.WithTimeout(ctx, w.t.How.ConnectWithin())
	defer cancel()
	found, err := w.d.addresses(ctx, w.t, list)
	if err != nil {
		w.err = err
		return
	}
	var s stop
	for _, p := range found {
		if len(s.places) == maxRanked {
			break
		}
		if err := w.d.Guard.Screen(p.addr.Addr(), w.t.How.Private); err != nil {
			w.refused = cmp.Or(w.refused, err)
			w.skipped = append(w.skipped, p.addr.Addr().String())
			continue
		}
		p.addr = netip.AddrPortFrom(p.addr.Addr().Unmap(), p.addr.Port())
		s.places = append(s.places, p)
	}
	if len(s.places) == 0 {
		return
	}
	addrs := make([]netip.AddrPort, len(s.places))
	for i, p := range s.places {
		addrs[i] = p.addr
	}
	ranks := make(map[netip.AddrPort]int, len(s.places))
	for i, r := range w.t.Try.Ranks(addrs) {
		if slices.Contains(w.t.Avoid, addrs[i]) {
			r = upstream.Aside + 1
		}
		ranks[addrs[i]] = r
	}
	slices.SortStableFunc(s.places, func(a, b place) int { return cmp.Compare(ranks[a.addr], ranks[b.addr]) })
	s.places = s.places[:min(len(s.places), maxAttempts)]
	for s.best < len(s.places) && ranks[s.places[s.best].addr] == ranks[s.places[0].addr] {
		s.best++
	}
	if s.rank = ranks[s.places[0].addr]; s.rank > upstream.Well {
		w.later = append(w.later, s)
		return
	}
	w.race(ctx, s)
}

// dial is for a choice that was put off.
func (w *walk) dial(ctx context.Context, s stop) {
	ctx, cancel := context.WithTimeout(ctx, w.t.How.ConnectWithin())
	defer cancel()
	w.race(ctx, s)
}

func (w *walk) race(ctx context.Context, s stop) {
	if w.have != nil && w.have(s.places[:s.best]) {
		w.over = true
		return
	}
	began := time.Now()
	w.conn, w.at, w.err = w.d.race(ctx, s.places, w.t, func(p place, err error) {
		if !errors.Is(ctx.Err(), context.Canceled) && !errors.Is(err, errParent) { // else that says nothing of it
			w.t.Try.Unmade(p.addr)
		}
	})
	w.t.Did("dial", telemetry.Client, began, w.err)
	w.over = w.err == nil
}

// addresses lists where the endpoints may be, or t itself when there are none:
// what they say, or what DNS says, families in turn.
func (d *Dialer) addresses(ctx context.Context, t *Target, list []mesh.Outlet) (out []place, err error) {
	if len(list) == 0 {
		if a, ok := t.Host.Addr(); ok {
			return []place{{addr: netip.AddrPortFrom(a, t.Port)}}, nil
		}
		return d.lookup(ctx, t, t.Host.String(), t.Port, "")
	}
	for _, e := range list {
		if ap, ok := e.AddrPort(); ok {
			out = append(out, place{addr: ap, outlet: e.Address})
			continue
		}
		name, port := e.Name()
		found, lerr := d.lookup(ctx, t, name, port, e.Address)
		err = cmp.Or(err, lerr)
		out = append(out, found...)
	}
	if len(out) > 0 {
		err = nil
	}
	return out, err
}

// lookup asks DNS.
func (d *Dialer) lookup(ctx context.Context, t *Target, name string, port uint16, outlet string) ([]place, error) {
	if d.Names == nil {
		return nil, refuse(ReasonResolve, "no resolver is configured, and the destination %s lists no addresses as endpoints", t.Host)
	}
	began := time.Now()
	addrs, err := d.Names.Lookup(ctx, name)
	t.Did("dns", telemetry.Client, began, err)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return nil, refuse(ReasonTimeout, "%v", err)
	case err != nil:
		return nil, refuse(ReasonResolve, "%v", err)
	case len(addrs) == 0:
		return nil, refuse(ReasonResolve, "look up %s: no address", name)
	}
	var out []place
	for _, ap := range inTurn(addrs, port) {
		out = append(out, place{addr: ap, outlet: outlet})
	}
	return out, nil
}
