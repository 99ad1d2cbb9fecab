// Package agent is the life of a proxy beside the issuer: it joins, keeps its
// node identity and its workload's SVIDs fresh, holds the newest snapshot, and
// reports. What it holds is also on disk, so that a restart serves on while no
// issuer answers.
//
// It carries no traffic and judges nothing. Run owns every goroutine.
package agent

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport/internal/attest"
	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/svid"
	"sallyport/internal/telemetry"
)

// Join says how the issuer is reached and how this node proves itself. It is
// part of each proxy's configuration file.
type Join struct {
	// Addresses are tried in turn: host:port. Required.
	Addresses []string `yaml:"addresses"`
	// Bundle is a PEM file with the root certificates of the trust domain, for
	// the first contact; afterwards the bundle is kept fresh. Required.
	Bundle string `yaml:"bundle"`
	// JoinToken proves this node once. JoinTokenFile names a file that holds
	// it. Without Attest one of them is needed until the node has been
	// attested.
	JoinToken     string `yaml:"join_token" secret:"true"`
	JoinTokenFile string `yaml:"join_token_file"`
	// Attest proves this node by what its platform gives it, instead of a
	// token.
	Attest attest.NodeConfig `yaml:"attest"`
}

// Validate reports every mistake, by field.
func (j Join) Validate() error {
	var errs []error
	if len(j.Addresses) == 0 {
		errs = append(errs, errors.New(`issuer.addresses: missing; write the issuer's address, such as ["issuer.corp.example:8443"]`))
	}
	if j.Bundle == "" {
		errs = append(errs, errors.New("issuer.bundle: missing; write the PEM file with the root certificate (the issuer keeps it as bundle.pem in its data_dir)"))
	}
	if j.JoinToken != "" && j.JoinTokenFile != "" {
		errs = append(errs, errors.New("issuer.join_token_file: given beside join_token; keep one of them"))
	}
	if j.Attest.Kind != "" && (j.JoinToken != "" || j.JoinTokenFile != "") {
		errs = append(errs, errors.New("issuer.attest: given beside a join token; keep one of them"))
	}
	errs = append(errs, j.Attest.Validate())
	return errors.Join(errs...)
}

// Config is what an Agent needs.
type Config struct {
	// TrustDomain that everybody here belongs to. Required.
	TrustDomain spiffeid.TrustDomain
	// Kind is control.KindSidecar or control.KindGateway. Required.
	Kind string
	// DataDir keeps the state of the proxy, mode 0700. Required.
	DataDir string
	Join    Join
	// Policy says whose policies are acted on.
	Policy Policy
	// Record keeps what became of signed sets. Required when Policy pins keys.
	Record func(*audit.Record) error
	// Identity is the SPIFFE ID to serve, when the node has several.
	Identity spiffeid.ID
	// Inbound is announced as the endpoint of the services of this identity.
	// Without it nothing is announced.
	Inbound netip.AddrPort
	// Labels are announced with it.
	Labels mesh.Labels
	// Serving, when set, holds the announcement back until it is closed: what
	// is behind Inbound does not answer before.
	Serving <-chan struct{}
	// Use puts a new snapshot in force, wholly or not at all; an error keeps
	// the former one and is told to the issuer. Snapshot gives the new one only
	// once it has returned; then Rejudge is called. Required.
	Use func(*mesh.Snapshot) error
	// Try tries the rows of a candidate beside those in force, nil ends that; an
	// error says that they are not tried and is told to the issuer. Default:
	// candidates are passed over.
	Try func(*mesh.Snapshot) error
	// Rejudge is called once Source believes fewer peers than before, or another
	// snapshot is in force: what is open and may not go on must be closed when it
	// returns. Required.
	Rejudge func()
	// Steering is asked what the proxy carries, and told what concerns that.
	// Default: the issuer hears nothing of it.
	Steering *control.Steering
	// Show shows calls to an operator who has asked the issuer. Optional.
	Show func(context.Context, control.Look) error
	// Audit is the path of the log that is sent to the issuer. Required.
	Audit string
	// Tree is the tree over that log, whose checkpoints the issuer is to sign.
	// Default: that of Hold, or none are.
	Tree *audit.Tree
	// Edges are reported to the issuer. Required.
	Edges *telemetry.Edges
	// Samples are the calls of rollouts that were counted since it was last asked,
	// for the issuer. Default: none are.
	Samples func() []mesh.Sample
	// Metrics says how things are. Nil: nothing is counted.
	Metrics *telemetry.Registry
	// Ready says so too. Required.
	Ready *daemon.Ready
	// Log is for operators. Required.
	Log *slog.Logger

	// reportEvery is how often the edges are reported. Default 10 s.
	reportEvery time.Duration
}

