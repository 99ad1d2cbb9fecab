package http2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sallyport/internal/mux"
)

// A peer is a client that says what a test has it say.
type peer struct {
	*xhttp2.Framer
	nc  net.Conn
	buf bytes.Buffer
	enc *hpack.Encoder
}

// speak connects and greets.
func speak(t *testing.T, dial func() net.Conn) *peer {
	t.Helper()
	p := &peer{nc: dial()}
	_ = p.nc.SetDeadline(time.Now().Add(time.Minute))
	p.Framer = xhttp2.NewFramer(p.nc, p.nc)
	p.enc = hpack.NewEncoder(&p.buf)
	if _, err := io.WriteString(p.nc, Preface); err != nil {
		t.Fatal(err)
	}
	if err := p.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return p
}

// head sends a field section.
func (p *peer) head(id uint32, end bool, fields ...string) {
	_ = p.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: p.block(fields...), EndStream: end, EndHeaders: true})
}

func (p *peer) block(fields ...string) []byte {
	p.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = p.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return bytes.Clone(p.buf.Bytes())
}

// request are the fields of a request, and more.
func request(method string, more ...string) []string {
	return append([]string{":method", method, ":scheme", "http", ":path", "/", ":authority", "a"}, more...)
}

// outcome is what became of a stream: "200", "reset 1", and so on, or of the
// connection: "goaway 11", "closed".
func (p *peer) outcome(id uint32) string {
	status := ""
	for {
		f, err := p.ReadFrame()
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return "closed"
		case err != nil:
			return err.Error()
		}
		switch f := f.(type) {
		case *xhttp2.HeadersFrame:
			if f.StreamID == id {
				fields, err := hpack.NewDecoder(4096, nil).DecodeFull(f.HeaderBlockFragment())
				if err == nil && len(fields) > 0 && status == "" {
					status = fields[0].Value
				}
				if f.StreamEnded() {
					return status
				}
			}
		case *xhttp2.DataFrame:
			if f.StreamID == id && f.StreamEnded() {
				return status
			}
		case *xhttp2.RSTStreamFrame:
			if f.StreamID == id {
				return fmt.Sprintf("reset %d", f.ErrCode)
			}
		case *xhttp2.GoAwayFrame:
			return fmt.Sprintf("goaway %d", f.ErrCode)
		}
	}
}

// Each flood ends the connection, and is told by its name. What an honest peer
// does as often as it needs to is none.
func TestFloods(t *testing.T) {
	const many = 20 * noiseBurst // more than comes back in a stall
	for _, tt := range []struct {
		name string
		do   func(p *peer)
		want Reason
	}{
		{"calls that are broken off at once", func(p *peer) {
			for i := range uint32(many) {
				p.head(2*i+1, true, request("GET")...)
				_ = p.WriteRSTStream(2*i+1, xhttp2.ErrCodeCancel)
			}
		}, Flood},
		{"calls that we are made to break off", func(p *peer) {
			for i := range uint32(many) {
				p.head(2*i+1, false, request("POST")...)
				_ = p.WriteWindowUpdate(2*i+1, maxWindow)
			}
		}, Flood},
		{"calls that no client makes", func(p *peer) {
			for i := range uint32(many) {
				p.head(2*i+1, true, request("GET", "Upper", "case")...)
			}
		}, Flood},
		{"more calls than there may be", func(p *peer) {
			for i := range uint32(many) {
				p.head(2*i+1, false, request("POST")...)
			}
		}, Flood},
		{"pings", func(p *peer) {
			for range many {
				_ = p.WritePing(false, [8]byte{1})
			}
		}, Flood},
		{"settings", func(p *peer) {
			for range many {
				_ = p.WriteSettings()
			}
		}, Flood},
		{"answers to settings", func(p *peer) {
			for range many {
				_ = p.WriteSettingsAck()
			}
		}, Flood},
		{"priorities", func(p *peer) {
			for i := range uint32(many) {
				_ = p.WritePriority(2*i+1, xhttp2.PriorityParam{Weight: 1})
			}
		}, Flood},
		{"small grants", func(p *peer) {
			for range many {
				_ = p.WriteWindowUpdate(0, 1)
			}
		}, Flood},
		{"data without content", func(p *peer) {
			p.head(1, false, request("POST")...)
			for range many {
				_ = p.WriteData(1, false, nil)
			}
		}, Flood},
		{"frames of no known kind", func(p *peer) {
			for range many {
				_ = p.WriteRawFrame(77, 0, 0, nil)
			}
		}, Flood},
		{"a field section in very many pieces", func(p *peer) {
			_ = p.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(request("GET")...), EndStream: true})
			for range 100 {
				_ = p.WriteContinuation(1, false, nil)
			}
		}, TooLarge},
		{"a field section without end", func(p *peer) {
			_ = p.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(request("GET")...), EndStream: true})
			for range 10 {
				_ = p.WriteContinuation(1, false, make([]byte, 15<<10))
			}
		}, TooLarge},
		{"field sections of a call that we have ended", func(p *peer) {
			p.head(1, false, request("POST")...)
			_ = p.WriteWindowUpdate(1, maxWindow)
			for range many {
				p.head(1, false, "x", "y")
			}
		}, Flood},
		{"calls behind its own farewell", func(p *peer) {
			p.head(1, false, request("POST")...)
			_ = p.WriteGoAway(0, xhttp2.ErrCodeNo, nil)
			for i := range uint32(many) {
				p.head(2*i+3, true, request("GET")...)
			}
		}, Flood},
		{"data beyond the window", func(p *peer) {
			p.head(1, false, request("POST", "x-slow", "yes")...)
			for range 10 {
				_ = p.WriteData(1, false, make([]byte, 16<<10))
			}
		}, Overrun},
	} {
		t.Run(tt.name, func(t *testing.T) {
			said := make(chan Reason, 2*many)
			release := make(chan struct{})
			dial := served(t, Config{Violated: func(r Reason) {
				select {
				case said <- r:
				default:
				}
			}}, func(l *Lane) {
				b := make([]byte, 1024)
				if n, _ := l.Read(b); strings.Contains(string(b[:n]), "x-slow") {
					<-release
				}
				_, _ = io.Copy(io.Discard, l)
			})
			defer close(release)
			p := speak(t, dial)
			go tt.do(p)
			id := uint32(1<<30 - 1)
			if tt.want == Overrun {
				id = 1 // which ends alone
			}
			p.outcome(id)
			for r := range said {
				if r == tt.want {
					return
				}
				if len(said) == 0 {
					t.Fatalf("ended by %q, want %q", r, tt.want)
				}
			}
		})
	}
}

