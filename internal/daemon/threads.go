package daemon

import (
	"context"
	"os"
	"runtime"
	"syscall"
	"time"
)

const (
	// fitEvery is how often the work is measured.
	fitEvery = 200 * time.Millisecond
	// full is how much of their time the threads may be busy before there is one
	// more, spare how much of it one less may be.
	full, spare = 0.8, 0.65
	// spareFor is how many times in a row one less must do: 5 s.
	spareFor = 25
)

// FitThreads keeps as many threads running Go code as the process has work for,
// up to what the runtime gave it, until ctx ends. The runtime wakes idle threads
// to look for work whenever some comes, and has them look for a while: at a low
// load of many small calls that is a quarter of what they cost, and the
// application next door needs the cores as well. A GOMAXPROCS in the environment
// is left as it is.
func FitThreads(ctx context.Context) error {
	most := runtime.GOMAXPROCS(0)
	if os.Getenv("GOMAXPROCS") != "" || most == 1 {
		return nil
	}
	defer runtime.GOMAXPROCS(most)
	tick := time.NewTicker(fitEvery)
	defer tick.Stop()
	f := fit{threads: most, most: most}
	for last, used := time.Now(), cpuTime(); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now, u := time.Now(), cpuTime()
		if f.measured(float64(u-used) / float64(now.Sub(last))) {
			runtime.GOMAXPROCS(f.threads) // stops all for some 20 µs
		}
		last, used = now, u
	}
}

// A fit is how many threads there are to be.
type fit struct {
	threads, most int
	idle          int // how many times in a row one less would have done
}

// measured takes in how many cores were busy, and says whether that changes the
// number of threads.
func (f *fit) measured(busy float64) bool {
	was := f.threads
	switch {
	case busy > full*float64(f.threads):
		f.threads, f.idle = min(2*f.threads, f.most), 0
	case f.threads > 1 && busy < spare*float64(f.threads-1):
		if f.idle++; f.idle == spareFor {
			f.threads, f.idle = f.threads-1, 0
		}
	default:
		f.idle = 0
	}
	return f.threads != was
}

// cpuTime is what the process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
