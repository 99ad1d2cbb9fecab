package review

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sallyport/internal/authz"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/route"
)

// A RouteQuery is a call whose route is asked for.
type RouteQuery struct {
	// Call is the call as it is judged, of the direction in. Its path may have a
	// query.
	Call *authz.Call
	// Service is what is called.
	Service mesh.ServiceName
	// Fields are header fields, "Name: value".
	Fields []string
	Claims map[string]string
	Addr   netip.Addr
}

// A Routed call is where a call goes, and why.
type Routed struct {
	Service mesh.ServiceName `json:"service"`
	// Route is empty when none matches, and the call goes to the service itself;
	// Number counts the routes of the file from 1.
	Route  string       `json:"route,omitempty"`
	Number int          `json:"number,omitempty"`
	Origin string       `json:"origin,omitempty"`
	Steps  []route.Step `json:"steps,omitempty"`
	// Answer is what the route answers itself.
	Answer string `json:"answer,omitempty"`
	// Backends are those it may go to with their part of the calls; Backend is
	// the one, when there is one, or the caller stays with it.
	Backends []string `json:"backends,omitempty"`
	Backend  string   `json:"backend,omitempty"`
	// Kept says by what the caller stays.
	Kept string `json:"kept,omitempty"`
	// Path is what the path becomes, Host what the service sees.
	Path string `json:"path,omitempty"`
	Host string `json:"host,omitempty"`
	// Timeout bounds the call. Faults may hit it at that time, Shadows may get a
	// copy.
	Timeout time.Duration `json:"timeout,omitempty"`
	Faults  []string      `json:"faults,omitempty"`
	Shadows []string      `json:"shadows,omitempty"`
	// Recorded says how calls that are allowed are recorded, where that is not the
	// usual way or the routes of the service say it.
	Recorded string `json:"recorded,omitempty"`
	// Judged says for each service it may go to how the call is decided there.
	Judged []Explained `json:"judged,omitempty"`
}

// ExplainRoute says which route a call takes, to what, and what the rows there
// say of it.
func ExplainRoute(p *mesh.Policies, q RouteQuery) (Routed, error) {
	snap, err := mesh.Compile(p, 1, 1, nil)
	if err != nil {
		return Routed{}, err
	}
	table, err := route.Compile(snap, route.Options{})
	if err != nil {
		return Routed{}, err
	}
	x := Routed{Service: q.Service}
	path, query, _ := strings.Cut(q.Call.Path, "?")
	judged := *q.Call
	judged.Path = path
	set := table.Of(q.Service)
	if set == nil {
		return x, x.judge(p, judged, []mesh.ServiceName{q.Service})
	}
	c := &route.Call{Method: []byte(judged.Verb), Path: []byte(path), Query: []byte(query), Caller: judged.Src.String(), Addr: q.Addr}
	for _, f := range q.Fields {
		name, value, ok := strings.Cut(f, ":")
		if !ok {
			return x, fmt.Errorf("%q is no header field: write NAME: VALUE", f)
		}
		c.Fields = append(c.Fields, http1.Field{Name: []byte(strings.TrimSpace(name)), Value: []byte(strings.TrimSpace(value))})
	}
	if len(q.Claims) > 0 {
		c.Claim = func(name string) string { return q.Claims[name] }
	}
	ch, steps := set.Explain(c)
	x.Steps = steps
	if ch.Route == nil {
		return x, x.judge(p, judged, []mesh.ServiceName{q.Service})
	}
	return x, x.follow(p, judged, set, &ch, c)
}

// follow fills in what the route does.
func (x *Routed) follow(p *mesh.Policies, call authz.Call, set *route.Set, ch *route.Choice, c *route.Call) error {
	r := ch.Route
	x.Route, x.Origin, x.Number = r.Name, r.Origin.String(), slices.Index(set.Routes, r)+1
	x.Timeout, x.Host = r.Timeouts.Request, r.Rewrite.Host
	for i := range r.Faults {
		f := &r.Faults[i]
		if !call.Now.Before(f.Since) && call.Now.Before(f.Until) && f.May(c) {
			x.Faults = append(x.Faults, fmt.Sprintf("%s: %s of the calls until %s", f.Name, f.Share, f.Until.UTC().Format(time.RFC3339)))
		}
	}
	for i := range r.Shadows {
		if s := &r.Shadows[i]; s.May(c) {
			x.Shadows = append(x.Shadows, fmt.Sprintf("%s: %s of the calls", s.Name, s.Share))
		}
	}
	switch {
	case r.Redirect != nil:
		x.Answer = fmt.Sprintf("redirect %d", r.Redirect.Status)
		return nil
	case r.Respond != nil:
		x.Answer = fmt.Sprintf("respond %d", r.Respond.Status)
		return nil
	}
	if to := r.Rewrite; to.Path != "" || to.Prefix != "" {
		x.Path = string(route.AppendPath(nil, c.Path, to.Path, to.Prefix, ch.Prefix))
		call.Path = x.Path
	}
	parts := r.Parts()
	x.Backends = parts
	if b := ch.Backend(0); len(parts) == 1 || ch.Kept {
		x.Backend = b.Title()
	}
	if ch.Kept {
		x.Kept = strings.TrimSpace(r.Sticky.By + " " + r.Sticky.Name)
	}
	var to []mesh.ServiceName
	for b := range r.All {
		if name := mesh.ServiceName(b.Name); !slices.Contains(to, name) {
			to = append(to, name)
		}
	}
	return x.judge(p, call, to)
}

