package page

import (
	"cmp"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/chart"
	"sallyport/internal/control"
	"sallyport/internal/mesh"
)

// A view is one address of the page; data is what its template is given.
type view struct {
	path string
	data func(p *Page, r *http.Request, c *visitor) (any, error)
	// still says that it changes when it is asked for anew only.
	still bool
}

var views = []view{
	{path: "denied", data: (*Page).deniedView},
	{path: "map", data: (*Page).mapView},
	{path: "services", data: (*Page).servicesView},
	{path: "service", data: (*Page).serviceView},
	{path: "rollouts", data: (*Page).rolloutsView},
	{path: "egress", data: (*Page).egressView},
	// What a search has found is not to move under the eyes.
	{path: "audit", data: (*Page).auditView, still: true},
	{path: "ca", data: (*Page).caView},
	{path: "doctor", data: (*Page).doctorView},
}

// pageRows is how many rows a table shows at once, and mapRows those above the
// drawing.
const (
	pageRows = 100
	mapRows  = 25
)

// spans are the stretches of time to choose from.
var spans = []struct {
	Text string
	Of   time.Duration
}{
	{"5m", 5 * time.Minute}, {"1h", time.Hour}, {"6h", 6 * time.Hour}, {"24h", 24 * time.Hour}, {"7d", 7 * 24 * time.Hour}, {"30d", 30 * 24 * time.Hour},
}

// span reads the stretch of time that a request asks for.
func (p *Page) span(r *http.Request) (text string, from, to time.Time, err error) {
	text = cmp.Or(r.FormValue("span"), "1h")
	for _, s := range spans {
		if s.Text == text {
			to = p.cfg.Now().UTC()
			return text, to.Add(-s.Of), to, nil
		}
	}
	return "", from, to, fmt.Errorf("%w: span %.20q is none of 5m, 1h, 6h, 24h, 7d and 30d", errAsk, text)
}

// A state is the address of a view with what it shows.
type state struct {
	path string
	q    url.Values
}

func stateOf(r *http.Request) state {
	path := r.URL.Path
	for _, prefix := range []string{"/view", "/live"} {
		path = strings.TrimPrefix(path, prefix)
	}
	return state{path, r.URL.Query()}
}

// With is the address with one value changed, gone when it is empty.
func (s state) With(key, value string) string {
	q := url.Values{}
	for k, v := range s.q {
		q[k] = v
	}
	q.Del("from")
	if q.Set(key, value); value == "" {
		q.Del(key)
	}
	if len(q) == 0 {
		return s.path
	}
	return s.path + "?" + q.Encode()
}

// Get is a value of the address.
func (s state) Get(key string) string { return s.q.Get(key) }

// deniedView is what was refused in a stretch of time.
func (p *Page) deniedView(r *http.Request, _ *visitor) (any, error) {
	text, from, _, err := p.span(r)
	if err != nil {
		return nil, err
	}
	var list []Denial
	n := uint64(0)
	find := strings.ToLower(r.FormValue("find"))
	for _, d := range p.cfg.Denials() {
		if d.Last.Before(from) || !strings.Contains(strings.ToLower(d.Identity+" "+d.Dst+" "+d.Path+" "+d.ID), find) {
			continue
		}
		n += d.N
		list = append(list, d)
	}
	slices.SortFunc(list, func(a, b Denial) int { return cmp.Or(b.Last.Compare(a.Last), cmp.Compare(a.ID, b.ID)) })
	status := p.cfg.Status()
	return map[string]any{
		"State": stateOf(r), "Span": text, "Spans": spans, "List": list[:min(len(list), pageRows)], "Kinds": len(list), "N": n, "Status": status,
		"Since": p.started, "Find": r.FormValue("find"),
	}, nil
}

// graph is the map as a request asks for it.
func (p *Page) graph(r *http.Request) (*chart.Graph, string, error) {
	text, from, to, err := p.span(r)
	if err != nil {
		return nil, "", err
	}
	c, err := p.chart(r.Context(), from, to)
	if err != nil {
		return nil, "", err
	}
	return chart.New(c), text, nil
}

