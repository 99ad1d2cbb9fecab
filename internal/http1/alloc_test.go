package http1

import (
	"bytes"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

const benchRequest = "POST /v1/charges/ch_1234567890?expand=customer HTTP/1.1\r\n" +
	"Host: billing.mesh.internal\r\nUser-Agent: Go-http-client/1.1\r\nAccept: */*\r\n" +
	"Content-Type: application/json\r\nAuthorization: Bearer abcdefghijklmnopqrstuvwxyz0123456789\r\n" +
	"Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n" +
	"X-Forwarded-For: 10.0.0.1\r\nAccept-Encoding: gzip\r\nContent-Length: 12\r\n\r\n{\"amount\":1}"

var benchAnswer = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nDate: Sun, 22 Nov 2026 23:00:00 GMT\r\n" +
	"Server: billing\r\nContent-Length: 1024\r\n\r\n" + strings.Repeat("x", 1024)

// loopConn repeats one message for ever: a keep-alive peer without a network.
type loopConn struct {
	msg []byte
	at  int
}

func (c *loopConn) Read(p []byte) (int, error) {
	n := copy(p, c.msg[c.at:])
	c.at = (c.at + n) % len(c.msg)
	return n, nil
}

func (c *loopConn) Write(p []byte) (int, error)      { return len(p), nil }
func (c *loopConn) Close() error                     { return nil }
func (c *loopConn) LocalAddr() net.Addr              { return nil }
func (c *loopConn) RemoteAddr() net.Addr             { return nil }
func (c *loopConn) SetDeadline(time.Time) error      { return nil }
func (c *loopConn) SetReadDeadline(time.Time) error  { return nil }
func (c *loopConn) SetWriteDeadline(time.Time) error { return nil }

// oneByOne gives whole messages, one for each read, so that an answer never
// comes before its request.
type oneByOne struct{ loopConn }

func (c *oneByOne) Read(p []byte) (int, error) { return copy(p, c.msg), nil }

// keepAlive makes a function that does one whole exchange.
func keepAlive(tb testing.TB, request, answer string) func() {
	down := NewConn(&oneByOne{loopConn{msg: []byte(request)}}, Limits{})
	up := NewConn(&oneByOne{loopConn{msg: []byte(answer)}}, Limits{})
	r := new(Request)
	x := &Exchange{Down: down, Up: up, Request: r, Timeout: time.Second}
	x.ToUp = Edit{Drop: Reserved, Extra: []byte("Sallyport-Peer: spiffe://corp.example/ns/shop/sa/payment\r\n")}
	return func() {
		if err := down.ReadRequest(r); err != nil {
			tb.Fatal(err)
		}
		if r.Verb() == "" || r.PathText() == "" || r.AuthorityText() == "" {
			tb.Fatal("request is empty")
		}
		res, err := x.Run()
		if err != nil || !res.UpstreamReusable || !res.DownstreamReusable {
			tb.Fatalf("%v, %+v", err, res)
		}
	}
}

const chunkedRequest = "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3;x\r\nyou\r\n0\r\n\r\n"

const chunkedAnswer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3\r\nyou\r\n0\r\n\r\n"

// TestKeepAliveDoesNotAllocate holds the promise of the hot path.
func TestKeepAliveDoesNotAllocate(t *testing.T) {
	if meshtest.Race {
		t.Skip("the race detector has a sync.Pool forget things")
	}
	for _, tt := range []struct{ name, request, answer string }{
		{"lengths", benchRequest, benchAnswer},
		{"chunked", chunkedRequest, chunkedAnswer},
		{"path to be cleaned", "GET /a//%62?c HTTP/1.1\r\nHost: EXAMPLE\r\n\r\n", "HTTP/1.1 204 No Content\r\n\r\n"},
		{"interim", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + okAnswer},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if n := testing.AllocsPerRun(1000, keepAlive(t, tt.request, tt.answer)); n != 0 {
				t.Errorf("%v allocations per exchange, want 0", n)
			}
		})
	}
}

