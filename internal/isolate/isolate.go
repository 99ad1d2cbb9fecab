// Package isolate starts a program in a user and a network namespace of its own,
// in which there is nothing but loopback and the doors of the sidecar that
// stands outside. It needs no privilege.
//
// The program's process is first this executable itself (Enter), which makes
// the namespace ready, sends the sockets that were opened in it to the sidecar,
// gives every capability up and then becomes the program: so the sidecar holds
// the process from before its first instruction. Beside it an usher stays, which
// opens connections to the program for the sidecar and ends with it. A Room owns
// no goroutine.
package isolate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Names by which this executable is started again.
const (
	enterName = "sallyport-isolate"
	usherName = "sallyport-usher"
)

// ErrForbidden says that the kernel gives an ordinary user no namespaces, or
// nothing to do in them.
var ErrForbidden = errors.New("this kernel lets this user have no network namespace of its own")

// A Plan says what the namespace is to have.
type Plan struct {
	// Listen are the addresses on which the sidecar listens inside, the first
	// one being where everything that the program opens is brought.
	Listen []netip.AddrPort
	// Names are where what the program asks DNS servers is brought, over UDP; the
	// same is in Listen, over TCP.
	Names []netip.AddrPort
	// App is where the program listens; without it there is no usher.
	App netip.AddrPort
}

// A Room is the sidecar's hold on a namespace.
type Room struct {
	plan      Plan
	tie       *net.UnixConn // to the process that becomes the program
	usher     *net.UnixConn
	far       []*os.File // the other ends
	listeners map[netip.AddrPort]*net.TCPListener
	names     map[netip.AddrPort]*net.UDPConn
	asker     *net.UDPConn
	diag      *os.File
}

// order is what the sidecar tells the process that becomes the program.
type order struct {
	Plan   Plan
	Parent int
}

// report is its answer. Without an error the sockets come with it: the
// listeners in their order, those for names, one that asks if there are any, and
// one of sock_diag.
type report struct {
	Error     string
	Forbidden bool
}

// patience bounds each step of the preparation.
const patience = 20 * time.Second

// New makes what ties a sidecar to a namespace.
func New(p Plan) (*Room, error) {
	if len(p.Listen) == 0 {
		return nil, errors.New("isolate: no door into the mesh")
	}
	r := &Room{plan: p, listeners: map[netip.AddrPort]*net.TCPListener{}, names: map[netip.AddrPort]*net.UDPConn{}}
	for _, near := range []**net.UnixConn{&r.tie, &r.usher} {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			r.Close()
			return nil, fmt.Errorf("isolate: %w", err)
		}
		r.far = append(r.far, os.NewFile(uintptr(fds[1]), "isolate"))
		if *near, err = unixConn(fds[0]); err != nil {
			r.Close()
			return nil, fmt.Errorf("isolate: %w", err)
		}
	}
	return r, nil
}

// unixConn makes a connection of a descriptor, which it owns.
func unixConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "isolate")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(errors.New("it is no Unix socket"), c.Close())
	}
	return u, nil
}

// Into has a command that is about to be started begin in a namespace.
func (r *Room) Into(cmd *exec.Cmd) {
	cmd.Args = append([]string{enterName, cmd.Path}, cmd.Args...)
	cmd.Path = "/proc/self/exe"
	cmd.ExtraFiles = r.far
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	// The program keeps its user and its group, and has no other.
	cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET
	cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
	cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
	cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_SETPCAP}
}

// Await tells the process what to do and takes the sockets that it has opened.
func (r *Room) Await() error {
	for _, f := range r.far {
		f.Close() // so that its end is seen
	}
	r.far = nil
	if err := r.tie.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if err := send(r.tie, order{r.plan, os.Getpid()}); err != nil {
		return fmt.Errorf("isolate: %w", err)
	}
	var rep report
	fds, err := receive(r.tie, &rep)
	if err != nil {
		return fmt.Errorf("isolate: the process that makes the namespace ready has ended: %w", err)
	}
	files := make([]*os.File, len(fds))
	for i, fd := range fds {
		files[i] = os.NewFile(uintptr(fd), "isolate")
		defer files[i].Close()
	}
	switch {
	case rep.Forbidden:
		return fmt.Errorf("%w: %s", ErrForbidden, rep.Error)
	case rep.Error != "":
		return fmt.Errorf("isolate: %s", rep.Error)
	case len(files) != r.plan.sockets():
		return fmt.Errorf("isolate: %d sockets came, want %d", len(files), r.plan.sockets())
	}
	for i, a := range r.plan.Listen {
		ln, err := net.FileListener(files[i])
		if err != nil {
			return fmt.Errorf("isolate: listener %s: %w", a, err)
		}
		t, ok := ln.(*net.TCPListener)
		if !ok || t.Addr().String() != a.String() {
			return errors.Join(fmt.Errorf("isolate: what came for %s is not that listener", a), ln.Close())
		}
		r.listeners[a] = t
	}
	if err := r.takeNames(files[len(r.plan.Listen):]); err != nil {
		return err
	}
	fd, err := unix.FcntlInt(files[len(files)-1].Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("isolate: %w", err)
	}
	r.diag = os.NewFile(uintptr(fd), "sock_diag")
	return nil
}

