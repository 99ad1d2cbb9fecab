package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
	"sallyport/internal/handover"
)

// takeOver asks the process that runs for its sockets, if there is one.
func (gw *gateway) takeOver() error {
	tie, err := handover.Take(handover.Want{Path: filepath.Join(gw.cfg.RunDir, handover.Socket), Program: "gateway", DataDir: gw.cfg.DataDir, Log: gw.log})
	if errors.Is(err, handover.ErrNobody) {
		gw.log.Info("there is no process to take over from, starting as usual")
		return nil
	}
	if err != nil {
		return err
	}
	gw.tie, gw.doors = tie, tie.Doors()
	return nil
}

// letGo ends what is left of a takeover.
func (gw *gateway) letGo() {
	gw.doors.Rest()
	if gw.tie != nil {
		gw.tie.Close()
	}
}

// follow runs the tie to the issuer: at once, or after the process before has
// ended, with all else that only one may do.
func (gw *gateway) follow(ground context.Context, g *errgroup.Group) error {
	if gw.tie == nil {
		close(gw.adopted)
		return gw.agent.Run(ground)
	}
	if err := gw.agent.Follow(ground, gw.tie.Gone()); err != nil || ground.Err() != nil {
		return err
	}
	within, cancel := context.WithTimeout(ground, handover.AdoptWithin)
	defer cancel()
	if err := gw.audit.Adopt(within); err != nil {
		return fmt.Errorf("the process before serves on: %w", err)
	}
	if err := gw.hold(); err != nil {
		return err
	}
	gw.duties(ground, g)
	close(gw.adopted)
	gw.log.Info("the process before has ended, its duties are taken over")
	return gw.agent.Run(ground)
}

// keep lets another process take over from this one.
func (gw *gateway) keep(stop, ground context.Context, g *errgroup.Group, drain func()) error {
	gw.keeper = &handover.Keeper{
		Program: "gateway", DataDir: gw.cfg.DataDir, Doors: gw.doors, Writer: gw.audit.Writer(), Head: gw.audit.Head, Stop: drain, Log: gw.log,
		May: func() error {
			select {
			case <-gw.adopted:
			default:
				return errors.New("this process is taking over itself; next: try again when the one before has ended")
			}
			if stop.Err() != nil {
				return errors.New("this process is stopping")
			}
			return nil
		},
	}
	g.Go(func() error { return handover.Renew(ground, gw.log, gw.keeper.May) })
	if gw.tie != nil {
		return nil // once this one serves
	}
	return gw.answer(ground, g)
}

// answer serves the socket on which the next process asks.
func (gw *gateway) answer(ground context.Context, g *errgroup.Group) error {
	path := filepath.Join(gw.cfg.RunDir, handover.Socket)
	ln, err := gw.doors.Private("handover", path, gw.log)
	if err != nil {
		return err
	}
	g.Go(func() error { return gw.keeper.Run(ground, ln) })
	return nil
}

// serves says that the gateway is ready. From then on the process before takes
// no new connections.
func (gw *gateway) serves(ground context.Context, g *errgroup.Group, self spiffeid.ID, addr string, drain func()) error {
	if gw.tie != nil {
		if err := gw.replaces(ground); err != nil {
			return err
		}
	}
	gw.ready.Set(readyListener, nil)
	if gw.tie != nil {
		if err := errors.Join(gw.administer(ground, g, drain), gw.answer(ground, g)); err != nil {
			return err
		}
		gw.doors.Rest()
		gw.doors.Release()
	}
	gw.log.Info("gateway ready", "identity", self.String(), "listen", addr)
	_ = daemon.Notify("READY=1")
	return nil
}

// replaces has the process before take no new connections. One that has gone
// by itself takes none: then its duties must be ours first.
func (gw *gateway) replaces(ground context.Context) error {
	err := gw.tie.Ready()
	if !errors.Is(err, audit.ErrGone) {
		return err
	}
	select {
	case <-gw.adopted:
	case <-ground.Done():
	}
	return nil
}

// stay returns when the process is to end. It reports whether another one serves
// in its place; served gives why accepting has ended.
func (gw *gateway) stay(stop context.Context, served <-chan error) (replaced bool, err error) {
	for {
		select {
		case <-stop.Done():
			if gw.tie != nil {
				gw.tie.Stop() // both were meant
			}
			return false, nil
		case err := <-served:
			return false, cmp.Or(err, errEnded)
		case heir := <-gw.keeper.Taken():
			gw.log.Info("another process serves, finishing what is carried", "pid", heir.PID(), "within", gw.cfg.Drain.Handover)
			_ = daemon.Notify(fmt.Sprintf("MAINPID=%d", heir.PID()))
			gw.egress.Yield(true)
			if !heir.Finish(stop, gw.cfg.Drain.Handover, gw.egress.Carries) {
				gw.heir = heir
				return true, nil
			}
			gw.log.Warn("the process that took over has gone, serving on", "pid", heir.PID())
			gw.egress.Yield(false)
			gw.doors.Release()
		}
	}
}

// errEnded is why a gateway stops whose listener has ended without an error: a
// part of it has failed, which says why.
var errEnded = errors.New("accepts no more connections")

// awaitDuties waits for the log that the process before still writes, to leave
// nothing in it untold.
func (gw *gateway) awaitDuties(ground context.Context) {
	within, cancel := context.WithTimeout(gw.now, gw.cfg.Drain.Timeout)
	defer cancel()
	select {
	case <-gw.adopted:
	case <-ground.Done():
	case <-within.Done():
	}
}

// close brings the audit log to its end. The next process is told before, and
// sends no record after that.
func (gw *gateway) close() error {
	if gw.heir != nil {
		gw.heir.Leave()
	}
	return gw.audit.Close()
}
