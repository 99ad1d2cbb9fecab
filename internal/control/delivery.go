package control

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

const (
	// maxSamples bounds the samples of one report, maxCounted what each counts:
	// more calls than a proxy can make between two reports.
	maxSamples = 256
	maxCounted = 100_000_000
)

// A RolloutMove is what an operator wants of the rollout of a route.
type RolloutMove struct {
	Service mesh.ServiceName
	Route   string
	// Move is "start", "pause", "promote" or "abort".
	Move string
	// Force promotes though the canary is not judged to do well.
	Force bool
	// By is who moves it, for people. The server fills it in.
	By string
}

// A RolloutKeeper looks after the rollouts of routes.
type RolloutKeeper interface {
	// Rollouts are all of them, as they stand.
	Rollouts(ctx context.Context) ([]mesh.Delivery, error)
	// MoveRollout moves one; durable when it returns. Its error is of Unready
	// when the caller is to be told.
	MoveRollout(ctx context.Context, m RolloutMove) (mesh.Delivery, error)
	// TakeSamples counts what the proxy of a workload reports. It is quick.
	TakeSamples(workload spiffeid.ID, list []mesh.Sample)
}

// ReportSamples counts what a proxy reports of its own calls.
func (a *meshAPI) ReportSamples(ctx context.Context, r *meshpb.SampleReport) (*meshpb.SampleAck, error) {
	who, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	workload, err := workloadID(r.GetWorkload(), a.s.cfg.TrustDomain)
	if err != nil {
		return nil, refuse(codes.InvalidArgument, "workload: %v", err)
	}
	if !a.s.entitled(who.id, workload) {
		return nil, a.s.errNotEntitled(who.id, workload)
	}
	if n := len(r.GetSamples()); n > maxSamples {
		return nil, refuse(codes.InvalidArgument, "%d samples in a report, at most %d", n, maxSamples)
	}
	list := make([]mesh.Sample, 0, len(r.GetSamples()))
	for _, w := range r.GetSamples() {
		s, err := sampleFromWire(w)
		if err != nil {
			return nil, refuse(codes.InvalidArgument, "%v", err)
		}
		list = append(list, s)
	}
	if k := a.s.cfg.Rollouts; k != nil && len(list) > 0 {
		k.TakeSamples(workload, list)
	}
	return &meshpb.SampleAck{}, nil
}

// sampleFromWire refuses counts that do not add up.
func sampleFromWire(w *meshpb.Sample) (mesh.Sample, error) {
	s := mesh.Sample{Service: mesh.ServiceName(w.GetService()), Route: w.GetRoute(), Canary: w.GetCanary(), Calls: mesh.Calls{N: w.GetCalls(), Failed: w.GetFailed(), Took: w.GetTook()}}
	took := uint64(0)
	for _, n := range s.Took {
		took += uint64(n)
	}
	switch {
	case len(s.Service) > 63 || len(s.Route) > 63:
		return s, fmt.Errorf("a sample names no route")
	case len(s.Took) > mesh.Buckets:
		return s, fmt.Errorf("a sample has %d buckets, at most %d", len(s.Took), mesh.Buckets)
	case s.N > maxCounted || s.Failed > s.N || took > s.N-s.Failed:
		return s, fmt.Errorf("a sample of %d calls has %d that failed and %d that did not", s.N, s.Failed, took)
	}
	return s, nil
}

func sampleToWire(s mesh.Sample) *meshpb.Sample {
	return &meshpb.Sample{Service: string(s.Service), Route: s.Route, Canary: s.Canary, Calls: s.N, Failed: s.Failed, Took: s.Took}
}

