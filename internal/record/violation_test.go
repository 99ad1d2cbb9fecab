package record

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"sync"
	"testing"
	"time"

	"sallyport/internal/mux"
	"sallyport/internal/socket"
)

// A liar writes records by hand, by the keys of one direction.
type liar struct {
	keys
	suite *suite
	out   []byte
}

// newLiar takes the place of whoever writes to c.
func newLiar(t testing.TB, c *Conn) *liar {
	t.Helper()
	l := &liar{suite: c.suite}
	if err := l.set(c.suite, c.in.secret[:c.suite.size]); err != nil {
		t.Fatal(err)
	}
	return l
}

// inner writes a record of what is inside, type and padding included.
func (l *liar) inner(b ...byte) {
	head := len(l.out)
	size := len(b) + tagSize
	l.out = append(l.out, typeData, 3, 3, byte(size>>8), byte(size))
	nonce, err := l.number()
	if err != nil {
		panic(err)
	}
	l.out = l.aead.Seal(l.out, nonce, b, l.out[head:head+headerSize])
}

func (l *liar) say(typ byte, b ...byte) { l.inner(append(bytes.Clone(b), typ)...) }

// renew says a KeyUpdate.
func (l *liar) renew(ask byte) {
	l.say(typeHandshake, keyUpdate, 0, 0, 1, ask)
	if err := l.next(l.suite); err != nil {
		panic(err)
	}
}

// scripted is a connection on which so much arrives, and then the end.
type scripted struct {
	net.Conn
	in      *bytes.Reader
	piece   int // how much arrives at a time; 0: all
	written bytes.Buffer
	closed  bool
}

func (s *scripted) Read(p []byte) (int, error) {
	if s.piece > 0 {
		p = p[:min(len(p), s.piece)]
	}
	return s.in.Read(p)
}
func (s *scripted) Write(p []byte) (int, error)      { return s.written.Write(p) }
func (s *scripted) SetWriteDeadline(time.Time) error { return nil }
func (s *scripted) Close() error {
	s.closed = true
	return nil
}

// behind makes a Conn whose handshake is over, as a client or not, and who lies
// to it.
func behind(t testing.TB, id uint16, client bool) (*Conn, *scripted, *liar) {
	t.Helper()
	wire := &scripted{}
	c := newConn(wire)
	c.in.client = client
	c.state = &tls.ConnectionState{}
	var err error
	if c.suite, err = suiteOf(id); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(c.in.set(c.suite, bytes.Repeat([]byte{1}, c.suite.size)), c.out.set(c.suite, bytes.Repeat([]byte{2}, c.suite.size))); err != nil {
		t.Fatal(err)
	}
	c.in.updates = mux.NewBucket(updatesBurst, updatesRate)
	return c, wire, newLiar(t, c)
}

// alertOf reads the alert that was sent last.
func alertOf(t testing.TB, c *Conn, wire *scripted) uint8 {
	t.Helper()
	k := keys{}
	if err := k.set(c.suite, bytes.Repeat([]byte{2}, c.suite.size)); err != nil {
		t.Fatal(err)
	}
	var last []byte
	for b := wire.written.Bytes(); len(b) > 0; {
		size := int(binary.BigEndian.Uint16(b[3:]))
		nonce, _ := k.number()
		text, err := k.aead.Open(nil, nonce, b[5:5+size], b[:5])
		if err != nil {
			t.Fatal(err)
		}
		last, b = text, b[5+size:]
	}
	if len(last) != 3 || last[2] != typeAlert {
		t.Fatalf("the last record is %x, want an alert", last)
	}
	return last[1]
}

var full = bytes.Repeat([]byte{'x'}, maxPlain)

