package handover

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// firstPassed is the descriptor of the first socket that a service manager
// passes (sd_listen_fds(3)).
const firstPassed = 3

// A passed socket is one that the service manager has opened for this process,
// and keeps: connections wait in it while no process is there.
type passed struct {
	name string // what the service manager calls it
	at   net.Addr
	file *os.File
}

func (p passed) String() string { return fmt.Sprintf("socket %q at %s", p.name, p.at) }

// Activate takes the sockets that the service manager has passed to this
// process, as LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES say, and removes these
// from the environment: no child is meant. A door is made of the one that has
// its address, or that is named after its setting, and then the addresses must
// agree. It is called before any door is opened.
func (d *Doors) Activate() error {
	n, names, err := passedTo(os.Getpid(), os.Getenv)
	for _, v := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"} {
		err = errors.Join(err, os.Unsetenv(v))
	}
	if err == nil {
		err = d.adopt(firstPassed, n, names)
	}
	if err != nil {
		return fmt.Errorf("sockets of the service manager: %w", err)
	}
	return nil
}

// Passed says whether the service manager has passed sockets.
func (d *Doors) Passed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.passed) > 0
}

// passedTo reads how many sockets are passed to a process, and their names.
func passedTo(pid int, env func(string) string) (n int, names []string, err error) {
	if env("LISTEN_PID") != strconv.Itoa(pid) {
		return 0, nil, nil // none, or they are another's
	}
	n, err = strconv.Atoi(env("LISTEN_FDS"))
	if err != nil || n < 0 || n > maxDoors {
		return 0, nil, fmt.Errorf("LISTEN_FDS is %.20q, want a number up to %d", env("LISTEN_FDS"), maxDoors)
	}
	names = slices.Repeat([]string{"unknown"}, n)
	if list := env("LISTEN_FDNAMES"); list != "" {
		given := strings.Split(list, ":")
		if len(given) != n {
			return 0, nil, fmt.Errorf("LISTEN_FDNAMES has %d names, LISTEN_FDS says %d", len(given), n)
		}
		names = given
	}
	return n, names, nil
}

// adopt takes n descriptors from the first on. A mistake closes none: the
// process ends.
func (d *Doors) adopt(first, n int, names []string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range n {
		fd := first + i
		p := passed{name: names[i]}
		err := listens(fd)
		if err == nil {
			p.at, err = tcpAddress(fd)
		}
		if err != nil {
			return fmt.Errorf("socket %q (descriptor %d): %w; next: pass only sockets that listen for TCP (ListenStream=, Accept=no)", p.name, fd, err)
		}
		unix.CloseOnExec(fd)
		p.file = os.NewFile(uintptr(fd), p.name)
		d.passed = append(d.passed, p)
	}
	return nil
}

// tcpAddress is where a socket listens.
func tcpAddress(fd int) (net.Addr, error) {
	switch proto, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); {
	case err != nil:
		return nil, err
	case proto == unix.IPPROTO_MPTCP:
		return nil, errors.New("it speaks Multipath TCP, with which the kernel does not tell where a connection was going")
	case proto != unix.IPPROTO_TCP:
		return nil, errors.New("it is no TCP socket")
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return nil, err
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return &net.TCPAddr{IP: sa.Addr[:], Port: sa.Port}, nil
	case *unix.SockaddrInet6:
		a := &net.TCPAddr{IP: sa.Addr[:], Port: sa.Port}
		if sa.ZoneId != 0 {
			link, err := net.InterfaceByIndex(int(sa.ZoneId))
			if err != nil {
				return nil, err
			}
			a.Zone = link.Name
		}
		return a, nil
	}
	return nil, errors.New("it is of another family")
}

// claim finds the socket that was passed for a door. The caller holds mu.
func (d *Doors) claim(n name) (*os.File, error) {
	if len(d.passed) == 0 {
		return nil, nil
	}
	want, err := net.ResolveTCPAddr("tcp", n.Address)
	if err != nil {
		return nil, err
	}
	named := slices.IndexFunc(d.passed, func(p passed) bool { return p.name == n.Setting && sameTCP(p.at.(*net.TCPAddr), want) })
	if named < 0 {
		if i := slices.IndexFunc(d.passed, func(p passed) bool { return p.name == n.Setting }); i >= 0 {
			return nil, fmt.Errorf("the service manager's %s is not at %s, as the configuration says", d.passed[i], want)
		}
		named = slices.IndexFunc(d.passed, func(p passed) bool { return sameTCP(p.at.(*net.TCPAddr), want) })
	}
	if named < 0 {
		return nil, nil
	}
	f := d.passed[named].file
	d.passed = slices.Delete(d.passed, named, named+1)
	return f, nil
}

// sameTCP compares what listens with what was written: an absent host is that of
// both families, as net.Listen has it.
func sameTCP(has, want *net.TCPAddr) bool {
	ip := want.IP
	if ip == nil {
		ip = net.IPv6unspecified
	}
	return has.Port == want.Port && has.IP.Equal(ip) && has.Zone == want.Zone
}

// Unclaimed is an error for the sockets that were passed and that no setting
// has: whoever connects there would wait for nobody.
func (d *Doors) Unclaimed() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, p := range d.passed {
		errs = append(errs, fmt.Errorf("the service manager passed %s, and no setting has this address; next: remove it from the unit, or write its address in the configuration", p))
	}
	return errors.Join(errs...)
}
