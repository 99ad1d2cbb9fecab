package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport/internal/agent"
	"sallyport/internal/archive"
	"sallyport/internal/attest"
	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/capture"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/handover"
	"sallyport/internal/hop"
	"sallyport/internal/http2"
	"sallyport/internal/isolate"
	"sallyport/internal/keyset"
	"sallyport/internal/mesh"
	"sallyport/internal/nameserver"
	"sallyport/internal/proxy"
	"sallyport/internal/region"
	"sallyport/internal/route"
	"sallyport/internal/shadow"
	"sallyport/internal/sink"
	"sallyport/internal/svid"
	"sallyport/internal/tap"
	"sallyport/internal/telemetry"
	"sallyport/internal/translate"
	"sallyport/internal/upstream"
	"sallyport/internal/virtual"
)

// A sidecar is the composed process.
type sidecar struct {
	cfg     *Config
	log     *slog.Logger
	level   *slog.LevelVar
	ready   *daemon.Ready
	metrics *telemetry.Registry
	edges   *telemetry.Edges
	// tracer keeps spans, traces sends them, and exports the metrics; nil without a
	// collector.
	tracer  *telemetry.Tracer
	traces  *sink.Traces
	exports *sink.Metrics
	// taps show calls to whoever asks on the admin socket, or through the issuer.
	taps  tap.Taps
	audit *audit.Ledger
	// checked is the tree over the audit log.
	checked *audit.Tree
	// sinks send the audit log to other systems.
	sinks  []*sink.Sink
	judge  *authz.Judge
	keys   *keyset.Keeper
	tokens *authz.Verifier
	shown  *authz.Verifier // of tokens by which the workload's calls take their route
	agent  *agent.Agent
	// services and gateways are where calls go.
	services, gateways *upstream.Services
	// streams are the services that speak TCP.
	streams *upstream.Services
	regions *region.Databases
	// mirror copies calls; archives keep them, once this process may write.
	mirror  *shadow.Mirror
	shadows shadow.Traces
	// stops are the faults that are stopped for all; nil until the issuer was heard.
	stops       atomic.Pointer[mesh.FaultStops]
	archives    atomic.Pointer[map[string]*archive.Archive]
	translation translation
	// inbound and outbound are nil before there is an identity.
	inbound  atomic.Pointer[proxy.Inbound]
	outbound atomic.Pointer[proxy.Outbound]
	child    atomic.Pointer[attest.Child]
	found    atomic.Pointer[ownService]
	// started is closed when the application has been started, if there is one.
	started chan struct{}
	// serving is closed when the application has accepted a connection.
	serving chan struct{}
	kubelet *attest.Kubelet // nil when it is not asked
	callers callers
	// addresses are those that stand for services, if virtual says that they do.
	addresses *virtual.Book
	virtual   bool
	// names answers the workload's DNS questions; nil when nobody asks here.
	names *nameserver.Names
	real  *nameserver.Gateways // nil when no gateway is asked
	// room is the application's network namespace; nil when it has ours.
	room *isolate.Room

	// now ends when the process is to leave at once.
	now context.Context
	// shift is from the process before to the next one.
	shift *handover.Shift
}

// auditFile is the audit log inside DataDir.
const auditFile = "audit.jsonl"

