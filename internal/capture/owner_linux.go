package capture

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The wire of NETLINK_SOCK_DIAG (linux/inet_diag.h): header, request, reply.
const (
	nlHeaderLen  = 16
	diagReqLen   = 56
	diagMsgLen   = 72
	diagNoCookie = ^uint64(0)

	tcpEstablished = 1
	tcpFinWait1    = 4
	tcpFinWait2    = 5
	tcpCloseWait   = 8
)

// A socket is what the kernel says of one end of a TCP connection.
type socket struct {
	inode uint32
	uid   uint32
}

// OwnerOf names the process at the other end of a TCP connection between two
// sockets of this host, accepted here as local with the peer remote. It looks
// first at candidates, then at every process. It needs no privilege for
// processes of the same user; one that may not be seen is ErrNoOwner.
//
// When several processes share the socket (a parent and its forked child), the
// first candidate, else one that Owners have named of late, else the lowest pid,
// is named. The connection and the
// owner's descriptor are looked at again after the process was inspected. An
// owner of another user than the one who opened the connection is refused.
//
// TCP does not say who wrote what. A process may write ahead and then become
// another program, or hand the socket to one that takes it: the answer names
// the holder of now. User, cgroup and process tree do not change that way, the
// executable does; so the executable alone is no boundary for a TCP connection.
func OwnerOf(local, remote netip.AddrPort, candidates ...int) (Process, error) {
	var o Owners
	defer o.hangUp()
	return o.Of(local, remote, candidates...)
}

// Owners answers as OwnerOf does, and remembers by which descriptor of which
// process a connection was held: a process with a thousand connections would
// otherwise be searched a thousand times. Nothing of that is believed, it is
// only looked at first; so the holder that was named once is named as long as
// it holds the connection. What the state of that process is, it is asked four
// times a second at most, for all connections that it was found to hold before.
// The zero value is ready, and safe for concurrent use.
type Owners struct {
	// In is a socket of sock_diag that was opened in another network namespace,
	// whose connections are meant then. Nil: those of our own.
	In *os.File

	asking sync.Mutex // guards In and own: one question at a time
	own    *os.File   // as In, of our own namespace; nil before the first question

	scanning sync.Mutex // held by who looks through all processes, which costs as much as many calls

	mu     sync.Mutex // guards what follows
	last   map[socket]place
	seen   map[int]sight   // by pid
	passed map[held]string // the descriptors that searches came by, until they are asked for
	turns  map[int]*turn   // of who searches a process
	recent [16]place       // of the processes that were named last, the latest first: as many as workers that one program has
}

// A held is a socket of a process, of which a look through its descriptors for
// another one has shown where it is.
type held struct {
	pid   int
	inode uint32
}

// A turn is what those wait for who want to search the same process.
type turn struct {
	sync.Mutex
	wants int // guarded by the lock of Owners
}

// A sight is what was seen of a process.
type sight struct {
	Process
	at time.Time
}

const (
	sightHolds = 250 * time.Millisecond
	maxSights  = 1 << 10 // beyond it they begin anew
)

