package sched

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/internal/meshtest"
)

// policies counts the threads of a process by their policy.
func policies(t *testing.T, process string) map[uint32]int {
	t.Helper()
	tasks, err := os.ReadDir(filepath.Join("/proc", process, "task"))
	if err != nil {
		t.Fatal(err)
	}
	got := map[uint32]int{}
	for _, task := range tasks {
		id, _ := strconv.Atoi(task.Name())
		if a, err := unix.SchedGetAttr(id, 0); err == nil {
			got[a.Policy]++
		}
	}
	return got
}

// TestFit has a process be idle and busy, and looks each time at all of its threads,
// and at a program that it starts.
func TestFit(t *testing.T) {
	if !willing() {
		meshtest.Unable(t, "these tests run by a scheduling policy of their own")
	}
	steps := []struct {
		computed time.Duration
		policy   uint32
	}{{0, unix.SCHED_NORMAL}, {time.Hour, unix.SCHED_BATCH}, {time.Hour, unix.SCHED_BATCH}, {0, unix.SCHED_NORMAL}, {0, unix.SCHED_NORMAL}}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var spent time.Duration
	next := -1 // the first time Fit asks where it begins
	err := Fit(ctx, func() time.Duration {
		if last := next - 1; last >= 0 && last < len(steps) { // which it has done what follows from
			if got := policies(t, "self"); got[steps[last].policy] == 0 || len(got) != 1 {
				t.Errorf("step %d: threads by policy %v, want all %d", last, got, steps[last].policy)
			}
			started(t)
		}
		if next >= 0 && next < len(steps) {
			spent += steps[next].computed
		}
		if next == len(steps) {
			stop()
		}
		next++
		go func() { runtime.LockOSThread(); <-ctx.Done() }() // a thread more, for the next look
		return spent
	})
	if err != nil {
		t.Error(err)
	}
}

// started starts a program, which goes by the usual policy.
func started(t *testing.T) {
	t.Helper()
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := Start(cmd); err != nil {
		t.Fatal(err)
	}
	if got := policies(t, strconv.Itoa(cmd.Process.Pid)); got[unix.SCHED_NORMAL] == 0 || len(got) != 1 {
		t.Errorf("a program that was started has threads by policy %v", got)
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// Who has chosen a policy is not argued with.
func TestFitLeavesOthersAlone(t *testing.T) {
	cmd := exec.Command(os.Args[0], "-test.run=^TestFit$", "-test.v")
	cmd.Env = append(os.Environ(), "CI=")
	chosen := make(chan error, 1)
	go func() { // the thread ends with its goroutine, since it stays locked
		runtime.LockOSThread()
		a, err := unix.SchedGetAttr(0, 0)
		if err == nil {
			a.Policy = unix.SCHED_IDLE
			err = unix.SchedSetAttr(0, a, 0)
		}
		if err == nil {
			var out []byte
			out, err = cmd.CombinedOutput()
			if err == nil && !strings.Contains(string(out), "policy of their own") {
				t.Errorf("%s", out)
			}
		}
		chosen <- err
	}()
	if err := <-chosen; err != nil {
		t.Fatal(err)
	}
}
