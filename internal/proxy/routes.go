package proxy

import (
	"bytes"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/route"
	"sallyport/internal/telemetry"
)

// A policy is what the way out has made of the routes of one snapshot.
type policy struct {
	snap  *mesh.Snapshot
	table *route.Table
	// ways are where backends and own answers lead, by their IDs, filled when
	// first taken; changes are of routes, by theirs.
	ways    []atomic.Pointer[way]
	changes []*change
	// plans, faults and quotas are of routes, by their IDs.
	plans  []*plan
	faults [][]*fault
	quotas []*quota
	// paces are those of the plans that have one, by what they are of.
	paces map[paceKey]*pace
	// sides are of backends, by their IDs; nil when no rollout is under way.
	sides []*side
	// broken is why the routes mean nothing; no call is then made.
	broken error
}

// A way is where the calls of a route, or of one of its backends, go.
type way struct {
	name   mesh.ServiceName
	host   []byte
	dst    string
	series *telemetry.Series
	stream mesh.Stream
}

// A change is what a route does to the heads of its calls.
type change struct {
	drop, dropAnswer   *http1.NameSet
	lines, linesAnswer []byte
}

// Prepare makes ready what was compiled of a snapshot, which Snapshot is about
// to give.
func (o *Outbound) Prepare(snap *mesh.Snapshot, table *route.Table) {
	o.keeping.Lock()
	defer o.keeping.Unlock()
	o.keep(newPolicy(snap, table))
}

// keep remembers a policy beside the one before, for calls that still go by it.
// The caller holds keeping.
func (o *Outbound) keep(p *policy) *policy {
	now := time.Now()
	o.faults.use(now, p)
	o.quotas.use(now, p)
	o.samples.use(p)
	before := (*policy)(nil)
	if kept := o.kept.Load(); kept != nil {
		before = kept[0]
	}
	p.keepPace(before)
	o.kept.Store(&[2]*policy{p, before})
	return p
}

// policyOf is what was made of a snapshot.
func (o *Outbound) policyOf(snap *mesh.Snapshot) *policy {
	if p := o.remembered(snap); p != nil {
		return p
	}
	o.keeping.Lock()
	defer o.keeping.Unlock()
	if p := o.remembered(snap); p != nil {
		return p
	}
	table, err := route.Compile(snap, route.Options{Region: o.cfg.Region})
	p := newPolicy(snap, table)
	p.broken = err
	if o.cfg.Snapshot() != snap {
		// Others have come since the call looked: it goes by what it saw, and
		// that does not come into force again.
		o.faults.lend(p)
		o.quotas.lend(time.Now(), p)
		return p
	}
	return o.keep(p)
}

func (o *Outbound) remembered(snap *mesh.Snapshot) *policy {
	if kept := o.kept.Load(); kept != nil {
		for _, p := range kept {
			if p != nil && p.snap == snap {
				return p
			}
		}
	}
	return nil
}

func newPolicy(snap *mesh.Snapshot, table *route.Table) *policy {
	p := &policy{snap: snap, table: table}
	if table == nil || table.Empty() {
		return p
	}
	p.ways, p.changes = make([]atomic.Pointer[way], table.Size()), make([]*change, table.Size())
	p.plans, p.faults, p.quotas = make([]*plan, table.Size()), make([][]*fault, table.Size()), make([]*quota, table.Size())
	for set := range table.All {
		for _, r := range set.Routes {
			p.changes[r.ID], p.plans[r.ID] = changeOf(r), planOf(r.Route)
		}
	}
	return p
}

// of are the routes of a service, nil for none.
func (p *policy) of(name mesh.ServiceName) *route.Set {
	if p.broken != nil || p.table == nil {
		return nil
	}
	return p.table.Of(name)
}

func changeOf(r *route.Route) *change {
	c := &change{}
	c.drop, c.lines = editOf(r.Rewrite.Fields)
	if r.Rewrite.Host != "" {
		c.lines = append(c.lines, "Sallyport-Host: "+r.Rewrite.Host+"\r\n"...)
	}
	names := []string{}
	c.dropAnswer, c.linesAnswer = editOf(r.Answer)
	if r.CORS != nil {
		names = append(names, "access-control-*")
		for n := range r.Answer.Set {
			names = append(names, n)
		}
		c.dropAnswer = http1.NewNameSet(append(names, r.Answer.Remove...)...)
	}
	return c
}

// editOf is what an edit drops, nil for nothing, and what it adds.
func editOf(e mesh.FieldEdit) (drop *http1.NameSet, lines []byte) {
	names := append([]string{}, e.Remove...)
	for _, m := range []map[string]string{e.Set, e.Add} {
		for name, value := range m {
			lines = append(lines, name+": "+value+"\r\n"...)
		}
	}
	for name := range e.Set {
		names = append(names, name)
	}
	if len(names) > 0 {
		drop = http1.NewNameSet(names...)
	}
	return drop, lines
}

