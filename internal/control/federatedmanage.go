package control

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"sallyport/internal/mesh"
)

// maxGiven bounds the authorities of a bundle that a call gives.
const maxGiven = 256

// heldBundle is the bundle of another trust domain as it is held;
// mesh.ErrNotFound, told to the caller, when there is none.
func (s *Server) heldBundle(td spiffeid.TrustDomain, m *types.BundleMask) (*types.Bundle, error) {
	var b FederatedBundle
	ok := false
	if s.cfg.Federated != nil {
		b, ok = s.cfg.Federated(td)
	}
	if !ok {
		return nil, notHeld{td}
	}
	w := &types.Bundle{TrustDomain: td.Name(), RefreshHint: int64(b.RefreshHint / time.Second), SequenceNumber: b.Sequence}
	for _, c := range b.X509 {
		w.X509Authorities = append(w.X509Authorities, &types.X509Certificate{Asn1: c.Raw})
	}
	var err error
	if w.JwtAuthorities, err = jwtKeysToWire(b.JWT); err != nil {
		return nil, fmt.Errorf("bundle of %s: %w", td, err)
	}
	maskBundle(w, m)
	return w, nil
}

func maskBundle(w *types.Bundle, m *types.BundleMask) {
	if m == nil {
		return
	}
	drop(!m.X509Authorities, &w.X509Authorities)
	drop(!m.JwtAuthorities, &w.JwtAuthorities)
	drop(!m.RefreshHint, &w.RefreshHint)
	drop(!m.SequenceNumber, &w.SequenceNumber)
}

// givenBundle reads the bundle of td that an operator gives.
func givenBundle(w *types.Bundle, td spiffeid.TrustDomain) (FederatedBundle, error) {
	no := func(format string, args ...any) (FederatedBundle, error) {
		return FederatedBundle{}, refuse(codes.InvalidArgument, "bundle: "+format, args...)
	}
	if w.GetTrustDomain() != "" && w.GetTrustDomain() != td.Name() {
		return no("it is of another trust domain than %s", td)
	}
	if n := len(w.GetX509Authorities()) + len(w.GetJwtAuthorities()); n == 0 || n > maxGiven {
		return no("it has %d authorities, want 1 to %d", n, maxGiven)
	}
	b := FederatedBundle{Sequence: w.GetSequenceNumber(), RefreshHint: time.Duration(min(max(w.GetRefreshHint(), 0), 24*3600)) * time.Second}
	for i, a := range w.GetX509Authorities() {
		if len(a.GetAsn1()) > maxCSR {
			return no("x509_authorities[%d] has %d bytes, at most %d are read", i, len(a.GetAsn1()), maxCSR)
		}
		c, err := x509.ParseCertificate(a.GetAsn1())
		if err != nil {
			return no("x509_authorities[%d] is not a certificate in DER", i)
		}
		if !c.IsCA {
			return no("x509_authorities[%d] is not an authority's", i)
		}
		b.X509 = append(b.X509, c)
	}
	seen := map[string]bool{}
	for i, k := range w.GetJwtAuthorities() {
		if k.GetKeyId() == "" || len(k.GetKeyId()) > maxKeyID || seen[k.GetKeyId()] {
			return no("jwt_authorities[%d].key_id is missing, too long or given twice", i)
		}
		seen[k.GetKeyId()] = true
		if len(k.GetPublicKey()) > maxCSR {
			return no("jwt_authorities[%d] has %d bytes, at most %d are read", i, len(k.GetPublicKey()), maxCSR)
		}
		key, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err == nil {
			_, err = x509.MarshalPKIXPublicKey(key) // DSA is read, and could not be sent on
		}
		if err != nil {
			return no("jwt_authorities[%d] is not a key in PKIX form, of RSA or an elliptic curve", i)
		}
		b.JWT = append(b.JWT, JWTKey{KeyID: k.GetKeyId(), PublicKey: key})
	}
	return b, nil
}

// A bundleEdit says what is done with the bundle that is held, nil for none.
type bundleEdit func(held *types.Bundle) (*types.Bundle, error)

