package authz

import (
	"fmt"

	"sallyport/internal/mesh"
)

// lenient is what a Set knows of rows that are not enforced.
type lenient struct {
	snap *mesh.Snapshot // its modes
	// full has the rows of access.csv and of guardrails that are enforced, bars
	// these alone.
	full, bars *Set
	// guard is the mode of guardrails.csv, guards are the ids of its rows.
	guard  mesh.Mode
	guards map[string]bool
}

// wouldDeny is the detail of the record of a denial that was not enforced.
var wouldDeny = func() map[Reason]string {
	m := map[Reason]string{}
	for _, r := range []Reason{NoPolicy, NoRow, ByRule, FailedCond, FailedToken} {
		m[r] = "not enforced; denied otherwise: " + string(r)
	}
	return m
}()

// compileModes keeps apart what is enforced, when not everything is.
func compileModes(snap *mesh.Snapshot) (*lenient, error) {
	if !snap.Lenient() {
		return nil, nil
	}
	l := &lenient{snap: snap, guards: map[string]bool{}, guard: mesh.Enforce}
	full, bars := *snap, *snap
	full.Modes, full.Rules, bars.Modes, bars.Rules = nil, nil, nil, nil
	for i := range snap.Rules {
		r := &snap.Rules[i]
		guard := r.Guard()
		if guard {
			l.guard, l.guards[r.ID] = snap.ModeOf(r), true
		}
		if guard && l.guard != mesh.Enforce {
			continue
		}
		if full.Rules = append(full.Rules, *r); guard {
			bars.Rules = append(bars.Rules, *r)
		}
	}
	var err error
	if l.full, err = compileIndex(&full); err == nil {
		l.bars, err = compileIndex(&bars)
	}
	if err != nil {
		return nil, fmt.Errorf("rows that are enforced: %w", err)
	}
	return l, nil
}

// modeTo returns the mode of access.csv for calls to a destination.
func (s *Set) modeTo(dir mesh.Direction, dst string) mesh.Mode {
	switch {
	case s.lenient == nil:
		return mesh.Enforce
	case dir == mesh.Out:
		return s.lenient.snap.ModeTo(dst)
	}
	return s.lenient.snap.ModeOf(nil)
}

// soften lets a call pass that only rows deny which are not enforced. The
// decision keeps the row and names the mode as its reason.
func (s *Set) soften(c *Call, d Decision) Decision {
	if d.Allow || s == nil || s.lenient == nil || d.Reason == BadRequest || d.Reason == Internal {
		return d
	}
	return s.softened(c.Dir, c.Dst, d, func(rows *Set) Decision { return rows.Decide(c) })
}

// softened does so by what rows say that are enforced.
func (s *Set) softened(dir mesh.Direction, dst string, d Decision, ask func(*Set) Decision) Decision {
	l, access := s.lenient, s.modeTo(dir, dst)
	mode := access
	if l.guards[d.Rule] {
		mode = l.guard
	}
	var pass bool
	if access == mesh.Enforce {
		pass = ask(l.full).Allow
	} else {
		pass = ask(l.bars).Reason != ByRule // they are denials, and none denies
	}
	switch {
	case !pass:
		return d
	case mode == mesh.Observe:
		return Decision{Allow: true, Rule: d.Rule, Reason: Observed, would: d.Reason}
	case mode == mesh.Warn:
		return Decision{Allow: true, Rule: d.Rule, Reason: Warned, would: d.Reason}
	}
	return d
}
