package upstream

import (
	"cmp"
	"slices"
	"sort"
)

// points is how many places an endpoint has on the ring: with 128 the shares of
// two differ by some 10 %.
const points = 128

// A ring has the endpoints at places that depend on nothing but their addresses,
// so that all proxies have the same one, and the going of an endpoint moves only
// its own keys.
type ring []point

type point struct {
	at uint64
	of int32 // index of the endpoint
}

func newRing(names []string) ring {
	r := make(ring, 0, len(names)*points)
	for i, name := range names {
		h := Hash(name)
		for range points {
			h = mix(h)
			r = append(r, point{h, int32(i)})
		}
	}
	slices.SortFunc(r, func(a, b point) int { return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.of, b.of)) })
	return r
}

// pick is the first endpoint behind the key that takes the call.
func (r ring) pick(key uint64, takes func(int32) bool) int32 {
	n := len(r)
	start := sort.Search(n, func(i int) bool { return r[i].at >= key })
	for i := range n {
		if p := r[(start+i)%n]; takes(p.of) {
			return p.of
		}
	}
	return r[start%n].of
}

// Hash is FNV-1a, mixed: the same in every process, unlike maphash.
func Hash[T string | []byte](s T) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return mix(h)
}

// mix is the finalizer of splitmix64.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
