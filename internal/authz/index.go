package authz

import (
	"slices"
	"strings"

	"sallyport/internal/mesh"
)

// A class is a source or a destination as rows write it: an exact name, a
// pattern or a group. Rows are found by the pair of classes.
type class uint32

// classes finds the classes that a name belongs to.
type classes struct {
	ids map[string]class
	// known has every name that stands in a row or group, with all its
	// classes: nearly every call is answered by this map alone.
	known map[string][]class
	// patterns is walked for all other names.
	patterns pattern
}

// id returns the class of the text, making one if needed. The members of a
// group are those names and patterns that belong to its class.
func (x *classes) id(text string, groups map[string][]string) class {
	if id, ok := x.ids[text]; ok {
		return id
	}
	id := class(len(x.ids))
	x.ids[text] = id
	if !mesh.IsGroup(text) {
		x.member(text, id)
		return id
	}
	for _, m := range groups[text] {
		x.member(m, id)
	}
	return id
}

func (x *classes) member(text string, id class) {
	if text == "*" || strings.Contains(text, "*.") || strings.Contains(text, "/*") || text == mesh.Any {
		x.patterns.add(text, id)
		return
	}
	x.known[text] = append(x.known[text], id)
}

// seal completes known with the patterns that each name matches.
func (x *classes) seal() {
	for name, ids := range x.known {
		ids = x.patterns.match(name, ids)
		slices.Sort(ids)
		x.known[name] = slices.Clip(slices.Compact(ids))
	}
}

// of returns the classes of a name; out is used when it is not a known one. A
// class may be there twice.
func (x *classes) of(name string, out []class) []class {
	if ids, ok := x.known[name]; ok {
		return ids
	}
	return x.patterns.match(name, out)
}

// pattern finds the patterns that a name matches, in time that depends on the
// name and not on how many patterns there are.
type pattern struct {
	any   []class // "**" and "*": every SPIFFE ID
	tds   map[string]*node
	hosts map[string][]class // by what follows "host:*."
}

// node is a place in the tree of path segments of one trust domain.
type node struct {
	next map[string]*node
	star *node   // any one segment
	here []class // patterns that end here
	rest []class // patterns that end in "**" here
}

func (p *pattern) add(text string, id class) {
	if text == "*" || text == mesh.Any {
		p.any = append(p.any, id)
		return
	}
	if host, ok := strings.CutPrefix(text, "host:*."); ok {
		if p.hosts == nil {
			p.hosts = map[string][]class{}
		}
		p.hosts[host] = append(p.hosts[host], id)
		return
	}
	td, path, _ := strings.Cut(strings.TrimPrefix(text, "spiffe://"), "/")
	if p.tds == nil {
		p.tds = map[string]*node{}
	}
	n := p.tds[td]
	if n == nil {
		n = &node{}
		p.tds[td] = n
	}
	for more := true; more; {
		var seg string
		seg, path, more = strings.Cut(path, "/")
		if seg == mesh.Any && !more {
			n.rest = append(n.rest, id)
			return
		}
		n = n.child(seg)
	}
	n.here = append(n.here, id)
}

func (n *node) child(seg string) *node {
	if seg == "*" {
		if n.star == nil {
			n.star = &node{}
		}
		return n.star
	}
	if n.next == nil {
		n.next = map[string]*node{}
	}
	c := n.next[seg]
	if c == nil {
		c = &node{}
		n.next[seg] = c
	}
	return c
}

// match appends the classes of the patterns that name matches, as mesh.MatchSrc
// and mesh.MatchDst would say.
func (p *pattern) match(name string, out []class) []class {
	if host, ok := strings.CutPrefix(name, "host:"); ok {
		label, rest, ok := strings.Cut(host, ".")
		if ok && label != "" && rest != "" {
			out = append(out, p.hosts[rest]...)
		}
		return out
	}
	id, ok := strings.CutPrefix(name, "spiffe://")
	if !ok || id == "" {
		return out
	}
	out = append(out, p.any...)
	td, path, ok := strings.Cut(id, "/")
	if !ok || path == "" {
		return out
	}
	if n := p.tds[td]; n != nil {
		out = n.match(path, out)
	}
	return out
}

