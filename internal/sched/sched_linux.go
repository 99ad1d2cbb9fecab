package sched

import (
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// telling is held while threads are told, and while one of them starts a program,
// which goes on by the policy of who has started it.
var telling sync.Mutex

// willing says whether this process goes by the usual policy, or by ours, which it
// has from who has started it anew.
func willing() bool {
	a, err := unix.SchedGetAttr(0, 0)
	return err == nil && (a.Policy == unix.SCHED_NORMAL || a.Policy == unix.SCHED_BATCH)
}

// tell has every thread go by one policy, and looks again for those that one made
// which was not told yet. Later ones have it from who makes them.
func tell(batch bool) error {
	telling.Lock()
	defer telling.Unlock()
	for {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		changed := false
		for _, t := range tasks {
			id, err := strconv.Atoi(t.Name())
			if err != nil {
				return err
			}
			was, err := choose(id, batch)
			if err != nil && !errors.Is(err, unix.ESRCH) { // it has ended
				return err
			}
			changed = changed || err == nil && was != batch
		}
		if !changed {
			return nil
		}
	}
}

// choose has a thread, of the number 0 this one, go by a policy, leaves its other
// settings, and says by which of the two it went.
func choose(thread int, batch bool) (was bool, err error) {
	a, err := unix.SchedGetAttr(thread, 0)
	if err != nil {
		return false, err
	}
	if was = a.Policy == unix.SCHED_BATCH; was == batch {
		return was, nil
	}
	a.Policy = unix.SCHED_NORMAL
	if batch {
		a.Policy = unix.SCHED_BATCH
	}
	return was, unix.SchedSetAttr(thread, a, 0)
}

// Start starts a program that goes by the usual policy, whatever this process does.
func Start(cmd *exec.Cmd) error {
	telling.Lock()
	defer telling.Unlock()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if was, err := choose(0, false); was && err == nil { // else the program is worth more than its policy
		defer func() { _, _ = choose(0, true) }()
	}
	return cmd.Start()
}
