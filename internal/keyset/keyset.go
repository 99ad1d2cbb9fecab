// Package keyset keeps the public keys of the issuers of tokens: fetched over
// https, read from a file, or written in the policy.
//
// Keys that were good stay good for a day while their issuer does not answer,
// over a restart too; what an issuer answers that is no key set never replaces
// them. One issuer does not hold up another. Keeper.Run refreshes; a token with
// an unknown key ID has its issuer asked at most every 30 s, by one request
// for all who wait.
package keyset

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

// ErrUnavailable is returned while no keys of the issuer are known or those
// that are known are too old, and for an unknown key ID while the issuer does
// not answer.
var ErrUnavailable = errors.New("keys of the issuer are not available")

var errUnknown = errors.New("issuer has no such key")

// Times of a set. A token waits for fetchTimeout at most.
const (
	fetchTimeout = 3 * time.Second
	// askEvery is how often an issuer is asked because of unknown key IDs or
	// while it fails. One of which no key is known is asked after firstAgain,
	// then after twice that, and so on.
	askEvery   = 30 * time.Second
	firstAgain = time.Second
	// staleAfter ends keys that could not be refreshed.
	staleAfter = 24 * time.Hour
	// defaultAge is the life of an answer that does not say; minAge and maxAge
	// bound what one says.
	defaultAge     = 10 * time.Minute
	minAge, maxAge = time.Minute, 24 * time.Hour
	// fileEvery is how often a file is looked at.
	fileEvery = 5 * time.Second
	// unknownFor is how long an unknown key ID is not asked for again.
	unknownFor = time.Minute
	maxUnknown = 1024
)

// Config is what a Keeper needs.
type Config struct {
	// Dir keeps fetched keys over a restart, mode 0700. Empty: nothing is kept.
	Dir string
	// Dial reaches the host of a key page. Default: the system's, which refuses
	// link-local, multicast and unspecified addresses.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Log receives failures, once per change. Required.
	Log *slog.Logger
	// Result counts fetches by issuer and result: "ok", "unchanged", "error".
	// Optional.
	Result func(issuer, result string)
}

// A Keeper keeps the keys of several issuers. It is safe for concurrent use.
type Keeper struct {
	cfg Config
	// sets is replaced as a whole by Use.
	sets atomic.Pointer[map[string]*set]
	// changed wakes Run after Use.
	changed chan struct{}
	mu      sync.Mutex // held by Use
}

// New returns a Keeper that knows no issuer. It opens and fetches nothing.
func New(cfg Config) (*Keeper, error) {
	if cfg.Log == nil {
		return nil, errors.New("keyset: log: missing")
	}
	if cfg.Dial == nil {
		cfg.Dial = screened().DialContext
	}
	if cfg.Result == nil {
		cfg.Result = func(string, string) {}
	}
	k := &Keeper{cfg: cfg, changed: make(chan struct{}, 1)}
	k.sets.Store(&map[string]*set{})
	return k, nil
}

// Use keeps the keys of these issuers from now on. An issuer whose source is
// as before keeps its keys. Keys in the policy that cannot be read are an
// error, and nothing has changed then; a page or file that cannot is tried
// again.
func (k *Keeper) Use(issuers []mesh.TokenIssuer) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	old, next := *k.sets.Load(), map[string]*set{}
	for i := range issuers {
		is := &issuers[i]
		if is.Profile == mesh.ProfileSVID {
			continue
		}
		if s := old[is.Issuer]; s != nil && s.source == is.Keys {
			next[is.Issuer] = s
			continue
		}
		s, err := k.open(is.Issuer, is.Keys)
		if err != nil {
			return fmt.Errorf("keys of issuer %s: %w", is.Issuer, err)
		}
		if was := old[is.Issuer]; was != nil {
			s.generation.Store(was.generation.Load() + 1)
		}
		next[is.Issuer] = s
	}
	k.sets.Store(&next)
	select {
	case k.changed <- struct{}{}:
	default:
	}
	return nil
}

// Find gives the key that the issuer's token names; known is false when the
// issuer has none such. The error is ErrUnavailable or says that ctx ended.
func (k *Keeper) Find(ctx context.Context, issuer string, t *jose.Token) (key jose.Key, known bool, err error) {
	s := (*k.sets.Load())[issuer]
	if s == nil {
		return jose.Key{}, false, ErrUnavailable
	}
	key, err = s.find(ctx, t)
	if errors.Is(err, errUnknown) {
		return jose.Key{}, false, nil
	}
	return key, err == nil, err
}

