package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"testing"

	"connectrpc.com/vanguard"

	"sallyport/internal/mesh"
	"sallyport/internal/translate"
	"sallyport/internal/translate/translatetest"
)

// translating is a call of REST to a service of gRPC, by vanguard as it is and by
// the room that wraps it. Both stand behind connections in memory, and the service
// behind loopback.
func translating() []part {
	return []part{
		{name: "translate_vanguard", run: func(b *testing.B) {
			addr := translatetest.GRPC(b, "127.0.0.1:0")
			p := new(http.Protocols)
			p.SetUnencryptedHTTP2(true)
			to := &httputil.ReverseProxy{
				Rewrite:   func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", addr },
				Transport: &http.Transport{Protocols: p, DisableCompression: true}, FlushInterval: -1,
			}
			tr, err := vanguard.NewTranscoder([]*vanguard.Service{vanguard.NewServiceWithSchema(translatetest.Service(b), to,
				vanguard.WithTargetProtocols(vanguard.ProtocolGRPC), vanguard.WithTargetCodecs(vanguard.CodecProto), vanguard.WithNoTargetCompression())})
			if err != nil {
				b.Fatal(err)
			}
			in := &inMemory{make(chan net.Conn), make(chan struct{})}
			s := &http.Server{Handler: tr}
			go func() { _ = s.Serve(in) }() // until it is closed
			defer s.Close()
			calls(b, in.dial, "")
		}},
		{name: "translate_sallyport", run: func(b *testing.B) {
			addr := translatetest.GRPC(b, "127.0.0.1:0")
			tr, err := translate.New(translate.Config{Log: slog.New(slog.DiscardHandler), Dial: func(ctx context.Context) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "tcp", addr)
			}})
			if err != nil {
				b.Fatal(err)
			}
			o, err := tr.Read(&mesh.Translate{To: "grpc", Descriptors: "shop.binpb", Set: translatetest.Set})
			if err != nil {
				b.Fatal(err)
			}
			tr.Use(o)
			ctx, stop := context.WithCancel(context.Background())
			defer stop()
			go func() { _ = tr.Run(ctx) }() // until it is stopped
			calls(b, tr.Connect, "/shop.v1.Shop/Put")
		}},
	}
}

// calls puts an item, over and over, by a connection that is kept.
func calls(b *testing.B, dial func(context.Context) (net.Conn, error), method string) {
	b.Helper()
	hc := &http.Client{Transport: &http.Transport{
		DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
	}}
	defer hc.CloseIdleConnections()
	for b.Loop() {
		r, err := http.NewRequestWithContext(b.Context(), http.MethodPost, "http://shop.test/v1/items", bytes.NewReader([]byte(`{"id":"a","price":"7"}`)))
		if err != nil {
			b.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/json")
		r.Header.Set("X-User", "alice")
		if method != "" {
			r.Header.Set(translate.MethodField, method)
		}
		resp, err := hc.Do(r)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
			b.Fatal(resp.Status, err)
		}
		resp.Body.Close()
	}
}

// inMemory is a listener whose connections are made by dial.
type inMemory struct {
	queue chan net.Conn
	done  chan struct{}
}

func (l *inMemory) dial(context.Context) (net.Conn, error) {
	near, far := net.Pipe()
	l.queue <- far
	return near, nil
}

func (l *inMemory) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *inMemory) Close() error {
	close(l.done)
	return nil
}

func (l *inMemory) Addr() net.Addr { return &net.UnixAddr{Name: "bench", Net: "memory"} }
