package ca

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// ErrGate is returned for a step of a rotation that must wait.
var ErrGate = errors.New("the rotation must wait")

// A Phase is how far the replacement of the root has come.
type Phase string

// From Steady a rotation goes through Prepared (the next root is in the bundle
// and signs nothing), Activated (it signs, the old one is still trusted) and
// Tainted (whoever holds an SVID under the old one renews at once) back to
// Steady, when the old root is revoked. Withdrawn is a rotation that was rolled
// back after the new root had signed: the old one signs again, and what the new
// one signed is renewed.
const (
	Steady    Phase = "steady"
	Prepared  Phase = "prepared"
	Activated Phase = "activated"
	Tainted   Phase = "tainted"
	Withdrawn Phase = "withdrawn"
)

// A Step leads from one Phase to the next.
type Step string

// The steps forward, and those back.
const (
	StepPrepare  Step = "prepare"
	StepActivate Step = "activate"
	StepTaint    Step = "taint"
	StepRevoke   Step = "revoke"
	StepRollback Step = "rollback"
	StepDiscard  Step = "discard"
)

// A Pace says what moves a rotation on.
type Pace string

// ByTime goes on at the times that follow from the life of the root, ByHand
// waits for the operator, AtOnce takes each step as soon as its gate opens.
const (
	ByTime Pace = "time"
	ByHand Pace = "hand"
	AtOnce Pace = "once"
)

// forward is the step that leads on from each phase.
var forward = map[Phase]Step{
	Steady: StepPrepare, Prepared: StepActivate, Activated: StepTaint, Tainted: StepRevoke, Withdrawn: StepDiscard,
}

// A rotation is the durable part of the state machine.
type rotation struct {
	Phase Phase     `json:"phase"`
	Pace  Pace      `json:"pace"`
	Since time.Time `json:"since"`
	// Others are roots in the bundle that do not sign: the next one while
	// Prepared, the old ones while Activated and Tainted, the rejected one while
	// Withdrawn. The last is the one that a rollback would let sign.
	Others []string `json:"others"`
	// Intermediate is one under the last of Others. It signs for the issuer's
	// own connection alone, and only while a proxy may not trust the new root.
	Intermediate string `json:"intermediate,omitempty"`
	// Ready is one under the next root, made before it may sign. Only issuers
	// that share the root make it so early: it shows that they have the key.
	Ready     string `json:"ready,omitempty"`
	Emergency bool   `json:"emergency,omitempty"`
}

func (r *rotation) phase() Phase {
	if r == nil {
		return Steady
	}
	return r.Phase
}

func (r *rotation) emergency() bool { return r != nil && r.Emergency }

// A Holder is a live proxy and the authorities it knows.
type Holder struct {
	// Name is for people.
	Name string
	// Trusts are the IDs of the roots and JWT keys in the bundle it acts on.
	Trusts []string
	// Shows are the IDs of the roots above the SVIDs it holds.
	Shows []string
}

// A Gate is who confirms what a step needs.
type Gate struct {
	Step Step
	// Confirmed of Live proxies are ready; Stragglers are the names of the
	// others.
	Confirmed, Live int
	Stragglers      []string
	// IssuersConfirmed of the IssuersLive that share the root are ready, this
	// one among them; both are 0 of one that shares it with none.
	IssuersConfirmed, IssuersLive int
	// Known is false while the issuer cannot say which proxies live.
	Known bool
	// NotBefore is when the last token under a key that the step removes has
	// expired; zero when it removes none.
	NotBefore time.Time
}

// demand is what a step asks of every proxy.
type demand struct {
	trusts, notShown []string
	notBefore        time.Time
}

func (d demand) metBy(h Holder) bool {
	for _, id := range d.trusts {
		if !slices.Contains(h.Trusts, id) {
			return false
		}
	}
	// A proxy that does not say what it shows may show anything.
	return len(d.notShown) == 0 || len(h.Shows) > 0 && !slices.ContainsFunc(h.Shows, func(id string) bool {
		return slices.Contains(d.notShown, id)
	})
}

// count asks every holder.
func (d demand) count(step Step, holders []Holder, known bool) Gate {
	g := Gate{Step: step, Live: len(holders), Known: known, NotBefore: d.notBefore}
	for _, h := range holders {
		if d.metBy(h) {
			g.Confirmed++
		} else {
			g.Stragglers = append(g.Stragglers, h.Name)
		}
	}
	slices.Sort(g.Stragglers)
	return g
}

// everyone says that each live proxy confirms.
func (g Gate) everyone() bool {
	return g.Known && g.Confirmed == g.Live && g.IssuersConfirmed == g.IssuersLive
}

// Open returns nil when the step may be taken, else ErrGate and why not.
func (g Gate) Open(now time.Time) error {
	switch {
	case !g.Known:
		return fmt.Errorf("%w: the issuer started a moment ago and does not know yet which proxies live", ErrGate)
	case g.Confirmed < g.Live || g.IssuersConfirmed < g.IssuersLive:
		const most = 10
		names := strings.Join(g.Stragglers[:min(most, len(g.Stragglers))], ", ")
		if more := len(g.Stragglers) - most; more > 0 {
			names += fmt.Sprintf(" and %d more", more)
		}
		issuers := ""
		if g.IssuersLive > 0 {
			issuers = fmt.Sprintf(" and %d of %d issuers", g.IssuersConfirmed, g.IssuersLive)
		}
		return fmt.Errorf("%w: %d of %d proxies%s confirm, not yet %s", ErrGate, g.Confirmed, g.Live, issuers, names)
	case now.Before(g.NotBefore):
		return fmt.Errorf("%w: tokens under the old key are valid until %s", ErrGate, utc(g.NotBefore))
	}
	return nil
}

// A schedule is when the steps are due by time.
type schedule struct {
	// prepare is at half and activate at 5/6 of the root's life. From forced on
	// the new root is activated although proxies lag: later its successors
	// would be cut short, and in the end all proxies cut off.
	prepare, activate, forced time.Time
	// dwell is the stay in Activated and in Tainted.
	dwell time.Duration
}

func scheduleOf(begin, end time.Time, intermediate, leaf time.Duration) schedule {
	life := end.Sub(begin)
	return schedule{
		prepare: begin.Add(life / 2), activate: begin.Add(life / 6 * 5),
		forced: end.Add(-min(intermediate, life/12)), dwell: leaf,
	}
}

// due returns the step that time or pace asks for now, and whether it goes
// without the gate. No step is the empty one.
func (s schedule) due(r *rotation, now time.Time) (step Step, forced bool) {
	phase := r.phase()
	step = forward[phase]
	reached := func(t time.Time) bool { return !now.Before(t) }
	switch {
	case phase == Steady:
		if reached(s.prepare) {
			return step, false
		}
	case phase == Prepared && reached(s.forced):
		return step, true
	case r.Pace == AtOnce, phase == Withdrawn:
		return step, false
	case phase == Prepared:
		if reached(s.activate) {
			return step, false
		}
	case r.Pace == ByTime && reached(r.Since.Add(s.dwell)):
		return step, false
	}
	return "", false
}

// next is when due may have another answer than none, for want of an event.
func (s schedule) next(r *rotation) []time.Time {
	switch r.phase() {
	case Steady:
		return []time.Time{s.prepare}
	case Prepared:
		return []time.Time{s.activate, s.forced}
	}
	return []time.Time{r.Since.Add(s.dwell)}
}
