// Package route matches a call to a route of its service, and chooses one of
// the backends of that route.
//
// A Table is compiled from a snapshot and never changes. To match a call costs
// the same however many routes with an exact path or a prefix there are, and
// allocates nothing. The package does no I/O and reads no clock: whether a fault
// is over, and which backend is well, is for others to say.
package route

import (
	"cmp"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
)

// A Call is what is known of a call before anybody is asked. Its bytes are not
// kept.
type Call struct {
	Method []byte
	// Path is in its normal form, Query as received.
	Path, Query []byte
	Fields      []http1.Field
	// Caller is a SPIFFE ID.
	Caller string
	// Claim is the value of a claim of the verified token; nil when there is no
	// such token.
	Claim func(name string) string
	// Addr is where the call came from, as far as that is believed.
	Addr netip.Addr
	// Trace is random; calls that belong together have the same.
	Trace [16]byte

	text []byte // of what had to be decoded
}

// get is the value of the first field of that name, which is in lower case.
func (c *Call) get(name string) ([]byte, bool) {
	for i := range c.Fields {
		if f := &c.Fields[i]; len(f.Name) == len(name) && equalFold(f.Name, name) {
			return f.Value, true
		}
	}
	return nil, false
}

func equalFold(b []byte, lower string) bool {
	for i, c := range b {
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}

// Options are what a Table takes from its surroundings.
type Options struct {
	// Region says in which region a database in MaxMind's format, of that
	// name, has an address; empty for none. It must be quick. Without it no
	// match by database holds.
	Region func(database string, a netip.Addr) string
}

// A Table has the routes of every service and host of a snapshot.
type Table struct {
	sets map[string]*Set
	size int
}

// A Set has the routes of one service or host.
type Set struct {
	// File is what was compiled.
	File *mesh.Routes
	// Routes are in the order of the file.
	Routes []*Route

	exact map[string][]*entry
	rest  []*entry // regular expressions, and methods of gRPC in any service
	root  *node
}

// A Route is a compiled route.
type Route struct {
	*mesh.Route
	// ID is the number of the route among the routes and backends of the Table.
	ID      int
	Faults  []Fault
	Shadows []Shadow

	// Watched says that the calls of its canary and of the others are counted.
	Watched bool

	// levels are the backends that have a weight by their priority, the first
	// to be chosen from first.
	levels [][]Backend
	salt   uint64
}

// A Backend is one of those of a route.
type Backend struct {
	mesh.Backend
	// Name is the service, or the address, that is called.
	Name string
	// Index is the place among the backends of the route, ID the number among
	// the routes and backends of the Table.
	Index, ID int
	// Canary says that it is that of a rollout.
	Canary bool

	seed   uint64
	weight float64
}

// A node is a segment of the prefixes of paths.
type node struct {
	next map[string]*node
	here []*entry
	up   *node // the nearest one above that has entries
	size int   // bytes of the prefix
}

// An entry is one match of a route.
type entry struct {
	conditions
	route *Route
	match int
	// order is the place of the match in the file, all routes counted.
	order int
	// kind is by what the path is compared, prefix how long that is.
	kind   kind
	path   string
	regexp *regexp.Regexp
	suffix string // of the path: "/" and a method of gRPC
}

// A kind is how a path is compared. The smaller is asked first.
type kind int

const (
	exact kind = iota
	pattern
	prefix
)

// Compile checks the routes of a snapshot and makes a Table, which is empty when
// there are none.
func Compile(snap *mesh.Snapshot, opt Options) (*Table, error) {
	t := &Table{sets: map[string]*Set{}}
	if len(snap.Routes) == 0 {
		return t, nil
	}
	checked := mesh.Snapshot{TrustDomain: snap.TrustDomain, Services: snap.Services, Routes: snap.Routes, Shares: snap.Shares}
	if err := checked.Validate(); err != nil {
		return nil, fmt.Errorf("routes: %w", err)
	}
	c := compiler{opt: opt, members: membersOf(snap.Memberships), snap: snap}
	for i := range snap.Routes {
		f := &snap.Routes[i]
		s, err := c.set(f)
		if err != nil {
			return nil, fmt.Errorf("routes of %s: %w", f.Of(), err)
		}
		t.sets[f.Of()] = s
	}
	t.size = c.size
	return t, nil
}

// Size is how many routes and backends there are: their IDs are below it, so that
// what is kept for each can stand in a slice.
func (t *Table) Size() int { return t.size }

// Each are the backends of the route that have a weight.
func (r *Route) Each(yield func(*Backend) bool) {
	for _, level := range r.levels {
		for i := range level {
			if !yield(&level[i]) {
				return
			}
		}
	}
}

// All are the sets of the Table, in no order.
func (t *Table) All(yield func(*Set) bool) {
	for _, s := range t.sets {
		if !yield(s) {
			return
		}
	}
}

// Of returns the routes of a service, nil when it has none.
func (t *Table) Of(service mesh.ServiceName) *Set { return t.sets[string(service)] }

// OfHost returns the routes of a host outside of the mesh, nil when it has none.
func (t *Table) OfHost(host string) *Set { return t.sets["host:"+host] }

// Empty says that nothing has routes.
func (t *Table) Empty() bool { return len(t.sets) == 0 }

// A Choice is the route of a call.
type Choice struct {
	// Route is nil when none matches: the call goes to the service itself.
	Route *Route
	// Prefix is how much of the path matched as a prefix, bytes.
	Prefix int
	// Kept says that the caller stays with its backend; other calls are spread.
	Kept bool

	key uint64
}

// Match finds the route of a call, the most specific that matches.
func (s *Set) Match(c *Call) Choice {
	e, size := s.find(c)
	if e == nil {
		return Choice{}
	}
	key, kept := e.route.keyOf(c)
	return Choice{Route: e.route, Prefix: size, Kept: kept, key: key}
}

func (s *Set) find(c *Call) (*entry, int) {
	if e := first(s.exact[string(c.Path)], c); e != nil {
		return e, 0
	}
	for _, e := range s.rest {
		if e.matchesPath(c.Path) && e.holds(c) {
			return e, 0
		}
	}
	for n := s.deepest(c.Path); n != nil; n = n.up {
		if e := first(n.here, c); e != nil {
			return e, n.size
		}
	}
	return nil, 0
}

func first(list []*entry, c *Call) *entry {
	for _, e := range list {
		if e.holds(c) {
			return e
		}
	}
	return nil
}

// deepest is the node of the longest prefix of path that has entries.
func (s *Set) deepest(path []byte) *node {
	n, found := s.root, (*node)(nil)
	for {
		if len(n.here) > 0 {
			found = n
		}
		if len(path) == 0 || path[0] != '/' || n.next == nil {
			return found
		}
		end := 1
		for end < len(path) && path[end] != '/' {
			end++
		}
		if n = n.next[string(path[1:end])]; n == nil {
			return found
		}
		path = path[end:]
	}
}

// matchesPath compares a path that no map finds.
func (e *entry) matchesPath(path []byte) bool {
	if e.regexp != nil {
		return e.regexp.Match(path)
	}
	n := len(path) - len(e.suffix)
	// "/" and the service, then the method.
	return n > 1 && string(path[n:]) == e.suffix && path[0] == '/' && !slices.Contains(path[1:n], '/')
}

// A compiler makes sets of files.
type compiler struct {
	opt     Options
	members map[string][]string
	snap    *mesh.Snapshot
	size    int
}

// id is the next number of a route or backend.
func (c *compiler) id() int {
	c.size++
	return c.size - 1
}

func (c *compiler) set(f *mesh.Routes) (*Set, error) {
	s := &Set{File: f, exact: map[string][]*entry{}, root: &node{}}
	var all []*entry
	for i := range f.Routes {
		r, err := c.route(f, &f.Routes[i])
		if err != nil {
			return nil, fmt.Errorf("%s: route %s: %w", r.Origin, r.Name, err)
		}
		s.Routes = append(s.Routes, r)
		matches := r.Matches
		if len(matches) == 0 {
			matches = []mesh.Match{{}}
		}
		for m := range matches {
			e, err := c.entry(&matches[m])
			if err != nil {
				return nil, fmt.Errorf("%s: route %s: %w", r.Origin, r.Name, err)
			}
			e.route, e.match, e.order = r, m, len(all)
			all = append(all, e)
		}
	}
	slices.SortStableFunc(all, compare)
	for _, e := range all {
		switch e.kind {
		case exact:
			s.exact[e.path] = append(s.exact[e.path], e)
		case pattern:
			s.rest = append(s.rest, e)
		default:
			n := s.root.at(e.path)
			n.here = append(n.here, e)
		}
	}
	s.root.link(nil)
	return s, nil
}

// compare puts first what is more specific, as the Gateway API has it: exact
// path, longest prefix, method, number of headers, number of query parameters;
// then what is known of the caller, and then the order of the file.
func compare(a, b *entry) int {
	return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(len(b.path), len(a.path)), -compareBool(a.method != "", b.method != ""),
		cmp.Compare(len(b.headers), len(a.headers)), cmp.Compare(len(b.query), len(a.query)), cmp.Compare(b.known(), a.known()), cmp.Compare(a.order, b.order))
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// at is the node of a prefix, made where there is none.
func (n *node) at(path string) *node {
	for seg := range strings.SplitSeq(path, "/") {
		if seg == "" {
			continue // before the first "/"
		}
		if n.next == nil {
			n.next = map[string]*node{}
		}
		if n.next[seg] == nil {
			n.next[seg] = &node{size: n.size + 1 + len(seg)}
		}
		n = n.next[seg]
	}
	return n
}

func (n *node) link(up *node) {
	n.up = up
	if len(n.here) > 0 {
		up = n
	}
	for _, next := range n.next {
		next.link(up)
	}
}

// entry compiles a match.
func (c *compiler) entry(m *mesh.Match) (*entry, error) {
	e := &entry{kind: prefix}
	var err error
	if e.conditions, err = c.conditions(m); err != nil {
		return nil, err
	}
	switch p := m.Path; {
	case m.GRPC != nil && m.GRPC.Service == "":
		e.kind, e.suffix = pattern, "/"+m.GRPC.Method
	case m.GRPC != nil && m.GRPC.Method == "":
		e.path = "/" + m.GRPC.Service
	case m.GRPC != nil:
		e.kind, e.path = exact, "/"+m.GRPC.Service+"/"+m.GRPC.Method
	case p == nil:
	case p.Exact != "":
		e.kind, e.path = exact, p.Exact
	case p.Regex != "":
		e.kind = pattern
		e.regexp, err = mesh.CompileText(p.Regex)
	default:
		e.path = strings.TrimRight(p.Prefix, "/")
	}
	return e, err
}

func (c *compiler) route(f *mesh.Routes, r *mesh.Route) (*Route, error) {
	out := &Route{Route: r, ID: c.id(), salt: hash(0, []byte(f.Of()+" "+r.Name))}
	backends := r.Backends
	if len(backends) == 0 {
		backends = []mesh.Backend{{Weight: 1}}
	}
	weights := c.weights(f, out, backends)
	byPriority := map[uint8][]Backend{}
	for i, b := range backends {
		if weights[i] == 0 {
			continue
		}
		k := Backend{Backend: b, Name: cmp.Or(b.Address, string(b.Service), string(f.Service), f.Host), Index: i, ID: c.id(), Canary: r.IsCanary(f.Service, i), weight: weights[i]}
		k.seed = hash(out.salt, []byte(k.Name+" "+b.Subset))
		byPriority[b.Priority] = append(byPriority[b.Priority], k)
	}
	for p := range 256 {
		if level := byPriority[uint8(p)]; level != nil {
			out.levels = append(out.levels, level)
		}
	}
	for i := range r.Faults {
		d, err := c.disturbance(out, r.Faults[i].Name, r.Faults[i].Share, r.Faults[i].Match)
		if err != nil {
			return out, err
		}
		out.Faults = append(out.Faults, Fault{&r.Faults[i], d, c.callers(r.Faults[i].Callers)})
	}
	for i := range r.Shadows {
		d, err := c.disturbance(out, r.Shadows[i].Name, r.Shadows[i].Share, r.Shadows[i].Match)
		if err != nil {
			return out, err
		}
		out.Shadows = append(out.Shadows, Shadow{&r.Shadows[i], d})
	}
	return out, nil
}

// weights are those of the backends. While a rollout says the share of the
// canary, those of the others stay as they are, so that no caller moves between
// them, and that of the canary follows from the share.
func (c *compiler) weights(f *mesh.Routes, r *Route, backends []mesh.Backend) []float64 {
	w, rest := make([]float64, len(backends)), 0.0
	for i, b := range backends {
		w[i] = float64(b.Weight)
		if !r.IsCanary(f.Service, i) {
			rest += w[i]
		}
	}
	if r.Plan == nil {
		return w
	}
	s, started := c.snap.ShareOf(f.Service, r.Name)
	if !started {
		return w
	}
	r.Watched = s.Watch
	for i := range backends {
		switch canary := r.IsCanary(f.Service, i); {
		case s.Share == mesh.Whole && canary:
			w[i] = 1
		case s.Share == mesh.Whole:
			w[i] = 0
		case canary:
			w[i] = rest * float64(s.Share) / float64(mesh.Whole-s.Share)
		}
	}
	return w
}
