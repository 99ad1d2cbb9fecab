package route

import "fmt"

// A Step is one match that was looked at for a call.
type Step struct {
	Route string `json:"route"`
	// Match counts from 1; 0 of a route without matches.
	Match int `json:"match,omitempty"`
	// Path is by what the path was compared.
	Path string `json:"path"`
	// Fails names the condition that does not hold; empty when all do.
	Fails string `json:"fails,omitempty"`
}

// Explain gives the choice for a call and the matches that were looked at
// before, the last of which is its own if there is one. Those whose path is
// found by no map are not among them.
func (s *Set) Explain(c *Call) (Choice, []Step) {
	var steps []Step
	look := func(list []*entry) bool {
		for _, e := range list {
			if e.kind == pattern && !e.matchesPath(c.Path) {
				continue
			}
			fails := e.fails(c)
			steps = append(steps, e.step(fails))
			if fails == "" {
				return true
			}
		}
		return false
	}
	found := look(s.exact[string(c.Path)]) || look(s.rest)
	for n := s.deepest(c.Path); n != nil && !found; n = n.up {
		found = look(n.here)
	}
	return s.Match(c), steps
}

func (e *entry) step(fails string) Step {
	s := Step{Route: e.route.Name, Fails: fails}
	if len(e.route.Matches) > 0 {
		s.Match = e.match + 1
	}
	switch {
	case e.regexp != nil:
		s.Path = "regex " + e.route.Matches[e.match].Path.Regex
	case e.kind == pattern:
		s.Path = "grpc method " + e.suffix[1:]
	case e.kind == exact:
		s.Path = "exact " + e.path
	case e.path == "":
		s.Path = "any"
	default:
		s.Path = "prefix " + e.path
	}
	return s
}

// All are the backends that have a weight, the first priority first.
func (r *Route) All(yield func(*Backend) bool) {
	for _, level := range r.levels {
		for i := range level {
			if !yield(&level[i]) {
				return
			}
		}
	}
}

// Spread is the choice for a call that is known to take the route.
func (r *Route) Spread(c *Call) Choice {
	key, kept := r.keyOf(c)
	return Choice{Route: r, Kept: kept, key: key}
}

// Parts lists what part of the calls of the route goes to which backend of the
// first priority, as text for people.
func (r *Route) Parts() (out []string) {
	if len(r.levels) == 0 {
		return nil
	}
	total := 0.0
	for i := range r.levels[0] {
		total += r.levels[0][i].weight
	}
	for i := range r.levels[0] {
		b := &r.levels[0][i]
		out = append(out, fmt.Sprintf("%s %.2f%%", b.Title(), 100*b.weight/total))
	}
	return out
}

// Title is the backend as people have it.
func (b *Backend) Title() string {
	if b.Subset == "" {
		return b.Name
	}
	return b.Name + "/" + b.Subset
}
