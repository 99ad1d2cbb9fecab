package review

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

// A Result is one case and what became of it.
type Result struct {
	Case mesh.Case `json:"case"`
	// Got and Rule are the decision; Rule is empty when no row matched.
	Got  mesh.Effect `json:"got"`
	Rule string      `json:"rule,omitempty"`
	OK   bool        `json:"ok"`
	// Why says what differs, when OK is false.
	Why string `json:"why,omitempty"`
}

// Error is "file:line: "name": why".
func (r Result) Error() string {
	return fmt.Sprintf("%s: %q: %s", r.Case.Origin, r.Case.Name, r.Why)
}

// A Row is a row of access.csv or guardrails.csv and how many cases it decided.
type Row struct {
	ID     string      `json:"id"`
	Origin mesh.Origin `json:"origin"`
	Cases  int         `json:"cases"`
	// Conds are the conditions of the row.
	Conds []CondCoverage `json:"conds,omitempty"`
}

// A CondCoverage is a condition of a row and how many cases show that it is
// needed: all of the row fits the call but this condition.
type CondCoverage struct {
	Cond  string `json:"cond"`
	Cases int    `json:"cases"`
}

// A Report is the outcome of the cases in policies/tests.
type Report struct {
	Results []Result `json:"results"`
	// Rows has every row, in the order of the files.
	Rows []Row `json:"rows"`
	// Broken is why nothing could be decided; nil otherwise.
	Broken error `json:"-"`
}

// Failed returns the results that are not as wanted.
func (r Report) Failed() []Result {
	return slices.DeleteFunc(slices.Clone(r.Results), func(c Result) bool { return c.OK })
}

// Covered counts the rows that decided at least one case.
func (r Report) Covered() int {
	n := 0
	for _, row := range r.Rows {
		if row.Cases > 0 {
			n++
		}
	}
	return n
}

// CoveredConds counts the conditions that a case shows to be needed, and all.
func (r Report) CoveredConds() (covered, all int) {
	for _, row := range r.Rows {
		for _, c := range row.Conds {
			if all++; c.Cases > 0 {
				covered++
			}
		}
	}
	return covered, all
}

// Coverage is how much of rows and conditions the cases cover, in percent;
// rounded down, so that 100 means all.
func (r Report) Coverage() int {
	covered, all := r.CoveredConds()
	covered, all = covered+r.Covered(), all+len(r.Rows)
	if all == 0 {
		return 100
	}
	return 100 * covered / all
}

// Err joins all failures; nil when every case is as wanted.
func (r Report) Err() error {
	if r.Broken != nil {
		return r.Broken
	}
	var errs []error
	for _, f := range r.Failed() {
		errs = append(errs, f)
	}
	return errors.Join(errs...)
}

// Red returns why policies must not be put in force: a case that is not decided
// as wanted. The issuer asks before it accepts an edit.
func Red(c *mesh.Checked) error {
	snap := c.Compile(0, 0, nil)
	if err := test(c.Policies(), snap).Err(); err != nil || snap.Candidate == nil {
		return err
	}
	if _, err := authz.Compile(snap.Candidate); err != nil {
		return fmt.Errorf("the candidate: %w", err)
	}
	return nil
}

// Test decides every case with the judge's own index and with Casbin.
func Test(p *mesh.Policies) Report {
	snap, err := mesh.Compile(p, 0, 0, nil)
	if err != nil {
		return Report{Broken: err}
	}
	return test(p, snap)
}

func test(p *mesh.Policies, snap *mesh.Snapshot) Report {
	set, err := authz.Compile(snap)
	if err != nil {
		return Report{Broken: err}
	}
	var rep Report
	at := map[string]int{}
	for _, r := range p.Rules {
		at[r.ID] = len(rep.Rows)
		row := Row{ID: r.ID, Origin: r.Origin}
		if r.Cond != "-" {
			for _, w := range strings.Fields(r.Cond) {
				row.Conds = append(row.Conds, CondCoverage{Cond: w})
			}
		}
		rep.Rows = append(rep.Rows, row)
	}
	t := tester{p: p, snap: snap, set: set, members: membersOf(p.Memberships)}
	for _, c := range p.Cases {
		res := t.run(c)
		if i, ok := at[res.Rule]; ok {
			rep.Rows[i].Cases++
		}
		rep.Results = append(rep.Results, res)
		t.needed(c, rep.Rows)
	}
	return rep
}

type tester struct {
	p       *mesh.Policies
	snap    *mesh.Snapshot
	set     *authz.Set
	members members
}

