package proxy

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/mux"
	"sallyport/internal/route"
	"sallyport/internal/telemetry"
	"sallyport/internal/translate"
	"sallyport/internal/upstream"
)

const (
	// verifyEvery is how often the proof of a kept connection is looked at
	// again: an authority may have been withdrawn. Its end is looked at for
	// each call.
	verifyEvery = 10 * time.Second
)

// InboundConfig is what the way in needs.
type InboundConfig struct {
	Shared
	// Self is the identity that is served. Required.
	Self spiffeid.ID
	// Port is the port that rules name for the service of Self in the policy in
	// force; 0 when there is none, which denies. Required.
	Port func() uint16
	// Name is the service of Self in the policy in force, empty when there is
	// none. With it the application sees no other Host than its own name in
	// the mesh, and a call for another service is sent away (421). Optional.
	Name func() mesh.ServiceName
	// Host says whether the routes of the service have the application see that
	// Host where a caller's sidecar asks for it. Optional.
	Host func(host []byte) bool
	// Keeper finds the route of the service that says how a call is recorded.
	// Optional.
	Keeper func() *route.Keeper
	// ShadowOnly says that the application is nothing but a shadow: it sees the
	// name of the service that it stands for.
	ShadowOnly bool
	// Stream says how streams are carried, if the service of Self speaks TCP in
	// the policy in force. Nil: it speaks HTTP.
	Stream func() (mesh.Stream, bool)
	// ProxyFrom are the load balancers whose connections begin with a header of
	// the PROXY protocol, version 2. It changes the address in records and in
	// what the application is told, nothing of who the peer is. Optional.
	ProxyFrom []netip.Prefix
	// ForwardedFrom are the peers, as SPIFFE IDs or patterns of them, that are
	// believed when they say in X-Forwarded-For through which addresses a call
	// came. It changes what the application is told, nothing of who the peer is
	// and nothing in records. Optional.
	ForwardedFrom []string
	// RestartTrace are the peers, written the same way, whose word about traces is
	// not taken: a new one begins and is linked to theirs. Optional.
	RestartTrace []string
	// TLS is the server side of mutual TLS. Its VerifyConnection is asked again
	// during the life of a connection. Required.
	TLS *tls.Config
	// PeerID reads the verified identity of a peer. Required.
	PeerID func(tls.ConnectionState) (spiffeid.ID, error)
	// Tokens checks what calls show beside their certificate. Nil: nothing of
	// that counts.
	Tokens *authz.Verifier
	// Standing looks again at what a peer has proved: an error wraps
	// svid.ErrRevoked or svid.ErrExpired. It is quick. Required.
	Standing func(tls.ConnectionState) error
	// Judge decides each call. Required.
	Judge *authz.Judge
	// App lends connections to the application. Required.
	App *upstream.Pool
	// Translate gives the application's calls another face, where the policy says
	// so. Its Run is for whoever made it. Optional.
	Translate *translate.Translator
	// MaxHandshakes bounds the connections whose peer has not proved an
	// identity yet. One more closes the one that has taken the longest, of the
	// address that has most. Default 512.
	MaxHandshakes int
	// HandshakeTimeout bounds a handshake. Default 10 s.
	HandshakeTimeout time.Duration
	// Original tells where a connection was going to that rules of the kernel
	// have brought here, for the record of one that proves nothing. Optional.
	Original func(net.Conn) (to netip.AddrPort, ok bool, err error)
	// Rates bound how often each caller may call; a call must be within all
	// that speak of it. Optional.
	Rates []mesh.CallRate
	// MaxPerPeer bounds the connections of one identity. Default: half of
	// MaxConns.
	MaxPerPeer int
}

func (c InboundConfig) validate() error {
	errs := []error{c.Shared.validate()}
	for name, missing := range map[string]bool{
		"self": c.Self.IsZero(), "port": c.Port == nil, "tls": c.TLS == nil, "standing": c.Standing == nil,
		"peer id": c.PeerID == nil, "judge": c.Judge == nil, "app": c.App == nil,
	} {
		if missing {
			errs = append(errs, errors.New(name+": missing"))
		}
	}
	for i, p := range c.ForwardedFrom {
		if err := mesh.CheckIDPattern(p); err != nil {
			errs = append(errs, fmt.Errorf("forwarded from[%d]: %w", i, err))
		}
	}
	for i, p := range c.RestartTrace {
		if err := mesh.CheckIDPattern(p); err != nil {
			errs = append(errs, fmt.Errorf("restart trace[%d]: %w", i, err))
		}
	}
	if c.TLS != nil && c.TLS.VerifyConnection == nil {
		errs = append(errs, errors.New("tls: has no VerifyConnection, so that nobody checks peers"))
	}
	return errors.Join(errs...)
}

