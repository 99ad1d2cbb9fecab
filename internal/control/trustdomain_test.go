package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/mesh"
)

var (
	far   = spiffeid.RequireTrustDomainFromString("far.example")
	filed = spiffeid.RequireTrustDomainFromString("filed.example")
)

// federates is a Federator in memory; filed.example is declared in a file.
type federates struct {
	mu   sync.Mutex // guards what follows
	all  map[spiffeid.TrustDomain]Federation
	held map[spiffeid.TrustDomain]FederatedBundle
	fail error
}

func newFederates() *federates {
	return &federates{
		all: map[spiffeid.TrustDomain]Federation{
			filed: {TrustDomain: filed, URL: "https://filed.example", Profile: profileWeb, Origin: "issuer.yaml"},
		},
		held: map[spiffeid.TrustDomain]FederatedBundle{},
	}
}

func (f *federates) Federations() []Federation {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.SortedFunc(maps.Values(f.all), func(a, b Federation) int { return a.TrustDomain.Compare(b.TrustDomain) })
}

func (f *federates) EditFederation(_ context.Context, td spiffeid.TrustDomain, change func(Federation) (Federation, error)) error {
	f.mu.Lock()
	old := f.all[td]
	f.mu.Unlock()
	if old.Origin != "" {
		return fmt.Errorf("federation with %s %w: %s", td, mesh.ErrReviewed, old.Origin)
	}
	next, err := change(old)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case next.TrustDomain.IsZero():
		delete(f.all, td)
		delete(f.held, td)
		return nil
	case next.Bundle != nil:
		f.held[td] = *next.Bundle
	case next.Void:
		delete(f.held, td)
	}
	next.Bundle, next.Void = nil, false
	f.all[td] = next
	return nil
}

func (f *federates) RefreshBundle(_ context.Context, td spiffeid.TrustDomain) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.all[td].URL == "" {
		return mesh.ErrNotFound
	}
	return f.fail
}

func (f *federates) bundle(td spiffeid.TrustDomain) (FederatedBundle, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, ok := f.held[td]
	return b, ok
}

func (f *federates) domains() []spiffeid.TrustDomain {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Keys(f.held))
}

// with lets an issuer federate by call.
func (f *federates) with(c *ServerConfig) {
	c.Federator, c.Federated, c.FederatedDomains = f, f.bundle, f.domains
}

func relationTo(td string, change ...func(*types.FederationRelationship)) *types.FederationRelationship {
	r := &types.FederationRelationship{TrustDomain: td, BundleEndpointUrl: "https://" + td, BundleEndpointProfile: &types.FederationRelationship_HttpsWeb{}}
	for _, f := range change {
		f(r)
	}
	return r
}

