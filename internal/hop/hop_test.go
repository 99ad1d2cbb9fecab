package hop

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/meshtest"
	"sallyport/internal/mux"
)

// A pair is both ends of one connection. What the far end accepts is served by
// serve, which closes what it was given when it returns.
type pair struct {
	near, far       *Conn
	nearErr, farErr error // of Run, once both have ended
	ended           sync.WaitGroup
	serving         sync.WaitGroup
}

// newPair starts both ends. It must be called inside a bubble.
func newPair(t *testing.T, near, far Config, serve func(*Stream)) *pair {
	t.Helper()
	a, b := meshtest.Pipe()
	p := new(pair)
	p.start(t, a, b, near, far, serve)
	return p
}

func (p *pair) start(t testing.TB, a, b net.Conn, near, far Config, serve func(*Stream)) {
	p.near = Dialled(a, near)
	p.far = Accepted(b, far, func(s *Stream) bool {
		p.serving.Go(func() {
			defer s.Close()
			serve(s)
		})
		return true
	})
	p.ended.Go(func() { p.nearErr = p.near.Run() })
	p.ended.Go(func() { p.farErr = p.far.Run() })
	t.Cleanup(p.stop)
}

// stop ends both ends and everything on them.
func (p *pair) stop() {
	p.near.Close()
	p.far.Close()
	p.ended.Wait()
	p.serving.Wait()
}

func (p *pair) open(t *testing.T) *Stream {
	t.Helper()
	s, err := p.near.Open()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// echo sends back what it gets, until the end.
func echo(s *Stream) {
	if _, err := io.Copy(struct{ io.Writer }{s}, struct{ io.Reader }{s}); err == nil {
		_ = s.CloseWrite()
		_, _ = s.Read(make([]byte, 1)) // until the peer closes
	}
}

// hold keeps a stream without reading it, until it is reset.
func hold(s *Stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.rerr == nil {
		s.more.Wait()
	}
}

func say(t *testing.T, s *Stream, text string) {
	t.Helper()
	if _, err := io.WriteString(s, text); err != nil {
		t.Fatalf("write: %v", err)
	}
}

func hear(t *testing.T, s *Stream, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(s, b); err != nil || string(b) != want {
		t.Fatalf("read %q, %v; want %q", b, err, want)
	}
}

// bubble runs f where time stands still while anything can move.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

func TestStreamsCarryBytesBothWays(t *testing.T) {
	bubble(t, func(t *testing.T) {
		p := newPair(t, Config{}, Config{}, echo)
		s := p.open(t)
		defer s.Close()
		for _, text := range []string{"hello", strings.Repeat("x", 1000), "again"} {
			say(t, s, text)
			hear(t, s, text)
		}
		if err := s.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(s); err != nil || len(b) > 0 {
			t.Errorf("behind the end: %q, %v", b, err)
		}
		if _, err := s.Write([]byte("x")); err != errEnded {
			t.Errorf("write behind the end: %v", err)
		}
	})
}

// TestManyStreamsAtOnce has each stream move more than its window, both ways,
// and looks that nothing is mixed up.
func TestManyStreamsAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		p := newPair(t, Config{}, Config{}, echo)
		var wg sync.WaitGroup
		for i := range 20 {
			s := p.open(t)
			want := bytes.Repeat([]byte{byte(i)}, 100<<10+i)
			wg.Go(func() {
				defer s.Close()
				wg.Go(func() {
					if _, err := s.Write(want); err != nil {
						t.Error(err)
					}
					_ = s.CloseWrite()
				})
				if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, want) {
					t.Errorf("stream %d: %d bytes, %v; want %d", i, len(got), err, len(want))
				}
			})
		}
		wg.Wait()
		synctest.Wait()
		if n := p.near.open.Load() + p.far.open.Load(); n != 0 {
			t.Errorf("%d streams left", n)
		}
		if len(p.near.streams)+len(p.far.streams) != 0 {
			t.Errorf("streams left in the tables: %v, %v", p.near.streams, p.far.streams)
		}
	})
}

