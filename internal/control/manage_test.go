package control

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

var (
	boss = spiffeid.RequireFromString("spiffe://corp.example/ns/ops/sa/boss")
	down = spiffeid.RequireFromString("spiffe://corp.example/ns/ops/sa/issuer-2")
	desk = spiffeid.RequireFromString("spiffe://corp.example/ns/ops/sa/desk")
)

// EditEntries is Keeper, for one edit after the other.
func (m *memory) EditEntries(_ context.Context, edits []mesh.EntryEdit) (out []mesh.EntryResult, _ error) {
	m.change(func() {
		for _, ed := range edits {
			e, err := m.editOne(ed)
			out = append(out, mesh.EntryResult{Entry: e, Err: err})
		}
	})
	return out, nil
}

func (m *memory) editOne(ed mesh.EntryEdit) (mesh.Entry, error) {
	at := slices.IndexFunc(m.entries, func(e mesh.Entry) bool { return e.ID == ed.ID })
	var old mesh.Entry
	switch {
	case ed.ID != "" && at < 0:
		return old, mesh.ErrNotFound
	case at >= 0:
		old = m.entries[at]
	}
	if old.Reviewed() {
		return old, fmt.Errorf("entry %s %w: %s", old.ID, mesh.ErrReviewed, old.Origin)
	}
	if ed.Delete {
		m.entries = slices.Delete(m.entries, at, at+1)
		return old, nil
	}
	e, err := ed.Change(old)
	if err != nil {
		return e, err
	}
	if err := mesh.CheckEntry(td, e); e.ID != "" && err != nil {
		return e, err
	}
	if e.ID == "" {
		e.ID = mesh.NewEntryID(e)
	}
	for i, other := range m.entries {
		if i != at && mesh.NewEntryID(other) == mesh.NewEntryID(e) {
			return other, mesh.ErrExists
		}
	}
	e.Revision++
	if at >= 0 {
		m.entries[at] = e
	} else {
		m.entries = append(m.entries, e)
	}
	return e, nil
}

// DeleteAgent is Keeper.
func (m *memory) DeleteAgent(_ context.Context, id spiffeid.ID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.agents, id)
	return nil
}

// rows is an AdminJudge: the desk may do everything with entries of the shop,
// and nobody may touch billing.
type rows struct{}

func (rows) JudgeAdmin(who spiffeid.ID, method string, on spiffeid.ID) (mesh.Effect, string) {
	switch {
	case on == billing:
		return mesh.Deny, "hands-off"
	case who == desk && strings.HasPrefix(method, "entry.") && strings.HasPrefix(on.Path(), "/ns/shop/"):
		return mesh.Allow, "desk"
	}
	return "", ""
}

func (rows) MayAdmin(who spiffeid.ID, method string) bool {
	return who == desk && strings.HasPrefix(method, "entry.")
}

// calls keeps what OnAdmin was told.
type calls struct {
	mu  sync.Mutex
	all []AdminCall
}

func (c *calls) note(_ context.Context, a AdminCall) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all = append(c.all, a)
	return nil
}

func (c *calls) list() []AdminCall {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.all)
}

// manageRig is an issuer whose entries name an admin and a downstream issuer.
func manageRig(t testing.TB, change ...func(*ServerConfig)) *rig {
	t.Helper()
	r := newRig(t, newCA(t, td))
	r.reg.change(func() {
		sel := []mesh.Selector{{Type: "unix", Value: "uid:9"}}
		r.reg.entries = append(r.reg.entries,
			mesh.Entry{ID: "e-boss", SPIFFEID: boss, ParentID: agentID("node-o"), Selectors: sel, Admin: true, Origin: mesh.Origin{File: "entries.yaml", Line: 7}},
			mesh.Entry{ID: "e-down", SPIFFEID: down, ParentID: agentID("node-o"), Selectors: sel, Downstream: true, Hint: "below"})
	})
	r.stop()
	r.start(append([]func(*ServerConfig){func(c *ServerConfig) { c.Keeper = r.reg }}, change...)...)
	return r
}

// raw is a connection as a stock SPIRE client has it, with a certificate or
// without.
func (r *rig) raw(cert *tls.Certificate) *grpc.ClientConn {
	r.t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(r.ca.root)
	cfg := &tls.Config{InsecureSkipVerify: true} // the server is not what these tests are about
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	cc, err := grpc.NewClient(r.addr, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { cc.Close() })
	return cc
}

