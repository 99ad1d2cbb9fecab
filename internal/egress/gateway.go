package egress

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/capture"
	"sallyport/internal/hop"
	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/mesh"
	"sallyport/internal/mux"
	"sallyport/internal/record"
	"sallyport/internal/svid"
	"sallyport/internal/tap"
	"sallyport/internal/telemetry"
	"sallyport/internal/upstream"
)

// Recorder keeps audit records. When Append returns nil the record survives
// the end of this process, and its ID is filled in. *audit.Log is one.
type Recorder interface {
	Append(*audit.Record) error
}

// Limits bound what callers may hold. Zero means the default.
type Limits struct {
	// Conns is how many connections are open at once. Default 8192.
	Conns int
	// ConnsPerCaller is the same for one SPIFFE ID. Default 1024. Both bound also
	// the streams whose request is not answered yet.
	ConnsPerCaller int
	// Handshakes is how many of them may be without identity. One more closes the
	// one that has taken longest, of the address that has most. Default 512.
	Handshakes int
	// HandshakeTimeout is the time from accept to identity. Default 5 s.
	HandshakeTimeout time.Duration
	// HelloTimeout is the time from 200 to a whole ClientHello, however slowly
	// its bytes come; and for a caller to take a refusal. Default 5 s.
	HelloTimeout time.Duration
	// Request bounds the head of a request over HTTP/1.1, and the wait for it.
	// Default: those of http1.
	Request http1.Limits
	// Tunnels is how many tunnels are open at once, requests under way counted with
	// them. Default 4096.
	Tunnels int
	// TunnelsPerCaller is the same for one SPIFFE ID. Default 512.
	TunnelsPerCaller int
	// Streams is how many tunnels one connection carries that has streams: of
	// HTTP/2, or of one of our own proxies. Default 250.
	Streams int
	// Idle ends a tunnel without a byte either way. Default 1 h.
	Idle time.Duration
	// Life ends a tunnel of this age, moving or not. Default 24 h.
	Life time.Duration
	// Rejudge is how often live tunnels are judged again on account of time:
	// the until= and when= of rules. Default 15 s.
	Rejudge time.Duration
	// Verify is how often the proof of a caller that asks for tunnels is looked at
	// again: an authority may have been withdrawn. Default 10 s.
	Verify time.Duration
}

func (l Limits) filled() Limits {
	l.Conns = cmp.Or(l.Conns, 8192)
	l.ConnsPerCaller = cmp.Or(l.ConnsPerCaller, 1024)
	l.Handshakes = cmp.Or(l.Handshakes, 512)
	l.HandshakeTimeout = cmp.Or(l.HandshakeTimeout, 5*time.Second)
	l.HelloTimeout = cmp.Or(l.HelloTimeout, 5*time.Second)
	l.Tunnels = cmp.Or(l.Tunnels, 4096)
	l.TunnelsPerCaller = cmp.Or(l.TunnelsPerCaller, 512)
	l.Streams = cmp.Or(l.Streams, 250)
	l.Idle = cmp.Or(l.Idle, time.Hour)
	l.Life = cmp.Or(l.Life, 24*time.Hour)
	l.Rejudge = cmp.Or(l.Rejudge, 15*time.Second)
	l.Verify = cmp.Or(l.Verify, 10*time.Second)
	return l
}

func (l Limits) validate() error {
	var errs []error
	for name, v := range map[string]int64{
		"conns": int64(l.Conns), "conns per caller": int64(l.ConnsPerCaller), "handshakes": int64(l.Handshakes), "tunnels": int64(l.Tunnels),
		"tunnels per caller": int64(l.TunnelsPerCaller), "streams": int64(l.Streams),
		"handshake timeout": int64(l.HandshakeTimeout), "hello timeout": int64(l.HelloTimeout),
		"idle": int64(l.Idle), "life": int64(l.Life), "rejudge": int64(l.Rejudge), "verify": int64(l.Verify),
	} {
		if v < 0 {
			errs = append(errs, fmt.Errorf("limits: %s: is negative", name))
		}
	}
	return errors.Join(errs...)
}