// inspect is Inspect, or what that said a moment ago: the caller sees to it that
// it is the same process.
func (o *Owners) inspect(pid int, lately bool) (Process, error) {
	o.mu.Lock()
	last, ok := o.seen[pid]
	o.mu.Unlock()
	now := time.Now()
	if lately && ok && now.Sub(last.at) < sightHolds {
		return last.Process, nil
	}
	p, err := Inspect(pid)
	if err != nil {
		return p, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.seen == nil || len(o.seen) >= maxSights {
		o.seen = map[int]sight{}
	}
	o.seen[pid] = sight{p, now}
	return p, nil
}

// A place is a descriptor of a process.
type place struct {
	pid int
	fd  string
}

// maxPlaces bounds what Owners remember. Beyond it they begin anew.
const maxPlaces = 1 << 16

func (o *Owners) place(s socket) place {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.last[s]
}

func (o *Owners) keep(s socket, p place) {
	o.mu.Lock()
	defer o.mu.Unlock()
	at := slices.IndexFunc(o.recent[:], func(x place) bool { return x.pid == p.pid })
	if at < 0 {
		at = len(o.recent) - 1
	}
	copy(o.recent[1:at+1], o.recent[:at])
	o.recent[0] = p
	if o.last == nil || len(o.last) >= maxPlaces {
		o.last = map[socket]place{}
	}
	o.last[s] = p
}

// Of is OwnerOf.
func (o *Owners) Of(local, remote netip.AddrPort, candidates ...int) (Process, error) {
	local, remote = unmap(local), unmap(remote)
	s, err := o.lookup(remote, local)
	if err != nil {
		return Process{}, err
	}
	at := o.place(s)
	known := at.pid != 0 && at.holds(s)
	if !known {
		if at, err = o.find(s, remote, local, candidates); err != nil {
			return Process{}, err
		}
		o.keep(s, at)
	}
	p, err := o.inspect(at.pid, known)
	if err != nil {
		return Process{}, fmt.Errorf("owner of connection from %s: %w", remote, err)
	}
	if !at.holds(s) {
		return Process{}, ErrNoOwner
	}
	_, start, err := readStat("/proc/" + strconv.Itoa(at.pid))
	if err != nil || start != p.Start {
		return Process{}, ErrNoOwner
	}
	again, err := o.lookup(remote, local)
	if err != nil {
		return Process{}, err
	}
	if again != s {
		return Process{}, ErrNoOwner
	}
	// A program that opens a connection and then starts a setuid one, or gives
	// the socket to another user's, must not borrow that user's name.
	if p.UID != s.uid {
		return Process{}, fmt.Errorf("pid %d runs as user %d, the connection was opened by user %d: %w", p.PID, p.UID, s.uid, ErrNoOwner)
	}
	return p, nil
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}

// lookup asks the kernel for the socket whose own address is src and whose
// peer is dst. An IPv6 socket that speaks to a mapped IPv4 address is found by
// the IPv4 pair.
func (o *Owners) lookup(src, dst netip.AddrPort) (socket, error) {
	if !src.IsValid() || !dst.IsValid() || src.Addr().Is4() != dst.Addr().Is4() {
		return socket{}, fmt.Errorf("owner of connection: %s to %s is not one TCP connection", src, dst)
	}
	o.asking.Lock()
	defer o.asking.Unlock()
	if o.In != nil {
		return ask(int(o.In.Fd()), src, dst)
	}
	if o.own == nil {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		if err != nil {
			return socket{}, fmt.Errorf("owner of connection: open sock_diag: %w", err)
		}
		o.own = os.NewFile(uintptr(fd), "sock_diag")
	}
	s, err := ask(int(o.own.Fd()), src, dst)
	if err != nil && !errors.Is(err, ErrNoOwner) {
		o.own.Close() // the answer may still come, and must not be taken for that of another question
		o.own = nil
	}
	return s, err
}

// hangUp closes what lookup has opened.
func (o *Owners) hangUp() {
	o.asking.Lock()
	defer o.asking.Unlock()
	if o.own != nil {
		o.own.Close()
		o.own = nil
	}
}

// ask sends one question on a socket of sock_diag and reads the answer.
func ask(fd int, src, dst netip.AddrPort) (socket, error) {
	req := diagRequest(src, dst)
	if err := unix.Sendto(fd, req[:], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return socket{}, fmt.Errorf("owner of connection: ask sock_diag: %w", err)
	}
	var buf [1024]byte
	for {
		// The kernel answers within sendto, so nothing to read is an error.
		n, from, err := unix.Recvfrom(fd, buf[:], unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return socket{}, fmt.Errorf("owner of connection: read sock_diag: %w", err)
		}
		if nl, ok := from.(*unix.SockaddrNetlink); !ok || nl.Pid != 0 {
			continue // not from the kernel
		}
		return parseDiag(buf[:n], src, dst)
	}
}

// diagRequest asks for exactly one socket: no dump, any state.
func diagRequest(src, dst netip.AddrPort) [nlHeaderLen + diagReqLen]byte {
	var b [nlHeaderLen + diagReqLen]byte
	ne := binary.NativeEndian
	ne.PutUint32(b[0:], uint32(len(b)))
	ne.PutUint16(b[4:], unix.SOCK_DIAG_BY_FAMILY)
	ne.PutUint16(b[6:], unix.NLM_F_REQUEST)
	ne.PutUint32(b[8:], 1)
	r := b[nlHeaderLen:]
	r[0] = unix.AF_INET6
	if src.Addr().Is4() {
		r[0] = unix.AF_INET
	}
	r[1] = unix.IPPROTO_TCP
	ne.PutUint32(r[4:], ^uint32(0))
	id := r[8:]
	binary.BigEndian.PutUint16(id[0:], src.Port())
	binary.BigEndian.PutUint16(id[2:], dst.Port())
	copy(id[4:20], src.Addr().AsSlice())
	copy(id[20:36], dst.Addr().AsSlice())
	ne.PutUint64(id[40:], diagNoCookie)
	return b
}

// parseDiag reads one answer. A kernel that finds only the listener on the
// port answers with another pair than was asked for.
func parseDiag(b []byte, src, dst netip.AddrPort) (socket, error) {
	ne := binary.NativeEndian
	if len(b) < nlHeaderLen+4 {
		return socket{}, fmt.Errorf("owner of connection: answer of %d bytes is too short", len(b))
	}
	switch typ := ne.Uint16(b[4:]); typ {
	case unix.NLMSG_ERROR:
		errno := unix.Errno(-int32(ne.Uint32(b[nlHeaderLen:])))
		if errno == unix.ENOENT {
			return socket{}, ErrNoOwner
		}
		return socket{}, fmt.Errorf("owner of connection: sock_diag: %w", errno)
	case unix.SOCK_DIAG_BY_FAMILY:
	default:
		return socket{}, fmt.Errorf("owner of connection: unexpected answer type %d", typ)
	}
	m := b[nlHeaderLen:]
	if len(m) < diagMsgLen {
		return socket{}, fmt.Errorf("owner of connection: answer of %d bytes is too short", len(b))
	}
	family, state, id := m[0], m[1], m[4:40]
	s := socket{uid: ne.Uint32(m[64:]), inode: ne.Uint32(m[68:])}
	// The caller of a connection that is served may have said that it ends, but
	// not have heard it: one that was refused and stays open is no longer at the
	// port, which NAT may have given to another's since.
	if state != tcpEstablished && state != tcpFinWait1 && state != tcpFinWait2 {
		return socket{}, ErrNoOwner
	}
	if s.inode == 0 || diagAddr(family, id[0:2], id[4:20]) != src || diagAddr(family, id[2:4], id[20:36]) != dst {
		return socket{}, ErrNoOwner
	}
	return s, nil
}

// diagAddr reads one end of the answer; an IPv6 socket gives an IPv4 address
// in mapped form.
func diagAddr(family byte, port, addr []byte) netip.AddrPort {
	a := netip.AddrFrom16([16]byte(addr)).Unmap()
	if family == unix.AF_INET {
		a = netip.AddrFrom4([4]byte(addr[:4]))
	}
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(port))
}

