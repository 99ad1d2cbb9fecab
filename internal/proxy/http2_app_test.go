package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/upstream"
)

// toH2C has the sidecar speak HTTP/2 to the application at addr.
func toH2C(t *testing.T, addr string) func(*rig) {
	return func(r *rig) {
		r.inCfg.App = upstream.NewLocalHTTP2(netip.MustParseAddrPort(addr), http1.Limits{})
		t.Cleanup(r.inCfg.App.Close)
	}
}

// appH2C is an application that speaks HTTP/2 alone, as servers of gRPC do.
func appH2C(t *testing.T, h http.HandlerFunc) func(*rig) {
	s := httptest.NewUnstartedServer(h)
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	return toH2C(t, s.Listener.Addr().String())
}

// grpcCall is a call as clients of gRPC make them, whose messages go through w.
func grpcCall(ctx context.Context) (_ *http.Request, w *io.PipeWriter) {
	body, w := io.Pipe()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://billing.mesh.internal/ok/Echo", body)
	if err != nil {
		panic(err)
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Te", "trailers")
	req.Header.Set("Grpc-Timeout", "20S")
	return req, w
}

func TestMessagesBothWays(t *testing.T) {
	r := newRig(t, "127.0.0.1:1", appH2C(t, func(w http.ResponseWriter, r *http.Request) {
		c := http.NewResponseController(w)
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Saw", fmt.Sprint(r.Header.Get("Grpc-Timeout"), " ", r.Header.Get("Te")))
		w.Header().Set("Trailer", "Grpc-Status")
		w.WriteHeader(200)
		_ = c.Flush() // the first word is the application's
		b := make([]byte, 100)
		for {
			n, err := r.Body.Read(b)
			if _, werr := w.Write(b[:n]); werr != nil {
				t.Error(werr)
			}
			_ = c.Flush()
			if err != nil {
				break
			}
		}
		w.Header().Set("Grpc-Status", "0")
	}))
	client := r.clientH2C()
	for range 3 {
		req, w := grpcCall(t.Context())
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if saw := resp.Header.Get("Saw"); !strings.HasPrefix(saw, "1") || !strings.HasSuffix(saw, "m trailers") { // of 20 s
			t.Errorf("the application saw %q", resp.Header.Get("Saw"))
		}
		for i := range 50 {
			word := fmt.Sprintf("message %d", i)
			if _, err := io.WriteString(w, word); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(word))
			if _, err := io.ReadFull(resp.Body, got); err != nil || string(got) != word {
				t.Fatalf("got %q, %v", got, err)
			}
		}
		w.Close()
		if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) > 0 || resp.Trailer.Get("Grpc-Status") != "0" {
			t.Errorf("behind the messages: %q, %v, trailers %v", rest, err, resp.Trailer)
		}
		resp.Body.Close()
	}
}

func TestCallsThatAreBrokenOff(t *testing.T) {
	ended := make(chan error, 1)
	r := newRig(t, "127.0.0.1:1", appH2C(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(200)
		_, _ = io.WriteString(w, "first")
		_ = http.NewResponseController(w).Flush()
		if r.Header.Get("Mode") == "abort" {
			panic(http.ErrAbortHandler)
		}
		<-r.Context().Done()
		ended <- r.Context().Err()
	}))
	client := r.clientH2C()
	first := func(resp *http.Response) {
		t.Helper()
		b := make([]byte, 5)
		if _, err := io.ReadFull(resp.Body, b); err != nil || string(b) != "first" {
			t.Fatalf("got %q, %v", b, err)
		}
	}
	t.Run("by the client", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		req, w := grpcCall(ctx)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		first(resp)
		cancel()
		w.CloseWithError(context.Canceled) // for which net/http waits
		select {
		case err := <-ended:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("the application learned %v", err)
			}
		case <-time.After(patience):
			t.Error("the application did not learn of it")
		}
	})
	t.Run("by the application", func(t *testing.T) {
		for name, c := range map[string]*http.Client{"HTTP/2": client, "HTTP/1.1": r.client()} {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://billing.mesh.internal/ok/1", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Mode", "abort")
			resp, err := c.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			first(resp)
			if b, err := io.ReadAll(resp.Body); err == nil {
				t.Errorf("%s: the rest was taken for the whole: %q", name, b)
			}
			resp.Body.Close()
		}
	})
}

