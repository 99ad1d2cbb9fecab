// Package pagetest invents a mesh for tests of the page: as many services as
// wanted, the same at every run, with something of everything that there is to
// see.
package pagetest

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/chart"
	"sallyport/internal/control"
	"sallyport/internal/mesh"
	"sallyport/internal/page"
)

// TD is the trust domain of the mesh.
var TD = spiffeid.RequireTrustDomainFromString("corp.example")

// A Mesh is invented.
type Mesh struct {
	edges []mesh.Edge
	now   time.Time

	mu         sync.Mutex // guards the fields below
	policies   *mesh.Policies
	deliveries []mesh.Delivery
	denials    []page.Denial
	// Calls are those of operators, in order; Refuse has their recording fail.
	Calls  []control.AdminCall
	Moves  []control.RolloutMove
	Refuse error
}

// namespaces are as many as a large mesh has.
var namespaces = []string{"shop", "pay", "stock", "search", "mail", "data", "ml", "edge", "auth", "ops", "web", "batch"}

var verbs = []string{"cart", "checkout", "catalog", "invoice", "ledger", "quote", "profile", "session", "feed", "index", "export", "report", "tax", "label", "parcel", "refund"}

// ID is the identity of service i.
func ID(i int) string {
	ns := namespaces[i%len(namespaces)]
	name := verbs[i/len(namespaces)%len(verbs)]
	if k := i / len(namespaces) / len(verbs); k > 0 {
		name = fmt.Sprintf("%s-%d", name, k+1)
	}
	return fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", TD.Name(), ns, name)
}

// New invents a mesh of n services that call three others each.
func New(n int, now time.Time) *Mesh {
	m := &Mesh{policies: &mesh.Policies{TrustDomain: TD}, now: now}
	for i := range n {
		id := spiffeid.RequireFromString(ID(i))
		m.policies.Services = append(m.policies.Services, mesh.Service{Name: mesh.ServiceName(fmt.Sprintf("%s-%s", chart.Group(ID(i)), chart.Name(ID(i)))), ID: id, Port: 8443, Protocol: mesh.HTTP})
		m.policies.Entries = append(m.policies.Entries, mesh.Entry{SPIFFEID: id})
		for k, to := range []int{2*i + 1, 2*i + 2, (7*i + 5) % n} {
			if to >= n || to == i {
				continue
			}
			m.policies.Rules = append(m.policies.Rules, mesh.Rule{ID: fmt.Sprintf("row-%d-%d", i, k), Dir: mesh.In, Src: ID(i), Dst: ID(to), Effect: mesh.Allow})
			if i%17 != 3 || k != 2 {
				m.edges = append(m.edges, edge(i, k, ID(i), ID(to), now))
			}
		}
	}
	m.edges = append(m.edges, mesh.Edge{Src: ID(1), Dst: "host:api.stripe.test", Proto: "tcp", Allowed: 4210, MTLS: true, First: now.Add(-time.Hour), Last: now.Add(-2 * time.Second)},
		mesh.Edge{Src: "", Dst: ID(0), Proto: "http", Denied: 12, First: now.Add(-time.Hour), Last: now.Add(-40 * time.Second)})
	m.deny()
	m.roll()
	return m
}

func edge(i, k int, src, dst string, now time.Time) mesh.Edge {
	e := mesh.Edge{Src: src, Dst: dst, Proto: "http", Allowed: uint64(90000 / (1 + i + 3*k)), MTLS: true, First: now.Add(-50 * time.Minute), Last: now.Add(-time.Duration(1+i%50) * time.Second)}
	if i%23 == 7 {
		e.Errors = e.Allowed / 40
	}
	switch {
	case i%41 == 5:
		e.Denied, e.Allowed = 90, 0
	case i%29 == 11:
		e.Denied = 7
	}
	if e.Allowed > 0 {
		at := mesh.Bucket(time.Duration(2+i%9) * time.Millisecond)
		e.Took.Count(at, uint32(e.Allowed-e.Allowed/50))
		e.Took.Count(at+9, uint32(e.Allowed/50))
	}
	return e
}

