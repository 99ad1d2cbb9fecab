package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

const (
	// keepAgent is how long an agent is known after its SVID expired. A banned
	// one is known for ever.
	keepAgent = 30 * 24 * time.Hour
	// keepProxy is how long a proxy that is gone stays in the list.
	keepProxy = 24 * time.Hour
)

// fleet is what proxies say of themselves. It is lost at a restart, and made
// good as they connect again.
type fleet struct {
	mu      sync.Mutex // guards the fields below
	proxies map[proxyKey]proxy
	// unsaid are the proxies whose report the other issuers do not have yet.
	unsaid map[proxyKey]bool
	// elsewhere is what proxies last said to other issuers.
	elsewhere map[proxyKey]proxy

	// behind says that elsewhere is to be read anew.
	behind atomic.Bool
}

type proxyKey struct{ agent, workload spiffeid.ID }

// proxy is a proxy as it was last reported; its PolicyRevision is the last
// acknowledged.
type proxy struct {
	mesh.Proxy
	// refused is the policy revision that the last report refused, if it did.
	refused uint64
}

// PutAgent keeps an agent in the place of the one of its Revision; the error
// wraps mesh.ErrChanged when that is not there any more, so that no issuer
// undoes the ban of another. To ban it revokes what it holds and ends its
// endpoints at once, and wakes whoever waits for Changed, so that its streams
// end too.
func (r *Registry) PutAgent(ctx context.Context, a mesh.Agent) error {
	if !a.ID.MemberOf(r.cfg.TrustDomain) {
		return fmt.Errorf("put agent: %q is not of trust domain %s", a.ID, r.cfg.TrustDomain.Name())
	}
	value, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("put agent: %w", err)
	}
	op := store.Op{Kind: store.KindAgent, Key: a.ID.String(), Value: value, IfRevision: &a.Revision}
	if !a.Banned && !a.ExpiresAt.IsZero() {
		op.Expires = a.ExpiresAt.Add(keepAgent)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	// Not held while it is written: after an error either may be true.
	r.agents.Delete(a.ID)
	if _, err := r.write(ctx, op); errors.Is(err, store.ErrConflict) {
		return fmt.Errorf("put agent %s: %w", a.ID, mesh.ErrChanged)
	} else if err != nil {
		if old, known := r.nodes.Load(a.ID); known && !slices.Equal(old.([]mesh.Selector), a.Selectors) {
			r.lost = true // which it has now is read when that is settled
			r.rouse()
		}
		return fmt.Errorf("put agent: %w", err)
	}
	if r.learn(a) {
		if err := r.regroup(ctx); err != nil {
			return fmt.Errorf("put agent: %w", err)
		}
	}
	if !a.Banned {
		return nil
	}
	defer r.wakeAll() // also when no endpoint ends: streams of the agent must
	r.lost = true
	if err := r.settleLost(ctx); err != nil {
		return fmt.Errorf("put agent: %w", err)
	}
	for {
		var over []mesh.Endpoint
		for e := range r.endpoints {
			if e.Agent == a.ID {
				over = append(over, e)
			}
		}
		// What another issuer wrote meanwhile is still there.
		if err := r.drop(ctx, over); err != nil || len(over) == 0 {
			return err
		}
	}
}

// GetAgent returns an agent, expired ones too; mesh.ErrNotFound if none has
// the ID.
func (r *Registry) GetAgent(ctx context.Context, id spiffeid.ID) (mesh.Agent, error) {
	if id.IsZero() {
		return mesh.Agent{}, fmt.Errorf("agent without an ID: %w", mesh.ErrNotFound)
	}
	rec, err := r.cfg.Store.Get(ctx, store.KindAgent, id.String())
	if errors.Is(err, store.ErrNotFound) {
		return mesh.Agent{}, fmt.Errorf("agent %s: %w", id, mesh.ErrNotFound)
	}
	if err != nil {
		return mesh.Agent{}, fmt.Errorf("get agent: %w", err)
	}
	a, err := decodeAgent(rec)
	if err == nil {
		// One that attested to another issuer is here before its change is.
		r.nodes.LoadOrStore(a.ID, a.Selectors)
	}
	return a, err
}

// ListAgents returns every agent, by ID.
func (r *Registry) ListAgents(ctx context.Context) ([]mesh.Agent, error) {
	records, err := r.list(ctx, store.KindAgent)
	if err != nil {
		return nil, fmt.Errorf("list agents: %w", err)
	}
	agents := make([]mesh.Agent, 0, len(records))
	for _, rec := range records {
		a, err := decodeAgent(rec)
		if err != nil {
			return nil, err
		}
		agents = append(agents, a)
	}
	return agents, nil
}

func decodeAgent(rec store.Record) (mesh.Agent, error) {
	var a mesh.Agent
	if err := json.Unmarshal(rec.Value, &a); err != nil {
		return mesh.Agent{}, fmt.Errorf("decode agent %s: %w", rec.Key, err)
	}
	a.Revision = rec.Revision
	return a, nil
}

