package review

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"sallyport/internal/mesh"
)

// A side is the part of one dimension that a cell covers: the values that
// satisfy one of the accepted combinations of terms.
type side struct {
	dim    dimension
	terms  []string
	values []string // one for each accepted combination
	others []string // one for each that is not accepted; none means any value
	accept map[string]bool
}

func newSide(d dimension, terms, values, all []string) side {
	s := side{dim: d, terms: slices.Clone(terms), values: values, accept: map[string]bool{}}
	for _, v := range values {
		s.accept[vector(d, terms, v)] = true
	}
	for _, v := range all {
		if !s.accept[vector(d, terms, v)] {
			s.others = append(s.others, v)
		}
	}
	s.forget()
	return s
}

// forgetful bounds the search for terms that make no difference.
const forgetful = 128

// forget drops terms that do not tell accepted values from others, so that two
// sides which cover the same calls are written the same way.
func (s *side) forget() {
	if len(s.others) == 0 {
		s.terms, s.accept = nil, map[string]bool{"": true}
		return
	}
	if len(s.terms) > forgetful {
		return
	}
	// What no accepted value satisfies goes first: "in" says more than "not out".
	slices.SortStableFunc(s.terms, func(a, b string) int {
		return cmp.Compare(min(s.reach(a, s.values), 1), min(s.reach(b, s.values), 1))
	})
	for i := 0; i < len(s.terms); {
		less := slices.Delete(slices.Clone(s.terms), i, i+1)
		accept := map[string]bool{}
		for _, v := range s.values {
			accept[vector(s.dim, less, v)] = true
		}
		if slices.ContainsFunc(s.others, func(v string) bool { return accept[vector(s.dim, less, v)] }) {
			i++
			continue
		}
		s.terms, s.accept = less, accept
	}
	slices.Sort(s.terms)
	s.accept = map[string]bool{}
	for _, v := range s.values {
		s.accept[vector(s.dim, s.terms, v)] = true
	}
}

func (s *side) any() bool { return len(s.others) == 0 }

func (s *side) covers(value string) bool { return s.accept[vector(s.dim, s.terms, value)] }

func (s *side) key() string {
	vs := make([]string, 0, len(s.accept))
	for v := range s.accept {
		vs = append(vs, v)
	}
	slices.Sort(vs)
	return string(s.dim) + "\x00" + strings.Join(s.terms, "\x00") + "\x01" + strings.Join(vs, "\x00") + "\x02"
}

// A block is a set of calls that all changed the same way.
type block struct {
	allowed bool // now allowed, and denied before; or the other way round
	sides   []side
}

func (b *block) key() string {
	s := "deny\x03"
	if b.allowed {
		s = "allow\x03"
	}
	for i := range b.sides {
		s += b.sides[i].key()
	}
	return s
}

// A splitter compares two sets of boxes by splitting one dimension after the
// other until nothing is left that could differ.
type splitter struct {
	now time.Time
	// left is how many more sets of boxes may be compared.
	left int
}

// changed returns the blocks in which the decision of the two sets differs. It
// does not sample: calls that are in no block are decided alike.
func (s *splitter) changed(old, new []*box, done map[dimension]bool) ([]block, error) {
	if s.left--; s.left < 0 {
		return nil, ErrTooWide
	}
	if sameRest(old, new, done) || !allows(old) && !allows(new) {
		return nil, nil
	}
	d := next(done, old, new)
	if d == "" {
		was, is := verdict(old), verdict(new)
		if was == is {
			return nil, nil
		}
		return []block{{allowed: is}}, nil
	}
	terms := termsOf(d, old, new)
	all := atoms(d, terms, s.now)
	done[d] = true
	defer delete(done, d)
	groups := map[string][]string{} // values by what follows from them
	follow := map[string][]block{}
	var order []string
	for _, v := range all {
		sub, err := s.changed(keep(old, d, v), keep(new, d, v), done)
		if err != nil {
			return nil, err
		}
		for _, b := range sub {
			k := b.key()
			if groups[k] == nil {
				order = append(order, k)
				follow[k] = []block{b}
			}
			groups[k] = append(groups[k], v)
		}
	}
	var out []block
	for _, k := range order {
		for _, b := range follow[k] {
			b.sides = append([]side{newSide(d, terms, groups[k], all)}, b.sides...)
			out = append(out, b)
		}
	}
	return out, nil
}

func keep(bs []*box, d dimension, value string) []*box {
	var out []*box
	for _, b := range bs {
		if b.holds(d, value) {
			out = append(out, b)
		}
	}
	return out
}

// apart are the verb and the path that are told from others whatever the rows
// say: CONNECT has no path, and all others have one.
var apart = map[dimension]string{byVerb: "CONNECT", byPath: "-"}

// termsOf collects what boxes say in a dimension.
func termsOf(d dimension, sets ...[]*box) []string {
	var out []string
	seen := map[string]bool{}
	for _, bs := range sets {
		for _, b := range bs {
			for _, t := range b.terms[d] {
				if !seen[t] {
					seen[t] = true
					out = append(out, t)
				}
			}
		}
	}
	if apart := apart[d]; apart != "" && !seen[apart] {
		out = append(out, apart)
	}
	slices.Sort(out)
	return out
}

// allows reports whether any box could allow; verdict whether they do, when all
// of them match.
func allows(bs []*box) bool { return slices.ContainsFunc(bs, func(b *box) bool { return !b.deny }) }

func verdict(bs []*box) bool {
	return allows(bs) && !slices.ContainsFunc(bs, func(b *box) bool { return b.deny })
}

// valueOf is what a call has in a dimension; term has the text of it in rows.
func valueOf(d dimension, c *callFacts) string {
	switch d {
	case byDir:
		return string(c.Dir)
	case bySrc:
		return c.Src.String()
	case byDst:
		return c.Dst
	case byPort:
		return c.port
	case byPath:
		return c.Path
	case byVerb:
		return c.Verb
	case byEnv:
		return string(mesh.CondEnv) + c.Environment
	case bySNI:
		if h, ok := strings.CutPrefix(c.Dst, "host:"); ok && h == c.SNI {
			return string(mesh.CondSNI) + "same"
		}
		return ""
	case byTime:
		return c.Now.UTC().Format(time.RFC3339Nano)
	}
	return c.tokenFact(d)
}
