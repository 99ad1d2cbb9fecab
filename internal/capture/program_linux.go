package capture

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"syscall"
)

// ForgetProgram has the kernel unmap the pages of this program's file that are
// only read, and those of files that are shared with it: what is still of use
// comes back from its cache, and what only the start has needed does not count as
// memory of the process any more.
func ForgetProgram() error {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return err
	}
	defer maps.Close()
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		var from, to uintptr
		var mode string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &mode); err != nil {
			return fmt.Errorf("read /proc/self/maps: %w", err)
		}
		// What was written to a private mapping is nowhere else.
		shared := mode[3] == 's' && strings.Contains(lines.Text(), " /")
		if !shared && (mode[1] == 'w' || !strings.HasSuffix(lines.Text(), " "+exe)) {
			continue
		}
		if _, _, e := syscall.Syscall(syscall.SYS_MADVISE, from, to-from, syscall.MADV_DONTNEED); e != 0 {
			return os.NewSyscallError("madvise", e)
		}
	}
	return lines.Err()
}
