package daemon

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Conceal closes this process to others of the same user that have no privilege:
// its memory, its descriptors, and by /proc/PID/root its files, where processes of
// several containers see each other. It also writes no core.
//
// What is its own it goes on reading in /proc/self, but for a kernel before 5.14,
// on which the way to the pid of a pidfd would be closed: there all stays as it
// was. A process that is to give a child a namespace of users cannot be concealed,
// because the kernel would not let it write who is who in there.
func Conceal() {
	before, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil || before != 1 { // it is concealed
		return
	}
	if unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) == nil && !readsItself() {
		_ = unix.Prctl(unix.PR_SET_DUMPABLE, uintptr(before), 0, 0, 0)
	}
}

func readsItself() bool {
	f, err := os.Open(os.DevNull)
	if err != nil {
		return false
	}
	defer f.Close()
	_, err = os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(int(f.Fd())))
	return err == nil
}
