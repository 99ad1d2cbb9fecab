package main

import (
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport/internal/daemon"
)

// takeOver asks the process that runs for its sockets, if there is one.
func (s *sidecar) takeOver(app []string) error {
	if len(app) > 0 {
		return daemon.Hint(daemon.Exit(daemon.Usage, errors.New("--takeover with a program after --: a program cannot be handed to another parent")),
			"leave one of them out")
	}
	return s.shift.TakeOver()
}

// activate takes the sockets of a service manager. With capture by the sidecar's
// user it has none: the rules let answers out of sockets that this user opened,
// and the manager is another.
func (s *sidecar) activate() error {
	err := s.shift.Doors.Activate()
	if err == nil && s.shift.Doors.Passed() && s.cfg.Capture.SidecarUser != "" {
		err = daemon.Hint(errors.New("capture.sidecar_user: sockets that the service manager has opened would not be let answer"),
			"take the sidecar's .socket unit away, or name sidecar_cgroup alone")
	}
	return err
}

// follow runs the tie to the issuer, and all else that only one process may do.
func (s *sidecar) follow(ground context.Context, g *errgroup.Group) error {
	return s.shift.Follow(ground, s.agent, s.audit, func() error {
		if err := s.hold(); err != nil {
			return err
		}
		s.duties(ground, g)
		return nil
	})
}

// keep lets another process take over from this one.
func (s *sidecar) keep(stop, ground context.Context, g *errgroup.Group, drain func()) error {
	s.shift.Keep(stop, s.audit, drain, func() error {
		if s.child.Load() != nil {
			return errors.New("the application is a child of this sidecar and cannot be handed to another; next: restart both")
		}
		return nil
	})
	g.Go(func() error { return s.shift.Renew(ground) })
	if s.shift.Tie != nil {
		return nil // once this one serves
	}
	return s.answer(ground, g)
}

// answer serves the socket on which the next process asks.
func (s *sidecar) answer(ground context.Context, g *errgroup.Group) error {
	run, err := s.shift.Answer()
	if err != nil {
		return err
	}
	g.Go(func() error { return run(ground) })
	return nil
}

// serves says that the sidecar is ready once it is. From then on the process
// before takes no new connections.
func (s *sidecar) serves(begin, ground context.Context, g *errgroup.Group, self spiffeid.ID, drain func()) error {
	if !s.awaitApp(begin) {
		return nil
	}
	if s.shift.Tie != nil {
		if err := s.shift.Replace(ground); err != nil {
			return err
		}
	}
	s.ready.Set(readyDoors, nil)
	if s.shift.Tie != nil {
		if err := errors.Join(s.administer(ground, g, drain), s.answer(ground, g)); err != nil {
			return err
		}
		s.shift.Serves()
	}
	s.log.Info("sidecar ready", "identity", self.String(), "policy_revision", s.agent.Snapshot().PolicyRevision)
	_ = daemon.Notify("READY=1")
	return nil
}

// stay returns when the process is to end. It reports whether another one serves
// in its place.
func (s *sidecar) stay(stop, ground context.Context, done <-chan struct{}) (replaced bool) {
	for {
		select {
		case <-stop.Done():
			if s.shift.Tie != nil {
				s.shift.Tie.Stop() // both were meant
			}
			return false
		case <-done:
			return false
		case <-ground.Done():
			return false
		case heir := <-s.shift.Taken():
			if s.shift.Yield(either(stop, ground), heir, s.cfg.Drain.Handover, s.yield, s.carries) {
				return true
			}
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
	if noWay || s.child.Load() != nil || s.shift.Replaced() {
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

// close brings the audit log to its end, once the next process knows.
func (s *sidecar) close() error {
	s.shift.Leave()
	return s.audit.Close()
}
