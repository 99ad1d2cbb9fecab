package attest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"sallyport/internal/capture"
)

const (
	// maxSeen bounds the memory of processes seen in the tree.
	maxSeen = 4096
	// pipeWait is how long Wait lets output of a program that has ended drain,
	// when something it left behind holds the pipe open.
	pipeWait = 2 * time.Second
)

// A Spec says what to start.
type Spec struct {
	// Path is the program; without a slash it is looked up in PATH. Required.
	Path string
	// Args are the arguments after the program's name.
	Args []string
	// Env is the whole environment. Nil means that of this process.
	Env []string
	// Dir is the working directory. Empty means that of this process.
	Dir string
	// Stdin, Stdout and Stderr as in os/exec: nil means the null device.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// SameGroup leaves the program in our process group, so that it may read
	// from our terminal. The terminal's signals then reach it directly and
	// must not be passed on, and what it leaves behind is not killed.
	SameGroup bool
	// Through changes the command before it is started: what it starts becomes
	// the program in the end, by execve. Optional.
	Through func(*exec.Cmd)
}

// A Child is a program that this process started and holds by its pidfd from
// before the program's first instruction. It is the strongest evidence that
// needs no privilege.
//
// A process is in its tree when its chain of parents reaches the Child. One
// whose parent exits becomes a child of this process, because StartChild makes
// it the subreaper of what descends from it; it stays in the tree only when it
// was seen there before. When the Child ends the tree is empty.
type Child struct {
	pid    int
	start  uint64
	sum    [32]byte
	pidfd  *capture.Pidfd
	ended  chan struct{}
	status int // valid once ended is closed

	mu   sync.Mutex     // guards seen
	seen map[int]uint64 // pid and start time
}

// StartChild starts the program. It is killed when this process dies. The file
// must not change between being hashed and being started.
func StartChild(s Spec) (*Child, error) {
	if s.Path == "" {
		return nil, errors.New("start program: no program given")
	}
	path, err := exec.LookPath(s.Path)
	if err != nil {
		return nil, fmt.Errorf("start program: %w", err)
	}
	if err := capture.AdoptOrphans(); err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	sum, err := capture.HashFile(path)
	if err != nil {
		return nil, fmt.Errorf("start %s: hash it: %w", path, err)
	}
	c := &Child{sum: sum, ended: make(chan struct{}), seen: map[int]uint64{}}
	started := make(chan error)
	go c.run(path, s, started)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	return c, nil
}

// run starts the program and waits for it on one thread: the kernel kills the
// program when the thread that started it ends, and Go ends threads at will.
func (c *Child) run(path string, s Spec, started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd := -1
	cmd := exec.Command(path, s.Args...)
	cmd.Args[0] = s.Path
	cmd.Env, cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = s.Env, s.Dir, s.Stdin, s.Stdout, s.Stderr
	cmd.WaitDelay = pipeWait
	cmd.SysProcAttr = capture.HeldChild(&fd, !s.SameGroup)
	if s.Through != nil {
		s.Through(cmd)
	}
	if err := cmd.Start(); err != nil {
		started <- err
		return
	}
	c.pid = cmd.Process.Pid
	err := c.hold(fd, path)
	if err != nil {
		_ = cmd.Process.Kill() // the error says why; Wait collects it
		_ = cmd.Wait()
		if c.pidfd != nil {
			c.pidfd.Close()
		}
		started <- err
		return
	}
	started <- nil
	<-c.pidfd.Done()
	if !s.SameGroup {
		capture.KillGroup(c.pid) // before Wait, while the pid is still its own
	}
	c.status = exitStatus(cmd.Wait(), cmd.ProcessState)
	close(c.ended)
}

// hold notes what identifies the child, and that the file is still the one
// that was hashed.
func (c *Child) hold(fd int, path string) error {
	var err error
	if c.pidfd, err = capture.AdoptPidfd(fd, c.pid); err != nil {
		return err
	}
	again, err := capture.HashFile(path)
	if err != nil {
		return fmt.Errorf("hash it: %w", err)
	}
	if again != c.sum {
		return errors.New("the program file was replaced while it was started: try again")
	}
	// It may be at its next execve already, so no more is read of it than what
	// that leaves as it is.
	c.start, err = capture.Started(c.pid)
	if errors.Is(err, capture.ErrNoProcess) { // ended at once: an empty tree, and a status to report
		return nil
	}
	return err
}