// edit gives a bundle for one trust domain, and says what became of it.
func (a *bundleAPI) edit(ctx context.Context, name string, m *types.BundleMask, edit bundleEdit) (*types.Status, *types.Bundle) {
	td, err := a.s.foreign(ctx, name)
	if err == nil {
		err = a.s.cfg.Federator.EditFederation(ctx, td, func(f Federation) (Federation, error) {
			held, err := a.s.heldBundle(td, nil)
			if err != nil && !errors.Is(err, mesh.ErrNotFound) {
				return f, err
			}
			w, err := edit(held)
			if err != nil {
				return f, err
			}
			b, err := givenBundle(w, td)
			f.TrustDomain, f.Bundle = td, &b
			return f, err
		})
	}
	var held *types.Bundle
	if err == nil {
		held, err = a.s.heldBundle(td, m)
	}
	return a.s.federationStatus(ctx, err), held
}

// BatchCreateFederatedBundle gives bundles of trust domains that have none.
func (a *bundleAPI) BatchCreateFederatedBundle(ctx context.Context, req *bundlev1.BatchCreateFederatedBundleRequest) (*bundlev1.BatchCreateFederatedBundleResponse, error) {
	if err := a.s.batch("bundle", len(req.GetBundle())); err != nil {
		return nil, err
	}
	resp := &bundlev1.BatchCreateFederatedBundleResponse{}
	for _, w := range req.GetBundle() {
		st, b := a.edit(ctx, w.GetTrustDomain(), req.GetOutputMask(), func(held *types.Bundle) (*types.Bundle, error) {
			if held != nil {
				return nil, refuse(codes.AlreadyExists, "a bundle of %s is held already", held.TrustDomain)
			}
			return w, nil
		})
		resp.Results = append(resp.Results, &bundlev1.BatchCreateFederatedBundleResponse_Result{Status: st, Bundle: b})
	}
	return resp, nil
}

// BatchUpdateFederatedBundle replaces of each bundle that is held what the input
// mask names, all without one.
func (a *bundleAPI) BatchUpdateFederatedBundle(ctx context.Context, req *bundlev1.BatchUpdateFederatedBundleRequest) (*bundlev1.BatchUpdateFederatedBundleResponse, error) {
	if err := a.s.batch("bundle", len(req.GetBundle())); err != nil {
		return nil, err
	}
	resp := &bundlev1.BatchUpdateFederatedBundleResponse{}
	for _, w := range req.GetBundle() {
		st, b := a.edit(ctx, w.GetTrustDomain(), req.GetOutputMask(), func(held *types.Bundle) (*types.Bundle, error) {
			m := req.GetInputMask()
			if held == nil {
				return nil, refuse(codes.NotFound, "no bundle of that trust domain is held")
			}
			put(m == nil || m.GetX509Authorities(), &held.X509Authorities, w.GetX509Authorities())
			put(m == nil || m.GetJwtAuthorities(), &held.JwtAuthorities, w.GetJwtAuthorities())
			put(m == nil || m.GetRefreshHint(), &held.RefreshHint, w.GetRefreshHint())
			put(m == nil || m.GetSequenceNumber(), &held.SequenceNumber, w.GetSequenceNumber())
			return held, nil
		})
		resp.Results = append(resp.Results, &bundlev1.BatchUpdateFederatedBundleResponse_Result{Status: st, Bundle: b})
	}
	return resp, nil
}

// BatchSetFederatedBundle gives bundles, whatever is held.
func (a *bundleAPI) BatchSetFederatedBundle(ctx context.Context, req *bundlev1.BatchSetFederatedBundleRequest) (*bundlev1.BatchSetFederatedBundleResponse, error) {
	if err := a.s.batch("bundle", len(req.GetBundle())); err != nil {
		return nil, err
	}
	resp := &bundlev1.BatchSetFederatedBundleResponse{}
	for _, w := range req.GetBundle() {
		st, b := a.edit(ctx, w.GetTrustDomain(), req.GetOutputMask(), func(*types.Bundle) (*types.Bundle, error) { return w, nil })
		resp.Results = append(resp.Results, &bundlev1.BatchSetFederatedBundleResponse_Result{Status: st, Bundle: b})
	}
	return resp, nil
}

