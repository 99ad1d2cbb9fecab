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
	// calls has how many went well so far above how many are under way: one word,
	// so that a call which ends well counts both at once.
	calls atomic.Uint64
	// word has the average in microseconds (float32) above the time it was
	// taken, in ticks (uint32): one word, so that no lock is needed. Zero: no
	// measure.
	word atomic.Uint64
}

func (l *load) begin() { l.calls.Add(1) }

// end counts the end of a call, and that it went well.
func (l *load) end(well bool) {
	if well {
		l.calls.Add(1<<32 - 1)
	} else {
		l.calls.Add(^uint64(0))
	}
}

// pending is how many calls are under way.
func (l *load) pending() int32 { return int32(uint32(l.calls.Load())) }

// passed is how many went well so far; it wraps.
func (l *load) passed() uint32 { return uint32(l.calls.Load() >> 32) }

// tick is the shift from nanoseconds to the time of a load: about a millisecond,
// which wraps after 50 days.
const tick = 20

func pack(micros float32, at uint32) uint64 { return uint64(math.Float32bits(micros))<<32 | uint64(at) }

func unpack(w uint64) (micros float32, at uint32) {
	return math.Float32frombits(uint32(w >> 32)), uint32(w)
}

// fading is what part of its weight a measure loses in a tick.
const fading = float32(1<<tick) / float32(decay)

// kept is the part of a measure's weight that is left after some ticks.
func kept(ticks uint32) float32 {
	switch x := float32(int32(ticks)) * fading; {
	case int32(ticks) <= 0:
		return 1
	case x < 0.1: // the usual case, to three digits
		return 1 - x + x*x/2
	default:
		return float32(math.Exp(-float64(x)))
	}
}

// took counts an answer. One that is no slower than those of the same tick says
// nothing new: one answer a tick lowers the measure, since weight comes with time.
func (l *load) took(now int64, d time.Duration) {
	at, micros := uint32(now>>tick), float32(d)*1e-3
	if micros < 1 {
		micros = 1
	}
	was := l.word.Load()
	if avg, then := unpack(was); was == 0 || at != then || micros > avg {
		l.measure(was, at, micros)
	}
}

func (l *load) measure(was uint64, at uint32, last float32) {
	for {
		micros := last
		if avg, then := unpack(was); was != 0 && micros < avg {
			if at == then {
				return
			}
			w := kept(at - then)
			micros = avg*w + micros*(1-w)
		}
		if l.word.CompareAndSwap(was, pack(micros, at)) {
			return
		}
		was = l.word.Load()
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

// alike is how many ticks two measures may lie apart to be compared as they are:
// both have then lost the same, but for a few thousandths.
const alike = 32

// dearer says whether a costs more than b. One without a measure counts as the
// other does: it is tried, and no crowd falls upon it.
func dearer(a, b *load, wa, wb float32, now int64) bool {
	x, y := a.word.Load(), b.word.Load()
	ca, ta := unpack(x)
	cb, tb := unpack(y)
	switch {
	case x == 0 || y == 0:
		ca, cb = 1, 1
	case ta-tb+alike > 2*alike:
		ca, cb = a.cost(now), b.cost(now)
	}
	return ca*float32(a.pending()+1)*wb > cb*float32(b.pending()+1)*wa
}
