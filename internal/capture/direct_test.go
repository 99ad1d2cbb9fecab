package capture

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// directs gives both ends of a TCP connection.
func directs(t *testing.T) (a, b net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	type accepted struct {
		c   net.Conn
		err error
	}
	got := make(chan accepted, 1)
	go func() {
		c, err := ln.Accept()
		got <- accepted{c, err}
	}()
	a, err = net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	other := <-got
	if other.err != nil {
		t.Fatal(other.err)
	}
	a, b = NewDirect(a), NewDirect(other.c)
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// asker is what a Direct can on Linux.
type asker interface {
	Ask(p []byte) (int, error)
	Await() error
}

func TestDirectIsAConnection(t *testing.T) {
	for _, tt := range []struct {
		name string
		run  func(t *testing.T, a, b net.Conn)
	}{
		{"what is written arrives, more than fits at once", func(t *testing.T, a, b net.Conn) {
			want := bytes.Repeat([]byte("0123456789abcdef"), 1<<19) // 8 MiB
			wrote := make(chan error, 1)
			go func() {
				n, err := a.Write(want)
				if err == nil && n != len(want) {
					err = io.ErrShortWrite
				}
				a.Close()
				wrote <- err
			}()
			got, err := io.ReadAll(struct{ io.Reader }{b})
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("read %d bytes, %v; want all %d", len(got), err, len(want))
			}
			if err := <-wrote; err != nil {
				t.Error(err)
			}
		}},
		{"nothing to read until the deadline", func(t *testing.T, a, _ net.Conn) {
			_ = a.SetReadDeadline(time.Now().Add(time.Millisecond))
			if _, err := a.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("got %v, want the deadline", err)
			}
		}},
		{"no room to write until the deadline", func(t *testing.T, a, _ net.Conn) {
			much := make([]byte, 64<<20)
			_ = a.SetWriteDeadline(time.Now().Add(2 * time.Second))
			n, err := a.Write(much)
			if !errors.Is(err, os.ErrDeadlineExceeded) || n == 0 {
				t.Errorf("wrote %d: %v, want some and the deadline", n, err)
			}
		}},
		{"closing wakes who reads", func(t *testing.T, a, _ net.Conn) {
			go a.Close()
			if _, err := a.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
				t.Errorf("got %v, want net.ErrClosed", err)
			}
			if _, err := a.Write([]byte{1}); !errors.Is(err, net.ErrClosed) {
				t.Errorf("got %v, want net.ErrClosed", err)
			}
		}},
		{"a reset is an error, an end is EOF", func(t *testing.T, a, b net.Conn) {
			if err := b.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if n, err := a.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("got %d, %v; want EOF", n, err)
			}
			_ = b.(interface{ SetLinger(int) error }).SetLinger(0)
			b.Close()
			if _, err := a.Write([]byte{1}); err == nil {
				t.Error("wrote to a connection that was reset")
			}
		}},
		{"an empty read and an empty write do nothing", func(t *testing.T, a, _ net.Conn) {
			n, err := a.Read(nil)
			m, werr := a.Write(nil)
			if n != 0 || err != nil || m != 0 || werr != nil {
				t.Errorf("got %d, %v and %d, %v", n, err, m, werr)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := directs(t)
			tt.run(t, a, b)
		})
	}
}

func TestAskWaitsForTheAnswer(t *testing.T) {
	a, b := directs(t)
	d, ok := a.(asker)
	if !ok {
		t.Skip("only Linux has Ask")
	}
	got := make([]byte, 8)
	for range 200 {
		go func() {
			buf := make([]byte, 8)
			if _, err := io.ReadFull(b, buf[:4]); err == nil {
				_, _ = b.Write(buf[:4])
			}
		}()
		if n, err := d.Ask([]byte("ping")); n != 4 || err != nil {
			t.Fatalf("wrote %d: %v", n, err)
		}
		if n, err := a.Read(got); n != 4 || err != nil {
			t.Fatalf("read %d: %v", n, err)
		}
	}
	t.Run("more than fits at once", func(t *testing.T) {
		go func() {
			_, _ = io.Copy(io.Discard, io.LimitReader(b, 8<<20))
			_, _ = b.Write([]byte("pong"))
		}()
		if n, err := d.Ask(make([]byte, 8<<20)); n != 8<<20 || err != nil {
			t.Errorf("wrote %d: %v", n, err)
		}
		if n, err := a.Read(got); n != 4 || err != nil {
			t.Errorf("read %d: %v", n, err)
		}
	})
	t.Run("the deadline shows in the read", func(t *testing.T) {
		_ = a.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if n, err := d.Ask([]byte("ping")); n != 4 || err != nil {
			t.Errorf("wrote %d: %v", n, err)
		}
		if _, err := a.Read(got); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("got %v, want the deadline", err)
		}
		_ = a.SetReadDeadline(time.Time{})
	})
	t.Run("not on a connection with something to read", func(t *testing.T) {
		if _, err := b.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := d.Await(); err != nil {
			t.Fatal(err)
		}
		if n, err := d.Ask([]byte("ping")); n != 0 || !errors.Is(err, ErrSpent) {
			t.Errorf("wrote %d: %v; want ErrSpent", n, err)
		}
	})
	t.Run("not on one that is closed", func(t *testing.T) {
		a.Close()
		if n, err := d.Ask([]byte("ping")); n != 0 || !errors.Is(err, net.ErrClosed) {
			t.Errorf("wrote %d: %v; want net.ErrClosed", n, err)
		}
	})
}

func TestAskFindsAnEnd(t *testing.T) {
	a, b := directs(t)
	d, ok := a.(asker)
	if !ok {
		t.Skip("only Linux has Ask")
	}
	b.Close()
	if err := d.Await(); err != nil {
		t.Fatal(err)
	}
	if n, err := d.Ask([]byte("ping")); n != 0 || !errors.Is(err, ErrSpent) {
		t.Errorf("wrote %d: %v; want ErrSpent", n, err)
	}
}

func TestDirectAllocatesNothing(t *testing.T) {
	a, b := directs(t)
	buf := make([]byte, 64)
	if n := testing.AllocsPerRun(200, func() {
		_, _ = a.Write(buf)
		_, _ = b.Read(buf)
	}); n != 0 {
		t.Errorf("a write and a read allocate %v times", n)
	}
}
