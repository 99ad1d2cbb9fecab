package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
	"sallyport/internal/store"
)

const (
	// lostAfter is how long a canary proxy may be away, and how long after the
	// end of the bake one that is there may owe its answer: longer than it takes
	// to notice that an issuer is gone, and to come to another.
	lostAfter = 30 * time.Second
	// conductTTL is how long an issuer that dies holds up a rollout.
	conductTTL = 5 * time.Second
)

// A Trial is a set that goes to a canary group first.
type Trial struct {
	Set *policyset.Signed
	// Fallback says what is in force, under a revision above Set's: by it the
	// canary proxies go back without anybody signing. Without it they hold
	// until an operator decides.
	Fallback *policyset.Signed
	// Group are the selectors of mesh.ParseGroup.
	Group []string
	// Bake is how long they must do well; 0 lets only an operator promote.
	Bake time.Duration
	// By is who asks.
	By string
}

// A RolloutStep is something that is about to be done to a rollout.
type RolloutStep struct {
	// Step is one of the steps below.
	Step          string
	Revision      uint64
	Set, By, Why  string
	Group         []string
	Members, Acks int
}

// The steps of a rollout, and who makes those that nobody asks for.
const (
	StepTry      = "try"
	StepPromote  = "promote"
	StepTakeBack = "take_back"
	StepHold     = "hold"

	ByItself = "issuer"
)

// busy says that a rollout is in the way.
func (ro *rollout) busy() error {
	return fmt.Errorf("%w: revision %d is %s by the canary group (%s); first: sallyport policy promote, or sallyport policy rollback",
		ErrRolling, ro.Rollout.Revision, map[mesh.RolloutState]string{mesh.Baking: "tried", mesh.Held: "held"}[ro.Rollout.State], joined(ro.Rollout.Group))
}

// TryPolicies gives a set to a canary group; all others stay on what is in
// force. The set is reviewed, and follows, as one that is pushed. To try what is
// tried changes nothing.
func (r *Registry) TryPolicies(ctx context.Context, t Trial) error {
	r.applying.Lock()
	defer r.applying.Unlock()
	group, err := mesh.ParseGroup(t.Group)
	if err == nil && (t.Bake < 0 || t.Bake > mesh.MaxBake) {
		err = fmt.Errorf("bake: %s is not from 0 to %s", t.Bake, mesh.MaxBake)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnfit, err)
	}
	tried, err := r.review(t.Set)
	if err != nil {
		return err
	}
	now := r.state.Load()
	if ro := now.rollout; ro.active() && ro.Rollout.Set == t.Set.Hash() {
		return nil
	}
	former, err := r.mayTry(now, t)
	if err != nil {
		return err
	}
	rec := rolloutRecord{
		Rollout: mesh.Rollout{
			Revision: t.Set.Revision, Set: t.Set.Hash(), PolicyHash: tried.Hash, State: mesh.Baking, Group: t.Group,
			Bake: t.Bake, By: t.By, Started: r.cfg.Now().UTC(),
		},
		Floor: t.Set.Revision,
	}
	ops := []store.Op{{Kind: store.KindRollout, Key: triedSet, Value: t.Set.Encode()}}
	if t.Fallback != nil {
		rec.Rollout.Fallback, rec.Floor = t.Fallback.Revision, t.Fallback.Revision
		ops = append(ops, store.Op{Kind: store.KindRollout, Key: fallbackSet, Value: t.Fallback.Encode()})
	}
	ro := &rollout{group: group, tried: tried, set: t.Set, back: t.Fallback, former: former}
	all := 0
	for _, p := range r.Proxies() {
		if !p.Connected {
			continue
		}
		all++
		if group.Has(p.Agent, p.Workload, p.Kind, r.factsOf(p.Agent)) {
			rec.Members = append(rec.Members, member{p.Agent, p.Workload})
		}
	}
	rec.First = rec.Members
	if len(rec.Members) == 0 {
		return fmt.Errorf("%w: none of the %d connected proxies is in the canary group (%s); look at them with: sallyport policy status", ErrUnfit, all, joined(t.Group))
	}
	if err := r.step(StepTry, rec, t.By, fmt.Sprintf("to %d of %d connected proxies (%s), bake %s", len(rec.Members), all, joined(t.Group), t.Bake), 0); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.again(ctx, func() error { return r.beginTrial(ctx, t, ro, rec, ops) })
}

