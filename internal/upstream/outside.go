package upstream

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

const (
	// maxOutside is how many hosts are remembered, and maxOfOne how many of one
	// caller: with one more, what was called longest ago is forgotten. Of each host
	// as many as maxAddresses are.
	maxOutside   = 4096
	maxOfOne     = 512
	maxAddresses = 64
	// forgetOutside is after what time a host is forgotten that nobody calls.
	forgetOutside = 10 * time.Minute
)

// Outside keeps what is known of hosts outside the mesh: their breakers, the
// budgets of their retries, and which of their addresses are put aside or rest. Each
// caller has its own, by its identity: one that has its calls fail on purpose cuts
// off nobody else. Who calls them makes the connections, since no two callers share
// one. It is safe for concurrent use.
type Outside struct {
	// Changed is as in Config. It is called under no lock that a call to another host
	// waits for. Optional.
	Changed func(Trouble)

	mu  sync.Mutex // guards what follows
	by  map[spiffeid.ID]map[string]*outside
	all int // hosts of all callers
}

// outside is one host as one caller knows it. Its standing's lock guards at.
type outside struct {
	*standing
	at   map[netip.AddrPort]*away
	used atomic.Int64

	tell      sync.Mutex // guards what follows
	told      bool       // it was told that the host is cut off
	forgotten bool       // it is forgotten: what is told of it late is not heard
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

// Begin begins a try of a caller's call to a host, which metrics know as dst, unless
// its breaker is open (ErrOpen). Again says that it is a further try of a call that
// was counted. It is followed by End.
func (o *Outside) Begin(who spiffeid.ID, host, dst string, cfg mesh.Routes, again bool) (*Try, error) {
	now := time.Now().UnixNano()
	h, old := o.host(who, host, dst, cfg, now)
	for _, x := range old {
		x.forget(o.Changed, now)
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

// host finds what is known of a host, and what is forgotten for it.
func (o *Outside) host(who spiffeid.ID, name, dst string, cfg mesh.Routes, now int64) (h *outside, old []*outside) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if h = o.by[who][name]; h == nil || !h.same(cfg) {
		switch {
		case h != nil:
			old = append(old, o.drop(who, name))
		case len(o.by[who]) >= maxOfOne:
			old = append(old, o.dropOldest(who))
		case o.all >= maxOutside:
			old = append(old, o.dropOldest(o.most()))
		}
		h = &outside{at: map[netip.AddrPort]*away{}}
		var change func(Trouble)
		if o.Changed != nil {
			change = func(x Trouble) { h.changed(o.Changed, x) }
		}
		h.standing = newStanding(mesh.ServiceName(name), cfg, change)
		h.dst = dst
		if o.by == nil {
			o.by = map[spiffeid.ID]map[string]*outside{}
		}
		if o.by[who] == nil {
			o.by[who] = map[string]*outside{}
		}
		o.by[who][name] = h
		o.all++
	}
	h.used.Store(now)
	return h, old
}

// drop takes a host of a caller away. The caller holds the lock.
func (o *Outside) drop(who spiffeid.ID, name string) *outside {
	h := o.by[who][name]
	delete(o.by[who], name)
	if len(o.by[who]) == 0 {
		delete(o.by, who)
	}
	o.all--
	return h
}

// dropOldest takes away the host of a caller that was called longest ago. The caller
// holds the lock.
func (o *Outside) dropOldest(who spiffeid.ID) *outside {
	var oldest string
	var since int64
	for name, h := range o.by[who] {
		if at := h.used.Load(); oldest == "" || at < since {
			oldest, since = name, at
		}
	}
	return o.drop(who, oldest)
}

// most is the caller that has most hosts. The caller holds the lock.
func (o *Outside) most() (who spiffeid.ID) {
	n := 0
	for id, hosts := range o.by {
		if len(hosts) > n {
			who, n = id, len(hosts)
		}
	}
	return who
}

// changed tells of the host. What is told of its breaker alternates, whatever the
// order in which calls tell.
func (h *outside) changed(tell func(Trouble), x Trouble) {
	h.tell.Lock()
	defer h.tell.Unlock()
	if h.forgotten {
		return
	}
	if x.Kind == Open || x.Kind == Closed {
		x = h.standing.cut(time.Now().UnixNano())
		if h.told == (x.Kind == Open) {
			return
		}
		h.told = !h.told
	}
	tell(x)
}

// forget says that the breaker of a host cuts nobody off any more.
func (h *outside) forget(tell func(Trouble), now int64) {
	h.tell.Lock()
	defer h.tell.Unlock()
	h.forgotten = true
	if h.told {
		tell(Trouble{Service: h.name, Dst: h.dst, Kind: Closed, Since: time.Unix(0, now)})
	}
}

// Sweep forgets the hosts that nobody has called for long.
func (o *Outside) Sweep() {
	now := time.Now()
	for _, h := range o.unused(now.Add(-forgetOutside).UnixNano()) {
		h.forget(o.Changed, now.UnixNano())
	}
}

func (o *Outside) unused(since int64) (old []*outside) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for who, hosts := range o.by {
		for name, h := range hosts {
			if h.used.Load() < since {
				old = append(old, o.drop(who, name))
			}
		}
	}
	return old
}

// Troubles lists what is held against whom now, by host and address; what is so for
// several callers once.
func (o *Outside) Troubles() (list []Trouble) {
	now := time.Now().UnixNano()
	o.mu.Lock()
	for _, hosts := range o.by {
		for _, h := range hosts {
			list = h.troubles(list, now)
		}
	}
	o.mu.Unlock()
	return slices.CompactFunc(inOrder(list), func(a, b Trouble) bool {
		return a.Service == b.Service && a.Address == b.Address && a.Kind == b.Kind
	})
}

// The ranks of addresses: those that are well are tried first.
const (
	Well  = iota
	Rests // no connection could be made lately
	Aside // it is put aside
)

// Ranks says which addresses of the host are tried before others, in their order. It
// remembers none of them: there may be any in an answer of DNS.
func (t *Try) Ranks(addrs []netip.AddrPort) []int {
	ranks := make([]int, len(addrs))
	if t == nil {
		return ranks
	}
	now, h := time.Now().UnixNano(), t.host
	h.mu.Lock()
	defer h.mu.Unlock()
	h.among = len(addrs)
	for i, addr := range addrs {
		e := h.at[addr]
		if e == nil {
			continue
		}
		e.seen = now
		switch {
		case e.out.Load() > now:
			ranks[i] = Aside
		case e.rests(now):
			ranks[i] = Rests
		}
	}
	return ranks
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
