package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport/internal/attest"
	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/ca"
	"sallyport/internal/capture"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/federation"
	"sallyport/internal/handover"
	"sallyport/internal/mesh"
	"sallyport/internal/page"
	"sallyport/internal/registry"
	"sallyport/internal/review"
	"sallyport/internal/rollout"
	"sallyport/internal/sink"
	"sallyport/internal/store"
	"sallyport/internal/telemetry"
)

// An issuer is the composed process.
type issuer struct {
	cfg      *Config
	folder   *mesh.Folder
	files    *mesh.Files // as the folder was last at rest
	log      *slog.Logger
	level    *slog.LevelVar
	ready    *daemon.Ready
	metrics  *telemetry.Registry
	audit    *audit.Log
	store    store.Store
	ca       *ca.CA
	registry *registry.Registry
	server   *control.Server
	rollouts *rollout.Conductor
	received *received
	heard    *heard
	charts   *charts
	auth     *authority
	page     *page.Page
	witness  *witness
	sinks    []*sink.Sink
	exports  *sink.Metrics // nil without a collector
	started  time.Time
	doors    handover.Doors
	follower *federation.Follower
	// federations are those of the configuration and those made by calls.
	federations *federations

	// name is this issuer's over restarts, instance that of this start; both
	// are empty unless the store is shared.
	name, instance string
}

// serve runs the issuer until a signal, or until a part of it fails.
func serve(ctx context.Context, cfg *Config, stderr io.Writer) (err error) {
	in := &issuer{cfg: cfg, folder: &mesh.Folder{Dir: cfg.Policies, TrustDomain: cfg.TrustDomain}, started: time.Now(), ready: new(daemon.Ready), metrics: cfg.Metrics.Registry(cfg.TrustDomain.Name())}
	tty := false
	if f, ok := stderr.(*os.File); ok {
		tty = daemon.IsTerminal(f)
	}
	in.log, in.level = daemon.NewLogger(stderr, cfg.Log.Level, tty)
	defer func() { err = errors.Join(err, in.close()) }()
	if err := in.doors.Activate(); err != nil {
		return err
	}
	if err := in.open(ctx); err != nil {
		return err
	}
	stop, now, cancel := daemon.Signals(ctx)
	defer cancel()
	ln, err := in.doors.TCP("listen", cfg.Listen)
	if err != nil {
		return err
	}
	public, err := in.openDoors()
	var scrape net.Listener
	if err == nil {
		scrape, err = in.doors.TCP("metrics.listen", cfg.Metrics.Listen)
	}
	if err == nil {
		err = in.doors.Unclaimed()
	}
	if err != nil {
		ln.Close()
		return err
	}
	if err := daemon.OwnDir("run_dir", cfg.RunDir); err != nil {
		ln.Close()
		return err
	}
	api, err := capture.ListenUnix(filepath.Join(cfg.RunDir, "api.sock"), 0o600)
	if err != nil {
		ln.Close()
		return err
	}
	admin := &daemon.Admin{
		Socket: filepath.Join(cfg.RunDir, "admin.sock"), Scrape: scrape, Ready: in.ready, Metrics: in.metrics.Handler(),
		ConfigDump: func() any { return cfg }, Level: in.level, Drain: cancel, Pprof: cfg.Pprof, Log: in.log,
	}
	g, run := errgroup.WithContext(stop)
	// The second signal ends at once. Not when serve returns, which ends now too:
	// then its error is to be said first.
	defer context.AfterFunc(now, func() { os.Exit(daemon.Failed) })()
	g.Go(func() error { return in.audit.Run(run) })
	g.Go(func() error { return in.exports.Run(run) })
	g.Go(func() error { return in.witness.tree.Run(run) })
	g.Go(func() error { return in.audit.Keep(cfg.Audit.Keep, in.witness.tree).Run(run) })
	g.Go(func() error { return in.received.sweep(run, in.witness.w, in.audit) })
	for _, k := range in.sinks {
		g.Go(func() error { return k.Run(run) })
	}
	g.Go(func() error { return in.witness.Run(run) })
	g.Go(func() error { return in.ca.Run(run) })
	g.Go(func() error { return in.registry.Run(run) })
	g.Go(func() error { return in.rollouts.Run(run) })
	g.Go(func() error { return in.server.Serve(run, ln) })
	g.Go(func() error { return in.follower.Run(run) })
	g.Go(func() error { return in.followFederation(run) })
	g.Go(func() error { return in.serveDoors(run, public) })
	g.Go(func() error { return in.server.ServeAdmin(run, api.UnixListener) })
	g.Go(func() error { return admin.Run(run) })
	g.Go(func() error { return in.followCA(run) })
	g.Go(func() error { return in.publishCRL(run) })
	g.Go(func() error { return in.followIssuers(run) })
	if !in.pushed() {
		g.Go(func() error { return daemon.Watch(run, cfg.Policies, 30*time.Second, func() { in.reload(run) }) })
	}
	in.ready.Set("serving", nil)
	in.log.Info("issuer ready", "trust_domain", cfg.TrustDomain, "listen", ln.Addr().String(), "policy_revision", in.registry.Status().PolicyRevision)
	_ = daemon.Notify("READY=1")
	return g.Wait()
}

