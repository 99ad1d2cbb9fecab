package authz

import (
	"fmt"

	"sallyport/internal/mesh"
)

// lenient is what a Set knows of files that are not enforced.
type lenient struct {
	// rows has the rows of the enforced files alone.
	rows *Set
	// access and guard are the modes of the two files.
	access, guard mesh.Mode
	// guards are the ids of the rows in guardrails.csv.
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
	if len(snap.Modes) == 0 {
		return nil, nil
	}
	l := &lenient{access: snap.ModeOf(nil), guards: map[string]bool{}, guard: mesh.Enforce}
	enforced := *snap
	enforced.Modes, enforced.Rules = nil, nil
	for i := range snap.Rules {
		r := &snap.Rules[i]
		if r.Guard() {
			l.guard, l.guards[r.ID] = snap.ModeOf(r), true
		}
		if snap.ModeOf(r) == mesh.Enforce {
			enforced.Rules = append(enforced.Rules, *r)
		}
	}
	var err error
	if l.rows, err = compileIndex(&enforced); err != nil {
		return nil, fmt.Errorf("rows that are enforced: %w", err)
	}
	return l, nil
}

// soften lets a call pass that only files deny which are not enforced. The
// decision keeps the row and names the mode as its reason.
func (s *Set) soften(c *Call, d Decision) Decision {
	if d.Allow || s == nil || s.lenient == nil || d.Reason == BadRequest || d.Reason == Internal {
		return d
	}
	l := s.lenient
	mode := l.access
	if l.guards[d.Rule] {
		mode = l.guard
	}
	strict := l.rows.Decide(c)
	pass := strict.Allow
	if l.access != mesh.Enforce {
		pass = strict.Reason != ByRule // the rows left are denials, and none denies
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
