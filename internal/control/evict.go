package control

import (
	"context"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// evictions ends the streams of an agent that must go.
type evictions struct {
	mu   sync.Mutex
	open map[spiffeid.ID]map[*context.CancelCauseFunc]bool // guarded by mu
}

// watch returns a context that ends when the agent is evicted, for the reason
// given there.
func (v *evictions) watch(ctx context.Context, id spiffeid.ID) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.open == nil {
		v.open = map[spiffeid.ID]map[*context.CancelCauseFunc]bool{}
	}
	if v.open[id] == nil {
		v.open[id] = map[*context.CancelCauseFunc]bool{}
	}
	v.open[id][&cancel] = true
	return ctx, func() {
		cancel(nil)
		v.mu.Lock()
		defer v.mu.Unlock()
		if delete(v.open[id], &cancel); len(v.open[id]) == 0 {
			delete(v.open, id)
		}
	}
}

// evict ends every open stream of an agent, with an error that tells it why.
func (s *Server) evict(id spiffeid.ID, why error) {
	s.evictions.mu.Lock()
	defer s.evictions.mu.Unlock()
	for cancel := range s.evictions.open[id] {
		(*cancel)(why)
	}
}
