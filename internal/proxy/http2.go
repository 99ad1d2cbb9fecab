package proxy

import (
	"context"
	"errors"
	"net"
	"sync"

	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/socket"
)

// serveHTTP2 serves a connection of HTTP/2 until it ends: each lane of it is to
// the chain a connection of its own. enter takes one in, or not; serve serves it
// and leaves.
func (l *listener) serveHTTP2(c *conn, nc net.Conn, enter func(*conn) bool, serve func(*conn)) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	cfg := l.http2Config()
	cfg.Broken = func() bool { return l.brokenOff(c, 1) }
	if cfg.First = l.firsts; c.who != nil {
		cfg.First = c.who.share.firsts
	}
	h := http2.Accepted(nc, cfg, func(lane *http2.Lane) bool {
		sc := &conn{Conn: lane, on: c, from: c.from, who: c.who}
		// A client that breaks a call off ends it at the service too.
		lane.OnCut(sc.hangUp)
		if !enter(sc) {
			return false
		}
		wg.Go(func() {
			defer l.forget(sc)
			defer l.survive(sc)
			serve(sc)
		})
		return true
	})
	if !c.shares(h) {
		return nil
	}
	defer h.Sever()        // should serving it panic, its calls must not keep it
	if l.draining.Load() { // whoever drains may have come too early to see it
		h.Drain()
	}
	return h.Run()
}

func (l *listener) http2Config() http2.Config {
	return http2.Config{
		Head: l.Limits.Head, Budget: l.bodies, HeadTimeout: l.Limits.HeadTimeout,
		WriteTimeout: l.Limits.WriteTimeout, Idle: l.Limits.IdleTimeout,
		Violated: func(r http2.Reason) { l.Metrics.RequestsRefused(l.Reporter, "http2_"+string(r)).Inc() },
	}
}

// bodies is by how much the windows of all connections and calls of HTTP/2 may
// grow: of those that come in, and of those of all ports of the workload.
const bodies = 64 << 20

// firsts is what all connections of HTTP/2, and all streams of our own proxies, may
// hold unread of their first windows, half of it those of one identity: in all, and
// beside what bodies and windows bound. Of each identity ownFirst is there whatever
// others hold.
const firsts, ownFirst = 64 << 20, 256 << 10

// serveHTTP2 serves a peer of another make.
func (in *Inbound) serveHTTP2(ctx context.Context, c *conn, nc net.Conn) {
	err := in.listener.serveHTTP2(c, nc, in.enterStream, func(sc *conn) {
		defer in.peers.leave(c.who.id)
		if in.serveAwake(ctx, sc, sc.Conn, in.idleTimeout()) {
			sc.refuse()
		}
	})
	if err != nil {
		in.Log.Debug("connection of HTTP/2 ended", "peer", c.who.src, "remote", c.who.remote, "err", err)
	}
}

// serveHTTP2 serves an application that says HTTP/2 by prior knowledge, of which
// x has read the beginning.
func (d *door) serveHTTP2(ctx context.Context, c *conn, x *call) {
	begun := &ahead{Conn: x.down.NetConn(), read: x.down.Unread()}
	x.down.Release() // each lane has buffers of its own
	x.down = nil
	err := d.listener.serveHTTP2(c, begun, d.admit, func(sc *conn) { d.serveLane(ctx, sc, x) })
	if err != nil {
		d.Log.Debug("connection of HTTP/2 ended", "remote", x.remote, "err", err)
	}
}

// serveLane serves a lane of a connection of which on has found where it leads.
func (d *door) serveLane(ctx context.Context, c *conn, on *call) {
	x := d.callOn(ctx, c, on.remote, on.process)
	x.only, x.meant = on.only, on.meant
	x.down = http1.NewConn(c.Conn, d.Limits)
	defer x.down.Release()
	if d.calls(x, d.chain) {
		c.refuse()
	}
}

// ahead is a connection of which something was read already.
type ahead struct {
	net.Conn
	read []byte
}

// CloseWrite is that of a TCP connection.
func (a *ahead) CloseWrite() error {
	if h, ok := a.Conn.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return errors.ErrUnsupported
}

// NetConn is the connection itself.
func (a *ahead) NetConn() net.Conn { return a.Conn }

// Await waits until there is something to read, if the connection can.
func (a *ahead) Await() error {
	if w, ok := a.Conn.(interface{ Await() error }); ok && len(a.read) == 0 {
		return w.Await()
	}
	return nil
}

func (a *ahead) Read(p []byte) (int, error) {
	if len(a.read) == 0 {
		return a.Conn.Read(p)
	}
	n := copy(p, a.read)
	a.read = a.read[n:]
	return n, nil
}

// ReadLate is Read into memory that is borrowed when there is something to read.
func (a *ahead) ReadLate(from socket.Lender) (int, error) {
	if late, ok := a.Conn.(interface {
		ReadLate(socket.Lender) (int, error)
	}); ok && len(a.read) == 0 {
		return late.ReadLate(from)
	}
	return a.Read(from.Lend())
}