// Config is what a Gateway needs.
type Config struct {
	// TLS is the server side of svid.ServerTLS: it must demand a certificate
	// and verify it. Its ALPN is set by the gateway. Required.
	TLS *tls.Config
	// Judge decides and records. Required.
	Judge *authz.Judge
	// Snapshot gives the snapshot in force, which is the one that Judge has
	// the rules of; nil while there is none, and then all is denied. Required.
	Snapshot func() *mesh.Snapshot
	// Standing looks again at what a caller has proved in its handshake: an
	// error wraps svid.ErrRevoked or svid.ErrExpired. It is quick. Required.
	Standing func(tls.ConnectionState) error
	// Names resolves destinations without endpoints. Without it those are
	// refused.
	Names Names
	// Roots are whom the certificates of hosts must lead to that the gateway speaks
	// TLS with itself. Default: those of the system.
	Roots *x509.CertPool
	// Secrets are what destinations may have injected. Default: none.
	Secrets *Secrets
	// Inspector stands in for hosts that are inspected. Without it nobody reaches
	// them.
	Inspector *Inspector
	// Guard screens addresses. Default: the zero Guard.
	Guard *Guard
	// Audit keeps what the Judge does not know: tunnels opened and closed, and
	// refusals by name, address, or first bytes. Required.
	Audit Recorder
	// Log receives failures of the gateway itself. Required.
	Log *slog.Logger
	// Metrics counts tunnels and bytes. Default: none.
	Metrics *telemetry.Registry
	// Edges counts who asked for which host. Default: none.
	Edges *telemetry.Edges
	// Troubled is told of each address that is put aside, and of each host that is cut
	// off or called again. It must be quick. Default: nobody.
	Troubled func(upstream.Trouble)
	// Tracer keeps the spans of tunnels. Nil: none is kept.
	Tracer *telemetry.Tracer
	// Taps show requests and tunnels to whoever looks. Default: nobody can.
	Taps   *tap.Taps
	Limits Limits
}

// Validate reports every mistake by field.
func (c Config) Validate() error {
	var errs []error
	switch {
	case c.TLS == nil:
		errs = append(errs, errors.New("tls: missing"))
	case c.TLS.ClientAuth != tls.RequireAndVerifyClientCert &&
		(c.TLS.ClientAuth != tls.RequireAnyClientCert || c.TLS.VerifyConnection == nil):
		errs = append(errs, errors.New("tls: does not demand and verify a client certificate"))
	case !c.TLS.SessionTicketsDisabled:
		errs = append(errs, errors.New("tls: session tickets are on; a resumed session would outlive its identity"))
	}
	if c.Judge == nil {
		errs = append(errs, errors.New("judge: missing"))
	}
	if c.Snapshot == nil {
		errs = append(errs, errors.New("snapshot: missing"))
	}
	if c.Standing == nil {
		errs = append(errs, errors.New("standing: missing"))
	}
	if c.Audit == nil {
		errs = append(errs, errors.New("audit: missing"))
	}
	if c.Log == nil {
		errs = append(errs, errors.New("log: missing"))
	}
	return errors.Join(append(errs, c.Limits.validate())...)
}

// A Gateway serves CONNECT to workloads. It is safe for concurrent use.
type Gateway struct {
	cfg     Config
	lim     Limits
	dialer  *Dialer
	tunnels tunnels
	crowd   crowd
	flood   flood
	proving *mux.Anteroom          // connections without identity
	turns   mux.Turns              // of handshakes
	calm    *mux.Calm[mux.Source]  // with who breaks off handshakes
	vain    *mux.Calm[mux.Source]  // with sources whose handshakes came to nothing, whoever is there: they wait for each other
	calmOf  *mux.Calm[spiffeid.ID] // with callers that break off what they have begun
	windows *mux.Budget            // of streams
	// restOfWorn is a field for tests.
	restOfWorn time.Duration
	origins    origins
	probes     probes
	outside    *upstream.Outside
	signals    *telemetry.Signals
	h2         *http.Server
	h2conns    *handover
	base       context.Context // ends when Drain gives up waiting
	giveUp     context.CancelFunc

	wg sync.WaitGroup // connections and streams

	mu       sync.Mutex // guards what follows, and h2 and h2conns
	conns    map[*wire]bool
	waiting  map[*hop.Stream]bool // for another request
	inner    map[*http2.Conn]bool // in tunnels
	draining bool
	// yielding has connections end with their next answer; resting closes those
	// that wait for a request meanwhile.
	yielding bool
	resting  *time.Timer
}

