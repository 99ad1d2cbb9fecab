// Package registry is what an issuer knows and distributes: the accepted
// policies, the endpoints of services, agents, join tokens, and the state of
// each proxy.
//
// What must survive a restart is in the store before a call returns; the rest
// is in memory. Several issuers may share a store: each follows what the others
// write. It reads no policy file and speaks no protocol. Run owns all
// background work. Lock order: applying before mu; those of fleet, edges,
// keys, federations and the ledger come last.
package registry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
	"sallyport/internal/store"
)

// A Config says what a Registry works with.
type Config struct {
	// Store keeps what must survive a restart. Required.
	Store store.Store
	// TrustDomain is the only one that policies and agents may belong to.
	// Required.
	TrustDomain spiffeid.TrustDomain
	// Log receives accepted policies and ended leases. Required.
	Log *slog.Logger
	// Check is asked before policies are accepted and says what is wrong with
	// them: the tests that reviewers wrote. Default: nothing is wrong.
	Check func(*mesh.Checked) error
	// Verify says why those who must have signed a set did not. With it no other
	// policies come into force, pushed or found in the store: what that says of
	// them is not believed. Default: nobody must have signed.
	Verify func(*policyset.Signed) error
	// OnUnsigned is told why policies in the store are passed over for that. It
	// does not call back. Default none.
	OnUnsigned func(error)
	// Floor is the newest signed set that ever was in force at this issuer, and
	// OnFloor is told of a newer one, to keep it beside the store: a store that
	// is set back is not followed. It does not call back. Default none.
	Floor   Floor
	OnFloor func(Floor)
	// Instance names this process among those that share the store: unique,
	// and another one at each start. Empty when the store is this process's
	// alone.
	Instance string
	// OnRevoke is told of what is revoked here, once it is durable.
	// It does not call back. Default none.
	OnRevoke func([]mesh.RevokedSVID)
	// OnRollout is told of each step of a rollout before it is made, and an
	// error keeps it from being made. It does not call back. Default none.
	OnRollout func(RolloutStep) error
	// OnFaultStop is told of each stop of faults before it is made; an error keeps
	// it from being made. Default none.
	OnFaultStop func(mesh.FaultStop) error
	// Now is the clock. Default time.Now.
	Now func() time.Time
}

// Validate reports every mistake.
func (c Config) Validate() error {
	var errs []error
	if c.Store == nil {
		errs = append(errs, errors.New("store: missing"))
	}
	if c.TrustDomain.IsZero() {
		errs = append(errs, errors.New("trust domain: missing"))
	}
	if c.Log == nil {
		errs = append(errs, errors.New("log: missing"))
	}
	return errors.Join(errs...)
}

// A Registry serves many proxies at once: every method is safe for concurrent
// use. Reads of Current, Entries and EntriesFor cost an atomic load.
type Registry struct {
	cfg     Config
	started time.Time
	state   atomic.Pointer[state]
	refusal atomic.Pointer[string]
	// calls are the entries made by calls.
	calls atomic.Pointer[kept]
	// agents holds a mesh.Agent by its ID. It is written under mu.
	agents sync.Map
	// nodes holds the []mesh.Selector of every agent by its ID. It is written
	// under mu, but for agents that are not in it.
	nodes sync.Map

	// applying lets one set of policies be judged at a time.
	applying sync.Mutex

	// parsing guards parsed, which knows the entries of the last set.
	parsing sync.Mutex
	parsed  mesh.Folder

	// mu orders every change of state, with its write to the store.
	mu        sync.Mutex
	endpoints map[mesh.Endpoint]*held
	// alive are the instances that share the store.
	alive map[string]bool
	// wake tells Run that the next end of a lease may be another.
	wake chan struct{}
	// files are the last signed sets that were in force, the newest first.
	files atomic.Pointer[[]setFile]
	// floor is the newest signed set that was in force.
	floor Floor
	// passed is the revision of the record of policies that are passed over.
	passed int64
	// lost says that something was withdrawn and may not be revoked yet.
	lost bool

	ledger  ledger
	revoked atomic.Pointer[mesh.RevokedSVIDs]
	stops   atomic.Pointer[mesh.FaultStops]
	// issuers is how many are alive.
	issuers atomic.Int32
	// deliveries are the rollouts of routes. It is replaced under mu.
	deliveries atomic.Pointer[map[deliveryKey]delivery]

	// seen is the revision up to which the changes of other issuers are known,
	// lease says to them that this one is alive. After Load, only follow and
	// only attend use them.
	seen  int64
	lease *store.Lease
	// recount says that an issuer came or went.
	recount atomic.Bool

	fleet       fleet
	edges       edges
	keys        keyring
	federations federations
}

