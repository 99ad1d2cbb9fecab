package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
	"sallyport/internal/upstream"
)

// handshakeTimeout bounds a TLS handshake: a peer without an SVID must not
// hold a connection for long.
const handshakeTimeout = 10 * time.Second

// InboundConfig is what the way in needs.
type InboundConfig struct {
	Shared
	// Self is the identity that is served. Required.
	Self spiffeid.ID
	// Port is the port that rules name for the service of Self in the policy in
	// force; 0 when there is none, which denies. Required.
	Port func() uint16
	// TLS is the server side of mutual TLS. Required.
	TLS *tls.Config
	// PeerID reads the verified identity of a peer. Required.
	PeerID func(tls.ConnectionState) (spiffeid.ID, error)
	// Judge decides each call. Required.
	Judge *authz.Judge
	// App lends connections to the application. Required.
	App *upstream.Pool
}

func (c InboundConfig) validate() error {
	errs := []error{c.Shared.validate()}
	for name, missing := range map[string]bool{
		"self": c.Self.IsZero(), "port": c.Port == nil, "tls": c.TLS == nil,
		"peer id": c.PeerID == nil, "judge": c.Judge == nil, "app": c.App == nil,
	} {
		if missing {
			errs = append(errs, errors.New(name+": missing"))
		}
	}
	return errors.Join(errs...)
}

// Inbound takes calls from peers and hands those that are allowed to the
// application.
type Inbound struct {
	listener
	cfg   InboundConfig
	chain chain
	self  string
}

// NewInbound checks the configuration; Run does the work.
func NewInbound(cfg InboundConfig) (*Inbound, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("inbound proxy: %w", err)
	}
	in := &Inbound{cfg: cfg, self: cfg.Self.String()}
	in.listener = listener{Shared: cfg.Shared.withDefaults(), serve: in.serveConn}
	in.chain = in.makeChain()
	return in, nil
}

// Run serves ln until ctx ends and the calls in flight are done, and closes it.
func (in *Inbound) Run(ctx context.Context, ln net.Listener) error { return in.run(ctx, ln) }

func (in *Inbound) serveConn(ctx context.Context, c *conn) {
	tc := tls.Server(c.Conn, in.cfg.TLS)
	x := &call{ctx: ctx, conn: c, dst: in.self, remote: c.RemoteAddr().String()}
	if err := in.handshake(ctx, tc, x); err != nil {
		in.refusedHandshake(x, err)
		return
	}
	x.down = http1.NewConn(tc, in.Limits)
	defer x.down.Release()
	x.port = in.cfg.Port()
	x.judge = in.cfg.Judge.Conn(mesh.In, x.peer, in.self, x.port)
	x.series = in.Signals.Series(x.src, x.dst, "")
	x.caller = fmt.Appendf(nil, "X-Forwarded-Client-Cert: By=%s;URI=%s\r\n", in.self, x.src)
	for {
		if err := x.down.ReadRequest(&x.req); err != nil {
			x.unreadable(err)
			return
		}
		if !c.begin() {
			return
		}
		x.reset()
		in.chain.run(x)
		c.rest()
		if !x.keep {
			if !x.tunnel {
				_ = x.down.Linger()
			}
			return
		}
		if in.draining.Load() {
			return
		}
	}
}

func (in *Inbound) handshake(ctx context.Context, tc *tls.Conn, x *call) error {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	if err := tc.HandshakeContext(ctx); err != nil {
		return err
	}
	cs := tc.ConnectionState()
	id, err := in.cfg.PeerID(cs)
	if err != nil {
		return err
	}
	x.peer, x.src, x.peerUntil = id, id.String(), cs.PeerCertificates[0].NotAfter
	return nil
}

// refusedHandshake records a peer that could not prove an identity. A peer
// that only closed the connection has proved nothing and tried nothing.
func (in *Inbound) refusedHandshake(x *call, err error) {
	if isClosed(err) {
		return
	}
	r := audit.Record{Kind: audit.KindTLS, Decision: audit.Deny, Reason: "handshake", Dst: in.self, Peer: x.remote, Detail: err.Error()}
	if err := in.Audit.Append(&r); err != nil {
		in.Log.Error("audit record lost", "err", err)
	}
	in.Edges.Add("", in.self, "http", telemetry.Denied, false, time.Now())
}

// isClosed says that the peer went away before it said anything.
func isClosed(err error) bool {
	return strings.HasSuffix(err.Error(), "EOF") || strings.Contains(err.Error(), "connection reset") || errors.Is(err, net.ErrClosed)
}

// The links of the way in.

func (in *Inbound) trace(x *call) *refusal {
	x.traceOf()
	x.extra = append(x.extra, x.caller...)
	return nil
}

func (in *Inbound) count(x *call) {
	x.series.Observe(x.status(), time.Since(x.start), x.res.ReqBytes, x.res.RespBytes)
	in.Edges.Add(x.src, x.dst, "http", x.outcome(), true, x.start)
}

func (in *Inbound) peerValid(x *call) *refusal {
	if x.start.After(x.peerUntil) {
		x.ex.ToDown.Close = true
		return in.deny(audit.Record{Reason: "svid_expired", Dir: string(mesh.In), Src: x.src, Dst: x.dst, Port: x.port,
			Verb: string(x.req.Method), Path: x.req.PathText(), Peer: x.remote, Trace: x.traceID})
	}
	return nil
}

func (in *Inbound) judge(x *call) *refusal {
	if x.req.Form == http1.Authority || x.req.Form == http1.Asterisk {
		return &refusal{status: 405, reason: "method", detail: "only requests for a path are served here"}
	}
	x.judged = authz.Call{
		Dir: mesh.In, Src: x.peer, Dst: in.self, Port: x.port,
		Verb: methodText(x.req.Method), Path: x.req.PathText(), Now: x.start, Peer: x.remote, Trace: x.traceID,
	}
	g, err := x.judge.Judge(&x.judged)
	if err == nil {
		x.grant = g
		return nil
	}
	r := &refusal{status: 403, reason: "policy"}
	if d := (*authz.Denial)(nil); errors.As(err, &d) && d.ID != "" {
		r.decision = d.ID
	} else {
		r.status, r.reason, r.detail = 503, "audit", "the decision could not be recorded"
	}
	return r
}

func (in *Inbound) forward(x *call) *refusal { return in.handOver(x, x.grant) }

// handOver brings the call to the application. It takes the proof that the
// call was judged and recorded.
func (in *Inbound) handOver(x *call, g authz.Grant) *refusal {
	if !g.Covers(in.self, x.port) {
		return &refusal{status: 500, reason: "no_grant", detail: "the call was not judged"}
	}
	r := x.exchange(func(fresh bool) (*upstream.Conn, error) { return in.cfg.App.Get(x.ctx, fresh) })
	if r != nil && r.reason == "no_endpoint" {
		r.detail = "the application does not accept connections"
	}
	return r
}

// methodText gives the usual methods without an allocation.
func methodText(m []byte) string {
	switch string(m) {
	case "GET":
		return "GET"
	case "POST":
		return "POST"
	case "PUT":
		return "PUT"
	case "DELETE":
		return "DELETE"
	case "HEAD":
		return "HEAD"
	case "PATCH":
		return "PATCH"
	case "OPTIONS":
		return "OPTIONS"
	}
	return string(m)
}
