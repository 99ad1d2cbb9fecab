package upstream

import (
	"cmp"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/mesh"
)

const (
	// mostCalls is where an adaptive bound ends when none is given.
	mostCalls = 1000
	// leastCalls is what it never falls below: with fewer under way a service
	// cannot show that it has become faster.
	leastCalls = 4
	// sampleEvery and sampleCalls are what one step of the bound is taken by.
	sampleEvery = 250 * time.Millisecond
	sampleCalls = 20
	// tolerance is how much longer than usual calls may take before the bound
	// falls.
	tolerance = 1.5
)

// A capacity bounds the calls to a service that are under way at once. An
// adaptive one finds the bound as Netflix's gradient2 does: it compares how long
// calls take now with how long they usually take, lowers the bound by as much as
// they take longer, and lets it grow by a little while they do not.
type capacity struct {
	adaptive bool
	most     float64
	bound    atomic.Int32 // 0: none
	calls    atomic.Int32 // under way

	mu sync.Mutex // guards the fields below; taken for adaptive ones only
	// exact is bound without the rounding, usual the long average in
	// nanoseconds.
	exact, usual float64
	sum          float64
	n, failed    int
	peak         int32
	since        int64
}

func newCapacity(cfg mesh.Capacity) *capacity {
	c := &capacity{adaptive: cfg.Adaptive}
	c.bound.Store(int32(min(cfg.Calls, math.MaxInt32)))
	if cfg.Adaptive {
		c.most = float64(max(cmp.Or(cfg.Calls, mostCalls), leastCalls))
		c.exact = min(c.most, 20)
		c.bound.Store(int32(c.exact))
	}
	return c
}

// enter takes a place, if there is one.
func (c *capacity) enter() bool {
	b := c.bound.Load()
	if b == 0 {
		return true
	}
	if c.calls.Add(1) > b {
		c.calls.Add(-1)
		return false
	}
	return true
}

func (c *capacity) leave() {
	if c.bound.Load() > 0 { // one that is bounded always is
		c.calls.Add(-1)
	}
}

// took counts how long a call took until its answer began, of an adaptive one.
func (c *capacity) took(now int64, d time.Duration, o Outcome) {
	if o == Ignored {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.peak = max(c.peak, c.calls.Load())
	if o != OK {
		c.failed++
	} else {
		c.sum += float64(d)
		c.n++
	}
	if c.since == 0 {
		c.since = now
	}
	if now-c.since < int64(sampleEvery) || c.n+c.failed < sampleCalls {
		return
	}
	c.step()
	c.sum, c.n, c.failed, c.peak, c.since = 0, 0, 0, 0, now
}

// step moves the bound by one sample. The caller holds the lock.
func (c *capacity) step() {
	if c.failed > c.n {
		c.exact = max(c.exact*0.9, leastCalls)
		c.bound.Store(int32(c.exact))
		return
	}
	now := c.sum / float64(c.n)
	if c.usual == 0 {
		c.usual = now
	}
	gradient := min(max(tolerance*c.usual/now, 0.5), 1)
	// What is usual follows slowly, and faster on the way down: a load that
	// lasts must not come to look usual before it ends.
	w := 0.02
	if now < c.usual {
		w = 0.2
	}
	c.usual += w * (now - c.usual)
	// A bound that nobody has met says nothing of how many there could be.
	if gradient == 1 && float64(c.peak) < c.exact/2 {
		return
	}
	next := c.exact*gradient + math.Sqrt(c.exact)
	if gradient < 1 {
		next = c.exact * gradient
	}
	c.exact = min(max(c.exact*0.8+next*0.2, leastCalls), c.most)
	c.bound.Store(int32(c.exact))
}
