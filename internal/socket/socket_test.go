package socket

import (
	"bytes"
	"errors"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"sallyport/internal/capture"
	"sallyport/internal/meshtest"
)

// TestASourceGivesWhatWasWritten writes pieces of all sizes by all ways.
func TestASourceGivesWhatWasWritten(t *testing.T) {
	for _, way := range []struct {
		name string
		wrap func(t *testing.T, near, far net.Conn) (net.Conn, net.Conn)
	}{
		{"plain", func(_ *testing.T, near, far net.Conn) (net.Conn, net.Conn) { return near, far }},
		{"direct", func(_ *testing.T, near, far net.Conn) (net.Conn, net.Conn) {
			return capture.NewDirect(near), capture.NewDirect(far)
		}},
	} {
		t.Run(way.name, func(t *testing.T) {
			near, far := meshtest.TCP(t)
			to, from := way.wrap(t, near, far)
			r := mathrand.New(mathrand.NewPCG(1, 2))
			var pieces [][]byte
			var all []byte
			for range 200 {
				p := make([]byte, 1+r.IntN(1<<(1+r.IntN(18))))
				for i := range p {
					p[i] = byte(r.Uint32())
				}
				pieces, all = append(pieces, p), append(all, p...)
			}
			var wg sync.WaitGroup
			defer wg.Wait()
			wg.Go(func() {
				for _, p := range pieces {
					if _, err := to.Write(p); err != nil {
						t.Error(err)
						return
					}
				}
				if err := to.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
					t.Error(err)
				}
			})
			var got []byte
			for s := NewSource(from); ; {
				b, err := s.Next()
				if err == io.EOF && len(b) == 0 {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, b...)
			}
			if !bytes.Equal(got, all) {
				t.Errorf("%d bytes arrive of %d, or others", len(got), len(all))
			}
		})
	}
}

func TestADeadlineEndsNothing(t *testing.T) {
	near, far := meshtest.TCP(t)
	client, server := near, capture.NewDirect(far)
	s := NewSource(server)
	for range 2 {
		if err := server.SetReadDeadline(time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		if b, err := s.Next(); len(b) > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%q, %v", b, err)
		}
		if s.buf != nil {
			t.Error("a side that waits holds a buffer")
		}
		if err := server.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Write([]byte("more")); err != nil {
			t.Fatal(err)
		}
		if b, err := s.Next(); string(b) != "more" || err != nil {
			t.Fatalf("%q, %v", b, err)
		}
	}
}

// TestLargeBuffersAreBounded: who finds none left makes do with a small one.
func TestLargeBuffersAreBounded(t *testing.T) {
	var held []*Buffer
	for range maxLarge {
		held = append(held, Get(true))
	}
	if b := Get(true); b.Large() {
		t.Errorf("one more has %d bytes", len(b.Bytes))
	}
	near, far := meshtest.TCP(t)
	go func() { _, _ = near.Write(make([]byte, Large)) }()
	for n, s := 0, NewSource(far); n < Large; {
		b, err := s.Next()
		if n += len(b); err != nil || len(b) > Small {
			t.Fatalf("%d bytes at once, %v", len(b), err)
		}
	}
	for _, b := range held {
		b.Put()
	}
	if n := largeIn.Load(); n != 0 {
		t.Errorf("%d large buffers are held", n)
	}
}

// A connection that was reset is gone, though something is still to be read.
func TestGone(t *testing.T) {
	near, far := meshtest.TCP(t)
	if _, err := far.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if Gone(near) {
		t.Error("a connection that stands is gone")
	}
	_ = far.(*net.TCPConn).SetLinger(0)
	far.Close()
	for end := time.Now().Add(time.Minute); !Gone(near); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatal("a connection that was reset is not gone")
		}
	}
	if a, b := net.Pipe(); Gone(a) || Gone(b) {
		t.Error("what has no descriptor is gone")
	}
}