func TestFederationsAreMadeByCall(t *testing.T) {
	f := newFederates()
	r := manageRig(t, f.with)
	ctx := t.Context()
	bundle := &types.Bundle{TrustDomain: far.Name(), X509Authorities: []*types.X509Certificate{{Asn1: r.ca.root.Raw}}, SequenceNumber: 4}
	for name, c := range map[string]trustdomainv1.TrustDomainClient{
		"tls": trustdomainv1.NewTrustDomainClient(r.as(boss)), "socket": trustdomainv1.NewTrustDomainClient(r.admin().cc),
	} {
		t.Run(name, func(t *testing.T) {
			table := []struct {
				name string
				r    *types.FederationRelationship
				code codes.Code
				want string
			}{
				{"a good one", relationTo(far.Name(), func(r *types.FederationRelationship) {
					r.BundleEndpointProfile = &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: "spiffe://far.example/x"}}
					r.TrustDomainBundle = bundle
				}), codes.OK, "OK"},
				{"the same again", relationTo(far.Name()), codes.AlreadyExists, "already"},
				{"nothing", nil, codes.InvalidArgument, "trust_domain"},
				{"our own", relationTo(td.Name()), codes.InvalidArgument, "of this issuer"},
				{"one of a file", relationTo(filed.Name()), codes.FailedPrecondition, "is written in a reviewed file"},
				{"an ID for a name", relationTo("spiffe://far.example/x"), codes.InvalidArgument, "not the name"},
				{"no URL", relationTo("b.example", func(r *types.FederationRelationship) { r.BundleEndpointUrl = "" }), codes.InvalidArgument, "bundle_endpoint_url"},
				{"a huge URL", relationTo("b.example", func(r *types.FederationRelationship) { r.BundleEndpointUrl += strings.Repeat("x", maxURL) }), codes.InvalidArgument, "bundle_endpoint_url"},
				{"no profile", relationTo("b.example", func(r *types.FederationRelationship) { r.BundleEndpointProfile = nil }), codes.InvalidArgument, "https_web or https_spiffe"},
				{"no ID of the endpoint", relationTo("b.example", func(r *types.FederationRelationship) {
					r.BundleEndpointProfile = &types.FederationRelationship_HttpsSpiffe{}
				}), codes.InvalidArgument, "endpoint_spiffe_id"},
				{"another's bundle", relationTo("b.example", func(r *types.FederationRelationship) { r.TrustDomainBundle = bundle }), codes.InvalidArgument, "another trust domain"},
			}
			req := &trustdomainv1.BatchCreateFederationRelationshipRequest{}
			for _, tc := range table {
				req.FederationRelationships = append(req.FederationRelationships, tc.r)
			}
			made, err := c.BatchCreateFederationRelationship(ctx, req)
			if err != nil {
				t.Fatal(err)
			}
			for i, tc := range table {
				st := made.Results[i].Status
				if codes.Code(st.Code) != tc.code || !strings.Contains(st.Message, tc.want) || (made.Results[i].FederationRelationship != nil) != (tc.code == codes.OK) {
					t.Errorf("%s: %v, want %s with %q", tc.name, made.Results[i], tc.code, tc.want)
				}
			}
			if got := made.Results[0].FederationRelationship; got.GetHttpsSpiffe().GetEndpointSpiffeId() != "spiffe://far.example/x" || got.GetTrustDomainBundle().GetSequenceNumber() != 4 {
				t.Errorf("made %v", got)
			}
			all, err := c.ListFederationRelationships(ctx, &trustdomainv1.ListFederationRelationshipsRequest{PageSize: 1, OutputMask: &types.FederationRelationshipMask{BundleEndpointUrl: true}})
			if err != nil || len(all.FederationRelationships) != 1 || all.NextPageToken != far.Name() || all.FederationRelationships[0].TrustDomainBundle != nil {
				t.Errorf("list %v, %v", all, err)
			}
			up, err := c.BatchUpdateFederationRelationship(ctx, &trustdomainv1.BatchUpdateFederationRelationshipRequest{
				FederationRelationships: []*types.FederationRelationship{
					{TrustDomain: far.Name(), BundleEndpointUrl: "https://new.example"}, relationTo("b.example"), relationTo(filed.Name()),
				},
				InputMask: &types.FederationRelationshipMask{BundleEndpointUrl: true},
			})
			if err != nil || codesOf(up.Results) != "OK NotFound FailedPrecondition" {
				t.Errorf("update %v, %v", up, err)
			}
			got, err := c.GetFederationRelationship(ctx, &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: far.Name()})
			if err != nil || got.BundleEndpointUrl != "https://new.example" || got.GetHttpsSpiffe() == nil {
				t.Errorf("get %v, %v", got, err)
			}
			if _, err := c.GetFederationRelationship(ctx, &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: "b.example"}); status.Code(err) != codes.NotFound {
				t.Errorf("get of none: %v", err)
			}
			refreshes(t, c, f)
			gone, err := c.BatchDeleteFederationRelationship(ctx, &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{far.Name(), far.Name(), filed.Name(), ""}})
			if err != nil || codesOf(gone.Results) != "OK NotFound FailedPrecondition InvalidArgument" {
				t.Errorf("delete %v, %v", gone, err)
			}
			if _, ok := f.bundle(far); ok {
				t.Error("the bundle outlives the federation")
			}
		})
	}
}

func refreshes(t *testing.T, c trustdomainv1.TrustDomainClient, f *federates) {
	t.Helper()
	for _, tc := range []struct {
		td   string
		fail error
		code codes.Code
		want string
	}{
		{far.Name(), nil, codes.OK, ""},
		{far.Name(), errors.New("no route\nto host"), codes.Unavailable, "no route to host"},
		{"b.example", nil, codes.NotFound, "no federation"},
		{"", nil, codes.InvalidArgument, "trust_domain"},
	} {
		f.mu.Lock()
		f.fail = tc.fail
		f.mu.Unlock()
		_, err := c.RefreshBundle(t.Context(), &trustdomainv1.RefreshBundleRequest{TrustDomain: tc.td})
		if status.Code(err) != tc.code || !strings.Contains(status.Convert(err).Message(), tc.want) {
			t.Errorf("refresh of %q: %v, want %s", tc.td, err, tc.code)
		}
	}
}

// codesOf is the codes of the results of a batch.
func codesOf[T interface{ GetStatus() *types.Status }](results []T) string {
	var out []string
	for _, r := range results {
		out = append(out, codes.Code(r.GetStatus().GetCode()).String())
	}
	return strings.Join(out, " ")
}

