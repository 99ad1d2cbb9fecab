package shadow

import (
	"context"
	"sync"
	"time"

	"sallyport/internal/mesh"
)

// A lane is the way of the copies of one shadow: one that hangs holds up
// nothing but its own.
type lane struct {
	m   *Mirror
	ctx context.Context

	mu      sync.Mutex // guards the fields below
	waiting []*job
	running int
	closed  bool
	idle    *sync.Cond
	// restUntil is when a shadow that could not be reached is tried again.
	restUntil time.Time
}

// restFor is how long one that could not be reached is left alone: each attempt
// costs the machine more than a call does.
const restFor = time.Second

// rests has the copies of the next second dropped.
func (l *lane) rests() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.restUntil = time.Now().Add(restFor)
}

// A laneKey is whose calls a lane carries.
type laneKey struct{ dst, route, shadow string }

// full drops the copy that would be made for a shadow whose lane takes none now.
func (m *Mirror) full(s *mesh.Shadow, call *Call) bool {
	m.mu.Lock()
	l := m.lanes[laneKey{call.Dst, call.Route, s.Name}]
	m.mu.Unlock()
	if l == nil {
		return false // there will be one
	}
	refused := l.refuses()
	if refused != "" {
		m.count(s, refused)
	}
	return refused != ""
}

// offer puts a copy into the lane of its shadow, or drops it.
func (m *Mirror) offer(j *job) {
	m.mu.Lock()
	key := laneKey{j.call.Dst, j.call.Route, j.shadow.Name}
	l := m.lanes[key]
	if l == nil && m.ctx != nil {
		l = &lane{m: m, ctx: m.ctx}
		l.idle = sync.NewCond(&l.mu)
		m.lanes[key] = l
	}
	m.mu.Unlock()
	outcome := outcomeStopped
	if l != nil {
		outcome = l.take(j)
	}
	if outcome != "" {
		m.count(j.shadow, outcome)
		j.held.done()
	}
}

// take queues a job or has it run; otherwise it says why not.
func (l *lane) take(j *job) (refused string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if refused = l.closedTo(); refused != "" {
		return refused
	}
	if l.running < l.m.cfg.Concurrency {
		l.running++
		go l.work(j)
	} else {
		l.waiting = append(l.waiting, j)
	}
	return ""
}

// refuses says why a copy would not be taken now; empty when it would.
func (l *lane) refuses() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closedTo()
}

// closedTo is refuses of who holds the lock.
func (l *lane) closedTo() string {
	switch {
	case l.closed:
		return outcomeStopped
	case !l.restUntil.IsZero() && time.Now().Before(l.restUntil):
		return outcomeUnreachable
	case l.running >= l.m.cfg.Concurrency && len(l.waiting) >= l.m.cfg.Queue:
		return outcomeQueueFull
	}
	return ""
}

// work does j and then whatever waits.
func (l *lane) work(j *job) {
	for j != nil {
		l.do(j)
		j = l.next()
	}
}

// do runs a job. What panics is a mistake of ours and costs one copy.
func (l *lane) do(j *job) {
	defer j.held.done()
	defer func() {
		if p := recover(); p != nil {
			l.m.count(j.shadow, outcomeFailed)
			l.m.cfg.Log.Error("copying a call failed", "shadow", j.shadow.Name, "panic", p)
		}
	}()
	j.run(l)
}

func (l *lane) next() (j *job) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.waiting) == 0 {
		l.running--
		l.idle.Broadcast()
		return nil
	}
	j = l.waiting[0]
	l.waiting[0] = nil
	l.waiting = l.waiting[1:]
	return j
}

// close drops what waits and returns once nothing runs; the context of the lane
// has ended.
func (l *lane) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for _, j := range l.waiting {
		l.m.count(j.shadow, outcomeStopped)
		j.held.done()
	}
	l.waiting = nil
	for l.running > 0 {
		l.idle.Wait()
	}
}

// shared counts the jobs that still need a copy.
type shared struct {
	mu   sync.Mutex // guards left
	left int
	copy *Copy
}

func (s *shared) done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.left--; s.left == 0 {
		s.copy.release()
	}
}
