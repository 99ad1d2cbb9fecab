package chart

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// A Kind of change says what became of a link.
type Kind string

// New links were not there before and Gone ones are not any more; Opened ones
// were refused before, Closed ones are now; Failing and Mended ones changed the
// share of calls that fail, Busier and Quieter ones how many there are.
const (
	Added   Kind = "new"
	Gone    Kind = "gone"
	Opened  Kind = "opened"
	Closed  Kind = "closed"
	Failing Kind = "failing"
	Mended  Kind = "mended"
	Busier  Kind = "busier"
	Quieter Kind = "quieter"
)

// What makes a change worth telling: a rate that is more than doubled or less
// than halved, a share of errors that has moved by more than this.
const (
	worthRatio  = 2.0
	worthErrors = 0.01
)

// A Change is a link that differs between two graphs. Rates are calls a second.
type Change struct {
	Kind   Kind    `json:"kind"`
	Src    string  `json:"src"`
	Dst    string  `json:"dst"`
	Before float64 `json:"before"`
	After  float64 `json:"after"`
	// The shares of calls that failed, and that were refused.
	ErrorsBefore float64 `json:"errors_before"`
	ErrorsAfter  float64 `json:"errors_after"`
	DeniedBefore float64 `json:"denied_before"`
	DeniedAfter  float64 `json:"denied_after"`
}

// Diff says what changed from one graph to another. Each is counted by its own
// length, so that they need not be equally long.
func Diff(before, after *Graph) []Change {
	was := map[[2]string]*Link{}
	for i := range before.Links {
		if l := &before.Links[i]; l.State != Unused {
			was[[2]string{l.Src, l.Dst}] = l
		}
	}
	var out []Change
	for i := range after.Links {
		l := &after.Links[i]
		if l.State == Unused {
			continue
		}
		k := [2]string{l.Src, l.Dst}
		out = appendChange(out, l.Src, l.Dst, was[k], l, before.Span(), after.Span())
		delete(was, k)
	}
	for _, l := range was {
		out = appendChange(out, l.Src, l.Dst, l, nil, before.Span(), after.Span())
	}
	slices.SortFunc(out, func(a, b Change) int {
		return cmp.Or(cmp.Compare(a.Src, b.Src), cmp.Compare(a.Dst, b.Dst))
	})
	return out
}

func appendChange(out []Change, src, dst string, was, is *Link, before, after time.Duration) []Change {
	c := Change{Src: src, Dst: dst}
	c.Before, c.ErrorsBefore, c.DeniedBefore = was.rates(before)
	c.After, c.ErrorsAfter, c.DeniedAfter = is.rates(after)
	switch {
	case was == nil:
		c.Kind = Added
	case is == nil:
		c.Kind = Gone
	case was.Allowed == 0 && is.Allowed > 0:
		c.Kind = Opened
	case was.Allowed > 0 && is.Allowed == 0:
		c.Kind = Closed
	case c.ErrorsAfter-c.ErrorsBefore > worthErrors:
		c.Kind = Failing
	case c.ErrorsBefore-c.ErrorsAfter > worthErrors:
		c.Kind = Mended
	case c.After > worthRatio*c.Before:
		c.Kind = Busier
	case c.Before > worthRatio*c.After:
		c.Kind = Quieter
	default:
		return out
	}
	return append(out, c)
}

// rates are the calls a second, and the shares that failed and were refused.
func (l *Link) rates(span time.Duration) (calls, errors, denied float64) {
	if l == nil {
		return 0, 0, 0
	}
	return l.Rate(span), l.Failed(), share(l.Denied, l.Allowed+l.Denied)
}

// Rate is calls a second, refused ones too.
func (l *Link) Rate(span time.Duration) float64 {
	if span <= 0 {
		return 0
	}
	return float64(l.Allowed+l.Denied) / span.Seconds()
}

// Failed is the share of the allowed calls that came to nothing.
func (l *Link) Failed() float64 { return share(l.Errors, l.Allowed) }

func share(part, whole uint64) float64 {
	if whole == 0 {
		return 0
	}
	return math.Min(float64(part)/float64(whole), 1)
}
