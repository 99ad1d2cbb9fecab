package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

// deliveries begins the keys of the records of rollouts of routes.
const deliveries = "route/"

// A deliveryKey is a route of a service.
type deliveryKey struct {
	service mesh.ServiceName
	route   string
}

func (k deliveryKey) String() string { return deliveries + string(k.service) + "/" + k.route }

// A delivery is the rollout of a route, as it is kept.
type delivery struct {
	mesh.Delivery
	// told is the revision of the snapshot by which its share was distributed
	// here.
	told uint64
}

// Deliveries returns the rollouts of routes, by service and route. The caller
// must not change what they lead to.
func (r *Registry) Deliveries() []mesh.Delivery {
	known := r.deliveries.Load()
	if known == nil {
		return nil
	}
	out := make([]mesh.Delivery, 0, len(*known))
	for _, d := range *known {
		out = append(out, d.Delivery)
	}
	slices.SortFunc(out, func(a, b mesh.Delivery) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Route, b.Route))
	})
	return out
}

// PutDelivery keeps a rollout in the place of the one of its Revision, and has
// the proxies act on its share; the error wraps mesh.ErrChanged when that one is
// not there any more. It is written by write, such as that of a lease; nil for
// the store's own.
func (r *Registry) PutDelivery(ctx context.Context, d mesh.Delivery, write func(context.Context, ...store.Op) (int64, error)) error {
	if write == nil {
		write = r.write
	}
	value, err := json.Marshal(d)
	if err != nil {
		return fmt.Errorf("keep rollout: %w", err)
	}
	k := deliveryKey{d.Service, d.Route}
	r.mu.Lock()
	defer r.mu.Unlock()
	rev, err := write(context.WithoutCancel(ctx), store.Op{Kind: store.KindRollout, Key: k.String(), Value: value, IfRevision: &d.Revision})
	if errors.Is(err, store.ErrConflict) {
		// The policies first: a rollout is never known before the plan that it was
		// started by.
		if err := errors.Join(r.adopt(ctx), r.loadDeliveries(ctx)); err != nil {
			return err
		}
		return fmt.Errorf("keep rollout of %s/%s: %w", d.Service, d.Route, mesh.ErrChanged)
	}
	if err != nil {
		return fmt.Errorf("keep rollout of %s/%s: %w", d.Service, d.Route, err)
	}
	d.Revision = rev
	r.deliver(map[deliveryKey]mesh.Delivery{k: d}, rev)
	return nil
}

// loadDeliveries reads the rollouts of routes anew, and distributes what is news.
// One that this issuer cannot read stays as it is known. mu is held.
func (r *Registry) loadDeliveries(ctx context.Context) error {
	records, err := r.prefixed(ctx, store.KindRollout, deliveries)
	if err != nil {
		return fmt.Errorf("load rollouts of routes: %w", err)
	}
	news, newest := map[deliveryKey]mesh.Delivery{}, int64(0)
	for _, rec := range records {
		var d mesh.Delivery
		if err := json.Unmarshal(rec.Value, &d); err != nil || (deliveryKey{d.Service, d.Route}).String() != rec.Key {
			r.cfg.Log.Error("rollout of a route not understood; it stays as it was known", "key", rec.Key, "error", err)
			continue
		}
		d.Revision = rec.Revision
		news[deliveryKey{d.Service, d.Route}] = d
		newest = max(newest, rec.Revision)
	}
	r.deliver(news, newest)
	return nil
}

// deliver takes news of rollouts, and distributes shares that are others now.
// mu is held.
func (r *Registry) deliver(news map[deliveryKey]mesh.Delivery, rev int64) {
	next := map[deliveryKey]delivery{}
	if known := r.deliveries.Load(); known != nil {
		maps.Copy(next, *known)
	}
	changed := false
	for k, d := range news {
		was := next[k]
		if was.Revision >= d.Revision {
			continue
		}
		if was.State == "" || was.Share != d.Share || was.Active() != d.Active() {
			was.told = 0
		}
		next[k], changed = delivery{d, was.told}, true
	}
	if !changed {
		return
	}
	r.deliveries.Store(&next)
	now := r.state.Load()
	if now.accepted == nil {
		return
	}
	state, snapshot := *now, *now.snapshot
	snapshot.Shares = r.shares(now.accepted.Policies)
	if ro := now.rollout; ro.serves() {
		tried, of := *ro, *ro.snapshot
		of.Shares = r.shares(ro.tried.Policies)
		tried.snapshot, state.rollout = &of, &tried
	}
	if slices.Equal(snapshot.Shares, now.snapshot.Shares) && (!now.rollout.serves() || slices.Equal(state.rollout.snapshot.Shares, now.rollout.snapshot.Shares)) {
		r.wakeAll()
		return
	}
	state.snapshot, state.changed = &snapshot, make(chan struct{})
	r.publish(&state, rev)
}

// shares are those that hold under a set of policies: of rollouts by the plan
// that it has.
func (r *Registry) shares(p *mesh.Policies) (out []mesh.CanaryShare) {
	known := r.deliveries.Load()
	if known == nil {
		return nil
	}
	for k, d := range *known {
		if _, hash, ok := p.PlanOf(k.service, k.route); ok && hash == d.PlanHash && d.State != mesh.Superseded {
			out = append(out, mesh.CanaryShare{Service: k.service, Route: k.route, Share: d.Share, Watch: d.Active()})
		}
	}
	slices.SortFunc(out, func(a, b mesh.CanaryShare) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Route, b.Route))
	})
	return out
}

// numberShares notes by which revision shares were distributed. mu is held.
func (r *Registry) numberShares(rev uint64) {
	known := r.deliveries.Load()
	if known == nil {
		return
	}
	next := maps.Clone(*known)
	some := false
	for k, d := range next {
		if d.told == 0 {
			d.told, some = rev, true
			next[k] = d
		}
	}
	if some {
		r.deliveries.Store(&next)
	}
}

// ActsOn says how many sidecars are connected here, and how many of them act on
// the share that the canary of a route has.
func (r *Registry) ActsOn(service mesh.ServiceName, route string) (acked, connected int) {
	var told uint64
	if known := r.deliveries.Load(); known != nil {
		told = (*known)[deliveryKey{service, route}].told
	}
	f := &r.fleet
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.proxies {
		if !p.Connected || p.Kind != "sidecar" {
			continue
		}
		connected++
		if told > 0 && p.Revision >= told {
			acked++
		}
	}
	return acked, connected
}

// ofRoute says that a change is news of the rollout of a route.
func (r *Registry) ofRoute(c store.Change) bool {
	name, is := strings.CutPrefix(c.Key, deliveries)
	if !is {
		return false
	}
	service, route, _ := strings.Cut(name, "/")
	known := r.deliveries.Load()
	return known == nil || (*known)[deliveryKey{mesh.ServiceName(service), route}].Revision < c.Revision
}
