package upstream

import (
	"math"
	"sync/atomic"
	"time"
)

const (
	// penalty is what a failure counts as, in place of the time it took: what
	// fails fast must not draw calls.
	penalty = 5 * time.Second
	// decay is the time in which a measure loses all but 1/e of its weight.
	decay = 10 * time.Second
)

// A load is what an endpoint costs a call: the peak-sensitive moving average of
// the times until its answers began, times the calls that are under way. A slow
// answer raises it at once, faster ones and time alone lower it.
type load struct {
	pending atomic.Int32
	// word has the average in microseconds (float32) above the time it was
	// taken, in ticks (uint32): one word, so that no lock is needed. Zero: no
	// measure.
	word atomic.Uint64
}

// tick is the shift from nanoseconds to the time of a load: about a millisecond,
// which wraps after 50 days.
const tick = 20

func pack(micros float32, at uint32) uint64 { return uint64(math.Float32bits(micros))<<32 | uint64(at) }

func unpack(w uint64) (micros float32, at uint32) {
	return math.Float32frombits(uint32(w >> 32)), uint32(w)
}

// kept is the part of a measure's weight that is left after some ticks.
func kept(ticks uint32) float32 {
	switch x := float32(uint64(ticks)<<tick) / float32(decay); {
	case int32(ticks) <= 0:
		return 1
	case x < 0.1: // the usual case, to three digits
		return 1 - x + x*x/2
	default:
		return float32(math.Exp(-float64(x)))
	}
}

// took counts an answer.
func (l *load) took(now int64, d time.Duration) {
	at := uint32(now >> tick)
	for {
		was, micros := l.word.Load(), max(float32(d)/1e3, 1)
		avg, then := unpack(was)
		if was != 0 && micros < avg {
			if at == then {
				return // one answer a tick lowers it: weight comes with time
			}
			w := kept(at - then)
			micros = avg*w + micros*(1-w)
		}
		if now := pack(micros, at); now == was || l.word.CompareAndSwap(was, now) {
			return
		}
	}
}

// cost is the average as it is now, in microseconds; 0 when there is none.
func (l *load) cost(now int64) float32 {
	w := l.word.Load()
	if w == 0 {
		return 0
	}
	avg, then := unpack(w)
	return avg * kept(uint32(now>>tick)-then)
}

// dearer says whether a costs more than b. One without a measure counts as the
// other does: it is tried, and no crowd falls upon it.
func dearer(a, b *load, wa, wb float32, now int64) bool {
	ca, cb := a.cost(now), b.cost(now)
	if ca == 0 || cb == 0 {
		ca, cb = 1, 1
	}
	return ca*float32(a.pending.Load()+1)*wb > cb*float32(b.pending.Load()+1)*wa
}