// mapView is who calls whom: a table, and a drawing of it.
func (p *Page) mapView(r *http.Request, _ *visitor) (any, error) {
	g, text, err := p.graph(r)
	if err != nil {
		return nil, err
	}
	all := g
	data := map[string]any{
		"State": stateOf(r), "Span": text, "Spans": spans, "Focus": r.FormValue("focus"), "Show": cmp.Or(r.FormValue("show"), "all"),
		"Group": r.FormValue("group") != "", "From": g.From, "To": g.To,
	}
	if f := r.FormValue("focus"); f != "" {
		if end, ok := g.Find(f); ok {
			data["End"] = chart.Name(end)
			g = g.Focus(end)
		} else {
			data["Unknown"] = true
			g = &chart.Graph{From: g.From, To: g.To}
		}
	}
	if r.FormValue("group") != "" {
		g = g.Merge(chart.Group)
	}
	if g, err = shown(g, r.FormValue("show")); err != nil {
		return nil, err
	}
	g.Busiest()
	rows, more, err := p.paged(r, len(g.Links), mapRows)
	if err != nil {
		return nil, err
	}
	drawing := g.Draw()
	data["Counts"], data["Rows"], data["Links"], data["More"] = counts(all), len(g.Links), g.Links[rows[0]:rows[1]], more
	data["Seconds"], data["Drawing"] = g.Span().Seconds(), drawing
	if r.FormValue("than") != "" {
		data["Than"], data["Changes"], err = p.changes(r, all)
	}
	return data, err
}

// changes compares a graph with the same stretch of time some while before.
func (p *Page) changes(r *http.Request, now *chart.Graph) (string, []chart.Change, error) {
	text := r.FormValue("than")
	for _, s := range spans {
		if s.Text != text {
			continue
		}
		c, err := p.chart(r.Context(), now.From.Add(-s.Of), now.To.Add(-s.Of))
		if err != nil {
			return "", nil, err
		}
		list := chart.Diff(chart.New(c), now)
		return text, list[:min(len(list), pageRows)], nil
	}
	return "", nil, fmt.Errorf("%w: than %.20q is no time", errAsk, text)
}

// shown keeps the links that are asked for.
func shown(g *chart.Graph, show string) (*chart.Graph, error) {
	keep := map[string][]chart.State{
		"": {chart.Open, chart.Mixed, chart.Refused}, "all": {chart.Open, chart.Mixed, chart.Refused},
		"denied": {chart.Mixed, chart.Refused}, "unused": {chart.Unused},
	}[show]
	if keep == nil {
		return nil, fmt.Errorf("%w: show %.20q is none of all, denied and unused", errAsk, show)
	}
	out := &chart.Graph{From: g.From, To: g.To}
	for _, l := range g.Links {
		if slices.Contains(keep, l.State) {
			out.Links = append(out.Links, l)
		}
	}
	return out, nil
}

// counts are how many links there are of each state, and their calls.
func counts(g *chart.Graph) map[string]uint64 {
	n := map[string]uint64{}
	for _, l := range g.Links {
		n[string(l.State)]++
		n["calls"] += l.Allowed
		n["denied"] += l.Denied
		n["errors"] += l.Errors
	}
	return n
}

// paged are the rows of a table from the one that a request begins with, and
// which the next page begins with, 0 for none.
func (p *Page) paged(r *http.Request, n, size int) (rows [2]int, next int, err error) {
	from := 0
	if text := r.FormValue("from"); text != "" {
		if from, err = strconv.Atoi(text); err != nil || from < 0 {
			return rows, 0, fmt.Errorf("%w: from %.20q is no row", errAsk, text)
		}
	}
	from = min(from, n)
	to := min(from+size, n)
	if to < n {
		next = to
	}
	return [2]int{from, to}, next, nil
}

// A service is what the table of services says of one.
type service struct {
	Name, ID, Protocol string
	In                 chart.Link // the sum of what comes to it
	Rate               float64
	Callers            int
	Proxies            []mesh.Proxy
	// Worst is the state of the proxy that does worst, Expires when the first
	// SVID does.
	Worst   mesh.ProxyState
	Expires time.Time
	Cut     []mesh.EjectionSum // what its callers do not call of it
}

