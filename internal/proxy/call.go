package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/hop"
	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/mesh"
	"sallyport/internal/route"
	"sallyport/internal/shadow"
	"sallyport/internal/telemetry"
	"sallyport/internal/translate"
	"sallyport/internal/upstream"
)

// A call is one request on its way through a chain. A connection has one call
// and uses it again for each request.
type call struct {
	ctx  context.Context
	on   *listener
	conn *conn
	down *http1.Conn
	req  http1.Request
	ex   http1.Exchange
	// lend gives a connection to where the call goes.
	lend func(x *call, fresh bool) (*upstream.Conn, error)
	// accept, when set, sees the answer before any of it is passed on.
	accept func(x *call) bool
	tries  tries

	// src and dst are the two ends as they stand in records and metrics.
	src, dst string
	remote   string

	start time.Time
	trace telemetry.Trace
	tracing
	// traceID is trace as records and logs have it, once somebody asked; names
	// is where such texts are made.
	traceID string
	names   strings.Builder
	// unread counts what is no request; series counts the call, running the
	// one that has seen it begin.
	unread, series, running *telemetry.Series
	extra                   []byte // field lines for the upstream, ended by CRLF each

	// Inbound: the caller, what the request shows beside its SVID and what that
	// says, once verified, and the judge's slice.
	who    *peer
	shown  authz.Credential
	token  *authz.Token
	placed bool    // it counts as in flight
	of     *member // it counts as in flight of this peer
	epoch  uint64  // of the Rejudge that has seen it
	// standing, when set, refuses a call that a Rejudge has overtaken.
	standing func() *refusal
	port     uint16 // of the rules
	judge    *authz.Conn
	judged   authz.Call
	grant    authz.Grant
	intro    introduction
	// face is the method that the call means, if translated says that the policy
	// has methods.
	face       translate.Face
	translated bool
	bounds     []bound // of how often the caller may call
	host       ownHost

	// Outbound: what the local process is, and the service meant. Every request is for only, if that is set; meant is where
	// the connection was going to, if rules of the kernel brought it here.
	process  *process
	to       *target
	known    target // what the authority of the connection meant the last time
	routed   target // where a route has led the call
	look     route.Call
	claims   claims
	claimer  func(name string) string // what the routes ask for claims, made once
	fromAddr netip.Addr
	pathBuf  []byte
	lines    []byte // of the answer
	only     mesh.ServiceName
	meant    netip.AddrPort

	// up is what is lent to the call until it gives it back, way the chain that it
	// goes through. A call that is settled has been through it.
	up      *upstream.Conn
	way     chain
	settled bool
	settler func(http1.Result) // settle, made once

	res     http1.Result
	grpc    string // status of gRPC that the client was told, empty for other calls
	refused *refusal
	err     error
	keep    bool // the connection may carry another call
	tunnel  bool // the connection was handed over
	opaque  bool // nobody speaks HTTP on it
	socks   bool // it was asked for in SOCKS, which the answer speaks too
	// idle is how long nothing may move on a tunnel, 0 for relayIdle.
	idle   time.Duration
	broken bool // the client must see that the answer is not whole
	// marked says that it is done for a shadow, proven that somebody has said so
	// who may; copied is the copy that shadows get of it.
	marked bool
	proven bool
	// traced says that the trace is believed until the call ends.
	traced bool
	copied *shadow.Copy
}

// reset makes the call ready for the next request on its connection.
func (x *call) reset() {
	x.res, x.refused, x.err, x.grpc = http1.Result{}, nil, nil, ""
	x.keep, x.tunnel, x.broken, x.settled = false, false, false, false
	x.idle, x.marked, x.proven, x.traced = 0, false, false, false
	x.grant = authz.Grant{}
	x.face, x.translated, x.claims = translate.Face{}, false, claims{}
	x.extra = x.extra[:0]
	x.ex.ToUp, x.ex.ToDown = http1.Edit{}, http1.Edit{}
	x.tries.n, x.tries.dropped = 0, false
	x.tries.plan, x.tries.fault, x.tries.until, x.ex.Idle = nil, nil, time.Time{}, 0
	x.lines = x.lines[:0]
}

// panicked ends a call in which something was not as the code believes.
func (x *call) panicked(p any) {
	x.on.panicked(p)
	x.err = errors.New("panic")
	x.keep, x.broken = false, true
	x.tries.cut.disarm()
	x.conn.sever()
	if up := x.up; up != nil {
		x.up = nil
		up.Abandon()
	}
}