func (n *node) match(path string, out []class) []class {
	out = append(out, n.rest...)
	seg, path, more := strings.Cut(path, "/")
	if c := n.next[seg]; c != nil {
		out = c.end(path, more, out)
	}
	if n.star != nil && seg != "" {
		out = n.star.end(path, more, out)
	}
	return out
}

func (n *node) end(path string, more bool, out []class) []class {
	if more {
		return n.match(path, out)
	}
	out = append(out, n.here...)
	return append(out, n.rest...) // "**" stands for no segment, too
}

// pathKind says how the path of a rule is compared.
type pathKind uint8

const (
	exactPath  pathKind = iota // also "-"
	prefixPath                 // "/a/**": path is "/a"
	segmentPath
	anyPath
)

// rule is a row, ready to be compared with a call whose source and destination
// are known to match.
type rule struct {
	path  string
	verbs uint32
	row   int32 // its place in the set; smaller wins
	port  uint16
	kind  pathKind
	deny  bool
	conds []mesh.Cond
	more  []string // verbs without a bit
	id    string
}

// Bits of verbs. A verb without one has bit otherVerb and is compared as text.
const (
	otherVerb = 1 << 31
	anyVerb   = ^uint32(0)
)

func verbBit(v string) uint32 {
	switch v {
	case "GET":
		return 1 << 0
	case "HEAD":
		return 1 << 1
	case "POST":
		return 1 << 2
	case "PUT":
		return 1 << 3
	case "PATCH":
		return 1 << 4
	case "DELETE":
		return 1 << 5
	case "OPTIONS":
		return 1 << 6
	case "TRACE":
		return 1 << 7
	case "CONNECT":
		return 1 << 8
	}
	return otherVerb
}

func (r *rule) setVerbs(s string) {
	if s == "*" {
		r.verbs = anyVerb
		return
	}
	for v := range strings.SplitSeq(s, "|") {
		bit := verbBit(v)
		r.verbs |= bit
		if bit == otherVerb {
			r.more = append(r.more, v)
		}
	}
}

func (r *rule) setPath(s string) {
	base, tree := strings.CutSuffix(s, "/**")
	switch {
	case s == mesh.Any:
		r.kind = anyPath
	case tree && !strings.Contains(base, "*"):
		r.kind, r.path = prefixPath, base
	case strings.Contains(s, "*"):
		r.kind, r.path = segmentPath, s
	default:
		r.kind, r.path = exactPath, s
	}
}

// matches compares verb and path; bit is verbBit(verb).
func (r *rule) matches(bit uint32, verb, path string) bool {
	if r.verbs&bit == 0 || bit == otherVerb && r.verbs != anyVerb && !slices.Contains(r.more, verb) {
		return false
	}
	switch r.kind {
	case exactPath:
		return r.path == path
	case prefixPath:
		n := len(r.path)
		return len(path) >= n && path[:n] == r.path && (len(path) == n && n > 0 || len(path) > n && path[n] == '/')
	case anyPath:
		return true
	}
	return path[0] == '/' && mesh.MatchSegments(r.path, path)
}

// table is the index of one direction.
type table struct {
	src, dst classes
	rules    map[uint64][]rule
}

func newTable() *table {
	x := func() classes { return classes{ids: map[string]class{}, known: map[string][]class{}} }
	return &table{src: x(), dst: x(), rules: map[uint64][]rule{}}
}

func pair(src, dst class) uint64 { return uint64(src)<<32 | uint64(dst) }

func (t *table) add(r *mesh.Rule, c rule, groups map[string][]string) {
	k := pair(t.src.id(r.Src, groups), t.dst.id(r.Dst, groups))
	t.rules[k] = append(t.rules[k], c)
}

func (t *table) seal() {
	t.src.seal()
	t.dst.seal()
}
