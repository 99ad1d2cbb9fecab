package http2

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// dialled serves h with net/http over clear HTTP/2 and connects to it.
func dialled(t *testing.T, cfg Config, h http.Handler) *Conn {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	s.Config.Protocols = &p
	s.Start()
	t.Cleanup(s.Close)
	nc, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return runs(t, nc, cfg)
}

func runs(t *testing.T, nc net.Conn, cfg Config) *Conn {
	c := Dialled(nc, cfg)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = c.Run()
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
	return c
}

func lane(t *testing.T, c *Conn) *Lane {
	t.Helper()
	l, err := c.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// call makes a call on a lane with net/http's eyes for what is answered.
func call(l *Lane, method, path, more string, body string) (*http.Response, []byte, error) {
	if _, err := fmt.Fprintf(l, "%s %s HTTP/1.1\r\nHost: billing.mesh.internal\r\n%s\r\n%s", method, path, more, body); err != nil {
		return nil, nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(l), &http.Request{Method: method})
	if err != nil {
		return nil, nil, err
	}
	b, err := io.ReadAll(resp.Body)
	return resp, b, err
}

func TestCallsToNetHTTP(t *testing.T) {
	long := strings.Repeat("0123456789abcdef", 1<<16)
	c := dialled(t, Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		w.Header().Set("Seen", fmt.Sprint(r.Method, " ", r.Host, " ", r.URL, " ", r.ContentLength, " ", r.Header.Get("Te"), " ", r.Header.Get("X-Own"), " ", r.Proto))
		switch r.URL.Path {
		case "/204":
			w.WriteHeader(204)
		case "/103":
			w.Header().Set("Link", "</a>")
			w.WriteHeader(103)
			w.WriteHeader(200)
			_, _ = w.Write(b)
		case "/trailers":
			w.Header().Set("Trailer", "Grpc-Status")
			_, _ = w.Write(b)
			w.Header().Set("Grpc-Status", "0")
		case "/flushed":
			for i := range b {
				_, _ = w.Write(b[i : i+1])
				w.(http.Flusher).Flush()
			}
		default:
			_, _ = w.Write(b)
		}
	}))
	var wg sync.WaitGroup
	for range 8 {
		l := lane(t, c)
		wg.Go(func() {
			for _, tt := range []struct {
				method, path, more, body string
				status                   int
				seen, want, trailer      string
			}{
				{"GET", "/a?b=c", "", "", 200, "GET billing.mesh.internal /a?b=c 0   HTTP/2.0", "", ""},
				{"GET", "/", "TE: trailers\r\nConnection: TE\r\nX-Own: 1\r\n", "", 200, "GET billing.mesh.internal / 0 trailers 1 HTTP/2.0", "", ""},
				{"HEAD", "/", "", "", 200, "HEAD billing.mesh.internal / 0   HTTP/2.0", "", ""},
				{"POST", "/", "Content-Length: 5\r\n", "hello", 200, "POST billing.mesh.internal / 5   HTTP/2.0", "hello", ""},
				{"POST", "/", "Content-Length: 0\r\n", "", 200, "POST billing.mesh.internal / 0   HTTP/2.0", "", ""},
				{"PUT", "/", "Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", 200, "PUT billing.mesh.internal / -1   HTTP/2.0", "hello world", ""},
				{"PUT", "/", fmt.Sprintf("Content-Length: %d\r\n", len(long)), long, 200, fmt.Sprintf("PUT billing.mesh.internal / %d   HTTP/2.0", len(long)), long, ""},
				{"POST", "/204", "Content-Length: 1\r\n", "x", 204, "POST billing.mesh.internal /204 1   HTTP/2.0", "", ""},
				{"POST", "/trailers", "Content-Length: 1\r\n", "x", 200, "POST billing.mesh.internal /trailers 1   HTTP/2.0", "x", "0"},
				{"POST", "/flushed", "Content-Length: 9\r\n", "one by on", 200, "POST billing.mesh.internal /flushed 9   HTTP/2.0", "one by on", ""},
				{"DELETE", "/x", "", "", 200, "DELETE billing.mesh.internal /x 0   HTTP/2.0", "", ""},
			} {
				resp, b, err := call(l, tt.method, tt.path, tt.more, tt.body)
				if err != nil {
					t.Errorf("%s %s: %v", tt.method, tt.path, err)
					return
				}
				if resp.StatusCode != tt.status || resp.Header.Get("Seen") != tt.seen || string(b) != tt.want || resp.Trailer.Get("Grpc-Status") != tt.trailer {
					t.Errorf("%s %s: got %d, seen %q, %d bytes, trailers %v", tt.method, tt.path, resp.StatusCode, resp.Header.Get("Seen"), len(b), resp.Trailer)
				}
			}
		})
	}
	wg.Wait()
}