// ReportSamples tells the issuer of the calls that the proxy of a workload has
// made. It is told at most once: a report that may have arrived is not repeated.
func (c *Client) ReportSamples(ctx context.Context, workload spiffeid.ID, list []mesh.Sample) error {
	r := &meshpb.SampleReport{Workload: workload.String()}
	for _, s := range list[:min(len(list), maxSamples)] {
		r.Samples = append(r.Samples, sampleToWire(s))
	}
	return c.call(ctx, "report samples", func(l *link) error {
		_, err := meshpb.NewMeshClient(l.cc).ReportSamples(ctx, r)
		return err
	})
}

// rollouts is asked by each call that is about rollouts of routes.
func (s *Server) rollouts(ctx context.Context) (RolloutKeeper, error) {
	if err := s.may(ctx, spiffeid.ID{}); err != nil {
		return nil, err
	}
	if s.cfg.Rollouts == nil {
		return nil, refuse(codes.FailedPrecondition, "this issuer conducts no rollouts of routes")
	}
	return s.cfg.Rollouts, nil
}

// Rollouts says how the rollouts of routes stand.
func (a *adminAPI) Rollouts(ctx context.Context, _ *meshpb.RolloutsRequest) (*meshpb.RolloutsResponse, error) {
	k, err := a.s.rollouts(ctx)
	if err != nil {
		return nil, err
	}
	list, err := k.Rollouts(ctx)
	if err != nil {
		return nil, err
	}
	resp := &meshpb.RolloutsResponse{}
	for _, d := range list {
		b, err := json.Marshal(d)
		if err != nil {
			return nil, fmt.Errorf("encode rollout: %w", err)
		}
		resp.Rollouts = append(resp.Rollouts, b)
	}
	return resp, nil
}

// MoveRollout moves the rollout of a route.
func (a *adminAPI) MoveRollout(ctx context.Context, req *meshpb.MoveRolloutRequest) (*meshpb.MoveRolloutResponse, error) {
	k, err := a.s.rollouts(ctx)
	if err != nil {
		return nil, err
	}
	m := RolloutMove{Service: mesh.ServiceName(req.GetService()), Route: req.GetRoute(), Move: req.GetMove(), Force: req.GetForce(), By: byWhom(ctx)}
	switch m.Move {
	case "start", "pause", "promote", "abort":
	default:
		return nil, refuse(codes.InvalidArgument, "move %.64q is none of start, pause, promote and abort", m.Move)
	}
	if len(m.Service) > 63 || len(m.Route) > 63 || m.Service == "" || m.Route == "" {
		return nil, refuse(codes.InvalidArgument, "a rollout is of a service and a route")
	}
	d, err := k.MoveRollout(ctx, m)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("encode rollout: %w", err)
	}
	return &meshpb.MoveRolloutResponse{Rollout: b}, nil
}

// Rollouts says how the rollouts of routes stand.
func (a *Admin) Rollouts(ctx context.Context) ([]mesh.Delivery, error) {
	const verb = "list rollouts"
	resp, err := meshpb.NewAdminClient(a.cc).Rollouts(ctx, &meshpb.RolloutsRequest{})
	if err != nil {
		return nil, a.explain(verb, err)
	}
	return convert(verb, resp.GetRollouts(), deliveryFromWire)
}

// MoveRollout moves the rollout of a route, and returns it as it is then.
func (a *Admin) MoveRollout(ctx context.Context, m RolloutMove) (mesh.Delivery, error) {
	verb := m.Move + " rollout"
	resp, err := meshpb.NewAdminClient(a.cc).MoveRollout(ctx, &meshpb.MoveRolloutRequest{Service: string(m.Service), Route: m.Route, Move: m.Move, Force: m.Force})
	if err != nil {
		return mesh.Delivery{}, a.explain(verb, err)
	}
	d, err := deliveryFromWire(resp.GetRollout())
	if err != nil {
		return d, fmt.Errorf("%s: %w", verb, err)
	}
	return d, nil
}

func deliveryFromWire(b []byte) (mesh.Delivery, error) {
	var d mesh.Delivery
	err := json.Unmarshal(b, &d)
	return d, err
}
