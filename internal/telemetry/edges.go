package telemetry

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxEdges bounds the edges of one report; what is beyond counts under Other.
const maxEdges = 4096

// maxHostsOfSource bounds the hosts of one source in a report: what is beyond
// counts under OtherHost. A caller may have the right to any name of a domain,
// and must not take the room of all others.
const maxHostsOfSource = 256

// An Outcome is how a call ended for the map of who calls whom.
type Outcome uint8

// A call was let through, refused by policy, or let through and then failed.
const (
	Allowed Outcome = iota
	Denied
	Errored
)

// An Edge counts the calls from one identity to another, as mesh.Edge does.
type Edge struct {
	Src, Dst, Proto         string
	Allowed, Denied, Errors uint64
	MTLS                    bool
	First, Last             time.Time
	// Took counts the allowed calls by how long they took; the caller of Add
	// says what the places mean.
	Took []uint32
}

type edgeKey struct{ src, dst, proto string }

// Edges adds up calls between two reports. The zero value is not ready; use
// NewEdges. A nil Edges counts nothing.
type Edges struct {
	mu    sync.Mutex // guards the fields below
	sums  map[edgeKey]*Edge
	hosts map[string]int // edges to hosts, by their source
}

// NewEdges returns an empty accumulator.
func NewEdges() *Edges {
	return &Edges{sums: make(map[edgeKey]*Edge), hosts: make(map[string]int)}
}

// NoTime is the place of a call whose time says nothing, such as a refusal.
const NoTime = -1

// Add counts one call, which took a time of the place given. An error counts as
// allowed too: it was let through. MTLS of an edge holds only when every call
// had it.
func (e *Edges) Add(src, dst, proto string, o Outcome, mtls bool, now time.Time, took int) {
	if e == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	x := e.edge(edgeKey{src, dst, proto}, mtls, now)
	switch o {
	case Denied:
		x.Denied++
	case Errored:
		x.Allowed++
		x.Errors++
	default:
		x.Allowed++
	}
	x.count(took, 1)
	x.MTLS = x.MTLS && mtls
	if now.After(x.Last) {
		x.Last = now
	}
	if now.Before(x.First) {
		x.First = now
	}
}

// count adds n calls at a place of Took.
func (x *Edge) count(place int, n uint32) {
	if place < 0 {
		return
	}
	for len(x.Took) <= place {
		x.Took = append(x.Took, 0)
	}
	x.Took[place] += n
}

// edge finds or makes the sum for k. The caller holds e.mu.
func (e *Edges) edge(k edgeKey, mtls bool, now time.Time) *Edge {
	x := e.sums[k]
	out := strings.HasPrefix(k.dst, "host:")
	if x == nil && out && e.hosts[k.src] >= maxHostsOfSource {
		k.dst = OtherHost
		x = e.sums[k]
	}
	if x == nil && len(e.sums) >= maxEdges {
		k.src, k.dst = Other, Other
		x = e.sums[k]
	}
	if x == nil {
		x = &Edge{Src: k.src, Dst: k.dst, Proto: k.proto, MTLS: mtls, First: now, Last: now}
		e.sums[k] = x
		if out {
			e.hosts[k.src]++
		}
	}
	return x
}

// Flush returns what was counted since the last Flush, in a fixed order.
func (e *Edges) Flush() []Edge {
	if e == nil {
		return nil
	}
	e.mu.Lock()
	sums := e.sums
	e.sums, e.hosts = make(map[edgeKey]*Edge), make(map[string]int)
	e.mu.Unlock()
	edges := make([]Edge, 0, len(sums))
	for _, x := range sums {
		edges = append(edges, *x)
	}
	slices.SortFunc(edges, func(a, b Edge) int {
		return cmp.Or(cmp.Compare(a.Src, b.Src), cmp.Compare(a.Dst, b.Dst), cmp.Compare(a.Proto, b.Proto))
	})
	return edges
}

// Restore puts edges back that a report could not deliver.
func (e *Edges) Restore(edges []Edge) {
	if e == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, x := range edges {
		sum := e.edge(edgeKey{x.Src, x.Dst, x.Proto}, x.MTLS, x.First)
		sum.Allowed += x.Allowed
		sum.Denied += x.Denied
		sum.Errors += x.Errors
		for i, n := range x.Took {
			sum.count(i, n)
		}
		sum.MTLS = sum.MTLS && x.MTLS
		if x.First.Before(sum.First) {
			sum.First = x.First
		}
		if x.Last.After(sum.Last) {
			sum.Last = x.Last
		}
	}
}
