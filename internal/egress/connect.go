package egress

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
	"sallyport/internal/upstream"
)

// An answer is what a caller gets instead of a tunnel.
type answer struct {
	status int
	id     string // of the decision; empty when none could be recorded
	text   string
	reason Reason
}

// body is the JSON of an answer. Its text and id need no escape.
func (a *answer) body() []byte {
	return []byte(`{"error":"` + a.text + `","decision":"` + a.id + `"}` + "\n")
}

// decisionHeader names the decision in every refusal.
const decisionHeader = "Sallyport-Decision"

func answerTo(reason Reason, id string) *answer {
	a := &answer{status: http.StatusForbidden, id: id, text: "denied by policy", reason: cmp.Or(reason, ReasonPolicy)}
	switch reason {
	case ReasonName, ReasonRequest:
		a.status, a.text = http.StatusBadRequest, "the request is not acceptable; CONNECT host:port is"
	case ReasonMethod:
		a.status, a.text = http.StatusMethodNotAllowed, "only CONNECT is served here"
	case ReasonMisdirected:
		a.status, a.text = http.StatusMisdirectedRequest, "the tunnel leads to another host"
	case ReasonALPN:
		a.status, a.text = http.StatusNotImplemented, "the destination is not asked over HTTP/2"
	case ReasonBudget:
		a.status, a.text = http.StatusTooManyRequests, "the budget for this destination is used up"
	case ReasonTunnelCap:
		a.status, a.text = http.StatusTooManyRequests, "too many tunnels are open"
	case ReasonProbeCap:
		a.status, a.text = http.StatusTooManyRequests, "too many hosts are being looked at"
	case ReasonResolve, ReasonDial, ReasonCertificate:
		a.status, a.text = http.StatusBadGateway, "the destination cannot be reached"
	case ReasonTimeout:
		a.status, a.text = http.StatusGatewayTimeout, "the destination did not answer in time"
	case ReasonBreaker:
		a.status, a.text = http.StatusServiceUnavailable, "the destination keeps failing and is left alone for a while"
	case ReasonSecret:
		a.status, a.text = http.StatusServiceUnavailable, "the credential for the destination is missing"
	case ReasonAudit, ReasonShutdown:
		a.status, a.text = http.StatusServiceUnavailable, "the decision could not be recorded"
	}
	if reason == ReasonShutdown {
		a.text = "the gateway is stopping"
	}
	return a
}

// reasonOf is the Reason of a refusal; what is not one is a failed dial.
func reasonOf(err error) Reason {
	var ref *Refusal
	if errors.As(err, &ref) {
		return ref.Reason
	}
	return ReasonDial
}

// deny records a refusal of the gateway's own, and gives the answer to it.
func (g *Gateway) deny(rec *audit.Record, err error) *answer {
	g.edge(rec.Src, rec.Dst, telemetry.Denied)
	reason := reasonOf(err)
	rec.Decision, rec.Reason, rec.Detail = audit.Deny, string(reason), err.Error()
	if aerr := g.cfg.Audit.Append(rec); aerr != nil {
		g.cfg.Log.Error("refusal was not recorded", "err", aerr)
		return answerTo(ReasonAudit, rec.ID)
	}
	return answerTo(reason, rec.ID)
}

// edge counts a tunnel, or what was refused to be one, for the map. A caller may
// ask for any host: what is refused counts for the destination that covers it.
func (g *Gateway) edge(src, dst string, o telemetry.Outcome) {
	if host, out := strings.CutPrefix(dst, "host:"); out && o == telemetry.Denied {
		dst = telemetry.OtherHost
		if s := g.cfg.Snapshot(); s != nil {
			if d, listed := s.DestinationOf(host); listed {
				dst = "host:" + d.Host
			}
		}
	}
	if dst != "" {
		g.cfg.Edges.Add(src, dst, telemetry.ProtoTCP, o, true, time.Now(), telemetry.NoTime)
	}
}

// denyRequest refuses what is not a CONNECT to judge.
func (g *Gateway) denyRequest(who *caller, verb string, err error) *answer {
	ans := g.deny(&audit.Record{
		Kind: audit.KindDecision, Dir: string(mesh.Out), Src: who.id.String(), Verb: verb, Peer: who.peer,
	}, err)
	g.tappedUnread(who, verb, ans)
	return ans
}

// originHeader is where a sidecar says how its workload came to the destination.
const originHeader = "Egress-Origin"

// originOf is what the record says of it. It decides nothing: a caller may write
// what it likes.
func originOf(said string) string {
	switch said {
	case "explicit", "vip", "orig-dst":
		return " origin=" + said
	}
	return ""
}

