package svid

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"reflect"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

const (
	// tick is the longest the Rotator sleeps, so that a jump of the wall
	// clock is noticed within it.
	tick = time.Second
	// maxSkew is how far wall and monotonic clock may drift apart in one tick
	// before it counts as a jump: slewing moves 0.5 ms a second.
	maxSkew = 500 * time.Millisecond
	// roundTimeout bounds all calls to the issuer in one round.
	roundTimeout = 15 * time.Second

	retryBase = 200 * time.Millisecond
	retryMax  = 30 * time.Second
	retryMin  = 20 * time.Millisecond
)

// A Trust is what an issuer says is to be trusted.
type Trust struct {
	Bundle *x509bundle.Bundle
	// Tainted are roots of the bundle that are on their way out: an identity
	// under one of them is renewed at once, and serves until then.
	Tainted   []*x509.Certificate
	Federated map[spiffeid.TrustDomain]*x509bundle.Bundle
	JWTKeys   map[string]crypto.PublicKey
	// FederatedJWT are the keys of the other trust domains.
	FederatedJWT map[spiffeid.TrustDomain]map[string]crypto.PublicKey
}

// A Minter is the issuer as the Rotator sees it. The Rotator retries; calls
// come from one goroutine. A method must return when ctx ends.
type Minter interface {
	// Entries gives all entries that this agent may serve. An empty list
	// without error withdraws every identity.
	Entries(ctx context.Context) ([]mesh.Entry, error)
	// Trust gives the bundles in force; it is asked after Entries, which say
	// which other trust domains matter.
	Trust(ctx context.Context) (Trust, error)
	// MintX509 has the key, whose possession it proves, certified for the
	// entry. The identity follows from the entry.
	MintX509(ctx context.Context, e mesh.Entry, key crypto.Signer) ([]*x509.Certificate, error)
}

// RotatorConfig says what a Rotator keeps fresh.
type RotatorConfig struct {
	// Source receives each new state. What it holds already, as loaded from
	// disk, is kept until replaced or expired. Required.
	Source *Source
	// Minter is the issuer. Required.
	Minter Minter
	// Match chooses the entries that hold for the workload, in the order in
	// which identities are listed: the first is shown to peers. Required, so
	// that no entry is served by omission.
	Match func([]mesh.Entry) []mesh.Entry
	// Save stores a state after it became current, such as State.Save. An
	// error is logged. Optional.
	Save func(*State) error
	// Poll is how often entries and bundles are fetched when nothing else asks
	// for it. Default 30 s, varied by 20 %.
	Poll time.Duration
	// Log receives each change. Required.
	Log *slog.Logger

	now func() time.Time // wall clock; tests set it
}

// Validate reports all mistakes at once.
func (c RotatorConfig) Validate() error {
	var errs []error
	if c.Source == nil {
		errs = append(errs, errors.New("source: missing"))
	}
	if c.Minter == nil {
		errs = append(errs, errors.New("minter: missing"))
	}
	if c.Match == nil {
		errs = append(errs, errors.New("match: missing"))
	}
	if c.Log == nil {
		errs = append(errs, errors.New("log: missing"))
	}
	if c.Poll < 0 {
		errs = append(errs, fmt.Errorf("poll: %s is negative", c.Poll))
	}
	return errors.Join(errs...)
}

// A Rotator keeps one identity for each matching entry, with a new key at each
// renewal. It renews at 40 to 60 % of the life that was left when a
// certificate arrived, retries with full jitter, and never gives up an SVID
// before it expires, unless its entry is gone.
type Rotator struct {
	cfg     RotatorConfig
	trigger chan struct{}
	sync    chan struct{}

	// The rest belongs to Run.
	held     map[string]*lease
	trust    Trust
	entries  []mesh.Entry // matched, of the last good fetch
	dirty    bool         // something is held that was not yet published
	nextSync time.Time
	failures int
	clock    skew
}

// A lease is an identity and when to renew it.
type lease struct {
	Identity
	entry mesh.Entry
	renew time.Time
}

// NewRotator checks the configuration.
func NewRotator(cfg RotatorConfig) (*Rotator, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("rotator: %w", err)
	}
	cfg.Poll = cmp.Or(cfg.Poll, 30*time.Second)
	if cfg.now == nil {
		cfg.now = time.Now
	}
	return &Rotator{cfg: cfg, trigger: make(chan struct{}, 1), sync: make(chan struct{}, 1), held: map[string]*lease{}}, nil
}

// Trigger renews everything now: new keys for all identities.
func (r *Rotator) Trigger() { poke(r.trigger) }

// Sync fetches entries and bundles now, and renews only what they change.
func (r *Rotator) Sync() { poke(r.sync) }

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // one is pending already
	}
}