// TestViolations has each end with its alert, after what came before it.
func TestViolations(t *testing.T) {
	header := func(typ, major, minor byte, size int) func(*liar) {
		return func(l *liar) {
			l.out = append(l.out, typ, major, minor, byte(size>>8), byte(size))
			l.out = append(l.out, make([]byte, min(size, 100))...)
		}
	}
	for _, tt := range []struct {
		name   string
		lie    func(*liar)
		client bool
		want   uint8
	}{
		{"a tampered byte", func(l *liar) { l.say(typeData, 1, 2, 3); l.out[len(l.out)-1] ^= 1 }, false, alertBadRecordMAC},
		{"a record twice", func(l *liar) { n := len(l.out); l.say(typeData, 1); l.out = append(l.out, l.out[n:]...) }, false, alertBadRecordMAC},
		{"a record left out", func(l *liar) { n := len(l.out); l.say(typeData, 1); l.out = l.out[:n]; l.say(typeData, 2) }, false, alertBadRecordMAC},
		{"keys of the other direction", func(l *liar) { _ = l.set(l.suite, bytes.Repeat([]byte{2}, l.suite.size)); l.say(typeData, 1) }, false, alertBadRecordMAC},
		{"no room for a tag", header(typeData, 3, 3, tagSize), false, alertBadRecordMAC},
		{"an empty record", header(typeData, 3, 3, 0), false, alertBadRecordMAC},
		{"too long", header(typeData, 3, 3, maxCipher+1), false, alertRecordOverflow},
		{"longer than may be", header(typeData, 3, 3, 1<<16-1), false, alertRecordOverflow},
		{"another version", header(typeData, 3, 1, 100), false, alertProtocolVersion},
		{"a plain alert", header(typeAlert, 3, 3, 2), false, alertUnexpectedMessage},
		{"a change of cipher", header(20, 3, 3, 1), false, alertUnexpectedMessage},
		{"a plain handshake", header(typeHandshake, 3, 3, 100), false, alertUnexpectedMessage},
		{"HTTP", func(l *liar) { l.out = append(l.out, "GET / HTTP/1.1\r\n\r\n"...) }, false, alertUnexpectedMessage},
		{"padding and nothing else", func(l *liar) { l.inner(make([]byte, 100)...) }, false, alertUnexpectedMessage},
		{"an unknown type", func(l *liar) { l.say(24, 1) }, false, alertUnexpectedMessage},
		{"a protected change of cipher", func(l *liar) { l.say(20, 1) }, false, alertUnexpectedMessage},
		{"an empty handshake", func(l *liar) { l.say(typeHandshake) }, false, alertUnexpectedMessage},
		{"an empty alert", func(l *liar) { l.say(typeAlert) }, false, alertDecodeError},
		{"two alerts in one", func(l *liar) { l.say(typeAlert, 1, 90, 1, 0) }, false, alertDecodeError},
		{"empty records without end", func(l *liar) {
			for range maxUseless + 1 {
				l.say(typeData)
			}
		}, false, alertUnexpectedMessage},
		{"farewells that are none", func(l *liar) {
			for range maxUseless + 1 {
				l.say(typeAlert, 1, alertUserCanceled)
			}
		}, false, alertUnexpectedMessage},
		{"a ticket for a server", func(l *liar) { l.say(typeHandshake, newSessionTicket, 0, 0, 1, 0) }, false, alertUnexpectedMessage},
		{"tickets without end", func(l *liar) {
			for range maxTickets + 1 {
				l.say(typeHandshake, newSessionTicket, 0, 0, 1, 0)
				l.say(typeData, 1)
			}
		}, true, alertUnexpectedMessage},
		{"a ticket without end", func(l *liar) { l.say(typeHandshake, newSessionTicket, 255, 255, 255, 0) }, true, alertDecodeError},
		{"an empty ticket", func(l *liar) { l.say(typeHandshake, newSessionTicket, 0, 0, 0) }, true, alertDecodeError},
		{"data inside of a ticket", func(l *liar) { l.say(typeHandshake, newSessionTicket, 0, 0, 9, 0); l.say(typeData, 1) }, true, alertUnexpectedMessage},
		{"data inside of a header", func(l *liar) { l.say(typeHandshake, newSessionTicket, 0); l.say(typeData, 1) }, true, alertUnexpectedMessage},
		{"a farewell inside of a ticket", func(l *liar) { l.say(typeHandshake, newSessionTicket, 0, 0, 9, 0); l.say(typeAlert, 1, 0) }, true, alertUnexpectedMessage},
		{"a request for a certificate", func(l *liar) { l.say(typeHandshake, 13, 0, 0, 3, 0, 0, 0) }, true, alertUnexpectedMessage},
		{"another hello", func(l *liar) { l.say(typeHandshake, 1, 0, 0, 1, 0) }, false, alertUnexpectedMessage},
		{"a long key update", func(l *liar) { l.say(typeHandshake, keyUpdate, 0, 0, 2, 0, 0) }, false, alertDecodeError},
		{"an odd key update", func(l *liar) { l.say(typeHandshake, keyUpdate, 0, 0, 1, 2) }, false, alertIllegalParameter},
		{"more behind a key update", func(l *liar) { l.say(typeHandshake, keyUpdate, 0, 0, 1, 0, keyUpdate) }, false, alertUnexpectedMessage},
		{"old keys after an update", func(l *liar) { l.say(typeHandshake, keyUpdate, 0, 0, 1, 0); l.say(typeData, 1) }, false, alertBadRecordMAC},
		{"key updates without end", func(l *liar) {
			for range updatesBurst + 2 {
				l.renew(1)
				l.say(typeData, 1)
			}
		}, false, alertUnexpectedMessage},
		{"more text than a record has", func(l *liar) { l.inner(append(append(bytes.Clone(full), 'x'), typeData)...) }, false, alertRecordOverflow},
		{"more padding than a record has", func(l *liar) { l.inner(append(append(bytes.Clone(full), typeData), 0)...) }, false, alertRecordOverflow},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, room := range []int{1, 100, 64 << 10} {
				for _, piece := range []int{0, 7} {
					c, wire, l := behind(t, tls.TLS_AES_128_GCM_SHA256, tt.client)
					l.say(typeData, []byte("before")...)
					tt.lie(l)
					l.out = append(l.out, make([]byte, 200)...)
					wire.in, wire.piece = bytes.NewReader(l.out), piece
					got, err := read(c, room)
					var alert tls.AlertError
					if !bytes.HasPrefix(got, []byte("before")) || !errors.As(err, &alert) || uint8(alert) != tt.want {
						t.Fatalf("read %.20q, %v, want alert %d", got, err, tt.want)
					}
					if a := alertOf(t, c, wire); a != tt.want {
						t.Errorf("sent alert %d, want %d", a, tt.want)
					}
					if _, err := c.Write([]byte("x")); err == nil {
						t.Error("something could be written after that")
					}
					sent := wire.written.Len()
					if c.in.buf != nil {
						t.Error("a buffer is held")
					}
					if c.Close(); !wire.closed || wire.written.Len() != sent {
						t.Error("a farewell follows an alert that ends the connection")
					}
				}
			}
		})
	}
}

