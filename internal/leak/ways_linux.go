package leak

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func ways() []way {
	const v4, v6 = false, true
	return []way{
		{"tcp4", tcp(v4, nil)}, {"tcp6", tcp(v6, nil)},
		{"tcp4-in-6", mapped},
		{"tcp-fast-open", fastOpen},
		{"mptcp", stream(unix.IPPROTO_MPTCP)},
		{"sctp", stream(unix.IPPROTO_SCTP)},
		{"tcp-mark", tcp(v4, option(unix.SOL_SOCKET, unix.SO_MARK, 0x1))},
		{"tcp-free-bind", tcp(v4, option(unix.SOL_IP, unix.IP_FREEBIND, 1))},
		{"tcp-device", device},
		{"udp4", udp(v4)}, {"udp6", udp(v6)},
		{"udp-lite", datagram(unix.SOCK_DGRAM, unix.IPPROTO_UDPLITE)},
		{"multicast-dns", multicast},
		{"ping4", ping(v4)}, {"ping6", ping(v6)},
		{"raw-icmp", datagram(unix.SOCK_RAW, unix.IPPROTO_ICMP)},
		{"raw-gre", datagram(unix.SOCK_RAW, unix.IPPROTO_GRE)},
		{"raw-ip", datagram(unix.SOCK_RAW, unix.IPPROTO_RAW)},
		{"packet", frame(false)}, {"packet-direct", frame(true)}, {"xdp", xdp},
		{"vsock", vsock},
		{"metadata4", metadata("169.254.169.254:80")}, {"metadata6", metadata("[fd00:ec2::254]:80")},
		{"connect", connect},
		{"resolved", resolver("/run/systemd/resolve/io.systemd.Resolve")}, {"nscd", resolver("/run/nscd/socket")},
		{"other-user", otherUser}, {"other-cgroup", otherCgroup}, {"own-network", ownNetwork},
	}
}

// refused is what an error of a way that has answers means.
func refused(err error) (Result, string) {
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, unix.ETIMEDOUT) || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINPROGRESS) {
		return Unknown, "nobody answers"
	}
	return Refused, why(err)
}

// why is the kernel's word, without the addresses around it.
func why(err error) string {
	var no syscall.Errno
	if errors.As(err, &no) {
		return no.Error()
	}
	return err.Error()
}

func (t *trial) line(way string) string { return hello + way + " " + t.nonce + "\n" }

// to is the witness's address of a family.
func (t *trial) to(six bool) netip.AddrPort {
	if six {
		return t.V6
	}
	return t.V4
}

const noAddress = "the witness has no address of this family"

// said reads the answer of a witness.
func (t *trial) said(c net.Conn, way string) (Result, string) {
	_ = c.SetDeadline(time.Now().Add(t.Timeout))
	if _, err := c.Write([]byte(t.line(way))); err != nil {
		return Refused, why(err)
	}
	s, err := bufio.NewReaderSize(c, 1<<10).ReadString('\n')
	_, udp := c.(*net.UDPConn)
	switch {
	case udp && errors.Is(err, os.ErrDeadlineExceeded):
		return Leaked, "the kernel has sent it"
	case strings.HasPrefix(s, heard+way+" "+t.nonce):
		return Leaked, "the witness has heard it"
	case err != nil:
		return refused(err)
	}
	return Refused, fmt.Sprintf("somebody else answers: %.40q", s)
}

func (t *trial) dial(ctx context.Context, network string, to netip.AddrPort, control func(int) error, way string) (Result, string) {
	if !to.IsValid() {
		return Absent, noAddress
	}
	d := net.Dialer{Timeout: t.Timeout, Control: func(_, _ string, rc syscall.RawConn) (err error) {
		e := rc.Control(func(fd uintptr) {
			if control != nil {
				err = control(int(fd)) //nolint:gosec // a descriptor
			}
		})
		return errors.Join(e, err)
	}}
	d.SetMultipathTCP(false)
	c, err := d.DialContext(ctx, network, to.String())
	if err != nil {
		return refused(err)
	}
	defer c.Close()
	return t.said(c, way)
}

func tcp(six bool, control func(int) error) func(context.Context, *trial) (Result, string) {
	return func(ctx context.Context, t *trial) (Result, string) {
		return t.dial(ctx, "tcp", t.to(six), control, "tcp")
	}
}

func option(level, name, value int) func(int) error {
	return func(fd int) error { return unix.SetsockoptInt(fd, level, name, value) }
}

