package proxy

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/hop"
	"sallyport/internal/http1"
	"sallyport/internal/meshtest"
	"sallyport/internal/svid"
	"sallyport/internal/upstream"
)

// openAt counts the connections and the streams that are open at a listener.
func openAt(l *listener) (conns, streams int) {
	for _, c := range l.conns() {
		if c.on == nil {
			conns++
		} else {
			streams++
		}
	}
	return conns, streams
}

func TestCallsAtOnceShareAConnection(t *testing.T) {
	const many = 40
	var here sync.WaitGroup
	here.Add(many)
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		here.Done()
		here.Wait() // all of them are here
		fmt.Fprint(w, r.Header.Get("X-Forwarded-Client-Cert"))
	}))
	var wg sync.WaitGroup
	for i := range many {
		wg.Go(func() {
			_, body := get(t, r.client(), fmt.Sprintf("http://billing.mesh.internal/ok/%d", i))
			if !strings.HasSuffix(body, ";URI="+web.String()) {
				t.Errorf("the application knows the caller as %q", body)
			}
		})
	}
	wg.Wait()
	if conns, streams := openAt(&r.inbound.listener); conns != 1 || streams != many {
		t.Errorf("%d connections, %d streams", conns, streams)
	}
	// Each call was judged and recorded by itself, as everywhere.
	if n := len(decisions(r.inAudit)); n != many {
		t.Errorf("%d calls were recorded", n)
	}
}

// A peer that knows no hop gets what it knows, whichever end it is.
func TestPeersWithoutHop(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*rig)
	}{
		{"the caller", func(r *rig) { r.protos = []string{"http/1.1"} }},
		{"the service", func(r *rig) {
			r.inCfg.TLS = svid.ServerTLS(r.billing, func(spiffeid.ID) error { return nil }, "http/1.1")
		}},
		{"a caller without ALPN", func(r *rig) { r.protos = nil }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, app(t, hello), tt.change)
			c := r.client()
			for range 3 {
				if resp, body := get(t, c, "http://billing.mesh.internal/ok/1"); resp.StatusCode != 200 || body != "hello /ok/1" {
					t.Errorf("got %d %q", resp.StatusCode, body)
				}
			}
			if resp, _ := get(t, c, "http://billing.mesh.internal/no"); resp.StatusCode != 403 {
				t.Errorf("got %d", resp.StatusCode)
			}
			if conns, streams := openAt(&r.inbound.listener); conns != 1 || streams != 0 {
				t.Errorf("%d connections, %d streams", conns, streams)
			}
		})
	}
}

// A revocation ends the connection and all on it, and is one record; what the
// same identity holds by another SVID goes on.
func TestARevocationEndsAConnectionWithItsStreams(t *testing.T) {
	r := newRig(t, echoApp(t))
	ws, slow, idle := r.dial(), r.dial(), r.dial()
	ws.upgraded(wsThrough)
	slow.streams(strings.Replace(proxied, "/ok/1", "/ok/slow", 1))
	idle.say(proxied)
	idle.answer("GET")
	if conns, streams := openAt(&r.inbound.listener); conns != 1 || streams != 3 {
		t.Fatalf("%d connections, %d streams", conns, streams)
	}
	other := r.dialIn(meshtest.Source(t, r.ca, web))
	other.upgraded(wsRequest)
	r.billing.Revoke(revocationOf(r.web))
	r.inbound.Rejudge()
	for name, w := range map[string]*wire{"a call in flight": slow, "upgraded": ws} {
		severed(t, w, name)
	}
	other.echo()
	if got := closedFor(r.inAudit, "svid_revoked"); len(got) != 1 {
		t.Errorf("recorded %+v", got)
	}
	await(t, func() bool { conns, streams := openAt(&r.inbound.listener); return conns == 1 && streams == 0 })
}

const wsThrough = "GET http://billing.mesh.internal/ok/ws HTTP/1.1\r\nHost: billing.mesh.internal\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"

