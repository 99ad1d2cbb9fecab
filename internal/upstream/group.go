package upstream

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/mesh"
)

// What a call is refused for before anything of it is sent. Neither counts as a
// failure of the service.
var (
	// ErrOpen is returned instead of calling a service that is cut off.
	ErrOpen = errors.New("circuit open")
	// ErrFull is returned when as many calls to a service are under way as may
	// be.
	ErrFull = errors.New("as many calls under way as the service may be given")
)

// A Want is what a call needs of a connection.
type Want struct {
	Service mesh.ServiceName
	// Subset narrows the endpoints; empty for all.
	Subset string
	// Key is what ring_hash goes by.
	Key uint64
	// Fresh asks for a connection that has served no call.
	Fresh bool
	// Avoid is an endpoint that has just failed: another is taken if there is
	// one.
	Avoid netip.AddrPort
	// Connect bounds the making of a connection, and Until all of it; 0: as the
	// Config says.
	Connect time.Duration
	Until   time.Time
	// Hurried says that Until is what the caller asked for: when it comes, that
	// says nothing of the service.
	Hurried bool
	// Again says that it is a further try of a call that was counted.
	Again bool
	// At is what the clock said a moment ago; zero: it is asked.
	At time.Time

	// found is the group that known and sub meant the last time, in a table of that
	// version.
	version uint64
	known   mesh.ServiceName
	sub     string
	found   *group
	// dice is where the last choice at random was. Each caller has its own, for
	// which nobody waits.
	dice uint64
}

// Renew makes w ready for another call, most likely to the same service.
func (w *Want) Renew() {
	*w = Want{version: w.version, known: w.known, sub: w.sub, found: w.found, dice: w.dice}
}

// roll throws the dice.
func (w *Want) roll() uint64 {
	if w.dice == 0 {
		w.dice = rand.Uint64()
	}
	w.dice += 0x9e3779b97f4a7c15
	return mix(w.dice)
}

// group finds the endpoints that are meant, nil for none.
func (s *Services) group(w *Want) *group {
	version := s.version.Load() // before the table, which may be newer
	if w.found != nil && w.version == version && w.known == w.Service && w.sub == w.Subset {
		return w.found
	}
	g := (*s.table.Load())[w.Service]
	if g != nil && w.Subset != "" {
		g = g.subsets[w.Subset]
	}
	w.version, w.known, w.sub, w.found = version, w.Service, w.Subset, g
	return g
}

// now is the time at which the call asks.
func (w *Want) now() time.Time {
	if w.At.IsZero() {
		return time.Now()
	}
	return w.At
}

// spent says that the time is over which the caller gave.
func (w *Want) spent() bool { return w.Hurried && !time.Now().Before(w.Until) }

// within bounds the making of a connection.
func (w *Want) within(ctx context.Context, usual time.Duration) (context.Context, context.CancelFunc) {
	until := time.Now().Add(cmp.Or(w.Connect, usual))
	if !w.Until.IsZero() && w.Until.Before(until) {
		until = w.Until
	}
	return context.WithDeadline(ctx, until)
}

// An endpoint is one place where a service is reached, and what is known of it.
type endpoint struct {
	load
	// rest is until when others are tried first, since no connection could be
	// made. It is that of the pool, beside what else is looked at for a choice.
	rest atomic.Int64
	pool *Pool // nil outside the mesh
	addr netip.AddrPort
	born int64 // when it appeared beside others, for the slow start; else 0
	near bool  // it stands in our zone
	history
	// sick: a health check says so. The others are of it, under the group's lock.
	sick      atomic.Bool
	sickSince int64
	sickWhy   string
	well      bool // the last answer to a check, of alike ones in a row
	alike     int
	// asking says that a check is under way; askAt is when the next one is due,
	// and Watch's own.
	asking atomic.Bool
	askAt  int64
}

