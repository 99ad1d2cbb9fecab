package hop

import (
	"errors"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

func TestAwaitWaitsForAStream(t *testing.T) {
	bubble(t, func(t *testing.T) {
		p := newPair(t, Config{}, Config{}, func(s *Stream) {
			if err := s.Await(); err != nil {
				t.Error(err)
			}
			echo(s)
		})
		s := p.open(t)
		say(t, s, "hello")
		if err := s.Await(); err != nil {
			t.Error(err)
		}
		hear(t, s, "hello")
		_ = s.SetReadDeadline(time.Now().Add(time.Second))
		start := time.Now()
		err := s.Await()
		if _, rerr := s.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(rerr, os.ErrDeadlineExceeded) || time.Since(start) != time.Second {
			t.Errorf("waited %s: %v, then read: %v", time.Since(start), err, rerr)
		}
		s.Close()
		_ = s.Await() // it does not wait
		p.stop()
	})
}

// A lend lends memory of a few bytes, and counts.
type lend struct {
	b     [4]byte
	times int
}

func (l *lend) Lend() []byte {
	l.times++
	return l.b[:]
}

func (l *lend) Back() { panic("nothing was there") }

// TestReadLateBorrowsWhatItFills reads a stream piece by piece into memory that is
// borrowed when something has come, and never before.
func TestReadLateBorrowsWhatItFills(t *testing.T) {
	bubble(t, func(t *testing.T) {
		p := newPair(t, Config{}, Config{}, echo)
		s := p.open(t)
		var l lend
		read := func() string {
			n, err := s.ReadLate(&l)
			if err != nil {
				t.Error(err)
			}
			return string(l.b[:n])
		}
		got := make(chan string)
		go func() { got <- read() + read() + read() }()
		synctest.Wait()
		if l.times != 0 {
			t.Error("who waits has borrowed memory")
		}
		if s.working() {
			t.Error("a reader that waits counts as one that works")
		}
		say(t, s, "0123456789")
		if text := <-got; text != "0123456789" || l.times != 3 {
			t.Errorf("read %q into memory that was borrowed %d times", text, l.times)
		}
		_ = s.SetReadDeadline(time.Now().Add(time.Second))
		if n, err := s.ReadLate(&l); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) || l.times != 3 {
			t.Errorf("past the deadline: %d bytes, %v, borrowed %d times", n, err, l.times)
		}
		_ = s.SetReadDeadline(time.Time{})
		say(t, s, "ab")
		if text := read(); text != "ab" {
			t.Errorf("after a deadline: %q", text)
		}
		s.Close()
		if _, err := s.ReadLate(&l); !errors.Is(err, net.ErrClosed) {
			t.Errorf("of a closed stream: %v", err)
		}
		if n := s.c.waiting.Load(); n != 0 {
			t.Errorf("%d streams count as waiting", n)
		}
		p.stop()
	})
}
