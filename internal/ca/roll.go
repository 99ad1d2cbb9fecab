package ca

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// RootID names a root for the rotation: hex SHA-256 of its DER form. A JWT key
// is named by its kid.
func RootID(root *x509.Certificate) string {
	return mesh.RootID(root.Raw)
}

// A Root is one root of the bundle.
type Root struct {
	ID      string
	Expires time.Time
	// SubjectKeyID is that of its certificate, in hex.
	SubjectKeyID string
	// Signs is true of one root.
	Signs   bool
	Tainted bool
}

// An Intermediate is one that an upstream authority signed.
type Intermediate struct {
	// ID is the subject key ID in hex, and RootKeyID that of the root above.
	ID, RootKeyID string
	Expires       time.Time
	Signs, Next   bool
}

// A Rotation is how the replacement of the root stands.
type Rotation struct {
	Phase     Phase
	Pace      Pace
	Since     time.Time
	Emergency bool
	Roots     []Root
	// Intermediates are those that sign, are next and were before, and none when
	// the root is ours.
	Intermediates []Intermediate
	JWT           []JWTKey
	// KeyID is the kid that signs, NextKeyID that of the key to come, if there
	// is one.
	KeyID, NextKeyID string
	// Gate is that of the next step forward.
	Gate Gate
	// Due is when time takes the next step; zero when the operator or the
	// gate alone does.
	Due time.Time
}

// Rotation tells how the replacement of the root stands.
func (c *CA) Rotation() Rotation {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.current.Load()
	if s == nil {
		return Rotation{}
	}
	out := Rotation{Phase: c.state.Rotation.phase(), Pace: ByTime, JWT: s.bundle.JWT, KeyID: s.jwt.id}
	if i := slices.IndexFunc(c.state.JWT, isNext); i >= 0 {
		out.NextKeyID = c.state.JWT[i].KeyID
	}
	for i, r := range s.bundle.X509 {
		out.Roots = append(out.Roots, Root{ID: RootID(r), SubjectKeyID: hex.EncodeToString(r.SubjectKeyId), Expires: r.NotAfter, Signs: i == 0, Tainted: slices.Contains(s.bundle.Tainted, r)})
	}
	if r := c.state.Rotation; r != nil {
		out.Pace, out.Since, out.Emergency = r.Pace, r.Since, r.Emergency
	}
	out.Intermediates = c.intermediates(s)
	out.Gate = c.gate(s, forward[out.Phase])
	plan := c.schedule(s)
	switch {
	case c.cfg.Upstream != nil && out.Phase == Steady: // the upstream authority says when
	case c.cfg.SharedRoot && c.company == nil:
	case out.Phase == Steady:
		out.Due = plan.prepare
	case out.Phase == Prepared && out.Pace != AtOnce:
		out.Due = plan.activate
	case out.Pace == ByTime && out.Phase != Withdrawn:
		out.Due = out.Since.Add(plan.dwell)
	}
	return out
}

func (c *CA) schedule(s *signing) schedule {
	if c.cfg.Upstream != nil {
		return c.upstreamSchedule(s)
	}
	return scheduleOf(s.root.NotBefore.Add(backdate), s.root.NotAfter, c.cfg.IntermediateTTL, c.cfg.X509TTL)
}

// gate asks the proxies for what a step needs. The caller holds c.mu.
func (c *CA) gate(s *signing, step Step) Gate {
	var d demand
	switch step {
	case StepPrepare:
		g := Gate{Step: step, Known: true}
		c.countIssuers(&g, s)
		return g
	case StepActivate:
		d.trusts = idsOf(s.others)
		i := slices.IndexFunc(c.state.JWT, isNext)
		if i < 0 {
			return Gate{Step: step} // renew is about to make it
		}
		d.trusts = append(d.trusts, c.state.JWT[i].KeyID)
	case StepTaint:
		d.trusts = []string{RootID(s.root), s.jwt.id}
	case StepRevoke, StepDiscard:
		d.trusts, d.notShown = []string{RootID(s.root)}, idsOf(s.others)
		d.notBefore = c.state.Rotation.Since.Add(c.cfg.JWTTTL)
	}
	d.trusts = append(d.trusts, c.keysOfIssuers(step)...)
	holders, known := c.cfg.Holders()
	g := d.count(step, holders, known)
	c.countIssuers(&g, s)
	return g
}

func idsOf(roots []*x509.Certificate) (out []string) {
	for _, r := range roots {
		out = append(out, RootID(r))
	}
	return out
}

