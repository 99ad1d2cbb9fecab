package redirect

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/internal/meshtest"
)

// The roles that this test program plays as a process of its own.
const (
	envInside = "REDIRECT_INSIDE" // the test runs in a network namespace of its own
	envTry    = "REDIRECT_TRY"    // attempts, one on a line
	envHold   = "REDIRECT_HOLD"   // hold rules until the input ends
	envDial   = "REDIRECT_DIAL"   // open connections as the input says
)

func TestMain(m *testing.M) {
	if a := os.Getenv(envTry); a != "" {
		for one := range strings.SplitSeq(a, "\n") {
			fmt.Println(strings.ReplaceAll(try(one), "\n", " "))
		}
		return
	}
	if c := os.Getenv(envHold); c != "" {
		os.Exit(hold(c))
	}
	if os.Getenv(envDial) != "" {
		dialer(os.Stdin)
		return
	}
	os.Exit(m.Run())
}

// hold puts rules into force, says so, and holds them.
func hold(config string) int {
	var c Config
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		fmt.Println(err)
		return 1
	}
	r, err := New(c, testDoors)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	h, err := r.Install()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Printf("owned=%v\n", h.Owned)
	_, _ = io.Copy(io.Discard, os.Stdin)
	runtime.KeepAlive(h) // its socket holds the rules, and is closed with what nobody needs any more
	return 0
}

// inNamespace runs the test again as root of a user and network namespace of
// its own, and reports whether this is that run. It needs no privilege, but
// without it the test has one user only.
func inNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(envInside) != "" {
		if err := LoopbackUp(); err != nil {
			t.Fatal(err)
		}
		return true
	}
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), envInside+"=1")
	cmd.SysProcAttr = ownNamespace()
	out, err := cmd.CombinedOutput()
	switch {
	case cmd.ProcessState == nil:
		meshtest.Unable(t, fmt.Sprintf("the kernel gives no namespaces: %v", err))
	case err != nil:
		t.Errorf("in a namespace of its own: %v\n%s", err, out)
	case bytes.Contains(out, []byte("--- SKIP")):
		t.Skipf("%s", out)
	}
	return false
}

// ownNamespace is how a process gets a user and a network namespace of its own.
func ownNamespace() *syscall.SysProcAttr {
	n := 1
	if os.Getuid() == 0 {
		n = 65536
	}
	return &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: n}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: n}}, GidMappingsEnableSetgroups: n > 1,
	}
}

// manyUsers ends a test that needs several users where there is one.
func manyUsers(t *testing.T) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	if f := strings.Fields(string(b)); len(f) != 3 || len(f[2]) < 5 {
		meshtest.Unable(t, "this needs several users; run the test as root")
	}
}

// as tries something as a user, and in a cgroup when one is given.
func as(t *testing.T, uid int, cgroup, attempt string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = []string{envTry + "=" + attempt, "GORACE=atexit_sleep_ms=0"} // it would sleep for a second otherwise
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if uid != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}
		// Raw sockets, for what an attacker may have.
		cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_NET_RAW}
	}
	if cgroup != "" {
		f, err := os.Open(cgroup)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(f.Fd())
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s as %d: %v: %s", attempt, uid, err, out)
	}
	return string(out)
}

// try makes one attempt to send something: "network address", where network is
// also icmp, raw (a TCP segment by a raw socket), mptcp and bound ("bound
// source destination").
func try(attempt string) string {
	patience := 10 * time.Second // of a machine under load; a refusal comes at once
	f := strings.Fields(attempt)
	if f[0] == "brief" { // for what nobody answers
		patience, f = 2*time.Second, f[1:]
	}
	d := net.Dialer{Timeout: patience}
	network := f[0]
	switch network {
	case "frame", "frame-direct":
		return sendFrame(f[1], network == "frame-direct")
	case "raw", "gre", "fragment", "multicast":
		return sendRaw(network, f[1])
	case "mark":
		network = "tcp"
		d.Control = func(_, _ string, c syscall.RawConn) (err error) {
			return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 1) }), err)
		}
	case "device":
		network = "tcp"
		d.Control = func(_, _ string, c syscall.RawConn) (err error) {
			return errors.Join(c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), f[2]) }), err)
		}
	case "fast":
		network = "tcp"
		d.Control = func(_, _ string, c syscall.RawConn) (err error) {
			return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1) }), err)
		}
	case "icmp":
		network = "ip4:icmp"
	case "mptcp":
		network = "tcp"
		d.SetMultipathTCP(true)
	case "bound":
		network = "tcp"
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(f[1])}
		f = f[1:]
	}
	c, err := d.Dial(network, f[1])
	if err != nil {
		return "refused: " + err.Error()
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err.Error()
	}
	say := []byte("hello")
	if network == "ip4:icmp" {
		say = []byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0}
	}
	if _, err := c.Write(say); err != nil {
		return "refused: " + err.Error()
	}
	b := make([]byte, 256)
	n, err := c.Read(b)
	if err != nil {
		return "refused: " + err.Error()
	}
	return string(b[:n])
}