func (c Config) validate() error {
	var errs []error
	for _, f := range []struct {
		name    string
		missing bool
	}{
		{"trust domain", c.TrustDomain.IsZero()}, {"kind", c.Kind == ""}, {"data dir", c.DataDir == ""},
		{"use", c.Use == nil}, {"rejudge", c.Rejudge == nil}, {"audit", c.Audit == ""}, {"edges", c.Edges == nil},
		{"record", c.Policy.Signers.Pinned() && c.Record == nil}, {"ready", c.Ready == nil}, {"log", c.Log == nil},
	} {
		if f.missing {
			errs = append(errs, errors.New(f.name+": missing"))
		}
	}
	if !c.Identity.IsZero() && !c.Identity.MemberOf(c.TrustDomain) {
		errs = append(errs, fmt.Errorf("identity: %s is not in trust domain %s", c.Identity, c.TrustDomain))
	}
	return errors.Join(append(errs, c.Join.Validate(), c.Policy.Validate())...)
}

// An Agent is one proxy's tie to the issuer. It is safe for concurrent use.
type Agent struct {
	spool  *audit.Reader // what of the audit log the issuer has
	cfg    Config
	client *control.Client
	// evidence is nil when the node joins by a token.
	evidence attest.Evidence
	roots    []*x509.Certificate // of the bootstrap file
	node     *svid.Source        // the node's own identity
	held     *svid.Source        // the workload's
	rot      *svid.Rotator
	// pins is nil when the proxy acts on what the issuer sends.
	pins *pins
	// refusals bounds what is recorded of those.
	refusals refusals

	// kept is the bundle of an earlier run whose SVIDs have all expired.
	kept *x509bundle.Bundle
	// renewNow asks for a new node SVID before its time.
	renewNow chan struct{}

	snapshot   atomic.Pointer[mesh.Snapshot]
	candidate  atomic.Pointer[mesh.Snapshot]
	entries    atomic.Pointer[[]mesh.Entry]
	generation atomic.Uint64

	// served is the identity that listeners were opened for. No other is
	// served until the process ends: they judge by it.
	served atomic.Pointer[spiffeid.ID]

	// must is told that the issuer wants evidence anew; attested is when it
	// was last given, in Unix nanoseconds.
	must     chan struct{}
	attested atomic.Int64
	// noticing orders the two.
	noticing sync.Mutex

	cursorWait time.Duration // a field for tests

	mu    sync.Mutex    // guards fresh
	fresh chan struct{} // closed and replaced at each new snapshot
}

// The names of the files in DataDir.
const (
	nodeFile     = "node.json"
	heldFile     = "svids.json"
	snapshotFile = "snapshot.json"
	entriesFile  = "entries.json"
	revokedFile  = "revoked.json"
	cursorFile   = "audit.cursor"
	keyFile      = "node.key"
)

// Ready conditions.
const (
	readySVID   = "svid"
	readyPolicy = "policy"
)

