package proxy

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/capture"
	"sallyport/internal/hop"
	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/record"
	"sallyport/internal/telemetry"
)

// A connection that has carried no call for a while is at rest: of all that
// serves its calls nothing is left but who its peer is and the secrets of its
// records. Most of a crowd of connections are at rest, and the call alone takes
// more room than those. So is a stream, by itself.

// restAfter is how long a connection waits for its next call with all at hand.
// To make it anew takes some microseconds, nothing beside such a pause.
const restAfter = time.Second

// A peer is who has proved an identity on a connection, and what follows from
// that for all its calls. The streams of the connection have it in common.
type peer struct {
	id         spiffeid.ID
	src        string // the same, as records have it
	remote     string // its address, as records have it
	tls        *tls.ConnectionState
	until      time.Time
	thumbprint [sha256.Size]byte // of its certificate
	// verified is when the proof was last looked at, in Unix nanoseconds, epoch
	// the Rejudge that the handshake has seen.
	verified atomic.Int64
	epoch    uint64
	share    *member // what it has of the listener
	series   *telemetry.Series
	restarts bool // a trace of its own is only linked to
	intro    introduction
	bounds   []bound
}

// proved says whose the connection is.
func (c *conn) proved(p *peer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.who = p
}

// serveConn serves a connection until it ends. What begins it is done elsewhere:
// a goroutine whose stack is not deep while it waits for the next call gets a
// small one.
func (in *Inbound) serveConn(ctx context.Context, c *conn) {
	tc := in.meet(ctx, c)
	if tc == nil {
		return
	}
	defer in.part(c, tc)
	if in.serveOther(ctx, c, tc) {
		return
	}
	in.serveCalls(ctx, c, tc)
}

// An awaiter waits until there is something to read, with nothing to read it
// into.
type awaiter interface {
	net.Conn
	Await() error
}

// serveCalls serves the calls of a connection, or of a stream, until it ends.
func (in *Inbound) serveCalls(ctx context.Context, c *conn, nc awaiter) {
	for in.serveAwake(ctx, c, nc, min(in.restAfter, in.idleTimeout())) && in.restOn(c, nc) {
	}
}

// serveOther serves a connection on which something else than HTTP/1.1 is spoken.
func (in *Inbound) serveOther(ctx context.Context, c *conn, tc *record.Conn) bool {
	_, opaque := in.streams()
	switch {
	case opaque:
		x := in.callOf(ctx, c)
		x.down = http1.NewConn(tc, in.Limits)
		defer x.down.Release()
		x.series = in.Signals.SeriesOf(telemetry.ProtoTCP, x.src, x.dst, "")
		in.listener.opaque(x, in.opaque)
	case c.who.tls.NegotiatedProtocol == hop.Proto:
		in.serveHop(ctx, c, tc)
	case c.who.tls.NegotiatedProtocol == http2.Proto:
		in.serveHTTP2(ctx, c, tc)
	default:
		return false
	}
	return true
}

// serveAwake serves calls, and says whether none has come within so long.
func (in *Inbound) serveAwake(ctx context.Context, c *conn, nc net.Conn, within time.Duration) bool {
	x := in.callOf(ctx, c)
	lim := in.Limits
	lim.IdleTimeout = within
	x.down = http1.NewConn(nc, lim)
	defer x.down.Release()
	return in.calls(x, in.chain)
}

// restOn waits for the next call of a connection at rest; false when it has
// ended, or has waited for too long.
func (in *Inbound) restOn(c *conn, nc awaiter) bool {
	err := os.ErrDeadlineExceeded
	if left := in.idleTimeout() - in.restAfter; left > 0 {
		if r, ok := nc.(interface{ Rest() }); ok {
			r.Rest()
		}
		in.resting.Add(1)
		if err = nc.SetReadDeadline(time.Now().Add(left)); err == nil {
			err = nc.Await()
		}
		in.resting.Add(-1)
	}
	if err != nil {
		c.refuse()
		in.leftOff(c, err)
	}
	return err == nil
}

func (in *Inbound) idleTimeout() time.Duration {
	return cmp.Or(in.Limits.IdleTimeout, http1.IdleTimeout)
}

