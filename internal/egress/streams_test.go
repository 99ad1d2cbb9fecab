package egress

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/hop"
	"sallyport/internal/mux"
)

// streamsOn makes the connection of a proxy of our own.
func (w *world) streamsOn(id spiffeid.ID) *hop.Conn {
	w.t.Helper()
	tc, err := tls.Dial("tcp", w.addr, w.client(id, hop.Proto))
	if err != nil {
		w.t.Fatal(err)
	}
	if got := tc.ConnectionState().NegotiatedProtocol; got != hop.Proto {
		w.t.Fatalf("agreed on %q", got)
	}
	h := hop.Dialled(tc, hop.Config{})
	done := make(chan struct{})
	go func() { defer close(done); _ = h.Run() }()
	w.t.Cleanup(func() { h.Close(); <-done })
	return h
}

// A connStream is a tunnel on a stream.
type connStream struct {
	*hop.Stream
	br *bufio.Reader
}

func (c *connStream) Read(p []byte) (int, error) { return c.br.Read(p) }

func (w *world) connectStream(h *hop.Conn, authority string) (clientTunnel, *refused) {
	w.t.Helper()
	s, err := h.Open()
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { s.Close() })
	_ = s.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprintf(s, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", authority, authority)
	c := &connStream{s, bufio.NewReader(s)}
	res, err := http.ReadResponse(c.br, &http.Request{Method: "CONNECT"})
	if err != nil {
		w.t.Fatal(err)
	}
	return orRefused(w, c, res)
}

func dialStream(w *world, id spiffeid.ID, authority string) (clientTunnel, *refused) {
	w.t.Helper()
	return w.connectStream(w.streamsOn(id), authority)
}

// echoes sees that a tunnel to the echo server works, and ends what it sends.
func echoes(t *testing.T, tun clientTunnel) {
	t.Helper()
	b := make([]byte, 4)
	if _, err := io.WriteString(tun, "ping"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(tun, b); err != nil || string(b) != "ping" {
		t.Fatalf("got %q, %v", b, err)
	}
}

// TestManyTunnelsOnOneConnection has one connection carry them, a refusal among
// them, and a change of policy end one of them alone.
func TestManyTunnelsOnOneConnection(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.ConnsPerCaller = 2 }) // one stream may still take its refusal
	h := w.streamsOn(billing)
	var tuns []clientTunnel
	for range 12 {
		tun, ref := w.connectStream(h, "db.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		tuns = append(tuns, tun)
	}
	if _, ref := w.connectStream(h, "evil.test:443"); ref == nil || ref.status != 403 || ref.id == "" {
		t.Fatalf("evil.test: %+v", ref)
	}
	other, ref := w.connectStream(h, "api.stripe.test:443")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	for _, tun := range tuns {
		echoes(t, tun)
	}
	if n := w.gw.Carries(); n != 1 {
		t.Errorf("%d connections carry them, want 1", n)
	}
	w.use(w.policy(`
p, db, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:db.test, *, CONNECT, -, -, allow
`, ""))
	w.gw.Rejudge()
	if _, err := other.Read(make([]byte, 1)); !errors.Is(err, hop.ErrCancelled) {
		t.Errorf("the tunnel whose row is gone: %v, want a reset", err)
	}
	end := w.until("revoked", func(r audit.Record) bool { return r.Reason == string(ReasonRevoked) && r.Kind == audit.KindEgressClose })
	if end.Dst != "host:api.stripe.test" {
		t.Errorf("ended %s", end.Dst)
	}
	for _, tun := range tuns {
		echoes(t, tun)
	}
}

// TestACallerThatBreaksOffEndsTheDial has a stream reset while its destination
// is being dialled.
func TestACallerThatBreaksOffEndsTheDial(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Names = silentNames{} })
	h := w.streamsOn(billing)
	s := w.askSlowly(h)
	s.Close()
	w.until("the end of the dial", denial(ReasonResolve))
	tun, ref := w.connectStream(h, "db.test:5432")
	if ref != nil {
		t.Fatalf("the connection carries nothing more: %+v", ref)
	}
	echoes(t, tun)
}