// Has reports whether Find would give this key for the token, by what is at
// hand.
func (k *Keeper) Has(issuer string, t *jose.Token, key crypto.PublicKey) bool {
	s := (*k.sets.Load())[issuer]
	if s == nil {
		return false
	}
	h := s.cur.Load()
	if !h.fresh(time.Now()) {
		return false
	}
	have, ok := h.keys.Find(t)
	return ok && jose.SameKey(have.Public, key)
}

// Generation changes whenever the keys of the issuer do, or become too old.
func (k *Keeper) Generation(issuer string) uint64 {
	if s := (*k.sets.Load())[issuer]; s != nil {
		return s.gen(time.Now())
	}
	return 0
}

// Run keeps the keys fresh until ctx ends.
func (k *Keeper) Run(ctx context.Context) error {
	running := map[*set]context.CancelFunc{}
	var all sync.WaitGroup
	defer all.Wait()
	defer func() {
		for _, stop := range running {
			stop()
		}
	}()
	for {
		wanted := map[*set]bool{}
		for s := range maps.Values(*k.sets.Load()) {
			wanted[s] = true
			if running[s] != nil || s.source.Inline != "" {
				continue
			}
			one, stop := context.WithCancel(ctx)
			running[s] = stop
			all.Go(func() { s.run(one) })
		}
		for s, stop := range running {
			if !wanted[s] {
				stop()
				delete(running, s)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-k.changed:
		}
	}
}

// A set is the keys of one issuer.
type set struct {
	cfg    *Config
	issuer string
	source mesh.KeySet
	page   *page // of a URL

	generation atomic.Uint64
	cur        atomic.Pointer[held]

	mu     sync.Mutex // guards what follows
	flight *flight    // the fetch that is under way
	asked  time.Time  // when the last fetch began
	failed int        // how often it failed in a row; the first time was logged
	// unknown are key IDs that the issuer did not have when it was asked.
	unknown map[string]time.Time
}

// A flight is one fetch for all who wait; err is its end once done is closed.
type flight struct {
	done chan struct{}
	err  error
}

// held is what an issuer said last.
type held struct {
	keys jose.Keys
	// etag is the page's name for this answer, doc the answer itself.
	etag string
	doc  []byte
	// got is when it was fetched or confirmed, next when to ask again.
	got, next time.Time
}

// fresh says whether the keys may still be used.
func (h *held) fresh(now time.Time) bool {
	return h != nil && (h.got.IsZero() || now.Sub(h.got) < staleAfter)
}

// open makes a set and gives it the keys that are at hand.
func (k *Keeper) open(issuer string, src mesh.KeySet) (*set, error) {
	s := &set{cfg: &k.cfg, issuer: issuer, source: src, unknown: map[string]time.Time{}}
	switch {
	case src.Inline != "":
		keys, err := parseKeys([]byte(src.Inline))
		if err != nil {
			return nil, err
		}
		s.cur.Store(&held{keys: keys})
	case src.URL != "":
		var err error
		if s.page, err = newPage(&k.cfg, src); err != nil {
			return nil, err
		}
		s.load()
	case src.File != "":
		_ = s.ask(context.Background(), time.Now()) // logged; tried again
	default:
		return nil, errors.New("no source")
	}
	return s, nil
}

func (s *set) gen(now time.Time) uint64 {
	if !s.cur.Load().fresh(now) {
		return 0
	}
	return s.generation.Load() + 1
}

func (s *set) find(ctx context.Context, t *jose.Token) (jose.Key, error) {
	now := time.Now()
	h := s.cur.Load()
	if h.fresh(now) {
		if key, ok := h.keys.Find(t); ok {
			return key, nil
		}
		if s.source.Inline != "" || s.isUnknown(t.KeyID, now) {
			return jose.Key{}, errUnknown
		}
	}
	err := s.ask(ctx, now)
	if ctx.Err() != nil {
		return jose.Key{}, ctx.Err()
	}
	if h = s.cur.Load(); !h.fresh(time.Now()) {
		return jose.Key{}, ErrUnavailable
	}
	if key, ok := h.keys.Find(t); ok {
		return key, nil
	}
	switch {
	case err == nil:
		s.rememberUnknown(t.KeyID, now)
	case s.failing():
		return jose.Key{}, ErrUnavailable // it may have published the key since
	}
	return jose.Key{}, errUnknown
}

// failing says that the issuer did not answer when it was asked last.
func (s *set) failing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed > 0
}

