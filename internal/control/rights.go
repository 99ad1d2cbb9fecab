package control

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// A right is a set of kinds of callers, as SPIRE has them.
type right uint8

const (
	// toAnyone: no certificate is needed.
	toAnyone right = 1 << iota
	// toAgents: an attested node with its current SVID.
	toAgents
	// toDownstream: a workload whose entry says downstream.
	toDownstream
	// toAdmins: a workload whose entry says admin, or that a row allows.
	toAdmins
	// toLocal: the user of the admin socket.
	toLocal
	// toNamed: a workload that a row allows. That its entry says admin does not
	// do: such entries are older than what they would let in here.
	toNamed

	toOperators = toAdmins | toLocal
)

// rights says who may call what. A method that is not here is nobody's.
var rights = map[string]right{
	agentv1.Agent_AttestAgent_FullMethodName:     toAnyone,
	agentv1.Agent_RenewAgent_FullMethodName:      toAgents,
	agentv1.Agent_PostStatus_FullMethodName:      toAgents,
	agentv1.Agent_CountAgents_FullMethodName:     toOperators,
	agentv1.Agent_ListAgents_FullMethodName:      toOperators,
	agentv1.Agent_GetAgent_FullMethodName:        toOperators,
	agentv1.Agent_DeleteAgent_FullMethodName:     toOperators,
	agentv1.Agent_BanAgent_FullMethodName:        toOperators,
	agentv1.Agent_CreateJoinToken_FullMethodName: toOperators,

	entryv1.Entry_GetAuthorizedEntries_FullMethodName:  toAgents,
	entryv1.Entry_SyncAuthorizedEntries_FullMethodName: toAgents,
	entryv1.Entry_CountEntries_FullMethodName:          toOperators,
	entryv1.Entry_ListEntries_FullMethodName:           toOperators,
	entryv1.Entry_GetEntry_FullMethodName:              toOperators,
	entryv1.Entry_BatchCreateEntry_FullMethodName:      toOperators,
	entryv1.Entry_BatchUpdateEntry_FullMethodName:      toOperators,
	entryv1.Entry_BatchDeleteEntry_FullMethodName:      toOperators,

	svidv1.SVID_BatchNewX509SVID_FullMethodName:    toAgents,
	svidv1.SVID_BatchNewWITSVID_FullMethodName:     toAgents,
	svidv1.SVID_NewJWTSVID_FullMethodName:          toAgents,
	svidv1.SVID_NewDownstreamX509CA_FullMethodName: toDownstream,
	svidv1.SVID_MintX509SVID_FullMethodName:        toOperators,
	svidv1.SVID_MintJWTSVID_FullMethodName:         toOperators,
	svidv1.SVID_MintWITSVID_FullMethodName:         toOperators,

	bundlev1.Bundle_GetBundle_FullMethodName:                  toAnyone,
	bundlev1.Bundle_GetFederatedBundle_FullMethodName:         toAgents | toOperators,
	bundlev1.Bundle_PublishJWTAuthority_FullMethodName:        toDownstream,
	bundlev1.Bundle_PublishWITAuthority_FullMethodName:        toDownstream,
	bundlev1.Bundle_CountBundles_FullMethodName:               toOperators,
	bundlev1.Bundle_AppendBundle_FullMethodName:               toOperators,
	bundlev1.Bundle_ListFederatedBundles_FullMethodName:       toOperators,
	bundlev1.Bundle_BatchCreateFederatedBundle_FullMethodName: toOperators,
	bundlev1.Bundle_BatchUpdateFederatedBundle_FullMethodName: toOperators,
	bundlev1.Bundle_BatchSetFederatedBundle_FullMethodName:    toOperators,
	bundlev1.Bundle_BatchDeleteFederatedBundle_FullMethodName: toOperators,

	trustdomainv1.TrustDomain_ListFederationRelationships_FullMethodName:       toOperators,
	trustdomainv1.TrustDomain_GetFederationRelationship_FullMethodName:         toOperators,
	trustdomainv1.TrustDomain_BatchCreateFederationRelationship_FullMethodName: toOperators,
	trustdomainv1.TrustDomain_BatchUpdateFederationRelationship_FullMethodName: toOperators,
	trustdomainv1.TrustDomain_BatchDeleteFederationRelationship_FullMethodName: toOperators,
	trustdomainv1.TrustDomain_RefreshBundle_FullMethodName:                     toOperators,

	localauthorityv1.LocalAuthority_GetX509AuthorityState_FullMethodName:       toOperators,
	localauthorityv1.LocalAuthority_PrepareX509Authority_FullMethodName:        toOperators,
	localauthorityv1.LocalAuthority_ActivateX509Authority_FullMethodName:       toOperators,
	localauthorityv1.LocalAuthority_TaintX509Authority_FullMethodName:          toOperators,
	localauthorityv1.LocalAuthority_RevokeX509Authority_FullMethodName:         toOperators,
	localauthorityv1.LocalAuthority_TaintX509UpstreamAuthority_FullMethodName:  toOperators,
	localauthorityv1.LocalAuthority_RevokeX509UpstreamAuthority_FullMethodName: toOperators,
	localauthorityv1.LocalAuthority_GetJWTAuthorityState_FullMethodName:        toOperators,
	localauthorityv1.LocalAuthority_PrepareJWTAuthority_FullMethodName:         toOperators,
	localauthorityv1.LocalAuthority_ActivateJWTAuthority_FullMethodName:        toOperators,
	localauthorityv1.LocalAuthority_TaintJWTAuthority_FullMethodName:           toOperators,
	localauthorityv1.LocalAuthority_RevokeJWTAuthority_FullMethodName:          toOperators,
	localauthorityv1.LocalAuthority_GetWITAuthorityState_FullMethodName:        toOperators,
	localauthorityv1.LocalAuthority_PrepareWITAuthority_FullMethodName:         toOperators,
	localauthorityv1.LocalAuthority_ActivateWITAuthority_FullMethodName:        toOperators,
	localauthorityv1.LocalAuthority_TaintWITAuthority_FullMethodName:           toOperators,
	localauthorityv1.LocalAuthority_RevokeWITAuthority_FullMethodName:          toOperators,

	meshpb.Mesh_Subscribe_FullMethodName:     toAgents,
	meshpb.Mesh_UploadAudit_FullMethodName:   toAgents,
	meshpb.Mesh_ReportEdges_FullMethodName:   toAgents,
	meshpb.Mesh_ReportSamples_FullMethodName: toAgents,
	meshpb.Mesh_Cosign_FullMethodName:        toAgents,
	meshpb.Mesh_FetchSet_FullMethodName:      toAgents,
	meshpb.Mesh_ShowCalls_FullMethodName:     toAgents,

	meshpb.Admin_CreateJoinToken_FullMethodName: toLocal,
	meshpb.Admin_Status_FullMethodName:          toLocal | toNamed,
	meshpb.Admin_Proxies_FullMethodName:         toLocal | toNamed,
	meshpb.Admin_Edges_FullMethodName:           toLocal,
	meshpb.Admin_PageLink_FullMethodName:        toLocal,
	meshpb.Admin_Roots_FullMethodName:           toLocal,
	meshpb.Admin_MoveRoots_FullMethodName:       toLocal,
	meshpb.Admin_AuditHeads_FullMethodName:      toLocal,
	meshpb.Admin_Revoke_FullMethodName:          toLocal,
	meshpb.Admin_Why_FullMethodName:             toLocal,
	meshpb.Admin_Faults_FullMethodName:          toLocal,
	meshpb.Admin_StopFaults_FullMethodName:      toLocal,
	meshpb.Admin_PushPolicy_FullMethodName:      toLocal | toNamed,
	meshpb.Admin_MovePolicy_FullMethodName:      toLocal | toNamed,
	meshpb.Admin_PolicySet_FullMethodName:       toLocal | toNamed,
	meshpb.Admin_Rollouts_FullMethodName:        toLocal | toNamed,
	meshpb.Admin_MoveRollout_FullMethodName:     toLocal | toNamed,
	meshpb.Admin_Tap_FullMethodName:             toLocal | toNamed,

	healthpb.Health_Check_FullMethodName: toAnyone,
	healthpb.Health_List_FullMethodName:  toOperators,
	healthpb.Health_Watch_FullMethodName: toAgents | toOperators,
}