// ReportProxy takes note of what a proxy says. A report with State Rejected
// refuses its PolicyRevision, or what is in force if that is 0, and leaves the
// last acknowledged as it was. Any other acknowledges its PolicyRevision; the
// State is computed when Proxies is asked.
func (r *Registry) ReportProxy(p mesh.Proxy) {
	now := r.cfg.Now()
	if p.LastSeen.IsZero() {
		p.LastSeen = now
	}
	key, in := proxyKey{p.Agent, p.Workload}, proxy{Proxy: p}
	current := r.policyRevision()
	f := &r.fleet
	f.mu.Lock()
	defer f.mu.Unlock()
	if p.State == mesh.Rejected {
		in.refused = cmp.Or(p.PolicyRevision, current)
		in.PolicyRevision = f.proxies[key].PolicyRevision
	}
	in.Since = f.since(key, in.PolicyRevision, now)
	if f.proxies == nil {
		f.proxies = make(map[proxyKey]proxy)
	}
	_, known := f.proxies[key]
	if old := f.proxies[key]; r.shared() && (old.Kind == "" || differs(old, in)) {
		if f.unsaid == nil {
			f.unsaid = make(map[proxyKey]bool)
		}
		f.unsaid[key] = true
	}
	f.proxies[key] = in
	if known {
		return // each of thousands says so every few seconds
	}
	for key, old := range f.proxies {
		if !old.Connected && now.Sub(old.LastSeen) > keepProxy {
			delete(f.proxies, key)
		}
	}
}

// since is when a proxy acknowledged a revision, by what it said before, here
// or to another issuer. mu is held.
func (f *fleet) since(key proxyKey, revision uint64, now time.Time) time.Time {
	for _, said := range []map[proxyKey]proxy{f.proxies, f.elsewhere} {
		if p, known := said[key]; known && p.PolicyRevision == revision && !p.Since.IsZero() {
			return p.Since
		}
	}
	if revision == 0 {
		return time.Time{}
	}
	return now.UTC()
}

// Proxies returns every proxy that was seen in the last day, by workload and
// agent, with its state as of now.
func (r *Registry) Proxies() []mesh.Proxy {
	st := r.state.Load()
	now := r.cfg.Now()
	f := &r.fleet
	f.mu.Lock()
	defer f.mu.Unlock()
	all := f.proxies
	if len(f.elsewhere) > 0 {
		all = maps.Clone(f.elsewhere)
		for key, p := range f.proxies {
			if other, known := all[key]; !known || newer(p, other) {
				all[key] = p
			}
		}
	}
	out := make([]mesh.Proxy, 0, len(all))
	for _, p := range all {
		if !p.Connected && now.Sub(p.LastSeen) > keepProxy {
			continue
		}
		p.Wanted, p.Group = r.wanted(st, p)
		switch {
		case p.Wanted == 0:
			p.State = mesh.Stale
		case p.refused == p.Wanted:
			p.State = mesh.Rejected
		case p.PolicyRevision == p.Wanted:
			p.State = mesh.Synced
		default:
			p.State = mesh.Stale
		}
		p.PolicyHash = st.hashOf(p.PolicyRevision)
		if p.State != mesh.Rejected {
			p.Reason = ""
		}
		out = append(out, p.Proxy)
	}
	slices.SortFunc(out, func(a, b mesh.Proxy) int {
		return cmp.Or(cmp.Compare(a.Workload.String(), b.Workload.String()), cmp.Compare(a.Agent.String(), b.Agent.String()))
	})
	return out
}

// wanted is the policy revision that a proxy should act on, and its group while
// there are two.
func (r *Registry) wanted(st *state, p proxy) (uint64, string) {
	switch {
	case st.snapshot == nil:
		return 0, ""
	case !st.rollout.serves():
		return st.snapshot.PolicyRevision, ""
	case st.rollout.has(p.Agent, p.Workload, p.Kind, r.factsOf(p.Agent)):
		return st.rollout.snapshot.PolicyRevision, mesh.GroupCanary
	}
	return st.snapshot.PolicyRevision, mesh.GroupFleet
}

// hashOf is the hash of the policies of a revision, as far as it is known: that
// of the set, or of the files.
func (s *state) hashOf(revision uint64) string {
	if acc := s.accepted; acc != nil && acc.Revision == revision {
		return cmp.Or(acc.Set, acc.Hash)
	}
	if s.rollout.serves() && s.rollout.tried.Revision == revision {
		return s.rollout.tried.Set
	}
	return ""
}

// policyRevision is that in force, 0 before the first.
func (r *Registry) policyRevision() uint64 {
	if s := r.Current(); s != nil {
		return s.PolicyRevision
	}
	return 0
}
