package control

import (
	"context"
	"crypto/x509"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/mesh"
)

// maxMint bounds the life of an SVID that an operator mints.
const maxMint = 24 * time.Hour

// mintable reads the identity of what is minted, and asks whether the caller
// may.
func (a *svidAPI) mintable(ctx context.Context, field, text string) (spiffeid.ID, error) {
	id, err := workloadID(text, a.s.cfg.TrustDomain)
	if err != nil {
		return id, refuse(codes.InvalidArgument, "%s: %v", field, err)
	}
	if id.Path() == "/spire" || strings.HasPrefix(id.Path(), "/spire/") {
		return id, refuse(codes.InvalidArgument, "%s: %s is under /spire, which is kept for agents and the issuer", field, id)
	}
	return id, a.s.may(ctx, id)
}

func mintTTL(seconds int32) (time.Duration, error) {
	ttl := time.Duration(seconds) * time.Second
	if ttl < 0 || ttl > maxMint {
		return 0, refuse(codes.InvalidArgument, "ttl: %d s is not from 0 to %d", seconds, int(maxMint/time.Second))
	}
	return ttl, nil
}

// MintX509SVID signs an SVID without an entry. Here alone the request says whom
// it names, because the operator made it.
func (a *svidAPI) MintX509SVID(ctx context.Context, req *svidv1.MintX509SVIDRequest) (*svidv1.MintX509SVIDResponse, error) {
	key, err := requestKey(req.GetCsr())
	if err != nil {
		return nil, refuse(codes.InvalidArgument, "csr: %v", err)
	}
	// It was read a moment ago.
	csr, err := x509.ParseCertificateRequest(req.GetCsr())
	if err != nil || len(csr.URIs) != 1 {
		return nil, refuse(codes.InvalidArgument, "csr: it has to name exactly one URI, the SPIFFE ID")
	}
	if n := len(csr.DNSNames); n > maxSelectors {
		return nil, refuse(codes.InvalidArgument, "csr: it has %d DNS names, at most %d are signed", n, maxSelectors)
	}
	id, err := a.mintable(ctx, "csr", csr.URIs[0].String())
	if err != nil {
		return nil, err
	}
	ttl, err := mintTTL(req.GetTtl())
	if err != nil {
		return nil, err
	}
	chain, err := a.s.cfg.Authority.SignX509(ctx, id, key, ttl, csr.DNSNames)
	if err != nil {
		return nil, during(err, "mint SVID of", id)
	}
	svid, err := chainToWire(id, chain)
	if err != nil {
		return nil, err
	}
	if err := a.s.give(ctx, mesh.IssuedOf(chain[0], id, "", spiffeid.ID{})); err != nil {
		return nil, err
	}
	return &svidv1.MintX509SVIDResponse{Svid: svid}, nil
}

// MintJWTSVID signs a token without an entry.
func (a *svidAPI) MintJWTSVID(ctx context.Context, req *svidv1.MintJWTSVIDRequest) (*svidv1.MintJWTSVIDResponse, error) {
	if err := checkAudience(req.GetAudience()); err != nil {
		return nil, err
	}
	want, err := idFromWire(req.GetId())
	if err != nil {
		return nil, refuse(codes.InvalidArgument, "id: %v", err)
	}
	id, err := a.mintable(ctx, "id", want.String())
	if err != nil {
		return nil, err
	}
	ttl, err := mintTTL(req.GetTtl())
	if err != nil {
		return nil, err
	}
	token, issued, expires, err := a.s.cfg.Authority.SignJWT(ctx, id, req.GetAudience(), ttl)
	if err != nil {
		return nil, during(err, "mint token of", id)
	}
	return &svidv1.MintJWTSVIDResponse{Svid: &types.JWTSVID{Token: token, Id: idToWire(id), IssuedAt: issued.Unix(), ExpiresAt: expires.Unix()}}, nil
}

func checkAudience(audience []string) error {
	if n := len(audience); n == 0 || n > 32 {
		return refuse(codes.InvalidArgument, "audience: there are %d, want 1 to 32", n)
	}
	for i, aud := range audience {
		if aud == "" || len(aud) > maxID {
			return refuse(codes.InvalidArgument, "audience[%d]: it has %d bytes, want 1 to %d", i, len(aud), maxID)
		}
	}
	return nil
}

// domains are the other trust domains whose bundles are held, by name.
func (a *bundleAPI) domains() []spiffeid.TrustDomain {
	if a.s.cfg.FederatedDomains == nil {
		return nil
	}
	out := slices.Clone(a.s.cfg.FederatedDomains())
	slices.SortFunc(out, spiffeid.TrustDomain.Compare)
	return out
}

// CountBundles counts the trust domain's own bundle and those of others.
func (a *bundleAPI) CountBundles(ctx context.Context, _ *bundlev1.CountBundlesRequest) (*bundlev1.CountBundlesResponse, error) {
	if err := a.s.may(ctx, spiffeid.ID{}); err != nil {
		return nil, err
	}
	return &bundlev1.CountBundlesResponse{Count: 1 + int32(len(a.domains()))}, nil
}

// ListFederatedBundles lists the bundles of other trust domains, a page at a
// time.
func (a *bundleAPI) ListFederatedBundles(ctx context.Context, req *bundlev1.ListFederatedBundlesRequest) (*bundlev1.ListFederatedBundlesResponse, error) {
	if err := a.s.may(ctx, spiffeid.ID{}); err != nil {
		return nil, err
	}
	page, next, err := pageOf(a.domains(), spiffeid.TrustDomain.Name, req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, err
	}
	resp := &bundlev1.ListFederatedBundlesResponse{NextPageToken: next}
	for _, td := range page {
		b, err := a.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: td.Name(), OutputMask: req.GetOutputMask()})
		if status.Code(err) == codes.NotFound {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, err
		}
		resp.Bundles = append(resp.Bundles, b)
	}
	return resp, nil
}

// AppendBundle is refused: authorities come from the issuer's own CA alone.
func (a *bundleAPI) AppendBundle(ctx context.Context, _ *bundlev1.AppendBundleRequest) (*types.Bundle, error) {
	if err := a.s.may(ctx, spiffeid.ID{}); err != nil {
		return nil, err
	}
	return nil, refuse(codes.FailedPrecondition, "the bundle holds the authorities of this issuer's CA and no others: rotate the CA to change it")
}
