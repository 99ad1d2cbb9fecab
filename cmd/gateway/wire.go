package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport/internal/agent"
	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/egress"
	"sallyport/internal/handover"
	"sallyport/internal/mesh"
	"sallyport/internal/nameserver"
	"sallyport/internal/sink"
	"sallyport/internal/svid"
	"sallyport/internal/tap"
	"sallyport/internal/telemetry"
)

// A gateway is the composed process.
type gateway struct {
	cfg     *Config
	log     *slog.Logger
	level   *slog.LevelVar
	ready   *daemon.Ready
	metrics *telemetry.Registry
	// tracer keeps spans, traces sends them, and exports the metrics; nil without a
	// collector.
	tracer  *telemetry.Tracer
	traces  *sink.Traces
	exports *sink.Metrics
	audit   *audit.Ledger
	// checked is the tree over the audit log.
	checked *audit.Tree
	// sinks send the audit log to other systems.
	sinks []*sink.Sink
	judge *authz.Judge
	agent *agent.Agent
	// inForce is the snapshot that the judge has the rules of.
	inForce atomic.Pointer[mesh.Snapshot]
	egress  *egress.Gateway
	// taps show requests and tunnels to whoever asks on the admin socket, or through
	// the issuer.
	taps tap.Taps
	// inspector stands in for hosts that are inspected.
	inspector *egress.Inspector
	// names answers DNS questions; nil when nobody asks here.
	names *nameserver.Names

	// now ends when the process is to leave at once.
	now context.Context
	// shift is from the process before to the next one.
	shift *handover.Shift
}

// readyListener is the condition that tunnels are accepted.
const readyListener = "listener"

// auditFile is the audit log inside DataDir.
const auditFile = "audit.jsonl"

// serve runs the gateway until a signal, or until a part of it fails.
func serve(ctx context.Context, cfg *Config, takeover bool, stderr io.Writer) (err error) {
	gw := &gateway{cfg: cfg, ready: new(daemon.Ready), metrics: cfg.Metrics.Registry(cfg.TrustDomain.Name())}
	f, ok := stderr.(*os.File)
	gw.log, gw.level = daemon.NewLogger(stderr, cfg.Log.Level, ok && daemon.IsTerminal(f))
	gw.shift = handover.NewShift("gateway", cfg.RunDir, cfg.DataDir, gw.log)
	if takeover {
		if err := gw.shift.TakeOver(); err != nil {
			return err
		}
		defer gw.shift.LetGo()
	}
	if err := gw.shift.Doors.Activate(); err != nil {
		return err
	}
	if err := gw.open(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, gw.close()) }()
	signalled, now, cancel := daemon.Signals(ctx)
	defer cancel()
	gw.now = now
	stop, drain := context.WithCancel(signalled)
	defer drain()
	ground, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	g, ground := errgroup.WithContext(ground)
	g.Go(func() error { return gw.audit.Run(ground) })
	g.Go(func() error { return daemon.Settle(ground) })
	g.Go(func() error { return gw.judge.Run(ground) })
	g.Go(func() error { return gw.traces.Run(ground) })
	g.Go(func() error { return gw.exports.Run(ground) })
	if gw.shift.Tie == nil {
		if err := gw.administer(ground, g, drain); err != nil {
			return err
		}
		gw.duties(ground, g)
	}
	g.Go(func() error {
		defer end()
		begin, cancel := context.WithCancel(ground)
		defer context.AfterFunc(stop, cancel)()
		defer cancel()
		if gw.shift.Tie == nil {
			if err := gw.agent.Join(begin); err != nil {
				return err
			}
		}
		g.Go(func() error { return gw.follow(ground, g) })
		self, err := gw.agent.AwaitPolicy(begin)
		if err != nil {
			return nil //nolint:nilerr // asked to stop before it began
		}
		return gw.live(stop, ground, g, drain, self)
	})
	return g.Wait()
}

// openExports prepares to send spans and metrics to collectors, if there are any.
func (gw *gateway) openExports() (err error) {
	env := sink.Env{
		Program: "gateway", Identity: func() (*tls.Certificate, error) { return gw.agent.Source().Certificate() }, Metrics: gw.metrics, Log: gw.log,
	}
	name := func() string { return "gateway" }
	if gw.traces, err = sink.NewTraces(gw.cfg.Tracing, gw.tracer, env, name); err != nil {
		return err
	}
	gw.exports, err = sink.NewMetrics(gw.cfg.Metrics, env, name)
	return err
}