// keysOfIssuers are the JWT keys of the issuers that share the root which every
// proxy must have before a step. The caller holds c.mu.
func (c *CA) keysOfIssuers(step Step) (kids []string) {
	for _, r := range c.council.reports {
		switch {
		case r == nil:
		case step == StepActivate && r.NextKey != "":
			kids = append(kids, r.NextKey)
		case step == StepTaint:
			kids = append(kids, r.Key)
		}
	}
	return kids
}

// countIssuers adds to a gate what the issuers that share the root confirm:
// that they are where this one is, and for a root that is to sign that they can
// sign under it. The caller holds c.mu.
func (c *CA) countIssuers(g *Gate, s *signing) {
	if c.company == nil {
		return
	}
	g.Known = g.Known && c.council.known(c.cfg.Now())
	var late []string
	for name, r := range c.council.reports {
		g.IssuersLive++
		ok := r != nil && r.Number == c.state.Number && r.Signs == RootID(s.root)
		if ok && g.Step == StepActivate {
			ok = r.Ready == RootID(s.others[len(s.others)-1]) && r.NextKey != ""
		}
		if ok {
			g.IssuersConfirmed++
		} else {
			late = append(late, "issuer "+name)
		}
	}
	slices.Sort(late)
	g.Stragglers = append(late, g.Stragglers...)
}

// rollOn takes the step that is due, if its gate is open. The caller holds c.mu.
func (c *CA) rollOn(ctx context.Context, s *signing, now time.Time) error {
	if c.cfg.SharedRoot {
		c.lookWhoLags()
		return nil // meet does it, once the others are known
	}
	step, forced := c.schedule(s).due(c.state.Rotation, now)
	if step != "" && (forced || c.gate(s, step).Open(now) == nil) {
		if forced {
			c.cfg.Log.Warn("root is near its end: the next one signs, whoever trusts it", "root_expires", s.root.NotAfter)
		}
		pace := ByTime
		if r := c.state.Rotation; r != nil {
			pace = r.Pace
		}
		if err := c.take(ctx, step, pace, now); err != nil {
			return err
		}
	}
	c.lookWhoLags()
	return nil
}

// lookWhoLags finds out whether a live proxy may not trust the root that signs.
// The caller holds c.mu.
func (c *CA) lookWhoLags() {
	s := c.current.Load()
	c.lagging.Store(s.former != nil && !c.gate(s, StepTaint).everyone())
}

// Rotate takes the next step of replacing the root, or the first one. It is
// ErrGate, and nothing changes, while not every live proxy confirms what the
// step needs, unless it is forced. At the pace AtOnce the steps after this one
// follow by themselves, each through its gate.
func (c *CA) Rotate(ctx context.Context, pace Pace, force bool) (Rotation, error) {
	if co := c.sharing(); co != nil {
		err := c.rotateShared(ctx, co, pace, force)
		return c.Rotation(), err
	}
	err := c.offering(ctx, isSteady, func(s *signing, now time.Time) error {
		if c.cfg.SharedRoot && !force {
			return errShared()
		}
		phase := c.state.Rotation.phase()
		step := forward[phase]
		if err := c.gate(s, step).Open(now); err != nil && !force {
			if pace != AtOnce || phase == Withdrawn {
				return daemon.Hint(err, "wait, repair or restart those, or add --force and leave them behind")
			}
			// The gate is open later: only the pace changes now.
			return c.change(ctx, func(st *state) error { st.Rotation.Pace = pace; return nil })
		}
		return c.take(ctx, step, pace, now)
	})
	return c.Rotation(), err
}

// Rollback undoes a rotation: what was only prepared leaves the bundle at once;
// after the new root has signed, the old one signs again and the new one is
// tainted, until no live proxy shows it any more.
func (c *CA) Rollback(ctx context.Context) (Rotation, error) {
	if co := c.sharing(); co != nil {
		err := c.together(ctx, co, func(phase Phase, _ Gate, _ time.Time) (Step, Pace, error) {
			return StepRollback, ByTime, rollsBack(phase, c.inEmergency())
		})
		return c.Rotation(), err
	}
	err := c.operate(func(_ *signing, now time.Time) error {
		if err := rollsBack(c.state.Rotation.phase(), c.state.Rotation.emergency()); err != nil {
			return err
		}
		return c.take(ctx, StepRollback, c.state.Rotation.Pace, now)
	})
	return c.Rotation(), err
}

