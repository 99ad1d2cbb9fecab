// Package sched tells the kernel's scheduler how a process of ours works.
//
// Most of what a proxy does is to wake somebody: the other proxy, the application,
// the client. Usually the kernel puts who was just woken in the place of who runs, at
// once where that one has had its share. A proxy that has much to do then goes to
// sleep after each call and is woken for the next one, and its peers no less. Threads
// of SCHED_BATCH (sched(7)) do not push anybody aside: they run when who is there
// waits or has used its time up, and find several calls then. But beside programs
// that compute without end they would wait for milliseconds for each call, so that
// it is for a process that has much to do itself.
package sched

import (
	"context"
	"runtime"
	"time"
)

const (
	// every is how often a process looks at what it has computed.
	every = 200 * time.Millisecond
	// much is which part of the time of its processors a process computes that has
	// much to do; little is what ends that. A pair of proxies that have a machine
	// full of calls computes a quarter of it each.
	much, little = 0.17, 0.12
)

// Fit has the kernel take the threads of this process for batch work while it has
// much to do, by what spent says that it has computed since its start. It returns when
// ctx ends, or at once where there is nothing to be told: on other systems than Linux,
// and where somebody has chosen another policy than the usual one. What the kernel does
// not allow is left as it is.
func Fit(ctx context.Context, spent func() time.Duration) error {
	if !willing() {
		return nil
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	told := false // that it is busy
	for l := (load{at: time.Now(), spent: spent()}); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		l.look(time.Now(), spent(), runtime.GOMAXPROCS(0))
		if l.busy || told { // it may have been told in part, and have threads that are new
			told = tell(l.busy) != nil || l.busy
		}
	}
}

// A load is what a process has computed.
type load struct {
	at    time.Time
	spent time.Duration
	busy  bool
}

// look takes note of what was spent until now on so many processors.
func (l *load) look(now time.Time, spent time.Duration, processors int) {
	part := float64(spent-l.spent) / (float64(now.Sub(l.at)) * float64(processors))
	l.at, l.spent = now, spent
	switch {
	case part >= much:
		l.busy = true
	case part < little:
		l.busy = false
	}
}
