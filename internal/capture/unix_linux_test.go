package capture

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func listen(t *testing.T) (*UnixListener, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := ListenUnix(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, path
}

func TestUnixPeerReadsItsOpener(t *testing.T) {
	l, path := listen(t)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	p := s.(*UnixPeer)
	if want := (Cred{os.Getpid(), uint32(os.Getuid()), uint32(os.Getgid())}); p.Cred() != want {
		t.Errorf("Cred = %+v, want %+v", p.Cred(), want)
	}
	fd, err := p.Pidfd()
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	if fd.PID() != os.Getpid() || !fd.Alive() {
		t.Errorf("Pidfd: pid %d alive %v", fd.PID(), fd.Alive())
	}
	c.Close()
	got, err := io.ReadAll(s)
	if err != nil || string(got) != "hello" {
		t.Errorf("read %q, %v", got, err)
	}
}

// receive takes the connection that the other process opened.
func receive(t *testing.T, sock int) net.Conn {
	t.Helper()
	oob, b := make([]byte, 128), make([]byte, 1)
	_, n, _, _, err := unix.Recvmsg(sock, b, oob, 0)
	if err != nil {
		t.Fatal(err)
	}
	m, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(m) != 1 {
		t.Fatalf("control messages %v, %v", m, err)
	}
	fds, err := unix.ParseUnixRights(&m[0])
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[0]), "handed over")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func handOver(t *testing.T, args ...string) (net.Conn, *other) {
	t.Helper()
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(sp[0]) })
	theirs := os.NewFile(uintptr(sp[1]), "pair")
	o := start(t, "open-and-hand-over", []*os.File{theirs}, args...)
	theirs.Close()
	return receive(t, sp[0]), o
}

func TestHandedOverConnectionIsRefused(t *testing.T) {
	l, path := listen(t)
	c, o := handOver(t, path)
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if got := s.(*UnixPeer).Cred().PID; got != o.Process.Pid {
		t.Fatalf("opener is pid %d, want %d", got, o.Process.Pid)
	}
	if _, err := c.Write([]byte("give me the key")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 64)
	n, err := s.Read(b)
	if n != 0 || !errors.Is(err, ErrSenderChanged) {
		t.Fatalf("Read = %d, %v; want 0, ErrSenderChanged", n, err)
	}
	if strings.Trim(string(b), "\x00") != "" {
		t.Error("the refused bytes were left in the buffer")
	}
	if _, err := s.Write([]byte("x")); err == nil {
		t.Error("the connection stayed open")
	}
}

func TestBytesOfTwoWritersAreNotJoined(t *testing.T) {
	l, path := listen(t)
	c, _ := handOver(t, path, "honest ")
	if _, err := c.Write([]byte("stolen")); err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(s)
	if string(got) != "honest " || !errors.Is(err, ErrSenderChanged) {
		t.Errorf("read %q, %v; want only what the opener wrote, then ErrSenderChanged", got, err)
	}
}

func TestDescriptorsAreRefused(t *testing.T) {
	l, path := listen(t)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, _, err := c.(*net.UnixConn).WriteMsgUnix([]byte("x"), unix.UnixRights(0), nil); err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	before, _ := os.ReadDir("/proc/self/fd")
	if n, err := s.Read(make([]byte, 8)); n != 0 || err == nil {
		t.Errorf("Read = %d, %v; want a refusal", n, err)
	}
	after, _ := os.ReadDir("/proc/self/fd")
	if len(after) > len(before) {
		t.Errorf("descriptors grew from %d to %d", len(before), len(after))
	}
}

func TestPeerThatExitedBeforeWeAskedIsRefused(t *testing.T) {
	l, path := listen(t)
	_, o := handOver(t, path)
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	o.Process.Kill()
	o.Wait()
	fd, err := s.(*UnixPeer).Pidfd()
	if err == nil { // newer kernels keep the pidfd of a reaped process
		defer fd.Close()
		if fd.Alive() {
			t.Error("a process that is gone is alive")
		}
	} else if !errors.Is(err, ErrNoProcess) {
		t.Errorf("Pidfd: %v, want ErrNoProcess", err)
	}
}

func TestListenUnix(t *testing.T) {
	dir := t.TempDir()
	old := unix.Umask(0)
	defer unix.Umask(old)
	path := filepath.Join(dir, "s")
	l, err := ListenUnix(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", fi.Mode(), err)
	}
	if _, err := ListenUnix(path, 0o600); err == nil || !strings.Contains(err.Error(), "another process listens there") {
		t.Errorf("second listener: %v", err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	l, err = ListenUnix(path, 0o600)
	if err != nil {
		t.Fatalf("stale socket was not replaced: %v", err)
	}
	l.Close()
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(file, 0o600); err == nil {
		t.Error("a regular file was replaced by a socket")
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Error("a regular file was harmed")
	}
}