// serve runs the sidecar, and the application when one is given, until a
// signal, until the application ends, or until a part fails.
func serve(ctx context.Context, cfg *Config, run daemon.Run, stdout, stderr io.Writer) (err error) {
	s := &sidecar{
		cfg: cfg, virtual: cfg.Capture.Enabled() || run.Isolate, ready: new(daemon.Ready), metrics: cfg.Metrics.Registry(cfg.TrustDomain.Name()), edges: telemetry.NewEdges(), started: make(chan struct{}), serving: make(chan struct{}),
	}
	f, ok := stderr.(*os.File)
	s.log, s.level = daemon.NewLogger(stderr, cfg.Log.Level, ok && daemon.IsTerminal(f))
	s.shift = handover.NewShift("sidecar", cfg.RunDir, cfg.DataDir, s.log)
	if run.Takeover {
		if err := s.takeOver(run.Program); err != nil {
			return err
		}
		defer s.shift.LetGo()
	}
	if err := s.activate(); err != nil {
		return err
	}
	if run.Isolate {
		if err := cfg.mayIsolate(run); err != nil {
			return err
		}
	}
	if err := s.open(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()

	signalled, now, cancel := daemon.Signals(ctx)
	defer cancel()
	s.now = now
	stop, drain := context.WithCancel(signalled)
	defer drain()
	defer context.AfterFunc(now, func() {
		if ctx.Err() == nil && stop.Err() != nil {
			s.killChild()
		}
	})()
	// What everything else stands on runs until the very end.
	ground, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	g, ground := errgroup.WithContext(ground)
	if cfg.Capture.Hold {
		if err := s.holdRules(ground, g); err != nil {
			return err
		}
	}
	g.Go(func() error { return s.audit.Run(ground) })
	g.Go(func() error { return daemon.Settle(ground) })
	g.Go(func() error { return s.judge.Run(ground) })
	g.Go(func() error { return s.keys.Run(ground) })
	g.Go(func() error { return s.services.Watch(ground) })
	g.Go(func() error { return s.streams.Watch(ground) })
	g.Go(func() error { return s.translation.Run(ground) })
	g.Go(func() error { return s.mirror.Run(ground) })
	g.Go(func() error { return s.regions.Follow(ground) })
	g.Go(func() error { return s.traces.Run(ground) })
	g.Go(func() error { return s.exports.Run(ground) })
	if s.shift.Tie == nil {
		if err := s.administer(ground, g, drain); err != nil {
			return err
		}
		s.duties(ground, g)
	}
	g.Go(func() error {
		defer end()
		if s.shift.Tie == nil {
			if err := s.agent.Join(either(stop, ground)); err != nil {
				return err
			}
		}
		return s.live(stop, ground, g, drain, run, stdout, stderr)
	})
	return g.Wait()
}

// either ends when one of both does. Nothing is left behind once b has ended.
func either(a, b context.Context) context.Context {
	ctx, cancel := context.WithCancel(b)
	context.AfterFunc(a, cancel)
	return ctx
}

// open builds every part, the lowest first. It contacts nobody.
func (s *sidecar) open() (err error) {
	cfg := s.cfg
	if err := daemon.OwnDir("data_dir", cfg.DataDir); err != nil {
		return err
	}
	if cfg.Workload.Kubelet.URL != "" {
		if s.kubelet, err = attest.NewKubelet(cfg.Workload.Kubelet); err != nil {
			return err
		}
	}
	if s.addresses, err = virtual.Open(filepath.Join(cfg.DataDir, "addresses.json"), cfg.Capture.Virtual, cfg.Capture.Virtual6); err != nil {
		return err
	}
	s.shift.Doors.Beside(s.holdAddresses)
	path := filepath.Join(cfg.DataDir, auditFile)
	log := audit.Config{Path: path, Log: s.log, MaxFile: cfg.Audit.Keep.MaxFile(), Counted: func(k audit.Kind) { s.metrics.AuditRecords(string(k)).Inc() }}
	if s.shift.Tie != nil {
		s.audit, err = audit.FollowLedger(log, audit.LedgerConfig{}, s.shift.Tie, s.shift.Tie.Head())
	} else {
		s.audit, err = audit.OpenLedger(log, audit.LedgerConfig{})
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.audit.Close())
		}
	}()
	if s.judge, err = authz.NewJudge(authz.JudgeConfig{Audit: s.audit, Log: s.log, Environment: cfg.Environment, Metrics: s.metrics}); err != nil {
		return err
	}
	if s.translation.Translator, err = translate.New(translate.Config{Dial: s.dialApp, HTTP2: cfg.Inbound.AppProtocol == appH2C, Log: s.log}); err != nil {
		return err
	}
	up := upstream.Config{
		TLS: func(want spiffeid.ID) *tls.Config {
			return svid.ClientTLS(s.agent.Source(), want, hop.Proto, http2.Proto, "http/1.1")
		},
		Generation: func() uint64 { return s.agent.Generation() },
		Standing:   func(cs tls.ConnectionState) error { return s.agent.Source().Standing(cs) },
		Limits:     cfg.Limits.http(),
		Zone:       cfg.Workload.Labels.Get(mesh.LabelZone),
		Changed:    s.changed, Dialled: s.dialled,
	}
	if s.services, err = upstream.New(up); err != nil {
		return err
	}
	plain := up
	plain.TLS = func(want spiffeid.ID) *tls.Config { return svid.ClientTLS(s.agent.Source(), want) }
	if s.streams, err = upstream.New(plain); err != nil {
		return err
	}
	if len(cfg.Egress.Addresses) > 0 {
		gw := up // tunnels are HTTP/1.1
		gw.TLS = func(want spiffeid.ID) *tls.Config {
			return svid.ClientTLS(s.agent.Source(), want, hop.Proto, "http/1.1")
		}
		if s.gateways, err = upstream.New(gw); err != nil {
			return err
		}
		s.gateways.Use(gatewaySnapshot(cfg.Egress))
	}
	if err = errors.Join(s.openExports(), s.openTokens(), s.openMirror(), s.openRegions(), s.openNames()); err != nil {
		return err
	}
	s.agent, err = agent.Open(agent.Config{
		TrustDomain: cfg.TrustDomain, Kind: control.KindSidecar, DataDir: cfg.DataDir, Join: cfg.Issuer,
		Policy: cfg.Policy, Record: s.audit.Append, Identity: cfg.Workload.Identity, Inbound: s.advertised(), Labels: cfg.Workload.Labels, Serving: s.serving, Use: s.use, Try: s.judge.Try, Rejudge: s.rejudge,
		Audit: path, Edges: s.edges, Samples: s.samples, Metrics: s.metrics, Ready: s.ready, Log: s.log, Steering: s.steering(), Show: s.taps.Passer(s.audit),
	})
	if err != nil {
		return err
	}
	s.agent.Source().Exchange(cfg.TLS.KeyExchange)
	if s.shift.Tie != nil {
		return s.agent.Known()
	}
	return s.hold()
}

