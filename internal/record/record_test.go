package record

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/capture"
	"sallyport/internal/meshtest"
	"sallyport/internal/mux"
)

var suites = []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384, tls.TLS_CHACHA20_POLY1305_SHA256}

// TestPiecesArriveWhole writes pieces of all sizes in all suites, and reads them
// in others.
func TestPiecesArriveWhole(t *testing.T) {
	for _, id := range suites {
		for _, direct := range []bool{true, false} {
			near, far := meshtest.TCP(t)
			if direct {
				near, far = capture.NewDirect(near), capture.NewDirect(far)
			}
			client, server := pairOn(t, near, far)
			ofSuite(t, id, client, server)
			var wg sync.WaitGroup
			for i, way := range [][2]*Conn{{client, server}, {server, client}} {
				wg.Go(func() { carry(t, way[0], way[1], uint64(i)) })
			}
			wg.Wait()
		}
	}
}

// carry writes from one end to the other until the end.
func carry(t *testing.T, from, to *Conn, seed uint64) {
	r := mathrand.New(mathrand.NewPCG(1, seed))
	size := func() int { return 1 + r.IntN(1<<(1+r.IntN(20))) }
	var all []byte
	var sizes []int
	source := mathrand.NewChaCha8([32]byte{byte(seed)})
	for len(all) < 4<<20 {
		n := size()
		sizes = append(sizes, n)
		all = append(all, make([]byte, n)...)
		_, _ = source.Read(all[len(all)-n:]) // it never fails
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		left := all
		for i, n := range sizes {
			var err error
			if i%3 == 1 {
				lent := append(make([]byte, 0, n+1), left[:n]...)
				if _, err = from.WriteLent(lent); !bytes.Equal(lent, left[:n]) {
					t.Error("what was lent is not as it was")
				}
			} else if i%3 == 0 {
				_, err = from.WriteParts([][]byte{left[:n/3], nil, left[n/3 : n/2], left[n/2 : n]})
			} else {
				_, err = from.Write(left[:n])
			}
			if err != nil {
				t.Error(err)
				return
			}
			left = left[n:]
		}
		if err := from.CloseWrite(); err != nil {
			t.Error(err)
		}
	})
	rr := mathrand.New(mathrand.NewPCG(2, seed))
	var got []byte
	for {
		if rr.IntN(2) == 0 {
			if err := to.Await(); err != nil {
				t.Error(err)
				return
			}
		}
		p := make([]byte, 1+rr.IntN(1<<(1+rr.IntN(20))))
		n, err := to.Read(p)
		got = append(got, p[:n]...)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Error(err)
			return
		}
	}
	if !bytes.Equal(got, all) {
		t.Errorf("%d bytes arrive of %d, or others", len(got), len(all))
	}
	if to.in.buf != nil || to.Buffered() != 0 {
		t.Error("a buffer is held at the end")
	}
}

// TestPeersOfCryptoTLS speaks with the standard library's, whichever end it is.
func TestPeersOfCryptoTLS(t *testing.T) {
	for _, serve := range []bool{true, false} {
		ours, theirs := withTLS(t, serve)
		say(t, ours, "hello")
		hear(t, theirs, "hello")
		say(t, theirs, "good day")
		hear(t, ours, "good day")
		big := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
		for _, way := range [][2]net.Conn{{ours, theirs}, {theirs, ours}} {
			go func() { _, _ = way[0].Write(big) }()
			hear(t, way[1], string(big))
		}
		cs := ours.ConnectionState()
		if !cs.HandshakeComplete || cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != "x" || len(cs.PeerCertificates) != 1 {
			t.Errorf("state %+v", cs)
		}
		if err := theirs.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if n, err := ours.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("after a farewell: %d, %v", n, err)
		}
		say(t, ours, "still here")
		hear(t, theirs, "still here")
		if err := ours.Close(); err != nil {
			t.Fatal(err)
		}
		if n, err := theirs.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("after ours: %d, %v", n, err)
		}
		if err := ours.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed again: %v", err)
		}
		if _, err := ours.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("written after: %v", err)
		}
		if _, err := ours.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read after: %v", err)
		}
	}
}

// TestDataComesWithTheHandshake has the first bytes arrive with what ends it.
func TestDataComesWithTheHandshake(t *testing.T) {
	near, far := meshtest.TCP(t)
	held := &holding{Conn: near}
	done := make(chan error, 1)
	go func() {
		client := tls.Client(held, clientConfig())
		err := client.Handshake()
		if err == nil {
			_, err = client.Write(bytes.Repeat([]byte("x"), 40<<10))
		}
		held.flush()
		done <- err
	}()
	server, err := Server(context.Background(), capture.NewDirect(far), serverConfig(), nil)
	if err := errors.Join(err, <-done); err != nil {
		t.Fatal(err)
	}
	hear(t, server, string(bytes.Repeat([]byte("x"), 40<<10)))
}

// holding keeps all that is written after the first time.
type holding struct {
	net.Conn
	writes int
	kept   []byte
}

func (h *holding) Write(p []byte) (int, error) {
	if h.writes++; h.writes == 1 {
		return h.Conn.Write(p)
	}
	h.kept = append(h.kept, p...)
	return len(p), nil
}

func (h *holding) flush() { _, _ = h.Conn.Write(h.kept) }