// A standing is what all subsets of a service have in common, and what outlives
// a snapshot that changes nothing about it.
type standing struct {
	name mesh.ServiceName
	dst  string
	cfg  mesh.Routes // without its routes
	out  *mesh.Outlier
	*breaker
	*budget
	*capacity
	change func(Trouble)

	// mu guards what puts endpoints aside, and has one view made at a time.
	mu    sync.Mutex
	whole []*endpoint // of the service, guarded by mu
	// among is how many addresses there are, where whole has only those that were
	// called, guarded by mu.
	among int
	// gone counts the calls that went well at endpoints that have gone, guarded by
	// mu.
	gone uint32
	// turn counts what changed which endpoints are well.
	turn atomic.Uint64
	// next is when a bucket begins of what the budget and the breaker go by.
	next atomic.Int64
	// plain says that of a call which goes well nothing is looked at but how long it
	// took: no ratio of an endpoint, no slow calls, no adaptive bound.
	plain bool
}

func newStanding(name mesh.ServiceName, cfg mesh.Routes, change func(Trouble)) *standing {
	cfg.Routes, cfg.Origin = nil, mesh.Origin{}
	st := &standing{name: name, cfg: cfg, budget: newBudget(cfg.Budget), capacity: newCapacity(cfg.Capacity), change: change}
	st.budget.well.total = st.passed
	if cfg.Breaker != nil {
		st.breaker = newBreaker(*cfg.Breaker)
		st.breaker.well.total = st.passed
	}
	if cfg.Outlier != nil {
		o := outlierDefaults(*cfg.Outlier)
		st.out = &o
	}
	st.plain = !st.adaptive && (st.breaker == nil || st.breaker.cfg.Slow == 0) && (st.out == nil || st.out.Success == 0)
	return st
}

// same says whether what is known under st holds under cfg.
func (st *standing) same(cfg mesh.Routes) bool {
	cfg.Routes, cfg.Origin = nil, mesh.Origin{}
	return reflect.DeepEqual(st.cfg, cfg)
}

