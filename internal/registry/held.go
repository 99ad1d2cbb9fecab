package registry

import (
	"context"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

// HeldAgent is GetAgent from memory, for those who ask again at every change:
// thousands of streams look at the same moment. What is written here shows at
// once; what another issuer writes, when its change is followed.
func (r *Registry) HeldAgent(ctx context.Context, id spiffeid.ID) (mesh.Agent, error) {
	if a, ok := r.agents.Load(id); ok {
		return a.(mesh.Agent), nil
	}
	// Under the lock, so that what is kept is not older than the last write here;
	// a later one of another issuer is followed after this.
	r.mu.Lock()
	defer r.mu.Unlock()
	a, err := r.GetAgent(ctx, id)
	if err == nil {
		r.agents.Store(id, a)
	}
	return a, err
}

// followAgents takes what other issuers wrote of some agents. It wakes who
// waits for Changed when one was banned or forgotten, so that its streams here
// end too, or has other entries by its selectors, and revokes what was given to
// it here meanwhile. What agents do by themselves, such as renew, wakes nobody.
// mu is held.
func (r *Registry) followAgents(ctx context.Context, keys []string) error {
	gone, others := false, false
	for _, key := range keys {
		id, err := spiffeid.FromString(key)
		if err != nil {
			continue // no stream is of such an agent
		}
		rec, err := r.cfg.Store.Get(ctx, store.KindAgent, key)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return fmt.Errorf("follow agents: %w", err)
		}
		var a mesh.Agent
		if err == nil {
			if a, err = decodeAgent(rec); err != nil {
				// Its streams end when they look; the other changes count.
				r.cfg.Log.Error("agent written by another issuer not understood", "agent", id, "error", err)
				a = mesh.Agent{}
			}
		}
		if a.ID.IsZero() {
			r.nodes.Delete(id)
		} else {
			others = r.learn(a) || others
		}
		gone = gone || a.ID.IsZero() || a.Banned
		if _, held := r.agents.Load(id); held && !a.ID.IsZero() {
			r.agents.Store(id, a)
		} else {
			r.agents.Delete(id)
		}
	}
	if others {
		if err := r.regroup(ctx); err != nil {
			return err
		}
	}
	if !gone {
		return nil
	}
	r.wakeAll()
	r.lost = true
	return r.settleLost(ctx)
}

// forgetAgents has every agent read anew. mu is held.
func (r *Registry) forgetAgents() {
	r.agents.Clear()
	r.wakeAll()
}