func udp(six bool) func(context.Context, *trial) (Result, string) {
	return func(ctx context.Context, t *trial) (Result, string) { return t.dial(ctx, "udp", t.to(six), nil, "udp") }
}

// mapped reaches an IPv4 address by a socket of IPv6.
func mapped(ctx context.Context, t *trial) (Result, string) {
	if !t.V4.IsValid() {
		return Absent, noAddress
	}
	return t.bare(ctx, unix.AF_INET6, unix.SOCK_STREAM, 0, &unix.SockaddrInet6{Port: int(t.V4.Port()), Addr: netip.AddrFrom16(t.V4.Addr().As16()).As16()})
}

// stream is a socket of IPv4 of a protocol with connections.
func stream(protocol int) func(context.Context, *trial) (Result, string) {
	return func(ctx context.Context, t *trial) (Result, string) {
		if !t.V4.IsValid() {
			return Absent, noAddress
		}
		return t.bare(ctx, unix.AF_INET, unix.SOCK_STREAM, protocol, t.sockaddr())
	}
}

func (t *trial) sockaddr() *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Port: int(t.V4.Port()), Addr: t.V4.Addr().As4()}
}

// bare connects a socket that the library knows nothing of, and speaks to
// whoever answers.
func (t *trial) bare(_ context.Context, family, kind, protocol int, to unix.Sockaddr) (Result, string) {
	fd, err := t.socket(family, kind, protocol)
	if err != nil {
		return noSocket(err)
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, to); err != nil {
		return refused(err)
	}
	return t.spoken(fd, t.line("tcp"))
}

// socket is one that waits no longer than a way may take.
func (t *trial) socket(family, kind, protocol int) (fd int, err error) {
	if fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC, protocol); err != nil {
		return -1, err
	}
	wait := unix.NsecToTimeval(t.Timeout.Nanoseconds())
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait) // without them it waits longer
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait)
	return fd, nil
}

// spoken sends a line on a connected socket and reads what comes.
func (t *trial) spoken(fd int, line string) (Result, string) {
	if line != "" {
		if _, err := unix.Write(fd, []byte(line)); err != nil {
			return Refused, why(err)
		}
	}
	b := make([]byte, 1<<10)
	n, err := unix.Read(fd, b)
	switch {
	case err != nil:
		return refused(err)
	case strings.HasPrefix(string(b[:n]), heard):
		return Leaked, "the witness has heard it"
	case n == 0:
		return Refused, "closed"
	}
	return Refused, fmt.Sprintf("somebody else answers: %.40q", b[:n])
}

// noSocket is what a socket that cannot be had means.
func noSocket(err error) (Result, string) {
	for _, no := range []error{unix.EPROTONOSUPPORT, unix.ESOCKTNOSUPPORT, unix.EAFNOSUPPORT, unix.EINVAL} {
		if errors.Is(err, no) {
			return Absent, why(err)
		}
	}
	return Refused, "no such socket: " + why(err)
}

// fastOpen sends data with the first packet.
func fastOpen(_ context.Context, t *trial) (Result, string) {
	if !t.V4.IsValid() {
		return Absent, noAddress
	}
	fd, err := t.socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return noSocket(err)
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, []byte(t.line("tcp")), unix.MSG_FASTOPEN, t.sockaddr()); err != nil {
		return refused(err)
	}
	return t.spoken(fd, "")
}

// device binds a connection to each interface that is up and not loopback.
func device(ctx context.Context, t *trial) (Result, string) {
	ifs, err := net.Interfaces()
	if err != nil {
		return Refused, why(err)
	}
	result, detail := Absent, "there is no interface but loopback"
	for _, i := range ifs {
		if i.Flags&net.FlagLoopback != 0 || i.Flags&net.FlagUp == 0 {
			continue
		}
		result, detail = t.dial(ctx, "tcp", t.V4, func(fd int) error { return unix.BindToDevice(fd, i.Name) }, "tcp")
		detail = i.Name + ": " + detail
		if result == Leaked {
			break
		}
	}
	return result, detail
}

// datagram sends one packet of a protocol that nobody answers: that the kernel
// takes it is a leak.
func datagram(kind, protocol int) func(context.Context, *trial) (Result, string) {
	return func(_ context.Context, t *trial) (Result, string) {
		if !t.V4.IsValid() {
			return Absent, noAddress
		}
		b := []byte(t.line("datagram"))
		switch {
		case protocol == unix.IPPROTO_ICMP:
			b = echo(8)
		case protocol == unix.IPPROTO_RAW:
			b = packet(t.V4.Addr(), b)
		}
		return sent(unix.AF_INET, kind, protocol, b, t.sockaddr(), protocol == unix.IPPROTO_UDPLITE)
	}
}