// administer serves the admin socket.
func (gw *gateway) administer(ground context.Context, g *errgroup.Group, drain func()) error {
	path := filepath.Join(gw.cfg.RunDir, "admin.sock")
	ln, err := gw.shift.Doors.Private("admin", path, gw.log)
	if err != nil {
		return err
	}
	scrape, err := gw.shift.Doors.TCP("metrics.listen", gw.cfg.Metrics.Listen)
	if err != nil {
		return err
	}
	admin := &daemon.Admin{
		Socket: path, Listener: ln, Scrape: scrape, Ready: gw.ready, Metrics: gw.metrics.Handler(),
		ConfigDump: func() any { return gw.cfg }, Level: gw.level, Drain: drain, Pprof: gw.cfg.Pprof, Log: gw.log,
		Extra: map[string]http.Handler{"GET /why/{id}": gw.judge.WhyHandler(), "GET /candidate": gw.judge.CandidateHandler(), "GET /troubles": http.HandlerFunc(gw.serveTroubles), "GET /tap": gw.taps.Handler(gw.audit)},
	}
	g.Go(func() error { return admin.Run(ground) })
	return nil
}

// open builds every part, the lowest first. It contacts nobody.
func (gw *gateway) open() (err error) {
	cfg := gw.cfg
	gw.ready.Expect(readyListener)
	if err := daemon.OwnDir("data_dir", cfg.DataDir); err != nil {
		return err
	}
	path := filepath.Join(cfg.DataDir, auditFile)
	log := audit.Config{Path: path, Log: gw.log, MaxFile: cfg.Audit.Keep.MaxFile(), Counted: func(k audit.Kind) { gw.metrics.AuditRecords(string(k)).Inc() }}
	if gw.shift.Tie != nil {
		gw.audit, err = audit.FollowLedger(log, audit.LedgerConfig{}, gw.shift.Tie, gw.shift.Tie.Head())
	} else {
		gw.audit, err = audit.OpenLedger(log, audit.LedgerConfig{})
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, gw.audit.Close())
		}
	}()
	if gw.judge, err = authz.NewJudge(authz.JudgeConfig{Audit: gw.audit, Log: gw.log, Environment: cfg.Environment, Metrics: gw.metrics}); err != nil {
		return err
	}
	servers := make([]egress.Server, len(cfg.Resolvers))
	for i, a := range cfg.Resolvers {
		servers[i] = egress.Server{Addr: a}
	}
	names, err := egress.NewResolver(egress.ResolverConfig{Servers: servers})
	if err != nil {
		return err
	}
	gw.tracer = cfg.Tracing.Tracer(gw.metrics)
	if err = gw.openNames(); err != nil {
		return err
	}
	if gw.inspector, err = egress.OpenInspector(cfg.InspectionKey); err != nil {
		return err
	}
	edges := telemetry.NewEdges()
	gw.agent, err = agent.Open(agent.Config{
		TrustDomain: cfg.TrustDomain, Kind: control.KindGateway, DataDir: cfg.DataDir, Join: cfg.Issuer,
		Policy: cfg.Policy, Record: gw.audit.Append, Identity: cfg.Identity, Use: gw.use, Try: gw.judge.Try, Rejudge: gw.rejudge, Audit: path, Edges: edges, Metrics: gw.metrics, Ready: gw.ready, Log: gw.log,
		Steering: gw.steering(), Show: gw.taps.Passer(gw.audit),
	})
	if err != nil {
		return err
	}
	gw.agent.Source().Exchange(cfg.TLS.KeyExchange)
	if err := gw.openExports(); err != nil {
		return err
	}
	gw.egress, err = egress.New(egress.Config{
		TLS: svid.ServerTLS(gw.agent.Source(), gw.member), Judge: gw.judge, Snapshot: gw.inForce.Load,
		Standing: gw.agent.Source().Standing,
		Names:    names, Audit: gw.audit, Log: gw.log, Metrics: gw.metrics, Edges: edges, Tracer: gw.tracer,
		Secrets: cfg.secrets(), Inspector: gw.inspector, Limits: cfg.Limits.egress(), Troubled: gw.troubled, Taps: &gw.taps,
	})
	if err != nil {
		return err
	}
	if gw.shift.Tie != nil {
		return gw.agent.Known()
	}
	return gw.hold()
}

// steering levels budgets with other gateways. A gateway makes no faults that could
// be stopped.
func (gw *gateway) steering() *control.Steering {
	return &control.Steering{
		Traffic: gw.traffic,
		Stop:    func(*mesh.FaultStops) {},
		Share:   func(totals []mesh.Total) { gw.egress.Share(totals) },
	}
}

