//lint:file-ignore SA1019 http2.Transport is the one client that sends CONNECT with a body that goes on

package egress

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/svid"
)

// revoke makes the gateway believe an SVID no more.
func (w *world) revoke(s *svid.Source) {
	leaf := s.Current().Identities[0].Chain[0]
	w.source.Revoke([]mesh.RevokedSVID{{Serial: mesh.SerialText(leaf.SerialNumber), Until: leaf.NotAfter, Why: mesh.WhyBanned}})
	w.gw.Rejudge()
}

func TestRevocationClosesTheTunnelsOfOneCaller(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		w := newWorld(t, nil)
		loser, ref := dial(w, billing, "db.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		defer loser.Close()
		stolen := w.caller
		winner, ref := dial(w, billing, "db.test:5432") // the same identity, another SVID
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		defer winner.Close()
		w.revoke(stolen)
		_, _ = io.Copy(io.Discard, loser) // returns when it has ended
		end := w.until("close", kind(audit.KindEgressClose))
		if end.Reason != string(ReasonSVIDRevoked) || end.Src != billing.String() {
			t.Errorf("recorded %+v", end)
		}
		w.until("the connection", func(r audit.Record) bool {
			return r.Kind == audit.KindTLS && r.Reason == string(ReasonSVIDRevoked) && r.Src == billing.String()
		})
		io.WriteString(winner, "ping")
		b := make([]byte, 4)
		if _, err := io.ReadFull(winner, b); err != nil || string(b) != "ping" {
			t.Errorf("the SVID beside it got %q, %v", b, err)
		}
		if n := w.gw.Tunnels(); n != 1 {
			t.Errorf("%d tunnels live, want 1", n)
		}
	})
}

func TestRevocationClosesIdleConnectionsAndNewHandshakes(t *testing.T) {
	w := newWorld(t, nil)
	c := w.open1(billing)
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	res, err := http.ReadResponse(c.br, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, res.Body)
	stolen := w.caller
	w.revoke(stolen)
	if _, err := c.br.ReadByte(); err == nil {
		t.Error("an idle connection goes on")
	}
	again, err := tls.Dial("tcp", w.addr, svid.ClientTLS(stolen, gatewayID, "http/1.1"))
	if err == nil {
		_ = again.SetDeadline(time.Now().Add(20 * time.Second))
		_, err = again.Read(make([]byte, 1)) // TLS 1.3: the refusal comes afterwards
		again.Close()
	}
	if err == nil {
		t.Error("a new handshake by a revoked SVID was taken")
	}
	w.until("the handshake", func(r audit.Record) bool { return r.Kind == audit.KindTLS && strings.Contains(r.Detail, "revoked") })
}

// TestARevokedCallerOpensNoTunnel asks on a connection that the gateway has not
// closed yet: one that a Rejudge has still to come to.
func TestARevokedCallerOpensNoTunnel(t *testing.T) {
	w := newWorld(t, func(c *Config) {
		c.Standing = func(tls.ConnectionState) error { return fmt.Errorf("x: %w", svid.ErrRevoked) }
	})
	c := w.open1(billing)
	fmt.Fprint(c, "CONNECT db.test:5432 HTTP/1.1\r\nHost: db.test:5432\r\n\r\n")
	if res, err := http.ReadResponse(c.br, &http.Request{Method: "CONNECT"}); err == nil && res.StatusCode == 200 {
		t.Error("a tunnel was opened")
	}
	if n := w.gw.Tunnels(); n != 0 {
		t.Errorf("%d tunnels are open", n)
	}
}

