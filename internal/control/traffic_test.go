package control

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// told is a proxy's side of steering.
type told struct {
	stops  chan *mesh.FaultStops
	shares chan []mesh.Total
}

func steered(said func() *mesh.Traffic) (*Steering, told) {
	c := told{make(chan *mesh.FaultStops, 16), make(chan []mesh.Total, 16)}
	return &Steering{Traffic: said, Stop: func(s *mesh.FaultStops) { c.stops <- s }, Share: func(t []mesh.Total) { c.shares <- t }}, c
}

// limited has the calls to billing, and to inventory, share limits.
func (r *rig) limited(rate int) {
	next := *r.reg.snap
	for _, of := range []mesh.ServiceName{"billing", "inventory"} {
		next.Routes = append(next.Routes, mesh.Routes{Service: of, Routes: []mesh.Route{
			{Name: "all", Limit: &mesh.RateLimit{Rate: rate, Shared: true}}, {Name: "alone", Limit: &mesh.RateLimit{Rate: rate}},
		}})
	}
	r.reg.change(func() { r.reg.snap = &next })
}

func TestAProxySaysWhatItCarries(t *testing.T) {
	r := newRig(t, newCA(t, td))
	r.limited(100)
	c, _ := r.joined("node-b")
	since := time.Unix(1.8e9, 0).UTC()
	all := []mesh.Ejection{
		{Service: "billing", Address: netip.MustParseAddrPort("10.0.0.7:8443"), Kind: "ejected", Since: since, Why: "5 consecutive connect errors"},
		{Service: "ledger", Kind: "open", Since: since, Why: "7 consecutive failures"},
	}
	quota := mesh.Quota{Route: "billing/all"}
	s, heard := steered(func() *mesh.Traffic {
		return &mesh.Traffic{Ejections: all, Demands: []mesh.Demand{{Quota: quota, Calls: 30}}}
	})
	h := billingHello()
	h.Steering = s
	subscribe(t, c, h, newWatcher())
	if got := recv(t, "the stops", heard.stops); got.Revision != 0 || len(got.All) != 0 {
		t.Errorf("at first it hears %+v", got)
	}
	if got := recv(t, "the totals", heard.shares); len(got) != 1 || got[0] != (mesh.Total{Quota: quota, Calls: 30, Proxies: 1, Issuers: 1}) {
		t.Errorf("all are asked for %+v", got)
	}
	report(t, r, "what it does not call", func(p mesh.Proxy) bool { return p.Traffic.Equal(&mesh.Traffic{Ejections: all}) })
	ps, err := r.admin().Proxies(t.Context())
	if err != nil || len(ps) != 1 || !ps[0].Traffic.Equal(&mesh.Traffic{Ejections: all}) {
		t.Errorf("the operator sees %+v, %v", ps, err)
	}
	stop := mesh.FaultStop{Fault: "billing/all/slow", Before: since}
	rev, err := r.admin().StopFaults(t.Context(), stop)
	if err != nil || rev != 1 {
		t.Fatalf("revision %d, %v", rev, err)
	}
	if got := recv(t, "the stop", heard.stops); got.Revision != 1 || got.Of(stop.Fault, since.Add(-1)) == nil || got.Of(stop.Fault, since) != nil {
		t.Errorf("it hears %+v", got)
	}
	report(t, r, "that it acts on the stop", func(p mesh.Proxy) bool { return p.Traffic != nil && p.Traffic.Stops == 1 })
	if _, err := r.admin().StopFaults(t.Context(), mesh.FaultStop{Fault: "billing", Before: since}); err == nil || !strings.Contains(err.Error(), "SERVICE/ROUTE/FAULT") {
		t.Errorf("a fault that has no name: %v", err)
	}
}

