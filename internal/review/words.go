package review

import (
	"fmt"
	"slices"
	"strings"
)

// text writes the side in the words of rows: whole terms where they fit, what
// is left over by its nearest term and what is taken out of it.
func (s *side) text() string {
	switch s.dim {
	case byVerb:
		return s.verbs()
	case bySrc, byDst, byPort, byPath, byDir:
		return s.pattern()
	}
	return s.condition()
}

// reach is which values a term matches.
func (s *side) reach(term string, values []string) (n int) {
	for _, v := range values {
		if match(s.dim, term, v) {
			n++
		}
	}
	return n
}

func (s *side) pattern() string {
	var words []string
	left := slices.Clone(s.values)
	for len(left) > 0 {
		best, most := "", 0
		for _, t := range s.terms {
			if strings.HasPrefix(t, unless) || s.reach(t, s.others) > 0 {
				continue
			}
			if n := s.reach(t, left); n > most {
				best, most = t, n
			}
		}
		if best == "" {
			break
		}
		words = append(words, best)
		left = slices.DeleteFunc(left, func(v string) bool { return match(s.dim, best, v) })
	}
	for _, v := range left {
		words = append(words, s.atom(v))
	}
	slices.Sort(words)
	return strings.Join(slices.Compact(words), ", ")
}

// verbs writes the verbs that rows name, or all but those.
func (s *side) verbs() string {
	var named []string
	for _, t := range s.terms {
		named = append(named, strings.Split(t, "|")...)
	}
	unnamed := func(v string) bool { return !slices.Contains(named, v) }
	if slices.ContainsFunc(s.values, unnamed) {
		not := slices.Concat(slices.DeleteFunc(slices.Clone(s.others), unnamed),
			slices.DeleteFunc(slices.Clone(named), func(v string) bool { return v == "*" || s.covers(v) }))
		slices.Sort(not)
		return "any except " + strings.Join(slices.Compact(not), "|")
	}
	// One value stands for all verbs that rows do not tell apart.
	vs := slices.Concat(s.values, slices.DeleteFunc(named, func(v string) bool { return v == "*" || !s.covers(v) }))
	slices.Sort(vs)
	return strings.Join(slices.Compact(vs), "|")
}

// atom writes the values that satisfy the same terms as v does.
func (s *side) atom(v string) string {
	within, size := "any", len(s.values)+len(s.others)+1
	all := slices.Concat(s.values, s.others)
	for _, t := range s.terms {
		if strings.HasPrefix(t, unless) || !match(s.dim, t, v) {
			continue
		}
		if n := s.reach(t, all); n < size {
			within, size = t, n
		}
	}
	var but []string
	for _, t := range s.terms {
		if match(s.dim, t, v) {
			continue
		}
		p := strings.TrimPrefix(t, unless)
		overlaps := slices.ContainsFunc(all, func(o string) bool {
			return match(s.dim, p, o) && (within == "any" || match(s.dim, within, o))
		})
		if overlaps && !slices.Contains(but, p) {
			but = append(but, p)
		}
	}
	if len(but) == 0 {
		return within
	}
	return fmt.Sprintf("%s except %s", within, strings.Join(but, " "))
}

// condition writes accepted combinations of conditions.
func (s *side) condition() string {
	var alts []string
	for _, v := range s.values {
		var words []string
		for _, t := range s.terms {
			if match(s.dim, t, v) {
				words = append(words, t)
			} else if !s.implied(t) {
				words = append(words, "not "+t)
			}
		}
		alts = append(alts, strings.Join(words, " "))
	}
	slices.Sort(alts)
	return strings.Join(slices.Compact(alts), " or ")
}

// implied reports whether "not t" need not be said because terms of the side
// exclude each other and another one is said.
func (s *side) implied(t string) bool {
	return s.dim != byTime && s.dim != byACR && slices.ContainsFunc(s.values, func(v string) bool { return v != "" && match(s.dim, v, v) && v != t })
}

// Calls writes the calls of the cell on one line.
func (c *Cell) Calls() string {
	s := fmt.Sprintf("%s %s -> %s port %s %s %s", c.Dir, c.Src, c.Dst, c.Port, c.Verb, c.Path)
	if c.When != "" {
		s += " when " + c.When
	}
	return s
}

// String is the call on one line.
func (w Witness) String() string {
	s := fmt.Sprintf("%s %s -> %s:%d %s %s", w.Dir, w.Src, w.Dst, w.Port, w.Verb, w.Path)
	if w.SNI != "" {
		s += " sni=" + w.SNI
	}
	if len(w.Token) > 0 {
		s += " token(" + strings.Join(w.Token, " ") + ")"
	}
	if w.Env != "" {
		s += " env=" + w.Env
	}
	if w.At != "" {
		s += " at " + w.At
	}
	return s
}