// New makes a Gateway.
func New(c Config) (*Gateway, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	g := &Gateway{cfg: c, lim: c.Limits.filled(), conns: make(map[*wire]bool), waiting: make(map[*hop.Stream]bool), inner: make(map[*http2.Conn]bool)}
	guard := c.Guard
	if guard == nil {
		guard = new(Guard)
	}
	g.outside = &upstream.Outside{Changed: c.Troubled}
	g.dialer = &Dialer{Names: c.Names, Guard: guard, Secrets: c.Secrets, Roots: c.Roots, Outside: g.outside}
	g.crowd = crowd{firsts: mux.NewBudget(firsts), of: make(map[spiffeid.ID]*member), askingOf: make(map[spiffeid.ID]int)}
	g.proving, g.turns, g.calm = mux.NewAnteroom(g.lim.Handshakes), mux.NewTurns(), mux.NewCalm[mux.Source](brokenBurst, brokenRate)
	g.vain = mux.NewCalm[mux.Source](brokenBurst, brokenRate)
	g.calmOf, g.restOfWorn = mux.NewCalm[spiffeid.ID](brokenBurst, brokenRate), restOfWorn
	g.windows, g.signals = mux.NewBudget(windows), telemetry.NewSignals(c.Metrics, reporter)
	g.tunnels.init(g.lim.Tunnels, g.lim.TunnelsPerCaller)
	g.cfg.TLS = c.TLS.Clone()
	g.cfg.TLS.NextProtos = []string{hop.Proto, "h2", "http/1.1"}
	g.cfg.TLS.DynamicRecordSizingDisabled = true
	g.base, g.giveUp = context.WithCancel(context.Background())
	g.h2conns = newHandover()
	g.h2 = g.newHTTP2()
	return g, nil
}

// Serve accepts connections until ctx ends, then stops accepting and returns
// nil; what is open goes on until Drain. It judges live tunnels again now and
// then. It is called once.
func (g *Gateway) Serve(ctx context.Context, ln net.Listener) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	var helpers sync.WaitGroup
	defer helpers.Wait()
	over, cancel := context.WithCancel(ctx)
	defer cancel()
	helpers.Go(func() { g.rejudgeEvery(over) })
	defer g.cfg.Metrics.Saturation(reporter, "connections", func() float64 { return float64(g.Carries()) / float64(g.lim.Conns) })()
	defer g.cfg.Metrics.Saturation(reporter, "tunnels", func() float64 { return float64(g.Tunnels()) / float64(g.lim.Tunnels) })()
	g.serveStreams()
	pause := 5 * time.Millisecond
	for {
		c, err := ln.Accept()
		switch {
		case err == nil:
			pause = 5 * time.Millisecond
			g.admit(c)
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept: %w", err)
		default:
			// Out of descriptors, most likely: wait for some to come free.
			g.cfg.Log.Error("accept failed", "err", err, "pause", pause)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			pause = min(2*pause, time.Second)
		}
	}
}

