package agent

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/attest"
	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/registry"
	"sallyport/internal/store"
	"sallyport/internal/svid"
	"sallyport/internal/telemetry"
)

var (
	billing = meshtest.ID("/ns/shop/sa/billing")
	second  = meshtest.ID("/ns/shop/sa/second")
	node    = meshtest.AgentID("node-b")
)

const servicesYAML = `services:
  - name: billing
    identity: spiffe://demo.sallyport/ns/shop/sa/billing
    port: 8443
`

const entriesYAML = `entries:
  - spiffe_id: spiffe://demo.sallyport/ns/shop/sa/billing
    parent_id: spiffe://demo.sallyport/spire/agent/join_token/node-b
    selectors: ["child:true"]
`

const secondEntry = `  - spiffe_id: spiffe://demo.sallyport/ns/shop/sa/second
    parent_id: spiffe://demo.sallyport/spire/agent/join_token/node-b
    selectors: ["child:true"]
`

// authority is the test CA as an issuer's.
type authority struct {
	*meshtest.CA
	server *tls.Certificate
	// life of an SVID of a workload, of a node.
	x509TTL, agentTTL atomic.Int64
	signedAgents      atomic.Int64
}

func (a *authority) SignX509(_ context.Context, id spiffeid.ID, key crypto.PublicKey, ttl time.Duration, dns []string) ([]*x509.Certificate, error) {
	return a.Sign(id, key, cmp.Or(ttl, time.Duration(a.x509TTL.Load()), time.Hour), dns...)
}

func (a *authority) SignAgent(_ context.Context, id spiffeid.ID, key crypto.PublicKey) ([]*x509.Certificate, error) {
	a.signedAgents.Add(1)
	return a.Sign(id, key, cmp.Or(time.Duration(a.agentTTL.Load()), time.Hour))
}

func (a *authority) SignJWT(_ context.Context, id spiffeid.ID, aud []string, ttl time.Duration) (string, time.Time, time.Time, error) {
	now := time.Now()
	return "token of " + id.String(), now, now.Add(time.Minute), nil
}

func (a *authority) X509Bundle() []*x509.Certificate              { return []*x509.Certificate{a.Root()} }
func (a *authority) JWTKeys() []control.JWTKey                    { return nil }
func (a *authority) ServerCertificate() (*tls.Certificate, error) { return a.server, nil }

// sink keeps audit lines.
type sink struct {
	mu    sync.Mutex
	lines []string
	fail  error
}

func (s *sink) Receive(_ context.Context, _, _ spiffeid.ID, lines [][]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return s.fail
	}
	for _, l := range lines {
		s.lines = append(s.lines, string(bytes.TrimSuffix(l, []byte{'\n'})))
	}
	return nil
}

func (s *sink) all() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.lines...)
}

// An issuer is one on loopback, with the real registry on a real store.
type issuer struct {
	t        *testing.T
	ca       *authority
	registry *registry.Registry
	sink     *sink
	addr     string
	stop     func()
	bundle   string // PEM file
	// setFile gives out signed sets.
	setFile func(hash string) ([]byte, error)
	// hostile, when set, is what the issuer sends in the place of a snapshot.
	hostile func(*mesh.Snapshot) *mesh.Snapshot
}

// told is a registry of which the issuer says something else.
type told struct {
	*registry.Registry
	is *issuer
}

func (r told) SnapshotFor(agent, workload spiffeid.ID, kind string) (*mesh.Snapshot, bool) {
	s, canary := r.Registry.SnapshotFor(agent, workload, kind)
	if s != nil && r.is.hostile != nil {
		return r.is.hostile(s), canary
	}
	return s, canary
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	is := &issuer{t: t, sink: new(sink), bundle: filepath.Join(t.TempDir(), "bundle.pem")}
	is.ca = &authority{CA: meshtest.NewCA(t, meshtest.TD)}
	id := is.ca.Issue(t, control.ServerID(meshtest.TD), time.Hour)
	is.ca.server = &tls.Certificate{PrivateKey: id.Key}
	for _, c := range id.Chain {
		is.ca.server.Certificate = append(is.ca.server.Certificate, c.Raw)
	}
	if err := os.WriteFile(is.bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: is.ca.Root().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	st, err := store.OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "issuer.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	is.registry, err = registry.New(registry.Config{Store: st, TrustDomain: meshtest.TD, Log: slog.New(slog.DiscardHandler)})
	if err == nil {
		err = is.registry.Load(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	is.apply(entriesYAML, "")
	is.start()
	t.Cleanup(func() { is.stop() })
	return is
}

// apply puts policies in force.
func (is *issuer) apply(entries, access string) {
	is.t.Helper()
	p := meshtest.Policies(is.t, map[string]string{"services.yaml": servicesYAML, "entries.yaml": entries, "access.csv": access})
	if _, err := is.registry.ApplyPolicies(is.t.Context(), p); err != nil {
		is.t.Fatal(err)
	}
}

// start serves; an issuer that is started again does so where it did, and knows what
// it knew.
func (is *issuer) start() {
	is.t.Helper()
	srv, err := control.NewServer(control.ServerConfig{
		TrustDomain: meshtest.TD, Registry: told{is.registry, is}, SetFile: is.setFile, Authority: is.ca, Audit: is.sink,
		Verifiers: map[string]control.NodeVerifier{"join_token": attest.NewJoinToken(meshtest.TD, is.registry)},
		Why: func(err error) control.Refusal {
			switch {
			case errors.Is(err, registry.ErrTokenUnknown):
				return control.RefusalTokenUnknown
			case errors.Is(err, registry.ErrTokenUsed):
				return control.RefusalTokenUsed
			}
			return control.RefusalEvidence
		},
		Endpoints: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		is.t.Fatal(err)
	}
	ln := meshtest.Listen(is.t, is.addr)
	is.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, ln) }()
	is.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			is.t.Errorf("Serve: %v", err)
		}
	})
}

