package hop

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	"sallyport/internal/capture"
	"sallyport/internal/meshtest"
	"sallyport/internal/record"
	"sallyport/internal/svid"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// onLoopback is a pair on a real connection; what the far end accepts is served
// by serve.
func onLoopback(tb testing.TB, serve func(*Stream)) *pair {
	tb.Helper()
	here, there := meshtest.TCP(tb)
	near, far := shakeHands(tb, capture.NewDirect(here), capture.NewDirect(there))
	p := new(pair)
	p.start(tb, near, far, Config{}, Config{}, serve)
	return p
}

// answer answers each 300 bytes with 1 KiB.
func answer(s *Stream) {
	request, answer := make([]byte, requestSize), make([]byte, answerSize)
	for {
		if _, err := io.ReadFull(s, request); err != nil {
			return
		}
		if _, err := s.Write(answer); err != nil {
			return
		}
	}
}

func shakeHands(tb testing.TB, here, there net.Conn) (near, far net.Conn) {
	ca := meshtest.NewCA(tb, meshtest.TD)
	web, billing := meshtest.ID("/ns/shop/sa/web"), meshtest.ID("/ns/shop/sa/billing")
	shaken := make(chan error, 1)
	go func() {
		var err error
		far, err = record.Server(tb.Context(), there, svid.ServerTLS(meshtest.Source(tb, ca, billing), func(spiffeid.ID) error { return nil }, Proto), nil)
		shaken <- err
	}()
	near, err := record.Client(tb.Context(), here, svid.ClientTLS(meshtest.Source(tb, ca, web), billing, Proto))
	if err := errors.Join(err, <-shaken); err != nil {
		tb.Fatal(err)
	}
	return near, far
}

const (
	requestSize = 300
	answerSize  = 1 << 10
)

// caller makes calls on a stream of its own.
func caller(tb testing.TB, p *pair) func() {
	s, err := p.near.Open()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	request, answer := make([]byte, requestSize), make([]byte, answerSize)
	return func() {
		if _, err := s.Write(request); err != nil {
			tb.Fatal(err)
		}
		if _, err := io.ReadFull(s, answer); err != nil {
			tb.Fatal(err)
		}
	}
}

// TestCallsDoNotAllocate holds the promise of the hot path.
func TestCallsDoNotAllocate(t *testing.T) {
	if meshtest.Race {
		t.Skip("the race detector has a sync.Pool forget things")
	}
	call := caller(t, onLoopback(t, answer))
	for range 200 { // buffers find their size
		call()
	}
	if n := testing.AllocsPerRun(2000, call); n != 0 {
		t.Errorf("%v allocations per call, want 0", n)
	}
}

// BenchmarkCall is one call after the other over loopback and TLS; with company
// 64 callers share the connection.
func BenchmarkCall(b *testing.B) {
	b.Run("alone", func(b *testing.B) {
		call := caller(b, onLoopback(b, answer))
		b.ReportAllocs()
		for b.Loop() {
			call()
		}
	})
	b.Run("company", func(b *testing.B) {
		p := onLoopback(b, answer)
		caller(b, p)() // the hello has come
		work := make(chan int)
		var wg sync.WaitGroup
		for range 64 {
			call := caller(b, p)
			wg.Go(func() {
				for n := range work {
					for range n {
						call()
					}
				}
			})
		}
		b.ReportAllocs()
		b.ResetTimer()
		for left := b.N; left > 0; left -= 100 {
			work <- min(left, 100)
		}
		close(work)
		wg.Wait()
	})
}

// BenchmarkBulk is one stream with much to send.
func BenchmarkBulk(b *testing.B) {
	p := onLoopback(b, func(s *Stream) { _, _ = io.Copy(io.Discard, struct{ io.Reader }{s}) })
	s, err := p.near.Open()
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	buf := make([]byte, 64<<10)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		if _, err := s.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
}

// What is queued grows in few steps, and is what was queued.
func TestPendingGrowsInFewSteps(t *testing.T) {
	var o writer
	var want []byte
	steps, was := 0, 0
	for i := range 1000 {
		frame := bytes.Repeat([]byte{byte(i)}, 300)
		o.pend = append(o.pending(len(frame)), frame...)
		want = append(want, frame...)
		if cap(o.pend) != was {
			steps, was = steps+1, cap(o.pend)
		}
	}
	if steps > 4 {
		t.Errorf("300 KB were moved %d times, want at most 4", steps)
	}
	if !bytes.Equal(o.pend, want) {
		t.Error("what is queued is not what was put there")
	}
}
