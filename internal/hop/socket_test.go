package hop

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"sallyport/internal/capture"
)

// TestSocketParts looks at a Socket through pieces of every size: it gives no
// bytes of two records at once, and loses none.
func TestSocketParts(t *testing.T) {
	records := [][]byte{
		append([]byte{23, 3, 3, 0, 5}, "hello"...),
		{23, 3, 3, 0, 0},
		append([]byte{23, 3, 3, 1, 0}, bytes.Repeat([]byte{'x'}, 256)...),
	}
	for size := 1; size < 300; size++ {
		s := NewSocket(pieces{bytes.NewReader(bytes.Join(records, nil)), size})
		for i, want := range records {
			var got []byte
			for len(got) < len(want) {
				p := make([]byte, 300)
				n, err := s.Read(p)
				if err != nil {
					t.Fatalf("pieces of %d, record %d: %v", size, i, err)
				}
				got = append(got, p[:n]...)
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("pieces of %d, record %d: got %q", size, i, got)
			}
		}
		if _, err := s.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("pieces of %d: %v, want EOF", size, err)
		}
	}
}

// pieces is a connection on which so many bytes arrive at a time.
type pieces struct {
	*bytes.Reader
	size int
}

func (p pieces) Read(b []byte) (int, error)       { return p.Reader.Read(b[:min(len(b), p.size)]) }
func (p pieces) Write([]byte) (int, error)        { return 0, net.ErrClosed }
func (p pieces) Close() error                     { return nil }
func (p pieces) LocalAddr() net.Addr              { return nil }
func (p pieces) RemoteAddr() net.Addr             { return nil }
func (p pieces) SetDeadline(time.Time) error      { return nil }
func (p pieces) SetReadDeadline(time.Time) error  { return nil }
func (p pieces) SetWriteDeadline(time.Time) error { return nil }

// TestQuietMissesNothing waits before each read while records arrive many at a
// time: one that TLS had already would be waited for in vain.
func TestQuietMissesNothing(t *testing.T) {
	near, far := onTCP(t)
	sock := NewSocket(near)
	a, b := shakeHands(t, sock, NewSocket(capture.NewDirect(far)))
	defer b.Close()
	quiet := Quiet(b)
	q, ok := quiet.(awaiter)
	if !ok {
		t.Skip("connections here do not await")
	}
	_ = b.SetReadDeadline(time.Now().Add(10 * time.Second))
	for _, size := range []int{1, 100, 4096, 20_000} {
		const records = 50
		go func() {
			sock.Cork()
			for range records {
				_, _ = a.Write(bytes.Repeat([]byte{'x'}, size))
			}
			_ = sock.Uncork()
		}()
		p := make([]byte, 4096)
		for left := records * size; left > 0; {
			if err := q.Await(); err != nil {
				t.Fatalf("%d bytes a record, %d missing: %v", size, left, err)
			}
			n, err := quiet.Read(p)
			if err != nil {
				t.Fatal(err)
			}
			left -= n
		}
	}
	if s, _ := b.NetConn().(*Socket); s.in != nil {
		t.Error("a socket with nothing to read holds a buffer")
	}
	_ = b.SetReadDeadline(time.Now().Add(time.Millisecond))
	if err := q.Await(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("waited for nothing: %v, want the deadline", err)
	}
}

func onTCP(t *testing.T) (near, far net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if near, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if far, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

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
		if _, rerr := s.Read(make([]byte, 1)); err != nil || !errors.Is(rerr, os.ErrDeadlineExceeded) || time.Since(start) != time.Second {
			t.Errorf("waited %s: %v, then read: %v", time.Since(start), err, rerr)
		}
		s.Close()
		_ = s.Await() // it does not wait
		p.stop()
	})
}
