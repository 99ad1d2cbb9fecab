package registry

import (
	"context"
	"errors"
	"fmt"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

// followAgents wakes who waits for Changed when another issuer banned or forgot
// one of some agents, so that its streams here end too. What agents do by
// themselves, such as renew, wakes nobody. mu is held.
func (r *Registry) followAgents(ctx context.Context, keys []string) error {
	for _, key := range keys {
		rec, err := r.cfg.Store.Get(ctx, store.KindAgent, key)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return fmt.Errorf("follow agents: %w", err)
		}
		var a mesh.Agent
		if err == nil {
			if a, err = decodeAgent(rec); err != nil {
				return err
			}
		}
		if a.ID.IsZero() || a.Banned {
			next := *r.state.Load()
			next.changed = make(chan struct{})
			close(r.state.Swap(&next).changed)
			return nil
		}
	}
	return nil
}