func TestInterimAnswers(t *testing.T) {
	c := dialled(t, Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</a>")
		w.WriteHeader(103)
		w.WriteHeader(200)
		_, _ = io.WriteString(w, "yes")
	}))
	l := lane(t, c)
	if _, err := io.WriteString(l, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	br := bufio.NewReader(l)
	for _, want := range []int{103, 200} {
		resp, err := http.ReadResponse(br, nil)
		if err != nil || resp.StatusCode != want || resp.Header.Get("Link") != "</a>" {
			t.Fatalf("got %v, %v, want %d", resp, err, want)
		}
		if want == 200 {
			if b, _ := io.ReadAll(resp.Body); string(b) != "yes" {
				t.Errorf("the body is %q", b)
			}
		}
	}
}

// Both directions of a call move at once, byte by byte.
func TestBothWaysAtOnce(t *testing.T) {
	c := dialled(t, Config{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		w.WriteHeader(200)
		_ = http.NewResponseController(w).Flush()
		b := make([]byte, 1)
		for {
			if _, err := r.Body.Read(b); err != nil {
				return
			}
			_, _ = w.Write(b)
			_ = http.NewResponseController(w).Flush()
		}
	}))
	l := lane(t, c)
	if _, err := io.WriteString(l, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(l), nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		if _, err := fmt.Fprintf(l, "1\r\n%c\r\n", 'a'+i%26); err != nil {
			t.Fatal(err)
		}
		var got [1]byte
		if _, err := io.ReadFull(resp.Body, got[:]); err != nil || got[0] != byte('a'+i%26) {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	if _, err := io.WriteString(l, "0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(resp.Body); len(b) > 0 || err != nil {
		t.Errorf("behind the end: %q, %v", b, err)
	}
	if l.Stale() {
		t.Error("the lane cannot be used again")
	}
}

// A foe is a server that says what a test has it say.
type foe struct {
	*xhttp2.Framer
	nc  net.Conn
	buf bytes.Buffer
	enc *hpack.Encoder
}

// against connects to a server that do plays.
func against(t *testing.T, cfg Config, do func(f *foe)) *Conn {
	t.Helper()
	here, there := net.Pipe()
	done := make(chan struct{})
	t.Cleanup(func() {
		there.Close()
		<-done
	})
	go func() {
		defer close(done)
		if _, err := io.ReadFull(there, make([]byte, len(Preface))); err != nil {
			return
		}
		f := &foe{Framer: xhttp2.NewFramer(there, there), nc: there}
		f.enc = hpack.NewEncoder(&f.buf)
		do(f)
		_, _ = io.Copy(io.Discard, there)
	}()
	return runs(t, here, cfg)
}

// await reads frames until one of the kind has come.
func (f *foe) await(kind xhttp2.FrameType) xhttp2.Frame {
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			return nil
		}
		if fr.Header().Type == kind {
			return fr
		}
	}
}

// drain reads what comes, so that nobody waits to write.
func (f *foe) drain() {
	go func() { _, _ = io.Copy(io.Discard, f.nc) }()
}

func (f *foe) head(id uint32, end bool, fields ...string) {
	f.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = f.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	_ = f.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: f.buf.Bytes(), EndStream: end, EndHeaders: true})
}

const get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"

