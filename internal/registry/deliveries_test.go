package registry_test

import (
	"errors"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

// planned are policies whose service pay has a route with a rollout.
func planned(weight uint32) *mesh.Policies {
	p := policies("pay")
	p.Routes = []mesh.Routes{{
		Service: "pay", Subsets: []mesh.Subset{{Name: "v2", Labels: map[string]string{"version": "v2"}}},
		Routes: []mesh.Route{{
			Name: "all", Backends: []mesh.Backend{{Weight: weight}, {Subset: "v2"}},
			Plan: &mesh.Plan{Canary: mesh.Ref{Subset: "v2"}, Steps: []mesh.Step{{Share: 10_00, For: time.Minute}, {Share: mesh.Whole, For: time.Minute}}},
		}},
	}}
	return p
}

// delivery is a rollout of it.
func delivery(p *mesh.Policies, share mesh.Share, at int64) mesh.Delivery {
	plan, hash, _ := p.PlanOf("pay", "all")
	return mesh.Delivery{Service: "pay", Route: "all", Plan: plan, PlanHash: hash, State: mesh.Stepping, Step: 1, Share: share, Started: time.Now().UTC(), Revision: at}
}

func shareOf(m interface{ Current() *mesh.Snapshot }) (mesh.CanaryShare, bool) {
	if s := m.Current(); s != nil {
		return s.ShareOf("pay", "all")
	}
	return mesh.CanaryShare{}, false
}

func sharedDelivery(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	p := planned(1)
	if _, err := a.ApplyPolicies(f.t.Context(), p); err != nil {
		f.t.Fatal(err)
	}
	f.eventually("b has the policies", func() bool { return b.Policies() != nil })
	before := a.Current().Revision
	if err := a.PutDelivery(f.t.Context(), delivery(p, 10_00, 0), nil); err != nil {
		f.t.Fatal(err)
	}
	if s, ok := shareOf(a); !ok || s.Share != 10_00 || !s.Watch || a.Current().Revision <= before {
		f.t.Fatalf("at a: %+v %t", s, ok)
	}
	f.eventually("b distributes the share", func() bool { s, _ := shareOf(b); return s.Share == 10_00 })

	// Who acts on it is known by the snapshot that was acknowledged.
	proxy := mesh.Proxy{Agent: agent("web-1"), Workload: id("/web"), Kind: "sidecar", Connected: true, Revision: before}
	a.ReportProxy(proxy)
	a.ReportProxy(mesh.Proxy{Agent: agent("gw"), Workload: id("/gw"), Kind: "gateway", Connected: true})
	if acked, all := a.ActsOn("pay", "all"); acked != 0 || all != 1 {
		f.t.Errorf("before its answer: %d of %d", acked, all)
	}
	proxy.Revision = a.Current().Revision
	a.ReportProxy(proxy)
	if acked, all := a.ActsOn("pay", "all"); acked != 1 || all != 1 {
		f.t.Errorf("after its answer: %d of %d", acked, all)
	}

	// One of two moves counts, and an issuer that has lost its lease makes none.
	at := b.Deliveries()[0].Revision
	if err := b.PutDelivery(f.t.Context(), delivery(p, 20_00, at), nil); err != nil {
		f.t.Fatal(err)
	}
	err := a.PutDelivery(f.t.Context(), delivery(p, 30_00, at), nil)
	if s, _ := shareOf(a); !errors.Is(err, mesh.ErrChanged) || s.Share != 20_00 {
		f.t.Errorf("a move of what was moved: %v, %+v", err, s)
	}
	if acked, _ := a.ActsOn("pay", "all"); acked != 0 {
		f.t.Error("the answer to the share before counts for the one after")
	}
	lease, err := store.LeaseConfig{Store: a.store, Name: "x", Holder: "a", TTL: time.Second, Now: f.now}.Acquire(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	f.ahead.Add(int64(2 * time.Second))
	if _, err := (store.LeaseConfig{Store: b.store, Name: "x", Holder: "b", TTL: time.Second, Now: f.now}).Acquire(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
	err = a.PutDelivery(f.t.Context(), delivery(p, 40_00, a.Deliveries()[0].Revision), lease.Write)
	if s, _ := shareOf(a); !errors.Is(err, store.ErrLost) || s.Share != 20_00 {
		f.t.Errorf("without the lease: %v, %+v", err, s)
	}

	// One that starts later has it, and an edit of the route ends it everywhere.
	c := f.join("c", false)
	if s, ok := shareOf(c); !ok || s.Share != 20_00 {
		f.t.Errorf("at c: %+v %t", s, ok)
	}
	if _, err := a.ApplyPolicies(f.t.Context(), planned(2)); err != nil {
		f.t.Fatal(err)
	}
	if s, ok := shareOf(a); ok {
		f.t.Errorf("after an edit: %+v", s)
	}
	f.eventually("b has the edit", func() bool { _, ok := shareOf(b); return !ok })
}

// What is not the rollout's wakes nobody, and no share is distributed before
// there are policies.
func TestADeliveryThatSaysNothingNewDistributesNothing(t *testing.T) {
	f := &fleet{t: t, open: func(now func() time.Time) store.Store {
		s, err := store.SQLiteConfig{Path: filepath.Join(t.TempDir(), "s.sqlite"), Now: now}.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}}
	m := f.join("a", false)
	p := planned(1)
	if err := m.PutDelivery(t.Context(), delivery(p, 10_00, 0), nil); err != nil || m.Current() != nil {
		t.Fatalf("before policies: %v", err)
	}
	if _, err := m.ApplyPolicies(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	before := m.Current()
	if s, _ := shareOf(m); s.Share != 10_00 {
		t.Fatalf("%+v", s)
	}
	d := m.Deliveries()[0]
	d.State = mesh.Gated
	changed := m.Changed()
	if err := m.PutDelivery(t.Context(), d, nil); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("nobody is told of the new state")
	}
	if m.Current() != before {
		t.Error("the same shares are distributed again")
	}
	if list := m.Deliveries(); len(list) != 1 || list[0].State != mesh.Gated || !slices.Equal(list[0].Plan.Steps, d.Plan.Steps) {
		t.Errorf("%+v", list)
	}
}
