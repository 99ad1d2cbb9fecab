package control

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/emptypb"

	"sallyport/internal/mesh"
)

const (
	// maxFederated bounds a batch that changes federations: each is a write of
	// its own.
	maxFederated = 100
	// maxURL bounds the URL of a bundle endpoint, bytes.
	maxURL = 2048
)

// The profiles of SPIFFE Federation section 5.
const (
	profileWeb    = "https_web"
	profileSPIFFE = "https_spiffe"
)

// A Federation is what is known of another trust domain, apart from the bundle
// that verifies its SVIDs now.
type Federation struct {
	TrustDomain spiffeid.TrustDomain
	// URL of its bundle endpoint; empty when the bundle was given by a call and
	// is not fetched.
	URL string
	// Profile is https_web or https_spiffe; EndpointID goes with the latter.
	Profile    string
	EndpointID spiffeid.ID
	// Origin is the file that declares it; empty when a call made it.
	Origin string
	// Bundle, in a change, is what an operator gives in place of the bundle that
	// is held; Void drops that one.
	Bundle *FederatedBundle
	Void   bool
}

// A Federator keeps federations. It is safe for concurrent use.
type Federator interface {
	// Federations are all, by name of the trust domain.
	Federations() []Federation
	// EditFederation changes what is known of a trust domain, durably. Change is
	// given what is known, zero for nothing, and returns what shall be; zero
	// forgets it and its bundle. It may be called again. The error is its, or
	// mesh.ErrReviewed for one that a file declares, or made by Unfit.
	EditFederation(ctx context.Context, td spiffeid.TrustDomain, change func(Federation) (Federation, error)) error
	// RefreshBundle looks at the bundle endpoint now. The error is
	// mesh.ErrNotFound, or why the bundle that is held stays.
	RefreshBundle(ctx context.Context, td spiffeid.TrustDomain) error
}

// trustDomainAPI is spire.api.server.trustdomain.v1.
type trustDomainAPI struct {
	trustdomainv1.UnimplementedTrustDomainServer
	s *Server
}

func (s *Server) federator() (Federator, error) {
	if s.cfg.Federator == nil {
		return nil, refuse(codes.FailedPrecondition, "this issuer takes federations from its configuration alone")
	}
	return s.cfg.Federator, nil
}

// relationships are the federations that are fetched.
func (s *Server) relationships() []Federation {
	if s.cfg.Federator == nil {
		return nil
	}
	return slices.DeleteFunc(s.cfg.Federator.Federations(), func(f Federation) bool { return f.URL == "" })
}

// foreign reads the name of another trust domain, and asks whether the caller
// may make this call on it.
func (s *Server) foreign(ctx context.Context, name string) (spiffeid.TrustDomain, error) {
	td, err := s.foreignName(name)
	if err != nil {
		return td, err
	}
	return td, s.may(ctx, td.ID())
}

func (s *Server) foreignName(name string) (spiffeid.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(name)
	switch {
	case err != nil || strings.HasPrefix(name, "spiffe:") || len(name) > 255:
		return td, refuse(codes.InvalidArgument, "trust_domain: it is not the name of a trust domain")
	case td == s.cfg.TrustDomain:
		return td, refuse(codes.InvalidArgument, "trust_domain: %s is the trust domain of this issuer", td)
	}
	return td, nil
}

// ListFederationRelationships lists the federations of files and of calls
// alike, a page at a time.
func (a *trustDomainAPI) ListFederationRelationships(ctx context.Context, req *trustdomainv1.ListFederationRelationshipsRequest) (*trustdomainv1.ListFederationRelationshipsResponse, error) {
	all := visible(ctx, a.s, a.s.relationships(), func(f Federation) spiffeid.ID { return f.TrustDomain.ID() })
	page, next, err := pageOf(all, func(f Federation) string { return f.TrustDomain.Name() }, req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, err
	}
	resp := &trustdomainv1.ListFederationRelationshipsResponse{NextPageToken: next}
	for _, f := range page {
		w, err := a.toWire(f, req.GetOutputMask())
		if err != nil {
			return nil, err
		}
		resp.FederationRelationships = append(resp.FederationRelationships, w)
	}
	return resp, nil
}