// Inbound takes calls from peers and hands those that are allowed to the
// application.
type Inbound struct {
	listener
	cfg      InboundConfig
	chain    chain
	opaque   chain // of streams
	self     string
	unproved anteroom
	turns    mux.Turns // of handshakes
	peers    crowd
	rates    rates
	drops    dropSets
	resting  *telemetry.Gauge
	windows  *mux.Budget
	behind   *upstream.Pool // leads to the application through Translate
	// epoch counts the calls of Rejudge.
	epoch atomic.Uint64
	// rechecked is the epoch that recheck has seen.
	rechecked uint64
	// restAfter, verifyEvery and tokenGrace are fields for tests.
	restAfter, verifyEvery, tokenGrace time.Duration
}

// NewInbound checks the configuration; Run does the work.
func NewInbound(cfg InboundConfig) (*Inbound, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("inbound proxy: %w", err)
	}
	in := &Inbound{cfg: cfg, self: cfg.Self.String(), restAfter: restAfter, verifyEvery: verifyEvery, tokenGrace: tokenGrace, windows: mux.NewBudget(windows)}
	in.listener = listener{
		Shared: cfg.Shared.withDefaults(), serve: in.serveConn, arrive: in.unproved.enter,
		bodies: mux.NewBudget(bodies), calm: mux.NewCalm[mux.Source](brokenBurst, brokenRate), calmOf: mux.NewCalm[spiffeid.ID](brokenBurst, brokenRate), costs: costHandshake,
		vain: mux.NewCalm[mux.Source](brokenBurst, brokenRate),
	}
	in.cfg.HandshakeTimeout = cmp.Or(cfg.HandshakeTimeout, 10*time.Second)
	in.unproved.Anteroom, in.turns = mux.NewAnteroom(cmp.Or(cfg.MaxHandshakes, 512)), mux.NewTurns()
	in.unproved.waiting = in.Metrics.Connections(in.Reporter, "proving")
	in.resting = in.Metrics.Connections(in.Reporter, "resting")
	in.unproved.putOut = in.Metrics.ConnectionsRefused(in.Reporter, limitHandshakes)
	in.peers.max = cmp.Or(cfg.MaxPerPeer, max(in.MaxConns/2, 1))
	in.peers.maxCalls = int64(max(in.MaxInFlight/2, 1))
	in.peers.firsts = mux.NewBudget(firsts)
	in.chain, in.opaque = in.makeChain(), in.streamChain()
	if cfg.Translate != nil {
		in.behind = upstream.NewLocal(netip.AddrPort{}, cfg.Limits)
		in.behind.Through(cfg.Translate.Connect)
	}
	var err error
	if in.rates, err = newRates(cfg.Rates); err != nil {
		return nil, fmt.Errorf("inbound proxy: %w", err)
	}
	return in, nil
}

// Run serves ln until ctx ends and the calls in flight are done, and closes it.
// An Inbound runs once.
func (in *Inbound) Run(ctx context.Context, ln net.Listener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	looking, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop() // connections in flight are looked at while they drain
	wg.Go(func() { every(looking, rejudgeEvery, in.Rejudge) })
	wg.Go(func() { every(looking, recheckEvery, in.recheck) })
	return in.run(ctx, ln)
}

// Yield has the open connections end with the call that they carry, or the next
// one, since another process takes the new ones. False takes that back.
func (in *Inbound) Yield(on bool) { in.yield(on) }

// Carries is how many connections are open.
func (in *Inbound) Carries() int { return in.carries() }

// The links of the way in.

func (in *Inbound) trace(x *call) *refusal {
	x.traceOf(!x.who.restarts)
	x.proven = x.marks()
	if x.marked {
		x.mark(true)
	}
	return nil
}

func (in *Inbound) startClock(x *call) *refusal {
	x.start = time.Now()
	x.runs()
	return nil
}

func (in *Inbound) count(x *call) {
	x.observe()
	x.grant.Done(x.status(), x.traceText())
	if x.grant.Valid() && x.outcome() == telemetry.Errored {
		in.failedCall(x)
	}
	in.Edges.Add(x.src, x.dst, x.proto(), x.outcome(), true, x.start, x.place())
}