// A state is everything that is read together. It is immutable.
type state struct {
	accepted *accepted      // nil before the first policies
	snapshot *mesh.Snapshot // nil before the first policies
	rollout  *rollout       // nil before the first
	// entries are those in force when it was made, lineage says whose they are,
	// and calls are those of them that were made by calls, and others.
	entries []mesh.Entry
	calls   *kept
	lineage *mesh.Lineage
	// lapses is when the first of them ends, zero if none does.
	lapses  time.Time
	changed chan struct{}
}

// lapsed says that one of the entries has ended since.
func (s *state) lapsed(now time.Time) bool { return !s.lapses.IsZero() && !now.Before(s.lapses) }

// New returns a registry that knows nothing until Load.
func New(cfg Config) (*Registry, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.OnUnsigned == nil {
		cfg.OnUnsigned = func(error) {}
	}
	if cfg.OnFloor == nil {
		cfg.OnFloor = func(Floor) {}
	}
	if cfg.Check == nil {
		cfg.Check = func(*mesh.Checked) error { return nil }
	}
	if cfg.OnRollout == nil {
		cfg.OnRollout = func(RolloutStep) error { return nil }
	}
	r := &Registry{
		cfg:       cfg,
		parsed:    mesh.Folder{TrustDomain: cfg.TrustDomain},
		started:   cfg.Now(),
		floor:     cfg.Floor,
		endpoints: make(map[mesh.Endpoint]*held),
		wake:      make(chan struct{}, 1),
	}
	r.state.Store(&state{lineage: mesh.NewLineage(nil), changed: make(chan struct{})})
	r.keys.changed, r.federations.changed = make(chan struct{}), make(chan struct{})
	return r, nil
}

// Load brings back the last accepted policies and the endpoints. It is called
// once, before anything else. Each endpoint is held for its lease from now on,
// so that proxies have the time to connect again before traffic is turned
// away from them.
func (r *Registry) Load(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.shared() {
		if err := r.join(ctx); err != nil {
			return err
		}
	}
	if err := errors.Join(r.loadKeys(ctx), r.loadFederations(ctx), r.loadDeliveries(ctx)); err != nil {
		return err
	}
	ro, err := r.loadRollout(ctx, nil)
	if err != nil {
		return err
	}
	// What follows is above all that was in force here, whatever the store says.
	if r.cfg.Verify != nil && ro.floor() < r.floor.Revision {
		if ro == nil {
			ro = new(rollout)
		}
		ro.Floor = r.floor.Revision
	}
	acc, err := r.loadPolicies(ctx)
	if errors.Is(err, errUnsigned) {
		acc, err = nil, nil // said; without policies nobody has a right
	}
	if err != nil {
		return err
	}
	if _, err := r.standing(ctx); err != nil {
		return err
	}
	if err := r.loadEndpoints(ctx); err != nil {
		return err
	}
	if _, err := r.loadEntries(ctx); err != nil {
		return err
	}
	if err := r.loadFaultStops(ctx); err != nil {
		return err
	}
	// This write gives what we distribute from now on a revision above all
	// that an earlier run may have distributed.
	rev, err := r.write(ctx, store.Op{Kind: store.KindLease, Key: "issuer/start", Value: []byte(r.cfg.Now().UTC().Format(time.RFC3339Nano))})
	if err != nil {
		return fmt.Errorf("load registry: %w", err)
	}
	if acc != nil {
		r.publish(r.compile(acc, ro), rev)
	} else {
		r.adoptRollout(ro)
	}
	// An issuer that was killed may have withdrawn what it did not revoke.
	if err := r.revokeGone(ctx); err != nil {
		return fmt.Errorf("load registry: %w", err)
	}
	return nil
}

// compile makes the state that follows from policies, a rollout and today's
// endpoints. mu is held.
func (r *Registry) compile(acc *accepted, ro *rollout) *state {
	next := r.register(acc)
	next.snapshot = r.snapshotOf(acc, next)
	next.rollout = r.try(next, ro)
	return next
}

// snapshotOf compiles policies with the endpoints and entries of a state. mu is
// held.
func (r *Registry) snapshotOf(acc *accepted, s *state) *mesh.Snapshot {
	snap := acc.checked.Compile(0, acc.Revision, r.eligible(s, acc.Policies.Services))
	if acc.file != nil {
		snap.PolicySet = acc.Set
	}
	snap.Shares = r.shares(acc.Policies)
	return snap
}

