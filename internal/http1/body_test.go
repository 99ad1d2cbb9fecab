package http1

import "testing"

// Long bodies that are carried at once hold large buffers up to a bound, and small
// ones beyond it.
func TestBulksAreBounded(t *testing.T) {
	was := bulks.Load()
	held := make([]bulk, maxBulks+3)
	large := 0
	for i := range held {
		if len(held[i].hold()) == bulkSize {
			large++
		}
	}
	if want := maxBulks - int(was); large != want {
		t.Errorf("%d large buffers are held, want %d", large, want)
	}
	for i := range held {
		held[i].rest()
		held[i].rest() // does nothing
	}
	if n := bulks.Load(); n != was {
		t.Errorf("%d large buffers count as held afterwards, want %d", n, was)
	}
}