// mayTry says why a set cannot be tried now, and reads what its fallback says;
// nil when there is none.
func (r *Registry) mayTry(now *state, t Trial) (former *accepted, err error) {
	switch {
	case now.rollout.active():
		return nil, now.rollout.busy()
	case now.accepted == nil || now.accepted.Set == "":
		return nil, fmt.Errorf("%w: the fleet has no pushed set to stay on while a canary group tries another; push one without a canary group first", ErrUnfit)
	}
	if err := follows(t.Set, now); err != nil || t.Fallback == nil {
		return nil, err
	}
	back := t.Fallback
	c, err := r.signedPolicies(back)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: fallback: %w", ErrUnfit, err)
	case back.TrustDomain != r.cfg.TrustDomain || c.Hash() != now.accepted.Hash:
		return nil, fmt.Errorf("%w: the fallback does not say what revision %d says, which is in force", ErrUnfit, now.accepted.Revision)
	case back.Previous != now.accepted.Set:
		return nil, fmt.Errorf("%w: the fallback follows on set %s, in force is %s", ErrStale, named(back.Previous), now.accepted.Set)
	case back.Revision <= t.Set.Revision:
		return nil, fmt.Errorf("%w: the fallback has revision %d, which is not above revision %d that it would take back", ErrStale, back.Revision, t.Set.Revision)
	}
	if err := back.InReach(t.Set.Revision); err != nil {
		return nil, fmt.Errorf("%w: fallback: %w", ErrUnfit, err)
	}
	return r.acceptedSet(back, c), nil
}

// beginTrial writes a rollout and tells its canary proxies. mu is held.
func (r *Registry) beginTrial(ctx context.Context, t Trial, ro *rollout, rec rolloutRecord, ops []store.Op) error {
	now := r.state.Load()
	if _, err := r.mayTry(now, t); err != nil {
		return err
	}
	next := *now
	next.rollout = r.try(now, ro.as(rec, 0))
	op, err := rec.op(now.rollout)
	if err != nil {
		return err
	}
	rev, err := r.write(ctx, append(slices.Clone(ops), op)...)
	if err != nil {
		return fmt.Errorf("try policies: %w", err)
	}
	next.rollout.stored = rev
	r.tell(&next, rev)
	r.cfg.Log.Info("policies are tried by the canary group", "policy_revision", rec.Rollout.Revision, "set", rec.Rollout.Set, "proxies", len(rec.Members))
	return nil
}

// PromotePolicies puts the set that is tried in force for all. Without force
// every canary proxy must have acknowledged it. Revision is the one that is
// meant; 0 is whichever is tried.
func (r *Registry) PromotePolicies(ctx context.Context, revision uint64, force bool, by string) error {
	r.applying.Lock()
	defer r.applying.Unlock()
	now := r.state.Load()
	if acc := now.accepted; acc != nil && revision != 0 && acc.Revision == revision {
		return nil
	}
	ro, err := now.underWay(revision)
	if err != nil {
		return err
	}
	v := ro.judge(r.Proxies(), r.cfg.Now(), r.cfg.Now())
	why := fmt.Sprintf("%d of %d canary proxies acknowledged", v.acked, len(v.members))
	if v.acked < len(v.members) && !force {
		return fmt.Errorf("%w: %s; not yet: %s; wait, or promote with --force", ErrRolling, why, joined(v.missing))
	}
	return r.promote(ctx, ro, v, by, why)
}

// TakeBackPolicies ends a rollout: the canary proxies go back, by the fallback.
func (r *Registry) TakeBackPolicies(ctx context.Context, revision uint64, by string) error {
	r.applying.Lock()
	defer r.applying.Unlock()
	ro, err := r.state.Load().underWay(revision)
	if err != nil {
		return err
	}
	if ro.back == nil {
		return fmt.Errorf("%w: revision %d was pushed without a set to go back by; make one with: sallyport policy rollback %d --key FILE", ErrRolling, ro.Rollout.Revision, r.state.Load().accepted.Revision)
	}
	return r.takeBack(ctx, ro, ro.judge(r.Proxies(), r.cfg.Now(), r.cfg.Now()), by, "asked for by "+by)
}

// underWay returns the rollout of a revision, or why there is none.
func (s *state) underWay(revision uint64) (*rollout, error) {
	ro := s.rollout
	switch {
	case !ro.active():
		return nil, fmt.Errorf("%w: no set is tried by a canary group", ErrRolling)
	case revision != 0 && ro.Rollout.Revision != revision:
		return nil, fmt.Errorf("%w: revision %d is tried, not %d", ErrRolling, ro.Rollout.Revision, revision)
	case !ro.serves():
		return nil, fmt.Errorf("%w: this issuer cannot read the set of revision %d; ask an issuer of the version that took it", ErrRolling, ro.Rollout.Revision)
	}
	return ro, nil
}

