package review

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

// A Suggestion is a row that would allow calls that were observed, and as few
// others as a row can.
type Suggestion struct {
	Rule mesh.Rule `json:"rule"`
	// Calls counts those that were observed, Today are the rows that decided
	// them, or why none did.
	Calls uint64   `json:"calls"`
	Today []string `json:"today"`
	// Doubt says why the row must not be taken as it is; empty when it may.
	Doubt string `json:"doubt,omitempty"`
}

// Suggest returns least-privilege rows for the calls that passed, and with
// denied for those that no row allowed, too: what a deny row refused is never
// suggested. Callers and destinations are those observed, never a pattern; of a
// path only what audit logs count together is generalised, one segment at a
// time. Conditions are those of the row of p that allowed the call.
func Suggest(p *mesh.Policies, t *Traffic, denied bool) []Suggestion {
	s := suggester{p: p, at: map[mesh.Rule]int{}, rows: map[string]*mesh.Rule{}}
	for i := range p.Rules {
		s.rows[p.Rules[i].ID] = &p.Rules[i]
	}
	for i := range t.Observed {
		o := &t.Observed[i]
		refused := s.rows[o.Rule] != nil && s.rows[o.Rule].Effect == mesh.Deny || o.Rule != "" && !o.Allowed
		if !refused && (o.Allowed || denied) {
			s.add(o)
		}
	}
	return s.finish()
}

type suggester struct {
	p    *mesh.Policies
	rows map[string]*mesh.Rule
	out  []Suggestion
	// at finds the suggestion of a row without its verb and id, verbs has
	// those that were observed.
	at    map[mesh.Rule]int
	verbs []map[string]bool
}

func (s *suggester) add(o *Observed) {
	r := mesh.Rule{
		Dir: o.Dir, Src: o.Src, Dst: o.Dst, Port: strconv.Itoa(int(o.Port)),
		Path: o.Path, Cond: "-", Effect: mesh.Allow,
	}
	doubt := ""
	if o.Dir == mesh.Out {
		r.Cond = string(mesh.CondSNI) + "same"
	}
	switch row := s.rows[o.Rule]; {
	case row != nil:
		r.Cond = row.Cond
	case o.Rule != "":
		doubt = fmt.Sprintf("row %s, which allowed it, is not in these files: its conditions are not known", o.Rule)
	case o.Reason == string(authz.FailedCond) || o.Reason == string(authz.FailedToken):
		doubt = "a row allows it when its conditions hold, which they did not"
	}
	if r.Path != "-" {
		var why string
		r.Path, why = general(o.Path)
		doubt = cmp.Or(doubt, why)
	}
	if o.Verb == "*" {
		doubt = cmp.Or(doubt, "the log does not say which verb")
	}
	if doubt != "" { // kept apart from rows that are in no doubt
		r.Origin.File = doubt
	}
	i, known := s.at[r]
	if !known {
		i = len(s.out)
		s.at[r] = i
		s.out = append(s.out, Suggestion{Rule: r, Doubt: doubt})
		s.verbs = append(s.verbs, map[string]bool{})
	}
	x := &s.out[i]
	x.Calls += o.Calls
	s.verbs[i][o.Verb] = true
	if by := cmp.Or(o.Rule, o.Reason); !slices.Contains(x.Today, by) {
		x.Today = append(x.Today, by)
	}
}

// general makes a pattern of a template: "{}" is one segment. What the log
// does not have in full is in doubt.
func general(path string) (pattern, doubt string) {
	segs := strings.Split(path, "/")
	for i, seg := range segs {
		switch {
		case seg == "{}":
			segs[i] = "*"
		case strings.Contains(seg, "…") || strings.Contains(seg, "[redacted]"):
			segs[i], doubt = "*", "the log does not have the whole path"
		case seg == "*" || seg == mesh.Any && i < len(segs)-1:
			doubt = fmt.Sprintf("the segment %q of the path would be a pattern", seg)
		case seg == mesh.Any:
			doubt = "there were more paths than the log counts apart"
		}
	}
	if path == mesh.Any {
		doubt = "there were more paths than the log counts apart"
	}
	return strings.Join(segs, "/"), doubt
}

// finish gives the rows their verbs, an order and ids, and checks that each can
// be written.
func (s *suggester) finish() []Suggestion {
	for i := range s.out {
		x := &s.out[i]
		x.Rule.Origin = mesh.Origin{}
		verbs := make([]string, 0, len(s.verbs[i]))
		for v := range s.verbs[i] {
			verbs = append(verbs, v)
		}
		slices.Sort(verbs)
		x.Rule.Verb = strings.Join(verbs, "|")
		if s.verbs[i]["*"] {
			x.Rule.Verb = "*"
		}
		slices.Sort(x.Today)
	}
	slices.SortStableFunc(s.out, func(a, b Suggestion) int {
		x, y := &a.Rule, &b.Rule
		return cmp.Or(cmp.Compare(x.Src, y.Src), cmp.Compare(x.Dir, y.Dir), cmp.Compare(x.Dst, y.Dst), cmp.Compare(x.Path, y.Path), cmp.Compare(x.Port, y.Port), cmp.Compare(x.Cond, y.Cond), cmp.Compare(x.Verb, y.Verb))
	})
	taken := map[string]bool{}
	for id := range s.rows {
		taken[id] = true
	}
	for i := range s.out {
		x := &s.out[i]
		x.Rule.ID = mesh.RuleID(&x.Rule, func(id string) bool { return taken[id] })
		taken[x.Rule.ID] = true
		if _, err := spiffeid.FromString(x.Rule.Src); err != nil {
			x.Doubt = "the caller is not a SPIFFE ID"
		}
		if err := x.Rule.Writable(s.p.TrustDomain); err != nil && x.Doubt == "" {
			x.Doubt = strings.Join(strings.Fields(err.Error()), " ")
		}
	}
	return s.out
}
