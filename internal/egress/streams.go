package egress

import (
	"context"
	"net/http"

	"sallyport/internal/hop"
	"sallyport/internal/http1"
	"sallyport/internal/record"
)

// windows is by how much the windows of all streams may grow.
const windows = 64 << 20

// serveHop serves a connection of one of our own proxies (package hop): each
// stream on it carries a tunnel, or requests that are judged one by one.
func (g *Gateway) serveHop(w *wire, tc *record.Conn, who *caller) {
	cfg := hop.Config{Streams: g.lim.Streams, Budget: g.windows, First: who.firsts}
	cfg.Hoarded = func() { g.cfg.Metrics.RequestsRefused(reporter, "hop_hoarded").Inc() }
	h := hop.Accepted(tc, cfg, func(s *hop.Stream) bool {
		if !g.asks(who) {
			return false
		}
		if !g.enter() {
			g.answered(who)
			return false
		}
		ctx, cancel := context.WithCancelCause(g.base)
		// A caller that breaks off ends what is being dialled for it too.
		s.OnCut(func() {
			if s.Spared() {
				cancel(errHoarded)
			}
			cancel(nil)
			s.Close()
		})
		go func() {
			defer g.wg.Done()
			defer cancel(nil)
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
	for h := range g.inner {
		h.Drain()
	}
	for s := range g.waiting {
		_ = s.Refuse() // which tells that nothing was acted on
	}
	clear(g.waiting)
}

// rests notes that a stream waits for its next request, unless the gateway ends
// such.
func (g *Gateway) rests(s *hop.Stream) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.yielding || g.draining {
		return false
	}
	g.waiting[s] = true
	return true
}

// wakes notes that one has come. It is false when the peer was told meanwhile that
// none is taken.
func (g *Gateway) wakes(s *hop.Stream) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	waited := g.waiting[s]
	delete(g.waiting, s)
	return waited
}

// serveHopStream answers the requests on a stream, and carries the tunnel that one
// may become.
func (g *Gateway) serveHopStream(ctx context.Context, w *wire, s *hop.Stream, who *caller) {
	if t, left := g.askStream(ctx, w, s, who); t != nil {
		g.tunnel1(ctx, t, &stream1{
			pipe: s, w: w, left: left, abort: func() { s.Close() },
			rest: func() bool { return g.rests(s) }, wake: func() bool { return g.wakes(s) },
		})
	}
}

// askStream answers requests until one becomes a tunnel. The stream is counted
// until the answer is out, however slowly its caller takes that, or the tunnel is,
// which counts against limits of its own; not while it waits for another request.
func (g *Gateway) askStream(ctx context.Context, w *wire, s *hop.Stream, who *caller) (*tunnel, []byte) {
	asking := true
	defer func() {
		if asking {
			g.answered(who)
		}
	}()
	hc := http1.NewConn(s, g.lim.Request)
	defer hc.Release()
	a := &asker{hc: hc, who: who, abort: func() { s.Close() }}
	var req http1.Request
	for {
		err := hc.ReadRequest(&req)
		if !asking {
			if err != nil && !unreadable(err) {
				return nil, nil // it was a pause that did not end
			}
			if asking = g.wakes(s) && g.asks(who); !asking {
				_ = s.Refuse()
				return nil, nil
			}
		}
		if err != nil || string(req.Method) == http.MethodConnect {
			return g.lastOf(ctx, w, hc, who, &req, err)
		}
		if !g.ask(ctx, a, &req) {
			g.brokeOff(ctx, w, who)
			return nil, nil
		}
		g.answered(who)
		if asking = false; !g.rests(s) {
			_ = s.Refuse()
			return nil, nil
		}
	}
}

// brokeOff takes note of a request that its caller has broken off, if it has: not if
// it was done for the memory that others hold.
func (g *Gateway) brokeOff(ctx context.Context, w *wire, who *caller) {
	if ctx.Err() == nil || g.base.Err() != nil || context.Cause(ctx) == errHoarded { //nolint:errorlint // made by us
		return
	}
	if !g.calmOf.Spend(who.id, 1) {
		w.Close()
	}
}

// lastOf acts on what was read from a stream and is the last of it: a tunnel, or
// an answer to what cannot become one.
func (g *Gateway) lastOf(ctx context.Context, w *wire, hc *http1.Conn, who *caller, req *http1.Request, err error) (*tunnel, []byte) {
	var t *tunnel
	var ans *answer
	if g.meant(ctx, who) {
		t, ans = g.request1(ctx, who, req, err)
	}
	if t == nil {
		g.brokeOff(ctx, w, who)
	}
	if ans != nil {
		req.KeepAlive = false
		ans.write1(hc, req, err)
	}
	return t, hc.Unread()
}
