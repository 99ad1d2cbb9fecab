package handover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
)

// A Shift is the time for which one process of a program serves: from the one
// before, if it takes over from one, to the one after.
type Shift struct {
	program, socket, dataDir string
	log                      *slog.Logger

	// Doors are the listening sockets.
	Doors *Doors
	// Tie is to the process that this one takes over from, nil when there is none.
	Tie *Tie

	adopted chan struct{}
	keeper  *Keeper
	heir    *Session // who has taken over
}

// NewShift begins one with doors of its own.
func NewShift(program, runDir, dataDir string, log *slog.Logger) *Shift {
	return &Shift{
		program: program, socket: filepath.Join(runDir, Socket), dataDir: dataDir, log: log,
		Doors: new(Doors), adopted: make(chan struct{}),
	}
}

// TakeOver asks the process that runs for its sockets, if there is one. Whoever
// calls it calls LetGo in the end.
func (s *Shift) TakeOver() error {
	tie, err := Take(Want{Path: s.socket, Program: s.program, DataDir: s.dataDir, Log: s.log})
	if errors.Is(err, ErrNobody) {
		s.log.Info("there is no process to take over from, starting as usual")
		return nil
	}
	if err != nil {
		return err
	}
	s.Tie, s.Doors = tie, tie.Doors()
	return nil
}

// LetGo ends what is left of a takeover.
func (s *Shift) LetGo() {
	s.Doors.Rest()
	if s.Tie != nil {
		s.Tie.Close()
	}
}

// Adopted is closed once all is ours that only one process may have.
func (s *Shift) Adopted() <-chan struct{} { return s.adopted }

// An Agent is a process's tie to the issuer.
type Agent interface {
	// Follow acts on what the process before hears, until that has gone or ctx
	// ends.
	Follow(ctx context.Context, gone <-chan struct{}) error
	// Run hears itself, until ctx ends.
	Run(ctx context.Context) error
}

// Follow runs the tie to the issuer: at once, or after the process before has
// ended, with the audit log and all else that only one may have, which hold opens
// and starts.
func (s *Shift) Follow(ctx context.Context, a Agent, log *audit.Ledger, hold func() error) error {
	if s.Tie == nil {
		close(s.adopted)
		return a.Run(ctx)
	}
	if err := a.Follow(ctx, s.Tie.Gone()); err != nil || ctx.Err() != nil {
		return err
	}
	within, cancel := context.WithTimeout(ctx, AdoptWithin)
	defer cancel()
	if err := log.Adopt(within); err != nil {
		return fmt.Errorf("the process before serves on: %w", err)
	}
	if err := hold(); err != nil {
		return err
	}
	close(s.adopted)
	s.log.Info("the process before has ended, its duties are taken over")
	return a.Run(ctx)
}

// Keep lets another process take over from this one, until it stops or may says
// why not. It is called before all that follows.
func (s *Shift) Keep(stop context.Context, log *audit.Ledger, drain func(), may func() error) {
	s.keeper = &Keeper{
		Program: s.program, DataDir: s.dataDir, Doors: s.Doors, Writer: log.Writer(), Head: log.Head, Stop: drain, Log: s.log,
		May: func() error {
			select {
			case <-s.adopted:
			default:
				return errors.New("this process is taking over itself; next: try again when the one before has ended")
			}
			if err := may(); err != nil {
				return err
			}
			if stop.Err() != nil {
				return errors.New("this process is stopping")
			}
			return nil
		},
	}
}

// Renew is the function of that name, by what Keep was told.
func (s *Shift) Renew(ctx context.Context) error { return Renew(ctx, s.log, s.keeper.May) }

// Answer opens the socket on which the next process asks, and returns what serves
// it.
func (s *Shift) Answer() (func(context.Context) error, error) {
	ln, err := s.Doors.Private("handover", s.socket, s.log)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error { return s.keeper.Run(ctx, ln) }, nil
}

// Replace has the process before take no new connections. One that has gone by
// itself takes none: then its duties must be ours first.
func (s *Shift) Replace(ctx context.Context) error {
	err := s.Tie.Ready()
	if !errors.Is(err, audit.ErrGone) {
		return err
	}
	select {
	case <-s.adopted:
	case <-ctx.Done():
	}
	return nil
}

// Serves says that this process serves and the one before takes no new
// connections any more.
func (s *Shift) Serves() {
	s.Doors.Rest()
	s.Doors.Release()
}

// Taken gives the session of a process that serves in our place: see Yield.
func (s *Shift) Taken() <-chan *Session { return s.keeper.Taken() }

// Yield finishes what is carried once another process serves, within a time or
// until ctx ends. If that process goes instead, this one serves on. It reports
// whether this one was replaced.
func (s *Shift) Yield(ctx context.Context, heir *Session, within time.Duration, yield func(on bool), carries func() int) (replaced bool) {
	s.log.Info("another process serves, finishing what is carried", "pid", heir.PID(), "within", within)
	_ = daemon.Notify(fmt.Sprintf("MAINPID=%d", heir.PID()))
	yield(true)
	if !heir.Finish(ctx, within, carries) {
		s.heir = heir
		return true
	}
	s.log.Warn("the process that took over has gone, serving on", "pid", heir.PID())
	yield(false)
	s.Doors.Release()
	return false
}

// Replaced says that another process serves in our place.
func (s *Shift) Replaced() bool { return s.heir != nil }

// AwaitDuties waits for the log that the process before still writes, to leave
// nothing in it untold.
func (s *Shift) AwaitDuties(ctx, now context.Context, within time.Duration) {
	now, cancel := context.WithTimeout(now, within)
	defer cancel()
	select {
	case <-s.adopted:
	case <-ctx.Done():
	case <-now.Done():
	}
}

// Leave tells the next process, if there is one, that this one is about to close
// the audit log. It sends no record after that.
func (s *Shift) Leave() {
	if s.heir != nil {
		s.heir.Leave()
	}
}
