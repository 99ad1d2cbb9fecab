package daemon

import (
	"context"
	"runtime"
	"testing"
)

func TestThreadsFollowTheWork(t *testing.T) {
	f := fit{threads: 8, most: 8}
	after := func(times int, busy float64) int {
		for range times {
			f.measured(busy)
		}
		return f.threads
	}
	for _, tt := range []struct {
		name  string
		times int
		busy  float64
		want  int
	}{
		{"one less after a while", spareFor, 0.01, 7},
		{"and not before", spareFor - 1, 0.01, 7},
		{"a burst starts the while anew", 1, 5, 7},
		{"so that it is still to come", spareFor - 1, 0.01, 7},
		{"down to one", 10 * spareFor, 0, 1},
		{"which half a core leaves alone", 10 * spareFor, 0.55, 1},
		{"twice as many at once when they are full", 1, 0.9, 2},
		{"and again", 1, 1.9, 4},
		{"up to what there is", 3, 8, 8},
		{"in between nothing changes", 100, 5.5, 8},
	} {
		if got := after(tt.times, tt.busy); got != tt.want {
			t.Errorf("%s: %d threads, want %d", tt.name, got, tt.want)
		}
	}
}

func TestThreadsAreAsBeforeInTheEnd(t *testing.T) {
	was := runtime.GOMAXPROCS(0)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := FitThreads(ctx); err != nil || runtime.GOMAXPROCS(0) != was {
		t.Errorf("%v, %d threads, want %d", err, runtime.GOMAXPROCS(0), was)
	}
}
