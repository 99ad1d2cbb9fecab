package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// localUser is who calls on the admin socket.
const localUser = "the user of the admin socket"

// A PolicyPush is a set of policies that an operator pushes.
type PolicyPush struct {
	// Set and Fallback are canonical files. Fallback, by which a canary group
	// goes back, may be missing.
	Set, Fallback []byte
	// Group are the selectors of those who try the set first, for the time of
	// Bake; none: it is in force for all.
	Group []string
	Bake  time.Duration
	// Overtake ends what a canary group tries.
	Overtake bool
	// By is who pushes, for people. The server fills it in.
	By string
}

// The ends of what a canary group tries.
const (
	MovePromote  = "promote"
	MoveTakeBack = "take_back"
)

// A PolicyMove ends what a canary group tries.
type PolicyMove struct {
	// Move is MovePromote or MoveTakeBack.
	Move string
	// Revision is the one that is meant; 0 is whichever is tried.
	Revision uint64
	// Force promotes without those who have not acknowledged.
	Force bool
	// By is who moves it, for people. The server fills it in.
	By string
}

// A PolicyKeeper takes policies that operators push.
type PolicyKeeper interface {
	// PushPolicies puts a set in force, or has a canary group try it; durable
	// when it returns. Its error is of Unfit or Unready when the caller is to be
	// told; so is that of MovePolicies.
	PushPolicies(ctx context.Context, p PolicyPush) error
	MovePolicies(ctx context.Context, m PolicyMove) error
	// PolicySet returns a set that was pushed, mesh.ErrNotFound when it is not
	// kept. Revision 0 is the one before that in force.
	PolicySet(ctx context.Context, revision uint64) ([]byte, error)
}

// policies is asked by each call that is about pushed policies. It looks at the
// rows too, which may deny what the socket or another row allows.
func (s *Server) policies(ctx context.Context) (PolicyKeeper, error) {
	if err := s.may(ctx, spiffeid.ID{}); err != nil {
		return nil, err
	}
	if s.cfg.Policies == nil {
		return nil, refuse(codes.FailedPrecondition, "this issuer takes no policies that are pushed: edit the reviewed files, or write policy.source: pushed into its configuration")
	}
	return s.cfg.Policies, nil
}

// byWhom names the operator of a call.
func byWhom(ctx context.Context) string {
	if o, ok := ctx.Value(operatorKey{}).(operator); ok && !o.id.IsZero() {
		return o.id.String()
	}
	return localUser
}

// PushPolicy puts a set in force, or has a canary group try it.
func (a *adminAPI) PushPolicy(st grpc.ClientStreamingServer[meshpb.PushPolicyRequest, meshpb.PushPolicyResponse]) error {
	ctx := st.Context()
	k, err := a.s.policies(ctx)
	if err != nil {
		return err
	}
	p := PolicyPush{By: byWhom(ctx)}
	for n := 0; ; n++ {
		m, err := st.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		switch later := m.GetOvertake() || m.GetCanary() != nil; {
		case n == 0:
			p.Overtake = m.GetOvertake()
			if c := m.GetCanary(); c != nil {
				if p.Group = c.GetGroup(); len(p.Group) == 0 {
					return refuse(codes.InvalidArgument, "a canary group without a selector: name its proxies")
				}
				if c.GetBakeSeconds() < 0 || c.GetBakeSeconds() > int64(mesh.MaxBake/time.Second) {
					return refuse(codes.InvalidArgument, "bake: %d seconds are not from 0 to %s", c.GetBakeSeconds(), mesh.MaxBake)
				}
				p.Bake = time.Duration(c.GetBakeSeconds()) * time.Second
			}
		case later:
			return refuse(codes.InvalidArgument, "only the first message of a push says how it is meant")
		}
		if len(p.Set)+len(m.GetSet()) > maxSet || len(p.Fallback)+len(m.GetFallback()) > maxSet {
			return refuse(codes.InvalidArgument, "a set of policies has at most %d bytes", maxSet)
		}
		p.Set, p.Fallback = append(p.Set, m.GetSet()...), append(p.Fallback, m.GetFallback()...)
	}
	switch {
	case len(p.Set) == 0:
		return refuse(codes.InvalidArgument, "a push without a set")
	case len(p.Group) > 0 && p.Overtake:
		return refuse(codes.InvalidArgument, "a set that a canary group tries first overtakes nothing: promote or take back what is tried")
	case len(p.Group) == 0 && len(p.Fallback) > 0:
		return refuse(codes.InvalidArgument, "a fallback is of a canary group, which is missing")
	}
	if err := k.PushPolicies(ctx, p); err != nil {
		return err
	}
	return st.SendAndClose(&meshpb.PushPolicyResponse{})
}

