package proxy

import (
	"context"
	"errors"
	"sync"

	"sallyport/internal/hop"
	"sallyport/internal/http2"
	"sallyport/internal/record"
)

// windows is by how much the windows of all streams of a listener may grow.
const windows = 64 << 20

// serveHop serves a connection of one of our own proxies: each stream on it is
// to the chain a connection of its own, of the same peer.
func (in *Inbound) serveHop(ctx context.Context, c *conn, tc *record.Conn) {
	var wg sync.WaitGroup
	defer wg.Wait()
	broken := func() bool { return in.brokenOff(c, 1) }
	hoarded := func() { in.Metrics.RequestsRefused(in.Reporter, "hop_hoarded").Inc() }
	h := hop.Accepted(tc, hop.Config{Budget: in.windows, First: c.who.share.firsts, Hoarded: hoarded, Broken: broken}, func(s *hop.Stream) bool {
		sc := &conn{Conn: s, on: c, from: c.from, who: c.who}
		// A caller that breaks a call off ends it at the application too.
		s.OnCut(sc.hangUp)
		if !in.enterStream(sc) {
			return false
		}
		wg.Go(func() {
			defer in.peers.leave(c.who.id)
			defer in.forget(sc)
			defer in.survive(sc)
			in.serveCalls(ctx, sc, s)
		})
		return true
	})
	if !c.shares(h) {
		return
	}
	defer h.Sever()         // should serving it panic, its calls must not keep it
	if in.draining.Load() { // whoever drains may have come too early to see it
		h.Drain()
	}
	if err := h.Run(); err != nil {
		if v := (*hop.Violation)(nil); errors.As(err, &v) {
			in.Metrics.HopViolations(in.Reporter, string(v.Reason)).Inc()
		}
		in.Log.Debug("connection of a proxy ended", "peer", c.who.src, "remote", c.who.remote, "err", err)
	}
}

// enterStream takes a stream in, which counts as a connection does.
func (in *Inbound) enterStream(c *conn) bool {
	if in.peers.enter(c.who.id) == nil {
		in.turnAway(limitPeer, "limit", in.peers.max, "peer", c.who.src)
		return false
	}
	if !in.admit(c) {
		in.peers.leave(c.who.id)
		return false
	}
	return true
}

// shares marks the connection as one whose streams carry the calls; false means
// that the drain has closed it first.
func (c *conn) shares(h shared) bool {
	c.mu.Lock()
	c.shared = h
	c.mu.Unlock()
	return c.begin()
}

// isShared says whether streams carry its calls.
func (c *conn) isShared() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.shared != nil
}

// leave has a connection that is shared end with its last call.
func (c *conn) leave() {
	c.mu.Lock()
	h := c.shared
	c.mu.Unlock()
	if h != nil {
		h.Drain()
	}
}

// refuse has the peer of a stream learn that nothing was acted on since the
// last answer.
func (c *conn) refuse() {
	switch s := c.Conn.(type) {
	case *hop.Stream:
		_ = s.Refuse()
	case *http2.Lane:
		_ = s.Reset(http2.RefusedStream)
	}
}
