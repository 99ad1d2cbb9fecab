package route

import (
	"bytes"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"sallyport/internal/mesh"
)

// conditions are what a match asks of a call beside its path.
type conditions struct {
	method  string
	headers []named
	query   []named
	from    *callers // nil: everybody
	claims  []claim
	region  *region
}

// known counts what a match asks of who calls.
func (k *conditions) known() (n int) {
	if k.from != nil {
		n++
	}
	if k.region != nil {
		n++
	}
	return n + len(k.claims)
}

// holds says whether all hold.
func (k *conditions) holds(c *Call) bool { return k.fails(c) == "" }

// fails names the first that does not hold, empty when all do.
func (k *conditions) fails(c *Call) string {
	if k.method != "" && string(c.Method) != k.method {
		return "method"
	}
	for i := range k.headers {
		v, there := c.get(k.headers[i].name)
		if !k.headers[i].holds(v, there) {
			return "headers"
		}
	}
	for i := range k.query {
		v, there := c.parameter(k.query[i].name)
		if !k.query[i].holds(v, there) {
			return "query"
		}
	}
	if k.from != nil && !k.from.has(c.Caller) {
		return "from"
	}
	for i := range k.claims {
		if c.Claim == nil || c.Claim(k.claims[i].name) != k.claims[i].value {
			return "claims"
		}
	}
	if k.region != nil && !k.region.has(c) {
		return "region"
	}
	return ""
}

// named compares the value of a header or a parameter.
type named struct {
	name   string
	text   mesh.Text
	regexp *regexp.Regexp
}

func (n *named) holds(v []byte, there bool) bool {
	if !there {
		return n.text.Not
	}
	t, ok := &n.text, true
	switch {
	case t.Exact != "":
		ok = string(v) == t.Exact
	case t.Prefix != "":
		ok = len(v) >= len(t.Prefix) && string(v[:len(t.Prefix)]) == t.Prefix
	case t.Suffix != "":
		ok = len(v) >= len(t.Suffix) && string(v[len(v)-len(t.Suffix):]) == t.Suffix
	case n.regexp != nil:
		ok = n.regexp.Match(v)
	}
	return ok != t.Not
}

// parameter is the value of the first parameter of that name, as a form has it.
func (c *Call) parameter(name string) ([]byte, bool) {
	for rest := c.Query; len(rest) > 0; {
		var pair []byte
		pair, rest, _ = bytes.Cut(rest, []byte{'&'})
		k, v, _ := bytes.Cut(pair, []byte{'='})
		if string(c.decode(k)) == name {
			return c.decode(v), true
		}
	}
	return nil, false
}

// decode resolves "+" and "%41". An escape that is none stays as it is.
func (c *Call) decode(b []byte) []byte {
	if bytes.IndexByte(b, '%') < 0 && bytes.IndexByte(b, '+') < 0 {
		return b
	}
	out := c.text[:0]
	for i := 0; i < len(b); i++ {
		switch {
		case b[i] == '+':
			out = append(out, ' ')
		case b[i] == '%' && i+2 < len(b) && unhex(b[i+1]) >= 0 && unhex(b[i+2]) >= 0:
			out = append(out, byte(unhex(b[i+1])<<4|unhex(b[i+2])))
			i += 2
		default:
			out = append(out, b[i])
		}
	}
	c.text = out
	return out
}

func unhex(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

type claim struct{ name, value string }

// callers are those that one of some patterns matches.
type callers struct {
	all      bool
	ids      map[string]bool
	patterns []string
}

func (s *callers) has(id string) bool {
	if id == "" {
		return false
	}
	return s.all || s.ids[id] || slices.ContainsFunc(s.patterns, func(p string) bool { return mesh.MatchSrc(p, id) })
}

// membersOf lists the members of each group, groups in it resolved.
func membersOf(ms []mesh.Membership) map[string][]string {
	direct, out := map[string][]string{}, map[string][]string{}
	for _, m := range ms {
		direct[m.Group] = append(direct[m.Group], m.Member)
	}
	for g := range direct {
		seen := map[string]bool{g: true}
		for todo := []string{g}; len(todo) > 0; {
			last := todo[len(todo)-1]
			todo = todo[:len(todo)-1]
			for _, m := range direct[last] {
				if mesh.IsGroup(m) && !seen[m] {
					seen[m] = true
					todo = append(todo, m)
				} else if !mesh.IsGroup(m) {
					out[g] = append(out[g], m)
				}
			}
		}
	}
	return out
}

func (c *compiler) callers(list []string) *callers {
	if len(list) == 0 {
		return nil
	}
	s := &callers{ids: map[string]bool{}}
	for _, p := range list {
		switch {
		case p == mesh.Any:
			s.all = true
		case mesh.IsGroup(p):
			for _, m := range c.members[p] {
				s.ids[m] = true
			}
		case strings.Contains(p, "*"):
			s.patterns = append(s.patterns, p)
		default:
			s.ids[p] = true
		}
	}
	return s
}

// A region says whether a call comes from one of some regions.
type region struct {
	in            map[string]bool
	header, claim string
	// ranges are those of the regions, widths their different lengths.
	ranges map[netip.Prefix]bool
	widths []int
	// database is asked where there are none.
	database string
	lookup   func(database string, a netip.Addr) string
}

func (r *region) has(c *Call) bool {
	switch {
	case r.header != "":
		v, there := c.get(r.header)
		return there && r.in[string(v)]
	case r.claim != "":
		return c.Claim != nil && r.in[c.Claim(r.claim)]
	case !c.Addr.IsValid():
		return false
	case r.database != "":
		return r.lookup != nil && r.in[r.lookup(r.database, c.Addr)]
	}
	a := c.Addr.Unmap().WithZone("")
	for _, n := range r.widths {
		if p, err := a.Prefix(n); err == nil && r.ranges[p] {
			return true
		}
	}
	return false
}

func (c *compiler) region(m *mesh.Region) *region {
	if m == nil {
		return nil
	}
	r := &region{in: map[string]bool{}, header: strings.ToLower(m.Header), claim: m.Claim, database: m.Database, lookup: c.opt.Region, ranges: map[netip.Prefix]bool{}}
	for _, name := range m.In {
		r.in[name] = true
		for _, p := range m.Ranges[name] {
			r.ranges[p] = true
			if !slices.Contains(r.widths, p.Bits()) {
				r.widths = append(r.widths, p.Bits())
			}
		}
	}
	return r
}

func (c *compiler) conditions(m *mesh.Match) (k conditions, err error) {
	k = conditions{method: m.Method, from: c.callers(m.From), region: c.region(m.Region)}
	if k.headers, err = compileNamed(m.Headers, strings.ToLower); err != nil {
		return k, err
	}
	if k.query, err = compileNamed(m.Query, strings.Clone); err != nil {
		return k, err
	}
	for name, value := range m.Claims {
		k.claims = append(k.claims, claim{name, value})
	}
	slices.SortFunc(k.claims, func(a, b claim) int { return strings.Compare(a.name, b.name) })
	return k, nil
}

func compileNamed(list []mesh.NamedText, name func(string) string) (out []named, err error) {
	for i := range list {
		n := named{name: name(list[i].Name), text: list[i].Text}
		if n.text.Regex != "" {
			if n.regexp, err = mesh.CompileText(n.text.Regex); err != nil {
				return nil, err
			}
		}
		out = append(out, n)
	}
	return out, nil
}