// Sections that grow by what they point at cost what they are, not what they
// stand for, and get the answer of a head that is too large.
func TestSectionThatGrows(t *testing.T) {
	dial := served(t, Config{}, func(l *Lane) {
		_, err := io.Copy(io.Discard, l)
		if err == nil || !strings.Contains(err.Error(), "larger than the limit") {
			t.Errorf("the reader got %v", err)
		}
		_, _ = io.WriteString(l, "HTTP/1.1 431 Too Large\r\nContent-Length: 0\r\n\r\n")
	})
	p := speak(t, dial)
	block := p.block(request("GET", "x", strings.Repeat("y", 3000))...)
	block = append(block, bytes.Repeat([]byte{0x80 | 62}, 10000)...) // the last field, 10,000 times
	_ = p.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndStream: true, EndHeaders: true})
	if got := p.outcome(1); got != "431" {
		t.Errorf("got %s", got)
	}
}

// What begins must end in time: a preface, a frame, a field section.
func TestSlowBeginnings(t *testing.T) {
	for name, say := range map[string]string{
		"nothing":                   "",
		"half a preface":            Preface[:10],
		"a preface and no more":     Preface,
		"half a frame":              Preface + string(appendSettings(nil)) + "\x00\x00\x08\x06",
		"half of a field section":   Preface + string(appendSettings(nil)) + string(appendHeader(nil, 0, kindHeaders, 0, 1)),
		"no SETTINGS but a ping":    Preface + string(appendPing(nil, 0, 1)),
		"what is no preface at all": "GET / HTTP/1.1\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			dial := served(t, Config{HeadTimeout: 50 * time.Millisecond}, func(*Lane) { t.Error("a call came") })
			nc := dial()
			_, _ = io.WriteString(nc, say)
			_ = nc.SetDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.Copy(io.Discard, nc); err != nil {
				t.Errorf("the connection did not end: %v", err)
			}
		})
	}
}

