package egress

import (
	"context"

	"sallyport/internal/hop"
	"sallyport/internal/http1"
	"sallyport/internal/record"
)

// windows is by how much the windows of all streams may grow.
const windows = 64 << 20

// serveHop serves a connection of one of our own proxies (package hop): each
// stream on it is one CONNECT, judged by itself.
func (g *Gateway) serveHop(w *wire, tc *record.Conn, who *caller) {
	h := hop.Accepted(tc, hop.Config{Streams: g.lim.Streams, Budget: g.windows}, func(s *hop.Stream) bool {
		if !g.asks(who) {
			return false
		}
		if !g.enter() {
			g.answered(who)
			return false
		}
		ctx, cancel := context.WithCancel(g.base)
		// A caller that breaks off ends what is being dialled for it too.
		s.OnCut(func() { cancel(); s.Close() })
		go func() {
			defer g.wg.Done()
			defer cancel()
			defer s.Close()
			defer g.recovered()
			g.serveHopStream(ctx, w, s, who)
		}()
		return true
	})
	if !g.share(w, h) {
		return
	}
	defer h.Sever() // should serving it panic, its streams must not stay
	if err := h.Run(); err != nil {
		g.cfg.Log.Debug("connection of a proxy ended", "peer", who.id.String(), "remote", who.peer, "err", err)
	}
}

// share notes what has the streams of w, unless the gateway drains.
func (g *Gateway) share(w *wire, h *hop.Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	w.shared = h
	if g.yielding {
		h.Drain() // whoever drains came too early to see it
	}
	return !g.draining
}

// part has the connections that are shared end with their last stream, of which
// their callers are told. It is called under mu.
func (g *Gateway) part() {
	for w := range g.conns {
		if w.shared != nil {
			w.shared.Drain()
		}
	}
}

// serveHopStream answers one request, which opens a stream, and carries the
// tunnel that it may become.
func (g *Gateway) serveHopStream(ctx context.Context, w *wire, s *hop.Stream, who *caller) {
	if t, left := g.askStream(ctx, w, s, who); t != nil {
		g.tunnel1(t, &stream1{pipe: s, w: w, left: left, abort: func() { s.Close() }})
	}
}

// askStream reads the request, and answers one that becomes no tunnel. The stream
// is counted until its answer is out, however slowly its caller takes that, or the
// tunnel is, which counts against limits of its own.
func (g *Gateway) askStream(ctx context.Context, w *wire, s *hop.Stream, who *caller) (*tunnel, []byte) {
	defer g.answered(who)
	hc := http1.NewConn(s, g.lim.Request)
	defer hc.Release()
	var req http1.Request
	err := hc.ReadRequest(&req)
	t, ans := g.request1(ctx, who, &req, err)
	if t == nil && ctx.Err() != nil && g.base.Err() == nil && !g.calmOf.Spend(who.id, 1) {
		w.Close()
	}
	if ans != nil {
		req.KeepAlive = false
		ans.write1(hc, &req, err)
	}
	return t, hc.Unread()
}
