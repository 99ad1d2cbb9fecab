package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/capture"
	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/mesh"
	"sallyport/internal/mux"
	"sallyport/internal/route"
	"sallyport/internal/shadow"
	"sallyport/internal/telemetry"
	"sallyport/internal/upstream"
)

// OutboundConfig is what the way out needs.
type OutboundConfig struct {
	Shared
	// Self is the identity of the workload. Required.
	Self spiffeid.ID
	// Local is given each local connection once, before any of it is read. What it
	// returns says whether the process at the other end is the workload; the error
	// says who it is instead. That is asked again during the life of a connection,
	// which may have changed hands. Required.
	Local func(c net.Conn) (ask func() error)
	// Snapshot is the newest policy; nil before the first. Required.
	Snapshot func() *mesh.Snapshot
	// Services lends connections to the endpoints of services. Required.
	Services *upstream.Services
	// Streams lends connections to the endpoints of services that speak TCP,
	// which negotiate no protocol. Without it no such service is reached.
	Streams *upstream.Services
	// Standing looks again at what a peer has proved: an error wraps
	// svid.ErrRevoked or svid.ErrExpired. It is quick. Required.
	Standing func(tls.ConnectionState) error
	// Gateways lends connections to the gateways under the name "gateway".
	// Without it nothing leads out of the mesh.
	Gateways *upstream.Services
	// Tokens checks the token of a call whose route is chosen by a claim. Without it
	// no claim holds. Leaf is the certificate that peers see of the workload, to
	// which tokens may be bound. Optional.
	Tokens *authz.Verifier
	Leaf   func() []byte
	// Region says where an address is, as route.Options has it. Optional.
	Region func(database string, a netip.Addr) string
	// KeepForwardedFor passes on what the workload says in X-Forwarded-For, as a
	// load balancer does. Without it the field is dropped.
	KeepForwardedFor bool
	// Mirror gives copies of calls to the shadows of their route. Optional.
	Mirror *shadow.Mirror
	// ShadowOnly says that all that the workload does is done for a shadow.
	// ShadowWrites are the services which what is done for one may change.
	ShadowOnly   bool
	ShadowWrites []mesh.ServiceName
	// FaultsWait keeps faults from beginning before Heed was called: who has not
	// heard what is stopped does not know what may begin.
	FaultsWait bool
	// Captured takes connections that rules of the kernel have brought to the
	// HTTP proxy. Nil: all are made to it.
	Captured *Captured
}

// GatewayName is the name of the gateways in OutboundConfig.Gateways.
const GatewayName mesh.ServiceName = "gateway"

func (c OutboundConfig) validate() error {
	errs := []error{c.Shared.validate()}
	for name, missing := range map[string]bool{
		"self": c.Self.IsZero(), "local": c.Local == nil, "snapshot": c.Snapshot == nil, "services": c.Services == nil, "standing": c.Standing == nil,
	} {
		if missing {
			errs = append(errs, errors.New(name+": missing"))
		}
	}
	return errors.Join(errs...)
}

// Outbound takes calls from the application and brings them to their service,
// or, as tunnels, to a gateway.
type Outbound struct {
	cfg  OutboundConfig
	self string
	kept atomic.Pointer[[2]*policy]
	// bodies and firsts are what the connections of HTTP/2 of all doors have
	// together.
	bodies, firsts *mux.Budget
	// keeping is held by who changes kept. It is taken before the locks of faults
	// and quotas.
	keeping sync.Mutex
	// faults and quotas are those of the policy in force.
	faults  faults
	quotas  quotas
	samples samples

	mu    sync.Mutex // guards doors
	doors []*door    // those that are served
}

// NewOutbound checks the configuration; Run does the work.
func NewOutbound(cfg OutboundConfig) (*Outbound, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("outbound proxy: %w", err)
	}
	o := &Outbound{cfg: cfg, self: cfg.Self.String(), bodies: mux.NewBudget(bodies), firsts: mux.NewBudget(firsts)}
	if !cfg.FaultsWait {
		o.faults.stops = &mesh.FaultStops{}
	}
	o.faults.note = func(r audit.Record) error { return cfg.Audit.Append(&r) }
	return o, nil
}