// open judges one CONNECT and dials. It returns a tunnel whose destination is
// connected and whose open record is written, or the answer that refuses it.
// The tunnel must then be carried.
func (g *Gateway) open(ctx context.Context, who *caller, authority, origin string, tr spans) (_ *tunnel, ans *answer) {
	host, port, err := ParseAuthority(authority)
	if err != nil {
		return nil, g.denyRequest(who, http.MethodConnect, err)
	}
	t := &tunnel{who: who, host: host, origin: originOf(origin), call: authz.Call{
		Dir: mesh.Out, Src: who.id, Dst: "host:" + host.String(), Port: port,
		Verb: http.MethodConnect, Path: "-", Peer: who.peer, Trace: tr.trace.String(),
	}, spans: tr}
	defer func() {
		if g.told(t, ans); ans != nil {
			g.tapped(t, 0, ans, 0, nil)
		}
	}()
	_, ans, howErr := g.prepare(t)
	if ans != nil {
		return nil, ans
	}
	if asksHTTP(t.how) {
		return g.openRequests(t, howErr)
	}
	began := time.Now()
	grant, err := g.cfg.Judge.Judge(&t.call)
	t.spans.did("policy", telemetry.Internal, began, err)
	if err != nil {
		return nil, g.denied(t, err)
	}
	t.id, t.rule = grant.ID(), grant.Rule()
	if howErr != nil {
		return nil, g.deny(t.record(audit.KindDecision), howErr)
	}
	ctx, t.cancel = context.WithCancel(ctx)
	t.idle, t.life = g.idleOf(&t.how), g.lim.Life
	t.panicked = func(p any) {
		g.logPanic(p)
		t.stop(ReasonInternal)
	}
	if err := g.tunnels.add(t); err != nil {
		t.cancel()
		return nil, g.deny(t.record(audit.KindDecision), err)
	}
	kept := false
	defer func() {
		if !kept {
			t.stop(ReasonInternal)
			g.tunnels.remove(t)
		}
	}()
	if err := g.dial(ctx, t, grant); err != nil {
		reason := reasonOf(err)
		if t.stop(reason); reason == ReasonAudit {
			return nil, answerTo(reason, t.id) // the log has counted it; it would count this again
		}
		return nil, g.deny(t.record(audit.KindDecision), err)
	}
	kept = true
	return t, nil
}

// prepare looks at what must hold before t is judged, and finds how its host is
// reached. When it cannot be, howErr is for after the judgement.
func (g *Gateway) prepare(t *tunnel) (s *mesh.Snapshot, ans *answer, howErr error) {
	if ans := g.proves(t); ans != nil {
		return nil, ans, nil
	}
	s = g.cfg.Snapshot()
	if s == nil || g.cfg.Judge.Set() == nil {
		return nil, g.deny(t.record(audit.KindDecision), refuse(ReasonNoPolicy, "no policy is loaded")), nil
	}
	t.revision = s.PolicyRevision
	t.how, howErr = routeOf(s, t.host)
	if _, literal := t.host.Addr(); !literal && (t.how.Proto == mesh.ProtoTLS || t.how.TLS != "") {
		t.call.SNI = t.host.String() // what the first bytes must then say, or the gateway says
	}
	t.sni = t.call.SNI
	return s, nil, howErr
}

// proves answers a caller whose proof holds no more, nil for one whose does.
func (g *Gateway) proves(t *tunnel) *answer {
	who := t.who
	if !time.Now().Before(who.until) {
		return g.deny(t.record(audit.KindDecision), refuse(ReasonIdentity, "the caller's SVID ended at %s; connect again with a new one", who.until.UTC().Format(time.RFC3339)))
	}
	if err := g.verify(who); err != nil {
		ans := g.deny(t.record(audit.KindDecision), err)
		g.disprove(who)
		return ans
	}
	return nil
}

// openRequests opens a tunnel to a host that the gateway asks itself: nothing is
// dialled, and each request in it is judged. What no row allows any of is refused
// at once. It must then be served by inside.
func (g *Gateway) openRequests(t *tunnel, howErr error) (*tunnel, *answer) {
	t.asked = t.call.Port
	t.call.Port = t.how.PortOf(t.asked)
	if !g.cfg.Judge.Reaches(mesh.Out, t.call.Src, t.call.Dst, t.call.Port) {
		grant, err := g.cfg.Judge.Judge(&t.call)
		if err != nil {
			return nil, g.denied(t, err)
		}
		t.id, t.rule = grant.ID(), grant.Rule()
	}
	if howErr != nil {
		return nil, g.deny(t.record(audit.KindDecision), howErr)
	}
	t.cancel = func() {} // nothing is under way before its caller is there
	if err := g.tunnels.add(t); err != nil {
		return nil, g.deny(t.record(audit.KindDecision), err)
	}
	ans := g.recordRequests(t)
	if ans != nil {
		g.tunnels.remove(t)
		return nil, ans
	}
	return t, nil
}

