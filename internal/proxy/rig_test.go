package proxy

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/hop"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/svid"
	"sallyport/internal/telemetry"
	"sallyport/internal/upstream"
)

var (
	web     = meshtest.ID("/ns/shop/sa/web")
	billing = meshtest.ID("/ns/shop/sa/billing")
	gateway = meshtest.ID("/ns/sys/sa/gateway")
)

type (
	bufioReader = bufio.Reader
	spiffeID    = spiffeid.ID
)

var quiet = slog.New(slog.DiscardHandler)

const servicesYAML = `services:
  - name: billing
    identity: spiffe://demo.sallyport/ns/shop/sa/billing
    port: 8443
  - name: inventory
    identity: spiffe://demo.sallyport/ns/shop/sa/inventory
    port: 8443
`

// accessCSV lets web do what most tests do.
const accessCSV = `p, all, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, *, /ok/**, -, allow
`

// A rig is two sidecars on loopback, without the processes around them: web
// calls, billing answers.
type rig struct {
	t        testing.TB
	ca       *meshtest.CA
	snap     atomic.Pointer[mesh.Snapshot]
	judge    *authz.Judge
	inAudit  *audit.Log
	outAudit *audit.Log
	web      *svid.Source
	billing  *svid.Source
	log      *logBuffer
	metrics  *telemetry.Registry
	modes    string   // modes.yaml
	served   string   // services.yaml
	protos   []string // what web offers
	services *upstream.Services
	streams  *upstream.Services
	gateways *upstream.Services
	gen      atomic.Uint64
	stranger atomic.Pointer[error]
	locals   atomic.Int64 // how often the process was asked about

	inbound        *Inbound
	outbound       *Outbound
	inAddr         string
	outAddr        string
	stopIn         func() error
	stopOut        func() error
	inCfg          InboundConfig
	outCfg         OutboundConfig
	access         string
	routes         string // routes/billing.yaml
	tokens         string // tokens.yaml
	shadow         *mesh.Shadow
	nextRevision   uint64
	endpointsExtra []mesh.Endpoint
	tokenGrace     time.Duration // of inbound; 0 for the usual
}

// logBuffer is where the operator's log goes.
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

// newRig starts both sidecars in front of app, "host:port"; change may alter
// what they are made with.
func newRig(t testing.TB, app string, change ...func(*rig)) *rig {
	t.Helper()
	return newParts(t, app, change...).open()
}

// open opens the ports of a rig whose parts are as they are to be.
func (r *rig) open() *rig {
	r.t.Helper()
	r.inAddr, r.stopIn = start(r.t, r.inbound.Run)
	r.outAddr, r.stopOut = start(r.t, r.outbound.Run)
	r.use(r.access)
	return r
}

