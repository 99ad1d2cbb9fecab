package capture

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestOwnerOf(t *testing.T) {
	for _, c := range []struct{ name, network, listen, dial string }{
		{"IPv4", "tcp4", "127.0.0.1:0", "127.0.0.1"},
		{"IPv6", "tcp6", "[::1]:0", "::1"},
		{"IPv4 client of a dual-stack listener", "tcp", "[::]:0", "127.0.0.1"},
		{"client that dials the mapped address", "tcp", "127.0.0.1:0", "::ffff:127.0.0.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := net.Listen(c.network, c.listen)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			_, port, _ := net.SplitHostPort(l.Addr().String())
			o := start(t, "dial", nil, "tcp", net.JoinHostPort(c.dial, port))
			s, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			local, remote := ends(s)
			for _, cand := range [][]int{nil, {o.Process.Pid}, {os.Getpid(), 1 << 30}} {
				p, err := OwnerOf(local, remote, cand...)
				if err != nil || p.PID != o.Process.Pid {
					t.Errorf("OwnerOf with candidates %v = pid %d, %v; want %d", cand, p.PID, err, o.Process.Pid)
				}
			}
			if p, err := OwnerOf(remote, local); err != nil || p.PID != os.Getpid() {
				t.Errorf("our own end: pid %d, %v; want %d", p.PID, err, os.Getpid())
			}
			o.expect(t, "ready")
			o.Process.Kill()
			o.Wait()
			if p, err := OwnerOf(local, remote, o.Process.Pid); !errors.Is(err, ErrNoOwner) {
				t.Errorf("after exit: pid %d, %v; want ErrNoOwner", p.PID, err)
			}
		})
	}
}

// A socket that another user's program holds, as after starting a setuid one,
// does not speak for that user.
func TestOwnerOfRefusesABorrowedUser(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	holder := exec.Command("cat")
	holder.ExtraFiles = []*os.File{f}
	in, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	other := os.Geteuid() == 0 // only root can start another user's program
	if other {
		holder.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); holder.Wait() }()
	f.Close()
	c.Close()
	local, remote := ends(s)
	p, err := OwnerOf(local, remote, holder.Process.Pid)
	if other && !errors.Is(err, ErrNoOwner) {
		t.Errorf("pid %d (user %d), %v; want ErrNoOwner: user 0 opened the connection", p.PID, p.UID, err)
	}
	if !other && (err != nil || p.PID != holder.Process.Pid) {
		t.Errorf("the same user's child: pid %d, %v", p.PID, err)
	}
}

func ends(c net.Conn) (local, remote netip.AddrPort) {
	return c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort()
}

func TestOwnerOfRefusesWhatIsNoConnection(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	at := l.Addr().(*net.TCPAddr).AddrPort()
	nobody := netip.MustParseAddrPort("127.0.0.1:1")
	for name, c := range map[string][2]netip.AddrPort{
		"a listener is not the client":  {nobody, at},
		"nothing there":                 {nobody, nobody},
		"invalid addresses":             {{}, {}},
		"one end IPv4, the other IPv6":  {at, netip.MustParseAddrPort("[::1]:1")},
		"a listener and an invalid end": {at, {}},
	} {
		if p, err := OwnerOf(c[0], c[1]); err == nil {
			t.Errorf("%s: pid %d", name, p.PID)
		}
	}
}

// TestOwnerOfRefusesWhatWasEnded has the caller keep a connection that the other
// end has closed: it must not count for another that comes by its port.
func TestOwnerOfRefusesWhatWasEnded(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	caller, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer caller.Close()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	local, remote := ends(c)
	if err := caller.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := OwnerOf(local, remote); err != nil {
		t.Errorf("a caller that has said all: %v", err)
	}
	other, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	ended, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	local, remote = ends(ended)
	if err := ended.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	if p, err := OwnerOf(local, remote); !errors.Is(err, ErrNoOwner) {
		t.Errorf("a caller that was told of the end: pid %d, %v", p.PID, err)
	}
}

func FuzzParseDiag(f *testing.F) {
	src, dst := netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("127.0.0.1:2")
	f.Add([]byte{})
	f.Add(make([]byte, nlHeaderLen+diagMsgLen))
	b := make([]byte, nlHeaderLen+diagMsgLen)
	b[4] = unix.SOCK_DIAG_BY_FAMILY
	b[nlHeaderLen] = unix.AF_INET
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseDiag(b, src, dst); err == nil && s.inode == 0 {
			t.Error("accepted an answer without an inode")
		}
	})
}

// TestOwnersForgetWhoLetGo closes the descriptor of the holder that was named.
func TestOwnersForgetWhoLetGo(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	local, remote := ends(s)
	var o Owners
	for range 2 { // the second time by what is remembered
		if p, err := o.Of(local, remote); err != nil || p.PID != os.Getpid() {
			t.Fatalf("got pid %d, %v; want this process", p.PID, err)
		}
	}
	f, err := c.(*net.TCPConn).File() // under another number
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if p, err := o.Of(local, remote); err != nil || p.PID != os.Getpid() {
		t.Errorf("after the descriptor moved: pid %d, %v", p.PID, err)
	}
	f.Close()
	if p, err := o.Of(local, remote); !errors.Is(err, ErrNoOwner) {
		t.Errorf("nobody holds it any more: pid %d, %v", p.PID, err)
	}
}

