package mux

import "sync"

const (
	// small is the size of the first piece of a buffer that holds little, large
	// that of all others.
	small = 2 << 10
	large = 16 << 10
)

var (
	smalls = sync.Pool{New: func() any { return &piece{b: make([]byte, 0, small)} }}
	larges = sync.Pool{New: func() any { return &piece{b: make([]byte, 0, large)} }}
)

// A piece is a part of what a Buffer holds.
type piece struct {
	b    []byte
	next *piece
}

// A Buffer holds what has come and was not read. It bounds nothing: windows do.
// It holds as much memory as that takes, to one piece, and none while it is empty.
type Buffer struct {
	first, last *piece
	r           int // how much of first was read
	n           int // how much was not read of all
}

// Len is how many bytes are not read.
func (b *Buffer) Len() int { return b.n }

// Add takes p in.
func (b *Buffer) Add(p []byte) {
	b.n += len(p)
	for len(p) > 0 {
		if b.last == nil || len(b.last.b) == cap(b.last.b) {
			b.grow(len(p))
		}
		room := b.last.b[len(b.last.b):cap(b.last.b)]
		k := copy(room, p)
		b.last.b = b.last.b[:len(b.last.b)+k]
		p = p[k:]
	}
}

// grow adds a piece, for n bytes and what follows them.
func (b *Buffer) grow(n int) {
	from := &larges
	if b.first == nil && n <= small {
		from = &smalls
	}
	c := from.Get().(*piece)
	if b.first == nil {
		b.first = c
	} else {
		b.last.next = c
	}
	b.last = c
}

// Take reads into p. It may be called when there is nothing.
func (b *Buffer) Take(p []byte) (n int) {
	for n < len(p) && b.first != nil {
		k := copy(p[n:], b.first.b[b.r:])
		n += k
		if b.r += k; b.r == len(b.first.b) {
			b.shift()
		}
	}
	b.n -= n
	return n
}

// shift gives the first piece back.
func (b *Buffer) shift() {
	c := b.first
	if b.first = c.next; b.first == nil {
		b.last = nil
	}
	b.r = 0
	from := &larges
	if cap(c.b) == small {
		from = &smalls
	}
	c.b, c.next = c.b[:0], nil
	from.Put(c)
}

// Drop throws away what is not read.
func (b *Buffer) Drop() {
	for b.first != nil {
		b.shift()
	}
	b.n = 0
}