// TestOnlyThePeerEnds: whoever stands on the way can close a connection, and what
// was cut off must not be taken for the whole.
func TestOnlyThePeerEnds(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(*Conn) error
		want error
	}{
		{"a farewell", (*Conn).CloseWrite, io.EOF},
		{"the end", (*Conn).Close, io.EOF},
		{"none", func(c *Conn) error { return c.NetConn().Close() }, io.ErrUnexpectedEOF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client, server := pair(t)
			say(t, client, "hello")
			if err := tt.end(client); err != nil {
				t.Fatal(err)
			}
			hear(t, server, "hello")
			for range 2 {
				if n, err := server.Read(make([]byte, 1)); n != 0 || err != tt.want {
					t.Errorf("%d, %v, want %v", n, err, tt.want)
				}
			}
		})
	}
}

func TestADeadlineEndsNothing(t *testing.T) {
	client, server := pair(t)
	for range 2 {
		if err := server.SetReadDeadline(time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		if err := server.Await(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		if n, err := server.Read(make([]byte, 10)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%d, %v", n, err)
		}
		if server.in.buf != nil {
			t.Error("who waits holds a buffer")
		}
		if err := server.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		say(t, client, "more")
		hear(t, server, "more")
	}
}

// TestFarewellsAreBounded closes on a peer that reads nothing.
func TestFarewellsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		client, server := pairOn(t, near, far)
		start := time.Now()
		if err := client.Close(); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took != farewell {
			t.Errorf("it took %s, want %s", took, farewell)
		}
		if _, err := server.Read(make([]byte, 1)); err != io.ErrUnexpectedEOF {
			t.Errorf("the peer reads %v", err)
		}
		// Whoever writes is not waited for.
		near, far = net.Pipe()
		client, server = pairOn(t, near, far)
		done := make(chan error)
		go func() {
			_, err := client.Write([]byte("x"))
			done <- err
		}()
		synctest.Wait()
		start = time.Now()
		_ = client.Close() // what it says is the pipe's
		if err := <-done; err == nil || time.Since(start) != 0 {
			t.Errorf("after %s the writer has %v", time.Since(start), err)
		}
		_ = server.Close() // as above
	})
}

// TestHandshakeFails says what crypto/tls says, and that the time is bounded.
func TestHandshakeFails(t *testing.T) {
	near, far := meshtest.TCP(t)
	old := clientConfig()
	old.MaxVersion, old.MinVersion = tls.VersionTLS12, tls.VersionTLS12
	go func() { _ = tls.Client(near, old).Handshake() }()
	if _, err := Server(context.Background(), far, serverConfig(), nil); err == nil {
		t.Error("TLS 1.2 was spoken")
	}
	_, far = meshtest.TCP(t)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := Server(ctx, far, serverConfig(), nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a silent client: %v", err)
	}
	conf := serverConfig()
	conf.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return nil, nil }
	if _, err := Server(context.Background(), far, conf, nil); err == nil {
		t.Error("another configuration could take the secrets")
	}
}

// TestHandshakesInTurns has one client be slow with the only turn there is: it
// must not keep it while it is waited for.
func TestHandshakesInTurns(t *testing.T) {
	turns := make(mux.Turns, 1)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	near, far := meshtest.TCP(t)
	slow := make(chan error, 1)
	go func() {
		c, err := Server(ctx, far, serverConfig(), turns)
		if err == nil {
			c.Close()
		}
		slow <- err
	}()
	for range 3 {
		n, f := meshtest.TCP(t)
		go func() { _ = tls.Client(n, clientConfig()).Handshake() }()
		c, err := Server(ctx, capture.NewDirect(f), serverConfig(), turns)
		if err != nil {
			t.Fatalf("beside a slow client: %v", err)
		}
		c.Close()
	}
	if err := tls.Client(near, clientConfig()).Handshake(); err != nil {
		t.Errorf("the slow client: %v", err)
	}
	if err := <-slow; err != nil || len(turns) != 0 {
		t.Errorf("%v, %d turns are taken", err, len(turns))
	}
}

// TestAPanicIsWhoeverServes: it must not end the process.
func TestAPanicIsWhoeverServes(t *testing.T) {
	near, far := meshtest.TCP(t)
	go func() { _ = tls.Client(near, clientConfig()).Handshake() }()
	conf := serverConfig()
	conf.VerifyConnection = func(tls.ConnectionState) error { panic("oops") }
	defer func() {
		if recover() != "oops" {
			t.Error("no panic, or another")
		}
	}()
	_, _ = Server(context.Background(), far, conf, nil)
}

// TestCertificatesAreShared among the connections of one peer.
func TestCertificatesAreShared(t *testing.T) {
	_, a := pair(t)
	_, b := pair(t)
	if a.State() != b.State() {
		t.Error("two connections of one peer have states of their own")
	}
	states.mu.Lock() // those of tests before go when the collector has seen it
	defer states.mu.Unlock()
	if n := len(states.known); n == 0 || n > 4 {
		t.Errorf("%d states are known", n)
	}
}

// TestSteadyWorkDoesNotAllocate holds the promise of the hot path.
func TestSteadyWorkDoesNotAllocate(t *testing.T) {
	client, server := pair(t)
	for _, size := range []int{1 << 10, 100 << 10} {
		out, in := make([]byte, size), make([]byte, size)
		round := func() {
			if _, err := client.Write(out); err != nil {
				t.Fatal(err)
			}
			if err := server.Await(); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(server, in); err != nil {
				t.Fatal(err)
			}
		}
		for range 100 {
			round()
		}
		if n := testing.AllocsPerRun(500, round); n >= 1 && !meshtest.Race {
			t.Errorf("%v allocations for %d bytes, want 0", n, size)
		}
	}
}