// Whoever uses up what windows may grow takes from nobody else the first window,
// with which every body gets through.
func TestBudgetOfWindows(t *testing.T) {
	// For one connection to grow once, and a stream of it.
	const grown = firstWindow + 64<<10
	budget := mux.NewBudget(grown + 32<<10)
	start, release := make(chan struct{}), make(chan struct{})
	read, ended := make(chan struct{}), make(chan struct{})
	dial := served(t, Config{Budget: budget, Violated: func(r Reason) { t.Errorf("somebody is told to have done wrong: %s", r) }}, func(l *Lane) {
		<-start
		b := make([]byte, 128<<10)
		n, err := io.ReadAtLeast(l, b, 64<<10)
		if err != nil {
			t.Error(err)
		}
		if bytes.Contains(b[:n], []byte("x-hold: ")) {
			read <- struct{}{}
			<-release
			l.Close()
			close(ended)
			return
		}
		_, _ = io.WriteString(l, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	})
	for _, tt := range []struct{ field, want string }{{"x-hold", ""}, {"x-other", "200"}} {
		p := speak(t, dial)
		p.head(1, false, request("POST", "content-length", "100000", tt.field, "1")...)
		for range 3 {
			_ = p.WriteData(1, false, make([]byte, 16<<10))
		}
		last := 16 << 10
		if tt.want != "" {
			last-- // of a connection that has not grown
		}
		_ = p.WriteData(1, false, make([]byte, last))
		if tt.want == "" {
			_ = p.WritePing(false, [8]byte{})
			for f, err := p.ReadFrame(); ; f, err = p.ReadFrame() {
				if err != nil {
					t.Fatal(err)
				}
				if f, ok := f.(*xhttp2.PingFrame); ok && f.IsAck() {
					break // all of the window was used before any was read
				}
			}
			close(start)
			<-read
		} else if got := p.outcome(1); got != tt.want {
			t.Errorf("another call: %s", got)
		}
		if n := budget.Used(); n != grown {
			t.Errorf("%s: windows have grown by %d bytes", tt.field, n)
		}
	}
	close(release)
	<-ended
	if n := budget.Used(); n != firstWindow { // the connection goes on
		t.Errorf("%d bytes are missing from the budget", n)
	}
}

// The end of a connection is told twice: what was on its way meanwhile is
// served, what comes later is refused, and what runs comes to its end.
func TestDrain(t *testing.T) {
	conns := make(chan *Conn, 1)
	entered, leave := make(chan struct{}, 1), make(chan struct{})
	dial := servedBy(t, Config{}, conns, func(l *Lane) {
		b := make([]byte, 4096)
		n, _ := l.Read(b)
		if strings.Contains(string(b[:n]), "x-slow") {
			entered <- struct{}{}
			<-leave
		}
		_, _ = io.WriteString(l, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		_, _ = l.Read(b)
	})
	p := speak(t, dial)
	c := <-conns
	p.head(1, true, request("GET", "x-slow", "yes")...)
	<-entered
	c.mu.Lock()
	c.hearing = time.Minute // it is told by the answer to the ping alone
	c.mu.Unlock()
	c.Drain()
	var ping [8]byte
	for {
		f, err := p.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if g, ok := f.(*xhttp2.GoAwayFrame); ok && (g.LastStreamID != maxStream || g.ErrCode != 0) {
			t.Errorf("first told %v", g)
		}
		if f, ok := f.(*xhttp2.PingFrame); ok {
			ping = f.Data
			break
		}
	}
	if binary.BigEndian.Uint64(ping[:]) != drainWord {
		t.Errorf("asked %x", ping)
	}
	p.head(3, true, request("GET")...) // it has not heard yet
	if got := p.outcome(3); got != "200" {
		t.Errorf("a call that was on its way: %s", got)
	}
	_ = p.WritePing(true, ping)
	for {
		f, err := p.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if g, ok := f.(*xhttp2.GoAwayFrame); ok {
			if g.LastStreamID != 3 {
				t.Errorf("then told %v", g)
			}
			break
		}
	}
	p.head(5, true, request("GET")...)
	if got := p.outcome(5); got != "reset 7" {
		t.Errorf("a later call: %s", got)
	}
	close(leave)
	if got := p.outcome(1); got != "200" {
		t.Errorf("the call in flight: %s", got)
	}
	if got := p.outcome(7); got != "closed" {
		t.Errorf("then: %s", got)
	}
}

// A call that is broken off behind its very head is nothing to those that
// accept, and counts; who breaks off too much loses the connection.
func TestCallsBrokenOffAtOnce(t *testing.T) {
	var accepted, broken atomic.Int32
	dial := served(t, Config{Broken: func() bool { return broken.Add(1) < 10 }}, func(l *Lane) {
		accepted.Add(1)
		_, _ = io.Copy(io.Discard, l)
	})
	p := speak(t, dial)
	var together bytes.Buffer
	at := xhttp2.NewFramer(&together, nil)
	for i := range uint32(9) {
		_ = at.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: p.block(request("GET")...), EndStream: true, EndHeaders: true})
		_ = at.WriteRSTStream(2*i+1, xhttp2.ErrCodeCancel)
	}
	_ = at.WritePing(false, [8]byte{7})
	if _, err := p.nc.Write(together.Bytes()); err != nil {
		t.Fatal(err)
	}
	for {
		f, err := p.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if ping, ok := f.(*xhttp2.PingFrame); ok && ping.IsAck() {
			break
		}
	}
	if accepted.Load() != 0 || broken.Load() != 9 {
		t.Errorf("%d accepted, %d broken off", accepted.Load(), broken.Load())
	}
	p.head(101, true, request("GET")...)
	_ = p.WriteRSTStream(101, xhttp2.ErrCodeCancel)
	if got := p.outcome(101); got != "goaway 11" {
		t.Errorf("one too many got %s", got)
	}
}
