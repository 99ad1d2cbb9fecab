package capture

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The test binary plays the other process: CAPTURE_ROLE says which.
func TestMain(m *testing.M) {
	if role := os.Getenv("CAPTURE_ROLE"); role != "" {
		if err := play(role, os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func play(role string, args []string) error {
	in := bufio.NewReader(os.Stdin)
	wait := func() { _, _ = in.ReadString('\n') }
	switch role {
	case "wait":
		fmt.Println("ready")
		wait()
	case "exec": // becomes another program under the same pid
		fmt.Println("ready")
		wait()
		return syscall.Exec(args[0], args, os.Environ())
	case "dial":
		c, err := net.Dial(args[0], args[1])
		if err != nil {
			return err
		}
		defer c.Close()
		fmt.Println("ready")
		wait()
	case "open-and-hand-over": // fd 3 is the way to the one who gets the connection
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: args[0]}); err != nil {
			return err
		}
		if len(args) > 1 {
			if _, err := unix.Write(fd, []byte(args[1])); err != nil {
				return err
			}
		}
		if err := unix.Sendmsg(3, []byte{1}, unix.UnixRights(fd), nil, 0); err != nil {
			return err
		}
		wait()
	}
	return nil
}

type other struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func start(t testing.TB, role string, extra []*os.File, args ...string) *other {
	t.Helper()
	c := exec.Command("/proc/self/exe", args...)
	c.Env = append(os.Environ(), "CAPTURE_ROLE="+role)
	c.ExtraFiles = extra
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); c.Process.Kill(); c.Wait() })
	return &other{c, in, bufio.NewReader(out)}
}

func (o *other) expect(t testing.TB, want string) {
	t.Helper()
	got, err := o.out.ReadString('\n')
	if err != nil || strings.TrimSpace(got) != want {
		t.Fatalf("other process said %q (%v), want %q", got, err, want)
	}
}

func TestInspectSelf(t *testing.T) {
	p, err := Inspect(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	exe, _ := os.Executable()
	if p.PID != os.Getpid() || p.PPID != os.Getppid() || int(p.UID) != os.Geteuid() || int(p.GID) != os.Getegid() || p.ExePath != exe || p.Start == 0 || p.ExeInode == 0 {
		t.Errorf("Inspect(self) = %+v", p)
	}
	q, err := Inspect(os.Getpid())
	if err != nil || !p.Same(q) {
		t.Errorf("a process differs from itself: %+v, %+v, %v", p, q, err)
	}
	data, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := HashExe(os.Getpid()); err != nil || h != sha256.Sum256(data) {
		t.Errorf("HashExe(self) = %x, %v", h, err)
	}
}

func TestInspectRefusesWhatIsNotAProcess(t *testing.T) {
	o := start(t, "wait", nil)
	o.expect(t, "ready")
	o.Process.Kill()
	o.Wait()
	for _, pid := range []int{0, -1, o.Process.Pid, 1 << 30} {
		if p, err := Inspect(pid); !errors.Is(err, ErrNoProcess) {
			t.Errorf("Inspect(%d) = %+v, %v; want ErrNoProcess", pid, p, err)
		}
	}
}

func TestSame(t *testing.T) {
	p := Process{PID: 7, Start: 100, UID: 1, GID: 2, Groups: []uint32{3}, ExeDev: 4, ExeInode: 5, Cgroup: "/a", PPID: 1}
	for name, c := range map[string]struct {
		change func(*Process)
		want   bool
	}{
		"nothing changed":              {func(*Process) {}, true},
		"another parent is the same":   {func(q *Process) { q.PPID = 9 }, true},
		"a reused pid started later":   {func(q *Process) { q.Start++ }, false},
		"another pid":                  {func(q *Process) { q.PID++ }, false},
		"another user":                 {func(q *Process) { q.UID = 0 }, false},
		"another group":                {func(q *Process) { q.GID = 0 }, false},
		"another supplementary group":  {func(q *Process) { q.Groups = []uint32{4} }, false},
		"another executable":           {func(q *Process) { q.ExeInode++ }, false},
		"the inode on another device":  {func(q *Process) { q.ExeDev++ }, false},
		"moved to another cgroup":      {func(q *Process) { q.Cgroup = "/b" }, false},
		"the zero value is no process": {func(q *Process) { *q = Process{} }, false},
	} {
		q := p
		c.change(&q)
		if got := p.Same(q); got != c.want {
			t.Errorf("%s: Same = %v, want %v", name, got, c.want)
		}
	}
	if (Process{}).Same(Process{}) {
		t.Error("two zero values are the same process")
	}
}

func TestExecOfAnotherBinaryInTheSamePIDIsSeen(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	o := start(t, "exec", nil, sleep, "600")
	o.expect(t, "ready")
	before, err := Inspect(o.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(o.in, "\n"); err != nil {
		t.Fatal(err)
	}
	for {
		after, err := Inspect(o.Process.Pid)
		if err == nil && after.ExeInode != before.ExeInode {
			if before.Same(after) {
				t.Errorf("exec was not seen: %+v then %+v", before, after)
			}
			if after.Start != before.Start {
				t.Errorf("exec changed the start time from %d to %d", before.Start, after.Start)
			}
			return
		}
		runtime.Gosched()
	}
}

func TestParseCgroup(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"0::/user.slice/a.scope\n", "/user.slice/a.scope"},
		{"12:pids:/x\n0::/unified\n", "/unified"},
		{"12:pids:/docker/abc\n1:name=systemd:/docker\n0::/\n", "/docker/abc"},
		{"0::/\n", "/"},
		{"", ""},
		{"garbage\n", ""},
		{"0::/with:colon\n", "/with:colon"},
	} {
		if got := parseCgroup(c.in); got != c.want {
			t.Errorf("parseCgroup(%q) = %q, want %q", c.in, got, c.want)
		}
	}
}

