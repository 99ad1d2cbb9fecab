// Package capture tells what the kernel knows about the other end of a local
// connection: its process, credentials, executable and cgroup. It also reads and
// writes connections by bare system calls.
//
// It asks and reports; it holds no policy and never decides who may call. It is
// the only package that may use unsafe. The one goroutine it owns waits on behalf
// of each Pidfd whose Done was asked for, and ends when the Pidfd is closed.
package capture

import (
	"errors"
	"slices"
)

var (
	// ErrNoProcess says that the process is gone, or was replaced while it was
	// looked at.
	ErrNoProcess = errors.New("no such process: it has exited or its pid was reused")
	// ErrNoOwner says that no visible process holds the connection.
	ErrNoOwner = errors.New("no process found that owns the connection: it is closed or belongs to a process this one may not see")
	// ErrSpent says that a connection at rest must not be used any more.
	ErrSpent = errors.New("connection was closed by the other end, or it has said what nobody asked for")
	// ErrSenderChanged says that a message on a Unix connection was written by
	// another process than the one that opened it.
	ErrSenderChanged = errors.New("message written by another process than the one that opened the connection: connections cannot be handed over")
)

// A Cred is what the kernel recorded of the process that opened a Unix socket
// at the time it did. PID is never 0.
type Cred struct {
	PID int
	UID uint32
	GID uint32
}

// A Process describes a process at one moment.
type Process struct {
	PID int
	// Start is the time the process was started, in clock ticks since boot.
	// A pid and its Start together are not reused while the machine is up.
	Start uint64
	// UID and GID are the effective ones, Groups the supplementary ones.
	UID, GID uint32
	Groups   []uint32
	// ExeDev and ExeInode name the executable file even when its path was
	// renamed or written anew.
	ExeDev, ExeInode uint64
	ExePath          string
	// Cgroup is the path in the unified hierarchy, else the line of
	// /proc/PID/cgroup with the longest path.
	Cgroup string
	PPID   int
}

// Same reports whether q is the same process in the same state as p: same pid
// and start time, user, groups, executable and cgroup. The parent may differ,
// because a process whose parent exits is given another.
func (p Process) Same(q Process) bool {
	return p.PID != 0 && p.PID == q.PID && p.Start == q.Start &&
		p.UID == q.UID && p.GID == q.GID && slices.Equal(p.Groups, q.Groups) &&
		p.ExeDev == q.ExeDev && p.ExeInode == q.ExeInode && p.Cgroup == q.Cgroup
}