// as is a connection of a workload.
func (r *rig) as(id spiffeid.ID) *grpc.ClientConn { return r.raw(r.ca.issue(r.t, id, newKey(r.t))) }

func TestWhoMayCallWhat(t *testing.T) {
	r := manageRig(t)
	_, h := r.joined("node-a")
	callers := map[string]*grpc.ClientConn{
		"anyone": r.raw(nil), "agent": r.raw(h.cert), "workload": r.as(payment),
		"admin": r.as(boss), "downstream": r.as(down), "local": r.admin().cc,
	}
	services := []grpc.ServiceDesc{
		agentv1.Agent_ServiceDesc, entryv1.Entry_ServiceDesc, svidv1.SVID_ServiceDesc, bundlev1.Bundle_ServiceDesc, trustdomainv1.TrustDomain_ServiceDesc,
		localauthorityv1.LocalAuthority_ServiceDesc, meshpb.Admin_ServiceDesc,
	}
	listed := map[string]bool{}
	for _, d := range services {
		for _, m := range d.Methods {
			method := "/" + d.ServiceName + "/" + m.MethodName
			listed[method] = true
			may, ok := rights[method]
			if !ok {
				t.Errorf("%s is in no one's right", method)
			}
			want := map[string]right{
				"anyone": toAnyone, "agent": toAnyone | toAgents, "workload": toAnyone,
				"admin": toAnyone | toAdmins, "downstream": toAnyone | toDownstream, "local": toAnyone | toLocal,
			}
			for _, who := range slices.Sorted(maps.Keys(callers)) {
				err := callers[who].Invoke(t.Context(), method, &emptypb.Empty{}, &emptypb.Empty{})
				if d.ServiceName == meshpb.Admin_ServiceDesc.ServiceName && who != "local" {
					if may&toNamed != 0 && status.Code(err) == codes.PermissionDenied {
						continue // no row names anybody here
					}
					// A stranger is refused before the method is looked for.
					if c := status.Code(err); c != codes.Unimplemented && (who != "anyone" || c != codes.PermissionDenied) {
						t.Errorf("%s as %s: %v, want it to be absent", method, who, err)
					}
					continue
				}
				if denied := status.Code(err) == codes.PermissionDenied; denied == (may&want[who] != 0) {
					t.Errorf("%s as %s: %v", method, who, err)
				}
			}
		}
	}
	for method := range rights {
		if strings.HasPrefix(method, "/spire.") && !listed[method] && !strings.Contains(method, "AttestAgent") && !strings.Contains(method, "SyncAuthorized") {
			t.Errorf("%s has a right and does not exist", method)
		}
	}
}

func wireEntry(id spiffeid.ID, node, selector string) *types.Entry {
	return &types.Entry{SpiffeId: idToWire(id), ParentId: idToWire(agentID(node)), Selectors: []*types.Selector{{Type: "unix", Value: selector}}}
}

