package isolate

import (
	"encoding/binary"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// The filter is run as the kernel runs it, with the answers of each machine.
func TestFilter(t *testing.T) {
	const allow, gone, unknown = unix.SECCOMP_RET_ALLOW, unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS), unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)
	for name, m := range machines {
		own, other := m[0], m[1]
		vm, err := bpf.NewVM(filter(own, other)) // reads big-endian packets
		if err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			what           string
			arch, call, at uint32
			want           uint32
		}{
			{"a socket of IPv4", own.arch, own.socket, unix.AF_INET, allow},
			{"a socket of IPv6", own.arch, own.socket, unix.AF_INET6, allow},
			{"a Unix socket", own.arch, own.socket, unix.AF_UNIX, allow},
			{"a pair", own.arch, own.paired, unix.AF_UNIX, allow},
			{"netlink", own.arch, own.socket, unix.AF_NETLINK, allow},
			{"the host", own.arch, own.socket, unix.AF_VSOCK, unknown},
			{"frames", own.arch, own.socket, unix.AF_PACKET, unknown},
			{"a pair of the host", own.arch, own.paired, unix.AF_VSOCK, unknown},
			{"no family", own.arch, own.socket, 0, unknown},
			{"io_uring", own.arch, ioUring, 0, gone},
			{"another call", own.arch, 1, unix.AF_VSOCK, allow},
			{"a number of x32", own.arch, own.socket | x32, unix.AF_INET, gone},
			{"another machine's socket", other.arch, other.socket, unix.AF_INET, gone},
			{"its pair", other.arch, other.paired, unix.AF_UNIX, gone},
			{"its io_uring", other.arch, ioUring, 0, gone},
			{"its other calls", other.arch, 4, 0, allow},
			{"a third machine", 0x1234, 1, 0, gone},
		} {
			in := make([]byte, 64)
			binary.BigEndian.PutUint32(in[offsetCall:], tt.call)
			binary.BigEndian.PutUint32(in[offsetArch:], tt.arch)
			binary.BigEndian.PutUint32(in[offsetArg:], tt.at)
			got, err := vm.Run(in)
			if err != nil || uint32(got) != tt.want { //nolint:gosec // 32 bits of the machine
				t.Errorf("%s: %s: %#x %v, want %#x", name, tt.what, got, err, tt.want)
			}
		}
		if other.call != noCall {
			in := make([]byte, 64)
			binary.BigEndian.PutUint32(in[offsetCall:], other.call)
			binary.BigEndian.PutUint32(in[offsetArch:], other.arch)
			if got, err := vm.Run(in); err != nil || uint32(got) != gone { //nolint:gosec // 32 bits of the machine
				t.Errorf("%s: socketcall: %#x %v", name, got, err)
			}
		}
	}
}
