package redirect

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"sallyport/internal/capture"
)

// dialer opens connections as it is told, one order on a line: "open NAME FROM
// TO" and "TO" can be 4 or 6, "say NAME", "reset NAME" and "close NAME".
func dialer(in io.Reader) {
	open := map[string]int{}
	for s := bufio.NewScanner(in); s.Scan(); {
		f := strings.Fields(s.Text())
		var err error
		switch f[0] {
		case "open":
			open[f[1]], err = openFrom(netip.MustParseAddrPort(f[2]), netip.MustParseAddrPort(f[3]))
		case "say":
			_, err = unix.Write(open[f[1]], []byte("hello"))
		case "reset":
			err = errors.Join(unix.SetsockoptLinger(open[f[1]], unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}), unix.Close(open[f[1]]))
		case "close":
			err = unix.Close(open[f[1]])
		}
		fmt.Println(f[0], err)
	}
}

// openFrom connects from a port that may have other connections.
func openFrom(from, to netip.AddrPort) (int, error) {
	domain := unix.AF_INET
	if from.Addr().Is6() {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return 0, err
	}
	if err := unix.Bind(fd, sockaddr(from)); err != nil {
		return 0, err
	}
	return fd, unix.Connect(fd, sockaddr(to))
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is6() {
		return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	}
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}

// A program is a dialer in a process of its own.
type program struct {
	pid int
	in  io.Writer
	out *bufio.Scanner
}

func startProgram(t *testing.T, uid uint32) *program {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = []string{envDial + "=1", "GORACE=atexit_sleep_ms=0"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.(io.Closer).Close()
		_ = cmd.Wait()
	})
	return &program{cmd.Process.Pid, in, bufio.NewScanner(out)}
}

func (p *program) does(t *testing.T, order string) {
	t.Helper()
	if _, err := fmt.Fprintln(p.in, order); err != nil {
		t.Fatal(err)
	}
	if !p.out.Scan() || !strings.HasSuffix(p.out.Text(), " <nil>") {
		t.Fatalf("%s: %q", order, p.out.Text())
	}
}

// A brought connection is one that has come to the door.
type brought struct {
	seen, from, to netip.AddrPort
	net.Conn
	err error
}

// doorway accepts what comes to an address.
func doorway(t *testing.T, uid int, addr string) (accept func() brought) {
	t.Helper()
	var ln net.Listener
	done := make(chan error)
	go become(uid, func() {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		var err error
		ln, err = lc.Listen(t.Context(), "tcp", addr)
		done <- err
	})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	if err := capture.KeepSYN(ln); err != nil {
		t.Fatal(err)
	}
	return func() brought {
		t.Helper()
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		b := brought{seen: c.RemoteAddr().(*net.TCPAddr).AddrPort(), Conn: c}
		b.from, b.to, b.err = capture.Ends(c)
		return b
	}
}

// owner is who the connection is found to be of, 0 for nobody.
func (b brought) owner(t *testing.T) int {
	t.Helper()
	if b.err != nil {
		t.Fatal(b.err)
	}
	return ownerOf(t, b.to, b.from)
}

func ownerOf(t *testing.T, to, from netip.AddrPort) int {
	t.Helper()
	p, err := capture.OwnerOf(to, from)
	if err != nil && !errors.Is(err, capture.ErrNoOwner) {
		t.Fatal(err)
	}
	return p.PID
}

// settled waits until all has come that the other end has said, and its end.
func (b brought) settled(t *testing.T) {
	t.Helper()
	got, err := io.ReadAll(b)
	if string(got) != "hello" || err != nil && !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("%q, %v", got, err)
	}
}

// twoUsers captures the workload and somebody else.
func twoUsers() Config {
	c := byUser()
	c.Users = append(c.Users, fmt.Sprint(strangerUID))
	return c
}

// TestEndsOfConnectionsFromOnePort has programs open connections from one port to
// several places. They would be the same at the door, so that the kernel gives
// them other ports there; each must be found to be of who opened it.
func TestEndsOfConnectionsFromOnePort(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	install(t, twoUsers())
	a, b := startProgram(t, workloadUID), startProgram(t, strangerUID)
	for _, f := range []struct{ door, from, one, two, three string }{
		{"127.0.0.1:15001", "127.0.0.1:40000", "247.0.0.1:80", "247.0.0.2:80", "247.0.0.2:443"},
		{"[::1]:15001", "[::1]:40000", "[fd00:e::1]:80", "[fd00:e::2]:80", "[fd00:e::2]:443"},
	} {
		accept := doorway(t, sidecarUID, f.door)
		moved := 0
		for i, o := range []struct {
			who *program
			to  string
		}{{a, f.one}, {a, f.two}, {b, f.three}, {a, f.door}} {
			o.who.does(t, fmt.Sprintf("open %s%d %s %s", f.door, i, f.from, o.to))
			c := accept()
			if c.from.String() != f.from || c.to.String() != o.to || c.err != nil {
				t.Errorf("from %s to %s: got %s to %s, %v", f.from, o.to, c.from, c.to, c.err)
			}
			if got := c.owner(t); got != o.who.pid {
				t.Errorf("from %s to %s: of process %d, want %d", f.from, o.to, got, o.who.pid)
			}
			if c.seen != c.from {
				moved++
			}
		}
		if moved != 3 {
			t.Errorf("at %s the kernel moved %d connections, want all but the first", f.door, moved)
		}
	}
}

