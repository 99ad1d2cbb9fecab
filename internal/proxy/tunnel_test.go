package proxy

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/svid"
)

// fakeGateway proves the gateway's identity and has serve answer.
func fakeGateway(t *testing.T, r *rig, serve func(c net.Conn, br *bufio.Reader, connect *http.Request)) *svid.Source {
	t.Helper()
	src := meshtest.Source(t, r.ca, gateway)
	cfg := svid.ServerTLS(src, func(id spiffeID) error {
		if id != web {
			return fmt.Errorf("%s is not web", id)
		}
		return nil
	}, "http/1.1")
	addr := rawApp(t, func(c net.Conn, _ *bufio.Reader) {
		tc := tls.Server(c, cfg)
		if tc.Handshake() != nil {
			return
		}
		defer tc.Close()
		br := bufio.NewReader(tc)
		req, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		serve(tc, br, req)
	})
	useGateway(r, addr)
	return src
}

func useGateway(r *rig, addr string) {
	r.gateways.Use(&mesh.Snapshot{
		Services:  []mesh.Service{{Name: GatewayName, ID: gateway}},
		Endpoints: []mesh.Endpoint{{Service: GatewayName, Address: netip.MustParseAddrPort(addr)}},
	})
}

const connectStripe = "CONNECT api.stripe.test:443 HTTP/1.1\r\nHost: api.stripe.test:443\r\n"

func TestTunnelCarriesBothWays(t *testing.T) {
	r := newRig(t, app(t, hello))
	asked := make(chan *http.Request, 1)
	fakeGateway(t, r, func(c net.Conn, br *bufio.Reader, req *http.Request) {
		asked <- req
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nearly ")
		_, _ = io.Copy(c, br)
	})
	w := r.dial()
	// What follows the head at once belongs to the tunnel.
	w.say(connectStripe + "Proxy-Authorization: Basic c2VjcmV0\r\nX-Forwarded-For: 1.2.3.4\r\n\r\npipelined ")
	line, _ := w.r.ReadString('\n')
	blank, _ := w.r.ReadString('\n')
	if !strings.HasPrefix(line, "HTTP/1.1 200 ") || blank != "\r\n" {
		t.Fatalf("got %q %q", line, blank)
	}
	big := noise(2<<20, 4)
	go func() {
		_, _ = w.Write(big)
		_ = w.Conn.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(w.r)
	if err != nil || !bytes.Equal(got, append([]byte("early pipelined "), big...)) {
		t.Errorf("%d bytes came, %v", len(got), err)
	}
	req := <-asked
	if req.Method != "CONNECT" || req.Host != "api.stripe.test:443" || req.Header.Get("Traceparent") == "" || req.Header.Get("Egress-Origin") != "explicit" || len(req.Header) != 2 {
		t.Errorf("the gateway was asked %s %s %v", req.Method, req.Host, req.Header)
	}
}

func TestRefusalOfTheGatewayIsPassedOn(t *testing.T) {
	const body = `{"error":"denied","decision":"abc-1"}`
	for _, c := range []struct {
		name, answer string
		status       int
		decision     string
		body         string
	}{
		{"denied", "HTTP/1.1 403 Forbidden\r\nSallyport-Decision: abc-1\r\nContent-Length: 37\r\n\r\n" + body, 403, "abc-1", body},
		{"interim first", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 403 Forbidden\r\nSallyport-Decision: abc-1\r\nContent-Length: 37\r\n\r\n" + body, 403, "abc-1", body},
		{"no dial", "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", 502, "", `refused the tunnel`},
		{"body is no JSON", "HTTP/1.1 403 Forbidden\r\nSallyport-Decision: abc-1\r\nContent-Length: 6\r\n\r\n<html>", 403, "abc-1", `"decision":"abc-1"`},
		{"decision is none", "HTTP/1.1 403 Forbidden\r\nSallyport-Decision: a\"b\r\nContent-Length: 1\r\n\r\nx", 403, "", "refused the tunnel"},
		{"redirect", "HTTP/1.1 302 Found\r\nLocation: http://evil.test/\r\nContent-Length: 0\r\n\r\n", 502, "", "did not answer properly"},
		{"body breaks off", "HTTP/1.1 403 Forbidden\r\nSallyport-Decision: abc-1\r\nContent-Length: 99\r\n\r\n{", 403, "abc-1", "denied by policy"},
		{"nothing", "", 502, "", "did not answer properly"},
		{"nonsense", "SSH-2.0-OpenSSH\r\n\r\n", 502, "", "did not answer properly"},
		{"interim without end", strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 20), 502, "", "did not answer properly"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, "127.0.0.1:1")
			fakeGateway(t, r, func(conn net.Conn, _ *bufio.Reader, _ *http.Request) { _, _ = io.WriteString(conn, c.answer) })
			w := r.dial()
			w.say(connectStripe + "\r\n")
			resp, got := w.answer("GET") // as a client reads a refusal
			if resp.StatusCode != c.status || resp.Header.Get("Sallyport-Decision") != c.decision || !has(got, c.body) || !json.Valid([]byte(got)) {
				t.Errorf("got %d %q %s", resp.StatusCode, resp.Header.Get("Sallyport-Decision"), got)
			}
			if resp.Header.Get("Location") != "" {
				t.Error("a field of the gateway came through")
			}
			// The connection goes on.
			w.say(proxied)
			if resp, _ := w.answer("GET"); resp.StatusCode != 503 {
				t.Errorf("the next call got %d", resp.StatusCode)
			}
		})
	}
}