// sendFrame writes a frame with a packet of IPv4 past the stack, and past what
// orders packets when direct.
func sendFrame(device string, direct bool) string {
	i, err := net.InterfaceByName(device)
	if err != nil {
		return err.Error()
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "no socket: " + err.Error()
	}
	defer unix.Close(fd)
	if direct {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
			return err.Error()
		}
	}
	packet := append([]byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0, 10, 77, 0, 1, 10, 77, 0, 2}, 0, 9, 0, 9, 0, 8, 0, 0)
	to := &unix.SockaddrLinklayer{Protocol: 0x0008, Ifindex: i.Index, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	if err := unix.Sendto(fd, packet, 0, to); err != nil {
		return "refused: " + err.Error()
	}
	return "sent"
}

// sendRaw sends a packet that no protocol answers: one of experiments, of GRE, the
// first fragment of one that never becomes whole, or one to many.
func sendRaw(kind, addr string) string {
	protocol, packet := unix.IPPROTO_GRE, []byte{0, 0, 0x08, 0}
	to := net.ParseIP(addr).To4()
	switch kind {
	case "raw", "fragment":
		protocol = unix.IPPROTO_RAW
		packet = append([]byte{0x45, 0, 0, 28, 0, 1, 0, 0, 64, 253, 0, 0, 0, 0, 0, 0}, to...)
		if kind == "fragment" {
			packet[6], packet[9] = 0x20, unix.IPPROTO_UDP // more fragments
		}
		packet = append(packet, 0, 53, 0, 53, 0, 64, 0, 0)
	}
	domain, typ, port := unix.AF_INET, unix.SOCK_RAW, 0
	if kind == "multicast" {
		typ, protocol, port = unix.SOCK_DGRAM, unix.IPPROTO_UDP, 5353
	}
	fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return "no socket: " + err.Error()
	}
	defer unix.Close(fd)
	const many = 20 // so that they are told from what the kernel itself sends
	before := transmitted()
	for range many {
		if err := unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Port: port, Addr: [4]byte(to)}); err != nil {
			return "refused: " + err.Error()
		}
		if kind == "fragment" {
			packet[5]++ // each of another packet
		}
	}
	if kind == "fragment" && transmitted()-before < many {
		return "refused: the kernel waits for the rest"
	}
	return "sent"
}

// transmitted is how many packets have left through the interface "near".
func transmitted() (n int) {
	b, _ := os.ReadFile("/proc/net/dev")
	for line := range strings.Lines(string(b)) {
		if name, rest, ok := strings.Cut(strings.TrimSpace(line), ":"); ok && name == "near" {
			if f := strings.Fields(rest); len(f) > 9 {
				n, _ = strconv.Atoi(f[9])
			}
		}
	}
	return n
}

// place makes an address of the world outside, on this machine, so that what
// gets past the rules is seen.
func place(t *testing.T, addrs ...string) {
	t.Helper()
	ip := meshtest.Need(t, "ip")
	for _, a := range addrs {
		args := []string{"addr", "add", a, "dev", "lo"}
		if strings.Contains(a, ":") {
			args = append(args, "nodad")
		}
		if out, err := exec.CommandContext(t.Context(), ip, args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v %s", args, err, out)
		}
	}
}

// serve answers whoever comes with what reply says of the connection.
func serve(t *testing.T, addr string, reply func(net.Conn) string) {
	t.Helper()
	serveAs(t, 0, addr, reply)
}

// serveAs does so by sockets of a user.
func serveAs(t *testing.T, uid int, addr string, reply func(net.Conn) string) {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ready := make(chan error)
	go become(uid, func() {
		ln, err := lc.Listen(t.Context(), "tcp", addr)
		ready <- err
		if err != nil {
			return
		}
		t.Cleanup(func() { ln.Close() })
		ready <- nil
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b := make([]byte, 16)
				if _, err := c.Read(b); err == nil {
					_, _ = io.WriteString(c, reply(c))
				}
			}()
		}
	})
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	<-ready
}

// become has the files that f opens belong to a user. The thread ends with it.
func become(uid int, f func()) {
	runtime.LockOSThread()
	if uid != 0 {
		_, _ = unix.SetfsuidRetUid(uid)
	}
	f()
}

// overfull listens as a user at a port whose queue is full, so that the kernel
// answers who connects by a SYN cookie, which no socket owns.
func overfull(t *testing.T, uid, port int) {
	t.Helper()
	done := make(chan error)
	go become(uid, func() {
		done <- func() error {
			var fds [2]int
			for i := range fds {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
				if err != nil {
					return err
				}
				t.Cleanup(func() { unix.Close(fd) })
				fds[i] = fd
			}
			if err := unix.SetsockoptInt(fds[0], unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 30); err != nil {
				return err
			}
			if err := unix.Bind(fds[0], &unix.SockaddrInet4{Port: port}); err != nil {
				return err
			}
			if err := unix.Listen(fds[0], 0); err != nil {
				return err
			}
			if err := unix.Connect(fds[1], &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}); !errors.Is(err, unix.EINPROGRESS) {
				return err
			}
			return nil
		}()
	})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func serveUDP(t *testing.T, addr, reply string) {
	t.Helper()
	serveUDPAs(t, 0, addr, reply)
}

// serveUDPAs answers from a socket of a user.
func serveUDPAs(t *testing.T, uid int, addr, reply string) {
	t.Helper()
	ready := make(chan error)
	go become(uid, func() {
		c, err := net.ListenPacket("udp", addr)
		ready <- err
		if err != nil {
			return
		}
		t.Cleanup(func() { c.Close() })
		ready <- nil
		b := make([]byte, 64)
		for {
			_, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = c.WriteTo([]byte(reply), from)
		}
	})
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	<-ready
}
