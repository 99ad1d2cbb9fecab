package registry

import (
	"context"
	"errors"
	"fmt"
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

// ErrUnfit says that a set can't be in force as it is, and what is wrong with it.
var ErrUnfit = errors.New("policies refused")

// setKey orders sets by revision.
func setKey(revision uint64) string { return fmt.Sprintf("%s%020d", pushedSets, revision) }

// PushPolicies puts a set in force: it is validated, checked and stored, with
// the two before it. It must follow on what is in force, with a greater
// revision and its hash, or the error is ErrStale; after any error the old set
// stays. To push what is in force changes nothing. Who signed it is the
// caller's to have checked.
func (r *Registry) PushPolicies(ctx context.Context, s *policyset.Signed) error {
	r.applying.Lock()
	defer r.applying.Unlock()
	if s.TrustDomain != r.cfg.TrustDomain {
		return fmt.Errorf("%w: the set is for trust domain %q, this issuer serves %q", ErrUnfit, s.TrustDomain.Name(), r.cfg.TrustDomain.Name())
	}
	p, err := s.Policies()
	if err == nil {
		err = r.cfg.Check(p)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnfit, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		old := r.state.Load().accepted
		if old != nil && old.Set == s.Hash() {
			return nil
		}
		if err := follows(s, old); err != nil {
			return err
		}
		ops, err := r.setOps(ctx, s)
		if err != nil {
			return err
		}
		err = r.accept(ctx, &accepted{Revision: s.Revision, Hash: p.Hash(), Policies: p, Set: s.Hash()}, old, ops...)
		switch {
		case err == nil:
			r.refusal.Store(nil)
			if err := r.settleLost(ctx); err != nil {
				r.cfg.Log.Error("policies accepted, but not yet revoked what they withdraw", "error", err)
			}
			return nil
		case !errors.Is(err, store.ErrConflict):
			return err
		}
		// Another issuer was faster.
		if err := r.adopt(ctx); err != nil {
			return err
		}
	}
}

// follows says why a set does not come after the one in force.
func follows(s *policyset.Signed, old *accepted) error {
	now := accepted{}
	if old != nil {
		now = *old
	}
	switch {
	case s.Revision <= now.Revision:
		return fmt.Errorf("%w: it has revision %d, in force is revision %d", ErrStale, s.Revision, now.Revision)
	case s.Previous != now.Set:
		return fmt.Errorf("%w: it follows on set %s, in force is %s", ErrStale, named(s.Previous), named(now.Set))
	}
	return nil
}

func named(hash string) string {
	if hash == "" {
		return "none"
	}
	return hash
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
