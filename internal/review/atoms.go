package review

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyport/internal/mesh"
)

// atoms splits a dimension: the values returned satisfy, between them, every
// combination of the terms that any value can satisfy, each combination once.
// Judging those few values is therefore judging all values.
func atoms(d dimension, terms []string, now time.Time) []string {
	var vs []string
	switch d {
	case byDir:
		vs = []string{string(mesh.In), string(mesh.Out)}
	case bySrc:
		vs = identities(terms)
	case byDst:
		vs = destinations(terms)
	case byPort:
		vs = ports(terms)
	case byPath:
		vs = paths(terms)
	case byVerb:
		vs = verbs(terms)
	case byACR:
		vs = append(slices.Clone(terms), "") // "" is below every level
	case byTime:
		vs = moments(terms, now)
	default:
		vs = append(slices.Clone(terms), "") // "" is none of them
	}
	seen := map[string]bool{}
	return slices.DeleteFunc(vs, func(v string) bool {
		k := vector(d, terms, v)
		dup := seen[k]
		seen[k] = true
		return dup
	})
}

// vector writes which of the terms a value satisfies, one byte each.
func vector(d dimension, terms []string, value string) string {
	b := make([]byte, len(terms))
	for i, t := range terms {
		b[i] = '0'
		if match(d, t, value) {
			b[i] = '1'
		}
	}
	return string(b)
}

// fresh returns a word that is not among the taken ones.
func fresh(word string, taken []string) string {
	for w, n := word, 2; ; n++ {
		if !slices.Contains(taken, w) {
			return w
		}
		w = fmt.Sprintf("%s-%d", word, n)
	}
}

func ports(terms []string) []string {
	var out []string
	for _, t := range terms {
		if t != "*" {
			out = append(out, t)
		}
	}
	for n := 1; ; n++ {
		if p := strconv.Itoa(n); !slices.Contains(out, p) {
			return append(out, p)
		}
	}
}

func verbs(terms []string) []string {
	var out []string
	for _, t := range terms {
		for v := range strings.SplitSeq(t, "|") {
			if v != "*" {
				out = append(out, v)
			}
		}
	}
	// Two more, so that there is one with a path and one without.
	return append(out, "GET", "CONNECT", fresh("PROPFIND", out))
}

func identities(terms []string) []string {
	var ps [][]string
	for _, t := range terms {
		if p, ok := strings.CutPrefix(strings.TrimPrefix(t, unless), "spiffe://"); ok {
			ps = append(ps, strings.Split(p, "/"))
		}
	}
	var out []string
	for _, v := range strand(ps, fresh("other.example", firsts(ps)), false) {
		if strings.Contains(v, "/") { // a trust domain alone is nobody
			out = append(out, "spiffe://"+v)
		}
	}
	return out
}

func firsts(ps [][]string) []string {
	var out []string
	for _, p := range ps {
		out = append(out, p[0])
	}
	return out
}

// destinations are hosts and identities: the direction was chosen before.
func destinations(terms []string) []string {
	var names, in []string
	for _, t := range terms {
		if h, ok := strings.CutPrefix(t, "host:"); ok {
			names = append(names, h)
		} else {
			in = append(in, t)
		}
	}
	out := identities(in)
	for _, h := range names {
		if apex, ok := strings.CutPrefix(h, "*."); ok {
			h = fresh("any", labels(names)) + "." + apex
		}
		out = append(out, "host:"+h)
	}
	return append(out, "host:"+fresh("any", labels(names))+".example")
}

func labels(names []string) []string {
	out := make([]string, len(names))
	for i, n := range names {
		out[i], _, _ = strings.Cut(n, ".")
	}
	return out
}

func paths(terms []string) []string {
	var ps [][]string
	for _, t := range terms {
		if strings.HasPrefix(t, "/") {
			ps = append(ps, strings.Split(t[1:], "/"))
		}
	}
	out := []string{"-"}
	for _, v := range strand(ps, "", true) {
		out = append(out, "/"+v)
	}
	return out
}

