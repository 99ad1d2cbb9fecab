package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"sallyport/internal/store"
)

const (
	// planKey is the key of the record of the shared roots, and of the lease
	// under which one issuer at a time changes it.
	planKey = "roots"
	// issuerReports begins the keys of what issuers say of themselves.
	issuerReports = "issuer/"

	// stepTTL is how long an issuer that dies in a step holds up the others.
	stepTTL = 5 * time.Second
	// stepPoll is how often one that waits for another looks again.
	stepPoll = 100 * time.Millisecond
)

// An issuerRecord is what an issuer says of itself, in the store.
type issuerRecord struct {
	// Instance is which start of the issuer says so.
	Instance string `json:"instance"`
	Said     []byte `json:"said"`
}

// RootPlan returns the record of the roots that the issuers share, nil before
// the first.
func (r *Registry) RootPlan(ctx context.Context) ([]byte, error) {
	rec, err := r.cfg.Store.Get(ctx, store.KindAuthority, planKey)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read shared roots: %w", err)
	}
	return rec.Value, nil
}

// EditRootPlan lets one issuer at a time replace the record of the roots, under
// a lease whose fence refuses an issuer that was asleep meanwhile. Root, as DER,
// is that which signs from now on. Nothing is written when edit returns nil.
func (r *Registry) EditRootPlan(ctx context.Context, edit func(was []byte) (plan, root []byte, err error)) error {
	lease, err := r.leaseRoots(ctx)
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if err := lease.Release(ctx); err != nil {
			r.cfg.Log.Warn("the lease on the shared roots ends by itself", "error", err)
		}
	}()
	rec, err := r.cfg.Store.Get(ctx, store.KindAuthority, planKey)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("read shared roots: %w", err)
	}
	plan, root, err := edit(rec.Value)
	if err != nil || plan == nil {
		return err
	}
	_, err = lease.Write(ctx,
		store.Op{Kind: store.KindAuthority, Key: planKey, Value: plan, IfRevision: &rec.Revision},
		// An issuer that knows no plan checks its root against this at its start.
		store.Op{Kind: store.KindAuthority, Key: rootsKey, Value: root})
	if err != nil {
		return fmt.Errorf("write shared roots: %w", err)
	}
	return nil
}

// leaseRoots waits for the lease until ctx ends.
func (r *Registry) leaseRoots(ctx context.Context) (*store.Lease, error) {
	ticker := time.NewTicker(stepPoll)
	defer ticker.Stop()
	for {
		lease, err := store.LeaseConfig{
			Store: r.cfg.Store, Name: planKey, Holder: r.cfg.Instance, TTL: stepTTL, Now: r.cfg.Now,
		}.Acquire(ctx)
		if err == nil {
			return lease, nil
		}
		if !errors.Is(err, store.ErrHeld) {
			return nil, fmt.Errorf("lease on the shared roots: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("lease on the shared roots: %w", err)
		case <-ticker.C:
		}
	}
}

// TellIssuers replaces what this issuer said before. Name is that over
// restarts.
func (r *Registry) TellIssuers(ctx context.Context, name string, said []byte) error {
	value, err := json.Marshal(issuerRecord{r.cfg.Instance, said})
	if err == nil {
		_, err = r.write(ctx, store.Op{Kind: store.KindAuthority, Key: issuerReports + name, Value: value})
	}
	if err != nil {
		return fmt.Errorf("tell the other issuers: %w", err)
	}
	return nil
}

// IssuersSay returns what each live issuer said last, by name. One that lives
// and said nothing since its start is named by its instance, with nil.
func (r *Registry) IssuersSay(ctx context.Context) (map[string][]byte, error) {
	alive, err := r.living(ctx)
	if err != nil {
		return nil, fmt.Errorf("hear the other issuers: %w", err)
	}
	records, err := r.prefixed(ctx, store.KindAuthority, issuerReports)
	if err != nil {
		return nil, fmt.Errorf("hear the other issuers: %w", err)
	}
	out := make(map[string][]byte, len(alive))
	for _, rec := range records {
		var ir issuerRecord
		if err := json.Unmarshal(rec.Value, &ir); err != nil {
			return nil, fmt.Errorf("decode %s: %w", rec.Key, err)
		}
		if alive[ir.Instance] {
			delete(alive, ir.Instance)
			out[strings.TrimPrefix(rec.Key, issuerReports)] = ir.Said
		}
	}
	for instance := range alive {
		out[instance] = nil
	}
	return out, nil
}
