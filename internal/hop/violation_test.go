package hop

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/meshtest"
)

// send writes frames as a peer of this protocol, or of none, would.
func send(t testing.TB, nc net.Conn, frames ...any) {
	t.Helper()
	var b []byte
	for _, f := range frames {
		switch f := f.(type) {
		case note:
			b = f.append(b)
		case []byte:
			b = append(b, f...)
		default:
			t.Fatalf("%T is no frame", f)
		}
	}
	if _, err := nc.Write(b); err != nil {
		t.Fatal(err)
	}
}

// frame is one of any form.
func frame(length int, k, flags uint8, stream uint32, payload string) []byte {
	return append(appendHeader(nil, length, kind(k), flags, stream), payload...)
}

func dataFrame(flags uint8, stream uint32, payload string) []byte {
	return frame(len(payload), uint8(kindData), flags, stream, payload)
}

var hello = note{kindHello, 0, 100}

// opened opens stream 1 and grants much on it, as often as asked.
func grants(n int, each uint64) (out []any) {
	out = append(out, dataFrame(flagOpen, 1, "x"))
	for range n {
		out = append(out, note{kindWindow, 1, each})
	}
	return out
}

func repeat(n int, frames ...any) (out []any) {
	for range n {
		out = append(out, frames...)
	}
	return out
}

// TestViolations has a peer break each rule; the connection ends with the
// reason, and the peer is told.
func TestViolations(t *testing.T) {
	window := string(make([]byte, baseWindow))
	for _, tt := range []struct {
		name   string
		opens  bool // the peer is the one that accepts, we have opened stream 1
		frames []any
		want   Reason
	}{
		{"kind 0", false, []any{frame(0, 0, 0, 0, "")}, BadKind},
		{"a kind that does not exist", false, []any{frame(0, uint8(kindCount), 0, 0, "")}, BadKind},
		{"a flag on a ping", false, []any{frame(8, uint8(kindPing), flagEnd, 0, "12345678")}, BadFlags},
		{"a short ping", false, []any{frame(7, uint8(kindPing), 0, 0, "1234567")}, BadLength},
		{"a long reset", false, []any{dataFrame(flagOpen, 1, "x"), frame(5, uint8(kindReset), 0, 1, "12345")}, BadLength},
		{"data larger than a frame may be", false, []any{frame(maxPayload+1, uint8(kindData), flagOpen, 1, "")}, BadLength},
		{"data on no stream", false, []any{dataFrame(flagOpen, 0, "x")}, BadStream},
		{"a ping on a stream", false, []any{frame(8, uint8(kindPing), 0, 1, "12345678")}, BadStream},
		{"a number that is too high", false, []any{dataFrame(flagOpen, maxStream+1, "x")}, BadStream},
		{"data on a stream that was not opened", false, []any{dataFrame(0, 1, "x")}, BadStream},
		{"a stream opened twice", false, []any{dataFrame(flagOpen, 1, "x"), dataFrame(flagOpen, 1, "x")}, BadStream},
		{"a stream opened out of order", false, []any{dataFrame(flagOpen, 2, "x"), dataFrame(flagOpen, 1, "x")}, BadStream},
		{"a grant on a stream that was not opened", false, []any{note{kindWindow, 1, 1}}, BadStream},
		{"a reset of a stream that was not opened", false, []any{note{kindReset, 1, resetCancel}}, BadStream},
		{"a grant of nothing", false, grants(1, 0), BadWindow},
		{"a grant of too much", false, grants(1, maxCredit+1), BadWindow},
		{"grants of too much together", false, grants(3, 1<<30), BadWindow},
		{"an unknown reset", false, []any{dataFrame(flagOpen, 1, "x"), note{kindReset, 1, 9}}, BadCode},
		{"an unknown goaway", false, []any{note{kindGoaway, 0, 0}}, BadCode},
		{"more than the window", false, []any{dataFrame(flagOpen, 1, window), dataFrame(0, 1, "x")}, Overrun},
		{"data behind the end", false, []any{dataFrame(flagOpen|flagEnd, 1, "x"), dataFrame(0, 1, "x")}, AfterEnd},
		{"the end behind the end", false, []any{dataFrame(flagOpen|flagEnd, 1, ""), dataFrame(flagEnd, 1, "")}, AfterEnd},
		{"a pong to no ping", false, []any{note{kindPong, 0, pingWord}}, Unexpected},
		{"a hello by who dialled", false, []any{hello}, BadHello},
		{"empty frames without end", false, append([]any{dataFrame(flagOpen, 1, "x")}, repeat(2*noiseBurst, dataFrame(0, 1, ""))...), Flood},
		{"streams that say nothing without end", false, emptyOpens(2 * noiseBurst), Flood},
		{"streams with a byte each without end", false, shortStreams(opensBurst + 2*noiseBurst), Flood},
		{"pings without end", false, repeat(2*noiseBurst, note{kindPing, 0, 1}), Flood},
		{"goaways without end", false, repeat(2*noiseBurst, note{kindGoaway, 0, goDrain}), Flood},
		{"resets without end", false, opensAndResets(2 * noiseBurst), Flood},
		{"resets of nothing without end", true, append([]any{hello}, repeat(2*noiseBurst, note{kindReset, 1, resetCancel})...), Flood},
		{"no hello", true, []any{note{kindPing, 0, 1}}, BadHello},
		{"two hellos", true, []any{hello, hello}, BadHello},
		{"a hello of no streams", true, []any{note{kindHello, 0, 0}}, BadHello},
		{"a hello of too many", true, []any{note{kindHello, 0, maxStream + 1}}, BadHello},
		{"a stream opened by who accepted", true, []any{hello, dataFrame(flagOpen, 2, "x")}, BadStream},
		{"data on a stream that we have not opened", true, []any{hello, dataFrame(0, 2, "x")}, BadStream},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				nc, peer := meshtest.Pipe()
				var c *Conn
				var serving, wg sync.WaitGroup
				if tt.opens {
					c = Dialled(nc, Config{})
				} else {
					c = Accepted(nc, Config{}, func(s *Stream) bool {
						serving.Go(func() { hold(s); s.Close() })
						return true
					})
				}
				var end error
				wg.Go(func() { end = c.Run() })
				if tt.opens {
					s, err := c.Open()
					if err != nil {
						t.Fatal(err)
					}
					defer s.Close()
					say(t, s, "x")
				}
				var told []byte
				wg.Go(func() { told, _ = io.ReadAll(peer) })
				wg.Go(func() {
					for _, f := range tt.frames {
						b, ok := f.([]byte)
						if !ok {
							b = f.(note).append(nil)
						}
						if _, err := peer.Write(b); err != nil {
							return
						}
					}
				})
				wg.Wait()
				serving.Wait()
				if v := (*Violation)(nil); !errors.As(end, &v) || v.Reason != tt.want {
					t.Fatalf("it ended with %v, want reason %s", end, tt.want)
				}
				last := goawayFrame(goViolation).append(nil)
				if n := len(told); n < len(last) || string(told[n-len(last):]) != string(last) {
					t.Errorf("the peer was told %x at last, want a goaway", told[max(0, n-len(last)):])
				}
			})
		})
	}
}

