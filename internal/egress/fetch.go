package egress

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/mesh"
)

// An asker is a connection of HTTP/1.1, or a stream that carries one, on which a
// caller asks for what hosts outside have.
type asker struct {
	hc    *http1.Conn
	who   *caller
	ex    http1.Exchange
	abort func() // breaks it off
	// rest notes that it waits for a request, and wake that one has come. Either is
	// false when the gateway has no time for it any more.
	rest, wake func() bool
	// in is the tunnel that the requests come in by, whose host they must name;
	// nil for a connection on which each says where it goes.
	in *tunnel
}

// A fetch is one request that the gateway asks a host in the caller's stead. It
// stands in the registry of tunnels while it lasts: to a change of the policy it
// is one.
type fetch struct {
	*tunnel
	g     *Gateway
	a     *asker
	ctx   context.Context
	req   *http1.Request
	snap  *mesh.Snapshot
	grant authz.Grant
	tries int
	trial
	status int    // that the host has answered
	secret string // the name of what is injected; empty: nothing is
	note   string // of the dial, or of what went wrong
	bare   bool   // it goes without an upgrade, which the destination allows

	mu        sync.Mutex // guards what follows
	over      *origin    // what the request is sent on
	answering bool       // the caller has a part of the answer
}

// inside answers the requests that come in a tunnel to a host that the gateway
// asks itself.
func (g *Gateway) inside(ctx context.Context, t *tunnel, s requestStream, a *asker) {
	open := g.cfg.Metrics.EgressTunnels(t.call.Src.String())
	open.Add(1)
	defer func() {
		t.end(ReasonDone, false)
		g.tunnels.remove(t)
		open.Add(-1)
		g.recordInside(t)
	}()
	if !t.setCaller(s) {
		return
	}
	life := time.AfterFunc(g.lim.Life, func() { t.stop(ReasonLife) })
	defer life.Stop()
	c := net.Conn(s)
	if t.how.TLS == mesh.Inspect {
		tc := g.standIn(ctx, t, c)
		if tc == nil {
			return
		}
		if tc.ConnectionState().NegotiatedProtocol == mesh.ALPNHTTP2 {
			g.insideHTTP2(ctx, t, tc)
			return
		}
		c = tc
	}
	a.hc, a.who, a.in = http1.NewConn(c, http1.Limits{}), t.who, t
	defer a.hc.Release()
	if !a.rest() {
		return
	}
	h2, err := a.hc.Begins(http2.Preface)
	if !a.wake() {
		return
	}
	if h2 && err == nil && t.how.TLS != mesh.Inspect { // whose TLS would say so
		g.insideHTTP2(ctx, t, &replay{c, a.hc.Unread()})
		return
	}
	var req http1.Request
	for a.rest() {
		err := a.hc.ReadRequest(&req)
		if !a.wake() {
			return
		}
		if ans := g.unread(a.who, &req, err); ans != nil {
			ans.write1(a.hc, &req, err)
			return
		}
		if err != nil || !g.ask(ctx, a, &req) {
			return
		}
	}
}

// A requestStream is the caller's side of a tunnel for requests.
type requestStream interface {
	net.Conn
	stream
}

// recordInside is the record of the end of a tunnel for requests. Their bytes are
// in their own.
func (g *Gateway) recordInside(t *tunnel) {
	rec := t.record(audit.KindEgressClose)
	rec.Reason, rec.Duration = string(t.why()), time.Since(t.start)
	rec.Detail, rec.Done = "for requests", true
	if err := g.cfg.Audit.Append(rec); err != nil {
		g.cfg.Log.Error("end of a tunnel was not recorded", "decision", t.id, "err", err)
	}
}

// ask answers one request, and says whether the connection may carry another.
func (g *Gateway) ask(ctx context.Context, a *asker, req *http1.Request) (keep bool) {
	if keep, told := g.tellInspection(a, req); told {
		return keep
	}
	began := time.Now()
	f, ans := g.fetch(ctx, a, req)
	defer func() { g.asked(a.who, began, f, ans) }()
	if ans == nil {
		defer g.tunnels.remove(f.tunnel)
		defer f.end(ReasonDone, false)
		// A caller that breaks it off ends it at the host too, whoever is waited for.
		defer context.AfterFunc(ctx, func() {
			if g.base.Err() == nil {
				f.broke(true)
			}
		})()
		keep, ans = f.run()
		if a.in != nil {
			a.in.down.Add(f.down.Load())
		}
		if ans == nil {
			if !keep {
				_ = a.hc.Linger() // what was broken off is closed already
			}
			return keep
		}
	}
	if g.yields() || a.who.disproved.Load() {
		req.KeepAlive = false
	}
	return ans.write1(a.hc, req, nil)
}

