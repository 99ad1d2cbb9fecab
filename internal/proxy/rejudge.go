package proxy

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/svid"
	"sallyport/internal/upstream"
)

// rejudgeEvery is how often what is open is looked at again on account of
// time: the end of SVIDs, the until= and when= of rules.
const rejudgeEvery = 15 * time.Second

const (
	// recheckEvery is how often what is carried by a token or an API key is
	// held to it, and how long after a Rejudge all is looked at once more.
	recheckEvery = time.Second
	// tokenGrace is how long a call that is no upgrade may go on after the end
	// of its token: as long as an application may take to begin its answer.
	tokenGrace = time.Minute
)

// Why a connection was closed, or a call on it refused.
const (
	reasonRevoked = "svid_revoked" // the peer's SVID was revoked
	reasonExpired = "svid_expired" // a tunnel has come to the end of the peer's SVID
	reasonPolicy  = "revoked"      // the policy in force does not allow what it carries any more
)

// A look is what a connection carries, for who judges it again.
type look struct {
	who    *peer      // the peer of an inbound connection, once it is known
	up     net.Conn   // what the call in flight talks to
	tunnel bool       // it was upgraded, or leads through a gateway
	call   authz.Call // what an inbound call in flight was judged by, if carries
	// carries and carried say that it carries a call now, or has carried one,
	// that was allowed.
	carries, carried bool
	cut              bool // it is on its way out
}

func (c *conn) look() look {
	c.mu.Lock()
	defer c.mu.Unlock()
	v := look{who: c.who, up: c.up, tunnel: c.tunnel, carries: c.call != nil, carried: c.carried, cut: c.cut}
	if v.carries {
		v.call = *c.call
	}
	return v
}

// pass says that the connection is a tunnel from now on.
func (c *conn) pass() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tunnel = true
}

// every looks again now and then until ctx ends.
func every(ctx context.Context, d time.Duration, rejudge func()) {
	tick := time.NewTicker(d)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			rejudge()
		}
	}
}

// conns are the open connections, before their streams.
func (l *listener) conns() []*conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]*conn, 0, len(l.open))
	for c := range l.open {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b *conn) int { return cmp.Compare(depth(a), depth(b)) })
	return out
}

// depth is 0 for a connection and 1 for a stream on one.
func depth(c *conn) int {
	if c.on != nil {
		return 1
	}
	return 0
}

// whyNot names what Standing said.
func whyNot(err error) string {
	switch {
	case errors.Is(err, svid.ErrRevoked):
		return reasonRevoked
	case errors.Is(err, svid.ErrExpired):
		return reasonExpired
	}
	return "svid_invalid"
}

// closed records that connections were closed, once all of them are.
func (s Shared) closed(list ...audit.Record) {
	for _, r := range list {
		r.Kind, r.Decision = audit.KindTLS, audit.Deny
		if err := s.Audit.Append(&r); err != nil {
			s.Log.Error("audit record lost", "err", err)
		}
	}
}

// Rejudge looks at every open connection again and closes those whose peer's
// SVID was revoked; those that carry a call, upgraded or not, whose credential
// does not count any more or that the policy in force does not allow; those
// that carry none and whose peer may call nothing any more; and the upgraded
// ones whose peer's SVID has ended. It is called after each revocation and each
// change of policy; when it returns they are closed and recorded.
func (in *Inbound) Rejudge() {
	in.epoch.Add(1)
	// Without an identity there is nothing to look at: who proves one looks then.
	in.rejudge(func(v look) bool { return v.who != nil })
}

// recheck is Rejudge for the connections that carry a call by a token or an API
// key, whose end, and its issuer's keys, come without a word. After a Rejudge it
// looks at all of them once more: one on which a call was just ending was not
// idle.
func (in *Inbound) recheck() {
	e := in.epoch.Load()
	late := e != in.rechecked
	in.rechecked = e
	if late || in.cfg.Tokens != nil {
		in.rejudge(func(v look) bool { return v.who != nil && (late || v.carries && v.call.Token != nil) })
	}
}

func (in *Inbound) rejudge(which func(look) bool) {
	var over []audit.Record
	var doomed []*conn // that are shared
	var wg sync.WaitGroup
	reached := map[spiffeid.ID]bool{}
	for _, c := range in.conns() {
		v := c.look()
		if v.cut || !which(v) {
			continue
		}
		reason, detail := in.standing(v)
		switch {
		case reason != "" && c.isShared():
			doomed = append(doomed, c) // after its streams, which come next
		case reason != "":
			wg.Go(func() { c.part(http1.ClosePolicy, in.partTime) })
			if slices.Contains(doomed, c.on) {
				continue // one record does for all of them
			}
		case in.idleForGood(v, reached) && c.end():
			reason, detail = reasonPolicy, "the policy in force allows the peer no call any more"
		default:
			continue
		}
		over = append(over, audit.Record{Reason: reason, Dir: string(mesh.In), Src: v.who.id.String(), Dst: in.self, Peer: v.who.remote, Detail: detail})
	}
	wg.Wait()
	for _, c := range doomed {
		c.sever()
	}
	in.closed(over...)
}

// idleForGood says that a connection was of use, is idle, and will not be of
// use again. One that only ever got refusals is left: each of them is told.
// What the policy says of a peer is asked once for all of its connections.
func (in *Inbound) idleForGood(v look, reached map[spiffeid.ID]bool) bool {
	if !v.carried || v.carries {
		return false
	}
	reaches, known := reached[v.who.id]
	if !known {
		reaches = in.cfg.Judge.Reaches(mesh.In, v.who.id, in.self, in.cfg.Port())
		reached[v.who.id] = reaches
	}
	return !reaches
}

