package daemon

import (
	"context"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

// keep is what the test holds.
var keep [][]byte

func TestSettleGivesABurstBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- Settle(ctx) }()
		for range 64 {
			keep = append(keep, make([]byte, 1<<20))
		}
		h := newHeap()
		h.look()
		during := h.held()
		keep = nil
		after := during
		for range 50 { // other tests may be at work beside the first
			time.Sleep(settleEvery) // of the bubble
			h.look()
			if after = h.held(); after+32<<20 <= during {
				break
			}
		}
		if after+32<<20 > during {
			t.Errorf("%d bytes are held, %d were", after, during)
		}
		runtime.KeepAlive(keep)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestSettleLeavesABusyProcessAlone(t *testing.T) {
	h := newHeap()
	h.look()
	for range 8 {
		keep = append(keep, make([]byte, 1<<20))
	}
	keep = nil
	if h.look(); h.settled() {
		t.Errorf("settled with %d bytes allocated since the last look", h.fresh)
	}
	h.least = h.held()
	if h.look(); h.settled() {
		t.Errorf("settled with %d bytes held, as after the last time", h.held())
	}
	h.least, h.fresh, h.worked = 0, 0, idly
	for n := range patience {
		if h.settled() {
			t.Fatalf("settled at look %d while calls take much of a processor, though they allocate nothing", n)
		}
	}
	if !h.settled() {
		t.Error("waits for ever")
	}
	if h.waited, h.worked = 0, idly/2; !h.settled() {
		t.Errorf("not settled with %d bytes held and nothing to do", h.held())
	}
}
