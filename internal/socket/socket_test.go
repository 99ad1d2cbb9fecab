package socket

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/capture"
)

// counting counts the writes that reach the network.
type counting struct {
	net.Conn
	writes atomic.Int64
}

func (c *counting) Write(p []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(p)
}

// onLoopback is a pair of connections.
func onLoopback(t *testing.T) (near, far net.Conn) {
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
	t.Cleanup(func() {
		near.Close()
		far.Close()
	})
	return near, far
}

// encrypted speaks TLS over two Sockets.
func encrypted(t *testing.T, near, far net.Conn) (client, server *tls.Conn) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, leaf, leaf, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	server = tls.Server(New(far), &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, DynamicRecordSizingDisabled: true})
	client = tls.Client(New(near), &tls.Config{InsecureSkipVerify: true, DynamicRecordSizingDisabled: true})
	done := make(chan error, 1)
	go func() { done <- server.Handshake() }()
	if err := errors.Join(client.Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	return client, server
}

func TestASinkSendsAllRecordsInOneGo(t *testing.T) {
	near, far := onLoopback(t)
	count := &counting{Conn: near}
	client, server := encrypted(t, count, far)
	sent := make([]byte, Large)
	for i := range sent {
		sent[i] = byte(mathrand.Uint32())
	}
	before := count.writes.Load()
	done := make(chan error, 1)
	go func() {
		_, err := NewSink(client).Write(sent)
		done <- err
	}()
	var got bytes.Buffer
	from := NewSource(server)
	for got.Len() < len(sent) {
		b, err := from.Next()
		if err != nil {
			t.Fatal(err)
		}
		got.Write(b)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n := count.writes.Load() - before; n != 1 || !bytes.Equal(got.Bytes(), sent) {
		t.Errorf("%d writes, and what arrives is the same: %v", n, bytes.Equal(got.Bytes(), sent))
	}
	from.Release()
	if n := largeIn.Load(); n != 0 {
		t.Errorf("%d large buffers are held", n)
	}
}

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
		{"TLS", func(t *testing.T, near, far net.Conn) (net.Conn, net.Conn) {
			c, s := encrypted(t, near, far)
			return c, s
		}},
		{"TLS on direct", func(t *testing.T, near, far net.Conn) (net.Conn, net.Conn) {
			c, s := encrypted(t, capture.NewDirect(near), capture.NewDirect(far))
			return c, s
		}},
	} {
		t.Run(way.name, func(t *testing.T) {
			near, far := onLoopback(t)
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
				k := NewSink(to)
				for _, p := range pieces {
					if _, err := k.Write(p); err != nil {
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

// TestOnlyThePeerEndsTLS: whoever stands on the way can close a connection, and
// what was cut off must not be taken for the whole.
func TestOnlyThePeerEndsTLS(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(*tls.Conn) error
		want error
	}{
		{"a farewell", func(c *tls.Conn) error { return c.CloseWrite() }, io.EOF},
		{"none", func(c *tls.Conn) error { return c.NetConn().Close() }, io.ErrUnexpectedEOF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			near, far := onLoopback(t)
			client, server := encrypted(t, near, far)
			if _, err := client.Write([]byte("the first half")); err != nil {
				t.Fatal(err)
			}
			if err := tt.end(client); err != nil {
				t.Fatal(err)
			}
			s := NewSource(server)
			b, err := s.Next()
			if string(b) != "the first half" || err != nil {
				t.Fatalf("%q, %v", b, err)
			}
			if b, err = s.Next(); len(b) > 0 || err != tt.want {
				t.Errorf("%q, %v, want %v", b, err, tt.want)
			}
		})
	}
}

func TestADeadlineEndsNothing(t *testing.T) {
	near, far := onLoopback(t)
	client, server := encrypted(t, near, capture.NewDirect(far))
	s := NewSource(server)
	for range 2 {
		if err := server.SetReadDeadline(time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		if b, err := s.Next(); len(b) > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%q, %v", b, err)
		}
		if s.buf != nil || s.sock.in != nil {
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

// TestASocketGivesOneRecordAtATime: what comes after it is seen to be there.
func TestASocketGivesOneRecordAtATime(t *testing.T) {
	near, far := onLoopback(t)
	client, server := encrypted(t, near, far)
	sock := server.NetConn().(*Socket)
	k := client.NetConn().(*Socket)
	k.Cork()
	for _, text := range []string{"one", "two"} {
		if _, err := client.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	if err := k.Uncork(); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	for i, text := range []string{"one", "two"} {
		n, err := server.Read(b)
		if string(b[:n]) != text || err != nil || (sock.Buffered() > 0) != (i == 0) {
			t.Errorf("%q, %v, %d bytes left", b[:n], err, sock.Buffered())
		}
	}
}

// TestLargeBuffersAreBounded: who finds none left makes do with a small one.
func TestLargeBuffersAreBounded(t *testing.T) {
	var held []*buffer
	for range maxLarge {
		held = append(held, get(true))
	}
	if b := get(true); len(b.bytes) != Small {
		t.Errorf("one more has %d bytes", len(b.bytes))
	}
	near, far := onLoopback(t)
	client, server := encrypted(t, near, far)
	go func() { _, _ = NewSink(client).Write(make([]byte, Large)) }()
	for n, s := 0, NewSource(server); n < Large; {
		b, err := s.Next()
		if n += len(b); err != nil {
			t.Fatal(err)
		}
	}
	for _, b := range held {
		b.put()
	}
	if n := largeIn.Load(); n != 0 {
		t.Errorf("%d large buffers are held", n)
	}
}

// TestSocketParts looks at a Socket through pieces of every size: it gives no
// bytes of two records at once, and loses none.
func TestSocketParts(t *testing.T) {
	records := [][]byte{
		append([]byte{23, 3, 3, 0, 5}, "hello"...),
		{23, 3, 3, 0, 0},
		append([]byte{23, 3, 3, 1, 0}, bytes.Repeat([]byte{'x'}, 256)...),
	}
	for size := 1; size < 300; size++ {
		s := New(pieces{bytes.NewReader(bytes.Join(records, nil)), size})
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
	near, far := onLoopback(t)
	a, b := encrypted(t, near, capture.NewDirect(far))
	sock := a.NetConn().(*Socket)
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
