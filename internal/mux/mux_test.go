package mux

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// What goes in comes out, in pieces of any size, and an empty buffer holds
// nothing.
func TestBuffer(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var b Buffer
	var in, out []byte
	for range 200 {
		p := make([]byte, rnd.IntN(50_000))
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		b.Add(p)
		in = append(in, p...)
		q := make([]byte, rnd.IntN(60_000))
		out = append(out, q[:b.Take(q)]...)
		if b.Len() != len(in)-len(out) {
			t.Fatalf("%d bytes are left, want %d", b.Len(), len(in)-len(out))
		}
		if b.Len() == 0 && b.first != nil {
			t.Fatal("an empty buffer holds memory")
		}
	}
	if !bytes.HasPrefix(in, out) {
		t.Error("other bytes came out")
	}
	b.Drop()
	if b.Len() != 0 || b.first != nil || b.Take(make([]byte, 1)) != 0 {
		t.Error("something is left of what was dropped")
	}
}

func TestBucket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBucket(3, 2)
		passed := func() (n int) {
			for range 10 {
				if b.Spend() {
					n++
				}
			}
			return n
		}
		if n := passed(); n != 3 {
			t.Errorf("%d at once, want 3", n)
		}
		time.Sleep(time.Second)
		if n := passed(); n != 2 {
			t.Errorf("%d after a second, want 2", n)
		}
		time.Sleep(time.Hour)
		if n := passed(); n != 3 {
			t.Errorf("%d after an hour, want 3", n)
		}
		b.Earn(10)
		if n := passed(); n != 3 {
			t.Errorf("%d that were earned, want 3", n)
		}
	})
}

func TestBudget(t *testing.T) {
	b := NewBudget(10)
	if !b.Take(6) || b.Take(5) || !b.Take(4) || b.Used() != 10 {
		t.Errorf("%d are taken", b.Used())
	}
	b.Give(10)
	if none := (*Budget)(nil); b.Used() != 0 || !none.Take(1<<40) {
		t.Error("it bounds what it must not")
	}
}

func TestDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		cond := sync.NewCond(&mu)
		var d Deadline
		waits := func() time.Duration {
			mu.Lock()
			defer mu.Unlock()
			start := time.Now()
			for !d.Passed {
				cond.Wait()
			}
			return time.Since(start)
		}
		d.Set(cond, time.Now().Add(time.Second))
		if got := waits(); got != time.Second {
			t.Errorf("it woke after %v", got)
		}
		d.Set(cond, time.Now().Add(time.Minute)) // another one counts, not both
		if got := waits(); got != time.Minute {
			t.Errorf("the next woke after %v", got)
		}
		d.Set(cond, time.Time{})
		if d.Passed {
			t.Error("none has passed")
		}
		d.Set(cond, time.Now().Add(-time.Second))
		if got := waits(); got != 0 {
			t.Errorf("a past one woke after %v", got)
		}
	})
}

// What a part of a budget takes is taken from the whole, and no more than either has.
func TestPartOfABudget(t *testing.T) {
	all := NewBudget(10)
	a, b := all.Part(6, 0), all.Part(6, 0)
	for _, tt := range []struct {
		of   *Budget
		n    int
		want bool
	}{{a, 7, false}, {a, 6, true}, {a, 1, false}, {b, 5, false}, {b, 4, true}, {all, 1, false}} {
		if got := tt.of.Take(tt.n); got != tt.want {
			t.Errorf("take %d: %v", tt.n, got)
		}
	}
	a.Give(6)
	if !b.Take(2) || b.Take(1) || all.Used() != 6 || a.Used() != 0 {
		t.Errorf("used are %d of the whole, %d and %d of the parts", all.Used(), a.Used(), b.Used())
	}
}

// TestBudgetOfOwn has a part that has something whatever others have taken.
func TestBudgetOfOwn(t *testing.T) {
	all := NewBudget(10)
	greedy, modest := all.Part(20, 0), all.Part(6, 4)
	if !greedy.Take(10) || greedy.Take(1) {
		t.Error("the greedy one")
	}
	if !modest.Take(3) || modest.Take(2) || !modest.Take(1) || modest.Take(1) {
		t.Errorf("%d of 4 are its own", modest.Used())
	}
	greedy.Give(3)
	if !modest.Take(2) || modest.Take(1) || all.Used() != 9 {
		t.Errorf("%d of the whole are taken, want 7 and 2", all.Used())
	}
	modest.Give(3)
	if all.Used() != 7 || modest.Used() != 3 {
		t.Errorf("%d of the whole are taken, want 7", all.Used())
	}
	modest.Give(3)
	greedy.Give(7)
	var g sync.WaitGroup
	for range 8 {
		g.Go(func() {
			for n := range 2000 {
				for _, b := range []*Budget{greedy, modest} {
					if b.Take(1 + n%5) {
						b.Give(1 + n%5)
					}
				}
			}
		})
	}
	if g.Wait(); all.Used() != 0 || modest.Used() != 0 || greedy.Used() != 0 {
		t.Errorf("%d, %d and %d are taken in the end", all.Used(), modest.Used(), greedy.Used())
	}
}
