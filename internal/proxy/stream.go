package proxy

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/proxyproto"
	"sallyport/internal/telemetry"
	"sallyport/internal/upstream"
)

// A stream is a connection of a service that speaks TCP: judged once, as
// CONNECT with the path "-", and then carried as it is. The side that speaks
// first does not matter, since nobody waits to see what is said. The hop is
// mutual TLS without ALPN, which any peer with an SVID can make.

// streamChain is the way of a stream from a peer to the application.
func (in *Inbound) streamChain() chain {
	return chain{
		{"access record", "outermost: whatever became of the stream is written down", nil, in.record},
		{"trace", "before anything that takes time, so that its time is seen", in.trace, nil},
		{"signals", "counts refusals below as well as what was carried", in.startClock, in.count},
		{"in-flight limit", "before the judge: a flood must not cost a decision each", in.enterFlight, in.leaveFlight},
		{"protocol", "bytes that were meant as HTTP must not reach an application that takes them for its own", in.plain, nil},
		{"rate limit", "before anything that costs", in.rateLimit, nil},
		{"judge", "last before the application: it answers for the whole stream", in.judge, nil},
		{"application", "takes the Grant as proof", in.carry, nil},
	}
}

// streamChain is the way of a stream from the application to a peer.
func (d *door) streamChain() chain {
	return chain{
		{"access record", "outermost: whatever became of the stream is written down", nil, d.record},
		{"trace", "before anything that takes time, so that its time is seen", d.trace, nil},
		{"signals", "counts refusals below as well as what was carried", d.startClock, d.count},
		{"workload", "nothing is done for a process that is not the workload", d.ownProcess, nil},
		{"in-flight limit", "bounds what a runaway workload holds", d.enterFlight, d.leaveFlight},
		{"route", "one snapshot says which service is meant; below it the target is fixed", d.streamRoute, nil},
		{"shadow's hands", "once the target is known: what is done for a shadow changes nothing", d.harmless, nil},
		{"upstream", "balance around dial", d.carry, nil},
	}
}

// opaque makes a call of a connection on which nobody speaks HTTP. A refusal
// of it is a reset: the protocol has no place for words of ours.
func (l *listener) opaque(x *call, way chain) {
	if !x.conn.begin() {
		return
	}
	x.reset()
	x.opaque = true
	x.req.Method, x.req.Path = []byte("CONNECT"), []byte("-")
	way.run(x)
	if !x.tunnel {
		x.conn.abort()
	}
}

// streams says how streams are carried, if the service of Self speaks TCP.
func (in *Inbound) streams() (mesh.Stream, bool) {
	if in.cfg.Stream == nil {
		return mesh.Stream{}, false
	}
	return in.cfg.Stream()
}

// plain refuses a peer that believes that HTTP is spoken here: the policy has
// changed, and it does not know.
func (in *Inbound) plain(x *call) *refusal {
	if x.who.tls.NegotiatedProtocol == "" {
		return nil
	}
	return in.deny(audit.Record{Reason: "protocol", Dir: string(mesh.In), Src: x.src, Dst: x.dst, Port: in.cfg.Port(), Verb: "CONNECT", Path: "-",
		Peer: x.remote, Trace: x.traceText(), Detail: "the peer negotiated " + x.who.tls.NegotiatedProtocol + ", the service speaks tcp"})
}

func (in *Inbound) carry(x *call) *refusal { return in.carryTo(x, x.grant) }

// carryTo brings the stream to the application. It takes the proof that it was
// judged and recorded.
func (in *Inbound) carryTo(x *call, g authz.Grant) *refusal {
	if !g.Covers(in.self, x.port) {
		return &refusal{status: 500, reason: "no_grant", detail: "the stream was not judged"}
	}
	how, ok := in.streams()
	if !ok {
		return &refusal{status: 503, reason: "protocol", detail: "the service speaks no tcp any more"}
	}
	up, err := in.cfg.App.Get(x.ctx, true)
	if err != nil {
		x.err = err
		return &refusal{status: 503, reason: "no_endpoint", detail: "the application does not accept connections"}
	}
	if how.Proxy != "" {
		h := proxyproto.Header{Src: addrOf(x.remote), Dst: addrOf(x.conn.LocalAddr().String()), SPIFFE: x.src}
		if _, err := up.Write(h.Append(nil)); err != nil {
			up.Discard()
			x.err = err
			return &refusal{status: 502, reason: "upstream", detail: "the application closed the connection"}
		}
	}
	x.carry(up, how)
	return nil
}

// speaksTCP says whether connections to a door are streams. When the policy in
// force does not know its service any more, they are what they were: a client
// of that protocol is refused at once, not after it has not sent a request.
func (d *door) speaksTCP() bool {
	snap := d.cfg.Snapshot()
	if d.service == "" || snap == nil {
		return false
	}
	if svc, ok := snap.Service(d.service); ok {
		d.tcp.Store(svc.Protocol == mesh.TCP)
	}
	return d.tcp.Load()
}