// hold opens what only the process may have that writes the audit log.
func (s *sidecar) hold() (err error) {
	cfg := s.cfg
	if s.checked, err = s.audit.Tree(); err != nil {
		return err
	}
	if s.sinks, err = sink.NewAll(cfg.Audit, sink.Env{
		Program: "sidecar", Path: filepath.Join(cfg.DataDir, auditFile), Durable: s.audit.Durable, Append: s.audit.Append,
		Identity: func() (*tls.Certificate, error) { return s.agent.Source().Certificate() }, Metrics: s.metrics, Log: s.log,
	}); err != nil {
		return err
	}
	spool, err := s.audit.Spool(cfg.Audit.Spool)
	if err != nil {
		return err
	}
	sink.Report(s.sinks, spool)
	s.metrics.AuditSpool(func() telemetry.Spool { return telemetry.Spool(spool.State()) })
	s.agent.Hold(s.checked, spool)
	s.holdArchives()
	return nil
}

// duties starts what hold has opened.
func (s *sidecar) duties(ground context.Context, g *errgroup.Group) {
	g.Go(func() error { return s.audit.Keep(s.cfg.Audit.Keep, s.checked).Run(ground) })
	g.Go(func() error { return s.checked.Run(ground) })
	s.keepArchives(ground, g)
	for _, k := range s.sinks {
		g.Go(func() error { return k.Run(ground) })
	}
}

// use puts a snapshot in force: nothing is changed before all of it is good.
func (s *sidecar) use(snap *mesh.Snapshot) error {
	set, err := authz.Compile(snap)
	if err != nil {
		return err
	}
	tokens, err := authz.CompileTokens(snap.Tokens)
	if err != nil {
		return err
	}
	routes, err := route.Compile(snap, route.Options{Region: s.regions.Region})
	if err != nil {
		return err
	}
	faces := &s.translation
	faces.mu.Lock()
	defer faces.mu.Unlock()
	offer, err := faces.Read(translateOf(snap, faces.self))
	if err != nil {
		return err
	}
	shown, err := authz.CompileTokens(snap.Shown)
	if err != nil {
		return err
	}
	if err := s.keys.Use(bothIssuers(tokens, shown)); err != nil {
		return err
	}
	faces.newest = snap
	faces.Use(offer)
	if s.virtual || s.names != nil {
		if err := s.addresses.Use(meshNames(snap)); err != nil {
			s.log.Error("not every service has a virtual address that lasts", "err", err)
		}
	}
	if out := s.outbound.Load(); out != nil {
		out.Prepare(snap, routes)
	}
	s.judge.Use(set)
	if s.names != nil {
		s.names.Use(snap, set)
	}
	s.tokens.Use(tokens)
	s.shown.Use(shown)
	s.services.Use(snap)
	s.streams.Use(snap)
	return nil
}

// rejudge closes what is open and may not go on.
func (s *sidecar) rejudge() {
	if in := s.inbound.Load(); in != nil {
		in.Rejudge()
	}
	if out := s.outbound.Load(); out != nil {
		out.Rejudge()
	}
}

