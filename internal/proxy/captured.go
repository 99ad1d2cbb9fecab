package proxy

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"sallyport/internal/mesh"
	"sallyport/internal/upstream"
)

// Captured says what becomes of connections that the application made to
// somewhere else and that rules of the kernel brought here. Where they were
// going to is all that is known of them: the first bytes are not looked at to
// guess a protocol.
type Captured struct {
	// Original tells where a connection was going to; ok is false for one that was
	// made to this proxy. Required.
	Original func(c net.Conn) (to netip.AddrPort, ok bool, err error)
	// Virtual tells which service a virtual address stands for. Required.
	Virtual func(netip.Addr) (mesh.ServiceName, bool)
	// Outside tells which host outside of the mesh an address stands for, a virtual
	// one or one that the workload was told: a gateway is asked for a tunnel to that
	// host. No service is at such an address. Optional.
	Outside func(netip.Addr) (host string, ok bool)
	// Beyond has what leads to no service of the mesh ask a gateway for a tunnel
	// to its address. Without it that is refused. With it only virtual addresses
	// lead to services: the addresses of endpoints are what proxies say, and one
	// could take, or block, what goes to somebody outside.
	Beyond bool
}

// captured finds what a connection is for that was going elsewhere, and says
// whether it is a stream. One that leads to no service is one, whatever it
// would have said.
func (d *door) captured(x *call) (opaque bool) {
	if d.cfg.Captured == nil || d.service != "" {
		return false
	}
	to, ok, err := d.cfg.Captured.Original(x.conn.Conn)
	if err == nil && !ok {
		return false
	}
	if err != nil {
		x.err = err
		return true
	}
	x.meant = to
	snap := d.cfg.Snapshot()
	if snap == nil {
		return true
	}
	svc, ok := d.serviceAt(snap, to)
	if !ok {
		return true
	}
	x.only = svc.Name
	return svc.Protocol == mesh.TCP
}

// httpPort is the port that programs mean when they write none.
const httpPort = 80

// serviceAt finds the service that an address belongs to: by its virtual
// address or, when nothing leads outside, by that of one of its endpoints, at the
// port that the policy names or the endpoint has. An address that could be of two services is of none.
func (d *door) serviceAt(snap *mesh.Snapshot, to netip.AddrPort) (mesh.Service, bool) {
	at := func(svc mesh.Service) bool {
		return to.Port() == svc.Port || to.Port() == httpPort && svc.Protocol == mesh.HTTP
	}
	if name, ok := d.cfg.Captured.Virtual(to.Addr()); ok {
		svc, ok := snap.Service(name)
		return svc, ok && at(svc)
	}
	if _, outside := d.outsideHost(to.Addr()); outside {
		return mesh.Service{}, false
	}
	if d.cfg.Captured.Beyond {
		return mesh.Service{}, false
	}
	var found mesh.Service
	for _, e := range snap.Endpoints {
		if e.Address.Addr().Unmap() != to.Addr() || e.Service == found.Name {
			continue
		}
		svc, ok := snap.Service(e.Service)
		if !ok || e.Address.Port() != to.Port() && to.Port() != svc.Port {
			continue
		}
		if found.Name != "" {
			return mesh.Service{}, false
		}
		found = svc
	}
	return found, found.Name != ""
}

// elsewhere refuses a request that names another service than the one whose
// address was dialled: the name is old, or somebody plays with both.
func (x *call) elsewhere() *refusal {
	if !x.meant.IsValid() {
		return nil
	}
	if other, inside := serviceOf(x.req.Authority); inside && other != string(x.only) {
		x.ex.ToDown.Close = true
		return &refusal{status: 421, reason: "misdirected", detail: fmt.Sprintf("this is the address of %s, another service of the mesh was asked for", x.only)}
	}
	return nil
}