func TestEntriesAreManagedByCalls(t *testing.T) {
	r := manageRig(t)
	for name, cc := range map[string]*grpc.ClientConn{"tls": r.as(boss), "socket": r.admin().cc} {
		t.Run(name, func(t *testing.T) {
			c, ctx := entryv1.NewEntryClient(cc), t.Context()
			bad := func(change func(*types.Entry)) *types.Entry {
				e := wireEntry(stock, "node-s", "uid:5")
				e.Id = "named"
				change(e)
				return e
			}
			made, err := c.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{
				Entries: []*types.Entry{
					wireEntry(stock, "node-s", "uid:5"),
					wireEntry(payment, "node-a", "uid:1000"),
					nil,
					bad(func(e *types.Entry) { e.SpiffeId = nil }),
					bad(func(e *types.Entry) { e.FederatesWith = []string{"not a name"} }),
					bad(func(e *types.Entry) { e.Selectors = []*types.Selector{{Type: "unix", Value: "path:/bin/x"}} }),
					bad(func(e *types.Entry) { e.X509SvidTtl = -1 }),
					bad(func(e *types.Entry) { e.ExpiresAt = 1 << 62 }),
				},
				OutputMask: &types.EntryMask{SpiffeId: true},
			})
			if err != nil {
				t.Fatal(err)
			}
			want := []codes.Code{codes.OK, codes.AlreadyExists, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument}
			for i, res := range made.Results {
				if codes.Code(res.Status.Code) != want[i] || (res.Entry != nil) != (i < 2) {
					t.Errorf("entry %d: %v %v, want %v", i, res.Status, res.Entry, want[i])
				}
			}
			id := made.Results[0].Entry.GetId()
			if made.Results[0].Entry.GetParentId() != nil || made.Results[1].Entry.GetId() != "e-pay" {
				t.Errorf("results %v", made.Results)
			}
			up, err := c.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{
				Entries:   []*types.Entry{{Id: id, Hint: "north", Admin: true}, {Id: "e-boss", Hint: "x"}, {Id: "gone"}, {}},
				InputMask: &types.EntryMask{Hint: true},
			})
			if err != nil {
				t.Fatal(err)
			}
			if e := up.Results[0].Entry; e.GetHint() != "north" || e.GetAdmin() || e.GetSpiffeId().GetPath() != stock.Path() {
				t.Errorf("updated %v, want the hint alone changed", up.Results[0])
			}
			if st := up.Results[1].Status; codes.Code(st.Code) != codes.FailedPrecondition || !strings.Contains(st.Message, "entries.yaml:7") {
				t.Errorf("a reviewed entry: %v, want where it stands", st)
			}
			if a, b := codes.Code(up.Results[2].Status.Code), codes.Code(up.Results[3].Status.Code); a != codes.NotFound || b != codes.InvalidArgument {
				t.Errorf("absent %v, without ID %v", a, b)
			}
			got, err := c.GetEntry(ctx, &entryv1.GetEntryRequest{Id: id})
			if err != nil || got.GetHint() != "north" || got.GetRevisionNumber() < 2 {
				t.Errorf("got %v, %v", got, err)
			}
			del, err := c.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{id, id + "x", "", "e-boss"}})
			if err != nil {
				t.Fatal(err)
			}
			for i, w := range []codes.Code{codes.OK, codes.NotFound, codes.InvalidArgument, codes.FailedPrecondition} {
				if codes.Code(del.Results[i].Status.Code) != w {
					t.Errorf("delete %d: %v, want %v", i, del.Results[i], w)
				}
			}
			if _, err := c.GetEntry(ctx, &entryv1.GetEntryRequest{Id: id}); status.Code(err) != codes.NotFound {
				t.Errorf("deleted entry: %v", err)
			}
		})
	}
}

