package proxy

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
	"sallyport/internal/upstream"
)

// A call is one request on its way through a chain. A connection has one call
// and uses it again for each request.
type call struct {
	ctx  context.Context
	conn *conn
	down *http1.Conn
	req  http1.Request
	ex   http1.Exchange

	// src and dst are the two ends as they stand in records and metrics.
	src, dst string
	remote   string

	start time.Time
	trace telemetry.Trace
	// traceID is trace as records and logs have it.
	traceID string
	series  *telemetry.Series
	extra   []byte // field lines for the upstream, ended by CRLF each

	// Inbound: the caller, until when its SVID is valid, and the judge's slice.
	peer      spiffeid.ID
	port      uint16 // of the rules
	peerUntil time.Time
	judge     *authz.Conn
	judged    authz.Call
	grant     authz.Grant
	caller    []byte // the field line that tells the application

	// Outbound: what the local process is, and the service meant.
	stranger error
	svc      mesh.Service
	fixed    mesh.ServiceName // of a port that belongs to one service

	res     http1.Result
	refused *refusal
	err     error
	keep    bool // the connection may carry another call
	tunnel  bool // the connection was handed over
}

// reset makes the call ready for the next request on its connection.
func (x *call) reset() {
	x.res, x.refused, x.err, x.keep, x.tunnel = http1.Result{}, nil, nil, false, false
	x.grant, x.svc = authz.Grant{}, mesh.Service{}
	x.extra = x.extra[:0]
	x.ex.ToUp, x.ex.ToDown = http1.Edit{}, http1.Edit{}
}

// A refusal is an answer of our own instead of the upstream's. Its decision is
// the id of the audit record; refusals for other causes than policy have none.
type refusal struct {
	status   int
	reason   string // from a closed set, also the metric's flag
	decision string
	detail   string // for the caller; never tells about rules
}

// refuse answers the client. What was not allowed says only that, and the id.
func (x *call) refuse(r *refusal) {
	x.refused = r
	x.res.Status = r.status
	var head, body []byte
	if r.decision != "" {
		head = append(append(append(head, "Sallyport-Decision: "...), r.decision...), "\r\n"...)
		body = append(append(append(body, `{"error":"denied by policy","decision":"`...), r.decision...), "\"}\n"...)
	} else {
		body = append(append(append(body, `{"error":"`...), r.detail...), "\"}\n"...)
	}
	keep, err := x.down.WriteError(&x.req, r.status, head, body)
	x.keep = keep && err == nil && !x.ex.ToDown.Close
	x.err = errors.Join(x.err, err)
}

// status is what the client was told, 0 when nothing.
func (x *call) status() int {
	if x.refused == nil && !x.res.ResponseStarted {
		return 0
	}
	return x.res.Status
}

// traceOf continues the caller's trace, or begins one.
func (x *call) traceOf() {
	if t, ok := telemetry.ParseTraceparent(x.req.Get("traceparent")); ok {
		x.trace = t.Child()
	} else {
		x.trace = telemetry.NewTrace()
	}
	x.traceID = x.trace.String()
	x.extra = append(x.extra, "Traceparent: "...)
	x.extra = x.trace.AppendTraceparent(x.extra)
	x.extra = append(x.extra, '\r', '\n')
}

// dropped are the fields that only a proxy may set.
var dropped = http1.NewNameSet("sallyport-*", "x-forwarded-*", "forwarded", "x-real-ip", "x-envoy-*", "traceparent")

