package control

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("corp.example")
	payment = spiffeid.RequireFromString("spiffe://corp.example/ns/shop/sa/payment")
	billing = spiffeid.RequireFromString("spiffe://corp.example/ns/shop/sa/billing")
	stock   = spiffeid.RequireFromString("spiffe://corp.example/ns/shop/sa/inventory")
	egress  = spiffeid.RequireFromString("spiffe://corp.example/ns/sys/sa/gateway")
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// ca is an Authority: a root and one intermediate.
type ca struct {
	root, mid *x509.Certificate
	midKey    *ecdsa.PrivateKey
	ttl       time.Duration
	server    *tls.Certificate

	mu     sync.Mutex
	serial int64
	fail   error
}

func template(serial int64, id *spiffeid.ID, ttl time.Duration) *x509.Certificate {
	c := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: fmt.Sprint(serial)},
		NotBefore: time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(ttl),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if id != nil {
		c.URIs = []*url.URL{id.URL()}
	}
	return c
}

func asCA(c *x509.Certificate) *x509.Certificate {
	c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign, nil
	return c
}

func sign(t testing.TB, c, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func newCA(t testing.TB, of spiffeid.TrustDomain, change ...func(*x509.Certificate)) *ca {
	t.Helper()
	rootKey, midKey, serverKey := newKey(t), newKey(t), newKey(t)
	a := &ca{midKey: midKey, ttl: time.Hour, serial: 100}
	rt := asCA(template(1, nil, 48*time.Hour))
	rt.NotBefore = time.Now().Add(-48 * time.Hour)
	a.root = sign(t, rt, rt, rootKey.Public(), rootKey)
	mt := asCA(template(2, nil, 24*time.Hour))
	mt.NotBefore = rt.NotBefore
	a.mid = sign(t, mt, a.root, midKey.Public(), rootKey)
	id := ServerID(of)
	leaf := template(3, &id, time.Hour)
	for _, f := range change {
		f(leaf)
	}
	leaf = sign(t, leaf, a.mid, serverKey.Public(), midKey)
	a.server = &tls.Certificate{Certificate: [][]byte{leaf.Raw, a.mid.Raw}, PrivateKey: serverKey}
	return a
}

func (a *ca) issue(t testing.TB, id spiffeid.ID, key crypto.Signer, change ...func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	c := template(a.nextSerial(), &id, a.ttl)
	for _, f := range change {
		f(c)
	}
	leaf := sign(t, c, a.mid, key.Public(), a.midKey)
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw, a.mid.Raw}, PrivateKey: key, Leaf: leaf}
}

func (a *ca) nextSerial() int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.serial++
	return a.serial
}

func (a *ca) SignX509(_ context.Context, id spiffeid.ID, key crypto.PublicKey, ttl time.Duration, dns []string) ([]*x509.Certificate, error) {
	if a.fail != nil {
		return nil, a.fail
	}
	c := template(a.nextSerial(), &id, cmp.Or(ttl, a.ttl))
	c.DNSNames = dns
	der, err := x509.CreateCertificate(rand.Reader, c, a.mid, key, a.midKey)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	return []*x509.Certificate{leaf, a.mid}, err
}

func (a *ca) SignAgent(ctx context.Context, id spiffeid.ID, key crypto.PublicKey) ([]*x509.Certificate, error) {
	return a.SignX509(ctx, id, key, 0, nil)
}

func (a *ca) SignJWT(_ context.Context, id spiffeid.ID, aud []string, ttl time.Duration) (string, time.Time, time.Time, error) {
	now := time.Now().Truncate(time.Second)
	return fmt.Sprintf("token:%s:%v", id, aud), now, now.Add(cmp.Or(ttl, time.Minute)), nil
}

func (a *ca) X509Bundle() []*x509.Certificate { return []*x509.Certificate{a.root} }

func (a *ca) JWTKeys() []JWTKey {
	return []JWTKey{{KeyID: "k1", PublicKey: a.midKey.Public(), ExpiresAt: time.Unix(4e9, 0)}}
}

func (a *ca) ServerCertificate() (*tls.Certificate, error) { return a.server, nil }