// BatchDeleteFederatedBundle drops bundles. One that is fetched comes back with
// the next look at its endpoint: end the federation to be rid of it.
func (a *bundleAPI) BatchDeleteFederatedBundle(ctx context.Context, req *bundlev1.BatchDeleteFederatedBundleRequest) (*bundlev1.BatchDeleteFederatedBundleResponse, error) {
	if err := a.s.batch("trust_domains", len(req.GetTrustDomains())); err != nil {
		return nil, err
	}
	if _, known := bundlev1.BatchDeleteFederatedBundleRequest_Mode_name[int32(req.GetMode())]; !known {
		return nil, refuse(codes.InvalidArgument, "mode: %d is none of RESTRICT, DELETE and DISSOCIATE", req.GetMode())
	}
	resp := &bundlev1.BatchDeleteFederatedBundleResponse{}
	for _, name := range req.GetTrustDomains() {
		err := a.deleteBundle(ctx, name, req.GetMode())
		resp.Results = append(resp.Results, &bundlev1.BatchDeleteFederatedBundleResponse_Result{Status: a.s.federationStatus(ctx, err), TrustDomain: name})
	}
	return resp, nil
}

func (a *bundleAPI) deleteBundle(ctx context.Context, name string, mode bundlev1.BatchDeleteFederatedBundleRequest_Mode) error {
	td, err := a.s.foreign(ctx, name)
	if err != nil {
		return err
	}
	if _, err := a.s.heldBundle(td, nil); err != nil {
		return err
	}
	for _, f := range a.s.cfg.Federator.Federations() {
		if f.TrustDomain == td && f.Origin != "" {
			return refuse(codes.FailedPrecondition, "federation with %s is declared in %s: end it there", td, f.Origin)
		}
	}
	if err := a.dissociate(ctx, td, mode); err != nil {
		return err
	}
	return a.s.cfg.Federator.EditFederation(ctx, td, func(f Federation) (Federation, error) {
		if f.URL == "" {
			return Federation{}, nil
		}
		f.Void = true
		return f, nil
	})
}

// dissociate lets no entry name td any more, as the mode says.
func (a *bundleAPI) dissociate(ctx context.Context, td spiffeid.TrustDomain, mode bundlev1.BatchDeleteFederatedBundleRequest_Mode) error {
	var edits []mesh.EntryEdit
	for _, e := range a.s.cfg.Registry.Entries() {
		if !slices.Contains(e.FederatesWith, td) {
			continue
		}
		if e.Reviewed() {
			return refuse(codes.FailedPrecondition, "entry %s federates with %s and stands in %s: change it there", e.ID, td, e.Origin)
		}
		edit := mesh.EntryEdit{ID: e.ID, Delete: true}
		if mode == bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE {
			edit = mesh.EntryEdit{ID: e.ID, Change: func(e mesh.Entry) (mesh.Entry, error) {
				e.FederatesWith = slices.DeleteFunc(slices.Clone(e.FederatesWith), func(other spiffeid.TrustDomain) bool { return other == td })
				return e, nil
			}}
		}
		if mode != bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT {
			if err := a.s.may(ctx, e.SPIFFEID); err != nil {
				return err
			}
		}
		edits = append(edits, edit)
	}
	if len(edits) == 0 {
		return nil
	}
	if mode == bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT {
		return refuse(codes.FailedPrecondition, "%d entries federate with %s: use the mode DISSOCIATE or DELETE, or change them first", len(edits), td)
	}
	k, err := a.s.keeper()
	if err != nil {
		return err
	}
	results, err := k.EditEntries(ctx, edits)
	for _, r := range results {
		if r.Err != nil && !errors.Is(r.Err, mesh.ErrNotFound) {
			err = errors.Join(err, r.Err)
		}
	}
	return err
}
