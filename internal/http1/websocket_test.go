package http1

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// frame is a frame with a payload of n bytes; first has FIN, RSV and opcode.
func frame(first byte, masked bool, n int) []byte {
	b := []byte{first}
	bit := byte(0)
	if masked {
		bit = maskBit
	}
	switch {
	case n > 0xffff:
		b = binary.BigEndian.AppendUint64(append(b, bit|127), uint64(n))
	case n > 125:
		b = binary.BigEndian.AppendUint16(append(b, bit|126), uint16(n))
	default:
		b = append(b, bit|byte(n))
	}
	if masked {
		b = append(b, 1, 2, 3, 4)
	}
	return append(b, make([]byte, n)...)
}

func join(b ...[]byte) []byte { return bytes.Join(b, nil) }

var framesTable = []struct {
	name          string
	b             []byte
	masked        bool
	between, lost bool
}{
	{"nothing yet", nil, false, true, false},
	{"a text", frame(0x81, false, 5), false, true, false},
	{"from a client", frame(0x82, true, 5), true, true, false},
	{"an empty one", frame(0x81, true, 0), true, true, false},
	{"of 16 bits", frame(0x82, false, 126), false, true, false},
	{"of 64 bits", frame(0x82, true, 70_000), true, true, false},
	{"compressed", frame(0xc1, false, 5), false, true, false},
	{"half a head", frame(0x82, false, 126)[:3], false, false, false},
	{"a head", frame(0x82, false, 126)[:4], false, false, false},
	{"half a mask", frame(0x82, true, 5)[:4], true, false, false},
	{"all but a byte", frame(0x82, false, 70_000)[:70_009], false, false, false},
	{"between the frames of a message", frame(0x01, false, 5), false, true, false},
	{"a message of three, with a ping", join(frame(0x01, false, 5), frame(0x00, false, 5), frame(0x89, false, 5), frame(0x80, false, 5)), false, true, false},
	{"after a Close frame", frame(0x88, false, 2), false, false, false},
	{"something after a Close frame", join(frame(0x88, false, 2), frame(0x81, false, 2)), false, false, true},
	{"a client without mask", frame(0x81, false, 5), true, false, true},
	{"a server with mask", frame(0x81, true, 5), false, false, true},
	{"a continuation of nothing", frame(0x80, false, 5), false, false, true},
	{"a message within a message", join(frame(0x01, false, 5), frame(0x81, false, 5)), false, false, true},
	{"an opcode that nobody knows", frame(0x83, false, 5), false, false, true},
	{"a control opcode that nobody knows", frame(0x8b, false, 5), false, false, true},
	{"a ping in pieces", frame(0x09, false, 5), false, false, true},
	{"a large ping", frame(0x89, false, 126), false, false, true},
	{"a length with its top bit", []byte{0x82, 127, 0x80, 0, 0, 0, 0, 0, 0, 0}, false, false, true},
	{"no frame at all", []byte("open"), true, false, true},
}

func TestFrames(t *testing.T) {
	for _, c := range framesTable {
		for _, step := range []int{1, 2, 3, 1 << 20} {
			f := frames{masked: c.masked}
			for b := c.b; len(b) > 0; b = b[min(step, len(b)):] {
				f.follow(b[:min(step, len(b))])
			}
			if f.between() != c.between || f.lost != c.lost {
				t.Errorf("%s, %d bytes at once: between %v, lost %v", c.name, step, f.between(), f.lost)
			}
		}
	}
}

// FuzzFrames holds what is followed in pieces to what is followed at once, and a
// Close frame that is put in to be one.
func FuzzFrames(f *testing.F) {
	for _, c := range framesTable {
		f.Add(c.b[:min(len(c.b), 300)], c.masked, byte(3))
	}
	f.Fuzz(func(t *testing.T, b []byte, masked bool, step byte) {
		whole, parts := frames{masked: masked}, frames{masked: masked}
		whole.follow(b)
		for n := int(step)%7 + 1; len(b) > 0; b = b[min(n, len(b)):] {
			parts.follow(b[:min(n, len(b))])
		}
		if whole.between() != parts.between() || whole.lost != parts.lost {
			t.Fatalf("at once: between %v, lost %v; in pieces: between %v, lost %v", whole.between(), whole.lost, parts.between(), parts.lost)
		}
		if !whole.between() {
			return
		}
		if whole.follow(closeFrame(ClosePolicy, masked)); whole.lost || !whole.closed || whole.between() {
			t.Fatalf("a Close frame was taken for %+v", whole)
		}
	})
}