func rollsBack(phase Phase, emergency bool) error {
	switch {
	case emergency:
		return daemon.Hint(errors.New("the root before was replaced in an emergency and signs no more"), "sallyport ca rotate replaces the present one in its turn, once this has ended")
	case phase == Steady:
		return daemon.Hint(errors.New("no rotation is under way"), "sallyport ca status; what was revoked does not come back")
	case phase == Withdrawn:
		return daemon.Hint(errors.New("the rotation was rolled back already"), "sallyport ca status shows who still uses the new root")
	}
	return nil
}

// Emergency replaces the root and the JWT keys at once: a new root signs, all
// others are tainted, and each is revoked once no live proxy shows it. Proxies
// fetch the new trust over the connection they have, so peers that have not
// yet refuse those that have, for about a second.
func (c *CA) Emergency(ctx context.Context) (Rotation, error) {
	if co := c.sharing(); co != nil {
		err := c.together(ctx, co, func(Phase, Gate, time.Time) (Step, Pace, error) { return stepEmergency, AtOnce, nil })
		return c.Rotation(), err
	}
	err := c.offering(ctx, always, func(s *signing, now time.Time) error {
		if c.cfg.SharedRoot {
			return errShared()
		}
		return c.emergency(ctx, s, now)
	})
	return c.Rotation(), err
}

func errShared() error {
	return daemon.Hint(fmt.Errorf("%w: other issuers sign under this root and would not know the new one", ErrGate),
		"stop the others, run sallyport ca rotate --force until the phase is steady again, and give the others the new root by ca.root_dir and an empty directory ca")
}

// operate runs what an operator asked for.
func (c *CA) operate(do func(*signing, time.Time) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.current.Load()
	if s == nil {
		return errors.New("CA is closed")
	}
	return do(s, c.cfg.Now())
}

// take does one step. The caller holds c.mu and has looked at the gate.
func (c *CA) take(ctx context.Context, step Step, pace Pace, now time.Time) error {
	s := c.current.Load()
	from := c.state.Rotation.phase()
	if err := c.recordStep(string(step), from); err != nil {
		return err
	}
	err := c.change(ctx, func(st *state) error {
		if st.Rotation == nil {
			st.Rotation = &rotation{}
		}
		st.Rotation.Since, st.Rotation.Pace = now.UTC().Truncate(time.Second), pace
		switch step {
		case StepPrepare:
			return c.prepareRoot(ctx, st, now)
		case StepActivate:
			return c.swap(ctx, st, s, Activated, now)
		case StepTaint:
			st.Rotation.Phase = Tainted
			st.taintJWT()
			return nil
		case StepRevoke, StepDiscard:
			st.Rotation = nil
			st.JWT = slices.DeleteFunc(st.JWT, func(r jwtKeyRecord) bool { return r.Tainted })
			return nil
		case StepRollback:
			if from == Prepared {
				st.Rotation = nil
				return nil
			}
			st.Rotation.Pace = AtOnce
			return c.swap(ctx, st, s, Withdrawn, now)
		}
		return fmt.Errorf("no step is called %q", step)
	})
	if err != nil {
		return fmt.Errorf("%s root: %w", step, err)
	}
	c.lookWhoLags()
	c.cfg.Log.Info("root rotation went on", "step", string(step), "from", string(from), "to", string(c.state.Rotation.phase()))
	return nil
}

// prepareRoot makes the next root and sees that there is a next JWT key.
func (c *CA) prepareRoot(ctx context.Context, st *state, now time.Time) error {
	if c.cfg.Upstream != nil {
		return c.prepareOffer(st, now)
	}
	name, _, err := c.anotherRoot(ctx, now)
	if err != nil {
		return err
	}
	st.Rotation.Phase, st.Rotation.Others = Prepared, []string{name}
	return c.addNext(st, now)
}

func (c *CA) anotherRoot(ctx context.Context, now time.Time) (string, *x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return "", nil, err
	}
	name := rootName + "-" + hex.EncodeToString(serial.Bytes())[:12]
	root, _, err := c.newRoot(ctx, name, now)
	return name, root, err
}

// swap lets the last of the other roots sign, under a new intermediate, and
// puts the one that signed in its place.
func (c *CA) swap(ctx context.Context, st *state, s *signing, to Phase, now time.Time) error {
	if c.cfg.Upstream != nil {
		return c.swapUpstream(st, to, now)
	}
	r := st.Rotation
	last := len(r.Others) - 1
	former, next := st.root(), s.others[last]
	if now.After(next.NotAfter) {
		return daemon.Hint(fmt.Errorf("that root expired at %s", utc(next.NotAfter)), "sallyport ca rotate")
	}
	st.Root, r.Others[last] = r.Others[last], former
	r.Phase, r.Intermediate = to, st.Intermediate
	if err := c.replaceIntermediate(ctx, st, next, now); err != nil {
		return err
	}
	if to != Withdrawn {
		return c.activateJWT(st, now)
	}
	// Everybody trusts the old root, so nobody needs the new one to reach us.
	r.Intermediate = ""
	st.restoreJWT(now)
	st.taintJWT()
	return nil
}

