package capture

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxDepth bounds a walk towards pid 1. Linux has no limit of its own; no
// honest process tree comes near this.
const maxDepth = 128

// Inspect describes the process pid. Everything in the result belongs to one
// and the same process: the start time and the executable are read first and
// last, and a difference is ErrNoProcess.
func Inspect(pid int) (Process, error) {
	if pid <= 0 {
		return Process{}, fmt.Errorf("inspect pid %d: %w", pid, ErrNoProcess)
	}
	p := Process{PID: pid}
	dir := "/proc/" + strconv.Itoa(pid)
	var err error
	if p.PPID, p.Start, err = readStat(dir); err != nil {
		return Process{}, fmt.Errorf("inspect pid %d: %w", pid, err)
	}
	if p.ExeDev, p.ExeInode, err = statExe(dir); err != nil {
		return Process{}, fmt.Errorf("inspect pid %d: %w", pid, err)
	}
	if p.ExePath, err = os.Readlink(dir + "/exe"); err != nil {
		return Process{}, fmt.Errorf("inspect pid %d: read executable: %w", pid, procErr(err))
	}
	if err = p.readStatus(dir); err != nil {
		return Process{}, fmt.Errorf("inspect pid %d: %w", pid, err)
	}
	if p.Cgroup, err = readCgroup(dir); err != nil {
		return Process{}, fmt.Errorf("inspect pid %d: %w", pid, err)
	}
	dev, ino, err := statExe(dir)
	if err != nil {
		return Process{}, fmt.Errorf("inspect pid %d: %w", pid, err)
	}
	_, start, err := readStat(dir)
	if err != nil {
		return Process{}, fmt.Errorf("inspect pid %d: %w", pid, err)
	}
	if start != p.Start || dev != p.ExeDev || ino != p.ExeInode {
		return Process{}, fmt.Errorf("inspect pid %d: changed while being read: %w", pid, ErrNoProcess)
	}
	return p, nil
}

// procErr turns "file is gone" under /proc into ErrNoProcess.
func procErr(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return ErrNoProcess
	}
	return err
}

// readStat gives the parent and the start time of /proc/PID/stat. The command
// name may hold blanks and parentheses, so fields count from its last ')'.
// A zombie counts as gone.
func readStat(dir string) (ppid int, start uint64, err error) {
	state, ppid, start, err := readAnyStat(dir)
	if err == nil && (state == 'Z' || state == 'X') {
		return 0, 0, ErrNoProcess
	}
	return ppid, start, err
}

func readAnyStat(dir string) (state byte, ppid int, start uint64, err error) {
	err = withProcFile(dir+"/stat", func(b []byte) error {
		state, ppid, start, err = parseStat(b)
		return err
	})
	if err != nil {
		return 0, 0, 0, fmt.Errorf("read stat: %w", err)
	}
	return state, ppid, start, nil
}

func parseStat(b []byte) (state byte, ppid int, start uint64, err error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, 0, 0, errors.New("no command name in it")
	}
	field := 2 // the start time is field 22
	for f := range bytes.FieldsSeq(b[i+1:]) {
		switch field++; field {
		case 3:
			state = f[0]
		case 4:
			if ppid, err = strconv.Atoi(string(f)); err != nil {
				return 0, 0, 0, fmt.Errorf("parent: %w", err)
			}
		case 22:
			if start, err = strconv.ParseUint(string(f), 10, 64); err != nil {
				return 0, 0, 0, fmt.Errorf("start time: %w", err)
			}
			return state, ppid, start, nil
		}
	}
	return 0, 0, 0, fmt.Errorf("%d fields, want 22 or more", field)
}

func statExe(dir string) (dev, ino uint64, err error) {
	var st unix.Stat_t
	if err := unix.Stat(dir+"/exe", &st); err != nil {
		return 0, 0, fmt.Errorf("stat executable: %w", procErr(err))
	}
	return uint64(st.Dev), st.Ino, nil
}

// readStatus takes the effective user and group and the supplementary groups
// from /proc/PID/status.
func (p *Process) readStatus(dir string) error {
	if err := withProcFile(dir+"/status", p.parseStatus); err != nil {
		return fmt.Errorf("read status: %w", err)
	}
	return nil
}