// fetch judges a request. What it returns is in the registry.
func (g *Gateway) fetch(ctx context.Context, a *asker, req *http1.Request) (_ *fetch, ans *answer) {
	verb := req.Verb()
	host, port, err := a.target(req)
	if err != nil {
		return nil, g.denyRequest(a.who, verbOf(verb), err)
	}
	t := &tunnel{who: a.who, host: host, origin: originOf(string(req.Get(originHeader))), call: authz.Call{
		Dir: mesh.Out, Src: a.who.id, Dst: "host:" + host.String(), Port: port,
		Verb: verb, Path: strings.Clone(req.PathText()), Peer: a.who.peer,
	}}
	if t.spans = g.traceOf(req.Get("traceparent")); a.in != nil {
		t.origin = a.in.origin
		if in := &a.in.spans; t.spans.parent == [8]byte{} && in.trace.ID != [16]byte{} {
			t.spans.trace, t.spans.parent = in.trace.Child(), in.trace.Span
		}
	}
	t.call.Trace = t.spans.trace.String()
	defer func() {
		if ans != nil {
			g.tapped(t, 0, ans, 0, req)
		}
	}()
	snap, ans, howErr := g.prepare(t)
	if ans != nil {
		return nil, ans
	}
	t.call.Port = t.how.PortOf(port)
	t.within = a.in != nil
	f := &fetch{tunnel: t, g: g, a: a, req: req, snap: snap}
	if verb == http.MethodTrace {
		return nil, g.deny(t.record(audit.KindDecision), refuse(ReasonMethod, "TRACE is not passed on: it would show what is added on the way"))
	}
	if f.grant, err = g.cfg.Judge.Judge(&t.call); err != nil {
		return nil, g.denied(t, err)
	}
	t.id, t.rule = f.grant.ID(), f.grant.Rule()
	if howErr == nil && (!asksHTTP(t.how) || t.how.TLS == mesh.Inspect && a.in == nil) {
		howErr = refuse(ReasonMethod, "%s is reached by CONNECT: its destination says neither proto: http nor tls: originate", host)
	}
	if howErr == nil && a.in != nil && t.how.TLS != a.in.how.TLS {
		howErr = refuse(ReasonRevoked, "the policy changed since the tunnel to %s was opened: connect again", host)
	}
	if howErr == nil && speaksGRPC(req) {
		howErr = overHTTP2(&t.how)
	}
	if howErr != nil {
		return nil, g.deny(t.record(audit.KindDecision), howErr)
	}
	f.start = time.Now()
	ctx, cancel := context.WithCancel(ctx)
	f.ctx, t.cancel = ctx, func() { cancel(); f.cut() }
	if err := g.tunnels.add(t); err != nil {
		cancel()
		return nil, g.deny(t.record(audit.KindDecision), err)
	}
	return f, nil
}

// target finds where a request goes.
func (a *asker) target(req *http1.Request) (Host, uint16, error) {
	usual := uint16(80)
	if a.in != nil {
		usual = a.in.asked
	}
	authority := string(req.Authority)
	switch {
	case req.Form == http1.Authority:
		return Host{}, 0, refuse(ReasonMethod, "CONNECT came inside a tunnel; target %s", clip(string(req.Target)))
	case string(req.Path) == "*":
		return Host{}, 0, refuse(ReasonRequest, "OPTIONS for the server as a whole is not passed on")
	case req.Scheme == "https":
		return Host{}, 0, refuse(ReasonRequest, "https is reached by CONNECT; target %s", clip(string(req.Target)))
	case authority == "":
		return Host{}, 0, refuse(ReasonRequest, "the request names no host")
	case strings.HasSuffix(authority, "]") || strings.IndexByte(authority, ':') < 0:
		authority = fmt.Sprintf("%s:%d", authority, usual)
	}
	host, port, err := ParseAuthority(authority)
	if err == nil && a.in != nil && (host != a.in.host || port != a.in.asked) {
		err = refuse(ReasonMisdirected, "a request for %s came in a tunnel to %s port %d", clip(authority), a.in.host, a.in.asked)
	}
	return host, port, err
}

