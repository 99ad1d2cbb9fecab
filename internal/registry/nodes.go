package registry

import (
	"context"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

// factsOf are the selectors that an agent was attested with, as far as this
// issuer knows: aliases are judged by them.
func (r *Registry) factsOf(agent spiffeid.ID) []mesh.Selector {
	if s, ok := r.nodes.Load(agent); ok {
		return s.([]mesh.Selector)
	}
	return nil
}

// learn takes what a record says of an agent's selectors, and reports whether
// an agent that was known has other entries by them. Whoever is new here has
// nothing open that could be judged otherwise: that would wake every stream for
// each of thousands that join. mu is held.
func (r *Registry) learn(a mesh.Agent) bool {
	old, known := r.nodes.Swap(a.ID, a.Selectors)
	if !known || slices.Equal(old.([]mesh.Selector), a.Selectors) {
		return false
	}
	l, now := r.state.Load().lineage, r.cfg.Now()
	return !slices.EqualFunc(l.Of(a.ID, old.([]mesh.Selector), now), l.Of(a.ID, a.Selectors, now), func(x, y mesh.Entry) bool { return x.ID == y.ID })
}

// regroup acts on what learn reported: what the agents have no entry for any
// more is revoked, their endpoints go or come, and their streams look again. mu
// is held.
func (r *Registry) regroup(ctx context.Context) error {
	r.lost = true
	rev, err := r.cfg.Store.Revision(ctx)
	if err != nil {
		return fmt.Errorf("follow the selectors of agents: %w", err)
	}
	r.refresh(rev)
	r.wakeAll()
	return r.settleLost(ctx)
}

// standing reads the agents. It says of each why it may hold nothing, empty when
// it may. One that cannot be read does not keep the others from being judged:
// it gets nothing new, and what it has ends by itself. mu is held.
func (r *Registry) standing(ctx context.Context) (map[spiffeid.ID]string, error) {
	records, err := r.list(ctx, store.KindAgent)
	if err != nil {
		return nil, fmt.Errorf("list agents: %w", err)
	}
	out, others := make(map[spiffeid.ID]string, len(records)), false
	for _, rec := range records {
		a, err := decodeAgent(rec)
		if err != nil {
			r.cfg.Log.Error("agent not understood, nothing of it is revoked", "agent", rec.Key, "error", err)
			a.ID, err = spiffeid.FromString(rec.Key)
		} else {
			others = r.learn(a) || others
		}
		if err != nil {
			continue
		}
		out[a.ID] = ""
		if a.Banned {
			out[a.ID] = mesh.WhyBanned
		}
	}
	if others {
		r.lost = true
		rev, err := r.cfg.Store.Revision(ctx)
		if err != nil {
			return nil, fmt.Errorf("follow the selectors of agents: %w", err)
		}
		r.refresh(rev)
		r.wakeAll()
	}
	return out, nil
}
