package proxy

import (
	"cmp"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/mesh"
	"sallyport/internal/route"
	"sallyport/internal/telemetry"
	"sallyport/internal/upstream"
)

// maxReplay is the largest body, bytes, that is kept so that a call can be tried
// again.
const maxReplay = 64 << 10

// A plan is how the calls of a route are tried.
type plan struct {
	mesh.Timeouts
	attempts int // further tries
	codes    []int
	statuses uint32        // a bit for each code of gRPC
	unsafe   bool          // of any method
	wait     time.Duration // before the first further try, and at most
	most     time.Duration
	// hedge is after what time a second upstream is asked, 0 for never; pace, when
	// set, says it instead.
	hedge time.Duration
	pace  *pace
}

// usual is the plan of calls that no route speaks of.
var usual = planOf(&mesh.Route{})

// grpcCodes are the statuses of gRPC by name, as routes have them.
var grpcCodes = map[string]int{
	"CANCELLED": 1, "UNKNOWN": http1.GRPCUnknown, "INVALID_ARGUMENT": 3, "DEADLINE_EXCEEDED": http1.GRPCDeadlineExceeded, "NOT_FOUND": 5, "ALREADY_EXISTS": 6,
	"PERMISSION_DENIED": http1.GRPCPermissionDenied, "RESOURCE_EXHAUSTED": http1.GRPCResourceExhausted, "FAILED_PRECONDITION": 9, "ABORTED": 10,
	"OUT_OF_RANGE": 11, "UNIMPLEMENTED": http1.GRPCUnimplemented, "INTERNAL": http1.GRPCInternal, "UNAVAILABLE": http1.GRPCUnavailable, "DATA_LOSS": 15, "UNAUTHENTICATED": http1.GRPCUnauthenticated,
}

func planOf(r *mesh.Route) *plan {
	p := &plan{Timeouts: r.Timeouts, attempts: 1, codes: []int{502, 503, 504}, wait: 25 * time.Millisecond, most: 250 * time.Millisecond}
	if t := r.Retry; t != nil {
		p.attempts, p.unsafe = t.Attempts, t.Unsafe
		if len(t.Codes) > 0 || len(t.GRPC) > 0 {
			p.codes = t.Codes
		}
		for _, name := range t.GRPC {
			p.statuses |= 1 << grpcCodes[name]
		}
		p.wait = cmp.Or(t.Base, p.wait)
		p.most = max(cmp.Or(t.Max, p.most), p.wait)
	}
	if h := r.Hedge; h != nil && h.Of > 0 {
		p.pace = newPace(h)
	} else if h != nil {
		p.hedge = h.After
	}
	return p
}

// tries is what a call has come to so far.
type tries struct {
	*plan
	want  upstream.Want
	n     int       // further tries that were made
	until time.Time // when all of it must be over; zero: never
	// asked is how long the caller waits, if that is what until is of. That it
	// was not enough says nothing of the service.
	asked time.Duration
	fixed int  // length of x.extra without what changes with each try
	safe  bool // acting on it twice is the same as once
	grpc  bool

	// Of the try under way: when its answer began, what that says, what it asks
	// for in Retry-After, and whether it is not passed on.
	began   time.Time
	outcome upstream.Outcome
	after   time.Duration
	dropped bool
	fault   *fault        // that it meets
	judged  bool          // outcome is of the whole answer
	late    bool          // it was ended since it was due
	sent    time.Time     // when it began, if its time is counted
	second  time.Duration // after what time another upstream is asked; 0: never
	denied  bool          // a policy does not let it through
	cut     cutter
}

// plan is how the calls of the route are tried that was taken.
func (t *target) plan() *plan {
	if t.route == nil {
		return usual
	}
	return t.policy.plans[t.route.ID]
}

// hashed says by what the service that is called keeps callers on an endpoint, nil
// when it does not.
func (t *target) hashed() *mesh.Balance {
	if t.routes == nil {
		return nil
	}
	set := t.policy.of(t.name)
	if set == nil || set.File.Balance.Policy != "ring_hash" {
		return nil
	}
	return &set.File.Balance
}

