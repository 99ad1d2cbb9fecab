package mesh

import (
	"cmp"
	"slices"
	"time"
)

// An Edge counts the calls from one identity to another.
type Edge struct {
	Src     string `json:"src"`
	Dst     string `json:"dst"`
	Proto   string `json:"proto"`
	Allowed uint64 `json:"allowed"`
	Denied  uint64 `json:"denied"`
	// Errors are those of Allowed that came to nothing.
	Errors uint64    `json:"errors"`
	MTLS   bool      `json:"mtls"`
	First  time.Time `json:"first"`
	Last   time.Time `json:"last"`
	// Took is how long the allowed calls took, for tunnels none.
	Took Histogram `json:"took,omitempty"`
}

// A Pair is who calls whom and how.
type Pair struct {
	Src, Dst, Proto string
	MTLS            bool
}

// Pair is what the edge counts.
func (e *Edge) Pair() Pair { return Pair{e.Src, e.Dst, e.Proto, e.MTLS} }

// Add adds the counts of another edge of the same pair. It keeps nothing of o.
func (e *Edge) Add(o Edge) {
	e.Allowed += o.Allowed
	e.Denied += o.Denied
	e.Errors += o.Errors
	for i, n := range o.Took {
		e.Took.Count(i, n)
	}
	if o.First.Before(e.First) {
		e.First = o.First
	}
	if o.Last.After(e.Last) {
		e.Last = o.Last
	}
}

// CompareEdges orders edges by source and destination.
func CompareEdges(a, b Edge) int {
	mtls := func(e Edge) int {
		if e.MTLS {
			return 1
		}
		return 0
	}
	return cmp.Or(cmp.Compare(a.Src, b.Src), cmp.Compare(a.Dst, b.Dst), cmp.Compare(a.Proto, b.Proto), cmp.Compare(mtls(a), mtls(b)))
}

// A Window has the edges of a stretch of time.
type Window struct {
	From  time.Time `json:"from"`
	To    time.Time `json:"to"`
	Edges []Edge    `json:"edges"`
}

// maxSum bounds the edges of an EdgeSum. Each window has its own bound, but every
// window may have others.
const maxSum = 100_000

// An EdgeSum adds the edges of windows up. The zero value is empty.
type EdgeSum struct {
	at   map[Pair]int
	list []Edge
}

// Add adds the edges of a window, and keeps nothing of it. What is beyond the
// bound is counted as one edge between "other" and "other".
func (s *EdgeSum) Add(w Window) {
	if s.at == nil {
		s.at = map[Pair]int{}
	}
	for _, e := range w.Edges {
		i, known := s.at[e.Pair()]
		if !known && len(s.list) >= maxSum {
			e.Src, e.Dst, e.Proto, e.MTLS = "other", "other", "other", false
			i, known = s.at[e.Pair()]
		}
		if !known {
			s.at[e.Pair()] = len(s.list)
			e.Took = slices.Clone(e.Took)
			s.list = append(s.list, e)
			continue
		}
		s.list[i].Add(e)
	}
}

// Edges are the sums, in order. Nothing is added after.
func (s *EdgeSum) Edges() []Edge {
	slices.SortFunc(s.list, CompareEdges)
	return s.list
}

// SumEdges adds the edges of windows up, in order.
func SumEdges(windows []Window) []Edge {
	var s EdgeSum
	for _, w := range windows {
		s.Add(w)
	}
	return s.Edges()
}

// A Chart is who called whom in a stretch of time, beside what the policy
// allows.
type Chart struct {
	From  time.Time `json:"from"`
	To    time.Time `json:"to"`
	Edges []Edge    `json:"edges"`
	// Unused are allowed and were not called.
	Unused []Unused `json:"unused"`
}

// An Unused is a pair of identities that a row allows to call and that did not.
type Unused struct {
	Src string `json:"src"`
	Dst string `json:"dst"`
	// Rule is the row, or the first of them.
	Rule string `json:"rule"`
}

// Total is how many calls the histogram has.
func (h Histogram) Total() (n uint64) {
	for _, c := range h {
		n += uint64(c)
	}
	return n
}

// Quantile is a time that the share q of the calls did not exceed: the end of
// its bucket, 0 without calls.
func (h Histogram) Quantile(q float64) time.Duration {
	rank := q * float64(h.Total())
	sum := uint64(0)
	for i, c := range h {
		if sum += uint64(c); c > 0 && float64(sum) >= rank {
			return BucketStart(i + 1)
		}
	}
	return 0
}
