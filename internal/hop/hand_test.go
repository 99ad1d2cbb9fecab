package hop

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// catcher is a Hand that takes what begins as it likes it.
type catcher struct {
	likes string
	claim func() bool // nil: it is
	got   atomic.Pointer[string]
	left  atomic.Int32
}

func (c *catcher) Take(p []byte) bool {
	s := string(p)
	c.got.Store(&s)
	return s[0] == c.likes[0]
}

func (c *catcher) Claim() bool { return c.claim == nil || c.claim() }

func (c *catcher) Left() { c.left.Add(1) }

func TestHandTakesWhatComesNext(t *testing.T) {
	for _, tt := range []struct {
		name  string
		after func(s *Stream)
		got   string
		left  int32
		read  string // what is for a reader
	}{
		{name: "what it likes", after: func(s *Stream) { _, _ = s.Write([]byte("yes")) }, got: "yes"},
		{name: "the rest is for a reader", after: func(s *Stream) { _, _ = s.Write([]byte("no")) }, got: "no", read: "no"},
		{name: "not after it is recalled", after: func(s *Stream) { s.Recall(); _, _ = s.Write([]byte("yes")) }, read: "yes"},
		{name: "the end", after: func(s *Stream) { _ = s.CloseWrite() }, left: 1},
		{name: "the end of the stream", after: func(s *Stream) { s.Close() }, left: 1},
		{name: "the end of the connection", after: func(s *Stream) { s.Conn().Close() }, left: 1},
		{name: "the deadline", after: func(s *Stream) { _ = s.SetReadDeadline(time.Now().Add(time.Second)); time.Sleep(2 * time.Second) }, left: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				p := newPair(t, Config{}, Config{}, echo)
				s := p.open(t)
				say(t, s, "hello")
				hear(t, s, "hello")
				c := &catcher{likes: "y"}
				if !s.Answer(c) {
					t.Fatal("nothing is to be waited for")
				}
				tt.after(s)
				synctest.Wait()
				got := c.got.Load()
				if tt.got == "" && got != nil || tt.got != "" && (got == nil || *got != tt.got) || c.left.Load() != tt.left {
					t.Errorf("got %v and %d times word that it will not be asked", got, c.left.Load())
				}
				if tt.read != "" {
					hear(t, s, tt.read)
				}
				if n := s.c.waiting.Load(); n != 0 {
					t.Errorf("%d streams count as waiting", n)
				}
				p.stop()
			})
		})
	}
}

// TestHandLeavesTheWindow has a hand take far more than the window of a stream.
func TestHandLeavesTheWindow(t *testing.T) {
	bubble(t, func(t *testing.T) {
		p := newPair(t, Config{}, Config{}, echo)
		s := p.open(t)
		text := make([]byte, 10<<10)
		text[0] = 'y'
		for i := range 50 {
			c := &catcher{likes: "ny"[i%2 : i%2+1]} // a reader gets the other half
			if !s.Answer(c) {
				t.Fatal("nothing is to be waited for")
			}
			say(t, s, string(text))
			synctest.Wait()
			if c.got.Load() == nil {
				t.Fatalf("nothing came after %d times", i)
			}
			if i%2 == 0 || len(*c.got.Load()) < len(text) {
				n := 0
				for n < len(text) && s.in.Len() > 0 {
					k, err := s.Read(make([]byte, len(text)))
					if err != nil {
						t.Fatal(err)
					}
					n += k
				}
			}
			if s.in.Len() != 0 {
				t.Fatalf("%d bytes are left", s.in.Len())
			}
			if s.left < 0 || s.left > s.window {
				t.Fatalf("the peer may send %d of a window of %d", s.left, s.window)
			}
		}
		if s.window != baseWindow {
			t.Errorf("the window has grown to %d", s.window)
		}
		p.stop()
	})
}

// TestRecallIsTheLastWord has what comes claimed under the lock that Recall takes:
// else a reader that is held up in between gives an answer to the next call.
func TestRecallIsTheLastWord(t *testing.T) {
	for _, claims := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			p := newPair(t, Config{}, Config{}, echo)
			s := p.open(t)
			say(t, s, "hello")
			hear(t, s, "hello")
			c := &catcher{likes: "y", claim: func() bool {
				if s.mu.TryLock() {
					s.mu.Unlock()
					t.Error("it can be recalled while it is claimed")
				}
				return claims
			}}
			if !s.Answer(c) {
				t.Fatal("nothing is to be waited for")
			}
			say(t, s, "yes")
			synctest.Wait()
			if got := c.got.Load(); claims != (got != nil) {
				t.Errorf("claimed %v, and got %v", claims, got)
			}
			if !claims {
				hear(t, s, "yes")
			}
			if n := s.c.waiting.Load(); n != 0 {
				t.Errorf("%d streams count as waiting", n)
			}
			p.stop()
		})
	}
}

func TestHandIsNotForWhatIsThere(t *testing.T) {
	bubble(t, func(t *testing.T) {
		p := newPair(t, Config{}, Config{}, echo)
		s := p.open(t)
		say(t, s, "hello")
		synctest.Wait()
		if s.Answer(&catcher{likes: "h"}) {
			t.Error("it was set beside what a reader can read")
		}
		hear(t, s, "hello")
		p.stop()
	})
}