// sent sends one packet.
func sent(family, kind, protocol int, b []byte, to unix.Sockaddr, port bool) (Result, string) {
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return noSocket(err)
	}
	defer unix.Close(fd)
	if a, ok := to.(*unix.SockaddrInet4); ok && !port {
		to = &unix.SockaddrInet4{Addr: a.Addr} // raw sockets know no ports
	}
	if err := unix.Sendto(fd, b, 0, to); err != nil {
		return Refused, why(err)
	}
	return Leaked, "the kernel has sent it"
}

// echo is a question of ICMP, with its sum.
func echo(kind byte) []byte {
	b := []byte{kind, 0, 0, 0, 0, 1, 0, 1, 's', 'p'}
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	sum = sum>>16 + sum&0xffff
	b[2], b[3] = byte(^sum>>8), byte(^sum) //nolint:gosec // halves of it
	return b
}

// packet is one of IPv4 of the protocol 253, which is for experiments (RFC 3692).
func packet(to netip.Addr, body []byte) []byte {
	b := make([]byte, 20, 20+len(body))
	b[0], b[8], b[9] = 0x45, 64, 253 // the kernel fills in the rest
	copy(b[16:], to.AsSlice())
	return append(b, body...)
}

func ping(six bool) func(context.Context, *trial) (Result, string) {
	return func(_ context.Context, t *trial) (Result, string) {
		to := t.to(six)
		switch {
		case !to.IsValid():
			return Absent, noAddress
		case six:
			return sent(unix.AF_INET6, unix.SOCK_DGRAM, unix.IPPROTO_ICMPV6, echo(128), &unix.SockaddrInet6{Addr: to.Addr().As16()}, true)
		}
		return sent(unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP, echo(8), t.sockaddr(), false)
	}
}

// multicast asks the local network for a name, as mDNS does.
func multicast(_ context.Context, t *trial) (Result, string) {
	return sent(unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_UDP, []byte(t.line("mdns")), &unix.SockaddrInet4{Addr: [4]byte{224, 0, 0, 251}, Port: 5353}, true)
}

// frame sends a frame to everybody on each interface that is up and not
// loopback, below the rules for packets; when direct, past the queue of the
// interface and what stands there.
func frame(direct bool) func(context.Context, *trial) (Result, string) {
	return func(_ context.Context, t *trial) (Result, string) {
		ifs, err := net.Interfaces()
		if err != nil {
			return Refused, why(err)
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return noSocket(err)
		}
		defer unix.Close(fd)
		if direct {
			if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
				return Absent, why(err)
			}
		}
		result, detail := Absent, "there is no interface but loopback"
		for _, i := range ifs {
			if i.Flags&net.FlagLoopback != 0 || i.Flags&net.FlagUp == 0 {
				continue
			}
			// 0x88b5 is for experiments (IEEE 802).
			to := &unix.SockaddrLinklayer{Protocol: 0xb588, Ifindex: i.Index, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
			if err := unix.Sendto(fd, []byte(t.line("frame")), 0, to); err != nil {
				result, detail = Refused, i.Name+": "+why(err)
				continue
			}
			return Leaked, i.Name + ": the kernel has sent it"
		}
		return result, detail
	}
}

// xdp opens a socket that writes frames to an interface below every hook of the
// kernel: to have it is to have a way out.
func xdp(context.Context, *trial) (Result, string) {
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return noSocket(err)
	}
	unix.Close(fd)
	return Leaked, "no rule sees what such a socket sends"
}

// vsock calls the host of a virtual machine.
func vsock(_ context.Context, t *trial) (Result, string) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return noSocket(err)
	}
	defer unix.Close(fd)
	switch err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: 1}); {
	case err == nil, errors.Is(err, unix.EINPROGRESS), errors.Is(err, unix.ECONNRESET):
		return Leaked, "the host of this machine can be called"
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENETUNREACH):
		return Absent, why(err)
	default:
		return Refused, why(err)
	}
}