// Run serves ln, the HTTP proxy of the application, until ctx ends and the
// calls in flight are done, and closes it.
func (o *Outbound) Run(ctx context.Context, ln net.Listener) error {
	return o.RunFor(ctx, ln, "")
}

// RunFor is Run for a listener whose every request is for one service.
func (o *Outbound) RunFor(ctx context.Context, ln net.Listener, service mesh.ServiceName) error {
	d := newDoor(o, service)
	o.mu.Lock()
	o.doors = append(o.doors, d)
	o.mu.Unlock()
	defer func() {
		o.mu.Lock()
		o.doors = slices.DeleteFunc(o.doors, func(x *door) bool { return x == d })
		o.mu.Unlock()
	}()
	var wg sync.WaitGroup
	defer wg.Wait()
	looking, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	wg.Go(func() { every(looking, rejudgeEvery, func() { o.cfg.closed(d.rejudge()...) }) })
	defer o.cfg.Metrics.Saturation(o.cfg.Reporter, "queue", func() float64 { return float64(o.waiting()) / float64(d.MaxInFlight) })()
	return d.run(ctx, ln)
}

// waiting is how many calls wait for a connection.
func (o *Outbound) waiting() (n int) {
	for _, s := range []*upstream.Services{o.cfg.Services, o.cfg.Streams, o.cfg.Gateways} {
		if s != nil {
			n += s.Waiting()
		}
	}
	return n
}

// Yield has the open connections end with the call that they carry, or the next
// one, since another process takes the new ones. False takes that back.
func (o *Outbound) Yield(on bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, d := range o.doors {
		d.yield(on)
	}
}

// Carries is how many connections are open.
func (o *Outbound) Carries() (n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, d := range o.doors {
		n += d.carries()
	}
	return n
}

// A door is one listener of the way out.
type door struct {
	listener
	*Outbound
	// service is meant by every request, whatever it says.
	service mesh.ServiceName
	chain   chain
	opaque  chain // of streams
	accepts func(*call) bool
	// nowhere counts calls that lead to no service, outside the tunnels that leave
	// the mesh, and asked the requests.
	nowhere, outside, asked *telemetry.Series
	// tcp is what the service spoke when it was last known.
	tcp atomic.Bool
	// askEvery is a field for tests.
	askEvery time.Duration
}

// askEvery is how long an answer about the process at the other end holds.
const askEvery = time.Second

func newDoor(o *Outbound, service mesh.ServiceName) *door {
	d := &door{Outbound: o, service: service, askEvery: askEvery}
	d.listener = listener{Shared: o.cfg.Shared.withDefaults(), serve: d.serveConn, bodies: o.bodies, firsts: o.firsts, calm: mux.NewCalm[mux.Source](ownBurst, ownRate), costs: 1, rests: true}
	d.nowhere, d.outside = d.Signals.Series(o.self, "", ""), d.Signals.SeriesOf(telemetry.ProtoTCP, o.self, "gateway", "")
	d.asked = d.Signals.Series(o.self, "gateway", "")
	d.chain, d.opaque, d.accepts = d.makeChain(), d.streamChain(), d.accept
	return d
}

func (d *door) serveConn(ctx context.Context, c *conn) {
	x := d.callOn(ctx, c, c.RemoteAddr().String(), &process{ask: d.cfg.Local(c.Conn)})
	x.down = http1.NewConn(capture.NewDirect(c.Conn), d.Limits)
	defer func() {
		if x.down != nil {
			x.down.Release()
		}
	}()
	if d.captured(x) || d.speaksTCP() {
		d.listener.opaque(x, d.opaque)
		return
	}
	switch text, err := d.begins(x); {
	case err != nil:
		d.unreadable(x, err)
		d.leftOff(x.conn, err)
	case text == socks5:
		d.serveSOCKS(c, x)
	case text == http2.Preface:
		d.serveHTTP2(ctx, c, x)
	default:
		d.calls(x, d.chain)
	}
}

