package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
	"sallyport/internal/store"
)

const (
	// pushedSets begins the keys of sets as they were pushed, by revision.
	pushedSets = "set/"
	// keepSets is how many of them are kept, the one in force included.
	keepSets = 3
)

// ErrStale says that a set does not follow on the one in force: somebody else
// pushed meanwhile, or an old set is played back.
var ErrStale = errors.New("stale policy set")

// ErrRolling says that a rollout is under way, or that none is.
var ErrRolling = errors.New("rollout of policies")

// ErrUnfit says that a set can't be in force as it is, and what is wrong with it.
var ErrUnfit = errors.New("policies refused")

// errUnsigned says that the policies in the store are passed over.
var errUnsigned = errors.New("policies are not signed as they must be")

// setKey orders sets by revision.
func setKey(revision uint64) string { return fmt.Sprintf("%s%020d", pushedSets, revision) }

// PushPolicies puts a set in force: it is validated, checked and stored, with
// the two before it. It must follow on what is in force, with a greater
// revision than any before and the hash of that, or the error is ErrStale; while
// another is tried by a canary group it is ErrRolling. After any error the old
// set stays. To push what is in force changes nothing.
func (r *Registry) PushPolicies(ctx context.Context, s *policyset.Signed) error {
	return r.push(ctx, s, false)
}

// OvertakePolicies is PushPolicies that ends what a canary group tries.
func (r *Registry) OvertakePolicies(ctx context.Context, s *policyset.Signed) error {
	return r.push(ctx, s, true)
}

func (r *Registry) push(ctx context.Context, s *policyset.Signed, overtake bool) error {
	r.applying.Lock()
	defer r.applying.Unlock()
	next, err := r.review(s)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.again(ctx, func() error {
		now := r.state.Load()
		if now.accepted != nil && now.accepted.Set == s.Hash() {
			return nil
		}
		if now.rollout.active() && !overtake {
			return now.rollout.busy()
		}
		if err := follows(s, now); err != nil {
			return err
		}
		ops, err := r.setOps(ctx, s)
		if err != nil {
			return err
		}
		ro, more, err := r.finish(now.rollout, s.Revision, mesh.Overtaken, fmt.Sprintf("revision %d was pushed to all", s.Revision))
		if err != nil {
			return err
		}
		return r.accept(ctx, next, now.accepted, ro, append(ops, more...)...)
	})
}

// review checks what a set says, whoever is to act on it.
func (r *Registry) review(s *policyset.Signed) (*accepted, error) {
	if s.TrustDomain != r.cfg.TrustDomain {
		return nil, fmt.Errorf("%w: the set is for trust domain %q, this issuer serves %q", ErrUnfit, s.TrustDomain.Name(), r.cfg.TrustDomain.Name())
	}
	c, err := r.tested(s)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnfit, err)
	}
	return r.acceptedSet(s, c), nil
}

// maxConflicts bounds how often another issuer may be faster, or the database
// not as it was read.
const maxConflicts = 100

// again lets write put something in force, as often as another issuer is
// faster. mu is held.
func (r *Registry) again(ctx context.Context, write func() error) error {
	for try := 1; ; try++ {
		err := write()
		switch {
		case err == nil:
			r.refusal.Store(nil)
			if err := r.settleLost(ctx); err != nil {
				r.cfg.Log.Error("policies accepted, but not yet revoked what they withdraw", "error", err)
			}
			return nil
		case !errors.Is(err, store.ErrConflict) || try == maxConflicts:
			return err
		}
		if err := r.adopt(ctx); err != nil {
			return err
		}
	}
}

// follows says why a set does not come after the one in force.
func follows(s *policyset.Signed, at *state) error {
	now := accepted{}
	if at.accepted != nil {
		now = *at.accepted
	}
	switch {
	case s.Revision <= now.Revision:
		return fmt.Errorf("%w: it has revision %d, in force is revision %d", ErrStale, s.Revision, now.Revision)
	case s.Revision < at.nextRevision():
		return fmt.Errorf("%w: revision %d was given out with a rollout, the next is %d", ErrStale, s.Revision, at.nextRevision())
	case s.Previous != now.Set:
		return fmt.Errorf("%w: it follows on set %s, in force is %s", ErrStale, named(s.Previous), named(now.Set))
	}
	if err := s.InReach(at.nextRevision() - 1); err != nil {
		return fmt.Errorf("%w: %w", ErrUnfit, err)
	}
	return nil
}

