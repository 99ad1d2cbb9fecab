package egress

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
	"sallyport/internal/upstream"
)

// A trial is what the tries of a request have come to so far.
type trial struct {
	on    *upstream.Try // the one under way; nil where nothing is remembered
	more  int           // further tries that were made
	avoid []netip.AddrPort
	fresh bool // no kept connection is tried again
	lent  *origin

	// Of the try under way: where it leads, whether its connection was kept, and since
	// when; what its answer says of the host, when it began, what it asks for in
	// Retry-After; whether it is not passed on, and whether its time was over.
	at      netip.AddrPort
	reused  bool
	outcome upstream.Outcome
	heard   time.Time
	after   time.Duration
	dropped bool
	late    bool
}

// attempt begins a try of a call to the host of t.
func (g *Gateway) attempt(t *tunnel, again bool) (*upstream.Try, error) {
	if !t.how.Remembered() {
		return nil, nil //nolint:nilnil // nothing is
	}
	try, err := g.outside.Begin(t.call.Src, "host:"+t.host.String(), "host:"+t.how.Host, t.how.Judged(), again)
	if err != nil {
		return nil, refuse(ReasonBreaker, "%v", err)
	}
	return try, nil
}

// blamed is what a connection that was not made says of the host.
func blamed(ctx context.Context, err error) upstream.Outcome {
	switch reasonOf(err) {
	case ReasonDial, ReasonTimeout, ReasonResolve, ReasonCertificate:
		if ctx.Err() == nil {
			return upstream.Failed
		}
	}
	return upstream.Ignored
}

// bounded has the request end when all its time is over. It returns what stops that.
func (f *fetch) bounded() func() bool {
	if f.how.Timeouts.Request == 0 {
		return func() bool { return true }
	}
	return time.AfterFunc(f.how.Timeouts.Request-time.Since(f.start), func() { f.stop(ReasonTimeout) }).Stop
}

// try sends the request once. The error is a *Refusal when there is no connection.
func (f *fetch) try() (res http1.Result, err error) {
	f.outcome, f.heard, f.after, f.dropped, f.late = upstream.OK, time.Time{}, 0, false, false
	if f.on, err = f.g.attempt(f.tunnel, f.more > 0); err != nil {
		return res, err
	}
	defer f.on.End()
	o, err := f.lend()
	if err != nil {
		f.on.Tell(blamed(f.ctx, err), time.Now(), 0)
		return res, err
	}
	f.on.On(o.to.addr)
	f.tries++
	f.at, f.reused = o.to.addr, o.reused // from put on o is for another request
	f.a.ex.Up, f.lent = o.Conn, o
	due := f.due(o)
	if err = errStopped; f.goes(o) {
		res, err = f.a.ex.Run()
	}
	f.late = !due()
	f.status = res.Status
	if res.Upgraded && err == nil {
		f.tell(nil, true)
		return res, nil
	}
	f.goes(nil)
	f.up.Add(res.ReqBytes)
	f.down.Add(res.RespBytes)
	if err == nil && res.UpstreamReusable && f.why() == "" && !f.late && o.meter == nil {
		f.g.origins.put(o)
	} else {
		o.discard()
	}
	if f.late = f.late && err != nil; f.late {
		err = &http1.SideError{Side: http1.Upstream, Op: "read", Err: os.ErrDeadlineExceeded}
	}
	f.tell(err, res.Whole)
	return res, err
}

// due has the connection of a try break when its time is over. What it returns
// stops that, and is false when it was too late.
func (f *fetch) due(o *origin) func() bool {
	if f.how.Timeouts.Try == 0 {
		return func() bool { return true }
	}
	return time.AfterFunc(f.how.Timeouts.Try, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.over == o {
			o.cut()
		}
	}).Stop
}

// tell says what became of the try. A time that was over while the caller had not
// sent all, or was taking the answer, says nothing of the host.
func (f *fetch) tell(err error, whole bool) {
	switch why := f.why(); {
	case !f.heard.IsZero() && (err == nil || errors.Is(err, http1.ErrNotAccepted)):
		f.on.Tell(f.outcome, f.heard, f.after)
	case (why == ReasonTimeout || f.late) && (!whole || !f.heard.IsZero()):
	case why == ReasonTimeout, why == "" && http1.FailedSide(err) == http1.Upstream && !f.stale(err):
		f.on.Tell(upstream.Failed, time.Now(), 0)
	}
}

// stale says that the host most likely closed a kept connection before the request
// came.
func (f *fetch) stale(err error) bool {
	return f.reused && f.heard.IsZero() && http1.StatusOf(err) != 504
}

// drops sees the answer before any of it goes on. When it is true, the answer does
// not: the request is tried again.
func (f *fetch) drops(resp *http1.Response) bool {
	f.heard = time.Now()
	f.outcome = upstream.OutcomeOf(resp.Status)
	if secs, err := strconv.ParseUint(string(resp.Get("retry-after")), 10, 16); err == nil {
		f.after = time.Duration(secs) * time.Second
	}
	f.dropped = f.retries(resp.Status) && f.after <= f.waits() && f.a.ex.Whole() && f.another(telemetry.RetryStatus)
	return f.dropped
}