// What the policy ends is one stream; the others on the connection go on.
func TestPolicyEndsOneStreamOnly(t *testing.T) {
	r := newRig(t, echoApp(t))
	r.use(accessCSV + row2(strings.Replace(accessCSV, "/ok/**", "/ws/**", 1)))
	stays, goes := r.dial(), r.dial()
	stays.upgraded(wsThrough)
	goes.upgraded(strings.Replace(wsThrough, "/ok/ws", "/ws/1", 1))
	r.use(accessCSV)
	r.inbound.Rejudge()
	severed(t, goes, "upgraded by a row that is gone")
	stays.echo()
	if got := closedFor(r.inAudit, reasonPolicy); len(got) != 1 {
		t.Errorf("recorded %+v", got)
	}
}

// A proxy that drains refuses what it has not begun; such a call is made again,
// whatever its method, by the next one at the address.
func TestRefusedCallIsMadeAgain(t *testing.T) {
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s", r.Method, b)
	}))
	w := r.dial()
	w.say(proxied)
	w.answer("GET")
	for _, c := range r.inbound.conns() {
		// The drain has come between the request and its beginning.
		if _, ok := c.Conn.(*hop.Stream); ok {
			await(t, func() bool { return c.state.CompareAndSwap(idle, ended) })
		}
	}
	w.say("POST http://billing.mesh.internal/ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\nContent-Length: 5\r\n\r\nhello")
	if resp, body := w.answer("POST"); resp.StatusCode != 200 || body != "POST hello" {
		t.Errorf("got %d %q", resp.StatusCode, body)
	}
}

// refuses has the streams that are kept to an inbound proxy refuse their next call,
// while it takes new ones.
func refuses(t *testing.T, in *Inbound) {
	t.Helper()
	for _, c := range in.conns() {
		if _, ok := c.Conn.(*hop.Stream); ok {
			await(t, func() bool { return c.state.CompareAndSwap(idle, ended) || c.state.Load() == ended })
		}
	}
}

// One that goes on and refuses has too much to do: to try again is a retry as any
// other, and goes elsewhere.
func TestACallThatIsRefusedByOneThatStaysIsARetry(t *testing.T) {
	// On one connection, so that a stream is back before the next call wants it.
	ask := func(w *wire, method string) int {
		w.say(method + " http://billing.mesh.internal/ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\nContent-Length: 0\r\n\r\n")
		resp, _ := w.answer(method)
		return resp.StatusCode
	}
	t.Run("within the attempts of its route", func(t *testing.T) {
		f := &flaky{}
		r := newRig(t, app(t, f.ServeHTTP), func(r *rig) { r.routes = "service: billing\nroutes:\n  - name: all\n    retry: {attempts: 0}\n" })
		w := r.dial()
		ask(w, "GET")
		refuses(t, r.inbound)
		if got := ask(w, "GET"); got != 502 || f.seen.Load() != 1 {
			t.Errorf("status %d, the application saw %d calls", got, f.seen.Load())
		}
	})
	t.Run("at another endpoint", func(t *testing.T) {
		f, other := &flaky{}, &flaky{}
		r := newRig(t, app(t, f.ServeHTTP))
		cfg := r.inCfg
		cfg.App = upstream.NewLocal(netip.MustParseAddrPort(app(t, other.ServeHTTP)), http1.Limits{})
		in, err := NewInbound(cfg)
		if err != nil {
			t.Fatal(err)
		}
		addr, _ := start(t, in.Run)
		r.endpointsExtra = append(r.endpointsExtra, meshtest.Endpoint(t, "billing", addr))
		r.use(r.access)
		w := r.dial()
		for range 20 {
			for was := f.seen.Load(); f.seen.Load() == was; {
				ask(w, "GET")
			}
			refuses(t, r.inbound)
			was := f.seen.Load()
			if got := ask(w, "POST"); got != 200 || f.seen.Load() != was {
				t.Fatalf("status %d, the one that had refused saw %d calls more", got, f.seen.Load()-was)
			}
		}
	})
}

