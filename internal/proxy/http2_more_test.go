package proxy

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"sallyport/internal/http1"
	"sallyport/internal/svid"
)

// What is refused of gRPC is said in the words of gRPC, in the head alone, with
// the id of the decision.
func TestRefusalsOfGRPC(t *testing.T) {
	r := newRig(t, rawApp(t, func(c net.Conn, br *bufioReader) { _ = skipHead(br) }), withH2)
	rpc := []string{"content-type", "application/grpc+proto", "te", "trailers"}
	for door, dial := range r.doorsH2(t) {
		for _, tt := range []struct {
			name   string
			fields []string
			want   string
			denied bool
		}{
			{"denied", ask("POST", "/no/Method", rpc...), "7", true},
			{"an application that hangs up", ask("POST", "/ok/Method", rpc...), "14", false},
			{"a method that is not served", ask("TRACE", "/ok/Method", rpc...), "12", false},
		} {
			w := dial()
			w.head(1, true, tt.fields...)
			got := w.answer(1, false)
			if got.outcome != "200" || got.head["grpc-status"] != tt.want || got.head["content-type"] != "application/grpc" || !got.ended || got.head["grpc-message"] == "" {
				t.Errorf("%s, %s: got %+v", door, tt.name, got)
			}
			if (got.head["sallyport-decision"] != "") != tt.denied {
				t.Errorf("%s, %s: decision %q", door, tt.name, got.head["sallyport-decision"])
			}
		}
		w := dial()
		w.head(1, true, ask("POST", "/no/Method", "content-type", "application/grpc-web")...)
		if got := w.answer(1, false); got.outcome != "403" || !strings.Contains(got.body, "denied by policy") {
			t.Errorf("%s: another protocol got %+v", door, got)
		}
	}
}

func TestGRPCStatusOfOurAnswers(t *testing.T) {
	for status, want := range map[int]int{400: 13, 401: 16, 403: 7, 404: 12, 405: 12, 408: 4, 421: 12, 429: 8, 431: 8, 500: 13, 502: 14, 503: 14, 504: 4, 418: 2} {
		if got := http1.GRPCStatus(status); got != want {
			t.Errorf("%d: got %d, want %d", status, got, want)
		}
	}
	if got := string(http1.AppendGRPC(nil, "application/grpc", 403, "50% of\r\nx: \xff")); got != "Content-Type: application/grpc\r\nGrpc-Status: 7\r\nGrpc-Message: 50%25 of%0D%0Ax: %FF\r\n" {
		t.Errorf("got %q", got)
	}
}

// Both directions of a call move at once, with nothing waited for, and end with
// trailers.
func TestBothWaysAtOnceOverHTTP2(t *testing.T) {
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		w.Header().Set("Trailer", "Grpc-Status")
		w.WriteHeader(200)
		_ = http.NewResponseController(w).Flush()
		b := make([]byte, 100)
		for {
			n, err := r.Body.Read(b)
			if n > 0 {
				_, _ = w.Write(b[:n])
				_ = http.NewResponseController(w).Flush()
			}
			if err != nil {
				break
			}
		}
		w.Header().Set("Grpc-Status", "0")
	}), withH2)
	for door, dial := range r.doorsH2(t) {
		w := dial()
		w.head(1, false, ask("POST", "/ok/Method", "content-type", "application/grpc", "te", "trailers")...)
		if got := w.answer(1, true); got.outcome != "200" { // before we have said anything
			t.Errorf("%s: got %+v", door, got)
		}
		for i := range 5 {
			word := fmt.Sprintf("word %d", i)
			_ = w.WriteData(1, false, []byte(word))
			for got := ""; got != word; {
				f, err := w.ReadFrame()
				if err != nil {
					t.Fatal(err)
				}
				if d, ok := f.(*xhttp2.DataFrame); ok {
					got += string(d.Data())
				}
			}
		}
		_ = w.WriteData(1, true, nil)
		if got := w.answer(1, false); got.head["grpc-status"] != "0" || !got.ended {
			t.Errorf("%s: ended by %+v", door, got)
		}
	}
}

// A client that breaks a call off ends it at the application at once, though
// that says nothing and reads nothing; its other calls go on.
func TestBrokenOffStreamEndsAtTheApplication(t *testing.T) {
	entered, gone := make(chan struct{}, 9), make(chan struct{}, 9)
	r := newRig(t, rawApp(t, func(c net.Conn, br *bufioReader) {
		if skipHead(br) != nil {
			return
		}
		entered <- struct{}{}
		_, _ = io.Copy(io.Discard, br)
		gone <- struct{}{}
	}), withH2)
	for door, dial := range r.doorsH2(t) {
		w := dial()
		w.head(1, true, ask("GET", "/ok/1")...)
		<-entered
		_ = w.WriteRSTStream(1, xhttp2.ErrCodeCancel)
		select {
		case <-gone:
		case <-time.After(patience):
			t.Fatalf("%s: the call goes on", door)
		}
		w.head(3, true, ask("GET", "/no")...)
		if got := w.answer(3, false); got.outcome != "403" {
			t.Errorf("%s: another call got %+v", door, got)
		}
	}
}

