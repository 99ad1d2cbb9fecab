package control

import (
	"context"
	"slices"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
)

// Bounds of a report of edges.
const (
	maxEdges     = 10_000
	maxEnd       = 512     // bytes of a SPIFFE ID
	maxHost      = 255     // bytes of a host
	maxEdgeCount = 1 << 40 // what an outage of days can add up
)

// ReportEdges adds counts. An agent speaks only of calls from or to a workload
// of its own, and that of a gateway also of those to hosts outside.
func (a *meshAPI) ReportEdges(ctx context.Context, r *meshpb.EdgeReport) (*meshpb.EdgeAck, error) {
	who, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	if n := len(r.GetEdges()); n > maxEdges {
		return nil, refuse(codes.InvalidArgument, "%d edges in a report, at most %d", n, maxEdges)
	}
	own := map[string]bool{}
	for _, e := range a.s.cfg.Registry.EntriesFor(who.id) {
		own[e.SPIFFEID.String()] = true
	}
	leads := sync.OnceValue(func() bool { return a.leadsOut(who.id) })
	edges := make([]mesh.Edge, 0, len(r.GetEdges()))
	for _, w := range r.GetEdges() {
		rest := w.GetSrc() == telemetry.Other && w.GetDst() == telemetry.Other // for which a report had no room
		if !own[w.GetSrc()] && !own[w.GetDst()] && !rest && !(strings.HasPrefix(w.GetDst(), "host:") && leads()) {
			return nil, refuse(codes.PermissionDenied, "an edge has neither end at a workload of agent %s", who.id)
		}
		e := edgeFromWire(w)
		if err := checkEnds(&e); err != nil {
			return nil, err
		}
		if max(w.GetAllowed(), w.GetDenied(), w.GetErrors()) > maxEdgeCount {
			return nil, refuse(codes.InvalidArgument, "an edge counts more than %d calls", uint64(maxEdgeCount))
		}
		if len(w.GetTook()) > mesh.Buckets {
			return nil, refuse(codes.InvalidArgument, "an edge has %d buckets, at most %d", len(w.GetTook()), mesh.Buckets)
		}
		edges = append(edges, e)
	}
	if len(edges) > 0 {
		a.s.cfg.Registry.AddEdges(who.id, edges)
	}
	return &meshpb.EdgeAck{}, nil
}

// checkEnds refuses what no proxy of ours counts: the ends are kept for 30 days,
// and an operator's terminal shows them. A SPIFFE ID that is good and long is
// counted among others, since a foreign caller may have one.
func checkEnds(e *mesh.Edge) error {
	for _, end := range []*string{&e.Src, &e.Dst} {
		host, isHost := strings.CutPrefix(*end, "host:")
		switch {
		case *end == "", *end == telemetry.Other, *end == telemetry.OtherHost:
		case isHost && len(host) <= maxHost && mesh.CheckHostRef(host) == nil:
		case isHost || len(*end) > maxID:
			return refuse(codes.InvalidArgument, "an edge names a host that is none")
		default:
			if _, err := spiffeid.FromString(*end); err != nil {
				return refuse(codes.InvalidArgument, "an edge names an end that is neither a SPIFFE ID nor a host")
			}
			if len(*end) > maxEnd {
				*end = telemetry.Other
			}
		}
	}
	if len(e.Proto) > 64 || strings.ContainsFunc(e.Proto, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && !strings.ContainsRune("./+-_", r)
	}) {
		return refuse(codes.InvalidArgument, "an edge names a protocol that is none")
	}
	return nil
}

// leadsOut says that one of the agent's proxies is a gateway.
func (a *meshAPI) leadsOut(agent spiffeid.ID) bool {
	return slices.ContainsFunc(a.s.cfg.Registry.Proxies(), func(p mesh.Proxy) bool { return p.Agent == agent && p.Kind == KindGateway })
}