// A refusal is an answer of our own instead of the upstream's. Its decision is
// the id of the audit record; refusals for other causes than policy have none.
type refusal struct {
	status   int
	reason   string // from a closed set, also the metric's flag
	decision string
	detail   string // for the caller; never tells about rules
	told     string // the same, also beside a decision
	head     string // a further field line
	// own says that the answer is what a route wants, with body, which head says
	// all of.
	own  bool
	body string
}

// refuse answers the client. What was not allowed says only that, and the id.
func (x *call) refuse(r *refusal) {
	x.refused = r
	x.res.Status = r.status
	x.vacate()
	if x.opaque {
		return
	}
	if x.socks {
		x.answerSOCKS(r.status)
		return
	}
	if r.own {
		x.answerOwn(r)
		return
	}
	head := []byte(r.head)
	if r.decision != "" {
		head = append(append(append(head, "Sallyport-Decision: "...), r.decision...), "\r\n"...)
	} else {
		head = append(append(append(head, "Sallyport-Refused: "...), r.reason...), "\r\n"...)
	}
	detail := r.detail
	if r.told != "" {
		detail = r.told
	} else if r.decision != "" {
		detail = deniedDetail
	}
	switch {
	case x.speaksGRPC():
		x.grpc = grpcText(http1.GRPCStatus(r.status))
		x.answer(http.StatusOK, http1.AppendGRPC(head, "application/grpc", r.status, detail), nil)
	case x.face.Web: // its clients read the status of HTTP too, and others would take 200 for a yes
		x.answer(r.status, http1.AppendGRPC(head, "application/grpc-web+proto", r.status, detail), nil)
	case x.face.REST:
		x.answer(r.status, head, translate.Refusal(http1.GRPCStatus(r.status), detail, r.reason, r.decision))
	default:
		x.answer(r.status, head, refusalBody(detail, r.decision))
	}
}

// answer writes an answer of our own. The client learns whether the connection
// goes on.
func (x *call) answer(status int, head, body []byte) {
	if x.ex.ToDown.Close {
		x.req.KeepAlive = false
	}
	var keep bool
	var err error
	if body == nil {
		keep, err = x.down.WriteRefusal(&x.req, status, head)
	} else {
		keep, err = x.down.WriteError(&x.req, status, head, body)
	}
	x.keep = keep && err == nil
	x.err = errors.Join(x.err, err)
}

// answerOwn writes what a route answers in the service's place.
func (x *call) answerOwn(r *refusal) {
	if x.ex.ToDown.Close {
		x.req.KeepAlive = false
	}
	head := append([]byte(r.head), x.lines...)
	var keep bool
	var err error
	if x.speaksGRPC() {
		keep, err = x.down.WriteRefusal(&x.req, http.StatusOK, http1.AppendGRPC(head, "application/grpc", r.status, r.detail))
	} else {
		keep, err = x.down.WriteAnswer(&x.req, r.status, head, []byte(r.body))
	}
	x.keep = keep && err == nil
	x.err = errors.Join(x.err, err)
}

// deniedDetail is all that the caller is told of a rule.
const deniedDetail = "denied by policy"

// errorBody is the JSON of a refusal.
func errorBody(detail, decision string) []byte {
	if decision != "" {
		detail = deniedDetail
	}
	return refusalBody(detail, decision)
}

func refusalBody(detail, decision string) []byte {
	b, err := json.Marshal(struct {
		Error    string `json:"error"`
		Decision string `json:"decision,omitempty"`
	}{detail, decision})
	if err != nil { // two strings always have a form
		return []byte("{}\n")
	}
	return append(b, '\n')
}

// proto is what the call counts as.
func (x *call) proto() string {
	if x.opaque {
		return telemetry.ProtoTCP
	}
	return telemetry.ProtoHTTP
}

// status is what the client was told, 0 when nothing.
func (x *call) status() int {
	if x.refused == nil && !x.res.ResponseStarted {
		return 0
	}
	if lane, ok := x.conn.Conn.(*http2.Lane); ok && lane.Turned() != 0 {
		return lane.Turned()
	}
	return x.res.Status
}

