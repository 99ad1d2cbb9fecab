package authz

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// A Field names the column of a row that a call did not fit; empty when all fit.
type Field string

// The columns, in the order in which they are compared.
const (
	FieldSrc  Field = "src"
	FieldDst  Field = "dst"
	FieldPort Field = "port"
	FieldVerb Field = "verb"
	FieldPath Field = "path"
	FieldCond Field = "cond"
)

// A Trial is one row compared with a call.
type Trial struct {
	Rule mesh.Rule
	// Field is the first column that did not fit, empty when the row matches.
	Field Field
	// Want is what the row has in that column; of conditions, the first that
	// does not hold.
	Want string
	// fit counts the columns that fit, ends those of caller and destination.
	fit, ends int
}

// An Explanation says how a decision came about.
type Explanation struct {
	Decision Decision
	// Tried has the rows that speak of both the caller and the destination.
	Tried []Trial
	// Nearest is the allow row that fits the call best, nil when the call is
	// allowed or no allow row speaks of its caller or destination.
	Nearest *Trial
}

// Explain decides and says why, by comparing each row. It is for people and
// tests: it takes time in proportion to the rows.
func (s *Set) Explain(c *Call) Explanation {
	x := Explanation{Decision: s.Decide(c)}
	if s.Len() == 0 || x.Decision.Reason == BadRequest {
		return x
	}
	for i := range s.rows {
		if s.rows[i].Dir != c.Dir {
			continue
		}
		t := s.try(i, c)
		if t.Field != FieldSrc && t.Field != FieldDst {
			x.Tried = append(x.Tried, t)
		}
		if t.Rule.Effect == mesh.Allow && !x.Decision.Allow && t.ends > 0 && (x.Nearest == nil || t.fit > x.Nearest.fit) {
			x.Nearest = &t
		}
	}
	return x
}

// try compares row i with the call, column by column.
func (s *Set) try(i int, c *Call) Trial {
	r := &s.rows[i]
	t := Trial{Rule: *r}
	miss := func(ok bool, f Field, want string) {
		if ok {
			t.fit++
		} else if t.Field == "" {
			t.Field, t.Want = f, want
		}
	}
	src := c.Src.String()
	miss(mesh.MatchSrc(r.Src, src) || s.oracle.members[r.Src][src], FieldSrc, r.Src)
	miss(mesh.MatchDst(r.Dir, r.Dst, c.Dst) || s.oracle.members[r.Dst][c.Dst], FieldDst, r.Dst)
	t.ends = t.fit
	miss(mesh.MatchPort(r.Port, c.Port), FieldPort, r.Port)
	miss(mesh.MatchVerb(r.Verb, c.Verb), FieldVerb, r.Verb)
	miss(mesh.MatchPath(r.Path, c.Path), FieldPath, r.Path)
	w := failedCond(s.conds[i], c)
	want := ""
	if w != nil {
		want = condText(w)
	}
	miss(w == nil, FieldCond, want)
	return t
}

// condText writes a condition as it stands in a row.
func condText(w *mesh.Cond) string {
	if w.Word == mesh.CondClaim {
		return string(w.Word) + w.Key + "=" + w.Value
	}
	return string(w.Word) + w.Value
}

// ErrNoRow is returned by RowFor when a row could not help.
var ErrNoRow = errors.New("no new row helps")

// RowFor is the row that would allow the call and nothing else, or why there is
// none. Conditions are not among it: who adds it decides on them.
func (s *Set) RowFor(c *Call) (mesh.Rule, error) {
	return s.rowFor(c, s.Explain(c))
}

func (s *Set) rowFor(c *Call, x Explanation) (mesh.Rule, error) {
	d := x.Decision
	cond := slices.IndexFunc(x.Tried, func(t Trial) bool { return t.Rule.Effect == mesh.Allow && t.Field == FieldCond })
	switch {
	case d.Allow:
		return mesh.Rule{}, fmt.Errorf("%w: row %s allows it", ErrNoRow, d.Rule)
	case d.Rule != "":
		return mesh.Rule{}, fmt.Errorf("%w: row %s denies it, and a deny beats every allow", ErrNoRow, d.Rule)
	case d.Reason == BadRequest:
		return mesh.Rule{}, fmt.Errorf("%w: such a call is refused before rows are asked", ErrNoRow)
	case cond >= 0:
		return mesh.Rule{}, fmt.Errorf("%w: row %s allows it when %s holds", ErrNoRow, x.Tried[cond].Rule.ID, x.Tried[cond].Want)
	}
	if err := mesh.Literal(c.Path); err != nil {
		return mesh.Rule{}, fmt.Errorf("%w: %w", ErrNoRow, err)
	}
	r := mesh.Rule{
		Dir: c.Dir, Src: c.Src.String(), Dst: c.Dst, Port: strconv.Itoa(int(c.Port)),
		Verb: c.Verb, Path: c.Path, Cond: "-", Effect: mesh.Allow,
	}
	if host, ok := strings.CutPrefix(c.Dst, "host:"); ok && c.SNI == host {
		r.Cond = string(mesh.CondSNI) + "same"
	}
	r.ID = mesh.RuleID(&r, s.has)
	td := c.Src.TrustDomain()
	if dst, err := spiffeid.FromString(c.Dst); err == nil {
		td = dst.TrustDomain()
	}
	if err := r.Writable(td); err != nil {
		return mesh.Rule{}, fmt.Errorf("%w: %w", ErrNoRow, err)
	}
	return r, nil
}

// has reports whether a row has the id.
func (s *Set) has(id string) bool {
	return s != nil && slices.ContainsFunc(s.rows, func(r mesh.Rule) bool { return r.ID == id })
}