func (m *Mesh) deny() {
	for i, path := range []string{"/v1/charges/c-100", "/admin/export", "/v1/stock/77"} {
		d := page.Denial{N: uint64(130 / (1 + 4*i)), First: m.now.Add(-40 * time.Minute), Last: m.now.Add(-time.Duration(3+20*i) * time.Second)}
		d.ID, d.Time, d.Reason = fmt.Sprintf("k3v9q2-%d", 4410+i), d.Last, "no_rule"
		d.Identity, d.Dst, d.Port, d.Verb, d.Path, d.Dir = ID(3*i+1), ID(3*i), 8443, "POST", path, "in"
		d.Nearest = &authz.Tried{Rule: fmt.Sprintf("row-%d-1", 3*i+1), Origin: "access.csv:12", Effect: mesh.Allow, Field: authz.FieldPath, Want: "/v1/report", Got: path}
		d.Add = fmt.Sprintf("p, new-%d, in, %s, %s, 8443, POST, %s, -, allow", i+1, d.Identity, d.Dst, path)
		if i == 1 {
			d.Reason, d.Rule, d.Origin, d.Nearest, d.Add, d.NoAdd = "row", "guard-admin", "guardrails.csv:4", nil, "", "the deny row guard-admin beats every allow"
		}
		m.denials = append(m.denials, d)
	}
}

func (m *Mesh) roll() {
	m.deliveries = []mesh.Delivery{
		{
			Service: m.policies.Services[0].Name, Route: "default", State: mesh.Stepping, Step: 2, Share: 2500, By: "spiffe://corp.example/ns/ops/sa/deployer", Started: m.now.Add(-9 * time.Minute), Since: m.now.Add(-4 * time.Minute), Proxies: 12, Acked: 12,
			Plan:    mesh.Plan{Canary: mesh.Ref{Subset: "v2"}, Steps: []mesh.Step{{Share: 500}, {Share: 2500}, {Share: 10000}}},
			Verdict: mesh.Verdict{Verdict: mesh.Pass, Why: "the canary fails at most 0.3 % more calls than the others", Canary: mesh.Figure{Calls: 2410, Failed: 2, Latency: 9 * time.Millisecond}, Others: mesh.Figure{Calls: 7230, Failed: 7, Latency: 8 * time.Millisecond}},
		},
		{
			Service: m.policies.Services[1].Name, Route: "default", State: mesh.RolledBack, Step: 1, By: "local", Started: m.now.Add(-3 * time.Hour), Since: m.now.Add(-2 * time.Hour), Ended: m.now.Add(-2 * time.Hour),
			Plan: mesh.Plan{Canary: mesh.Ref{Subset: "v7"}, Steps: []mesh.Step{{Share: 1000}, {Share: 10000}}}, Why: "the canary failed 4.1 % of its calls, the others 0.1 %",
		},
	}
}

// Config is that of a page of the mesh.
func (m *Mesh) Config() page.Config {
	return page.Config{
		TrustDomain: TD, Status: m.status, Proxies: m.proxies, Policies: m.inForce, Chart: m.chart, Windows: m.windows,
		Denials: func() []page.Denial {
			m.mu.Lock()
			defer m.mu.Unlock()
			return append([]page.Denial(nil), m.denials...)
		}, Passages: m.passages,
		Rollouts: func(context.Context) ([]mesh.Delivery, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			return append([]mesh.Delivery(nil), m.deliveries...), nil
		},
		MoveRollout: m.move, Roots: m.roots, Logs: m.logs, Search: m.search, Admins: authz.NewAdmins(m.inForce, slog.New(slog.DiscardHandler)),
		OnAdmin: m.admin, Version: "v1.4.0 go1.26.5", Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return m.now },
	}
}