// recordRequests looks at a tunnel for requests once more, since the policy may
// have changed before the registry knew of it, and records that it is open.
func (g *Gateway) recordRequests(t *tunnel) *answer {
	if err := g.rejudge(t); err != nil {
		return g.deny(t.record(audit.KindDecision), err)
	}
	t.start = time.Now()
	rec := t.record(audit.KindEgressOpen)
	rec.Decision, rec.Detail = audit.Allow, "for requests"+t.origin
	if err := g.cfg.Audit.Append(rec); err != nil {
		g.cfg.Log.Error("tunnel was not recorded, and not opened", "err", err)
		t.stop(ReasonAudit)
		return answerTo(ReasonAudit, rec.ID)
	}
	t.id = rec.ID
	return nil
}

// denied is the answer to a judgement that is not an allow; the Judge has
// recorded it.
func (g *Gateway) denied(t *tunnel, err error) *answer {
	var d *authz.Denial
	if !errors.As(err, &d) {
		return g.deny(t.record(audit.KindDecision), refuse(ReasonGrant, "judge: %v", err))
	}
	g.edge(t.call.Src.String(), t.call.Dst, telemetry.Denied)
	if d.Reason == authz.Unrecorded {
		return answerTo(ReasonAudit, d.ID)
	}
	return answerTo("", d.ID)
}

// dial connects t and records that it is open.
func (g *Gateway) dial(ctx context.Context, t *tunnel, grant authz.Grant) error {
	// The policy may have changed since the judgement, before the registry
	// knew of t.
	if err := g.rejudge(t); err != nil {
		return err
	}
	try, err := g.attempt(t, false)
	if err != nil {
		return err
	}
	defer try.End()
	conn, at, note, err := g.dialer.Dial(ctx, grant, Target{Host: t.host, Port: t.call.Port, How: t.how, Did: t.spans.did, Try: try})
	if err != nil {
		try.Tell(blamed(ctx, err), time.Now(), 0)
		switch t.why() {
		case ReasonRevoked:
			return refuse(ReasonRevoked, "the policy changed while the tunnel was opened")
		case ReasonSVIDRevoked, ReasonSVIDEnded, ReasonIdentity:
			return errIdentity(t.why())
		case ReasonShutdown:
			return refuse(ReasonShutdown, "the gateway is stopping")
		}
		return err
	}
	try.On(at.addr)
	try.Tell(upstream.OK, time.Now(), 0)
	if !t.setDest(conn) {
		return refuse(t.why(), "the tunnel was ended while it was opened")
	}
	t.mu.Lock()
	t.to = at
	t.mu.Unlock()
	if err := g.rejudge(t); err != nil { // now that Rejudge can see where it leads
		return err
	}
	if t.how.Probe {
		seen, err := g.probe(ctx, t, at)
		if why := t.why(); why != "" {
			return errEnded(why)
		}
		if err != nil {
			return err
		}
		note = strings.TrimSpace(note + " " + seen)
	}
	rec := t.record(audit.KindEgressOpen)
	rec.Decision = audit.Allow
	rec.Detail = strings.TrimSpace("to " + at.String() + t.origin + " " + note)
	if err := g.cfg.Audit.Append(rec); err != nil {
		g.cfg.Log.Error("tunnel was not recorded, and not opened", "err", err)
		return refuse(ReasonAudit, "the tunnel could not be recorded")
	}
	t.start = time.Now()
	return nil
}

// carry moves bytes until t ends, and records the end. What there is to be done for
// that is done by others, so that the stack on which a tunnel waits is small.
func (g *Gateway) carry(t *tunnel, s stream) {
	defer g.counts(t)()
	defer g.bounds(t)()
	if !t.setCaller(s) {
		return
	}
	if t.how.Proto == mesh.ProtoTLS && !g.greet(t, s) {
		return
	}
	t.run()
}

// counts notes that t carries, and returns what notes its end.
func (g *Gateway) counts(t *tunnel) (over func()) {
	src := t.call.Src.String()
	g.edge(src, t.call.Dst, telemetry.Allowed)
	open := g.cfg.Metrics.EgressTunnels(src)
	open.Add(1)
	told := g.begins(t)
	return func() {
		t.stop(ReasonInternal) // nothing, unless it was left by a panic
		g.tunnels.remove(t)
		open.Add(-1)
		told()
		up, down := g.cfg.Metrics.EgressBytes(src, t.how.Host)
		up.Add(t.up.Load())
		down.Add(t.down.Load())
		g.recordClose(t)
	}
}

