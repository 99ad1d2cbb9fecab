package proxy

import (
	"sync"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/upstream"
)

// samples count the calls of routes whose rollout is under way, to the canary
// and to the others, between two reports.
type samples struct {
	mu    sync.Mutex // guards sides
	sides map[sideKey]*side
}

type sideKey struct {
	service mesh.ServiceName
	route   string
	canary  bool
}

// A side counts the tries of one of both.
type side struct {
	mu sync.Mutex // guards the fields below
	n  mesh.Calls
}

// use gives the backends of a policy what counts their calls. What is counted no
// more is forgotten.
func (s *samples) use(p *policy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := map[sideKey]*side{}
	if p.table != nil {
		for set := range p.table.All {
			for _, r := range set.Routes {
				if !r.Watched {
					continue
				}
				if p.sides == nil {
					p.sides = make([]*side, p.table.Size())
				}
				for b := range r.Each {
					k := sideKey{set.File.Service, r.Name, b.Canary}
					if next[k] == nil {
						next[k] = s.sides[k]
					}
					if next[k] == nil {
						next[k] = new(side)
					}
					p.sides[b.ID] = next[k]
				}
			}
		}
	}
	s.sides = next
}

// Samples is what was counted since it was last asked, without what a fault of
// ours has touched.
func (o *Outbound) Samples() (out []mesh.Sample) {
	s := &o.samples
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, counts := range s.sides {
		counts.mu.Lock()
		n := counts.n
		counts.n = mesh.Calls{}
		counts.mu.Unlock()
		if n.N > 0 {
			out = append(out, mesh.Sample{Service: k.service, Route: k.route, Canary: k.canary, Calls: n})
		}
	}
	return out
}

// sample counts a try that came to an end, or to nothing. What a fault of ours
// did, or a caller who did not wait, says nothing of the backend, and what is done
// for a shadow is no user's. A call that the backend's policy denies has failed:
// its row may be forgotten.
func (x *call) sample(o upstream.Outcome, at time.Time) {
	t := &x.tries
	if x.to == nil || x.to.side == nil || t.fault != nil || x.marked || o == upstream.Ignored {
		return
	}
	s := x.to.side
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n.N++
	if o != upstream.OK || t.denied {
		s.n.Failed++
		return
	}
	s.n.Took.Count(mesh.Bucket(at.Sub(t.sent)), 1)
}
