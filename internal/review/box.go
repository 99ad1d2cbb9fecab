package review

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"sallyport/internal/mesh"
)

// A dimension is one of the independent facts of a call, such as its caller or
// the issuer of its token. The text is what people read.
type dimension string

// The dimensions that every call has, in the order in which they are split.
// Those of conditions follow in the order of condDimensions.
const (
	byDir  dimension = "dir"
	bySrc  dimension = "src"
	byDst  dimension = "dst"
	byPort dimension = "port"
	byPath dimension = "path"
	byVerb dimension = "verb"
)

// Dimensions of conditions. byClaim, byAud and byScope are followed by the name
// of the claim, audience or scope: each is a fact of its own.
const (
	byToken  dimension = "token"
	byIssuer dimension = "iss"
	byClaim  dimension = "claim."
	byAud    dimension = "aud="
	byScope  dimension = "scope~"
	byACR    dimension = "acr"
	byBound  dimension = "bound"
	byEnv    dimension = "env"
	bySNI    dimension = "sni"
	byTime   dimension = "time"
)

var (
	fixedDimensions = []dimension{byDir, bySrc, byDst, byPort, byPath, byVerb}
	condDimensions  = []dimension{byToken, byIssuer, byClaim, byAud, byScope, byACR, byBound, byEnv, bySNI, byTime}
)

// unless stands before a pattern that the caller must not match.
const unless = "unless.src="

// hasToken is the one term of byToken.
const hasToken = "token"

// A box is the set of calls that a row speaks of: for each dimension the terms
// that say what must hold there. Of callers and destinations one term must
// match, and none that starts with "unless.src="; of all others each must.
type box struct {
	deny  bool
	terms map[dimension][]string
}

// boxes gives the rows as boxes, groups expanded. A row of an empty group
// speaks of no call.
func boxes(p *mesh.Policies) []*box {
	m := membersOf(p.Memberships)
	out := make([]*box, 0, len(p.Rules))
	for i := range p.Rules {
		if b := boxOf(&p.Rules[i], m); b != nil {
			out = append(out, b)
		}
	}
	return out
}

func boxOf(r *mesh.Rule, m members) *box {
	src, dst := m.patterns(r.Src), m.patterns(r.Dst)
	if len(src) == 0 || len(dst) == 0 {
		return nil
	}
	b := &box{deny: r.Effect == mesh.Deny, terms: map[dimension][]string{
		byDir:  {string(r.Dir)},
		bySrc:  slices.Clone(src),
		byDst:  slices.Clone(dst),
		byPort: {r.Port},
		byPath: {r.Path},
		byVerb: {r.Verb},
	}}
	conds, err := mesh.ParseCond(r.Cond)
	if err != nil {
		return nil // policies are validated before they are compared
	}
	for i := range conds {
		c := &conds[i]
		if c.Word == mesh.CondUnlessSrc {
			b.terms[bySrc] = append(b.terms[bySrc], unless+c.Value)
			continue
		}
		if c.NeedsToken() {
			b.terms[byToken] = []string{hasToken}
		}
		d, term := condTerm(c)
		b.terms[d] = append(b.terms[d], term)
	}
	for _, terms := range b.terms {
		slices.Sort(terms)
	}
	return b
}

// condTerm says which fact a condition speaks of, and writes it as in the row.
func condTerm(c *mesh.Cond) (dimension, string) {
	text := string(c.Word) + c.Value
	switch c.Word {
	case mesh.CondIssuer:
		return byIssuer, text
	case mesh.CondClaim:
		return byClaim + dimension(c.Key), string(c.Word) + c.Key + "=" + c.Value
	case mesh.CondAudience:
		return byAud + dimension(c.Value), text
	case mesh.CondScope:
		return byScope + dimension(c.Value), text
	case mesh.CondACR:
		return byACR, text
	case mesh.CondBound:
		return byBound, text
	case mesh.CondEnv:
		return byEnv, text
	case mesh.CondSNI:
		return bySNI, text
	}
	return byTime, text
}

