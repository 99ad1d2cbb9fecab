package rollout

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

var (
	td     = spiffeid.RequireTrustDomainFromString("demo.sallyport")
	web    = spiffeid.RequireFromPath(td, "/ns/shop/sa/web")
	nobody = spiffeid.RequireFromPath(td, "/ns/shop/sa/nobody")
)

// policiesOf has a route of billing with a rollout; share is that of its first
// step.
func policiesOf(t *testing.T, share string) *mesh.Policies {
	t.Helper()
	p, err := mesh.ParseFS(fstest.MapFS{
		"services.yaml": {Data: []byte("services:\n  - {name: billing, identity: \"spiffe://demo.sallyport/ns/shop/sa/billing\", port: 8443}\n")},
		"access.csv":    {Data: []byte("p, a, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, *, **, -, allow\n")},
		"routes/billing.yaml": {Data: []byte(`service: billing
subsets: [{name: v2, labels: {version: v2}}]
routes:
  - name: all
    backends: [{weight: 1}, {subset: v2, weight: 0}]
    rollout:
      canary: {subset: v2}
      steps: [{share: ` + share + `, for: 10s}, {share: 100%, for: 10s}]
      judge: {window: 5s, min_requests: 20, errors: 20%, latency: {ratio: 0}}
`)},
	}, td)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// A book is what an issuer knows, kept in a store that others write to.
type book struct {
	store    store.Store
	mu       sync.Mutex // guards the fields below
	policies *mesh.Policies
	known    map[string]mesh.Delivery
	changed  chan struct{}
}

func newBook(s store.Store, p *mesh.Policies) *book {
	return &book{store: s, policies: p, known: map[string]mesh.Delivery{}, changed: make(chan struct{})}
}

func (b *book) Deliveries() (out []mesh.Delivery) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, d := range b.known {
		out = append(out, d)
	}
	return out
}

func (b *book) PutDelivery(ctx context.Context, d mesh.Delivery, write func(context.Context, ...store.Op) (int64, error)) error {
	if write == nil {
		write = b.store.Write
	}
	rev, err := write(ctx, store.Op{Kind: store.KindRollout, Key: "all", Value: []byte("x"), IfRevision: &d.Revision})
	if errors.Is(err, store.ErrConflict) {
		return mesh.ErrChanged
	}
	if err != nil {
		return err
	}
	d.Revision = rev
	b.learn(d)
	return nil
}

// learn is news of a rollout.
func (b *book) learn(list ...mesh.Delivery) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, d := range list {
		b.known[d.Route] = d
	}
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *book) edit(p *mesh.Policies) {
	b.mu.Lock()
	b.policies = p
	b.mu.Unlock()
	b.learn()
}

func (b *book) Policies() *mesh.Policies {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.policies
}

func (b *book) Changed() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.changed
}

func (b *book) ActsOn(mesh.ServiceName, string) (int, int) { return 1, 2 }

// A clock is set by hand.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	c.t = c.t.Add(d)
	c.mu.Unlock()
}

// A stand is some issuers of one store.
type stand struct {
	t     *testing.T
	store store.Store
	clock *clock
	// steps are those that were recorded, of all; deny keeps them from being made.
	steps []string
	deny  error
}

func newStand(t *testing.T) *stand {
	t.Helper()
	s := &stand{t: t, clock: &clock{t: time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)}}
	db, err := store.SQLiteConfig{Path: filepath.Join(t.TempDir(), "s.db"), Now: s.clock.now}.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	s.store = db
	return s
}

func (s *stand) issuer(name string, p *mesh.Policies) (*Conductor, *book) {
	s.t.Helper()
	b := newBook(s.store, p)
	c, err := New(Config{Book: b, Store: s.store, Instance: name, Log: slog.New(slog.DiscardHandler), Now: s.clock.now, OnStep: func(e Event) error {
		if s.deny == nil {
			s.steps = append(s.steps, e.Step)
		}
		return s.deny
	}})
	if err != nil {
		s.t.Fatal(err)
	}
	return c, b
}