func TestStreamsOfTheServer(t *testing.T) {
	t.Run("no more are opened than it takes", func(t *testing.T) {
		settled := make(chan struct{})
		c := against(t, Config{}, func(f *foe) {
			_ = f.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingMaxConcurrentStreams, Val: 2})
			f.await(xhttp2.FrameSettings)
			f.await(xhttp2.FrameSettings) // ours was acknowledged
			close(settled)
		})
		<-settled
		a, b := lane(t, c), lane(t, c)
		if _, err := c.Open(); !errors.Is(err, ErrFull) {
			t.Errorf("the third: %v, want ErrFull", err)
		}
		for _, l := range []*Lane{a, b} {
			if _, err := io.WriteString(l, get); err != nil {
				t.Error(err)
			}
		}
	})
	t.Run("a limit that falls refuses the next call, which can be made elsewhere", func(t *testing.T) {
		settled := make(chan struct{})
		c := against(t, Config{}, func(f *foe) {
			_ = f.WriteSettings()
			f.await(xhttp2.FrameHeaders)
			_ = f.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingMaxConcurrentStreams, Val: 1})
			_ = f.WritePing(false, [8]byte{1})
			f.await(xhttp2.FramePing) // it is answered behind the setting
			close(settled)
		})
		a, b := lane(t, c), lane(t, c)
		if _, err := io.WriteString(a, get); err != nil {
			t.Fatal(err)
		}
		<-settled
		for {
			_, err := io.WriteString(b, get)
			if errors.Is(err, ErrRefused) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			b = lane(t, c)
		}
	})
	t.Run("GOAWAY refuses what is behind its last stream, and the rest goes on", func(t *testing.T) {
		c := against(t, Config{}, func(f *foe) {
			_ = f.WriteSettings()
			for range 3 {
				f.await(xhttp2.FrameHeaders)
			}
			f.drain()
			_ = f.WriteGoAway(3, xhttp2.ErrCodeNo, nil)
			f.head(1, true, ":status", "200")
			f.head(3, false, ":status", "200", "content-length", "2")
			_ = f.WriteData(3, true, []byte("ok"))
		})
		ls := []*Lane{lane(t, c), lane(t, c), lane(t, c)}
		for _, l := range ls {
			if _, err := io.WriteString(l, get); err != nil {
				t.Fatal(err)
			}
		}
		for i, l := range ls {
			_, err := http.ReadResponse(bufio.NewReader(l), nil)
			if i < 2 && err != nil || i == 2 && !errors.Is(err, ErrRefused) {
				t.Errorf("call %d: %v", i, err)
			}
		}
		if _, err := c.Open(); !errors.Is(err, ErrClosing) {
			t.Errorf("a new call: %v, want ErrClosing", err)
		}
	})
	t.Run("GOAWAY before all calls refuses them", func(t *testing.T) {
		c := against(t, Config{}, func(f *foe) {
			_ = f.WriteSettings()
			f.await(xhttp2.FrameHeaders)
			f.drain()
			_ = f.WriteGoAway(0, xhttp2.ErrCodeNo, nil)
		})
		if _, _, err := call(lane(t, c), "GET", "/", "", ""); !errors.Is(err, ErrRefused) {
			t.Errorf("got %v, want ErrRefused", err)
		}
	})
	t.Run("a stream that is refused can be asked for again", func(t *testing.T) {
		for code, want := range map[xhttp2.ErrCode]error{xhttp2.ErrCodeRefusedStream: ErrRefused, xhttp2.ErrCodeCancel: ErrCancelled} {
			c := against(t, Config{}, func(f *foe) {
				_ = f.WriteSettings()
				f.await(xhttp2.FrameHeaders)
				_ = f.WriteRSTStream(1, code)
			})
			l := lane(t, c)
			_, _, err := call(l, "GET", "/", "", "")
			if !errors.Is(err, want) {
				t.Errorf("code %v: %v, want %v", code, err, want)
			}
			if !l.Stale() {
				t.Error("the lane of a stream that was reset may be used again")
			}
			if _, err := c.Open(); err != nil {
				t.Errorf("the connection takes no more: %v", err)
			}
		}
	})
	t.Run("an answer before the end of the request is read", func(t *testing.T) {
		c := against(t, Config{}, func(f *foe) {
			_ = f.WriteSettings()
			f.await(xhttp2.FrameHeaders)
			f.head(1, false, ":status", "413")
			_ = f.WriteData(1, true, []byte("too long"))
			_ = f.WriteRSTStream(1, xhttp2.ErrCodeNo)
		})
		resp, b, err := call(lane(t, c), "POST", "/", "Content-Length: 100000\r\n", "")
		if err != nil || resp.StatusCode != 413 || string(b) != "too long" {
			t.Errorf("got %v, %q, %v", resp, b, err)
		}
	})
	t.Run("the last byte of a known length waits for the end of the stream", func(t *testing.T) {
		go1 := make(chan struct{})
		c := against(t, Config{}, func(f *foe) {
			_ = f.WriteSettings()
			f.await(xhttp2.FrameHeaders)
			f.head(1, false, ":status", "200", "content-length", "2")
			_ = f.WriteData(1, false, []byte("ok"))
			<-go1
			_ = f.WriteData(1, true, nil)
		})
		l := lane(t, c)
		if _, err := io.WriteString(l, get); err != nil {
			t.Fatal(err)
		}
		var all []byte
		b := make([]byte, 4096)
		for !bytes.HasSuffix(all, []byte("\r\no")) {
			n, err := l.Read(b)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, b[:n]...)
		}
		close(go1)
		if n, err := l.Read(b); err != nil || string(b[:n]) != "k" {
			t.Errorf("the last byte: %q, %v", b[:n], err)
		}
		if l.Stale() {
			t.Error("the lane cannot be used again")
		}
	})
}

