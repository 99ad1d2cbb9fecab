package attest

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"sallyport/internal/capture"
	"sallyport/internal/mesh"
)

// The test binary plays the programs that are started: ATTEST_ROLE says which.
func TestMain(m *testing.M) {
	role := os.Getenv("ATTEST_ROLE")
	if role == "" {
		os.Exit(m.Run())
	}
	in := bufio.NewReader(os.Stdin)
	switch role {
	case "wait": // until input ends
		fmt.Println(os.Getpid())
		io.Copy(io.Discard, in)
	case "tree": // a middle that starts a leaf, and ends on the first line of input
		c := exec.Command("/proc/self/exe")
		c.Env = []string{"ATTEST_ROLE=leaf"}
		c.Stdout = os.Stdout
		pipe, err := c.StdinPipe()
		if err != nil {
			os.Exit(3)
		}
		defer pipe.Close()
		if err := c.Start(); err != nil {
			os.Exit(3)
		}
		io.Copy(io.Discard, in)
	case "top": // starts a middle whose input it holds; "\n" ends the middle, end of input ends all
		c := exec.Command("/proc/self/exe")
		c.Env = []string{"ATTEST_ROLE=tree"}
		c.Stdout = os.Stdout
		pipe, err := c.StdinPipe()
		if err != nil || c.Start() != nil {
			os.Exit(3)
		}
		in.ReadString('\n')
		pipe.Close()
		c.Wait()
		fmt.Println("middle ended")
		io.Copy(io.Discard, in)
	case "leaf": // lives until it is killed
		fmt.Println(os.Getpid())
		select {}
	case "exit":
		os.Exit(7)
	}
	os.Exit(0)
}

type started struct {
	*Child
	in  io.WriteCloser
	out *bufio.Reader
}

func startChild(t *testing.T, role string) started {
	t.Helper()
	ir, iw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	or, ow, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	exe, _ := os.Executable()
	c, err := StartChild(Spec{Path: exe, Env: []string{"ATTEST_ROLE=" + role}, Stdin: ir, Stdout: ow, Stderr: os.Stderr})
	ir.Close()
	ow.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Signal(syscall.SIGKILL); c.Wait(); iw.Close(); or.Close() })
	return started{c, iw, bufio.NewReader(or)}
}

func (s started) line(t *testing.T) string {
	t.Helper()
	l, err := s.out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(l)
}