func TestListsAreFilteredAndPaged(t *testing.T) {
	r := manageRig(t)
	c, ctx := entryv1.NewEntryClient(r.as(boss)), t.Context()
	sel := func(m types.SelectorMatch_MatchBehavior, values ...string) *types.SelectorMatch {
		out := &types.SelectorMatch{Match: m}
		for _, v := range values {
			out.Selectors = append(out.Selectors, &types.Selector{Type: "unix", Value: v})
		}
		return out
	}
	for _, tc := range []struct {
		name string
		f    *entryv1.ListEntriesRequest_Filter
		want string
	}{
		{"none", nil, "e-bill e-boss e-down e-gw e-pay"},
		{"by identity", &entryv1.ListEntriesRequest_Filter{BySpiffeId: idToWire(payment)}, "e-pay"},
		{"by parent", &entryv1.ListEntriesRequest_Filter{ByParentId: idToWire(agentID("node-o"))}, "e-boss e-down"},
		{"by parent and downstream", &entryv1.ListEntriesRequest_Filter{ByParentId: idToWire(agentID("node-o")), ByDownstream: wrapperspb.Bool(false)}, "e-boss"},
		{"by hint", &entryv1.ListEntriesRequest_Filter{ByHint: wrapperspb.String("below")}, "e-down"},
		{"exact", &entryv1.ListEntriesRequest_Filter{BySelectors: sel(types.SelectorMatch_MATCH_EXACT, "uid:1000", "uid:1000")}, "e-pay"},
		{"subset", &entryv1.ListEntriesRequest_Filter{BySelectors: sel(types.SelectorMatch_MATCH_SUBSET, "uid:1000", "uid:9")}, "e-boss e-down e-pay"},
		{"superset", &entryv1.ListEntriesRequest_Filter{BySelectors: sel(types.SelectorMatch_MATCH_SUPERSET, "uid:1000", "uid:9")}, ""},
		{"any", &entryv1.ListEntriesRequest_Filter{BySelectors: sel(types.SelectorMatch_MATCH_ANY, "uid:9", "uid:8")}, "e-boss e-down"},
		{"federated", &entryv1.ListEntriesRequest_Filter{ByFederatesWith: &types.FederatesWithMatch{TrustDomains: []string{"x.example"}}}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []string
			for token := ""; ; {
				resp, err := c.ListEntries(ctx, &entryv1.ListEntriesRequest{Filter: tc.f, PageSize: 2, PageToken: token, OutputMask: &types.EntryMask{}})
				if err != nil {
					t.Fatal(err)
				}
				for _, e := range resp.Entries {
					if e.SpiffeId != nil {
						t.Errorf("%v is not masked", e)
					}
					got = append(got, e.Id)
				}
				if token = resp.NextPageToken; token == "" {
					break
				}
			}
			if s := strings.Join(got, " "); s != tc.want {
				t.Errorf("got %q, want %q", s, tc.want)
			}
			b, _ := proto.Marshal(&entryv1.ListEntriesRequest{Filter: tc.f})
			var count entryv1.CountEntriesRequest
			if err := proto.Unmarshal(b, &count); err != nil {
				t.Fatal(err)
			}
			n, err := c.CountEntries(ctx, &count)
			if err != nil || int(n.Count) != len(got) {
				t.Errorf("count %v, %v, want %d", n, err, len(got))
			}
		})
	}
	for name, req := range map[string]*entryv1.ListEntriesRequest{
		"no selectors":  {Filter: &entryv1.ListEntriesRequest_Filter{BySelectors: &types.SelectorMatch{}}},
		"bad match":     {Filter: &entryv1.ListEntriesRequest_Filter{BySelectors: sel(9, "uid:1")}},
		"bad identity":  {Filter: &entryv1.ListEntriesRequest_Filter{BySpiffeId: &types.SPIFFEID{TrustDomain: "A B"}}},
		"negative page": {PageSize: -1},
		"long token":    {PageToken: strings.Repeat("x", 4096)},
	} {
		if _, err := c.ListEntries(ctx, req); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
}

func TestRowsMakeAnAdminsRightFiner(t *testing.T) {
	said := &calls{}
	r := manageRig(t, func(c *ServerConfig) { c.Admins, c.OnAdmin = rows{}, said.note })
	c, ctx := entryv1.NewEntryClient(r.as(desk)), t.Context()
	resp, err := c.ListEntries(ctx, &entryv1.ListEntriesRequest{})
	if err != nil || len(resp.Entries) != 1 || resp.Entries[0].Id != "e-pay" {
		t.Fatalf("the desk sees %v, %v, want the shop without billing", resp, err)
	}
	made, err := c.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{
		wireEntry(stock, "node-s", "uid:5"), wireEntry(egress, "node-s", "uid:6"), wireEntry(billing, "node-s", "uid:7"),
	}})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []codes.Code{codes.OK, codes.PermissionDenied, codes.PermissionDenied} {
		if codes.Code(made.Results[i].Status.Code) != want {
			t.Errorf("entry %d: %v, want %v", i, made.Results[i].Status, want)
		}
	}
	if text := made.Results[2].Status.Message; !strings.Contains(text, "hands-off") {
		t.Errorf("%q does not name the row", text)
	}
	if _, err := agentv1.NewAgentClient(r.as(desk)).ListAgents(ctx, &agentv1.ListAgentsRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("the desk lists agents: %v", err)
	}
	// A deny row binds the operator on the socket too.
	del, err := entryv1.NewEntryClient(r.admin().cc).BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{"e-bill"}})
	if err != nil || codes.Code(del.Results[0].Status.Code) != codes.PermissionDenied {
		t.Errorf("delete billing: %v, %v", del, err)
	}
	var got []string
	for _, a := range said.list() {
		got = append(got, fmt.Sprintf("%s %s %s %s %v", a.Caller.Path(), a.Method, a.On.Path(), a.Rule, a.Allowed))
	}
	for _, want := range []string{
		"/ns/ops/sa/desk entry.ListEntries   true",
		"/ns/ops/sa/desk entry.BatchCreateEntry /ns/shop/sa/inventory desk true",
		"/ns/ops/sa/desk entry.BatchCreateEntry /ns/shop/sa/billing hands-off false",
		"/ns/ops/sa/desk agent.ListAgents   false",
		" entry.BatchDeleteEntry /ns/shop/sa/billing hands-off false",
	} {
		if !slices.Contains(got, want) {
			t.Errorf("%q is not in the audit: %q", want, got)
		}
	}
}