// TestNobodyTakesTheWorkloadsPlace has a stranger write a request and let go of
// the connection, while the workload has others that it could be taken for.
func TestNobodyTakesTheWorkloadsPlace(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	install(t, twoUsers())
	accept := doorway(t, sidecarUID, "127.0.0.1:15001")
	workload, stranger := startProgram(t, workloadUID), startProgram(t, strangerUID)
	const place = "247.0.0.1:80"
	workload.does(t, "open idle 127.0.0.1:40000 "+place)
	workload.does(t, "open other 127.0.0.1:40001 247.0.0.2:80")
	for range 2 {
		if c := accept(); c.owner(t) != workload.pid {
			t.Errorf("the workload's own is of %d", c.owner(t))
		}
	}
	for _, end := range []string{"reset", "close"} {
		stranger.does(t, "open it 127.0.0.1:40001 "+place) // moved, since it has the port of the workload's other one
		c := accept()
		if c.seen == c.from {
			t.Fatal("the kernel has not moved it")
		}
		stranger.does(t, "say it")
		if got := c.owner(t); got != stranger.pid {
			t.Errorf("while it is open: of %d, want %d", got, stranger.pid)
		}
		stranger.does(t, end+" it")
		c.settled(t)
		if got := c.owner(t); got != 0 {
			t.Errorf("after %s: of process %d (the workload is %d), want nobody", end, got, workload.pid)
		}
		c.Close()
	}

	stranger.does(t, "open it 127.0.0.1:40002 "+place)
	c := accept()
	if err := capture.Stands(c.Conn); err != nil {
		t.Errorf("while it is open: %v", err)
	}
	stranger.does(t, "say it")
	stranger.does(t, "reset it")
	workload.does(t, "open it 127.0.0.1:40002 "+place) // from where the other's was
	if got := c.owner(t); got != workload.pid {
		t.Fatalf("of %d, want the workload, %d: this is no trap", got, workload.pid)
	}
	if err := capture.Stands(c.Conn); !errors.Is(err, capture.ErrNoOwner) {
		t.Errorf("a connection that its owner has reset, and another has followed: %v", err)
	}
}

// TestNobodyComesByTheWorkloadsPort moves a connection of the workload away from
// its port at the door, and one of a stranger to it.
func TestNobodyComesByTheWorkloadsPort(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	install(t, twoUsers())
	nftFile(t, fmt.Sprintf(`table ip moves {
	chain c {
		type nat hook postrouting priority 100
		meta skuid %d tcp sport 40000 tcp dport 15001 snat to 127.0.0.1:50000
		meta skuid %d tcp sport 40001 tcp dport 15001 snat to 127.0.0.1:40000
	}
}`, workloadUID, strangerUID))
	accept := doorway(t, sidecarUID, "127.0.0.1:15001")
	workload, stranger := startProgram(t, workloadUID), startProgram(t, strangerUID)
	const place = "247.0.0.1:80"
	workload.does(t, "open it 127.0.0.1:40000 "+place)
	if c := accept(); c.seen.Port() != 50000 || c.owner(t) != workload.pid {
		t.Fatalf("seen from %s, of %d, want %d", c.seen, c.owner(t), workload.pid)
	}
	stranger.does(t, "open it 127.0.0.1:40001 "+place)
	c := accept()
	if got := ownerOf(t, c.to, c.seen); got != workload.pid {
		t.Fatalf("by the port at the door it is of %d, want the workload, %d: this is no trap", got, workload.pid)
	}
	if got := c.owner(t); got != stranger.pid {
		t.Errorf("of %d (the workload is %d), want %d", got, workload.pid, stranger.pid)
	}
}

// TestEndsWithoutAStamp has rules of another version bring connections.
func TestEndsWithoutAStamp(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	place(t, "203.0.113.7/32")
	nftFile(t, "table ip older {\n\tchain c {\n\t\ttype nat hook output priority -105\n\t\tip daddr 203.0.113.7 tcp dport 80 redirect to :15001\n\t}\n}")
	accept := doorway(t, 0, "127.0.0.1:15001")
	dial := func() {
		c, err := net.Dial("tcp", "203.0.113.7:80")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	dial()
	if c := accept(); c.err != nil || c.from != c.seen || c.owner(t) != os.Getpid() {
		t.Errorf("from %s, seen from %s: %v", c.from, c.seen, c.err)
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/tcp_syncookies", []byte("2"), 0o600); err != nil {
		t.Fatal(err)
	}
	dial()
	if c := accept(); !errors.Is(c.err, capture.ErrNoOwner) {
		t.Errorf("by a cookie: from %s, %v; want that nobody owns it", c.from, c.err)
	}
}

func nftFile(t *testing.T, rules string) {
	t.Helper()
	file := t.TempDir() + "/rules"
	if err := os.WriteFile(file, []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	nft(t, "-f", file)
}