// emptyOpens opens streams with no byte on them, each at its end.
func emptyOpens(n int) (out []any) {
	for i := range n {
		out = append(out, dataFrame(flagOpen|flagEnd, uint32(i)+1, ""))
	}
	return out
}

// shortStreams opens streams with one byte on them, each at its end.
func shortStreams(n int) (out []any) {
	for i := range n {
		out = append(out, dataFrame(flagOpen|flagEnd, uint32(i)+1, "x"))
	}
	return out
}

func opensAndResets(n int) (out []any) {
	for i := range uint32(n) {
		out = append(out, dataFrame(flagOpen, i+1, "x"), note{kindReset, i + 1, resetCancel})
	}
	return out
}

// TestResetsAtAHonestRate is many streams broken off, over some time.
func TestResetsAtAHonestRate(t *testing.T) {
	bubble(t, func(t *testing.T) {
		p := newPair(t, Config{}, Config{}, hold)
		synctest.Wait()
		for range 50 {
			for range 100 {
				s := p.open(t)
				say(t, s, "x")
				s.Close()
			}
			time.Sleep(200 * time.Millisecond)
		}
		if !p.near.Live() || !p.far.Live() {
			t.Error("the connection has ended")
		}
	})
}

// TestLateFramesAreIgnored is what crosses the end of a stream on the wire.
func TestLateFramesAreIgnored(t *testing.T) {
	bubble(t, func(t *testing.T) {
		p := newPair(t, Config{}, Config{}, func(s *Stream) {})
		synctest.Wait()
		s := p.open(t)
		say(t, s, "x")
		synctest.Wait() // it was reset
		a := p.near
		a.mu.Lock()
		a.out.pend = append(a.out.pend, dataFrame(0, 1, "late")...)
		a.out.control(note{kindWindow, 1, 5})
		a.out.control(note{kindReset, 1, resetCancel})
		a.out.wake()
		a.mu.Unlock()
		s.Close()
		s = p.open(t)
		say(t, s, "y")
		synctest.Wait()
		if !p.far.Live() {
			t.Error("the connection has ended")
		}
		s.Close()
	})
}