func TestABannedAgentLosesItsStreamsAtOnce(t *testing.T) {
	r := manageRig(t)
	_, h := r.joined("node-a")
	c, ctx := agentv1.NewAgentClient(r.as(boss)), t.Context()
	st, err := meshpb.NewMeshClient(r.raw(h.cert)).Subscribe(ctx)
	if err != nil {
		t.Fatal(err)
	}
	hello := &meshpb.SubscribeRequest{Message: &meshpb.SubscribeRequest_Hello{Hello: &meshpb.Hello{Kind: KindSidecar, Workload: payment.String()}}}
	if err := st.Send(hello); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Recv(); err != nil {
		t.Fatal(err)
	}
	id := idToWire(agentID("node-a"))
	if _, err := c.BanAgent(ctx, &agentv1.BanAgentRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for err == nil {
		_, err = st.Recv()
	}
	if d := status.Convert(err).Details(); status.Code(err) != codes.PermissionDenied || len(d) != 1 || d[0].(*types.PermissionDeniedDetails).Reason != types.PermissionDeniedDetails_AGENT_BANNED {
		t.Errorf("stream ended with %v %v", err, d)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("the stream lived %s longer", took)
	}
	list, err := c.ListAgents(ctx, &agentv1.ListAgentsRequest{Filter: &agentv1.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(true), ByAttestationType: "join_token", ByCanReattest: wrapperspb.Bool(false)}})
	if err != nil || len(list.Agents) != 1 {
		t.Errorf("banned agents %v, %v", list, err)
	}
	if _, err := agentv1.NewAgentClient(r.raw(h.cert)).RenewAgent(ctx, &agentv1.RenewAgentRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a banned agent renews: %v", err)
	}
	if _, err := c.DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.GetAgent(ctx, &agentv1.GetAgentRequest{Id: id}); status.Code(err) != codes.NotFound {
		t.Errorf("a deleted agent: %v", err)
	}
	r.joined("node-a") // the ban is lifted
	for name, bad := range map[string]*types.SPIFFEID{"none": nil, "a workload": idToWire(payment), "foreign": {TrustDomain: "x.example", Path: "/spire/agent/a/b"}} {
		if _, err := c.BanAgent(ctx, &agentv1.BanAgentRequest{Id: bad}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("ban %s: %v", name, err)
		}
	}
	if n, err := c.CountAgents(ctx, &agentv1.CountAgentsRequest{Filter: &agentv1.CountAgentsRequest_Filter{ByExpiresBefore: "2100-01-01 00:00:00 +0000 +00"}}); err != nil || n.Count != 1 {
		t.Errorf("count %v, %v", n, err)
	}
	if _, err := c.CountAgents(ctx, &agentv1.CountAgentsRequest{Filter: &agentv1.CountAgentsRequest_Filter{ByExpiresBefore: "soon"}}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a time that is none: %v", err)
	}
}

