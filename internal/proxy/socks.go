package proxy

import (
	"errors"
	"fmt"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/capture"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/socks"
)

// socks5 is what a client of SOCKS 5 says first.
const socks5 = "\x05"

// serveSOCKS serves an application that speaks SOCKS 5, of which x has read the
// beginning. What it asks for is to the chain a CONNECT like any other; only the
// words in which it is told what became of that are others.
func (d *door) serveSOCKS(c *conn, x *call) {
	begun := &ahead{Conn: capture.NewDirect(c.Conn), read: x.down.Unread()}
	x.down.Release()
	x.down = nil
	_ = c.SetDeadline(time.Now().Add(d.headTimeout()))
	req, err := socks.Accept(begun)
	switch bad := (*socks.Error)(nil); {
	case errors.As(err, &bad):
		d.Metrics.RequestsRefused(d.Reporter, "socks").Inc()
		if bad.Reply != socks.Granted {
			_, _ = begun.Write(bad.Reply.Append(nil))
		}
		return
	case err != nil:
		d.leftOff(x.conn, err)
		return
	}
	if req.Command != socks.Connect {
		d.onlyConnect(x, req)
		_, _ = begun.Write(socks.NoCommand.Append(nil))
		return
	}
	_ = c.SetDeadline(time.Time{})
	begun.read = append(fmt.Appendf(nil, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n\r\n", req.Authority), begun.read...)
	x.socks = true
	x.down = http1.NewConn(begun, d.Limits)
	d.calls(x, d.chain)
}

// headTimeout bounds what comes before a request of SOCKS, and that.
func (d *door) headTimeout() time.Duration {
	if d.Limits.HeadTimeout > 0 {
		return d.Limits.HeadTimeout
	}
	return 10 * time.Second
}

// onlyConnect refuses what SOCKS knows beside CONNECT: nothing may come in by a
// port that a workload has asked for, and no datagram leaves.
func (d *door) onlyConnect(x *call, req socks.Request) {
	x.start = time.Now()
	if d.ownProcess(x) != nil {
		return
	}
	d.deny(audit.Record{Reason: "method", Dir: string(mesh.Out), Src: d.self, Dst: "host:" + req.Authority, Verb: req.Command.String(), Path: "-",
		Peer: x.remote, Detail: "of SOCKS only CONNECT is served"})
}

// established tells the client that its tunnel is open.
func (x *call) established() error {
	yes := []byte("HTTP/1.1 200 Connection Established\r\n\r\n")
	if x.socks {
		yes = socks.Granted.Append(nil)
	}
	_, err := x.down.Write(yes)
	return err
}

// answerSOCKS says in SOCKS what a status of HTTP says.
func (x *call) answerSOCKS(status int) {
	reply := socks.Failed
	switch {
	case status == 400, status == 403:
		reply = socks.Forbidden
	case status == 502:
		reply = socks.Unreachable
	case status == 504:
		reply = socks.Expired
	}
	_, err := x.down.Write(reply.Append(nil))
	x.keep = false
	x.err = errors.Join(x.err, err)
}
