package mux

import (
	"math/bits"
	"sync"
)

const (
	// small is the first size of a buffer.
	small = 2 << 10
	// bulk is the size of the smallest one that is not small.
	bulk = 32 << 10
)

// smalls holds buffers of size small, bulks those of bulk and more.
var (
	smalls = sync.Pool{New: func() any { return new([small]byte) }}
	bulks  sync.Pool
)

// A Buffer holds what has come and was not read. It bounds nothing: windows do.
// While it is empty it holds no memory.
type Buffer struct {
	b []byte // b[r:] is not read yet
	r int
}

// Len is how many bytes are not read.
func (b *Buffer) Len() int { return len(b.b) - b.r }

// Add takes p in.
func (b *Buffer) Add(p []byte) {
	if need := b.Len() + len(p); need > cap(b.b) {
		more := append(larger(need), b.b[b.r:]...)
		b.retire()
		b.b, b.r = more, 0
	} else if len(b.b)+len(p) > cap(b.b) {
		b.b = b.b[:copy(b.b, b.b[b.r:])]
		b.r = 0
	}
	b.b = append(b.b, p...)
}

// Take reads into p. It may be called when there is nothing.
func (b *Buffer) Take(p []byte) int {
	n := copy(p, b.b[b.r:])
	if b.r += n; b.r == len(b.b) {
		b.Drop()
	}
	return n
}

// Drop throws away what is not read.
func (b *Buffer) Drop() {
	b.retire()
	b.b, b.r = nil, 0
}

// larger gives an empty buffer for n bytes.
func larger(n int) []byte {
	if n <= small {
		return smalls.Get().(*[small]byte)[:0]
	}
	size := max(1<<bits.Len(uint(n-1)), bulk)
	if b, _ := bulks.Get().(*[]byte); b != nil {
		if cap(*b) == size {
			return (*b)[:0]
		}
		bulks.Put(b) // a small window holds no large buffer
	}
	return make([]byte, 0, size)
}

func (b *Buffer) retire() {
	if cap(b.b) == small {
		smalls.Put((*[small]byte)(b.b[:small]))
	} else if cap(b.b) >= bulk {
		empty := b.b[:0]
		bulks.Put(&empty)
	}
}