// Deny adds a denial, as news.
func (m *Mesh) Deny(path string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.denials[0]
	d.Path, d.Last, d.ID = path, m.now, "news-1"
	m.denials = append(m.denials, d)
}

func (m *Mesh) inForce() *mesh.Policies {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.policies
}

// Admin sets the rows of admin.csv.
func (m *Mesh) Admin(rows ...mesh.AdminRule) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := *m.policies
	p.Admin = rows
	m.policies = &p
}

func (m *Mesh) admin(_ context.Context, c control.AdminCall) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.Refuse != nil {
		return m.Refuse
	}
	m.Calls = append(m.Calls, c)
	return nil
}

func (m *Mesh) move(_ context.Context, r control.RolloutMove) (mesh.Delivery, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.Moves = append(m.Moves, r)
	for i := range m.deliveries {
		d := &m.deliveries[i]
		if d.Service != r.Service || d.Route != r.Route {
			continue
		}
		if !d.Active() {
			return *d, fmt.Errorf("%w: it is over", mesh.ErrDelivery)
		}
		if d.Step++; r.Move == "abort" {
			d.State, d.Share, d.Step = mesh.RolledBack, 0, 1
		}
		return *d, nil
	}
	return mesh.Delivery{}, mesh.ErrNotFound
}

func (m *Mesh) status() mesh.IssuerStatus {
	return mesh.IssuerStatus{TrustDomain: TD, Revision: 91, PolicyRevision: 42, PolicyHash: "9f2c", Started: m.now.Add(-26 * time.Hour)}
}

func (m *Mesh) proxies() (out []mesh.Proxy) {
	services := m.inForce().Services
	for i, s := range services {
		p := mesh.Proxy{
			Agent: spiffeid.RequireFromPath(TD, fmt.Sprintf("/spire/agent/join_token/node-%03d", i%40)), Workload: s.ID, Kind: "sidecar",
			Version: "v1.4.0 go1.26.5", SVIDExpires: m.now.Add(time.Duration(20+i%35) * time.Minute), PolicyRevision: 42, State: mesh.Synced, Connected: true, LastSeen: m.now,
		}
		if i%31 == 7 {
			p.Version = "v1.3.2 go1.26.4"
		}
		switch {
		case i == 4:
			p.Connected, p.LastSeen = false, m.now.Add(-10*time.Minute)
		case i%97 == 13:
			p.State, p.PolicyRevision = mesh.Stale, 41
		case i%211 == 17:
			p.State, p.Reason = mesh.Rejected, "routes/shop.yaml:3: unknown subset"
		}
		if i == 2 {
			p.Traffic = &mesh.Traffic{Ejections: []mesh.Ejection{{Service: services[0].Name, Address: netip.MustParseAddrPort("10.4.0.17:15006"), Kind: "ejected", Since: m.now.Add(-3 * time.Minute), Why: "5 of its last 6 answers were errors"}}}
		}
		out = append(out, p)
	}
	return append(out, mesh.Proxy{
		Agent: spiffeid.RequireFromPath(TD, "/spire/agent/join_token/edge"), Workload: spiffeid.RequireFromPath(TD, "/ns/edge/sa/gateway"), Kind: "gateway",
		Version: "v1.4.0 go1.26.5", SVIDExpires: m.now.Add(40 * time.Minute), PolicyRevision: 42, State: mesh.Synced, Connected: true, LastSeen: m.now,
		Traffic: &mesh.Traffic{Ejections: []mesh.Ejection{{Service: "host:api.bank.example", Kind: "open", Since: m.now.Add(-2 * time.Minute), Why: "5 consecutive failures"}}},
	})
}