// holds reports whether the box keeps calls with the value in the dimension.
func (b *box) holds(d dimension, value string) bool {
	terms := b.terms[d]
	if d != bySrc && d != byDst {
		for _, t := range terms {
			if !match(d, t, value) {
				return false
			}
		}
		return true
	}
	found := false
	for _, t := range terms {
		if p, ok := strings.CutPrefix(t, unless); ok {
			if mesh.MatchSrc(p, value) {
				return false
			}
		} else if !found {
			found = match(d, t, value)
		}
	}
	return found
}

// match reports whether a value of the dimension satisfies a term.
func match(d dimension, term, value string) bool {
	switch d {
	case byDir, byIssuer, byEnv, byBound, bySNI, byToken:
		return term == value
	case bySrc:
		return mesh.MatchSrc(strings.TrimPrefix(term, unless), value)
	case byDst:
		if strings.HasPrefix(value, "host:") {
			return mesh.MatchDst(mesh.Out, term, value)
		}
		return mesh.MatchDst(mesh.In, term, value)
	case byPort:
		return term == "*" || term == value
	case byPath:
		return mesh.MatchPath(term, value)
	case byVerb:
		return mesh.MatchVerb(term, value)
	case byACR:
		return value != "" && levelOf(value) >= levelOf(term)
	case byTime:
		return within(term, value)
	}
	return term == value // a claim, an audience, a scope
}

// levelOf reads "acr>=N".
func levelOf(term string) int {
	c, err := mesh.ParseCond(term)
	if err != nil || len(c) != 1 {
		return -1
	}
	return c[0].Level
}

// within reports whether a moment, RFC 3339, satisfies a when= or until=.
func within(term, moment string) bool {
	c, err := mesh.ParseCond(term)
	t, terr := time.Parse(time.RFC3339, moment)
	return err == nil && terr == nil && len(c) == 1 && c[0].Within(t)
}

// rest writes what the box says in the dimensions that are not split yet.
func (b *box) rest(done map[dimension]bool) string {
	keys := make([]dimension, 0, len(b.terms))
	for d := range b.terms {
		if !done[d] {
			keys = append(keys, d)
		}
	}
	slices.Sort(keys)
	var s strings.Builder
	if b.deny {
		s.WriteByte('!')
	}
	for _, d := range keys {
		s.WriteString(string(d))
		for _, t := range b.terms[d] {
			s.WriteByte(0)
			s.WriteString(t)
		}
		s.WriteByte(1)
	}
	return s.String()
}

// sameRest reports whether two sets of boxes say the same in what is left.
func sameRest(a, b []*box, done map[dimension]bool) bool {
	set := func(bs []*box) map[string]bool {
		m := make(map[string]bool, len(bs))
		for _, x := range bs {
			m[x.rest(done)] = true
		}
		return m
	}
	x, y := set(a), set(b)
	if len(x) != len(y) {
		return false
	}
	for k := range x {
		if !y[k] {
			return false
		}
	}
	return true
}

// next is the first dimension that is not split yet and that a box speaks of;
// empty when none is left.
func next(done map[dimension]bool, sets ...[]*box) dimension {
	for _, d := range fixedDimensions {
		if !done[d] {
			return d
		}
	}
	best, bestRank := dimension(""), 0
	for _, bs := range sets {
		for _, b := range bs {
			for d := range b.terms {
				if done[d] {
					continue
				}
				if r := rank(d); best == "" || cmp.Or(cmp.Compare(r, bestRank), cmp.Compare(d, best)) < 0 {
					best, bestRank = d, r
				}
			}
		}
	}
	return best
}

func rank(d dimension) int {
	return slices.IndexFunc(condDimensions, func(c dimension) bool {
		return d == c || (c == byClaim || c == byAud || c == byScope) && strings.HasPrefix(string(d), string(c))
	})
}