// begin reads what the request says of its tries and its deadline.
func (x *call) begin(p *plan) {
	t := &x.tries
	t.plan, t.n, t.until, t.dropped = p, 0, time.Time{}, false
	t.grpc = http1.IsGRPC(x.req.Get("content-type"))
	t.safe = p.unsafe || idempotent(x.req.Method) || len(x.req.Get("idempotency-key")) > 0
	t.want.Renew()
	t.want.Service, t.want.Subset, t.want.Connect = x.to.name, x.to.subset, p.Connect
	t.fixed = len(x.extra)
	if s := x.to.hashed(); s != nil {
		t.want.Key = route.Key(s.Hash, &x.look)
	}
	within := asked(&x.req, t.grpc)
	t.asked = within
	if p.Request > 0 && (within == 0 || p.Request < within) {
		within, t.asked = p.Request, 0
	}
	t.want.Hurried = t.asked > 0
	if within > 0 {
		t.until = x.start.Add(within)
		t.want.Until = t.until
	}
	x.ex.Idle = p.Idle
}

// send brings the call to an endpoint of its service, and to another when it
// may be tried again.
func (d *door) send(x *call, p *plan) *refusal {
	x.begin(p)
	if r := x.ready(maxReplay); r != nil {
		return r
	}
	t := &x.tries
	if x.req.Body.Empty() { // nothing was waited for
		t.want.At = x.start
	}
	for unseen := 0; ; {
		up, err := d.cfg.Services.Lend(x.ctx, &t.want)
		t.want.At = time.Time{}
		if err != nil {
			return x.unlent(err)
		}
		x.up, x.ex.Up = up, up.Conn
		if !x.bind(up) {
			x.discard()
			x.broken = true
			return nil
		}
		if x.err = up.Stands(); x.err != nil {
			x.unbind()
			x.discard()
			if !t.want.Fresh {
				t.want.Fresh = true // the next handshake says why
				continue
			}
			return noEndpoint()
		}
		if t.fault = d.fault(x); t.fault != nil {
			defer t.fault.leave()
		}
		d.try(x, up)
		up = x.up // another one may have answered
		if x.settled {
			return nil
		}
		if x.err == nil {
			x.report(up, x.outcomeOf(), t.began)
			x.saidGRPC()
			x.finish(up)
			return nil
		}
		again, free := d.again(x, up, &unseen)
		x.discard()
		if !again {
			return x.gaveUp()
		}
		t.want.Again = true
		if !free && !x.pause() {
			return x.gaveUp()
		}
	}
}

func noEndpoint() *refusal {
	return &refusal{status: 503, reason: "no_endpoint", detail: "the service cannot be reached"}
}

// try runs the exchange once.
func (d *door) try(x *call, up *upstream.Conn) {
	t := &x.tries
	x.extra = x.extra[:t.fixed]
	due := t.until
	if t.n > 0 {
		x.extra = append(x.extra, "Sallyport-Attempt: "...)
		x.extra = append(x.extra, byte('1'+min(t.n, 8)), '\r', '\n')
	}
	if t.Try > 0 {
		if try := time.Now().Add(t.Try); due.IsZero() || try.Before(due) {
			due = try
		}
	}
	if !due.IsZero() {
		x.extra = appendDeadline(x.extra, time.Until(due), t.grpc)
		x.ex.ToUp.Drop = withoutDeadline(x.ex.ToUp.Drop)
	}
	x.ex.ToUp.Extra = x.extra
	t.began, t.outcome, t.after, t.dropped = time.Time{}, upstream.OK, 0, false
	t.judged, t.denied = false, false
	if x.to.side != nil || t.pace != nil {
		t.sent = time.Now()
	}
	if t.fault != nil {
		x.through(t.fault, up, due)
		return
	}
	if t.second = x.hedged(); t.second > 0 {
		d.race(x, up, due)
		return
	}
	x.run(up.NetConn(), due)
}

// run runs the exchange over what stands for the upstream, which must be over when
// it is due. Zero is never.
func (x *call) run(over net.Conn, due time.Time) {
	t := &x.tries
	t.cut.arm(over, due)
	x.goesTo()
	if x.res, x.err = x.ex.Run(); x.err == http1.ErrSettled { //nolint:errorlint // never wrapped
		x.err = nil
		return
	}
	t.late = t.cut.disarm() && x.err != nil
	x.unbind()
	switch {
	case x.err == nil:
	case x.conn.hungUp(): // whatever broke then, the service did not break it
		x.err = &http1.SideError{Side: http1.Client, Op: "read", Err: http2.ErrCancelled}
	case t.late:
		x.err = &http1.SideError{Side: http1.Upstream, Op: "read", Err: os.ErrDeadlineExceeded}
	}
	x.cameBack()
}