// GetFederationRelationship returns one.
func (a *trustDomainAPI) GetFederationRelationship(ctx context.Context, req *trustdomainv1.GetFederationRelationshipRequest) (*types.FederationRelationship, error) {
	td, err := a.s.foreign(ctx, req.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	w, err := a.read(td, req.GetOutputMask())
	if errors.Is(err, mesh.ErrNotFound) {
		return nil, errNoFederation(td)
	}
	return w, err
}

// read is mesh.ErrNotFound when nothing is followed.
func (a *trustDomainAPI) read(td spiffeid.TrustDomain, m *types.FederationRelationshipMask) (*types.FederationRelationship, error) {
	for _, f := range a.s.relationships() {
		if f.TrustDomain == td {
			return a.toWire(f, m)
		}
	}
	return nil, mesh.ErrNotFound
}

func errNoFederation(td spiffeid.TrustDomain) error {
	return refuse(codes.NotFound, "there is no federation with %s", td)
}

func (a *trustDomainAPI) toWire(f Federation, m *types.FederationRelationshipMask) (*types.FederationRelationship, error) {
	w := &types.FederationRelationship{TrustDomain: f.TrustDomain.Name()}
	if m == nil || m.BundleEndpointUrl {
		w.BundleEndpointUrl = f.URL
	}
	switch {
	case m != nil && !m.BundleEndpointProfile:
	case f.Profile == profileSPIFFE:
		w.BundleEndpointProfile = &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: f.EndpointID.String()}}
	default:
		w.BundleEndpointProfile = &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}
	}
	if m == nil || m.TrustDomainBundle {
		var err error
		if w.TrustDomainBundle, err = a.s.heldBundle(f.TrustDomain, nil); err != nil && !errors.Is(err, mesh.ErrNotFound) {
			return nil, err
		}
	}
	return w, nil
}

// put puts the fields of w into f that the mask names; all without one.
func (a *trustDomainAPI) put(f *Federation, w *types.FederationRelationship, m *types.FederationRelationshipMask) error {
	if m == nil || m.BundleEndpointUrl {
		if n := len(w.GetBundleEndpointUrl()); n == 0 || n > maxURL {
			return refuse(codes.InvalidArgument, "bundle_endpoint_url: it has %d bytes, want 1 to %d", n, maxURL)
		}
		f.URL = w.GetBundleEndpointUrl()
	}
	if m == nil || m.BundleEndpointProfile {
		switch p := w.GetBundleEndpointProfile().(type) {
		case *types.FederationRelationship_HttpsWeb:
			f.Profile, f.EndpointID = profileWeb, spiffeid.ID{}
		case *types.FederationRelationship_HttpsSpiffe:
			id, err := spiffeid.FromString(p.HttpsSpiffe.GetEndpointSpiffeId())
			if err != nil {
				return refuse(codes.InvalidArgument, "https_spiffe.endpoint_spiffe_id: it is not a SPIFFE ID")
			}
			f.Profile, f.EndpointID = profileSPIFFE, id
		default:
			return refuse(codes.InvalidArgument, "bundle_endpoint_profile: missing; it is https_web or https_spiffe")
		}
	}
	if w.GetTrustDomainBundle() != nil && (m == nil || m.TrustDomainBundle) {
		b, err := givenBundle(w.GetTrustDomainBundle(), f.TrustDomain)
		if err != nil {
			return err
		}
		f.Bundle = &b
	}
	return nil
}

// edit makes one edit of a batch, and says what became of it.
func (a *trustDomainAPI) edit(ctx context.Context, name string, m *types.FederationRelationshipMask, change func(Federation) (Federation, error)) (*types.Status, *types.FederationRelationship) {
	var w *types.FederationRelationship
	td, err := a.s.foreign(ctx, name)
	if err == nil {
		err = a.s.cfg.Federator.EditFederation(ctx, td, change)
	}
	if err == nil {
		if w, err = a.read(td, m); errors.Is(err, mesh.ErrNotFound) {
			err = nil // deleted
		}
	}
	return a.s.federationStatus(ctx, err), w
}

// federationStatus says what became of an edit of a federation.
func (s *Server) federationStatus(ctx context.Context, err error) *types.Status {
	if errors.Is(err, mesh.ErrReviewed) {
		err = Unready(err)
	}
	code, message := s.itemStatus(ctx, err)
	return &types.Status{Code: int32(code), Message: message}
}