// exchange forwards the request over a connection that get lends. A kept
// connection that the upstream had closed in the meantime is replaced once,
// if nothing of the request can have been acted on.
func (x *call) exchange(get func(fresh bool) (*upstream.Conn, error)) *refusal {
	x.ex.Down, x.ex.Request = x.down, &x.req
	x.ex.ToUp.Drop, x.ex.ToUp.Extra = dropped, x.extra
	for fresh := false; ; fresh = true {
		up, err := get(fresh)
		if err != nil {
			x.err = err
			return &refusal{status: 503, reason: "no_endpoint", detail: "the service cannot be reached"}
		}
		x.ex.Up = up.Conn
		x.res, x.err = x.ex.Run()
		if x.err == nil {
			x.finish(up)
			return nil
		}
		stale := up.Reused && !x.res.ResponseSeen && x.res.Replayable && http1.FailedSide(x.err) == http1.Upstream
		up.Discard()
		if stale && !fresh && (x.res.RequestBytesSent == 0 || idempotent(x.req.Method)) {
			continue
		}
		if x.res.ResponseStarted {
			return nil // the answer is broken off; the client sees the connection end
		}
		status := http1.StatusOf(x.err)
		if status == 0 {
			return nil
		}
		if http1.FailedSide(x.err) == http1.Client {
			return &refusal{status: status, reason: "client", detail: "the request could not be read"}
		}
		return &refusal{status: status, reason: "upstream", detail: "the service did not answer properly"}
	}
}

func idempotent(method []byte) bool {
	switch string(method) {
	case "GET", "HEAD", "OPTIONS", "PUT", "DELETE":
		return true
	}
	return false
}

// finish gives the upstream connection back, or ties both together after an
// upgrade.
func (x *call) finish(up *upstream.Conn) {
	x.keep = x.res.DownstreamReusable
	switch {
	case x.res.Upgraded:
		x.tunnel, x.keep = true, false
		_, _, err := http1.Relay(x.down, up.Conn, x.relayIdle())
		x.err = err
		up.Discard()
	case x.res.UpstreamReusable:
		up.Put()
	default:
		up.Discard()
	}
}

// relayIdle ends an upgraded connection on which nothing moves.
func (x *call) relayIdle() time.Duration { return time.Hour }

// record writes the access record: the operator's view of one call. Decisions
// are in the audit log.
func (l *listener) record(x *call) {
	if !l.Log.Enabled(x.ctx, slog.LevelDebug) {
		return
	}
	attrs := []any{
		"src", x.src, "dst", x.dst, "method", string(x.req.Method), "path", x.req.PathText(), "status", x.status(),
		"ms", time.Since(x.start).Milliseconds(), "bytes_up", x.res.ReqBytes, "bytes_down", x.res.RespBytes,
		"trace_id", x.traceID,
	}
	if x.refused != nil {
		attrs = append(attrs, "refused", x.refused.reason, "decision_id", x.refused.decision)
	}
	if x.err != nil {
		attrs = append(attrs, "err", x.err.Error())
	}
	l.Log.Debug("call", attrs...)
}

// deny records a refusal that no judge has made. When it cannot be recorded
// the caller learns that nothing was decided.
func (l *listener) deny(r audit.Record) *refusal {
	r.Kind, r.Decision = audit.KindDecision, audit.Deny
	if err := l.Audit.Append(&r); err != nil {
		l.Log.Error("audit record lost", "err", err)
		return &refusal{status: 503, reason: "audit", detail: "the decision could not be recorded"}
	}
	return &refusal{status: 403, reason: r.Reason, decision: r.ID}
}

// unreadable answers a request that could not be read and says whether the
// client got an answer.
func (x *call) unreadable(err error) {
	status := http1.StatusOf(err)
	if status == 0 {
		return
	}
	reason := "the request head did not arrive in time"
	if p := (*http1.ProtocolError)(nil); errors.As(err, &p) {
		reason = p.Detail
	}
	if _, err := x.down.WriteError(nil, status, nil, []byte(`{"error":"`+reason+"\"}\n")); err == nil {
		_ = x.down.Linger()
	}
}

// outcome is how the call counts on the map of who calls whom.
func (x *call) outcome() telemetry.Outcome {
	switch {
	case x.refused != nil && x.refused.decision != "":
		return telemetry.Denied
	case x.err != nil || x.res.Status >= 500:
		return telemetry.Errored
	}
	return telemetry.Allowed
}
