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
	// Large is what crosses the kernel in one call. Twice as much is not faster,
	// and does not stay in the cache between the kernel and the cipher.
	Large = 128 << 10
	// smallMore and largeMore are what a protocol may add to so many bytes: TLS
	// puts 22 to each 16 KiB, and what changes the keys before them.
	smallMore = 2 << 10
	largeMore = 1 << 10
	// maxLarge bounds the large buffers of a process: 32 MiB. A transfer that
	// finds none left makes do with a small one.
	maxLarge = 256
)

// A Buffer belongs to a pool. The nil *Buffer is none.
type Buffer struct {
	// Bytes has room for Small or Large bytes, and for what a protocol adds.
	Bytes []byte
}

var (
	smalls  = sync.Pool{New: func() any { return &Buffer{make([]byte, Small+smallMore)} }}
	larges  = sync.Pool{New: func() any { return &Buffer{make([]byte, Large+largeMore)} }}
	largeIn atomic.Int32 // how many are in use
)

// Large says which size it has.
func (b *Buffer) Large() bool { return len(b.Bytes) > Large }

// room is where data goes that will be sent on within a buffer of the same size.
func (b *Buffer) room() []byte {
	if b.Large() {
		return b.Bytes[:Large]
	}
	return b.Bytes[:Small]
}

// Get gives a buffer, a large one if it may.
func Get(large bool) *Buffer {
	if large {
		if largeIn.Add(1) <= maxLarge {
			return larges.Get().(*Buffer)
		}
		largeIn.Add(-1)
	}
	return smalls.Get().(*Buffer)
}

// Put gives b back and returns nil.
func (b *Buffer) Put() *Buffer {
	switch {
	case b == nil:
	case b.Large():
		largeIn.Add(-1)
		larges.Put(b)
	default:
		smalls.Put(b)
	}
	return nil
}
