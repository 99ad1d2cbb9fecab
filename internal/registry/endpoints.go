package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

const (
	// DefaultLease is how long an endpoint is kept unless it is announced
	// again.
	DefaultLease = time.Minute
	// lapseCheck is how soon the end of an entry is looked for at the latest: it
	// stands by the wall clock, which timers do not follow when it is set.
	lapseCheck = 10 * time.Second
	// maxPerAgent bounds what one agent can make us keep. It is not less than
	// what control lets one proxy announce.
	maxPerAgent = 256
)

// ErrBadEndpoint says that an announced endpoint can never be reached.
var ErrBadEndpoint = errors.New("endpoint refused")

// held is how long an endpoint is kept.
type held struct {
	lease time.Duration
	// until is when it ends, zero while another issuer sees to that. In a run
	// of the issuer it is measured by the monotonic clock, so that a step of
	// the wall clock ends nothing.
	until time.Time
	// rev is the revision of its record: the latest wins an address.
	rev int64
	// owner is the instance that the proxy announced it to.
	owner string
	// labels are what it said of itself the last time.
	labels mesh.Labels
	// left says that its proxy has gone and was not heard of since.
	left bool
}

// keyOf is the key of an endpoint in the store.
func keyOf(e mesh.Endpoint) string {
	return e.Agent.String() + " " + string(e.Service) + " " + e.Address.String()
}

// place is the endpoint without its labels: what is kept under. They may change.
func place(e mesh.Endpoint) mesh.Endpoint {
	e.Labels = ""
	return e
}

// endpointRecord is a held endpoint in the store.
type endpointRecord struct {
	Endpoint mesh.Endpoint `json:"endpoint"`
	// Lease is in nanoseconds.
	Lease time.Duration `json:"lease"`
	// Issuer is the instance that it was announced to.
	Issuer string `json:"issuer,omitempty"`
}

// endpointOp keeps an endpoint that was announced here.
func (r *Registry) endpointOp(e mesh.Endpoint, labels mesh.Labels, lease time.Duration) (store.Op, error) {
	e.Labels = labels
	value, err := json.Marshal(endpointRecord{e, lease, r.cfg.Instance})
	if err != nil {
		return store.Op{}, fmt.Errorf("announce endpoint: %w", err)
	}
	return store.Op{Kind: store.KindEndpoint, Key: keyOf(e), Value: value}, nil
}

// Announce says that an agent's sidecar serves a service at an address. The
// endpoint is kept for the lease, counted from now (0 means DefaultLease). To
// announce it again extends the lease and writes nothing. An agent whose proxy
// had left and that comes back at another address loses the old one.
//
// An endpoint is distributed only while the policies have the service and an
// entry that gives its identity to the agent: whoever is not entitled is kept
// aside, since the policies may change.
func (r *Registry) Announce(ctx context.Context, e mesh.Endpoint, lease time.Duration) error {
	if lease == 0 {
		lease = DefaultLease
	}
	if err := r.checkEndpoint(e, lease); err != nil {
		return err
	}
	e.Address = netip.AddrPortFrom(e.Address.Addr().Unmap(), e.Address.Port())
	r.mu.Lock()
	defer r.mu.Unlock()
	labels, e := e.Labels, place(e)
	if old := r.endpoints[e]; old != nil && old.lease == lease && old.labels == labels && old.owner == r.cfg.Instance {
		old.until, old.left = r.cfg.Now().Add(lease), false
		return nil
	}
	op, err := r.endpointOp(e, labels, lease)
	if err != nil {
		return err
	}
	var ops []store.Op
	known, moved := 0, []mesh.Endpoint(nil)
	for other, h := range r.endpoints {
		switch {
		case other.Agent != e.Agent || other == e:
		case other.Service == e.Service && h.left:
			moved = append(moved, other)
			ops = append(ops, store.Op{Kind: store.KindEndpoint, Key: keyOf(other), Delete: true})
		default:
			known++
		}
	}
	if known >= maxPerAgent {
		return fmt.Errorf("%w: agent %s already announced %d", ErrBadEndpoint, e.Agent, maxPerAgent)
	}
	// The endpoint comes last: the revision is then its own.
	rev, err := r.write(ctx, append(ops, op)...)
	if err != nil {
		return fmt.Errorf("announce endpoint: %w", err)
	}
	for _, other := range moved {
		delete(r.endpoints, other)
	}
	r.endpoints[e] = &held{lease: lease, labels: labels, until: r.cfg.Now().Add(lease), rev: rev, owner: r.cfg.Instance}
	r.rouse()
	if !r.entitled(r.state.Load(), e) {
		r.cfg.Log.Warn("endpoint not distributed: no service and entry name the agent", "agent", e.Agent, "service", e.Service, "address", e.Address)
	}
	r.refresh(rev)
	return nil
}