func TestAnOperatorMintsSVIDs(t *testing.T) {
	r := manageRig(t)
	c, ctx, key := svidv1.NewSVIDClient(r.as(boss)), t.Context(), newKey(t)
	csr := func(uris ...string) []byte {
		tmpl := &x509.CertificateRequest{DNSNames: []string{"once.mesh.internal"}}
		for _, s := range uris {
			u, err := url.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			tmpl.URIs = append(tmpl.URIs, u)
		}
		der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	resp, err := c.MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr(stock.String()), Ttl: 60})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(resp.Svid.CertChain[0])
	if err != nil || leaf.URIs[0].String() != stock.String() || leaf.DNSNames[0] != "once.mesh.internal" || time.Until(leaf.NotAfter) > time.Minute {
		t.Errorf("minted %v, %v", leaf, err)
	}
	for name, req := range map[string]*svidv1.MintX509SVIDRequest{
		"nothing": {}, "no URI": {Csr: csr()}, "two URIs": {Csr: csr(stock.String(), billing.String())},
		"the issuer": {Csr: csr(ServerID(td).String())}, "foreign": {Csr: csr("spiffe://x.example/a")},
		"the trust domain": {Csr: csr("spiffe://corp.example")}, "too long a life": {Csr: csr(stock.String()), Ttl: 1 << 30}, "a negative life": {Csr: csr(stock.String()), Ttl: -1},
	} {
		if _, err := c.MintX509SVID(ctx, req); status.Code(err) != codes.InvalidArgument {
			t.Errorf("mint %s: %v", name, err)
		}
	}
	tok, err := c.MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: idToWire(stock), Audience: []string{"a"}, Ttl: 30})
	if err != nil || !strings.Contains(tok.Svid.Token, stock.String()) {
		t.Errorf("token %v, %v", tok, err)
	}
	for name, req := range map[string]*svidv1.MintJWTSVIDRequest{
		"no audience": {Id: idToWire(stock)}, "no identity": {Audience: []string{"a"}}, "an agent": {Id: idToWire(agentID("n")), Audience: []string{"a"}},
	} {
		if _, err := c.MintJWTSVID(ctx, req); status.Code(err) != codes.InvalidArgument {
			t.Errorf("token of %s: %v", name, err)
		}
	}
}

func TestBundlesOfTheTrustDomainAlone(t *testing.T) {
	r := manageRig(t)
	c, ctx := bundlev1.NewBundleClient(r.as(boss)), t.Context()
	if n, err := c.CountBundles(ctx, &bundlev1.CountBundlesRequest{}); err != nil || n.Count != 1 {
		t.Errorf("count %v, %v", n, err)
	}
	if l, err := c.ListFederatedBundles(ctx, &bundlev1.ListFederatedBundlesRequest{}); err != nil || len(l.Bundles) != 0 {
		t.Errorf("list %v, %v", l, err)
	}
	other := spiffeid.RequireTrustDomainFromString("b.example")
	r.srv.cfg.FederatedDomains = func() []spiffeid.TrustDomain { return []spiffeid.TrustDomain{other} }
	r.srv.cfg.Federated = func(td spiffeid.TrustDomain) (FederatedBundle, bool) {
		return FederatedBundle{Sequence: 5}, td == other
	}
	if l, err := c.ListFederatedBundles(ctx, &bundlev1.ListFederatedBundlesRequest{PageSize: 1}); err != nil || len(l.Bundles) != 1 || l.Bundles[0].SequenceNumber != 5 {
		t.Errorf("list %v, %v", l, err)
	}
	if n, err := c.CountBundles(ctx, &bundlev1.CountBundlesRequest{}); err != nil || n.Count != 2 {
		t.Errorf("count %v, %v", n, err)
	}
	if _, err := c.AppendBundle(ctx, &bundlev1.AppendBundleRequest{}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("append: %v", err)
	}
	if _, err := bundlev1.NewBundleClient(r.as(down)).PublishJWTAuthority(ctx, &bundlev1.PublishJWTAuthorityRequest{}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("publish: %v", err)
	}
}

// FuzzEntryCall feeds what a client may send as an entry: it becomes one that
// mesh accepts, or a sentence.
func FuzzEntryCall(f *testing.F) {
	f.Add(wire(f, wireEntry(stock, "n", "uid:5")), wire(f, &types.EntryMask{Hint: true}))
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, entry, mask []byte) {
		var w types.Entry
		var m types.EntryMask
		if proto.Unmarshal(entry, &w) != nil || proto.Unmarshal(mask, &m) != nil {
			return
		}
		for _, mask := range []*types.EntryMask{nil, &m} {
			var e mesh.Entry
			if err := change(&e, &w, mask); err != nil {
				if status.Code(err) != codes.InvalidArgument || status.Convert(err).Message() == "" {
					t.Fatalf("refused by %v", err)
				}
				continue
			}
			if e.ID = mesh.NewEntryID(e); mesh.CheckEntry(td, e) == nil {
				if _, err := entryFromWire(entryToWire(e, 1)); err != nil {
					t.Fatalf("accepted %+v, and cannot read it back: %v", e, err)
				}
			}
		}
	})
}
