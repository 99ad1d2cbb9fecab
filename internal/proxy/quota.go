package proxy

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strconv"
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
	// claim, when set, is by whose value calls are counted apart, in values. Those
	// that have none are counted as those of one.
	claim  string
	values meters[[sha256.Size]byte]
	// told is what callers hear of it: of the limit of all, where it is shared.
	told allowance

	mu    sync.Mutex // guards the fields below
	since time.Time
	own   uint32 // calls a second, when they were last counted; at most the limit
}

func newQuota(service string, r *route.Route, now time.Time) *quota {
	l := *r.Limit
	if l.Burst == 0 {
		l.Burst = l.Rate
	}
	q := &quota{limit: l, of: mesh.Quota{Route: service + "/" + r.Name, PerCaller: l.By == "caller"}, claim: l.Claim(), since: now}
	rate := float64(l.Rate)
	if l.Shared {
		rate *= firstPart
	}
	q.set(rate)
	q.told = newAllowance(q.of.Route, l.Rate, time.Second)
	return q
}

// set has rate calls a second pass, and the same part of the burst.
func (q *quota) set(rate float64) {
	step := max(int64(min(float64(time.Second)/rate, float64(time.Hour))), 1)
	q.step.Store(step)
	q.slack.Store(max(int64(float64(time.Second)*float64(q.limit.Burst)/float64(q.limit.Rate)), step))
}

// take lets one call pass that c counts, or says after what time one may.
func (q *quota) take(c *count, now int64) (wait time.Duration) {
	if q.limit.Shared {
		q.asked.Add(1)
	}
	return c.take(now, time.Duration(q.step.Load()), time.Duration(q.slack.Load()))
}

// counted is what counts the call.
func (q *quota) counted(x *call) *count {
	if q.claim == "" {
		return &q.count
	}
	value := ""
	if x.look.Claim != nil {
		value = x.look.Claim(q.claim)
	}
	return q.values.get(sha256.Sum256([]byte(value)), x.start)
}

// demand is how many calls a second were asked for lately, as far as there are.
func (q *quota) demand(now time.Time) uint32 {
	q.mu.Lock()
	defer q.mu.Unlock()
	if d := now.Sub(q.since); d >= gauge {
		q.own = uint32(min(float64(q.asked.Swap(0))/d.Seconds()+0.5, float64(q.limit.Rate)))
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
	c := q.counted(x)
	if r := x.unchecked(); r != nil {
		return r
	}
	now := x.start.UnixNano()
	wait := q.take(c, now)
	if wait <= 0 {
		left, full := c.left(now, time.Duration(q.step.Load()), time.Duration(q.slack.Load()))
		x.lines = q.told.append(x.lines, left, full)
		x.ex.ToDown.Extra = x.lines
		return nil
	}
	d.Metrics.RequestsRefused(d.Reporter, "limit").Inc()
	rec := d.about(x, "limit", fmt.Sprintf("more calls of route %s than %d a second, %d at once", q.of.Route, q.limit.Rate, q.limit.Burst))
	rec.Dst = x.dst
	r := d.deny(rec)
	if r.status == 403 { // else it could not be recorded
		r.tooMany(wait, &q.told)
	}
	return r
}

// An allowance is a limit as callers are told of it: by RateLimit header fields for
// HTTP, in the form of draft-ietf-httpapi-ratelimit-headers-10.
type allowance struct {
	calls int64
	lines string // up to how many are left
}

func newAllowance(name string, calls int, per time.Duration) allowance {
	return allowance{int64(calls), fmt.Sprintf("RateLimit-Policy: %[1]q;q=%[2]d;w=%[3]d\r\nRateLimit: %[1]q;r=", name, calls, seconds(per))}
}

// append appends the field lines: how many calls may come in which time, how many
// may come now, and in how many seconds as many as ever may.
func (a *allowance) append(b []byte, left int64, full time.Duration) []byte {
	b = strconv.AppendInt(append(b, a.lines...), min(left, a.calls), 10)
	return append(strconv.AppendInt(append(b, ";t="...), seconds(full), 10), '\r', '\n')
}

// seconds are whole ones, rounded up.
func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }

// tooMany says after what time the next call may come.
func (r *refusal) tooMany(wait time.Duration, of *allowance) {
	r.status, r.told = 429, "too many calls"
	r.head = string(of.append(fmt.Appendf(nil, "Retry-After: %d\r\n", seconds(wait)), 0, wait))
}