// A client that knows HTTP/1.1 alone is answered by an application that knows
// HTTP/2 alone.
func TestHTTP1ToAnApplicationOfHTTP2(t *testing.T) {
	long := strings.Repeat("0123456789abcdef", 1<<16)
	r := newRig(t, "127.0.0.1:1", appH2C(t, func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		w.Header().Set("Saw", r.Proto+" "+r.Method+" "+r.Host)
		if r.URL.Path == "/ok/204" {
			w.WriteHeader(204)
		}
		_, _ = w.Write(b)
	}))
	c := r.client()
	for _, tt := range []struct {
		method, path, body string
		status             int
	}{
		{"GET", "/ok/1", "", 200}, {"HEAD", "/ok/1", "", 200}, {"POST", "/ok/1", "hello", 200}, {"PUT", "/ok/1", long, 200},
		{"POST", "/ok/204", "x", 204}, {"DELETE", "/ok/1", "", 200}, {"POST", "/ok/1", "", 200},
	} {
		for range 2 {
			req, err := http.NewRequestWithContext(t.Context(), tt.method, "http://billing.mesh.internal"+tt.path, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := c.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			want := tt.body
			if tt.status == 204 || tt.method == "HEAD" {
				want = ""
			}
			if err != nil || string(b) != want || resp.StatusCode != tt.status || !strings.HasPrefix(resp.Header.Get("Saw"), "HTTP/2.0 "+tt.method+" billing.mesh.internal") {
				t.Errorf("%s %s: %d, %d bytes, %v, %q", tt.method, tt.path, resp.StatusCode, len(b), err, resp.Header.Get("Saw"))
			}
		}
	}
}

// What the application has not acted on, as it says itself, is asked for again,
// whatever the method; what it may have acted on is not.
func TestRefusedByTheApplication(t *testing.T) {
	for name, tt := range map[string]struct {
		refuse func(f *xhttp2.Framer)
		want   int
	}{
		"GOAWAY before the call": {func(f *xhttp2.Framer) { _ = f.WriteGoAway(0, xhttp2.ErrCodeNo, nil) }, 200},
		"REFUSED_STREAM":         {func(f *xhttp2.Framer) { _ = f.WriteRSTStream(1, xhttp2.ErrCodeRefusedStream) }, 200},
		"INTERNAL_ERROR":         {func(f *xhttp2.Framer) { _ = f.WriteRSTStream(1, xhttp2.ErrCodeInternal) }, 502},
		"GOAWAY that leaves it open": {func(f *xhttp2.Framer) {
			_ = f.WriteGoAway(1, xhttp2.ErrCodeNo, nil)
			_ = f.WriteRSTStream(1, xhttp2.ErrCodeCancel)
		}, 502},
	} {
		t.Run(name, func(t *testing.T) {
			var asked atomic.Int64
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			go func() {
				for {
					nc, err := ln.Accept()
					if err != nil {
						return
					}
					go refusesFirst(nc, &asked, tt.refuse)
				}
			}()
			r := newRig(t, "127.0.0.1:1", toH2C(t, ln.Addr().String()))
			resp, err := r.client().Post("http://billing.mesh.internal/ok/1", "text/plain", strings.NewReader("hello"))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if resp.StatusCode != tt.want {
				t.Errorf("status %d, want %d", resp.StatusCode, tt.want)
			}
			if want := map[int]int64{200: 2, 502: 1}[tt.want]; asked.Load() != want {
				t.Errorf("asked %d times, want %d", asked.Load(), want)
			}
		})
	}
}

// refusesFirst answers 200 to every call but the first of all.
func refusesFirst(nc net.Conn, asked *atomic.Int64, refuse func(*xhttp2.Framer)) {
	defer nc.Close()
	if _, err := io.ReadFull(nc, make([]byte, len(http2.Preface))); err != nil {
		return
	}
	f := xhttp2.NewFramer(nc, nc)
	_ = f.WriteSettings()
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			return
		}
		switch fr := fr.(type) {
		case *xhttp2.SettingsFrame:
			if !fr.IsAck() {
				_ = f.WriteSettingsAck()
			}
		case *xhttp2.HeadersFrame:
			if asked.Add(1) == 1 {
				refuse(f)
				continue
			}
			var b bytes.Buffer
			_ = hpack.NewEncoder(&b).WriteField(hpack.HeaderField{Name: ":status", Value: "200"})
			_ = f.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: fr.StreamID, BlockFragment: b.Bytes(), EndHeaders: true, EndStream: true})
		}
	}
}

func TestTheFirstMessageHasTime(t *testing.T) {
	for want, lim := range map[time.Duration]http1.Limits{
		5 * time.Minute:  {},
		2 * time.Minute:  {BodyTimeout: 2 * time.Minute},
		10 * time.Minute: {ResponseTimeout: 10 * time.Minute},
	} {
		l := &listener{Shared: Shared{Limits: lim}}
		if got := l.firstMessage(); got != want {
			t.Errorf("%+v: %s, want %s", lim, got, want)
		}
	}
}