func (s *stand) round(c *Conductor) {
	s.t.Helper()
	if err := c.round(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stand) move(c *Conductor, move string) mesh.Delivery {
	s.t.Helper()
	d, err := c.Move(s.t.Context(), "billing", "all", move, false, "somebody")
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

// report is what a sidecar says of a second.
func report(canary, others mesh.Calls) []mesh.Sample {
	return []mesh.Sample{
		{Service: "billing", Route: "all", Canary: true, Calls: canary},
		{Service: "billing", Route: "all", Calls: others},
	}
}

func only(t *testing.T, b *book) mesh.Delivery {
	t.Helper()
	list := b.Deliveries()
	if len(list) != 1 {
		t.Fatalf("%d rollouts", len(list))
	}
	return list[0]
}

func TestConductor(t *testing.T) {
	s := newStand(t)
	c, b := s.issuer("", policiesOf(t, "10%"))
	if _, err := c.Move(t.Context(), "billing", "none", Start, false, "somebody"); !errors.Is(err, mesh.ErrDelivery) {
		t.Errorf("a route without a rollout: %v", err)
	}
	if d := s.move(c, Start); d.State != mesh.Stepping || d.Share != 10_00 {
		t.Fatalf("%+v", d)
	}
	s.clock.pass(10 * time.Second)
	// Who may not call the service says nothing of it, and nobody of others.
	c.Take(nobody, report(calls(100, 100), calls(100, 0)))
	c.Take(web, []mesh.Sample{{Service: "billing", Route: "other", Canary: true, Calls: calls(100, 100)}, {Service: "ledger", Route: "all", Calls: calls(1, 1)}})
	s.round(c)
	if d := only(t, b); d.State != mesh.Stepping || d.Step != 1 || len(c.tallies) != 0 {
		t.Fatalf("%+v, %d tallies", d, len(c.tallies))
	}
	c.Take(web, report(calls(100, 0), calls(100, 0)))
	s.deny = errors.New("the audit is full")
	if err := c.round(t.Context()); !errors.Is(err, s.deny) || only(t, b).Step != 1 {
		t.Errorf("what cannot be recorded: %v %+v", err, only(t, b))
	}
	s.deny = nil
	s.round(c)
	if d := only(t, b); d.Step != 2 || d.Share != mesh.Whole || d.Before.N != 100 {
		t.Fatalf("%+v", d)
	}
	// What was counted before the step says nothing of it.
	s.round(c)
	list, err := c.Deliveries(t.Context())
	if err != nil || list[0].Verdict.Canary.Calls != 0 || list[0].Acked != 1 || list[0].Proxies != 2 {
		t.Errorf("%+v %v", list, err)
	}
	s.clock.pass(time.Second)
	c.Take(web, report(calls(20, 20), mesh.Calls{}))
	s.round(c)
	if d := only(t, b); d.State != mesh.RolledBack || d.Share != 0 {
		t.Fatalf("%+v", d)
	}
	if c.busy() || len(c.tallies) > 0 {
		t.Error("it is looked after beyond its end")
	}
	if want := []string{Start, Advance, RollBack}; !slices.Equal(s.steps, want) {
		t.Errorf("steps %v, want %v", s.steps, want)
	}

	// An edit of the route ends the next one.
	s.move(c, Start)
	b.edit(policiesOf(t, "20%"))
	if _, err := c.Move(t.Context(), "billing", "all", Promote, true, "somebody"); !errors.Is(err, mesh.ErrDelivery) {
		t.Errorf("promote after an edit: %v", err)
	}
	s.round(c)
	if d := only(t, b); d.State != mesh.Superseded {
		t.Errorf("%+v", d)
	}
	if d := s.move(c, Start); d.Share != 20_00 {
		t.Errorf("%+v", d)
	}
	// One that is over ends so too: what is taken back later brings nothing back.
	s.move(c, Abort)
	if c.busy() {
		t.Error("it is looked after beyond its end")
	}
	b.edit(nil)
	if c.busy() {
		t.Error("without policies an edit is seen")
	}
	b.edit(policiesOf(t, "30%"))
	if !c.busy() {
		t.Error("an edit is not seen")
	}
	s.round(c)
	b.edit(policiesOf(t, "20%"))
	if d := only(t, b); d.State != mesh.Superseded || c.busy() {
		t.Errorf("%+v", d)
	}
}

// Two issuers count, and one of them acts; when it dies the other goes on with
// what both have counted, and it can do nothing any more.
func TestConductorsTakeOver(t *testing.T) {
	s := newStand(t)
	p := policiesOf(t, "10%")
	a, abook := s.issuer("a", p)
	b, bbook := s.issuer("b", p)
	bbook.learn(s.move(a, Start))
	bbook.learn(only(t, abook))
	s.round(a)
	s.round(b)
	if a.lease == nil || b.lease != nil {
		t.Fatal("not the first one leads")
	}
	s.clock.pass(9 * time.Second)
	a.Take(web, report(calls(15, 0), calls(15, 0)))
	b.Take(web, report(calls(15, 0), calls(15, 0)))
	s.round(b) // its counts are in the store, and the lease of a is over
	if b.lease == nil {
		t.Fatal("the other one does not take over")
	}
	if d := only(t, bbook); d.Step != 1 {
		t.Errorf("it is early: %+v", d)
	}
	// a wakes up, believes that it leads, and sees enough calls and time.
	s.clock.pass(time.Second)
	a.renewed = s.clock.now()
	steps := len(s.steps)
	if err := a.round(t.Context()); err == nil || !errors.Is(err, store.ErrLost) {
		t.Errorf("an issuer whose lease is lost acts: %v", err)
	}
	if d := only(t, abook); d.Step != 1 || a.lease != nil {
		t.Errorf("an issuer whose lease is lost has moved it: %+v", d)
	}
	s.steps = s.steps[:steps]
	// Together they have enough.
	s.round(b)
	if d := only(t, bbook); d.Step != 2 || d.Before.N != 30 || d.Verdict.Canary.Calls != 30 {
		t.Errorf("%+v", d)
	}
	// An operator at a, who has not heard of that, is not in its way.
	if _, err := a.Move(t.Context(), "billing", "all", Pause, false, "somebody"); !errors.Is(err, mesh.ErrChanged) {
		t.Errorf("a move of what was moved: %v", err)
	}
	abook.learn(only(t, bbook))
	s.move(a, Abort)
	list, err := a.Deliveries(t.Context())
	if err != nil || list[0].State != mesh.RolledBack || list[0].Proxies != 4 {
		t.Errorf("%+v %v", list, err)
	}
}

func TestRunGivesTheLeaseBack(t *testing.T) {
	s := newStand(t)
	c, b := s.issuer("a", policiesOf(t, "10%"))
	s.move(c, Start)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := c.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	held := func() bool {
		_, err := s.store.Get(t.Context(), store.KindLease, leaseName)
		return err == nil
	}
	for !held() {
		select {
		case <-t.Context().Done():
			t.Fatal("it never leads")
		case <-time.After(time.Millisecond):
		}
	}
	cancel()
	<-ended
	if held() {
		t.Error("the lease is held by nobody")
	}
	if d := only(t, b); d.State != mesh.Stepping {
		t.Errorf("%+v", d)
	}
	if _, err := New(Config{}); err == nil {
		t.Error("nothing is required")
	}
}