// direct takes the route of the call, if its service has routes: it fixes where
// the call goes and how its heads change, or answers it.
func (d *door) direct(x *call) *refusal {
	t := &x.known
	if t.policy != nil && t.policy.broken != nil {
		x.err = t.policy.broken
		return &refusal{status: 503, reason: "no_policy", detail: "the routes in force mean nothing to this proxy"}
	}
	if t.routes == nil {
		return nil
	}
	preflight := d.seen(x)
	ch := t.routes.Match(&x.look)
	if preflight {
		if ch.Route == nil || ch.Route.CORS == nil {
			x.look.Method = x.req.Method
			ch = t.routes.Match(&x.look)
			preflight = false
		}
	}
	if r := x.unchecked(); r != nil || ch.Route == nil {
		return r
	}
	r := d.follow(x, &ch)
	if r != nil && r.decision != "" {
		return r
	}
	if cors := ch.Route.CORS; cors != nil {
		x.allowOrigin(cors, preflight)
	}
	if preflight {
		return &refusal{status: http.StatusOK, reason: "preflight", own: true}
	}
	if r == nil {
		x.ex.ToDown.Extra = x.lines
	}
	return r
}

// seen tells the matcher of the call. Before a browser makes a call it asks
// whether it may: what it asks for is matched by the method it asks about.
func (d *door) seen(x *call) (preflight bool) {
	c := &x.look
	c.Method, c.Path, c.Query, c.Fields = x.req.Method, x.req.Path, x.req.RawQuery, x.req.Fields
	c.Caller, c.Trace, c.Addr, c.Claim = d.self, x.trace.ID, netip.Addr{}, x.claimer
	if x.opaque {
		c.Fields, c.Query, c.Claim = nil, nil, nil
	} else if bytes.IndexByte(c.Path, ';') >= 0 {
		c.Path = []byte(x.req.PathText())
	}
	if d.cfg.KeepForwardedFor && !x.opaque {
		if through := forwardedFor(x.req.Fields); len(through) > 0 {
			c.Addr = through[len(through)-1]
		}
	}
	if !c.Addr.IsValid() {
		c.Addr = x.from()
	}
	if x.opaque || string(c.Method) != "OPTIONS" || x.req.Get("origin") == nil {
		return false
	}
	if asked := x.req.Get("access-control-request-method"); len(asked) > 0 {
		c.Method = asked
		return true
	}
	return false
}

// from is the address at the other end of the connection, read once.
func (x *call) from() netip.Addr {
	if !x.fromAddr.IsValid() {
		x.fromAddr = addrOf(x.remote).Addr().Unmap()
	}
	return x.fromAddr
}

// follow does what the route says.
func (d *door) follow(x *call, ch *route.Choice) *refusal {
	r, p := ch.Route, x.known.policy
	b := d.backend(ch)
	id, name := r.ID, x.known.name
	if b != nil {
		id, name = b.ID, mesh.ServiceName(b.Name)
	}
	w := p.ways[id].Load()
	if w == nil {
		svc, ok := p.snap.Service(name)
		if !ok {
			return d.deny(d.about(x, "no_route", "route "+r.Name+" leads to "+string(name)+", which this workload may not call"))
		}
		proto := telemetry.ProtoHTTP
		if x.opaque {
			proto = telemetry.ProtoTCP
		}
		dst := svc.ID.String()
		w = &way{name: name, host: []byte(string(name) + "." + mesh.Domain), dst: dst, stream: svc.Stream, series: d.Signals.SeriesOf(proto, x.src, dst, string(x.known.name)+"/"+r.Name)}
		p.ways[id].Store(w)
	}
	x.routed = target{snap: p.snap, name: w.name, dst: w.dst, series: w.series, stream: w.stream, policy: p, routes: x.known.routes, route: r}
	x.to, x.dst = &x.routed, w.dst
	if x.running != nil { // a stream, which counts as running where it was meant to go
		x.running.End()
		x.running = nil
	}
	x.series = w.series
	if x.opaque {
		x.runs()
	}
	if b != nil {
		x.routed.subset = b.Subset
		if p.sides != nil {
			x.routed.side = p.sides[b.ID]
		}
		if w.name != x.known.name {
			x.ex.ToUp.Authority = w.host
		}
	}
	c := p.changes[r.ID]
	x.ex.ToUp.Also, x.ex.ToDown.Also = c.drop, c.dropAnswer
	x.extra, x.lines = append(x.extra, c.lines...), append(x.lines, c.linesAnswer...)
	switch {
	case r.Redirect != nil:
		return x.redirect(r.Redirect, ch.Prefix)
	case r.Respond != nil:
		return respond(r.Respond)
	}
	if to := &r.Rewrite; to.Path != "" || to.Prefix != "" {
		x.pathBuf = route.AppendPath(x.pathBuf[:0], x.look.Path, to.Path, to.Prefix, ch.Prefix)
		x.ex.ToUp.Path = x.pathBuf
	}
	return nil
}