// bounds has t end in time, and when it is refused, until that is taken back.
func (g *Gateway) bounds(t *tunnel) (over func()) {
	t.refused = func(ref *Refusal) {
		if t.why() == "" {
			g.deny(t.record(audit.KindDecision), ref)
		}
		t.stop(ref.Reason)
	}
	life := time.AfterFunc(t.life, func() { t.stop(ReasonLife) })
	// A clock that is set meanwhile is noticed by the next Rejudge.
	svid := time.AfterFunc(time.Until(t.who.until.Add(mesh.Grace)), func() { t.stop(ReasonSVIDEnded) })
	return func() {
		svid.Stop()
		life.Stop()
	}
}

func (g *Gateway) recordClose(t *tunnel) {
	rec := t.record(audit.KindEgressClose)
	rec.Reason = string(t.why())
	rec.BytesUp, rec.BytesDown = t.up.Load(), t.down.Load()
	rec.Duration = time.Since(t.start)
	rec.Detail, rec.Done = "to "+t.to.addr.Addr().String(), true
	if err := g.cfg.Audit.Append(rec); err != nil {
		g.cfg.Log.Error("end of a tunnel was not recorded", "decision", t.id, "err", err)
	}
}

// greet reads the ClientHello, holds it against what was allowed and passes it
// on. It reports whether the relay may begin; otherwise t has ended.
func (g *Gateway) greet(t *tunnel, s stream) bool {
	timer := time.AfterFunc(g.lim.HelloTimeout, func() { t.stop(ReasonHelloTime) })
	hello, err := ReadHello(s)
	late := !timer.Stop()
	var ref *Refusal
	switch {
	case late || t.why() != "":
		if t.why() == ReasonHelloTime {
			g.deny(t.record(audit.KindDecision), refuse(ReasonHelloTime, "no whole ClientHello came within %v", g.lim.HelloTimeout))
		}
		return false
	case err == io.EOF && len(hello.Raw) == 0:
		t.end(ReasonDone, false)
		return false
	case err != nil && !errors.As(err, &ref):
		t.broke(true)
		return false
	}
	if err == nil {
		err = hello.Check(t.host, &t.how)
	}
	if err == nil && hello.ServerName == "" && t.call.SNI != "" {
		if err = g.nameless(t); err != nil {
			t.finish(s, ReasonNoSNI)
			return false
		}
	}
	if err != nil {
		g.deny(t.record(audit.KindDecision), err)
		t.finish(s, reasonOf(err))
		return false
	}
	n, err := t.dest.Write(hello.Raw)
	t.up.Add(int64(n))
	if err != nil {
		t.broke(false)
		return false
	}
	greet := newGreeting(func(second *Hello) error {
		if second.ServerName != hello.ServerName {
			return refuse(ReasonSNI, "the second ClientHello names %s, the first %s", clip(second.ServerName), clip(hello.ServerName))
		}
		return second.Check(t.host, &t.how)
	})
	if t.how.Probe {
		greet.shown = &shown{prove: func(chain []*x509.Certificate) error { return g.proven(t, chain) }}
	}
	t.greet = greet
	return true
}

// nameless judges t again, whose caller names no server, since rules may ask
// for the name. The Judge records it.
func (g *Gateway) nameless(t *tunnel) error {
	t.mu.Lock()
	t.sni = ""
	t.mu.Unlock()
	call := t.call
	call.SNI, call.Now = "", time.Time{}
	if _, err := g.cfg.Judge.Judge(&call); err != nil {
		return err
	}
	// The destination may have come to ask for the name since t was opened,
	// when the name that t was bound to send was still taken for sent.
	if err := g.rejudge(t); err != nil {
		return err
	}
	return nil
}

// The TLS alerts (RFC 8446, 6.2) that tell a caller why its tunnel ends.
const (
	alertDecodeError      = 50
	alertUnrecognizedName = 112
	alertNoProtocol       = 120
)

// alertTime is how long a caller may take to read one.
const alertTime = time.Second

// alertFor is the alert that tells of a reason, 0 for none.
func alertFor(reason Reason) byte {
	switch reason {
	case ReasonSNI, ReasonNoSNI, ReasonECH:
		return alertUnrecognizedName
	case ReasonHello:
		return alertDecodeError
	case ReasonALPN:
		return alertNoProtocol
	}
	return 0
}

// finish ends t before any byte was relayed, with a fatal TLS alert if the
// caller speaks TLS.
func (t *tunnel) finish(s stream, reason Reason) {
	if alert := alertFor(reason); alert != 0 {
		// A caller that does not read would keep t for ever.
		timer := time.AfterFunc(alertTime, func() { t.stop(reason) })
		defer timer.Stop()
		_, _ = s.Write([]byte{21, 3, 3, 0, 2, 2, alert})
		_ = s.CloseWrite()
	}
	t.end(reason, false)
}