// Run rotates until ctx ends, and then returns nil.
func (r *Rotator) Run(ctx context.Context) error {
	r.adopt()
	r.clock = newSkew(r.cfg.now())
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-r.trigger:
			r.expireLeases()
		case <-r.sync:
			r.nextSync, r.failures = time.Time{}, 0
		}
		now := r.cfg.now()
		if d, jumped := r.clock.jumped(now); jumped {
			r.cfg.Log.Warn("wall clock jumped, renewing every SVID", "by", d)
			r.expireLeases()
		}
		if r.due(now) {
			r.round(ctx)
		}
		timer.Reset(r.sleep(r.cfg.now()))
	}
}

// adopt takes over what the Source holds, to be renewed in the first round.
func (r *Rotator) adopt() {
	st := r.cfg.Source.Current()
	if st == nil {
		return
	}
	r.trust = Trust{Bundle: st.Bundle, Federated: st.Federated, JWTKeys: st.JWTKeys, FederatedJWT: st.FederatedJWT}
	for _, id := range st.Identities {
		e := mesh.Entry{ID: id.EntryID, SPIFFEID: id.ID, Hint: id.Hint, FederatesWith: id.FederatesWith}
		r.held[id.EntryID] = &lease{Identity: id, entry: e}
		r.entries = append(r.entries, e)
	}
}

func (r *Rotator) expireLeases() {
	for _, l := range r.held {
		l.renew = time.Time{}
	}
	r.nextSync, r.failures = time.Time{}, 0
}

// due reports whether a round has work: a fetch, a renewal that is not held
// back after a failure, or an identity that has expired.
func (r *Rotator) due(now time.Time) bool {
	if !now.Before(r.nextSync) {
		return true
	}
	for _, l := range r.held {
		if !now.Before(l.Expires()) || r.failures == 0 && !now.Before(l.renew) {
			return true
		}
	}
	return false
}

func (r *Rotator) sleep(now time.Time) time.Duration {
	d := min(tick, r.nextSync.Sub(now))
	for _, l := range r.held {
		d = min(d, l.Expires().Sub(now))
		if r.failures == 0 {
			d = min(d, l.renew.Sub(now))
		}
	}
	return max(d, time.Millisecond)
}

// round fetches, renews what is due and publishes. On failure it plans the
// next try; what is held stays.
func (r *Rotator) round(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, r.patience(r.cfg.now()))
	defer cancel()
	err := errors.Join(r.fetch(ctx), r.renew(ctx))
	r.drop()
	if r.dirty {
		err = errors.Join(err, r.publish())
	}
	now := r.cfg.now()
	if err == nil {
		r.failures = 0
		r.nextSync = now.Add(vary(r.cfg.Poll))
		return
	}
	if ctx.Err() != nil && errors.Is(context.Cause(ctx), context.Canceled) {
		return // stopping
	}
	r.failures++
	wait := r.backoff(now)
	r.nextSync = now.Add(wait)
	r.cfg.Log.Warn("SVID renewal failed, keeping what is valid", "error", err, "failures", r.failures, "retry_in", wait)
}

// patience is how long one round may take: a third of what the first SVID to
// expire has left, so that an issuer that hangs is tried again in time.
func (r *Rotator) patience(now time.Time) time.Duration {
	d := roundTimeout
	for _, l := range r.held {
		d = min(d, max(l.Expires().Sub(now)/3, time.Second))
	}
	return d
}

// fetch asks for entries and bundles.
func (r *Rotator) fetch(ctx context.Context) error {
	entries, err := r.cfg.Minter.Entries(ctx)
	if err != nil {
		return fmt.Errorf("fetch entries: %w", err)
	}
	trust, err := r.cfg.Minter.Trust(ctx)
	if err != nil {
		return fmt.Errorf("fetch bundles: %w", err)
	}
	if trust.Bundle == nil || trust.Bundle.Empty() {
		return errors.New("fetch bundles: the bundle of the own trust domain is empty")
	}
	matched := r.cfg.Match(entries)
	order := slices.EqualFunc(r.entries, matched, func(a, b mesh.Entry) bool {
		return a.ID == b.ID && slices.Equal(a.FederatesWith, b.FederatesWith)
	})
	r.dirty = r.dirty || !order || !sameTrust(r.trust, trust)
	r.trust, r.entries = trust, matched
	return nil
}

func sameTrust(a, b Trust) bool {
	if a.Bundle == nil || !a.Bundle.Equal(b.Bundle) || len(a.Federated) != len(b.Federated) || !reflect.DeepEqual(a.JWTKeys, b.JWTKeys) || !reflect.DeepEqual(a.FederatedJWT, b.FederatedJWT) {
		return false
	}
	for td, x := range a.Federated {
		if y := b.Federated[td]; y == nil || !x.Equal(y) {
			return false
		}
	}
	return true
}

// Taints reports whether an identity stands under a tainted root.
func (t Trust) Taints(id Identity) bool {
	if len(t.Tainted) == 0 {
		return false
	}
	root := id.Root(t.Bundle)
	return root != nil && slices.ContainsFunc(t.Tainted, root.Equal)
}