func (m *Mesh) chart(_ context.Context, from, to time.Time) (mesh.Chart, error) {
	c := mesh.Chart{From: from, To: to, Edges: m.edges}
	if to.Before(m.now.Add(-30 * time.Minute)) { // before: a few links fewer
		c.Edges = m.edges[min(len(m.edges)/20+1, len(m.edges)):]
	}
	c.Unused = chart.NotCalled(chart.Pairs(m.inForce()), c.Edges)
	return c, nil
}

func (m *Mesh) windows(_ context.Context, _, to time.Time, _ string) (out []mesh.Window, err error) {
	to = to.Truncate(time.Minute)
	for i := range 60 {
		w := mesh.Window{From: to.Add(-time.Duration(60-i) * time.Minute), To: to.Add(-time.Duration(59-i) * time.Minute)}
		for k := range min(len(m.edges), 60) {
			e := m.edges[k]
			e.Allowed = e.Allowed/60 + uint64((i*i+13*k)%40)
			e.Errors = uint64(max(0, 14-(i-35)*(i-35)))
			w.Edges = append(w.Edges, e)
		}
		out = append(out, w)
	}
	return out, nil
}

func (m *Mesh) passages() []page.Passage {
	return []page.Passage{
		{ID: "gw01-1", Src: ID(1), Dst: "host:api.stripe.test", Port: 443, Rule: "bill-out-1", State: "closed", Opened: m.now.Add(-6 * time.Minute), Took: 42 * time.Second, Up: 18_204, Down: 1_402_113, Reason: "done", Completed: m.now.Add(-5 * time.Minute)},
		{ID: "gw01-2", Src: ID(1), Dst: "host:api.stripe.test", Port: 443, Rule: "bill-out-1", State: "open", Opened: m.now.Add(-70 * time.Second)},
		{ID: "gw01-3", Src: ID(4), Dst: "host:evil.test", Port: 443, Reason: "no_rule", State: "refused", Opened: m.now.Add(-9 * time.Second), Completed: m.now.Add(-9 * time.Second)},
	}
}

func (m *Mesh) roots() control.RootStatus {
	return control.RootStatus{
		Phase: "prepared", Pace: "hand", Since: m.now.Add(-time.Hour), Next: "activate", Confirmed: 37, Live: 40, Known: true, Stragglers: []string{ID(13), ID(17)},
		Authorities: []control.AuthorityStatus{
			{ID: "5b1e7c0d9a2f4e66b0c1", Kind: control.KindX509, Expires: m.now.Add(200 * 24 * time.Hour), Signs: true},
			{ID: "c07a11f3e8d95b42a6ee", Kind: control.KindX509, Expires: m.now.Add(365 * 24 * time.Hour), Next: true},
			{ID: "jwt-2026-11", Kind: control.KindJWT, Expires: m.now.Add(6 * 24 * time.Hour), Signs: true},
		},
	}
}

func (m *Mesh) logs(context.Context) ([]page.Log, error) {
	return []page.Log{
		{Name: "issuer", Seq: 90_211},
		{Name: "ns~shop~sa~cart@node-001", Seq: 1_204_551, Signed: 1_204_480, SignedAt: m.now.Add(-time.Second)},
		{Name: "ns~pay~sa~cart@node-002", Seq: 88_120, Signed: 88_100, SignedAt: m.now.Add(-2 * time.Second), Broken: true},
	}, nil
}

func (m *Mesh) search(_ context.Context, f audit.Filter) (page.Found, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out page.Found
	for i, d := range m.denials {
		r := audit.Record{Seq: uint64(i + 1), Time: d.Last, Kind: audit.KindDecision, ID: d.ID, Decision: audit.Deny, Reason: string(d.Reason), Rule: d.Rule, Src: d.Identity, Dst: d.Dst, Port: d.Port, Verb: d.Verb, Path: d.Path}
		if f.Match(&r) {
			out.Hits = append(out.Hits, page.Hit{Record: r, Log: "ns~shop~sa~cart@node-001"})
		}
	}
	return out, nil
}