func (is *issuer) token(name string) string {
	is.t.Helper()
	token, _, err := is.registry.CreateToken(is.t.Context(), name, time.Hour)
	if err != nil {
		is.t.Fatal(err)
	}
	return token
}

// A proxy is an agent and what it is given.
type proxy struct {
	*Agent
	t     *testing.T
	cfg   Config
	ready *daemon.Ready
	edges *telemetry.Edges
	log   *logBuffer
	used  chan *mesh.Snapshot
	// refuse, when set, is why no snapshot is taken.
	refuse atomic.Pointer[error]
	// rejudged counts the calls of Rejudge.
	rejudged atomic.Int32
	stop     func()
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// newProxy opens an agent in a directory. It has a join token unless the
// change takes it away.
func (is *issuer) newProxy(dir, token string, change ...func(*Config)) *proxy {
	is.t.Helper()
	p := &proxy{t: is.t, ready: new(daemon.Ready), edges: telemetry.NewEdges(), log: new(logBuffer), used: make(chan *mesh.Snapshot, 64)}
	p.cfg = Config{
		TrustDomain: meshtest.TD, Kind: control.KindSidecar, DataDir: dir,
		Join:    Join{Addresses: []string{is.addr}, Bundle: is.bundle, JoinToken: token},
		Inbound: netip.MustParseAddrPort("10.0.0.2:15006"), Audit: filepath.Join(dir, "audit.jsonl"),
		Edges: p.edges, Metrics: telemetry.NewRegistry(), Ready: p.ready, Log: slog.New(slog.NewTextHandler(p.log, nil)),
		Rejudge: func() { p.rejudged.Add(1) },
		Use: func(s *mesh.Snapshot) error {
			if e := p.refuse.Load(); e != nil {
				return *e
			}
			p.used <- s
			return nil
		},
	}
	for _, f := range change {
		f(&p.cfg)
	}
	a, err := Open(p.cfg)
	if err != nil {
		is.t.Fatal(err)
	}
	p.Agent = a
	return p
}

// run keeps the agent going until stop.
func (p *proxy) run() *proxy {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	p.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			p.t.Errorf("Run: %v", err)
		}
	})
	p.t.Cleanup(p.stop)
	return p
}

// join attests, runs, and waits for identity and policy.
func (p *proxy) join() *proxy {
	p.t.Helper()
	if err := p.Join(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
	p.run()
	p.serves()
	return p
}

func (p *proxy) serves() spiffeid.ID {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), time.Minute)
	defer cancel()
	id, err := p.AwaitPolicy(ctx)
	if err != nil {
		p.t.Fatalf("%v\n%s", err, p.log)
	}
	return id
}

// settle waits until the proxy has heard what came of its own endpoint: no snapshot
// comes by itself after it.
func (p *proxy) settle(is *issuer) {
	p.t.Helper()
	await(p.t, func() bool {
		s := is.registry.Current()
		return len(s.EndpointsOf("billing")) == 1 && p.Snapshot().Revision == s.Revision
	})
}

// await asks again, when something may have changed, until it is so.
func await(t *testing.T, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	end := time.After(time.Minute)
	for !ok() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatal("it did not happen")
		}
	}
}

// record appends n records to the proxy's audit log and closes it.
func record(t *testing.T, path string, n int) {
	t.Helper()
	l, err := audit.Open(audit.Config{Path: path, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	for range n {
		if err := l.Append(&audit.Record{Kind: audit.KindDecision, Decision: audit.Allow}); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

type svidState = svid.State

func mustTD(name string) spiffeid.TrustDomain { return spiffeid.RequireTrustDomainFromString(name) }

// edges are those of the last hour, summed.
func (is *issuer) edges() []mesh.Edge {
	is.t.Helper()
	now := time.Now()
	var sum mesh.EdgeSum
	if err := is.registry.EachWindow(is.t.Context(), now.Add(-time.Hour), now.Add(time.Second), sum.Add); err != nil {
		is.t.Fatal(err)
	}
	return sum.Edges()
}