// What a server must not answer ends the call, or the connection when the state
// of that is lost.
func TestWrongAnswers(t *testing.T) {
	for name, tt := range map[string]struct {
		do   func(f *foe)
		conn bool // the connection ends
	}{
		"no status":                    {func(f *foe) { f.head(1, true, "a", "b") }, false},
		"two of them":                  {func(f *foe) { f.head(1, true, ":status", "200", ":status", "200") }, false},
		"a status of two digits":       {func(f *foe) { f.head(1, true, ":status", "20") }, false},
		"a status of four digits":      {func(f *foe) { f.head(1, true, ":status", "2000") }, false},
		"a status that is a word":      {func(f *foe) { f.head(1, true, ":status", "2o0") }, false},
		"a status of 99":               {func(f *foe) { f.head(1, true, ":status", "099") }, false},
		"a status of 600":              {func(f *foe) { f.head(1, true, ":status", "600") }, false},
		"101":                          {func(f *foe) { f.head(1, false, ":status", "101") }, false},
		"an interim answer at the end": {func(f *foe) { f.head(1, true, ":status", "103") }, false},
		"a pseudo field of requests":   {func(f *foe) { f.head(1, true, ":status", "200", ":path", "/") }, false},
		"a pseudo field behind others": {func(f *foe) { f.head(1, true, "a", "b", ":status", "200") }, false},
		"a name in upper case":         {func(f *foe) { f.head(1, true, ":status", "200", "Bad", "b") }, false},
		"a value with a line end":      {func(f *foe) { f.head(1, true, ":status", "200", "a", "b\r\nSet-Cookie: x") }, false},
		"a name with a blank":          {func(f *foe) { f.head(1, true, ":status", "200", "a b", "c") }, false},
		"connection":                   {func(f *foe) { f.head(1, true, ":status", "200", "connection", "close") }, false},
		"transfer-encoding":            {func(f *foe) { f.head(1, true, ":status", "200", "transfer-encoding", "chunked") }, false},
		"two lengths":                  {func(f *foe) { f.head(1, false, ":status", "200", "content-length", "1", "content-length", "1") }, false},
		"a length with a sign":         {func(f *foe) { f.head(1, false, ":status", "200", "content-length", "+1") }, false},
		"a length, and nothing":        {func(f *foe) { f.head(1, true, ":status", "200", "content-length", "1") }, false},
		"more than the length": {func(f *foe) {
			f.head(1, false, ":status", "200", "content-length", "1")
			_ = f.WriteData(1, true, []byte("ab"))
		}, false},
		"less than the length": {func(f *foe) {
			f.head(1, false, ":status", "200", "content-length", "3")
			_ = f.WriteData(1, true, []byte("ab"))
		}, false},
		"data before the head": {func(f *foe) { _ = f.WriteData(1, true, []byte("ab")) }, false},
		"trailers that do not end": {func(f *foe) {
			f.head(1, false, ":status", "200")
			f.head(1, false, "a", "b")
		}, false},
		"a status in the trailers": {func(f *foe) {
			f.head(1, false, ":status", "200")
			f.head(1, true, ":status", "200")
		}, false},
		"a head that is too large": {func(f *foe) {
			f.buf.Reset()
			_ = f.enc.WriteField(hpack.HeaderField{Name: ":status", Value: "200"})
			for i := range 40 {
				_ = f.enc.WriteField(hpack.HeaderField{Name: fmt.Sprint("x-", i), Value: strings.Repeat("z", 1000)})
			}
			b := bytes.Clone(f.buf.Bytes())
			_ = f.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:16000], EndStream: true})
			_ = f.WriteContinuation(1, len(b) < 32000, b[16000:min(32000, len(b))])
			if len(b) >= 32000 {
				_ = f.WriteContinuation(1, true, b[32000:])
			}
		}, false},
		"a stream that nobody opened": {func(f *foe) { f.head(3, true, ":status", "200") }, true},
		"data on one":                 {func(f *foe) { _ = f.WriteData(5, true, []byte("ab")) }, true},
		"a stream of its own":         {func(f *foe) { f.head(2, true, ":status", "200") }, true},
		"a reset of one":              {func(f *foe) { _ = f.WriteRSTStream(7, xhttp2.ErrCodeCancel) }, true},
		"a promise": {func(f *foe) {
			_ = f.WritePushPromise(xhttp2.PushPromiseParam{StreamID: 1, PromiseID: 2, BlockFragment: []byte{0x88}, EndHeaders: true})
		}, true},
		"a block that does not decode": {func(f *foe) {
			_ = f.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0xff, 0xff, 0xff, 0xff, 0xff}, EndStream: true, EndHeaders: true})
		}, true},
		"pings without end": {func(f *foe) {
			for range 10 * noiseBurst {
				if f.WritePing(false, [8]byte{}) != nil {
					return
				}
			}
		}, true},
		"settings without end": {func(f *foe) {
			for range 10 * noiseBurst {
				if f.WriteSettings() != nil {
					return
				}
			}
		}, true},
		"empty data without end": {func(f *foe) {
			f.head(1, false, ":status", "200")
			for range 10 * noiseBurst {
				if f.WriteData(1, false, nil) != nil {
					return
				}
			}
		}, true},
		"a window that overflows": {func(f *foe) { _ = f.WriteWindowUpdate(0, 1<<31-1) }, true},
		"a setting of push": {func(f *foe) {
			_ = f.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingEnablePush, Val: 1})
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			var reasons []Reason
			var mu sync.Mutex
			c := against(t, Config{Violated: func(r Reason) {
				mu.Lock()
				defer mu.Unlock()
				reasons = append(reasons, r)
			}}, func(f *foe) {
				f.AllowIllegalWrites = true
				_ = f.WriteSettings()
				f.await(xhttp2.FrameHeaders)
				f.drain()
				tt.do(f)
			})
			l := lane(t, c)
			_ = l.SetReadDeadline(time.Now().Add(time.Minute))
			_, b, err := call(l, "GET", "/", "", "")
			if err == nil {
				t.Fatalf("it was taken for an answer: %q", b)
			}
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				t.Fatalf("nobody noticed: %v", err)
			}
			if live := c.Live(); live == tt.conn {
				t.Errorf("the connection lives: %v (%v)", live, err)
			}
			mu.Lock()
			defer mu.Unlock()
			if len(reasons) == 0 {
				t.Error("no reason was told")
			}
		})
	}
}

