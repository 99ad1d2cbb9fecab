package rollout

import (
	"time"

	"sallyport/internal/mesh"
)

// slots is how many parts a window has: a verdict is by the whole parts of the
// last window, and the one that goes on.
const slots = 12

// A key is a route of a service.
type key struct {
	service mesh.ServiceName
	route   string
}

// A tally counts the calls of a route by stretches of time. Its size is bounded,
// whatever is counted.
type tally struct {
	width time.Duration
	parts []slot // by time, slots+1 at most
}

// A slot is one stretch of time, which begins At times the width since 1970:
// issuers whose clocks agree mean the same by it.
type slot struct {
	At     int64      `json:"at"`
	Canary mesh.Calls `json:"canary"`
	Others mesh.Calls `json:"others"`
}

func newTally(window time.Duration) *tally { return &tally{width: max(window/slots, time.Millisecond)} }

// add counts calls that were reported now.
func (t *tally) add(now time.Time, canary bool, c mesh.Calls) {
	at := now.UnixNano() / int64(t.width)
	t.forget(at)
	n := len(t.parts)
	if n == 0 || t.parts[n-1].At < at {
		t.parts = append(t.parts, slot{At: at})
		n++
	}
	s := &t.parts[n-1] // also when the clock went back
	if canary {
		s.Canary.Add(c)
	} else {
		s.Others.Add(c)
	}
}

// forget drops what is out of the window.
func (t *tally) forget(at int64) {
	i := 0
	for i < len(t.parts) && t.parts[i].At < at-slots {
		i++
	}
	t.parts = append(t.parts[:0], t.parts[i:]...)
}

// since sums up what was counted within the window, from a moment on. A part
// that had begun by then is left out.
func since(parts []slot, width time.Duration, from, now time.Time) (w Calls) {
	last := now.UnixNano() / int64(width)
	first := max(last-slots+1, (from.UnixNano()+int64(width)-1)/int64(width))
	for _, s := range parts {
		if s.At >= first && s.At <= last {
			w.Canary.Add(s.Canary)
			w.Others.Add(s.Others)
		}
	}
	return w
}