// An AdminJudge knows the rows that make an operator's right finer: which
// caller may call which method on which identity. It is safe for concurrent
// use. Methods are named like "entry.BatchDeleteEntry"; the zero caller is the
// user of the admin socket; the zero identity stands for a call that concerns
// none in particular.
type AdminJudge interface {
	// JudgeAdmin returns the effect of the rows and the row that decided;
	// no effect when no row speaks of such a call.
	JudgeAdmin(caller spiffeid.ID, method string, on spiffeid.ID) (effect mesh.Effect, rule string)
	// MayAdmin reports whether a row allows caller the method on some identity.
	MayAdmin(caller spiffeid.ID, method string) bool
}

// An AdminCall is something an operator or a downstream issuer did or wanted to
// do, for the audit.
type AdminCall struct {
	// Caller is zero for the user of the admin socket.
	Caller spiffeid.ID
	Method string
	// On is the identity that the call changes; zero when it concerns none, or
	// changes nothing.
	On spiffeid.ID
	// Peer is the remote address.
	Peer string
	// Rule is the row that decided, if one did.
	Rule    string
	Allowed bool
}

// An operator is who makes an administrative call.
type operator struct {
	id     spiffeid.ID // zero for the user of the admin socket
	serial string      // of the SVID, empty as id
	until  time.Time   // when the SVID ends, zero as id
	method string
	// flagged: the right is SPIRE's, and rows can only take of it.
	flagged bool
}