// memory is a Registry.
type memory struct {
	mu        sync.Mutex
	entries   []mesh.Entry
	agents    map[spiffeid.ID]mesh.Agent
	snap      *mesh.Snapshot
	tried     *mesh.Snapshot // by canary
	canary    spiffeid.ID
	changed   chan struct{}
	proxies   map[spiffeid.ID]mesh.Proxy
	announced map[mesh.Endpoint]int
	announces chan time.Duration
	withdrawn chan spiffeid.ID
	reported  chan mesh.Proxy
	edges     []mesh.Edge
	issued    []mesh.Issued
	stops     *mesh.FaultStops
	revoked   *mesh.RevokedSVIDs
	// onIssued, when set, is called while something is recorded.
	onIssued func() error
}

func newMemory() *memory {
	return &memory{
		revoked: &mesh.RevokedSVIDs{},
		agents:  map[spiffeid.ID]mesh.Agent{}, changed: make(chan struct{}), proxies: map[spiffeid.ID]mesh.Proxy{},
		announced: map[mesh.Endpoint]int{}, withdrawn: make(chan spiffeid.ID, 64), reported: make(chan mesh.Proxy, 1024), announces: make(chan time.Duration, 1024),
	}
}

// change changes the registry and wakes whoever waits.
func (m *memory) change(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
	close(m.changed)
	m.changed = make(chan struct{})
}

func read[T any](m *memory, f func() T) T {
	m.mu.Lock()
	defer m.mu.Unlock()
	return f()
}

func (m *memory) EntriesFor(agent spiffeid.ID) []mesh.Entry {
	facts := read(m, func() []mesh.Selector { return m.agents[agent].Selectors })
	return mesh.NewLineage(m.Entries()).Of(agent, facts, time.Now())
}
func (m *memory) Entries() []mesh.Entry {
	return read(m, func() []mesh.Entry { return slices.Clone(m.entries) })
}
func (m *memory) CreateToken(_ context.Context, name string, ttl time.Duration) (string, time.Time, error) {
	return "token-of-" + name, time.Unix(1e9, 0).Add(ttl), nil
}
func (m *memory) PutAgent(_ context.Context, a mesh.Agent) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.agents[a.ID].Revision != a.Revision {
		return fmt.Errorf("agent %s: %w", a.ID, mesh.ErrChanged)
	}
	a.Revision++
	m.agents[a.ID] = a
	return nil
}
func (m *memory) GetAgent(_ context.Context, id spiffeid.ID) (mesh.Agent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, ok := m.agents[id]
	if !ok {
		return a, fmt.Errorf("agent %s: %w", id, mesh.ErrNotFound)
	}
	return a, nil
}
func (m *memory) HeldAgent(ctx context.Context, id spiffeid.ID) (mesh.Agent, error) {
	return m.GetAgent(ctx, id)
}
func (m *memory) ListAgents(context.Context) (out []mesh.Agent, _ error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, a := range m.agents {
		out = append(out, a)
	}
	return out, nil
}
func (m *memory) RecordIssued(_ context.Context, list []mesh.Issued) error {
	m.mu.Lock()
	m.issued = append(m.issued, list...)
	f := m.onIssued
	m.mu.Unlock()
	if f != nil {
		return f()
	}
	return nil
}
func (m *memory) Revocations() *mesh.RevokedSVIDs {
	return read(m, func() *mesh.RevokedSVIDs { return m.revoked })
}
func (m *memory) FaultStops() *mesh.FaultStops {
	return read(m, func() *mesh.FaultStops {
		if m.stops == nil {
			return &mesh.FaultStops{}
		}
		return m.stops
	})
}
func (m *memory) StopFaults(_ context.Context, s mesh.FaultStop) (uint64, error) {
	before := m.FaultStops()
	next := &mesh.FaultStops{Revision: before.Revision + 1, All: append(slices.Clone(before.All), s)}
	m.change(func() { m.stops = next })
	return next.Revision, nil
}
func (m *memory) Issuers() int { return 1 }
func (m *memory) Current() *mesh.Snapshot {
	return read(m, func() *mesh.Snapshot { return m.snap })
}
func (m *memory) SnapshotFor(_, workload spiffeid.ID, _ string) (*mesh.Snapshot, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.tried != nil && workload == m.canary {
		return m.tried, true
	}
	return m.snap, false
}
func (m *memory) Changed() <-chan struct{} {
	return read(m, func() chan struct{} { return m.changed })
}
func (m *memory) Announce(_ context.Context, e mesh.Endpoint, lease time.Duration) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.announced[e]++
	m.announces <- lease
	return nil
}
func (m *memory) Withdraw(_ context.Context, agent spiffeid.ID) error {
	m.withdrawn <- agent
	return nil
}
func (m *memory) ReportProxy(p mesh.Proxy) {
	m.mu.Lock()
	m.proxies[p.Workload] = p
	m.mu.Unlock()
	m.reported <- p
}
func (m *memory) Proxies() (out []mesh.Proxy) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.proxies {
		out = append(out, p)
	}
	return out
}
func (m *memory) AddEdges(_ spiffeid.ID, e []mesh.Edge) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.edges = append(m.edges, e...)
}
func (m *memory) counted() []mesh.Edge {
	return read(m, func() []mesh.Edge { return slices.Clone(m.edges) })
}
func (m *memory) Status() mesh.IssuerStatus {
	return mesh.IssuerStatus{TrustDomain: td, Revision: 7, PolicyRevision: 3, PolicyHash: "abc", LastRefusal: "access.csv:3:1: no", Started: time.Unix(1e9, 0)}
}

