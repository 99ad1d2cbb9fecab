package control

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc/codes"
)

// The kinds of AuthorityStatus.
const (
	KindX509 = "x509"
	KindJWT  = "jwt"
	// KindIntermediate is what an upstream authority signed, beside its roots of
	// KindX509.
	KindIntermediate = "intermediate"
)

// localAuthorityAPI is spire.api.server.localauthority.v1 over the replacement
// of the root: an authority is one of Roots; under an upstream authority, an
// intermediate.
type localAuthorityAPI struct {
	localauthorityv1.UnimplementedLocalAuthorityServer
	s *Server
}

// places are the authorities of a kind by SPIRE's names for where they stand.
type places struct {
	active, prepared, old *localauthorityv1.AuthorityState
}

func placesOf(st RootStatus, kind string) (p places) {
	var latest time.Time
	kind = st.local(kind)
	for _, a := range st.Authorities {
		if a.Kind != kind {
			continue
		}
		state := authorityState(a)
		switch {
		case a.Signs:
			p.active = state
		case a.Next:
			p.prepared = state
		case p.old == nil || !a.Expires.Before(latest):
			p.old, latest = state, a.Expires
		}
	}
	return p
}

// local is the kind of the authorities of our own that a caller means.
func (st RootStatus) local(kind string) string {
	if kind == KindX509 && st.upstream() {
		return KindIntermediate
	}
	return kind
}

func authorityState(a AuthorityStatus) *localauthorityv1.AuthorityState {
	w := &localauthorityv1.AuthorityState{AuthorityId: a.ID, ExpiresAt: a.Expires.Unix()}
	if a.Kind == KindIntermediate {
		w.UpstreamAuthoritySubjectKeyId = a.SubjectKeyID
	}
	return w
}

// places reads how things stand.
func (a *localAuthorityAPI) places(ctx context.Context, kind string) (places, error) {
	k := a.s.cfg.Roots
	if k == nil {
		return places{}, errNoRoots()
	}
	if err := a.s.may(ctx, spiffeid.ID{}); err != nil {
		return places{}, err
	}
	p := placesOf(k.Roots(), kind)
	if p.active == nil {
		return p, refuse(codes.Unavailable, "server is initializing")
	}
	return p, nil
}

// move takes a step, and returns the authority with the ID as it then is, or was
// before it was revoked.
func (a *localAuthorityAPI) move(ctx context.Context, kind, step, id string) (*localauthorityv1.AuthorityState, places, error) {
	k := a.s.cfg.Roots
	if k == nil {
		return nil, places{}, errNoRoots()
	}
	if step != "prepare" && id == "" {
		return nil, places{}, refuse(codes.InvalidArgument, "no authority ID provided")
	}
	if err := a.s.may(ctx, spiffeid.ID{}); err != nil {
		return nil, places{}, err
	}
	before := k.Roots()
	if kind == KindX509 && before.upstream() && step != "prepare" && step != "activate" {
		return nil, places{}, refuse(codes.FailedPrecondition, "a local authority is not what to %s under an upstream authority: every proxy trusts its root", step)
	}
	st, err := k.MoveAuthority(ctx, kind, step, id)
	if err != nil {
		return nil, places{}, during(err, step+" authority", a.s.cfg.TrustDomain.ID())
	}
	for _, all := range [][]AuthorityStatus{st.Authorities, before.Authorities} {
		if i := slices.IndexFunc(all, func(x AuthorityStatus) bool { return x.Kind == before.local(kind) && x.ID == id }); i >= 0 {
			return authorityState(all[i]), placesOf(st, kind), nil
		}
	}
	return nil, placesOf(st, kind), nil
}

func (a *localAuthorityAPI) GetX509AuthorityState(ctx context.Context, _ *localauthorityv1.GetX509AuthorityStateRequest) (*localauthorityv1.GetX509AuthorityStateResponse, error) {
	p, err := a.places(ctx, KindX509)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.GetX509AuthorityStateResponse{Active: p.active, Prepared: p.prepared, Old: p.old}, nil
}

func (a *localAuthorityAPI) PrepareX509Authority(ctx context.Context, _ *localauthorityv1.PrepareX509AuthorityRequest) (*localauthorityv1.PrepareX509AuthorityResponse, error) {
	_, p, err := a.move(ctx, KindX509, "prepare", "")
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.PrepareX509AuthorityResponse{PreparedAuthority: p.prepared}, nil
}

