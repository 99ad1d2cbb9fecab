package control

import (
	"context"
	"crypto/x509"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
)

// A FederatedBundle is what verifies the SVIDs of another trust domain.
type FederatedBundle struct {
	X509        []*x509.Certificate
	JWT         []JWTKey
	RefreshHint time.Duration
	Sequence    uint64
}

// GetFederatedBundle returns the bundle of another trust domain as last
// fetched, never merged with ours.
func (a *bundleAPI) GetFederatedBundle(_ context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	td, err := spiffeid.TrustDomainFromString(req.GetTrustDomain())
	if err != nil {
		return nil, refuse(codes.InvalidArgument, "trust_domain is not the name of a trust domain")
	}
	if td == a.s.cfg.TrustDomain {
		return nil, refuse(codes.InvalidArgument, "%s is the trust domain of this issuer: call GetBundle", td)
	}
	return a.s.heldBundle(td, req.GetOutputMask())
}

// GetFederatedBundle fetches the bundle of another trust domain. Without any
// authority it verifies nobody. The error is ErrRefused when the issuer has
// none.
func (c *Client) GetFederatedBundle(ctx context.Context, td spiffeid.TrustDomain) (Bundle, error) {
	var out Bundle
	err := c.call(ctx, "get bundle of "+td.Name(), func(l *link) error {
		w, err := bundlev1.NewBundleClient(l.cc).GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: td.Name()})
		if err != nil {
			return err
		}
		if len(w.GetX509Authorities()) == 0 && w.GetTrustDomain() == td.Name() {
			return nil // it has revoked everything
		}
		out, err = bundleFromWire(w, td)
		return err
	})
	return out, err
}

// domainMatch reads a match, named by its field for errors.
func domainMatch(field string, m *types.FederatesWithMatch) (func([]spiffeid.TrustDomain) bool, error) {
	want, err := domainsFromWire(m.GetTrustDomains())
	if err != nil || len(want) == 0 {
		return nil, refuse(codes.InvalidArgument, "%s.trust_domains: want names of trust domains, at least one", field)
	}
	within := func(a, b []spiffeid.TrustDomain) bool {
		return !slices.ContainsFunc(a, func(td spiffeid.TrustDomain) bool { return !slices.Contains(b, td) })
	}
	switch m.GetMatch() {
	case types.FederatesWithMatch_MATCH_EXACT:
		return func(have []spiffeid.TrustDomain) bool { return within(have, want) && within(want, have) }, nil
	case types.FederatesWithMatch_MATCH_SUBSET:
		return func(have []spiffeid.TrustDomain) bool { return len(have) > 0 && within(have, want) }, nil
	case types.FederatesWithMatch_MATCH_SUPERSET:
		return func(have []spiffeid.TrustDomain) bool { return within(want, have) }, nil
	case types.FederatesWithMatch_MATCH_ANY:
		return func(have []spiffeid.TrustDomain) bool {
			return slices.ContainsFunc(have, func(td spiffeid.TrustDomain) bool { return slices.Contains(want, td) })
		}, nil
	}
	return nil, refuse(codes.InvalidArgument, "%s.match: is not a kind of match", field)
}

func domainsToWire(in []spiffeid.TrustDomain) (out []string) {
	for _, td := range in {
		out = append(out, td.Name())
	}
	return out
}

func domainsFromWire(in []string) (out []spiffeid.TrustDomain, err error) {
	for _, s := range in {
		td, err := spiffeid.TrustDomainFromString(s)
		if err != nil {
			return nil, err
		}
		out = append(out, td)
	}
	return out, nil
}
