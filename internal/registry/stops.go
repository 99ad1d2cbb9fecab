package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

// keepStop is how long a stop is kept after its Before: no fault that it holds for
// lasts longer.
const keepStop = 24 * time.Hour

// FaultStops are those in force, never nil.
func (r *Registry) FaultStops() *mesh.FaultStops {
	if s := r.stops.Load(); s != nil {
		return s
	}
	return &mesh.FaultStops{}
}

// StopFaults has every proxy end faults. It is durable on return, with the
// revision that proxies say which act on it.
func (r *Registry) StopFaults(ctx context.Context, s mesh.FaultStop) (uint64, error) {
	if r.cfg.OnFaultStop != nil {
		if err := r.cfg.OnFaultStop(s); err != nil {
			return 0, fmt.Errorf("stop faults: %w", err)
		}
	}
	value, err := json.Marshal(s)
	if err != nil {
		return 0, fmt.Errorf("stop faults: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	// One later in time takes the place of one before, unless that holds longer.
	for _, old := range r.FaultStops().All {
		if old.Fault == s.Fault && old.Before.After(s.Before) {
			return r.FaultStops().Revision, nil
		}
	}
	rev, err := r.write(ctx, store.Op{Kind: store.KindFaultStop, Key: s.Fault, Value: value, Expires: s.Before.Add(keepStop)})
	if err != nil {
		return 0, fmt.Errorf("stop faults: %w", err)
	}
	r.cfg.Log.Warn("faults stopped", "fault", s.Fault, "before", s.Before, "by", s.By)
	return uint64(rev), r.loadFaultStops(ctx)
}

// loadFaultStops reads which faults are stopped. mu is held.
func (r *Registry) loadFaultStops(ctx context.Context) error {
	records, err := r.list(ctx, store.KindFaultStop)
	if err != nil {
		return fmt.Errorf("load stops of faults: %w", err)
	}
	old := r.FaultStops()
	next := &mesh.FaultStops{Revision: old.Revision}
	for _, rec := range records {
		var s mesh.FaultStop
		if err := json.Unmarshal(rec.Value, &s); err != nil {
			return fmt.Errorf("load stop of fault %s: %w", rec.Key, err)
		}
		next.Revision = max(next.Revision, uint64(rec.Revision))
		next.All = append(next.All, s)
	}
	slices.SortFunc(next.All, func(a, b mesh.FaultStop) int { return cmp.Compare(a.Fault, b.Fault) })
	r.stops.Store(next)
	if next.Revision != old.Revision {
		r.wakeAll()
	}
	return nil
}

// Issuers is how many issuers share the store.
func (r *Registry) Issuers() int { return int(max(r.issuers.Load(), 1)) }