func (a *localAuthorityAPI) ActivateX509Authority(ctx context.Context, req *localauthorityv1.ActivateX509AuthorityRequest) (*localauthorityv1.ActivateX509AuthorityResponse, error) {
	x, _, err := a.move(ctx, KindX509, "activate", req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.ActivateX509AuthorityResponse{ActivatedAuthority: x}, nil
}

func (a *localAuthorityAPI) TaintX509Authority(ctx context.Context, req *localauthorityv1.TaintX509AuthorityRequest) (*localauthorityv1.TaintX509AuthorityResponse, error) {
	x, _, err := a.move(ctx, KindX509, "taint", req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintX509AuthorityResponse{TaintedAuthority: x}, nil
}

func (a *localAuthorityAPI) RevokeX509Authority(ctx context.Context, req *localauthorityv1.RevokeX509AuthorityRequest) (*localauthorityv1.RevokeX509AuthorityResponse, error) {
	x, _, err := a.move(ctx, KindX509, "revoke", req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeX509AuthorityResponse{RevokedAuthority: x}, nil
}

// moveUpstream takes a step for the root with a subject key ID.
func (a *localAuthorityAPI) moveUpstream(ctx context.Context, step, keyID string) (string, error) {
	k := a.s.cfg.Roots
	if k == nil {
		return "", errNoUpstream()
	}
	if err := a.s.may(ctx, spiffeid.ID{}); err != nil {
		return "", err
	}
	st := k.Roots()
	if !st.upstream() {
		return "", errNoUpstream()
	}
	if keyID == "" {
		return "", refuse(codes.InvalidArgument, "no subject key ID provided")
	}
	keyID = strings.ToLower(keyID)
	var id string
	for _, x := range st.Authorities {
		switch {
		case x.Kind != KindX509 || x.SubjectKeyID != keyID:
		case x.Signs || x.Next:
			return "", refuse(codes.InvalidArgument, "the upstream authority with subject key ID %.64q is in use: only an old one is to %s", keyID, step)
		default:
			id = x.ID
		}
	}
	if id == "" {
		return "", refuse(codes.InvalidArgument, "no upstream authority has the subject key ID %.64q", keyID)
	}
	if _, err := k.MoveAuthority(ctx, KindX509, step, id); err != nil {
		return "", during(err, step+" upstream authority", a.s.cfg.TrustDomain.ID())
	}
	return keyID, nil
}

func (a *localAuthorityAPI) TaintX509UpstreamAuthority(ctx context.Context, req *localauthorityv1.TaintX509UpstreamAuthorityRequest) (*localauthorityv1.TaintX509UpstreamAuthorityResponse, error) {
	id, err := a.moveUpstream(ctx, "taint", req.GetSubjectKeyId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: id}, nil
}

func (a *localAuthorityAPI) RevokeX509UpstreamAuthority(ctx context.Context, req *localauthorityv1.RevokeX509UpstreamAuthorityRequest) (*localauthorityv1.RevokeX509UpstreamAuthorityResponse, error) {
	id, err := a.moveUpstream(ctx, "revoke", req.GetSubjectKeyId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: id}, nil
}

func errNoUpstream() error {
	return refuse(codes.FailedPrecondition, "upstream authority is not configured")
}

func (a *localAuthorityAPI) GetJWTAuthorityState(ctx context.Context, _ *localauthorityv1.GetJWTAuthorityStateRequest) (*localauthorityv1.GetJWTAuthorityStateResponse, error) {
	p, err := a.places(ctx, KindJWT)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.GetJWTAuthorityStateResponse{Active: p.active, Prepared: p.prepared, Old: p.old}, nil
}

func (a *localAuthorityAPI) PrepareJWTAuthority(ctx context.Context, _ *localauthorityv1.PrepareJWTAuthorityRequest) (*localauthorityv1.PrepareJWTAuthorityResponse, error) {
	_, p, err := a.move(ctx, KindJWT, "prepare", "")
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.PrepareJWTAuthorityResponse{PreparedAuthority: p.prepared}, nil
}

func (a *localAuthorityAPI) ActivateJWTAuthority(ctx context.Context, req *localauthorityv1.ActivateJWTAuthorityRequest) (*localauthorityv1.ActivateJWTAuthorityResponse, error) {
	x, _, err := a.move(ctx, KindJWT, "activate", req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.ActivateJWTAuthorityResponse{ActivatedAuthority: x}, nil
}

func (a *localAuthorityAPI) TaintJWTAuthority(ctx context.Context, req *localauthorityv1.TaintJWTAuthorityRequest) (*localauthorityv1.TaintJWTAuthorityResponse, error) {
	x, _, err := a.move(ctx, KindJWT, "taint", req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintJWTAuthorityResponse{TaintedAuthority: x}, nil
}

func (a *localAuthorityAPI) RevokeJWTAuthority(ctx context.Context, req *localauthorityv1.RevokeJWTAuthorityRequest) (*localauthorityv1.RevokeJWTAuthorityResponse, error) {
	x, _, err := a.move(ctx, KindJWT, "revoke", req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeJWTAuthorityResponse{RevokedAuthority: x}, nil
}