// retries says whether a request that came to a status may be repeated.
func (f *fetch) retries(status int) bool {
	y := f.how.Retry
	if y == nil || !idempotent(f.req.Method) {
		return false
	}
	if len(y.Codes) == 0 {
		return status >= 502 && status <= 504
	}
	return slices.Contains(y.Codes, status)
}

// another takes one further try, if there is one: of the destination and of the
// budget of the host.
func (f *fetch) another(reason string) bool {
	if f.how.Retry == nil || f.more >= f.how.Retry.Attempts || f.why() != "" {
		return false
	}
	granted := f.on.Retry()
	f.g.cfg.Metrics.Retries("host:"+f.how.Host, reason, granted).Inc()
	if granted {
		f.more++
	}
	return granted
}

// again says whether the request that has failed is tried again, and waits until it
// is to be.
func (f *fetch) again(err error, res http1.Result) bool {
	free := false
	switch {
	case f.dropped:
	case http1.FailedSide(err) != http1.Upstream || !res.Replayable:
		return false
	case f.stale(err) && !f.fresh && !res.ResponseSeen && (res.RequestBytesSent == 0 || idempotent(f.req.Method)):
		f.fresh, free = true, true // the host had closed it
	case res.RequestBytesSent == 0 && f.another(telemetry.RetryRefused):
	case f.retries(http1.StatusOf(err)) && f.another(telemetry.RetryFailure):
	default:
		return false
	}
	if free {
		return true
	}
	f.avoid = append(f.avoid, f.at)
	return f.pause()
}

// waits is the longest wait before a further try.
func (f *fetch) waits() time.Duration {
	return max(cmp.Or(f.how.Retry.Max, 250*time.Millisecond), cmp.Or(f.how.Retry.Base, 25*time.Millisecond))
}

// pause waits before a further try, half to all of a time that doubles.
func (f *fetch) pause() bool {
	wait := min(cmp.Or(f.how.Retry.Base, 25*time.Millisecond)<<(f.more-1), f.waits())
	timer := time.NewTimer(max(wait/2+rand.N(wait/2+1), f.after))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-f.ctx.Done():
	}
	return f.why() == ""
}

// maxShakes is to how many addresses a request goes on that did not prove the name
// of the host.
const maxShakes = 3

// lend gives a connection to the host: one that was kept, or a new one.
func (f *fetch) lend() (*origin, error) {
	key := originKeyOf(f)
	fits := func(to place) bool { return f.g.leadsThere(f.snap, f.tunnel, f.call.SNI, to) }
	to := Target{Host: f.host, Port: f.call.Port, How: f.how, Try: f.on, Avoid: f.avoid}
	switch {
	case f.req.Upgrade: // which is asked for over HTTP/1.1
		to.How.ALPN = []string{mesh.ALPNHTTP1}
	case speaksGRPC(f.req): // which goes over HTTP/2, or not at all
		to.How.ALPN, key.alpn = []string{mesh.ALPNHTTP2}, mesh.ALPNHTTP2
	}
	if !f.how.Remembered() {
		if !f.fresh && !f.req.Upgrade {
			if o := f.g.origins.take(f.grant, key, fits); o != nil {
				return f.judged(o)
			}
		}
		return f.dial(&to, key, nil)
	}
	var kept *origin
	for n := 1; ; n++ {
		o, err := f.dial(&to, key, func(list []place) bool {
			for i := 0; i < len(list) && kept == nil && !f.fresh && !f.req.Upgrade; i++ {
				key.at = list[i].outlet + " " + list[i].addr.String()
				kept = f.g.origins.take(f.grant, key, fits)
			}
			return kept != nil
		})
		switch {
		case kept != nil:
			return f.judged(kept)
		case o != nil || n == maxShakes || len(to.Avoid) == len(f.avoid)+n-1:
			return o, err
		}
	}
}

// dial makes a new connection, unless have says that there is one. What did not
// prove the host's name is avoided from then on.
func (f *fetch) dial(to *Target, key originKey, have func([]place) bool) (*origin, error) {
	conn, at, note, err := f.g.dialer.seek(f.ctx, f.grant, to, have)
	if err != nil || conn == nil {
		return nil, err
	}
	if have != nil {
		key.at = at.outlet + " " + at.addr.String()
	}
	o, err := f.g.shake(f.ctx, conn, at, key, to)
	if err != nil {
		if f.ctx.Err() == nil {
			f.on.Unmade(at.addr)
			to.Avoid = append(slices.Clip(to.Avoid), at.addr)
		}
		return nil, err
	}
	f.note = note
	if f.req.Upgrade {
		o.metered(f)
	}
	return f.judged(o)
}

// Troubles lists what the gateway holds against hosts and their addresses now.
func (g *Gateway) Troubles() []upstream.Trouble { return g.outside.Troubles() }
