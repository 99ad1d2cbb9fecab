package test

import (
	"bufio"
	"context"
	"crypto"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"sallyport/internal/jose/josetest"
)

// A held connection has carried something and is open.
type held struct {
	net.Conn
	br *bufio.Reader
}

// hold asks billing for a path and keeps the connection: between calls, in the
// middle of an answer, or upgraded.
func (s *thief) hold(addr, path, fields string) *held {
	s.w.t.Helper()
	c, err := s.dial(addr)
	if err != nil {
		s.w.t.Fatal(err)
	}
	h := &held{c, bufio.NewReader(c)}
	if err := h.ask(path, fields); err != nil {
		s.w.t.Fatalf("GET %s: %v", path, err)
	}
	return h
}

// ask makes a call and reads what begins to come: all of a whole answer.
func (h *held) ask(path, fields string) error {
	_ = h.SetDeadline(time.Now().Add(within))
	defer h.SetDeadline(time.Time{})
	if _, err := fmt.Fprintf(h, "GET %s HTTP/1.1\r\nHost: billing.mesh.internal\r\n%s\r\n", path, fields); err != nil {
		return err
	}
	resp, err := http.ReadResponse(h.br, &http.Request{Method: "GET"})
	switch {
	case err != nil:
		return err
	case resp.StatusCode == http.StatusSwitchingProtocols:
		_, err = io.ReadFull(h.br, make([]byte, len("open")))
	case resp.StatusCode != http.StatusOK:
		err = fmt.Errorf("status %d", resp.StatusCode)
	case strings.HasSuffix(path, "/stream"):
		_, err = io.ReadFull(resp.Body, make([]byte, len("data: ")))
	default:
		_, err = io.Copy(io.Discard, resp.Body)
	}
	return err
}

const upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n"

// liveIssuer says whose tokens count, by a key in the file itself.
func (w *world) liveIssuer(key crypto.Signer, revoked string) {
	w.t.Helper()
	jwk := josetest.JWK(w.t, key.Public())
	jwk["kid"], jwk["alg"] = "k1", "ES256"
	w.put(filepath.Join(w.policy, "tokens.yaml"), fmt.Sprintf(`issuers:
  - {issuer: "https://%s", profile: at+jwt, audiences: [billing], leeway: 0s, jwks: {inline: '%s'}}
%s`, loginHost, josetest.Set(w.t, jwk), revoked))
}

// TestRejudge takes rights away by edits of the policies, and lets a token end,
// while what they allowed is in use at a sidecar and the gateway.
func TestRejudge(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 10*time.Minute)
	stripe := w.startOutside("api.stripe.test")
	w.routeOut(stripe)
	l := &login{t: t, key: josetest.NewKey(t, "ES256")}
	w.liveIssuer(l.key, "")
	if err := os.RemoveAll(filepath.Join(w.policy, "tests")); err != nil { // they would refuse the edits
		t.Fatal(err)
	}
	row := func(name, src, path, cond string) string {
		return fmt.Sprintf("p, %s, in, %s, %s, 8443, GET, %s, %s, allow\n", name, id("/ns/shop/sa/"+src), id("/ns/shop/sa/billing"), path, cond)
	}
	stays := row("web-bill-1", "web", "/v1/charges/**", "-") + row("tok-live-1", "batch", "/v1/live/**", "iss=https://"+loginHost) +
		fmt.Sprintf("p, inv-out-1, out, %s, hosts:payments, 443, CONNECT, -, env.sni=same, allow\n", id("/ns/shop/sa/inventory"))
	w.extend("access.csv", stays)
	w.startIssuer()
	gateway := w.startGateway()
	bill := &node{name: "billing", gateways: gateway}
	w.join(bill)
	w.startNode(bill)

	bearer := func(end time.Time, sub string) string {
		return "Authorization: Bearer " + l.tokenUntil(end, sub, "") + "\r\n"
	}
	batch := w.steal("batch")
	w.await("be let in", func() bool {
		c, err := batch.dial(bill.in)
		return err == nil && (&held{c, bufio.NewReader(c)}).ask("/v1/live/x", bearer(time.Now().Add(30*time.Minute), "alice")) == nil
	})

	// A token that ends soon: what it carries at the end of the test.
	end := time.Now().Truncate(time.Second).Add(5 * time.Second)
	short := bearer(end, "bob")
	shortWS, shortStream := batch.hold(bill.in, "/v1/live/ws", upgrade+short), batch.hold(bill.in, "/v1/live/stream", short)
	shortWSEnd, shortStreamEnd := ends(shortWS.br), ends(shortStream.br)

	t.Run("an edit", func(t *testing.T) { w.rejudgeEdit(t, bill, gateway, stripe, stays) })
	t.Run("a revoked token", func(t *testing.T) {
		long := bearer(time.Now().Add(30*time.Minute), "carol")
		other := batch.hold(bill.in, "/v1/live/ws", upgrade+bearer(time.Now().Add(30*time.Minute), "dave"))
		otherEnd := ends(other.br)
		lost := map[string]<-chan time.Time{}
		for what, h := range map[string]*held{
			"an upgraded connection": batch.hold(bill.in, "/v1/live/ws", upgrade+long),
			"an answer on its way":   batch.hold(bill.in, "/v1/live/stream", long),
		} {
			lost[what] = ends(h.br)
		}
		began := time.Now()
		w.liveIssuer(l.key, fmt.Sprintf("revoked:\n  - {issuer: \"https://%s\", jti: j-carol}\n", loginHost))
		for what, at := range lost {
			closed(t, "a revoked token: "+what, began, at)
		}
		open(t, "by another token", otherEnd)
		w.awaitAudit("billing", "why", func(r auditLine) bool { return r.Kind == "tls" && r.Reason == "token_revoked" })
	})
	t.Run("an expired token", func(t *testing.T) {
		closed(t, "an expired token: an upgraded connection", end, shortWSEnd)
		select {
		case at := <-shortStreamEnd:
			late := at.Sub(end)
			t.Logf("an expired token: an answer on its way ended %s after it", late.Round(time.Millisecond))
			if late < time.Minute || late > time.Minute+closeWithin {
				t.Errorf("want a minute")
			}
		case <-time.After(time.Minute + within):
			t.Error("an expired token: an answer on its way goes on")
		}
	})
}

