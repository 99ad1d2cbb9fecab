package http1

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/meshtest"
)

const plainGet = "GET /x HTTP/1.1\r\nHost: a\r\n\r\n"

// TestResponsesRefused holds what an upstream may not send: the client gets
// 502 and neither it nor the connection to the upstream is used again.
func TestResponsesRefused(t *testing.T) {
	tests := []struct {
		name, answer string
		reason       Reason
	}{
		{"two lengths", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok", ReasonDuplicate},
		{"list of lengths", "HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok", ReasonContentLength},
		{"length and chunked", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ReasonFraming},
		{"other coding", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", ReasonTransferEncoding},
		{"chunked in HTTP/1.0", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ReasonFraming},
		{"204 with length", "HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok", ReasonFraming},
		{"204 chunked", "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ReasonFraming},
		{"103 with length", "HTTP/1.1 103 Early Hints\r\nContent-Length: 2\r\n\r\nok", ReasonFraming},
		{"101 that nobody asked for", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", ReasonUpgrade},
		{"101 to something else", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", ReasonUpgrade},
		{"too many interim", strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", 9) + okAnswer, ReasonInterim},
		{"bad name", "HTTP/1.1 200 OK\r\nA b: c\r\nContent-Length: 2\r\n\r\nok", ReasonFieldName},
		{"folded", "HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 2\r\n\r\nok", ReasonFolded},
		{"bare LF", "HTTP/1.1 200 OK\nContent-Length: 2\n\nok", ReasonLineEnding},
		{"NUL in phrase", "HTTP/1.1 200 O\x00K\r\nContent-Length: 2\r\n\r\nok", ReasonStartLine},
		{"status out of range", "HTTP/1.1 600 OK\r\nContent-Length: 2\r\n\r\nok", ReasonStatus},
		{"status of two digits", "HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok", ReasonStartLine},
		{"status of four digits", "HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok", ReasonStartLine},
		{"other version", "HTTP/1.2 200 OK\r\nContent-Length: 2\r\n\r\nok", ReasonVersion},
		{"not HTTP", "SSH-2.0-OpenSSH_9.9\r\n\r\n", ReasonStartLine},
		{"head too large", "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("a", 33<<10) + "\r\n\r\n", ReasonHeadTooLarge},
		{"too many fields", "HTTP/1.1 200 OK\r\n" + strings.Repeat("A: b\r\n", 101) + "\r\n", ReasonTooManyFields},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, _, res, err := once(plainGet, tt.answer)
			if i := strings.LastIndex(got, "HTTP/1.1 "); i < 0 || !strings.HasPrefix(got[i:], "HTTP/1.1 502 ") {
				t.Errorf("client got %q, want 502", got)
			}
			wantReason(t, err, 502, tt.reason)
			if FailedSide(err) != Upstream || res.UpstreamReusable || res.DownstreamReusable || res.ResponseStarted || !res.ResponseSeen {
				t.Errorf("%v, %+v", err, res)
			}
		})
	}
}

// TestResponsesPass holds how a response changes on its way.
func TestResponsesPass(t *testing.T) {
	get10 := "GET /x HTTP/1.0\r\nHost: a\r\n\r\n"
	head := "HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n"
	tests := []struct {
		name, request, answer, want string
		upOK, downOK                bool
	}{
		{"length", plainGet, okAnswer, okAnswer, true, true},
		{"chunked", plainGet, chunkedAnswer, chunkedAnswer, true, true},
		{"trailers", plainGet, "HTTP/1.1 200 OK\r\nTrailer: A, Content-Length\r\nTransfer-Encoding: chunked\r\n\r\n1;x\r\na\r\n0\r\nA: b\r\nContent-Length: 9\r\n\r\n",
			"HTTP/1.1 200 OK\r\nTrailer: A, Content-Length\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nA: b\r\n\r\n", true, true},
		{"until close", plainGet, "HTTP/1.0 200 OK\r\n\r\nall of it", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nall of it\r\n0\r\n\r\n", false, true},
		{"until close to HTTP/1.0", get10, "HTTP/1.1 200 OK\r\n\r\nall of it", "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nall of it", false, false},
		{"chunked to HTTP/1.0", get10, chunkedAnswer, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhelloyou", true, false},
		{"interim to HTTP/1.0", get10, "HTTP/1.1 103 Early Hints\r\n\r\n" + okAnswer, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok", true, false},
		{"early hints", plainGet, "HTTP/1.1 103 Early Hints\r\nLink: b\r\n\r\n" + okAnswer, "HTTP/1.1 103 Early Hints\r\nLink: b\r\n\r\n" + okAnswer, true, true},
		{"100 unasked", plainGet, "HTTP/1.1 100 Continue\r\n\r\n" + okAnswer, okAnswer, true, true},
		{"HEAD with length", head, "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", true, true},
		{"HEAD chunked", head, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n", true, true},
		{"HEAD without framing", head, "HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n", true, true},
		{"HEAD with a body all the same", head, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", false, true},
		{"304", plainGet, "HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", "HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", true, true},
		{"204 with length zero", plainGet, "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 204 No Content\r\n\r\n", true, true},
		{"no phrase", plainGet, "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", true, true},
		{"upstream closes", plainGet, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", okAnswer, false, true},
		{"hop by hop", plainGet, "HTTP/1.1 200 OK\r\nConnection: x-hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\nok", okAnswer, true, true},
		{"client closes", "GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", okAnswer, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok", true, false},
		{"bytes behind the response", plainGet, okAnswer + "HTTP/1.1 200 OK\r\n", okAnswer, false, true},
		{"200 to an upgrade", "GET /x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", okAnswer, okAnswer, true, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d, u := mem(tt.request), mem(tt.answer)
			down, up := NewConn(d, Limits{}), NewConn(u, Limits{})
			r := new(Request)
			if err := down.ReadRequest(r); err != nil {
				t.Fatal(err)
			}
			x := Exchange{Down: down, Up: up, Request: r}
			res, err := x.Run()
			if err != nil {
				t.Fatal(err)
			}
			if got := d.written(); got != tt.want {
				t.Errorf("client got\n%q, want\n%q", got, tt.want)
			}
			if res.UpstreamReusable != tt.upOK || res.DownstreamReusable != tt.downOK {
				t.Errorf("reusable: upstream %v, downstream %v; want %v, %v", res.UpstreamReusable, res.DownstreamReusable, tt.upOK, tt.downOK)
			}
		})
	}
}

func TestReplayOnStaleConnection(t *testing.T) {
	for _, body := range []string{"\r\n", "Content-Length: 2\r\n\r\nab", "Transfer-Encoding: chunked\r\n\r\n2;x\r\nab\r\n0\r\n\r\n"} {
		d, good := mem("POST /x HTTP/1.1\r\nHost: a\r\n"+body+plainGet), mem(okAnswer)
		broken := mem("")
		broken.fail = syscall.EPIPE
		down, r := NewConn(d, Limits{}), new(Request)
		if err := down.ReadRequest(r); err != nil {
			t.Fatal(err)
		}
		x := Exchange{Down: down, Request: r}
		for _, dead := range []*memConn{mem(""), broken} {
			x.Up = NewConn(dead, Limits{})
			res, err := x.Run()
			if FailedSide(err) != Upstream || !res.Replayable || res.ResponseSeen || res.ResponseStarted {
				t.Fatalf("%q: %v, %+v", body, err, res)
			}
			if sent := dead != broken; sent != (res.RequestBytesSent > 0) {
				t.Errorf("%q: %d bytes count as sent", body, res.RequestBytesSent)
			}
		}
		x.Up = NewConn(good, Limits{})
		res, err := x.Run()
		if err != nil || res.Replayable || !res.DownstreamReusable || !strings.HasPrefix(good.written(), "POST /x") {
			t.Fatalf("%q: %v, %+v, upstream got %q", body, err, res, good.written())
		}
		if _, err := x.Run(); err != ErrNotReplayable {
			t.Errorf("third run: %v", err)
		}
		if err := down.ReadRequest(r); err != nil || r.Verb() != "GET" {
			t.Errorf("next request on the connection: %v", err)
		}
	}
}

func TestAcceptLeavesTheClientUntouched(t *testing.T) {
	d := mem(plainGet)
	down, r := NewConn(d, Limits{}), new(Request)
	if err := down.ReadRequest(r); err != nil {
		t.Fatal(err)
	}
	x := Exchange{Down: down, Request: r, Up: NewConn(mem("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"), Limits{})}
	x.Accept = func(r *Response) bool { return r.Status != 503 }
	if res, err := x.Run(); err != ErrNotAccepted || !res.Replayable || res.Status != 503 || d.written() != "" {
		t.Fatalf("%v, %+v, client got %q", err, res, d.written())
	}
	x.Up = NewConn(mem(okAnswer), Limits{})
	if _, err := x.Run(); err != nil || d.written() != okAnswer {
		t.Fatalf("%v, client got %q", err, d.written())
	}
}

func TestTruncatedResponseIsNotCompleted(t *testing.T) {
	for _, answer := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz",
	} {
		got, _, res, err := once(plainGet, answer)
		if FailedSide(err) != Upstream || !res.ResponseStarted || res.DownstreamReusable || res.UpstreamReusable {
			t.Errorf("%q: %v, %+v", answer, err, res)
		}
		if strings.HasSuffix(got, "0\r\n\r\n") || strings.Contains(got, "502") {
			t.Errorf("%q: client got %q", answer, got)
		}
	}
}

// live starts a proxy between two loopback connections, and gives the client's
// end, the upstream's end, and the outcome.
func live(t *testing.T) (client, upstream net.Conn, outcome chan error) {
	client, down := meshtest.TCP(t)
	up, upstream := meshtest.TCP(t)
	outcome = make(chan error, 1)
	go func() {
		_, err := proxy(NewConn(down, Limits{}), reuse(NewConn(up, Limits{})))
		down.Close()
		outcome <- err
	}()
	return client, upstream, outcome
}

func TestLongBodiesBothWays(t *testing.T) {
	const size = 3 << 20
	data := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	want := fmt.Sprintf("%x", sha256.Sum256(data))
	client, upstream, _ := live(t)
	go func() { // echoes each body after reading all of it
		br := bufio.NewReader(upstream)
		for {
			req, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			b, err := io.ReadAll(req.Body)
			if err != nil {
				return
			}
			resp := http.Response{StatusCode: 200, ProtoMajor: 1, ProtoMinor: 1, Body: io.NopCloser(bytes.NewReader(b)), ContentLength: req.ContentLength, Request: req}
			if req.ContentLength < 0 {
				resp.TransferEncoding = []string{"chunked"}
			}
			_ = resp.Write(upstream)
		}
	}()
	br := bufio.NewReader(client)
	for i, length := range []int64{size, -1, size, 0} {
		body := data
		if length == 0 {
			body = nil
		}
		req, _ := http.NewRequest("POST", "http://a/x", io.NopCloser(bytes.NewReader(body)))
		req.ContentLength = length
		sent := make(chan error, 1)
		go func() { sent <- req.Write(client) }()
		resp, err := http.ReadResponse(br, req)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("%x", sha256.Sum256(b)); length != 0 && got != want || len(b) != len(body) {
			t.Fatalf("request %d: %d bytes came back, want %d", i, len(b), len(body))
		}
	}
}

func TestEarlyResponseReachesTheClient(t *testing.T) {
	client, upstream, outcome := live(t)
	go func() {
		_, _ = io.ReadFull(upstream, make([]byte, 10))
		_, _ = io.WriteString(upstream, "HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
	}()
	go func() {
		_, _ = io.WriteString(client, "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")
		for b := make([]byte, 4096); ; {
			if _, err := client.Write(b); err != nil {
				return
			}
		}
	}()
	resp, err := http.ReadResponse(bufio.NewReader(client), nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 413 || !resp.Close {
		t.Errorf("got %d, close %v", resp.StatusCode, resp.Close)
	}
	if b, err := io.ReadAll(resp.Body); string(b) != "no" || err != nil {
		t.Errorf("body %q, %v", b, err)
	}
	if err := <-outcome; err != nil {
		t.Errorf("outcome %v", err)
	}
}

// TestEarlyResponseToAStalledUpload has a client that stops in the middle: the
// exchange must end all the same.
func TestEarlyResponseToAStalledUpload(t *testing.T) {
	for _, framing := range []string{"Content-Length: 1000000", "Transfer-Encoding: chunked"} {
		client, upstream, outcome := live(t)
		go func() {
			_, _ = io.ReadFull(upstream, make([]byte, 10))
			_, _ = io.WriteString(upstream, okAnswer)
		}()
		_, _ = io.WriteString(client, "POST /x HTTP/1.1\r\nHost: a\r\n"+framing+"\r\n\r\n5\r\nhe")
		resp, err := http.ReadResponse(bufio.NewReader(client), nil)
		if err != nil || resp.StatusCode != 200 || !resp.Close {
			t.Fatalf("%v, %v", resp, err)
		}
		client.Close()
		if err := <-outcome; err != nil {
			t.Errorf("outcome %v", err)
		}
	}
}

func TestTunnelThroughAnotherProxy(t *testing.T) {
	r, _ := parsed(t, "CONNECT API.example:443 HTTP/1.1\r\nHost: api.example\r\nContent-Length: 0\r\nProxy-Authorization: x\r\n\r\n")
	want := "CONNECT api.example:443 HTTP/1.1\r\nHost: api.example:443\r\n\r\n"
	if got := string(AppendRequest(nil, r, nil)); got != want {
		t.Errorf("forwarded %q, want %q", got, want)
	}
	up, resp := NewConn(mem("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly bytes"), Limits{}), new(Response)
	if err := up.ReadResponse(resp, "CONNECT"); err != nil || !resp.Body.Empty() || up.Buffered() != 11 {
		t.Errorf("%v, %+v, %d buffered", err, resp, up.Buffered())
	}
	up = NewConn(mem("HTTP/1.1 403 Forbidden\r\nContent-Length: 5\r\n\r\nearly"), Limits{})
	if err := up.ReadResponse(resp, "CONNECT"); err != nil || resp.Body.Length != 5 {
		t.Errorf("%v, %+v", err, resp)
	}
	if _, _, err := readReq("CONNECT a.example:443 HTTP/1.0\r\n\r\n", Limits{}); err != nil {
		t.Errorf("CONNECT in HTTP/1.0 without Host: %v", err)
	}
}

func TestClientFailuresAreTheClients(t *testing.T) {
	const start = "POST /x HTTP/1.1\r\nHost: a\r\n"
	long := strings.Repeat("a", 20<<10)
	for _, tt := range []struct{ name, in, want string }{
		{"gone inside a long body", start + "Content-Length: 100000\r\n\r\n" + long, ""},
		{"gone inside a small body", start + "Content-Length: 100\r\n\r\nabc", ""},
		{"gone inside a chunk", start + "Transfer-Encoding: chunked\r\n\r\n5000\r\n" + long, ""},
		{"bad chunk late", start + "Transfer-Encoding: chunked\r\n\r\n5000\r\n" + long + "\r\nzz\r\n", "HTTP/1.1 400 "},
		{"bad trailer late", start + "Transfer-Encoding: chunked\r\n\r\n5000\r\n" + long + "\r\n0\r\nA : b\r\n\r\n", "HTTP/1.1 400 "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client, upstream, outcome := live(t)
			go func() { _, _ = io.Copy(io.Discard, upstream) }()
			if _, err := io.WriteString(client, tt.in); err != nil {
				t.Fatal(err)
			}
			_ = client.(*net.TCPConn).CloseWrite()
			got, _ := io.ReadAll(client)
			if err := <-outcome; FailedSide(err) != Client {
				t.Errorf("outcome %v, want a failure of the client", err)
			}
			if !strings.HasPrefix(string(got), tt.want) || tt.want == "" && len(got) > 0 {
				t.Errorf("client got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestUpstreamDiesDuringUpload(t *testing.T) {
	client, upstream, outcome := live(t)
	go func() {
		_, _ = io.ReadFull(upstream, make([]byte, 1000))
		upstream.Close()
	}()
	go func() {
		_, _ = io.WriteString(client, "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 50000000\r\n\r\n")
		for b := make([]byte, 4096); ; {
			if _, err := client.Write(b); err != nil {
				return
			}
		}
	}()
	resp, err := http.ReadResponse(bufio.NewReader(client), nil)
	if err != nil || resp.StatusCode != 502 {
		t.Fatalf("%v, %v; want 502", resp, err)
	}
	if err := <-outcome; FailedSide(err) != Upstream {
		t.Errorf("outcome %v, want a failure of the upstream", err)
	}
}

func TestUpgradeAndTunnel(t *testing.T) {
	client, down := meshtest.TCP(t)
	up, upstream := meshtest.TCP(t)
	type end struct {
		ab, ba int64
		err    error
	}
	over := make(chan end, 1)
	go func() {
		a, b := NewConn(down, Limits{}), NewConn(up, Limits{})
		if res, err := proxy(a, reuse(b)); err != nil || !res.Upgraded || res.Status != 101 {
			over <- end{err: fmt.Errorf("not upgraded: %v %+v", err, res)}
			return
		}
		var e end
		e.ab, e.ba, e.err = NewTunnel(a, b, time.Minute).Run()
		over <- e
	}()
	// Frames come together with the heads: none may be lost.
	_, _ = io.WriteString(client, "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nframe1")
	br := bufio.NewReader(upstream)
	if req, err := http.ReadRequest(br); err != nil || req.Header.Get("Upgrade") != "websocket" || req.Header.Get("Connection") != "Upgrade" {
		t.Fatal(err, req)
	}
	_, _ = io.WriteString(upstream, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nframe2")
	bc := bufio.NewReader(client)
	if resp, err := http.ReadResponse(bc, nil); err != nil || resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "websocket" {
		t.Fatal(err, resp)
	}
	got := make([]byte, 6)
	if _, err := io.ReadFull(br, got); err != nil || string(got) != "frame1" {
		t.Fatalf("upstream got %q, %v", got, err)
	}
	if _, err := io.ReadFull(bc, got); err != nil || string(got) != "frame2" {
		t.Fatalf("client got %q, %v", got, err)
	}
	_ = client.(*net.TCPConn).CloseWrite()
	if b, err := io.ReadAll(br); len(b) != 0 || err != nil {
		t.Fatalf("after the half close the upstream got %q, %v", b, err)
	}
	_, _ = io.WriteString(upstream, "last words")
	upstream.Close()
	if b, err := io.ReadAll(bc); string(b) != "last words" || err != nil {
		t.Fatalf("client got %q, %v", b, err)
	}
	if e := <-over; e.err != nil || e.ab != 6 || e.ba != 16 {
		t.Errorf("tunnel: %+v", e)
	}
}

func TestTunnelEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a1, a2 := net.Pipe()
		b1, b2 := net.Pipe()
		over := make(chan error, 1)
		go func() {
			_, _, err := NewTunnel(NewConn(a2, Limits{}), NewConn(b1, Limits{}), 10*time.Second).Run()
			over <- err
		}()
		start := time.Now()
		for range 5 { // one direction alone keeps both alive
			<-time.After(8 * time.Second)
			if _, err := a1.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(b2, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		if err := <-over; err != ErrIdleTimeout {
			t.Errorf("ended with %v, want ErrIdleTimeout", err)
		}
		if d := time.Since(start); d < 50*time.Second || d > 65*time.Second {
			t.Errorf("ended after %v", d)
		}
		if _, err := b2.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("far end still open: %v", err)
		}
	})
}

func TestTunnelStopsWhenClosedElsewhere(t *testing.T) {
	a1, a2 := net.Pipe()
	b1, b2 := net.Pipe()
	a, b := NewConn(a2, Limits{}), NewConn(b1, Limits{})
	over := make(chan error, 1)
	go func() {
		_, _, err := NewTunnel(a, b, 0).Run()
		over <- err
	}()
	a.Close()
	if err := <-over; !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("ended with %v", err)
	}
	a1.Close()
	b2.Close()
}

func TestTrailersThatOnlyAProxyMaySetDoNotPass(t *testing.T) {
	d := decoder{trailer: []byte("Sallyport-Decision: forged\r\nSallyport_Decision: forged\r\nGrpc-Status: 0\r\n")}
	lim := Limits{}.filled()
	got, err := d.appendLast(nil, true, NewNameSet("sallyport-*"), &lim)
	if err != nil {
		t.Fatal(err)
	}
	if want := "0\r\nGrpc-Status: 0\r\n\r\n"; string(got) != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
