package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

// currentPolicies is the key of the policies in force.
const currentPolicies = "current"

// accepted is a reviewed set that passed every check. It is immutable.
type accepted struct {
	// Revision counts accepted sets, from 1.
	Revision uint64
	Hash     string
	Policies *mesh.Policies
	// Set is the hash of the set that was pushed; empty of files.
	Set string
	// file is that set as it was signed; nil when nobody must have signed it.
	file []byte
	// checked is the proof that they are valid.
	checked *mesh.Checked
	// stored is the revision of the record that holds it.
	stored int64
}

// policyRecord is an accepted set in the store.
type policyRecord struct {
	Revision uint64    `json:"revision"`
	Hash     string    `json:"hash"`
	At       time.Time `json:"at"`
	// Policies is what mesh.Policies.Encode wrote.
	Policies json.RawMessage `json:"policies"`
	Set      string          `json:"set,omitempty"`
}

// ApplyPolicies puts a reviewed set in force and returns its policy revision.
// The set is validated, checked, stored and published, in this order; an error
// in any of these leaves the old set in force, and LastRefusal says why. A set
// with the hash of the one in force changes nothing. The caller gives p away.
func (r *Registry) ApplyPolicies(ctx context.Context, p *mesh.Policies) (uint64, error) {
	r.applying.Lock()
	defer r.applying.Unlock()
	rev, err := r.apply(ctx, p)
	if err != nil {
		r.Refuse(err)
		return 0, err
	}
	r.refusal.Store(nil)
	return rev, nil
}

func (r *Registry) apply(ctx context.Context, p *mesh.Policies) (uint64, error) {
	if p == nil {
		return 0, errors.New("apply policies: there are none")
	}
	if p.TrustDomain != r.cfg.TrustDomain {
		return 0, fmt.Errorf("apply policies: they are written for trust domain %q, this issuer serves %q; check trust_domain in both", p.TrustDomain.Name(), r.cfg.TrustDomain.Name())
	}
	c, err := r.check(p)
	if err != nil {
		return 0, err
	}
	hash := c.Hash()
	if old := r.state.Load().accepted; old != nil && old.Hash == hash {
		return old.Revision, nil
	}
	if r.cfg.Verify != nil {
		return 0, errors.New("apply policies: they come from files, which nobody has signed")
	}
	if err := r.cfg.Check(c); err != nil {
		return 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		acc := &accepted{Revision: 1, Hash: hash, Policies: p, checked: c}
		old := r.state.Load().accepted
		if old != nil {
			if old.Hash == hash {
				return old.Revision, nil
			}
			acc.Revision = r.state.Load().nextRevision()
		}
		ro, ops, err := r.finish(r.state.Load().rollout, acc.Revision, mesh.Overtaken, "an edit of the policy files is in force")
		if err == nil {
			err = r.accept(ctx, acc, old, ro, ops...)
		}
		switch {
		case err == nil:
			if err := r.settleLost(ctx); err != nil {
				r.cfg.Log.Error("policies accepted, but not yet revoked what they withdraw", "error", err)
			}
			return acc.Revision, nil
		case !errors.Is(err, store.ErrConflict):
			return 0, err
		}
		// Another issuer was faster; ours comes after its.
		if err := r.adopt(ctx); err != nil {
			return 0, err
		}
	}
}

// check validates a set: the entries that are in force already were validated.
func (r *Registry) check(p *mesh.Policies) (*mesh.Checked, error) {
	var before *mesh.Checked
	if old := r.state.Load().accepted; old != nil {
		before = old.checked
	}
	return mesh.Check(p, before)
}