func (p *Process) parseStatus(b []byte) error {
	var uid, gid, groups bool
	for line := range bytes.Lines(b) {
		var ids []uint32
		var err error
		switch key, val, _ := bytes.Cut(line, []byte{':'}); string(key) {
		case "Uid":
			if ids, err = parseIDs(val); err == nil && len(ids) > 1 {
				p.UID, uid = ids[1], true
			}
		case "Gid":
			if ids, err = parseIDs(val); err == nil && len(ids) > 1 {
				p.GID, gid = ids[1], true
			}
		case "Groups":
			p.Groups, err = parseIDs(val)
			groups = true
		}
		if err != nil {
			return err
		}
		if uid && gid && groups {
			return nil
		}
	}
	return errors.New("no Uid, Gid or Groups line")
}

func parseIDs(b []byte) (out []uint32, err error) {
	for f := range bytes.FieldsSeq(b) {
		n, err := strconv.ParseUint(string(f), 10, 32)
		if err != nil {
			return nil, err
		}
		out = append(out, uint32(n))
	}
	return out, nil
}

func readCgroup(dir string) (path string, err error) {
	err = withProcFile(dir+"/cgroup", func(b []byte) error {
		path = parseCgroup(string(b))
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("read cgroup: %w", err)
	}
	return path, nil
}

// parseCgroup prefers the unified hierarchy ("0::/path"). Where only the old
// hierarchies hold the process, the longest path says most.
func parseCgroup(s string) string {
	longest := ""
	for line := range strings.Lines(s) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 {
			continue
		}
		if f[0] == "0" && f[1] == "" && f[2] != "/" {
			return f[2]
		}
		if len(f[2]) > len(longest) {
			longest = f[2]
		}
	}
	return longest
}

// Started gives the start time of pid, as in Process.Start, for less than what
// Inspect costs.
func Started(pid int) (uint64, error) {
	_, start, err := readStat("/proc/" + strconv.Itoa(pid))
	if err != nil {
		return 0, fmt.Errorf("start time of pid %d: %w", pid, err)
	}
	return start, nil
}

// Ancestors gives the parents of pid, nearest first, up to the first process
// of the pid namespace. A parent that started after its child was not its
// parent when it was read, and is ErrNoProcess.
func Ancestors(pid int) ([]int, error) {
	var out []int
	ppid, start, err := readStat("/proc/" + strconv.Itoa(pid))
	if err != nil {
		return nil, fmt.Errorf("ancestors of pid %d: %w", pid, err)
	}
	for ppid > 0 {
		if len(out) == maxDepth {
			return nil, fmt.Errorf("ancestors of pid %d: more than %d", pid, maxDepth)
		}
		up, at, err := readStat("/proc/" + strconv.Itoa(ppid))
		if err != nil {
			return nil, fmt.Errorf("ancestors of pid %d: parent %d: %w", pid, ppid, err)
		}
		if at > start {
			return nil, fmt.Errorf("ancestors of pid %d: parent %d is younger than its child: %w", pid, ppid, ErrNoProcess)
		}
		out = append(out, ppid)
		ppid, start = up, at
	}
	return out, nil
}

// Children gives the pids whose parent is pid at this moment, ascending, as
// they run and as they wait to be collected.
func Children(pid int) (running, zombies []int, err error) {
	pids, err := listPIDs()
	if err != nil {
		return nil, nil, err
	}
	for _, q := range pids {
		state, ppid, _, err := readAnyStat("/proc/" + strconv.Itoa(q))
		switch {
		case err != nil || ppid != pid || state == 'X':
		case state == 'Z':
			zombies = append(zombies, q)
		default:
			running = append(running, q)
		}
	}
	slices.Sort(running)
	slices.Sort(zombies)
	return running, zombies, nil
}

// listPIDs names every process that is visible.
func listPIDs() ([]int, error) {
	var out []int
	err := eachName("/proc", func(name string) bool {
		if name[0] >= '1' && name[0] <= '9' {
			if n, err := strconv.Atoi(name); err == nil {
				out = append(out, n)
			}
		}
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	return out, nil
}
