package egress

import (
	"crypto/tls"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"sallyport/internal/audit"
)

// spoken is originated with the protocols that the gateway may speak.
func (s *site) spoken(protocols string) string {
	return s.originated("shop.test") + "    alpn: [" + protocols + "]\n"
}

// TestRequestsShareAConnection has requests of HTTP/1.1 go on as streams of one
// connection, with their bodies and trailers.
func TestRequestsShareAConnection(t *testing.T) {
	w, s := askWorld(t)
	w.use(w.policy(asking, s.spoken("h2, http/1.1")))
	s.does(func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Trailer", "Grpc-Status")
		body, _ := io.ReadAll(r.Body)
		_, _ = io.WriteString(rw, r.Proto+" "+r.Host+" "+r.URL.Path+" "+string(body))
		rw.Header().Set("Grpc-Status", "0")
	})
	h := w.streamsOn(billing)
	// The first alone: those that come while it is dialled would dial, too.
	for range 2 {
		c := w.askOnStream(h)
		res, body := c.ask(t, "POST http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\nTE: trailers\r\nContent-Length: 4\r\n\r\nbody")
		if r := <-s.seen; res.StatusCode != 200 || body != "HTTP/2.0 shop.test /v1/a body" || res.Trailer.Get("Grpc-Status") != "0" || r.Header.Get("Te") != "trailers" {
			t.Fatalf("%d %q %v, the site saw %v", res.StatusCode, body, res.Trailer, r.Header)
		}
	}
	var all sync.WaitGroup
	for range 16 {
		c := w.askOnStream(h)
		all.Go(func() {
			if res, body := c.ask(t, "GET http://shop.test/v1/b HTTP/1.1\r\nHost: shop.test\r\n\r\n"); res.StatusCode != 200 || !strings.HasPrefix(body, "HTTP/2.0") {
				t.Errorf("%d %q", res.StatusCode, body)
			}
		})
	}
	all.Wait()
	if n := s.connected(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// TestHostsChooseTheProtocol of those that the destination has.
func TestHostsChooseTheProtocol(t *testing.T) {
	for _, tt := range []struct {
		name, protocols, host string
		status                int
	}{
		{"the host speaks both", "h2, http/1.1", "h2 http/1.1", 200},
		{"the host knows no other", "h2, http/1.1", "http/1.1", 200},
		{"the host says nothing of protocols", "h2, http/1.1", "", 200},
		{"the host lacks it", "h2", "http/1.1", 502},
		{"nobody knows what the host speaks", "h2", "", 502},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, s := askWorld(t)
			s.speaks(strings.Fields(tt.host)...)
			w.use(w.policy(asking, s.spoken(tt.protocols)))
			res, _ := w.askOnStream(w.streamsOn(billing)).ask(t, "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n")
			if res.StatusCode != tt.status {
				t.Errorf("status %d, want %d", res.StatusCode, tt.status)
			}
		})
	}
}

// TestStreamsEndWithTheirRow breaks one answer off, and leaves the others on its
// connection alone.
func TestStreamsEndWithTheirRow(t *testing.T) {
	w, s := askWorld(t)
	w.use(w.policy(asking, s.spoken("h2")))
	more := make(chan string)
	s.does(func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(rw, "begin")
		_ = http.NewResponseController(rw).Flush()
		if r.URL.Path == "/v1/stays" {
			_, _ = io.WriteString(rw, <-more)
			return
		}
		<-r.Context().Done()
		more <- " and end"
	})
	h := w.streamsOn(billing)
	begin := func(path string) (*http.Response, []byte) {
		c := w.askOnStream(h)
		if _, err := io.WriteString(c, "GET http://shop.test"+path+" HTTP/1.1\r\nHost: shop.test\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(c.br, nil)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 5)
		if _, err := io.ReadFull(res.Body, b); err != nil {
			t.Fatal(err)
		}
		return res, b
	}
	stays, _ := begin("/v1/stays")
	goes, _ := begin("/v1/goes")
	w.use(w.policy(asking+"p, gone, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:shop.test, *, *, /v1/goes, -, deny\n", s.spoken("h2")))
	w.gw.Rejudge()
	if _, err := io.Copy(io.Discard, goes.Body); err == nil {
		t.Error("what is not allowed any more ended in order")
	}
	if b, err := io.ReadAll(stays.Body); err != nil || string(b) != " and end" {
		t.Errorf("the other one: %q, %v", b, err)
	}
	w.until("its end", func(r audit.Record) bool {
		return r.Kind == audit.KindEgressClose && r.Path == "/v1/goes" && r.Reason == string(ReasonRevoked)
	})
	if n := s.connected(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// speaks says what the site agrees to from now on.
func (s *site) speaks(protocols ...string) {
	s.tls.Store(&tls.Config{Certificates: s.certs, NextProtos: protocols})
}
