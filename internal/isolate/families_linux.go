package isolate

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Where the kernel puts what a filter looks at: struct seccomp_data, of
// little-endian machines.
const (
	offsetCall = 0
	offsetArch = 4
	offsetArg  = 16
)

// x32 is set in the numbers of the calls of that ABI.
const x32 = 0x40000000

// families are what the program may have sockets of. Others lead past its
// namespace, as AF_VSOCK does to the host of a virtual machine, or are of no use
// in it.
var families = []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK}

// calls are the numbers by which a machine makes sockets.
type calls struct {
	arch           uint32
	socket, paired uint32
	call           uint32 // socketcall, or noCall
}

const noCall = 1<<32 - 1

// machines are what a kernel runs for GOARCH, the first as we are.
var machines = map[string][2]calls{
	"amd64": {{unix.AUDIT_ARCH_X86_64, 41, 53, noCall}, {unix.AUDIT_ARCH_I386, 359, 360, 102}},
	"arm64": {{unix.AUDIT_ARCH_AARCH64, 198, 199, noCall}, {unix.AUDIT_ARCH_ARM, 281, 288, noCall}},
}

// ioUring makes sockets that no filter sees. Its number is the same everywhere.
const ioUring = 425

// families of sockets that are not for the program cannot be had by this thread
// any more, nor by what it executes or starts.
func holdFamilies() error {
	m, ok := machines[runtime.GOARCH]
	if !ok {
		return nil // a machine that nobody has tried it on
	}
	raw, err := bpf.Assemble(filter(m[0], m[1]))
	if err != nil {
		return err
	}
	list := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		list[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	prog := unix.SockFprog{Len: uint16(len(list)), Filter: &list[0]} //nolint:gosec // some thirty
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0); err != nil {
		return fmt.Errorf("forbid other families of sockets: %w", err)
	}
	runtime.KeepAlive(list)
	return nil
}

// filter lets everything be called but sockets of other families, calls of
// io_uring, and sockets by another machine's numbers, for which it does not read
// the family: programs of 32 bits that know no more than those go without.
func filter(own, other calls) (p []bpf.Instruction) {
	refuse := func(no uint32) bpf.Instruction { return bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | no} }
	p = append(p,
		bpf.LoadAbsolute{Off: offsetArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: own.arch, SkipTrue: 9},
		// Not our own numbers.
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: other.arch, SkipTrue: 1},
		refuse(uint32(unix.ENOSYS)),
		bpf.LoadAbsolute{Off: offsetCall, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: other.socket, SkipTrue: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: other.paired, SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: other.call, SkipTrue: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: ioUring, SkipTrue: 1},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
		refuse(uint32(unix.ENOSYS)),
		// Our own.
		bpf.LoadAbsolute{Off: offsetCall, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: x32, SkipTrue: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: ioUring, SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: own.socket, SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: own.paired, SkipTrue: 2},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
		refuse(uint32(unix.ENOSYS)),
		bpf.LoadAbsolute{Off: offsetArg, Size: 4},
	)
	for i, f := range families {
		p = append(p, bpf.JumpIf{Cond: bpf.JumpEqual, Val: f, SkipTrue: uint8(len(families) - i)}) //nolint:gosec // four
	}
	return append(p, refuse(uint32(unix.EAFNOSUPPORT)), bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW})
}