// TestUnreadStreamHoldsUpNoOther fills a stream that nobody reads.
func TestUnreadStreamHoldsUpNoOther(t *testing.T) {
	bubble(t, func(t *testing.T) {
		first := true
		p := newPair(t, Config{}, Config{}, func(s *Stream) {
			if first {
				first = false
				hold(s)
				return
			}
			echo(s)
		})
		stuck, free := p.open(t), p.open(t)
		defer free.Close()
		var sent int
		var wg sync.WaitGroup
		wg.Go(func() {
			n, err := stuck.Write(make([]byte, 1<<20))
			if sent = n; err != net.ErrClosed {
				t.Errorf("write to a stream that was closed meanwhile: %v", err)
			}
		})
		synctest.Wait()
		for range 100 {
			say(t, free, strings.Repeat("y", 2000))
			hear(t, free, strings.Repeat("y", 2000))
		}
		stuck.Close()
		wg.Wait()
		if sent != baseWindow {
			t.Errorf("%d bytes were sent that nobody read, want the window, %d", sent, baseWindow)
		}
	})
}

// TestBulkTakesTurns has a stream with very much to send, and looks how much
// of it goes before what another one has to say.
func TestBulkTakesTurns(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a, b := meshtest.Pipe()
		c := Dialled(a, Config{})
		var wg sync.WaitGroup
		wg.Go(func() { _ = c.Run() })
		defer wg.Wait()
		defer c.Close()
		send(t, b, note{kindHello, 0, 100})
		synctest.Wait()
		var bulk []*Stream
		for range 3 {
			s, err := c.Open()
			if err != nil {
				t.Fatal(err)
			}
			s.credit = 1 << 30
			bulk = append(bulk, s)
			wg.Go(func() { _, _ = s.Write(make([]byte, 8<<20)) })
			synctest.Wait() // it has filled what holds bytes on the way
		}
		small, err := c.Open()
		if err != nil {
			t.Fatal(err)
		}
		say(t, small, "here I am")
		c.mu.Lock()
		pend := len(c.out.pend)
		c.mu.Unlock()
		if most := gather + 3*share + 1000; pend > most {
			t.Errorf("%d bytes wait in front, want at most %d", pend, most)
		}
		for _, s := range bulk {
			s.Close()
		}
	})
}

func TestWindowGrowsWithinItsBounds(t *testing.T) {
	for _, tt := range []struct {
		name string
		cfg  Config
		want int
	}{
		{"to its most", Config{}, 256 << 10},
		{"as the connection lets it", Config{Extra: 32 << 10}, 64 << 10},
		{"as all connections let it", Config{Budget: mux.NewBudget(96 << 10)}, 128 << 10},
		{"not at all", Config{MaxWindow: 1}, baseWindow},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var window int
				p := newPair(t, Config{}, tt.cfg, func(s *Stream) {
					b := make([]byte, 16<<10)
					for range 64 {
						time.Sleep(time.Second) // the sender has no window left
						if _, err := io.ReadFull(s, b); err != nil {
							t.Error(err)
						}
					}
					window = s.window
				})
				s := p.open(t)
				if _, err := s.Write(make([]byte, 64*16<<10)); err != nil {
					t.Fatal(err)
				}
				p.serving.Wait()
				if window != tt.want {
					t.Errorf("the window is %d, want %d", window, tt.want)
				}
				if n := p.far.extra.Load(); n != 0 {
					t.Errorf("%d bytes of growth are not given back", n)
				}
				if b := tt.cfg.Budget; b != nil && b.Used() != 0 {
					t.Errorf("%d bytes of the budget are not given back", b.Used())
				}
				s.Close()
			})
		})
	}
}

func TestEndsOfAStream(t *testing.T) {
	for _, tt := range []struct {
		name  string
		serve func(s *Stream)
		close bool // the near end closes first
		want  error
	}{
		{"broken off", func(s *Stream) {}, false, ErrCancelled},
		{"refused", func(s *Stream) { _ = s.Refuse() }, false, ErrRefused},
		{"ended", func(s *Stream) { _ = s.CloseWrite(); hold(s) }, false, io.EOF},
		{"closed here", hold, true, net.ErrClosed},
		{"the connection closed there", func(s *Stream) { s.Conn().Close(); hold(s) }, false, io.ErrUnexpectedEOF},
		{"the connection severed there", func(s *Stream) { s.Conn().Sever(); hold(s) }, false, io.ErrUnexpectedEOF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				p := newPair(t, Config{}, Config{}, func(s *Stream) {
					_, _ = s.Write([]byte("answer"))
					time.Sleep(time.Second) // until it has been sent
					tt.serve(s)
				})
				s := p.open(t)
				defer s.Close()
				say(t, s, "request")
				synctest.Wait()
				if tt.close {
					s.Close()
				} else {
					hear(t, s, "answer") // what came before the end is not lost
				}
				if _, err := s.Read(make([]byte, 1)); err != tt.want {
					t.Errorf("read: %v, want %v", err, tt.want)
				}
				if _, err := s.Write([]byte("x")); err == nil && tt.want != io.EOF {
					t.Error("write went well")
				}
			})
		})
	}
}