// strand returns texts of segments joined by "/" that satisfy every possible
// combination of the segment patterns. It follows all patterns at once, segment
// by segment: what counts is which of them are still alive, so it is finite.
// Other is an additional first segment, when not empty. With tail the last
// segment may be empty, as in a path that ends in a slash.
func strand(ps [][]string, other string, tail bool) []string {
	s := strander{ps: ps, other: other, tail: tail, deep: 2, seen: map[string]bool{}}
	all := make([]int, len(ps))
	for i := range all {
		all[i] = i
	}
	s.walk("", 0, all, nil)
	return s.out
}

type strander struct {
	ps    [][]string
	other string
	tail  bool
	deep  int // segments that a text has at least
	seen  map[string]bool
	out   []string
}

// walk continues a text of depth segments for which the patterns alive still
// can match, and those in done match whatever follows.
func (s *strander) walk(text string, depth int, alive, done []int) {
	key := fmt.Sprint(depth, alive, done)
	if s.seen[key] {
		return
	}
	s.seen[key] = true
	if depth > 0 {
		s.out = append(s.out, text)
	}
	var literals []string
	var rest []int
	for _, i := range alive {
		switch p := s.ps[i]; {
		case depth >= len(p): // ended before
		case p[depth] == mesh.Any:
			done = append(slices.Clone(done), i)
		default:
			rest = append(rest, i)
			if p[depth] != "*" && p[depth] != "" && !slices.Contains(literals, p[depth]) {
				literals = append(literals, p[depth])
			}
		}
	}
	join := func(seg string) string {
		if depth == 0 {
			return seg
		}
		return text + "/" + seg
	}
	if s.tail {
		s.out = append(s.out, join(""))
	}
	if len(alive) == 0 && depth >= s.deep {
		return // nothing that follows makes a difference
	}
	slices.Sort(done)
	for _, seg := range s.segments(literals, depth) {
		var next []int
		for _, i := range rest {
			if p := s.ps[i][depth]; p == "*" || p == seg {
				next = append(next, i)
			}
		}
		s.walk(join(seg), depth+1, next, done)
	}
}

// segments are the literals at this depth and one more that none of them is.
func (s *strander) segments(literals []string, depth int) []string {
	if depth == 0 && s.other != "" {
		return append(literals, s.other)
	}
	return append(literals, fresh("any", literals))
}

// moments are one for each combination of windows and ends that there is from
// now on. Windows repeat each week; between two ends a week shows all of them.
func moments(terms []string, now time.Time) []string {
	now = now.UTC().Truncate(time.Second)
	starts := []time.Time{now}
	var minutes []int // of the week, at which a window opens or closes
	for _, t := range terms {
		cs, err := mesh.ParseCond(t)
		if err != nil {
			continue
		}
		for i := range cs {
			c := &cs[i]
			if c.Word == mesh.CondUntil {
				if c.Until.After(now) {
					starts = append(starts, c.Until)
				}
				continue
			}
			for day := range 7 {
				if c.Days&(1<<day) != 0 {
					minutes = append(minutes, day*24*60+c.From, day*24*60+c.To)
				}
			}
		}
	}
	slices.SortFunc(starts, time.Time.Compare)
	var out []string
	for i, start := range starts {
		out = append(out, start.Format(time.RFC3339Nano))
		sunday := start.UTC().Truncate(24*time.Hour).AddDate(0, 0, -int(start.UTC().Weekday()))
		for _, m := range minutes {
			t := sunday.Add(time.Duration(m) * time.Minute)
			if t.Before(start) {
				t = t.AddDate(0, 0, 7)
			}
			if i+1 == len(starts) || t.Before(starts[i+1]) {
				out = append(out, t.Format(time.RFC3339Nano))
			}
		}
	}
	return out
}