func socketLink(s socket) string { return "socket:[" + strconv.FormatUint(uint64(s.inode), 10) + "]" }

// find finds a process with a descriptor of s: candidates first, then those that
// were named last, then all. These are looked through for one connection at a
// time, and not for one that has ended meanwhile: to open many must not cost more
// than they do.
func (o *Owners) find(s socket, src, dst netip.AddrPort, candidates []int) (place, error) {
	link := socketLink(s)
	o.mu.Lock()
	recent := o.recent
	o.mu.Unlock()
	for _, pid := range candidates {
		p := place{pid: pid}
		if at := slices.IndexFunc(recent[:], func(x place) bool { return x.pid == pid }); at >= 0 {
			p, recent[at] = recent[at], place{}
		}
		if fd := o.search(p, s); fd != "" {
			return place{pid, fd}, nil
		}
	}
	for _, p := range recent {
		if fd := o.guess(p, s); fd != "" {
			return place{p.pid, fd}, nil
		}
	}
	for _, p := range recent {
		if fd := o.search(p, s); fd != "" {
			return place{p.pid, fd}, nil
		}
	}
	o.scanning.Lock()
	defer o.scanning.Unlock()
	if again, err := o.lookup(src, dst); err != nil || again != s {
		return place{}, cmp.Or(err, ErrNoOwner)
	}
	pid, fd := findHolder(s.uid, link)
	if pid == 0 {
		return place{}, ErrNoOwner
	}
	return place{pid, fd}, nil
}

// findHolder finds a process with a descriptor of that link: of the socket's user
// first, then of all others.
func findHolder(uid uint32, link string) (pid int, fd string) {
	pids, err := listPIDs()
	if err != nil {
		return 0, ""
	}
	var others []int
	for _, p := range pids {
		var st unix.Stat_t
		if unix.Stat("/proc/"+strconv.Itoa(p), &st) != nil {
			continue
		}
		if st.Uid != uid {
			others = append(others, p)
			continue
		}
		if fd := holds(p, link); fd != "" {
			return p, fd
		}
	}
	for _, p := range others {
		if fd := holds(p, link); fd != "" {
			return p, fd
		}
	}
	return 0, ""
}