// backend is the one of the first priority whose choice is well, or of the first
// when none is.
func (d *door) backend(ch *route.Choice) *route.Backend {
	for level := 1; level < ch.Levels(); level++ {
		if b := ch.Backend(level - 1); b == nil || d.cfg.Services.Well(mesh.ServiceName(b.Name), b.Subset) {
			return b
		}
		if b := ch.Backend(level); d.cfg.Services.Well(mesh.ServiceName(b.Name), b.Subset) {
			return b
		}
	}
	return ch.Backend(0)
}

// redirect tells the client where to go instead. Without a scheme it is the one
// that the client has used.
func (x *call) redirect(r *mesh.Redirect, prefix int) *refusal {
	b := []byte("Location: ")
	if r.Scheme != "" {
		b = append(append(b, r.Scheme...), ':')
	}
	if r.Scheme != "" || r.Host != "" || r.Port != 0 {
		host, _, _ := strings.Cut(x.req.AuthorityText(), ":")
		if x.req.Authority[0] == '[' {
			host, _, _ = strings.Cut(x.req.AuthorityText(), "]")
			host += "]"
		}
		if r.Host != "" {
			host = r.Host
		}
		b = append(append(b, "//"...), host...)
		if r.Port != 0 {
			b = strconv.AppendUint(append(b, ':'), uint64(r.Port), 10)
		}
	}
	if r.Path != "" || r.Prefix != "" {
		b = route.AppendPath(b, x.look.Path, r.Path, r.Prefix, prefix)
	} else {
		b = append(b, x.look.Path...)
	}
	if len(x.req.RawQuery) > 0 {
		b = append(append(b, '?'), x.req.RawQuery...)
	}
	return &refusal{status: r.Status, reason: "redirect", own: true, head: string(append(b, '\r', '\n')), detail: "the method is elsewhere"}
}

func respond(r *mesh.Respond) *refusal {
	head := ""
	if r.Body != "" {
		kind := r.Type
		if kind == "" {
			kind = "text/plain; charset=utf-8"
		}
		head = "Content-Type: " + kind + "\r\n"
	}
	return &refusal{status: r.Status, reason: "respond", own: true, head: head, body: r.Body, detail: r.Body}
}

// allowOrigin adds what the Fetch standard has a server say to a script of
// another origin. To one that may not call it says nothing, and the browser
// refuses by itself.
func (x *call) allowOrigin(c *mesh.CORS, preflight bool) {
	origin := x.req.Get("origin")
	every := len(c.Origins) == 1 && c.Origins[0] == "*"
	b := x.lines
	if !every {
		b = append(b, "Vary: Origin\r\n"...) // whoever keeps the answer must know
	}
	if preflight {
		b = append(b, "Vary: Access-Control-Request-Method, Access-Control-Request-Headers\r\n"...)
	}
	if len(origin) > 0 && allows(c.Origins, origin) {
		b = append(b, "Access-Control-Allow-Origin: "...)
		if every {
			b = append(b, '*')
		} else {
			b = append(b, origin...)
		}
		b = append(b, '\r', '\n')
		if c.Credentials {
			b = append(b, "Access-Control-Allow-Credentials: true\r\n"...)
		}
		if !preflight {
			b = appendList(b, "Access-Control-Expose-Headers: ", c.Expose)
		} else {
			b = appendList(b, "Access-Control-Allow-Methods: ", c.Methods)
			b = appendList(b, "Access-Control-Allow-Headers: ", c.Headers)
			if c.MaxAge > 0 {
				b = append(strconv.AppendInt(append(b, "Access-Control-Max-Age: "...), int64(c.MaxAge.Seconds()), 10), '\r', '\n')
			}
		}
	}
	x.lines = b
}

func appendList(b []byte, name string, list []string) []byte {
	if len(list) == 0 {
		return b
	}
	return append(append(append(b, name...), strings.Join(list, ", ")...), '\r', '\n')
}

// allows says whether an origin is one of a list, in which "https://*.a.test"
// stands for one more label.
func allows(list []string, origin []byte) bool {
	for _, o := range list {
		before, after, wild := strings.Cut(o, "*")
		switch {
		case o == "*" || string(origin) == o:
			return true
		case !wild || len(origin) <= len(before)+len(after):
		case string(origin[:len(before)]) == before && string(origin[len(origin)-len(after):]) == after:
			label := origin[len(before) : len(origin)-len(after)]
			if !bytes.ContainsAny(label, "./:@") {
				return true
			}
		}
	}
	return false
}
