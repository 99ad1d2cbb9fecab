package control

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc/codes"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// What one proxy may say of its traffic: more than any has services.
const (
	maxEjections = 512
	maxDemands   = 512
	// maxQuota bounds the name of a limit, bytes.
	maxQuota = 200
)

// trafficToWire is nil for a proxy that says nothing of it.
func trafficToWire(t *mesh.Traffic) *meshpb.Traffic {
	if t == nil {
		return nil
	}
	w := &meshpb.Traffic{Stops: t.Stops}
	for _, e := range weightiest(t.Ejections) {
		x := &meshpb.Ejection{Service: string(e.Service), Kind: e.Kind, Since: timeToWire(e.Since), Why: e.Why}
		if e.Address.IsValid() {
			x.Address = e.Address.String()
		}
		w.Ejections = append(w.Ejections, x)
	}
	for _, d := range t.Demands[:min(len(t.Demands), maxDemands)] {
		w.Demands = append(w.Demands, &meshpb.Demand{Route: d.Route, PerCaller: d.PerCaller, Calls: d.Calls})
	}
	return w
}

// weightiest are as many of the ejections as may be said: services that are cut off
// as a whole before addresses, and one address of each service before the second of
// any, since one host may have hundreds.
func weightiest(list []mesh.Ejection) []mesh.Ejection {
	if len(list) <= maxEjections {
		return list
	}
	type ranked struct {
		mesh.Ejection
		nth int
	}
	all, of := make([]ranked, len(list)), map[mesh.ServiceName]int{}
	for i, e := range list {
		if all[i] = (ranked{e, 0}); e.Kind != "open" {
			of[e.Service]++
			all[i].nth = of[e.Service]
		}
	}
	slices.SortStableFunc(all, func(a, b ranked) int { return cmp.Compare(a.nth, b.nth) })
	out := make([]mesh.Ejection, maxEjections)
	for i := range out {
		out[i] = all[i].Ejection
	}
	return out
}

func trafficFromWire(w *meshpb.Traffic) (*mesh.Traffic, error) {
	if w == nil {
		return nil, nil //nolint:nilnil // it says nothing
	}
	if len(w.GetEjections()) > maxEjections || len(w.GetDemands()) > maxDemands {
		return nil, fmt.Errorf("%d ejections and %d demands, at most %d and %d are taken", len(w.GetEjections()), len(w.GetDemands()), maxEjections, maxDemands)
	}
	t := &mesh.Traffic{Stops: w.GetStops()}
	for _, x := range w.GetEjections() {
		e := mesh.Ejection{Service: mesh.ServiceName(x.GetService()), Kind: x.GetKind(), Since: timeFromWire(x.GetSince()), Why: plain(x.GetWhy())}
		if n := x.GetService(); n == "" || len(n) > 63 || n != plain(n) {
			return nil, fmt.Errorf("ejection: service %.64q is not a service name", n)
		}
		switch e.Kind {
		case "ejected", "unhealthy", "open":
		default:
			return nil, fmt.Errorf("ejection of %s: kind %.64q is not known", e.Service, e.Kind)
		}
		if x.GetAddress() != "" {
			var err error
			if e.Address, err = netip.ParseAddrPort(x.GetAddress()); err != nil || e.Address.Addr().Zone() != "" {
				return nil, fmt.Errorf("ejection of %s: address %.64q is not an IP address and port", e.Service, x.GetAddress())
			}
		}
		t.Ejections = append(t.Ejections, e)
	}
	for _, x := range w.GetDemands() {
		q, err := quotaFromWire(x.GetRoute(), x.GetPerCaller())
		if err != nil {
			return nil, fmt.Errorf("demand: %w", err)
		}
		t.Demands = append(t.Demands, mesh.Demand{Quota: q, Calls: x.GetCalls()})
	}
	return t, nil
}

func quotaFromWire(route string, perCaller bool) (mesh.Quota, error) {
	if len(route) > maxQuota || strings.Count(route, "/") != 1 || strings.ContainsFunc(route, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return mesh.Quota{}, fmt.Errorf("%.64q is not SERVICE/ROUTE", route)
	}
	return mesh.Quota{Route: route, PerCaller: perCaller}, nil
}

// demands are what the proxies of this issuer are asked for under limits that
// they share.
type demands struct {
	mu   sync.Mutex // guards the fields below
	of   map[subscriber]map[mesh.Quota]uint32
	sums map[share]*mesh.Total
}

// A share is a limit as those have it in common who share it.
type share struct {
	mesh.Quota
	workload string // of PerCaller
}

