package handover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/internal/daemon"
	"sallyport/internal/socket"
)

// A Listener is what a Door is made of: a *net.TCPListener, a *net.UnixListener
// or what embeds one.
type Listener interface {
	net.Listener
	SetDeadline(time.Time) error
	SyscallConn() (syscall.RawConn, error)
}

// Doors are the listening sockets of a process, each under the setting that it
// belongs to. Those that the process before had are used again if their address
// is still the same, and those that a service manager has passed. The zero value
// has none.
type Doors struct {
	mu     sync.Mutex // guards what follows
	from   map[name]*os.File
	passed []passed
	open   []*Door
	held   bool
	beside func(held bool)
}

// Beside names what is held and released with the doors: it is told when they
// accept nothing any more, and before they do again. Of doors that are held
// already it is told at once.
func (d *Doors) Beside(f func(held bool)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.beside = f; d.held {
		f(true)
	}
}

// UDP opens the door of a setting for datagrams. While it is held, reading from
// the socket fails with os.ErrDeadlineExceeded, and what is asked waits in the
// socket for the process that reads it. Closing the listener closes the socket.
func (d *Doors) UDP(setting, address string) (net.Listener, *net.UDPConn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := name{setting, address}
	f := d.from[n]
	delete(d.from, n)
	var c net.PacketConn
	var err error
	if f != nil {
		c, err = net.FilePacketConn(f) // a descriptor of its own
		f.Close()
	} else {
		c, err = net.ListenPacket("udp", address)
	}
	if err != nil {
		return nil, nil, err
	}
	udp, ok := c.(*net.UDPConn)
	if !ok {
		return nil, nil, errors.Join(fmt.Errorf("take %s over: it is no UDP socket", setting), c.Close())
	}
	return d.add(n, packets{udp}), udp, nil
}

// packets stand among listeners. Only their reading is held: an answer that is
// ready goes out.
type packets struct{ *net.UDPConn }

func (p packets) Accept() (net.Conn, error)     { return nil, errors.ErrUnsupported }
func (p packets) Addr() net.Addr                { return p.LocalAddr() }
func (p packets) SetDeadline(t time.Time) error { return p.SetReadDeadline(t) }

// TCP opens the door of a setting; there is none for an empty address. The error
// names the setting.
func (d *Doors) TCP(setting, address string) (net.Listener, error) {
	if address == "" {
		return nil, nil
	}
	ln, err := d.tcp(name{setting, address})
	if err != nil {
		return nil, daemon.Hint(fmt.Errorf("%s: %w", setting, err), "free the port, or change "+setting+" in the configuration")
	}
	return ln, nil
}

func (d *Doors) tcp(n name) (net.Listener, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	own, err := d.claim(n)
	if err != nil {
		return nil, err
	}
	if own != nil && d.from[n] == nil {
		d.take(n, own)
	} else if own != nil {
		own.Close() // the process before had the same from the same service manager
	}
	return d.door(n, func() (Listener, error) {
		lc := net.ListenConfig{Control: socket.Tune}
		lc.SetMultipathTCP(false) // of its connections the kernel does not tell where they were going
		ln, err := lc.Listen(context.Background(), "tcp", n.Address)
		if err != nil {
			return nil, err
		}
		return ln.(*net.TCPListener), nil
	}, func(ln net.Listener) (Listener, error) {
		l, ok := ln.(*net.TCPListener)
		if !ok {
			return nil, errors.New("it is no TCP socket")
		}
		if rc, err := l.SyscallConn(); err == nil { // who opened it may have known of no such thing
			_ = socket.Tune("tcp", l.Addr().String(), rc)
		}
		return l, nil
	})
}

// Private opens a door that only our own user and root may enter, as
// daemon.ListenPrivate says.
func (d *Doors) Private(setting, path string, log *slog.Logger) (net.Listener, error) {
	return d.Unix(setting, path, func() (Listener, error) { return daemon.ListenPrivate(path, log) },
		func(ln *net.UnixListener) (Listener, error) { return daemon.Private(ln, log), nil })
}

// Unix opens the door of a setting at a path. How says what is made of a socket
// that the process before had.
func (d *Doors) Unix(setting, path string, open func() (Listener, error), how func(*net.UnixListener) (Listener, error)) (net.Listener, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.door(name{setting, path}, open, func(ln net.Listener) (Listener, error) {
		l, ok := ln.(*net.UnixListener)
		if !ok || l.Addr().String() != path {
			return nil, errors.New("it is not the socket at that path")
		}
		l.SetUnlinkOnClose(true)
		return how(l)
	})
}

// take keeps a socket for the door that is about to be opened. The caller holds
// mu.
func (d *Doors) take(n name, f *os.File) {
	if d.from == nil {
		d.from = map[name]*os.File{}
	}
	d.from[n] = f
}

