package proxy

import (
	"sallyport/internal/http1"
	"sallyport/internal/upstream"
)

// toGateway are the fields that only we set in what goes to a gateway.
var toGateway = http1.NewNameSet(egressOrigin)

// leadsOut says whether a request for no service of the mesh is for a gateway to
// judge: one in the clear, to which no address of the mesh has led.
func (d *door) leadsOut(x *call) bool {
	_, inside := serviceOf(x.req.Authority)
	return !inside && x.only == "" && d.cfg.Gateways != nil && x.req.Scheme != "https"
}

// aimOut fixes a gateway as where the call goes.
func (d *door) aimOut(x *call) {
	x.known = target{name: GatewayName, dst: "host:" + x.req.AuthorityText()}
	x.to, x.dst, x.series = &x.known, x.known.dst, d.asked
	x.runs()
}

// passOut has a gateway answer a request for a host outside, which it judges by
// the identity on the connection. What it refuses is passed on as it said it.
func (d *door) passOut(x *call) *refusal {
	x.ex.Settle, x.ex.ToUp.Also = nil, toGateway
	x.extra = append(append(x.extra, egressOrigin...), ": explicit\r\n"...)
	x.lend = func(x *call, fresh bool) (*upstream.Conn, error) {
		return d.cfg.Gateways.Get(x.ctx, GatewayName, fresh)
	}
	r := x.exchange()
	if r != nil && r.reason == noEndpoint().reason {
		return x.noGateway(x.err, "the gateway cannot be reached")
	}
	return r
}