// promote lets all proxies follow the canaries. applying is held.
func (r *Registry) promote(ctx context.Context, ro *rollout, v verdict, by, why string) error {
	if err := r.step(StepPromote, ro.rolloutRecord, by, why, v.acked); err != nil {
		return err
	}
	return r.conclude(ctx, ro, mesh.Promoted, why, func(*state) (*accepted, []store.Op, error) {
		ops, err := r.setOps(ctx, ro.set)
		next := *ro.tried
		return &next, ops, err
	})
}

// takeBack puts what is in force in force again, under the revision of the
// fallback, for all: the canary proxies take no lower one. applying is held.
func (r *Registry) takeBack(ctx context.Context, ro *rollout, v verdict, by, why string) error {
	if err := r.step(StepTakeBack, ro.rolloutRecord, by, why, v.acked); err != nil {
		return err
	}
	return r.conclude(ctx, ro, mesh.TakenBack, why, func(now *state) (*accepted, []store.Op, error) {
		ops := []store.Op{
			// It takes the place of the set that it repeats.
			{Kind: store.KindPolicy, Key: setKey(now.accepted.Revision), Delete: true},
			{Kind: store.KindPolicy, Key: setKey(ro.back.Revision), Value: ro.back.Encode()},
		}
		next := *ro.former
		return &next, ops, nil
	})
}

// conclude ends a rollout with a set in force for all.
func (r *Registry) conclude(ctx context.Context, ro *rollout, how mesh.RolloutState, why string, set func(*state) (*accepted, []store.Op, error)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.again(ctx, func() error {
		now := r.state.Load()
		if _, err := now.underWay(ro.Rollout.Revision); err != nil {
			return err // another issuer ended it
		}
		acc, ops, err := set(now)
		if err != nil {
			return err
		}
		over, more, err := r.finish(now.rollout, acc.Revision, how, why)
		if err != nil {
			return err
		}
		return r.accept(ctx, acc, now.accepted, over, append(ops, more...)...)
	})
}

// stay stops a rollout that has nothing to go back by.
func (r *Registry) stay(ctx context.Context, ro *rollout, v verdict, by string) error {
	if err := r.step(StepHold, ro.rolloutRecord, by, v.fail, v.acked); err != nil {
		return err
	}
	rec := ro.rolloutRecord
	rec.Rollout.State, rec.Rollout.Why = mesh.Held, v.fail
	return r.note(ctx, ro, rec)
}

// note replaces the record of a rollout that goes on. That another issuer was
// faster is no error.
func (r *Registry) note(ctx context.Context, ro *rollout, rec rolloutRecord) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.state.Load()
	if now.rollout != ro {
		return nil
	}
	op, err := rec.op(ro)
	if err != nil {
		return err
	}
	rev, err := r.write(ctx, op)
	if errors.Is(err, store.ErrConflict) {
		return r.adopt(ctx)
	}
	if err != nil {
		return fmt.Errorf("note the rollout: %w", err)
	}
	next := *now
	next.rollout = ro.as(rec, rev)
	r.state.Store(&next)
	return nil
}

// step has a step recorded before it is made.
func (r *Registry) step(step string, rec rolloutRecord, by, why string, acks int) error {
	err := r.cfg.OnRollout(RolloutStep{
		Step: step, Revision: rec.Rollout.Revision, Set: rec.Rollout.Set, By: by, Why: why,
		Group: rec.Rollout.Group, Members: len(rec.Members), Acks: acks,
	})
	if err != nil {
		return fmt.Errorf("record the rollout: %w", err)
	}
	return nil
}

// A verdict is how the canary proxies do.
type verdict struct {
	members []member
	acked   int
	// missing are those who have not acknowledged.
	missing []string
	// fail is why they have to go back; promote, that all others may follow.
	fail    string
	promote bool
}