func TestATunnelEndsWithTheSVIDOfItsCaller(t *testing.T) {
	t.Parallel() // an SVID runs out in real time
	both(t, func(t *testing.T, dial dialFunc) {
		var over atomic.Bool
		w := newWorld(t, func(c *Config) {
			c.Standing = func(tls.ConnectionState) error {
				if over.Load() {
					return fmt.Errorf("x: %w", svid.ErrExpired)
				}
				return nil
			}
		})
		tun, ref := dial(w, billing, "db.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		defer tun.Close()
		over.Store(true)
		w.gw.Rejudge()
		_, _ = io.Copy(io.Discard, tun) // returns when it has ended
		if end := w.until("close", kind(audit.KindEgressClose)); end.Reason != string(ReasonSVIDEnded) {
			t.Errorf("recorded %+v", end)
		}
	})
	t.Run("not before its grace has ended", func(t *testing.T) {
		w := newWorld(t, nil)
		cfg := w.client(billing, "http/1.1")
		st := *w.caller.Current()
		st.Identities = []svid.Identity{w.ca.Issue(t, billing, 15*time.Second)}
		if err := w.caller.Set(&st); err != nil {
			t.Fatal(err)
		}
		c, err := tls.Dial("tcp", w.addr, cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprint(c, "CONNECT db.test:5432 HTTP/1.1\r\nHost: db.test:5432\r\n\r\n")
		br := bufio.NewReader(c)
		if res, err := http.ReadResponse(br, &http.Request{Method: "CONNECT"}); err != nil || res.StatusCode != 200 {
			t.Fatal(res, err)
		}
		<-time.After(time.Until(st.Identities[0].Chain[0].NotAfter.Add(100 * time.Millisecond)))
		w.gw.Rejudge()
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		fmt.Fprint(c, "ping")
		b := make([]byte, 4)
		if _, err := io.ReadFull(br, b); err != nil || string(b) != "ping" {
			t.Errorf("got %q, %v", b, err)
		}
	})
}

// withdraw has the gateway trust no authority that it trusted until now.
func (w *world) withdraw() {
	w.t.Helper()
	other := meshtest.NewCA(w.t, meshtest.TD)
	if err := w.source.Set(&svid.State{Identities: []svid.Identity{other.Issue(w.t, gatewayID, time.Hour)}, Bundle: other.Bundle()}); err != nil {
		w.t.Fatal(err)
	}
}

// ends sees that the last connection of the gateway does.
func (w *world) ends() {
	w.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for w.gw.Carries() > 0 {
		<-tick.C // a test that waits for ever is ended by its own limit
	}
}

// TestAWithdrawnAuthority has callers ask on connections that were proved by it.
func TestAWithdrawnAuthority(t *testing.T) {
	each := func(c *Config) { c.Limits.Verify = time.Nanosecond }
	want := func(t *testing.T, w *world, ref *refused) {
		t.Helper()
		if ref == nil || ref.status != 403 {
			t.Errorf("another tunnel: %+v, want 403", ref)
		}
		if end := w.until("close", kind(audit.KindEgressClose)); end.Reason != string(ReasonIdentity) {
			t.Errorf("recorded %+v", end)
		}
		w.until("denial", denial(ReasonIdentity))
		w.ends()
	}
	t.Run("on streams of a proxy", func(t *testing.T) {
		w := newWorld(t, each)
		h := w.streamsOn(billing)
		tun, ref := w.connectStream(h, "db.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		echoes(t, tun)
		w.withdraw()
		_, ref = w.connectStream(h, "db.test:5432")
		_, _ = io.Copy(io.Discard, tun) // returns when it has ended
		want(t, w, ref)
	})
	t.Run("over HTTP/2", func(t *testing.T) {
		w := newWorld(t, each)
		tr := &http2.Transport{TLSClientConfig: w.client(billing, "h2")}
		defer tr.CloseIdleConnections()
		tun, ref := connect2(w, tr, "db.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		echoes(t, tun)
		w.withdraw()
		_, ref = connect2(w, tr, "db.test:5432")
		_, _ = io.Copy(io.Discard, tun)
		want(t, w, ref)
	})
	t.Run("over HTTP/1.1", func(t *testing.T) {
		w := newWorld(t, each)
		c := w.open1(billing)
		fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		res, err := http.ReadResponse(c.br, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, res.Body)
		w.withdraw()
		fmt.Fprint(c, "CONNECT db.test:5432 HTTP/1.1\r\nHost: db.test:5432\r\n\r\n")
		if res, err := http.ReadResponse(c.br, &http.Request{Method: "CONNECT"}); err != nil || res.StatusCode != 403 {
			t.Errorf("%v, %v", res, err)
		}
		_, _ = io.Copy(io.Discard, c.br)
		w.ends()
	})
}
