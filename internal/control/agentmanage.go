package control

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"sallyport/internal/mesh"
)

// expiresForm is how SPIRE writes the time of by_expires_before.
const expiresForm = "2006-01-02 15:04:05 -0700 -07"

// An agentFilter is the filter of CountAgents and of ListAgents.
type agentFilter interface {
	GetByAttestationType() string
	GetBySelectorMatch() *types.SelectorMatch
	GetByBanned() *wrapperspb.BoolValue
	GetByCanReattest() *wrapperspb.BoolValue
	GetByExpiresBefore() string
}

// filtered returns the agents that the caller may see and the filter keeps, by
// ID.
func (a *agentAPI) filtered(ctx context.Context, f agentFilter) ([]mesh.Agent, error) {
	var keep []func(mesh.Agent) bool
	if t := f.GetByAttestationType(); t != "" {
		keep = append(keep, func(g mesh.Agent) bool { return g.AttestationType == t })
	}
	if m := f.GetBySelectorMatch(); m != nil {
		match, err := selectorMatch("filter.by_selector_match", m)
		if err != nil {
			return nil, err
		}
		keep = append(keep, func(g mesh.Agent) bool { return match(g.Selectors) })
	}
	if b := f.GetByBanned(); b != nil {
		keep = append(keep, func(g mesh.Agent) bool { return g.Banned == b.GetValue() })
	}
	if b := f.GetByCanReattest(); b != nil {
		keep = append(keep, func(g mesh.Agent) bool { return agentToWire(g).CanReattest == b.GetValue() })
	}
	if text := f.GetByExpiresBefore(); text != "" {
		before, err := time.Parse(expiresForm, text)
		if err != nil {
			return nil, refuse(codes.InvalidArgument, "filter.by_expires_before: %.64q is not like %q", text, expiresForm)
		}
		keep = append(keep, func(g mesh.Agent) bool { return g.ExpiresAt.Before(before) })
	}
	all, err := a.s.cfg.Registry.ListAgents(ctx)
	if err != nil {
		return nil, fmt.Errorf("list agents: %w", err)
	}
	all = slices.DeleteFunc(all, func(g mesh.Agent) bool {
		return slices.ContainsFunc(keep, func(k func(mesh.Agent) bool) bool { return !k(g) })
	})
	all = visible(ctx, a.s, all, func(g mesh.Agent) spiffeid.ID { return g.ID })
	slices.SortFunc(all, func(x, y mesh.Agent) int { return strings.Compare(x.ID.String(), y.ID.String()) })
	return all, nil
}

// CountAgents counts what ListAgents would list.
func (a *agentAPI) CountAgents(ctx context.Context, req *agentv1.CountAgentsRequest) (*agentv1.CountAgentsResponse, error) {
	all, err := a.filtered(ctx, req.GetFilter())
	if err != nil {
		return nil, err
	}
	return &agentv1.CountAgentsResponse{Count: int32(min(len(all), math.MaxInt32))}, nil
}

// ListAgents lists the nodes that were attested, a page at a time.
func (a *agentAPI) ListAgents(ctx context.Context, req *agentv1.ListAgentsRequest) (*agentv1.ListAgentsResponse, error) {
	all, err := a.filtered(ctx, req.GetFilter())
	if err != nil {
		return nil, err
	}
	page, next, err := pageOf(all, func(g mesh.Agent) string { return g.ID.String() }, req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, err
	}
	resp := &agentv1.ListAgentsResponse{NextPageToken: next}
	for _, g := range page {
		resp.Agents = append(resp.Agents, maskedAgent(g, req.GetOutputMask()))
	}
	return resp, nil
}

func maskedAgent(g mesh.Agent, m *types.AgentMask) *types.Agent {
	w := agentToWire(g)
	if m != nil {
		drop(!m.AttestationType, &w.AttestationType)
		drop(!m.X509SvidSerialNumber, &w.X509SvidSerialNumber)
		drop(!m.X509SvidExpiresAt, &w.X509SvidExpiresAt)
		drop(!m.Selectors, &w.Selectors)
		drop(!m.Banned, &w.Banned)
		drop(!m.CanReattest, &w.CanReattest)
	}
	return w
}