// parted runs a tunnel between two ends over TCP.
func parted(t *testing.T, webSocket bool) (client, server net.Conn, tun *Tunnel, over <-chan error) {
	t.Helper()
	client, down := meshtest.TCP(t)
	server, tun, over = partedFrom(t, down, webSocket)
	return client, server, tun, over
}

// partedFrom is parted with a client that comes by down.
func partedFrom(t *testing.T, down net.Conn, webSocket bool) (server net.Conn, tun *Tunnel, over <-chan error) {
	t.Helper()
	up, server := meshtest.TCP(t)
	tun = NewTunnel(NewConn(down, Limits{}), NewConn(up, Limits{}), time.Minute)
	tun.WebSocket = webSocket
	done := make(chan error, 1)
	go func() {
		_, _, err := tun.Run()
		done <- err
	}()
	return server, tun, done
}

// passes sends b through and reads it at the other end.
func passes(t *testing.T, from, to net.Conn, b []byte) {
	t.Helper()
	if _, err := from.Write(b); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(to, make([]byte, len(b))); err != nil {
		t.Fatal(err)
	}
}

// last reads what comes until the end.
func last(c net.Conn) []byte {
	_ = c.SetReadDeadline(time.Now().Add(time.Minute))
	b, _ := io.ReadAll(c)
	return b
}

// unmask is a Close frame as its receiver reads it.
func unmask(b []byte) []byte {
	if len(b) < 6 || b[1]&maskBit == 0 {
		return b
	}
	out := []byte{b[0], b[1] &^ maskBit}
	for i, c := range b[6:] {
		out = append(out, c^b[2+i%4])
	}
	return out
}

func TestPartSaysFarewellToBothEnds(t *testing.T) {
	client, server, tun, over := parted(t, true)
	passes(t, server, client, frame(0x81, false, 70_000))
	passes(t, client, server, frame(0x81, true, 5))
	began := time.Now()
	var gone sync.WaitGroup
	gone.Go(func() {
		defer client.Close() // as who has read a Close frame does
		got := last(client)
		if want := closeFrame(ClosePolicy, false); !bytes.Equal(got, want) {
			t.Errorf("the client got %q, want %q", got, want)
		}
	})
	gone.Go(func() {
		defer server.Close()
		got := last(server)
		if len(got) < 2 || got[1]&maskBit == 0 || !bytes.Equal(unmask(got), closeFrame(ClosePolicy, false)) {
			t.Errorf("the server got %q, want a masked Close frame", got)
		}
	})
	tun.Part(ClosePolicy, time.Minute)
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("it took %s, though both ends closed at once", took)
	}
	gone.Wait()
	if err := <-over; err != nil {
		t.Errorf("the tunnel ended with %v", err)
	}
}

// A hasty client has closed as soon as it read its Close frame: it cannot be half
// closed any more, or not even written to. It is heard from only then.
type hasty struct {
	net.Conn
	unwritable bool
	told       chan struct{}
	once       sync.Once
}

var errHasty = errors.New("the peer has closed")

func (h *hasty) Read(p []byte) (int, error) {
	n, err := h.Conn.Read(p)
	<-h.told
	return n, err
}

func (h *hasty) Write(p []byte) (int, error) {
	if h.unwritable {
		return 0, errHasty
	}
	return h.Conn.Write(p)
}

func (h *hasty) CloseWrite() error {
	h.once.Do(func() { close(h.told) })
	return errHasty
}