// accept stores and publishes a set that follows on old, with what else is to
// be written: the record of the rollout last. mu is held.
func (r *Registry) accept(ctx context.Context, acc, old *accepted, ro *rollout, with ...store.Op) error {
	value, err := json.Marshal(struct {
		policyRecord
		Policies *mesh.Policies `json:"policies"`
	}{policyRecord{Revision: acc.Revision, Hash: acc.Hash, At: r.cfg.Now().UTC(), Set: acc.Set}, acc.Policies})
	if err != nil {
		return fmt.Errorf("apply policies: encode: %w", err)
	}
	next := r.compile(acc, ro)
	at := r.passed
	if old != nil {
		at = max(at, old.stored)
	}
	// It comes last: the revision is then its own.
	rev, err := r.write(ctx, append(with, store.Op{Kind: store.KindPolicy, Key: currentPolicies, Value: value, IfRevision: &at})...)
	if err != nil {
		return fmt.Errorf("apply policies: %w", err)
	}
	acc.stored = rev
	next.rollout.stored = rev - 1
	r.lose(r.state.Load(), next)
	r.publish(next, rev)
	r.cfg.Log.Info("policies accepted", "policy_revision", acc.Revision, "revision", rev, "hash", acc.Hash)
	return nil
}

// adopt puts in force what another issuer accepted, and follows the rollout. The
// rollout is read first: what it has led to is then read too. mu is held.
func (r *Registry) adopt(ctx context.Context) error {
	now := r.state.Load()
	ro, err := r.loadRollout(ctx, now.rollout)
	if err != nil {
		return err
	}
	acc, err := r.loadPolicies(ctx)
	if errors.Is(err, errUnsigned) {
		acc, err = nil, nil // said; what is in force stays
	}
	if err != nil {
		return err
	}
	switch {
	case now.rollout == nil:
	case ro == nil: // its record is gone; the next write makes it anew
		ro = now.rollout.as(now.rollout.rolloutRecord, 0)
	case ro.stored <= now.rollout.stored:
		ro = now.rollout
	}
	if acc == nil || now.accepted != nil && now.accepted.stored >= acc.stored {
		r.adoptRollout(ro)
		return nil
	}
	next := r.compile(acc, ro)
	r.lose(r.state.Load(), next)
	r.publish(next, acc.stored)
	if acc.file != nil {
		r.refusal.Store(nil)
	}
	r.cfg.Log.Info("policies of another issuer in force", "policy_revision", acc.Revision, "hash", acc.Hash)
	return nil
}

// loadPolicies reads the last accepted set, nil if there is none.
func (r *Registry) loadPolicies(ctx context.Context) (*accepted, error) {
	rec, err := r.cfg.Store.Get(ctx, store.KindPolicy, currentPolicies)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("load policies: %w", err)
	}
	if r.cfg.Verify != nil {
		return r.loadSigned(ctx, rec)
	}
	var pr policyRecord
	if err := json.Unmarshal(rec.Value, &pr); err != nil {
		return nil, unreadable(err)
	}
	// Strict: a field that a newer issuer wrote may be one that forbids.
	p, err := mesh.DecodePolicies(pr.Policies)
	if err != nil {
		return nil, unreadable(err)
	}
	if p.TrustDomain != r.cfg.TrustDomain {
		return nil, fmt.Errorf("load policies: the store belongs to trust domain %q, this issuer serves %q; set trust_domain back or give another store", p.TrustDomain.Name(), r.cfg.TrustDomain.Name())
	}
	c, err := r.check(p)
	if err != nil {
		return nil, fmt.Errorf("load policies: what the store holds is not valid for this issuer: %w", err)
	}
	// Hashed anew: another version may hash another form of the same set.
	return &accepted{Revision: pr.Revision, Hash: c.Hash(), Policies: p, Set: pr.Set, checked: c, stored: rec.Revision}, nil
}

func unreadable(err error) error {
	return fmt.Errorf("load policies: this issuer cannot read what the store holds; run the version that wrote it, or move the store away to start empty: %w", err)
}

// Refuse records why the newest edit is not in force, for those who refuse it
// before it can be applied, such as the parser.
func (r *Registry) Refuse(err error) {
	text := err.Error()
	r.refusal.Store(&text)
}

// LastRefusal says why the newest edit of the policies is not in force; empty
// if it is.
func (r *Registry) LastRefusal() string {
	if text := r.refusal.Load(); text != nil {
		return *text
	}
	return ""
}