func TestStreamsCountAsConnections(t *testing.T) {
	entered, leave := make(chan struct{}, 8), make(chan struct{})
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		entered <- struct{}{}
		<-leave
		hello(w, r)
	}), func(r *rig) { r.inCfg.MaxConns, r.inCfg.MaxPerPeer = 3, 10 })
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() { get(t, r.client(), "http://billing.mesh.internal/ok/1") })
	}
	<-entered
	<-entered
	if resp, _ := get(t, r.client(), "http://billing.mesh.internal/ok/2"); resp.StatusCode < 500 {
		t.Errorf("one more got %d", resp.StatusCode)
	}
	close(leave)
	wg.Wait()
}

// A client that goes away in the middle of a call ends it at the service too.
func TestBrokenOffCallEndsAtTheApplication(t *testing.T) {
	gone := make(chan struct{})
	r := newRig(t, rawApp(t, func(c net.Conn, br *bufioReader) {
		if skipHead(br) != nil {
			return
		}
		fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
		for {
			if _, err := c.Write(make([]byte, 64<<10)); err != nil {
				close(gone)
				return
			}
		}
	}))
	w := r.dial()
	w.streams(proxied)
	w.Close()
	select {
	case <-gone:
	case <-time.After(patience):
		t.Error("the application goes on writing")
	}
}

// A peer that breaks the protocol is cut off, and counted by how.
func TestViolationsAreCounted(t *testing.T) {
	r := newRig(t, app(t, hello))
	w := newWire(t, r.inAddr, svid.ClientTLS(r.web, billing, hop.Proto))
	w.say("GET / HTTP/1.1\r\nHost: b\r\n\r\n")
	_, _ = io.Copy(io.Discard, w)
	const name = `sallyport_hop_violations_total{reason="kind",reporter="inbound"}`
	await(t, func() bool { return r.metric(name) == "1" })
}

// A peer that ends at once each connection that is made to it is about to end
// itself: the call is made once another one is there.
func TestAPeerThatDrainsIsDialledAgain(t *testing.T) {
	var shaken atomic.Int32
	r := newRig(t, app(t, hello), func(r *rig) {
		cfg := r.inCfg.TLS
		verify := cfg.VerifyConnection
		cfg.VerifyConnection = func(cs tls.ConnectionState) error {
			if shaken.Add(1) == 3 {
				r.inbound.draining.Store(false)
			}
			return verify(cs)
		}
	})
	r.inbound.draining.Store(true)
	w := r.dial()
	w.say("POST http://billing.mesh.internal/ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\nContent-Length: 5\r\n\r\nhello")
	if resp, body := w.answer("POST"); resp.StatusCode != 200 || body != "hello /ok/1" {
		t.Errorf("got %d %q after %d handshakes", resp.StatusCode, body, shaken.Load())
	}
}

// A proof that does not hold any more refuses every call on the connection, not
// only the one that looked.
func TestAProofThatFailsStaysSo(t *testing.T) {
	r := newParts(t, app(t, hello))
	r.inbound.verifyEvery = time.Hour
	r.open()
	tc, err := tls.Dial("tcp", r.inAddr, svid.ClientTLS(r.web, billing, hop.Proto))
	if err != nil {
		t.Fatal(err)
	}
	h := hop.Dialled(tc, hop.Config{})
	done := make(chan struct{})
	go func() { defer close(done); _ = h.Run() }()
	defer func() { h.Close(); <-done }()
	ask := func() int {
		t.Helper()
		s, err := h.Open()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		_ = s.SetDeadline(time.Now().Add(time.Minute))
		_, _ = io.WriteString(s, okRequest)
		resp, err := http.ReadResponse(bufio.NewReader(s), nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode
	}
	if got := ask(); got != 200 {
		t.Fatalf("got %d", got)
	}
	other := meshtest.NewCA(t, meshtest.TD)
	if err := r.billing.Set(&svid.State{Identities: []svid.Identity{other.Issue(t, billing, time.Hour)}, Bundle: other.Bundle()}); err != nil {
		t.Fatal(err)
	}
	for _, c := range r.inbound.conns() {
		if who := c.look().who; who != nil {
			who.verified.Store(0) // it is time to look again
		}
	}
	for range 3 {
		if got := ask(); got != 403 {
			t.Errorf("a call by a proof that is withdrawn got %d", got)
		}
	}
}