// read reads until it fails.
func read(c *Conn, room int) (got []byte, err error) {
	p := make([]byte, room)
	for {
		if err := c.Await(); err != nil {
			return got, err
		}
		n, err := c.Read(p)
		got = append(got, p[:n]...)
		if err != nil {
			return got, err
		}
	}
}

// TestWhatMayBeSaid is passed over.
func TestWhatMayBeSaid(t *testing.T) {
	for _, id := range suites {
		c, wire, l := behind(t, id, true)
		ticket := append([]byte{newSessionTicket, 0, 1, 0}, make([]byte, 256)...)
		l.say(typeData, 'a')
		l.say(typeHandshake, ticket...)
		l.say(typeHandshake, append(bytes.Clone(ticket), ticket[:100]...)...) // one, and the beginning of another
		l.say(typeHandshake, ticket[100:102]...)
		l.say(typeHandshake, ticket[102:]...)
		l.inner(append([]byte{'b', typeData}, make([]byte, 1000)...)...) // padded
		l.say(typeData)
		l.renew(0)
		l.say(typeHandshake, keyUpdate, 0) // in two pieces
		l.say(typeHandshake, 0, 1, 0)
		if err := l.next(l.suite); err != nil {
			t.Fatal(err)
		}
		l.inner(append(bytes.Clone(full), typeData)...)
		l.say(typeAlert, 1, alertUserCanceled)
		l.say(typeAlert, 1, alertCloseNotify)
		l.out = append(l.out, "what is behind the end is nobody's"...)
		for _, piece := range []int{0, 1, 100} {
			c2 := &Conn{nc: wire, suite: c.suite}
			c2.in.client = true
			c2.in.updates = mux.NewBucket(updatesBurst, updatesRate)
			_ = c2.in.set(c.suite, bytes.Repeat([]byte{1}, c.suite.size))
			wire.in, wire.piece = bytes.NewReader(l.out), piece
			got, err := read(c2, 32<<10)
			if want := "ab" + string(full); err != io.EOF || string(got) != want {
				t.Errorf("suite %#x, pieces of %d: %d bytes, %v", id, piece, len(got), err)
			}
		}
		if wire.written.Len() > 0 {
			t.Error("something was answered")
		}
	}
}

