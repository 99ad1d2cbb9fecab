package control

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/mesh"
)

// standing is a trust domain whose root and JWT key are being replaced.
func standing() *mover {
	until := time.Unix(1e9, 0)
	return &mover{status: RootStatus{Authorities: []AuthorityStatus{
		{ID: "r1", Kind: KindX509, Expires: until, Signs: true}, {ID: "r0", Kind: KindX509, Expires: until.Add(1), Tainted: true},
		{ID: "k2", Kind: KindJWT, Expires: until, Next: true}, {ID: "k1", Kind: KindJWT, Expires: until, Signs: true},
		{ID: "k0", Kind: KindJWT, Expires: until.Add(-time.Hour)}, {ID: "k", Kind: KindJWT, Expires: until.Add(-2 * time.Hour)},
	}}}
}

func TestAuthoritiesByTheSPIREAPI(t *testing.T) {
	k := standing()
	r := manageRig(t, func(c *ServerConfig) { c.Roots = k })
	for name, cc := range map[string]*grpc.ClientConn{"tls": r.as(boss), "socket": r.admin().cc} {
		t.Run(name, func(t *testing.T) {
			k.moves, k.err = nil, nil
			c, ctx := localauthorityv1.NewLocalAuthorityClient(cc), t.Context()
			x, err := c.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
			if err != nil || x.Active.GetAuthorityId() != "r1" || x.Active.GetExpiresAt() != 1e9 || x.Prepared != nil || x.Old.GetAuthorityId() != "r0" {
				t.Errorf("X.509: %v, %v", x, err)
			}
			j, err := c.GetJWTAuthorityState(ctx, &localauthorityv1.GetJWTAuthorityStateRequest{})
			if err != nil || j.Active.GetAuthorityId() != "k1" || j.Prepared.GetAuthorityId() != "k2" || j.Old.GetAuthorityId() != "k0" {
				t.Errorf("JWT: %v, %v", j, err)
			}
			prepared, err := c.PrepareJWTAuthority(ctx, &localauthorityv1.PrepareJWTAuthorityRequest{})
			if err != nil || prepared.PreparedAuthority.GetAuthorityId() != "k2" {
				t.Errorf("prepare: %v, %v", prepared, err)
			}
			_, err = c.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
			activated, err2 := c.ActivateJWTAuthority(ctx, &localauthorityv1.ActivateJWTAuthorityRequest{AuthorityId: "k2"})
			tainted, err3 := c.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: "r0"})
			revoked, err4 := c.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: "r0"})
			if err := errors.Join(err, err2, err3, err4); err != nil {
				t.Error(err)
			}
			if activated.GetActivatedAuthority().GetAuthorityId() != "k2" || tainted.GetTaintedAuthority().GetAuthorityId() != "r0" || revoked.GetRevokedAuthority().GetAuthorityId() != "r0" {
				t.Errorf("%v, %v, %v", activated, tainted, revoked)
			}
			want := []string{"jwt prepare ", "x509 prepare ", "jwt activate k2", "x509 taint r0", "x509 revoke r0"}
			if d := cmp.Diff(want, k.moves); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestAuthoritiesThatMayNotBeMoved(t *testing.T) {
	k := standing()
	seen := new(calls)
	r := manageRig(t, func(c *ServerConfig) { c.Roots, c.OnAdmin = k, seen.note })
	c, ctx := localauthorityv1.NewLocalAuthorityClient(r.as(boss)), t.Context()
	code := func(want codes.Code, text string, err error) {
		t.Helper()
		if status.Code(err) != want || text != "" && status.Convert(err).Message() != text {
			t.Errorf("got %v, want %s %q", err, want, text)
		}
	}
	_, err := c.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{})
	code(codes.InvalidArgument, "no authority ID provided", err)
	_, err = c.TaintX509UpstreamAuthority(ctx, &localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: "a"})
	code(codes.FailedPrecondition, "upstream authority is not configured", err)
	_, err = c.RevokeX509UpstreamAuthority(ctx, &localauthorityv1.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: "a"})
	code(codes.FailedPrecondition, "upstream authority is not configured", err)
	_, err = c.PrepareWITAuthority(ctx, &localauthorityv1.PrepareWITAuthorityRequest{})
	code(codes.Unimplemented, "", err)
	k.err = Unready(errors.New("1 of 2 proxies confirm"))
	_, err = c.TaintJWTAuthority(ctx, &localauthorityv1.TaintJWTAuthorityRequest{AuthorityId: "k0"})
	code(codes.FailedPrecondition, "1 of 2 proxies confirm", err)
	k.err = errors.New("disk full at a path that is nobody's business")
	_, err = c.RevokeJWTAuthority(ctx, &localauthorityv1.RevokeJWTAuthorityRequest{AuthorityId: "k0"})
	code(codes.Internal, "internal", err)
	k.err, k.status = nil, RootStatus{}
	_, err = c.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
	code(codes.Unavailable, "server is initializing", err)

	moves := len(k.moves)
	_, err = localauthorityv1.NewLocalAuthorityClient(r.as(payment)).PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
	code(codes.PermissionDenied, "", err)
	seen.mu.Lock()
	last := seen.all[len(seen.all)-1]
	seen.mu.Unlock()
	if len(k.moves) != moves || last.Caller != payment || last.Method != "localauthority.PrepareX509Authority" || last.Allowed {
		t.Errorf("a workload moved the root, or the audit does not say who tried: %+v", last)
	}
	r.stop()
	r.start(func(c *ServerConfig) { c.Keeper, c.Admins, c.Roots = r.reg, frozen{}, k })
	_, err = localauthorityv1.NewLocalAuthorityClient(r.as(boss)).PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
	code(codes.PermissionDenied, "", err)
	if len(k.moves) != moves {
		t.Error("a row denies it, and the root moved")
	}
}