// begins says which text a connection begins with that tells a protocol; none
// for HTTP/1.1. SOCKS is spoken to a proxy only.
func (d *door) begins(x *call) (string, error) {
	for _, text := range []string{socks5, http2.Preface} {
		if text == socks5 && (d.service != "" || x.meant.IsValid()) {
			continue
		}
		if ok, err := x.down.Begins(text); ok || err != nil {
			return text, err
		}
	}
	return "", nil
}

func (d *door) callOn(ctx context.Context, c *conn, remote string, at *process) *call {
	x := &call{ctx: ctx, on: &d.listener, conn: c, accept: d.accepts, src: d.self, remote: remote, process: at, unread: d.nowhere, only: d.service}
	x.settler = x.settle
	if d.cfg.Tokens != nil {
		x.claimer = func(name string) string { return d.claim(x, name) }
	}
	return x
}

// A process is who is at the other end of a connection of the workload, whose
// lanes have it in common.
type process struct {
	ask func() error // whether it is the workload

	mu       sync.Mutex // guards the fields below, also while a call asks
	asked    time.Time
	stranger error // it is not the workload
	ahead    bool  // it is asked for again, and no call waits for that
}

// The links of the way out.

func (d *door) trace(x *call) *refusal {
	x.marked = d.cfg.ShadowOnly
	x.traceOf(true)
	x.marks()
	if x.marked {
		x.proven = d.cfg.ShadowOnly || d.Shadows.Has(x.trace.ID)
		x.mark(x.proven)
	}
	return nil
}

func (d *door) startClock(x *call) *refusal {
	x.start, x.dst, x.series = time.Now(), "", d.nowhere
	return nil
}

func (d *door) count(x *call) { x.observe() }

// ownProcess looks at who is at the other end: at the first call, and again
// when the answer is old, since a connection can be handed to another process
// and the number of a process that has ended comes to mean another.
func (d *door) ownProcess(x *call) *refusal {
	stranger := d.strangerOn(x)
	if stranger == nil {
		return nil
	}
	x.ex.ToDown.Close = true
	return d.deny(d.about(x, "not_workload", stranger.Error()))
}

func (d *door) strangerOn(x *call) error {
	p := x.process
	p.mu.Lock()
	defer p.mu.Unlock()
	switch age := x.start.Sub(p.asked); {
	case p.asked.IsZero() || age >= d.askEvery:
		p.stranger = p.ask()
		p.asked = x.start
	case age >= d.askEvery*3/4 && !p.ahead:
		p.ahead = true
		go d.askAhead(x.conn, p)
	}
	return p.stranger
}

