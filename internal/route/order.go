package route

import (
	"cmp"
	"math"
	"slices"

	"sallyport/internal/mesh"
)

// Order is the endpoints of a host outside in the order in which a call with a key
// tries them: by priority, and within one by weighted rendezvous, as Backend
// chooses. The first of a priority is each one by its weight's part of all keys.
func Order(list []mesh.Outlet, key uint64) []mesh.Outlet {
	type scored struct {
		mesh.Outlet
		score float64
	}
	all := make([]scored, len(list))
	for i, e := range list {
		b := Backend{seed: hash(0, []byte(e.Address)), weight: math.Max(1, float64(e.Weight))}
		all[i] = scored{e, score(key, &b)}
	}
	slices.SortFunc(all, func(a, b scored) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.score, b.score))
	})
	out := make([]mesh.Outlet, len(all))
	for i := range all {
		out[i] = all[i].Outlet
	}
	return out
}
