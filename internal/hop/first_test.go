package hop

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"sallyport/internal/mux"
)

// TestFirstWindowsAreBounded has many streams fill their first windows with what
// nobody reads: there is memory for some, the others are broken off, and those of
// who has a share of its own go on.
func TestFirstWindowsAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const conns, each, limit = 4, 8, 512 << 10
		all := mux.NewBudget(limit)
		hoarder, other := all.Part(limit/2, 0), all.Part(limit/2, 0)
		var refused, charged atomic.Int32
		cfg := Config{First: hoarder, Hoarded: func() { refused.Add(1) }, Broken: func() bool { charged.Add(1); return true }}
		var mu sync.Mutex
		var held []*Stream
		var pairs []*pair
		for range conns {
			p := newPair(t, Config{}, cfg, func(s *Stream) {
				s.OnCut(func() { s.Close() })
				mu.Lock()
				held = append(held, s)
				mu.Unlock()
				hold(s)
			})
			pairs = append(pairs, p)
			for range each {
				s := p.open(t)
				if _, err := s.Write(make([]byte, baseWindow)); err != nil {
					t.Fatal(err)
				}
			}
		}
		synctest.Wait()
		sum, streams, most := 0, conns*each, limit/2+conns*each*spare
		for _, s := range held {
			s.mu.Lock()
			sum += s.in.Len()
			s.mu.Unlock()
		}
		if n := int(refused.Load()); sum > most || sum < limit/4 || n == 0 || n == streams || int(charged.Load()) != n {
			t.Errorf("%d bytes are held, of at most %d; %d of %d streams were broken off, %d charged", sum, most, n, streams, charged.Load())
		}
		cfg.First = other
		p := newPair(t, Config{}, cfg, echo)
		s := p.open(t)
		for range 20 {
			text := bytes.Repeat([]byte("x"), baseWindow-1)
			if _, err := s.Write(text); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(s, text); err != nil {
				t.Fatalf("a stream of another one: %v", err)
			}
		}
		synctest.Wait()
		if used := other.Used(); used != 0 {
			t.Errorf("%d bytes that were read are still paid for", used)
		}
		p.stop()
		for _, p := range pairs {
			p.stop()
		}
		if a, b := all.Used(), hoarder.Used(); a != 0 || b != 0 {
			t.Errorf("%d and %d bytes are paid for when all is over", a, b)
		}
	})
}

// TestHoardedIsCharged has who makes us end too many streams lose the connection.
func TestHoardedIsCharged(t *testing.T) {
	bubble(t, func(t *testing.T) {
		cfg := Config{First: mux.NewBudget(1), Broken: func() bool { return false }}
		p := newPair(t, Config{}, cfg, hold)
		s := p.open(t)
		_, _ = s.Write(make([]byte, baseWindow)) // it may be over by then
		synctest.Wait()
		p.stop()
		var v *Violation
		if !errors.As(p.farErr, &v) || v.Reason != Flood {
			t.Errorf("the connection ended by %v", p.farErr)
		}
	})
}

// TestWhoFindsNoMemoryIsNotCharged has the streams of one end because others have
// taken all there is: his connection goes on, however many they are.
func TestWhoFindsNoMemoryIsNotCharged(t *testing.T) {
	bubble(t, func(t *testing.T) {
		all := mux.NewBudget(64 << 10)
		greedy, modest := all.Part(64<<10, 0), all.Part(64<<10, 0)
		greedy.Take(64 << 10)
		var ended atomic.Int32
		cfg := Config{First: modest, Hoarded: func() { ended.Add(1) }, Broken: func() bool { return false }}
		p := newPair(t, Config{}, cfg, hold)
		for range 3 {
			s := p.open(t)
			_, _ = s.Write(make([]byte, baseWindow)) // it may be over by then
			synctest.Wait()
		}
		if n := ended.Load(); n != 3 {
			t.Errorf("%d of 3 streams were ended", n)
		}
		s := p.open(t)
		if _, err := s.Write([]byte("little")); err != nil {
			t.Errorf("the connection does not go on: %v", err)
		}
		synctest.Wait()
		p.stop()
		var v *Violation
		if errors.As(p.farErr, &v) {
			t.Errorf("the connection ended by %v", p.farErr)
		}
	})
}