func (r *Registry) checkEndpoint(e mesh.Endpoint, lease time.Duration) error {
	addr := e.Address.Addr()
	switch {
	case !e.Agent.MemberOf(r.cfg.TrustDomain):
		return fmt.Errorf("%w: agent %q is not of trust domain %s", ErrBadEndpoint, e.Agent, r.cfg.TrustDomain.Name())
	case e.Service == "" || len(e.Service) > 63:
		return fmt.Errorf("%w: %q is not the name of a service", ErrBadEndpoint, e.Service)
	case !addr.IsValid() || addr.IsUnspecified() || addr.IsMulticast() || e.Address.Port() == 0:
		return fmt.Errorf("%w: %s is not an address that others can dial", ErrBadEndpoint, e.Address)
	case e.Labels.Check() != nil:
		return fmt.Errorf("%w: %w", ErrBadEndpoint, e.Labels.Check())
	case lease < 0:
		return fmt.Errorf("%w: the lease %s is negative", ErrBadEndpoint, lease)
	}
	return nil
}

// Withdraw says that the proxy of an agent has gone: its endpoints are kept
// for one more lease, counted from now. An Announce in time keeps them.
func (r *Registry) Withdraw(_ context.Context, agent spiffeid.ID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.agents.Delete(agent)
	now := r.cfg.Now()
	for e, h := range r.endpoints {
		// One that it announced to another issuer since stays as it is.
		if e.Agent == agent && h.owner == r.cfg.Instance {
			h.until, h.left = now.Add(h.lease), true
		}
	}
	return nil
}

// Run ends leases and entries in time and, in a shared store, takes part with the other
// issuers. It returns nil when ctx ends.
func (r *Registry) Run(ctx context.Context) error {
	var others sync.WaitGroup
	defer others.Wait()
	others.Go(func() { r.conduct(ctx) })
	others.Go(func() { r.keepEdges(ctx) })
	if r.shared() {
		others.Go(func() { r.follow(ctx) })
		others.Go(func() { r.attend(ctx) })
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-r.wake:
		}
		next, err := r.sweep(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			r.cfg.Log.Error("endpoints or entries not ended, or revocations not made; trying again in 1s", "error", err)
			timer.Reset(time.Second)
		case next.IsZero():
			timer.Stop()
		default:
			timer.Reset(next.Sub(r.cfg.Now()))
		}
	}
}

// sweep removes endpoints whose lease is over, and entries that end, and returns
// when to look again, zero if never.
func (r *Registry) sweep(ctx context.Context) (next time.Time, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.lapse(ctx); err != nil {
		return time.Time{}, err
	}
	if err := r.settleLost(ctx); err != nil {
		return time.Time{}, err
	}
	now := r.cfg.Now()
	if next = r.state.Load().lapses; next.Sub(now) > lapseCheck {
		next = now.Add(lapseCheck)
	}
	var over []mesh.Endpoint
	for e, h := range r.endpoints {
		switch {
		case h.until.IsZero():
		case !h.until.After(now):
			over = append(over, e)
		case next.IsZero() || h.until.Before(next):
			next = h.until
		}
	}
	return next, r.drop(ctx, over)
}

// drop forgets endpoints. mu is held.
func (r *Registry) drop(ctx context.Context, over []mesh.Endpoint) error {
	if len(over) == 0 {
		return nil
	}
	slices.SortFunc(over, compare)
	ops := make([]store.Op, len(over))
	for i, e := range over {
		ops[i] = store.Op{Kind: store.KindEndpoint, Key: keyOf(e), Delete: true, IfRevision: &r.endpoints[e].rev}
	}
	rev, err := r.write(ctx, ops...)
	if errors.Is(err, store.ErrConflict) {
		// Another issuer ended one of them, or has its proxy now.
		return r.reread(ctx, over)
	}
	if err != nil {
		return fmt.Errorf("end endpoints: %w", err)
	}
	for _, e := range over {
		r.cfg.Log.Info("endpoint ended", "agent", e.Agent, "service", e.Service, "address", e.Address)
		delete(r.endpoints, e)
	}
	r.refresh(rev)
	return nil
}