// sockets is how many come with the report.
func (p Plan) sockets() int {
	n := len(p.Listen) + 1
	if len(p.Names) > 0 {
		n += len(p.Names) + 1
	}
	return n
}

// takeNames takes the sockets for names, and the one that asks.
func (r *Room) takeNames(files []*os.File) error {
	for i, a := range r.plan.Names {
		c, err := udpConn(files[i])
		if err != nil {
			return fmt.Errorf("isolate: socket %s: %w", a, err)
		}
		r.names[a] = c
		if c.LocalAddr().String() != a.String() {
			return fmt.Errorf("isolate: what came for %s is not that socket", a)
		}
	}
	if len(r.plan.Names) == 0 {
		return nil
	}
	var err error
	r.asker, err = udpConn(files[len(r.plan.Names)])
	return err
}

func udpConn(f *os.File) (*net.UDPConn, error) {
	c, err := net.FilePacketConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UDPConn)
	if !ok {
		return nil, errors.Join(errors.New("it is no UDP socket"), c.Close())
	}
	return u, nil
}

// Names is the socket for names on an address of the plan, once.
func (r *Room) Names(a netip.AddrPort) (*net.UDPConn, bool) {
	c, ok := r.names[a]
	delete(r.names, a)
	return c, ok
}

// Asker is a socket that sends as the program would. Nil when the plan has no
// names.
func (r *Room) Asker() *net.UDPConn { return r.asker }

// Listener is the one on an address of the plan, once.
func (r *Room) Listener(a netip.AddrPort) (net.Listener, bool) {
	ln, ok := r.listeners[a]
	delete(r.listeners, a)
	return ln, ok
}

// Diag is a socket of sock_diag that knows the connections inside.
func (r *Room) Diag() *os.File { return r.diag }

// Begin lets the process become the program.
func (r *Room) Begin() error {
	if err := r.tie.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if err := send(r.tie, struct{}{}); err != nil {
		return fmt.Errorf("isolate: the process that was to become the program has ended: %w", err)
	}
	var rep report // only what could not be executed answers
	if _, err := receive(r.tie, &rep); err == nil {
		return fmt.Errorf("isolate: %s", rep.Error)
	}
	return nil
}

// Dial connects to the program.
func (r *Room) Dial(ctx context.Context) (net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("isolate: %w", err)
	}
	near, err := unixConn(fds[0])
	if err != nil {
		unix.Close(fds[1])
		return nil, fmt.Errorf("isolate: %w", err)
	}
	defer near.Close()
	stop := context.AfterFunc(ctx, func() { near.Close() })
	defer stop()
	err = send(r.usher, struct{}{}, fds[1])
	unix.Close(fds[1])
	if err != nil {
		return nil, fmt.Errorf("isolate: the usher has ended: %w", err)
	}
	var rep report
	got, err := receive(near, &rep)
	if err != nil {
		return nil, errors.Join(ctx.Err(), fmt.Errorf("isolate: connect to the program: %w", err))
	}
	if len(got) != 1 {
		for _, fd := range got {
			unix.Close(fd)
		}
		return nil, fmt.Errorf("isolate: connect to the program: %s", rep.Error)
	}
	f := os.NewFile(uintptr(got[0]), "isolate")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("isolate: connect to the program: %w", err)
	}
	if _, ok := c.(*net.TCPConn); !ok {
		return nil, errors.Join(errors.New("isolate: what came is no TCP connection"), c.Close())
	}
	return c, nil
}

// Close gives the namespace up. A process that has not begun ends.
func (r *Room) Close() {
	for _, f := range r.far {
		f.Close()
	}
	for _, c := range []*net.UnixConn{r.tie, r.usher} {
		if c != nil {
			c.Close()
		}
	}
	for _, ln := range r.listeners {
		ln.Close()
	}
	for _, c := range r.names {
		c.Close()
	}
	if r.asker != nil {
		r.asker.Close()
	}
	if r.diag != nil {
		r.diag.Close()
	}
}

// Refused says what it means that a command could not be started in a
// namespace.
func Refused(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EUSERS) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("%w: %w", ErrForbidden, err)
	}
	return err
}

// maxFDs bounds what comes with one message.
const maxFDs = 64

// send writes one message, with copies of descriptors.
func send(c *net.UnixConn, v any, fds ...int) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(b, oob, nil)
	return err
}

// receive reads one message. The descriptors belong to the caller.
func receive(c *net.UnixConn, v any) (fds []int, err error) {
	b, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4*maxFDs))
	n, on, flags, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:on])
	if err != nil {
		return nil, err
	}
	for i := range messages {
		got, err := unix.ParseUnixRights(&messages[i])
		if err == nil {
			fds = append(fds, got...)
		}
	}
	for _, fd := range fds {
		unix.CloseOnExec(fd)
	}
	switch {
	case flags&(unix.MSG_CTRUNC|unix.MSG_TRUNC) != 0:
		err = errors.New("a message is too long")
	case n == 0:
		err = errors.New("the other end is closed")
	default:
		err = json.Unmarshal(b[:n], v)
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, err
	}
	return fds, nil
}