// The parts of all add up, whoever comes and goes.
func TestDemandsAddUp(t *testing.T) {
	var d demands
	key := func(n int, workload string) subscriber {
		id := agentID(fmt.Sprintf("node-%d", n))
		w, err := workloadID("spiffe://"+td.Name()+"/"+workload, td)
		if err != nil {
			t.Fatal(err)
		}
		return subscriber{id, w, KindSidecar}
	}
	each, own := mesh.Quota{Route: "a/b"}, mesh.Quota{Route: "a/c", PerCaller: true}
	ask := func(k subscriber, n, m uint32) []mesh.Total {
		return d.put(k, []mesh.Demand{{Quota: each, Calls: n}, {Quota: own, Calls: m}})
	}
	ask(key(1, "web"), 10, 1)
	ask(key(2, "web"), 20, 2)
	got := ask(key(3, "job"), 30, 3)
	ask(key(1, "web"), 100, 1)
	for _, tot := range append(got, ask(key(3, "job"), 5, 5)...) {
		t.Log(tot)
	}
	if s := d.sums[share{each, ""}]; s.Calls != 125 || s.Proxies != 3 {
		t.Errorf("all: %+v", s)
	}
	for workload, want := range map[string]mesh.Total{"web": {Quota: own, Calls: 3, Proxies: 2}, "job": {Quota: own, Calls: 5, Proxies: 1}} {
		if s := d.sums[shareOf(key(1, workload), own)]; *s != want {
			t.Errorf("%s: %+v", workload, s)
		}
	}
	for n, w := range map[int]string{1: "web", 2: "web", 3: "job"} {
		d.put(key(n, w), nil)
		d.put(key(n, w), nil)
	}
	if len(d.of) > 0 || len(d.sums) > 0 {
		t.Errorf("left behind: %v %v", d.of, d.sums)
	}
}

// A lying sidecar takes nothing of what is not its own to ask for, and no more than
// there is of what is.
func TestASidecarAsksForItsOwn(t *testing.T) {
	r := newRig(t, newCA(t, td))
	r.limited(100)
	c, _ := r.joined("node-b")
	own, much := mesh.Quota{Route: "billing/all"}, uint32(1<<32-1)
	s, heard := steered(func() *mesh.Traffic {
		return &mesh.Traffic{Demands: []mesh.Demand{
			{Quota: mesh.Quota{Route: "egress/0123456789abcdef-up"}, Calls: much}, {Quota: mesh.Quota{Route: "inventory/all"}, Calls: much},
			{Quota: mesh.Quota{Route: "billing/alone"}, Calls: much}, {Quota: mesh.Quota{Route: "billing/all", PerCaller: true}, Calls: much}, {Quota: own, Calls: much},
		}}
	})
	h := billingHello()
	h.Steering = s
	subscribe(t, c, h, newWatcher())
	if got := recv(t, "the totals", heard.shares); len(got) != 1 || got[0] != (mesh.Total{Quota: own, Calls: 100, Proxies: 1, Issuers: 1}) {
		t.Errorf("it is told of %+v", got)
	}
	budget := mesh.Demand{Quota: mesh.Quota{Route: "egress/0123456789abcdef-up"}, Calls: 7}
	if got := admitted(KindGateway, nil, []mesh.Demand{{Quota: own, Calls: 1}, budget}); len(got) != 1 || got[0] != budget {
		t.Errorf("of a gateway %+v are taken", got)
	}
}