func (s *sidecar) shared(reporter string) proxy.Shared {
	return proxy.Shared{
		Audit: s.audit, Signals: telemetry.NewSignals(s.metrics, reporter), Edges: s.edges, Log: s.log, Shadows: &s.shadows,
		DrainTimeout: s.cfg.Drain.Timeout, Now: s.now, Metrics: s.metrics, Tracer: s.tracer, Reporter: reporter, Taps: &s.taps,
		Limits: s.cfg.Limits.http(), MaxConns: s.cfg.Limits.Connections, MaxInFlight: s.cfg.Limits.Calls,
	}
}

// A door is a listener and what serves it.
type door struct {
	ln  net.Listener
	run func(context.Context, net.Listener) error
}

// listeners opens every door, and none if one cannot be opened.
func (s *sidecar) listeners(self spiffeid.ID) (in, out []door, err error) {
	var open []net.Listener
	defer func() {
		if err != nil {
			for _, ln := range open {
				ln.Close()
			}
		}
	}()
	at := func(field, addr string) net.Listener {
		if err != nil {
			return nil
		}
		var ln net.Listener
		if ln, err = s.shift.Doors.TCP(field, addr); err == nil {
			open = append(open, ln)
		}
		return ln
	}
	if s.cfg.Inbound.Listen != "" {
		inbound, e := proxy.NewInbound(proxy.InboundConfig{
			Shared: s.shared("inbound"), Self: self, Port: s.port, Name: s.name, Host: s.host, Keeper: s.recorder, ShadowOnly: s.cfg.Shadow.Only, Stream: s.stream, ProxyFrom: s.cfg.Inbound.ProxyProtocol,
			TLS: svid.ServerTLS(s.agent.Source(), anyMember(s.cfg.TrustDomain), hop.Proto, http2.Proto, "http/1.1"), PeerID: svid.PeerID,
			Standing: s.agent.Source().Standing, Judge: s.judge, Tokens: s.tokens, App: s.app(), ForwardedFrom: s.cfg.Inbound.ForwardedFrom, RestartTrace: s.cfg.Tracing.RestartFrom,
			MaxHandshakes: s.cfg.Limits.Handshakes, Rates: s.cfg.Inbound.Rates, MaxPerPeer: s.cfg.Limits.PeerConnections, HandshakeTimeout: s.cfg.Limits.HandshakeTimeout,
			Original: capture.OriginalDst, Translate: s.translation.Translator,
		})
		if e != nil {
			return nil, nil, e
		}
		s.inbound.Store(inbound)
		in = append(in, door{at("inbound.listen", s.cfg.Inbound.Listen), inbound.Run})
	}
	outbound, e := s.newOutbound(self)
	if e != nil {
		return nil, nil, e
	}
	within := func(field string, a netip.AddrPort) net.Listener {
		if s.room != nil {
			if ln, ok := s.room.Listener(a); ok {
				open = append(open, ln)
				return ln
			}
		}
		return at(field, a.String())
	}
	brought := func(field string, a netip.AddrPort) net.Listener { // where the kernel brings connections to
		ln := within(field, a)
		if err == nil {
			err = capture.KeepSYN(ln)
		}
		return ln
	}
	if a := s.cfg.Outbound.Listen; a.IsValid() {
		out = append(out, door{brought("outbound.listen", a), outbound.Run})
		if (s.cfg.Capture.Enabled() || s.room != nil) && hasIPv6() { // the kernel brings connections to the loopback address of their family
			out = append(out, door{brought("outbound.listen", twin(a)), outbound.Run})
		}
	}
	names, e := s.nameDoors(self, brought)
	for _, d := range names {
		if d.ln != nil { // within could not open one
			open = append(open, d.ln)
		}
	}
	if e != nil {
		return nil, nil, e
	}
	out = append(out, names...)
	for i, u := range s.cfg.Outbound.Upstreams {
		ln := within(fmt.Sprintf("outbound.upstreams[%d].listen", i), u.Listen)
		out = append(out, door{ln, func(ctx context.Context, ln net.Listener) error { return outbound.RunFor(ctx, ln, u.Service) }})
	}
	if err == nil {
		err = s.shift.Doors.Unclaimed()
	}
	return in, out, err
}

