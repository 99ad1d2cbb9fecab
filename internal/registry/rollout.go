package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
	"sallyport/internal/store"
)

const (
	// rolloutKey is the key of the rollout that is under way or was the last,
	// and of the lease of the issuer that conducts it. The set that is tried and
	// the one to go back by are beside it.
	rolloutKey  = "policies"
	triedSet    = rolloutKey + "/set"
	fallbackSet = rolloutKey + "/fallback"
)

// rolloutRecord is a rollout in the store.
type rolloutRecord struct {
	Rollout mesh.Rollout `json:"rollout"`
	// Floor is the highest revision that was given to any proxy or signed for a
	// fallback: what follows is above, so that no revision means two things.
	// Whatever is put in force writes it, so that it and the begin of a rollout
	// at another issuer are in each other's way.
	Floor uint64 `json:"floor"`
	// Members are the canary proxies that were seen: one that is not there any
	// more is missed.
	Members []member `json:"members,omitempty"`
	// First are those of them who were there when it began, and who bake it:
	// those who come later do not put off its end.
	First []member `json:"first,omitempty"`
}

// A member is a canary proxy.
type member struct {
	Agent    spiffeid.ID `json:"agent"`
	Workload spiffeid.ID `json:"workload"`
}

// A rollout is the newest rollout, under way or over. It is immutable.
type rollout struct {
	rolloutRecord
	// stored is the revision of its record.
	stored int64
	// What stands below is there while it is under way.
	group   mesh.Group
	members map[proxyKey]bool
	// set is tried, by back they go back to what it was before; nil when they
	// cannot. What they say is in tried and former.
	set, back     *policyset.Signed
	tried, former *accepted
	snapshot      *mesh.Snapshot // nil when this issuer cannot read it
}

// serves reports whether the canary proxies are to act on another snapshot
// than the fleet.
func (ro *rollout) serves() bool { return ro != nil && ro.snapshot != nil }

// active reports whether it is under way.
func (ro *rollout) active() bool { return ro != nil && ro.Rollout.Active() }

// floor is the revision above which the next set has to be.
func (ro *rollout) floor() uint64 {
	if ro == nil {
		return 0
	}
	return ro.Floor
}

// has reports whether a proxy is a canary. Who was one stays one: it would
// refuse the lower revision of the fleet.
func (ro *rollout) has(agent, workload spiffeid.ID, kind string, facts []mesh.Selector) bool {
	return ro.members[proxyKey{agent, workload}] || ro.group.Has(agent, workload, kind, facts)
}

// as is the rollout with another record. Once it is over, nothing but the
// record is left.
func (ro *rollout) as(rec rolloutRecord, stored int64) *rollout {
	if !rec.Rollout.Active() {
		return &rollout{rolloutRecord: rec, stored: stored}
	}
	next := *ro
	next.rolloutRecord, next.stored = rec, stored
	next.members = make(map[proxyKey]bool, len(rec.Members))
	for _, m := range rec.Members {
		next.members[proxyKey{m.Agent, m.Workload}] = true
	}
	return &next
}

// op writes the record in the place of ro's.
func (rec rolloutRecord) op(in *rollout) (store.Op, error) {
	value, err := json.Marshal(rec)
	if err != nil {
		return store.Op{}, fmt.Errorf("encode rollout: %w", err)
	}
	at := int64(0)
	if in != nil {
		at = in.stored
	}
	return store.Op{Kind: store.KindRollout, Key: rolloutKey, Value: value, IfRevision: &at}, nil
}

// finish returns what becomes of a rollout when a revision is put in force for
// all, and what is to be written, its record last.
func (r *Registry) finish(ro *rollout, revision uint64, how mesh.RolloutState, why string) (*rollout, []store.Op, error) {
	var rec rolloutRecord
	if ro != nil {
		rec = ro.rolloutRecord
	}
	var ops []store.Op
	if ro.active() {
		v := ro.judge(r.Proxies(), r.cfg.Now(), r.cfg.Now())
		rec.Rollout.State, rec.Rollout.Why, rec.Rollout.Ended = how, why, r.cfg.Now().UTC()
		rec.Rollout.Members, rec.Rollout.Acked, rec.Members, rec.First = len(v.members), v.acked, nil, nil
		ops = append(ops, store.Op{Kind: store.KindRollout, Key: triedSet, Delete: true}, store.Op{Kind: store.KindRollout, Key: fallbackSet, Delete: true})
	}
	rec.Floor = max(rec.Floor, revision)
	op, err := rec.op(ro)
	return ro.as(rec, 0), append(ops, op), err
}

// loadRollout reads the rollout, nil when there never was one. What was read
// before is not read again. A set that this issuer cannot read is not tried by
// its proxies: they keep what they have.
func (r *Registry) loadRollout(ctx context.Context, had *rollout) (*rollout, error) {
	rec, err := r.cfg.Store.Get(ctx, store.KindRollout, rolloutKey)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("load rollout: %w", err)
	}
	var rr rolloutRecord
	if err := json.Unmarshal(rec.Value, &rr); err != nil {
		return nil, fmt.Errorf("load rollout: this issuer cannot read what the store holds; run the version that wrote it: %w", err)
	}
	if had == nil || had.Rollout.Revision != rr.Rollout.Revision || !had.serves() {
		had = &rollout{}
		if rr.Rollout.Active() {
			if err := r.loadSets(ctx, had, rr.Rollout); err != nil {
				return nil, err
			}
		}
	}
	return had.as(rr, rec.Revision), nil
}