func named(hash string) string {
	if hash == "" {
		return "none"
	}
	return hash
}

// signedPolicies are what a set says, once those who must have signed it did.
func (r *Registry) signedPolicies(s *policyset.Signed) (*mesh.Checked, error) {
	if r.cfg.Verify != nil {
		if err := r.cfg.Verify(s); err != nil {
			return nil, err
		}
	}
	p, err := r.parse(s)
	if err != nil {
		return nil, err
	}
	return r.check(p)
}

// parse reads a set. Its entries are most often those of the one before.
func (r *Registry) parse(s *policyset.Signed) (*mesh.Policies, error) {
	if s.TrustDomain != r.cfg.TrustDomain {
		return s.Policies() // which is refused, whatever it says
	}
	r.parsing.Lock()
	defer r.parsing.Unlock()
	return r.parsed.ParseFS(s.FS())
}

func (r *Registry) acceptedSet(s *policyset.Signed, c *mesh.Checked) *accepted {
	acc := &accepted{Revision: s.Revision, Hash: c.Hash(), Policies: c.Policies(), Set: s.Hash(), checked: c}
	if r.cfg.Verify != nil {
		acc.file = s.Encode()
	}
	return acc
}

// loadSigned is loadPolicies for policies that must be signed: the record in
// force names a set, and that says everything. Whoever else can write to the
// store changes nothing: the error is then errUnsigned, and was said. mu is
// held.
func (r *Registry) loadSigned(ctx context.Context, rec store.Record) (*accepted, error) {
	if rec.Revision == r.passed {
		return nil, errUnsigned
	}
	var pr policyRecord
	err := json.Unmarshal(rec.Value, &pr)
	if err == nil && pr.Set == "" {
		err = errors.New("they do not come from a set")
	}
	var acc *accepted
	if err == nil {
		kept, lost := r.cfg.Store.Get(ctx, store.KindPolicy, setKey(pr.Revision))
		if lost != nil && !errors.Is(lost, store.ErrNotFound) {
			return nil, fmt.Errorf("load policies: set of revision %d: %w", pr.Revision, lost)
		}
		if err = lost; err == nil {
			acc, err = r.readSigned(kept.Value, pr)
		}
	}
	if err == nil {
		acc.stored = rec.Revision
		return acc, nil
	}
	r.passed = rec.Revision
	err = fmt.Errorf("the policies of revision %d in the store are not taken, policy.signers have not signed them: %w", pr.Revision, err)
	r.Refuse(err)
	r.cfg.OnUnsigned(err)
	return nil, errUnsigned
}

// readSigned checks a set that the store holds, and its place in the order.
func (r *Registry) readSigned(b []byte, pr policyRecord) (*accepted, error) {
	s, err := policyset.Parse(b)
	if err != nil {
		return nil, err
	}
	old := r.state.Load().accepted
	switch {
	case s.TrustDomain != r.cfg.TrustDomain:
		return nil, fmt.Errorf("the set is for trust domain %q, this issuer serves %q", s.TrustDomain.Name(), r.cfg.TrustDomain.Name())
	case s.Revision != pr.Revision || s.Hash() != pr.Set:
		return nil, fmt.Errorf("set %.12s of revision %d stands where set %.12s should", s.Hash(), s.Revision, pr.Set)
	case old != nil && (s.Revision < old.Revision || s.Revision == old.Revision && s.Hash() != old.Set):
		return nil, fmt.Errorf("set %.12s of revision %d is no newer than that of revision %d in force", s.Hash(), s.Revision, old.Revision)
	case s.Revision < r.floor.Revision || s.Revision == r.floor.Revision && s.Hash() != r.floor.Set:
		return nil, fmt.Errorf("set %.12s has revision %d; set %.12s of revision %d was in force at this issuer: the store was set back", s.Hash(), s.Revision, r.floor.Set, r.floor.Revision)
	}
	if old != nil {
		if err := r.stale(s.Previous, old); err != nil {
			return nil, err
		}
	}
	c, err := r.tested(s)
	if err != nil {
		return nil, err
	}
	return r.acceptedSet(s, c), nil
}