// services are all of the policy, with what the map says of them.
func (p *Page) services(g *chart.Graph) []*service {
	pol := p.cfg.Policies()
	if pol == nil {
		return nil
	}
	byID, byName := map[string]*service{}, map[mesh.ServiceName]*service{}
	var list []*service
	for _, s := range pol.Services {
		x := &service{Name: string(s.Name), ID: s.ID.String(), Protocol: s.Protocol}
		list = append(list, x)
		byID[x.ID], byName[s.Name] = x, x
	}
	callers := map[string]map[string]bool{}
	for _, l := range g.Links {
		x := byID[l.Dst]
		if x == nil || l.State == chart.Unused {
			continue
		}
		if callers[x.ID] == nil {
			callers[x.ID] = map[string]bool{}
		}
		callers[x.ID][l.Src] = true
	}
	for _, l := range g.Into().Links {
		if x := byID[l.Dst]; x != nil {
			x.In = l
		}
	}
	proxies := p.cfg.Proxies()
	for _, h := range mesh.SumEjections(proxies) {
		if x := byName[h.Service]; x != nil {
			x.Cut = append(x.Cut, h)
		}
	}
	for _, px := range proxies {
		if x := byID[px.Workload.String()]; x != nil {
			x.Proxies = append(x.Proxies, px)
		}
	}
	for _, x := range list {
		x.Callers, x.Rate = len(callers[x.ID]), x.In.Rate(g.Span())
		x.judge()
	}
	slices.SortFunc(list, func(a, b *service) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

// judge sums the proxies of a service up.
func (x *service) judge() {
	rank := map[mesh.ProxyState]int{mesh.Synced: 1, mesh.Stale: 2, mesh.Rejected: 3}
	for _, px := range x.Proxies {
		if rank[px.State] > rank[x.Worst] {
			x.Worst = px.State
		}
		if x.Expires.IsZero() || px.SVIDExpires.Before(x.Expires) {
			x.Expires = px.SVIDExpires
		}
	}
}

// servicesView is every service.
func (p *Page) servicesView(r *http.Request, _ *visitor) (any, error) {
	g, text, err := p.graph(r)
	if err != nil {
		return nil, err
	}
	list := p.services(g)
	find := strings.ToLower(r.FormValue("find"))
	list = slices.DeleteFunc(list, func(s *service) bool { return !strings.Contains(strings.ToLower(s.Name+" "+s.ID), find) })
	rows, more, err := p.paged(r, len(list), pageRows)
	if err != nil {
		return nil, err
	}
	return map[string]any{"State": stateOf(r), "Span": text, "Spans": spans, "List": list[rows[0]:rows[1]], "Rows": len(list), "More": more, "Find": r.FormValue("find")}, nil
}

// serviceView is one service, or another end of the map.
func (p *Page) serviceView(r *http.Request, _ *visitor) (any, error) {
	g, text, err := p.graph(r)
	if err != nil {
		return nil, err
	}
	end := r.FormValue("end")
	data := map[string]any{"State": stateOf(r), "Span": text, "Spans": spans, "End": end, "Seconds": g.Span().Seconds()}
	if end == "" {
		return nil, fmt.Errorf("%w: end is missing: the SPIFFE ID of a service", errAsk)
	}
	for _, s := range p.services(g) {
		if s.ID == end {
			data["Service"] = s
		}
	}
	for _, px := range p.cfg.Proxies() {
		if px.Workload.String() == end && data["Service"] == nil {
			x := &service{ID: end, Name: chart.Name(end), Proxies: []mesh.Proxy{px}}
			x.judge()
			data["Service"] = x
		}
	}
	near := g.Focus(end)
	near.Busiest()
	var callers, callees, unused []chart.Link
	for _, l := range near.Links {
		switch {
		case l.State == chart.Unused:
			unused = append(unused, l)
		case l.Dst == end:
			callers = append(callers, l)
		default:
			callees = append(callees, l)
		}
	}
	data["Callers"], data["Callees"], data["Unused"] = callers[:min(len(callers), pageRows)], callees[:min(len(callees), pageRows)], unused[:min(len(unused), pageRows)]
	windows, err := p.cfg.Windows(r.Context(), g.From, g.To, end)
	if err != nil {
		return nil, err
	}
	data["Curve"] = curveOf(windows, end)
	return data, nil
}

// rolloutsView is how the rollouts of routes stand, and that of the policies.
func (p *Page) rolloutsView(r *http.Request, c *visitor) (any, error) {
	list, err := p.cfg.Rollouts(r.Context())
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(list, func(a, b mesh.Delivery) int {
		if a.Active() != b.Active() {
			return map[bool]int{true: -1, false: 1}[a.Active()]
		}
		return b.Since.Compare(a.Since)
	})
	may, _ := p.mayMove(c)
	return map[string]any{"State": stateOf(r), "List": list, "May": may, "Status": p.cfg.Status()}, nil
}

// egressView is who reached which host outside.
func (p *Page) egressView(r *http.Request, _ *visitor) (any, error) {
	text, from, _, err := p.span(r)
	if err != nil {
		return nil, err
	}
	find := strings.ToLower(r.FormValue("find"))
	var list []Passage
	total := map[string]int64{}
	for _, x := range p.cfg.Passages() {
		if x.Opened.Before(from) && x.Completed.Before(from) || !strings.Contains(strings.ToLower(x.Src+" "+x.Dst+" "+x.Rule), find) {
			continue
		}
		list = append(list, x)
		total["up"] += x.Up
		total["down"] += x.Down
		total[x.State]++
	}
	slices.SortStableFunc(list, func(a, b Passage) int { return b.Opened.Compare(a.Opened) })
	held := slices.DeleteFunc(mesh.SumEjections(p.cfg.Proxies()), func(h mesh.EjectionSum) bool {
		return h.By != control.KindGateway || !strings.Contains(strings.ToLower(string(h.Service)), find)
	})
	rows, more, err := p.paged(r, len(list), pageRows)
	if err != nil {
		return nil, err
	}
	return map[string]any{"State": stateOf(r), "Span": text, "Spans": spans, "List": list[rows[0]:rows[1]], "Rows": len(list), "More": more, "Total": total, "Find": r.FormValue("find"), "Since": p.started, "Held": held[:min(len(held), pageRows)]}, nil
}

// auditView searches the records, and says how far each log is continuous.
func (p *Page) auditView(r *http.Request, c *visitor) (any, error) {
	text, from, _, err := p.span(r)
	if err != nil {
		return nil, err
	}
	q := r.URL.Query()
	f := audit.Filter{Kind: q.Get("kind"), Decision: q.Get("decision"), Src: q.Get("src"), Dst: q.Get("dst"), ID: q.Get("id"), Rule: q.Get("rule"), Since: from}
	if d := f.Decision; d != "" && d != audit.Allow && d != audit.Deny {
		return nil, fmt.Errorf("%w: decision %.20q is neither allow nor deny", errAsk, d)
	}
	data := map[string]any{"State": stateOf(r), "Span": text, "Spans": spans, "Filter": f, "Kinds": kinds}
	if data["Logs"], err = p.cfg.Logs(r.Context()); err != nil {
		return nil, err
	}
	end, ok := p.crowd.begin(c, "search", maxSearchesEach)
	if !ok {
		return nil, errBusy
	}
	defer end()
	data["Found"], err = p.cfg.Search(r.Context(), f)
	return data, err
}

// kinds are those that a search offers.
var kinds = []audit.Kind{
	audit.KindDecision, audit.KindRollup, audit.KindEgressOpen, audit.KindEgressClose, audit.KindTLS, audit.KindAttest, audit.KindIssue,
	audit.KindPolicy, audit.KindAdmin, audit.KindGap, audit.KindError, audit.KindShadow, audit.KindName,
}

// caView is the CA, and the proxies by what is left of their SVIDs.
func (p *Page) caView(r *http.Request, _ *visitor) (any, error) {
	proxies := p.cfg.Proxies()
	slices.SortStableFunc(proxies, func(a, b mesh.Proxy) int { return a.SVIDExpires.Compare(b.SVIDExpires) })
	states := map[string]int{}
	for _, x := range proxies {
		states[string(x.State)]++
	}
	roots := p.cfg.Roots()
	rows, more, err := p.paged(r, len(proxies), pageRows)
	if err != nil {
		return nil, err
	}
	return map[string]any{
		"State": stateOf(r), "Roots": roots, "Proxies": proxies[rows[0]:rows[1]], "Rows": len(proxies), "More": more, "States": states, "Status": p.cfg.Status(),
		"Phases": []string{"steady", "prepared", "activated", "tainted"}, "Share": shareOf(roots),
	}, nil
}

// shareOf is how many proxies of a hundred are ready for the next step.
func shareOf(s control.RootStatus) int {
	if s.Live == 0 {
		return 0
	}
	return 100 * s.Confirmed / s.Live
}