// standing says why a connection may not go on; empty when it may.
func (in *Inbound) standing(v look) (reason, detail string) {
	if err := in.cfg.Standing(*v.who.tls); err != nil && (v.tunnel || errors.Is(err, svid.ErrRevoked)) {
		return whyNot(err), err.Error()
	}
	if !v.carries {
		return "", ""
	}
	what, grace := "call in flight", in.tokenGrace
	if v.tunnel {
		what, grace = "upgraded connection", 0
	}
	if v.call.Token != nil {
		t, f := in.cfg.Tokens.Standing(v.call.Token, grace)
		if f != nil {
			return string(f.Code), "the credential of the " + what + " does not count any more: " + f.Detail
		}
		v.call.Token = t
	}
	if _, ok := in.streams(); !ok && v.call.Verb == "CONNECT" {
		return reasonPolicy, "the service speaks no tcp any more"
	}
	if !in.cfg.Judge.Allows(&v.call) {
		return reasonPolicy, "the policy in force does not allow the " + what
	}
	return "", ""
}

// stands looks whether a Rejudge has come since x was looked at last, and if so
// at what that would not have seen.
func (in *Inbound) stands(x *call) (reason, detail string) {
	e := in.epoch.Load()
	if e == x.epoch {
		return "", ""
	}
	if reason, detail = in.standing(x.conn.look()); reason == "" {
		x.epoch = e
	}
	return reason, detail
}

// Rejudge looks at every connection that the workload has open to a peer or a
// gateway and closes those whose peer's SVID was revoked, and the tunnels and
// upgraded ones whose peer's SVID has ended. It is called after each
// revocation; when it returns they are closed and recorded.
func (o *Outbound) Rejudge() {
	gone := o.cfg.Services.Recheck()
	for _, s := range []*upstream.Services{o.cfg.Streams, o.cfg.Gateways} {
		if s != nil {
			gone = append(gone, s.Recheck()...)
		}
	}
	var over []audit.Record
	for _, p := range gone {
		if errors.Is(p.Err, svid.ErrRevoked) { // of others nobody would have heard
			over = append(over, o.lost(p.ID.String(), p.Addr.String(), p.Err))
		}
	}
	o.mu.Lock()
	doors := slices.Clone(o.doors)
	o.mu.Unlock()
	for _, d := range doors {
		over = append(over, d.rejudge()...)
	}
	o.cfg.closed(over...)
}

// rejudge is Rejudge for one door.
func (d *door) rejudge() (over []audit.Record) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, c := range d.conns() {
		v := c.look()
		up, ok := v.up.(interface{ ConnectionState() tls.ConnectionState })
		if !ok {
			continue
		}
		cs := up.ConnectionState()
		if err := d.cfg.Standing(cs); err != nil && (v.tunnel || errors.Is(err, svid.ErrRevoked)) {
			wg.Go(func() { c.part(http1.ClosePolicy, d.partTime) })
			over = append(over, d.lost(idOf(cs), v.up.RemoteAddr().String(), err))
		}
	}
	return over
}

// lost is the record of a connection to a peer that was closed.
func (o *Outbound) lost(dst, addr string, err error) audit.Record {
	return audit.Record{Reason: whyNot(err), Dir: string(mesh.Out), Src: o.self, Dst: dst, Peer: addr, Detail: err.Error()}
}

func idOf(cs tls.ConnectionState) string {
	id, err := svid.PeerID(cs)
	if err != nil {
		return ""
	}
	return id.String()
}

// tie makes what the call talks to known to Rejudge, and looks whether it still
// stands: a Rejudge that came before has not seen it.
func (x *call) tie(up *upstream.Conn) bool {
	return x.bind(up) && up.Stands() == nil
}

// bind makes what the call talks to, and what it was judged by, known to
// Rejudge.
func (x *call) bind(up *upstream.Conn) bool {
	if x.grant.Valid() {
		return x.conn.bind(up.NetConn(), &x.judged)
	}
	return x.conn.bind(up.NetConn(), nil)
}

// unbind is called before another request may overwrite what bind has shown.
func (x *call) unbind() { x.conn.bind(nil, nil) }

// again judges the call once more if a Rejudge came between its judgement and
// bind: that one has not seen it.
func (x *call) again() *refusal {
	if x.standing == nil {
		return nil
	}
	return x.standing()
}

// lasting has an upgraded connection or a tunnel end mesh.Grace after the SVID by
// which its peer was let in, and be judged again meanwhile. It reports whether it
// may begin; stop is called at its end.
func (x *call) lasting(up *upstream.Conn) (stop func(), ok bool) {
	dir, until := mesh.Out, up.Until()
	if x.grant.Valid() {
		dir, until = mesh.In, x.who.until
	}
	x.conn.pass()
	if !x.tie(up) || x.again() != nil {
		return nil, false
	}
	if until.IsZero() {
		return func() {}, true
	}
	c, on := x.conn, x.on
	r := audit.Record{Reason: reasonExpired, Dir: string(dir), Src: x.src, Dst: x.dst, Port: x.port, Peer: x.remote, Trace: x.traceText(),
		Detail: "the SVID of the peer ended at " + until.UTC().Format(time.RFC3339)}
	// A clock that is set meanwhile is noticed by the next Rejudge.
	t := time.AfterFunc(time.Until(until.Add(mesh.Grace)), func() {
		c.part(http1.ClosePolicy, on.partTime)
		on.closed(r)
	})
	return func() { t.Stop() }, true
}
