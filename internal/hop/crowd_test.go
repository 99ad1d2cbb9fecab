package hop

import (
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestACrowdOfLargeWriters has very many streams send much at once, some of
// which are broken off while they wait: what is queued stays bounded and all
// of the others get through.
func TestACrowdOfLargeWriters(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const many, size = 200, 300 << 10
		p := newPair(t, Config{}, Config{}, func(s *Stream) {
			_, _ = io.Copy(io.Discard, struct{ io.Reader }{s})
			_ = s.CloseWrite()
			hold(s)
		})
		synctest.Wait()
		var wg sync.WaitGroup
		for i := range many {
			s := p.open(t)
			wg.Go(func() {
				defer s.Close()
				if i%3 == 0 {
					_ = s.SetWriteDeadline(time.Now().Add(time.Millisecond * time.Duration(i)))
				}
				if i%5 == 0 {
					time.AfterFunc(time.Duration(i)*time.Microsecond, func() { s.Close() })
				}
				if _, err := s.Write(make([]byte, size)); err != nil && i%3 != 0 && i%5 != 0 {
					t.Errorf("stream %d: %v", i, err)
				}
				_ = s.CloseWrite()
				_, _ = s.Read(make([]byte, 1))
			})
		}
		wg.Wait()
		p.near.mu.Lock()
		defer p.near.mu.Unlock()
		if n := cap(p.near.out.pend); n > 8*crowded {
			t.Errorf("%d bytes of queue", n)
		}
	})
}