// streamRoute finds what the service of the connection is now.
func (d *door) streamRoute(x *call) *refusal {
	if x.only == "" {
		return d.routeOut(x)
	}
	snap := d.cfg.Snapshot()
	svc, ok := snap.Service(x.only)
	if !ok || svc.Protocol != mesh.TCP {
		return d.astray(x, "host:"+x.host.textOf(x.only), "no_route", "this workload has nothing to do with the service")
	}
	return d.aimed(x, snap, svc)
}

// aimed is aim and then what routes say.
func (d *door) aimed(x *call, snap *mesh.Snapshot, svc mesh.Service) *refusal {
	d.aim(x, svc)
	x.known.policy = d.policyOf(snap)
	x.known.routes = x.known.policy.of(svc.Name)
	return d.direct(x)
}

// astray refuses a stream that leads nowhere.
func (d *door) astray(x *call, dst, reason, detail string) *refusal {
	x.dst = dst
	return d.deny(audit.Record{Reason: reason, Dir: string(mesh.Out), Src: d.self, Dst: dst, Verb: "CONNECT", Path: "-",
		Peer: x.remote, Trace: x.traceText(), Detail: detail})
}

// aim fixes the service that a stream goes to.
func (d *door) aim(x *call, svc mesh.Service) {
	x.known = target{name: svc.Name, dst: svc.ID.String(), stream: svc.Stream}
	x.to = &x.known
	x.dst, x.series = x.to.dst, d.Signals.SeriesOf(telemetry.ProtoTCP, x.src, x.to.dst, string(svc.Name))
	x.runs()
}

func (d *door) carry(x *call) *refusal {
	up, r := d.reach(x)
	if r != nil {
		return r
	}
	x.carry(up, x.to.stream)
	return nil
}

// reach dials an endpoint of the service that the stream goes to.
func (d *door) reach(x *call) (*upstream.Conn, *refusal) {
	if x.to.name == GatewayName && x.meant.IsValid() {
		return d.reachOut(x)
	}
	if d.cfg.Streams == nil {
		return nil, &refusal{status: 503, reason: "no_endpoint", detail: "no tcp is carried here"}
	}
	f, r := d.meet(x)
	if r != nil {
		return nil, r
	}
	up, err := d.cfg.Streams.Lend(x.ctx, &upstream.Want{Service: x.to.name, Subset: x.to.subset, Fresh: true, Connect: x.to.plan().Connect})
	if err != nil {
		if f != nil {
			f.leave()
		}
		return nil, x.unlent(err)
	}
	up.Report(upstream.OK, time.Now(), 0) // what it says from here on is not ours to judge
	up.Lasts()
	if f != nil {
		x.tries.fault = f
		x.slowed(f, up)
	}
	return up, nil
}

// connectStream is CONNECT to a service of the mesh that speaks TCP, for
// programs that know an HTTP proxy and no port of the service's own.
func (d *door) connectStream(x *call, svc mesh.Service) *refusal {
	x.running.End() // it was counted as leading out
	if r := d.aimed(x, d.cfg.Snapshot(), svc); r != nil {
		return r
	}
	up, r := d.reach(x)
	if r != nil {
		return r
	}
	if err := x.established(); err != nil {
		up.Discard()
		if f := x.tries.fault; f != nil {
			f.leave()
		}
		x.err, x.broken = err, true
		return nil
	}
	x.carry(up, svc.Stream)
	return nil
}

// carry ties both ends together within the limits of the service.
func (x *call) carry(up *upstream.Conn, how mesh.Stream) {
	defer up.Discard()
	defer x.unbind()
	if f := x.tries.fault; f != nil {
		x.tries.fault = nil
		defer f.leave()
	}
	x.res.Status, x.res.ResponseStarted = 200, true
	x.idle = how.Idle
	if how.Life > 0 {
		c := x.conn
		t := time.AfterFunc(how.Life, c.sever)
		defer t.Stop()
	}
	x.relay(up)
	if errors.Is(x.err, http1.ErrIdleTimeout) {
		x.err = nil // as agreed
	}
}

// relayWithin is how long nothing may move on what the call became.
func (x *call) relayWithin() time.Duration { return cmp.Or(x.idle, relayIdle) }

// addrOf reads an address that net.Addr wrote; the zero value for another.
func addrOf(s string) netip.AddrPort {
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return netip.AddrPort{}
	}
	return a
}

// announced reads who the peer is of a connection that a load balancer made,
// which says so before all else. Everybody else speaks for himself.
func (in *Inbound) announced(c *conn) (remote string, err error) {
	remote = c.RemoteAddr().String()
	by := addrOf(remote).Addr().Unmap()
	if !slices.ContainsFunc(in.cfg.ProxyFrom, func(p netip.Prefix) bool { return p.Contains(by) }) {
		return remote, nil
	}
	if err := c.SetReadDeadline(time.Now().Add(in.cfg.HandshakeTimeout)); err != nil {
		return remote, err
	}
	h, err := proxyproto.Read(c.Conn)
	if err != nil {
		return remote, err
	}
	if h.Src.IsValid() {
		remote = h.Src.String()
	}
	return remote, c.SetReadDeadline(time.Time{})
}
