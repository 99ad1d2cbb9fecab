package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
	"sallyport/internal/handover"
)

// takeOver asks the process that runs for its sockets, if there is one.
func (s *sidecar) takeOver(app []string) error {
	if len(app) > 0 {
		return daemon.Hint(daemon.Exit(daemon.Usage, errors.New("--takeover with a program after --: a program cannot be handed to another parent")),
			"leave one of them out")
	}
	tie, err := handover.Take(handover.Want{Path: filepath.Join(s.cfg.RunDir, handover.Socket), Program: "sidecar", DataDir: s.cfg.DataDir, Log: s.log})
	if errors.Is(err, handover.ErrNobody) {
		s.log.Info("there is no process to take over from, starting as usual")
		return nil
	}
	if err != nil {
		return err
	}
	s.tie, s.doors = tie, tie.Doors()
	return nil
}

// letGo ends what is left of a takeover.
func (s *sidecar) letGo() {
	s.doors.Rest()
	if s.tie != nil {
		s.tie.Close()
	}
}

// activate takes the sockets of a service manager. With capture by the sidecar's
// user it has none: the rules let answers out of sockets that this user opened,
// and the manager is another.
func (s *sidecar) activate() error {
	err := s.doors.Activate()
	if err == nil && s.doors.Passed() && s.cfg.Capture.SidecarUser != "" {
		err = daemon.Hint(errors.New("capture.sidecar_user: sockets that the service manager has opened would not be let answer"),
			"take the sidecar's .socket unit away, or name sidecar_cgroup alone")
	}
	return err
}

// follow runs the tie to the issuer: at once, or after the process before has
// ended, with all else that only one may do.
func (s *sidecar) follow(ground context.Context, g *errgroup.Group) error {
	if s.tie == nil {
		close(s.adopted)
		return s.agent.Run(ground)
	}
	if err := s.agent.Follow(ground, s.tie.Gone()); err != nil || ground.Err() != nil {
		return err
	}
	within, cancel := context.WithTimeout(ground, handover.AdoptWithin)
	defer cancel()
	if err := s.audit.Adopt(within); err != nil {
		return fmt.Errorf("the process before serves on: %w", err)
	}
	if err := s.hold(); err != nil {
		return err
	}
	s.duties(ground, g)
	close(s.adopted)
	s.log.Info("the process before has ended, its duties are taken over")
	return s.agent.Run(ground)
}

// keep lets another process take over from this one.
func (s *sidecar) keep(stop, ground context.Context, g *errgroup.Group, drain func()) error {
	s.keeper = &handover.Keeper{
		Program: "sidecar", DataDir: s.cfg.DataDir, Doors: s.doors, Writer: s.audit.Writer(), Head: s.audit.Head, Stop: drain, Log: s.log,
		May: func() error {
			select {
			case <-s.adopted:
			default:
				return errors.New("this process is taking over itself; next: try again when the one before has ended")
			}
			if s.child.Load() != nil {
				return errors.New("the application is a child of this sidecar and cannot be handed to another; next: restart both")
			}
			if stop.Err() != nil {
				return errors.New("this process is stopping")
			}
			return nil
		},
	}
	g.Go(func() error { return handover.Renew(ground, s.log, s.keeper.May) })
	if s.tie != nil {
		return nil // once this one serves
	}
	return s.answer(ground, g)
}

// answer serves the socket on which the next process asks.
func (s *sidecar) answer(ground context.Context, g *errgroup.Group) error {
	path := filepath.Join(s.cfg.RunDir, handover.Socket)
	ln, err := s.doors.Private("handover", path, s.log)
	if err != nil {
		return err
	}
	g.Go(func() error { return s.keeper.Run(ground, ln) })
	return nil
}

