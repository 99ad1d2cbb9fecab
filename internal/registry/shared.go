package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

const (
	// instances, proxies and authorities begin the keys of their records.
	instances = "instance/"
	proxies   = "proxy/"
	jwtKeys   = "jwt/"

	// instanceTTL is how long an issuer that is not heard of counts as alive.
	// Then its endpoints are held by the others for one lease more.
	instanceTTL = 15 * time.Second
	// tick is how often an issuer tells the others what its proxies reported.
	tick = time.Second
	// renewEvery is in ticks.
	renewEvery = 4
	// manyKeys is from when on it is cheaper to read a kind as a whole.
	manyKeys = 200
)

// shared says that other issuers write to the store as well.
func (r *Registry) shared() bool { return r.cfg.Instance != "" }

// join makes this issuer known to the others. mu is held.
func (r *Registry) join(ctx context.Context) error {
	// What is written from now on is followed.
	seen, err := r.cfg.Store.Revision(ctx)
	if err == nil {
		r.seen = seen
		r.fleet.behind.Store(true)
		r.lease, err = r.present(ctx)
	}
	if err == nil {
		r.alive, err = r.living(ctx)
		r.issuers.Store(int32(len(r.alive)))
	}
	if err != nil {
		return fmt.Errorf("join the other issuers: %w", err)
	}
	return nil
}

func (r *Registry) present(ctx context.Context) (*store.Lease, error) {
	return store.LeaseConfig{
		Store: r.cfg.Store, Name: instances + r.cfg.Instance, Holder: r.cfg.Instance, TTL: instanceTTL, Now: r.cfg.Now,
	}.Acquire(ctx)
}

// prefixed reads the records of a kind whose key begins with a prefix.
func (r *Registry) prefixed(ctx context.Context, kind store.Kind, prefix string) ([]store.Record, error) {
	var all []store.Record
	for after := prefix; ; after = all[len(all)-1].Key {
		page, err := r.cfg.Store.List(ctx, kind, after, store.MaxPage)
		if err != nil {
			return nil, err
		}
		for _, rec := range page {
			if !strings.HasPrefix(rec.Key, prefix) {
				return all, nil
			}
			all = append(all, rec)
		}
		if len(page) < store.MaxPage {
			return all, nil
		}
	}
}

// living reads which issuers are alive.
func (r *Registry) living(ctx context.Context) (map[string]bool, error) {
	records, err := r.prefixed(ctx, store.KindLease, instances)
	if err != nil {
		return nil, err
	}
	alive := map[string]bool{r.cfg.Instance: true}
	for _, rec := range records {
		alive[strings.TrimPrefix(rec.Key, instances)] = true
	}
	return alive, nil
}

