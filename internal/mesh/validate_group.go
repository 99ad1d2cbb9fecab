package mesh

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxGroupDepth bounds groups in groups. Casbin silently cuts a chain of more
// than ten.
const maxGroupDepth = 8

// Columns of a group row.
const (
	colMember = 2
	colGroup  = 3
)

func (v *validator) memberships() {
	type key struct{ kind, member, group string }
	seen := map[key]Origin{}
	for _, m := range v.p.Memberships {
		if err := checkMembershipGroup(m); err != nil {
			v.cell(m.Origin, colGroup, "%s", err)
		} else if err := checkMember(m); err != nil {
			v.cell(m.Origin, colMember, "%s", err)
		}
		k := key{string(m.Kind), m.Member, m.Group}
		if first, ok := seen[k]; ok {
			v.cell(m.Origin, colMember, "%q is a member of %q twice, first at %s", m.Member, m.Group, first)
			continue
		}
		seen[k] = m.Origin
	}
}

func checkMembershipGroup(m Membership) error {
	switch {
	case m.Kind == CallerGroup && strings.HasPrefix(m.Group, callerPrefix):
	case m.Kind == DestinationGroup && (strings.HasPrefix(m.Group, servicePrefix) || strings.HasPrefix(m.Group, hostPrefix)):
	case m.Kind == CallerGroup:
		return fmt.Errorf("group %q of a row g does not start with group:", clip(m.Group))
	case m.Kind == DestinationGroup:
		return fmt.Errorf("group %q of a row g2 does not start with svcs: or hosts:", clip(m.Group))
	default:
		return fmt.Errorf("unknown kind of row %q", clip(string(m.Kind)))
	}
	return checkGroup(m.Group)
}

// checkMember accepts what is exact: patterns belong into rules, where a reader
// sees how far they reach.
func checkMember(m Membership) error {
	kind, _, _ := strings.Cut(m.Group, ":")
	if IsGroup(m.Member) {
		if own, _, _ := strings.Cut(m.Member, ":"); own != kind {
			return fmt.Errorf("member %q of %q is another kind of group", clip(m.Member), clip(m.Group))
		}
		return checkGroup(m.Member)
	}
	if strings.Contains(m.Member, "*") {
		return fmt.Errorf("member %q is a pattern: members are exact, patterns stand in rules", clip(m.Member))
	}
	if kind == "hosts" {
		host, ok := strings.CutPrefix(m.Member, "host:")
		if !ok {
			return fmt.Errorf("member %q of %q is not host:NAME", clip(m.Member), clip(m.Group))
		}
		return CheckHostRef(host)
	}
	id, err := spiffeid.FromString(m.Member)
	if err != nil {
		return fmt.Errorf("member %q of %q is not a SPIFFE ID: %w", clip(m.Member), clip(m.Group), err)
	}
	if id.Path() == "" {
		return fmt.Errorf("member %q of %q is a trust domain, not a workload", clip(m.Member), clip(m.Group))
	}
	return nil
}

// groups checks that every group that is used has members, and that no group
// holds itself or is nested too deep.
func (v *validator) groups() {
	defined := map[string]bool{}
	up := map[string][]string{}
	for _, m := range v.p.Memberships {
		defined[m.Group] = true
		if IsGroup(m.Member) {
			up[m.Member] = append(up[m.Member], m.Group)
		}
	}
	known := sortedKeys(defined)
	unknown := func(o Origin, column int, ref string) {
		misplaced := strings.HasPrefix(ref, callerPrefix) != (column == colSrc)
		if !IsGroup(ref) || defined[ref] || column != colMember && misplaced {
			return
		}
		hint := ": no row makes anyone a member of it"
		if n := nearest(ref, known); n != "" {
			hint = fmt.Sprintf(": did you mean %q?", n)
		}
		v.cell(o, column, "unknown group %q%s", clip(ref), hint)
	}
	for _, r := range v.p.Rules {
		unknown(r.Origin, colSrc, r.Src)
		unknown(r.Origin, colDst, r.Dst)
	}
	depth := map[string]int{}
	for _, m := range v.p.Memberships {
		unknown(m.Origin, colMember, m.Member)
		if !IsGroup(m.Member) {
			continue
		}
		switch n := groupDepth(m.Member, up, depth, nil); {
		case n < 0 && reaches(m.Group, m.Member, up, map[string]bool{}):
			v.cell(m.Origin, colMember, "group %q holds itself: %q is a member of it", clip(m.Group), clip(m.Member))
		case n > maxGroupDepth-1:
			v.cell(m.Origin, colMember, "groups are nested %d deep, more than %d", n+1, maxGroupDepth)
		}
	}
}

// groupDepth is the longest chain of memberships that begins at group g, -1
// when it runs into a cycle.
func groupDepth(g string, up map[string][]string, memo map[string]int, path []string) int {
	if slices.Contains(path, g) {
		return -1
	}
	if n, ok := memo[g]; ok {
		return n
	}
	if len(path) > 4*maxGroupDepth {
		return len(path) // too deep is enough to know; bounds the recursion
	}
	longest := 0
	for _, parent := range up[g] {
		n := groupDepth(parent, up, memo, append(path, g))
		if n < 0 {
			longest = -1
			break
		}
		longest = max(longest, n+1)
	}
	memo[g] = longest
	return longest
}

// reaches reports whether target is at or above g.
func reaches(g, target string, up map[string][]string, seen map[string]bool) bool {
	if g == target {
		return true
	}
	if seen[g] {
		return false
	}
	seen[g] = true
	for _, parent := range up[g] {
		if reaches(parent, target, up, seen) {
			return true
		}
	}
	return false
}
