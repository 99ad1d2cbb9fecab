package main

import (
	"sync"
	"time"
)

// A recorder keeps what the programs of the demo said, by program and probe.
type recorder struct {
	mu     sync.Mutex // guards the fields below
	tally  map[string]*probeTally
	wake   chan struct{} // closed at every event
	failed []demoEvent   // the first few that went wrong
	hear   map[int]func(demoEvent)
	heard  int // how many have ever listened
}

// A probeTally counts one probe of one program.
type probeTally struct {
	OK, Failed int
	Last       demoEvent
}

const keepFailures = 20

func newRecorder() *recorder {
	return &recorder{tally: map[string]*probeTally{}, wake: make(chan struct{}), hear: map[int]func(demoEvent){}}
}

// begin forgets what was said while the mesh came up.
func (r *recorder) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.tally)
	r.failed = nil
}

// event is the sink of every process.
func (r *recorder) event(e demoEvent) {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := e.App + " " + e.Probe
	r.count(key, e)
	if e.By != "" {
		r.count(key+" by "+e.By, e)
	}
	if !e.OK && len(r.failed) < keepFailures {
		r.failed = append(r.failed, e)
	}
	for _, f := range r.hear {
		f(e)
	}
	close(r.wake)
	r.wake = make(chan struct{})
}

// count adds an event to a probe. The caller holds the lock.
func (r *recorder) count(key string, e demoEvent) {
	t := r.tally[key]
	if t == nil {
		t = &probeTally{}
		r.tally[key] = t
	}
	t.Last = e
	if e.OK {
		t.OK++
	} else {
		t.Failed++
	}
}

// listen has f told of every event until stop, under the lock.
func (r *recorder) listen(f func(demoEvent)) (stop func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.heard++
	n := r.heard
	r.hear[n] = f
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.hear, n)
	}
}

// get returns the count of a probe such as "web buy", or "web buy by v1".
func (r *recorder) get(key string) probeTally {
	r.mu.Lock()
	defer r.mu.Unlock()
	if t := r.tally[key]; t != nil {
		return *t
	}
	return probeTally{}
}

// failures returns the first events of a probe that went wrong.
func (r *recorder) failures(key string) (out []demoEvent) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.failed {
		if e.App+" "+e.Probe == key {
			out = append(out, e)
		}
	}
	return out
}

// await waits until the probe has gone well n more times than now, or until
// the time is over, and reports whether it did.
func (r *recorder) await(key string, n int, within time.Duration) bool {
	want := r.get(key).OK + n
	return r.awaitThat(within, func() bool { return r.get(key).OK >= want })
}

// awaitThat asks after every event whether something is so.
func (r *recorder) awaitThat(within time.Duration, so func() bool) bool {
	timer := time.NewTimer(within)
	defer timer.Stop()
	for {
		r.mu.Lock()
		wake := r.wake
		r.mu.Unlock()
		if so() {
			return true
		}
		select {
		case <-wake:
		case <-timer.C:
			return false
		}
	}
}