// TestWhatNobodyReadsOfAStreamIsBounded has a caller send while its destination is
// being dialled, and nothing left for that: by its own doing, or by that of others, for
// which it is not charged.
func TestWhatNobodyReadsOfAStreamIsBounded(t *testing.T) {
	for name, own := range map[string]bool{"its own doing": true, "that of others": false} {
		t.Run(name, func(t *testing.T) {
			w := newWorldOf(t, func(c *Config) { c.Names = silentNames{} }, func(g *Gateway) {
				g.calmOf = mux.NewCalm[spiffeid.ID](2, 0)
			})
			h := w.streamsOn(billing)
			s := w.askSlowly(h)
			back := w.gw.exhaust(billing, own)
			if _, err := s.Write(make([]byte, 16<<10)); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Read(make([]byte, 1)); !errors.Is(err, hop.ErrCancelled) {
				t.Errorf("it was read %v, want that it was broken off", err)
			}
			w.until("the end of the dial", denial(ReasonResolve))
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			for w.gw.asking() != 0 {
				<-tick.C
			}
			back()
			if charged := !w.gw.calmOf.Spend(billing, 1); charged != own {
				t.Errorf("it was charged: %v", charged)
			}
			if own {
				return
			}
			tun, ref := w.connectStream(h, "db.test:5432")
			if ref != nil {
				t.Fatalf("the connection carries nothing more: %+v", ref)
			}
			echoes(t, tun)
		})
	}
}

// asking is how many requests are not answered yet.
func (g *Gateway) asking() int {
	g.crowd.mu.Lock()
	defer g.crowd.mu.Unlock()
	return g.crowd.asking
}

// exhaust takes what a caller with a connection may hold unread: all of it, or what
// others leave. The caller's handshake may be over before the gateway's is.
func (g *Gateway) exhaust(id spiffeid.ID, own bool) (back func()) {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for g.connections(id) == 0 {
		<-tick.C
	}
	g.crowd.mu.Lock()
	b := g.crowd.of[id].firsts
	g.crowd.mu.Unlock()
	if own {
		b.Take(firsts / 2)
		return func() { b.Give(firsts / 2) }
	}
	g.crowd.firsts.Take(firsts)
	b.Take(ownFirst)
	return func() { b.Give(ownFirst); g.crowd.firsts.Give(firsts) }
}

// askSlowly opens a stream on which a tunnel is asked for, whose destination is
// being dialled: the world has silentNames.
func (w *world) askSlowly(h *hop.Conn) *hop.Stream {
	w.t.Helper()
	s, err := h.Open()
	if err != nil {
		w.t.Fatal(err)
	}
	fmt.Fprint(s, "CONNECT slow.test:443 HTTP/1.1\r\nHost: slow.test:443\r\n\r\n")
	for w.gw.Tunnels() == 0 {
		if w.t.Context().Err() != nil {
			w.t.Fatal("nothing was asked of the resolver")
		}
	}
	return s
}

// silentNames never answer.
type silentNames struct{}

func (silentNames) Lookup(ctx context.Context, _ string) ([]netip.Addr, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestDrainCutsNoStream has a gateway yield: its caller is told, what is open
// goes on, and Drain waits for it.
func TestDrainCutsNoStream(t *testing.T) {
	w := newWorld(t, nil)
	h := w.streamsOn(billing)
	tun, ref := w.connectStream(h, "db.test:5432")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	echoes(t, tun)
	w.gw.Yield(true)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for h.Live() {
		<-tick.C // until the goaway is here
	}
	echoes(t, tun)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	drained := make(chan struct{})
	go func() { defer close(drained); w.gw.Drain(ctx) }()
	w.stop()
	echoes(t, tun)
	_ = tun.CloseWrite()
	if rest, err := io.ReadAll(tun); err != nil || len(rest) > 0 {
		t.Errorf("at the end %q, %v", rest, err)
	}
	tun.Close()
	<-drained
	if ctx.Err() != nil {
		t.Error("Drain waited for more than the tunnel")
	}
	if end := w.until("close", kind(audit.KindEgressClose)); end.Reason != string(ReasonDone) {
		t.Errorf("the tunnel ended with %q", end.Reason)
	}
}

// TestStreamsThatAskNothing bounds what a caller holds by heads that never
// become whole, without a record for each.
func TestStreamsThatAskNothing(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.ConnsPerCaller = 2 })
	h := w.streamsOn(billing)
	var held []*hop.Stream
	for range 3 {
		s, err := h.Open()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(s, "CONNECT db.test"); err != nil {
			t.Fatal(err)
		}
		held = append(held, s)
	}
	if _, err := held[2].Read(make([]byte, 1)); !errors.Is(err, hop.ErrRefused) {
		t.Fatalf("the third: %v, want that it is refused", err)
	}
	if _, err := io.WriteString(held[0], ":5432 HTTP/1.1\r\nHost: db.test:5432\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(held[0]), &http.Request{Method: "CONNECT"})
	if err != nil || res.StatusCode != 200 {
		t.Fatalf("the first: %v, %v", res, err)
	}
	tun, ref := w.connectStream(h, "db.test:5432") // in its place
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	echoes(t, tun)
	for _, s := range held {
		s.Close()
	}
}
