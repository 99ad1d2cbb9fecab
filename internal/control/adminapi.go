package control

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// Lifetimes of a join token.
const (
	defaultTokenTTL = 10 * time.Minute
	maxTokenTTL     = 24 * time.Hour
)

// adminAPI is the operator's hand. It is served on the admin socket, whose
// listener has checked the user, and over mutual TLS to who has a right to it.
type adminAPI struct {
	meshpb.UnimplementedAdminServer
	s *Server
}

// CreateJoinToken makes a token for an agent name.
func (a *adminAPI) CreateJoinToken(ctx context.Context, req *meshpb.CreateJoinTokenRequest) (*meshpb.CreateJoinTokenResponse, error) {
	ttl := req.GetTtlSeconds()
	if ttl < 0 || ttl > int64(maxTokenTTL/time.Second) {
		return nil, errTokenTTL()
	}
	id, err := AgentID(a.s.cfg.TrustDomain, req.GetAgentName())
	if err != nil {
		return nil, refuse(codes.InvalidArgument, "agent name %.64q: %v: use letters, digits, '-', '_' and '.'", req.GetAgentName(), err)
	}
	token, expires, err := a.createToken(ctx, req.GetAgentName(), time.Duration(ttl)*time.Second)
	if err != nil {
		return nil, err
	}
	return &meshpb.CreateJoinTokenResponse{Token: token, Expires: timeToWire(expires), AgentId: id.String()}, nil
}

func (a *adminAPI) createToken(ctx context.Context, name string, ttl time.Duration) (string, time.Time, error) {
	if ttl == 0 {
		ttl = defaultTokenTTL
	}
	if ttl < time.Second || ttl > maxTokenTTL {
		return "", time.Time{}, errTokenTTL()
	}
	token, expires, err := a.s.cfg.Registry.CreateToken(ctx, name, ttl)
	if err != nil {
		return "", time.Time{}, fmt.Errorf("create join token: %w", err)
	}
	id, err := AgentID(a.s.cfg.TrustDomain, name)
	if err != nil {
		return "", time.Time{}, fmt.Errorf("create join token: %w", err)
	}
	if a.s.cfg.OnToken != nil {
		if err := a.s.cfg.OnToken(ctx, id, expires, remote(ctx)); err != nil {
			return "", time.Time{}, fmt.Errorf("record join token: %w", err)
		}
	}
	return token, expires, nil
}

func errTokenTTL() error {
	return refuse(codes.InvalidArgument, "a token's lifetime is 1s to %s", maxTokenTTL)
}

// Status says what the issuer acts on.
func (a *adminAPI) Status(ctx context.Context, _ *meshpb.StatusRequest) (*meshpb.StatusResponse, error) {
	if _, ok, _ := a.s.verdict(ctx, spiffeid.ID{}); !ok {
		return nil, a.s.may(ctx, spiffeid.ID{}) // which records that it may not
	}
	st := a.s.cfg.Registry.Status()
	rollout, err := rolloutToWire(st.Rollout)
	if err != nil {
		return nil, fmt.Errorf("encode rollout: %w", err)
	}
	return &meshpb.StatusResponse{
		TrustDomain: st.TrustDomain.Name(), Revision: st.Revision, PolicyRevision: st.PolicyRevision,
		PolicyHash: st.PolicyHash, LastRefusal: st.LastRefusal, Started: timeToWire(st.Started), PolicySet: st.PolicySet,
		NextRevision: st.NextRevision, Rollout: rollout,
	}, nil
}

// Proxies says what each proxy acts on that the caller may see.
func (a *adminAPI) Proxies(ctx context.Context, _ *meshpb.ProxiesRequest) (*meshpb.ProxiesResponse, error) {
	resp := &meshpb.ProxiesResponse{}
	for _, p := range visible(ctx, a.s, a.s.cfg.Registry.Proxies(), func(p mesh.Proxy) spiffeid.ID { return p.Workload }) {
		resp.Proxies = append(resp.Proxies, proxyToWire(p))
	}
	return resp, nil
}

// Edges says who called whom.
func (a *adminAPI) Edges(ctx context.Context, req *meshpb.EdgesRequest) (*meshpb.EdgesResponse, error) {
	if a.s.cfg.Chart == nil {
		return nil, refuse(codes.FailedPrecondition, "this issuer keeps no map")
	}
	from, to := timeFromWire(req.GetFrom()), timeFromWire(req.GetTo())
	if to.IsZero() {
		to = a.s.cfg.Now()
	}
	if from.IsZero() {
		from = to.Add(-time.Hour)
	}
	if !from.Before(to) {
		return nil, refuse(codes.InvalidArgument, "the stretch from %s to %s has no length", stamp(from), stamp(to))
	}
	c, err := a.s.cfg.Chart(ctx, from, to)
	if err != nil {
		return nil, err
	}
	resp := &meshpb.EdgesResponse{From: timeToWire(c.From), To: timeToWire(c.To)}
	for _, e := range c.Edges {
		resp.Edges = append(resp.Edges, edgeToWire(e))
	}
	for _, u := range c.Unused {
		resp.Unused = append(resp.Unused, &meshpb.UnusedEdge{Src: u.Src, Dst: u.Dst, Rule: u.Rule})
	}
	return resp, nil
}

// PageLink makes a link that opens the page once.
func (a *adminAPI) PageLink(ctx context.Context, _ *meshpb.PageLinkRequest) (*meshpb.PageLinkResponse, error) {
	if a.s.cfg.PageLink == nil {
		return nil, refuse(codes.FailedPrecondition, "this issuer serves no page on a loopback address; write page.listen, such as 127.0.0.1:7070, into its configuration")
	}
	link, expires, err := a.s.cfg.PageLink(ctx)
	if err != nil {
		return nil, err
	}
	return &meshpb.PageLinkResponse{Url: link, Expires: timeToWire(expires)}, nil
}

// freshName names an agent that nobody named.
func freshName() string { return strings.ToLower(rand.Text()) }