// TestCloseFreesBothEnds looks that a stream broken off at one end wakes who
// reads and who writes at the other.
func TestCloseFreesBothEnds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var read, write error
		p := newPair(t, Config{}, Config{}, func(s *Stream) {
			var wg sync.WaitGroup
			wg.Go(func() { _, read = io.Copy(io.Discard, s) })
			_, write = s.Write(make([]byte, 1<<20))
			wg.Wait()
		})
		s := p.open(t)
		say(t, s, "x")
		synctest.Wait()
		s.Close()
		p.serving.Wait()
		if read != ErrCancelled || write != ErrCancelled {
			t.Errorf("read ended with %v, write with %v", read, write)
		}
	})
}

func TestStreamsAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		p := newPair(t, Config{}, Config{Streams: 3}, echo)
		synctest.Wait()
		for range 3 {
			say(t, p.open(t), "x")
		}
		if _, err := p.near.Open(); err != ErrFull {
			t.Errorf("a stream too many: %v", err)
		}
		p.near.mu.Lock()
		p.near.limit = 10 // a peer that does not keep to it is refused
		p.near.mu.Unlock()
		s := p.open(t)
		say(t, s, "x")
		if _, err := s.Read(make([]byte, 1)); err != ErrRefused {
			t.Errorf("a stream too many: %v", err)
		}
		s.Close()
		if n := p.near.Room(); n != 7 {
			t.Errorf("room for %d", n)
		}
	})
}

func TestRefusedByWhoAccepts(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a, b := meshtest.Pipe()
		p := &pair{near: Dialled(a, Config{}), far: Accepted(b, Config{}, func(*Stream) bool { return false })}
		p.ended.Go(func() { _ = p.near.Run() })
		p.ended.Go(func() { _ = p.far.Run() })
		defer p.stop()
		s := p.open(t)
		say(t, s, strings.Repeat("x", 5000))
		if _, err := s.Read(make([]byte, 1)); err != ErrRefused {
			t.Errorf("read: %v", err)
		}
		s.Close()
		if n := p.far.open.Load(); n != 0 {
			t.Errorf("%d streams are counted", n)
		}
	})
}

func TestDrain(t *testing.T) {
	for _, tt := range []struct {
		name string
		who  func(*pair) *Conn
	}{
		{"by who accepted", func(p *pair) *Conn { return p.far }},
		{"by who dialled", func(p *pair) *Conn { return p.near }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				p := newPair(t, Config{}, Config{}, echo)
				s := p.open(t)
				say(t, s, "x")
				hear(t, s, "x")
				tt.who(p).Drain()
				synctest.Wait()
				if _, err := p.near.Open(); err != ErrClosing {
					t.Errorf("open: %v", err)
				}
				if !s.Stale() || p.near.Live() || p.near.Room() != 0 {
					t.Error("the connection looks as if it took more")
				}
				say(t, s, "goes on")
				hear(t, s, "goes on")
				start := time.Now()
				s.Close()
				p.ended.Wait()
				if p.nearErr != nil || p.farErr != nil {
					t.Errorf("ends: %v, %v", p.nearErr, p.farErr)
				}
				if d := time.Since(start); d > 0 {
					t.Errorf("it took %v to end", d)
				}
			})
		})
	}
}

// TestDrainMeetsANewStream lets a stream open while the goaway is on its way.
func TestDrainMeetsANewStream(t *testing.T) {
	bubble(t, func(t *testing.T) {
		p := newPair(t, Config{}, Config{}, echo)
		synctest.Wait()
		s := p.open(t)
		p.far.Drain()
		say(t, s, "x") // the near end has not read the goaway yet
		if _, err := s.Read(make([]byte, 1)); err != ErrRefused {
			t.Errorf("read: %v", err)
		}
		s.Close()
		p.ended.Wait()
	})
}

func TestSilentPeerIsGivenUp(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a, b := meshtest.Pipe()
		defer b.Close()
		c := Dialled(a, Config{})
		s, err := c.Open()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		start := time.Now()
		if err := c.Run(); !errors.Is(err, ErrSilent) {
			t.Errorf("it ended with %v", err)
		}
		if d := time.Since(start); d != 30*time.Second {
			t.Errorf("after %v", d)
		}
		if _, err := s.Read(make([]byte, 1)); err != ErrSilent {
			t.Errorf("a stream learns of %v", err)
		}
	})
}

