package mesh

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"time"
)

// Bounds of what a file of routes may hold: a proxy keeps all of it compiled.
const (
	maxRoutes      = 10_000
	maxMatches     = 64
	maxBackends    = 16
	maxFields      = 32
	maxNamed       = 16
	maxPattern     = 1024
	maxWeight      = 1_000_000
	maxRespond     = 64 << 10
	maxFaultWindow = 24 * time.Hour
)

// A routeChecker looks at one file of routes.
type routeChecker struct {
	*validator
	file *Routes
	// at is the route that is looked at, or the file.
	at Origin
	// tcp is true of a service that speaks it; strange of one that nobody knows.
	tcp, strange bool
	// known and groups are the services and groups of callers of the set.
	known    map[ServiceName]*Service
	groups   map[string]bool
	all      map[string]*Routes
	faults   map[string]Origin
	shadows  map[string]Origin
	patterns int
}

// say records a mistake at the text near.
func (c *routeChecker) say(near, format string, args ...any) { c.item(c.at, near, format, args...) }

// within records a value that is not in its range.
func within[T int | int64 | time.Duration](c *routeChecker, field string, n, low, high T) {
	if n < low || n > high {
		c.say(field[strings.LastIndexByte(field, '.')+1:]+":", "%s: %v is not from %v to %v", field, n, low, high)
	}
}

// word records a value that is none of those known.
func (c *routeChecker) word(field, s string, known ...string) {
	if s != "" && !slices.Contains(known, s) {
		c.say(s, "%s: unknown %q%s", field, clip(s), didYouMean(s, known))
	}
}

func (v *validator) routes() {
	if len(v.p.Routes) == 0 {
		return
	}
	c := routeChecker{validator: v, known: map[ServiceName]*Service{}, groups: map[string]bool{}, all: map[string]*Routes{}}
	for i := range v.p.Services {
		c.known[v.p.Services[i].Name] = &v.p.Services[i]
	}
	for _, m := range v.p.Memberships {
		c.groups[m.Group] = true
	}
	seen := map[string]Origin{}
	for i := range v.p.Routes {
		r := &v.p.Routes[i]
		c.all[r.Of()] = r
		if r.Service != "" || r.Host != "" {
			twice(v, seen, r.Of(), r.Origin, "routes of")
		}
	}
	for i := range v.p.Routes {
		c.check(&v.p.Routes[i])
	}
}

func (c *routeChecker) check(r *Routes) {
	c.file, c.at, c.tcp, c.strange = r, r.Origin, false, false
	c.faults, c.shadows = map[string]Origin{}, map[string]Origin{}
	c.ofWhat()
	c.subsets()
	c.choice()
	if len(r.Routes) > maxRoutes {
		c.say("routes:", "%d routes are more than %d", len(r.Routes), maxRoutes)
		return
	}
	names := map[string]Origin{}
	for i := range r.Routes {
		rt := &r.Routes[i]
		c.at = rt.Origin
		switch {
		case rt.Name == "":
			c.missing(rt.Origin, "name")
		case !plainWord(rt.Name, 63):
			c.say(rt.Name, "name %q is not 1 to 63 letters, digits, hyphens, dots or underscores", clip(rt.Name))
		default:
			twice(c.validator, names, rt.Name, rt.Origin, "route")
		}
		c.route(rt)
	}
}

// ofWhat checks whose routes they are.
func (c *routeChecker) ofWhat() {
	r := c.file
	switch svc := c.known[r.Service]; {
	case r.Service != "" && r.Host != "":
		c.say("host:", "service and host are both there: a file is of one of them")
	case r.Service == "" && r.Host == "":
		if !c.spoiled[r.Origin]["service"] && !c.spoiled[r.Origin]["host"] {
			c.say("", "service is missing, or host for one outside of the mesh")
		}
	case svc != nil:
		c.tcp = svc.Protocol == TCP
	case r.Service != "":
		c.strange = true
		c.unknownService("service", r.Service)
	default:
		if err := CheckHost(r.Host); err != nil {
			c.say(r.Host, "host: %s", err)
		} else if !c.destination(r.Host) {
			c.say(r.Host, "host %q is no destination: write it into %s first", r.Host, egressFile)
		} else if len(r.Subsets) == 0 {
			c.notYet(r.Host, "a route to a host outside", egressFile+" says how it is reached")
		}
	}
}

