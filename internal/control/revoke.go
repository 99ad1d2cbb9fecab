package control

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// revokedPage bounds the entries of one message: far below maxMessage.
const revokedPage = 5000

// give records X.509-SVIDs before they are given out, so that they can be
// revoked. What became of their entries and agent meanwhile is for the caller
// to look at afterwards: a withdrawal before the record did not see them.
func (s *Server) give(ctx context.Context, list ...mesh.Issued) error {
	if err := s.cfg.Registry.RecordIssued(ctx, list); err != nil {
		return fmt.Errorf("give out SVIDs: %w", err)
	}
	return nil
}

// giveAgent records an agent's own SVID. The agent gets none when another issuer
// has banned it meanwhile.
func (s *Server) giveAgent(ctx context.Context, id spiffeid.ID, leaf *x509.Certificate) error {
	if err := s.give(ctx, mesh.IssuedOf(leaf, id, "", id)); err != nil {
		return err
	}
	_, err := s.still(ctx, id)
	return err
}

// still are the entries that an agent has after something was recorded for it;
// none when it was banned meanwhile.
func (s *Server) still(ctx context.Context, agent spiffeid.ID) ([]mesh.Entry, error) {
	a, err := s.cfg.Registry.GetAgent(ctx, agent)
	if err != nil {
		return nil, agentError(agent, err)
	}
	if a.Banned {
		return nil, refuseAgent(types.PermissionDeniedDetails_AGENT_BANNED, "agent %s is banned", agent)
	}
	return s.cfg.Registry.EntriesFor(agent), nil
}

// revoke tells the proxy what was revoked since it was told last: on a new
// stream, everything that is in force.
func (sub *subscription) revoke() error {
	known := sub.s.cfg.Registry.Revocations()
	if known.Revision <= sub.revoked {
		return nil
	}
	// The revision says that everything up to it was told, so it comes last.
	pages := slices.Collect(slices.Chunk(known.After(sub.revoked, sub.s.cfg.Now()), revokedPage))
	if len(pages) == 0 {
		pages = append(pages, nil)
	}
	for i, page := range pages {
		m := &meshpb.Revocations{}
		if i == len(pages)-1 {
			m.Revision = known.Revision
		}
		for _, r := range page {
			m.Revoked = append(m.Revoked, &meshpb.Revoked{Serial: r.Serial, Until: timeToWire(r.Until), Why: r.Why})
		}
		if err := sub.st.Send(&meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_Revocations{Revocations: m}}); err != nil {
			return err
		}
	}
	sub.revoked = known.Revision
	return nil
}

func revokedFromWire(w *meshpb.Revoked) (mesh.RevokedSVID, error) {
	r := mesh.RevokedSVID{Serial: w.GetSerial(), Until: timeFromWire(w.GetUntil()), Why: w.GetWhy()}
	return r, r.Validate()
}

// distrust acts on revocations. One that is not understood does not keep the
// others from being in force, but then the proxy confirms nothing.
func (s *subscriberState) distrust(ctx context.Context, m *meshpb.Revocations) error {
	if m == nil {
		return nil
	}
	var errs []error
	list := make([]mesh.RevokedSVID, 0, len(m.GetRevoked()))
	for _, w := range m.GetRevoked() {
		r, err := revokedFromWire(w)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		list = append(list, r)
	}
	s.handler.OnRevoked(ctx, list)
	if s.spoiled = s.spoiled || len(errs) > 0; !s.spoiled {
		s.revoked = max(s.revoked, m.GetRevision())
	}
	return errors.Join(errs...)
}

// Revoke ends what was issued before its time.
func (a *adminAPI) Revoke(ctx context.Context, req *meshpb.RevokeRequest) (*meshpb.RevokeResponse, error) {
	k, err := a.s.keeper()
	if err != nil {
		return nil, err
	}
	var o mesh.RevokeOrder
	switch req.GetWhat().(type) {
	case *meshpb.RevokeRequest_Serial:
		if o.Serial, err = mesh.ParseSerial(req.GetSerial()); err != nil {
			return nil, refuse(codes.InvalidArgument, "serial: %v", err)
		}
	case *meshpb.RevokeRequest_Entry:
		if o.Entry = req.GetEntry(); o.Entry == "" || len(o.Entry) > maxID {
			return nil, refuse(codes.InvalidArgument, "entry: want the ID of an entry")
		}
	case *meshpb.RevokeRequest_Id:
		if o.ID, err = workloadID(req.GetId(), a.s.cfg.TrustDomain); err != nil {
			return nil, refuse(codes.InvalidArgument, "id: %v", err)
		}
	default:
		return nil, refuse(codes.InvalidArgument, "say what to revoke: a serial number, an entry or an identity")
	}
	res, err := k.Revoke(ctx, o)
	if errors.Is(err, mesh.ErrNotFound) {
		return nil, refuse(codes.NotFound, "no X.509-SVID that still holds was issued so (a node's own ends when the agent is banned)")
	}
	if err != nil {
		return nil, err
	}
	resp := &meshpb.RevokeResponse{Revision: res.Revision}
	for _, r := range res.SVIDs {
		resp.Revoked = append(resp.Revoked, &meshpb.Revoked{Serial: r.Serial, Until: timeToWire(r.Until), Why: r.Why, Id: r.ID.String()})
	}
	return resp, nil
}

// Revoke ends what was issued before its time. Proxies whose Revoked is the
// revision of the result, or greater, act on it.
func (a *Admin) Revoke(ctx context.Context, o mesh.RevokeOrder) (mesh.RevokeResult, error) {
	const verb = "revoke"
	req := &meshpb.RevokeRequest{}
	switch {
	case o.Serial != "":
		req.What = &meshpb.RevokeRequest_Serial{Serial: o.Serial}
	case o.Entry != "":
		req.What = &meshpb.RevokeRequest_Entry{Entry: o.Entry}
	default:
		req.What = &meshpb.RevokeRequest_Id{Id: o.ID.String()}
	}
	resp, err := meshpb.NewAdminClient(a.cc).Revoke(ctx, req)
	if err != nil {
		return mesh.RevokeResult{}, a.explain(verb, err)
	}
	out := mesh.RevokeResult{Revision: resp.GetRevision(), SVIDs: []mesh.RevokedSVID{}}
	for _, w := range resp.GetRevoked() {
		r, err := revokedFromWire(w)
		if err != nil {
			return out, fmt.Errorf("%s: %w", verb, err)
		}
		if r.ID, err = spiffeid.FromString(w.GetId()); err != nil {
			return out, fmt.Errorf("%s: %w", verb, err)
		}
		out.SVIDs = append(out.SVIDs, r)
	}
	return out, nil
}
