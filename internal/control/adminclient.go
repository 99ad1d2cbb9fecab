package control

import (
	"context"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// Admin speaks to the issuer on its admin socket, or from afar.
type Admin struct {
	cc     *grpc.ClientConn
	socket string
	// remote says why no issuer answered from afar; nil on the socket.
	remote func(text string) error
}

// DialAdmin prepares an Admin for the socket at a path. It connects at the first
// call.
func DialAdmin(socket string) (*Admin, error) {
	cc, err := grpc.NewClient("unix:"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAdminMessage)),
		grpc.WithDisableServiceConfig(), grpc.WithNoProxy())
	if err != nil {
		return nil, fmt.Errorf("prepare connection to %s: %w", socket, err)
	}
	return &Admin{cc: cc, socket: socket}, nil
}

// Close ends the connection.
func (a *Admin) Close() error { return a.cc.Close() }

// A Token lets one node join once.
type Token struct {
	Value   string
	Expires time.Time
	// Agent is the identity that the node gets.
	Agent spiffeid.ID
}

// CreateJoinToken makes a token for an agent name. A ttl of zero is 10 minutes.
func (a *Admin) CreateJoinToken(ctx context.Context, agentName string, ttl time.Duration) (Token, error) {
	resp, err := meshpb.NewAdminClient(a.cc).CreateJoinToken(ctx, &meshpb.CreateJoinTokenRequest{AgentName: agentName, TtlSeconds: int64(seconds(ttl))})
	if err != nil {
		return Token{}, a.explain("create join token", err)
	}
	id, err := spiffeid.FromString(resp.GetAgentId())
	if err != nil {
		return Token{}, fmt.Errorf("create join token: agent: %w", err)
	}
	return Token{Value: resp.GetToken(), Expires: timeFromWire(resp.GetExpires()), Agent: id}, nil
}

// Agents lists the nodes that were attested.
func (a *Admin) Agents(ctx context.Context) ([]mesh.Agent, error) {
	var all []*types.Agent
	for token := ""; ; {
		resp, err := agentv1.NewAgentClient(a.cc).ListAgents(ctx, &agentv1.ListAgentsRequest{PageToken: token})
		if err != nil {
			return nil, a.explain("list agents", err)
		}
		all = append(all, resp.GetAgents()...)
		if token = resp.GetNextPageToken(); token == "" {
			return convert("list agents", all, agentFromWire)
		}
	}
}

// Entries lists who gets which identity. Origins are not carried.
func (a *Admin) Entries(ctx context.Context) ([]mesh.Entry, error) {
	var all []*types.Entry
	for token := ""; ; {
		resp, err := entryv1.NewEntryClient(a.cc).ListEntries(ctx, &entryv1.ListEntriesRequest{PageToken: token})
		if err != nil {
			return nil, a.explain("list entries", err)
		}
		all = append(all, resp.GetEntries()...)
		if token = resp.GetNextPageToken(); token == "" {
			return convert("list entries", all, entryFromWire)
		}
	}
}

// Status says what the issuer acts on.
func (a *Admin) Status(ctx context.Context) (mesh.IssuerStatus, error) {
	resp, err := meshpb.NewAdminClient(a.cc).Status(ctx, &meshpb.StatusRequest{})
	if err != nil {
		return mesh.IssuerStatus{}, a.explain("read status", err)
	}
	td, err := spiffeid.TrustDomainFromString(resp.GetTrustDomain())
	if err != nil {
		return mesh.IssuerStatus{}, fmt.Errorf("read status: %w", err)
	}
	rollout, err := rolloutFromWire(resp.GetRollout())
	if err != nil {
		return mesh.IssuerStatus{}, fmt.Errorf("read status: rollout: %w", err)
	}
	return mesh.IssuerStatus{
		TrustDomain: td, Revision: resp.GetRevision(), PolicyRevision: resp.GetPolicyRevision(),
		PolicyHash: resp.GetPolicyHash(), LastRefusal: resp.GetLastRefusal(), Started: timeFromWire(resp.GetStarted()), PolicySet: resp.GetPolicySet(),
		NextRevision: resp.GetNextRevision(), Rollout: rollout,
	}, nil
}

// Proxies says what each proxy acts on.
func (a *Admin) Proxies(ctx context.Context) ([]mesh.Proxy, error) {
	resp, err := meshpb.NewAdminClient(a.cc).Proxies(ctx, &meshpb.ProxiesRequest{})
	if err != nil {
		return nil, a.explain("list proxies", err)
	}
	return convert("list proxies", resp.GetProxies(), proxyFromWire)
}

// PageLink makes a link that opens the page once.
func (a *Admin) PageLink(ctx context.Context) (link string, expires time.Time, err error) {
	resp, err := meshpb.NewAdminClient(a.cc).PageLink(ctx, &meshpb.PageLinkRequest{})
	if err != nil {
		return "", time.Time{}, a.explain("make a link to the page", err)
	}
	return resp.GetUrl(), timeFromWire(resp.GetExpires()), nil
}

// Edges says who called whom from one time to another, and what was allowed
// and not called. The zero times stand for the last hour.
func (a *Admin) Edges(ctx context.Context, from, to time.Time) (mesh.Chart, error) {
	req := &meshpb.EdgesRequest{}
	if !from.IsZero() {
		req.From = timeToWire(from)
	}
	if !to.IsZero() {
		req.To = timeToWire(to)
	}
	resp, err := meshpb.NewAdminClient(a.cc).Edges(ctx, req)
	if err != nil {
		return mesh.Chart{}, a.explain("list edges", err)
	}
	c := mesh.Chart{From: timeFromWire(resp.GetFrom()), To: timeFromWire(resp.GetTo())}
	for _, w := range resp.GetEdges() {
		c.Edges = append(c.Edges, edgeFromWire(w))
	}
	for _, w := range resp.GetUnused() {
		c.Unused = append(c.Unused, mesh.Unused{Src: w.GetSrc(), Dst: w.GetDst(), Rule: w.GetRule()})
	}
	return c, nil
}

func convert[W, T any](verb string, in []W, f func(W) (T, error)) ([]T, error) {
	out := make([]T, len(in))
	for i, w := range in {
		var err error
		if out[i], err = f(w); err != nil {
			return nil, fmt.Errorf("%s: %w", verb, err)
		}
	}
	return out, nil
}

func (a *Admin) explain(verb string, err error) error {
	st := status.Convert(err)
	if st.Code() == codes.Unimplemented && a.remote != nil {
		return fmt.Errorf("%s: %w: the issuer does this on its own socket only", verb, ErrRefused)
	}
	if st.Code() == codes.Unavailable && a.remote != nil {
		return fmt.Errorf("%s: %w", verb, a.remote(st.Message()))
	}
	if st.Code() == codes.Unavailable {
		return fmt.Errorf("%s: %w at %s: %s; check that the issuer runs and that you are its user", verb, ErrUnreachable, a.socket, plain(st.Message()))
	}
	return fmt.Errorf("%s: %w", verb, refusal(st))
}