// traceText is the trace as records and logs have it. The texts of 32 calls
// share one allocation, once a connection has had some.
func (x *call) traceText() string {
	if x.traceID == "" {
		var id [2 * len(x.trace.ID)]byte
		if x.names.Cap()-x.names.Len() < len(id) {
			size := min(max(2*x.names.Cap(), len(id)), 32*len(id))
			x.names.Reset()
			x.names.Grow(size)
		}
		start := x.names.Len()
		x.names.Write(x.trace.AppendID(id[:0]))
		x.traceID = x.names.String()[start:]
	}
	return x.traceID
}

// The fields that only a proxy may set: dropped from what goes to an upstream,
// whether spelled with '-' or '_', and mine from what an application answers.
var (
	reserved = []string{"sallyport-*", "x-forwarded-*", "forwarded", "x-real-ip", "x-envoy-*", "traceparent", "x-request-id",
		"b3", "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags"}
	dropped          = http1.NewNameSet(reserved...)
	droppedWithState = http1.NewNameSet(append([]string{"tracestate"}, reserved...)...)
	// The same for a call that has a deadline of ours.
	droppedTimed          = http1.NewNameSet(append([]string{"grpc-timeout"}, reserved...)...)
	droppedWithStateTimed = http1.NewNameSet(append([]string{"tracestate", "grpc-timeout"}, reserved...)...)
	mine                  = http1.NewNameSet("sallyport-*")
)

// ready waits for what must be there before a connection is borrowed: a client
// that is slow to send holds none. A body up to keep bytes is waited for whole.
func (x *call) ready(keep int64) *refusal {
	var err error
	if keep > 0 {
		err = x.down.Hold(&x.req, keep)
	} else {
		err = x.down.Prefetch(&x.req)
	}
	if err != nil {
		return x.failed(&http1.SideError{Side: http1.Client, Op: "read", Err: err})
	}
	x.ex.Down, x.ex.Request, x.ex.ToUp.Extra = x.down, &x.req, x.extra
	x.ex.Timeout = 0
	if x.face.Translated || x.speaksGRPC() {
		x.ex.Timeout = x.on.firstMessage()
	}
	return nil
}

// exchange forwards the request over a connection that is lent. A kept
// connection that the upstream had closed in the meantime is replaced once,
// if nothing of the request can have been acted on, or if acting on it twice
// is the same as once (RFC 9110 section 9.2.2).
func (x *call) exchange() *refusal {
	if r := x.ready(0); r != nil {
		return r
	}
	unseen := 0
	for fresh := false; ; fresh = true {
		up, err := x.lend(x, fresh)
		if err != nil {
			x.err = err
			return noEndpoint()
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
			if !fresh {
				continue // the next handshake says why
			}
			return noEndpoint()
		}
		if r := x.again(); r != nil {
			x.unbind()
			x.up = nil
			up.Put()
			return r
		}
		x.run(up.NetConn(), x.tries.until)
		if x.err == nil {
			x.saidGRPC()
			x.finish(up)
			return nil
		}
		again := x.unanswered()
		if isRefused(x.err) || x.res.RequestBytesSent == 0 {
			unseen++
			again = again && unseen <= maxUnseen
		} else {
			again = again && up.Reused && !fresh
		}
		x.discard()
		if !again {
			return x.gaveUp()
		}
	}
}

// maxUnseen is how often a call may come to nothing that no peer has acted on.
// One that drains refuses what crossed with its word, and once more what was sent
// on a connection that was being made; an SVID that is renewed at that moment
// ends the connection that the next attempt has found.
const maxUnseen = 4

// unanswered says that the failed exchange may be done again on another
// connection: the upstream has said nothing, it did not merely take too long,
// and it has not acted on the request, as it says itself or as can be told, or
// may twice.
func (x *call) unanswered() bool {
	return !x.res.ResponseSeen && x.res.Replayable &&
		http1.FailedSide(x.err) == http1.Upstream && http1.StatusOf(x.err) != 504 &&
		(x.res.RequestBytesSent == 0 || idempotent(x.req.Method) || isRefused(x.err))
}

// isRefused says that the upstream has acted on nothing of the request.
func isRefused(err error) bool {
	return errors.Is(err, hop.ErrRefused) || errors.Is(err, http2.ErrRefused)
}