func exitStatus(err error, ps *os.ProcessState) int {
	if ps == nil {
		return 1
	}
	if ws, ok := ps.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	if code := ps.ExitCode(); code > 0 || err == nil || errors.Is(err, exec.ErrWaitDelay) {
		return code
	}
	return 1 // it ended well but its output could not be copied
}

// PID is the process id of the program.
func (c *Child) PID() int { return c.pid }

// Hash is the SHA-256 of the program file as it was started. For a script that
// is the script, not its interpreter.
func (c *Child) Hash() [32]byte { return c.sum }

// Done is closed when the program has ended and its status is known.
func (c *Child) Done() <-chan struct{} { return c.ended }

// Wait blocks until the program has ended and gives its exit status, or 128
// and the number of the signal that ended it, as a shell does.
func (c *Child) Wait() int {
	<-c.ended
	return c.status
}

// Signal passes sig on to the program.
func (c *Child) Signal(sig syscall.Signal) error { return c.pidfd.Signal(sig) }

// Contains reports whether pid is the program or descends from it.
func (c *Child) Contains(pid int) bool {
	if pid <= 0 || pid == os.Getpid() || !c.pidfd.Alive() {
		return false
	}
	start, err := capture.Started(pid)
	if err != nil {
		return false
	}
	if pid == c.pid {
		return start == c.start
	}
	up, err := capture.Ancestors(pid)
	if err != nil {
		return false
	}
	if !c.reaches(up) && !c.sawBefore(pid, start) {
		return false
	}
	if again, err := capture.Started(pid); err != nil || again != start || !c.pidfd.Alive() {
		return false
	}
	c.remember(pid, start)
	return true
}

// reaches reports whether the chain of parents meets the child, or a process
// known to be in the tree, before it meets this process.
func (c *Child) reaches(up []int) bool {
	for _, a := range up {
		if a == c.pid {
			return true
		}
		if a == os.Getpid() {
			return false
		}
		if start, err := capture.Started(a); err == nil && c.sawBefore(a, start) {
			return true
		}
	}
	return false
}

func (c *Child) sawBefore(pid int, start uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	at, ok := c.seen[pid]
	return ok && at == start
}

// remember notes a process of the tree. When there are too many, those that
// have ended are forgotten first; if none has, the new one is not noted and
// will not count as an orphan.
func (c *Child) remember(pid int, start uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.seen[pid]; !ok && len(c.seen) >= maxSeen {
		for pid, start := range c.seen {
			if at, err := capture.Started(pid); err != nil || at != start {
				delete(c.seen, pid)
			}
		}
		if len(c.seen) >= maxSeen {
			return
		}
	}
	c.seen[pid] = start
}

// Run passes the signals SIGHUP, SIGINT, SIGTERM, SIGQUIT, SIGUSR1 and SIGUSR2
// on when forward is set, and collects orphans that have ended, until ctx or
// the program ends. Only a process that starts nothing but c may call it:
// every other child it has would be collected too.
func (c *Child) Run(ctx context.Context, forward bool) error {
	chld := make(chan os.Signal, 1)
	signal.Notify(chld, syscall.SIGCHLD)
	defer signal.Stop(chld)
	pass := make(chan os.Signal, 8)
	if forward {
		signal.Notify(pass, syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
		defer signal.Stop(pass)
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.ended:
			c.reap()
			return nil
		case s := <-pass:
			if sig, ok := s.(syscall.Signal); ok {
				_ = c.Signal(sig) // it may have ended meanwhile, which Done tells
			}
		case <-chld:
			c.reap()
		}
	}
}

func (c *Child) reap() {
	_, zombies, err := capture.Children(os.Getpid())
	if err != nil {
		return
	}
	for _, pid := range zombies {
		if pid != c.pid {
			capture.Reap(pid)
		}
	}
}
