package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/upstream"
)

const (
	// tunnelBody bounds the body of a gateway's refusal.
	tunnelBody = 16 << 10
	// tunnelInterim bounds the interim answers before it.
	tunnelInterim = 8
)

// connect opens a tunnel through a gateway, which judges it by the identity on
// the connection. What the gateway refuses is passed on as it said it.
func (d *door) connect(x *call) *refusal {
	if _, inside := serviceOf(x.req.Authority); inside {
		if snap := d.cfg.Snapshot(); snap != nil {
			if svc, ok := x.serviceOf(snap); ok && svc.Protocol == mesh.TCP {
				return d.connectStream(x, svc)
			}
		}
		return &refusal{status: 400, reason: "connect_inside", detail: "a service of the mesh is called as http://, the proxies encrypt"}
	}
	if d.cfg.Gateways == nil {
		return d.noRoute(x, "no_gateway")
	}
	for asked := 1; ; asked++ {
		r, again := d.throughGateway(x)
		if !again || asked == maxGateways {
			return r
		}
	}
}

// maxGateways is how many gateways are asked that end the connection instead of
// answering, since they are about to end.
const maxGateways = 3

// throughGateway asks a gateway for the tunnel, and carries it. Another one may be
// asked when this one has said nothing and closed: nothing of the client's was
// sent to it.
func (d *door) throughGateway(x *call) (r *refusal, again bool) {
	up, err := d.cfg.Gateways.Get(x.ctx, GatewayName, true)
	if err != nil {
		return x.noGateway(err, "the gateway cannot be reached"), false
	}
	defer up.Discard()
	if !x.tie(up) {
		x.broken = true
		return nil, false
	}
	defer x.unbind()
	x.goesTo()
	defer x.cameBack()
	head := fmt.Appendf(nil, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s: explicit\r\n", x.req.Authority, x.req.Authority, egressOrigin)
	head = append(append(head, x.extra...), '\r', '\n')
	if _, err := up.Write(head); err != nil {
		return x.noGateway(err, "the gateway closed the connection"), true
	}
	resp, err := gatewayAnswer(up)
	if err != nil {
		return x.noGateway(err, "the gateway did not answer properly"), isClosed(err) || isRefused(err)
	}
	x.err = nil // of a gateway before
	x.res.Status = resp.Status
	if resp.Status/100 != 2 {
		return x.passRefusal(up, resp), false
	}
	x.res.ResponseStarted = true
	x.cameBack()
	if err := x.established(); err != nil {
		x.err, x.broken = err, true
		return nil, false
	}
	x.relay(up)
	return nil, false
}

func (x *call) noGateway(err error, detail string) *refusal {
	x.err = err
	return &refusal{status: 502, reason: "no_gateway", detail: detail}
}

// gatewayAnswer reads the final answer to CONNECT.
func gatewayAnswer(up *upstream.Conn) (*http1.Response, error) {
	var resp http1.Response
	for range tunnelInterim {
		if err := up.ReadResponse(&resp, "CONNECT"); err != nil {
			return nil, err
		}
		if !resp.Informational() {
			return &resp, nil
		}
	}
	return nil, errors.New("too many interim answers")
}

// passRefusal tells the application what the gateway said, if it is a refusal
// in the form that ours have.
func (x *call) passRefusal(up *upstream.Conn, resp *http1.Response) *refusal {
	if resp.Status < 400 {
		return x.noGateway(fmt.Errorf("gateway answered CONNECT with status %d", resp.Status), "the gateway did not answer properly")
	}
	r := &refusal{status: resp.Status, reason: "gateway", detail: "the gateway refused the tunnel"}
	if id := resp.Get("Sallyport-Decision"); isDecision(id) {
		r.decision = string(id)
	}
	if x.socks {
		return r
	}
	var body bytes.Buffer
	if resp.Body.Framing == http1.Length && resp.Body.Length <= tunnelBody {
		if _, err, _ := http1.CopyBody(&body, up.Conn, resp.Body, http1.Length, nil); err != nil {
			return r
		}
	}
	if !json.Valid(body.Bytes()) {
		return r
	}
	x.refused = r
	var head []byte
	if r.decision != "" {
		head = fmt.Appendf(nil, "Sallyport-Decision: %s\r\n", r.decision)
	}
	x.answer(r.status, head, body.Bytes())
	return nil
}

// isDecision says whether b could be the id of a decision.
func isDecision(b []byte) bool {
	for _, c := range b {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && c != '-' {
			return false
		}
	}
	return len(b) > 0 && len(b) <= 64
}

// DialThrough opens a tunnel to address through a gateway, for what this
// process itself needs from outside of the mesh.
func DialThrough(ctx context.Context, gateways *upstream.Services, address string) (net.Conn, error) {
	up, err := gateways.Get(ctx, GatewayName, true)
	if err != nil {
		return nil, fmt.Errorf("reach the gateway: %w", err)
	}
	// The tunnel's owner sets deadlines of its own; until then ctx ends it.
	c := up.NetConn()
	stop := context.AfterFunc(ctx, func() { c.Close() }) // not what is around it, which may be another's by then
	defer stop()
	if err := up.Stands(); err != nil {
		up.Discard()
		return nil, fmt.Errorf("reach the gateway: %w", err)
	}
	if _, err := fmt.Fprintf(up, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", address, address); err != nil {
		up.Discard()
		return nil, fmt.Errorf("ask the gateway: %w", err)
	}
	resp, err := gatewayAnswer(up)
	if err == nil && (resp.Status/100 != 2 || up.Buffered() > 0) {
		err = fmt.Errorf("status %d", resp.Status)
		if id := resp.Get("Sallyport-Decision"); isDecision(id) {
			err = fmt.Errorf("status %d, decision %s: a row out must let this workload reach %s", resp.Status, id, address)
		}
	}
	if err != nil {
		up.Discard()
		return nil, fmt.Errorf("gateway answered CONNECT: %w", err)
	}
	t := &through{Conn: c, up: up}
	if !stop() {
		t.Close()
		return nil, ctx.Err()
	}
	return t, c.SetDeadline(time.Time{})
}

// A through is a tunnel that counts as a call to its gateway until it is closed.
type through struct {
	net.Conn
	up   *upstream.Conn
	over sync.Once
}

// Close closes the tunnel.
func (t *through) Close() error {
	t.over.Do(t.up.Discard)
	return nil
}