// routeOut decides about a captured connection that leads to no service.
func (d *door) routeOut(x *call) *refusal {
	if !x.meant.IsValid() {
		return d.astray(x, "", "no_destination", fmt.Sprintf("the kernel does not say where the connection was going to: %v", x.err))
	}
	dst := "host:" + x.meant.String()
	host, named := d.outsideHost(x.meant.Addr())
	if named {
		dst = "host:" + host
	}
	snap := d.cfg.Snapshot()
	if snap == nil {
		return d.astray(x, dst, "no_policy", "there is no policy yet")
	}
	if named && d.cfg.Gateways == nil {
		return d.astray(x, dst, "no_gateway", "the world outside is reached through a gateway, and none is configured")
	}
	if !named && (!d.cfg.Captured.Beyond || d.cfg.Gateways == nil) {
		return d.astray(x, dst, "no_route", "the address is that of no service this workload has to do with, or of another port of one; the world outside is reached through a gateway")
	}
	if name, ok := d.cfg.Captured.Virtual(x.meant.Addr()); ok && !named {
		return d.astray(x, dst, "no_route", fmt.Sprintf("this is the address of %s, which is not served at this port or does not concern this workload", name))
	}
	x.known = target{name: GatewayName, dst: dst}
	x.to = &x.known
	x.dst, x.series = dst, d.outside
	x.runs()
	return nil
}

// outsideHost is the host outside that an address stands for.
func (d *door) outsideHost(a netip.Addr) (string, bool) {
	if d.cfg.Captured.Outside == nil {
		return "", false
	}
	return d.cfg.Captured.Outside(a)
}

// egressOrigin tells a gateway how the workload came to its destination:
// "explicit", by asking the proxy, "vip", by the virtual address of a name, or
// "orig-dst", by an address. It is for the record and decides nothing.
const egressOrigin = "Egress-Origin"

// reachOut opens a tunnel through a gateway to where the connection was going,
// and asks another one when a gateway ends instead of answering, as connect does.
func (d *door) reachOut(x *call) (*upstream.Conn, *refusal) {
	for asked := 1; ; asked++ {
		up, r, again := d.askGateway(x)
		if !again || asked == maxGateways {
			return up, r
		}
	}
}

// askGateway asks one gateway, which judges the tunnel. Another one may be asked
// when this one has said nothing and closed.
func (d *door) askGateway(x *call) (_ *upstream.Conn, r *refusal, again bool) {
	up, err := d.cfg.Gateways.Get(x.ctx, GatewayName, true)
	if err != nil {
		return nil, x.noGateway(err, "the gateway cannot be reached"), false
	}
	defer func() {
		if r != nil {
			up.Discard()
		}
	}()
	if !x.tie(up) {
		return nil, &refusal{status: 503, reason: "no_gateway", detail: "the gateway is not believed any more"}, false
	}
	defer x.unbind()
	to, origin := x.meant.String(), "orig-dst"
	if host, ok := d.outsideHost(x.meant.Addr()); ok {
		to, origin = net.JoinHostPort(host, strconv.Itoa(int(x.meant.Port()))), "vip"
	}
	x.goesTo()
	defer x.cameBack()
	head := fmt.Appendf(nil, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s: %s\r\n", to, to, egressOrigin, origin)
	if _, err := up.Write(append(append(head, x.extra...), '\r', '\n')); err != nil {
		return nil, x.noGateway(err, "the gateway closed the connection"), true
	}
	resp, err := gatewayAnswer(up)
	if err != nil {
		return nil, x.noGateway(err, "the gateway did not answer properly"), isClosed(err) || isRefused(err)
	}
	x.err = nil // of a gateway before
	if resp.Status/100 == 2 {
		return up, nil, false
	}
	r = &refusal{status: resp.Status, reason: "gateway", detail: "the gateway refused the tunnel"}
	if id := resp.Get("Sallyport-Decision"); isDecision(id) {
		r.decision = string(id)
	}
	return nil, r, false
}