// accept sees the answer before any of it goes on. On false it does not: the
// call is tried again.
func (d *door) accept(x *call) bool {
	t := &x.tries
	if t.plan == nil {
		return true // a tunnel
	}
	t.began = time.Now()
	resp := &x.ex.Response
	code, known := grpcCode(resp.Get("grpc-status"))
	if !known && t.grpc && resp.Status == 200 {
		code = -1
		// A status may come with the trailers. Where that is retried, and nothing
		// comes before it, nobody has heard of the answer yet.
		if t.statuses != 0 && t.safe && t.n < t.attempts && x.ex.Whole() && x.ex.Hollow() {
			if c, ok := grpcCode(x.ex.Trailer("grpc-status")); ok {
				code = c
			}
		}
	}
	refused := string(resp.Get(refusedField))
	t.outcome = outcomeOf(resp.Status, code, refused)
	if t.outcome == upstream.Failed && t.hurried(resp.Status, code, refused) {
		t.outcome = upstream.Ignored
	}
	if t.pace != nil && t.fault == nil && t.outcome == upstream.OK {
		t.pace.add(t.began.Sub(t.sent))
	}
	if !x.up.Quiet(t.outcome, t.began) {
		x.ex.Settle = nil
	}
	asked := slices.Contains(t.codes, resp.Status) || code > 0 && t.retriesGRPC(code)
	if t.outcome <= upstream.OK && !asked {
		t.denied = x.to.side != nil && len(resp.Get("sallyport-decision")) > 0
		return true
	}
	t.after = retryAfter(resp.Get("retry-after"))
	unseen := refused == "no_endpoint" || refused == "overload"
	// What was decided, could not be recorded, or breaks the protocol is that the
	// next time as well.
	final := refused == malformed || refused == "audit" || len(resp.Get("sallyport-decision")) > 0
	wanted := unseen || t.safe && !final && asked
	if !wanted || t.after > t.most || !x.ex.Whole() || !d.another(x, telemetry.RetryStatus) {
		return true
	}
	t.dropped = true
	return false
}

func (p *plan) retriesGRPC(code int) bool { return p.statuses&(1<<code) != 0 }

// another takes one further try, if there is one: of the route, of the time and
// of the service's budget.
func (d *door) another(x *call, reason string) bool {
	t := &x.tries
	if t.n >= t.attempts || !t.until.IsZero() && !time.Now().Before(t.until) {
		return false
	}
	if !d.cfg.Services.Retry(x.to.name) {
		d.Metrics.Retries(x.dst, reason, false).Inc()
		return false
	}
	t.n++
	d.Metrics.Retries(x.dst, reason, true).Inc()
	return true
}

// again says whether the call that has failed is tried again, and whether that
// is no retry: nobody can have acted on the one before, or the connection was
// kept and its peer has closed it in the meantime.
func (d *door) again(x *call, up *upstream.Conn, unseen *int) (again, free bool) {
	t := &x.tries
	stale := up.Reused && !x.res.ResponseSeen && !timedOut(x.err)
	untouched := isRefused(x.err) || x.res.RequestBytesSent == 0
	switch {
	case t.dropped:
		x.report(up, t.outcome, t.began)
		t.want.Avoid = up.Endpoint()
		return true, false
	case http1.FailedSide(x.err) != http1.Upstream:
		return false, false
	case !x.res.Replayable:
	case untouched && !timedOut(x.err):
		if *unseen++; *unseen > maxUnseen {
			return false, false
		}
		t.want.Fresh = true
		if !up.Left() { // it could have, and would not
			t.want.Avoid = up.Endpoint()
			return d.another(x, telemetry.RetryRefused), false
		}
		if *unseen > 1 {
			t.want.Avoid = up.Endpoint() // and not before: another process may have come in its place
			return d.cfg.Services.Retry(x.to.name), true
		}
		return true, true
	case stale && !t.want.Fresh && (t.safe || idempotent(x.req.Method)):
		t.want.Fresh = true
		return true, true
	case t.safe && !isMalformed(x.err) && slices.Contains(t.codes, http1.StatusOf(x.err)) && d.another(x, telemetry.RetryFailure):
		x.report(up, upstream.Failed, time.Now())
		t.want.Avoid, t.want.Fresh = up.Endpoint(), false
		return true, false
	}
	o := upstream.Failed
	if t.late && t.spent() {
		o = upstream.Ignored
	}
	x.report(up, o, time.Now())
	return false, false
}