// follow applies what other issuers write until ctx ends.
func (r *Registry) follow(ctx context.Context) {
	for ctx.Err() == nil {
		err := r.catchUp(ctx)
		if err == nil || ctx.Err() != nil {
			continue
		}
		r.cfg.Log.Error("changes of other issuers not followed; trying again in 1s", "error", err)
		timer := time.NewTimer(time.Second)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

// catchUp waits for changes and applies them.
func (r *Registry) catchUp(ctx context.Context) error {
	newest, err := r.cfg.Store.Watch(ctx, r.seen)
	if err != nil {
		return err
	}
	for r.seen < newest {
		list, err := r.cfg.Store.Changes(ctx, r.seen, 0)
		if errors.Is(err, store.ErrCompacted) {
			list, err = nil, nil // read everything
		} else if err == nil && len(list) > 0 {
			newest = max(newest, list[len(list)-1].Revision)
		}
		if err != nil {
			return err
		}
		if err := r.applyChanges(ctx, list); err != nil {
			return err
		}
		if len(list) == 0 {
			r.seen = newest
		} else {
			r.seen = list[len(list)-1].Revision
		}
	}
	return nil
}

// applyChanges brings in what changed; everything if the list is empty.
func (r *Registry) applyChanges(ctx context.Context, list []store.Change) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := len(list) == 0
	policies, entries, keys, federations, reports, revocations, stops, routes := all, all, all, all, all, all, all, all
	endpoints := make(map[mesh.Endpoint]int64)
	var agents []string
	for _, c := range list {
		switch c.Kind {
		case store.KindAgent:
			agents = append(agents, c.Key)
		case store.KindRevocation:
			revocations = revocations || r.Revocations().Revision < uint64(c.Revision)
		case store.KindFaultStop:
			stops = stops || r.FaultStops().Revision < uint64(c.Revision)
		case store.KindPolicy, store.KindRollout:
			policies = policies || r.state.Load().older(c)
			routes = routes || c.Kind == store.KindRollout && r.ofRoute(c)
		case store.KindEndpoint:
			e, err := parseKey(c.Key)
			if err != nil {
				r.cfg.Log.Warn("endpoint of another issuer not understood", "key", c.Key, "error", err)
				continue
			}
			// What we wrote ourselves we know.
			if h := r.endpoints[e]; h == nil && !c.Deleted || h != nil && h.rev < c.Revision {
				endpoints[e] = c.Revision
			}
		case store.KindEntry:
			e, known := r.kept()[c.Key]
			entries = entries || known == c.Deleted || e.Revision < c.Revision
		case store.KindAuthority:
			keys = keys || strings.HasPrefix(c.Key, jwtKeys)
		case store.KindBundle:
			federations = true
		case store.KindLease:
			reports = reports || strings.HasPrefix(c.Key, proxies) && !strings.HasPrefix(c.Key, proxies+r.cfg.Instance+" ")
			if name, is := strings.CutPrefix(c.Key, instances); is && r.alive[name] == c.Deleted {
				r.recount.Store(true)
			}
		}
	}
	if reports {
		r.fleet.behind.Store(true)
	}
	if policies {
		if err := r.adopt(ctx); err != nil {
			return err
		}
	}
	if entries {
		if err := r.followEntries(ctx); err != nil {
			return err
		}
	}
	if all {
		r.forgetAgents()
		r.lost = true
	}
	// What was signed here since is revoked too: the other issuer may not have
	// seen it.
	if err := r.settleLost(ctx); err != nil {
		return err
	}
	if revocations {
		if err := r.loadRevocations(ctx); err != nil {
			return err
		}
	}
	if err := r.followAgents(ctx, agents); err != nil {
		return err
	}
	if err := r.reload(ctx, keys, federations, stops, routes); err != nil {
		return err
	}
	if all || len(endpoints) > manyKeys {
		return r.rereadAll(ctx)
	}
	return r.reread(ctx, slices.Collect(maps.Keys(endpoints)))
}

// reload reads again what of these changed. mu is held.
func (r *Registry) reload(ctx context.Context, keys, federations, stops, routes bool) error {
	if routes {
		if err := r.loadDeliveries(ctx); err != nil {
			return err
		}
	}
	if stops {
		if err := r.loadFaultStops(ctx); err != nil {
			return err
		}
	}
	if keys {
		if err := r.loadKeys(ctx); err != nil {
			return err
		}
	}
	if federations {
		return r.loadFederations(ctx)
	}
	return nil
}

// parseKey is the reverse of keyOf.
func parseKey(key string) (mesh.Endpoint, error) {
	f := strings.Split(key, " ")
	if len(f) != 3 {
		return mesh.Endpoint{}, errors.New("want three fields")
	}
	agent, err := spiffeid.FromString(f[0])
	if err != nil {
		return mesh.Endpoint{}, err
	}
	address, err := netip.ParseAddrPort(f[2])
	if err != nil {
		return mesh.Endpoint{}, err
	}
	return mesh.Endpoint{Agent: agent, Service: mesh.ServiceName(f[1]), Address: address}, nil
}

// reread takes endpoints as the store has them. mu is held.
func (r *Registry) reread(ctx context.Context, some []mesh.Endpoint) error {
	for _, e := range some {
		rec, err := r.cfg.Store.Get(ctx, store.KindEndpoint, keyOf(e))
		switch {
		case errors.Is(err, store.ErrNotFound):
			err = r.ended(ctx, e)
		case err == nil:
			err = r.holdNewer(rec, e)
		}
		if err != nil {
			return err
		}
	}
	return r.settle(ctx)
}

// rereadAll takes all endpoints as the store has them. mu is held.
func (r *Registry) rereadAll(ctx context.Context) error {
	records, err := r.list(ctx, store.KindEndpoint)
	if err != nil {
		return err
	}
	there := make(map[mesh.Endpoint]bool, len(records))
	for _, rec := range records {
		e, err := parseKey(rec.Key)
		if err != nil {
			continue
		}
		there[e] = true
		if err := r.holdNewer(rec, e); err != nil {
			return err
		}
	}
	for e := range r.endpoints {
		if there[e] {
			continue
		}
		if err := r.ended(ctx, e); err != nil {
			return err
		}
	}
	return r.settle(ctx)
}

// holdNewer takes a record unless it is the one we know. mu is held.
func (r *Registry) holdNewer(rec store.Record, e mesh.Endpoint) error {
	if h := r.endpoints[e]; h != nil && h.rev >= rec.Revision {
		return nil
	}
	return r.hold(rec)
}

// settle publishes what followed from a reading. mu is held.
func (r *Registry) settle(ctx context.Context) error {
	rev, err := r.cfg.Store.Revision(ctx)
	if err != nil {
		return err
	}
	r.rouse()
	r.refresh(rev)
	return nil
}

// ended takes note that another issuer ended an endpoint. If its proxy is
// connected here, and not banned, that was an error: the other believed that
// we were gone. mu is held.
func (r *Registry) ended(ctx context.Context, e mesh.Endpoint) error {
	h := r.endpoints[e]
	if h == nil {
		return nil
	}
	if h.owner == r.cfg.Instance && !h.left {
		agent, err := r.GetAgent(ctx, e.Agent)
		if err != nil && !errors.Is(err, mesh.ErrNotFound) {
			return err
		}
		if err != nil || !agent.Banned {
			op, err := r.endpointOp(e, h.labels, h.lease)
			if err != nil {
				return err
			}
			h.rev, err = r.write(ctx, op)
			return err
		}
	}
	delete(r.endpoints, e)
	return nil
}

// attend keeps this issuer known as alive, sees which others are, and tells
// them what proxies reported here, until ctx ends.
func (r *Registry) attend(ctx context.Context) {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			r.depart()
			return
		case <-ticker.C:
		}
		err := r.tellProxies(ctx)
		if r.recount.Swap(false) || n%renewEvery == 0 {
			err = errors.Join(err, r.renew(ctx))
		}
		err = errors.Join(err, r.hearProxies(ctx))
		if err != nil && ctx.Err() == nil {
			r.cfg.Log.Error("other issuers not kept up to date; trying again", "error", err)
		}
	}
}

