package mesh

import (
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Project returns what the sidecar beside the workload who needs and nothing
// more: rules about calls to it, rules about calls and egress it may make, the
// services it may call with their endpoints and routes, its own service, the members of
// the groups in these rules, the issuers of tokens that callers may show it, and of
// those by whose claims its own calls take their route.
func (s *Snapshot) Project(who spiffeid.ID) *Snapshot {
	out := s.head()
	id := who.String()
	x := newGroups(s.Memberships)
	mine := x.of(id)
	var calls, served []Rule
	for _, r := range s.Rules {
		asCaller := !who.IsZero() && (MatchSrc(r.Src, id) || mine[r.Src])
		asTarget := !who.IsZero() && r.Dir == In && (MatchDst(In, r.Dst, id) || mine[r.Dst])
		if asCaller || asTarget {
			out.Rules = append(out.Rules, r)
		}
		if asTarget {
			served = append(served, r)
		}
		if asCaller && r.Dir == In && r.Effect == Allow {
			calls = append(calls, r)
		}
	}
	asked := map[ServiceName][]Rule{}
	for _, svc := range s.Services {
		called := x.reached(calls, svc)
		if called || svc.ID == who {
			out.Services = append(out.Services, svc)
			out.Routes = append(out.Routes, s.routesOf(svc.Name)...)
			out.Shares = append(out.Shares, s.sharesOf(svc.Name)...)
		}
		if called {
			out.Endpoints = append(out.Endpoints, s.EndpointsOf(svc.Name)...)
		}
		if called && s.RoutesOf(svc.Name).asksClaims() {
			asked[svc.Name] = x.about(s.Rules, svc)
		}
	}
	out.Destinations = s.namesOf(out.Rules, x)
	out.Memberships = x.below(out.Rules, out.Routes)
	own, _ := s.ServiceByID(who)
	out.Tokens, out.Shown = s.Tokens.project(own.Name, served), s.Tokens.shown(asked)
	out.canonical()
	if s.Candidate != nil {
		out.Candidate = s.Candidate.Project(who)
	}
	return out
}

// reached says whether one of the rules is about calls to a service.
func (g *groups) reached(rules []Rule, svc Service) bool {
	target := svc.ID.String()
	in := g.of(target)
	return slices.ContainsFunc(rules, func(r Rule) bool { return MatchDst(In, r.Dst, target) || in[r.Dst] })
}

// about returns the rules about calls to a service.
func (g *groups) about(rules []Rule, svc Service) (out []Rule) {
	target := svc.ID.String()
	in := g.of(target)
	for _, r := range rules {
		if r.Dir == In && (MatchDst(In, r.Dst, target) || in[r.Dst]) {
			out = append(out, r)
		}
	}
	return out
}

// Callees are the services that a workload may call at all.
func (p *Policies) Callees(who spiffeid.ID) (out []ServiceName) {
	if p == nil || who.IsZero() {
		return nil
	}
	id, x := who.String(), newGroups(p.Memberships)
	mine := x.of(id)
	var calls []Rule
	for _, r := range p.Rules {
		if r.Dir == In && r.Effect == Allow && (MatchSrc(r.Src, id) || mine[r.Src]) {
			calls = append(calls, r)
		}
	}
	for _, svc := range p.Services {
		if x.reached(calls, svc) {
			out = append(out, svc.Name)
		}
	}
	return out
}

// namesOf returns what a nameserver must know of destinations.
func (s *Snapshot) namesOf(rules []Rule, x *groups) []Destination {
	out := s.realOf(rules, x)
	for _, d := range s.modesOf() {
		if i := slices.IndexFunc(out, func(o Destination) bool { return o.Host == d.Host }); i >= 0 {
			out[i].Mode = d.Mode
		} else {
			out = append(out, d)
		}
	}
	return out
}

// realOf returns the destinations that workloads are told the addresses of, as
// far as rules allow them, and of each only what a nameserver must know.
func (s *Snapshot) realOf(rules []Rule, x *groups) (out []Destination) {
	for _, d := range s.Destinations {
		meant := func(ref string) bool {
			host, ok := strings.CutPrefix(ref, "host:")
			return ok && (host == d.Host || MatchHost(d.Host, host) || MatchHost(host, d.Host))
		}
		if d.DNS == RealAddresses && slices.ContainsFunc(rules, func(r Rule) bool {
			return r.Dir == Out && r.Effect == Allow && (meant(r.Dst) || slices.ContainsFunc(x.members(r.Dst), meant))
		}) {
			out = append(out, Destination{Host: d.Host, Proto: d.Proto, SNI: d.SNI, DNS: d.DNS})
		}
	}
	return out
}

// ProjectGateway returns what a gateway needs: all rules of the direction Out
// with the members of their groups, all destinations and their routes, and the
// names of the services, whose endpoints it must never dial.
func (s *Snapshot) ProjectGateway() *Snapshot {
	out := s.head()
	for _, r := range s.Rules {
		if r.Dir == Out {
			out.Rules = append(out.Rules, r)
		}
	}
	out.Services = slices.Clone(s.Services)
	out.Destinations = slices.Clone(s.Destinations)
	for _, r := range s.Routes {
		if r.Host != "" {
			out.Routes = append(out.Routes, r)
		}
	}
	out.Memberships = newGroups(s.Memberships).below(out.Rules, out.Routes)
	out.canonical()
	if s.Candidate != nil {
		out.Candidate = s.Candidate.ProjectGateway()
	}
	return out
}

func (s *Snapshot) head() *Snapshot {
	return &Snapshot{
		Revision: s.Revision, PolicyRevision: s.PolicyRevision,
		PolicyHash: s.PolicyHash, PolicySet: s.PolicySet, TrustDomain: s.TrustDomain, Modes: slices.Clone(s.Modes),
	}
}

// groups answers who is in what.
type groups struct {
	up   map[string][]string
	down map[string][]Membership
}

func newGroups(ms []Membership) *groups {
	g := &groups{up: map[string][]string{}, down: map[string][]Membership{}}
	for _, m := range ms {
		g.up[m.Member] = append(g.up[m.Member], m.Group)
		g.down[m.Group] = append(g.down[m.Group], m)
	}
	return g
}

// of returns every group that holds ref, directly or through other groups.
func (g *groups) of(ref string) map[string]bool {
	out := map[string]bool{}
	for todo := slices.Clone(g.up[ref]); len(todo) > 0; {
		last := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if !out[last] {
			out[last] = true
			todo = append(todo, g.up[last]...)
		}
	}
	return out
}

// members returns who is in a group, directly or through other groups.
func (g *groups) members(group string) (out []string) {
	seen := map[string]bool{}
	for todo := []string{group}; len(todo) > 0; {
		last := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[last] {
			continue
		}
		seen[last] = true
		for _, m := range g.down[last] {
			out, todo = append(out, m.Member), append(todo, m.Member)
		}
	}
	return out
}

// below returns the memberships that give the groups in rules and routes their
// meaning.
func (g *groups) below(rules []Rule, routes []Routes) []Membership {
	var out []Membership
	var todo []string
	for _, r := range rules {
		todo = append(todo, r.Src, r.Dst)
	}
	for i := range routes {
		todo = append(todo, routes[i].callers()...)
	}
	seen := map[string]bool{}
	for len(todo) > 0 {
		ref := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[ref] || !IsGroup(ref) {
			continue
		}
		seen[ref] = true
		for _, m := range g.down[ref] {
			out = append(out, m)
			todo = append(todo, m.Member)
		}
	}
	return out
}