// isUnknown says that the issuer was asked for this key ID a moment ago.
func (s *set) isUnknown(kid string, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	until, ok := s.unknown[kid]
	return ok && now.Before(until)
}

func (s *set) rememberUnknown(kid string, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.unknown) >= maxUnknown {
		maps.DeleteFunc(s.unknown, func(_ string, until time.Time) bool { return !now.Before(until) })
	}
	for old := range s.unknown { // still full: any one goes
		if len(s.unknown) < maxUnknown {
			break
		}
		delete(s.unknown, old)
	}
	s.unknown[kid] = now.Add(unknownFor)
}

// errAskedLately says that the issuer was asked less than askEvery ago.
var errAskedLately = errors.New("asked a moment ago")

// ask has the source read once for all who wait, unless it was a moment ago.
func (s *set) ask(ctx context.Context, now time.Time) error {
	s.mu.Lock()
	if f := s.flight; f != nil {
		s.mu.Unlock()
		select {
		case <-f.done:
			return f.err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if since := now.Sub(s.asked); since >= 0 && since < s.every(now) {
		s.mu.Unlock()
		return errAskedLately
	}
	f := &flight{done: make(chan struct{})}
	s.asked, s.flight = now, f
	s.mu.Unlock()
	// Whoever asked first may go away; the others still wait for the answer.
	defer func() {
		s.mu.Lock()
		s.flight = nil
		s.mu.Unlock()
		close(f.done)
	}()
	f.err = s.read(context.WithoutCancel(ctx), now)
	return f.err
}

// read reads the source and takes what it says, if that is a key set.
func (s *set) read(ctx context.Context, now time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	next, err := s.fetch(ctx, now)
	result := "ok"
	switch {
	case err != nil:
		result = "error"
	case next.keys == nil: // confirmed
		result = "unchanged"
		h := *s.cur.Load()
		h.got, h.next = next.got, next.next
		next = &h
	}
	s.cfg.Result(s.issuer, result)
	s.mu.Lock()
	was := s.failed
	s.failed++
	if err == nil {
		s.failed = 0
	}
	s.mu.Unlock()
	if err != nil {
		if was == 0 {
			s.cfg.Log.Warn("keys of an issuer of tokens cannot be read; those that are known stay in use for a day", "issuer", s.issuer, "err", err)
		}
		return err
	}
	if was > 0 {
		s.cfg.Log.Info("keys of an issuer of tokens are read again", "issuer", s.issuer)
	}
	s.take(next)
	return nil
}

// take puts an answer in use and keeps it over a restart.
func (s *set) take(h *held) {
	old := s.cur.Load()
	s.cur.Store(h)
	if old == nil || string(old.doc) != string(h.doc) {
		s.generation.Add(1)
		s.mu.Lock()
		clear(s.unknown)
		s.mu.Unlock()
	}
	if s.page != nil {
		if err := s.save(h); err != nil {
			s.cfg.Log.Warn("keys of an issuer of tokens cannot be kept over a restart", "issuer", s.issuer, "err", err)
		}
	}
}

// fetch reads the source. Without keys the answer confirms those at hand.
func (s *set) fetch(ctx context.Context, now time.Time) (*held, error) {
	if s.page != nil {
		return s.page.fetch(ctx, s.cur.Load(), now)
	}
	return readFile(s.source.File, now)
}

// run refreshes the set until ctx ends.
func (s *set) run(ctx context.Context) {
	for ctx.Err() == nil {
		if wait := s.due(time.Now()); wait > 0 {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
			continue
		}
		_ = s.ask(ctx, time.Now()) // logged
	}
}

// due is how long to wait before the source is read again.
func (s *set) due(now time.Time) time.Duration {
	s.mu.Lock()
	wait, failed := s.every(now)-now.Sub(s.asked), s.failed > 0
	s.mu.Unlock()
	if h := s.cur.Load(); h != nil && !failed {
		wait = max(wait, h.next.Sub(now))
	}
	return wait
}

// every is how often the source is read at most. It is called with the lock
// held.
func (s *set) every(now time.Time) time.Duration {
	switch {
	case s.source.File != "":
		return fileEvery
	case s.failed > 0 && !s.cur.Load().fresh(now):
		return min(firstAgain<<min(s.failed-1, 8), askEvery)
	}
	return askEvery
}
