package egress

import (
	"cmp"
	"errors"
	"net"
	"slices"
	"strings"
	"sync/atomic"

	"sallyport/internal/audit"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/upstream"
)

// upgrade settles whether a request may have its connection become what it asks for.
// One with a credential may not: what goes through a WebSocket is not searched for it.
func (f *fetch) upgrade() error {
	may := f.req.Upgrade && slices.Contains(f.how.Upgrade, mesh.WebSocket)
	f.bare = may && f.secret != ""
	if f.req.Upgrade = may && !f.bare; f.req.Upgrade && f.req.WebSocketKey() == nil {
		return refuse(ReasonRequest, "a WebSocket is asked for with one Sec-WebSocket-Key of 16 bytes, and Sec-WebSocket-Version: 13")
	}
	return nil
}

// becomes looks whether a 101 answers the request, and records that this becomes a
// WebSocket, before any of it goes on.
func (f *fetch) becomes(resp *http1.Response) bool {
	if !resp.Answers(f.req.WebSocketKey()) {
		f.outcome, f.note = upstream.Failed, "the 101 does not answer the key of the request"
		return false
	}
	rec := f.record(audit.KindEgressOpen)
	rec.Decision = audit.Allow
	rec.Detail = strings.TrimSpace("websocket to " + f.to.String() + f.origin + " " + f.note)
	if err := f.g.cfg.Audit.Append(rec); err != nil {
		f.g.cfg.Log.Error("WebSocket was not recorded, and not opened", "err", err)
		f.stop(ReasonAudit)
		return false
	}
	return true
}

// A metered is a connection to a host that may become a WebSocket, what goes
// through which counts for the request.
type metered struct {
	net.Conn
	f  *fetch
	on atomic.Bool // it has
}

func (m *metered) Read(p []byte) (int, error) {
	n, err := m.Conn.Read(p)
	m.moved(false, n)
	return n, err
}

func (m *metered) Write(p []byte) (int, error) {
	n, err := m.Conn.Write(p)
	m.moved(true, n)
	return n, err
}

// NetConn is what carries the bytes.
func (m *metered) NetConn() net.Conn { return m.Conn }

// CloseWrite says that no more bytes go to the host.
func (m *metered) CloseWrite() error {
	if c, ok := m.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return errWhole
}

func (m *metered) moved(up bool, n int) {
	if n == 0 || !m.on.Load() {
		return
	}
	count := &m.f.down
	if up {
		count = &m.f.up
	}
	count.Add(int64(n))
	if m.f.spend != nil {
		meter{m.f}.take(up, n)
	}
}

// carry moves what a connection has become until it ends, and records that.
func (f *fetch) carry(o *origin) {
	o.meter.on.Store(true)
	o.meter.moved(false, o.Conn.Buffered()) // what came with the 101
	f.tunnel.webSocket.Store(true)
	reason := ReasonDone
	if f.g.rejudge(f.tunnel) == nil { // now that Rejudge can see what it is
		_, _, err := http1.NewTunnel(f.a.hc, o.Conn, f.g.idleOf(&f.how)).Run()
		switch {
		case errors.Is(err, http1.ErrIdleTimeout):
			reason = ReasonIdle
		case err != nil:
			reason = ReasonReset
		}
	}
	f.goes(nil)
	o.discard()
	f.recordEnd(cmp.Or(f.why(), reason))
}