// judge looks at the canary proxies. since is from when on this issuer would
// have heard of one that is there.
func (ro *rollout) judge(all []mesh.Proxy, now, since time.Time) verdict {
	canaries := make(map[member]mesh.Proxy)
	known := make(map[member]bool, len(ro.Members))
	for _, m := range ro.Members {
		known[m] = true
	}
	for _, p := range all {
		m := member{p.Agent, p.Workload}
		if p.Group == mesh.GroupCanary {
			canaries[m] = p
			known[m] = known[m] || p.Connected
		}
	}
	maps.DeleteFunc(known, func(_ member, is bool) bool { return !is })
	v := verdict{members: slices.SortedFunc(maps.Keys(known), func(a, b member) int {
		return cmp.Or(cmp.Compare(a.Workload.String(), b.Workload.String()), cmp.Compare(a.Agent.String(), b.Agent.String()))
	})}
	baked := ro.Rollout.Started.Add(ro.Rollout.Bake)
	late := ro.Rollout.Bake > 0 && !now.Before(baked.Add(lostAfter))
	failed, raw := 0, 0
	for _, m := range v.members {
		p := canaries[m]
		why := ""
		switch heard := later(since, p.LastSeen); {
		case p.State == mesh.Rejected:
			why = fmt.Sprintf("%s refuses revision %d: %s", m.Workload, ro.Rollout.Revision, p.Reason)
		case !p.Connected && now.Sub(heard) >= lostAfter:
			why = fmt.Sprintf("%s is lost: not connected since %s", m.Workload, heard.UTC().Format(time.RFC3339))
		case p.Connected && p.State == mesh.Synced:
			v.acked++
			if slices.Contains(ro.First, m) && now.Sub(p.Since) < ro.Rollout.Bake {
				raw++
			}
			continue
		case p.Connected && late:
			why = fmt.Sprintf("%s has not answered for revision %d within %s", m.Workload, ro.Rollout.Revision, ro.Rollout.Bake)
		}
		v.missing = append(v.missing, m.Workload.String())
		if why != "" {
			failed++
			v.fail = cmp.Or(v.fail, why)
		}
	}
	if failed > 1 {
		v.fail += fmt.Sprintf("; %d more failed", failed-1)
	}
	v.promote = v.fail == "" && ro.Rollout.Bake > 0 && !now.Before(baked) && len(v.members) > 0 && v.acked == len(v.members) && raw == 0
	return v
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// conduct looks after a rollout until ctx ends: in a shared store one issuer at
// a time does.
func (r *Registry) conduct(ctx context.Context) {
	c := &conductor{r: r}
	defer c.rest()
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for {
		changed := r.Changed()
		if !r.state.Load().rollout.active() {
			c.rest()
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
			continue
		}
		if err := c.look(ctx); err != nil && ctx.Err() == nil {
			r.cfg.Log.Error("rollout not looked after; trying again", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// A conductor is the issuer that looks after a rollout, while it has the lease.
type conductor struct {
	r     *Registry
	lease *store.Lease
	// since is from when on it has looked after this one.
	since time.Time
}

// take takes the lease, or keeps it, and reports whether it is ours.
func (c *conductor) take(ctx context.Context) (bool, error) {
	r := c.r
	if !r.shared() {
		c.since = later(c.since, r.started)
		return true, nil
	}
	if c.lease != nil {
		err := c.lease.Renew(ctx)
		if err == nil {
			return true, nil
		}
		if c.lease = nil; !errors.Is(err, store.ErrLost) {
			return false, err
		}
	}
	lease, err := store.LeaseConfig{
		Store: r.cfg.Store, Name: "rollout/" + rolloutKey, Holder: r.cfg.Instance, TTL: conductTTL, Now: r.cfg.Now,
	}.Acquire(ctx)
	if errors.Is(err, store.ErrHeld) {
		return false, nil
	}
	if err == nil {
		c.lease, c.since = lease, r.cfg.Now()
	}
	return err == nil, err
}

// rest gives the lease back.
func (c *conductor) rest() {
	if c.lease == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := c.lease.Release(ctx); err != nil {
		c.r.cfg.Log.Warn("the lease on the rollout ends by itself", "error", err)
	}
	c.lease = nil
}

// look judges the rollout once, and acts.
func (c *conductor) look(ctx context.Context) error {
	if ours, err := c.take(ctx); err != nil || !ours {
		return err
	}
	r := c.r
	r.applying.Lock()
	defer r.applying.Unlock()
	ro := r.state.Load().rollout
	if !ro.active() || !ro.serves() {
		return nil
	}
	v := ro.judge(r.Proxies(), r.cfg.Now(), c.since)
	switch held := ro.Rollout.State == mesh.Held; {
	case v.fail != "" && !held && ro.back != nil:
		return r.takeBack(ctx, ro, v, ByItself, v.fail)
	case v.fail != "" && !held:
		return r.stay(ctx, ro, v, ByItself)
	case v.promote && !held:
		return r.promote(ctx, ro, v, ByItself, fmt.Sprintf("%d of %d canary proxies acknowledged and did well for %s", v.acked, len(v.members), ro.Rollout.Bake))
	case !slices.Equal(v.members, ro.Members):
		rec := ro.rolloutRecord
		rec.Members = v.members
		return r.note(ctx, ro, rec)
	}
	return nil
}

// joined lists some of many.
func joined(list []string) string {
	const some = 5
	out := ""
	for i, s := range list[:min(len(list), some)] {
		if i > 0 {
			out += ", "
		}
		out += s
	}
	if len(list) > some {
		out += fmt.Sprintf(" and %d more", len(list)-some)
	}
	return out
}
