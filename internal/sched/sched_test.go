package sched

import (
	"testing"
	"time"
)

func TestLook(t *testing.T) {
	var l load
	now := time.Now()
	l.at = now
	for i, step := range []struct {
		computed   time.Duration // in a tick, on two processors
		processors int
		busy       bool
	}{
		{0, 2, false},
		{67 * time.Millisecond, 2, false}, // 0.1675: not yet
		{68 * time.Millisecond, 2, true},  // 0.17
		{50 * time.Millisecond, 2, true},  // still
		{47 * time.Millisecond, 2, false}, // 0.1175
		{67 * time.Millisecond, 2, false},
		{400 * time.Millisecond, 2, true},
		{400 * time.Millisecond, 64, false}, // two of 64 processors
	} {
		now = now.Add(every)
		l.look(now, l.spent+step.computed, step.processors)
		if l.busy != step.busy {
			t.Errorf("step %d: busy %v, want %v", i, l.busy, step.busy)
		}
	}
}
