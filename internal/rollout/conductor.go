package rollout

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

const (
	// tick is how often a rollout is looked at.
	tick = 500 * time.Millisecond
	// leaseTTL is how long an issuer that dies holds up the rollouts, renewAfter
	// when the lease is renewed though nothing is written.
	leaseTTL   = 5 * time.Second
	renewAfter = 2 * time.Second
	// leaseName is what the one has that acts.
	leaseName = "rollout/routes"
	// tallies begins the keys of what each issuer has counted.
	tallies = "tally/"
	// tellEvery is how often an issuer tells the others what it has counted.
	tellEvery = time.Second
	// linger is how long after its end the issuers tell each other who acts on the
	// share of a rollout.
	linger = time.Minute
	// tries bounds how often a move is made anew that others were faster than.
	tries = 5
)

// A Book keeps the rollouts, and has the proxies act on their shares.
type Book interface {
	// Deliveries are all that are known, by service and route.
	Deliveries() []mesh.Delivery
	// PutDelivery keeps one in the place of the one of its Revision, by write or,
	// when that is nil, by the store's own; it is durable then. The error wraps
	// mesh.ErrChanged when that one is not there any more.
	PutDelivery(ctx context.Context, d mesh.Delivery, write func(context.Context, ...store.Op) (int64, error)) error
	// Policies are those in force, nil before the first.
	Policies() *mesh.Policies
	// Changed is closed when Deliveries or Policies have another answer.
	Changed() <-chan struct{}
	// ActsOn says how many sidecars are connected to this issuer, and how many of
	// them act on the share of a route.
	ActsOn(service mesh.ServiceName, route string) (acked, connected int)
}

// A Config says what a Conductor works with.
type Config struct {
	// Book and Store keep what must survive. Required.
	Book  Book
	Store store.Store
	// Instance names this process among those that share the store; empty when
	// the store is this process's alone.
	Instance string
	// OnStep is told of each step before it is made, and an error keeps it from
	// being made. Required.
	OnStep func(Event) error
	// Log is for operators. Required.
	Log *slog.Logger
	// Now is the clock, that of Store. Default time.Now.
	Now func() time.Time
}

// An Event is a step that is about to be made.
type Event struct {
	// Step is one of the constants of this package.
	Step string
	// Delivery is the rollout as it will be, with the figures it was judged by.
	mesh.Delivery
	// Asked is who asked for it; empty for the issuer itself.
	Asked string
}

// A Conductor looks after the rollouts of routes. It is safe for concurrent use.
type Conductor struct {
	cfg Config

	mu      sync.Mutex // guards the fields below
	tallies map[key]*tally
	callees callees

	// Only Run uses these.
	lease   *store.Lease
	renewed time.Time
	told    time.Time
}