type operatorKey struct{}

// shortMethod is "entry.CountEntries" for
// "/spire.api.server.entry.v1.Entry/CountEntries".
func shortMethod(full string) string {
	service, method, _ := strings.Cut(strings.TrimPrefix(full, "/"), "/")
	parts := strings.Split(service, ".")
	return parts[max(len(parts)-3, 0)] + "." + method
}

// guard lets a call in, or not, and notes in the context who makes it.
func (s *Server) guard(ctx context.Context, method string) (context.Context, error) {
	r := rights[method]
	if r&toAnyone != 0 {
		return ctx, nil
	}
	c, err := s.authenticate(ctx)
	if err != nil {
		return nil, err
	}
	if strings.HasPrefix(c.id.Path(), agentPrefix) {
		if r&toAgents == 0 {
			return nil, s.denied(ctx, c.id, method)
		}
		if err := s.authorize(ctx, c); err != nil {
			return nil, err
		}
		return context.WithValue(ctx, callerKey{}, c), nil
	}
	if s.cfg.Now().After(c.leaf.NotAfter) {
		return nil, refuse(codes.PermissionDenied, "SVID of %s expired at %s", c.id, stamp(c.leaf.NotAfter))
	}
	serial := mesh.SerialText(c.leaf.SerialNumber)
	if s.cfg.Registry.Revocations().Has(serial) {
		return nil, refuse(codes.PermissionDenied, "SVID %s of %s is revoked: connect with a new one", serial, c.id)
	}
	if n := operatorWork[method]; n > 0 {
		if err := s.spend(c.id, n); err != nil {
			return nil, err
		}
	}
	admin, downstream := s.roles(c.id)
	short := shortMethod(method)
	switch {
	case r&toAdmins != 0 && (admin || s.cfg.Admins != nil && s.cfg.Admins.MayAdmin(c.id, short)):
		return s.operate(ctx, operator{id: c.id, serial: serial, until: c.leaf.NotAfter, method: short, flagged: admin})
	case r&toNamed != 0 && s.cfg.Admins != nil && s.cfg.Admins.MayAdmin(c.id, short):
		return s.operate(ctx, operator{id: c.id, serial: serial, until: c.leaf.NotAfter, method: short})
	case r&toDownstream != 0 && downstream:
		if err := s.recordAdmin(ctx, AdminCall{Caller: c.id, Method: short, On: c.id, Allowed: true}); err != nil {
			return nil, err
		}
		return context.WithValue(ctx, downstreamKey{}, c.id), nil
	case r&toAdmins == 0 && r&toAgents != 0:
		return nil, refuse(codes.PermissionDenied, "%s is not an agent: its path does not begin with %s", c.id, agentPrefix)
	}
	return nil, s.denied(ctx, c.id, method)
}

// guardLocal is guard for the admin socket, whose listener knows the user.
func (s *Server) guardLocal(ctx context.Context, method string) (context.Context, error) {
	switch r := rights[method]; {
	case r&toAnyone != 0:
		return ctx, nil
	case r&toLocal != 0:
		return s.operate(ctx, operator{method: shortMethod(method), flagged: true})
	}
	return nil, refuse(codes.PermissionDenied, "authorization denied for method %s: it is not for the admin socket", method)
}