// groupOf makes the group of a service, of what is known of it so far. The caller
// holds the lock of the Services.
func (s *Services) groupOf(name mesh.ServiceName, cfg mesh.Routes, places []place) *group {
	st := s.known[name]
	if st == nil || !st.same(cfg) {
		st = newStanding(name, cfg, s.cfg.Changed)
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	was := map[*Pool]*endpoint{}
	for _, e := range st.whole {
		was[e.pool] = e
	}
	g := &group{standing: st, subsets: map[string]*group{}}
	for _, sub := range cfg.Subsets {
		g.subsets[sub.Name] = &group{standing: st}
	}
	now := map[*Pool]bool{}
	for _, p := range places {
		if now[p.pool] {
			continue // two announcements of one address are one place
		}
		now[p.pool] = true
		st.dst = p.pool.t.id.String()
		e := was[p.pool]
		if e == nil {
			e = st.newEndpoint(p.pool.t.addr, len(was) > 0)
			e.pool = p.pool
		}
		e.near = s.cfg.Zone != "" && p.labels.Get(mesh.LabelZone) == s.cfg.Zone
		g.all = append(g.all, e)
		for _, sub := range cfg.Subsets {
			if p.labels.Has(sub.Labels) {
				g.subsets[sub.Name].all = append(g.subsets[sub.Name].all, e)
			}
		}
	}
	for p, e := range was {
		if !now[p] {
			st.gone += e.passed()
		}
	}
	st.whole = g.all
	st.turn.Add(1)
	return g
}

// passed counts the calls that went well so far. It wraps.
func (st *standing) passed() uint32 {
	st.mu.Lock()
	defer st.mu.Unlock()
	n := st.gone
	for _, e := range st.whole {
		n += e.passed()
	}
	return n
}

// mark notes how many calls have gone well, if a bucket begins.
func (st *standing) mark(now int64) {
	if now >= st.next.Load() {
		st.markNow(now)
	}
}

func (st *standing) markNow(now int64) {
	n := st.passed()
	next := st.budget.well.mark(now, n)
	if st.breaker != nil {
		next = min(next, st.breaker.well.mark(now, n))
	}
	st.next.Store(next)
}

// newEndpoint makes what is to be known of a place; late says that calls go to
// others already.
func (st *standing) newEndpoint(addr netip.AddrPort, late bool) *endpoint {
	e := &endpoint{addr: addr}
	if st.out != nil {
		e.window.width = int64(st.out.Interval / buckets)
	}
	if late {
		e.born = time.Now().UnixNano()
	}
	return e
}

// A place is where an endpoint was announced, and what was said of it.
type place struct {
	pool   *Pool
	labels mesh.Labels
}

// A group is the endpoints of one service, or of a subset of it.
type group struct {
	*standing
	all     []*endpoint
	subsets map[string]*group
	seen    atomic.Pointer[view]
	next    atomic.Uint32
}

// A view is what calls choose from: the endpoints that are well. It holds until
// something changes.
type view struct {
	use   []*endpoint
	ring  ring
	turn  uint64
	until int64 // 0: nothing ends by itself
	warm  bool  // some are in their slow start
}

// defaultBound is how much of its share an endpoint takes of ring_hash, percent.
const defaultBound = 125

// view is the one that holds now.
func (g *group) view(now int64) *view {
	if v := g.seen.Load(); v != nil && v.turn == g.turn.Load() && (v.until == 0 || now < v.until) {
		return v
	}
	return g.lookAgain(now)
}

func (g *group) lookAgain(now int64) *view {
	g.mu.Lock()
	defer g.mu.Unlock()
	v := g.look(now)
	g.seen.Store(v)
	return v
}

// look makes a view. The caller holds the lock.
func (g *group) look(now int64) *view {
	v := &view{turn: g.turn.Load()}
	until := func(t int64) {
		if t > now && (v.until == 0 || t < v.until) {
			v.until = t
		}
	}
	for _, e := range g.all {
		out := e.out.Load()
		until(out)
		if out <= now && !e.sick.Load() {
			v.use = append(v.use, e)
		}
		if slow := int64(g.cfg.Balance.SlowStart); slow > 0 && e.born > 0 && e.born+slow > now {
			v.warm = true
			until(e.born + slow)
		}
	}
	least := mesh.Share(mesh.Whole / 2)
	if p := g.cfg.Balance.Panic; p != nil {
		least = *p
	}
	if len(v.use) == 0 || len(v.use)*mesh.Whole < len(g.all)*int(least) {
		v.use = g.all // those that are left would not bear it
	}
	if g.cfg.Balance.Zone == "prefer" {
		v.use = near(v.use, g.all)
	}
	if g.cfg.Balance.Policy == "ring_hash" {
		names := make([]string, len(v.use))
		for i, e := range v.use {
			names[i] = e.addr.String()
		}
		v.ring = newRing(names)
	}
	return v
}

// near keeps to the endpoints of our own zone while at least half of them are
// well.
func near(well, all []*endpoint) []*endpoint {
	here := 0
	for _, e := range all {
		if e.near {
			here++
		}
	}
	var use []*endpoint
	for _, e := range well {
		if e.near {
			use = append(use, e)
		}
	}
	if here == 0 || 2*len(use) < here {
		return well
	}
	return use
}

// rests says that no connection could be made lately.
func (e *endpoint) rests(now int64) bool { return e.rest.Load() > now }

// pick chooses an endpoint for a call.
func (g *group) pick(v *view, now int64, w *Want) *endpoint {
	n := uint32(len(v.use))
	if n == 1 {
		return v.use[0]
	}
	switch g.cfg.Balance.Policy {
	case "round_robin":
		return v.use[g.next.Add(1)%n]
	case "ring_hash":
		return v.use[v.ring.pick(w.Key, g.bounded(v))]
	}
	i := w.roll()
	k := below(uint32(i), n)
	l := below(uint32(i>>32), n-1)
	if l >= k {
		l++
	}
	a, b := v.use[k], v.use[l]
	wa, wb := float32(1), float32(1)
	if v.warm {
		wa, wb = g.warmth(a, now), g.warmth(b, now)
	}
	switch ra, rb := a.rests(now), b.rests(now); {
	case ra != rb:
		if ra {
			return b
		}
	case g.cfg.Balance.Policy == "least_request":
		if float32(a.pending()+1)*wb > float32(b.pending()+1)*wa {
			return b
		}
	case dearer(&a.load, &b.load, wa, wb, now):
		return b
	}
	return a
}

// below makes a number below n of one of 32 bits, as evenly as that allows and
// without a division.
func below(i, n uint32) uint32 { return uint32(uint64(i) * uint64(n) >> 32) }

// warmth is the part of its share that an endpoint gets in its slow start, a
// tenth at least.
func (g *group) warmth(e *endpoint, now int64) float32 {
	if e.born == 0 {
		return 1
	}
	return min(max(float32(now-e.born)/float32(g.cfg.Balance.SlowStart), 0.1), 1)
}

// bounded says which endpoints take one more call: those that have not more
// than the bound above the average.
func (g *group) bounded(v *view) func(int32) bool {
	total := int64(1)
	for _, e := range v.use {
		total += int64(e.pending())
	}
	pct := int64(g.cfg.Balance.Bound)
	if pct == 0 {
		pct = defaultBound
	}
	most := (total*pct + 100*int64(len(v.use)) - 1) / (100 * int64(len(v.use)))
	return func(i int32) bool { return int64(v.use[i].pending()) < most }
}

// other is the endpoint to try when some were: one that is well, or rests, or
// else any; nil when all were tried.
func (g *group) other(v *view, now int64, tried []*endpoint) *endpoint {
	var best *endpoint
	var rank int
	start := int(g.next.Add(1))
	for i := range g.all {
		e := g.all[(start+i)%len(g.all)]
		if slices.Contains(tried, e) {
			continue
		}
		r := 0
		if e.rests(now) {
			r++
		}
		if !slices.Contains(v.use, e) {
			r += 2
		}
		if best == nil || r < rank {
			best, rank = e, r
		}
	}
	return best
}

// lend asks the endpoint that is chosen, and the others until one can be connected
// to.
func (g *group) lend(ctx context.Context, now int64, w *Want) (*Conn, error) {
	v := g.view(now)
	e := v.use[0]
	if len(v.use) > 1 {
		e = g.pick(v, now, w)
	}
	if w.Avoid.IsValid() && e.addr == w.Avoid || e.rests(now) {
		e = g.instead(v, now, w, e)
	}
	c, err := e.pool.get(ctx, w)
	if err != nil {
		return g.search(ctx, w, v, e, err)
	}
	return g.lent(c, e), nil
}

// instead is the endpoint to take in place of one that should not be, which it is
// when there is no other.
func (g *group) instead(v *view, now int64, w *Want, e *endpoint) *endpoint {
	var shun []*endpoint
	for _, a := range g.all {
		if a.addr == w.Avoid {
			shun = append(shun, a)
		}
	}
	if o := g.other(v, now, shun); o != nil {
		return o
	}
	return e
}

func (g *group) lent(c *Conn, e *endpoint) *Conn {
	if e.rest.Load() != 0 {
		e.rest.Store(0)
	}
	e.begin()
	c.on = e
	return c
}

// search asks the other endpoints, one after the other, when e could not be
// connected to because of err.
func (g *group) search(ctx context.Context, w *Want, v *view, e *endpoint, err error) (*Conn, error) {
	var tried []*endpoint
	for {
		now := time.Now().UnixNano()
		if ctx.Err() == nil || w.spent() {
			e.rest.Store(e.pool.restUntil.Load())
		}
		if ctx.Err() == nil && !w.spent() {
			g.blame(e, now, Failed, penalty, false)
		}
		tried = append(tried, e)
		if ctx.Err() != nil || !w.Until.IsZero() && !time.Now().Before(w.Until) {
			return nil, err
		}
		if e = g.other(v, now, tried); e == nil {
			return nil, err
		}
		var c *Conn
		if c, err = e.pool.get(ctx, w); err == nil {
			return g.lent(c, e), nil
		}
	}
}

// blame counts what an endpoint has done, and puts it aside if that is enough.
func (g *standing) blame(e *endpoint, now int64, o Outcome, took time.Duration, connected bool) {
	switch o {
	case OK:
		e.took(now, took)
	case Failed, Limited:
		e.took(now, penalty)
	}
	if g.out == nil {
		return
	}
	why := e.suspect(g.out, now, o, connected)
	if why == "" {
		return
	}
	if t, ok := g.eject(e, now, why); ok && g.change != nil {
		g.change(t)
	}
}

// eject puts an endpoint aside unless it is, or too many are.
func (g *standing) eject(e *endpoint, now int64, why string) (Trouble, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if e.out.Load() > now {
		return Trouble{}, false
	}
	out := 0
	for _, a := range g.whole {
		if a.out.Load() > now {
			out++
		}
	}
	if !mayEject(max(len(g.whole), g.among), out, g.out.MaxShare) {
		return Trouble{}, false
	}
	e.eject(g.out, now, why)
	g.turn.Add(1)
	return g.ejected(e), true
}