// cut breaks off what is under way.
func (f *fetch) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over != nil {
		f.over.cut()
	}
	if f.answering {
		f.a.abort()
	}
}

// goes says what the request is sent on, nil for nothing any more. It is false when
// the request has been stopped.
func (f *fetch) goes(o *origin) bool {
	f.mu.Lock()
	f.over, f.answering = o, f.answering && o != nil
	f.mu.Unlock()
	return f.why() == ""
}

// answers notes that the answer goes to the caller from now on. It is false when
// the request has been stopped.
func (f *fetch) answers() bool {
	f.mu.Lock()
	f.answering = true
	f.mu.Unlock()
	return f.why() == ""
}

// run sends the request on, and the answer back; or says what to answer.
func (f *fetch) run() (keep bool, ans *answer) {
	life := time.AfterFunc(f.g.lim.Life, func() { f.stop(ReasonLife) })
	defer life.Stop()
	if err := f.a.hc.Prefetch(f.req); err != nil {
		return f.failed(&http1.SideError{Side: http1.Client, Op: "read", Err: err}, http1.Result{})
	}
	if err := f.g.rejudge(f.tunnel); err != nil { // the policy may have changed before the registry knew
		return false, f.g.deny(f.record(audit.KindDecision), err)
	}
	f.edit()
	if err := f.inject(); err != nil {
		return false, f.unlent(err)
	}
	if err := f.upgrade(); err != nil {
		return false, f.unlent(err)
	}
	stop := f.bounded()
	defer stop()
	for {
		res, err := f.try()
		var ref *Refusal
		switch {
		case errors.As(err, &ref):
			return false, f.unlent(err)
		case res.Upgraded && err == nil:
			stop()
			f.carry(f.lent)
			return false, nil
		case err == nil:
			f.recordEnd(cmp.Or(f.why(), ReasonDone))
			return res.DownstreamReusable, nil
		case f.why() != "" || !f.again(err, res):
			return f.failed(err, res)
		}
	}
}

var errStopped = errors.New("the request was stopped")

func idempotent(method []byte) bool {
	switch string(method) {
	case "GET", "HEAD", "OPTIONS", "PUT", "DELETE":
		return true
	}
	return false
}

// The fields that do not leave the mesh: what only proxies say, what is meant for
// a proxy, and what would have the host take a method, a path or a host for another
// than was judged.
// Of an answer, nothing may name another way to the host than the one that is
// judged.
var (
	notOut = http1.NewNameSet("sallyport-*", "x-forwarded-*", "forwarded", "x-real-ip", "x-envoy-*", "egress-*", "proxy-*", "traceparent", "tracestate", "x-request-id",
		"x-http-method-override", "x-http-method", "x-method-override", "alt-used",
		"x-original-url", "x-original-uri", "x-original-host", "x-rewrite-url", "x-http-path-override", "x-http-host-override", "x-host")
	notIn    = http1.NewNameSet("sallyport-*", "alt-svc", "proxy-*")
	location = http1.NewNameSet("location")
)

// edit says how the two heads change.
func (f *fetch) edit() {
	x := &f.a.ex
	x.Down, x.Request, x.Idle, x.Timeout = f.a.hc, f.req, f.how.Timeouts.Idle, 0
	x.Scrub, x.Tee = nil, nil
	if speaksGRPC(f.req) {
		x.Timeout = firstMessage
	}
	if f.spend != nil {
		x.Tee = meter{f}
	}
	x.ToUp = http1.Edit{Drop: notOut, Authority: []byte(authorityOf(f.host, f.call.Port, f.how))}
	x.ToDown = http1.Edit{Drop: notIn, Close: f.g.yields() || f.who.disproved.Load()}
	x.Accept = func(resp *http1.Response) bool {
		if f.drops(resp) || !f.scrub(resp) || resp.Upgrade && !f.becomes(resp) {
			return false
		}
		f.redirect(resp)
		return f.answers()
	}
}

// A meter takes what a request moves out of a budget, and stops the request when
// that is used up.
type meter struct{ f *fetch }

// Again, Sent, Hinted and Answered are those of a Tee.
func (m meter) Again()            {}
func (m meter) Sent(b []byte)     { m.take(true, len(b)) }
func (m meter) Hinted(b []byte)   { m.take(false, len(b)) }
func (m meter) Answered(b []byte) { m.take(false, len(b)) }