// webSocket opens one to billing and says how it ends.
func (s *thief) webSocket(addr string) <-chan error {
	s.w.t.Helper()
	transport := &http.Transport{DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return s.dial(addr) }}
	c, _, err := websocket.Dial(s.w.t.Context(), "wss://billing.mesh.internal/v1/charges/live", &websocket.DialOptions{HTTPClient: &http.Client{Transport: transport}})
	if err != nil {
		s.w.t.Fatal(err)
	}
	s.w.t.Cleanup(func() { _ = c.CloseNow() })
	if _, b, err := c.Read(s.w.t.Context()); err != nil || string(b) != "open" {
		s.w.t.Fatalf("got %q, %v", b, err)
	}
	end := make(chan error, 1)
	go func() {
		_, _, err := c.Read(context.Background())
		end <- err
	}()
	return end
}

// rejudgeEdit takes the rights of payment to billing, and of billing to the
// world outside.
func (w *world) rejudgeEdit(t *testing.T, bill *node, gateway string, stripe *outside, stays string) {
	payment, web, leaver, stayer := w.steal("payment"), w.steal("web"), w.steal("billing"), w.steal("inventory")
	lost := map[string]<-chan time.Time{
		"a kept connection":      ends(payment.hold(bill.in, "/v1/charges", "").br),
		"an answer on its way":   ends(payment.hold(bill.in, "/v1/charges/stream", "").br),
		"an upgraded connection": ends(payment.hold(bill.in, "/v1/charges/ws", upgrade).br),
	}
	told := payment.webSocket(bill.in)
	out, err := leaver.tunnel(gateway, stripe)
	if err != nil {
		t.Fatal(err)
	}
	lost["a tunnel through the gateway"] = ends(out)

	kept := web.hold(bill.in, "/v1/charges", "")
	through, err := stayer.tunnel(gateway, stripe)
	if err != nil {
		t.Fatal(err)
	}
	left := map[string]<-chan time.Time{
		"an answer on its way":         ends(web.hold(bill.in, "/v1/charges/stream", "").br),
		"an upgraded connection":       ends(web.hold(bill.in, "/v1/charges/ws", upgrade).br),
		"a tunnel through the gateway": ends(through),
	}
	began := time.Now()
	w.put(filepath.Join(w.policy, "access.csv"), "g2, host:api.stripe.test, hosts:payments\n"+stays)
	for what, at := range lost {
		closed(t, "an edit that takes the right away: "+what, began, at)
	}
	select {
	case err := <-told:
		t.Logf("an edit that takes the right away: a WebSocket was told %s after the edit: %v", time.Since(began).Round(time.Millisecond), err)
		if websocket.CloseStatus(err) != websocket.StatusPolicyViolation {
			t.Error("it was not told why")
		}
	case <-time.After(within):
		t.Error("an edit that takes the right away: a WebSocket is still open")
	}
	for what, at := range left {
		open(t, what, at)
	}
	if err := kept.ask("/v1/charges", ""); err != nil {
		t.Errorf("a kept connection whose right stays: %v", err)
	}
	w.awaitAudit("billing", "the closed connections", func(r auditLine) bool {
		return r.Kind == "tls" && r.Reason == "revoked" && r.Src == id("/ns/shop/sa/payment")
	})
	w.awaitAudit("gateway", "the closed tunnel", func(r auditLine) bool {
		return r.Kind == "egress_close" && r.Reason == "revoked" && r.Src == id("/ns/shop/sa/billing")
	})
	for _, who := range []string{"web", "inventory"} {
		for _, name := range []string{"billing", "gateway"} {
			for _, r := range w.audit(name) {
				if r.Src == id("/ns/shop/sa/"+who) && r.Reason == "revoked" {
					t.Errorf("%s closed what %s may have: %+v", name, who, r)
				}
			}
		}
	}
}

// open checks that something has not ended.
func open(t *testing.T, what string, at <-chan time.Time) {
	t.Helper()
	select {
	case <-at:
		t.Errorf("%s: closed, though its right stays", what)
	default:
	}
}
