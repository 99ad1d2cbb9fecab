package proxy

import (
	"slices"
	"sync/atomic"
	"time"

	"sallyport/internal/mesh"
)

const (
	// paceCalls are the calls by which a route's pace is known: the last ones.
	paceCalls = 256
	// paceEvery is after how many of them it is found anew, and the least by which
	// it is known at all: the 95th of a hundred is then seen.
	paceEvery = 64
	// leastPace keeps a route that answers at once from asking twice for what a
	// pause of the machine holds up.
	leastPace = time.Millisecond
)

// A pace is in which time a share of the calls of a route has been answered
// lately. Answers that come in the same moment may take the place of one another;
// one of 256 changes little.
type pace struct {
	of   mesh.Hedge
	due  atomic.Int64 // nanoseconds
	n    atomic.Uint32
	took [paceCalls]atomic.Uint32 // microseconds
}

func newPace(h *mesh.Hedge) *pace {
	p := &pace{of: *h}
	p.due.Store(int64(h.Max))
	return p
}

// late is after what time a call is later than the share of them.
func (p *pace) late() time.Duration { return time.Duration(p.due.Load()) }

// add counts how long a call took until its answer began. That of a call which was
// sent twice counts as well, whoever answered: it was later than the share, and
// is counted as that.
func (p *pace) add(d time.Duration) {
	n := p.n.Add(1)
	p.took[n%paceCalls].Store(uint32(min(max(d.Microseconds(), 1), 1<<31)))
	if n%paceEvery != 0 {
		return
	}
	var last [paceCalls]uint32
	known := last[:0]
	for i := range p.took {
		if t := p.took[i].Load(); t > 0 {
			known = append(known, t)
		}
	}
	slices.Sort(known)
	t := time.Duration(known[len(known)*int(p.of.Of)/mesh.Whole]) * time.Microsecond
	p.due.Store(int64(min(max(t, leastPace), p.of.Max)))
}

// A paceKey says of which route a pace is.
type paceKey struct{ service, route string }

// keepPace has a policy go on with what is known from the one before, of routes
// that hedge as they did.
func (p *policy) keepPace(before *policy) {
	if p.plans == nil {
		return
	}
	p.paces = map[paceKey]*pace{}
	for set := range p.table.All {
		for _, r := range set.Routes {
			plan := p.plans[r.ID]
			if plan.pace == nil {
				continue
			}
			k := paceKey{set.File.Of(), r.Name}
			if before != nil {
				if was := before.paces[k]; was != nil && was.of == plan.pace.of {
					plan.pace = was
				}
			}
			p.paces[k] = plan.pace
		}
	}
}