// TestAnswersThatNobodyReads has a peer provoke answers and read none.
func TestAnswersThatNobodyReads(t *testing.T) {
	bubble(t, func(t *testing.T) {
		nc, peer := meshtest.Pipe()
		defer peer.Close()
		c := Accepted(nc, Config{}, func(*Stream) bool { return false })
		var wg sync.WaitGroup
		var end error
		wg.Go(func() { end = c.Run() })
		for i := range uint32(1 << 20) {
			if i%opensRate == 0 { // it is no flood
				time.Sleep(time.Second)
			}
			if _, err := peer.Write(dataFrame(flagOpen, i+1, "x")); err != nil {
				break
			}
		}
		wg.Wait()
		if v := (*Violation)(nil); !errors.As(end, &v) || v.Reason != Unread {
			t.Errorf("it ended with %v", end)
		}
	})
}

// FuzzFrames gives both kinds of ends arbitrary bytes: they must come to an end
// and hold no more than they may.
func FuzzFrames(f *testing.F) {
	f.Add(true, []byte{})
	f.Add(false, hello.append(nil))
	f.Add(true, append(dataFrame(flagOpen, 1, "GET / HTTP/1.1\r\n\r\n"), dataFrame(flagEnd, 1, "")...))
	f.Add(true, append(dataFrame(flagOpen, 1, "x"), note{kindReset, 1, resetRefused}.append(nil)...))
	f.Add(false, append(hello.append(nil), goawayFrame(goDrain).append(nil)...))
	f.Fuzz(func(t *testing.T, accepts bool, b []byte) {
		nc, peer := meshtest.Pipe()
		var c *Conn
		var wg sync.WaitGroup
		if accepts {
			c = Accepted(nc, Config{Streams: 4}, func(s *Stream) bool {
				wg.Go(func() {
					defer s.Close()
					_, _ = io.Copy(struct{ io.Writer }{s}, struct{ io.Reader }{s})
				})
				return true
			})
		} else {
			c = Dialled(nc, Config{})
			s, err := c.Open()
			if err != nil {
				t.Fatal(err)
			}
			wg.Go(func() {
				defer s.Close()
				_, _ = s.Write([]byte("x"))
				_, _ = io.Copy(io.Discard, struct{ io.Reader }{s})
			})
		}
		wg.Go(func() { _ = c.Run() })
		wg.Go(func() { _, _ = io.Copy(io.Discard, peer) })
		_, _ = peer.Write(b)
		_ = peer.CloseWrite()
		wg.Wait()
		peer.Close()
		if n := c.open.Load(); n != 0 {
			t.Errorf("%d streams are left", n)
		}
	})
}

// A stream that is broken off behind its very beginning is nothing to those that
// accept, and counts; who breaks off too much loses the connection.
func TestStreamsBrokenOffAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		nc, peer := meshtest.Pipe()
		defer peer.Close()
		accepted, broken := 0, 0
		c := Accepted(nc, Config{Broken: func() bool { broken++; return broken < 10 }}, func(*Stream) bool { accepted++; return false })
		var wg sync.WaitGroup
		var end error
		wg.Go(func() { end = c.Run() })
		wg.Go(func() { _, _ = io.Copy(io.Discard, peer) })
		send(t, peer, opensAndResets(9)...)
		synctest.Wait()
		if !c.Live() || accepted != 0 || broken != 9 || c.open.Load() != 0 {
			t.Errorf("live %v, %d accepted, %d broken off, %d open", c.Live(), accepted, broken, c.open.Load())
		}
		send(t, peer, dataFrame(flagOpen, 100, "x"), note{kindReset, 100, resetCancel})
		wg.Wait()
		if v := (*Violation)(nil); !errors.As(end, &v) || v.Reason != Flood || accepted != 0 {
			t.Errorf("it ended with %v", end)
		}
	})
}