// hold opens what only the process may have that writes the audit log.
func (gw *gateway) hold() (err error) {
	cfg := gw.cfg
	if gw.checked, err = gw.audit.Tree(); err != nil {
		return err
	}
	if gw.sinks, err = sink.NewAll(cfg.Audit, sink.Env{
		Program: "gateway", Path: filepath.Join(cfg.DataDir, auditFile), Durable: gw.audit.Durable, Append: gw.audit.Append,
		Identity: func() (*tls.Certificate, error) { return gw.agent.Source().Certificate() }, Metrics: gw.metrics, Log: gw.log,
	}); err != nil {
		return err
	}
	spool, err := gw.audit.Spool(cfg.Audit.Spool)
	if err != nil {
		return err
	}
	sink.Report(gw.sinks, spool)
	gw.metrics.AuditSpool(func() telemetry.Spool { return telemetry.Spool(spool.State()) })
	gw.agent.Hold(gw.checked, spool)
	return nil
}

// duties starts what hold has opened.
func (gw *gateway) duties(ground context.Context, g *errgroup.Group) {
	g.Go(func() error { return gw.audit.Keep(gw.cfg.Audit.Keep, gw.checked).Run(ground) })
	g.Go(func() error { return gw.checked.Run(ground) })
	for _, k := range gw.sinks {
		g.Go(func() error { return k.Run(ground) })
	}
}

// member lets every workload of the trust domain shake hands: what it may
// reach is decided for each tunnel, so that a refusal has a decision.
func (gw *gateway) member(id spiffeid.ID) error {
	if !id.MemberOf(gw.cfg.TrustDomain) {
		return fmt.Errorf("%s is not in trust domain %s", id, gw.cfg.TrustDomain)
	}
	if strings.HasPrefix(id.Path(), "/spire/") {
		return fmt.Errorf("%s is a node or an issuer, not a workload", id)
	}
	return nil
}

// use puts a snapshot in force. Nothing is changed before all of it is good.
func (gw *gateway) use(snap *mesh.Snapshot) error {
	set, err := authz.Compile(snap) // checks the rows
	if err != nil {
		return err
	}
	ways := mesh.Snapshot{TrustDomain: snap.TrustDomain, Services: snap.Services, Destinations: snap.Destinations, Routes: snap.Routes}
	if err := ways.Validate(); err != nil {
		return fmt.Errorf("destinations and routes: %w", err)
	}
	if err := gw.inspector.Use(snap); err != nil {
		return err
	}
	gw.judge.Use(set)
	if gw.names != nil {
		gw.names.Use(snap, set)
	}
	gw.inForce.Store(snap)
	return nil
}

// rejudge ends what may not go on.
func (gw *gateway) rejudge() {
	if gw.egress != nil { // nil while the state of an earlier run is taken over
		gw.egress.Rejudge()
	}
}

// live serves until it is told to stop or another process serves in its place,
// then lets the tunnels end.
func (gw *gateway) live(stop, ground context.Context, g *errgroup.Group, drain func(), self spiffeid.ID) error {
	ln, err := gw.shift.Doors.TCP("listen", gw.cfg.Listen)
	if err != nil {
		return err
	}
	if err := gw.shift.Doors.Unclaimed(); err != nil {
		return errors.Join(err, ln.Close())
	}
	serving, finish := context.WithCancel(ground)
	defer finish()
	served := make(chan error, 1)
	go func() { served <- gw.egress.Serve(serving, ln) }()
	if err := gw.serveNames(serving, g); err != nil {
		finish()
		return errors.Join(err, <-served)
	}
	if err := gw.keep(stop, ground, g, drain); err != nil {
		finish()
		return errors.Join(err, <-served)
	}
	if err := gw.serves(ground, g, self, ln.Addr().String(), drain); err != nil {
		finish()
		return errors.Join(err, <-served)
	}
	replaced, err := gw.stay(stop, served)
	if !replaced {
		gw.ready.Set(readyListener, errors.New("draining"))
		_ = daemon.Notify("STOPPING=1")
		daemon.Pause(gw.now, gw.cfg.Drain.Wait)
	}
	finish()
	if err == nil {
		err = <-served
	}
	grace, cancel := context.WithTimeout(gw.now, gw.cfg.Drain.Timeout)
	defer cancel()
	gw.egress.Drain(grace)
	gw.shift.AwaitDuties(ground, gw.now, gw.cfg.Drain.Timeout)
	return err
}