// Open reads what an earlier run has left. It contacts nobody.
func Open(cfg Config) (*Agent, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	cfg.reportEvery = cmp.Or(cfg.reportEvery, 10*time.Second)
	if err := daemon.OwnDir("data_dir", cfg.DataDir); err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(cfg.Join.Bundle)
	if err != nil {
		return nil, daemon.Hint(fmt.Errorf("read issuer.bundle: %w", err), "copy bundle.pem from the issuer's data_dir")
	}
	a := &Agent{
		cfg: cfg, node: svid.NewSource(), held: svid.NewSource(),
		must: make(chan struct{}, 1), fresh: make(chan struct{}), renewNow: make(chan struct{}, 1), cursorWait: cursorWait,
	}
	if a.roots, err = control.ParseBundle(pem); err != nil {
		return nil, daemon.Hint(fmt.Errorf("issuer.bundle %s: %w", cfg.Join.Bundle, err), "copy bundle.pem from the issuer's data_dir")
	}
	if a.evidence, err = attest.NewEvidence(cfg.Join.Attest); err != nil {
		return nil, err
	}
	if a.pins, err = openPins(cfg); err != nil {
		return nil, err
	}
	cfg.Ready.Expect(readySVID, readyPolicy)
	if err := a.resume(); err != nil {
		return nil, err
	}
	a.client, err = control.Dial(control.ClientConfig{
		Addresses: cfg.Join.Addresses, TrustDomain: cfg.TrustDomain, Log: cfg.Log,
		Bundle: a.trusted, Identity: a.nodeCertificate,
	})
	if err != nil {
		return nil, err
	}
	a.rot, err = svid.NewRotator(svid.RotatorConfig{
		Source: a.held, Minter: minter{a}, Match: a.match, Log: cfg.Log,
		Save: func(st *svid.State) error { return st.Save(a.file(heldFile)) },
	})
	if err != nil {
		a.client.Close()
		return nil, err
	}
	return a, nil
}

func (a *Agent) file(name string) string { return filepath.Join(a.cfg.DataDir, name) }

// resume takes over the state on disk. A file that is damaged or past its time
// is no reason not to start: it is fetched anew, and said so.
func (a *Agent) resume() error {
	if err := a.resumeRevoked(); err != nil {
		return err
	}
	for _, name := range []string{nodeFile, heldFile} {
		if err := a.resumeIdentity(name); err != nil {
			return err
		}
	}
	if err := a.resumeEntries(); err != nil {
		a.cfg.Log.Warn("kept entries are of no use, waiting for the issuer", "err", err)
	}
	if err := a.resumePolicy(); err != nil {
		a.cfg.Log.Warn("kept policy is of no use, waiting for the issuer", "err", err)
	}
	return nil
}

// resumeIdentity takes over the identities in one of the two files.
func (a *Agent) resumeIdentity(name string) error {
	src := a.node
	if name == heldFile {
		src = a.held
	}
	st, err := svid.Load(a.file(name))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err == nil && st.Bundle.TrustDomain() != a.cfg.TrustDomain:
		return daemon.Hint(fmt.Errorf("%s belongs to trust domain %s, the configuration says %s", a.file(name), st.Bundle.TrustDomain(), a.cfg.TrustDomain),
			"correct trust_domain, or give this proxy an empty data_dir")
	case err == nil:
		// One that has ended does not spoil the others, nor the roots.
		now := time.Now()
		st.Identities = slices.DeleteFunc(st.Identities, func(i svid.Identity) bool { return !now.Before(i.Expires()) })
		if name == heldFile {
			a.choose(st)
		}
		err = src.Set(st)
	}
	if errors.Is(err, svid.ErrExpired) && (name == heldFile || a.kept == nil) {
		a.keepBundle(a.file(name))
	}
	if err != nil {
		a.cfg.Log.Warn("kept identity is of no use, fetching a new one", "file", name, "err", err)
	}
	return nil
}

