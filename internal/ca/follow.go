package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"sallyport/internal/daemon"
)

// follow brings the state of this issuer to a plan, however many steps it
// missed. The caller holds moving.
func (c *CA) follow(ctx context.Context, co *company, p *plan, now time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.current.Load()
	if s == nil {
		return errors.New("CA is closed")
	}
	if p.Number <= c.state.Number {
		return nil
	}
	local := map[string]string{RootID(s.root): c.state.root()}
	for i, o := range s.others {
		local[RootID(o)] = c.state.Rotation.Others[i]
	}
	var names, taken []string
	for i, id := range p.ids() {
		name := local[id]
		if name == "" {
			var err error
			if name, err = c.takeOver(co, p, i, id, now); err != nil {
				c.discard(taken)
				return err
			}
			taken = append(taken, name)
		}
		names = append(names, name)
	}
	from := c.state.Rotation.phase()
	if err := c.change(ctx, func(st *state) error { return c.bring(ctx, st, p, names, now) }); err != nil {
		c.discard(taken)
		return fmt.Errorf("follow the other issuers to phase %s: %w", p.Phase, err)
	}
	c.lookWhoLags()
	c.cfg.Log.Info("root rotation followed", "from", string(from), "to", string(p.Phase), "number", p.Number, "root", RootID(p.certs[0]))
	return nil
}

// discard removes roots that were taken over for nothing.
func (c *CA) discard(names []string) {
	for _, name := range names {
		c.remove(name)
	}
}

// takeOver stores a root that another issuer made, with its key.
func (c *CA) takeOver(co *company, p *plan, i int, id string, now time.Time) (string, error) {
	root := p.certs[i]
	if err := lintCA(root, c.cfg.TrustDomain, 1); err != nil {
		return "", fmt.Errorf("root %.16s of the other issuers: %w", id, err)
	}
	if root.CheckSignatureFrom(root) != nil {
		return "", fmt.Errorf("root %.16s of the other issuers is not signed by its own key", id)
	}
	if now.After(root.NotAfter) || now.Before(root.NotBefore) {
		return "", daemon.Hint(fmt.Errorf("root %.16s of the other issuers is valid from %s to %s and the clock says %s", id, utc(root.NotBefore), utc(root.NotAfter), utc(now)), "check the clock")
	}
	sealed := p.Roots[i].Keys[co.name]
	if sealed == nil {
		return "", errNoKey
	}
	key, err := unseal(co.secret, c.cfg.TrustDomain, co.name, id, sealed)
	if err != nil {
		return "", err
	}
	if !samePublicKey(root.PublicKey, key.Public()) {
		return "", fmt.Errorf("the sealed key of root %.16s does not belong to it", id)
	}
	name := rootName + "-" + id[:16]
	if err := c.keys.adopt(name, key); err != nil {
		return "", err
	}
	return name, c.saveCert(name, root)
}

// bring edits the state as a plan says; names are those of its roots.
func (c *CA) bring(ctx context.Context, st *state, p *plan, names []string, now time.Time) error {
	former, intermediate, ready := st.root(), st.Intermediate, ""
	if r := st.Rotation; r != nil {
		ready = r.Ready
	}
	st.Root, st.Number = names[0], p.Number
	r := &rotation{Phase: p.Phase, Pace: p.Pace, Since: p.Since, Emergency: p.Emergency, Others: names[1:]}
	shows := (p.Phase == Activated || p.Phase == Tainted) && len(r.Others) > 0
	if names[0] != former {
		if err := c.signUnder(ctx, st, p.certs[0], ready, now); err != nil {
			return err
		}
		if shows && r.Others[len(r.Others)-1] == former {
			r.Intermediate = intermediate
		}
		if p.Emergency {
			// What was prepared lay beside the key that leaked.
			st.JWT = slices.DeleteFunc(st.JWT, isNext)
		}
		if p.Phase == Withdrawn {
			st.restoreJWT(now)
		} else if err := c.activateJWT(st, now); err != nil {
			return err
		}
	} else if old := st.Rotation; shows && old != nil && slices.Equal(old.Others, r.Others) {
		r.Intermediate = old.Intermediate
	}
	st.Rotation = r
	switch p.Phase {
	case Steady:
		st.Rotation = nil
		st.JWT = slices.DeleteFunc(st.JWT, func(r jwtKeyRecord) bool { return r.Tainted })
	case Prepared:
		return errors.Join(c.readyUnder(ctx, r, names[len(names)-1], p.certs[len(names)-1], now), c.addNext(st, now))
	case Tainted, Withdrawn:
		st.taintJWT()
	}
	return nil
}

// readyUnder makes the intermediate under the next root.
func (c *CA) readyUnder(ctx context.Context, r *rotation, name string, root *x509.Certificate, now time.Time) error {
	key, err := c.keys.load(name)
	if err != nil {
		return err
	}
	r.Ready, err = c.newIntermediate(root, key, now)
	return err
}