// tested are the policies of a set once its tests have passed, of one that the
// store holds, too: whoever put it there may not have asked an issuer.
func (r *Registry) tested(s *policyset.Signed) (*mesh.Checked, error) {
	c, err := r.signedPolicies(s)
	if err == nil {
		err = r.cfg.Check(c)
	}
	return c, err
}

// stale refuses what follows on a set that is older than the one in force, as
// far as those are known here: no issuer takes it.
func (r *Registry) stale(previous string, now *accepted) error {
	before := r.files.Load()
	if before == nil || previous == now.Set {
		return nil
	}
	for _, f := range *before {
		if f.hash == previous && f.revision < now.Revision {
			return fmt.Errorf("it follows on set %.12s of revision %d, and revision %d was in force since", previous, f.revision, now.Revision)
		}
	}
	return nil
}

// A Floor is a signed set in the order of all sets; the zero Floor is before all.
type Floor struct {
	Revision uint64
	Set      string
}

// raise keeps the newest signed set that was in force. mu is held.
func (r *Registry) raise(acc *accepted) {
	if acc.file == nil || acc.Revision <= r.floor.Revision {
		return
	}
	r.floor = Floor{acc.Revision, acc.Set}
	r.cfg.OnFloor(r.floor)
}

// A setFile is a signed set as it is given out.
type setFile struct {
	hash     string
	revision uint64
	file     []byte
}

// keepFile holds a set that is given out, and those before it for proxies that
// are late. mu is held.
func (r *Registry) keepFile(acc *accepted) {
	var before []setFile
	if p := r.files.Load(); p != nil {
		before = *p
	}
	if acc.file == nil || slices.ContainsFunc(before, func(f setFile) bool { return f.hash == acc.Set }) {
		return
	}
	next := append([]setFile{{acc.Set, acc.Revision, acc.file}}, before[:min(len(before), keepSets-1)]...)
	r.files.Store(&next)
}

// PolicySetFile returns a signed set by its hash; mesh.ErrNotFound when it is
// none of the last that were in force here. The caller must not change it.
func (r *Registry) PolicySetFile(hash string) ([]byte, error) {
	// What is in force is there however many were tried since.
	now := r.state.Load()
	if acc := now.accepted; acc != nil && acc.file != nil && acc.Set == hash {
		return acc.file, nil
	}
	if ro := now.rollout; ro.serves() && ro.tried.file != nil && ro.tried.Set == hash {
		return ro.tried.file, nil
	}
	if p := r.files.Load(); p != nil {
		for _, f := range *p {
			if f.hash == hash {
				return f.file, nil
			}
		}
	}
	return nil, fmt.Errorf("policy set %.12s: %w", hash, mesh.ErrNotFound)
}

// setOps keep a set and forget those that are too many.
func (r *Registry) setOps(ctx context.Context, s *policyset.Signed) ([]store.Op, error) {
	kept, err := r.prefixed(ctx, store.KindPolicy, pushedSets)
	if err != nil {
		return nil, fmt.Errorf("push policies: %w", err)
	}
	var ops []store.Op
	for i, rec := range kept {
		if len(kept)-i >= keepSets {
			ops = append(ops, store.Op{Kind: store.KindPolicy, Key: rec.Key, Delete: true})
		}
	}
	return append(ops, store.Op{Kind: store.KindPolicy, Key: setKey(s.Revision), Value: s.Encode()}), nil
}

// PolicySet returns a set that was pushed, as it was; mesh.ErrNotFound when it
// is not kept. Revision 0 is the one before that in force.
func (r *Registry) PolicySet(ctx context.Context, revision uint64) ([]byte, error) {
	kept, err := r.prefixed(ctx, store.KindPolicy, pushedSets)
	if err != nil {
		return nil, fmt.Errorf("read policy set: %w", err)
	}
	var have []string
	for i, rec := range kept {
		if rec.Key == setKey(revision) || revision == 0 && i == len(kept)-2 {
			return rec.Value, nil
		}
		have = append(have, strings.TrimLeft(strings.TrimPrefix(rec.Key, pushedSets), "0"))
	}
	return nil, fmt.Errorf("policy set of revision %d: %w; kept are: %s", revision, mesh.ErrNotFound, strings.Join(have, ", "))
}