func TestPartTellsTheServerOfAHastyClient(t *testing.T) {
	for name, unwritable := range map[string]bool{"closed after its Close frame": false, "closed before it": true} {
		t.Run(name, func(t *testing.T) {
			client, nc := meshtest.TCP(t)
			down := &hasty{Conn: nc, unwritable: unwritable, told: make(chan struct{})}
			server, tun, over := partedFrom(t, down, true)
			go tun.Part(CloseGoingAway, time.Minute)
			go func() {
				<-down.told
				client.Close()
			}()
			if got := last(server); !bytes.Equal(unmask(got), closeFrame(CloseGoingAway, false)) {
				t.Errorf("the server got %q, want a Close frame", got)
			}
			server.Close()
			if err := <-over; (err != nil) != unwritable {
				t.Errorf("the tunnel ended with %v", err)
			}
		})
	}
}

// Whoever is in the middle of a frame would take a Close frame for its payload.
func TestPartPutsNothingIntoAFrame(t *testing.T) {
	client, server, tun, over := parted(t, true)
	passes(t, server, client, frame(0x82, false, 1000)[:500])
	passes(t, client, server, frame(0x88, true, 2)) // and the client has said farewell
	go tun.Part(ClosePolicy, time.Second)
	if got := last(client); len(got) > 0 {
		t.Errorf("the client, in the middle of a frame, got %q", got)
	}
	if got := last(server); len(got) > 0 {
		t.Errorf("the server, after a Close frame, got %q", got)
	}
	client.Close()
	server.Close()
	<-over
}

// An end that does not close is waited for no longer than it may take, and what
// it sends meanwhile goes nowhere.
func TestPartCarriesNothingMore(t *testing.T) {
	client, server, tun, over := parted(t, true)
	got := make(chan []byte, 1)
	go func() { got <- last(server) }()
	more := frame(0x81, true, 5)
	stop := make(chan struct{})
	go func() {
		head := make([]byte, 2)
		_, _ = io.ReadFull(client, head) // the farewell has begun
		for {
			select {
			case <-stop:
				return
			default:
				_, _ = client.Write(more)
			}
		}
	}()
	began := time.Now()
	const within = 2 * time.Second
	tun.Part(CloseGoingAway, within)
	if took := time.Since(began); took < within || took > 30*time.Second {
		t.Errorf("it took %s", took)
	}
	close(stop)
	if b := <-got; !bytes.Equal(unmask(b), closeFrame(CloseGoingAway, false)) {
		t.Errorf("the server got %q, want a Close frame alone", b)
	}
	<-over
}

func TestPartOfWhatIsNoWebSocket(t *testing.T) {
	client, server, tun, over := parted(t, false)
	tun.Part(ClosePolicy, time.Hour)
	passes(t, client, server, []byte("goes on"))
	client.Close()
	server.Close()
	<-over
}

// BenchmarkFrames is what it costs to follow frames, over 64 KiB as one read
// brings them.
func BenchmarkFrames(b *testing.B) {
	for _, size := range []int{16, 1000, 64 << 10} {
		one := frame(0x82, true, size)
		var chunk []byte
		for len(chunk) < bulkSize {
			chunk = append(chunk, one...)
		}
		b.Run(fmt.Sprintf("payload=%d", size), func(b *testing.B) {
			b.SetBytes(int64(len(chunk)))
			b.ReportAllocs()
			f := frames{masked: true}
			for b.Loop() {
				f.follow(chunk)
			}
			if !f.between() {
				b.Fatal("lost the frames")
			}
		})
	}
}

// BenchmarkTunnel is a message to and fro, followed and not.
func BenchmarkTunnel(b *testing.B) {
	for _, webSocket := range []bool{false, true} {
		b.Run(fmt.Sprintf("websocket=%v", webSocket), func(b *testing.B) {
			client, down := meshtest.TCP(b)
			up, server := meshtest.TCP(b)
			tun := NewTunnel(NewConn(down, Limits{}), NewConn(up, Limits{}), time.Minute)
			tun.WebSocket = webSocket
			go tun.Run() //nolint:errcheck // ends with the connections
			go func() {
				got := make([]byte, 1006)
				for {
					if _, err := io.ReadFull(server, got); err != nil {
						return
					}
					if _, err := server.Write(frame(0x82, false, 1000)); err != nil {
						return
					}
				}
			}()
			ask, got := frame(0x82, true, 998), make([]byte, 1004)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := client.Write(ask); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(client, got); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