// meet makes the handshake. It gives nothing when the connection cannot be
// served.
func (in *Inbound) meet(ctx context.Context, c *conn) *record.Conn {
	remote, err := in.announced(c)
	if err != nil {
		in.unproved.leave(c)
		in.refusedHandshake(c, remote, err)
		return nil
	}
	if !in.turn(ctx, c) {
		in.unproved.leave(c)
		return nil
	}
	tc, err := in.handshake(ctx, c, remote)
	if err != nil {
		in.inVain(c)
		in.refusedHandshake(c, remote, err)
		return nil
	}
	who := c.who
	if in.calmOf.Over(who.id) { // only the handshake is its source's doing
		in.inVain(c)
		in.turnAway(limitResets, "peer", who.src)
		tc.Close()
		return nil
	}
	if who.share = in.peers.enter(who.id); who.share == nil {
		in.turnAway(limitPeer, "limit", in.peers.max, "peer", who.src)
		tc.Close()
		return nil
	}
	who.restarts = anyOf(in.cfg.RestartTrace, who.src)
	who.series = in.Signals.Series(who.src, in.self, "")
	who.intro, who.bounds = introduce(in.self, who.src, remote, anyOf(in.cfg.ForwardedFrom, who.src)), in.rates.bounds(who.id)
	return tc
}

// turnWithin is the longest that a connection waits for its handshake, see turn.
const turnWithin = time.Second

// turn has a connection wait for its handshake while those of its source come to
// nothing: they are then spread over time, so that the calls of others seldom meet one.
// It is false when the connection was reset meanwhile.
func (in *Inbound) turn(ctx context.Context, c *conn) bool {
	wait := in.vain.Wait(c.from, costHandshake, turnWithin)
	if wait == 0 || c.outlasts(ctx, wait) {
		return true
	}
	in.inVain(c)
	return false
}

// inVain takes note of a handshake that a source has asked for, and nobody gained by.
func (in *Inbound) inVain(c *conn) {
	in.calm.Spend(c.from, costHandshake)
	in.vain.Spend(c.from, costHandshake)
}

// part is the end of what meet has begun.
func (in *Inbound) part(c *conn, tc *record.Conn) {
	in.peers.leave(c.who.id)
	tc.Close()
}

// callOf makes the call of a connection or a stream whose peer has proved who it
// is.
func (in *Inbound) callOf(ctx context.Context, c *conn) *call {
	who := c.who
	x := &call{
		ctx: ctx, on: &in.listener, conn: c, lend: in.lend, who: who, src: who.src, dst: in.self, remote: who.remote,
		series: who.series, unread: who.series, intro: who.intro, bounds: who.bounds, epoch: who.epoch,
	}
	x.standing = func() *refusal { return in.overtaken(x) }
	return x
}

func (in *Inbound) handshake(ctx context.Context, c *conn, remote string) (_ *record.Conn, err error) {
	defer in.unproved.leave(c)
	ctx, cancel := context.WithTimeout(ctx, in.cfg.HandshakeTimeout)
	defer cancel()
	who := &peer{remote: remote, epoch: in.epoch.Load()}
	tc, err := record.Server(ctx, capture.NewDirect(c.Conn), in.cfg.TLS, in.turns)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			tc.Close()
		}
	}()
	who.tls = tc.State()
	who.verified.Store(time.Now().UnixNano())
	if who.id, err = in.cfg.PeerID(*who.tls); err != nil {
		return nil, err
	}
	who.src = who.id.String()
	who.thumbprint = sha256.Sum256(who.tls.PeerCertificates[0].Raw)
	for _, c := range who.tls.PeerCertificates {
		if who.until.IsZero() || c.NotAfter.Before(who.until) {
			who.until = c.NotAfter
		}
	}
	c.proved(who)
	if in.epoch.Load() == who.epoch {
		return tc, nil
	}
	if reason, detail := in.standing(c.look()); reason != "" {
		return nil, fmt.Errorf("%s: %s", reason, detail)
	}
	return tc, nil
}

// refusedHandshake records a peer that could not prove an identity. A peer
// that only closed the connection has proved nothing and tried nothing.
func (in *Inbound) refusedHandshake(c *conn, remote string, err error) {
	if isClosed(err) {
		return
	}
	r := audit.Record{Kind: audit.KindTLS, Decision: audit.Deny, Reason: "handshake", Dst: in.self, Peer: remote, Detail: err.Error()}
	if in.cfg.Original != nil {
		if to, ok, err := in.cfg.Original(c.Conn); err == nil && ok {
			r.Detail += "; the connection was going to " + to.String()
		}
	}
	if err := in.Audit.Append(&r); err != nil {
		in.Log.Error("audit record lost", "err", err)
	}
	in.Metrics.TLSFailures(in.Reporter, "handshake").Inc()
	in.Edges.Add("", in.self, telemetry.ProtoHTTP, telemetry.Denied, false, time.Now(), telemetry.NoTime)
}

// isClosed says that the peer went away before it said anything.
func isClosed(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed)
}
