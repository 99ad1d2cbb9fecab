package capture

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Pidfd holds on to one process: its pid cannot come to mean another one
// unnoticed while the Pidfd is open.
type Pidfd struct {
	pid  int
	f    *os.File
	once sync.Once
	done chan struct{}
}

// OpenPidfd takes hold of the process that has the pid now. The caller says
// how it knows that this is the process it means, for instance by comparing
// Inspect before and after.
func OpenPidfd(pid int) (*Pidfd, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			err = ErrNoProcess
		}
		return nil, fmt.Errorf("hold pid %d: %w", pid, err)
	}
	return newPidfd(fd, pid)
}

// AdoptPidfd wraps a pidfd that was got elsewhere, as from
// syscall.SysProcAttr.PidFD. It owns fd from then on.
func AdoptPidfd(fd, pid int) (*Pidfd, error) {
	if fd < 0 {
		return nil, fmt.Errorf("hold pid %d: the kernel gave no pidfd: Linux 5.4 or newer is needed", pid)
	}
	return newPidfd(fd, pid)
}

func newPidfd(fd, pid int) (*Pidfd, error) {
	if err := unix.SetNonblock(fd, true); err != nil { // so that the netpoller takes it
		unix.Close(fd)
		return nil, fmt.Errorf("hold pid %d: %w", pid, err)
	}
	return &Pidfd{pid: pid, f: os.NewFile(uintptr(fd), "pidfd"), done: make(chan struct{})}, nil
}

// PID is the process id as this process sees it.
func (p *Pidfd) PID() int { return p.pid }

// Alive reports whether the process still runs. A zombie does not.
func (p *Pidfd) Alive() bool {
	alive := false
	rc, err := p.f.SyscallConn()
	if err != nil {
		return false
	}
	err = rc.Control(func(fd uintptr) { alive = !exited(fd) })
	return err == nil && alive
}

// exited asks without waiting: a pidfd becomes readable when its process ends.
func exited(fd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err != nil || n > 0 // a pidfd that cannot be asked vouches for nothing
	}
}

// Done is closed when the process exits or the Pidfd is closed.
func (p *Pidfd) Done() <-chan struct{} {
	p.once.Do(func() {
		go func() {
			defer close(p.done)
			rc, err := p.f.SyscallConn()
			if err != nil {
				return
			}
			_ = rc.Read(exited) // an error means closed, which Done reports alike
		}()
	})
	return p.done
}

// Signal sends sig to the process, never to another that took its pid.
func (p *Pidfd) Signal(sig syscall.Signal) error {
	rc, err := p.f.SyscallConn()
	if err != nil {
		return fmt.Errorf("signal pid %d: %w", p.pid, err)
	}
	var serr error
	if err := rc.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return fmt.Errorf("signal pid %d: %w", p.pid, err)
	}
	if serr != nil {
		return fmt.Errorf("signal pid %d: %w", p.pid, serr)
	}
	return nil
}

// Close lets the process go. Done is closed.
func (p *Pidfd) Close() error { return p.f.Close() }

// PeerCred gives the credentials of the process that opened the other end of
// c, as they were when it did (SO_PEERCRED).
func PeerCred(c *net.UnixConn) (Cred, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return Cred{}, fmt.Errorf("peer credentials: %w", err)
	}
	var u *unix.Ucred
	var uerr error
	if err := rc.Control(func(fd uintptr) {
		u, uerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return Cred{}, fmt.Errorf("peer credentials: %w", err)
	}
	if uerr != nil {
		return Cred{}, fmt.Errorf("peer credentials: %w", uerr)
	}
	if u.Pid <= 0 {
		return Cred{}, errors.New("peer credentials: the peer is in another pid namespace: run it where this process can see it")
	}
	return Cred{PID: int(u.Pid), UID: u.Uid, GID: u.Gid}, nil
}

// PeerPidfd takes hold of the process that opened the other end of c, with
// SO_PEERPIDFD (Linux 6.5). On an older kernel it opens the pid of PeerCred
// and checks that the process there has the recorded user.
func PeerPidfd(c *net.UnixConn) (*Pidfd, error) {
	cred, err := PeerCred(c)
	if err != nil {
		return nil, err
	}
	rc, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("peer pidfd: %w", err)
	}
	fd := -1
	var serr error
	if err := rc.Control(func(s uintptr) {
		fd, serr = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	}); err != nil {
		return nil, fmt.Errorf("peer pidfd: %w", err)
	}
	switch {
	case serr == nil:
		if pid, err := pidOf(fd); err != nil || pid != cred.PID {
			unix.Close(fd)
			return nil, fmt.Errorf("peer pidfd: pid %d: %w", cred.PID, ErrNoProcess)
		}
		return newPidfd(fd, cred.PID)
	case errors.Is(serr, unix.ENOPROTOOPT):
		return openChecked(cred)
	default: // EINVAL, ESRCH, ENODATA: the peer was reaped before we asked
		return nil, fmt.Errorf("peer pidfd: pid %d: %w (%w)", cred.PID, ErrNoProcess, serr)
	}
}

func openChecked(cred Cred) (*Pidfd, error) {
	p, err := OpenPidfd(cred.PID)
	if err != nil {
		return nil, err
	}
	q, err := Inspect(cred.PID)
	if err == nil && q.UID != cred.UID {
		err = fmt.Errorf("peer pidfd: pid %d now has another user: %w", cred.PID, ErrNoProcess)
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// pidOf reads which process a pidfd stands for; -1 once it was reaped.
func pidOf(fd int) (int, error) {
	b, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Pid:"); ok {
			return strconv.Atoi(strings.TrimSpace(v))
		}
	}
	return 0, ErrNoProcess
}

// AdoptOrphans makes this process the parent of descendants whose own parent
// exits, so that they stay below it (PR_SET_CHILD_SUBREAPER).
func AdoptOrphans() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("adopt orphans: %w", err)
	}
	return nil
}

// Reap collects the exit of pid if it has ended and is our child, so that it
// does not stay as a zombie. It reports whether there was one.
func Reap(pid int) bool {
	var ws unix.WaitStatus
	n, err := unix.Wait4(pid, &ws, unix.WNOHANG, nil)
	return err == nil && n == pid
}

// HeldChild gives process attributes for os/exec: the kernel stores a pidfd of
// the new process in *pidfd, and kills it when the starting thread ends. With
// ownGroup it leads a process group of its own, which KillGroup ends.
func HeldChild(pidfd *int, ownGroup bool) *syscall.SysProcAttr {
	*pidfd = -1
	return &syscall.SysProcAttr{PidFD: pidfd, Pdeathsig: syscall.SIGKILL, Setpgid: ownGroup}
}

// KillGroup kills every process of the group that pid leads. The caller has
// not yet collected pid, so that the number cannot mean another group.
func KillGroup(pid int) { _ = unix.Kill(-pid, unix.SIGKILL) } // ESRCH: nobody is left
