package control

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// counted keeps what it is told.
type counted struct {
	who   spiffeid.ID
	list  []mesh.Sample
	moves []RolloutMove
}

func (c *counted) Rollouts(context.Context) ([]mesh.Delivery, error) {
	return []mesh.Delivery{{Service: "billing", Route: "all", State: mesh.Gated, Share: 10_00}}, nil
}

func (c *counted) MoveRollout(_ context.Context, m RolloutMove) (mesh.Delivery, error) {
	if m.Route == "none" {
		return mesh.Delivery{}, Unready(errors.New("no such route"))
	}
	c.moves = append(c.moves, m)
	return mesh.Delivery{Service: m.Service, Route: m.Route, State: mesh.Stepping}, nil
}

func (c *counted) TakeSamples(who spiffeid.ID, list []mesh.Sample) {
	c.who, c.list = who, append(c.list, list...)
}

func TestSamplesAreTakenOfTheirOwnAgentOnly(t *testing.T) {
	k := &counted{}
	r := newRig(t, newCA(t, td), func(c *ServerConfig) { c.Rollouts = k })
	c, _ := r.joined("node-a")
	s := mesh.Sample{Service: "billing", Route: "all", Canary: true, Calls: mesh.Calls{N: 5, Failed: 2, Took: mesh.Histogram{0, 1, 2}}}
	if err := c.ReportSamples(t.Context(), payment, []mesh.Sample{s}); err != nil {
		t.Fatal(err)
	}
	if k.who != payment || len(k.list) != 1 || k.list[0].Service != s.Service || !k.list[0].Canary || k.list[0].N != 5 || !slices.Equal(k.list[0].Took, s.Took) {
		t.Errorf("%s: %+v", k.who, k.list)
	}
	if err := c.ReportSamples(t.Context(), billing, []mesh.Sample{s}); !errors.Is(err, ErrRefused) {
		t.Errorf("samples of another's workload: %v", err)
	}
	if err := c.ReportSamples(t.Context(), payment, make([]mesh.Sample, 3*maxSamples)); err != nil {
		t.Errorf("more than one report holds: %v", err)
	}
	if n := len(k.list); n != 1+maxSamples {
		t.Errorf("%d samples are taken", n)
	}
}

func TestSamplesThatDoNotAddUpAreRefused(t *testing.T) {
	for name, w := range map[string]*meshpb.Sample{
		"more fail than are made":      {Service: "billing", Route: "all", Calls: 1, Failed: 2},
		"more take time than are made": {Service: "billing", Route: "all", Calls: 3, Failed: 1, Took: []uint32{3}},
		"more than can be made":        {Service: "billing", Route: "all", Calls: 1 << 60},
		"too many buckets":             {Service: "billing", Route: "all", Calls: 1, Took: make([]uint32, mesh.Buckets+1)},
		"a name that is too long":      {Service: strings.Repeat("x", 64), Route: "all"},
	} {
		if _, err := sampleFromWire(w); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if _, err := sampleFromWire(&meshpb.Sample{Service: "billing", Route: "all", Calls: 3, Failed: 1, Took: []uint32{1, 1}}); err != nil {
		t.Error(err)
	}
}

func FuzzSamples(f *testing.F) {
	f.Add("billing", "all", uint64(3), uint64(1), []byte{1, 1})
	f.Fuzz(func(t *testing.T, service, route string, n, failed uint64, took []byte) {
		w := &meshpb.Sample{Service: service, Route: route, Calls: n, Failed: failed}
		for _, b := range took {
			w.Took = append(w.Took, uint32(b)<<24)
		}
		s, err := sampleFromWire(w)
		if err != nil {
			return
		}
		sum := mesh.Calls{}
		sum.Add(s.Calls)
		if sum.Failed > sum.N || len(sum.Took) > mesh.Buckets {
			t.Errorf("%+v", sum)
		}
	})
}

func TestRolloutsAreMovedByTheUserOfTheSocket(t *testing.T) {
	k := &counted{}
	r := newRig(t, newCA(t, td), func(c *ServerConfig) { c.Rollouts = k })
	a := r.admin()
	list, err := a.Rollouts(t.Context())
	if err != nil || len(list) != 1 || list[0].State != mesh.Gated || list[0].Share != 10_00 {
		t.Fatalf("%+v %v", list, err)
	}
	d, err := a.MoveRollout(t.Context(), RolloutMove{Service: "billing", Route: "all", Move: "promote", Force: true})
	if err != nil || d.State != mesh.Stepping {
		t.Fatalf("%+v %v", d, err)
	}
	if want := (RolloutMove{Service: "billing", Route: "all", Move: "promote", Force: true, By: localUser}); len(k.moves) != 1 || k.moves[0] != want {
		t.Errorf("%+v", k.moves)
	}
	for name, m := range map[string]RolloutMove{
		"no such move":  {Service: "billing", Route: "all", Move: "advance"},
		"no route":      {Service: "billing", Move: "start"},
		"no service":    {Route: "all", Move: "start"},
		"not possible":  {Service: "billing", Route: "none", Move: "start"},
		"no such route": {Service: "billing", Route: strings.Repeat("x", 64), Move: "start"},
	} {
		if _, err := a.MoveRollout(t.Context(), m); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A proxy is no operator.
	c, _ := r.joined("node-a")
	if err := c.call(t.Context(), "move rollout", func(l *link) error {
		_, err := meshpb.NewAdminClient(l.cc).MoveRollout(t.Context(), &meshpb.MoveRolloutRequest{Service: "billing", Route: "all", Move: "abort"})
		return err
	}); err == nil || len(k.moves) != 1 {
		t.Errorf("a proxy moves a rollout: %v", err)
	}
}
