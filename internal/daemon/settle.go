package daemon

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"

	"sallyport/internal/capture"
	"sallyport/internal/telemetry"
)

const (
	// settleEvery is how often the heap is looked at.
	settleEvery = 4 * time.Second
	// quietly is how many bytes may have been allocated since the last look.
	quietly = 1 << 20
	// idly is how long may have been computed since then. Calls that allocate next
	// to nothing are no rest: what is done here takes both memory and processors
	// away from them for many milliseconds. So it waits for rest, through so many
	// looks.
	idly     = settleEvery / 20
	patience = 75
	// worthwhile is how much more than the last time must be held, and an eighth
	// of that: looking for what nobody needs costs as much as there is.
	worthwhile = 3 << 20
)

// Settle gives memory that a burst, the start for one, has left behind back to
// the kernel, once it is over; the runtime alone takes minutes, and keeps as much
// again as is in use. It returns when ctx ends.
func Settle(ctx context.Context) error {
	tick := time.NewTicker(settleEvery)
	defer tick.Stop()
	for h := newHeap(); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if h.look(); h.settled() {
			runtime.GC() // pools and stacks let go in two steps
			debug.FreeOSMemory()
			_ = capture.ForgetProgram() // where it cannot be done, more stays
			h.look()
			h.least, h.waited = h.held(), 0
		}
	}
}

// A heap is what the runtime says of it.
type heap struct {
	list []metrics.Sample
	// fresh is what was allocated between the last two looks; least what was
	// held after memory was last given back.
	fresh, allocated, least uint64
	// worked is what was computed between them.
	worked, computed time.Duration
	waited           int // looks at which that was too much
}

func newHeap() *heap {
	h := &heap{}
	for _, name := range []string{
		"/gc/heap/allocs:bytes",
		"/memory/classes/heap/objects:bytes", "/memory/classes/heap/unused:bytes", "/memory/classes/heap/free:bytes", "/memory/classes/heap/stacks:bytes",
	} {
		h.list = append(h.list, metrics.Sample{Name: name})
	}
	return h
}

func (h *heap) look() {
	metrics.Read(h.list)
	now := h.list[0].Value.Uint64()
	h.fresh, h.allocated = now-h.allocated, now
	spent := telemetry.CPUTime()
	h.worked, h.computed = spent-h.computed, spent
}

// held is what the process has for objects and stacks, in use or not.
func (h *heap) held() (n uint64) {
	for _, s := range h.list[1:] {
		n += s.Value.Uint64()
	}
	return n
}

// settled says that little happens and that it may be worth while to look for
// what can be given back.
func (h *heap) settled() bool {
	if h.fresh >= quietly || h.held() <= h.least+max(worthwhile, h.least/8) {
		h.waited = 0
		return false
	}
	h.waited++
	return h.worked < idly || h.waited > patience
}
