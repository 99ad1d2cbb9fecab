package mesh

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// canonical sorts every list and makes empty ones equal, so that equal contents
// have equal bytes.
func (s *Snapshot) canonical() {
	s.Services = sorted(s.Services, compareServices)
	s.Endpoints = slices.Compact(sorted(s.Endpoints, compareEndpoints))
	s.Rules = sorted(s.Rules, compareRules)
	s.Memberships = sorted(s.Memberships, compareMemberships)
	s.Destinations = sorted(s.Destinations, compareDestinations)
	slices.SortStableFunc(s.Routes, compareRoutes)
	slices.SortFunc(s.Shares, compareShares)
	s.Tokens, s.Shown = s.Tokens.canonical(), s.Shown.canonical()
	slices.SortFunc(s.Modes, compareModes)
}

// sorted returns a copy in order, never nil.
func sorted[T any](list []T, less func(a, b *T) int) []T {
	if len(list) == 0 {
		return []T{}
	}
	// By pointer: the nouns are large, and thousands of them are moved often.
	order := make([]*T, len(list))
	for i := range list {
		order[i] = &list[i]
	}
	slices.SortStableFunc(order, less)
	out := make([]T, len(list))
	for i, x := range order {
		out[i] = *x
	}
	return out
}

func compareServices(a, b *Service) int { return cmp.Compare(a.Name, b.Name) }

func compareRules(a, b *Rule) int { return cmp.Compare(a.ID, b.ID) }

func compareEntries(a, b *Entry) int { return cmp.Compare(a.ID, b.ID) }

func compareCases(a, b *Case) int { return cmp.Compare(a.Name, b.Name) }

func compareAdmin(a, b *AdminRule) int { return cmp.Compare(a.ID, b.ID) }

func compareDestinations(a, b *Destination) int { return cmp.Compare(a.Host, b.Host) }

func compareEndpoints(a, b *Endpoint) int {
	return cmp.Or(cmp.Compare(a.Service, b.Service), a.Address.Compare(b.Address), cmp.Compare(a.Agent.String(), b.Agent.String()), cmp.Compare(a.Labels, b.Labels))
}

func compareMemberships(a, b *Membership) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Group, b.Group), cmp.Compare(a.Member, b.Member))
}

func (p *Policies) plainRules(list []Rule) []Rule {
	return sorted(without(list, func(r *Rule) { r.Origin = p.sameFile(r.Origin) }), compareRules)
}

func plainMemberships(list []Membership) []Membership {
	return sorted(without(list, func(m *Membership) { m.Origin = Origin{} }), compareMemberships)
}

// without returns a copy of the list with edit applied to each element.
func without[T any](list []T, edit func(*T)) []T {
	out := slices.Clone(list)
	for i := range out {
		edit(&out[i])
	}
	return out
}

func hashJSON(v any) string {
	sum := sha256.Sum256(mustJSON(v))
	return hex.EncodeToString(sum[:])
}

// mustJSON encodes nouns, which hold nothing that JSON cannot say: a time
// outside of the years 0 to 9999 is refused where times are parsed.
func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("mesh: encode %T: %v", v, err))
	}
	return b
}

// Service returns the service of that name.
func (s *Snapshot) Service(name ServiceName) (Service, bool) {
	for _, v := range s.Services {
		if v.Name == name {
			return v, true
		}
	}
	return Service{}, false
}

// ServiceByID returns the service whose endpoints prove that identity.
func (s *Snapshot) ServiceByID(id spiffeid.ID) (Service, bool) {
	for _, v := range s.Services {
		if v.ID == id && !id.IsZero() {
			return v, true
		}
	}
	return Service{}, false
}

// EndpointsOf returns where a service is reached, in a stable order.
func (s *Snapshot) EndpointsOf(name ServiceName) []Endpoint {
	var out []Endpoint
	for _, e := range s.Endpoints {
		if e.Service == name {
			out = append(out, e)
		}
	}
	return out
}

// DestinationOf returns how a host is reached: the destination of that very
// name, or else the pattern it matches.
func (s *Snapshot) DestinationOf(host string) (Destination, bool) {
	var found Destination
	ok := false
	for _, d := range s.Destinations {
		if d.Host == host {
			return d, true
		}
		if MatchHost(d.Host, host) {
			found, ok = d, true
		}
	}
	return found, ok
}

// Validate reports rows and memberships that mean nothing, as Errors. A proxy
// asks before it acts on a snapshot from the wire or from disk.
func (s *Snapshot) Validate() error {
	v := validator{partial: true, p: &Policies{TrustDomain: s.TrustDomain, Services: s.Services, Rules: s.Rules, Memberships: s.Memberships, Destinations: s.Destinations, Routes: s.Routes, Tokens: s.Tokens, Modes: s.Modes}}
	v.shares(s.Shares)
	if s.Shown != nil {
		v.shown(s.Shown)
	}
	return v.run().orNil()
}
