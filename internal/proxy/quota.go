package proxy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/route"
)

const (
	// firstPart is what a proxy takes of a shared limit until it is told its part.
	firstPart = 0.1
	// gauge is the least time over which calls are counted for a demand.
	gauge = 900 * time.Millisecond
)

// A quota is the limit of a route, as far as it is this proxy's.
type quota struct {
	limit mesh.RateLimit
	of    mesh.Quota // of a shared one
	// step is the time between two calls in the long run, slack what may be used
	// up at once, nanoseconds. A shared one changes with what others need.
	step, slack atomic.Int64
	count       count
	asked       atomic.Uint32 // calls since was last counted

	mu    sync.Mutex // guards the fields below
	since time.Time
	own   uint32 // calls a second, when they were last counted
}

func newQuota(service string, r *route.Route, now time.Time) *quota {
	l := *r.Limit
	if l.Burst == 0 {
		l.Burst = l.Rate
	}
	q := &quota{limit: l, of: mesh.Quota{Route: service + "/" + r.Name, PerCaller: l.By == "caller"}, since: now}
	rate := float64(l.Rate)
	if l.Shared {
		rate *= firstPart
	}
	q.set(rate)
	return q
}

// set has rate calls a second pass, and the same part of the burst.
func (q *quota) set(rate float64) {
	step := max(int64(min(float64(time.Second)/rate, float64(time.Hour))), 1)
	q.step.Store(step)
	q.slack.Store(max(int64(float64(time.Second)*float64(q.limit.Burst)/float64(q.limit.Rate)), step))
}

// take lets one call pass, or says after what time one may.
func (q *quota) take(now int64) (wait time.Duration) {
	if q.limit.Shared {
		q.asked.Add(1)
	}
	return q.count.take(now, time.Duration(q.step.Load()), time.Duration(q.slack.Load()))
}

// demand is how many calls a second were asked for lately.
func (q *quota) demand(now time.Time) uint32 {
	q.mu.Lock()
	defer q.mu.Unlock()
	if d := now.Sub(q.since); d >= gauge {
		q.own = uint32(float64(q.asked.Swap(0))/d.Seconds() + 0.5)
		q.since = now
	}
	return q.own
}

// quotas are those of the policy in force.
type quotas struct {
	mu sync.Mutex // guards of
	of map[string]*quota
}

// use takes the limits of a policy in place of those before. One that has not
// changed goes on counting.
func (qs *quotas) use(now time.Time, p *policy) {
	qs.mu.Lock()
	defer qs.mu.Unlock()
	qs.of = qs.match(now, p)
}

// lend gives a policy that is in force no more the limits that go on counting.
func (qs *quotas) lend(now time.Time, p *policy) {
	qs.mu.Lock()
	defer qs.mu.Unlock()
	qs.match(now, p)
}

// match gives a policy its limits, of which those that are known are the same. The
// caller holds mu.
func (qs *quotas) match(now time.Time, p *policy) map[string]*quota {
	next := map[string]*quota{}
	if p.quotas == nil {
		return next
	}
	for set := range p.table.All {
		for _, r := range set.Routes {
			if r.Limit == nil {
				continue
			}
			fresh := newQuota(set.File.Of(), r, now)
			q := qs.of[fresh.of.Route]
			if q == nil || q.limit != fresh.limit {
				q = fresh
			}
			next[q.of.Route], p.quotas[r.ID] = q, q
		}
	}
	return next
}

// Demands are what the workload asks for of limits that are shared.
func (o *Outbound) Demands() (list []mesh.Demand) {
	now := time.Now()
	o.quotas.mu.Lock()
	all := slices.Collect(maps.Values(o.quotas.of))
	o.quotas.mu.Unlock()
	for _, q := range all {
		if q.limit.Shared {
			list = append(list, mesh.Demand{Quota: q.of, Calls: q.demand(now)})
		}
	}
	slices.SortFunc(list, func(a, b mesh.Demand) int { return strings.Compare(a.Route, b.Route) })
	return list
}

// Share takes this proxy's part of limits that are shared. It holds until there is
// another.
func (o *Outbound) Share(totals []mesh.Total) {
	o.quotas.mu.Lock()
	defer o.quotas.mu.Unlock()
	for _, t := range totals {
		q := o.quotas.of[t.Route]
		if q == nil || !q.limit.Shared || q.of != t.Quota {
			continue
		}
		q.mu.Lock()
		q.set(t.Part(float64(q.limit.Rate), q.own))
		q.mu.Unlock()
	}
}

// limit holds the calls of a route to its limit.
func (d *door) limit(x *call) *refusal {
	if x.to == nil || x.to.route == nil || x.to.route.Limit == nil {
		return nil
	}
	q := x.to.policy.quotas[x.to.route.ID]
	wait := q.take(x.start.UnixNano())
	if wait <= 0 {
		return nil
	}
	d.Metrics.RequestsRefused(d.Reporter, "limit").Inc()
	rec := d.about(x, "limit", fmt.Sprintf("more calls of route %s than %d a second, %d at once", q.of.Route, q.limit.Rate, q.limit.Burst))
	rec.Dst = x.dst
	r := d.deny(rec)
	if r.status == 403 { // else it could not be recorded
		r.tooMany(wait)
	}
	return r
}

// tooMany says after what time the next call may come.
func (r *refusal) tooMany(wait time.Duration) {
	r.status, r.told = 429, "too many calls"
	r.head = fmt.Sprintf("Retry-After: %d\r\n", (wait+time.Second-1)/time.Second)
}
