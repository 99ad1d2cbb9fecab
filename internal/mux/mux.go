// Package mux is what the protocols have in common that carry many calls over
// one connection, and the listeners that many peers share: bounds on what a peer
// may do and hold, deadlines of a stream, and the buffers of what has come and of
// what is to go. It knows no protocol and starts no goroutine.
package mux

import (
	"sync"
	"sync/atomic"
	"time"
)

// A Bucket bounds a rate. It is for one goroutine, or under a lock.
type Bucket struct {
	tokens, burst int
	rate          float64
	last          time.Time
}

// NewBucket lets so many pass at once, and so many in a second.
func NewBucket(burst int, perSecond float64) Bucket {
	return Bucket{tokens: burst, burst: burst, rate: perSecond, last: time.Now()}
}

// Spend takes one; false when there is none.
func (b *Bucket) Spend() bool {
	if b.tokens == 0 {
		now := time.Now()
		n := int(now.Sub(b.last).Seconds() * b.rate)
		if n <= 0 {
			return false
		}
		b.tokens, b.last = min(n, b.burst), now
	}
	b.tokens--
	return true
}

// Earn gives something back for what was of use.
func (b *Bucket) Earn(n int) { b.tokens = min(b.tokens+n, b.burst) }

// A Budget bounds the growth of the windows of many connections. The nil
// *Budget bounds nothing.
type Budget struct {
	max  int64
	used atomic.Int64
	of   *Budget // what it is a part of
	own  int64   // of max, what is not taken from there
}

// NewBudget returns a budget of so many bytes.
func NewBudget(bytes int64) *Budget { return &Budget{max: bytes} }

// Part returns a budget of so many bytes, which are taken from b as well, but for the
// first own of them: those are there whatever others have taken.
func (b *Budget) Part(bytes, own int64) *Budget { return &Budget{max: bytes, of: b, own: own} }

// Take takes n bytes; false when they are not left.
func (b *Budget) Take(n int) bool {
	if b == nil || n == 0 {
		return true
	}
	used := b.used.Add(int64(n))
	more := b.shared(used-int64(n), used)
	if used > b.max || !b.of.Take(more) {
		used = b.used.Add(-int64(n))
		b.of.Give(b.shared(used, used+int64(n)) - more) // others may have taken and given meanwhile
		return false
	}
	return true
}

// shared is what is taken from what b is a part of when its use goes from one to
// another.
func (b *Budget) shared(from, to int64) int {
	return int(max(to-b.own, 0) - max(from-b.own, 0))
}

// Spent says if n bytes are not left in b itself, whatever it is a part of.
func (b *Budget) Spent(n int) bool { return b != nil && b.used.Load()+int64(n) > b.max }

// Give gives n bytes back.
func (b *Budget) Give(n int) {
	if b != nil && n != 0 {
		used := b.used.Add(-int64(n))
		b.of.Give(b.shared(used, used+int64(n)))
	}
}

// Used is how many bytes are taken.
func (b *Budget) Used() int64 { return b.used.Load() }

// A Deadline wakes who waits for a condition. It is guarded by the lock of that.
type Deadline struct {
	// Passed says that the time is over.
	Passed bool
	// OnPass, when set, is called when it is, with the lock held.
	OnPass func()

	at    time.Time
	timer *time.Timer
}

// Set sets the time, the zero one for none, and takes the lock of cond for it.
func (d *Deadline) Set(cond *sync.Cond, t time.Time) {
	cond.L.Lock()
	defer cond.L.Unlock()
	d.at, d.Passed = t, !t.IsZero() && !time.Now().Before(t)
	switch {
	case d.Passed:
		d.pass(cond)
	case t.IsZero():
		d.Stop()
	case d.timer != nil:
		d.timer.Reset(time.Until(t))
	default:
		d.timer = time.AfterFunc(time.Until(t), func() {
			cond.L.Lock()
			defer cond.L.Unlock()
			if !d.at.IsZero() && !time.Now().Before(d.at) {
				d.Passed = true
				d.pass(cond)
			}
		})
	}
}

func (d *Deadline) pass(cond *sync.Cond) {
	cond.Broadcast()
	if d.OnPass != nil {
		d.OnPass()
	}
}

// Stop ends the timer. The lock is held.
func (d *Deadline) Stop() {
	if d.timer != nil {
		d.timer.Stop()
	}
}