// guess gives the descriptor where a search came by it, or one close to p. It is ""
// where it is not there.
func (o *Owners) guess(p place, s socket) (fd string) {
	if p.pid == 0 {
		return ""
	}
	h := held{p.pid, s.inode}
	o.mu.Lock()
	fd = o.passed[h]
	delete(o.passed, h)
	o.mu.Unlock()
	if fd != "" && (place{p.pid, fd}).holds(s) {
		return fd
	}
	return p.near(socketLink(s))
}

// search looks through all descriptors of the process of p, and remembers where its
// other sockets are: one that has opened a thousand connections is searched once, not
// for each. So one at a time does.
func (o *Owners) search(p place, s socket) (fd string) {
	if p.pid == 0 {
		return ""
	}
	defer o.searches(p.pid)()
	if fd = o.guess(p, s); fd != "" {
		return fd
	}
	link, dir := socketLink(s), "/proc/"+strconv.Itoa(p.pid)+"/fd"
	passed := map[held]string{}
	_ = eachName(dir, func(name string) bool { // one that may not be looked at holds nothing we know of
		if name[0] == '.' {
			return true
		}
		switch at := readLink(dir + "/" + name); {
		case at == link:
			fd = cmp.Or(fd, name)
		case len(passed) < maxPassed:
			if inode, ok := socketOf(at); ok {
				passed[held{p.pid, inode}] = name
			}
		}
		return fd == "" || len(passed) < maxPassed
	})
	if fd != "" && !(place{p.pid, fd}).holds(s) {
		fd = "" // it has another one, perhaps
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.passed == nil || len(o.passed)+len(passed) > maxPlaces {
		o.passed = map[held]string{}
	}
	maps.Copy(o.passed, passed)
	return fd
}

// maxPassed is how many sockets a search remembers.
const maxPassed = 1 << 14

// searches waits for its turn to search a process, and gives what ends it.
func (o *Owners) searches(pid int) (done func()) {
	o.mu.Lock()
	t := o.turns[pid]
	if t == nil {
		if t = new(turn); o.turns == nil {
			o.turns = map[int]*turn{}
		}
		o.turns[pid] = t
	}
	t.wants++
	o.mu.Unlock()
	t.Lock()
	return func() {
		t.Unlock()
		o.mu.Lock()
		defer o.mu.Unlock()
		if t.wants--; t.wants == 0 {
			delete(o.turns, pid)
		}
	}
}

// around is how far from a descriptor the next one is looked for.
const around = 16

// near gives the descriptor of that link if it is close to one that a socket of the
// process had, or is that, as when it opens one after the other. Else it is "": to
// look through all would take as long as there are others.
func (p place) near(link string) string {
	n, err := strconv.Atoi(p.fd)
	if err != nil {
		return ""
	}
	dir := "/proc/" + strconv.Itoa(p.pid) + "/fd/"
	for i := range 2*around + 1 {
		fd := n + (i+1)/2
		if i%2 == 0 {
			fd = n - i/2
		}
		if name := strconv.Itoa(fd); fd >= 0 && isSocket(dir+name, link) {
			return name
		}
	}
	return ""
}

// holds gives the descriptor by which pid holds the socket, or "".
func holds(pid int, link string) (fd string) {
	dir := "/proc/" + strconv.Itoa(pid) + "/fd"
	_ = eachName(dir, func(name string) bool { // one that may not be looked at holds nothing we know of
		if name[0] != '.' && isSocket(dir+"/"+name, link) {
			fd = name
		}
		return fd == ""
	})
	return fd
}

// holds reports whether the descriptor is the socket now.
func (p place) holds(s socket) bool {
	return isSocket("/proc/"+strconv.Itoa(p.pid)+"/fd/"+p.fd, socketLink(s))
}

func isSocket(path, link string) bool { return readLink(path) == link }

// readLink is where a short link leads, or "".
func readLink(path string) string {
	var buf [64]byte
	n, err := unix.Readlink(path, buf[:])
	if err != nil {
		return ""
	}
	return string(buf[:n])
}

// socketOf is the inverse of socketLink.
func socketOf(link string) (inode uint32, ok bool) {
	text, is := strings.CutPrefix(link, "socket:[")
	n, err := strconv.ParseUint(strings.TrimSuffix(text, "]"), 10, 32)
	return uint32(n), is && err == nil
}
