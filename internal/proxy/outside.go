package proxy

import (
	"bytes"
	"context"
	"fmt"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
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

// inspectionHost is what a gateway answers itself: by whom it stands in for hosts.
const inspectionHost = "inspection." + mesh.Domain

// InspectionCA asks a gateway for the certificate by which it stands in for hosts,
// in PEM; empty when it does for none.
func InspectionCA(ctx context.Context, gateways *upstream.Services) ([]byte, error) {
	up, err := gateways.Get(ctx, GatewayName, false)
	if err != nil {
		return nil, fmt.Errorf("reach the gateway: %w", err)
	}
	defer up.Discard()
	defer context.AfterFunc(ctx, func() { up.Close() })()
	if err := up.Stands(); err != nil {
		return nil, fmt.Errorf("reach the gateway: %w", err)
	}
	if _, err := fmt.Fprintf(up, "GET /ca.pem HTTP/1.1\r\nHost: %s\r\n\r\n", inspectionHost); err != nil {
		return nil, fmt.Errorf("ask the gateway: %w", err)
	}
	var resp http1.Response
	if err := up.ReadResponse(&resp, "GET"); err != nil {
		return nil, fmt.Errorf("ask the gateway: %w", err)
	}
	if resp.Status != 200 || resp.Body.Framing != http1.Length || resp.Body.Length > tunnelBody {
		return nil, fmt.Errorf("gateway answered with status %d", resp.Status)
	}
	var pem bytes.Buffer
	if _, err, _ := http1.CopyBody(&pem, up.Conn, resp.Body, http1.Length, nil); err != nil {
		return nil, fmt.Errorf("ask the gateway: %w", err)
	}
	return pem.Bytes(), nil
}
