package hop

import (
	"errors"
	"os"
	"testing"
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