// judge says how the call is decided at each service.
func (x *Routed) judge(p *mesh.Policies, call authz.Call, to []mesh.ServiceName) error {
	for _, name := range to {
		i := slices.IndexFunc(p.Services, func(s mesh.Service) bool { return s.Name == name })
		if i < 0 {
			continue
		}
		call.Dst, call.Port = p.Services[i].ID.String(), p.Services[i].Port
		e, err := Explain(p, &call)
		if err != nil {
			return err
		}
		x.Judged = append(x.Judged, e)
		if name == x.Service {
			x.Recorded = recorded(p, &p.Services[i], &call)
		}
	}
	return nil
}

// recorded says how a call is recorded that is allowed; empty for the usual way.
func recorded(p *mesh.Policies, svc *mesh.Service, call *authz.Call) string {
	snap := &mesh.Snapshot{Routes: p.Routes, Memberships: p.Memberships}
	r := route.KeeperOf(snap, svc.Name).Route(&route.Call{Method: []byte(call.Verb), Path: []byte(call.Path), Caller: call.Src.String()})
	k := svc.Keeping().By(r)
	if r == nil && k == (mesh.Keeping{}) {
		return ""
	}
	how := "counted"
	if k.Full {
		how = "in full"
	}
	if k.Open {
		how += ", and goes on where that cannot be done"
	} else {
		how += ", or refused"
	}
	if r != nil {
		return how + " (route " + r.Name + ", " + r.Origin.String() + ")"
	}
	return how + " (" + svc.Origin.String() + ")"
}

// A RouteChange is a route that one set has and the other has not, or has
// otherwise.
type RouteChange struct {
	// Of is a service, or "host:" and a host; Route is empty for what is said of
	// all its routes.
	Of    string `json:"of"`
	Route string `json:"route,omitempty"`
	What  string `json:"what"` // Added, Removed or Edited
	// Was and Is are the backends with their parts; Moved is the part of all
	// keys whose calls go elsewhere, of 10,000.
	Was    []string `json:"was,omitempty"`
	Is     []string `json:"is,omitempty"`
	Moved  int      `json:"moved,omitempty"`
	Fields []Field  `json:"fields,omitempty"`
}

// DiffRoutes compares the routes of two sets.
func DiffRoutes(was, is *mesh.Policies) ([]RouteChange, error) {
	old, err := routesOf(was)
	if err != nil {
		return nil, err
	}
	now, err := routesOf(is)
	if err != nil {
		return nil, err
	}
	var out []RouteChange
	keys := map[routeKey]bool{}
	for k := range old {
		keys[k] = true
	}
	for k := range now {
		keys[k] = true
	}
	for k := range keys {
		a, b := old[k], now[k]
		c := RouteChange{Of: k.of, Route: k.route, What: Edited, Fields: fieldsOf(a.fields, b.fields)}
		switch {
		case a.fields == nil:
			c.What = Added
		case b.fields == nil:
			c.What = Removed
		}
		if a.route != nil {
			c.Was = a.route.Parts()
		}
		if b.route != nil {
			c.Is = b.route.Parts()
		}
		if a.route != nil && b.route != nil {
			c.Moved = moved(a.route, b.route)
		}
		if len(c.Fields) > 0 || c.What != Edited {
			out = append(out, c)
		}
	}
	slices.SortFunc(out, func(a, b RouteChange) int { return strings.Compare(a.Of+" "+a.Route, b.Of+" "+b.Route) })
	return out, nil
}

type routeKey struct{ of, route string }

type flatRoute struct {
	fields map[string]string
	route  *route.Route
}

// routesOf lists the routes of a set, and what is said of all of a service under
// the empty name.
func routesOf(p *mesh.Policies) (map[routeKey]flatRoute, error) {
	snap, err := mesh.Compile(p, 1, 1, nil)
	if err != nil {
		return nil, err
	}
	table, err := route.Compile(snap, route.Options{})
	if err != nil {
		return nil, err
	}
	out := map[routeKey]flatRoute{}
	for set := range table.All {
		file := *set.File
		file.Routes = nil
		out[routeKey{file.Of(), ""}] = flatRoute{fields: fieldsOfNoun(file)}
		for i, r := range set.Routes {
			fields := fieldsOfNoun(*r.Route)
			fields["place in the file"] = fmt.Sprint(i + 1)
			out[routeKey{file.Of(), r.Name}] = flatRoute{fields, r}
		}
	}
	return out, nil
}

// moved counts of 10,000 keys those that another backend has.
func moved(a, b *route.Route) (n int) {
	var c route.Call
	for i := range mesh.Whole {
		binary.BigEndian.PutUint64(c.Trace[:], uint64(i)*0x9e3779b97f4a7c15)
		x, y := a.Spread(&c), b.Spread(&c)
		if p, q := x.Backend(0), y.Backend(0); p != nil && q != nil && p.Title() != q.Title() {
			n++
		}
	}
	return n
}