// resumePolicy puts the snapshot on disk in force, if there is one.
func (a *Agent) resumePolicy() error {
	b, err := os.ReadFile(a.file(snapshotFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	snap, err := mesh.DecodeSnapshot(b)
	if err != nil {
		return err
	}
	if err := a.own(snap); err != nil {
		return err
	}
	if a.pins != nil {
		if snap, err = a.pins.resume(a.identity(), snap); err != nil {
			return err
		}
	}
	return a.use(snap)
}

// choose puts the identity of the configuration first. Without it there, none
// of an earlier run is served.
func (a *Agent) choose(st *svid.State) {
	if a.cfg.Identity.IsZero() {
		return
	}
	i := slices.IndexFunc(st.Identities, func(i svid.Identity) bool { return i.ID == a.cfg.Identity })
	if i < 0 {
		st.Identities = nil
		return
	}
	st.Identities[0], st.Identities[i] = st.Identities[i], st.Identities[0]
}

// Source is where the workload's identities are read.
func (a *Agent) Source() *svid.Source { return a.held }

// Generation counts the changes of the workload's identities.
func (a *Agent) Generation() uint64 { return a.generation.Load() }

// Snapshot is the policy in force; nil before the first.
func (a *Agent) Snapshot() *mesh.Snapshot { return a.snapshot.Load() }

// Entries are what this node may serve, as last fetched.
func (a *Agent) Entries() []mesh.Entry {
	if es := a.entries.Load(); es != nil {
		return *es
	}
	return nil
}

// Self is the identity that the proxy serves; an error before it has one.
func (a *Agent) Self() (svid.Identity, error) {
	st := a.held.Current()
	if st == nil || len(st.Identities) == 0 {
		return svid.Identity{}, svid.ErrNoIdentity
	}
	return st.Identities[0], nil
}

// identity is the SPIFFE ID that is or will be served, zero while that is open.
func (a *Agent) identity() spiffeid.ID {
	if self, err := a.Self(); err == nil {
		return self.ID
	}
	return a.cfg.Identity
}

// AwaitPolicy waits until there are an identity and a policy, and returns the
// identity. Until then no listener may open. From then on the agent has this
// identity or none.
func (a *Agent) AwaitPolicy(ctx context.Context) (spiffeid.ID, error) {
	for {
		if err := a.held.WaitReady(ctx); err != nil {
			return spiffeid.ID{}, err
		}
		news := a.news()
		self, err := a.Self()
		if err == nil && a.Snapshot() != nil {
			a.served.CompareAndSwap(nil, &self.ID)
			return *a.served.Load(), nil
		}
		select {
		case <-ctx.Done():
			return spiffeid.ID{}, ctx.Err()
		case <-news:
		}
	}
}

// Join makes sure that the node is attested and that the workload has an
// identity, both of which may already be so from an earlier run. An error is
// one that trying again does not mend.
func (a *Agent) Join(ctx context.Context) error {
	if a.cfg.Identity.IsZero() {
		if _, err := a.Self(); err == nil {
			return nil
		}
	} else if id, err := a.Self(); err == nil && id.ID == a.cfg.Identity {
		return nil
	}
	if _, err := a.nodeIdentity(); err == nil {
		return nil
	}
	return a.attest(ctx)
}

// Run keeps everything fresh until ctx ends.
func (a *Agent) Run(ctx context.Context) error {
	defer a.client.Close()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.renewNode(ctx) })
	g.Go(func() error { return a.rot.Run(ctx) })
	g.Go(func() error { return a.watchIdentity(ctx) })
	g.Go(func() error { return a.follow(ctx) })
	g.Go(func() error { return a.upload(ctx) })
	g.Go(func() error { return a.cosign(ctx) })
	g.Go(func() error { return a.reportEdges(ctx) })
	if a.cfg.Samples != nil {
		g.Go(func() error { return a.reportSamples(ctx) })
	}
	return g.Wait()
}

// trusted are the roots that an issuer must prove by: those the issuer has
// sent, unless all of them have ended. Then those that the operator gave count
// again, so that a proxy that slept for long finds back.
func (a *Agent) trusted() []*x509.Certificate {
	for _, src := range []*svid.Source{a.held, a.node} {
		if st := src.Current(); st != nil && anyValid(st.Bundle) {
			return st.Bundle.X509Authorities()
		}
	}
	if anyValid(a.kept) {
		return a.kept.X509Authorities()
	}
	return a.roots
}