// What comes and is not read is bounded, and what no answer has ends the call.
func TestUnreadAnswers(t *testing.T) {
	for name, tt := range map[string]struct {
		do   func(f *foe)
		want Reason
	}{
		"more data than the window": {func(f *foe) {
			f.head(1, false, ":status", "200")
			for range 5 {
				_ = f.WriteData(1, false, make([]byte, 16<<10))
			}
		}, Overrun},
		"interim answers without end": {func(f *foe) {
			for range 100 {
				f.head(1, false, ":status", "103")
			}
		}, Flood},
		"a body where there is none": {func(f *foe) {
			f.head(1, false, ":status", "204")
			_ = f.WriteData(1, true, []byte("ab"))
		}, BadSize},
	} {
		t.Run(name, func(t *testing.T) {
			told := make(chan Reason, 200)
			cfg := Config{Violated: func(r Reason) { told <- r }}
			c := against(t, cfg, func(f *foe) {
				_ = f.WriteSettings()
				f.await(xhttp2.FrameHeaders)
				f.drain()
				tt.do(f)
			})
			l := lane(t, c)
			if _, err := io.WriteString(l, get); err != nil {
				t.Fatal(err)
			}
			if got := <-told; got != tt.want {
				t.Errorf("told %s, want %s", got, tt.want)
			}
			if !c.Live() {
				t.Error("the connection ended with the call")
			}
			l.Close()
		})
	}
}