// renew mints for each entry that has no identity, a changed one, one that the
// bundle no longer covers, one under a tainted root, one that was revoked, or
// one that is due.
func (r *Rotator) renew(ctx context.Context) error {
	if r.trust.Bundle == nil {
		return nil
	}
	var errs []error
	for _, e := range r.entries {
		l, now := r.held[e.ID], r.cfg.now()
		if l != nil && now.Before(l.renew) && sameEntry(l.entry, e) && r.covers(l.Identity, now) && !r.trust.Taints(l.Identity) {
			continue
		}
		id, err := r.mint(ctx, e)
		if err != nil {
			errs = append(errs, fmt.Errorf("renew SVID of %s: %w", e.SPIFFEID, err))
			continue
		}
		now = r.cfg.now()
		left := id.Expires().Sub(now)
		r.held[e.ID] = &lease{Identity: id, entry: e, renew: now.Add(vary(left / 2))}
		r.dirty = true
		r.cfg.Log.Info("SVID renewed", "id", id.ID, "expires", id.Expires())
	}
	return errors.Join(errs...)
}

func sameEntry(a, b mesh.Entry) bool {
	return a.SPIFFEID == b.SPIFFEID && a.Hint == b.Hint && a.X509TTL == b.X509TTL && reflect.DeepEqual(a.DNSNames, b.DNSNames)
}

func (r *Rotator) covers(id Identity, now time.Time) bool {
	st := State{Bundle: r.trust.Bundle}
	return st.checkIdentity(id, now) == nil && r.cfg.Source.checkRevoked(id.Chain[0]) == nil
}

func (r *Rotator) mint(ctx context.Context, e mesh.Entry) (Identity, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Identity{}, fmt.Errorf("make key: %w", err)
	}
	chain, err := r.cfg.Minter.MintX509(ctx, e, key)
	if err != nil {
		return Identity{}, err
	}
	id := Identity{ID: e.SPIFFEID, Chain: chain, Key: key, Hint: e.Hint, EntryID: e.ID}
	st := State{Bundle: r.trust.Bundle}
	if err := st.checkIdentity(id, r.cfg.now()); err != nil {
		return Identity{}, fmt.Errorf("issuer gave an unusable SVID: %w", err)
	}
	return id, nil
}

// drop lets go of identities whose entry is gone, that have expired or were
// revoked, or that the bundle no longer covers.
func (r *Rotator) drop() {
	wanted := map[string]bool{}
	for _, e := range r.entries {
		wanted[e.ID] = true
	}
	now := r.cfg.now()
	for key, l := range r.held {
		if wanted[key] && r.covers(l.Identity, now) {
			continue
		}
		delete(r.held, key)
		r.dirty = true
		r.cfg.Log.Warn("SVID dropped", "id", l.ID, "expires", l.Expires(), "entry_withdrawn", !wanted[key])
	}
}

// publish makes what is held the current state.
func (r *Rotator) publish() error {
	if r.trust.Bundle == nil {
		return nil
	}
	st := &State{Bundle: r.trust.Bundle, Federated: r.trust.Federated, JWTKeys: r.trust.JWTKeys, FederatedJWT: r.trust.FederatedJWT}
	for _, e := range r.entries {
		if l := r.held[e.ID]; l != nil {
			id := l.Identity
			id.FederatesWith = e.FederatesWith // may change without a new SVID
			st.Identities = append(st.Identities, id)
		}
	}
	if err := r.cfg.Source.Set(st); err != nil {
		return err
	}
	r.dirty = false
	if r.cfg.Save != nil {
		if err := r.cfg.Save(st); err != nil {
			r.cfg.Log.Error("cannot keep the SVID on disk", "error", err)
		}
	}
	return nil
}

// backoff draws from zero to a doubling bound, which also stays below a
// quarter of the time that the first SVID to expire has left.
func (r *Rotator) backoff(now time.Time) time.Duration {
	bound := min(retryMax, retryBase<<min(r.failures, 10))
	for _, l := range r.held {
		bound = min(bound, l.Expires().Sub(now)/4)
	}
	return max(retryMin, mrand.N(max(bound, retryMin)))
}

// vary spreads d by 20 % of itself either way around: half a life becomes 40
// to 60 % of it.
func vary(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return d*4/5 + mrand.N(d*2/5+1)
}

// A skew compares the wall clock with the monotonic one, which does not run
// while the machine sleeps and is never set.
type skew struct{ wall, mono time.Time }

func newSkew(wall time.Time) skew { return skew{wall.Round(0), time.Now()} }

// jumped reports by how much the wall clock moved beside the monotonic one
// since the last call.
func (s *skew) jumped(wall time.Time) (time.Duration, bool) {
	next := newSkew(wall)
	d := next.wall.Sub(s.wall) - next.mono.Sub(s.mono)
	*s = next
	return d, d.Abs() > maxSkew
}