// open builds every part, the lowest first.
func (in *issuer) open(ctx context.Context) error {
	cfg := in.cfg
	in.ready.Expect("serving", "policy")
	if err := daemon.OwnDir("data_dir", cfg.DataDir); err != nil {
		return err
	}
	if err := errors.Join(in.openAudit(), in.openExports()); err != nil {
		return err
	}
	if err := in.openStore(ctx); err != nil {
		return err
	}
	pass, err := passphrase(cfg.CA.PassphraseFile)
	if err != nil {
		return err
	}
	conf := ca.Config{
		TrustDomain: cfg.TrustDomain, Dir: filepath.Join(cfg.DataDir, "ca"), RootDir: cfg.CA.RootDir, Passphrase: pass, KMS: cfg.CA.KMS,
		X509TTL: cfg.CA.X509TTL, JWTTTL: cfg.CA.JWTTTL, JWTIssuer: cfg.OIDC.Issuer, AllowShort: cfg.CA.AllowShortTTL,
		Audit: in.audit, Log: in.log, Holders: in.holders, SharedRoot: in.name != "" || cfg.CA.RootDir != "",
	}
	upstream, err := cfg.upstream()
	if err != nil {
		return err
	}
	if upstream != nil {
		conf.Upstream, conf.OnUpstream = upstream, in.onUpstream
	}
	if in.ca, err = ca.Open(ctx, conf); err != nil {
		return err
	}
	if upstream != nil && time.Now().Before(in.ca.Status().IntermediateExpires) {
		in.ready.Set("upstream", nil) // whether or not it answers now
	}
	if err := in.writeBundle(); err != nil {
		return err
	}
	if err := in.openRegistry(); err != nil {
		return err
	}
	if err := in.registry.Load(ctx); err != nil {
		return err
	}
	if err := in.joinIssuers(ctx); err != nil {
		return err
	}
	if err := in.firstPolicies(ctx); err != nil {
		return err
	}
	if in.received, err = openReceived(filepath.Join(cfg.DataDir, "received"), cfg.Audit.Keep, in.log, in.audit.Append); err != nil {
		return err
	}
	verifiers, err := nodeVerifiers(cfg, in.registry)
	if err != nil {
		return err
	}
	if err := in.openFederation(); err != nil {
		return err
	}
	if err := in.openWitness(ctx); err != nil {
		return err
	}
	in.received.signed = in.witness.signed
	in.heard = newHeard(in.registry.Current)
	in.received.heard, in.received.leads = in.heard, in.leads
	if err := in.openRollouts(); err != nil {
		return err
	}
	in.charts = &charts{in: in}
	in.auth = &authority{ca: in.ca, others: in.registry.Keys, publish: in.registry.AddKey, server: in.ca.NewServer(), agentTTL: cfg.CA.AgentTTL}
	in.server, err = control.NewServer(control.ServerConfig{
		TrustDomain: cfg.TrustDomain, Registry: in.registry, Authority: in.auth, Downstream: in.auth, Roots: in.auth, Audit: in.received,
		Witness: in.witness, Explain: in.why, Chart: in.charts.Chart, PageLink: in.link(),
		Verifiers: verifiers, Federated: in.federated, FederatedDomains: in.federatedDomains, Federator: in.federations,
		Why: whyRefused, Alone: in.instance == "", OnAttest: in.recordAttest, Endpoints: cfg.Endpoints.Allow, OnAnnounce: in.recordAnnounced, OnToken: in.recordToken, Log: in.log,
		Keeper: in.registry, Policies: in.policyKeeper(), Rollouts: deliveries{in.rollouts}, SetFile: in.setFile(), Admins: authz.NewAdmins(in.registry.Policies, in.log), OnAdmin: in.recordAdmin,
		OnMessage: func(method string) { in.metrics.IssuerMessages(method).Inc() }, OnCall: in.countCall(),
	})
	return err
}

// openRegistry makes the registry, which knows nothing yet.
func (in *issuer) openRegistry() error {
	floor, err := in.openFloor()
	if err != nil {
		return err
	}
	in.registry, err = registry.New(registry.Config{
		Store: in.store, TrustDomain: in.cfg.TrustDomain, Log: in.log, Check: review.Red, Instance: in.instance, OnRevoke: in.recordRevoked, OnFaultStop: in.recordFaultStop,
		Verify: in.verifier(), OnUnsigned: in.passedOver, OnRollout: in.recordRollout, Floor: floor, OnFloor: in.keepFloor,
	})
	return err
}