// signUnder lets an intermediate sign that is under the root that st.Root
// names: the one that is ready unless it is old by now, else a new one.
func (c *CA) signUnder(ctx context.Context, st *state, root *x509.Certificate, ready string, now time.Time) error {
	if ready != "" {
		if cert, err := c.loadCert(ready); err == nil && cert.CheckSignatureFrom(root) == nil {
			if middle, _ := times(cert); now.Before(middle) {
				st.Intermediate = ready
				return nil
			}
		}
	}
	return c.replaceIntermediate(ctx, st, root, now)
}

// takeShared takes a step for all issuers. The caller holds moving and has
// looked at the gate.
func (c *CA) takeShared(ctx context.Context, co *company, step Step, pace Pace, now time.Time) error {
	c.mu.Lock()
	from, number := c.state.Rotation.phase(), c.state.Number
	here := maps.Clone(c.council.reports)
	c.mu.Unlock()
	if err := c.recordStep(string(step), from); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*meeting)
	defer cancel()
	var next *plan
	err := co.peers.EditRootPlan(ctx, func(was []byte) ([]byte, []byte, error) {
		p, err := c.readPlan(was)
		if err != nil {
			return nil, nil, err
		}
		if p == nil || p.Number != number {
			return nil, nil, ErrMoved
		}
		next = p
		if step == StepPrepare || step == stepEmergency {
			return c.planRoot(ctx, p, step == stepEmergency, pace, here, now)
		}
		if err := p.step(step, pace, now); err != nil {
			return nil, nil, err
		}
		return c.complete(p)
	})
	if err != nil {
		return fmt.Errorf("%s root: %w", step, err)
	}
	c.cfg.Log.Info("root rotation goes on at every issuer", "step", string(step), "from", string(from), "to", string(next.Phase), "number", next.Number)
	s := c.current.Load()
	if s == nil {
		return errors.New("CA is closed")
	}
	if next.certs, err = next.vouched(c.cfg.TrustDomain, s.root, s.others); err != nil {
		return err
	}
	if err := c.follow(ctx, co, next, now); err != nil {
		return err
	}
	return errors.Join(c.hear(ctx, co, next), c.tell(ctx, co))
}

// planRoot adds a new root to a plan, made here and vouched for by the one that
// signs. Its key stays sealed until the plan is written.
func (c *CA) planRoot(ctx context.Context, p *plan, emergency bool, pace Pace, here map[string]*report, now time.Time) (data, root []byte, err error) {
	for name, is := range p.Issuers {
		said, alive := here[name]
		if emergency && said == nil || !alive && now.Sub(is.Seen) > forgetIssuer {
			// What an issuer that is gone has may be with the thief, and its
			// lease, too; a report needs the root that signs.
			delete(p.Issuers, name)
		}
	}
	keys, err := c.rootKeys()
	if err != nil {
		return nil, nil, err
	}
	name, cert, err := c.anotherRoot(ctx, now)
	if err != nil {
		return nil, nil, err
	}
	defer c.discard([]string{name})
	key, err := c.keys.load(name)
	if err != nil {
		return nil, nil, err
	}
	v := voucher{By: p.ids()[0], Cert: cert.Raw}
	if v.Signature, err = vouch(keys[v.By], voucherContext, c.cfg.TrustDomain, "", cert.Raw); err != nil {
		return nil, nil, err
	}
	p.add(planRoot{Cert: cert.Raw, Keys: map[string][]byte{}}, v, emergency, pace, now)
	keys[RootID(cert)] = key
	return c.completeWith(p, keys)
}

// rotateShared is Rotate for issuers that share the root.
func (c *CA) rotateShared(ctx context.Context, co *company, pace Pace, force bool) error {
	return c.together(ctx, co, func(phase Phase, g Gate, now time.Time) (Step, Pace, error) {
		if err := g.Open(now); err != nil && !force {
			if pace != AtOnce || phase == Withdrawn {
				return "", pace, daemon.Hint(err, "wait, repair or restart those, or add --force and leave them behind")
			}
			return stepPace, pace, nil
		}
		return g.Step, pace, nil
	})
}

// together runs what an operator asked for, for all issuers.
func (c *CA) together(ctx context.Context, co *company, choose func(Phase, Gate, time.Time) (Step, Pace, error)) error {
	c.moving.Lock()
	defer c.moving.Unlock()
	if err := c.attend(ctx, co); err != nil {
		return err
	}
	now := c.cfg.Now()
	c.mu.Lock()
	s := c.current.Load()
	if s == nil {
		c.mu.Unlock()
		return errors.New("CA is closed")
	}
	phase := c.state.Rotation.phase()
	gate := c.gate(s, forward[phase])
	c.mu.Unlock()
	step, pace, err := choose(phase, gate, now)
	if err != nil {
		return err
	}
	return c.takeShared(ctx, co, step, pace, now)
}
