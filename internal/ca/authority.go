package ca

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"sallyport/internal/daemon"
)

// ErrUnknown is returned for a step on an authority that is not the one in the
// place that the step is about.
var ErrUnknown = errors.New("no such authority")

// MoveRoot takes one step of replacing the root, and only that one: ErrGate when
// another is next, or when not everyone confirms what it needs. ID is the root
// that it is about, as RootID names it: the next one to activate, an old one to
// taint or to revoke; under an upstream authority the intermediate to activate,
// by its subject key ID. To prepare names none.
func (c *CA) MoveRoot(ctx context.Context, step Step, id string) (Rotation, error) {
	if co := c.sharing(); co != nil {
		err := c.together(ctx, co, func(phase Phase, g Gate, now time.Time) (Step, Pace, error) {
			next, err := c.meant(c.current.Load(), phase, step, id)
			if err == nil {
				err = g.Open(now)
			}
			return next, ByHand, err
		})
		return c.Rotation(), err
	}
	err := c.offering(ctx, func(p Phase) bool { return p == Steady && step == StepPrepare }, func(s *signing, now time.Time) error {
		if c.cfg.SharedRoot {
			return errShared()
		}
		next, err := c.meant(s, c.state.Rotation.phase(), step, id)
		if err == nil {
			err = c.gate(s, next).Open(now)
		}
		if err != nil {
			return err
		}
		return c.take(ctx, next, ByHand, now)
	})
	return c.Rotation(), err
}

// meant checks that a step is the next one and about the right root.
func (c *CA) meant(s *signing, phase Phase, step Step, id string) (Step, error) {
	if s == nil {
		return "", errors.New("CA is closed")
	}
	next := forward[phase]
	if step == StepRevoke && next == StepDiscard {
		step = StepDiscard // that of the root which a rollback rejected
	}
	if step != StepPrepare && !slices.Contains(c.movable(s, step), id) {
		return "", fmt.Errorf("%w: %.64q is not a root that waits for the step %q", ErrUnknown, id, step)
	}
	if step != next {
		return "", daemon.Hint(fmt.Errorf("%w: the rotation of the root is %s, so %s is not next but %s", ErrGate, phase, step, next), "sallyport ca status")
	}
	return next, nil
}

// MoveJWT takes one step of replacing the JWT key of this issuer by itself. It
// is ErrGate while the root is replaced, which takes the key along, and while
// not every live proxy has the next key. ID is the kid that the step is about.
// What is revoked leaves the bundle at once: tokens under it are refused.
func (c *CA) MoveJWT(ctx context.Context, step Step, id string) (Rotation, error) {
	err := c.operate(func(_ *signing, now time.Time) error {
		if phase := c.state.Rotation.phase(); phase != Steady {
			return daemon.Hint(fmt.Errorf("%w: the rotation of the root is %s and takes the JWT key along", ErrGate, phase), "sallyport ca status")
		}
		edit, err := c.jwtStep(step, id, now)
		if err != nil || edit == nil {
			return err
		}
		if err := c.recordStep("jwt-"+string(step), Steady); err != nil {
			return err
		}
		if err := c.change(ctx, edit); err != nil {
			return fmt.Errorf("%s JWT key: %w", step, err)
		}
		c.cfg.Log.Info("JWT key moved", "step", string(step), "kid", id)
		return nil
	})
	return c.Rotation(), err
}

// jwtStep is the edit that a step makes, nil when nothing is left to do. The
// caller holds c.mu.
func (c *CA) jwtStep(step Step, id string, now time.Time) (func(*state) error, error) {
	i := slices.IndexFunc(c.state.JWT, func(r jwtKeyRecord) bool { return r.KeyID == id })
	is := func(role jwtRole) bool { return i >= 0 && c.state.JWT[i].Role == role }
	switch step {
	case StepPrepare:
		if slices.ContainsFunc(c.state.JWT, isNext) {
			return nil, nil
		}
		return func(st *state) error { return c.addNext(st, now) }, nil
	case StepActivate:
		if !is(roleNext) {
			return nil, fmt.Errorf("%w: %.64q is not the JWT key that was prepared", ErrUnknown, id)
		}
		holders, known := c.cfg.Holders()
		if err := (demand{trusts: []string{id}}).count(step, holders, known).Open(now); err != nil {
			return nil, err
		}
		return func(st *state) error { return c.activateJWT(st, now) }, nil
	case StepTaint, StepRevoke:
		if !is(roleRetired) {
			return nil, fmt.Errorf("%w: %.64q is not a JWT key that signed before", ErrUnknown, id)
		}
		if step == StepTaint {
			return func(st *state) error { st.JWT[i].Tainted = true; return nil }, nil
		}
		if !c.state.JWT[i].Tainted {
			return nil, daemon.Hint(fmt.Errorf("%w: JWT key %s is not tainted", ErrGate, id), "taint it first")
		}
		return func(st *state) error { st.JWT = slices.Delete(st.JWT, i, i+1); return nil }, nil
	}
	return nil, fmt.Errorf("no step is called %q", step)
}