// failed says how to answer an exchange that came to nothing.
func (x *call) failed(err error) *refusal {
	x.err = err
	if http1.FailedSide(err) == http1.Client {
		x.on.Metrics.RequestsRefused(x.on.Reporter, unreadReason(err)).Inc()
	}
	if x.res.ResponseStarted {
		x.broken = true
		return nil
	}
	status := http1.StatusOf(err)
	if status == 0 {
		x.broken = true
		return nil
	}
	if http1.FailedSide(err) == http1.Client {
		x.ex.ToDown.Close = true // where the next request begins is not known
		r := &refusal{status: status, reason: "client", detail: "the request could not be read"}
		if p := (*http1.ProtocolError)(nil); errors.As(err, &p) {
			r.detail = p.Detail
		}
		return r
	}
	r := &refusal{status: status, reason: "upstream", detail: "the service did not answer properly"}
	if isMalformed(err) {
		r.reason = malformed
	}
	return r
}

// malformed is the reason of a refusal in place of an answer that breaks the
// rules of its protocol. A further try would most likely bring the same.
const malformed = "malformed"

// isMalformed says that an upstream has answered such.
func isMalformed(err error) bool {
	p := (*http1.ProtocolError)(nil)
	return http1.FailedSide(err) == http1.Upstream && errors.As(err, &p)
}

func idempotent(method []byte) bool {
	switch string(method) {
	case "GET", "HEAD", "OPTIONS", "PUT", "DELETE":
		return true
	}
	return false
}

// relayIdle ends an upgraded connection or a tunnel on which nothing moves.
const relayIdle = time.Hour

// finish gives the upstream connection back, or ties both together after an
// upgrade.
func (x *call) finish(up *upstream.Conn) {
	x.keep = x.res.DownstreamReusable
	switch {
	case x.res.Upgraded:
		up.Lasts()
		x.relay(up)
		x.discard()
	case x.res.UpstreamReusable:
		x.up = nil
		up.Put()
	default:
		x.discard()
	}
}

// discard ends what is lent to the call.
func (x *call) discard() {
	up := x.up
	x.up = nil
	up.Discard()
}

// settle ends a call whose answer has gone to the client from the goroutine that
// reads what many calls share: nothing here waits. The goroutine of the call is
// waiting for the next one.
func (x *call) settle(res http1.Result) {
	x.res = res
	x.tries.cut.disarm()
	x.unbind()
	x.cameBack()
	o := x.outcomeOf()
	x.sample(o, x.tries.began)
	x.up.Report(o, x.tries.began, x.tries.after)
	x.saidGRPC()
	x.finish(x.up)
	x.way[:len(x.way)-1].leave(x)
	x.settled = true
	x.conn.rest()
}

// relay ties both connections together until they end.
func (x *call) relay(up *upstream.Conn) {
	x.tunnel, x.keep = true, false
	stop, ok := x.lasting(up)
	if !ok {
		return
	}
	defer stop()
	t := http1.NewTunnel(x.down, up.Conn, x.relayWithin())
	t.WebSocket = x.res.Upgraded && is(x.req.Get("upgrade"), "websocket") && is(x.ex.Response.Get("upgrade"), "websocket")
	x.conn.leads(t)
	sent, got, err := t.Run()
	x.unbind()
	x.res.ReqBytes += sent
	x.res.RespBytes += got
	x.err = err
}

// record writes the access record: the operator's view of one call. Decisions
// are in the audit log.
func (l *listener) record(x *call) {
	x.tapped(l.Taps)
	if !l.Log.Enabled(x.ctx, slog.LevelDebug) {
		return
	}
	attrs := []any{
		"src", x.src, "dst", x.dst, "method", x.verb(), "path", x.path(), "status", x.status(),
		"ms", time.Since(x.start).Milliseconds(), "bytes_up", x.res.ReqBytes, "bytes_down", x.res.RespBytes,
		"trace_id", x.traceText(),
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
	if err := l.Audit.Append(&r); err != nil || r.ID == "" {
		l.Log.Error("audit record lost", "err", err)
		return unrecorded(r.ID)
	}
	return &refusal{status: 403, reason: r.Reason, decision: r.ID}
}

// unrecorded is the refusal of what could not be written down: it does not
// happen. The id is that of the refusal, if it has one.
func unrecorded(id string) *refusal {
	return &refusal{status: 503, reason: "audit", detail: "the decision could not be recorded", decision: id}
}
