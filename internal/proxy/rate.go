package proxy

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
)

// mostCounts bounds the callers that are counted apart under one rate. It takes
// as many identities to fill it; who comes then shares one count.
const mostCounts = 4096

// rates are the bounds on the calls of each caller.
type rates []*rate

// A rate counts the calls that one entry of the configuration speaks of.
type rate struct {
	mesh.CallRate
	step    time.Duration // between two calls, in the long run
	burst   time.Duration // what may be used up at once
	told    allowance
	callers meters[spiffeid.ID]
}

// meters are the counts of many, by what tells them apart.
type meters[K comparable] struct {
	mu     sync.Mutex // guards of
	of     map[K]*count
	shared count
}

// A count is when all calls that were let pass will have had their step, in
// Unix nanoseconds.
type count struct{ free atomic.Int64 }

func newRates(list []mesh.CallRate) (rates, error) {
	var all rates
	for i, c := range list {
		if err := errors.Join(c.Validate()...); err != nil {
			return nil, fmt.Errorf("rates[%d]: %w", i, err)
		}
		c = c.WithDefaults()
		r := &rate{CallRate: c, step: max(c.Rate.Per/time.Duration(c.Rate.Calls), 1), told: newAllowance("calls", c.Rate.Calls, c.Rate.Per)}
		r.burst = r.step * time.Duration(c.Burst)
		all = append(all, r)
	}
	return all, nil
}

// A bound is the count of one caller under one rate. A connection looks its
// own up once.
type bound struct {
	*rate
	*count
}

// bounds are those of a caller.
func (all rates) bounds(id spiffeid.ID) (list []bound) {
	for _, r := range all {
		if mesh.MatchSrc(r.Caller, id.String()) {
			list = append(list, bound{r, r.callers.get(id, time.Now())})
		}
	}
	return list
}

// get is the count of one. Those that have nothing left to wait for are forgotten
// when there are too many: a new one is the same.
func (m *meters[K]) get(k K, now time.Time) *count {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.of[k]
	if c != nil {
		return c
	}
	if len(m.of) >= mostCounts {
		for other, c := range m.of {
			if c.free.Load() <= now.UnixNano() {
				delete(m.of, other)
			}
		}
	}
	if len(m.of) >= mostCounts {
		return &m.shared
	}
	if m.of == nil {
		m.of = map[K]*count{}
	}
	c = new(count)
	m.of[k] = c
	return c
}

// take lets one call of the caller pass, or says after what time one may.
func (b bound) take(now int64) (wait time.Duration) { return b.count.take(now, b.step, b.burst) }

// take lets one call pass that takes step in the long run, with slack to be used
// up at once, or says after what time one may (the generic cell rate algorithm).
func (c *count) take(now int64, step, slack time.Duration) (wait time.Duration) {
	for {
		was := c.free.Load()
		free := max(was, now) + int64(step)
		if over := free - now - int64(slack); over > 0 {
			return time.Duration(over)
		}
		if c.free.CompareAndSwap(was, free) {
			return 0
		}
	}
}

// left is how many calls may come now, and after what time all of slack may.
func (c *count) left(now int64, step, slack time.Duration) (calls int64, full time.Duration) {
	used := time.Duration(max(c.free.Load()-now, 0))
	return int64(max(slack-used, 0) / step), used
}

// rateLimit holds a caller to the rates of the calls it makes.
func (in *Inbound) rateLimit(x *call) *refusal {
	for _, b := range x.bounds {
		if !b.Counts(x.verb(), x.path()) {
			continue
		}
		if wait := b.take(x.start.UnixNano()); wait > 0 {
			return in.tooOften(x, b, wait)
		}
	}
	return nil
}

func (in *Inbound) tooOften(x *call, b bound, wait time.Duration) *refusal {
	in.Metrics.RequestsRefused(in.Reporter, "rate").Inc()
	r := in.deny(audit.Record{Reason: "rate", Dir: string(mesh.In), Src: x.src, Dst: x.dst, Port: in.cfg.Port(),
		Verb: x.verb(), Path: x.path(), Peer: x.remote, Trace: x.traceText(),
		Detail: fmt.Sprintf("more calls %s %s than %d in %s, %d at once", b.Verb, b.Path, b.Rate.Calls, b.Rate.Per, b.Burst)})
	if r.status != 403 {
		return r // it could not be recorded
	}
	r.tooMany(wait, &b.told)
	return r
}