func TestTrafficIsReadStrictly(t *testing.T) {
	many := make([]*meshpb.Ejection, maxEjections+1)
	for name, w := range map[string]*meshpb.Traffic{
		"no service":      {Ejections: []*meshpb.Ejection{{Kind: "open"}}},
		"a long service":  {Ejections: []*meshpb.Ejection{{Service: strings.Repeat("x", 64), Kind: "open"}}},
		"a terminal":      {Ejections: []*meshpb.Ejection{{Service: "\x1b[2J", Kind: "open"}}},
		"another kind":    {Ejections: []*meshpb.Ejection{{Service: "a", Kind: "bad"}}},
		"no address":      {Ejections: []*meshpb.Ejection{{Service: "a", Kind: "ejected", Address: "a:1"}}},
		"a zone":          {Ejections: []*meshpb.Ejection{{Service: "a", Kind: "ejected", Address: "[fe80::1%e]:1"}}},
		"many":            {Ejections: many},
		"a limit of none": {Demands: []*meshpb.Demand{{Route: "a"}}},
		"a long limit":    {Demands: []*meshpb.Demand{{Route: "a/" + strings.Repeat("x", maxQuota)}}},
	} {
		if got, err := trafficFromWire(w); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-b")
	s, _ := steered(func() *mesh.Traffic { return &mesh.Traffic{Ejections: []mesh.Ejection{{Service: "a", Kind: "bad"}}} })
	h, state := billingHello(), make(chan error, 16)
	h.Steering, h.OnState = s, func(err error) { state <- err }
	subscribe(t, c, h, newWatcher())
	for {
		if err := recv(t, "a refusal", state); err != nil {
			if status.Code(err) == codes.OK || !strings.Contains(err.Error(), "kind") {
				t.Errorf("refused with %v", err)
			}
			return
		}
	}
}

func TestAStopThatIsNotUnderstoodIsNotConfirmed(t *testing.T) {
	steering, heard := steered(func() *mesh.Traffic { return &mesh.Traffic{} })
	s := &subscriberState{hello: Hello{Steering: steering}, told: 1}
	good := &meshpb.FaultStop{Fault: "*", Before: timeToWire(time.Unix(4e9, 0))}
	stops := func(rev uint64, list ...*meshpb.FaultStop) *meshpb.SubscribeResponse {
		return &meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_FaultStops{FaultStops: &meshpb.FaultStops{Revision: rev, Stops: list}}}
	}
	if is, _, err := s.steer(stops(4, good, &meshpb.FaultStop{Fault: "x"})); !is || err == nil || s.stopped != 0 {
		t.Errorf("confirmed %d, %v", s.stopped, err)
	}
	if got := <-heard.stops; len(got.All) != 1 {
		t.Errorf("in force are %+v, want what was understood", got.All)
	}
	if is, answer, err := s.steer(stops(5, good)); !is || !answer || err != nil || s.traffic().GetStops() != 5 {
		t.Errorf("confirmed %d, %v", s.traffic().GetStops(), err)
	}
	if is, _, err := s.steer(&meshpb.SubscribeResponse{}); is || err != nil {
		t.Errorf("another message is one of traffic: %v", err)
	}
}

// TestWhatIsCutOffIsSaidFirst when more stands against addresses than may be said.
func TestWhatIsCutOffIsSaidFirst(t *testing.T) {
	list := make([]mesh.Ejection, maxEjections+5, maxEjections+6)
	for i := range list {
		list[i] = mesh.Ejection{Service: "a", Kind: "ejected"}
	}
	w := trafficToWire(&mesh.Traffic{Ejections: append(list, mesh.Ejection{Service: "z", Kind: "open"})})
	if n := len(w.GetEjections()); n != maxEjections || w.GetEjections()[0].GetService() != "z" {
		t.Errorf("%d ejections, the first of %s", n, w.GetEjections()[0].GetService())
	}
}

// One host whose addresses all fail leaves room for what is said of others.
func TestEveryServiceHasItsPart(t *testing.T) {
	var list []mesh.Ejection
	for i := range maxEjections {
		list = append(list, mesh.Ejection{Service: "host:a.test", Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 443), Kind: "ejected"})
	}
	list = append(list, mesh.Ejection{Service: "host:b.test", Address: netip.MustParseAddrPort("10.1.0.1:443"), Kind: "unhealthy"}, mesh.Ejection{Service: "host:c.test", Kind: "open"})
	n := map[mesh.ServiceName]int{}
	for _, e := range weightiest(list) {
		n[e.Service]++
	}
	if n["host:a.test"] != maxEjections-2 || n["host:b.test"] != 1 || n["host:c.test"] != 1 {
		t.Errorf("said are %v", n)
	}
	if got := weightiest(list)[0]; got.Service != "host:c.test" {
		t.Errorf("first is said %+v", got)
	}
}