// match puts the identity to be served first. Several, and none chosen, is a
// mistake that only the operator can mend: then none is served, except one that
// is served already and goes on.
func (a *Agent) match(entries []mesh.Entry) []mesh.Entry {
	a.keepEntries(entries)
	if len(entries) == 0 {
		return nil
	}
	want := a.cfg.Identity
	if served := a.served.Load(); served != nil {
		want = *served
	}
	if want.IsZero() {
		if want = a.only(entries); want.IsZero() {
			return nil
		}
	}
	out := slices.Clone(entries)
	slices.SortStableFunc(out, func(x, y mesh.Entry) int {
		switch {
		case x.SPIFFEID == want && y.SPIFFEID != want:
			return -1
		case x.SPIFFEID != want && y.SPIFFEID == want:
			return 1
		}
		return 0
	})
	if out[0].SPIFFEID != want {
		a.cfg.Log.Error("this node has no entry for the identity that it is to serve; next: add one to entries.yaml with this node as parent_id, or restart the proxy to serve another", "identity", want.String())
		return nil
	}
	return out
}

// only is the identity that the entries leave no choice about, zero if they do.
func (a *Agent) only(entries []mesh.Entry) spiffeid.ID {
	first := entries[0].SPIFFEID
	i := slices.IndexFunc(entries, func(e mesh.Entry) bool { return e.SPIFFEID != first })
	if i < 0 {
		return first
	}
	const next = "this node is entitled to several identities and none is chosen; next: write the one to serve into the configuration (identity)"
	if now, err := a.Self(); err == nil && slices.ContainsFunc(entries, func(e mesh.Entry) bool { return e.SPIFFEID == now.ID }) {
		a.cfg.Log.Warn(next, "serving", now.ID.String())
		return now.ID
	}
	a.cfg.Log.Error(next, "first", first.String(), "second", entries[i].SPIFFEID.String())
	return spiffeid.ID{}
}

// clockEvery bounds how long anything waits for a moment on the wall clock,
// which may jump, or stand still while the machine sleeps.
const clockEvery = 15 * time.Second

// watchIdentity says in readiness, metrics and the generation how the SVID is.
// Its end is a change too: connections made with it are used no more.
func (a *Agent) watchIdentity(ctx context.Context) error {
	expiry := a.cfg.Metrics.CertExpiry("workload")
	var last *svid.State
	var ended bool
	for {
		changed := a.held.Changed()
		st := a.held.Current()
		id, err := a.Self()
		left := clockEvery
		if err == nil {
			expiry.Set(id.Expires())
			left = min(left, time.Until(id.Expires()))
		}
		if left <= 0 {
			err, left = fmt.Errorf("%s: %w", id.ID, svid.ErrExpired), clockEvery
		}
		over := errors.Is(err, svid.ErrExpired)
		if st != last || over && !ended {
			a.generation.Add(1)
		}
		last, ended = st, over
		a.cfg.Ready.Set(readySVID, err)
		timer := time.NewTimer(left)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// nodeCertificate is the node's identity for a connection to the issuer; nil
// before attestation.
func (a *Agent) nodeCertificate() (*tls.Certificate, error) {
	id, err := a.nodeIdentity()
	if err != nil {
		return nil, nil //nolint:nilerr // without an identity the connection shows none
	}
	c := &tls.Certificate{PrivateKey: id.Key, Leaf: id.Chain[0]}
	for _, x := range id.Chain {
		c.Certificate = append(c.Certificate, x.Raw)
	}
	return c, nil
}

func (a *Agent) nodeIdentity() (svid.Identity, error) {
	st := a.node.Current()
	if st == nil || len(st.Identities) == 0 {
		return svid.Identity{}, svid.ErrNoIdentity
	}
	if id := st.Identities[0]; time.Now().Before(id.Expires()) {
		return id, nil
	}
	return svid.Identity{}, svid.ErrExpired
}

func (a *Agent) bundleOf(roots []*x509.Certificate) *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(a.cfg.TrustDomain, roots)
}
