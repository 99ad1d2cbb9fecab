package upstream

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/mesh"
)

// An Outcome is what became of a call, as far as its upstream is to blame.
type Outcome uint8

// The outcomes. Ignored is a call that says nothing of its upstream: the caller
// broke it off, or we refused it ourselves.
const (
	Ignored Outcome = iota
	// OK: the upstream did its work, whatever the answer says of the request.
	OK
	// Failed: it could not be connected to, broke off, took too long, or
	// answered with a status from 500 on.
	Failed
	// Limited: it asked for fewer calls (429, RESOURCE_EXHAUSTED).
	Limited
)

// OutcomeOf is what a status of HTTP says of who answered.
func OutcomeOf(status int) Outcome {
	switch {
	case status == 429:
		return Limited
	case status >= 500:
		return Failed
	}
	return OK
}

const (
	// maxRetryAfter bounds what a service may ask for in Retry-After.
	maxRetryAfter = 300 * time.Second
	buckets       = 10 // of a window
	// maxProbe is how long a probe may take before another call is one: it may
	// be a stream that lasts.
	maxProbe = 5 * time.Second
)

// A breaker stops the calls to a service that keeps failing. It is closed (calls
// pass), open (calls fail at once) or half-open: one real call passes, and what
// becomes of it closes the breaker or opens it for twice as long.
//
// It holds no goroutine and reads no clock: times are given, in nanoseconds. A
// closed one takes no lock.
type breaker struct {
	cfg mesh.Breaker
	// row counts failures in a row. If a ratio is watched, window counts the calls
	// that did not go well, and well is of the others.
	row    atomic.Int32
	window counts
	well   tally
	open   atomic.Bool // or half-open

	mu sync.Mutex // guards the fields below
	// until is when an open breaker lets one call pass; probing says that it
	// has.
	until   int64
	probing bool
	since   int64 // when it opened first
	times   int   // that it opened in succession
	why     string
}

func newBreaker(cfg mesh.Breaker) *breaker {
	cfg.Consecutive = cmp.Or(cfg.Consecutive, 7)
	cfg.Minimum = cmp.Or(cfg.Minimum, 10)
	cfg.Window = cmp.Or(cfg.Window, 10*time.Second)
	cfg.Open = cmp.Or(cfg.Open, time.Second)
	cfg.MaxOpen = max(cmp.Or(cfg.MaxOpen, time.Minute), cfg.Open)
	width := int64(cfg.Window / buckets)
	return &breaker{cfg: cfg, window: counts{width: width}, well: tally{width: width}}
}

// enter says whether a call may pass, and whether it is the probe. Whoever
// passed tells done what became of the call.
func (b *breaker) enter(now int64) (probe, ok bool) {
	if !b.open.Load() {
		return false, true
	}
	return b.ask(now)
}

// ask is enter of one that is not closed.
func (b *breaker) ask(now int64) (probe, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case !b.open.Load():
		return false, true
	case now < b.until:
		return false, false
	}
	b.probing, b.until = true, now+int64(maxProbe)
	return true, true
}

// done counts a call that passed. took is how long it was until the answer
// began, retryAfter what the upstream asked for, or 0.
func (b *breaker) done(now int64, o Outcome, took, retryAfter time.Duration, probe bool) {
	slow := b.slow(took) && o != Ignored
	if probe {
		b.judge(now, o, slow, retryAfter)
		return
	}
	switch o {
	case Ignored:
		return
	case OK:
		b.pass()
	case Failed:
		if n := b.row.Add(1); int(n) >= b.cfg.Consecutive {
			b.trip(now, fmt.Sprintf("%d consecutive failures", n), retryAfter)
			return
		}
	}
	if b.cfg.Success == 0 && b.cfg.SlowShare == 0 {
		return
	}
	b.window.add(now, o != OK, slow)
	if o == OK && !slow {
		return
	}
	n, bad, late := b.window.sum(now)
	n += b.well.grown(now)
	switch {
	case n < int64(b.cfg.Minimum):
	case b.cfg.Success > 0 && (n-bad)*mesh.Whole < n*int64(b.cfg.Success):
		b.trip(now, fmt.Sprintf("%d of %d calls failed", bad, n), retryAfter)
	case b.cfg.SlowShare > 0 && late*mesh.Whole > n*int64(b.cfg.SlowShare):
		b.trip(now, fmt.Sprintf("%d of %d calls took longer than %s", late, n, b.cfg.Slow), retryAfter)
	}
}