// openAudit opens the issuer's own log, and what sends it away.
func (in *issuer) openAudit() (err error) {
	if in.audit, err = audit.Open(audit.Config{Path: filepath.Join(in.cfg.DataDir, "audit.jsonl"), Log: in.log, MaxFile: in.cfg.Audit.Keep.MaxFile(), Counted: func(k audit.Kind) { in.metrics.AuditRecords(string(k)).Inc() }}); err != nil {
		return err
	}
	if in.sinks, err = sink.NewAll(in.cfg.Audit, sink.Env{
		Program: "issuer", Path: filepath.Join(in.cfg.DataDir, "audit.jsonl"), Durable: in.audit.Durable, Append: in.audit.Append,
		Metrics: in.metrics, Log: in.log,
	}); err != nil {
		return err
	}
	spool, err := in.audit.Spool(in.cfg.Audit.Spool)
	if err != nil {
		return err
	}
	sink.Report(in.sinks, spool)
	in.metrics.AuditSpool(func() telemetry.Spool { return telemetry.Spool(spool.State()) })
	return nil
}

// followCA tells the proxies, and the bundle file, of each change of the
// authorities.
func (in *issuer) followCA(ctx context.Context) error {
	for {
		changed := in.ca.Changed()
		if err := in.writeBundle(); err != nil {
			in.log.Error("bundle file not written", "err", err)
		}
		st := in.ca.Status()
		in.metrics.CertExpiry("root").Set(st.RootExpires)
		in.metrics.CertExpiry("intermediate").Set(st.IntermediateExpires)
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			in.publishKeys(ctx)
			in.server.SyncNow()
		}
	}
}

func (in *issuer) writeBundle() error {
	return daemon.WriteFile(filepath.Join(in.cfg.DataDir, "bundle.pem"), bundlePEM(in.ca), 0o644)
}

func (in *issuer) close() error {
	var errs []error
	if in.received != nil {
		errs = append(errs, in.received.Close())
	}
	if in.ca != nil {
		errs = append(errs, in.ca.Close())
	}
	if in.store != nil {
		errs = append(errs, in.store.Close())
	}
	if in.audit != nil {
		errs = append(errs, in.audit.Close())
	}
	return errors.Join(errs...)
}

// passphrase reads that of the CA keys; none without a file.
func passphrase(file string) ([]byte, error) {
	if file == "" {
		return nil, nil
	}
	return secretLine("ca.passphrase_file", file, "the passphrase of the CA keys")
}

// secretLine reads the first line of the file that a setting names.
func secretLine(field, file, what string) ([]byte, error) {
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, daemon.Hint(fmt.Errorf("%s %s does not exist", field, file), "write "+what+" into it, mode 0600")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, daemon.Hint(fmt.Errorf("%s %s may be read by others (mode %04o)", field, file, info.Mode().Perm()), "chmod 600 "+file)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	line, _, _ := strings.Cut(string(b), "\n")
	if line == "" {
		return nil, daemon.Hint(fmt.Errorf("%s %s is empty", field, file), "write "+what+" into its first line")
	}
	return []byte(line), nil
}

// whyRefused names a refusal of evidence for the wire.
func whyRefused(err error) control.Refusal {
	switch {
	case errors.Is(err, registry.ErrTokenUnknown):
		return control.RefusalTokenUnknown
	case errors.Is(err, registry.ErrTokenExpired):
		return control.RefusalTokenExpired
	case errors.Is(err, registry.ErrTokenUsed):
		return control.RefusalTokenUsed
	case errors.Is(err, attest.ErrEvidence):
		return control.RefusalEvidence
	}
	return control.RefusalNone
}

// recordToken writes down who made a join token, and for whom: never the token.
func (in *issuer) recordToken(_ context.Context, agent spiffeid.ID, expires time.Time, by string) error {
	return in.audit.Append(&audit.Record{
		Kind: audit.KindAdmin, Decision: audit.Allow, Dst: agent.String(), Verb: "token create", Peer: by,
		Detail: "good until " + expires.UTC().Format(time.RFC3339),
	})
}

// recordAttest writes down who asked to join and what came of it.
func (in *issuer) recordAttest(_ context.Context, a control.Attestation) error {
	r := audit.Record{Kind: audit.KindAttest, Decision: audit.Allow, Reason: string(a.Refusal), Peer: a.Peer, Detail: a.Type}
	if a.Refusal != control.RefusalNone {
		r.Decision = audit.Deny
	}
	if !a.Agent.IsZero() {
		r.Src = a.Agent.String()
	}
	return in.audit.Append(&r)
}

// leads says that the proxy of a workload is a gateway.
func (in *issuer) leads(agent, workload spiffeid.ID) bool {
	return slices.ContainsFunc(in.registry.Proxies(), func(p mesh.Proxy) bool {
		return p.Agent == agent && p.Workload == workload && p.Kind == control.KindGateway
	})
}