// destination says whether a host is known, or may be for what is at hand.
func (c *routeChecker) destination(host string) bool {
	return c.partial || c.valuesOnly || slices.ContainsFunc(c.p.Destinations, func(d Destination) bool { return MatchHost(d.Host, host) })
}

// unknownService reports a name that no service has. A projection leaves
// services out.
func (c *routeChecker) unknownService(field string, name ServiceName) {
	if !c.partial && !c.valuesOnly {
		c.say(string(name), "%s: no service is called %q%s", field, clip(string(name)), serviceHint(string(name), c.p.Services))
	}
}

func (c *routeChecker) subsets() {
	if len(c.file.Subsets) > 0 && c.file.Host != "" {
		c.say("subsets:", "subsets are of endpoints of the mesh: a host has none")
	}
	if len(c.file.Subsets) > maxMatches {
		c.say("subsets:", "%d subsets are more than %d", len(c.file.Subsets), maxMatches)
	}
	seen := map[string]Origin{}
	for _, s := range c.file.Subsets {
		if !plainWord(s.Name, 63) {
			c.say("subsets:", "subset %q: a name is 1 to 63 letters, digits, hyphens, dots or underscores", clip(s.Name))
		} else {
			twice(c.validator, seen, s.Name, c.at, "subset")
		}
		if len(s.Labels) == 0 {
			c.say(s.Name, "subset %q has no labels: it would be the whole service", clip(s.Name))
		}
		if _, err := NewLabels(s.Labels); err != nil {
			c.say(s.Name, "subset %q: %s", clip(s.Name), err)
		}
	}
}

func (c *routeChecker) route(r *Route) {
	c.matches("matches", r.Matches)
	answers := 0
	for _, there := range []bool{len(r.Backends) > 0, r.Redirect != nil, r.Respond != nil} {
		if there {
			answers++
		}
	}
	if answers > 1 {
		c.say("", "backends, redirect and respond are more than one: a call has one end")
	}
	c.backends(r)
	c.plan(r)
	if r.Redirect != nil {
		c.redirect(r)
	}
	if r.Respond != nil {
		c.respond(r.Respond)
	}
	if s := r.Sticky; s != nil {
		c.sticky("sticky", s)
	}
	c.rewrite(r)
	c.edit("answer", r.Answer)
	if r.CORS != nil {
		c.cors(r.CORS)
	}
	c.patience(r)
	c.disturbances(r)
	if r.Translate != nil {
		c.translate(r.Translate)
	}
	if r.Keeps() {
		c.keeping(r)
	}
	c.fits(r)
}

// fits refuses what has no meaning beside the rest of the route.
func (c *routeChecker) fits(r *Route) {
	type part struct {
		field string
		there bool
	}
	parts := []part{
		{"sticky", r.Sticky != nil}, {"rewrite", r.Rewrite.set()}, {"timeouts", r.Timeouts != Timeouts{}},
		{"retry", r.Retry != nil}, {"hedge", r.Hedge != nil}, {"faults", len(r.Faults) > 0},
		{"shadows", len(r.Shadows) > 0}, {"translate", r.Translate != nil}, {"limit", r.Limit != nil}, {"rollout", r.Plan != nil},
		{"audit", r.Audit != ""}, {"fail", r.Fail != ""},
	}
	what := ""
	switch {
	case c.tcp:
		what = "the service speaks tcp, whose bytes nobody reads"
		parts = []part{
			{"redirect", r.Redirect != nil}, {"respond", r.Respond != nil}, {"rewrite", r.Rewrite.set()}, {"answer", r.Answer.set()}, {"cors", r.CORS != nil},
			{"hedge", r.Hedge != nil}, {"shadows", len(r.Shadows) > 0}, {"translate", r.Translate != nil}, {"limit", r.Limit != nil}, {"rollout", r.Plan != nil},
			{"audit", r.Audit != ""}, {"fail", r.Fail != ""},
		}
	case r.Redirect != nil:
		what = "redirect answers every call itself"
	case r.Respond != nil:
		what = "respond answers every call itself"
	default:
		return
	}
	for _, p := range parts {
		if p.there {
			c.say(p.field+":", "%s has no meaning here: %s", p.field, what)
		}
	}
}

