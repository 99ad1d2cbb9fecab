package route

import "sallyport/internal/mesh"

// A Fault is a compiled fault of a route.
type Fault struct {
	*mesh.Fault
	disturbance
	callers *callers
}

// Touches says whether the call is one of those that the fault is about. The
// caller knows the time, and how many are touched already.
func (f *Fault) Touches(c *Call) bool {
	return f.callers != nil && f.callers.has(c.Caller) && f.takes(c)
}

// May says whether the call could be one of those.
func (f *Fault) May(c *Call) bool {
	return f.callers != nil && f.callers.has(c.Caller) && f.matched(c)
}

// A Shadow is a compiled shadow of a route.
type Shadow struct {
	*mesh.Shadow
	disturbance
}

// Copies says whether the call is one of those that are copied.
func (s *Shadow) Copies(c *Call) bool { return s.takes(c) }

// May says whether the call could be one of those.
func (s *Shadow) May(c *Call) bool { return s.matched(c) }

// A disturbance is about a share of the calls that one of some matches holds of.
type disturbance struct {
	share   uint64
	salt    uint64
	matches []*entry // none: all calls
}

func (c *compiler) disturbance(r *Route, name string, share mesh.Share, matches []mesh.Match) (disturbance, error) {
	d := disturbance{share: uint64(share), salt: hash(r.salt, []byte(name))}
	for i := range matches {
		e, err := c.entry(&matches[i])
		if err != nil {
			return d, err
		}
		d.matches = append(d.matches, e)
	}
	return d, nil
}

func (d *disturbance) takes(c *Call) bool {
	return hash(d.salt, c.Trace[:])%mesh.Whole < d.share && d.matched(c)
}

// matched says whether the call could be one of them.
func (d *disturbance) matched(c *Call) bool {
	for _, e := range d.matches {
		if e.covers(c.Path) && e.holds(c) {
			return true
		}
	}
	return len(d.matches) == 0
}

// covers compares the path alone, without the maps of a set.
func (e *entry) covers(path []byte) bool {
	switch e.kind {
	case exact:
		return string(path) == e.path
	case pattern:
		return e.matchesPath(path)
	}
	n := len(e.path)
	return n == 0 || len(path) >= n && string(path[:n]) == e.path && (len(path) == n || path[n] == '/')
}
