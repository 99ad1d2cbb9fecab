package egress

import (
	"context"
	"errors"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/mesh"
	"sallyport/internal/svid"
)

// Rejudge judges every live tunnel by the policy now in force and ends those
// that it does not allow, or would not lead to where they lead; and it ends
// those whose caller's SVID was revoked or has ended, with the connections of
// callers whose SVID was revoked. It is called after each change of policy and
// each revocation. When it returns, what had to end is closed.
func (g *Gateway) Rejudge() {
	over := g.revoked()
	for _, t := range g.tunnels.all() {
		_ = g.rejudge(t) // the reason is in its close record
	}
	for _, w := range over { // after its tunnels, which have a reason of their own
		w.Close()
	}
	g.recordRevoked(over)
}

// errIdentity is the refusal of a tunnel whose caller's proof holds no more.
func errIdentity(reason Reason) *Refusal {
	switch reason {
	case ReasonSVIDRevoked:
		return refuse(reason, "the caller's SVID is revoked")
	case ReasonIdentity:
		return refuse(reason, "the caller's SVID has no authority any more")
	}
	return refuse(reason, "the caller's SVID has ended; connect again with a new one")
}

// standing says why a caller's proof holds no more; empty when it does.
func (g *Gateway) standing(who *caller) Reason {
	if who.disproved.Load() {
		return ReasonIdentity
	}
	switch err := g.cfg.Standing(who.state); {
	case err == nil:
		return ""
	case errors.Is(err, svid.ErrRevoked):
		return ReasonSVIDRevoked
	default:
		return ReasonSVIDEnded
	}
}

// rejudge says why t may not go on, and then has ended it.
func (g *Gateway) rejudge(t *tunnel) error {
	if reason := g.standing(t.who); reason != "" {
		t.stop(reason)
		return errIdentity(reason)
	}
	t.mu.Lock()
	call, to := t.call, t.to
	call.SNI = t.sni
	t.mu.Unlock()
	s := g.cfg.Snapshot()
	switch {
	case s == nil:
	case t.asked != 0:
		if g.takesRequests(s, t, &call) {
			return nil
		}
	case g.cfg.Judge.Allows(&call) && g.leadsThere(s, t, call.SNI, to):
		return nil
	}
	t.stop(ReasonRevoked)
	return refuse(ReasonRevoked, "the policy changed while the tunnel was opened")
}

// takesRequests says whether a tunnel for requests may stay. What is asked in it
// is judged by itself.
func (g *Gateway) takesRequests(s *mesh.Snapshot, t *tunnel, call *authz.Call) bool {
	how, err := routeOf(s, t.host)
	return err == nil && how.Proto == t.how.Proto && how.TLS == t.how.TLS && (how.TLS != mesh.Inspect || keepsProtocols(&how, &t.how)) &&
		(g.cfg.Judge.Reaches(mesh.Out, call.Src, call.Dst, call.Port) || g.cfg.Judge.Allows(call))
}

// verify looks again, now and then, at what who has proved in its handshake.
// Success alone is remembered for that long.
func (g *Gateway) verify(who *caller) error {
	now := time.Now().UnixNano()
	if who.disproved.Load() {
		return errIdentity(ReasonIdentity)
	}
	if g.cfg.TLS.VerifyConnection == nil || now-who.verified.Load() < int64(g.lim.Verify) {
		return nil
	}
	if err := g.cfg.TLS.VerifyConnection(who.state); err != nil {
		return refuse(ReasonIdentity, "the caller's SVID is not verified any more: %v", err)
	}
	who.verified.Store(now)
	return nil
}

// disprove ends the tunnels of a connection whose proof holds no more, and the
// connection once it has told its streams.
func (g *Gateway) disprove(who *caller) {
	if !time.Now().Before(who.until) || who.disproved.Swap(true) {
		return // what is just over has its grace
	}
	for _, t := range g.tunnels.all() {
		if t.who == who && t.asked == 0 { // one for requests ends with an answer, or the next Rejudge
			_ = g.rejudge(t)
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for w := range g.conns {
		if w.who == who && w.shared != nil {
			w.shared.Drain()
		}
	}
}

// proved says whose a connection is, and whether it may go on: a Rejudge that
// came before did not know.
func (g *Gateway) proved(w *wire, who *caller) bool {
	g.mu.Lock()
	w.who = who
	g.mu.Unlock()
	return g.standing(who) != ReasonSVIDRevoked
}

// revoked are the connections of callers whose SVID was revoked, each once.
func (g *Gateway) revoked() (over []*wire) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for w := range g.conns {
		if w.who != nil && !w.over && g.standing(w.who) == ReasonSVIDRevoked {
			w.over = true
			over = append(over, w)
		}
	}
	return over
}

func (g *Gateway) recordRevoked(over []*wire) {
	for _, w := range over {
		rec := &audit.Record{
			Kind: audit.KindTLS, Decision: audit.Deny, Reason: string(ReasonSVIDRevoked), Dir: string(mesh.Out),
			Src: w.who.id.String(), Peer: w.who.peer, Detail: "the connection was closed",
		}
		if err := g.cfg.Audit.Append(rec); err != nil {
			g.cfg.Log.Error("end of a connection was not recorded", "err", err)
		}
	}
}

func (g *Gateway) rejudgeEvery(ctx context.Context) {
	tick := time.NewTicker(g.lim.Rejudge)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			g.refusedMore(g.flood.rest())
			g.origins.sweep(false)
			g.outside.Sweep()
			g.Rejudge()
		}
	}
}
