package control

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"

	"sallyport/internal/mesh"
)

// agentAPI is spire.api.server.agent.v1.
type agentAPI struct {
	agentv1.UnimplementedAgentServer
	s *Server
}

// AttestAgent admits a node by its evidence and certifies the key it asks for.
func (a *agentAPI) AttestAgent(st grpc.BidiStreamingServer[agentv1.AttestAgentRequest, agentv1.AttestAgentResponse]) error {
	req, err := firstMessage(st, a.s.hello)
	if err != nil {
		return err
	}
	select {
	case a.s.attests <- struct{}{}: // not before: to be silent must not hold up others
		defer func() { <-a.s.attests }()
	default:
		return refuse(codes.ResourceExhausted, "too many attestations at once: try again later")
	}
	ctx, cancel := context.WithTimeout(st.Context(), a.s.hello)
	defer cancel()
	if wait, ok := a.s.refusals.take(addressOf(ctx), 0, a.s.cfg.Now()); !ok {
		return refuse(codes.ResourceExhausted, "too many refused attestations from this address: try again in %s", wait.Round(time.Second)+time.Second)
	}
	params := req.GetParams()
	if params.GetData() == nil || params.GetParams() == nil {
		return refuse(codes.InvalidArgument, "attestation data or certificate request is missing")
	}
	key, err := requestKey(params.GetParams().GetCsr())
	if err != nil {
		return refuse(codes.InvalidArgument, "%v", err)
	}
	record := Attestation{Type: params.GetData().GetType(), Peer: remote(ctx)}
	v := a.s.cfg.Verifiers[record.Type]
	if v == nil {
		record.Type = plain(record.Type[:min(len(record.Type), 64)]) // a stranger's words
		record.Refusal = RefusalKind
		return a.refused(ctx, record, refuse(codes.InvalidArgument, "node attestor %.64q is not configured on this issuer", record.Type))
	}
	id, selectors, err, gone := a.verify(ctx, st, v, params.GetData().GetPayload(), key)
	if gone != nil {
		return gone
	}
	if err != nil {
		why := a.s.cfg.Why(err)
		if ctx.Err() != nil || why == RefusalNone {
			return fmt.Errorf("verify %s evidence: %w", record.Type, err)
		}
		record.Refusal = why
		return a.refused(ctx, record, refuseEvidence(why))
	}
	record.Agent = id
	svid, err := a.admit(ctx, record, selectors, key)
	if err != nil {
		return err
	}
	return st.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{
		Result: &agentv1.AttestAgentResponse_Result{Svid: svid, Reattestable: reattestable(v)},
	}})
}

// reattestable reports whether the evidence may be shown again with another
// key. An agent then attests again instead of renewing.
func reattestable(v NodeVerifier) bool {
	_, asks := v.(Challenger)
	o, ok := v.(interface{ Once() bool })
	return asks && !(ok && o.Once())
}

// verify asks the verifier, with a challenge if its kind has one. gone is why
// the node did not answer.
func (a *agentAPI) verify(ctx context.Context, st grpc.BidiStreamingServer[agentv1.AttestAgentRequest, agentv1.AttestAgentResponse], v NodeVerifier, payload []byte, key crypto.PublicKey) (id spiffeid.ID, selectors []mesh.Selector, err, gone error) {
	c, ok := v.(Challenger)
	if !ok {
		id, selectors, err = v.Verify(ctx, payload, key)
		return id, selectors, err, nil
	}
	id, selectors, err = c.VerifyAnswer(ctx, payload, key, func(challenge []byte) ([]byte, error) {
		if gone = st.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: challenge}}); gone != nil {
			return nil, gone
		}
		var req *agentv1.AttestAgentRequest
		if req, gone = firstMessage(st, a.s.hello); gone != nil {
			if errors.Is(gone, io.EOF) {
				gone = refuse(codes.InvalidArgument, "the challenge was not answered")
			}
			return nil, gone
		}
		if _, ok := req.GetStep().(*agentv1.AttestAgentRequest_ChallengeResponse); !ok {
			gone = refuse(codes.InvalidArgument, "want the answer to the challenge")
			return nil, gone
		}
		return req.GetChallengeResponse(), nil
	})
	return id, selectors, err, gone
}

