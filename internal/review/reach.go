package review

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

// A Reach is a set of calls that are allowed.
type Reach struct {
	Cell
	// Known are the identities, services and hosts of the policy files that the
	// open end of the cell covers: its callers, or its destinations.
	Known []string `json:"known,omitempty"`
}

// WhoCan returns exactly the calls to a destination that are allowed from now
// on, by all callers that could be. The destination is as in a row, without a
// pattern.
func WhoCan(p *mesh.Policies, dir mesh.Direction, dst string, now time.Time) ([]Reach, error) {
	fixed := map[dimension]string{byDir: string(dir), byDst: dst}
	var ids []string
	for i := range p.Entries {
		ids = append(ids, p.Entries[i].SPIFFEID.String())
	}
	return reach(p, fixed, bySrc, ids, now)
}

// CanReach returns exactly the calls by an identity that are allowed from now
// on.
func CanReach(p *mesh.Policies, id spiffeid.ID, now time.Time) ([]Reach, error) {
	var ends []string
	for i := range p.Services {
		ends = append(ends, p.Services[i].ID.String())
	}
	for i := range p.Destinations {
		ends = append(ends, "host:"+p.Destinations[i].Host)
	}
	return reach(p, map[dimension]string{bySrc: id.String()}, byDst, ends, now)
}

// reach compares p with the policy that allows nothing, for calls with the
// fixed values.
func reach(p *mesh.Policies, fixed map[dimension]string, open dimension, known []string, now time.Time) ([]Reach, error) {
	judge, err := judgeOf(p)
	if err != nil {
		return nil, err
	}
	bs, done := boxes(p), map[dimension]bool{}
	for d, v := range fixed {
		bs, done[d] = keep(bs, d, v), true
	}
	s := &splitter{now: now, left: widest}
	blocks, err := s.changed(nil, bs, done)
	if err != nil {
		return nil, err
	}
	slices.Sort(known)
	known = slices.Compact(known)
	var out []Reach
	for _, b := range blocks {
		for _, d := range fixedDimensions {
			if v, ok := fixed[d]; ok {
				b.sides = append(b.sides, exactly(d, v))
			}
		}
		slices.SortStableFunc(b.sides, func(a, b side) int { return cmp.Compare(order(a.dim), order(b.dim)) })
		c, ok := cellOf(b, now)
		if !ok {
			continue // no client can make such a call
		}
		d := judge.Decide(&c.Witness.call)
		if !d.Allow {
			return nil, fmt.Errorf("the judge does not agree that %s is allowed, which is a defect of Sallyport: please report it", c.Witness)
		}
		c.Was, c.Is = string(authz.NoRow), deciding(d)
		r := Reach{Cell: c}
		for i := range b.sides {
			for _, v := range known {
				if sd := &b.sides[i]; sd.dim == open && sd.covers(v) {
					r.Known = append(r.Known, v)
				}
			}
		}
		out = append(out, r)
	}
	slices.SortStableFunc(out, func(a, b Reach) int {
		return cmp.Or(cmp.Compare(a.Dir, b.Dir), cmp.Compare(a.Src, b.Src), cmp.Compare(a.Dst, b.Dst), cmp.Compare(a.Path, b.Path), cmp.Compare(a.Verb, b.Verb))
	})
	return out, nil
}

// exactly is the side of one value.
func exactly(d dimension, v string) side {
	return side{dim: d, terms: []string{v}, values: []string{v}, others: []string{""}, accept: map[string]bool{"1": true}}
}

// order is the place of a dimension among all, fixed ones first.
func order(d dimension) int {
	if i := slices.Index(fixedDimensions, d); i >= 0 {
		return i
	}
	return len(fixedDimensions) + rank(d)
}
