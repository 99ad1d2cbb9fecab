package upstream

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"sallyport/internal/mesh"
)

// A lease is what a lent connection counts for, until it comes back.
type lease struct {
	by    *standing
	on    *endpoint
	at    int64
	probe bool
	told  bool // what became of the call
}

// Lend lends a connection to an endpoint of the service that is wanted, unless
// its breaker is open (ErrOpen) or it has as many calls as it may have
// (ErrFull). An endpoint that cannot be connected to is passed over; when none is
// left the error is a ConnectError, and nothing of the call has been sent. The
// caller tells what became of the call with Report, and gives the connection
// back with Put, or closes it.
func (s *Services) Lend(ctx context.Context, w *Want) (*Conn, error) {
	g := s.group(w)
	if g == nil || len(g.all) == 0 {
		return nil, fmt.Errorf("service %s: %w", w.Service, ErrNoEndpoint)
	}
	now := w.now().UnixNano()
	if !g.capacity.enter() {
		return nil, fmt.Errorf("service %s: %w", w.Service, ErrFull)
	}
	probe := false
	if g.breaker != nil {
		var ok bool
		if probe, ok = g.breaker.enter(now); !ok {
			g.capacity.leave()
			return nil, fmt.Errorf("service %s: %w", w.Service, ErrOpen)
		}
	}
	if !w.Again {
		g.budget.call(now)
	}
	c, err := g.lend(ctx, now, w)
	if err != nil {
		o := Failed
		if ctx.Err() != nil || w.spent() {
			o = Ignored
		}
		g.decide(time.Now().UnixNano(), o, 0, 0, probe)
		g.capacity.leave()
		return nil, &ConnectError{w.Service, err}
	}
	c.by, c.at, c.probe, c.told = g.standing, now, probe, false
	return c, nil
}

// Retry takes one retry of the service's budget, if it is there.
func (s *Services) Retry(name mesh.ServiceName) bool {
	g := (*s.table.Load())[name]
	return g != nil && g.budget.spend(time.Now().UnixNano())
}

// Well says whether a service, or a subset of it, has an endpoint that calls
// should go to.
func (s *Services) Well(name mesh.ServiceName, subset string) bool {
	g := (*s.table.Load())[name]
	if g != nil && subset != "" {
		g = g.subsets[subset]
	}
	if g == nil {
		return false
	}
	now := time.Now().UnixNano()
	if g.breaker != nil {
		if open, _, _, _ := g.breaker.state(); open {
			return false
		}
	}
	for _, e := range g.all {
		if e.out.Load() <= now && !e.sick.Load() && !e.rests(now) {
			return true
		}
	}
	return false
}

// Endpoint is where the connection leads.
func (c *Conn) Endpoint() netip.AddrPort { return c.pool.t.addr }

// Left says that the peer has left the connection: it takes no more calls on it,
// or was gone before this one came.
func (c *Conn) Left() bool {
	if c.onLine() {
		return !c.line.Live()
	}
	return c.Reused
}

// Report tells what became of the call that the connection was lent for: when
// the answer began, or it failed, and what the service asked for in Retry-After,
// or 0. Without it the call counts for nothing.
func (c *Conn) Report(o Outcome, at time.Time, retryAfter time.Duration) {
	l := &c.lease
	if l.by == nil || l.told {
		return
	}
	now := at.UnixNano()
	l.by.blame(l.on, now, o, time.Duration(max(now-l.at, 0)), true)
	c.tell(o, now, retryAfter)
}

// ReportService is Report for what says nothing of the endpoint.
func (c *Conn) ReportService(o Outcome, at time.Time, retryAfter time.Duration) {
	if l := &c.lease; l.by != nil && !l.told {
		c.tell(o, at.UnixNano(), retryAfter)
	}
}

func (c *Conn) tell(o Outcome, now int64, retryAfter time.Duration) {
	l := &c.lease
	l.told = true
	took := time.Duration(max(now-l.at, 0))
	l.by.capacity.took(now, took, o)
	l.by.decide(now, o, took, retryAfter, l.probe)
}

// Quiet says that a Report of o puts nothing aside and cuts nothing off, nor takes
// that back: nobody need be told, who may have to be waited for.
func (c *Conn) Quiet(o Outcome, at time.Time) bool {
	l := &c.lease
	if l.by == nil || l.by.breaker == nil {
		return o == OK
	}
	slow := l.by.breaker.cfg.Slow
	return o == OK && !l.probe && (slow == 0 || at.UnixNano()-l.at <= int64(slow))
}

// decide tells the breaker.
func (st *standing) decide(now int64, o Outcome, took, retryAfter time.Duration, probe bool) {
	if st.breaker == nil {
		return
	}
	was := st.breaker.open.Load()
	st.breaker.done(now, o, took, retryAfter, probe)
	if st.change != nil && was != st.breaker.open.Load() {
		st.change(st.cut(now))
	}
}

// leave ends the lease.
func (c *Conn) leave() {
	by := c.by
	if by == nil {
		return
	}
	c.by = nil // the rest means nothing without it
	c.on.pending.Add(-1)
	by.capacity.leave()
	if c.probe && !c.told {
		by.breaker.done(0, Ignored, 0, 0, true)
	}
}
