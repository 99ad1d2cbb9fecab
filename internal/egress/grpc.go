package egress

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/mesh"
)

// firstMessage is how long the head of an answer of gRPC may take: a server may send
// it with its first message, for which a client may wait long.
const firstMessage = 5 * time.Minute

// speaksGRPC says whether who sends a request reads refusals of gRPC, which are a
// 200 to everybody else. Its clients take trailers.
func speaksGRPC(req *http1.Request) bool {
	return req.TETrailers && http1.IsGRPC(req.Get("content-type"))
}

// overHTTP2 refuses a call of gRPC where the destination says nothing of HTTP/2: over
// HTTP/1.1 no server takes it.
func overHTTP2(how *mesh.Destination) error {
	if !slices.Contains(how.ALPN, mesh.ALPNHTTP2) {
		return refuse(ReasonALPN, "gRPC needs HTTP/2 to the host: its destination says no alpn: [h2]")
	}
	return nil
}

// insideHTTP2 answers a caller that speaks HTTP/2 in a tunnel without being asked to,
// as clients of gRPC do in the clear: each call is to the gateway a connection with
// one request.
func (g *Gateway) insideHTTP2(ctx context.Context, t *tunnel, c net.Conn) {
	var wg sync.WaitGroup
	defer wg.Wait()
	cfg := http2.Config{
		Head: g.lim.Request.Head, HeadTimeout: g.lim.Request.HeadTimeout, Budget: g.windows, First: t.who.firsts,
		Broken:   func() bool { return g.calmOf.Spend(t.who.id, 1) },
		Violated: func(r http2.Reason) { g.cfg.Metrics.RequestsRefused(reporter, "http2_"+string(r)).Inc() },
	}
	h := http2.Accepted(c, cfg, func(l *http2.Lane) bool {
		if !g.asks(t.who) {
			return false
		}
		ctx, cancel := context.WithCancel(ctx)
		l.OnCut(func() { cancel(); l.Close() })
		wg.Go(func() {
			defer g.answered(t.who)
			defer cancel()
			defer l.Close()
			defer g.recovered()
			g.askLane(ctx, t, l)
		})
		return true
	})
	if !g.holds(h) {
		return
	}
	defer g.letGo(h)
	defer h.Sever() // should serving it panic, its calls must not stay
	err := h.Run()
	if v := (*http2.Violation)(nil); errors.As(err, &v) {
		g.deny(t.record(audit.KindDecision), refuse(ReasonRequest, "what came in the tunnel is no HTTP/2: %v", v))
	}
	if err != nil {
		g.cfg.Log.Debug("connection of HTTP/2 in a tunnel ended", "peer", t.who.id.String(), "host", t.host.String(), "err", err)
	}
}

// askLane answers the request of one call.
func (g *Gateway) askLane(ctx context.Context, t *tunnel, l *http2.Lane) {
	a := &asker{hc: http1.NewConn(l, g.lim.Request), who: t.who, in: t, abort: func() { _ = l.Reset(http2.Internal) }}
	defer a.hc.Release()
	var req http1.Request
	err := a.hc.ReadRequest(&req)
	if ans := g.unread(a.who, &req, err); ans != nil {
		ans.write1(a.hc, &req, err)
	} else if err == nil {
		g.ask(ctx, a, &req)
	}
}

// holds notes a connection in a tunnel that ends with its calls when the gateway
// drains. It is false when that is over.
func (g *Gateway) holds(h *http2.Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.draining {
		return false
	}
	g.inner[h] = true
	if g.yielding {
		h.Drain() // whoever drains came too early to see it
	}
	return true
}

func (g *Gateway) letGo(h *http2.Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.inner, h)
}
