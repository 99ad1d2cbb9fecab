package proxy

import (
	"bytes"
	"fmt"

	"sallyport/internal/http1"
	"sallyport/internal/upstream"
)

// tunnelBody bounds the body of a gateway's refusal.
const tunnelBody = 16 << 10

// connect opens a tunnel through a gateway, which judges it by the identity on
// the connection. What the gateway refuses is passed on as it said it.
func (d *door) connect(x *call) *refusal {
	if _, inside := serviceOf(x.req.Authority); inside {
		return &refusal{status: 400, reason: "connect_inside", detail: "a service of the mesh is called as http://, the proxies encrypt"}
	}
	if d.cfg.Gateways == nil {
		return d.noRoute(x, "no_gateway")
	}
	up, err := d.cfg.Gateways.Get(x.ctx, GatewayName, true)
	if err != nil {
		x.err = err
		return &refusal{status: 502, reason: "no_gateway", detail: "the gateway cannot be reached"}
	}
	defer up.Discard()
	head := fmt.Appendf(nil, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n", x.req.Authority, x.req.Authority)
	head = append(append(head, x.extra...), '\r', '\n')
	if _, err := up.Write(head); err != nil {
		x.err = err
		return &refusal{status: 502, reason: "no_gateway", detail: "the gateway closed the connection"}
	}
	var resp http1.Response
	if err := up.ReadResponse(&resp, "CONNECT"); err != nil {
		x.err = err
		return &refusal{status: 502, reason: "no_gateway", detail: "the gateway did not answer properly"}
	}
	x.res.Status = resp.Status
	if resp.Status/100 != 2 {
		d.passRefusal(x, up, &resp)
		return nil
	}
	if _, err := x.down.Write([]byte("HTTP/1.1 200 Connection Established\r\n\r\n")); err != nil {
		x.err = err
		return nil
	}
	x.res.ResponseStarted, x.tunnel = true, true
	x.res.ReqBytes, x.res.RespBytes, x.err = http1.Relay(x.down, up.Conn, x.relayIdle())
	return nil
}

// passRefusal tells the application what the gateway said.
func (d *door) passRefusal(x *call, up *upstream.Conn, resp *http1.Response) {
	var body bytes.Buffer
	if resp.Body.Framing == http1.Length && resp.Body.Length <= tunnelBody {
		if _, err, _ := http1.CopyBody(&body, up.Conn, resp.Body, http1.Length, nil); err != nil {
			x.err = err
		}
	}
	r := &refusal{status: resp.Status, reason: "gateway", decision: string(resp.Get("Sallyport-Decision"))}
	var extra []byte
	if r.decision != "" {
		extra = fmt.Appendf(nil, "Sallyport-Decision: %s\r\n", r.decision)
	}
	keep, err := x.down.WriteError(&x.req, resp.Status, extra, body.Bytes())
	x.refused, x.keep = r, keep && err == nil && !x.ex.ToDown.Close
}
