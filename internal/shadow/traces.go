package shadow

import "sync"

// maxTraces is how many traces are remembered: those of the last minutes, of
// which what an application does for a copy is one.
const maxTraces = 16 << 10

// Traces remember for which traces a peer has said, by an identity that it has
// proved, that they are done for a shadow. An application can say so of any call
// of its own, and would be believed by nobody who copies calls: it would hide
// them. The zero value knows none; it is safe for concurrent use.
type Traces struct {
	mu   sync.Mutex // guards the fields below
	of   map[[16]byte]struct{}
	ring [][16]byte // in the order of their coming, the oldest at next once it is full
	next int
}

// Add remembers a trace, in place of the oldest when there are too many.
func (t *Traces) Add(id [16]byte) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.of[id]; ok {
		return
	}
	if t.of == nil {
		t.of = map[[16]byte]struct{}{}
	}
	if len(t.ring) < maxTraces {
		t.ring = append(t.ring, id)
	} else {
		delete(t.of, t.ring[t.next])
		t.ring[t.next] = id
		t.next = (t.next + 1) % maxTraces
	}
	t.of[id] = struct{}{}
}

// Has says whether a trace is remembered.
func (t *Traces) Has(id [16]byte) bool {
	if t == nil {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.of[id]
	return ok
}
