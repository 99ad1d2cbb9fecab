package http2

import (
	"bytes"
	"io"
	"net"
	"sync"
	"testing"
)

// BenchmarkCalls is a call of 1 KiB over one connection, 64 at once, both ends.
func BenchmarkCalls(b *testing.B) {
	answer := []byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\nDate: Fri, 27 Nov 2026 12:00:00 GMT\r\n\r\n" + string(make([]byte, 1024)))
	dial := served(b, Config{}, func(l *Lane) {
		buf := make([]byte, 4096)
		for {
			if _, err := l.Read(buf); err != nil {
				return
			}
			if _, err := l.Write(answer); err != nil {
				return
			}
		}
	})
	c := Dialled(dial(), Config{})
	go func() { _ = c.Run() }()
	defer c.Close()
	request := []byte("GET /v1/charges/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\nUser-Agent: h2load nghttp2/1.52.0\r\nAccept: */*\r\n\r\n")
	b.ReportAllocs()
	calls := make(chan struct{}, 1024)
	var wg sync.WaitGroup
	for range 64 {
		l, err := c.Open()
		if err != nil {
			b.Fatal(err)
		}
		wg.Go(func() {
			defer l.Close()
			buf := make([]byte, 4096)
			for range calls {
				if _, err := l.Write(request); err != nil {
					b.Error(err)
					return
				}
				for got := 0; got < 1024; {
					n, err := l.Read(buf)
					if err != nil {
						b.Error(err)
						return
					}
					if i := bytes.Index(buf[:n], crlf2); i >= 0 && got == 0 {
						n -= i + 4
					}
					got += n
				}
			}
		})
	}
	for b.Loop() {
		calls <- struct{}{}
	}
	close(calls)
	wg.Wait()
}

var (
	_ io.ReadWriteCloser = (*Lane)(nil)
	_ net.Conn           = (*Lane)(nil)
)