// newOutbound makes the way out, which heeds the faults that an operator stopped.
func (s *sidecar) newOutbound(self spiffeid.ID) (*proxy.Outbound, error) {
	outbound, err := proxy.NewOutbound(proxy.OutboundConfig{
		Shared: s.shared("outbound"), Self: self, Local: s.isWorkload, Snapshot: s.agent.Snapshot, Region: s.regions.Region,
		Services: s.services, Streams: s.streams, Gateways: s.gateways, Standing: s.agent.Source().Standing, Captured: s.captured(), Tokens: s.shown, Leaf: s.leaf,
		KeepForwardedFor: s.cfg.Outbound.KeepForwardedFor, Mirror: s.mirror, ShadowOnly: s.cfg.Shadow.Only, ShadowWrites: s.cfg.Shadow.WritesTo, FaultsWait: true,
	})
	if err != nil {
		return nil, err
	}
	s.outbound.Store(outbound)
	if stops := s.stops.Load(); stops != nil {
		outbound.Heed(stops)
	}
	return outbound, nil
}

// anyMember lets every workload of the trust domain shake hands: what it may
// do is decided for each call, so that a refusal has a decision.
func anyMember(td spiffeid.TrustDomain) func(spiffeid.ID) error {
	return func(id spiffeid.ID) error {
		if !id.MemberOf(td) {
			return fmt.Errorf("%s is not in trust domain %s", id, td)
		}
		if strings.HasPrefix(id.Path(), "/spire/") {
			return fmt.Errorf("%s is a node or an issuer, not a workload", id)
		}
		return nil
	}
}

const readyDoors = "listeners"

// appEvery is how often an application that starts is looked at.
const appEvery = 20 * time.Millisecond

// awaitApp waits until the application accepts connections, if it takes any:
// only then are peers told of it, and only then is the sidecar ready.
func (s *sidecar) awaitApp(ground context.Context) bool {
	for s.cfg.Inbound.Listen != "" {
		c, err := s.dialApp(ground)
		if err == nil {
			c.Close()
			break
		}
		s.ready.Set(readyDoors, fmt.Errorf("the application does not accept connections yet: %w", err))
		daemon.Pause(ground, appEvery)
		if ground.Err() != nil {
			return false
		}
	}
	close(s.serving)
	return true
}

// live waits for identity and policy, opens the doors, starts the application
// and stays until one of them ends; then it closes the doors in order: first
// the way in, then the application, last the way out.
func (s *sidecar) live(stop, ground context.Context, g *errgroup.Group, drain func(), run daemon.Run, stdout, stderr io.Writer) error {
	s.ready.Expect(readyDoors)
	g.Go(func() error { return s.follow(ground, g) })
	g.Go(func() error { return s.keepInspection(ground) })
	self, err := s.agent.AwaitPolicy(either(stop, ground))
	if err != nil || stop.Err() != nil {
		return nil //nolint:nilerr // asked to stop before it began
	}
	if run.Isolate {
		if err := s.isolateApp(ground, g, run.Program, stdout, stderr); err != nil {
			return err
		}
		defer s.room.Close()
	}
	if err := s.translation.serve(self); err != nil {
		return err
	}
	in, out, err := s.listeners(self)
	if err != nil {
		return err
	}
	inCtx, closeIn := context.WithCancel(ground)
	defer closeIn()
	outCtx, closeOut := context.WithCancel(ground)
	defer closeOut()
	var ins, outs errgroup.Group
	for _, d := range in {
		ins.Go(func() error { return d.run(inCtx, d.ln) })
	}
	for _, d := range out {
		outs.Go(func() error { return d.run(outCtx, d.ln) })
	}
	s.testNames(ground, g)
	api, err := s.workloadAPI()
	if err != nil {
		return err
	}
	g.Go(func() error { return api(ground) })
	done, err := s.startApp(ground, g, run.Program, stdout, stderr)
	if err != nil {
		return err
	}
	if err := s.keep(stop, ground, g, drain); err != nil {
		return err
	}
	g.Go(func() error { return s.serves(either(stop, ground), ground, g, self, drain) })
	if !s.stay(stop, ground, done) {
		s.ready.Set(readyDoors, errors.New("draining"))
		_ = daemon.Notify("STOPPING=1")
		daemon.Pause(s.now, s.cfg.Drain.Wait)
	}
	closeIn()
	err = ins.Wait()
	status := s.endChild(s.now)
	s.awaitLeave()
	closeOut()
	err = errors.Join(err, outs.Wait(), status)
	s.shift.AwaitDuties(ground, s.now, s.cfg.Drain.Timeout)
	return err
}