func TestQuietConnectionLives(t *testing.T) {
	bubble(t, func(t *testing.T) {
		p := newPair(t, Config{}, Config{}, echo)
		s := p.open(t)
		defer s.Close()
		say(t, s, "x")
		hear(t, s, "x")
		time.Sleep(time.Hour)
		say(t, s, "y")
		hear(t, s, "y")
		for _, c := range []*Conn{p.near, p.far} {
			c.mu.Lock()
			if c.pings > 1 {
				t.Errorf("%d pings unanswered", c.pings)
			}
			c.mu.Unlock()
		}
	})
}

func TestUnusedConnectionEnds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		p := newPair(t, Config{Idle: 50 * time.Second}, Config{}, echo)
		start := time.Now()
		p.ended.Wait()
		if d := time.Since(start); d < 50*time.Second || d > 65*time.Second || p.nearErr != nil || p.farErr != nil {
			t.Errorf("after %v, %v, %v", d, p.nearErr, p.farErr)
		}
	})
}

func TestDeadlines(t *testing.T) {
	bubble(t, func(t *testing.T) {
		p := newPair(t, Config{}, Config{}, hold)
		s := p.open(t)
		defer s.Close()
		start := time.Now()
		_ = s.SetDeadline(start.Add(time.Second))
		_ = s.SetReadDeadline(start.Add(2 * time.Second)) // later than the timer that runs
		if _, err := s.Write(make([]byte, 1<<20)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Second {
			t.Errorf("write: %v after %v", err, time.Since(start))
		}
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != 2*time.Second {
			t.Errorf("read: %v after %v", err, time.Since(start))
		}
		_ = s.SetReadDeadline(time.Time{})
		var wg sync.WaitGroup
		var err error
		wg.Go(func() { _, err = s.Read(make([]byte, 1)) })
		time.Sleep(time.Hour)
		_ = s.SetReadDeadline(time.Unix(1, 0))
		wg.Wait()
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read: %v", err)
		}
	})
}

// TestPeerThatTakesNothing fills the connection and waits.
func TestPeerThatTakesNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a, b := meshtest.Pipe()
		defer b.Close()
		c := Dialled(a, Config{KeepAlive: time.Hour})
		var wg sync.WaitGroup
		var end error
		wg.Go(func() { end = c.Run() })
		send(t, b, note{kindHello, 0, 1000})
		synctest.Wait()
		for range 100 {
			s, err := c.Open()
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			wg.Go(func() { _, _ = s.Write(make([]byte, baseWindow)) })
		}
		wg.Wait()
		if !errors.Is(end, os.ErrDeadlineExceeded) {
			t.Errorf("it ended with %v", end)
		}
		if n := cap(c.out.pend); n > 4*crowded {
			t.Errorf("%d bytes were queued", n)
		}
	})
}

// counted counts the writes to a connection.
type counted struct {
	net.Conn
	writes []int
}

func (c *counted) Write(p []byte) (int, error) {
	c.writes = append(c.writes, len(p))
	return c.Conn.Write(p)
}

// TestConcurrentWritesAreCombined holds the promise of the hop: what many write
// while one is sending goes in one piece.
func TestConcurrentWritesAreCombined(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a, b := meshtest.Pipe()
		defer b.Close()
		w := &counted{Conn: a}
		c := Dialled(w, Config{KeepAlive: time.Hour})
		var wg sync.WaitGroup
		wg.Go(func() { _ = c.Run() })
		send(t, b, note{kindHello, 0, 1000})
		synctest.Wait()
		big, _ := c.Open()
		big.credit = 1 << 20
		wg.Go(func() { _, _ = big.Write(make([]byte, 128<<10)) }) // more than the pipe takes
		synctest.Wait()
		was := len(w.writes)
		for range 50 {
			s, _ := c.Open()
			wg.Go(func() { _, _ = s.Write(make([]byte, 300)) })
		}
		synctest.Wait()
		wg.Go(func() { _, _ = io.Copy(io.Discard, b) })
		synctest.Wait()
		if n := len(w.writes) - was; n > 2 || !slices.ContainsFunc(w.writes[was:], func(n int) bool { return n >= 50*300 }) {
			t.Errorf("50 writes made %v", w.writes[was:])
		}
		c.Close()
		wg.Wait()
	})
}