// newParts makes all that is in a rig, and opens no port.
func newParts(t testing.TB, app string, change ...func(*rig)) *rig {
	t.Helper()
	r := &rig{t: t, ca: meshtest.NewCA(t, meshtest.TD), inAudit: audit.NewMemory(), outAudit: audit.NewMemory(), log: new(logBuffer), access: accessCSV, served: servicesYAML, protos: []string{hop.Proto, "http/1.1"}}
	r.web, r.billing = meshtest.Source(t, r.ca, web), meshtest.Source(t, r.ca, billing)
	var err error
	log := slog.New(slog.NewTextHandler(r.log, nil))
	if r.judge, err = authz.NewJudge(authz.JudgeConfig{Audit: r.inAudit, Log: log}); err != nil {
		t.Fatal(err)
	}
	up := upstream.Config{
		TLS:        func(want spiffeid.ID) *tls.Config { return svid.ClientTLS(r.web, want, r.protos...) },
		Generation: r.gen.Load,
		Standing:   r.web.Standing,
		// A test that makes many connections at once must not depend on how
		// many handshakes the machine can make in five seconds.
		ConnectTimeout: time.Minute,
	}
	if r.services, err = upstream.New(up); err != nil {
		t.Fatal(err)
	}
	plain := up
	plain.TLS = func(want spiffeid.ID) *tls.Config { return svid.ClientTLS(r.web, want) }
	if r.streams, err = upstream.New(plain); err != nil {
		t.Fatal(err)
	}
	if r.gateways, err = upstream.New(up); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.services.Close)
	r.metrics = telemetry.NewRegistry()
	edges := telemetry.NewEdges()
	shared := func(reporter string, a *audit.Log) Shared {
		return Shared{Audit: a, Signals: telemetry.NewSignals(r.metrics, reporter), Edges: edges, Log: log, Metrics: r.metrics, Reporter: reporter, DrainTimeout: 10 * time.Second}
	}
	local := upstream.NewLocal(netip.MustParseAddrPort(app), http1.Limits{})
	t.Cleanup(local.Close)
	r.inCfg = InboundConfig{
		Shared: shared("inbound", r.inAudit), Self: billing, Port: func() uint16 { return 8443 },
		TLS:              svid.ServerTLS(r.billing, func(spiffeid.ID) error { return nil }, hop.Proto, "http/1.1"),
		HandshakeTimeout: time.Minute, PeerID: svid.PeerID, Standing: r.billing.Standing, Judge: r.judge, App: local,
		Stream: func() (mesh.Stream, bool) {
			snap := r.snap.Load()
			if snap == nil {
				return mesh.Stream{}, false
			}
			svc, _ := snap.ServiceByID(billing)
			return svc.Stream, svc.Protocol == mesh.TCP
		},
	}
	r.outCfg = OutboundConfig{
		Shared: shared("outbound", r.outAudit), Self: web, Snapshot: r.snap.Load, Services: r.services, Streams: r.streams, Gateways: r.gateways,
		Standing: r.web.Standing,
		Local: func(net.Conn) func() error {
			return func() error {
				r.locals.Add(1)
				if e := r.stranger.Load(); e != nil {
					return *e
				}
				return nil
			}
		},
	}
	for _, f := range change {
		f(r)
	}
	if r.inbound, err = NewInbound(r.inCfg); err != nil {
		t.Fatal(err)
	}
	r.inbound.tokenGrace = cmp.Or(r.tokenGrace, r.inbound.tokenGrace)
	if r.outbound, err = NewOutbound(r.outCfg); err != nil {
		t.Fatal(err)
	}
	return r
}

// start runs a listener; stop ends it in order and gives what Run returned.
func start(t testing.TB, run func(context.Context, net.Listener) error) (addr string, stop func() error) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx, ln) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return ln.Addr().String(), stop
}

// use puts a policy in force at both ends.
func (r *rig) use(access string) {
	r.t.Helper()
	r.nextRevision++
	files := map[string]string{"services.yaml": r.served, "access.csv": access, "modes.yaml": r.modes}
	if r.routes != "" {
		files["routes/billing.yaml"] = r.routes
	}
	if r.tokens != "" {
		files["tokens.yaml"] = r.tokens
	}
	p := meshtest.Policies(r.t, files)
	eps := append([]mesh.Endpoint{meshtest.Endpoint(r.t, "billing", r.inAddr)}, r.endpointsExtra...)
	snap, err := mesh.Compile(p, r.nextRevision, r.nextRevision, eps)
	if err != nil {
		r.t.Fatal(err)
	}
	if r.shadow != nil {
		snap.Routes = []mesh.Routes{{Service: "billing", Routes: []mesh.Route{{Name: "all", Shadows: []mesh.Shadow{*r.shadow}}}}}
	}
	set, err := authz.Compile(snap)
	if err != nil {
		r.t.Fatal(err)
	}
	r.judge.Use(set)
	r.services.Use(snap)
	r.streams.Use(snap)
	r.snap.Store(snap)
}

// client calls through the outbound proxy, as the application would.
func (r *rig) client() *http.Client {
	proxy := &url.URL{Scheme: "http", Host: r.outAddr}
	tr := &http.Transport{Proxy: http.ProxyURL(proxy), MaxIdleConnsPerHost: 200, DisableCompression: true}
	r.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 2 * patience}
}