// depart says that this issuer goes, so that the others need not wait.
func (r *Registry) depart() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if err := r.lease.Release(ctx); err != nil {
		r.cfg.Log.Warn("other issuers not told of the end of this one", "error", err)
	}
}

// renew prolongs the lease of this issuer, and holds the endpoints of those
// that are gone.
func (r *Registry) renew(ctx context.Context) error {
	err := r.lease.Renew(ctx)
	if errors.Is(err, store.ErrLost) {
		// The database was out of reach for longer than the lease.
		var again *store.Lease
		if again, err = r.present(ctx); err == nil {
			r.lease = again
		}
	}
	if err != nil {
		return err
	}
	alive, err := r.living(ctx)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !maps.Equal(r.alive, alive) {
		r.fleet.behind.Store(true)
	}
	r.alive = alive
	r.issuers.Store(int32(len(alive)))
	now, some := r.cfg.Now(), false
	for _, h := range r.endpoints {
		switch {
		case h.owner == r.cfg.Instance:
		case alive[h.owner]:
			// Perhaps it was only slow.
			h.until, h.left = time.Time{}, false
		case h.until.IsZero():
			h.until, h.left, some = now.Add(h.lease), true, true
		}
	}
	if some {
		r.cfg.Log.Warn("an issuer is gone; its endpoints end unless their proxies connect to another")
		r.rouse()
	}
	return nil
}

