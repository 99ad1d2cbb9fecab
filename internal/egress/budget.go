package egress

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// The kinds of what a budget bounds.
const (
	bytesUp = iota
	bytesDown
	names // below a pattern
	connections
	budgetKinds
)

const (
	// budgetTime is in what time a budget of bytes is whole again.
	budgetTime = time.Hour
	// firstPart is what a gateway takes of a budget until it is told its part.
	firstPart = 0.1
	// kib is what bytes are told to the issuer in.
	kib = 1 << 10
	// maxPurses bounds the budgets that are in use, and idlePurse is after what
	// time one is forgotten that is whole.
	maxPurses = 1 << 14
	idlePurse = time.Minute
)

// A purse is what one workload has used of the budget of one destination. What all
// gateways have used is levelled through the issuer: each is told what all have,
// and may use its own and an equal part of what is left.
type purse struct {
	name string // of its kinds, to the issuer

	mu    sync.Mutex // guards what follows
	limit mesh.Allowance
	used  [budgetKinds]float64 // bytes and names of late; connections that are open
	part  [budgetKinds]float64 // that this gateway may use
	at    time.Time            // of used
	seen  time.Time            // when it was last asked for anything
	known map[string]time.Time // names, and when each was counted
}

func limitsOf(a mesh.Allowance) [budgetKinds]float64 {
	return [budgetKinds]float64{bytesUp: float64(a.Up), bytesDown: float64(a.Down), names: float64(a.Names), connections: float64(a.Conns)}
}

// use takes a limit that may be another than before.
func (p *purse) use(a mesh.Allowance) {
	if p.limit == a {
		return
	}
	p.limit = a
	for k, l := range limitsOf(a) {
		p.part[k] = first(k, l)
		if l == 0 && k != connections {
			p.used[k] = 0
		}
	}
}

// first is a gateway's part of a limit until it is told.
func first(kind int, limit float64) float64 {
	if kind == connections || kind == names {
		return max(limit*firstPart, min(1, limit))
	}
	return limit * firstPart
}

// count takes bytes. Where there is no limit there is no part by which they would
// come back: they would keep the purse for ever.
func (p *purse) count(kind int, n int64) {
	if limitsOf(p.limit)[kind] > 0 {
		p.used[kind] += float64(n)
	}
}

// asked is what the issuer is told of: never more than there is.
func (p *purse) asked(kind int) uint32 {
	return uint32(min(math.Ceil(units(kind, p.used[kind])), math.Ceil(units(kind, limitsOf(p.limit)[kind])), 1<<31))
}

// age has what was used come back, in proportion to this gateway's part of it.
func (p *purse) age(now time.Time) {
	share := now.Sub(p.at).Seconds() / budgetTime.Seconds()
	for k := range connections {
		p.used[k] = max(p.used[k]-share*p.part[k], 0)
	}
	p.at = now
}

// touch is age for who uses the purse.
func (p *purse) touch(now time.Time) {
	p.age(now)
	p.seen = now
}

// over says which kind is used up.
func (p *purse) over(more float64) (kind int, is bool) {
	for k, l := range limitsOf(p.limit) {
		n := p.used[k]
		switch k {
		case names: // another one is counted by name
			continue
		case connections:
			n += more
		}
		if l > 0 && (n > p.part[k] || k != connections && more > 0 && n >= p.part[k]) {
			return k, true
		}
	}
	return 0, false
}

func (p *purse) refusal(kind int, host string) *Refusal {
	what := [budgetKinds]string{"bytes up in an hour", "bytes down in an hour", "names in an hour", "connections"}[kind]
	return refuse(ReasonBudget, "this workload has used up its budget of %.0f %s for %s: %.0f of the %.0f that are this gateway's part",
		limitsOf(p.limit)[kind], what, host, p.used[kind], p.part[kind])
}

// takeName takes a name, unless it was taken within the hour, and says whether it was
// there to be taken.
func (p *purse) takeName(host string, now time.Time) bool {
	if p.limit.Names == 0 {
		return true
	}
	if at, ok := p.known[host]; ok && now.Sub(at) < budgetTime {
		return true
	}
	if p.used[names]+1 > p.part[names] {
		return false
	}
	if len(p.known) >= p.limit.Names {
		maps.DeleteFunc(p.known, func(_ string, at time.Time) bool { return now.Sub(at) >= budgetTime })
	}
	if p.known == nil {
		p.known = map[string]time.Time{}
	}
	p.known[host] = now
	p.used[names]++
	return true
}

// purses are the budgets in use.
type purses struct {
	mu sync.Mutex // guards of
	of map[purseKey]*purse
}

type purseKey struct {
	who  spiffeid.ID
	host string // of the destination, which may be a pattern
}