func (m meter) take(up bool, n int) {
	if ref := m.f.spend(up, n); ref != nil {
		m.f.stop(ref.Reason)
	}
}

// authorityOf is how the host itself is told who it is: without the port that its
// scheme has.
func authorityOf(h Host, port uint16, how mesh.Destination) string {
	usual := uint16(80)
	if how.TLS != "" {
		usual = 443
	}
	name := h.String()
	if strings.IndexByte(name, ':') >= 0 {
		name = "[" + name + "]"
	}
	if port == usual {
		return name
	}
	return fmt.Sprintf("%s:%d", name, port)
}

// unlent answers a request that got no connection. One of which an earlier try has
// gone out was not denied: its record says what it came to.
func (f *fetch) unlent(err error) *answer {
	reason := f.why()
	if reason == "" {
		reason = reasonOf(err)
	} else {
		err = errEnded(reason)
	}
	f.stop(reason)
	if f.tries > 0 {
		f.note = strings.TrimSpace(f.note + " " + clip(f.plain(err.Error())))
		f.recordEnd(reason)
		f.req.KeepAlive = false
		return answerTo(reason, f.id)
	}
	return f.g.deny(f.record(audit.KindDecision), refuse(reason, "%s", f.plain(err.Error())))
}

// errEnded is the refusal of what was stopped before it had begun.
func errEnded(reason Reason) *Refusal {
	switch reason {
	case ReasonRevoked:
		return refuse(reason, "the policy changed while the host was connected to")
	case ReasonSVIDRevoked, ReasonSVIDEnded, ReasonIdentity:
		return errIdentity(reason)
	case ReasonShutdown:
		return refuse(reason, "the gateway is stopping")
	}
	return refuse(reason, "it was ended while the host was connected to")
}

// failed answers a request that came to nothing, or breaks the answer off.
func (f *fetch) failed(err error, res http1.Result) (keep bool, ans *answer) {
	reason := cmp.Or(f.why(), ReasonReset)
	if reason == ReasonReset && f.late {
		reason = ReasonTimeout
	}
	f.note = strings.TrimSpace(f.note + " " + clip(f.plain(err.Error())))
	f.recordEnd(reason)
	if res.ResponseStarted {
		f.a.abort()
		return false, nil
	}
	if reason != ReasonReset {
		ans = answerTo(reason, f.id)
	} else if ans = (&answer{status: http1.StatusOf(err), id: f.id, text: "the destination did not answer properly"}); errors.Is(err, http1.ErrNotAccepted) {
		ans.status = http.StatusBadGateway
	} else if ans.status == 0 {
		f.a.abort()
		return false, nil
	}
	if http1.FailedSide(err) == http1.Client {
		ans.text = "the request could not be read"
	}
	f.req.KeepAlive = false
	return false, ans
}

// recordEnd is the record of what the request came to, also when that is nothing.
func (f *fetch) recordEnd(reason Reason) {
	up, down := f.g.cfg.Metrics.EgressBytes(f.call.Src.String(), f.how.Host)
	up.Add(f.up.Load())
	down.Add(f.down.Load())
	rec := f.record(audit.KindEgressClose)
	rec.Reason = string(reason)
	rec.BytesUp, rec.BytesDown, rec.Duration = f.up.Load(), f.down.Load(), time.Since(f.start)
	rec.Detail = f.plain(strings.TrimSpace(fmt.Sprintf("status %d to %s%s %s", f.status, f.to, f.origin, f.note)))
	if f.bare {
		rec.Detail += ", no WebSocket since it has a credential"
	}
	if f.tries > 1 {
		rec.Detail += fmt.Sprintf(", %d tries", f.tries)
	}
	rec.Done = true
	if err := f.g.cfg.Audit.Append(rec); err != nil {
		f.g.cfg.Log.Error("end of a request was not recorded", "decision", f.id, "err", err)
	}
}

// judged gives a connection out if the request may lead where that does.
func (f *fetch) judged(o *origin) (*origin, error) {
	f.leads(o.to)
	if err := f.g.rejudge(f.tunnel); err != nil { // now that Rejudge can see where it leads
		o.discard()
		return nil, err
	}
	return o, nil
}

// leads notes where the request goes.
func (f *fetch) leads(to place) {
	f.relay.mu.Lock()
	defer f.relay.mu.Unlock()
	f.to = to
}