// register is a state that has no snapshot of its own yet, of policies and the
// entries beside them. mu is held.
func (r *Registry) register(acc *accepted) *state {
	now, calls := r.state.Load(), r.calls.Load()
	if now.accepted != nil && acc.checked.SameEntries(now.accepted.checked) && calls == now.calls && !now.lapsed(r.cfg.Now()) {
		next := *now
		next.accepted, next.changed = acc, make(chan struct{})
		return &next
	}
	at := r.cfg.Now()
	next := &state{accepted: acc, entries: r.union(acc.Policies.Entries, at), calls: calls, changed: make(chan struct{})}
	next.lineage = mesh.NewLineage(next.entries)
	for _, e := range next.entries {
		if e.ExpiresAt.After(at) && (next.lapses.IsZero() || e.ExpiresAt.Before(next.lapses)) {
			next.lapses = e.ExpiresAt
		}
	}
	return next
}

// publish puts a state in force under a revision, or a greater one: what is
// distributed here never goes back. mu is held.
func (r *Registry) publish(next *state, rev int64) {
	next.snapshot.Revision = max(uint64(rev), r.state.Load().newest()+1)
	next.rollout = next.rollout.numbered(next.snapshot.Revision)
	r.numberShares(next.snapshot.Revision)
	r.keepFile(next.accepted)
	r.raise(next.accepted)
	if next.rollout.serves() {
		r.keepFile(next.rollout.tried)
	}
	close(r.state.Swap(next).changed)
	if !next.lapses.IsZero() {
		r.rouse()
	}
}

// wakeAll closes Changed though nothing is distributed anew. mu is held.
func (r *Registry) wakeAll() {
	same := *r.state.Load()
	same.changed = make(chan struct{})
	close(r.state.Swap(&same).changed)
}

// write writes to the store. It does not stop half way when a caller goes
// away, so that the store and the memory say the same.
func (r *Registry) write(ctx context.Context, ops ...store.Op) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	return r.cfg.Store.Write(context.WithoutCancel(ctx), ops...)
}

// list reads every record of a kind.
func (r *Registry) list(ctx context.Context, kind store.Kind) ([]store.Record, error) {
	var all []store.Record
	for after := ""; ; after = all[len(all)-1].Key {
		page, err := r.cfg.Store.List(ctx, kind, after, store.MaxPage)
		if err != nil {
			return nil, err
		}
		all = append(all, page...)
		if len(page) < store.MaxPage {
			return all, nil
		}
	}
}

// Current returns the snapshot in force, nil before the first policies. The
// caller must not change it.
func (r *Registry) Current() *mesh.Snapshot { return r.state.Load().snapshot }

// Policies returns the reviewed set in force, nil before the first. The caller
// must not change it.
func (r *Registry) Policies() *mesh.Policies {
	if acc := r.state.Load().accepted; acc != nil {
		return acc.Policies
	}
	return nil
}

// Changed returns a channel that is closed when Current or Entries next
// change. Take the channel first and read afterwards, then no change is missed.
func (r *Registry) Changed() <-chan struct{} { return r.state.Load().changed }

// Entries returns every registration entry, in the order of the policies, and
// then those made by calls.
func (r *Registry) Entries() []mesh.Entry {
	acc := r.state.Load().accepted
	if acc == nil {
		return nil
	}
	return r.union(acc.Policies.Entries, r.cfg.Now())
}

// EntriesFor returns the entries whose parent is the agent or an alias of it,
// and those below them.
func (r *Registry) EntriesFor(agent spiffeid.ID) []mesh.Entry {
	return r.state.Load().lineage.Of(agent, r.factsOf(agent), r.cfg.Now())
}

// Status says what is in force and why the newest edit is not, if so.
func (r *Registry) Status() mesh.IssuerStatus {
	st := mesh.IssuerStatus{TrustDomain: r.cfg.TrustDomain, LastRefusal: r.LastRefusal(), Started: r.started}
	now := r.state.Load()
	st.NextRevision = now.nextRevision()
	if ro := now.rollout; ro != nil && ro.Rollout.Revision > 0 {
		last := ro.Rollout
		if ro.active() {
			v := ro.judge(r.Proxies(), r.cfg.Now(), r.cfg.Now())
			last.Members, last.Acked = len(v.members), v.acked
		}
		st.Rollout = &last
	}
	if s := now.snapshot; s != nil {
		st.Revision, st.PolicyRevision, st.PolicyHash = s.Revision, s.PolicyRevision, s.PolicyHash
		st.PolicySet = now.accepted.Set
	}
	return st
}