func (t *tester) run(c mesh.Case) Result {
	res := Result{Case: c, Got: mesh.Deny}
	call, err := callOf(t.p, c)
	if err != nil {
		res.Why = err.Error()
		return res
	}
	d := t.set.Decide(call)
	if oracle, err := t.set.Oracle(call); err != nil || oracle.Allow != d.Allow {
		res.Why = "index and Casbin disagree, which is a defect of Sallyport: please report this case"
		return res
	}
	res.Rule = d.Rule
	if d.Allow {
		res.Got = mesh.Allow
	}
	switch {
	case res.Got != c.Want:
		res.Why = fmt.Sprintf("want %s, got %s (%s)", c.Want, res.Got, t.because(call, d))
	case c.Rule != "" && c.Rule != d.Rule:
		res.Why = fmt.Sprintf("want %s by row %s, got %s (%s)", c.Want, c.Rule, res.Got, t.because(call, d))
	default:
		res.Why = wayOf(t.snap, call).differs(c.Way)
		res.OK = res.Why == ""
	}
	return res
}

// needed counts the conditions that alone keep a row from fitting the case.
func (t *tester) needed(c mesh.Case, rows []Row) {
	call, err := callOf(t.p, c)
	if err != nil {
		return
	}
	if call.Now.IsZero() {
		call.Now = time.Now()
	}
	facts := factsOf(call)
	for i := range rows {
		r := &t.p.Rules[i]
		if len(rows[i].Conds) == 0 || r.Dir != call.Dir {
			continue
		}
		if _, cost := t.differences(r, call); cost > 0 {
			continue
		}
		conds, err := mesh.ParseCond(r.Cond)
		if err != nil {
			continue // the policies compiled
		}
		failed := -1
		for j := range conds {
			if !condHolds(&conds[j], facts) {
				if failed >= 0 {
					failed = -1
					break
				}
				failed = j
			}
		}
		if failed >= 0 {
			rows[i].Conds[failed].Cases++
		}
	}
}

// condHolds asks one condition about a call.
func condHolds(c *mesh.Cond, f *callFacts) bool {
	if c.Word == mesh.CondUnlessSrc {
		return !mesh.MatchSrc(c.Value, f.Src.String())
	}
	if c.NeedsToken() && f.Token == nil {
		return false
	}
	d, term := condTerm(c)
	return match(d, term, valueOf(d, f))
}

// callOf is the call that a case describes.
func callOf(p *mesh.Policies, c mesh.Case) (*authz.Call, error) {
	dir, dst, err := p.Target(c)
	if err != nil {
		return nil, err
	}
	call := &authz.Call{
		Dir: dir, Src: c.From, Dst: dst, Port: c.Port, Verb: c.Verb, Path: c.Path,
		SNI: c.SNI, Now: c.Now, Environment: c.Environment,
	}
	call.Port = judgedPort(p.Destinations, call)
	if t := c.Token; t != nil {
		call.Token = &authz.Token{
			Issuer: t.Issuer, Audience: t.Audience, Claims: t.Claims,
			ACR: t.ACR, Bound: t.Bound, Scopes: map[string]bool{},
		}
		for _, s := range t.Scopes {
			call.Token.Scopes[s] = true
		}
	}
	return call, nil
}

// because says in the words of a reviewer why a call was decided so.
func (t *tester) because(c *authz.Call, d authz.Decision) string {
	switch {
	case d.Allow:
		return "allowed by " + d.Rule
	case d.Rule != "":
		return "denied by " + d.Rule
	case d.Reason == authz.BadRequest:
		return "no row can speak of such a call: it is refused before rows are asked"
	}
	near, differs := t.nearest(c)
	switch {
	case near == nil:
		return "no row matches"
	case len(differs) == 0:
		return fmt.Sprintf("no row matches: nearest is %s, whose condition %q does not hold", near.ID, near.Cond)
	case len(differs) == 1:
		return fmt.Sprintf("no row matches: nearest is %s, %s differs", near.ID, differs[0])
	}
	last := len(differs) - 1
	return fmt.Sprintf("no row matches: nearest is %s, %s and %s differ", near.ID, strings.Join(differs[:last], ", "), differs[last])
}

// nearest is the allow row that differs least from the call. A row that shares
// neither caller nor destination is not near.
func (t *tester) nearest(c *authz.Call) (*mesh.Rule, []string) {
	var (
		best *mesh.Rule
		diff []string
		cost = 1 << 10
	)
	for i := range t.p.Rules {
		r := &t.p.Rules[i]
		if r.Effect != mesh.Allow || r.Dir != c.Dir {
			continue
		}
		d, n := t.differences(r, c)
		if n < cost {
			best, diff, cost = r, d, n
		}
	}
	return best, diff
}

// differences lists the columns that keep the row from matching, and weighs
// them: another caller or destination is further away than another verb.
func (t *tester) differences(r *mesh.Rule, c *authz.Call) (columns []string, cost int) {
	differs := func(match bool, column string, weight int) {
		if !match {
			columns = append(columns, column)
			cost += weight
		}
	}
	src, dst := t.members.matchSrc(r, c.Src.String()), t.members.matchDst(r, c.Dst)
	if !src && !dst {
		return nil, 1 << 10
	}
	differs(src, "source", 8)
	differs(dst, "destination", 6)
	differs(mesh.MatchPort(r.Port, c.Port), "port", 2)
	differs(mesh.MatchVerb(r.Verb, c.Verb), "verb", 2)
	differs(mesh.MatchPath(r.Path, c.Path), "path", 3)
	return columns, cost
}
