package authz

import (
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// Resolves says whether a workload has a use for the name of a host: whether a
// row lets it call the host by some verb at some port, if the row's conditions
// hold, and no row denies all that. It is for a nameserver; the call itself is
// judged when it is made.
func (s *Set) Resolves(src spiffeid.ID, host string) Decision {
	d := s.resolves(src, "host:"+host)
	if d.Allow || s == nil || s.lenient == nil {
		return d
	}
	return s.softened(mesh.Out, "host:"+host, d, func(rows *Set) Decision { return rows.resolves(src, "host:"+host) })
}

func (s *Set) resolves(src spiffeid.ID, dst string) Decision {
	if s.Len() == 0 {
		return Decision{Reason: NoPolicy}
	}
	var rules []rule
	for _, a := range s.out.src.of(src.String(), nil) {
		for _, b := range s.out.dst.of(dst, nil) {
			rules = append(rules, s.out.rules[pair(a, b)]...)
		}
	}
	slices.SortFunc(rules, func(a, b rule) int { return int(a.row - b.row) })
	d := Decision{Reason: NoRow}
	for i := range rules {
		r := &rules[i]
		if r.deny {
			if d.Reason == NoRow && r.everything() {
				d = Decision{Rule: r.id, Reason: ByRule}
			}
			continue
		}
		by := slices.IndexFunc(rules, func(no rule) bool { return no.deny && no.covers(r) })
		if by < 0 {
			return Decision{Allow: true, Rule: r.id, Reason: ByRule}
		}
		d = Decision{Rule: rules[by].id, Reason: ByRule}
	}
	return d
}

// everything says that a rule speaks of every call between its two ends.
func (r *rule) everything() bool {
	return r.port == 0 && r.verbs == anyVerb && r.kind == anyPath && len(r.conds) == 0
}

// covers says that a rule speaks of every call that a speaks of.
func (r *rule) covers(a *rule) bool {
	verbs := r.verbs == anyVerb || a.verbs != anyVerb && len(a.more) == 0 && a.verbs&^r.verbs == 0
	paths := r.kind == anyPath || r.kind == a.kind && r.path == a.path
	return len(r.conds) == 0 && (r.port == 0 || r.port == a.port) && verbs && paths
}

// Hosts are the hosts outside that rows name in full, in order.
func (s *Set) Hosts() []string {
	if s.Len() == 0 {
		return nil
	}
	var out []string
	for name := range maps.Keys(s.out.dst.known) {
		if host, ok := strings.CutPrefix(name, "host:"); ok {
			out = append(out, host)
		}
	}
	slices.Sort(out)
	return out
}
