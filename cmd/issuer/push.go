package main

import (
	"context"
	"errors"
	"fmt"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/policyset"
	"sallyport/internal/registry"
)

// Where an issuer takes its policies from.
const (
	fromFiles = "files"
	fromPush  = "pushed"
)

// PolicyConfig is about how policies reach the issuer.
type PolicyConfig struct {
	// Source is "files" (default): the folder policies, as it is edited; or
	// "pushed": only what sallyport policy push brings, and no folder. All
	// issuers of one database have the same.
	Source string `yaml:"source"`
	// Signers are those who must have signed a set that is pushed.
	Signers policyset.Signers `yaml:"signers"`
}

func (c *Config) validatePolicy() error {
	errs := []error{c.Policy.Signers.Validate()}
	switch c.Policy.Source {
	case "", fromFiles:
		if c.Policies == "" {
			errs = append(errs, errors.New(`policies: missing; write the folder of the reviewed policy files, such as "/etc/sallyport/policies"`))
		}
		if c.Policy.Signers.Pinned() {
			errs = append(errs, errors.New("policy.signers: files are not signed; write policy.source: pushed"))
		}
	case fromPush:
		if c.Policies != "" {
			errs = append(errs, errors.New("policies: given beside policy.source: pushed, which reads no folder; keep one of them"))
		}
	default:
		errs = append(errs, fmt.Errorf("policy.source: %q is neither files nor pushed", c.Policy.Source))
	}
	return errors.Join(errs...)
}

func (in *issuer) pushed() bool { return in.cfg.Policy.Source == fromPush }

// pushedPolicies says in readiness whether a set was pushed yet. Until then
// nobody has an identity or a right.
func (in *issuer) pushedPolicies() {
	if in.registry.Current() != nil {
		in.ready.Set("policy", nil)
		return
	}
	why := "no policies were pushed yet"
	if passed := in.registry.LastRefusal(); passed != "" {
		why = passed
	}
	in.ready.Set("policy", errors.New(why))
	in.log.Warn("no policies are in force; next: sallyport policy push DIR", "why", why)
}

// pushes is control.PolicyKeeper.
type pushes struct{ in *issuer }

// policyKeeper is nil when the issuer takes its policies from files.
func (in *issuer) policyKeeper() control.PolicyKeeper {
	if !in.pushed() {
		return nil
	}
	return pushes{in}
}

// PushPolicies is control.PolicyKeeper. That somebody pushes is recorded by
// then; what came of it is recorded here.
func (k pushes) PushPolicies(ctx context.Context, p control.PolicyPush) error {
	in := k.in
	set, err := k.accept(ctx, p)
	st := in.registry.Status()
	if err != nil {
		in.metrics.PolicyRejected().Inc()
		in.log.Error("pushed policies refused, the old stay in force", "revision", st.PolicyRevision, "err", err)
		if done := in.audit.Append(&audit.Record{Kind: audit.KindPolicy, Decision: audit.Deny, Revision: st.PolicyRevision, Detail: err.Error()}); done != nil {
			return errors.Join(err, done)
		}
		return toPusher(err)
	}
	if len(p.Group) > 0 {
		return nil // which was recorded before
	}
	in.metrics.PolicyRevision().Set(float64(st.PolicyRevision))
	in.ready.Set("policy", nil)
	in.log.Info("pushed policies in force", "revision", set.Revision, "set", set.Hash(), "signatures", len(set.Keys()))
	return in.audit.Append(&audit.Record{Kind: audit.KindPolicy, Decision: audit.Allow, Revision: set.Revision, Detail: "set " + set.Hash()})
}

func (k pushes) accept(ctx context.Context, p control.PolicyPush) (set *policyset.Signed, err error) {
	if set, err = policyset.Parse(p.Set); err != nil {
		return nil, fmt.Errorf("%w: %w", registry.ErrUnfit, err)
	}
	r := k.in.registry
	switch {
	case p.Overtake:
		return set, r.OvertakePolicies(ctx, set)
	case len(p.Group) == 0:
		return set, r.PushPolicies(ctx, set)
	}
	t := registry.Trial{Set: set, Group: p.Group, Bake: p.Bake, By: p.By}
	if len(p.Fallback) > 0 {
		if t.Fallback, err = policyset.Parse(p.Fallback); err != nil {
			return nil, fmt.Errorf("%w: fallback: %w", registry.ErrUnfit, err)
		}
	}
	return set, r.TryPolicies(ctx, t)
}

// MovePolicies is control.PolicyKeeper. Each step is recorded before it is made.
func (k pushes) MovePolicies(ctx context.Context, m control.PolicyMove) error {
	if m.Move == control.MovePromote {
		return toPusher(k.in.registry.PromotePolicies(ctx, m.Revision, m.Force, m.By))
	}
	return toPusher(k.in.registry.TakeBackPolicies(ctx, m.Revision, m.By))
}

// verifier is nil when nobody must have signed.
func (in *issuer) verifier() func(*policyset.Signed) error {
	if pins := in.cfg.Policy.Signers; pins.Pinned() {
		return pins.Verify
	}
	return nil
}

// setFile is nil when nobody must have signed: a set says more than a proxy needs
// that does not count signatures.
func (in *issuer) setFile() func(hash string) ([]byte, error) {
	if in.verifier() == nil {
		return nil
	}
	return in.registry.PolicySetFile
}

// passedOver says that policies in the store are not signed: somebody but an
// issuer wrote them, or they are from before anything was pinned.
func (in *issuer) passedOver(why error) {
	in.metrics.PolicyRejected().Inc()
	in.log.Error("policies in the store passed over; next: sallyport policy push", "err", why)
	if err := in.audit.Append(&audit.Record{Kind: audit.KindPolicy, Decision: audit.Deny, Detail: why.Error()}); err != nil {
		in.log.Error("policies that are passed over not recorded", "err", err)
	}
}

// toPusher is an error as the one who pushed hears it.
func toPusher(err error) error {
	switch {
	case errors.Is(err, registry.ErrUnfit):
		return control.Unfit(err)
	case errors.Is(err, registry.ErrStale), errors.Is(err, registry.ErrRolling):
		return control.Unready(err)
	}
	return err
}

// PolicySet is control.PolicyKeeper.
func (k pushes) PolicySet(ctx context.Context, revision uint64) ([]byte, error) {
	return k.in.registry.PolicySet(ctx, revision)
}
