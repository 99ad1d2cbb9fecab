package mesh

import "time"

// choice checks how endpoints are chosen and judged.
func (c *routeChecker) choice() {
	r := c.file
	c.balance(&r.Balance)
	if b := r.Breaker; b != nil {
		within(c, "breaker.consecutive", b.Consecutive, 0, 10_000)
		c.whole("breaker.success", b.Success)
		c.whole("breaker.slow_share", b.SlowShare)
		within(c, "breaker.min_requests", b.Minimum, 0, maxWeight)
		within(c, "breaker.slow", b.Slow, 0, time.Hour)
		within(c, "breaker.window", b.Window, 0, time.Hour)
		within(c, "breaker.open", b.Open, 0, time.Hour)
		within(c, "breaker.max_open", b.MaxOpen, 0, time.Hour)
		if (b.Slow > 0) != (b.SlowShare > 0) {
			c.say("breaker:", "breaker: slow and slow_share stand together: which calls are slow, and how many are too many?")
		}
		if b.MaxOpen > 0 && b.Open > b.MaxOpen {
			c.say("open:", "breaker: open %s is longer than max_open %s", b.Open, b.MaxOpen)
		}
	}
	if o := r.Outlier; o != nil {
		within(c, "outlier.consecutive", o.Consecutive, 0, 10_000)
		c.whole("outlier.success", o.Success)
		c.whole("outlier.max_share", o.MaxShare)
		within(c, "outlier.min_requests", o.Minimum, 0, maxWeight)
		within(c, "outlier.interval", o.Interval, 0, time.Hour)
		within(c, "outlier.ejection", o.Ejection, 0, 24*time.Hour)
		within(c, "outlier.max_ejection", o.MaxEjection, 0, 24*time.Hour)
		if o.MaxEjection > 0 && o.Ejection > o.MaxEjection {
			c.say("ejection:", "outlier: ejection %s is longer than max_ejection %s", o.Ejection, o.MaxEjection)
		}
	}
	if h := r.Health; h != nil {
		c.health(h)
	}
	within(c, "capacity.calls", r.Capacity.Calls, 0, maxWeight)
	c.whole("retry_budget.share", r.Budget.Share)
	within(c, "retry_budget.floor", r.Budget.Floor, 0, 10_000)
}

func (c *routeChecker) whole(field string, s Share) { within(c, field, int(s), 0, Whole) }

func (c *routeChecker) balance(b *Balance) {
	c.word("balance.policy", b.Policy, "p2c_ewma", "least_request", "round_robin", "ring_hash")
	c.word("balance.zone", b.Zone, "prefer")
	within(c, "balance.slow_start", b.SlowStart, 0, time.Hour)
	if b.Bound != 0 {
		within(c, "balance.bound", b.Bound, 101, 1000)
	}
	if b.Panic != nil {
		c.whole("balance.panic_threshold", *b.Panic)
	}
	ring := b.Policy == "ring_hash"
	switch {
	case ring && b.Hash == nil:
		c.say("balance:", "balance: ring_hash needs hash: by what does a caller stay with an endpoint?")
	case !ring && (b.Hash != nil || b.Bound != 0):
		c.say("balance:", "balance: hash and bound are of policy: ring_hash")
	case ring:
		c.sticky("balance.hash", b.Hash)
	}
}

func (c *routeChecker) health(h *Health) {
	n := 0
	for _, there := range []bool{h.HTTP != "", h.GRPC != nil, h.TCP} {
		if there {
			n++
		}
	}
	switch {
	case n != 1:
		c.say("health:", "health: %d ways to ask, want exactly one of http, grpc and tcp", n)
	case h.HTTP != "" && h.HTTP[0] != '/':
		c.say(h.HTTP, "health: path %q does not start with \"/\"", clip(h.HTTP))
	case h.HTTP != "" && checkPathForm(h.HTTP) != nil:
		c.say(h.HTTP, "health: path %q: %s", clip(h.HTTP), checkPathForm(h.HTTP))
	case h.GRPC != nil && *h.GRPC != "":
		c.grpc(&GRPCMethod{Service: *h.GRPC})
	case c.tcp && !h.TCP:
		c.say("health:", "health: the service speaks tcp: ask it by tcp: true")
	}
	within(c, "health.interval", h.Interval, 0, time.Hour)
	within(c, "health.timeout", h.Timeout, 0, time.Minute)
	within(c, "health.unhealthy", h.Unhealthy, 0, 100)
	within(c, "health.healthy", h.Healthy, 0, 100)
	if h.Interval > 0 && h.Timeout > h.Interval {
		c.say("timeout:", "health: timeout %s is longer than interval %s", h.Timeout, h.Interval)
	}
}
