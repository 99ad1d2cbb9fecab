package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/upstream"
)

// OutboundConfig is what the way out needs.
type OutboundConfig struct {
	Shared
	// Self is the identity of the workload. Required.
	Self spiffeid.ID
	// Local says whether the process at the other end of a local connection
	// is the workload; the error says who it is instead. Required.
	Local func(c net.Conn) error
	// Snapshot is the newest policy; nil before the first. Required.
	Snapshot func() *mesh.Snapshot
	// Services lends connections to the endpoints of services. Required.
	Services *upstream.Services
	// Gateways lends connections to the gateways under the name "gateway".
	// Without it nothing leads out of the mesh.
	Gateways *upstream.Services
}

// GatewayName is the name of the gateways in OutboundConfig.Gateways.
const GatewayName mesh.ServiceName = "gateway"

func (c OutboundConfig) validate() error {
	errs := []error{c.Shared.validate()}
	for name, missing := range map[string]bool{
		"self": c.Self.IsZero(), "local": c.Local == nil, "snapshot": c.Snapshot == nil, "services": c.Services == nil,
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
}

// NewOutbound checks the configuration; Run does the work.
func NewOutbound(cfg OutboundConfig) (*Outbound, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("outbound proxy: %w", err)
	}
	return &Outbound{cfg: cfg, self: cfg.Self.String()}, nil
}

// Run serves ln, the HTTP proxy of the application, until ctx ends and the
// calls in flight are done, and closes it.
func (o *Outbound) Run(ctx context.Context, ln net.Listener) error {
	return o.RunFor(ctx, ln, "")
}

// RunFor is Run for a listener whose every request is for one service.
func (o *Outbound) RunFor(ctx context.Context, ln net.Listener, service mesh.ServiceName) error {
	door := newDoor(o, service)
	return door.run(ctx, ln)
}

// A door is one listener of the way out.
type door struct {
	listener
	*Outbound
	service mesh.ServiceName
	chain   chain
}

func newDoor(o *Outbound, service mesh.ServiceName) *door {
	d := &door{Outbound: o, service: service}
	d.listener = listener{Shared: o.cfg.Shared.withDefaults(), serve: d.serveConn}
	d.chain = d.makeChain()
	return d
}

func (d *door) serveConn(ctx context.Context, c *conn) {
	x := &call{ctx: ctx, conn: c, src: d.self, remote: c.RemoteAddr().String(), fixed: d.service}
	x.stranger = d.cfg.Local(c.Conn)
	x.down = http1.NewConn(c.Conn, d.Limits)
	defer x.down.Release()
	for {
		if err := x.down.ReadRequest(&x.req); err != nil {
			x.unreadable(err)
			return
		}
		if !c.begin() {
			return
		}
		x.reset()
		d.chain.run(x)
		c.rest()
		if !x.keep {
			if !x.tunnel {
				_ = x.down.Linger()
			}
			return
		}
		if d.draining.Load() {
			return
		}
	}
}

// The links of the way out.

func (d *door) trace(x *call) *refusal {
	x.dst, x.series = "", nil
	x.traceOf()
	return nil
}

func (d *door) count(x *call) {
	if x.series == nil {
		x.series = d.Signals.Series(x.src, "", "")
	}
	x.series.Observe(x.status(), time.Since(x.start), x.res.ReqBytes, x.res.RespBytes)
}

func (d *door) ownProcess(x *call) *refusal {
	if x.stranger == nil {
		return nil
	}
	x.ex.ToDown.Close = true
	return d.deny(audit.Record{Reason: "not_workload", Dir: string(mesh.Out), Src: d.self, Dst: "host:" + x.req.AuthorityText(),
		Verb: string(x.req.Method), Path: x.req.PathText(), Peer: x.remote, Trace: x.traceID, Detail: x.stranger.Error()})
}

// route finds the service that is meant, or sees that the call leads out.
func (d *door) route(x *call) *refusal {
	if x.req.Form == http1.Authority {
		x.dst = "host:" + x.req.AuthorityText()
		x.series = d.Signals.Series(x.src, "gateway", "")
		return nil
	}
	snap := d.cfg.Snapshot()
	if snap == nil {
		return d.noRoute(x, "no_policy")
	}
	name := x.fixed
	if name == "" {
		var ok bool
		if name, ok = serviceOf(x.req.Authority); !ok {
			return d.noRoute(x, "no_route")
		}
	}
	svc, ok := snap.Service(name)
	if !ok {
		return d.noRoute(x, "no_route")
	}
	x.svc, x.dst = svc, svc.ID.String()
	x.series = d.Signals.Series(x.src, x.dst, string(svc.Name))
	if x.fixed != "" {
		x.ex.ToUp.Authority = append(append([]byte(nil), svc.Name...), "."+mesh.Domain...)
	}
	return nil
}

// noRoute refuses a call to something that is not a service this workload has
// anything to do with.
func (d *door) noRoute(x *call, reason string) *refusal {
	x.dst = "host:" + x.req.AuthorityText()
	return d.deny(audit.Record{Reason: reason, Dir: string(mesh.Out), Src: d.self, Dst: x.dst,
		Verb: string(x.req.Method), Path: x.req.PathText(), Peer: x.remote, Trace: x.traceID,
		Detail: "clear HTTP is carried to services of the mesh only; the world outside is reached by CONNECT"})
}

// serviceOf reads the service's name from an authority such as
// "billing.mesh.internal" or "billing.mesh.internal:80".
func serviceOf(authority []byte) (mesh.ServiceName, bool) {
	host := authority
	if i := bytes.LastIndexByte(authority, ':'); i >= 0 {
		host = authority[:i]
	}
	name, ok := strings.CutSuffix(string(host), "."+mesh.Domain)
	return mesh.ServiceName(name), ok && name != "" && !strings.Contains(name, ".")
}

func (d *door) forward(x *call) *refusal {
	if x.req.Form == http1.Authority {
		return d.connect(x)
	}
	r := x.exchange(func(fresh bool) (*upstream.Conn, error) { return d.cfg.Services.Get(x.ctx, x.svc.Name, fresh) })
	return r
}