// failedCall records a call that was allowed and came to nothing.
func (in *Inbound) failedCall(x *call) {
	r := audit.Record{Kind: audit.KindError, Reason: "upstream", Rule: x.grant.Rule(), Dir: string(mesh.In), Src: x.src, Dst: x.dst, Port: x.port,
		Verb: x.verb(), Path: x.path(), Peer: x.remote, Trace: x.traceText(), Duration: time.Since(x.start),
		Class: audit.Class(x.status()), Detail: "decision " + x.grant.ID(), Open: true, Done: true}
	switch {
	case x.refused != nil:
		r.Reason = x.refused.reason
	case x.conn.look().cut && !x.conn.hungUp():
		r.Reason = "cut_off" // by us; another record says why
	}
	if err := in.Audit.Append(&r); err != nil {
		in.Log.Error("audit record lost", "err", err)
	}
}

// enterFlight bounds the calls of one caller as well: one that takes no answer
// holds its place as long as it likes to.
func (in *Inbound) enterFlight(x *call) *refusal {
	if r := in.listener.enterFlight(x); r != nil {
		return r
	}
	x.of = x.who.share
	if x.of.calls.Add(1) > in.peers.maxCalls {
		x.vacate()
		return &refusal{status: 503, reason: "overload", detail: "too many calls in flight of this caller"}
	}
	return nil
}

// drainGate also keeps what the application says from looking like ours.
func (in *Inbound) drainGate(x *call) *refusal {
	x.ex.ToDown.Drop = mine
	return in.listener.drainGate(x)
}

// peerValid holds the connection to what its peer proved when it was made.
func (in *Inbound) peerValid(x *call) *refusal {
	var reason string
	var cause error
	switch {
	case !x.start.Before(x.who.until):
		reason = reasonExpired
	case x.start.UnixNano()-x.who.verified.Load() >= int64(in.verifyEvery):
		if cause = in.cfg.TLS.VerifyConnection(*x.who.tls); cause != nil {
			reason = "svid_invalid"
			break // and so for every other call of this peer on the connection
		}
		x.who.verified.Store(x.start.UnixNano())
	}
	detail := ""
	if cause != nil {
		detail = cause.Error()
	}
	if reason == "" {
		reason, detail = in.stands(x)
	}
	if reason == "" {
		return nil
	}
	return in.refuseAgain(x, reason, detail)
}

// overtaken refuses a call that was judged before a Rejudge that did not see it.
func (in *Inbound) overtaken(x *call) *refusal {
	if reason, detail := in.stands(x); reason != "" {
		return in.refuseAgain(x, reason, detail)
	}
	return nil
}

// refuseAgain refuses a call by who was believed before.
func (in *Inbound) refuseAgain(x *call, reason, detail string) *refusal {
	x.ex.ToDown.Close = true
	r := audit.Record{Reason: reason, Dir: string(mesh.In), Src: x.src, Dst: x.dst, Port: x.port,
		Verb: x.verb(), Path: x.path(), Peer: x.remote, Trace: x.traceText(), Detail: detail}
	return in.deny(r)
}

// allow is what a 405 must name (RFC 9110 section 15.5.6).
const allow = "Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n"

// target holds the call to the service that is served here.
func (in *Inbound) target(x *call) *refusal {
	if x.req.Form == http1.Authority || x.req.Form == http1.Asterisk {
		return &refusal{status: 405, reason: "method", detail: "only requests for a path are served here", head: allow}
	}
	if r := noTrace(x); r != nil {
		return r
	}
	if _, ok := in.streams(); ok {
		x.ex.ToDown.Close = true
		return &refusal{status: 421, reason: "protocol", detail: "the service speaks no HTTP any more"}
	}
	if in.cfg.Name == nil {
		return nil
	}
	name := in.cfg.Name()
	if name == "" {
		return nil // no row speaks of it, so the judge denies
	}
	if !x.host.isMeant(name, x.req.Authority) {
		return &refusal{status: 421, reason: "misdirected", detail: "another service of the mesh is served here"}
	}
	x.ex.ToUp.Authority = x.host.bytes
	if host := x.req.Get("sallyport-host"); len(host) > 0 && (in.standsFor(x, host) || in.cfg.Host != nil && in.cfg.Host(host)) {
		x.ex.ToUp.Authority = host
	}
	return nil
}

// standsFor says whether what is served here is a shadow, and the call a copy of
// one to that service of the mesh.
func (in *Inbound) standsFor(x *call, host []byte) bool {
	_, inside := serviceOf(host)
	return inside && x.proven && in.cfg.ShadowOnly
}

// noTrace refuses TRACE: its answer would show the caller what only the
// application may see (RFC 9110 section 9.3.8).
func noTrace(x *call) *refusal {
	if string(x.req.Method) != "TRACE" {
		return nil
	}
	return &refusal{status: 405, reason: "method", detail: "TRACE is not served", head: allow}
}

