package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/hop"
	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/meshtest"
	"sallyport/internal/svid"
)

// h2c is an application that speaks HTTP/2 alone; conns counts its connections.
func h2c(t *testing.T, h http.HandlerFunc, streams int) (addr netip.AddrPort, conns *atomic.Int64) {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	s.Config.Protocols = &p
	s.Config.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: streams}
	conns = new(atomic.Int64)
	s.Config.ConnState = func(_ net.Conn, st http.ConnState) {
		if st == http.StateNew {
			conns.Add(1)
		}
	}
	s.Start()
	t.Cleanup(s.Close)
	return s.Listener.Addr().(*net.TCPAddr).AddrPort(), conns
}

// exchange makes a call on a lent connection and gives it back.
func exchange(c *Conn, path string) (string, error) {
	if _, err := fmt.Fprintf(c.Conn, "GET %s HTTP/1.1\r\nHost: app\r\n\r\n", path); err != nil {
		c.Discard()
		return "", err
	}
	var r http1.Response
	if err := c.ReadResponse(&r, "GET"); err != nil {
		c.Discard()
		return "", err
	}
	var body writer
	if _, rerr, werr := http1.CopyBody(&body, c.Conn, r.Body, http1.UntilClose, nil); rerr != nil || werr != nil {
		c.Discard()
		return "", errors.Join(rerr, werr)
	}
	c.Put()
	return fmt.Sprint(r.Status, " ", string(body)), nil
}

type writer []byte

func (w *writer) Write(p []byte) (int, error) {
	*w = append(*w, p...)
	return len(p), nil
}

func TestCallsToAnApplicationThatSpeaksHTTP2(t *testing.T) {
	const many = 40
	var here sync.WaitGroup
	here.Add(many)
	addr, conns := h2c(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/together" {
			here.Done()
			here.Wait()
		}
		fmt.Fprint(w, r.Proto, " ", r.URL)
	}, 0)
	p := NewLocalHTTP2(addr, http1.Limits{})
	defer p.Close()
	call := func(path string) {
		c, err := p.Get(t.Context(), false)
		if err != nil {
			t.Error(err)
			return
		}
		if got, err := exchange(c, path); got != "200 HTTP/2.0 "+path {
			t.Errorf("got %q, %v", got, err)
		}
	}
	var wg sync.WaitGroup
	for range many {
		wg.Go(func() { call("/together") })
	}
	wg.Wait()
	for range 10 {
		call("/later")
	}
	if n := conns.Load(); n != 1 {
		t.Errorf("%d connections for calls that one carries", n)
	}
}

func TestAnApplicationThatTakesFewStreamsGetsMoreConnections(t *testing.T) {
	const many, each = 12, 4
	var round atomic.Pointer[sync.WaitGroup]
	addr, conns := h2c(t, func(http.ResponseWriter, *http.Request) {
		here := round.Load()
		here.Done()
		here.Wait()
	}, each)
	p := NewLocalHTTP2(addr, http1.Limits{})
	defer p.Close()
	for range 2 {
		here := new(sync.WaitGroup)
		here.Add(many)
		round.Store(here)
		var wg sync.WaitGroup
		for range many {
			wg.Go(func() {
				// A connection is opened before the server has said how much it takes:
				// what it then refuses is asked for elsewhere, as every caller does.
				for range 20 {
					c, err := p.Get(t.Context(), false)
					if err != nil {
						t.Error(err)
						return
					}
					if _, err = exchange(c, "/"); err == nil {
						return
					} else if !errors.Is(err, http2.ErrRefused) {
						t.Error(err)
						return
					}
				}
				t.Error("refused over and over")
			})
		}
		wg.Wait()
	}
	if n := conns.Load(); n < many/each || n > many {
		t.Errorf("%d connections for %d calls of which each takes %d", n, many, each)
	}
}

// A server that answers nothing must not have us dial without end.
func TestNoMoreLinesThanThereMayBe(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var dialled atomic.Int64
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			dialled.Add(1)
			go func() {
				defer c.Close()
				_, _ = io.Copy(io.Discard, c)
			}()
		}
	}()
	p := NewLocalHTTP2(ln.Addr().(*net.TCPAddr).AddrPort(), http1.Limits{})
	var held []*Conn
	defer func() {
		for _, c := range held {
			c.Discard()
		}
	}()
	for range maxLines*100 + 1 {
		c, err := p.Get(t.Context(), false)
		if errors.Is(err, errCrowded) {
			if n := dialled.Load(); n > maxLines {
				t.Errorf("%d connections", n)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	t.Error("no end of it")
}

func TestPeersOfOtherMakesOverHTTP2(t *testing.T) {
	ca := meshtest.NewCA(t, spiffeid.RequireTrustDomainFromString("demo.sallyport"))
	id := spiffeid.RequireFromString("spiffe://demo.sallyport/billing")
	source := meshtest.Source(t, ca, id)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Proto, " ", r.TLS.NegotiatedProtocol)
	}))
	s.TLS = svid.ServerTLS(source, func(spiffeid.ID) error { return nil }, "h2", "http/1.1")
	cert, err := source.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	s.TLS.Certificates = []tls.Certificate{*cert} // or httptest brings its own
	s.EnableHTTP2 = true
	s.StartTLS()
	defer s.Close()
	standing := error(nil)
	ss, err := New(Config{
		TLS: func(want spiffeid.ID) *tls.Config {
			return svid.ClientTLS(source, want, hop.Proto, http2.Proto, "http/1.1")
		},
		Generation: func() uint64 { return 0 }, Standing: func(tls.ConnectionState) error { return standing },
	})
	if err != nil {
		t.Fatal(err)
	}
	snap := snapshot(s.Listener.Addr().(*net.TCPAddr).AddrPort())
	snap.Services[0].ID = id
	ss.Use(snap)
	defer ss.Close()
	for range 3 {
		c, err := ss.Get(context.Background(), snap.Services[0].Name, false)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := exchange(c, "/"); got != "200 HTTP/2.0 h2" {
			t.Errorf("got %q, %v", got, err)
		}
	}
	standing = errors.New("revoked")
	if gone := ss.Recheck(); len(gone) != 1 || gone[0].ID != id {
		t.Errorf("whose proof holds no more: %v", gone)
	}
}

// A server of gRPC takes pings without calls for an attack: none are sent.
func TestAQuietApplicationIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		cfg := Config{Generation: func() uint64 { return 0 }}
		p := newPool(cfg.withDefaults(), target{})
		p.h2c = true
		l := p.lineOn(here, nil)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = l.Run()
		}()
		all, _ := io.ReadAll(there) // until it has been idle for too long
		if len(all) > 200 {
			t.Errorf("said %d bytes: %q", len(all), all)
		}
		<-done
		there.Close()
	})
}