// named reads the agent that a call concerns, and asks whether the caller may
// make it.
func (a *agentAPI) named(ctx context.Context, w *types.SPIFFEID) (spiffeid.ID, error) {
	id, err := idFromWire(w)
	if err != nil {
		return id, refuse(codes.InvalidArgument, "id: %v", err)
	}
	if !id.MemberOf(a.s.cfg.TrustDomain) || !strings.HasPrefix(id.Path(), agentPrefix) {
		return id, refuse(codes.InvalidArgument, "id: %s is not an agent of %s", id, a.s.cfg.TrustDomain)
	}
	return id, a.s.may(ctx, id)
}

func (a *agentAPI) get(ctx context.Context, id spiffeid.ID) (mesh.Agent, error) {
	g, err := a.s.cfg.Registry.GetAgent(ctx, id)
	if errors.Is(err, mesh.ErrNotFound) {
		return g, refuse(codes.NotFound, "agent not found")
	}
	if err != nil {
		return g, fmt.Errorf("look up agent %s: %w", id, err)
	}
	return g, nil
}

// GetAgent returns one agent.
func (a *agentAPI) GetAgent(ctx context.Context, req *agentv1.GetAgentRequest) (*types.Agent, error) {
	id, err := a.named(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	g, err := a.get(ctx, id)
	if err != nil {
		return nil, err
	}
	return maskedAgent(g, req.GetOutputMask()), nil
}

// BanAgent keeps an agent out until DeleteAgent. Its streams end, and what was
// issued to it is revoked.
func (a *agentAPI) BanAgent(ctx context.Context, req *agentv1.BanAgentRequest) (*emptypb.Empty, error) {
	id, err := a.named(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	defer a.s.agents.lock(id)()
	for {
		g, err := a.get(ctx, id)
		if err != nil {
			return nil, err
		}
		g.Banned = true
		err = a.s.cfg.Registry.PutAgent(ctx, g)
		if err == nil {
			break
		}
		if !errors.Is(err, mesh.ErrChanged) {
			return nil, fmt.Errorf("ban agent %s: %w", id, err)
		}
	}
	a.s.evict(id, refuseAgent(types.PermissionDeniedDetails_AGENT_BANNED, "agent %s is banned", id))
	return &emptypb.Empty{}, nil
}

// DeleteAgent forgets an agent and its ban. It has to attest again.
func (a *agentAPI) DeleteAgent(ctx context.Context, req *agentv1.DeleteAgentRequest) (*emptypb.Empty, error) {
	k, err := a.s.keeper()
	if err != nil {
		return nil, err
	}
	id, err := a.named(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	defer a.s.agents.lock(id)()
	if _, err := a.get(ctx, id); err != nil {
		return nil, err
	}
	if err := k.DeleteAgent(ctx, id); err != nil {
		return nil, err
	}
	a.s.evict(id, refuseAgent(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %s is not attested", id))
	return &emptypb.Empty{}, nil
}

// CreateJoinToken makes a token for the agent that agent_id names, or for a
// fresh name.
func (a *agentAPI) CreateJoinToken(ctx context.Context, req *agentv1.CreateJoinTokenRequest) (*types.JoinToken, error) {
	if req.GetToken() != "" {
		return nil, refuse(codes.InvalidArgument, "token: its value is chosen by the issuer, leave it out")
	}
	name := freshName()
	if req.GetAgentId() != nil {
		id, err := idFromWire(req.GetAgentId())
		if err != nil {
			return nil, refuse(codes.InvalidArgument, "agent_id: %v", err)
		}
		if name, err = agentName(id, a.s.cfg.TrustDomain); err != nil {
			return nil, refuse(codes.InvalidArgument, "agent_id: %v", err)
		}
	}
	id, err := AgentID(a.s.cfg.TrustDomain, name)
	if err != nil {
		return nil, refuse(codes.InvalidArgument, "agent_id: %v", err)
	}
	if err := a.s.may(ctx, id); err != nil {
		return nil, err
	}
	token, expires, err := (&adminAPI{s: a.s}).createToken(ctx, name, time.Duration(req.GetTtl())*time.Second)
	if err != nil {
		return nil, err
	}
	return &types.JoinToken{Value: token, ExpiresAt: expires.Unix()}, nil
}

// agentName is the inverse of AgentID.
func agentName(id spiffeid.ID, td spiffeid.TrustDomain) (string, error) {
	name, ok := strings.CutPrefix(id.Path(), joinPrefix)
	if !ok || !id.MemberOf(td) || strings.Contains(name, "/") {
		return "", fmt.Errorf("%s is not of the form spiffe://%s%s<name>", id, td, joinPrefix)
	}
	return name, nil
}