// loadSets reads the sets of a rollout that is under way, and counts their
// signatures again: what else the record says is not believed.
func (r *Registry) loadSets(ctx context.Context, ro *rollout, of mesh.Rollout) error {
	read := func(key string, revision uint64) (*policyset.Signed, *accepted, error) {
		rec, err := r.cfg.Store.Get(ctx, store.KindRollout, key)
		if err != nil {
			return nil, nil, err
		}
		s, err := policyset.Parse(rec.Value)
		if err != nil {
			return nil, nil, err
		}
		if s.TrustDomain != r.cfg.TrustDomain || s.Revision != revision {
			return nil, nil, fmt.Errorf("set %.12s of %s, revision %d, stands where revision %d should", s.Hash(), s.TrustDomain.Name(), s.Revision, revision)
		}
		c, err := r.tested(s)
		if err != nil {
			return nil, nil, err
		}
		return s, r.acceptedSet(s, c), nil
	}
	group, err := mesh.ParseGroup(of.Group)
	var set, back *policyset.Signed
	var tried, former *accepted
	if err == nil {
		set, tried, err = read(triedSet, of.Revision)
	}
	if err == nil && of.Fallback > 0 {
		back, former, err = read(fallbackSet, of.Fallback)
		if err == nil && (back.Previous != set.Previous || back.Revision <= set.Revision) {
			err = fmt.Errorf("the fallback of revision %d does not belong to it", back.Revision)
		}
	}
	switch {
	case errors.Is(err, store.ErrNotFound):
		// It ended between two readings; the next change says so.
	case ctx.Err() != nil:
		return fmt.Errorf("load rollout: %w", err)
	case err != nil:
		r.cfg.Log.Error("the set of the rollout is not taken: its proxies at this issuer keep what they have", "revision", of.Revision, "error", err)
	default:
		ro.group, ro.set, ro.back, ro.tried, ro.former = group, set, back, tried, former
	}
	return nil
}

// try compiles what the canary proxies of a rollout act on, if it is under way
// and newer than what is in force. mu is held.
func (r *Registry) try(s *state, ro *rollout) *rollout {
	if ro == nil || ro.tried == nil {
		return ro
	}
	next := *ro
	next.snapshot = nil
	// What is tried, and what they go back by, follows on what is in force.
	if ro.active() && s.accepted != nil && ro.tried.Revision > s.accepted.Revision && ro.set.Previous == s.accepted.Set &&
		(ro.former == nil || ro.former.Hash == s.accepted.Hash) {
		next.snapshot = r.snapshotOf(ro.tried, s)
	}
	return &next
}

// moved is a rollout with the endpoints as they are now; the same one when they
// are no others. mu is held.
func (r *Registry) moved(s *state, ro *rollout) *rollout {
	if !ro.serves() {
		return ro
	}
	endpoints := r.eligible(s, ro.tried.Policies.Services)
	if slices.Equal(endpoints, ro.snapshot.Endpoints) {
		return ro
	}
	next, snapshot := *ro, *ro.snapshot
	snapshot.Endpoints = endpoints
	next.snapshot = &snapshot
	return &next
}

// adoptRollout takes what another issuer made of the rollout while what is in
// force is the same. Only what its proxies act on wakes them. mu is held.
func (r *Registry) adoptRollout(ro *rollout) {
	now := r.state.Load()
	if ro == now.rollout {
		return
	}
	next := *now
	if ro.serves() && ro.active() && now.rollout.serves() && now.rollout.Rollout.Revision == ro.Rollout.Revision {
		next.rollout = ro
		r.state.Store(&next)
		return
	}
	next.rollout = r.try(now, ro)
	r.tell(&next, ro.stored)
}

// tell puts a rollout in force for its canary proxies; the fleet is told
// nothing. mu is held.
func (r *Registry) tell(next *state, rev int64) {
	next.changed = make(chan struct{})
	if next.rollout.serves() {
		r.keepFile(next.rollout.tried)
	}
	next.rollout = next.rollout.numbered(max(uint64(rev), r.state.Load().newest()+1))
	close(r.state.Swap(next).changed)
}

// numbered is the rollout whose snapshot has a revision.
func (ro *rollout) numbered(rev uint64) *rollout {
	if !ro.serves() {
		return ro
	}
	next, snapshot := *ro, *ro.snapshot
	snapshot.Revision = rev
	next.snapshot = &snapshot
	return &next
}

// newest is the highest revision of a snapshot that was distributed.
func (s *state) newest() (rev uint64) {
	if s.snapshot != nil {
		rev = s.snapshot.Revision
	}
	if s.rollout.serves() {
		rev = max(rev, s.rollout.snapshot.Revision)
	}
	return rev
}

// SnapshotFor returns the snapshot that a proxy is to act on, and whether it is
// that of the canary group; nil before the first policies. The caller must not
// change it.
func (r *Registry) SnapshotFor(agent, workload spiffeid.ID, kind string) (s *mesh.Snapshot, canary bool) {
	now := r.state.Load()
	if now.rollout.serves() && now.rollout.has(agent, workload, kind, r.factsOf(agent)) {
		return now.rollout.snapshot, true
	}
	return now.snapshot, false
}

// older says that a change is news to what is in force or tried.
func (s *state) older(c store.Change) bool {
	if c.Kind == store.KindPolicy {
		return s.accepted == nil || s.accepted.stored < c.Revision
	}
	return c.Key == rolloutKey && (s.rollout == nil || s.rollout.stored < c.Revision)
}

// nextRevision is the first that no set has used.
func (s *state) nextRevision() uint64 {
	next := s.rollout.floor()
	if s.accepted != nil {
		next = max(next, s.accepted.Revision)
	}
	return next + 1
}