// TestCutOff ends the bytes at every place: it is never the end.
func TestCutOff(t *testing.T) {
	_, _, l := behind(t, tls.TLS_AES_128_GCM_SHA256, false)
	l.say(typeData, []byte("hello")...)
	whole := len(l.out)
	l.say(typeData, []byte("world")...)
	for cut := range len(l.out) {
		c, wire, _ := behind(t, tls.TLS_AES_128_GCM_SHA256, false)
		wire.in = bytes.NewReader(l.out[:cut])
		got, err := read(c, 100)
		want := ""
		if cut >= whole {
			want = "hello"
		}
		if err != io.ErrUnexpectedEOF || string(got) != want {
			t.Errorf("cut at %d: %q, %v", cut, got, err)
		}
	}
}

// TestRemoteAlert is told as crypto/tls tells it.
func TestRemoteAlert(t *testing.T) {
	c, wire, l := behind(t, tls.TLS_AES_128_GCM_SHA256, true)
	l.say(typeAlert, 2, 42)
	wire.in = bytes.NewReader(l.out)
	_, err := read(c, 100)
	if err == nil || err.Error() != "remote error: tls: bad certificate" {
		t.Errorf("got %v", err)
	}
	if _, err := c.Write([]byte("x")); err == nil || wire.written.Len() > 0 {
		t.Error("something was said after that")
	}
}

// TestKeysAreChangedInTime writes as many records as the keys are good for.
func TestKeysAreChangedInTime(t *testing.T) {
	client, server := pair(t)
	client.out.seq, server.in.seq = maxRecords-2, maxRecords-2
	text := bytes.Repeat([]byte("0123456789"), 10_000)
	var sent sync.WaitGroup
	sent.Go(func() { _, _ = client.Write(text) })
	hear(t, server, string(text))
	sent.Wait()
	if client.out.seq >= 100 || client.out.seq != server.in.seq {
		t.Errorf("sequence numbers %d and %d", client.out.seq, server.in.seq)
	}
	// A peer that does not is asked to.
	client.out.seq, server.in.seq = askAfter-1, askAfter-1
	say(t, client, "y")
	hear(t, server, "y")
	if !server.ask.Load() {
		t.Fatal("the peer is not asked")
	}
	say(t, server, "z")
	hear(t, client, "z")
	if !client.rekey.Load() {
		t.Fatal("the peer does not know")
	}
	say(t, client, "w")
	hear(t, server, "w")
	if server.in.seq != 1 || client.in.seq != 1 || server.ask.Load() {
		t.Errorf("sequence numbers %d and %d", server.in.seq, client.in.seq)
	}
	k := keys{seq: math.MaxUint64}
	if _, err := k.number(); err == nil {
		t.Error("a number was used again")
	}
}

// TestSilentUpdatesAreAnsweredOnce has a peer ask many times of one who is
// silent.
func TestSilentUpdatesAreAnsweredOnce(t *testing.T) {
	c, wire, l := behind(t, tls.TLS_CHACHA20_POLY1305_SHA256, false)
	for range 10 {
		l.renew(1)
	}
	l.say(typeData, 'x')
	wire.in = bytes.NewReader(l.out)
	hear(t, c, "x")
	if wire.written.Len() > 0 {
		t.Error("an answer was sent though there was nothing to say")
	}
	say(t, c, "y")
	if n, want := wire.written.Len(), overhead+5+overhead+1; n != want {
		t.Errorf("%d bytes were sent, want one change of keys and one byte, %d", n, want)
	}
}