// frozen denies every call.
type frozen struct{ rows }

func (frozen) JudgeAdmin(spiffeid.ID, string, spiffeid.ID) (mesh.Effect, string) {
	return mesh.Deny, "freeze"
}

func TestUpstreamAuthoritiesByTheSPIREAPI(t *testing.T) {
	k := &mover{status: RootStatus{Authorities: []AuthorityStatus{
		{ID: "r1", Kind: KindX509, SubjectKeyID: "a1", Signs: true}, {ID: "r0", Kind: KindX509, SubjectKeyID: "a0"},
		{ID: "r2", Kind: KindX509, SubjectKeyID: "a2", Next: true},
		{ID: "i1", Kind: KindIntermediate, SubjectKeyID: "a1", Signs: true}, {ID: "i2", Kind: KindIntermediate, SubjectKeyID: "a1", Next: true},
		{ID: "i0", Kind: KindIntermediate, SubjectKeyID: "a0"},
	}}}
	r := manageRig(t, func(c *ServerConfig) { c.Roots = k })
	c, ctx := localauthorityv1.NewLocalAuthorityClient(r.as(boss)), t.Context()
	x, err := c.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
	if err != nil || x.Active.GetAuthorityId() != "i1" || x.Prepared.GetAuthorityId() != "i2" || x.Old.GetAuthorityId() != "i0" || x.Old.GetUpstreamAuthoritySubjectKeyId() != "a0" {
		t.Errorf("%v, %v", x, err)
	}
	activated, err := c.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: "i2"})
	tainted, err2 := c.TaintX509UpstreamAuthority(ctx, &localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: "A0"})
	revoked, err3 := c.RevokeX509UpstreamAuthority(ctx, &localauthorityv1.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: "a0"})
	if err := errors.Join(err, err2, err3); err != nil {
		t.Error(err)
	}
	if activated.GetActivatedAuthority().GetAuthorityId() != "i2" || tainted.GetUpstreamAuthoritySubjectKeyId() != "a0" || revoked.GetUpstreamAuthoritySubjectKeyId() != "a0" {
		t.Errorf("%v, %v, %v", activated, tainted, revoked)
	}
	want := []string{"x509 activate i2", "x509 taint r0", "x509 revoke r0"}
	for id, code := range map[string]codes.Code{"": codes.InvalidArgument, "a1": codes.InvalidArgument, "a2": codes.InvalidArgument, "zz": codes.InvalidArgument} {
		_, err := c.TaintX509UpstreamAuthority(ctx, &localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: id})
		_, err2 := c.RevokeX509UpstreamAuthority(ctx, &localauthorityv1.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: id})
		if status.Code(err) != code || status.Code(err2) != code {
			t.Errorf("%q: %v, %v", id, err, err2)
		}
	}
	_, err = c.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: "i0"})
	_, err2 = c.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: "i0"})
	if status.Code(err) != codes.FailedPrecondition || status.Code(err2) != codes.FailedPrecondition {
		t.Errorf("a local authority: %v, %v", err, err2)
	}
	_, err = localauthorityv1.NewLocalAuthorityClient(r.as(payment)).TaintX509UpstreamAuthority(ctx, &localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: "a0"})
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("a workload: %v", err)
	}
	if d := cmp.Diff(want, k.moves); d != "" {
		t.Error(d)
	}
}
