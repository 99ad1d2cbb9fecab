package http2

import (
	"sync/atomic"
	"time"
)

// noiseBurst and noiseRate bound what costs us more than it costs the peer:
// calls broken off, pings, settings, frames without content.
const (
	noiseBurst = 1000
	noiseRate  = 1000 // per second
)

// A bucket bounds a rate.
type bucket struct {
	tokens int
	last   time.Time
}

func (b *bucket) spend() bool {
	if b.tokens == 0 {
		now := time.Now()
		n := int(now.Sub(b.last).Seconds() * noiseRate)
		if n <= 0 {
			return false
		}
		b.tokens, b.last = min(n, noiseBurst), now
	}
	b.tokens--
	return true
}

// earn gives something back for what was of use.
func (b *bucket) earn(n int) { b.tokens = min(b.tokens+n, noiseBurst) }

// A Budget bounds by how much the windows of many connections grow. What lies
// within the first window of a call is free: nobody can take it from another.
type Budget struct {
	max  int64
	used atomic.Int64
}

// NewBudget returns a budget of so many bytes.
func NewBudget(bytes int64) *Budget { return &Budget{max: bytes} }

func (b *Budget) take(n int) bool {
	if b == nil {
		return true
	}
	if b.used.Add(int64(n)) > b.max {
		b.used.Add(-int64(n))
		return false
	}
	return true
}

func (b *Budget) give(n int) {
	if b != nil {
		b.used.Add(-int64(n))
	}
}