// TestNoLargeBufferForAPart: a peer that stops in the middle of a record keeps
// no memory that others need.
func TestNoLargeBufferForAPart(t *testing.T) {
	client, server := pair(t)
	for range 4 { // the reader comes to expect much
		go func() { _, _ = client.Write(make([]byte, 1<<20)) }()
		if _, err := io.ReadFull(server, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
	server.in.large = true
	l := newLiar(t, server)
	l.seq = server.in.seq
	l.inner(append(bytes.Clone(full), typeData)...)
	if _, err := client.NetConn().Write(l.out[:10_000]); err != nil {
		t.Fatal(err)
	}
	_ = server.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	if err := server.Await(); err == nil {
		t.Fatal("part of a record is whole")
	}
	if server.in.buf == nil || server.in.buf.Large() {
		t.Error("a large buffer is held for part of a record, or none")
	}
	_ = server.SetReadDeadline(time.Time{})
	if _, err := client.NetConn().Write(l.out[10_000:]); err != nil {
		t.Fatal(err)
	}
	hear(t, server, string(full))
	server.Close()
	client.Close()
	if b := socket.Get(true); !b.Large() {
		t.Error("large buffers are lost")
	} else {
		b.Put()
	}
}

// TestAFullBufferIsReadAtOnce: what fills the reader's buffer exactly goes on in
// one piece, though its last record has no room for its type.
func TestAFullBufferIsReadAtOnce(t *testing.T) {
	c, wire, l := behind(t, tls.TLS_AES_128_GCM_SHA256, false)
	c.in.large = true
	want := bytes.Repeat(full, socket.Large/maxPlain)
	for range socket.Large / maxPlain {
		l.say(typeData, full...)
	}
	l.say(typeData, 'x')
	wire.in = bytes.NewReader(l.out)
	p := make([]byte, socket.Large)
	if n, err := c.Read(p); err != nil || !bytes.Equal(p[:n], want) {
		t.Errorf("%d bytes were read, and %v, want %d", n, err, len(want))
	}
	hear(t, c, "x")
}

// FuzzRecords reads what a peer may send that knows the keys: pieces of the
// input are types and contents, or bytes as they are.
func FuzzRecords(f *testing.F) {
	f.Add([]byte("\x17\x05hello\x15\x02\x01\x00"), uint16(100), uint8(0))
	f.Add([]byte("\x16\x05\x18\x00\x00\x01\x01\x17\x01x"), uint16(1), uint8(3))
	f.Add([]byte("\x16\x06\x04\x00\x00\x02xx"), uint16(9000), uint8(1))
	f.Add([]byte("\xff\x05\x17\x03\x03\x40\x12"), uint16(30000), uint8(0))
	f.Fuzz(func(t *testing.T, script []byte, room uint16, piece uint8) {
		c, wire, l := behind(t, tls.TLS_AES_128_GCM_SHA256, piece%2 == 1)
		var data []byte
		sure := true // as long as nothing was said that could end it
		for len(script) >= 2 {
			typ, n := script[0], min(int(script[1]), len(script)-2)
			b := script[2 : 2+n]
			script = script[2+n:]
			switch typ {
			case 0xff:
				l.out = append(l.out, b...)
				sure = false
			case 0xfe:
				_ = l.next(l.suite)
				sure = false
			default:
				l.say(typ, b...)
				if sure = sure && typ == typeData && n > 0; sure {
					data = append(data, b...)
				}
			}
		}
		wire.in, wire.piece = bytes.NewReader(l.out), int(piece)
		got, err := read(c, int(room)+1)
		if err == nil || !bytes.HasPrefix(got, data) {
			t.Fatalf("got %q, %v, want %q first", got, err, data)
		}
		if c.in.buf != nil {
			t.Error("a buffer is held at the end")
		}
		c.Close()
		if c.in.buf != nil {
			t.Error("a buffer is held after Close")
		}
	})
}
