package control

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"sallyport/internal/mesh"
)

const (
	// maxKeyID bounds the ID of a JWT key of a downstream issuer, bytes.
	maxKeyID = 128
	// maxKeyLife bounds how long such a key is published.
	maxKeyLife = 366 * 24 * time.Hour
	// downstreamWork is what a call of a downstream issuer costs it: each
	// writes durably, and one signs for all of its workloads.
	downstreamWork = 40
)

// A Downstream serves issuers of the same trust domain that stand below this
// one. It is safe for concurrent use.
type Downstream interface {
	// SignDownstream returns the CA certificate of the issuer id, and the
	// intermediates above it, not the root. A ttl of zero is this issuer's
	// choice; the life may be shorter than ttl.
	SignDownstream(ctx context.Context, id spiffeid.ID, key crypto.PublicKey, ttl time.Duration) ([]*x509.Certificate, error)
	// PublishJWTKey puts a key by which the issuer id signs tokens into the
	// bundle, durably, until it expires or an entry no more says that id is
	// downstream. mesh.ErrExists says that the key ID is another's.
	PublishJWTKey(ctx context.Context, id spiffeid.ID, k JWTKey) error
}

type downstreamKey struct{}

// downstream is the issuer that a call comes from, as guard has let it in. It
// pays for the call.
func (s *Server) downstream(ctx context.Context) (Downstream, spiffeid.ID, error) {
	id, ok := ctx.Value(downstreamKey{}).(spiffeid.ID)
	if !ok {
		return nil, id, refuse(codes.PermissionDenied, "caller is no downstream issuer")
	}
	if s.cfg.Downstream == nil {
		return nil, id, refuse(codes.FailedPrecondition, "this issuer has no issuers below it")
	}
	return s.cfg.Downstream, id, s.spend(id, downstreamWork)
}

// NewDownstreamX509CA certifies the key of an issuer below this one. Of the
// request only the key counts.
func (a *svidAPI) NewDownstreamX509CA(ctx context.Context, req *svidv1.NewDownstreamX509CARequest) (*svidv1.NewDownstreamX509CAResponse, error) {
	d, id, err := a.s.downstream(ctx)
	if err != nil {
		return nil, err
	}
	key, err := requestKey(req.GetCsr())
	if err != nil {
		return nil, refuse(codes.InvalidArgument, "csr: %v", err)
	}
	if req.GetPreferredTtl() < 0 {
		return nil, refuse(codes.InvalidArgument, "preferred_ttl: %d s is negative", req.GetPreferredTtl())
	}
	chain, err := d.SignDownstream(ctx, id, key, time.Duration(req.GetPreferredTtl())*time.Second)
	if err != nil {
		return nil, during(err, "sign CA of downstream issuer", id)
	}
	resp := &svidv1.NewDownstreamX509CAResponse{}
	for _, c := range chain {
		resp.CaCertChain = append(resp.CaCertChain, c.Raw)
	}
	for _, c := range a.s.cfg.Authority.X509Bundle() {
		resp.X509Authorities = append(resp.X509Authorities, c.Raw)
	}
	return resp, nil
}

// PublishJWTAuthority puts a key of an issuer below this one into the bundle.
func (a *bundleAPI) PublishJWTAuthority(ctx context.Context, req *bundlev1.PublishJWTAuthorityRequest) (*bundlev1.PublishJWTAuthorityResponse, error) {
	d, id, err := a.s.downstream(ctx)
	if err != nil {
		return nil, err
	}
	k, err := a.s.downstreamJWTKey(req.GetJwtAuthority())
	if err != nil {
		return nil, err
	}
	err = d.PublishJWTKey(ctx, id, k)
	if errors.Is(err, mesh.ErrExists) {
		return nil, refuse(codes.AlreadyExists, "jwt_authority.key_id: %.128q is the ID of another key", k.KeyID)
	}
	if err != nil {
		return nil, during(err, "publish JWT key of downstream issuer", id)
	}
	keys, err := jwtKeysToWire(a.s.cfg.Authority.JWTKeys())
	if err != nil {
		return nil, err
	}
	return &bundlev1.PublishJWTAuthorityResponse{JwtAuthorities: keys}, nil
}

func (s *Server) downstreamJWTKey(w *types.JWTKey) (JWTKey, error) {
	no := func(format string, args ...any) (JWTKey, error) {
		return JWTKey{}, refuse(codes.InvalidArgument, "jwt_authority."+format, args...)
	}
	id := w.GetKeyId()
	printable := !strings.ContainsFunc(id, func(r rune) bool { return r <= ' ' || r > '~' })
	if id == "" || len(id) > maxKeyID || !printable {
		return no("key_id: it has %d bytes, want 1 to %d printable ones of ASCII", len(id), maxKeyID)
	}
	if n := len(w.GetPublicKey()); n > maxCSR {
		return no("public_key: it has %d bytes, at most %d are read", n, maxCSR)
	}
	key, err := x509.ParsePKIXPublicKey(w.GetPublicKey())
	if err != nil {
		return no("public_key: it is not a key in PKIX form")
	}
	if err := checkKey(key); err != nil {
		return no("public_key: %v", err)
	}
	now := s.cfg.Now()
	if w.GetExpiresAt() <= now.Unix() || w.GetExpiresAt() > now.Add(maxKeyLife).Unix() {
		return no("expires_at: %d is not a time from now on, within %s", w.GetExpiresAt(), maxKeyLife)
	}
	return JWTKey{KeyID: id, PublicKey: key, ExpiresAt: time.Unix(w.GetExpiresAt(), 0)}, nil
}