// metadata asks where clouds answer with credentials.
func metadata(at string) func(context.Context, *trial) (Result, string) {
	return func(ctx context.Context, t *trial) (Result, string) {
		d := net.Dialer{Timeout: t.Timeout}
		c, err := d.DialContext(ctx, "tcp", at)
		if err != nil {
			return Refused, why(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(t.Timeout))
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", at)
		resp, err := http.ReadResponse(bufio.NewReaderSize(c, 4<<10), nil)
		switch {
		case err != nil:
			return Refused, why(err)
		case resp.Header.Get("Sallyport-Decision") != "" || resp.Header.Get("Sallyport-Refused") != "":
			return Refused, "the sidecar answers " + resp.Status
		}
		return Leaked, "it answers " + resp.Status
	}
}

// connect asks the proxy that the workload is told to use for a tunnel.
func connect(ctx context.Context, t *trial) (Result, string) {
	proxy := cmp.Or(os.Getenv("HTTPS_PROXY"), os.Getenv("https_proxy"))
	u, err := url.Parse(proxy)
	switch {
	case proxy == "":
		return Absent, "HTTPS_PROXY is not set"
	case err != nil || u.Scheme != "http":
		return Absent, "HTTPS_PROXY is not the URL of a proxy in clear text"
	case !t.V4.IsValid():
		return Absent, noAddress
	}
	d := net.Dialer{Timeout: t.Timeout}
	c, err := d.DialContext(ctx, "tcp", u.Host)
	if err != nil {
		return Refused, why(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(t.Timeout))
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", t.V4, t.V4)
	resp, err := http.ReadResponse(bufio.NewReaderSize(c, 4<<10), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return Refused, why(err)
	}
	if resp.StatusCode != http.StatusOK {
		return Refused, "the proxy answers " + resp.Status
	}
	return t.said(c, "connect")
}

// again runs this program again to try TCP, after a change of its own.
func (t *trial) again(ctx context.Context, attr *syscall.SysProcAttr, moved func(pid int) error) (Result, string) {
	if len(t.Self) == 0 {
		return Absent, "this program cannot be run again"
	}
	if !t.V4.IsValid() {
		return Absent, noAddress
	}
	ctx, cancel := context.WithTimeout(ctx, 5*t.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, t.Self[0], t.Self[1:]...)
	cmd.SysProcAttr = attr
	in, err := cmd.StdinPipe()
	if err != nil {
		return Refused, why(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return Refused, why(err)
	}
	if err := cmd.Start(); err != nil {
		return Refused, why(err)
	}
	defer func() { _ = cmd.Wait() }()
	if moved != nil {
		if err := moved(cmd.Process.Pid); err != nil {
			_ = cmd.Process.Kill()
			return Refused, why(err)
		}
	}
	if err := in.Close(); err != nil { // it waits for that
		return Refused, why(err)
	}
	var r Report
	if err := json.NewDecoder(out).Decode(&r); err != nil || len(r.Ways) != 1 {
		return Refused, "it could not be tried there"
	}
	return r.Ways[0].Result, r.Ways[0].Detail
}

// otherUser becomes those who may get out.
func otherUser(ctx context.Context, t *trial) (Result, string) {
	result, detail := Absent, "no user is named that the workload is not"
	for _, uid := range t.Users {
		if uid == os.Getuid() {
			continue
		}
		id := uint32(uid) //nolint:gosec // a number of a user
		result, detail = t.again(ctx, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}, Pdeathsig: syscall.SIGKILL}, nil)
		detail = fmt.Sprintf("uid %d: %s", uid, detail)
		if result == Leaked {
			break
		}
	}
	return result, detail
}

// otherCgroup moves to the cgroup at the root, of which no rule speaks.
func otherCgroup(ctx context.Context, t *trial) (Result, string) {
	const root = "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
		return Absent, "there are no cgroups to be seen"
	}
	return t.again(ctx, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}, func(pid int) error {
		return os.WriteFile(filepath.Join(root, "cgroup.procs"), fmt.Append(nil, pid), 0)
	})
}

// resolver opens the socket of a process that looks names up for whoever asks,
// with questions of its own that no rule of ours is for.
func resolver(path string) func(context.Context, *trial) (Result, string) {
	return func(ctx context.Context, t *trial) (Result, string) {
		d := net.Dialer{Timeout: t.Timeout}
		c, err := d.DialContext(ctx, "unix", path)
		switch {
		case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
			return Absent, "nobody is at " + path
		case err != nil:
			return refused(err)
		}
		c.Close()
		return Leaked, "who opens " + path + " has names looked up outside"
	}
}

// ownNetwork makes a network of its own, where no rule of ours is.
func ownNetwork(ctx context.Context, t *trial) (Result, string) {
	return t.again(ctx, &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}, GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}, nil)
}