// sink is an AuditSink.
type sink struct {
	mu    sync.Mutex
	lines []string
	fail  error
}

func (s *sink) Receive(_ context.Context, _, proxy spiffeid.ID, lines [][]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return s.fail
	}
	for _, l := range lines {
		s.lines = append(s.lines, proxy.Path()+" "+string(l))
	}
	return nil
}

var (
	errExpired = errors.New("expired")
	errUsed    = errors.New("used")
	errBroken  = errors.New("disk on fire")
)

// tokens is a NodeVerifier: the payload is the name of the agent, or what is
// wrong.
type tokens struct{}

func (tokens) Verify(_ context.Context, payload []byte, _ crypto.PublicKey) (spiffeid.ID, []mesh.Selector, error) {
	switch string(payload) {
	case "expired":
		return spiffeid.ID{}, nil, errExpired
	case "used":
		return spiffeid.ID{}, nil, fmt.Errorf("redeem: %w", errUsed)
	case "broken":
		return spiffeid.ID{}, nil, errBroken
	case "panic":
		panic("verifier")
	case "foreign":
		return billing, nil, nil
	}
	id, err := AgentID(td, string(payload))
	return id, []mesh.Selector{{Type: "join_token", Value: string(payload)}}, err
}

func why(err error) Refusal {
	switch {
	case errors.Is(err, errExpired):
		return RefusalTokenExpired
	case errors.Is(err, errUsed):
		return RefusalTokenUsed
	case errors.Is(err, errBroken):
		return RefusalNone
	}
	return RefusalTokenUnknown
}

type rig struct {
	t    testing.TB
	ca   *ca
	reg  *memory
	sink *sink
	srv  *Server
	addr string
	stop func()
	// tune, when set, changes a Server before it serves.
	tune func(*Server)
}

// retune starts the issuer again with other times.
func (r *rig) retune(f func(*Server), change ...func(*ServerConfig)) {
	r.t.Helper()
	r.stop()
	r.tune = f
	r.start(change...)
}

func newRig(t testing.TB, a *ca, change ...func(*ServerConfig)) *rig {
	t.Helper()
	r := &rig{t: t, ca: a, reg: newMemory(), sink: &sink{}}
	r.reg.entries = []mesh.Entry{
		{ID: "e-pay", SPIFFEID: payment, ParentID: agentID("node-a"), Selectors: []mesh.Selector{{Type: "unix", Value: "uid:1000"}}, X509TTL: 30 * time.Second, DNSNames: []string{"payment.mesh.internal"}, Hint: "main"},
		{ID: "e-bill", SPIFFEID: billing, ParentID: agentID("node-b"), Selectors: []mesh.Selector{{Type: "child", Value: "true"}}},
		{ID: "e-gw", SPIFFEID: egress, ParentID: agentID("node-g"), Selectors: []mesh.Selector{{Type: "self", Value: "true"}}},
	}
	r.reg.snap = snapshot(t, 10, 3, "GET")
	r.start(change...)
	t.Cleanup(func() { r.stop() })
	return r
}