// dial connects to the outbound proxy; what is said is up to the test.
func (r *rig) dial() *wire { return newWire(r.t, r.outAddr, nil) }

// dialIn connects to the inbound proxy with an identity.
func (r *rig) dialIn(src *svid.Source) *wire {
	return newWire(r.t, r.inAddr, svid.ClientTLS(src, billing, "http/1.1"))
}

// A wire is a connection on which a test says every byte itself.
type wire struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
}

func newWire(t testing.TB, addr string, cfg *tls.Config) *wire {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return wireOn(t, c, cfg)
}

func wireOn(t testing.TB, c net.Conn, cfg *tls.Config) *wire {
	t.Helper()
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	if cfg != nil {
		tc := tls.Client(c, cfg)
		if err := tc.Handshake(); err != nil {
			t.Fatal(err)
		}
		c = tc
	}
	return &wire{t, c, bufio.NewReader(c)}
}

func (w *wire) say(s string) {
	w.t.Helper()
	if _, err := io.WriteString(w, s); err != nil {
		w.t.Fatal(err)
	}
}

// answer reads one response with its body.
func (w *wire) answer(method string) (*http.Response, string) {
	w.t.Helper()
	resp, err := http.ReadResponse(w.r, &http.Request{Method: method})
	if err != nil {
		w.t.Fatalf("read response: %v", err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatalf("read body: %v", err)
	}
	return resp, string(b)
}

// ended reads until the peer closes and gives what came before.
func (w *wire) ended() string {
	b, _ := io.ReadAll(w.r)
	return string(b)
}

// get is one call; the body is read.
func get(t testing.TB, c *http.Client, url string) (*http.Response, string) {
	t.Helper()
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

// app is a real HTTP server that a handler makes.
func app(t testing.TB, h http.HandlerFunc) string {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func hello(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain")
	_, _ = io.WriteString(w, "hello "+r.URL.Path)
}

// rawApp answers each connection by a function that says every byte.
func rawApp(t testing.TB, serve func(c net.Conn, r *bufio.Reader)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				serve(c, bufio.NewReader(c))
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return ln.Addr().String()
}

// decisions are the records of calls that were judged.
func decisions(l *audit.Log) (out []audit.Record) {
	for _, r := range l.Records() {
		if r.Kind == audit.KindDecision {
			out = append(out, r)
		}
	}
	return out
}

// has says whether s holds every part.
func has(s string, parts ...string) bool {
	for _, p := range parts {
		if !strings.Contains(s, p) {
			return false
		}
	}
	return true
}

// handshakeAndAsk trusts whoever answers, and gives what an HTTP request got.
func handshakeAndAsk(t *testing.T, addr string, src *svid.Source) string {
	t.Helper()
	cfg := svid.ClientTLS(src, billing, "http/1.1")
	cfg.VerifyConnection = nil
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	tc := tls.Client(c, cfg)
	_, _ = io.WriteString(tc, okRequest)
	b, _ := io.ReadAll(tc)
	return string(b)
}

// awaitRecords waits until a log has n records of a kind: the peer knows the
// outcome of a handshake before it is written down.
func awaitRecords(t *testing.T, l *audit.Log, k audit.Kind, n int) {
	t.Helper()
	await(t, func() bool {
		got := 0
		for _, r := range l.Records() {
			if r.Kind == k {
				got++
			}
		}
		return got >= n
	})
}

// patience is for what is sure to come, on a machine that is slow and busy.
const patience = time.Minute

// await asks again until it is so.
func await(t testing.TB, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.After(patience); !ok(); {
		select {
		case <-tick.C:
		case <-end:
			t.Fatal("it did not happen")
		}
	}
}

// stateOf is a state with a new SVID for id.
func stateOf(t testing.TB, r *rig, id spiffeid.ID) *svid.State {
	t.Helper()
	return &svid.State{Identities: []svid.Identity{meshtest.Identity(t, r.ca, id)}, Bundle: r.ca.Bundle()}
}
