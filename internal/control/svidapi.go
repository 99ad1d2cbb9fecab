package control

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/mesh"
)

// bundleRefresh is how often a peer that cannot be told should fetch the
// bundle again, seconds.
const bundleRefresh = 60

// svidAPI is spire.api.server.svid.v1.
type svidAPI struct {
	svidv1.UnimplementedSVIDServer
	s *Server
}

// entries returns the calling agent's entries by ID.
func (a *svidAPI) entries(ctx context.Context) (map[string]mesh.Entry, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	byID := map[string]mesh.Entry{}
	for _, e := range a.s.cfg.Registry.EntriesFor(c.id) {
		byID[e.ID] = e
	}
	return byID, nil
}

// BatchNewX509SVID signs an SVID for each entry asked for. One that fails does
// not fail the others.
func (a *svidAPI) BatchNewX509SVID(ctx context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	if n := len(req.GetParams()); n == 0 || n > maxBatch {
		return nil, refuse(codes.InvalidArgument, "%d SVIDs asked for at once, want 1 to %d", n, maxBatch)
	}
	entries, err := a.entries(ctx)
	if err != nil {
		return nil, err
	}
	if err := a.charge(ctx, len(req.GetParams())); err != nil {
		return nil, err
	}
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	resp := &svidv1.BatchNewX509SVIDResponse{}
	var issued []mesh.Issued
	for _, p := range req.GetParams() {
		svid, leaf, st := a.newX509SVID(ctx, entries, p)
		resp.Results = append(resp.Results, &svidv1.BatchNewX509SVIDResponse_Result{Svid: svid, Status: st})
		if leaf != nil {
			issued = append(issued, mesh.IssuedOf(leaf, entries[p.GetEntryId()].SPIFFEID, p.GetEntryId(), c.id))
		}
	}
	if err := a.s.give(ctx, issued...); err != nil {
		return nil, err
	}
	return resp, a.withhold(ctx, c.id, entries, req, resp)
}

// withhold takes back what was signed for an entry that is gone meanwhile: who
// withdrew it has not revoked what was not yet recorded.
func (a *svidAPI) withhold(ctx context.Context, agent spiffeid.ID, entries map[string]mesh.Entry, req *svidv1.BatchNewX509SVIDRequest, resp *svidv1.BatchNewX509SVIDResponse) error {
	still, err := a.s.still(ctx, agent)
	if err != nil {
		return err
	}
	for i, res := range resp.Results {
		id := entries[req.GetParams()[i].GetEntryId()].SPIFFEID
		if res.GetSvid() == nil || slices.ContainsFunc(still, func(e mesh.Entry) bool { return e.SPIFFEID == id }) {
			continue
		}
		resp.Results[i] = &svidv1.BatchNewX509SVIDResponse_Result{Status: &types.Status{Code: int32(codes.NotFound), Message: noEntry}}
	}
	return nil
}

const noEntry = "entry not found or not this agent's"

// charge makes the caller account for signatures.
func (a *svidAPI) charge(ctx context.Context, n int) error {
	c, err := callerOf(ctx)
	if err != nil {
		return err
	}
	return a.s.spend(c.id, float64(n))
}

func (a *svidAPI) newX509SVID(ctx context.Context, entries map[string]mesh.Entry, p *svidv1.NewX509SVIDParams) (*types.X509SVID, *x509.Certificate, *types.Status) {
	no := func(c codes.Code, format string, args ...any) (*types.X509SVID, *x509.Certificate, *types.Status) {
		return nil, nil, &types.Status{Code: int32(c), Message: fmt.Sprintf(format, args...)}
	}
	e, ok := entries[p.GetEntryId()]
	if !ok {
		return no(codes.NotFound, noEntry)
	}
	key, err := requestKey(p.GetCsr())
	if err != nil {
		return no(codes.InvalidArgument, "%v", err)
	}
	chain, err := a.s.cfg.Authority.SignX509(ctx, e.SPIFFEID, key, e.X509TTL, e.DNSNames)
	if err == nil {
		var svid *types.X509SVID
		if svid, err = chainToWire(e.SPIFFEID, chain); err == nil {
			return svid, chain[0], &types.Status{Code: int32(codes.OK), Message: "OK"}
		}
	}
	if known, ok := crosses(err); ok {
		return no(status.Code(known), "%s", status.Convert(known).Message())
	}
	a.s.cfg.Log.Error("sign SVID failed", slog.String("id", e.SPIFFEID.String()), slog.String("entry", e.ID), slog.Any("err", err))
	return no(codes.Internal, "internal")
}

// NewJWTSVID signs a token for an entry and audiences that the agent names.
func (a *svidAPI) NewJWTSVID(ctx context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	if err := checkAudience(req.GetAudience()); err != nil {
		return nil, err
	}
	entries, err := a.entries(ctx)
	if err != nil {
		return nil, err
	}
	e, ok := entries[req.GetEntryId()]
	if !ok {
		return nil, refuse(codes.NotFound, noEntry)
	}
	if err := a.charge(ctx, 1); err != nil {
		return nil, err
	}
	token, issued, expires, err := a.s.cfg.Authority.SignJWT(ctx, e.SPIFFEID, req.GetAudience(), e.JWTTTL)
	if err != nil {
		return nil, during(err, "sign token of", e.SPIFFEID)
	}
	return &svidv1.NewJWTSVIDResponse{Svid: &types.JWTSVID{
		Token: token, Id: idToWire(e.SPIFFEID), IssuedAt: issued.Unix(), ExpiresAt: expires.Unix(), Hint: e.Hint,
	}}, nil
}

// bundleAPI is spire.api.server.bundle.v1 for reading.
type bundleAPI struct {
	bundlev1.UnimplementedBundleServer
	s *Server
}

// GetBundle returns the trust domain's bundle to anyone: it is public, and a
// reader must already trust the connection.
func (a *bundleAPI) GetBundle(_ context.Context, req *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	b := &types.Bundle{TrustDomain: a.s.cfg.TrustDomain.Name(), RefreshHint: bundleRefresh}
	tainted := a.s.tainted()
	for _, c := range a.s.cfg.Authority.X509Bundle() {
		b.X509Authorities = append(b.X509Authorities, &types.X509Certificate{Asn1: c.Raw, Tainted: slices.ContainsFunc(tainted, c.Equal)})
	}
	var err error
	if b.JwtAuthorities, err = jwtKeysToWire(a.s.cfg.Authority.JWTKeys()); err != nil {
		return nil, err
	}
	maskBundle(b, req.GetOutputMask())
	return b, nil
}

func jwtKeysToWire(keys []JWTKey) (out []*types.JWTKey, err error) {
	for _, k := range keys {
		der, err := x509.MarshalPKIXPublicKey(k.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("encode JWT key %s: %w", k.KeyID, err)
		}
		w := &types.JWTKey{KeyId: k.KeyID, PublicKey: der, Tainted: k.Tainted}
		if !k.ExpiresAt.IsZero() {
			w.ExpiresAt = k.ExpiresAt.Unix()
		}
		out = append(out, w)
	}
	return out, nil
}

// tainted are the roots under which SVIDs are to be fetched anew.
func (s *Server) tainted() []*x509.Certificate {
	if s.cfg.Roots == nil {
		return nil
	}
	return s.cfg.Roots.TaintedX509()
}
