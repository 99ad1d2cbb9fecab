package proxy

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"sallyport/internal/audit"
)

const (
	socksHello   = "\x05\x02\x00\x02"
	socksStripe  = "\x05\x01\x00\x03\x0fapi.stripe.test\x01\xbb"
	socksGranted = "\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"
)

// hears reads what must come next.
func (w *wire) hears(want string) {
	w.t.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(w.r, b); err != nil || string(b) != want {
		w.t.Fatalf("heard %q, %v; want %q", b, err, want)
	}
}

func TestSOCKSCarriesBothWays(t *testing.T) {
	r := newRig(t, app(t, hello))
	asked := make(chan *http.Request, 2)
	fakeGateway(t, r, func(c net.Conn, br *bufio.Reader, req *http.Request) {
		asked <- req
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nearly ")
		_, _ = io.Copy(c, br)
	})
	for _, one := range []bool{true, false} { // all at once, and step by step
		w := r.dial()
		if one {
			w.say(socksHello + socksStripe + "tail")
			w.hears("\x05\x00" + socksGranted)
		} else {
			w.say(socksHello[:1])
			w.say(socksHello[1:])
			w.hears("\x05\x00")
			w.say(socksStripe)
			w.hears(socksGranted)
			w.say("tail")
		}
		_ = w.Conn.(*net.TCPConn).CloseWrite()
		if rest := w.ended(); rest != "early tail" {
			t.Errorf("then came %q", rest)
		}
		if req := <-asked; req.Method != "CONNECT" || req.Host != "api.stripe.test:443" {
			t.Errorf("the gateway was asked %s %s", req.Method, req.Host)
		}
	}
}

func TestSOCKSReachesAStreamOfTheMesh(t *testing.T) {
	r, _ := streamRig(t, greeter(t), "")
	w := r.dial()
	w.say(socksHello + "\x05\x01\x00\x03\x15billing.mesh.internal\x20\xfb")
	w.hears("\x05\x00" + socksGranted)
	w.greeted()
}

func TestSOCKSRefusals(t *testing.T) {
	for _, c := range []struct {
		name, says, gateway, heard, reason string
		stranger                           bool
	}{
		{name: "the gateway denies", says: socksStripe, gateway: "HTTP/1.1 403 Forbidden\r\nSallyport-Decision: abc-1\r\nContent-Length: 0\r\n\r\n", heard: "\x05\x00\x05\x02"},
		{name: "the gateway takes the name for none", says: socksStripe, gateway: "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", heard: "\x05\x00\x05\x02"},
		{name: "the host does not answer", says: socksStripe, gateway: "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", heard: "\x05\x00\x05\x04"},
		{name: "it takes too long", says: socksStripe, gateway: "HTTP/1.1 504 Gateway Timeout\r\nContent-Length: 0\r\n\r\n", heard: "\x05\x00\x05\x06"},
		{name: "the gateway stops", says: socksStripe, gateway: "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", heard: "\x05\x00\x05\x01"},
		{name: "BIND", says: "\x05\x02\x00\x03\x0fapi.stripe.test\x01\xbb", heard: "\x05\x00\x05\x07", reason: "method"},
		{name: "UDP ASSOCIATE", says: "\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00", heard: "\x05\x00\x05\x07", reason: "method"},
		{name: "another process", says: socksStripe, heard: "\x05\x00\x05\x02", reason: "not_workload", stranger: true},
		{name: "BIND by another process", says: "\x05\x02\x00\x01\x09\x09\x09\x09\x01\xbb", heard: "\x05\x00\x05\x07", reason: "not_workload", stranger: true},
		{name: "a service that speaks HTTP", says: "\x05\x01\x00\x03\x15billing.mesh.internal\x20\xfb", heard: "\x05\x00\x05\x02"},
		{name: "two dots", says: "\x05\x01\x00\x03\x09evil..com\x01\xbb", heard: "\x05\x00\x05\x02"},
		{name: "a line end in the name", says: "\x05\x01\x00\x03\x05a\r\n.b\x01\xbb", heard: "\x05\x00\x05\x01"},
		{name: "an unknown kind of address", says: "\x05\x01\x00\x05\x01\x02\x03\x04\x01\xbb", heard: "\x05\x00\x05\x08"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, app(t, hello))
			fakeGateway(t, r, func(conn net.Conn, _ *bufio.Reader, _ *http.Request) {
				if c.gateway == "" {
					t.Error("the gateway was asked")
				}
				_, _ = io.WriteString(conn, c.gateway)
			})
			if c.stranger {
				err := errors.New("pid 7 is not the workload")
				r.stranger.Store(&err)
			}
			w := r.dial()
			w.say(socksHello + c.says)
			if rest := w.ended(); rest != c.heard+socksGranted[2:] {
				t.Errorf("heard %q, want %q and an address", rest, c.heard)
			}
			list := decisions(r.outAudit)
			if c.reason == "" {
				return // the gateway records it, or nobody understood it
			}
			if len(list) != 1 || list[0].Reason != c.reason || list[0].Decision != audit.Deny || !strings.HasPrefix(list[0].Dst, "host:") || list[0].ID == "" {
				t.Errorf("recorded %+v", list)
			}
		})
	}
}

// TestSOCKSIsForTheProxyOnly has the port of one service, and a client that
// offers no method of ours, hear that.
func TestSOCKSIsForTheProxyOnly(t *testing.T) {
	r := newRig(t, app(t, hello))
	addr, _ := start(t, newDoor(r.outbound, "billing").run)
	w := newWire(t, addr, nil)
	w.say(socksHello + socksStripe + "\r\n\r\n")
	if resp, _ := w.answer("GET"); resp.StatusCode != 400 {
		t.Errorf("the port of a service answered %s", resp.Status)
	}
	w = r.dial()
	w.say("\x05\x01\x02")
	if rest := w.ended(); rest != "\x05\xff" {
		t.Errorf("a client with a password heard %q", rest)
	}
}

// TestSOCKSThatIsNotWhole bounds how long a request may take.
func TestSOCKSThatIsNotWhole(t *testing.T) {
	r := newRig(t, app(t, hello), func(r *rig) { r.outCfg.Limits.HeadTimeout = 1 })
	w := r.dial()
	w.say(socksHello)
	w.ended()
}
