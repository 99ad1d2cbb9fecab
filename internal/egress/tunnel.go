package egress

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

// A tunnel is one CONNECT from its first judgement to its close record.
type tunnel struct {
	relay
	who      *caller
	call     authz.Call // as judged first
	host     Host
	how      mesh.Destination
	revision uint64
	id       string // of the decision
	rule     string // that allowed it
	origin   string // for the record: how the caller came to the host
	// purse has the budget of the destination, nil for none; spent is what was taken
	// of it while bytes moved, under its lock.
	purse *purse
	spent [connections]int64
	// asked is the port that the caller has named, of a tunnel for requests of HTTP;
	// else 0.
	asked uint16
	// within says that it is a request in a tunnel, which counts for both.
	within bool
	// webSocket says that it is a request that has become a WebSocket.
	webSocket atomic.Bool
	began     time.Time
	spans     spans

	// These are guarded by relay.mu: the registry reads them while the tunnel
	// comes to be.
	sni string // what the caller sends, or is bound to send
	to  place  // what was dialled
}

// record is the beginning of every record about t.
func (t *tunnel) record(kind audit.Kind) *audit.Record {
	return &audit.Record{
		Kind: kind, ID: t.id, Rule: t.rule, Dir: string(t.call.Dir), Src: t.call.Src.String(), Dst: t.call.Dst,
		Port: t.call.Port, Verb: t.call.Verb, Path: t.call.Path, Revision: t.revision, Trace: t.call.Trace, Peer: t.call.Peer,
	}
}

// tunnels is the registry of live tunnels, from before they are dialled, so
// that no change of policy can pass one by.
type tunnels struct {
	max, perCaller int
	purses         purses

	mu   sync.Mutex // guards what follows
	live map[*tunnel]bool
	n    int // of those in live that count
	of   map[spiffeid.ID]int
}

func (ts *tunnels) init(limit, perCaller int) {
	ts.max, ts.perCaller = limit, perCaller
	ts.live = make(map[*tunnel]bool)
	ts.of = make(map[spiffeid.ID]int)
}

func (ts *tunnels) add(t *tunnel) error {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	switch {
	case t.within: // else whoever has all of its tunnels could ask nothing in them
	case ts.n >= ts.max:
		return refuse(ReasonTunnelCap, "%d tunnels are open, which is the limit", ts.max)
	case ts.of[t.call.Src] >= ts.perCaller:
		return refuse(ReasonTunnelCap, "%s has %d tunnels open, which is the limit of one caller", t.call.Src, ts.perCaller)
	}
	if t.asked == 0 { // else its requests are what the budget is for
		if err := ts.purses.open(t, time.Now()); err != nil {
			return err
		}
	}
	ts.live[t] = true
	if !t.within {
		ts.n++
		ts.of[t.call.Src]++
	}
	return nil
}

func (ts *tunnels) remove(t *tunnel) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	ts.purses.shut(t)
	delete(ts.live, t)
	if t.within {
		return
	}
	ts.n--
	if ts.of[t.call.Src]--; ts.of[t.call.Src] <= 0 {
		delete(ts.of, t.call.Src)
	}
}

// all are the tunnels, those for requests last: what ends has its own reason in its
// record only if that comes before the end of what it is in.
func (ts *tunnels) all() []*tunnel {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	out := make([]*tunnel, 0, len(ts.live))
	var outer []*tunnel
	for t := range ts.live {
		if t.asked != 0 {
			outer = append(outer, t)
		} else {
			out = append(out, t)
		}
	}
	return append(out, outer...)
}

// Tunnels is how many tunnels are open or being opened, with requests that are not
// in one.
func (g *Gateway) Tunnels() int {
	g.tunnels.mu.Lock()
	defer g.tunnels.mu.Unlock()
	return g.tunnels.n
}

// idleOf is how long nothing may move in a tunnel.
func (g *Gateway) idleOf(how *mesh.Destination) time.Duration {
	if how.Timeouts.Idle > 0 {
		return min(how.Timeouts.Idle, g.lim.Idle)
	}
	return g.lim.Idle
}

// keepsProtocols says whether what was agreed on under one destination may be spoken
// under another: what was offered is not known any more.
func keepsProtocols(how, was *mesh.Destination) bool {
	list := protocolsOf(how)
	return len(list) == 0 || slices.Equal(list, protocolsOf(was))
}

// leadsThere reports whether s would let t lead to where it does, in the way
// it does.
func (g *Gateway) leadsThere(s *mesh.Snapshot, t *tunnel, sni string, to place) bool {
	how, err := routeOf(s, t.host)
	if err != nil || how.Proto != t.how.Proto || how.TLS != t.how.TLS || how.CA != t.how.CA || !how.Inject.Equal(t.how.Inject) {
		return false
	}
	if how.Proto == mesh.ProtoTLS && how.SNI != sniOptional && sni == "" {
		return false
	}
	switch {
	case how.Probe && !t.how.Probe: // nobody has seen a certificate
		return false
	case how.TLS == "" && how.ECH != t.how.ECH && t.how.ECH != "": // nor whether a name was hidden
		return false
	case !keepsProtocols(&how, &t.how):
		return false
	case t.webSocket.Load() && !slices.Contains(how.Upgrade, mesh.WebSocket):
		return false
	}
	if !to.addr.IsValid() {
		return true // not dialled yet
	}
	listed := func(e mesh.Outlet) bool {
		ap, literal := e.AddrPort()
		return e.Address == to.outlet || literal && ap.Port() == to.addr.Port() && ap.Addr().Unmap() == to.addr.Addr()
	}
	switch {
	case len(how.Endpoints) == 0 && to.outlet != "":
		return false // DNS was never asked where it leads
	case len(how.Endpoints) > 0 && !slices.ContainsFunc(how.Endpoints, listed):
		return false
	}
	direct := to.parent == mesh.Parent{}
	if direct != (len(how.Parents) == 0) || !direct && !slices.Contains(how.Parents, to.parent) {
		return false
	}
	if !direct && g.dialer.Guard.Screen(to.via.Addr(), how.Private) != nil {
		return false
	}
	return g.dialer.Guard.Screen(to.addr.Addr(), how.Private) == nil
}
