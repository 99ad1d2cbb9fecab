// Package chart reads the map of who calls whom: what the policy allows and
// nobody uses, what changed between two stretches of time, a drawing of it, and
// its text for other programs.
//
// It is pure: it keeps nothing, asks nobody and reads no clock.
package chart

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// A State says what an edge is beside its counts.
type State string

// Open edges carry calls, Refused ones were tried and never let through, Mixed
// ones both; Unused ones are allowed and were not called.
const (
	Open    State = "open"
	Mixed   State = "mixed"
	Refused State = "refused"
	Unused  State = "unused"
)

// A Link is all that goes from one end to another, whatever the protocol.
type Link struct {
	Src   string `json:"src"`
	Dst   string `json:"dst"`
	State State  `json:"state"`
	// Proto has the protocols, in order, with commas.
	Proto   string    `json:"proto,omitempty"`
	Allowed uint64    `json:"allowed"`
	Denied  uint64    `json:"denied"`
	Errors  uint64    `json:"errors"`
	MTLS    bool      `json:"mtls"`
	First   time.Time `json:"first,omitzero"`
	Last    time.Time `json:"last,omitzero"`
	// Rule is the row that allows an unused link.
	Rule string         `json:"rule,omitempty"`
	Took mesh.Histogram `json:"-"`
}

// A Graph is a chart with its links summed up.
type Graph struct {
	From  time.Time `json:"from"`
	To    time.Time `json:"to"`
	Links []Link    `json:"links"`
}

// Span is how long the graph counts.
func (g *Graph) Span() time.Duration { return g.To.Sub(g.From) }

// New sums a chart up. Unused links come after those that carry something.
func New(c mesh.Chart) *Graph {
	g := &Graph{From: c.From, To: c.To}
	at := map[[2]string]int{}
	for _, e := range c.Edges {
		k := [2]string{e.Src, e.Dst}
		i, known := at[k]
		if !known {
			i = len(g.Links)
			at[k] = i
			g.Links = append(g.Links, Link{Src: e.Src, Dst: e.Dst, MTLS: true, First: e.First, Last: e.Last})
		}
		g.Links[i].add(e)
	}
	for i := range g.Links {
		g.Links[i].settle()
	}
	for _, u := range c.Unused {
		if i, known := at[[2]string{u.Src, u.Dst}]; known {
			g.Links[i].Rule = u.Rule
			continue
		}
		g.Links = append(g.Links, Link{Src: u.Src, Dst: u.Dst, State: Unused, Rule: u.Rule})
	}
	return g
}

func (l *Link) add(e mesh.Edge) {
	if !slices.Contains(strings.Split(l.Proto, ","), e.Proto) {
		l.Proto = strings.TrimPrefix(l.Proto+","+e.Proto, ",")
	}
	sum := mesh.Edge{Allowed: l.Allowed, Denied: l.Denied, Errors: l.Errors, First: l.First, Last: l.Last, Took: l.Took}
	sum.Add(e)
	l.Allowed, l.Denied, l.Errors, l.First, l.Last, l.Took = sum.Allowed, sum.Denied, sum.Errors, sum.First, sum.Last, sum.Took
	l.MTLS = l.MTLS && e.MTLS
}

func (l *Link) settle() {
	switch {
	case l.Denied == 0:
		l.State = Open
	case l.Allowed == 0:
		l.State = Refused
	default:
		l.State = Mixed
	}
}

// Merge puts ends together that have the same name; name says which.
func (g *Graph) Merge(name func(end string) string) *Graph {
	out := &Graph{From: g.From, To: g.To}
	at := map[[2]string]int{}
	for _, l := range g.Links {
		k := [2]string{name(l.Src), name(l.Dst)}
		i, known := at[k]
		if !known {
			at[k] = len(out.Links)
			l.Src, l.Dst, l.Took = k[0], k[1], slices.Clone(l.Took)
			out.Links = append(out.Links, l)
			continue
		}
		o := &out.Links[i]
		if l.State == Unused {
			continue
		}
		if o.State == Unused {
			l.Src, l.Dst, l.Took = k[0], k[1], slices.Clone(l.Took)
			*o = l
			continue
		}
		for _, proto := range strings.Split(l.Proto, ",") {
			o.add(mesh.Edge{Proto: proto, MTLS: l.MTLS, First: l.First, Last: l.Last})
		}
		o.add(mesh.Edge{Proto: l.Proto, Allowed: l.Allowed, Denied: l.Denied, Errors: l.Errors, MTLS: l.MTLS, First: l.First, Last: l.Last, Took: l.Took})
		o.settle()
	}
	return out
}

// Into sums up what came to each end, whoever called; "" stands for all callers.
func (g *Graph) Into() *Graph {
	in := &Graph{From: g.From, To: g.To, Links: slices.Clone(g.Links)}
	for i := range in.Links {
		in.Links[i].Src = ""
	}
	return in.Merge(func(end string) string { return end })
}

// Focus keeps the links from and to one end.
func (g *Graph) Focus(end string) *Graph {
	out := &Graph{From: g.From, To: g.To}
	for _, l := range g.Links {
		if l.Src == end || l.Dst == end {
			out.Links = append(out.Links, l)
		}
	}
	return out
}

// Find returns the one end that text names: whole, or by the last part of its
// identity. It is not ok when none does, or several do.
func (g *Graph) Find(text string) (end string, ok bool) {
	found := map[string]bool{}
	for _, l := range g.Links {
		for _, e := range []string{l.Src, l.Dst} {
			if e == text {
				return e, true
			}
			if Name(e) == text || Group(e)+"/"+Name(e) == text {
				found[e], end = true, e
			}
		}
	}
	return end, len(found) == 1
}

// Busiest orders the links: those with most calls first.
func (g *Graph) Busiest() {
	slices.SortStableFunc(g.Links, func(a, b Link) int {
		return cmp.Or(cmp.Compare(b.Allowed+b.Denied, a.Allowed+a.Denied), cmp.Compare(a.Src, b.Src), cmp.Compare(a.Dst, b.Dst))
	})
}

// Name shortens an end to what people call it: the last part of an identity,
// the host, and "nobody" for who has proved no identity.
func Name(end string) string {
	if end == "" {
		return "nobody"
	}
	if host, ok := strings.CutPrefix(end, "host:"); ok {
		return host
	}
	if strings.HasPrefix(end, "spiffe://") {
		return end[strings.LastIndexByte(end, '/')+1:]
	}
	return end
}

// Group is what an end is grouped under: the namespace of an identity of the
// form /ns/NAME/..., otherwise its first part; "outside" for hosts.
func Group(end string) string {
	if strings.HasPrefix(end, "host:") {
		return "outside"
	}
	id, err := spiffeid.FromString(end)
	if err != nil {
		return Name(end)
	}
	parts := strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
	if len(parts) > 2 && parts[0] == "ns" {
		return parts[1]
	}
	return parts[0]
}
