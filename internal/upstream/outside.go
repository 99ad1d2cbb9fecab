package upstream

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/mesh"
)

const (
	// maxOutside is how many hosts are remembered, and maxAddresses how many
	// addresses of each. What is beyond is called as if nothing were known of it.
	maxOutside   = 4096
	maxAddresses = 64
	// forgetOutside is after what time a host is forgotten that nobody calls.
	forgetOutside = 10 * time.Minute
)

// Outside keeps what is known of hosts outside the mesh: their breakers, the
// budgets of their retries, and which of their addresses are put aside or rest. Who
// calls them makes the connections, since no two callers share one. It is safe for
// concurrent use.
type Outside struct {
	// Changed is as in Config. Optional.
	Changed func(Trouble)

	mu    sync.Mutex // guards what follows
	hosts map[string]*outside
}

// outside is one host. Its standing's lock guards at.
type outside struct {
	*standing
	at   map[netip.AddrPort]*away
	used atomic.Int64
}

// away is one address of a host outside.
type away struct {
	*endpoint
	unmade atomic.Int32 // connections in a row that could not be made
	seen   int64        // when it was last asked for, under the standing's lock
}

// A Try is one try of a call to a host outside. One goroutine at a time uses it. The
// methods of nil do nothing: of a host of which nothing is kept.
type Try struct {
	lease
	host *outside
}

// Begin begins a try of a call to a host, which metrics know as dst, unless its
// breaker is open (ErrOpen). Again says that it is a further try of a call that was
// counted. It is followed by End.
func (o *Outside) Begin(host, dst string, cfg mesh.Routes, again bool) (*Try, error) {
	now := time.Now().UnixNano()
	h := o.host(host, dst, cfg, now)
	if h == nil {
		return nil, nil //nolint:nilnil // nothing is known of it
	}
	t := &Try{host: h}
	if h.breaker != nil {
		var ok bool
		if t.probe, ok = h.breaker.enter(now); !ok {
			return nil, fmt.Errorf("host %s: %w", host, ErrOpen)
		}
	}
	h.mark(now)
	t.by, t.at, t.again = h.standing, now, again
	return t, nil
}

// host finds what is known of a host, nil when nothing can be.
func (o *Outside) host(name, dst string, cfg mesh.Routes, now int64) *outside {
	o.mu.Lock()
	defer o.mu.Unlock()
	h := o.hosts[name]
	if h == nil || !h.same(cfg) {
		if h == nil && len(o.hosts) >= maxOutside {
			return nil
		}
		if h != nil {
			o.closed(h, now)
		}
		if o.hosts == nil {
			o.hosts = map[string]*outside{}
		}
		h = &outside{standing: newStanding(mesh.ServiceName(name), cfg, o.Changed), at: map[netip.AddrPort]*away{}}
		h.dst = dst
		o.hosts[name] = h
	}
	h.used.Store(now)
	return h
}

// closed says that the breaker of a host which is forgotten cuts nobody off any
// more.
func (o *Outside) closed(h *outside, now int64) {
	if o.Changed != nil && h.breaker != nil && h.breaker.open.Load() {
		o.Changed(Trouble{Service: h.name, Dst: h.dst, Kind: Closed, Since: time.Unix(0, now)})
	}
}

// Sweep forgets the hosts that nobody has called for long.
func (o *Outside) Sweep() {
	now := time.Now()
	o.mu.Lock()
	defer o.mu.Unlock()
	for name, h := range o.hosts {
		if h.used.Load() < now.Add(-forgetOutside).UnixNano() {
			o.closed(h, now.UnixNano())
			delete(o.hosts, name)
		}
	}
}

// Troubles lists what is held against whom now, by host and address.
func (o *Outside) Troubles() (list []Trouble) {
	now := time.Now().UnixNano()
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, h := range o.hosts {
		list = h.troubles(list, now)
	}
	return inOrder(list)
}

// The ranks of addresses: those that are well are tried first.
const (
	Well  = iota
	Rests // no connection could be made lately
	Aside // it is put aside
)

// Rank says which addresses are tried before others.
func (t *Try) Rank(addr netip.AddrPort) int {
	if t == nil {
		return Well
	}
	now := time.Now().UnixNano()
	switch e := t.host.find(addr, now); {
	case e == nil:
		return Well
	case e.out.Load() > now:
		return Aside
	case e.rests(now):
		return Rests
	}
	return Well
}

// find is what is known of an address, nil when nothing can be.
func (h *outside) find(addr netip.AddrPort, now int64) *away {
	h.mu.Lock()
	defer h.mu.Unlock()
	e := h.at[addr]
	if e == nil {
		if len(h.at) >= maxAddresses && !h.dropOldest(now) {
			return nil
		}
		e = &away{endpoint: h.newEndpoint(addr, false)}
		h.at[addr] = e
		h.whole = append(slices.Clip(h.whole), e.endpoint)
	}
	e.seen = now
	return e
}

// dropOldest forgets the address that was asked for longest ago and is not put
// aside. The caller holds the lock.
func (h *outside) dropOldest(now int64) bool {
	var oldest *away
	for _, e := range h.at {
		if e.pending() == 0 && e.out.Load() <= now && (oldest == nil || e.seen < oldest.seen) {
			oldest = e
		}
	}
	if oldest == nil {
		return false
	}
	delete(h.at, oldest.addr)
	h.gone += oldest.passed()
	h.whole = slices.DeleteFunc(slices.Clone(h.whole), func(e *endpoint) bool { return e == oldest.endpoint })
	return true
}

// Unmade says that no connection could be made to an address: others are tried
// first for a while.
func (t *Try) Unmade(addr netip.AddrPort) {
	if t == nil {
		return
	}
	now := time.Now().UnixNano()
	e := t.host.find(addr, now)
	if e == nil {
		return
	}
	n := min(e.unmade.Add(1), 6)
	e.rest.Store(now + int64(firstRest<<(n-1)))
	t.host.blame(e.endpoint, now, Failed, penalty, false)
}

// On says that the try goes over a connection to an address.
func (t *Try) On(addr netip.AddrPort) {
	if t == nil || t.on != nil {
		return
	}
	if e := t.host.find(addr, time.Now().UnixNano()); e != nil {
		e.unmade.Store(0)
		e.rest.Store(0)
		e.begin()
		t.on = e.endpoint
	}
}

// Tell tells what became of the try, as Report does of a lent connection.
func (t *Try) Tell(o Outcome, at time.Time, retryAfter time.Duration) {
	switch {
	case t == nil:
	case t.on == nil: // it came to no connection
		t.ReportService(o, at, retryAfter)
	default:
		t.Report(o, at, retryAfter)
	}
}

// Retry takes one retry of the host's budget, if it is there.
func (t *Try) Retry() bool { return t != nil && t.host.budget.spend(time.Now().UnixNano()) }

// End ends the try. One that nothing was told of counts for nothing.
func (t *Try) End() {
	if t != nil {
		t.leave()
	}
}
