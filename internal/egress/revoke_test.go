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

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
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
		st.Identities = []svid.Identity{w.ca.Issue(t, billing, 6*time.Second)}
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
