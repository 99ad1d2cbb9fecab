package control

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// A PolicyKeeper takes policies that operators push.
type PolicyKeeper interface {
	// PushPolicies puts a set in force; durable when it returns. Its error is of
	// Unfit or Unready when the caller is to be told.
	PushPolicies(ctx context.Context, set []byte) error
	// PolicySet returns a set that was pushed, mesh.ErrNotFound when it is not
	// kept. Revision 0 is the one before that in force.
	PolicySet(ctx context.Context, revision uint64) ([]byte, error)
}

func (s *Server) policies() (PolicyKeeper, error) {
	if s.cfg.Policies == nil {
		return nil, refuse(codes.FailedPrecondition, "this issuer takes no policies that are pushed: edit the reviewed files, or write policy.source: pushed into its configuration")
	}
	return s.cfg.Policies, nil
}

// PushPolicy puts a set in force.
func (a *adminAPI) PushPolicy(ctx context.Context, req *meshpb.PushPolicyRequest) (*meshpb.PushPolicyResponse, error) {
	k, err := a.s.policies()
	if err != nil {
		return nil, err
	}
	if err := k.PushPolicies(ctx, req.GetSet()); err != nil {
		return nil, err
	}
	return &meshpb.PushPolicyResponse{}, nil
}

// PolicySet returns a set that was pushed.
func (a *adminAPI) PolicySet(ctx context.Context, req *meshpb.PolicySetRequest) (*meshpb.PolicySetResponse, error) {
	k, err := a.s.policies()
	if err != nil {
		return nil, err
	}
	b, err := k.PolicySet(ctx, req.GetRevision())
	if errors.Is(err, mesh.ErrNotFound) {
		return nil, refuse(codes.NotFound, "%s", plain(err.Error()))
	}
	if err != nil {
		return nil, err
	}
	return &meshpb.PolicySetResponse{Set: b}, nil
}

// PushPolicy puts a set in force on the issuer.
func (a *Admin) PushPolicy(ctx context.Context, set []byte) error {
	_, err := meshpb.NewAdminClient(a.cc).PushPolicy(ctx, &meshpb.PushPolicyRequest{Set: set})
	return a.explainAny("push policies", err)
}

// PolicySet returns a set that was pushed. Revision 0 is the one before that in
// force.
func (a *Admin) PolicySet(ctx context.Context, revision uint64) ([]byte, error) {
	resp, err := meshpb.NewAdminClient(a.cc).PolicySet(ctx, &meshpb.PolicySetRequest{Revision: revision})
	return resp.GetSet(), a.explainAny("read policy set", err)
}
