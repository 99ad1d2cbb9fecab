package capture

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Words is a file mapped into memory, as numbers that are read and written
// atomically. What is written survives the death of the process at any
// instant; Sync makes it survive that of the machine. The blocks of the file
// must be there already: writing into a hole of a full disk ends the process.
// The mapping stays until the process ends, so that no late writer faults.
type Words struct {
	// W is the file as 64-bit numbers, B the same memory as bytes.
	W []uint64
	B []byte

	mapped bool
}

// NewWords gives n numbers in memory alone.
func NewWords(n int) *Words {
	w := make([]uint64, n)
	return &Words{W: w, B: unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(w))), n*8)}
}

// MapWords maps the first n numbers of a file, which may be closed afterwards.
func MapWords(f *os.File, n int) (*Words, error) {
	if st, err := f.Stat(); err != nil || st.Size() < int64(n)*8 {
		return nil, fmt.Errorf("map %s: it is shorter than %d bytes", f.Name(), n*8)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, n*8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", f.Name(), err)
	}
	// A mapping begins at a page, so that every number is aligned.
	return &Words{W: unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), n), B: b, mapped: true}, nil
}

// Sync returns once what was written before is on the disk.
func (w *Words) Sync() error {
	if !w.mapped {
		return nil
	}
	return unix.Msync(w.B, unix.MS_SYNC)
}