func TestAncestorsAndChildren(t *testing.T) {
	o := start(t, "wait", nil)
	o.expect(t, "ready")
	up, err := Ancestors(o.Process.Pid)
	if err != nil || len(up) == 0 || up[0] != os.Getpid() || up[len(up)-1] != 1 {
		t.Errorf("Ancestors = %v, %v; want this process first and pid 1 last", up, err)
	}
	kids, _, err := Children(os.Getpid())
	if err != nil || !strings.Contains(fmt.Sprint(kids), strconv.Itoa(o.Process.Pid)) {
		t.Errorf("Children = %v, %v; want %d among them", kids, err, o.Process.Pid)
	}
	if _, err := Ancestors(1 << 30); !errors.Is(err, ErrNoProcess) {
		t.Errorf("Ancestors of nothing: %v", err)
	}
}

func TestPidfdSeesExit(t *testing.T) {
	o := start(t, "wait", nil)
	o.expect(t, "ready")
	p, err := OpenPidfd(o.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	done := p.Done()
	select {
	case <-done:
		t.Fatal("Done before exit")
	default:
	}
	if !p.Alive() {
		t.Error("a running process is not alive")
	}
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	<-done
	if p.Alive() {
		t.Error("a killed process is alive")
	}
	o.Wait()
	if err := p.Signal(syscall.SIGKILL); err == nil {
		t.Error("signal to a process that is gone succeeded")
	}
}

func TestPidfdCloseEndsDone(t *testing.T) {
	p, err := OpenPidfd(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	done := p.Done()
	p.Close()
	<-done
	if p.Alive() {
		t.Error("a closed Pidfd vouches for its process")
	}
}

func TestAdoptPidfdRefusesNone(t *testing.T) {
	if _, err := AdoptPidfd(-1, 7); err == nil {
		t.Error("descriptor -1 accepted")
	}
}

func BenchmarkInspect(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Inspect(os.Getpid()); err != nil {
			b.Fatal(err)
		}
	}
}

func TestHashFollowsTheContent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for _, text := range []string{"one", "two", "two", ""} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if h, err := HashFile(path); err != nil || h != sha256.Sum256([]byte(text)) {
				t.Errorf("hash of %q = %x, %v", text, h, err)
			}
		}
	}
	if _, err := HashFile("/dev/null"); err == nil {
		t.Error("a device was hashed")
	}
}

func TestParseStat(t *testing.T) {
	const tail = " S 7 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 9"
	for _, c := range []struct {
		in    string
		start uint64
		ok    bool
	}{
		{"1 (a)" + tail, 4242, true},
		{"1 (a b) c) (d)" + tail, 4242, true},
		{"1 (R 99 1)" + tail, 4242, true},
		{"1 (a", 0, false},
		{"1 (a) S 7", 0, false},
		{"1 (a) S x 1", 0, false},
		{"", 0, false},
	} {
		state, ppid, start, err := parseStat([]byte(c.in))
		if (err == nil) != c.ok || c.ok && (state != 'S' || ppid != 7 || start != c.start) {
			t.Errorf("parseStat(%q) = %c, %d, %d, %v", c.in, state, ppid, start, err)
		}
	}
}

func TestParseStatus(t *testing.T) {
	var p Process
	text := "Name:\tUid:\t0\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \nNgid:\t0\n"
	if err := p.parseStatus([]byte(text)); err != nil || p.UID != 2 || p.GID != 6 || len(p.Groups) != 2 || p.Groups[1] != 10 {
		t.Errorf("got %+v, %v", p, err)
	}
	for _, bad := range []string{"", "Uid:\t1\t2\n", "Uid:\t1\nGid:\t1\nGroups:\n", "Uid:\tx\ty\n"} {
		if err := new(Process).parseStatus([]byte(bad)); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}