// taintJWT marks the keys that signed before.
func (s *state) taintJWT() {
	for i := range s.JWT {
		s.JWT[i].Tainted = s.JWT[i].Role == roleRetired
	}
}

// restoreJWT lets the newest retired key sign again, if it still may.
func (s *state) restoreJWT(now time.Time) {
	back := -1
	for i, r := range s.JWT {
		if r.Role == roleRetired && r.Expires.After(now) && (back < 0 || r.Expires.After(s.JWT[back].Expires)) {
			back = i
		}
	}
	if back < 0 {
		return
	}
	s.JWT[slices.IndexFunc(s.JWT, isActive)].Role = roleRetired
	s.JWT[back].Role = roleActive
}

// emergency makes a root that signs at once. The caller holds c.mu.
func (c *CA) emergency(ctx context.Context, s *signing, now time.Time) error {
	if o := c.up.offered; o != nil && o.root.Equal(s.root) {
		return errSameRoot()
	}
	from := c.state.Rotation.phase()
	if err := c.recordStep("emergency", from); err != nil {
		return err
	}
	err := c.change(ctx, func(st *state) error {
		r := &rotation{Phase: Tainted, Pace: AtOnce, Since: now.UTC().Truncate(time.Second), Emergency: true, Intermediate: st.Intermediate}
		if old := st.Rotation; old != nil && old.Phase != Prepared {
			r.Others = old.Others
		}
		// What was prepared lay beside the key that leaked, and nobody shows it.
		r.Others = append(r.Others, st.root())
		st.Rotation = r
		if err := c.signAnew(ctx, st, now); err != nil {
			return err
		}
		st.JWT = slices.DeleteFunc(st.JWT, isNext)
		if err := c.activateJWT(st, now); err != nil {
			return err
		}
		st.taintJWT()
		return nil
	})
	if err != nil {
		return fmt.Errorf("replace root: %w", err)
	}
	c.lagging.Store(true)
	c.cfg.Log.Warn("root replaced in an emergency", "root", RootID(c.current.Load().root), "tainted", len(s.others)+1)
	return nil
}

// recordStep writes down what is about to happen to the roots.
func (c *CA) recordStep(step string, from Phase) error {
	err := c.cfg.Audit.Append(&audit.Record{
		Time: c.cfg.Now(), Kind: audit.KindAdmin, Reason: "ca-" + step, Dst: c.cfg.TrustDomain.IDString(),
		Detail: "root rotation from " + string(from),
	})
	if err != nil {
		return fmt.Errorf("%s root: record: %w", step, err)
	}
	return nil
}

// Replace makes a new root for a CA whose root has expired, with no proxy to
// ask: each must be given the new bundle by hand. A root that is still good
// stays. The directory must not be in use.
func Replace(ctx context.Context, cfg Config) (*CA, error) {
	c, err := Open(ctx, cfg)
	if !errors.Is(err, ErrRootExpired) {
		if err == nil {
			c.Close()
			err = daemon.Hint(errors.New("the root is still good"), "start the issuer, and run: sallyport ca rotate --emergency")
		}
		return nil, err
	}
	c = &CA{cfg: cfg.withDefaults(), changed: make(chan struct{}), write: daemon.WriteFile}
	if err := c.replace(ctx); err != nil {
		c.Close()
		return nil, fmt.Errorf("replace root of the CA in %s: %w", cfg.Dir, err)
	}
	return c, nil
}

func (c *CA) replace(ctx context.Context) error {
	if err := c.openDir(ctx); err != nil {
		return err
	}
	if _, err := c.loadState(); err != nil {
		return err
	}
	now := c.cfg.Now()
	if err := c.recordStep("replace", c.state.Rotation.phase()); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.change(ctx, func(st *state) error {
		name, root, err := c.anotherRoot(ctx, now)
		if err != nil {
			return err
		}
		st.Root, st.Rotation, st.JWT = name, nil, nil
		if err := c.replaceIntermediate(ctx, st, root, now); err != nil {
			return err
		}
		return c.activateJWT(st, now)
	})
}