func shareOf(key subscriber, q mesh.Quota) share {
	if q.PerCaller {
		return share{q, key.workload.String()}
	}
	return share{q, ""}
}

// put takes what a proxy is asked for in place of what it was, and returns what
// all are. Nothing is what one says that leaves.
func (d *demands) put(key subscriber, list []mesh.Demand) (totals []mesh.Total) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(list) == 0 && d.of[key] == nil {
		return nil
	}
	if d.of == nil {
		d.of, d.sums = map[subscriber]map[mesh.Quota]uint32{}, map[share]*mesh.Total{}
	}
	for q, n := range d.of[key] {
		s := shareOf(key, q)
		t := d.sums[s]
		if t.Calls -= uint64(n); t.Proxies == 1 {
			delete(d.sums, s)
		}
		t.Proxies--
	}
	delete(d.of, key)
	if len(list) == 0 {
		return nil
	}
	own := make(map[mesh.Quota]uint32, len(list))
	for _, x := range list {
		own[x.Quota] = x.Calls
	}
	d.of[key] = own
	for q, n := range own {
		s := shareOf(key, q)
		t := d.sums[s]
		if t == nil {
			t = &mesh.Total{Quota: q}
			d.sums[s] = t
		}
		t.Calls += uint64(n)
		t.Proxies++
	}
	for q := range own {
		totals = append(totals, *d.sums[shareOf(key, q)])
	}
	return totals
}

// ofBudget is how the names begin of what gateways share.
const ofBudget = "egress/"

// admitted are the demands that a proxy may have: a gateway those of budgets, a
// sidecar those of the limits in its projection, and of each no more than there is.
// Others are of a policy that is in force no more, or of one that would take from
// those whom they concern.
func admitted(kind string, limits map[mesh.Quota]uint32, list []mesh.Demand) (out []mesh.Demand) {
	for _, d := range list {
		if kind == KindGateway {
			if strings.HasPrefix(d.Route, ofBudget) {
				out = append(out, d)
			}
		} else if most, ok := limits[d.Quota]; ok {
			d.Calls = min(d.Calls, most)
			out = append(out, d)
		}
	}
	return out
}

// carries takes what the proxy says of its traffic, and answers its demands.
func (sub *subscription) carries(w *meshpb.Traffic) error {
	t, err := trafficFromWire(w)
	if err != nil {
		return refuse(codes.InvalidArgument, "%v", err)
	}
	if t == nil {
		return nil
	}
	totals := sub.s.demands.put(sub.key, admitted(sub.key.kind, sub.limits, t.Demands))
	t.Demands, t.Stops = nil, min(t.Stops, sub.stopsTold)
	if !sub.proxy.Traffic.Equal(t) {
		sub.proxy.Traffic = t
	}
	if len(totals) == 0 {
		return nil
	}
	m := &meshpb.Totals{Issuers: uint32(sub.s.cfg.Registry.Issuers())}
	for _, t := range totals {
		m.Totals = append(m.Totals, &meshpb.Total{Route: t.Route, PerCaller: t.PerCaller, Calls: t.Calls, Proxies: t.Proxies})
	}
	return sub.st.Send(&meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_Totals{Totals: m}})
}

// stopFaults tells the proxy which faults are stopped: on a new stream, whatever
// they are.
func (sub *subscription) stopFaults() error {
	known := sub.s.cfg.Registry.FaultStops()
	if sub.toldStops && known.Revision <= sub.stopsTold {
		return nil
	}
	m := &meshpb.FaultStops{Revision: known.Revision}
	for _, s := range known.All {
		m.Stops = append(m.Stops, &meshpb.FaultStop{Fault: s.Fault, Before: timeToWire(s.Before)})
	}
	sub.toldStops, sub.stopsTold = true, known.Revision
	return sub.st.Send(&meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_FaultStops{FaultStops: m}})
}

// Steering has a proxy say what it carries, and act on what all are told.
type Steering struct {
	// Traffic is asked with each answer, and at least once a second.
	Traffic func() *mesh.Traffic
	// Stop ends faults, and is told of all that are stopped: once on each stream,
	// be there any or none, and when there are more.
	Stop func(stops *mesh.FaultStops)
	// Share is told what all proxies are asked for, in answer to the demands.
	Share func(totals []mesh.Total)
}

