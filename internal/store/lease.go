package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"
)

var (
	// ErrHeld says that another holder has the lease.
	ErrHeld = errors.New("lease is held")
	// ErrLost says that a lease ended and may have another holder. Nothing was
	// written.
	ErrLost = errors.New("lease was lost")
)

// LeaseConfig says which lease is wanted.
type LeaseConfig struct {
	// Store keeps the lease. Required.
	Store Store
	// Name is what is leased: one holder has it at a time. Required.
	Name string
	// Holder names the process, for people. Required.
	Holder string
	// TTL is how long the lease lasts from each renewal. Required.
	TTL time.Duration
	// Now is the clock, the same as that of Store. Default time.Now.
	Now func() time.Time
}

// A Lease lets one process at a time do a thing. A holder that was asleep may
// believe that it still has the lease; what it then writes through the lease
// is refused. Safe for concurrent use.
type Lease struct {
	cfg   LeaseConfig
	fence int64

	mu  sync.Mutex // guards rev, and orders writes through the lease
	rev int64
}

// leaseRecord is a lease in the store.
type leaseRecord struct {
	Holder string `json:"holder"`
	// Fence is 0 until the first renewal: it is then the record's revision.
	Fence int64 `json:"fence,omitempty"`
}

// Acquire takes the lease if nobody has it; ErrHeld names who does.
func (c LeaseConfig) Acquire(ctx context.Context) (*Lease, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	l := &Lease{cfg: c}
	op, err := l.op()
	if err != nil {
		return nil, err
	}
	none := int64(0)
	op.IfRevision = &none
	rev, err := c.Store.Write(ctx, op)
	if errors.Is(err, ErrConflict) {
		var r leaseRecord
		if rec, err := c.Store.Get(ctx, KindLease, c.Name); err == nil && json.Unmarshal(rec.Value, &r) == nil {
			return nil, fmt.Errorf("lease %q: %w: held by %s until %s", c.Name, ErrHeld, r.Holder, rec.Expires.Format(time.RFC3339))
		}
		return nil, fmt.Errorf("lease %q: %w", c.Name, ErrHeld)
	}
	if err != nil {
		return nil, fmt.Errorf("acquire lease %q: %w", c.Name, err)
	}
	l.fence, l.rev = rev, rev
	return l, nil
}

// Fence is a number that each later acquisition of any lease exceeds: the
// revision of this one. What lies outside of the store can refuse a smaller
// one than it has seen.
func (l *Lease) Fence() int64 { return l.fence }

// op is the step that prolongs the lease.
func (l *Lease) op() (Op, error) {
	value, err := json.Marshal(leaseRecord{l.cfg.Holder, l.fence})
	if err != nil {
		return Op{}, fmt.Errorf("lease %q: %w", l.cfg.Name, err)
	}
	return Op{Kind: KindLease, Key: l.cfg.Name, Value: value, Expires: l.cfg.Now().Add(l.cfg.TTL)}, nil
}

// Renew prolongs the lease by its TTL from now, or says ErrLost.
func (l *Lease) Renew(ctx context.Context) error {
	_, err := l.Write(ctx)
	return err
}

// Write applies the ops only if the lease is still held, and prolongs it, in
// one step. ErrLost says that it is not; ErrConflict that an op of the caller
// did not find what it expected.
func (l *Lease) Write(ctx context.Context, ops ...Op) (int64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	op, err := l.op()
	if err != nil {
		return 0, err
	}
	op.IfRevision = &l.rev
	// The renewal comes first: its revision is the first that is taken.
	rev, err := l.cfg.Store.Write(ctx, append([]Op{op}, ops...)...)
	if err == nil && len(ops) == 0 {
		l.rev = rev
		return rev, nil
	}
	// After other ops, and after an error, only the store knows.
	held, lerr := l.reread(ctx)
	switch {
	case err == nil:
		return rev, nil // a reread that failed makes the next Write lose
	case lerr == nil && !held:
		return 0, fmt.Errorf("lease %q: %w", l.cfg.Name, ErrLost)
	}
	return 0, fmt.Errorf("write under lease %q: %w", l.cfg.Name, err)
}

// reread finds the revision at which the lease is ours. mu is held.
func (l *Lease) reread(ctx context.Context) (held bool, err error) {
	rec, err := l.cfg.Store.Get(ctx, KindLease, l.cfg.Name)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var r leaseRecord
	if err := json.Unmarshal(rec.Value, &r); err != nil {
		return false, fmt.Errorf("decode lease %q: %w", l.cfg.Name, err)
	}
	if r.Fence != l.fence && rec.Revision != l.fence {
		return false, nil
	}
	l.rev = rec.Revision
	return true, nil
}

// Release gives the lease up. One that was lost already is not touched.
func (l *Lease) Release(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err := l.cfg.Store.Write(ctx, Op{Kind: KindLease, Key: l.cfg.Name, Delete: true, IfRevision: &l.rev})
	if err != nil && !errors.Is(err, ErrConflict) {
		return fmt.Errorf("release lease %q: %w", l.cfg.Name, err)
	}
	return nil
}
