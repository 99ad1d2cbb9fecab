package capture

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// Files under /proc are read with bare system calls: os.File would first ask
// the poller to take each of them, which it cannot, and costs twice the time.

// maxProcFile bounds a file of /proc that describes one process; status of a
// process with 65,536 groups stays below it.
const maxProcFile = 1 << 20

var procBuffers = sync.Pool{New: func() any { b := make([]byte, 4096); return &b }}

// withProcFile gives the content of path to use, which must not keep it.
func withProcFile(path string, use func([]byte) error) error {
	fd, err := open(path, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	p := procBuffers.Get().(*[]byte)
	defer procBuffers.Put(p)
	n := 0
	for {
		if n == len(*p) {
			if n >= maxProcFile {
				return fmt.Errorf("read %s: longer than %d bytes", path, maxProcFile)
			}
			bigger := make([]byte, 2*n)
			copy(bigger, *p)
			*p = bigger
		}
		m, err := unix.Read(fd, (*p)[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return procErr(err)
		}
		if m <= 0 {
			return use((*p)[:n])
		}
		n += m
	}
}

func open(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, procErr(err)
		}
	}
}

// eachName calls use for each name in the directory until it returns false.
func eachName(path string, use func(name string) bool) error {
	fd, err := open(path, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	p := procBuffers.Get().(*[]byte)
	defer procBuffers.Put(p)
	var names []string
	for {
		n, err := unix.ReadDirent(fd, *p)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return procErr(err)
		}
		if n <= 0 {
			return nil
		}
		_, _, names = unix.ParseDirent((*p)[:n], -1, names[:0])
		for _, name := range names {
			if !use(name) {
				return nil
			}
		}
	}
}