// MovePolicy ends what a canary group tries.
func (a *adminAPI) MovePolicy(ctx context.Context, req *meshpb.MovePolicyRequest) (*meshpb.MovePolicyResponse, error) {
	k, err := a.s.policies(ctx)
	if err != nil {
		return nil, err
	}
	m := PolicyMove{Move: req.GetMove(), Revision: req.GetRevision(), Force: req.GetForce(), By: byWhom(ctx)}
	if m.Move != MovePromote && m.Move != MoveTakeBack {
		return nil, refuse(codes.InvalidArgument, "move %.64q is neither %q nor %q", m.Move, MovePromote, MoveTakeBack)
	}
	if err := k.MovePolicies(ctx, m); err != nil {
		return nil, err
	}
	return &meshpb.MovePolicyResponse{}, nil
}

// PolicySet returns a set that was pushed.
func (a *adminAPI) PolicySet(req *meshpb.PolicySetRequest, st grpc.ServerStreamingServer[meshpb.PolicySetResponse]) error {
	k, err := a.s.policies(st.Context())
	if err != nil {
		return err
	}
	b, err := k.PolicySet(st.Context(), req.GetRevision())
	if errors.Is(err, mesh.ErrNotFound) {
		return refuse(codes.NotFound, "%s", plain(err.Error()))
	}
	if err != nil {
		return err
	}
	for len(b) > 0 {
		part := b[:min(len(b), setPart)]
		if err := st.Send(&meshpb.PolicySetResponse{Set: part}); err != nil {
			return err
		}
		b = b[len(part):]
	}
	return nil
}

// PushPolicy puts a set in force on the issuer, or has a canary group try it.
func (a *Admin) PushPolicy(ctx context.Context, p PolicyPush) error {
	const verb = "push policies"
	st, err := meshpb.NewAdminClient(a.cc).PushPolicy(ctx)
	if err != nil {
		return a.explain(verb, err)
	}
	m := &meshpb.PushPolicyRequest{Overtake: p.Overtake}
	if len(p.Group) > 0 {
		m.Canary = &meshpb.Canary{Group: p.Group, BakeSeconds: int64(p.Bake / time.Second)}
	}
	for set, back := p.Set, p.Fallback; ; m = new(meshpb.PushPolicyRequest) {
		if m.Set, set = cut(set); len(m.GetSet()) == 0 {
			m.Fallback, back = cut(back)
		}
		// After an error the answer says why.
		if st.Send(m) != nil || len(set)+len(back) == 0 {
			break
		}
	}
	_, err = st.CloseAndRecv()
	return a.explainAny(verb, err)
}

// cut takes what one message holds.
func cut(b []byte) (part, rest []byte) {
	n := min(len(b), setPart)
	return b[:n], b[n:]
}

// MovePolicy ends what a canary group tries.
func (a *Admin) MovePolicy(ctx context.Context, m PolicyMove) error {
	_, err := meshpb.NewAdminClient(a.cc).MovePolicy(ctx, &meshpb.MovePolicyRequest{Move: m.Move, Revision: m.Revision, Force: m.Force})
	return a.explainAny("end the rollout", err)
}

// PolicySet returns a set that was pushed. Revision 0 is the one before that in
// force.
func (a *Admin) PolicySet(ctx context.Context, revision uint64) ([]byte, error) {
	const verb = "read policy set"
	st, err := meshpb.NewAdminClient(a.cc).PolicySet(ctx, &meshpb.PolicySetRequest{Revision: revision})
	if err != nil {
		return nil, a.explain(verb, err)
	}
	var set []byte
	for {
		m, err := st.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return set, nil
		case err != nil:
			return nil, a.explain(verb, err)
		case len(set)+len(m.GetSet()) > maxSet:
			return nil, fmt.Errorf("%s: %w: more than %d bytes", verb, ErrFailed, maxSet)
		}
		set = append(set, m.GetSet()...)
	}
}

// rolloutToWire is nil before the first.
func rolloutToWire(r *mesh.Rollout) ([]byte, error) {
	if r == nil {
		return nil, nil
	}
	return json.Marshal(r)
}

func rolloutFromWire(b []byte) (*mesh.Rollout, error) {
	if len(b) == 0 {
		return nil, nil
	}
	r := new(mesh.Rollout)
	return r, json.Unmarshal(b, r)
}