// Drain waits for the open tunnels to end, and closes those that are left when
// ctx ends. Connections without one end with their next answer, or soon.
// Everything the Gateway started has ended when it returns.
func (g *Gateway) Drain(ctx context.Context) {
	g.Yield(true)
	g.rest(ctx)
	g.mu.Lock()
	g.draining = true
	if g.resting != nil {
		g.resting.Stop()
	}
	for w := range g.conns {
		if w.idle {
			w.Close()
		}
	}
	g.part()
	h2, h2conns := g.h2, g.h2conns
	g.mu.Unlock()
	err := h2.Shutdown(ctx)
	h2conns.Close()
	done := make(chan struct{})
	go func() { g.wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
	}
	g.giveUp()
	for _, t := range g.tunnels.all() {
		t.stop(ReasonShutdown)
	}
	g.mu.Lock()
	for w := range g.conns {
		w.Close()
	}
	g.mu.Unlock()
	if err != nil {
		_ = h2.Close()
	}
	<-done
	g.origins.sweep(true)
	g.refusedMore(g.flood.rest())
}

// rest gives connections without a tunnel their time, as long as there are any.
func (g *Gateway) rest(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, restGrace)
	defer cancel()
	tick := time.NewTicker(restGrace / 50)
	defer tick.Stop()
	for g.Carries() > 0 {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// restGrace is how long a connection without a tunnel may wait for one while
// the gateway yields. To close it at once could meet a request on its way.
const restGrace = time.Second

// Yield has the open connections end with the tunnel that they carry, or the next
// one, since another process takes the new ones. False takes that back. Tunnels
// go on.
func (g *Gateway) Yield(on bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.draining || on == g.yielding {
		return
	}
	if g.yielding = on; !on {
		g.resting.Stop()
		return
	}
	g.resting = time.AfterFunc(restGrace, g.closeIdle)
	g.part()
	// A server of HTTP/2 that was shut down serves nothing more: what comes in
	// this process after all, goes to another.
	old, conns := g.h2, g.h2conns
	g.h2conns = newHandover()
	g.h2 = g.newHTTP2()
	g.serveStreams()
	g.wg.Go(func() {
		defer conns.Close()
		if old.Shutdown(g.base) != nil {
			_ = old.Close()
		}
	})
}

// serveStreams starts the server of HTTP/2, under mu or before anybody else.
func (g *Gateway) serveStreams() {
	h2, conns := g.h2, g.h2conns
	g.wg.Go(func() { _ = h2.Serve(conns) })
}

func (g *Gateway) closeIdle() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for w := range g.conns {
		if g.yielding && w.idle {
			w.Close()
		}
	}
}

// Carries is how many connections are open.
func (g *Gateway) Carries() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.conns)
}

// yields says that connections end with their next answer.
func (g *Gateway) yields() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.yielding
}

// admit gives a new connection its goroutine, unless too many are open.
func (g *Gateway) admit(c net.Conn) {
	w := &wire{Conn: c, closed: make(chan struct{}), from: mux.SourceOf(c.RemoteAddr())}
	if g.calm.Over(w.from) {
		g.cfg.Metrics.ConnectionsRefused(reporter, "resets").Inc()
		g.flood.more()
		c.Close()
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.draining {
		c.Close()
		return
	}
	if len(g.conns) >= g.lim.Conns {
		g.cfg.Metrics.ConnectionsRefused(reporter, "total").Inc()
		c.Close()
		return
	}
	var crowded bool
	if w.place, crowded = g.proving.Enter(w.from, func() { w.Close() }); crowded {
		g.cfg.Metrics.ConnectionsRefused(reporter, "handshakes").Inc()
	}
	g.conns[w] = true
	g.opened()
	g.wg.Go(func() {
		defer func() {
			w.Close()
			g.mu.Lock()
			delete(g.conns, w)
			g.opened()
			g.mu.Unlock()
		}()
		defer g.recovered()
		g.serveConn(w)
	})
}

// reporter is the name of the gateway in metrics.
const reporter = "gateway"

// opened shows how many connections there are, under mu.
func (g *Gateway) opened() {
	g.cfg.Metrics.Connections(reporter, "open").Set(float64(len(g.conns)))
	g.cfg.Metrics.Connections(reporter, "proving").Set(float64(g.proving.Len()))
}

// enter counts a stream in, unless the gateway drains. A stream that entered
// leaves with wg.Done.
func (g *Gateway) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.draining {
		return false
	}
	g.wg.Add(1)
	return true
}