// ownHost is the Host that the application sees, made once for a name.
type ownHost struct {
	name  mesh.ServiceName
	text  string
	bytes []byte
	asked []byte // the authority for which the name was last found to be meant
}

func (h *ownHost) textOf(name mesh.ServiceName) string {
	if h.name != name {
		h.name, h.text = name, fmt.Sprintf("%s.%s", name, mesh.Domain)
		h.bytes, h.asked = []byte(h.text), nil
	}
	return h.text
}

// isMeant says whether authority may mean the service of that name: no other one
// of the mesh.
func (h *ownHost) isMeant(name mesh.ServiceName, authority []byte) bool {
	h.textOf(name)
	if h.asked != nil && bytes.Equal(h.asked, authority) {
		return true
	}
	if other, inside := serviceOf(authority); inside && other != string(name) {
		return false
	}
	h.asked = append(h.asked[:0], authority...)
	return true
}

func (h *ownHost) of(name mesh.ServiceName) []byte {
	h.textOf(name)
	return h.bytes
}

func (in *Inbound) judge(x *call) *refusal {
	began := x.clock()
	r := in.decide(x)
	x.did("policy", began, r)
	return r
}

func (in *Inbound) decide(x *call) *refusal {
	if port := in.cfg.Port(); x.judge == nil || port != x.port {
		x.port = port
		x.judge = x.who.share.judgeOf(port, func() *authz.Conn { return in.cfg.Judge.Conn(mesh.In, x.who.id, in.self, port) })
	}
	x.judged = authz.Call{
		Dir: mesh.In, Src: x.who.id, Dst: in.self, Port: x.port,
		Verb: x.verb(), Path: x.path(), Now: x.start, Peer: x.remote, Trace: x.traceText(),
		Token: x.token, Route: in.kept(x),
	}
	g, err := x.judge.Judge(&x.judged)
	if err == nil {
		x.grant = g
		if g.Warn() {
			x.warn(g)
		}
		return nil
	}
	d := (*authz.Denial)(nil)
	if !errors.As(err, &d) {
		return unrecorded("")
	}
	if d.Reason == authz.Unrecorded || d.ID == "" {
		return unrecorded(d.ID)
	}
	if d.Reason == authz.FailedToken {
		return in.lacking(x, d.ID)
	}
	return &refusal{status: 403, reason: "policy", decision: d.ID}
}

// kept is the route that says how the call is recorded, nil when none does. What is
// compared is what is judged.
func (in *Inbound) kept(x *call) *mesh.Route {
	if in.cfg.Keeper == nil {
		return nil
	}
	k := in.cfg.Keeper()
	if k == nil {
		return nil
	}
	c := &x.look
	c.Method, c.Path, c.Caller = append(c.Method[:0], x.verb()...), append(c.Path[:0], x.path()...), x.src
	return k.Route(c)
}

// warn tells the caller of a denial that is not enforced yet. The answer shows
// the decision, never the rule.
func (x *call) warn(g authz.Grant) {
	x.ex.ToDown.Extra = fmt.Appendf(nil, "Sallyport-Warning: denied when enforced; decision=%s\r\n", g.ID())
}

func (in *Inbound) forward(x *call) *refusal {
	if x.proven {
		x.traced = in.Shadows.Begin(x.src, x.trace.ID)
	}
	return in.handOver(x, x.grant)
}

// handOver brings the call to the application. It takes the proof that the
// call was judged and recorded.
func (in *Inbound) handOver(x *call, g authz.Grant) *refusal {
	if !g.Covers(in.self, x.port) {
		return &refusal{status: 500, reason: "no_grant", detail: "the call was not judged"}
	}
	if r := x.translates(); r != nil {
		return r
	}
	// What ignores such a body takes it for the next request: there is none.
	x.ex.ToUp.Close = !x.req.Body.Empty() && !wantsBody(x.req.Method)
	r := x.exchange()
	if r != nil && r.reason == "no_endpoint" {
		r.detail = "the application does not accept connections"
	}
	return r
}

// wantsBody says whether a body has a meaning with this method (RFC 9110
// section 9.3), so that every application reads it.
func wantsBody(method []byte) bool {
	switch string(method) {
	case "GET", "HEAD", "DELETE", "OPTIONS":
		return false
	}
	return true
}

func (in *Inbound) lend(x *call, fresh bool) (*upstream.Conn, error) {
	if x.face.Translated {
		return in.behind.Get(x.ctx, fresh)
	}
	return in.cfg.App.Get(x.ctx, fresh)
}
