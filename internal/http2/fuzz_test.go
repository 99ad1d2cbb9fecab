package http2

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"

	"sallyport/internal/mux"
)

// memory is a connection whose peer has said everything, and hears what we say.
type memory struct {
	in *bytes.Reader

	mu   sync.Mutex // guards what follows
	out  bytes.Buffer
	shut chan struct{}
	once sync.Once
}

func (m *memory) Read(p []byte) (int, error) { return m.in.Read(p) }

func (m *memory) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.out.Write(p)
}

func (m *memory) Close() error {
	m.once.Do(func() { close(m.shut) })
	return nil
}

func (m *memory) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (m *memory) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (m *memory) SetDeadline(time.Time) error      { return nil }
func (m *memory) SetReadDeadline(time.Time) error  { return nil }
func (m *memory) SetWriteDeadline(time.Time) error { return nil }

// seed is a connection that is in order.
func seed(f func(enc func(...string) []byte) []byte) []byte {
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	return f(func(fields ...string) []byte {
		buf.Reset()
		for i := 0; i < len(fields); i += 2 {
			_ = enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
		}
		return bytes.Clone(buf.Bytes())
	})
}

func seeds(f *testing.F) {
	f.Add(seed(func(enc func(...string) []byte) []byte {
		b := appendSettings(nil, setting{settingWindow, 10})
		b = appendHeaders(b, 1, true, enc(request("GET", "cookie", "a", "cookie", "b")...))
		b = appendHeaders(b, 3, false, enc(request("POST", "content-length", "5")...))
		b = append(appendHeader(b, 5, kindData, flagEnd, 3), "hello"...)
		b = appendHeaders(b, 5, false, enc(request("POST")...))
		b = append(appendHeader(b, 8, kindData, flagPadded, 5), "\x02hello\x00\x00"...)
		b = appendHeaders(b, 5, true, enc("x-trailer", "v"))
		b = appendWindow(appendPing(b, 0, 1), 0, 100)
		return appendReset(b, 5, Cancel)
	}))
	f.Add(seed(func(enc func(...string) []byte) []byte {
		b := appendSettings(nil)
		b = appendHeaders(b, 1, false, enc(request("CONNECT", ":protocol", "websocket")...))
		b = append(appendHeader(b, 5, kindData, 0, 1), "hello"...)
		b = appendHeaders(b, 3, false, enc(":method", "CONNECT", ":authority", "a:443"))
		b = append(appendHeader(b, 5, kindData, flagEnd, 3), "hello"...)
		return appendGoaway(b, 0, NoError)
	}))
	f.Add(appendHeader(appendSettings(nil), 0, kindHeaders, 0, 1))
}

// FuzzFrames: a reader of frames neither fails in another way than by a
// violation, nor takes in more than it was given, however it is cut in pieces.
func FuzzFrames(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		b = append([]byte(Preface), b...)
		c := newConn(&memory{in: bytes.NewReader(nil), shut: make(chan struct{})}, Config{}, func(*Lane) bool { return true })
		for piece := 1; len(b) > 0; piece++ {
			n, err := c.frames(b[:min(piece*7, len(b))])
			if err != nil {
				if !isViolation(err) {
					t.Fatalf("ended by %v", err)
				}
				return
			}
			if n > piece*7 || n < 0 {
				t.Fatalf("took %d of %d bytes", n, piece*7)
			}
			if n == 0 && piece*7 >= len(b) {
				return
			}
			b = b[n:]
			if n > 0 {
				piece = 0
			}
		}
	})
}

// FuzzServer: whatever a client says, what its lanes read are requests that
// net/http reads too, one for each stream at most; every goroutine ends with the
// connection, and the budget is whole again.
func FuzzServer(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		m := &memory{in: bytes.NewReader(append([]byte(Preface), b...)), shut: make(chan struct{})}
		budget := mux.NewBudget(64 << 10)
		var wg sync.WaitGroup
		c := Accepted(m, Config{Budget: budget}, func(l *Lane) bool {
			wg.Go(func() {
				defer l.Close()
				serveFuzzed(t, l)
			})
			return true
		})
		_ = c.Run()
		wg.Wait()
		if n := budget.Used(); n != 0 {
			t.Errorf("%d bytes are missing from the budget", n)
		}
	})
}

func serveFuzzed(t *testing.T, l *Lane) {
	br := bufio.NewReader(l)
	for {
		var head bytes.Buffer
		r, err := http.ReadRequest(bufio.NewReader(io.TeeReader(br, &head)))
		if err != nil {
			return
		}
		// What was read ahead of the body is its beginning.
		text, rest, ok := strings.Cut(head.String(), "\r\n\r\n")
		if !ok {
			t.Errorf("no head in %q", head.String())
		}
		if strings.Contains(text, "\n\n") || strings.Contains(strings.ReplaceAll(text, "\r\n", ""), "\n") || strings.Contains(strings.ReplaceAll(text, "\r\n", ""), "\r") {
			t.Errorf("a line breaks off: %q", text)
		}
		if len(r.TransferEncoding) > 0 && r.Header.Get("Content-Length") != "" {
			t.Errorf("two lengths: %q", text)
		}
		body := io.MultiReader(strings.NewReader(rest), br)
		if r.ContentLength > 0 {
			body = io.LimitReader(body, r.ContentLength)
		}
		if r.Method != "CONNECT" && r.Header.Get("Upgrade") == "" && (r.ContentLength != 0 || len(r.TransferEncoding) > 0) {
			_, _ = io.CopyN(io.Discard, body, 1<<16)
		}
		answer := "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
		switch {
		case r.Method == "HEAD":
			answer = "HTTP/1.1 200 OK\r\n\r\n"
		case r.Header.Get("Upgrade") != "":
			answer = "HTTP/1.1 101 Switching Protocols\r\n\r\n"
		}
		if _, err := io.WriteString(l, answer); err != nil || len(rest) > 0 || r.Header.Get("Upgrade") != "" {
			return
		}
	}
}
