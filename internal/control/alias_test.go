package control

import (
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/mesh"
)

// TestAnAliasIsMadeByCalls makes a node alias and an entry below it as
// spire-server would, and asks what each agent may have signed.
func TestAnAliasIsMadeByCalls(t *testing.T) {
	r := manageRig(t)
	edge := spiffeid.RequireFromString("spiffe://corp.example/group/edge")
	nodes := map[string]*grpc.ClientConn{}
	for _, name := range []string{"node-x", "node-y", "node-z"} {
		_, h := r.joined(name)
		nodes[name] = r.raw(h.cert)
	}
	fact := func(node, cn string) {
		r.reg.change(func() {
			a := r.reg.agents[agentID(node)]
			a.Selectors = []mesh.Selector{{Type: "x509pop", Value: "subject:cn:" + cn}, {Type: "x509pop", Value: "ca:fingerprint:aa"}}
			r.reg.agents[a.ID] = a
		})
	}
	fact("node-x", "edge")
	fact("node-z", "other")
	alias := func(selector ...*types.Selector) *types.Entry {
		return &types.Entry{SpiffeId: idToWire(edge), ParentId: idToWire(ServerID(td)), Selectors: selector}
	}
	c := entryv1.NewEntryClient(r.as(boss))
	made, err := c.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{
		alias(&types.Selector{Type: "x509pop", Value: "subject:cn:edge"}),
		alias(&types.Selector{Type: "spiffe_id", Value: agentID("node-y").String()}),
		{Id: "run", SpiffeId: idToWire(stock), ParentId: idToWire(edge), Selectors: []*types.Selector{{Type: "unix", Value: "uid:7"}}},
		{Id: "wrong", SpiffeId: idToWire(edge), ParentId: idToWire(ServerID(td)), Selectors: []*types.Selector{{Type: "unix", Value: "uid:7"}}},
		{Id: "wrong2", SpiffeId: idToWire(stock), ParentId: &types.SPIFFEID{TrustDomain: td.Name(), Path: "/spire/x"}, Selectors: []*types.Selector{{Type: "unix", Value: "uid:7"}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []codes.Code{codes.OK, codes.OK, codes.OK, codes.InvalidArgument, codes.InvalidArgument} {
		if st := made.Results[i].Status; codes.Code(st.Code) != want || want != codes.OK && !strings.Contains(st.Message, " ") {
			t.Errorf("entry %d: %v, want %v", i, st, want)
		}
	}
	aliasID := made.Results[0].Entry.GetId()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	// has is what an agent is given, and that it can have nothing else signed.
	has := func(node, want string) {
		t.Helper()
		list, err := entryv1.NewEntryClient(nodes[node]).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range list.Entries {
			got = append(got, e.Id)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s has the entries %q, want %q", node, got, want)
		}
		signer := svidv1.NewSVIDClient(nodes[node])
		for _, id := range []string{"run", aliasID} {
			code := codes.NotFound
			if slices.Contains(got, id) {
				code = codes.OK
			}
			resp, err := signer.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: id, Csr: csr}}})
			if err != nil || codes.Code(resp.Results[0].Status.Code) != code {
				t.Errorf("%s, X.509-SVID of %s: %v %v, want %v", node, id, resp, err, code)
			}
			if _, err := signer.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: id, Audience: []string{"a"}}); status.Code(err) != code {
				t.Errorf("%s, JWT-SVID of %s: %v, want %v", node, id, err, code)
			}
		}
	}
	has("node-x", "run")
	has("node-y", "run") // by its name
	has("node-z", "")
	fact("node-z", "edge")
	has("node-z", "run")
	fact("node-x", "other")
	has("node-x", "")
	if _, err := c.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{aliasID}}); err != nil {
		t.Fatal(err)
	}
	has("node-z", "")
	has("node-y", "run")
}

// TestAnEntryBelowAnAliasIsPushed: a proxy is told at once that an alias has
// something new for its agent, and that its agent is of another alias.
func TestAnEntryBelowAnAliasIsPushed(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-b")
	w := newWatcher()
	subscribe(t, c, billingHello(), w)
	recv(t, "first sync", w.syncs)
	group := spiffeid.RequireFromString("spiffe://corp.example/group/a")
	add := func(id string, parent spiffeid.ID, s mesh.Selector) {
		r.reg.change(func() {
			r.reg.entries = append(r.reg.entries, mesh.Entry{ID: id, SPIFFEID: spiffeid.RequireFromPath(td, "/group/"+id), ParentID: parent, Selectors: []mesh.Selector{s}})
		})
	}
	add("a", ServerID(td), mesh.Selector{Type: "spiffe_id", Value: agentID("node-b").String()})
	add("below", group, mesh.Selector{Type: "unix", Value: "uid:7"})
	recv(t, fmt.Sprintf("sync for what is below %s", group), w.syncs)
}
