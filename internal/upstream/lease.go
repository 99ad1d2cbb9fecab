package upstream

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"sallyport/internal/mesh"
)

// A lease is what a lent connection counts for, until it comes back; or a try of
// a call to a host outside, until it ends.
type lease struct {
	by    *standing
	on    *endpoint
	at    int64
	probe bool
	again bool // it is of a further try
	told  bool // what became of the call
	well  bool // which is to be counted when it ends: it went well
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
	g.mark(now)
	c, err := g.lend(ctx, now, w)
	if err != nil {
		o := Failed
		if ctx.Err() != nil || w.spent() {
			o = Ignored
		}
		g.count(time.Now().UnixNano(), o, 0, 0, probe, w.Again)
		g.capacity.leave()
		return nil, &ConnectError{w.Service, err}
	}
	c.by, c.at, c.probe, c.again, c.told, c.well = g.standing, now, probe, w.Again, false, false
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
		if open, _, _ := g.breaker.state(); open {
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
func (l *lease) Report(o Outcome, at time.Time, retryAfter time.Duration) {
	if l.by == nil || l.told {
		return
	}
	now := at.UnixNano()
	took := time.Duration(max(now-l.at, 0))
	if st := l.by; o == OK && st.plain && !l.probe && !l.again && l.on.row.Load() == 0 && st.unbroken() {
		l.told, l.well = true, true
		l.on.took(now, took)
		st.mark(now)
		return
	}
	l.by.blame(l.on, now, o, took, true)
	l.tell(o, now, retryAfter)
}

// unbroken says that the last call of the service has not failed.
func (st *standing) unbroken() bool { return st.breaker == nil || st.breaker.row.Load() == 0 }

// ReportService is Report for what says nothing of the endpoint.
func (l *lease) ReportService(o Outcome, at time.Time, retryAfter time.Duration) {
	if l.by != nil && !l.told {
		l.tell(o, at.UnixNano(), retryAfter)
	}
}

func (l *lease) tell(o Outcome, now int64, retryAfter time.Duration) {
	l.told = true
	st, took := l.by, time.Duration(max(now-l.at, 0))
	if st.adaptive {
		st.took(now, took, o)
	}
	if o != OK || l.probe || l.again || st.breaker != nil && st.breaker.slow(took) {
		st.count(now, o, took, retryAfter, l.probe, l.again)
		return
	}
	st.mark(now)
	if st.breaker != nil {
		st.breaker.pass()
	}
	l.well = true // most likely it ends now
}

// Lasts says that the connection is kept for long after the Report: the call counts
// now, and not when it ends.
func (l *lease) Lasts() {
	if l.by != nil && l.well {
		l.well = false
		l.by.count(time.Now().UnixNano(), OK, 0, 0, false, false)
	}
}

// Quiet says that a Report of o puts nothing aside and cuts nothing off, nor takes
// that back: nobody need be told, who may have to be waited for.
func (l *lease) Quiet(o Outcome, at time.Time) bool {
	if l.by == nil || l.by.breaker == nil {
		return o == OK
	}
	return o == OK && !l.probe && !l.by.breaker.slow(time.Duration(at.UnixNano()-l.at))
}

// count counts a call for the budget, unless it is a further try, and tells the
// breaker.
func (st *standing) count(now int64, o Outcome, took, retryAfter time.Duration, probe, again bool) {
	if !again {
		st.budget.call(now)
	}
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
func (l *lease) leave() {
	by := l.by
	if by == nil {
		return
	}
	l.by = nil // the rest means nothing without it
	if l.on != nil {
		l.on.end(l.well)
	}
	by.capacity.leave()
	if !l.told {
		by.count(time.Now().UnixNano(), Ignored, 0, 0, l.probe, l.again)
	}
}