// What comes late for a call that was broken off is no mistake, however many
// such calls there are.
func TestLateFrames(t *testing.T) {
	const calls = 200
	asked := make(chan struct{})
	broken := make(chan struct{})
	c := against(t, Config{Streams: calls + 1}, func(f *foe) {
		_ = f.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingMaxConcurrentStreams, Val: calls + 1})
		for range calls {
			f.await(xhttp2.FrameHeaders)
		}
		close(asked)
		for range calls {
			f.await(xhttp2.FrameRSTStream)
		}
		close(broken)
		f.await(xhttp2.FrameHeaders)
		f.drain()
		for i := range uint32(calls) {
			f.head(2*i+1, false, ":status", "200")
			_ = f.WriteData(2*i+1, true, []byte("late"))
		}
		f.head(2*calls+1, true, ":status", "204")
	})
	var ls []*Lane
	for range calls {
		l := lane(t, c)
		if _, err := io.WriteString(l, get); err != nil {
			t.Fatal(err)
		}
		ls = append(ls, l)
	}
	<-asked
	l := lane(t, c)
	for _, l := range ls {
		l.Close()
	}
	<-broken
	resp, _, err := call(l, "GET", "/", "", "")
	if err != nil || resp.StatusCode != 204 {
		t.Errorf("the call after them: %v, %v", resp, err)
	}
}

func TestWebSocketOverHTTP2(t *testing.T) {
	const ask = "GET /chat HTTP/1.1\r\nHost: a\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
	t.Run("a server that takes none is asked for none", func(t *testing.T) {
		settled := make(chan struct{})
		c := against(t, Config{}, func(f *foe) {
			_ = f.WriteSettings()
			f.await(xhttp2.FrameSettings)
			f.await(xhttp2.FrameSettings)
			close(settled)
		})
		<-settled
		if _, err := io.WriteString(lane(t, c), ask); !errors.Is(err, ErrNoWebSocket) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("bytes pass both ways, and each way ends", func(t *testing.T) {
		settled := make(chan struct{})
		c := against(t, Config{}, func(f *foe) {
			_ = f.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingEnableConnectProtocol, Val: 1})
			f.await(xhttp2.FrameSettings)
			f.await(xhttp2.FrameSettings)
			close(settled)
			f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
			h, ok := f.await(xhttp2.FrameHeaders).(*xhttp2.MetaHeadersFrame)
			if !ok || h.PseudoValue("method") != "CONNECT" || h.PseudoValue("protocol") != "websocket" || h.PseudoValue("path") != "/chat" || h.StreamEnded() {
				t.Errorf("asked by %v", h)
			}
			f.head(1, false, ":status", "200")
			_ = f.WriteData(1, false, []byte("hello"))
			d, ok := f.await(xhttp2.FrameData).(*xhttp2.DataFrame)
			if !ok || string(d.Data()) != "frames" {
				t.Errorf("got %v", d)
			}
			_ = f.WriteData(1, true, []byte("bye"))
		})
		<-settled
		l := lane(t, c)
		if _, err := io.WriteString(l, ask); err != nil {
			t.Fatal(err)
		}
		br := bufio.NewReader(l)
		resp, err := http.ReadResponse(br, &http.Request{Method: "GET"})
		if err != nil || resp.StatusCode != 101 || resp.Header.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
			t.Fatalf("got %v, %v", resp, err)
		}
		if _, err := io.WriteString(l, "frames"); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(br); err != nil || string(b) != "hellobye" {
			t.Errorf("read %q, %v", b, err)
		}
	})
}