func (b *breaker) slow(took time.Duration) bool { return b.cfg.Slow > 0 && took > b.cfg.Slow }

// pass ends the row of failures, since a call went well.
func (b *breaker) pass() {
	if b.row.Load() != 0 {
		b.row.Store(0)
	}
}

// trip opens a closed breaker. A call that began before another opened it
// changes nothing.
func (b *breaker) trip(now int64, why string, retryAfter time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open.Load() {
		return
	}
	b.why, b.since = why, now
	b.again(now, retryAfter)
	b.open.Store(true)
}

// again has an open breaker wait. The caller holds the lock.
func (b *breaker) again(now int64, retryAfter time.Duration) {
	wait := b.cfg.MaxOpen
	if b.times < 32 && b.cfg.Open<<b.times>>b.times == b.cfg.Open {
		wait = min(b.cfg.Open<<b.times, b.cfg.MaxOpen)
	}
	b.times++
	// Those who saw the same failure must not all come back at once.
	wait = wait/2 + rand.N(wait/2+1)
	b.until = now + int64(max(wait, min(retryAfter, maxRetryAfter)))
	b.probing = false
}

// judge says what the probe has shown.
func (b *breaker) judge(now int64, o Outcome, slow bool, retryAfter time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case o == Ignored:
		b.probing, b.until = false, now // the next call is the probe
	case o == OK && !slow:
		b.row.Store(0)
		b.window.reset()
		b.well.reset()
		b.times, b.probing, b.why = 0, false, ""
		b.open.Store(false)
	default:
		b.again(now, retryAfter)
	}
}

// state says whether the breaker is open, since when and why.
func (b *breaker) state() (open bool, since int64, why string) {
	if !b.open.Load() {
		return false, 0, ""
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.open.Load(), b.since, b.why
}

// A counts is calls of a window, in buckets of one width. Two calls that meet
// at the turn of a bucket may lose a count between them; nothing that is
// decided by it needs it exact.
type counts struct {
	width int64 // of a bucket
	// last is the bucket that was counted in last, by which most calls need no
	// division.
	last  atomic.Int64
	slots [buckets]slot
}

type slot struct {
	turn        atomic.Int64 // which bucket of all time it is
	all, bad, x atomic.Int32
}

// slot is the bucket of now.
func (c *counts) slot(now int64) *slot {
	turn := c.last.Load()
	if uint64(now-turn*c.width) >= uint64(c.width) {
		turn = now / c.width
		c.last.Store(turn)
	}
	s := &c.slots[uint64(turn)%buckets]
	// What is told late, of a bucket that has left the window, counts in its place.
	if was := s.turn.Load(); was < turn && s.turn.CompareAndSwap(was, turn) {
		s.clear()
	}
	return s
}

func (s *slot) clear() {
	s.all.Store(0)
	s.bad.Store(0)
	s.x.Store(0)
}

// add counts a call. What x means is the owner's.
func (c *counts) add(now int64, bad, x bool) {
	s := c.slot(now)
	s.all.Add(1)
	if bad {
		s.bad.Add(1)
	}
	if x {
		s.x.Add(1)
	}
}

// sum is what was counted in the window that ends now.
func (c *counts) sum(now int64) (all, bad, x int64) {
	turn := now / c.width
	for i := range c.slots {
		s := &c.slots[i]
		if t := s.turn.Load(); t <= turn && t > turn-buckets {
			all += int64(s.all.Load())
			bad += int64(s.bad.Load())
			x += int64(s.x.Load())
		}
	}
	return all, bad, x
}

func (c *counts) reset() {
	for i := range c.slots {
		c.slots[i].clear()
	}
}