// batch asks what every call that changes federations needs.
func (s *Server) batch(field string, n int) error {
	if _, err := s.federator(); err != nil {
		return err
	}
	if n > maxFederated {
		return refuse(codes.InvalidArgument, "%s: there are %d, at most %d are changed at once", field, n, maxFederated)
	}
	return nil
}

// BatchCreateFederationRelationship follows more trust domains. One that fails
// does not fail the others.
func (a *trustDomainAPI) BatchCreateFederationRelationship(ctx context.Context, req *trustdomainv1.BatchCreateFederationRelationshipRequest) (*trustdomainv1.BatchCreateFederationRelationshipResponse, error) {
	if err := a.s.batch("federation_relationships", len(req.GetFederationRelationships())); err != nil {
		return nil, err
	}
	resp := &trustdomainv1.BatchCreateFederationRelationshipResponse{}
	for _, w := range req.GetFederationRelationships() {
		st, made := a.edit(ctx, w.GetTrustDomain(), req.GetOutputMask(), func(old Federation) (Federation, error) {
			if old.URL != "" {
				return old, refuse(codes.AlreadyExists, "there is a federation with %s already", old.TrustDomain)
			}
			// Its name was read before.
			f := Federation{TrustDomain: spiffeid.RequireTrustDomainFromString(w.GetTrustDomain())}
			return f, a.put(&f, w, nil)
		})
		resp.Results = append(resp.Results, &trustdomainv1.BatchCreateFederationRelationshipResponse_Result{Status: st, FederationRelationship: made})
	}
	return resp, nil
}

// BatchUpdateFederationRelationship changes the fields that the input mask
// names, all without one.
func (a *trustDomainAPI) BatchUpdateFederationRelationship(ctx context.Context, req *trustdomainv1.BatchUpdateFederationRelationshipRequest) (*trustdomainv1.BatchUpdateFederationRelationshipResponse, error) {
	if err := a.s.batch("federation_relationships", len(req.GetFederationRelationships())); err != nil {
		return nil, err
	}
	resp := &trustdomainv1.BatchUpdateFederationRelationshipResponse{}
	for _, w := range req.GetFederationRelationships() {
		st, made := a.edit(ctx, w.GetTrustDomain(), req.GetOutputMask(), func(f Federation) (Federation, error) {
			if f.URL == "" {
				return f, refuse(codes.NotFound, "there is no federation with that trust domain")
			}
			return f, a.put(&f, w, req.GetInputMask())
		})
		resp.Results = append(resp.Results, &trustdomainv1.BatchUpdateFederationRelationshipResponse_Result{Status: st, FederationRelationship: made})
	}
	return resp, nil
}

// BatchDeleteFederationRelationship ends federations, and the trust in them:
// the bundle goes too, since nobody keeps it fresh any more.
func (a *trustDomainAPI) BatchDeleteFederationRelationship(ctx context.Context, req *trustdomainv1.BatchDeleteFederationRelationshipRequest) (*trustdomainv1.BatchDeleteFederationRelationshipResponse, error) {
	if err := a.s.batch("trust_domains", len(req.GetTrustDomains())); err != nil {
		return nil, err
	}
	resp := &trustdomainv1.BatchDeleteFederationRelationshipResponse{}
	for _, name := range req.GetTrustDomains() {
		st, _ := a.edit(ctx, name, nil, func(f Federation) (Federation, error) {
			if f.URL == "" {
				return f, refuse(codes.NotFound, "there is no federation with that trust domain")
			}
			return Federation{}, nil
		})
		resp.Results = append(resp.Results, &trustdomainv1.BatchDeleteFederationRelationshipResponse_Result{Status: st, TrustDomain: name})
	}
	return resp, nil
}

// RefreshBundle looks at a bundle endpoint at once.
func (a *trustDomainAPI) RefreshBundle(ctx context.Context, req *trustdomainv1.RefreshBundleRequest) (*emptypb.Empty, error) {
	td, err := a.s.foreign(ctx, req.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	f, err := a.s.federator()
	if err != nil {
		return nil, err
	}
	err = f.RefreshBundle(ctx, td)
	if errors.Is(err, mesh.ErrNotFound) {
		return nil, errNoFederation(td)
	}
	if err != nil {
		// Operators alone call this, and the cause is what they ask for.
		return nil, refuse(codes.Unavailable, "bundle of %s is not refreshed: %s", td, plain(err.Error()))
	}
	return &emptypb.Empty{}, nil
}
