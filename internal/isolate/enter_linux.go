package isolate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/internal/capture/redirect"
	"sallyport/internal/socket"
)

// The descriptors that Into gives.
const (
	tieFD   = 3
	usherFD = 4
)

// Entering says whether this process was started by Into: then main does
// nothing but call Enter.
func Entering() bool { return os.Args[0] == enterName || os.Args[0] == usherName }

// Enter makes the namespace ready and becomes the program. It returns only what
// it ends with when it cannot.
func Enter() (code int) {
	if os.Args[0] == usherName {
		return usher()
	}
	// Capabilities and the signal at the parent's death are of a thread.
	runtime.LockOSThread()
	tie, err := unixConn(tieFD)
	if err != nil {
		return 1
	}
	var o order
	if _, err := receive(tie, &o); err != nil {
		return 1
	}
	err = enter(tie, o)
	if err == nil {
		return 0 // not wanted any more
	}
	_ = send(tie, report{Error: err.Error(), Forbidden: errors.Is(err, redirect.ErrDenied)}) // the sidecar may be gone
	return 1
}

func enter(tie *net.UnixConn, o order) error {
	fds, err := furnish(o)
	if err != nil {
		return err
	}
	if err := dropAll(); err != nil { // before the usher is there, which needs none either
		return err
	}
	if o.Plan.App.IsValid() {
		if err := startUsher(o); err != nil {
			return err
		}
	}
	unix.Close(usherFD)
	if err := send(tie, report{}, fds...); err != nil {
		return err
	}
	if _, err := receive(tie, &struct{}{}); err != nil {
		return nil //nolint:nilerr // the sidecar has given up, and said why
	}
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("die with the sidecar: %w", err)
	}
	if os.Getppid() != o.Parent {
		return nil
	}
	if err := holdFamilies(); err != nil {
		return err
	}
	path, args := os.Args[1], os.Args[2:]
	return fmt.Errorf("execute %s: %w", path, syscall.Exec(path, args, os.Environ()))
}

// furnish puts into the namespace what it is to have, and opens the sockets.
func furnish(o order) (fds []int, err error) {
	if err := redirect.LoopbackUp(); err != nil {
		return nil, err
	}
	// Ports of one's own below 1024: nobody else is here.
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_unprivileged_port_start", []byte("0"), 0o644); err != nil {
		return nil, fmt.Errorf("free the low ports: %w", err)
	}
	names := uint16(0)
	if len(o.Plan.Names) > 0 {
		names = o.Plan.Names[0].Port()
	}
	h, err := redirect.Isolated(o.Plan.Listen[0].Port(), names).Install()
	if err != nil {
		return nil, err
	}
	h.Close() // the program has no right to change them
	for _, a := range o.Plan.Listen {
		lc := net.ListenConfig{Control: socket.Tune}
		lc.SetMultipathTCP(false) // of its connections the kernel does not tell where they were going
		ln, err := lc.Listen(context.Background(), "tcp", a.String())
		if err != nil {
			return nil, err
		}
		f, err := ln.(*net.TCPListener).File()
		if err != nil {
			return nil, err
		}
		fd, err := own(f)
		if err != nil {
			return nil, err
		}
		fds = append(fds, fd)
	}
	if len(o.Plan.Names) > 0 {
		for _, a := range append(o.Plan.Names, netip.AddrPort{}) { // the last one asks
			c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(a))
			if err != nil {
				return nil, err
			}
			f, err := c.File()
			if err != nil {
				return nil, err
			}
			fd, err := own(f)
			if err != nil {
				return nil, err
			}
			fds = append(fds, fd)
		}
	}
	diag, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("open sock_diag: %w", err)
	}
	return append(fds, diag), nil
}

// own copies the descriptor of a file and closes it: it would be closed whenever
// the file became garbage.
func own(f *os.File) (int, error) {
	defer f.Close()
	return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
}

// dropAll gives up every capability for good: the program could change the
// rules of its namespace otherwise. Executing what is set-user-ID, or has
// capabilities of its own, gives none either.
func dropAll() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("give capabilities up: %w", err)
	}
	for c := range uintptr(64) {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) { // one that the kernel does not know
			return fmt.Errorf("give capability %d up: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("give privileges up: %w", err)
	}
	none := [2]unix.CapUserData{}
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
		return fmt.Errorf("give capabilities up: %w", err)
	}
	return nil
}

// startUsher starts the usher as a child of the sidecar, not of the program,
// which need not know of it.
func startUsher(o order) error {
	_, err := syscall.ForkExec("/proc/self/exe", []string{usherName, o.Plan.App.String()}, &syscall.ProcAttr{
		Env: []string{}, Files: []uintptr{^uintptr(0), ^uintptr(0), ^uintptr(0), usherFD},
		Sys: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_PARENT},
	})
	if err != nil {
		return fmt.Errorf("start the usher: %w", err)
	}
	return nil
}

// usher connects to the program, as often as it is asked, until the sidecar is
// gone.
func usher() int {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT) // meant for the program, when they share a terminal
	// The program runs as the same user; it has no right to look in here.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return 1
	}
	c, err := unixConn(tieFD)
	if err != nil {
		return 1
	}
	for {
		fds, err := receive(c, &struct{}{})
		if err != nil {
			return 0
		}
		for _, fd := range fds {
			go connect(fd, os.Args[1])
		}
	}
}

// connectWithin bounds one connection: it is on loopback.
const connectWithin = 5 * time.Second

func connect(fd int, app string) {
	back, err := unixConn(fd)
	if err != nil {
		return
	}
	defer back.Close()
	d := net.Dialer{Timeout: connectWithin, Control: socket.Tune}
	c, err := d.Dial("tcp", app)
	if err != nil {
		_ = send(back, report{Error: err.Error()}) // who asked may have given up
		return
	}
	defer c.Close()
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		_ = send(back, report{Error: err.Error()})
		return
	}
	defer f.Close()
	_ = send(back, report{}, int(f.Fd()))
}