func TestGatewayThatIsDownOrSomebodyElse(t *testing.T) {
	r := newRig(t, app(t, hello))
	for name, addr := range map[string]string{"down": "127.0.0.1:1", "somebody else": r.inAddr} {
		useGateway(r, addr)
		w := r.dial()
		w.say(connectStripe + "\r\n")
		if resp, body := w.answer("GET"); resp.StatusCode != 502 || !has(body, "cannot be reached") {
			t.Errorf("%s: got %d %s", name, resp.StatusCode, body)
		}
	}
}

func TestWithoutGatewayNothingLeavesTheMesh(t *testing.T) {
	r := newRig(t, app(t, hello), func(r *rig) { r.outCfg.Gateways = nil })
	w := r.dial()
	w.say(connectStripe + "\r\n")
	resp, body := w.answer("GET")
	if rec := denied(t, resp, body, r.outAudit, "no_gateway"); rec.Dst != "host:api.stripe.test:443" {
		t.Errorf("record %+v", rec)
	}
}

func TestNoTunnelToAService(t *testing.T) {
	r := newRig(t, app(t, hello))
	for _, host := range []string{"billing.mesh.internal:8443", "BILLING.mesh.internal.:443"} {
		w := r.dial()
		w.say("CONNECT " + host + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n")
		if resp, body := w.answer("GET"); resp.StatusCode != 400 || !json.Valid([]byte(body)) {
			t.Errorf("%s: got %d %s", host, resp.StatusCode, body)
		}
	}
}

// A drain that has run out of time ends tunnels too.
func TestTunnelEndsWithTheDrain(t *testing.T) {
	r := newRig(t, app(t, hello), func(r *rig) { r.outCfg.DrainTimeout = 1 })
	fakeGateway(t, r, func(c net.Conn, br *bufio.Reader, _ *http.Request) {
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nhello")
		_, _ = io.Copy(io.Discard, br)
	})
	w := r.dial()
	w.say(connectStripe + "\r\n")
	for range 2 {
		_, _ = w.r.ReadString('\n')
	}
	if _, err := io.ReadFull(w.r, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	if err := r.stopOut(); err != nil {
		t.Error(err)
	}
	if rest := w.ended(); rest != "" {
		t.Errorf("then came %q", rest)
	}
}

func TestGatewayThatSaysNothingEndsWithTheDrain(t *testing.T) {
	r := newRig(t, app(t, hello), func(r *rig) { r.outCfg.DrainTimeout = 1 })
	asked := make(chan struct{})
	fakeGateway(t, r, func(_ net.Conn, br *bufio.Reader, _ *http.Request) {
		close(asked)
		_, _ = br.ReadByte()
	})
	w := r.dial()
	w.say(connectStripe + "\r\n")
	<-asked
	if err := r.stopOut(); err != nil {
		t.Error(err)
	}
}

// A gateway that ends the connection instead of answering is about to end: the
// next one is asked, and of three that say nothing the client hears.
func TestAGatewayThatEndsIsAskedAgain(t *testing.T) {
	for _, c := range []struct {
		silent int32
		want   string
	}{{1, "200"}, {2, "200"}, {3, "502"}} {
		r := newRig(t, app(t, hello))
		var asked atomic.Int32
		fakeGateway(t, r, func(c2 net.Conn, _ *bufio.Reader, _ *http.Request) {
			if asked.Add(1) > c.silent {
				_, _ = io.WriteString(c2, "HTTP/1.1 200 OK\r\n\r\n")
			}
		})
		w := r.dial()
		w.say(connectStripe + "\r\n")
		if line, _ := w.r.ReadString('\n'); !strings.HasPrefix(line, "HTTP/1.1 "+c.want) {
			t.Errorf("after %d that say nothing: %q", c.silent, line)
		}
	}
}
