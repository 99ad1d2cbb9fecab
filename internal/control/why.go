package control

import (
	"context"
	"errors"
	"regexp"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// decisionID is what a decision id looks like.
var decisionID = regexp.MustCompile(`^[A-Za-z0-9.-]{1,128}$`)

// Why explains the decision of a proxy to an operator.
func (a *adminAPI) Why(ctx context.Context, req *meshpb.WhyRequest) (*meshpb.WhyResponse, error) {
	if a.s.cfg.Explain == nil {
		return nil, refuse(codes.Unimplemented, "this issuer keeps no audit logs of proxies")
	}
	if !decisionID.MatchString(req.GetId()) {
		return nil, refuse(codes.InvalidArgument, "%.128q is no decision id; it stands in the header Sallyport-Decision and in the body of the refusal", req.GetId())
	}
	if err := a.s.may(ctx, spiffeid.ID{}); err != nil {
		return nil, err
	}
	b, err := a.s.cfg.Explain(ctx, req.GetId())
	if errors.Is(err, mesh.ErrNotFound) {
		return nil, refuse(codes.NotFound, "%v", err)
	}
	if err != nil {
		return nil, err
	}
	return &meshpb.WhyResponse{Account: b}, nil
}

// Why returns the account of a decision of a proxy, the JSON of authz.Recorded.
func (a *Admin) Why(ctx context.Context, id string) ([]byte, error) {
	resp, err := meshpb.NewAdminClient(a.cc).Why(ctx, &meshpb.WhyRequest{Id: id})
	if err != nil {
		return nil, a.explain("explain decision "+id, err)
	}
	return resp.GetAccount(), nil
}