// serves says that the sidecar is ready once it is. From then on the process
// before takes no new connections.
func (s *sidecar) serves(begin, ground context.Context, g *errgroup.Group, self spiffeid.ID, drain func()) error {
	if !s.awaitApp(begin) {
		return nil
	}
	if s.tie != nil {
		if err := s.replaces(ground); err != nil {
			return err
		}
	}
	s.ready.Set(readyDoors, nil)
	if s.tie != nil {
		if err := errors.Join(s.administer(ground, g, drain), s.answer(ground, g)); err != nil {
			return err
		}
		s.doors.Rest()
		s.doors.Release()
	}
	s.log.Info("sidecar ready", "identity", self.String(), "policy_revision", s.agent.Snapshot().PolicyRevision)
	_ = daemon.Notify("READY=1")
	return nil
}

// replaces has the process before take no new connections. One that has gone
// by itself takes none: then its duties must be ours first.
func (s *sidecar) replaces(ground context.Context) error {
	err := s.tie.Ready()
	if !errors.Is(err, audit.ErrGone) {
		return err
	}
	select {
	case <-s.adopted:
	case <-ground.Done():
	}
	return nil
}

// stay returns when the process is to end. It reports whether another one serves
// in its place.
func (s *sidecar) stay(stop, ground context.Context, done <-chan struct{}) (replaced bool) {
	for {
		select {
		case <-stop.Done():
			if s.tie != nil {
				s.tie.Stop() // both were meant
			}
			return false
		case <-done:
			return false
		case <-ground.Done():
			return false
		case heir := <-s.keeper.Taken():
			s.log.Info("another process serves, finishing what is carried", "pid", heir.PID(), "within", s.cfg.Drain.Handover)
			_ = daemon.Notify(fmt.Sprintf("MAINPID=%d", heir.PID()))
			s.yield(true)
			if !heir.Finish(either(stop, ground), s.cfg.Drain.Handover, s.carries) {
				s.heir = heir
				return true
			}
			s.log.Warn("the process that took over has gone, serving on", "pid", heir.PID())
			s.yield(false)
			s.doors.Release()
		}
	}
}

func (s *sidecar) yield(on bool) {
	if in := s.inbound.Load(); in != nil {
		in.Yield(on)
	}
	s.outbound.Load().Yield(on)
}

func (s *sidecar) carries() int {
	n := s.outbound.Load().Carries()
	if in := s.inbound.Load(); in != nil {
		n += in.Carries()
	}
	return n
}

// leaveEvery is how often an application that ends by itself is looked at.
const leaveEvery = 50 * time.Millisecond

// awaitLeave keeps the way out open for an application that another started: it
// ends by itself, and may have something to finish. It has ended when it accepts
// no connection and has none, or when its time is over.
func (s *sidecar) awaitLeave() {
	noWay := !s.cfg.Outbound.Listen.IsValid() && len(s.cfg.Outbound.Upstreams) == 0
	if noWay || s.child.Load() != nil || s.heir != nil {
		return
	}
	within, cancel := context.WithTimeout(s.now, s.cfg.Drain.Outbound)
	defer cancel()
	for within.Err() == nil && (s.outbound.Load().Carries() > 0 || s.appAccepts(within)) {
		daemon.Pause(within, leaveEvery)
	}
}

func (s *sidecar) appAccepts(ctx context.Context) bool {
	if s.cfg.Inbound.Listen == "" {
		return false
	}
	c, err := s.dialApp(ctx)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

// awaitDuties waits for the log that the process before still writes, to leave
// nothing in it untold.
func (s *sidecar) awaitDuties(ground context.Context) {
	within, cancel := context.WithTimeout(s.now, s.cfg.Drain.Timeout)
	defer cancel()
	select {
	case <-s.adopted:
	case <-ground.Done():
	case <-within.Done():
	}
}

// close brings the audit log to its end. The next process is told before, and
// sends no record after that.
func (s *sidecar) close() error {
	if s.heir != nil {
		s.heir.Leave()
	}
	return s.audit.Close()
}