// admit records the agent and signs its SVID. A banned agent stays out.
func (a *agentAPI) admit(ctx context.Context, record Attestation, selectors []mesh.Selector, key crypto.PublicKey) (*types.X509SVID, error) {
	id := record.Agent
	if !id.MemberOf(a.s.cfg.TrustDomain) || !strings.HasPrefix(id.Path(), agentPrefix) {
		return nil, fmt.Errorf("verifier %q named %s, which is no agent of %s", record.Type, id, a.s.cfg.TrustDomain)
	}
	defer a.s.agents.lock(id)()
	old, err := a.s.cfg.Registry.GetAgent(ctx, id)
	if err != nil && !errors.Is(err, mesh.ErrNotFound) {
		return nil, fmt.Errorf("look up agent %s: %w", id, err)
	}
	if old.Banned {
		record.Refusal = RefusalBanned
		return nil, a.refused(ctx, record, refuseAgent(types.PermissionDeniedDetails_AGENT_BANNED, "agent %s is banned", id))
	}
	if err := a.record(ctx, record); err != nil {
		return nil, err
	}
	chain, err := a.s.cfg.Authority.SignAgent(ctx, id, key)
	if err != nil {
		return nil, during(err, "sign SVID of agent", id)
	}
	svid, err := chainToWire(id, chain)
	if err != nil {
		return nil, err
	}
	err = a.s.cfg.Registry.PutAgent(ctx, mesh.Agent{
		ID: id, AttestationType: record.Type, Selectors: selectors,
		Serial: chain[0].SerialNumber.String(), ExpiresAt: chain[0].NotAfter, Revision: old.Revision,
	})
	if errors.Is(err, mesh.ErrChanged) {
		return nil, agentError(id, err)
	}
	if err != nil {
		return nil, fmt.Errorf("record agent %s: %w", id, err)
	}
	if err := a.s.giveAgent(ctx, id, chain[0]); err != nil {
		return nil, err
	}
	// Whoever holds the SVID before is refused when it connects again.
	a.s.evict(id, refuse(codes.Unavailable, "agent %s attested again: connect with its new SVID", id))
	if !old.ID.IsZero() && old.ExpiresAt.After(a.s.cfg.Now()) {
		// By design: so a node that was lost is replaced. It may also be a
		// name that was given twice.
		a.s.cfg.Log.Warn("agent attested again, its SVID before no longer counts", slog.String("agent", id.String()),
			slog.String("serial_before", old.Serial), slog.String("peer", record.Peer))
	}
	a.s.cfg.Log.Info("agent attested", slog.String("agent", id.String()), slog.String("attestor", record.Type), slog.String("peer", record.Peer))
	return svid, nil
}

// refused records a refusal and returns it; what the record says is not hidden
// when recording fails.
func (a *agentAPI) refused(ctx context.Context, record Attestation, refusal error) error {
	a.s.refusals.take(addressOf(ctx), 1, a.s.cfg.Now())
	a.s.cfg.Log.Warn("attestation refused", slog.String("reason", string(record.Refusal)), slog.String("peer", record.Peer))
	if err := a.record(ctx, record); err != nil {
		return err
	}
	return refusal
}

func (a *agentAPI) record(ctx context.Context, record Attestation) error {
	if a.s.cfg.OnAttest == nil {
		return nil
	}
	if err := a.s.cfg.OnAttest(ctx, record); err != nil {
		return fmt.Errorf("record attestation: %w", err)
	}
	return nil
}

// RenewAgent certifies a new key for the calling agent. Both SVIDs are good
// until the new one is used, so that a lost reply locks nobody out.
func (a *agentAPI) RenewAgent(ctx context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	key, err := requestKey(req.GetParams().GetCsr())
	if err != nil {
		return nil, refuse(codes.InvalidArgument, "%v", err)
	}
	defer a.s.agents.lock(c.id)()
	agent, err := a.s.cfg.Registry.GetAgent(ctx, c.id)
	if err != nil {
		return nil, agentError(c.id, err)
	}
	if agent.Banned {
		return nil, refuseAgent(types.PermissionDeniedDetails_AGENT_BANNED, "agent %s is banned", c.id)
	}
	if agent.Serial != c.leaf.SerialNumber.String() {
		return nil, refuseAgent(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, "agent %s uses an SVID that a newer one replaced", c.id)
	}
	chain, err := a.s.cfg.Authority.SignAgent(ctx, c.id, key)
	if err != nil {
		return nil, during(err, "sign SVID of agent", c.id)
	}
	svid, err := chainToWire(c.id, chain)
	if err != nil {
		return nil, err
	}
	agent.NextSerial = chain[0].SerialNumber.String()
	err = a.s.cfg.Registry.PutAgent(ctx, agent)
	if errors.Is(err, mesh.ErrChanged) {
		return nil, agentError(c.id, err)
	}
	if err != nil {
		return nil, fmt.Errorf("record agent %s: %w", c.id, err)
	}
	if err := a.s.giveAgent(ctx, c.id, chain[0]); err != nil {
		return nil, err
	}
	return &agentv1.RenewAgentResponse{Svid: svid}, nil
}

// PostStatus is accepted and not kept: bundles are few and pushed.
func (a *agentAPI) PostStatus(context.Context, *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	return &agentv1.PostStatusResponse{}, nil
}

// firstMessage waits for a message of the peer, not for ever.
func firstMessage[Req, Resp any](st grpc.BidiStreamingServer[Req, Resp], within time.Duration) (*Req, error) {
	type first struct {
		m   *Req
		err error
	}
	got := make(chan first, 1)
	// The goroutine ends at the latest when the handler returns, which ends Recv.
	go func() {
		m, err := st.Recv()
		got <- first{m, err}
	}()
	t := time.NewTimer(within)
	defer t.Stop()
	select {
	case f := <-got:
		return f.m, f.err
	case <-t.C:
		return nil, refuse(codes.DeadlineExceeded, "no message within %s", within)
	}
}

func remote(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		return p.Addr.String()
	}
	return ""
}
