package chart

import (
	"slices"
	"strings"

	"sallyport/internal/mesh"
)

const (
	// maxPairs bounds the pairs that rows are expanded to, and maxMatches how many
	// names are compared for it: a row of patterns can allow millions.
	maxPairs   = 20_000
	maxMatches = 4_000_000
	// maxUnused bounds the pairs that are told as unused.
	maxUnused = 5000
)

// Pairs are the identities that the policy allows to call each other, each with
// the first row that says so. Who there is say the entries; who can be called,
// the services and destinations. What nobody can name is left out, such as hosts
// of which a pattern alone is known.
func Pairs(p *mesh.Policies) (out []mesh.Unused) {
	if p == nil {
		return nil
	}
	x := newEnds(p)
	seen := map[[2]string]bool{}
	for _, r := range p.Rules {
		if r.Effect != mesh.Allow {
			continue
		}
		callers := x.callers(r.Src)
		called := x.called(r.Dir, r.Dst)
		for _, src := range callers {
			for _, dst := range called {
				k := [2]string{src, dst}
				if seen[k] || src == dst {
					continue
				}
				seen[k] = true
				if out = append(out, mesh.Unused{Src: src, Dst: dst, Rule: r.ID}); len(out) == maxPairs {
					return out
				}
			}
		}
	}
	return out
}

// NotCalled are the pairs that no edge has let a call through for.
func NotCalled(pairs []mesh.Unused, edges []mesh.Edge) (out []mesh.Unused) {
	seen := map[[2]string]bool{}
	for _, e := range edges {
		if e.Allowed > 0 {
			seen[[2]string{e.Src, e.Dst}] = true
		}
	}
	for _, u := range pairs {
		if !seen[[2]string{u.Src, u.Dst}] && len(out) < maxUnused {
			out = append(out, u)
		}
	}
	return out
}

// ends are who there is by the policy.
type ends struct {
	ids, services, hosts []string
	members              map[string][]string
	left                 int // comparisons
}

func newEnds(p *mesh.Policies) *ends {
	x := &ends{members: map[string][]string{}, left: maxMatches}
	for _, e := range p.Entries {
		x.ids = append(x.ids, e.SPIFFEID.String())
	}
	for _, s := range p.Services {
		x.services = append(x.services, s.ID.String())
	}
	for _, d := range p.Destinations {
		if !strings.HasPrefix(d.Host, "*") {
			x.hosts = append(x.hosts, "host:"+d.Host)
		}
	}
	for _, list := range []*[]string{&x.ids, &x.services, &x.hosts} {
		slices.Sort(*list)
		*list = slices.Compact(*list)
	}
	for _, m := range p.Memberships {
		x.members[m.Group] = append(x.members[m.Group], m.Member)
	}
	return x
}

// patterns resolves a reference to a group; groups have no cycles.
func (x *ends) patterns(ref string) []string {
	members, group := x.members[ref]
	if !group {
		return []string{ref}
	}
	var out []string
	for _, m := range members {
		out = append(out, x.patterns(m)...)
	}
	return out
}

func (x *ends) callers(ref string) []string {
	return x.matching(ref, x.ids, mesh.MatchSrc)
}

func (x *ends) called(dir mesh.Direction, ref string) []string {
	all := x.services
	if dir == mesh.Out {
		all = x.hosts
	}
	return x.matching(ref, all, func(pattern, end string) bool { return mesh.MatchDst(dir, pattern, end) })
}

func (x *ends) matching(ref string, all []string, match func(pattern, end string) bool) (out []string) {
	for _, p := range x.patterns(ref) {
		if i, literal := slices.BinarySearch(all, p); literal {
			out = append(out, all[i])
			continue
		}
		if x.left -= len(all); x.left < 0 || !strings.Contains(p, "*") {
			continue // enough, or a literal that is nobody here
		}
		for _, end := range all {
			if match(p, end) {
				out = append(out, end)
			}
		}
	}
	return out
}