func TestBundlesAreGivenByCall(t *testing.T) {
	f := newFederates()
	r := manageRig(t, f.with)
	ctx, c := t.Context(), bundlev1.NewBundleClient(r.admin().cc)
	root := []*types.X509Certificate{{Asn1: r.ca.root.Raw}}
	good := func(td string) *types.Bundle { return &types.Bundle{TrustDomain: td, X509Authorities: root} }
	leaf := r.ca.issue(t, payment, newKey(t)).Leaf.Raw
	made, err := c.BatchCreateFederatedBundle(ctx, &bundlev1.BatchCreateFederatedBundleRequest{Bundle: []*types.Bundle{
		good(far.Name()), good(far.Name()), nil, good(td.Name()), {TrustDomain: "b.example"}, good(filed.Name()),
		{TrustDomain: "b.example", X509Authorities: []*types.X509Certificate{{Asn1: []byte("x")}}},
		{TrustDomain: "b.example", X509Authorities: []*types.X509Certificate{{Asn1: leaf}}},
		{TrustDomain: "b.example", JwtAuthorities: []*types.JWTKey{{KeyId: "k", PublicKey: []byte("x")}}},
		{TrustDomain: "b.example", X509Authorities: slices.Repeat(root, maxGiven+1)},
	}})
	const want = "OK AlreadyExists InvalidArgument InvalidArgument InvalidArgument FailedPrecondition InvalidArgument InvalidArgument InvalidArgument InvalidArgument"
	if err != nil || codesOf(made.Results) != want {
		t.Fatalf("create %v, %v", made, err)
	}
	up, err := c.BatchUpdateFederatedBundle(ctx, &bundlev1.BatchUpdateFederatedBundleRequest{
		Bundle:    []*types.Bundle{{TrustDomain: far.Name(), SequenceNumber: 9}, {TrustDomain: "b.example", SequenceNumber: 9}},
		InputMask: &types.BundleMask{SequenceNumber: true},
	})
	if err != nil || codesOf(up.Results) != "OK NotFound" || up.Results[0].Bundle.SequenceNumber != 9 || len(up.Results[0].Bundle.X509Authorities) != 1 {
		t.Errorf("update %v, %v", up, err)
	}
	set, err := c.BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{
		Bundle: []*types.Bundle{good(far.Name()), good("b.example")}, OutputMask: &types.BundleMask{RefreshHint: true},
	})
	if err != nil || codesOf(set.Results) != "OK OK" || set.Results[0].Bundle.X509Authorities != nil {
		t.Errorf("set %v, %v", set, err)
	}
	if n, err := c.CountBundles(ctx, &bundlev1.CountBundlesRequest{}); err != nil || n.Count != 3 {
		t.Errorf("count %v, %v", n, err)
	}
	many := make([]string, maxFederated+1)
	if _, err := c.BatchDeleteFederatedBundle(ctx, &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: many}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a huge batch: %v", err)
	}
	if _, err := c.BatchDeleteFederatedBundle(ctx, &bundlev1.BatchDeleteFederatedBundleRequest{Mode: 9}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("an unknown mode: %v", err)
	}
}

// TestABundleThatEntriesName is not dropped but with them, as the mode says.
func TestABundleThatEntriesName(t *testing.T) {
	f := newFederates()
	r := manageRig(t, f.with)
	ctx, c := t.Context(), bundlev1.NewBundleClient(r.admin().cc)
	root := []*types.X509Certificate{{Asn1: r.ca.root.Raw}}
	friend := func(id string, file string) mesh.Entry {
		return mesh.Entry{ID: id, SPIFFEID: stock, ParentID: agentID("node-" + id), Selectors: []mesh.Selector{{Type: "unix", Value: "uid:7"}},
			FederatesWith: []spiffeid.TrustDomain{far}, Origin: mesh.Origin{File: file}}
	}
	for _, tc := range []struct {
		name   string
		entry  mesh.Entry
		mode   bundlev1.BatchDeleteFederatedBundleRequest_Mode
		code   codes.Code
		want   string
		left   bool // the entry is
		names  bool // far.example still
		bundle bool // is held
	}{
		{"restrict", friend("a", ""), bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT, codes.FailedPrecondition, "1 entries federate", true, true, true},
		{"a reviewed entry", friend("b", "entries.yaml"), bundlev1.BatchDeleteFederatedBundleRequest_DELETE, codes.FailedPrecondition, "entries.yaml", true, true, true},
		{"dissociate", friend("c", ""), bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE, codes.OK, "", true, false, false},
		{"delete", friend("d", ""), bundlev1.BatchDeleteFederatedBundleRequest_DELETE, codes.OK, "", false, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r.reg.change(func() { r.reg.entries = append(r.reg.entries, tc.entry) })
			defer r.reg.change(func() {
				r.reg.entries = slices.DeleteFunc(r.reg.entries, func(e mesh.Entry) bool { return e.ID == tc.entry.ID })
			})
			set, err := c.BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{{TrustDomain: far.Name(), X509Authorities: root}}})
			if err != nil || codesOf(set.Results) != "OK" {
				t.Fatalf("set %v, %v", set, err)
			}
			got, err := c.BatchDeleteFederatedBundle(ctx, &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{far.Name()}, Mode: tc.mode})
			if err != nil || codesOf(got.Results) != tc.code.String() || !strings.Contains(got.Results[0].Status.Message, tc.want) {
				t.Errorf("%v, %v", got, err)
			}
			left, names := false, false
			for _, e := range r.reg.Entries() {
				if e.ID == tc.entry.ID {
					left, names = true, slices.Contains(e.FederatesWith, far)
				}
			}
			if _, held := f.bundle(far); left != tc.left || names != tc.names || held != tc.bundle {
				t.Errorf("the entry is left: %v, names it: %v, the bundle is held: %v", left, names, held)
			}
		})
	}
}