// spent says that the time is over which the caller gives the call.
func (t *tries) spent() bool { return t.asked > 0 && !time.Now().Before(t.until) }

// hurried says that an answer is the end of what the caller waits for, as the
// service or its sidecar sees it: they were told, and their clocks begin earlier.
func (t *tries) hurried(status, code int, refused string) bool {
	if t.asked == 0 || code != http1.GRPCDeadlineExceeded && (status != 504 || refused != "timeout") {
		return false
	}
	return time.Until(t.until) <= t.asked/10
}

// pause waits before a further try, half to all of what it may be.
func (x *call) pause() bool {
	t := &x.tries
	wait := t.most
	if t.n < 16 {
		wait = min(t.plan.wait<<(t.n-1), t.most)
	}
	wait = max(wait/2+rand.N(wait/2+1), t.after)
	if !t.until.IsZero() && time.Until(t.until) <= wait {
		t.late = true
		x.err = &http1.SideError{Side: http1.Upstream, Op: "read", Err: os.ErrDeadlineExceeded}
		return false
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-x.ctx.Done():
	}
	return !x.conn.hungUp()
}

// unlent says how to answer a call that got no connection.
func (x *call) unlent(err error) *refusal {
	x.err = err
	if !errors.Is(err, upstream.ErrOpen) && !errors.Is(err, upstream.ErrFull) { // which are of the service as a whole
		x.sample(upstream.Failed, time.Now())
	}
	switch t := &x.tries; {
	case errors.Is(err, upstream.ErrOpen):
		return &refusal{status: 503, reason: "circuit_open", detail: "the service keeps failing and is left alone for a while"}
	case errors.Is(err, upstream.ErrFull):
		return &refusal{status: 503, reason: "capacity", detail: "as many calls to the service are under way as may be"}
	case !t.until.IsZero() && !time.Now().Before(t.until):
		return overdue()
	}
	return noEndpoint()
}

func overdue() *refusal {
	return &refusal{status: 504, reason: "timeout", detail: "the call took longer than it may"}
}

// gaveUp says how to answer a call that came to nothing.
func (x *call) gaveUp() *refusal {
	if x.tries.late && !x.res.ResponseStarted && timedOut(x.err) {
		return overdue()
	}
	return x.failed(x.err)
}

func timedOut(err error) bool { return http1.StatusOf(err) == 504 }

// report tells what became of a try. A fault that answers in the endpoint's place
// says nothing of the endpoint.
func (x *call) report(up *upstream.Conn, o upstream.Outcome, at time.Time) {
	x.sample(o, at)
	if f := x.tries.fault; f != nil && !f.real() {
		up.ReportService(o, at, x.tries.after)
		return
	}
	up.Report(o, at, x.tries.after)
}

// outcomeOf is what the whole answer says of the service.
func (x *call) outcomeOf() upstream.Outcome {
	t := &x.tries
	if !t.grpc || t.judged || t.outcome != upstream.OK {
		return t.outcome
	}
	code, known := grpcCode(x.ex.Trailer("grpc-status"))
	if !known {
		return t.outcome
	}
	if t.hurried(x.res.Status, code, "") {
		return upstream.Ignored
	}
	return outcomeOf(x.res.Status, code, "")
}

// outcomeOf is what a status says of the service: of gRPC, when code is above
// zero.
func outcomeOf(status, code int, refused string) upstream.Outcome {
	switch code {
	case http1.GRPCUnknown, http1.GRPCDeadlineExceeded, http1.GRPCInternal, http1.GRPCUnavailable, 15:
		if refused == "overload" {
			return upstream.Limited
		}
		return upstream.Failed
	case http1.GRPCResourceExhausted:
		return upstream.Limited
	}
	if refused == "overload" {
		return upstream.Limited
	}
	return upstream.OutcomeOf(status)
}

// grpcCode reads a status of gRPC.
func grpcCode(b []byte) (int, bool) {
	n, ok := number(b)
	return int(n), ok && n <= 16
}

// retryAfter reads seconds of Retry-After; a date is not read, which needs both
// clocks to agree.
func retryAfter(b []byte) time.Duration {
	n, ok := number(b)
	if !ok {
		return 0
	}
	return time.Duration(n) * time.Second
}