// steer acts on what concerns traffic, and reports whether that was what m is
// about. What is not understood is not confirmed.
func (s *subscriberState) steer(m *meshpb.SubscribeResponse) (is, answer bool, err error) {
	stops, totals := m.GetFaultStops(), m.GetTotals()
	switch {
	case stops == nil && totals == nil:
		return false, false, nil
	case s.hello.Steering == nil:
		return true, false, nil
	case totals != nil:
		var list []mesh.Total
		for _, w := range totals.GetTotals() {
			q, err := quotaFromWire(w.GetRoute(), w.GetPerCaller())
			if err != nil {
				return true, false, fmt.Errorf("total: %w", err)
			}
			list = append(list, mesh.Total{Quota: q, Calls: w.GetCalls(), Proxies: w.GetProxies(), Issuers: totals.GetIssuers()})
		}
		s.hello.Steering.Share(list)
		return true, false, nil
	}
	all := &mesh.FaultStops{Revision: stops.GetRevision()}
	var errs []error
	for _, w := range stops.GetStops() {
		x := mesh.FaultStop{Fault: w.GetFault(), Before: timeFromWire(w.GetBefore())}
		if err := x.Validate(); err != nil {
			errs = append(errs, err)
			continue
		}
		all.All = append(all.All, x)
	}
	s.hello.Steering.Stop(all)
	if len(errs) == 0 {
		s.stopped = all.Revision
	}
	return true, s.told > 0, errors.Join(errs...)
}

// traffic is what the proxy says now, nil when it is asked for nothing.
func (s *subscriberState) traffic() *meshpb.Traffic {
	if s.hello.Steering == nil {
		return nil
	}
	t := *s.hello.Steering.Traffic()
	s.said = &t
	t.Stops = s.stopped
	return trafficToWire(&t)
}

// news says whether there is something to say of the traffic: demands are while
// there are any, and once more when there are none.
func (s *subscriberState) news() bool {
	if s.hello.Steering == nil || s.told == 0 {
		return false
	}
	t := s.hello.Steering.Traffic()
	was := s.said
	if was == nil {
		return true
	}
	a, b := *t, *was
	a.Stops, b.Stops = 0, 0
	busy := func(d mesh.Demand) bool { return d.Calls > 0 }
	return !a.Equal(&b) || len(t.Demands) != len(was.Demands) || slices.ContainsFunc(t.Demands, busy) || slices.ContainsFunc(was.Demands, busy)
}

// Faults are those of the policy in force.
func (a *adminAPI) Faults(context.Context, *meshpb.FaultsRequest) (*meshpb.FaultsResponse, error) {
	r := a.s.cfg.Registry
	b, err := json.Marshal(r.Current().Faults(r.FaultStops(), a.s.cfg.Now()))
	if err != nil {
		return nil, fmt.Errorf("encode faults: %w", err)
	}
	return &meshpb.FaultsResponse{Faults: b}, nil
}

// StopFaults has every proxy end faults.
func (a *adminAPI) StopFaults(ctx context.Context, req *meshpb.StopFaultsRequest) (*meshpb.StopFaultsResponse, error) {
	s := mesh.FaultStop{Fault: req.GetFault(), Before: timeFromWire(req.GetBefore()), At: a.s.cfg.Now().UTC(), By: byWhom(ctx)}
	if err := s.Validate(); err != nil {
		return nil, refuse(codes.InvalidArgument, "%v", err)
	}
	rev, err := a.s.cfg.Registry.StopFaults(ctx, s)
	if err != nil {
		return nil, err
	}
	return &meshpb.StopFaultsResponse{Revision: rev}, nil
}

// Faults are those of the policy in force, by name.
func (a *Admin) Faults(ctx context.Context) ([]mesh.FaultState, error) {
	const verb = "list faults"
	resp, err := meshpb.NewAdminClient(a.cc).Faults(ctx, &meshpb.FaultsRequest{})
	if err != nil {
		return nil, a.explain(verb, err)
	}
	var list []mesh.FaultState
	if err := json.Unmarshal(resp.GetFaults(), &list); err != nil {
		return nil, fmt.Errorf("%s: %w", verb, err)
	}
	return list, nil
}

// StopFaults has every proxy end faults. Those act on it whose Traffic has the
// revision in Stops, or a greater one.
func (a *Admin) StopFaults(ctx context.Context, s mesh.FaultStop) (revision uint64, err error) {
	resp, err := meshpb.NewAdminClient(a.cc).StopFaults(ctx, &meshpb.StopFaultsRequest{Fault: s.Fault, Before: timeToWire(s.Before)})
	if err != nil {
		return 0, a.explain("stop faults", err)
	}
	return resp.GetRevision(), nil
}