func agentID(name string) spiffeid.ID {
	id, err := AgentID(td, name)
	if err != nil {
		panic(err)
	}
	return id
}

// start serves; an issuer that is started again does so where it did, and knows what
// it knew.
func (r *rig) start(change ...func(*ServerConfig)) {
	r.t.Helper()
	cfg := ServerConfig{
		TrustDomain: td, Registry: r.reg, Authority: r.ca, Audit: r.sink, Why: why,
		Verifiers: map[string]NodeVerifier{"join_token": tokens{}}, Log: slog.New(slog.DiscardHandler),
		Chart: func(_ context.Context, from, to time.Time) (mesh.Chart, error) {
			return mesh.Chart{From: from, To: to, Edges: r.reg.counted(), Unused: []mesh.Unused{{Src: "a", Dst: "b", Rule: "r-1"}}}, nil
		},
	}
	for _, f := range change {
		f(&cfg)
	}
	var err error
	if r.srv, err = NewServer(cfg); err != nil {
		r.t.Fatal(err)
	}
	if r.tune != nil {
		r.tune(r.srv)
	}
	l := meshtest.Listen(r.t, r.addr)
	r.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.srv.Serve(ctx, l) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("Serve: %v", err)
		}
	})
}

func (r *rig) admin() *Admin {
	r.t.Helper()
	path := filepath.Join(r.t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.srv.ServeAdmin(ctx, l) }()
	a, err := DialAdmin(path)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		a.Close()
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("ServeAdmin: %v", err)
		}
	})
	return a
}

// holder holds an agent SVID as svid.Source would.
type holder struct {
	mu   sync.Mutex
	cert *tls.Certificate
}

func (h *holder) set(cert *tls.Certificate) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cert = cert
}

func (h *holder) get() (*tls.Certificate, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cert, nil
}

func (r *rig) client(h *holder, change ...func(*ClientConfig)) *Client {
	r.t.Helper()
	cfg := ClientConfig{
		Addresses: []string{r.addr}, TrustDomain: td, Identity: h.get,
		Bundle: r.ca.X509Bundle, Log: slog.New(slog.DiscardHandler),
	}
	for _, f := range change {
		f(&cfg)
	}
	c, err := Dial(cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	c.retryMin, c.retryMax = 5*time.Millisecond, 50*time.Millisecond
	r.t.Cleanup(func() { c.Close() })
	return c
}

// joined returns a client whose agent is attested under a name.
func (r *rig) joined(name string) (*Client, *holder) {
	r.t.Helper()
	h := &holder{}
	c := r.client(h)
	key := newKey(r.t)
	svid, err := c.Attest(r.t.Context(), "join_token", []byte(name), key)
	if err != nil {
		r.t.Fatal(err)
	}
	h.set(pair(svid, key))
	return c, h
}

func pair(s AgentSVID, key crypto.Signer) *tls.Certificate {
	c := &tls.Certificate{PrivateKey: key, Leaf: s.Chain[0]}
	for _, x := range s.Chain {
		c.Certificate = append(c.Certificate, x.Raw)
	}
	return c
}

// snapshot is a policy under which payment may call billing by a verb.
func snapshot(t testing.TB, rev, policyRev uint64, verb string) *mesh.Snapshot {
	t.Helper()
	p := &mesh.Policies{
		TrustDomain: td,
		Services: []mesh.Service{
			{Name: "billing", ID: billing, Port: 8443, Protocol: "http"},
			{Name: "inventory", ID: stock, Port: 8443, Protocol: "http"},
		},
		Rules: []mesh.Rule{
			{ID: "pay-bill", Dir: mesh.In, Src: payment.String(), Dst: billing.String(), Port: "8443", Verb: verb, Path: "/v1/**", Cond: "-", Effect: mesh.Allow},
			{ID: "bill-out", Dir: mesh.Out, Src: billing.String(), Dst: "host:api.stripe.test", Port: "443", Verb: "CONNECT", Path: "-", Cond: "-", Effect: mesh.Allow},
		},
		Destinations: []mesh.Destination{{Host: "api.stripe.test", Proto: "tls", SNI: "strict"}},
	}
	s, err := mesh.Compile(p, rev, policyRev, []mesh.Endpoint{{Service: "billing", Address: netip.MustParseAddrPort("127.0.0.1:15006"), Agent: agentID("node-b")}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}
