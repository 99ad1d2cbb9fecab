package upstream

import "sync"

// A tally is how a count that only grows stood when the buckets of a window began:
// what came since then is a difference, and to count costs no more than the count
// itself. That is of the calls that went well, which are nearly all. It stands in
// the words that each of them changes anyway, of its endpoint.
type tally struct {
	width int64         // of a bucket
	total func() uint32 // the count; it may wrap. Nil for none.

	mu    sync.Mutex // guards the fields below
	last  int64      // the bucket that began last
	marks [buckets]struct {
		turn int64
		n    uint32
	}
}

// mark notes the count if a bucket has begun, and says when the next one does.
func (t *tally) mark(now int64, n uint32) (next int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if turn := now / t.width; turn > t.last {
		t.last = turn
		m := &t.marks[turn%buckets]
		m.turn, m.n = turn, n
	}
	return (t.last + 1) * t.width
}

// grown is by how much the count has grown in the window that ends now.
func (t *tally) grown(now int64) int64 {
	if t.total == nil {
		return 0
	}
	n := t.total()
	t.mu.Lock()
	defer t.mu.Unlock()
	first, then := int64(0), n
	for _, m := range t.marks {
		if m.turn > now/t.width-buckets && (first == 0 || m.turn < first) {
			first, then = m.turn, m.n
		}
	}
	return int64(max(int32(n-then), 0))
}

// reset has the window begin anew.
func (t *tally) reset() {
	if t.total == nil {
		return
	}
	n := t.total()
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.marks {
		t.marks[i].n = n
	}
}
