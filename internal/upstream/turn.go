package upstream

import (
	"container/list"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"
)

// A waiter waits for its turn while as many dials as may be are under way.
type waiter struct {
	fresh bool // it takes no connection that has served a call
	// turn gives a connection, or nil for the right to dial. It holds one, so
	// that whoever gives it never waits.
	turn  chan *Conn
	place *list.Element // nil once the turn was given
}

// enter lends an idle connection, or gives the right to dial, or else a place
// in the queue. Some dial is under way whenever somebody waits, and its end
// wakes the first: nobody waits for those behind.
func (p *Pool) enter(fresh bool) (*Conn, *waiter) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !fresh {
		if c := p.pop(); c != nil {
			return c, nil
		}
	}
	if c := p.stream(); c != nil {
		return c, nil
	}
	if p.dialling < p.maxDials() {
		p.dialling++
		return nil, nil
	}
	w := &waiter{fresh: fresh, turn: make(chan *Conn, 1)}
	w.place = p.queue.PushBack(w)
	return nil, w
}

// wait waits until it is w's turn. It gives up when ctx ends, and when the
// endpoint has given nobody a connection for as long as a dial may take: where
// nothing comes, the time is better spent on another endpoint.
func (p *Pool) wait(ctx context.Context, w *waiter) (*Conn, error) {
	since := time.Now()
	t := time.NewTimer(p.cfg.ConnectTimeout)
	defer t.Stop()
	for {
		select {
		case c := <-w.turn:
			return c, nil
		case <-ctx.Done():
			p.resign(w)
			return nil, ctx.Err()
		case <-t.C:
			if left := p.cfg.ConnectTimeout - time.Since(p.lastTurn(since)); left > 0 {
				t.Reset(left)
				continue
			}
			p.resign(w)
			return nil, fmt.Errorf("%s: no connection within %s, while others are being made: %w", p.t.addr, p.cfg.ConnectTimeout, context.DeadlineExceeded)
		}
	}
}

// Waiting is how many calls wait for a connection that is being made, or for the
// right to make one.
func (s *Services) Waiting() (n int) {
	s.mu.Lock()
	pools := slices.Collect(maps.Values(s.pools))
	s.mu.Unlock()
	for _, p := range pools {
		p.mu.Lock()
		n += p.queue.Len()
		p.mu.Unlock()
	}
	return n
}

// lastTurn is when somebody last got a connection, or since if that is later.
func (p *Pool) lastTurn(since time.Time) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.moved.After(since) {
		return p.moved
	}
	return since
}

// resign takes w out of the queue. The turn that came in the same moment goes
// to the next.
func (p *Pool) resign(w *waiter) {
	p.mu.Lock()
	waits := w.place != nil
	if waits {
		p.queue.Remove(w.place)
		w.place = nil
	}
	p.mu.Unlock()
	if waits {
		return
	}
	if c := <-w.turn; c != nil {
		c.Put()
	} else {
		p.dialled(false)
	}
}

// dialled gives the right to dial to the first who waits. moved says that the
// dial made a connection.
func (p *Pool) dialled(moved bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if moved {
		p.moved = time.Now()
	}
	for first := p.queue.Front(); first != nil; first = p.queue.Front() {
		c := p.stream()
		if c == nil {
			break
		}
		p.give(first, c)
	}
	p.dialling--
	for p.queue.Front() != nil && p.dialling < p.maxDials() {
		p.dialling++
		p.give(p.queue.Front(), nil)
	}
}

// handOn gives a connection that has come back to the first who waits for any.
// The caller holds the lock.
func (p *Pool) handOn(c *Conn) bool {
	for e := p.queue.Front(); e != nil; e = e.Next() {
		if !e.Value.(*waiter).fresh {
			p.moved = c.idle
			p.give(e, c)
			return true
		}
	}
	return false
}

func (p *Pool) give(e *list.Element, c *Conn) {
	w := e.Value.(*waiter)
	p.queue.Remove(e)
	w.place = nil
	w.turn <- c
}
