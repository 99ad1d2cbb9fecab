package main

import (
	"cmp"
	"context"
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport/internal/daemon"
)

// follow runs the tie to the issuer, and all else that only one process may do.
func (gw *gateway) follow(ground context.Context, g *errgroup.Group) error {
	return gw.shift.Follow(ground, gw.agent, gw.audit, func() error {
		if err := gw.hold(); err != nil {
			return err
		}
		gw.duties(ground, g)
		return nil
	})
}

// keep lets another process take over from this one.
func (gw *gateway) keep(stop, ground context.Context, g *errgroup.Group, drain func()) error {
	gw.shift.Keep(stop, gw.audit, drain, func() error { return nil })
	g.Go(func() error { return gw.shift.Renew(ground) })
	if gw.shift.Tie != nil {
		return nil // once this one serves
	}
	return gw.answer(ground, g)
}

// answer serves the socket on which the next process asks.
func (gw *gateway) answer(ground context.Context, g *errgroup.Group) error {
	run, err := gw.shift.Answer()
	if err != nil {
		return err
	}
	g.Go(func() error { return run(ground) })
	return nil
}

// serves says that the gateway is ready. From then on the process before takes
// no new connections.
func (gw *gateway) serves(ground context.Context, g *errgroup.Group, self spiffeid.ID, addr string, drain func()) error {
	if gw.shift.Tie != nil {
		if err := gw.shift.Replace(ground); err != nil {
			return err
		}
	}
	gw.ready.Set(readyListener, nil)
	if gw.shift.Tie != nil {
		if err := errors.Join(gw.administer(ground, g, drain), gw.answer(ground, g)); err != nil {
			return err
		}
		gw.shift.Serves()
	}
	gw.log.Info("gateway ready", "identity", self.String(), "listen", addr)
	_ = daemon.Notify("READY=1")
	return nil
}

// stay returns when the process is to end. It reports whether another one serves
// in its place; served gives why accepting has ended.
func (gw *gateway) stay(stop context.Context, served <-chan error) (replaced bool, err error) {
	for {
		select {
		case <-stop.Done():
			if gw.shift.Tie != nil {
				gw.shift.Tie.Stop() // both were meant
			}
			return false, nil
		case err := <-served:
			return false, cmp.Or(err, errEnded)
		case heir := <-gw.shift.Taken():
			if gw.shift.Yield(stop, heir, gw.cfg.Drain.Handover, gw.egress.Yield, gw.egress.Carries) {
				return true, nil
			}
		}
	}
}

// errEnded is why a gateway stops whose listener has ended without an error: a
// part of it has failed, which says why.
var errEnded = errors.New("accepts no more connections")

// close brings the audit log to its end, once the next process knows.
func (gw *gateway) close() error {
	gw.shift.Leave()
	return gw.audit.Close()
}
