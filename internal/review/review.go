// Package review holds the tools that people use on the policy files before
// they are in force: lint finds rows that do not do what their author thought,
// test decides the cases of policies/tests with the judge that proxies use.
//
// It reads parsed policies and returns values. It opens no file, prints nothing
// and starts no goroutine; the CLI and the issuer call the same functions.
package review

import (
	"fmt"
	"slices"
	"strings"

	"sallyport/internal/mesh"
)

// A Check names one kind of finding. The list is closed.
type Check string

// The checks of Lint.
const (
	// Shadowed: a deny row covers an allow row, which never allows anything.
	Shadowed Check = "shadowed"
	// Redundant: another row with the same effect covers the row.
	Redundant Check = "redundant"
	// Unreachable: nobody can make the calls that the row speaks of.
	Unreachable Check = "unreachable"
	// NoDestination: the row allows a host that egress.yaml does not describe.
	NoDestination Check = "no-destination"
	// UnusedGroup: no row names the group.
	UnusedGroup Check = "unused-group"
	// UnusedDestination: no row allows the host.
	UnusedDestination Check = "unused-destination"
	// Broad: an allow row names no caller, or leaves everything open.
	Broad Check = "broad"
	// Leaky: a deny row leaves open what it seems to close.
	Leaky Check = "leaky"
	// Expired: the row has ended.
	Expired Check = "expired"
	// Untested: no test is decided by the row.
	Untested Check = "untested"
	// NoEntry: a service has an identity that nobody can get.
	NoEntry Check = "no-entry"
	// TimeDependent: a test is decided by the present moment.
	TimeDependent Check = "time-dependent"
	// NotEnforced: the denials of a file let calls pass.
	NotEnforced Check = "not-enforced"
)

// A Finding is something that is valid and probably not meant.
type Finding struct {
	Check  Check       `json:"check"`
	Origin mesh.Origin `json:"origin"`
	// Subject is the row, group, host, service or test it is about.
	Subject string `json:"subject"`
	Msg     string `json:"msg"`
}

// String is "file:line: message (check)".
func (f Finding) String() string {
	return fmt.Sprintf("%s: %s (%s)", f.Origin, f.Msg, f.Check)
}

// members answers which identities and hosts stand in a group, at any depth.
type members map[string][]string

func membersOf(ms []mesh.Membership) members {
	down := map[string][]string{}
	for _, m := range ms {
		down[m.Group] = append(down[m.Group], m.Member)
	}
	out := members{}
	for g := range down {
		seen := map[string]bool{g: true}
		for todo := []string{g}; len(todo) > 0; {
			next := todo[len(todo)-1]
			todo = todo[:len(todo)-1]
			for _, m := range down[next] {
				switch {
				case seen[m]:
				case mesh.IsGroup(m):
					todo = append(todo, m)
				default:
					out[g] = append(out[g], m)
				}
				seen[m] = true
			}
		}
		slices.Sort(out[g])
	}
	return out
}

// patterns are what a column says: the members of a group, or the pattern.
func (m members) patterns(ref string) []string {
	if mesh.IsGroup(ref) {
		return m[ref]
	}
	return []string{ref}
}

func (m members) matchSrc(r *mesh.Rule, src string) bool {
	return slices.ContainsFunc(m.patterns(r.Src), func(p string) bool { return mesh.MatchSrc(p, src) })
}

func (m members) matchDst(r *mesh.Rule, dst string) bool {
	return slices.ContainsFunc(m.patterns(r.Dst), func(p string) bool { return mesh.MatchDst(r.Dir, p, dst) })
}

// covers reports whether every call that b speaks of is one that a matches too.
// It may say no although it is so; it never says yes when it is not.
func (m members) covers(a, b *mesh.Rule) bool {
	return a.Dir == b.Dir &&
		(a.Port == "*" || a.Port == b.Port) &&
		coversVerb(a.Verb, b.Verb) &&
		coversPath(a.Path, b.Path) &&
		coversCond(a.Cond, b.Cond) &&
		coversAll(m.patterns(a.Src), m.patterns(b.Src)) &&
		coversAll(m.patterns(a.Dst), m.patterns(b.Dst))
}

func coversAll(a, b []string) bool {
	for _, q := range b {
		if !slices.ContainsFunc(a, func(p string) bool { return coversRef(p, q) }) {
			return false
		}
	}
	return len(b) > 0
}

// coversRef compares two source or destination patterns.
func coversRef(a, b string) bool {
	if a == mesh.Any || a == "*" || a == b {
		return true
	}
	if ah, ok := strings.CutPrefix(a, "host:"); ok {
		bh, ok := strings.CutPrefix(b, "host:")
		return ok && !strings.HasPrefix(bh, "*") && mesh.MatchHost(ah, bh)
	}
	return b != mesh.Any && b != "*" && coversSegments(a, b)
}

func coversPath(a, b string) bool {
	if a == mesh.Any || a == b {
		return true
	}
	return a != "-" && b != "-" && b != mesh.Any && coversSegments(a, b)
}

// coversSegments reports whether all that pattern b matches, a matches as well.
func coversSegments(a, b string) bool {
	as, bs := strings.Split(a, "/"), strings.Split(b, "/")
	for i, s := range as {
		if s == mesh.Any {
			return true // the last segment
		}
		if i >= len(bs) || bs[i] == mesh.Any || s != "*" && s != bs[i] || s == "*" && bs[i] == "" {
			return false
		}
	}
	return len(as) == len(bs)
}

func coversVerb(a, b string) bool {
	if a == "*" || a == b {
		return true
	}
	if b == "*" {
		return false
	}
	for v := range strings.SplitSeq(b, "|") {
		if !mesh.MatchVerb(a, v) {
			return false
		}
	}
	return true
}

// coversCond: all conditions of a must be among those of b.
func coversCond(a, b string) bool {
	if a == "-" {
		return true
	}
	have := strings.Fields(b)
	for _, w := range strings.Fields(a) {
		if !slices.Contains(have, w) {
			return false
		}
	}
	return true
}