// An answer that is cut off is never taken for a whole one.
func TestCutOffAnswerOverHTTP2(t *testing.T) {
	r := newRig(t, rawApp(t, func(c net.Conn, br *bufioReader) {
		_ = skipHead(br)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
	}), withH2)
	for door, dial := range r.doorsH2(t) {
		w := dial()
		w.head(1, true, ask("GET", "/ok/1")...)
		if got := w.answer(1, false); got.outcome != "reset 2" || got.body != "hello" {
			t.Errorf("%s: got %+v", door, got)
		}
	}
}

// A WebSocket over HTTP/2 is one over HTTP/1.1 to the application, and is judged
// again like that.
func TestWebSocketOverHTTP2(t *testing.T) {
	r := newRig(t, echoApp(t), withH2)
	for door, dial := range r.doorsH2(t) {
		w := dial()
		w.head(1, false, append(ask("CONNECT", "/ok/ws"), ":protocol", "websocket", "sec-websocket-version", "13")...)
		if got := w.answer(1, true); got.outcome != "200" || got.ended || got.head["sec-websocket-accept"] != "" {
			t.Fatalf("%s: got %+v", door, got)
		}
		for range 3 {
			_ = w.WriteData(1, false, []byte("ping"))
			for got := ""; got != "ping"; {
				f, err := w.ReadFrame()
				if err != nil {
					t.Fatal(err)
				}
				if d, ok := f.(*xhttp2.DataFrame); ok {
					got += string(d.Data())
				}
			}
		}
		r.use(strings.Replace(accessCSV, "/ok/**", "/other/**", 1))
		r.inbound.Rejudge()
		if got := w.answer(1, false); got.outcome != "reset 8" && got.outcome != "" { // ended with data, or without
			t.Errorf("%s: not allowed any more, got %+v", door, got)
		}
		r.use(accessCSV)
	}
}

// A drain lets a call in flight come to its end, and the connection with it.
func TestDrainOverHTTP2(t *testing.T) {
	entered, leave := make(chan struct{}, 1), make(chan struct{})
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ok/slow" {
			entered <- struct{}{}
			<-leave
		}
		hello(w, r)
	}), withH2)
	w := newH2wire(t, r.inAddr, svid.ClientTLS(r.web, billing, "h2"))
	w.head(1, true, ask("GET", "/ok/1")...)
	w.answer(1, false)
	w.head(3, true, ask("GET", "/ok/slow")...)
	<-entered
	stopped := make(chan error, 1)
	go func() { stopped <- r.stopIn() }()
	if got := w.answer(3, false); got.outcome != "goaway 0" {
		t.Errorf("got %+v", got)
	}
	close(leave)
	if got := w.answer(3, false); got.outcome != "goaway 0" {
		// The second one comes first, unless the answer is faster.
		if got.outcome != "200" {
			t.Errorf("the call in flight got %+v", got)
		}
	} else if got := w.answer(3, false); got.outcome != "200" || got.body != "hello /ok/slow" {
		t.Errorf("the call in flight got %+v", got)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// To a client of HTTP/1.1 a refusal is one by its status, whatever it says that
// its body is. Both sidecars refuse: one behind the wire between them.
func TestRefusalsOverHTTP1(t *testing.T) {
	r := newRig(t, app(t, hello), withH2)
	for name, dial := range map[string]func() *wire{"at the service": func() *wire { return r.dialIn(r.web) }, "through both": r.dial} {
		for te, want := range map[string]int{"": 403, "TE: trailers\r\nConnection: TE\r\n": 200} {
			w := dial()
			w.say("POST /no HTTP/1.1\r\nHost: billing.mesh.internal\r\nContent-Type: application/grpc\r\n" + te + "Content-Length: 2\r\n\r\nhi")
			if resp, body := w.answer("POST"); resp.StatusCode != want || resp.Header.Get("Sallyport-Decision") == "" {
				t.Errorf("%s, %q: got %d %v %q", name, te, resp.StatusCode, resp.Header, body)
			}
		}
	}
}

// A WebSocket is open when the application says so, not when it answers as if it
// had been asked for a page.
func TestAnswersToWebSocketOverHTTP2(t *testing.T) {
	for answer, want := range map[string]string{
		"200 OK\r\nContent-Length: 5\r\n\r\n\x81\x03abc":  "502",
		"204 No Content\r\n\r\n":                          "502",
		"404 Not Found\r\nContent-Length: 5\r\n\r\nwhat?": "404",
	} {
		r := newRig(t, rawApp(t, func(c net.Conn, br *bufioReader) {
			if skipHead(br) == nil {
				fmt.Fprint(c, "HTTP/1.1 "+answer)
			}
		}), withH2)
		for door, dial := range r.doorsH2(t) {
			w := dial()
			w.head(1, false, append([]string{":protocol", "websocket"}, ask("CONNECT", "/ok/ws", "sec-websocket-version", "13")...)...)
			if got := w.answer(1, false); got.outcome != want {
				t.Errorf("%s, %.3s: got %+v", door, answer, got)
			}
		}
		// The sidecar that told the client counts what it told.
		await(t, func() bool {
			w := httptest.NewRecorder()
			r.metrics.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
			for line := range strings.Lines(w.Body.String()) {
				if strings.HasPrefix(line, `sallyport_requests_total{code="`+want) && strings.Contains(line, `reporter="outbound"`) {
					return strings.HasSuffix(line, " 1\n")
				}
			}
			return false
		})
	}
}
