package authz

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyport/internal/mesh"
)

// An Account says for people how a call was decided, and what would have to be
// otherwise. It is for operators: callers are told the decision id only.
type Account struct {
	Allow  bool   `json:"allow"`
	Reason Reason `json:"reason"`
	// Rule is the row that decided, Origin where it is written.
	Rule   string `json:"rule,omitempty"`
	Origin string `json:"origin,omitempty"`
	// What was judged.
	Dir      string `json:"dir"`
	Identity string `json:"identity"`
	Dst      string `json:"dst"`
	Port     uint16 `json:"port"`
	Verb     string `json:"verb"`
	Path     string `json:"path"`
	// Revision is that of the policy.
	Revision uint64 `json:"revision,omitempty"`
	// Tried are the rows that speak of the caller and the destination.
	Tried []Tried `json:"tried,omitempty"`
	// Nearest is the allow row that fits best, of a call that is denied.
	Nearest *Tried `json:"nearest,omitempty"`
	// Add is the row that would allow exactly this call, NoAdd why there is
	// none.
	Add   string `json:"add,omitempty"`
	NoAdd string `json:"no_add,omitempty"`
}

// Tried is a row that was compared with a call.
type Tried struct {
	Rule   string      `json:"rule"`
	Origin string      `json:"origin,omitempty"`
	Effect mesh.Effect `json:"effect"`
	// Field is the first column that did not fit, empty when all do; Want is
	// what the row has there and Got the call.
	Field Field  `json:"field,omitempty"`
	Want  string `json:"want,omitempty"`
	Got   string `json:"got,omitempty"`
}

// String is the comparison in a sentence.
func (t Tried) String() string {
	row := t.Rule
	if t.Origin != "" {
		row += " (" + t.Origin + ")"
	}
	if t.Field == "" {
		return fmt.Sprintf("%s fits: %s", row, t.Effect)
	}
	return fmt.Sprintf("%s, %s, does not fit: %s is %s, the row has %s", row, t.Effect, t.Field, t.Got, t.Want)
}

// Account explains a call.
func (s *Set) Account(c *Call) Account {
	x := s.Explain(c)
	a := Account{
		Allow: x.Decision.Allow, Reason: x.Decision.Reason, Rule: x.Decision.Rule,
		Dir: string(c.Dir), Identity: srcText(c.Src), Dst: c.Dst, Port: c.Port, Verb: c.Verb, Path: c.Path,
		Revision: s.Revision(),
	}
	for i := range x.Tried {
		t := x.Tried[i].told(c)
		if t.Rule == a.Rule {
			a.Origin = t.Origin
		}
		a.Tried = append(a.Tried, t)
	}
	if a.Allow {
		return a
	}
	if x.Nearest != nil {
		t := x.Nearest.told(c)
		a.Nearest = &t
	}
	row, err := s.rowFor(c, x)
	if err != nil {
		a.NoAdd = err.Error()
	} else {
		a.Add = row.Row()
	}
	return a
}

func (t *Trial) told(c *Call) Tried {
	out := Tried{Rule: t.Rule.ID, Effect: t.Rule.Effect, Field: t.Field, Want: t.Want}
	if t.Rule.Origin.File != "" {
		out.Origin = t.Rule.Origin.String()
	}
	switch t.Field {
	case FieldSrc:
		out.Got = srcText(c.Src)
	case FieldDst:
		out.Got = c.Dst
	case FieldPort:
		out.Got = strconv.Itoa(int(c.Port))
	case FieldVerb:
		out.Got = c.Verb
	case FieldPath:
		out.Got = c.Path
	case FieldCond:
		out.Got = gotCond(t.Want, c)
	}
	return out
}

// gotCond is what the call has where the condition wants something else.
func gotCond(want string, c *Call) string {
	conds, err := mesh.ParseCond(want)
	if err != nil || len(conds) != 1 {
		return "something else"
	}
	w := &conds[0]
	if w.NeedsToken() && c.Token == nil {
		return "no token"
	}
	or := func(s string) string {
		if s == "" {
			return "none"
		}
		return s
	}
	switch w.Word {
	case mesh.CondIssuer:
		return or(c.Token.Issuer)
	case mesh.CondAudience:
		return or(strings.Join(c.Token.Audience, " "))
	case mesh.CondScope:
		scopes := make([]string, 0, len(c.Token.Scopes))
		for s, has := range c.Token.Scopes {
			if has {
				scopes = append(scopes, s)
			}
		}
		slices.Sort(scopes)
		return or(strings.Join(scopes, " "))
	case mesh.CondClaim:
		return or(c.Token.Claims[w.Key])
	case mesh.CondACR:
		return strconv.Itoa(c.Token.ACR)
	case mesh.CondBound:
		return "a token that is not bound to the caller's key"
	case mesh.CondEnv:
		return or(c.Environment)
	case mesh.CondSNI:
		return or(c.SNI)
	case mesh.CondUnlessSrc:
		return srcText(c.Src)
	}
	return c.Now.UTC().Format(time.RFC3339)
}