// recovered, deferred, keeps a panic to the connection it happened on: what
// that carries ends, the gateway goes on.
func (g *Gateway) recovered() {
	if p := recover(); p != nil {
		g.logPanic(p)
	}
}

func (g *Gateway) logPanic(p any) {
	g.cfg.Log.Error("panic; what it served was ended", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
}

// setIdle notes whether w holds nothing that a drain must wait for, and
// reports whether it may go on.
func (g *Gateway) setIdle(w *wire, idle bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	w.idle = idle
	return !g.draining
}

// A caller is the workload at the other end of one connection.
type caller struct {
	id    spiffeid.ID
	until time.Time // when its SVID, or what signed that, ends
	peer  string    // its address
	state tls.ConnectionState
	// firsts is what its streams, and its connections of HTTP/2 in tunnels, may hold
	// unread.
	firsts *mux.Budget

	// verified is when that was last verified, in Unix nanoseconds; disproved says
	// that it was in vain.
	verified  atomic.Int64
	disproved atomic.Bool
}

func callerOf(cs tls.ConnectionState, addr string) (*caller, error) {
	id, err := svid.PeerID(cs)
	if err != nil {
		return nil, err
	}
	who := &caller{id: id, until: cs.PeerCertificates[0].NotAfter, peer: addr, state: cs}
	for _, c := range cs.PeerCertificates[1:] {
		if c.NotAfter.Before(who.until) {
			who.until = c.NotAfter
		}
	}
	who.verified.Store(time.Now().UnixNano())
	return who, nil
}

// serveConn makes the handshake and serves the protocol agreed on.
func (g *Gateway) serveConn(w *wire) {
	g.turn(w)
	tc, who, err := g.handshake(w)
	if err != nil {
		return
	}
	defer tc.Close()
	if g.calmOf.Over(who.id) { // only the handshake is its source's doing
		g.inVain(w)
		g.cfg.Metrics.ConnectionsRefused(reporter, "resets").Inc()
		g.flood.more()
		return
	}
	if !g.connected(who) {
		return
	}
	defer g.parted(who)
	if !g.proved(w, who) {
		return
	}
	switch tc.State().NegotiatedProtocol {
	case hop.Proto:
		g.serveHop(w, tc, who)
	case "h2":
		g.serveHTTP2(w, tc, who)
	default:
		g.serveHTTP1(w, tc, who)
	}
}

// turnWithin is the longest that a connection waits for its handshake, see turn.
const turnWithin = time.Second

// turn has a connection wait for its handshake while those of its source come to
// nothing: they are then spread over time, so that others seldom meet one.
func (g *Gateway) turn(w *wire) {
	wait := g.vain.Wait(w.from, costHandshake, turnWithin)
	if wait == 0 {
		return
	}
	select {
	case <-time.After(wait):
	case <-w.closed:
	}
}

// inVain takes note of a handshake that a source has asked for, and nobody gained by.
func (g *Gateway) inVain(w *wire) {
	g.calm.Spend(w.from, costHandshake)
	g.vain.Spend(w.from, costHandshake)
}

// handshake establishes who calls. Failures are recorded.
func (g *Gateway) handshake(w *wire) (*record.Conn, *caller, error) {
	defer func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.proving.Leave(w.place)
		g.opened()
	}()
	ctx, cancel := context.WithTimeout(context.Background(), g.lim.HandshakeTimeout)
	defer cancel()
	peer := w.RemoteAddr().String()
	tc, err := record.Server(ctx, capture.NewDirect(w.Conn), g.cfg.TLS, g.turns)
	if err == nil {
		var who *caller
		if who, err = callerOf(tc.ConnectionState(), peer); err == nil {
			return tc, who, nil
		}
		tc.Close()
	}
	g.inVain(w)
	g.cfg.Metrics.TLSFailures(reporter, "handshake").Inc()
	g.refusedConn(&audit.Record{Kind: audit.KindTLS, Decision: audit.Deny, Reason: "handshake", Peer: peer, Detail: err.Error()})
	return nil, nil, err
}