// door opens a door. The caller holds mu.
func (d *Doors) door(n name, open func() (Listener, error), how func(net.Listener) (Listener, error)) (net.Listener, error) {
	var ln Listener
	var err error
	if f := d.from[n]; f != nil {
		delete(d.from, n)
		ln, err = inherited(f, how)
		if err != nil {
			err = fmt.Errorf("take %s over: %w", n.Setting, err)
		}
	} else {
		ln, err = open()
	}
	if err != nil {
		return nil, err
	}
	return d.add(n, ln), nil
}

// add keeps an open door. The caller holds mu.
func (d *Doors) add(n name, ln Listener) *Door {
	door := &Door{Listener: ln, name: n, gone: make(chan struct{})}
	if d.held {
		door.hold()
	}
	d.open = append(d.open, door)
	return door
}

func inherited(f *os.File, how func(net.Listener) (Listener, error)) (Listener, error) {
	defer f.Close()
	ln, err := net.FileListener(f) // a descriptor of its own
	if err != nil {
		return nil, err
	}
	l, err := how(ln)
	if err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return l, nil
}

// Rest closes what the process before had and nobody has asked for.
func (d *Doors) Rest() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for n, f := range d.from {
		f.Close()
		delete(d.from, n)
	}
}

// hold has the doors accept nothing until release: another process does.
func (d *Doors) hold() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.held = true
	for _, x := range d.open {
		x.hold()
	}
	if d.beside != nil {
		d.beside(true)
	}
}

// Release has the doors accept again that were held.
func (d *Doors) Release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.held && d.beside != nil {
		d.beside(false)
	}
	d.held = false
	for _, x := range d.open {
		x.release()
	}
}

// send gives copies of the open sockets to a message.
func (d *Doors) send() (names []name, fds []int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, x := range d.open {
		if x.closed() {
			continue
		}
		fd, err := x.dup()
		if err != nil {
			closeAll(fds)
			return nil, nil, fmt.Errorf("%s: %w", x.name.Setting, err)
		}
		names, fds = append(names, x.name), append(fds, fd)
	}
	if len(fds) > maxDoors {
		closeAll(fds)
		return nil, nil, fmt.Errorf("%d sockets are more than the %d that can be handed over", len(fds), maxDoors)
	}
	return names, fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// receive takes the sockets that a message came with. It owns them. They are
// held: the process before still accepts.
func receive(names []name, fds []int) (*Doors, error) {
	d := &Doors{from: map[name]*os.File{}, held: true}
	err := error(nil)
	if len(names) != len(fds) {
		err = fmt.Errorf("%d sockets came, %d are named", len(fds), len(names))
	}
	for i, fd := range fds {
		if err == nil {
			err = isDoor(fd)
		}
		if err == nil && d.from[names[i]] != nil {
			err = errors.New("it is named twice")
		}
		if err != nil {
			unix.Close(fd)
			continue
		}
		d.from[names[i]] = os.NewFile(uintptr(fd), names[i].Setting)
	}
	if err != nil {
		d.Rest()
		return nil, fmt.Errorf("a socket that was handed over: %w", err)
	}
	return d, nil
}

// A Door is a listener that can be held.
type Door struct {
	Listener
	name name

	once sync.Once
	gone chan struct{} // closed by Close

	mu   sync.Mutex    // guards held
	held chan struct{} // closed when it is released; nil while it is not held
}

// Accept waits for a connection, also while the door is held.
func (d *Door) Accept() (net.Conn, error) {
	for {
		c, err := d.Listener.Accept()
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			return c, err
		}
		d.mu.Lock()
		held := d.held
		d.mu.Unlock()
		if held == nil {
			continue // it was released in this moment
		}
		select {
		case <-held:
		case <-d.gone:
			return nil, net.ErrClosed
		}
	}
}

// Close closes the socket. The file of one that another process has stays.
func (d *Door) Close() error {
	d.once.Do(func() { close(d.gone) })
	return d.Listener.Close()
}

func (d *Door) closed() bool {
	select {
	case <-d.gone:
		return true
	default:
		return false
	}
}

func (d *Door) hold() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.held != nil || d.closed() {
		return
	}
	d.held = make(chan struct{})
	d.unlinks(false)
	_ = d.SetDeadline(time.Unix(1, 0)) // a closed one accepts nothing either
}

func (d *Door) release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.held == nil {
		return
	}
	_ = d.SetDeadline(time.Time{})
	d.unlinks(true)
	close(d.held)
	d.held = nil
}

func (d *Door) unlinks(yes bool) {
	if u, ok := d.Listener.(interface{ SetUnlinkOnClose(bool) }); ok {
		u.SetUnlinkOnClose(yes)
	}
}

// dup copies the descriptor. (*os.File).Fd would have it block for both.
func (d *Door) dup() (fd int, err error) {
	rc, err := d.SyscallConn()
	if err != nil {
		return 0, err
	}
	if cerr := rc.Control(func(own uintptr) {
		fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0)
	}); cerr != nil {
		return 0, cerr
	}
	return fd, err
}