func (s started) pidLine(t *testing.T) int {
	t.Helper()
	n, err := strconv.Atoi(s.line(t))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func inspect(t *testing.T, pid int) capture.Process {
	t.Helper()
	p, err := capture.Inspect(pid)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestChildThatExecs has programs in the tree though they become other programs
// from their first moment on, as what a shell script ends with does.
func TestChildThatExecs(t *testing.T) {
	sh, err := os.ReadFile("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	one, two := filepath.Join(t.TempDir(), "one"), filepath.Join(t.TempDir(), "two")
	if err := errors.Join(os.WriteFile(one, sh, 0o755), os.WriteFile(two, sh, 0o755)); err != nil {
		t.Fatal(err)
	}
	const script = `exec "$2" -c "$0" "$0" "$2" "$1"` // for ever, by turns
	for range 20 {
		c, err := StartChild(Spec{Path: one, Args: []string{"-c", script, script, one, two}})
		if err != nil {
			t.Fatal(err)
		}
		if !c.Contains(c.PID()) {
			t.Error("the program is not in its own tree")
		}
		c.Signal(syscall.SIGKILL)
		c.Wait()
	}
}

func TestGatherChild(t *testing.T) {
	c := startChild(t, "wait")
	if got := c.pidLine(t); got != c.PID() {
		t.Fatalf("pid %d, want %d", got, c.PID())
	}
	p := inspect(t, c.PID())
	got, err := Gather(p, c)
	if err != nil {
		t.Fatal(err)
	}
	exe, _ := os.Executable()
	data, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	hash := hex.EncodeToString(sum[:])
	for _, want := range []string{
		"unix:uid:" + strconv.Itoa(os.Geteuid()), "unix:gid:" + strconv.Itoa(os.Getegid()), "unix:path:" + exe,
		"unix:sha256:" + hash, "cgroup:path:" + p.Cgroup, "child:true", "child:sha256:" + hash,
	} {
		if !slices.ContainsFunc(got, func(s mesh.Selector) bool { return s.String() == want }) {
			t.Errorf("no selector %s in %v", want, got)
		}
	}
	none, err := Gather(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range none {
		if s.Type == "child" || s.Type == "self" {
			t.Errorf("selector %s without a tree", s)
		}
	}
}

func TestGatherOfAStrangerAndOfSelf(t *testing.T) {
	c := startChild(t, "wait")
	c.line(t)
	other := exec.Command("/proc/self/exe") // started by this process, but not as the Child
	other.Env = []string{"ATTEST_ROLE=wait"}
	pipe, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { pipe.Close(); other.Wait() }()
	got, err := Gather(inspect(t, other.Process.Pid), c)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range got {
		if s.Type == "child" || s.Type == "self" {
			t.Errorf("a stranger has %s", s)
		}
	}
	self, err := Gather(inspect(t, os.Getpid()), nil)
	if err != nil || !slices.Contains(self, mesh.Selector{Type: "self", Value: "true"}) {
		t.Errorf("this process has %v, %v", self, err)
	}
}

// In a mount namespace of its own a process puts any file at any path.
func TestAPathCountsOnlyWhereItMeansTheSameFile(t *testing.T) {
	c := startChild(t, "wait")
	c.line(t)
	p := inspect(t, c.PID())
	path := mesh.Selector{Type: "unix", Value: "path:" + p.ExePath}
	if got, err := Gather(p, c); err != nil || !slices.Contains(got, path) {
		t.Errorf("the true path is missing: %v, %v", got, err)
	}
	for _, lie := range []string{"/bin/sh", filepath.Join(t.TempDir(), "absent"), ""} {
		p.ExePath = lie
		got, err := Gather(p, c)
		if err != nil || slices.ContainsFunc(got, func(s mesh.Selector) bool { return s.Type == "unix" && strings.HasPrefix(s.Value, "path:") }) {
			t.Errorf("executable %s is said to be at %q: %v, %v", path.Value, lie, got, err)
		}
	}
}

func TestGatherRefusesAnotherProcessUnderThePID(t *testing.T) {
	c := startChild(t, "wait")
	c.line(t)
	p := inspect(t, c.PID())
	for name, change := range map[string]func(*capture.Process){
		"reused pid":    func(p *capture.Process) { p.Start++ },
		"other program": func(p *capture.Process) { p.ExeInode++ },
		"other user":    func(p *capture.Process) { p.UID++ },
	} {
		q := p
		change(&q)
		if _, err := Gather(q, c); !errors.Is(err, capture.ErrNoProcess) {
			t.Errorf("%s: %v", name, err)
		}
	}
	c.Signal(syscall.SIGKILL)
	c.Wait()
	if _, err := Gather(p, c); !errors.Is(err, capture.ErrNoProcess) {
		t.Errorf("exited: %v", err)
	}
}

func TestMatchWantsEverySelector(t *testing.T) {
	sel := func(ss ...string) (out []mesh.Selector) {
		for _, s := range ss {
			typ, val, _ := strings.Cut(s, ":")
			out = append(out, mesh.Selector{Type: typ, Value: val})
		}
		return out
	}
	entries := []mesh.Entry{
		{ID: "child", Selectors: sel("child:true")},
		{ID: "both", Selectors: sel("unix:uid:1000", "cgroup:path:/a")},
		{ID: "none"},
		{ID: "uid", Selectors: sel("unix:uid:1000")},
	}
	for _, c := range []struct {
		have []mesh.Selector
		want string
	}{
		{nil, ""},
		{sel("unix:uid:1000"), "uid"},
		{sel("unix:uid:1000", "cgroup:path:/a", "unix:gid:7"), "both uid"},
		{sel("unix:uid:10000"), ""},
		{sel("unix:gid:1000", "cgroup:path:/a"), ""},
		{sel("child:true", "unix:uid:1000"), "child uid"},
		{sel("child:True"), ""},
	} {
		var got []string
		for _, e := range Match(entries, c.have) {
			got = append(got, e.ID)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("Match with %v = %v, want %s", c.have, got, c.want)
		}
	}
}

func TestTree(t *testing.T) {
	c := startChild(t, "top")
	leaf := c.pidLine(t)
	if !c.Contains(c.PID()) || !c.Contains(leaf) {
		t.Fatalf("the program or its descendant %d is not in the tree", leaf)
	}
	for name, pid := range map[string]int{"this process": os.Getpid(), "its parent": os.Getppid(), "init": 1, "nothing": 1 << 30, "zero": 0, "negative": -1} {
		if c.Contains(pid) {
			t.Errorf("%s is in the tree", name)
		}
	}
	io.WriteString(c.in, "\n")
	if got := c.line(t); got != "middle ended" {
		t.Fatal(got)
	}
	up, err := capture.Ancestors(leaf)
	if err != nil || up[0] != os.Getpid() {
		t.Fatalf("the orphan's parents are %v, %v; want this process first", up, err)
	}
	if !c.Contains(leaf) {
		t.Error("an orphan that was seen in the tree left it")
	}
	fresh := &Child{pid: c.pid, start: c.start, pidfd: c.pidfd, seen: map[int]uint64{}}
	if fresh.Contains(leaf) {
		t.Error("an orphan that was never seen is in the tree")
	}
	held, err := capture.OpenPidfd(leaf)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	c.in.Close()
	if got := c.Wait(); got != 0 {
		t.Errorf("status %d", got)
	}
	<-held.Done() // what the program left behind in its group is killed
	if c.Contains(leaf) || c.Contains(c.PID()) {
		t.Error("the tree outlived its program")
	}
	capture.Reap(leaf)
}

func BenchmarkGatherChild(b *testing.B) {
	c, err := StartChild(Spec{Path: "sleep", Args: []string{"600"}})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { c.Signal(syscall.SIGKILL); c.Wait() }()
	p, err := capture.Inspect(c.PID())
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := Gather(p, c); err != nil {
			b.Fatal(err)
		}
	}
}

func TestStatus(t *testing.T) {
	if got := startChild(t, "exit").Wait(); got != 7 {
		t.Errorf("status %d, want 7", got)
	}
	c := startChild(t, "wait")
	c.line(t)
	if err := c.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := c.Wait(); got != 128+15 {
		t.Errorf("status %d, want 143", got)
	}
}

func TestRunPassesSignalsOn(t *testing.T) {
	c := startChild(t, "wait")
	c.line(t)
	// Taken here as well, so that it does not end this process before Run has
	// begun to take it.
	mine := make(chan os.Signal, 1)
	signal.Notify(mine, syscall.SIGTERM)
	defer signal.Stop(mine)
	done := make(chan error)
	go func() { done <- c.Run(t.Context(), true) }()
	for ended := false; !ended; {
		syscall.Kill(os.Getpid(), syscall.SIGTERM)
		<-mine
		select {
		case <-c.Done():
			ended = true
		default:
		}
	}
	if got := c.Wait(); got != 128+int(syscall.SIGTERM) {
		t.Errorf("status %d", got)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestStartChildSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		spec Spec
		want string
	}{
		{Spec{}, "no program given"},
		{Spec{Path: "no-such-program-here"}, "executable file not found"},
		{Spec{Path: dir + "/gone"}, "no such file"},
		{Spec{Path: plain}, "permission denied"},
		{Spec{Path: "/bin/sh", Dir: dir + "/gone"}, "no such file"},
	} {
		if _, err := StartChild(c.spec); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.spec, err, c.want)
		}
	}
}