// readable tells when it is waited for.
type readable struct {
	*memConn
	await func()
}

func (r *readable) Await() error {
	r.await()
	return nil
}

// TestAtRestNothingIsHeld looks at a connection while it waits for a request.
func TestAtRestNothingIsHeld(t *testing.T) {
	nc, waits := &readable{memConn: mem(plainGet)}, 0
	c, r := NewConn(nc, Limits{}), new(Request)
	nc.await = func() {
		if waits++; c.buf != nil || c.out != nil {
			t.Error("holds buffers while it waits for a request")
		}
	}
	if err := c.ReadRequest(r); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteError(r, 404, nil, nil); err != nil || c.buf == nil || c.out == nil {
		t.Fatalf("%v; reads into %d bytes, writes from %d", err, len(c.buf), cap(c.out))
	}
	if err := c.ReadRequest(r); err != io.EOF || waits != 2 {
		t.Errorf("got %v after %d waits, want EOF after 2", err, waits)
	}
}

func BenchmarkParseRequest(b *testing.B) {
	c := NewConn(&loopConn{msg: []byte(strings.Replace(benchRequest, "12\r\n\r\n{\"amount\":1}", "0\r\n\r\n", 1))}, Limits{})
	r := new(Request)
	b.ReportAllocs()
	for b.Loop() {
		if err := c.ReadRequest(r); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRewriteRequest(b *testing.B) {
	r, _, err := readReq(benchRequest, Limits{})
	if err != nil {
		b.Fatal(err)
	}
	var dst []byte
	e := Edit{Drop: Reserved}
	b.ReportAllocs()
	for b.Loop() {
		dst = AppendRequest(dst[:0], r, &e)
	}
}

func BenchmarkKeepAlive(b *testing.B) {
	do := keepAlive(b, benchRequest, benchAnswer)
	b.ReportAllocs()
	for b.Loop() {
		do()
	}
}

// BenchmarkKeepAliveLoopback is a whole exchange over four TCP sockets: the
// test client and server are part of the figure.
func BenchmarkKeepAliveLoopback(b *testing.B) {
	upClient, upServer := meshtest.TCP(b)
	client, downServer := meshtest.TCP(b)
	go func() {
		buf, answer := make([]byte, 8<<10), []byte(benchAnswer)
		for {
			if n, err := upServer.Read(buf); err != nil || !bytes.HasSuffix(buf[:n], []byte("}")) {
				return
			}
			if _, err := upServer.Write(answer); err != nil {
				return
			}
		}
	}()
	go func() { _, _ = proxy(NewConn(downServer, Limits{}), reuse(NewConn(upClient, Limits{}))) }()
	request, buf := []byte(benchRequest), make([]byte, len(benchAnswer))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := client.Write(request); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(client, buf); err != nil {
			b.Fatal(err)
		}
	}
}

func reuse(c *Conn) func() *Conn { return func() *Conn { return c } }

// BenchmarkChunked reads and re-frames a chunked body of 1 MiB in chunks of
// 4 KiB.
func BenchmarkChunked(b *testing.B) {
	var body []byte
	for range 256 {
		body = appendChunk(body, bytes.Repeat([]byte("x"), 4096), true)
	}
	body = append(body, "0\r\n\r\n"...)
	c := NewConn(&loopConn{msg: body}, Limits{})
	scratch := make([]byte, 0, 64<<10)
	b.SetBytes(1 << 20)
	b.ReportAllocs()
	for b.Loop() {
		scratch = scratch[:0]
		n, rerr, werr := copyBody(io.Discard, c, Body{Framing: Chunked}, Chunked, &scratch)
		if n != 1<<20 || rerr != nil || werr != nil {
			b.Fatal(n, rerr, werr)
		}
	}
}

func BenchmarkCleanPath(b *testing.B) {
	var dst []byte
	b.ReportAllocs()
	for b.Loop() {
		dst, _ = CleanPath(dst[:0], []byte("/v1/charges//ch_12345/%6Cines/./3"), false)
	}
}