// compare orders endpoints as mesh.Compile does.
func compare(a, b mesh.Endpoint) int {
	return cmp.Or(cmp.Compare(a.Service, b.Service), a.Address.Compare(b.Address), cmp.Compare(a.Agent.String(), b.Agent.String()))
}

// refresh publishes under a revision if the endpoints that are distributed are
// others now. What came from the policies is shared with the snapshot before:
// to compile 10,000 rules for each endpoint would cost seconds when all proxies
// connect at once. mu is held.
func (r *Registry) refresh(rev int64) {
	now := r.state.Load()
	if now.accepted == nil {
		return
	}
	endpoints, ro := r.eligible(now, now.accepted.Policies.Services), r.moved(now, now.rollout)
	if slices.Equal(endpoints, now.snapshot.Endpoints) && ro == now.rollout {
		return
	}
	next, snapshot := *now, *now.snapshot
	snapshot.Endpoints, next.rollout = endpoints, ro
	next.snapshot, next.changed = &snapshot, make(chan struct{})
	r.publish(&next, rev)
}

// eligible returns the endpoints of services that may be distributed, in the
// order that mesh.Compile gives them. Of several agents at one address of a service only the latest is named: one
// that attested anew under another name. mu is held.
func (r *Registry) eligible(s *state, services []mesh.Service) []mesh.Endpoint {
	type spot struct {
		service mesh.ServiceName
		address netip.AddrPort
	}
	ids := make(map[mesh.ServiceName]spiffeid.ID, len(services))
	for _, svc := range services {
		ids[svc.Name] = svc.ID
	}
	latest := make(map[spot]mesh.Endpoint)
	for e, h := range r.endpoints {
		id, known := ids[e.Service]
		if !known || !r.gives(s, e.Agent, id) {
			continue
		}
		at := spot{e.Service, e.Address}
		if other, taken := latest[at]; !taken || r.endpoints[other].rev < h.rev {
			latest[at] = e
		}
	}
	out := make([]mesh.Endpoint, 0, len(latest))
	for _, e := range latest {
		e.Labels = r.endpoints[e].labels
		out = append(out, e)
	}
	slices.SortFunc(out, compare)
	return out
}

// entitled says if the policies let the agent of an endpoint hold the identity
// of its service.
func (r *Registry) entitled(s *state, e mesh.Endpoint) bool {
	if s.accepted == nil {
		return false
	}
	return slices.ContainsFunc(s.accepted.Policies.Services, func(svc mesh.Service) bool {
		return svc.Name == e.Service && r.gives(s, e.Agent, svc.ID)
	})
}

func (r *Registry) gives(s *state, agent, id spiffeid.ID) bool {
	return s.lineage.Gives(agent, r.factsOf(agent), id, r.cfg.Now())
}

func (r *Registry) rouse() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// loadEndpoints brings back endpoints and starts their leases. mu is held.
func (r *Registry) loadEndpoints(ctx context.Context) error {
	records, err := r.list(ctx, store.KindEndpoint)
	if err != nil {
		return fmt.Errorf("load endpoints: %w", err)
	}
	for _, rec := range records {
		if err := r.hold(rec); err != nil {
			return err
		}
	}
	r.rouse()
	return nil
}

// hold takes an endpoint from the store. The issuer that it was announced to
// ends it, until renew finds that one gone. mu is held.
func (r *Registry) hold(rec store.Record) error {
	var er endpointRecord
	if err := json.Unmarshal(rec.Value, &er); err != nil {
		return fmt.Errorf("load endpoint %q: %w", rec.Key, err)
	}
	if err := r.checkEndpoint(er.Endpoint, er.Lease); err != nil {
		return fmt.Errorf("load endpoint %q: %w", rec.Key, err)
	}
	h := &held{lease: er.Lease, labels: er.Endpoint.Labels, rev: rec.Revision, owner: er.Issuer}
	if er.Issuer == "" || !r.shared() {
		h.until, h.left = r.cfg.Now().Add(er.Lease), true
	}
	r.endpoints[place(er.Endpoint)] = h
	return nil
}