func (s *Server) guardLocalUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	ctx, err := s.guardLocal(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (s *Server) guardLocalStream(srv any, st grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	ctx, err := s.guardLocal(st.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	return next(srv, &agentStream{ServerStream: st, ctx: ctx})
}

// roles are what the entries of an identity say of it.
func (s *Server) roles(id spiffeid.ID) (admin, downstream bool) {
	now := s.cfg.Now()
	for _, e := range s.cfg.Registry.Entries() {
		if e.SPIFFEID == id && (e.ExpiresAt.IsZero() || now.Before(e.ExpiresAt)) {
			admin, downstream = admin || e.Admin, downstream || e.Downstream
		}
	}
	return admin, downstream
}

// denied refuses a call that the caller has no right to, and records it when
// it is an operator's or a downstream issuer's.
func (s *Server) denied(ctx context.Context, id spiffeid.ID, method string) error {
	if rights[method]&(toOperators|toDownstream) != 0 {
		if err := s.spend(id, 1); err != nil {
			return err // its refusals so far are recorded
		}
		if err := s.recordAdmin(ctx, AdminCall{Caller: id, Method: shortMethod(method)}); err != nil {
			return err
		}
	}
	next := ""
	if rights[method]&toNamed != 0 {
		next = "; a row of admin.csv gives it, for the method " + shortMethod(method)
	}
	return refuse(codes.PermissionDenied, "authorization denied for method %s: %s has no right to it%s", method, id, next)
}

// operate records an operator's call and lets it in.
func (s *Server) operate(ctx context.Context, o operator) (context.Context, error) {
	if err := s.recordAdmin(ctx, AdminCall{Caller: o.id, Method: o.method, Allowed: true}); err != nil {
		return nil, err
	}
	return context.WithValue(ctx, operatorKey{}, o), nil
}

func (s *Server) recordAdmin(ctx context.Context, c AdminCall) error {
	if s.cfg.OnAdmin == nil {
		return nil
	}
	c.Peer = remote(ctx)
	if err := s.cfg.OnAdmin(ctx, c); err != nil {
		return fmt.Errorf("record admin call: %w", err)
	}
	return nil
}

// verdict is whether the operator of a call may make it on an identity, and
// the row that decided.
func (s *Server) verdict(ctx context.Context, on spiffeid.ID) (operator, bool, string) {
	o, ok := ctx.Value(operatorKey{}).(operator)
	if !ok {
		return o, false, ""
	}
	if s.cfg.Admins == nil {
		return o, o.flagged, ""
	}
	effect, rule := s.cfg.Admins.JudgeAdmin(o.id, o.method, on)
	return o, effect == mesh.Allow || effect == "" && o.flagged, rule
}

// may is asked before an operator's call changes anything, for each identity
// that it changes; the zero identity for what concerns none. The answer is in
// the audit.
func (s *Server) may(ctx context.Context, on spiffeid.ID) error {
	o, ok, rule := s.verdict(ctx, on)
	if err := s.recordAdmin(ctx, AdminCall{Caller: o.id, Method: o.method, On: on, Rule: rule, Allowed: ok}); err != nil {
		return err
	}
	if ok {
		return nil
	}
	what, by := "this", "no row of admin.csv allows it"
	if !on.IsZero() {
		what = on.String()
	}
	if rule != "" {
		by = "row " + rule + " of admin.csv denies it"
	}
	return refuse(codes.PermissionDenied, "%s on %s is denied to this caller: %s", o.method, what, by)
}

// visible leaves out what the operator of a call may not see.
func visible[T any](ctx context.Context, s *Server, all []T, id func(T) spiffeid.ID) []T {
	return slices.DeleteFunc(all, func(t T) bool {
		_, ok, _ := s.verdict(ctx, id(t))
		return !ok
	})
}

// itemStatus is the status of one item of a batch. What may not cross the wire
// is logged.
func (s *Server) itemStatus(ctx context.Context, err error) (codes.Code, string) {
	if err == nil {
		return codes.OK, "OK"
	}
	if known, ok := crosses(err); ok {
		st := status.Convert(known)
		return st.Code(), st.Message()
	}
	o, _ := ctx.Value(operatorKey{}).(operator)
	s.cfg.Log.Error("call failed", slog.String("method", o.method), slog.Any("err", err))
	return codes.Internal, "internal"
}