// askAhead asks before the answer is old: to ask takes as long as some calls, and
// one that comes then need not wait for it.
func (d *door) askAhead(c *conn, p *process) {
	var stranger error
	began := time.Now()
	defer func() {
		fault := recover()
		if fault != nil { // it is for the next call to ask
			d.survived(c, fault)
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.ahead = false; fault == nil && began.After(p.asked) {
			p.asked, p.stranger = began, stranger
		}
	}()
	stranger = p.ask()
}

// about is the record of a refusal to carry something out.
func (d *door) about(x *call, reason, detail string) audit.Record {
	return audit.Record{Reason: reason, Dir: string(mesh.Out), Src: d.self, Dst: "host:" + x.req.AuthorityText(),
		Verb: x.req.Verb(), Path: x.req.PathText(), Peer: x.remote, Trace: x.traceText(), Detail: detail}
}

// A target is the service that an authority means by one snapshot. A
// connection keeps its last one.
type target struct {
	snap      *mesh.Snapshot
	authority []byte
	name      mesh.ServiceName
	dst       string
	series    *telemetry.Series
	stream    mesh.Stream

	// policy is that of snap, routes those of the service, nil for none.
	policy *policy
	routes *route.Set
	// route is the one that was taken, nil for none, and subset what it narrows
	// the endpoints to.
	route  *route.Route
	subset string
	// side counts the calls to the backend, nil when nobody asks.
	side *side
}

// route finds the service that is meant, or sees that the call leads out.
func (d *door) route(x *call) *refusal {
	began := x.clock()
	r := d.find(x)
	x.did("route", began, r)
	return r
}

func (d *door) find(x *call) *refusal {
	if x.req.Form == http1.Authority {
		if x.only != "" {
			return &refusal{status: 405, reason: "method", detail: "only requests for a path are served on the port of a service", head: allow}
		}
		x.dst, x.series = "host:"+x.req.AuthorityText(), d.outside
		x.runs()
		return nil
	}
	if r := noTrace(x); r != nil {
		return r
	}
	snap := d.cfg.Snapshot()
	if snap == nil {
		return d.noRoute(x, "no_policy")
	}
	t := &x.known
	if t.snap != snap || x.only == "" && !bytes.Equal(t.authority, x.req.Authority) {
		svc, ok := x.serviceOf(snap)
		if !ok && d.leadsOut(x) {
			d.aimOut(x)
			return nil
		}
		if !ok {
			return d.noRoute(x, "no_route")
		}
		if svc.Protocol == mesh.TCP {
			return &refusal{status: 421, reason: "protocol", detail: "the service speaks tcp: it is reached by CONNECT, or by a port of its own"}
		}
		dst := svc.ID.String()
		*t = target{snap: snap, authority: append(t.authority[:0], x.req.Authority...), name: svc.Name, dst: dst, series: d.Signals.Series(x.src, dst, string(svc.Name)), policy: d.policyOf(snap)}
		t.routes = t.policy.of(svc.Name)
	}
	x.to, x.dst, x.series = t, t.dst, t.series
	if x.only != "" {
		x.ex.ToUp.Authority = x.host.of(x.only)
	}
	if r := x.elsewhere(); r != nil {
		return r
	}
	if r := d.direct(x); r != nil {
		return r
	}
	x.runs()
	return nil
}

// noRoute refuses a call to something that is not a service this workload has
// anything to do with.
func (d *door) noRoute(x *call, reason string) *refusal {
	r := d.about(x, reason, "clear HTTP is carried to services of the mesh, and through a gateway; else the world outside is reached by CONNECT")
	x.dst = r.Dst
	return d.deny(r)
}

// serviceOf finds the service that is meant in a snapshot.
func (x *call) serviceOf(snap *mesh.Snapshot) (mesh.Service, bool) {
	name := x.only
	if name == "" {
		s, inside := serviceOf(x.req.Authority)
		if !inside {
			return mesh.Service{}, false
		}
		name = mesh.ServiceName(s)
	}
	return snap.Service(name)
}

// serviceOf reads the service's name from an authority such as
// "billing.mesh.internal" or "billing.mesh.internal:80"; inside says that the
// authority is one of the mesh.
func serviceOf(authority []byte) (name string, inside bool) {
	host := authority
	if i := bytes.LastIndexByte(authority, ':'); i >= 0 {
		host = authority[:i]
	}
	host = bytes.TrimSuffix(host, []byte{'.'})
	label, inside := bytes.CutSuffix(host, []byte("."+mesh.Domain))
	if !inside {
		return "", false
	}
	return string(label), true
}

func (d *door) forward(x *call) *refusal {
	if x.req.Form == http1.Authority {
		return d.connect(x)
	}
	if x.to.name == GatewayName {
		return d.passOut(x)
	}
	if d.cfg.KeepForwardedFor {
		x.extra = appendForwardedFor(x.extra, forwardedFor(x.req.Fields))
	}
	x.ex.Settle = x.settler
	if d.Log.Enabled(x.ctx, slog.LevelDebug) { // a log may have to be waited for
		x.ex.Settle = nil
	}
	return d.send(x, x.to.plan())
}