func (f FieldEdit) set() bool { return len(f.Set)+len(f.Add)+len(f.Remove) > 0 }

func (r Rewrite) set() bool {
	return r.Host != "" || r.Path != "" || r.Prefix != "" || r.Fields.set()
}

func (c *routeChecker) backends(r *Route) {
	if len(r.Backends) > maxBackends {
		c.say("backends:", "%d backends are more than %d", len(r.Backends), maxBackends)
	}
	type key struct {
		service         ServiceName
		address, subset string
	}
	seen, total := map[key]bool{}, uint64(0)
	for _, b := range r.Backends {
		c.backend("backends", b)
		k := key{b.Service, b.Address, b.Subset}
		if k.service == "" {
			k.service = c.file.Service
		}
		if seen[k] {
			c.say("backends:", "backends: %s is written twice", c.nameOf(b))
		}
		seen[k] = true
		total += uint64(b.Weight)
		if b.Weight > maxWeight {
			c.say("weight:", "weight: %d is more than %d", b.Weight, maxWeight)
		}
	}
	if len(r.Backends) > 0 && total == 0 {
		c.say("backends:", "all weights are 0, so that nobody would get the calls: give one a weight, or write respond:")
	}
}

// nameOf is a backend as messages have it.
func (c *routeChecker) nameOf(b Backend) string {
	name := string(b.Service)
	if b.Address != "" {
		name = b.Address
	} else if name == "" {
		name = c.file.Of()
	}
	if b.Subset != "" {
		name += " (" + b.Subset + ")"
	}
	return fmt.Sprintf("%q", clip(name))
}

func (c *routeChecker) backend(field string, b Backend) {
	of := c.file.Service
	if b.Service != "" {
		of = b.Service
	}
	svc := c.known[of]
	switch {
	case b.Service != "" && b.Address != "":
		c.say(b.Address, "%s: service and address are both there", field)
	case c.file.Host != "" && b.Service != "":
		c.say(string(b.Service), "%s: %q is of the mesh: calls to a host go to addresses outside of it", field, clip(string(b.Service)))
	case c.file.Host == "" && b.Address != "":
		c.say(b.Address, "%s: address %q leads out of the mesh: calls to a service stay in it", field, clip(b.Address))
	case b.Address != "":
		c.address(field, b.Address)
	case b.Service != "" && svc == nil:
		c.unknownService(field, b.Service)
	case svc != nil && !c.strange && c.file.Service != "" && (svc.Protocol == TCP) != c.tcp:
		c.say(string(b.Service), "%s: service %q speaks another protocol", field, b.Service)
	}
	if b.Subset == "" || c.file.Host != "" && b.Subset == "" {
		return
	}
	subsets := c.all[string(of)]
	if c.partial && subsets == nil || c.valuesOnly {
		return
	}
	if subsets.Subset(b.Subset) == nil {
		var names []string
		if subsets != nil {
			for _, s := range subsets.Subsets {
				names = append(names, s.Name)
			}
		}
		hint := ": the routes of that service define none"
		if len(names) > 0 {
			hint = didYouMean(b.Subset, names)
		}
		c.say(b.Subset, "%s: service %q has no subset %q%s", field, of, clip(b.Subset), hint)
	}
}

func (c *routeChecker) address(field, address string) {
	host, port, err := net.SplitHostPort(address)
	if err == nil {
		err = CheckHost(host)
	}
	if err == nil {
		err = checkPort(port)
	}
	switch {
	case err != nil || port == "*":
		c.say(address, "%s: address %q is not a host name and a port", field, clip(address))
	case !c.destination(host):
		c.say(address, "%s: host %q is no destination: write it into %s first", field, host, egressFile)
	}
}