// find gives the purse of a workload for a destination, nil when that has no budget.
func (ps *purses) find(who spiffeid.ID, how *mesh.Destination, now time.Time) (*purse, error) {
	if how.Budget == (mesh.Allowance{}) {
		return nil, nil
	}
	key := purseKey{who, how.Host}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.of[key]
	if p == nil {
		if len(ps.of) >= maxPurses {
			return nil, refuse(ReasonBudget, "%d budgets are in use, which is the limit", maxPurses)
		}
		sum := sha256.Sum256([]byte(key.who.String() + "\n" + key.host))
		p = &purse{name: "egress/" + hex.EncodeToString(sum[:16]), at: now}
		if ps.of == nil {
			ps.of = map[purseKey]*purse{}
		}
		ps.of[key] = p
	}
	p.mu.Lock()
	p.seen = now // so that it is not forgotten before it is used
	p.mu.Unlock()
	return p, nil
}

// open counts a tunnel in, or a request. It is counted out by shut.
func (ps *purses) open(t *tunnel, now time.Time) error {
	p, err := ps.find(t.call.Src, &t.how, now)
	if p == nil || err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.use(t.how.Budget)
	p.touch(now)
	if kind, over := p.over(1); over {
		return p.refusal(kind, t.how.Host)
	}
	if !p.takeName(t.host.String(), now) {
		return p.refusal(names, t.how.Host)
	}
	p.used[connections]++
	t.purse = p
	t.spend = func(up bool, n int) *Refusal {
		p.mu.Lock()
		defer p.mu.Unlock()
		kind := bytesDown
		if up {
			kind = bytesUp
		}
		p.touch(time.Now())
		p.count(kind, int64(n))
		t.spent[kind] += int64(n)
		if limitsOf(p.limit)[kind] > 0 && p.used[kind] > p.part[kind] {
			return p.refusal(kind, t.how.Host)
		}
		return nil
	}
	return nil
}

// lookUp takes the name of a host that a workload has looked up.
func (ps *purses) lookUp(who spiffeid.ID, host Host, how *mesh.Destination, now time.Time) error {
	p, err := ps.find(who, how, now)
	if p == nil || err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.use(how.Budget)
	p.touch(now)
	if !p.takeName(host.String(), now) {
		return p.refusal(names, how.Host)
	}
	return nil
}

// shut counts a tunnel out, with what went through it unseen. Of a request more is
// seen than t counts, which are bodies: its heads and framing stay taken.
func (ps *purses) shut(t *tunnel) {
	p := t.purse
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.touch(time.Now())
	p.used[connections]--
	p.count(bytesUp, max(t.up.Load()-t.spent[bytesUp], 0))
	p.count(bytesDown, max(t.down.Load()-t.spent[bytesDown], 0))
}

var kindNames = [budgetKinds]string{"-up", "-down", "-names", "-conns"}

// Demands are what this gateway's callers have used of budgets, the greatest part of
// a limit first: beyond some number they are not heard.
func (g *Gateway) Demands() (list []mesh.Demand) {
	now := time.Now()
	type use struct {
		mesh.Demand
		share float64
	}
	var uses []use
	ps := &g.tunnels.purses
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for key, p := range ps.of {
		p.mu.Lock()
		p.age(now)
		if now.Sub(p.seen) > idlePurse && p.used == [budgetKinds]float64{} {
			delete(ps.of, key)
		}
		for k, l := range limitsOf(p.limit) {
			if l > 0 {
				uses = append(uses, use{mesh.Demand{Quota: mesh.Quota{Route: p.name + kindNames[k]}, Calls: p.asked(k)}, p.used[k] / l})
			}
		}
		p.mu.Unlock()
	}
	slices.SortFunc(uses, func(a, b use) int {
		return cmp.Or(cmp.Compare(b.share, a.share), strings.Compare(a.Route, b.Route))
	})
	for _, u := range uses {
		list = append(list, u.Demand)
	}
	return list
}

// units are what the issuer counts in.
func units(kind int, n float64) float64 {
	if kind == connections || kind == names {
		return n
	}
	return n / kib
}

// Share takes this gateway's part of budgets. It holds until there is another; what
// is not told of has the first part again, since nobody levels it.
func (g *Gateway) Share(totals []mesh.Total) {
	of := make(map[string]mesh.Total, len(totals))
	for _, t := range totals {
		of[t.Route] = t
	}
	ps := &g.tunnels.purses
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, p := range ps.of {
		p.mu.Lock()
		for k, l := range limitsOf(p.limit) {
			t, ok := of[p.name+kindNames[k]]
			switch {
			case !ok:
				p.part[k] = first(k, l)
			case l > 0:
				p.part[k] = t.Part(units(k, l), p.asked(k)) * l / units(k, l)
				if k == connections || k == names { // a part of one opens none: where gateways are more than connections, nobody could
					p.part[k] = max(math.Ceil(p.part[k]), 1)
				}
			}
		}
		p.mu.Unlock()
	}
}
