package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/internal/audit"
)

// readyWithin is how long a process that takes over may take to serve.
const readyWithin = 2 * time.Minute

// A Keeper is the side of the process that runs: it gives its sockets to another
// one that asks, and writes its records until that one has them.
type Keeper struct {
	// Program and DataDir must be the same for both. Required.
	Program, DataDir string
	// Doors are what is handed over. Required.
	Doors *Doors
	// Writer writes the audit log, and Head says how many records it has.
	// Required.
	Writer audit.Writer
	Head   func() uint64
	// May says why the process cannot be taken over from at present. Required.
	May func() error
	// Stop has the process stop: the new one was asked to. Required.
	Stop func()
	// Log is for operators. Required.
	Log *slog.Logger

	once  sync.Once
	taken chan *Session

	mu   sync.Mutex // guards busy
	busy bool
}

// Taken gives the session of a process that serves in our place. From then on
// the doors are held. Whoever receives it calls Leave before the process ends,
// or releases the doors once Gone is closed.
func (k *Keeper) Taken() <-chan *Session {
	k.once.Do(func() { k.taken = make(chan *Session) })
	return k.taken
}

// Run answers on ln until ctx ends, and closes it. Sessions go on until their
// connection ends.
func (k *Keeper) Run(ctx context.Context, ln net.Listener) error {
	k.Taken()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	for {
		c, err := ln.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				c.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("serve %s: %w", Socket, err)
		case err != nil:
			k.Log.Error("accept failed", "socket", Socket, "err", err)
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
			continue
		}
		uc, ok := c.(*net.UnixConn)
		if !ok {
			c.Close()
			continue
		}
		go k.serve(ctx, uc)
	}
}

func (k *Keeper) serve(ctx context.Context, c *net.UnixConn) {
	defer c.Close()
	s := &Session{c: c, gone: make(chan struct{}), parted: make(chan struct{})}
	defer close(s.gone)
	var err error
	if s.pid, err = ownUser(c); err != nil {
		k.Log.Warn("a process that would take over was refused", "err", err)
		return
	}
	if err := k.greet(c); err != nil {
		k.Log.Error("a process that would take over was refused", "pid", s.pid, "err", err)
		_ = write(c, message{Op: opDoors, Err: err.Error()}) // it may be gone
		return
	}
	defer k.free()
	k.Log.Info("another process takes over", "pid", s.pid)
	_ = c.SetDeadline(time.Now().Add(readyWithin))
	err = k.answer(ctx, s)
	select {
	case <-s.parted:
	default:
		k.Log.Warn("the process that was to take over has gone", "pid", s.pid, "err", err)
	}
}

// greet hears who asks, and gives it the sockets.
func (k *Keeper) greet(c *net.UnixConn) error {
	_ = c.SetDeadline(time.Now().Add(helloWithin))
	m, err := read(c)
	switch {
	case err != nil:
		return fmt.Errorf("read its first message: %w", err)
	case m.Op != opHello || m.Version != version:
		return fmt.Errorf("it speaks version %d of the handover, this is version %d; next: stop this process and start the other", m.Version, version)
	case m.Program != k.Program:
		return fmt.Errorf("it is a %.20q, this is a %s", m.Program, k.Program)
	case m.DataDir != k.DataDir:
		return fmt.Errorf("its data_dir is %q, that of this process is %q", m.DataDir, k.DataDir)
	}
	if err := k.May(); err != nil {
		return err
	}
	if !k.take() {
		return errors.New("another process is taking over already; next: try again when the one before has ended")
	}
	if err := k.give(c); err != nil {
		k.free()
		return err
	}
	return nil
}

func (k *Keeper) give(c *net.UnixConn) error {
	names, fds, err := k.Doors.send()
	if err != nil {
		return err
	}
	defer closeAll(fds)
	b, err := message{Op: opDoors, Doors: names, Seq: k.Head()}.encode()
	if err != nil {
		return err
	}
	n, _, err := c.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
	if err == nil && n < len(b) {
		_, err = c.Write(b[n:])
	}
	return err
}

func (k *Keeper) take() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	was := k.busy
	k.busy = true
	return !was
}

func (k *Keeper) free() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.busy = false
}

// answer serves a process until it says no more.
func (k *Keeper) answer(ctx context.Context, s *Session) error {
	for {
		m, err := read(s.c)
		if err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		a := message{Op: opAnswer}
		switch m.Op {
		case opAppend:
			if m.Record == nil {
				return errors.New("a record is missing")
			}
			m.Record.Tally = audit.Tally{}
			err := k.Writer.Append(m.Record)
			a.Record, a.Err = m.Record, text(err)
		case opSync:
			n, err := k.Writer.Sync(ctx)
			a.Seq, a.Err = n, text(err)
		case opReady:
			_ = s.c.SetDeadline(time.Time{})
			err := k.replaced(ctx, s)
			a.Err = text(err)
		case opStop:
			k.Stop()
		case opParted:
			close(s.parted)
			return nil
		default:
			return fmt.Errorf("it asks for %.20q", m.Op)
		}
		if err := s.write(a); err != nil {
			return err
		}
	}
}

// replaced holds the doors and passes the session on. A process that began to
// stop meanwhile takes it no more: its doors are its own again.
func (k *Keeper) replaced(ctx context.Context, s *Session) error {
	if err := k.May(); err != nil {
		return err
	}
	k.Doors.hold()
	t := time.NewTimer(partWithin)
	defer t.Stop()
	select {
	case k.taken <- s:
		return nil
	case <-ctx.Done():
	case <-t.C:
	}
	k.Doors.Release()
	return errors.New("this process is stopping; next: start the other one again when it has ended")
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// A Session is the other process, as the one that ends sees it.
type Session struct {
	c   *net.UnixConn
	pid int

	gone   chan struct{} // closed when the connection has ended
	parted chan struct{} // closed when it will send nothing more

	mu sync.Mutex // guards writing
}

func (s *Session) write(m message) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.c.SetWriteDeadline(time.Now().Add(partWithin))
	return write(s.c, m)
}

// PID is the number of the other process.
func (s *Session) PID() int { return s.pid }

// Gone is closed when the other process has gone.
func (s *Session) Gone() <-chan struct{} { return s.gone }

// Leave tells the other process that this one is about to end, and returns once
// it has sent its last record.
func (s *Session) Leave() {
	if s.write(message{Op: opPart}) != nil {
		return
	}
	t := time.NewTimer(partWithin)
	defer t.Stop()
	select {
	case <-s.parted:
	case <-s.gone:
	case <-t.C:
		s.c.Close() // no record of it may come any more
	}
}

// finishEvery is how often an old process looks at what it still carries.
const finishEvery = 20 * time.Millisecond

// Finish waits until nothing is carried any more, at most for within, or until
// ctx ends. It reports that the other process has gone instead: then this one has
// to serve on.
func (s *Session) Finish(ctx context.Context, within time.Duration, carries func() int) (serve bool) {
	over := time.NewTimer(within)
	defer over.Stop()
	tick := time.NewTicker(finishEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.gone:
			return true
		case <-ctx.Done():
			return false
		case <-over.C:
			return false
		case <-tick.C:
			if carries() == 0 {
				return false
			}
		}
	}
}