// A proxyRecord is what a proxy last said to an issuer, in the store.
type proxyRecord struct {
	Proxy   mesh.Proxy `json:"proxy"`
	Refused uint64     `json:"refused,omitempty"`
}

// differs says that a report has news. LastSeen is news once a minute.
func differs(old, p proxy) bool {
	if a, b := old.Authorities, p.Authorities; a != nil && b != nil && slices.Equal(a.Trusts, b.Trusts) && slices.Equal(a.Shows, b.Shows) {
		p.Authorities = a
	}
	if old.Traffic.Equal(p.Traffic) {
		p.Traffic = old.Traffic
	}
	if p.LastSeen.Sub(old.LastSeen) < time.Minute {
		p.LastSeen = old.LastSeen
	}
	p.Revision = old.Revision
	return old != p
}

// newer says which of two issuers has the proxy: the one it is connected to,
// or was last.
func newer(a, b proxy) bool {
	if a.Connected != b.Connected {
		return a.Connected
	}
	return a.LastSeen.After(b.LastSeen)
}

// tellProxies writes what proxies reported here since the last time.
func (r *Registry) tellProxies(ctx context.Context) error {
	f := &r.fleet
	f.mu.Lock()
	unsaid := f.unsaid
	f.unsaid = nil
	var ops []store.Op
	for key := range unsaid {
		p, known := f.proxies[key]
		if !known {
			continue
		}
		value, err := json.Marshal(proxyRecord{p.Proxy, p.refused})
		if err != nil {
			f.mu.Unlock()
			return fmt.Errorf("encode proxy %s: %w", key.workload, err)
		}
		name := proxies + r.cfg.Instance + " " + key.agent.String() + " " + key.workload.String()
		if len(name) > store.MaxKey {
			continue // two identities of 500 bytes are shown by one issuer only
		}
		ops = append(ops, store.Op{Kind: store.KindLease, Key: name, Value: value, Expires: r.cfg.Now().Add(keepProxy)})
	}
	f.mu.Unlock()
	if len(ops) == 0 {
		return nil
	}
	if _, err := r.write(ctx, ops...); err != nil {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.unsaid == nil {
			f.unsaid = unsaid
		}
		for key := range unsaid {
			f.unsaid[key] = true
		}
		return fmt.Errorf("tell of proxies: %w", err)
	}
	return nil
}

// hearProxies reads what proxies said to other issuers, if there is news. Who
// was connected to an issuer that is gone is not connected.
func (r *Registry) hearProxies(ctx context.Context) error {
	if !r.fleet.behind.Swap(false) {
		return nil
	}
	r.mu.Lock()
	alive := r.alive
	r.mu.Unlock()
	records, err := r.prefixed(ctx, store.KindLease, proxies)
	if err != nil {
		r.fleet.behind.Store(true)
		return fmt.Errorf("hear of proxies: %w", err)
	}
	elsewhere := make(map[proxyKey]proxy)
	for _, rec := range records {
		instance, _, _ := strings.Cut(strings.TrimPrefix(rec.Key, proxies), " ")
		if instance == r.cfg.Instance {
			continue
		}
		var pr proxyRecord
		if err := json.Unmarshal(rec.Value, &pr); err != nil {
			return fmt.Errorf("decode %s: %w", rec.Key, err)
		}
		p, key := proxy{pr.Proxy, pr.Refused}, proxyKey{pr.Proxy.Agent, pr.Proxy.Workload}
		p.Connected = p.Connected && alive[instance]
		if old, known := elsewhere[key]; !known || newer(p, old) {
			elsewhere[key] = p
		}
	}
	r.fleet.mu.Lock()
	r.fleet.elsewhere = elsewhere
	r.fleet.mu.Unlock()
	return nil
}
