package socket

import (
	"sync"
	"sync/atomic"
)

// The sizes of buffers. A side that gets little at a time holds a small one, a
// side in the middle of a transfer a large one: memory follows the bytes that
// move, not the connections that are open.
const (
	Small = 16 << 10
	// Large is what crosses the kernel in one call.
	Large = 256 << 10
	// overhead is what TLS adds to Large bytes, 22 to each 16 KiB.
	overhead = 1 << 10
	// maxLarge bounds the large buffers of a process: 64 MiB. A transfer that
	// finds none left makes do with a small one.
	maxLarge = 256
)

// A buffer belongs to a pool. The nil *buffer is none.
type buffer struct{ bytes []byte }

var (
	smalls  = sync.Pool{New: func() any { return &buffer{make([]byte, Small)} }}
	larges  = sync.Pool{New: func() any { return &buffer{make([]byte, Large+overhead)} }}
	largeIn atomic.Int32 // how many are in use
)

// room is where data goes that will be sent on within Large and overhead.
func (b *buffer) room() []byte { return b.bytes[:min(len(b.bytes), Large)] }

// get gives a buffer, a large one if it may.
func get(large bool) *buffer {
	if large {
		if largeIn.Add(1) <= maxLarge {
			return larges.Get().(*buffer)
		}
		largeIn.Add(-1)
	}
	return smalls.Get().(*buffer)
}

// put gives b back and returns nil.
func (b *buffer) put() *buffer {
	switch {
	case b == nil:
	case len(b.bytes) == Small:
		smalls.Put(b)
	default:
		largeIn.Add(-1)
		larges.Put(b)
	}
	return nil
}