// New checks the configuration; Run does the work.
func New(cfg Config) (*Conductor, error) {
	var errs []error
	for _, f := range []struct {
		name    string
		missing bool
	}{{"book", cfg.Book == nil}, {"store", cfg.Store == nil}, {"on step", cfg.OnStep == nil}, {"log", cfg.Log == nil}} {
		if f.missing {
			errs = append(errs, errors.New(f.name+": missing"))
		}
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("rollouts: %w", errors.Join(errs...))
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Conductor{cfg: cfg, tallies: map[key]*tally{}}, nil
}

// Run looks after what is under way until ctx ends.
func (c *Conductor) Run(ctx context.Context) error {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	defer c.rest()
	for ctx.Err() == nil {
		changed := c.cfg.Book.Changed()
		if !c.busy() {
			c.rest()
			select {
			case <-ctx.Done():
			case <-changed:
			}
			continue
		}
		if err := c.round(ctx); err != nil && ctx.Err() == nil {
			c.cfg.Log.Error("rollouts not looked after; trying again", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
	return nil
}

// busy says whether any rollout is under way, or was until just now, and forgets
// the counts of others.
func (c *Conductor) busy() bool {
	active, busy := map[key]bool{}, false
	for _, d := range c.cfg.Book.Deliveries() {
		if d.Active() {
			active[key{d.Service, d.Route}] = true
		}
		busy = busy || c.lives(d) || c.edited(d)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for k := range c.tallies {
		if !active[k] {
			delete(c.tallies, k)
		}
	}
	return busy
}

// edited says that the route of a rollout has another plan than it was started
// by, or none. Without policies nothing is known.
func (c *Conductor) edited(d mesh.Delivery) bool {
	p := c.cfg.Book.Policies()
	_, hash, ok := p.PlanOf(d.Service, d.Route)
	return p != nil && d.State != mesh.Superseded && (!ok || hash != d.PlanHash)
}

// lives says whether others may ask how a rollout does.
func (c *Conductor) lives(d mesh.Delivery) bool {
	return d.Active() || c.cfg.Instance != "" && c.cfg.Now().Sub(d.Ended) < linger
}

// round tells the other issuers what was counted here, and acts if it is for
// this one to act.
func (c *Conductor) round(ctx context.Context) error {
	if err := c.tell(ctx); err != nil {
		return err
	}
	if ours, err := c.lead(ctx); err != nil || !ours {
		return err
	}
	var errs []error
	for _, d := range c.cfg.Book.Deliveries() {
		if c.lease == nil {
			break // it was lost
		}
		if err := c.look(ctx, d); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// lead takes the lease, or keeps it, and reports whether it is ours.
func (c *Conductor) lead(ctx context.Context) (bool, error) {
	now := c.cfg.Now()
	if c.lease != nil {
		if now.Sub(c.renewed) < renewAfter && !now.Before(c.renewed) {
			return true, nil
		}
		err := c.lease.Renew(ctx)
		if err == nil {
			c.renewed = now
			return true, nil
		}
		if c.lease = nil; !errors.Is(err, store.ErrLost) {
			return false, err
		}
	}
	lease, err := store.LeaseConfig{
		Store: c.cfg.Store, Name: leaseName, Holder: cmp.Or(c.cfg.Instance, "issuer"), TTL: leaseTTL, Now: c.cfg.Now,
	}.Acquire(ctx)
	if errors.Is(err, store.ErrHeld) {
		return false, nil
	}
	if err == nil {
		c.lease, c.renewed = lease, now
		c.cfg.Log.Info("this issuer conducts the rollouts of routes", "fence", lease.Fence())
	}
	return err == nil, err
}

// rest gives the lease back.
func (c *Conductor) rest() {
	if c.lease == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := c.lease.Release(ctx); err != nil {
		c.cfg.Log.Warn("the lease on the rollouts of routes ends by itself", "error", err)
	}
	c.lease = nil
}

// look judges a rollout once, and acts. What is written is written under the
// lease: an issuer that was asleep and has lost it changes nothing. One that is
// over ends for good with an edit of its route: that the edit is taken back later
// brings no share back.
func (c *Conductor) look(ctx context.Context, d mesh.Delivery) error {
	now := c.cfg.Now().UTC()
	next, step := Lapse(d, now), Supersede
	if !c.edited(d) {
		if !d.Active() {
			return nil
		}
		w, _, err := c.calls(ctx, d, now)
		if err != nil {
			return err
		}
		if next, step = Look(d, w, now); step == "" {
			return nil
		}
	}
	if err := c.cfg.OnStep(Event{Step: step, Delivery: next}); err != nil {
		return fmt.Errorf("record the rollout: %w", err)
	}
	err := c.cfg.Book.PutDelivery(ctx, next, c.lease.Write)
	switch {
	case errors.Is(err, mesh.ErrChanged):
		return nil // somebody has moved it: it is looked at anew
	case errors.Is(err, store.ErrLost):
		c.lease = nil
	}
	return err
}

// Move does what an operator asks for.
func (c *Conductor) Move(ctx context.Context, service mesh.ServiceName, route, move string, force bool, by string) (mesh.Delivery, error) {
	for n := 0; ; n++ {
		next, err := c.move(ctx, service, route, move, force, by)
		if err == nil {
			err = c.cfg.OnStep(Event{Step: move, Delivery: next, Asked: by})
		}
		if err == nil {
			if err = c.cfg.Book.PutDelivery(ctx, next, nil); err == nil {
				return next, nil
			}
		}
		if !errors.Is(err, mesh.ErrChanged) || n == tries {
			return mesh.Delivery{}, err
		}
	}
}

func (c *Conductor) move(ctx context.Context, service mesh.ServiceName, route, move string, force bool, by string) (mesh.Delivery, error) {
	plan, hash, ok := c.cfg.Book.Policies().PlanOf(service, route)
	if !ok {
		return mesh.Delivery{}, fmt.Errorf("%w: no route %s of service %s has a rollout in the policies in force%s", mesh.ErrDelivery, route, service, c.hint())
	}
	d := mesh.Delivery{Service: service, Route: route}
	for _, known := range c.cfg.Book.Deliveries() {
		if known.Service == service && known.Route == route {
			d = known
		}
	}
	now := c.cfg.Now().UTC()
	if d.State != "" && d.PlanHash != hash { // Run says so soon
		d.State = mesh.Superseded
	}
	w, _, err := c.calls(ctx, d, now)
	if err != nil {
		return d, err
	}
	switch move {
	case Start:
		return Begin(d, plan, hash, by, now)
	case Pause:
		return Stop(judged(d, w), by)
	case Promote:
		return Next(d, w, force, now)
	case Abort:
		return Back(judged(d, w), by, now)
	}
	return d, fmt.Errorf("%w: unknown move %.20q", mesh.ErrDelivery, move)
}

// hint names the routes that have a rollout.
func (c *Conductor) hint() string {
	var names []string
	c.cfg.Book.Policies().Plans(func(service mesh.ServiceName, route string) bool {
		names = append(names, string(service)+"/"+route)
		return len(names) < 5
	})
	if len(names) == 0 {
		return ": none has"
	}
	return "; these have: " + strings.Join(names, ", ")
}

// Deliveries are the rollouts as they stand: those under way as they are judged
// now, by what all issuers have counted.
func (c *Conductor) Deliveries(ctx context.Context) ([]mesh.Delivery, error) {
	list := slices.Clone(c.cfg.Book.Deliveries())
	for i, d := range list {
		w, acts, err := c.calls(ctx, d, c.cfg.Now())
		if err != nil {
			return nil, err
		}
		if d.Active() {
			list[i] = judged(d, w)
		}
		list[i].Acked, list[i].Proxies = acts.Acked, acts.Connected
	}
	return list, nil
}

// acts says how many proxies act on a share.
type acts struct {
	Acked     int `json:"acked"`
	Connected int `json:"connected"`
}

// A counted is what one issuer has counted of a route, in the store.
type counted struct {
	Width time.Duration `json:"width"`
	Parts []slot        `json:"parts"`
	// Share is what Acts speaks of.
	Share mesh.Share `json:"share"`
	Acts  acts       `json:"acts"`
}

// tell gives the other issuers what was counted here.
func (c *Conductor) tell(ctx context.Context) error {
	now := c.cfg.Now()
	if c.cfg.Instance == "" || now.Sub(c.told) < tellEvery && !now.Before(c.told) {
		return nil
	}
	c.told = now
	var ops []store.Op
	for _, d := range c.cfg.Book.Deliveries() {
		if !c.lives(d) {
			continue
		}
		own := c.own(d, now)
		value, err := json.Marshal(own)
		if err != nil {
			return fmt.Errorf("encode counts: %w", err)
		}
		ops = append(ops, store.Op{
			Kind: store.KindLease, Key: tallies + string(d.Service) + "/" + d.Route + " " + c.cfg.Instance, Value: value,
			Expires: now.Add(d.Plan.Judge.WithDefaults().Window + 10*time.Second),
		})
	}
	if len(ops) == 0 {
		return nil
	}
	if _, err := c.cfg.Store.Write(ctx, ops...); err != nil {
		return fmt.Errorf("tell the other issuers what was counted: %w", err)
	}
	return nil
}

// own is what was counted here.
func (c *Conductor) own(d mesh.Delivery, now time.Time) counted {
	out := counted{Share: d.Share}
	out.Acts.Acked, out.Acts.Connected = c.cfg.Book.ActsOn(d.Service, d.Route)
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.tallies[key{d.Service, d.Route}]; t != nil {
		t.forget(now.UnixNano() / int64(t.width))
		out.Width = t.width
		for _, s := range t.parts {
			out.Parts = append(out.Parts, slot{s.At, s.Canary.Clone(), s.Others.Clone()})
		}
	}
	return out
}

// calls sums up what all issuers have counted since the step began, and who acts
// on the share.
func (c *Conductor) calls(ctx context.Context, d mesh.Delivery, now time.Time) (w Calls, who acts, err error) {
	all := []counted{c.own(d, now)}
	if c.cfg.Instance != "" {
		prefix := tallies + string(d.Service) + "/" + d.Route + " "
		records, err := c.cfg.Store.List(ctx, store.KindLease, prefix, 0)
		if err != nil {
			return w, who, fmt.Errorf("read what other issuers counted: %w", err)
		}
		for _, rec := range records {
			name, is := strings.CutPrefix(rec.Key, prefix)
			if !is {
				break
			}
			var k counted
			if name == c.cfg.Instance || json.Unmarshal(rec.Value, &k) != nil {
				continue // our own; or of a version that counts otherwise
			}
			all = append(all, k)
		}
	}
	for _, k := range all {
		if k.Width > 0 {
			part := since(k.Parts, k.Width, d.Since, now)
			w.Canary.Add(part.Canary)
			w.Others.Add(part.Others)
		}
		who.Connected += k.Acts.Connected
		if k.Share == d.Share {
			who.Acked += k.Acts.Acked
		}
	}
	return w, who, nil
}

// Take counts what the sidecar of a workload reports. Counts of a route that no
// rollout is of, or whose service the workload may not call, are passed over.
func (c *Conductor) Take(workload spiffeid.ID, list []mesh.Sample) {
	policies, now := c.cfg.Book.Policies(), c.cfg.Now()
	windows := map[key]time.Duration{}
	for _, d := range c.cfg.Book.Deliveries() {
		if d.Active() {
			windows[key{d.Service, d.Route}] = d.Plan.Judge.WithDefaults().Window
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range list {
		k := key{s.Service, s.Route}
		window, active := windows[k]
		if !active || !c.callees.has(policies, workload, s.Service) {
			continue
		}
		t := c.tallies[k]
		if t == nil || t.width != newTally(window).width {
			t = newTally(window)
			c.tallies[k] = t
		}
		t.add(now, s.Canary, s.Calls)
	}
}

// callees remember which services a workload may call at all.
type callees struct {
	of   *mesh.Policies
	seen map[spiffeid.ID]map[mesh.ServiceName]bool
}

func (c *callees) has(p *mesh.Policies, who spiffeid.ID, service mesh.ServiceName) bool {
	if c.of != p || c.seen == nil {
		c.of, c.seen = p, map[spiffeid.ID]map[mesh.ServiceName]bool{}
	}
	may, known := c.seen[who]
	if !known {
		may = map[mesh.ServiceName]bool{}
		for _, name := range p.Callees(who) {
			may[name] = true
		}
		c.seen[who] = may
	}
	return may[service]
}