// TestOwnersLookAgain plants what is remembered of a process: it counts for a
// connection that it was found to hold before, for a moment.
func TestOwnersLookAgain(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var o Owners
	defer o.hangUp()
	pid := os.Getpid()
	held := func() (local, remote netip.AddrPort) {
		c, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			c.Close()
			s.Close()
		})
		return ends(s)
	}
	planted := func(local, remote netip.AddrPort, age time.Duration, change func(*Process)) (bool, error) {
		o.mu.Lock()
		p := o.seen[pid].Process
		p.ExePath = "planted"
		change(&p)
		o.seen[pid] = sight{p, time.Now().Add(-age)}
		o.mu.Unlock()
		got, err := o.Of(local, remote)
		return got.ExePath == "planted", err
	}
	same := func(*Process) {}
	local, remote := held()
	if _, err := o.Of(local, remote); err != nil {
		t.Fatal(err)
	}
	if old, err := planted(local, remote, -time.Hour, same); err != nil || !old {
		t.Errorf("a moment later: as before %v, %v", old, err)
	}
	if old, err := planted(local, remote, sightHolds, same); err != nil || old {
		t.Errorf("later: as before %v, %v", old, err)
	}
	if _, err := planted(local, remote, -time.Hour, func(p *Process) { p.Start++ }); !errors.Is(err, ErrNoOwner) {
		t.Errorf("another process under the number: %v", err)
	}
	if _, err := planted(local, remote, -time.Hour, func(p *Process) { p.UID++ }); !errors.Is(err, ErrNoOwner) {
		t.Errorf("another user: %v", err)
	}
	other, end := held()
	o.scanning.Lock() // who was named before is found without a look at all
	defer o.scanning.Unlock()
	if old, err := planted(other, end, -time.Hour, same); err != nil || old {
		t.Errorf("another connection: as before %v, %v", old, err)
	}
}

func BenchmarkOwnerOf(b *testing.B) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	o := start(b, "dial", nil, "tcp", l.Addr().String())
	s, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	local, remote := ends(s)
	var owners, named Owners
	defer owners.hangUp()
	defer named.hangUp()
	for name, of := range map[string]func() (Process, error){
		"candidate": func() (Process, error) { return OwnerOf(local, remote, o.Process.Pid) },
		"scan":      func() (Process, error) { return OwnerOf(local, remote) },
		"again":     func() (Process, error) { return owners.Of(local, remote) },
		"new": func() (Process, error) {
			named.mu.Lock()
			named.last = nil
			named.mu.Unlock()
			return named.Of(local, remote)
		},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if p, err := of(); err != nil || p.PID != o.Process.Pid {
					b.Fatal(p, err)
				}
			}
		})
	}
}

// A descriptor is found close to the one that was found before.
func TestNear(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	link := socketLink(socket{inode: uint32(st.Ino)})
	for _, tt := range []struct {
		from  string
		found bool
	}{
		{strconv.Itoa(fd), true}, {strconv.Itoa(fd + 1), true}, {strconv.Itoa(fd + around), true}, {strconv.Itoa(fd + around + 1), false},
		{strconv.Itoa(fd - 1), true}, {strconv.Itoa(max(fd-around, 0)), true}, {strconv.Itoa(fd - around - 1), false}, {"", false},
	} {
		want := ""
		if tt.found {
			want = strconv.Itoa(fd)
		}
		if got := (place{os.Getpid(), tt.from}).near(link); got != want {
			t.Errorf("from %q it is %q, want %q", tt.from, got, want)
		}
	}
	if got := (place{os.Getpid(), strconv.Itoa(fd)}).near("socket:[0]"); got != "" {
		t.Errorf("another one's is %q", got)
	}
}

// To search for one socket shows where the others are, once each, as long as they
// are there.
func TestSearchRemembersOthers(t *testing.T) {
	var fds [3]string
	var links [3]string
	var at [3]held
	for i := range fds {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if i < 2 {
			defer unix.Close(fd)
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			t.Fatal(err)
		}
		fds[i], at[i] = strconv.Itoa(fd), held{os.Getpid(), uint32(st.Ino)}
		links[i] = socketLink(socket{inode: uint32(st.Ino)})
		if inode, ok := socketOf(links[i]); !ok || inode != at[i].inode {
			t.Errorf("%s is %d, %v", links[i], inode, ok)
		}
	}
	var o Owners
	if got := o.search(place{pid: os.Getpid()}, socket{inode: at[0].inode}); got != fds[0] {
		t.Errorf("the socket was found at %q, want %s", got, fds[0])
	}
	if len(o.turns) > 0 {
		t.Error("somebody still waits for a turn")
	}
	for i, want := range []string{"", fds[1], ""} {
		if i == 2 {
			fd, _ := strconv.Atoi(fds[2])
			unix.Close(fd)
		}
		if got := o.guess(place{pid: at[i].pid}, socket{inode: at[i].inode}); got != want {
			t.Errorf("socket %d was passed at %q, want %q", i, got, want)
		}
	}
	if got := o.guess(place{pid: at[1].pid}, socket{inode: at[1].inode}); got != "" {
		t.Errorf("it is remembered at %q when it was asked for already", got)
	}
	for _, bad := range []string{"", "pipe:[12]", "socket:[]", "socket:[x]", "socket:[99999999999]"} {
		if _, ok := socketOf(bad); ok {
			t.Errorf("%q is a socket", bad)
		}
	}
}
