package proxy

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
)

var (
	virtualBilling = netip.MustParseAddr("247.1.2.3")
	virtualOutside = netip.MustParseAddr("247.1.2.9")
)

// capturedRig is a rig that takes every connection for one that was going to
// where the test says.
func capturedRig(t *testing.T, app string, beyond bool, change ...func(*rig)) (r *rig, to func(string)) {
	t.Helper()
	type place struct {
		meant   netip.AddrPort
		failure error
	}
	var now atomic.Pointer[place]
	now.Store(&place{})
	captured := &Captured{
		Original: func(net.Conn) (netip.AddrPort, bool, error) {
			p := now.Load()
			return p.meant, p.meant.IsValid(), p.failure
		},
		Virtual: func(a netip.Addr) (mesh.ServiceName, bool) {
			switch a {
			case virtualBilling:
				return "billing", true
			case virtualBilling.Next():
				return "gone", true
			}
			return "", false
		},
		Outside: func(a netip.Addr) (string, bool) { return "api.example.com", a == virtualOutside },
		Beyond:  beyond,
	}
	change = append(change, func(r *rig) {
		r.outCfg.Captured = captured
		if !beyond {
			r.outCfg.Gateways = nil
		}
	})
	return newRig(t, app, change...), func(s string) {
		var p place
		switch s {
		case "":
		case "unknown":
			p.failure = errors.New("the kernel does not say")
		default:
			p.meant = netip.MustParseAddrPort(s)
		}
		now.Store(&p)
	}
}

func TestCapturedRequestsFindTheirService(t *testing.T) {
	r, to := capturedRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Host+" "+r.URL.Path)
	}), false)
	endpoint := netip.MustParseAddrPort(r.inAddr)
	for name, tt := range map[string]struct {
		to, host string
		status   int
	}{
		"a virtual address":                     {"247.1.2.3:8443", "billing.mesh.internal", 200},
		"the port of a name without one":        {"247.1.2.3:80", "billing.mesh.internal", 200},
		"another name of the program's own":     {"247.1.2.3:80", "billing", 200},
		"the address of an endpoint":            {endpoint.String(), endpoint.String(), 200},
		"an endpoint at the port of the policy": {netip.AddrPortFrom(endpoint.Addr(), 8443).String(), "x", 200},
		"the name of another service":           {"247.1.2.3:80", "inventory.mesh.internal", 421},
		"the proxy itself":                      {"", "billing.mesh.internal", 200},
		"the proxy itself, a name of no mesh":   {"", "billing", 403},
	} {
		to(tt.to)
		w := r.dial()
		w.say("GET /ok/1 HTTP/1.1\r\nHost: " + tt.host + "\r\n\r\n")
		resp, body := w.answer("GET")
		if resp.StatusCode != tt.status || tt.status == 200 && !strings.HasSuffix(body, " /ok/1") {
			t.Errorf("%s: %d %q, want %d", name, resp.StatusCode, body, tt.status)
		}
	}
	to("247.1.2.3:80")
	w := r.dial()
	w.say("GET /no HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")
	if resp, _ := w.answer("GET"); resp.StatusCode != 403 {
		t.Errorf("what no row allows: %d", resp.StatusCode)
	}
	w = r.dial()
	w.say("CONNECT billing.mesh.internal:80 HTTP/1.1\r\nHost: billing.mesh.internal:80\r\n\r\n")
	if resp, _ := w.answer("CONNECT"); resp.StatusCode != 405 {
		t.Errorf("CONNECT at the address of a service: %d", resp.StatusCode)
	}
}

func TestCapturedConnectionsThatLeadNowhere(t *testing.T) {
	r, to := capturedRig(t, app(t, hello), false)
	inventory := func(addr string) mesh.Endpoint { return meshtest.Endpoint(t, "inventory", addr) }
	endpoint := netip.MustParseAddrPort(r.inAddr)
	r.endpointsExtra = []mesh.Endpoint{inventory(netip.AddrPortFrom(endpoint.Addr(), 1).String())}
	r.use(accessCSV)
	for name, tt := range map[string]struct{ to, reason, dst string }{
		"an address outside":                   {"203.0.113.7:443", "no_route", "host:203.0.113.7:443"},
		"another port of a virtual address":    {"247.1.2.3:22", "no_route", "host:247.1.2.3:22"},
		"a virtual address of nobody":          {"247.9.9.9:80", "no_route", "host:247.9.9.9:80"},
		"a service that is gone":               {"247.1.2.4:80", "no_route", "host:247.1.2.4:80"},
		"another port of an endpoint":          {netip.AddrPortFrom(endpoint.Addr(), 22).String(), "no_route", "host:" + netip.AddrPortFrom(endpoint.Addr(), 22).String()},
		"a port of two services on a machine":  {netip.AddrPortFrom(endpoint.Addr(), 8443).String(), "no_route", "host:" + netip.AddrPortFrom(endpoint.Addr(), 8443).String()},
		"IPv6":                                 {"[2001:db8::1]:443", "no_route", "host:[2001:db8::1]:443"},
		"a place that the kernel does not say": {"unknown", "no_destination", ""},
	} {
		to(tt.to)
		before := len(decisions(r.outAudit))
		if w := tried(t, r.outAddr); w != nil {
			_, _ = io.WriteString(w, "GET /ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")
			if b, _ := io.ReadAll(w.r); len(b) > 0 {
				t.Errorf("%s: it is answered %q", name, b)
			}
		}
		list := decisions(r.outAudit)
		if len(list) != before+1 || list[before].Reason != tt.reason || list[before].Dst != tt.dst || list[before].Decision != audit.Deny {
			t.Errorf("%s: recorded %+v", name, list[before:])
		}
	}
}

func TestCapturedStream(t *testing.T) {
	r, to := capturedRig(t, greeter(t), false, func(r *rig) { r.served, r.access = streamYAML, streamCSV })
	to("247.1.2.3:8443")
	w := newWire(t, r.outAddr, nil)
	w.greeted()
	w.say("more")
	_ = w.Conn.(*net.TCPConn).CloseWrite()
	if got := w.ended(); got != "more" {
		t.Errorf("the server said %q", got)
	}
	// No port is usual for what is not HTTP.
	to("247.1.2.3:80")
	if w := tried(t, r.outAddr); w != nil {
		if got := w.ended(); got != "" {
			t.Errorf("another port is served: %q", got)
		}
	}
	stranger := errors.New("pid 1 is not the workload")
	r.stranger.Store(&stranger)
	to("247.1.2.3:8443")
	if w := tried(t, r.outAddr); w != nil {
		if got := w.ended(); got != "" {
			t.Errorf("another program is served: %q", got)
		}
	}
	if list := decisions(r.outAudit); len(list) != 2 || list[1].Reason != "not_workload" {
		t.Errorf("recorded %+v", list)
	}
}

func TestCapturedConnectionsLeadOutThroughTheGateway(t *testing.T) {
	r, to := capturedRig(t, app(t, hello), true)
	asked := make(chan string, 4)
	fakeGateway(t, r, func(c net.Conn, br *bufio.Reader, req *http.Request) {
		asked <- req.Method + " " + req.Host
		if strings.HasPrefix(req.Host, "198.51.100.") {
			_, _ = io.WriteString(c, "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nearly ")
		_, _ = io.Copy(c, br)
	})
	to("203.0.113.7:443")
	w := r.dial()
	w.say("bytes")
	_ = w.Conn.(*net.TCPConn).CloseWrite()
	if got := w.ended(); got != "early bytes" {
		t.Errorf("through the tunnel came %q", got)
	}
	if got := <-asked; got != "CONNECT 203.0.113.7:443" {
		t.Errorf("the gateway was asked %s", got)
	}
	to("198.51.100.1:443")
	if w := tried(t, r.outAddr); w != nil {
		if got := w.ended(); got != "" {
			t.Errorf("what the gateway refuses: %q", got)
		}
	}
	<-asked
	// What is inside the mesh does not leave it.
	for _, inside := range []string{"247.1.2.3:22", "247.1.2.4:80"} {
		to(inside)
		if w := tried(t, r.outAddr); w != nil {
			if got := w.ended(); got != "" {
				t.Errorf("%s: %q", inside, got)
			}
		}
	}
	select {
	case got := <-asked:
		t.Errorf("the gateway was asked %s", got)
	default:
	}
}

// TestAVirtualAddressOfAHostOutside leads to that host by its name, whatever
// becomes of other addresses.
func TestAVirtualAddressOfAHostOutside(t *testing.T) {
	for _, beyond := range []bool{true, false} {
		r, to := capturedRig(t, app(t, hello), beyond)
		asked := make(chan string, 4)
		fakeGateway(t, r, func(c net.Conn, br *bufio.Reader, req *http.Request) {
			asked <- req.Method + " " + req.Host + " " + req.Header.Get("Egress-Origin")
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
			_, _ = io.Copy(c, br)
		})
		to("247.1.2.9:443")
		w := tried(t, r.outAddr)
		if !beyond { // the rig has no gateway then
			if w != nil {
				if got := w.ended(); got != "" {
					t.Errorf("without a gateway: %q", got)
				}
			}
			if list := decisions(r.outAudit); len(list) != 1 || list[0].Reason != "no_gateway" || list[0].Dst != "host:api.example.com" {
				t.Errorf("recorded %+v", list)
			}
			continue
		}
		w.say("bytes")
		_ = w.Conn.(*net.TCPConn).CloseWrite()
		if got := w.ended(); got != "bytes" {
			t.Errorf("through the tunnel came %q", got)
		}
		if got := <-asked; got != "CONNECT api.example.com:443 vip" {
			t.Errorf("the gateway was asked %s", got)
		}
	}
}

// TestNoProxyTakesWhatGoesOutside: a proxy that says that its service is at an
// address of somebody outside neither gets what goes there nor stops it.
func TestNoProxyTakesWhatGoesOutside(t *testing.T) {
	r, to := capturedRig(t, app(t, hello), true)
	asked := make(chan string, 4)
	fakeGateway(t, r, func(c net.Conn, _ *bufio.Reader, req *http.Request) {
		asked <- req.Host
		_, _ = io.WriteString(c, "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
	})
	r.endpointsExtra = []mesh.Endpoint{meshtest.Endpoint(t, "billing", "203.0.113.9:443"), meshtest.Endpoint(t, "inventory", "203.0.113.9:22")}
	r.use(accessCSV)
	// Its port, that of the policy, another, and that of two services.
	for _, outside := range []string{"203.0.113.9:443", "203.0.113.9:8443", "203.0.113.9:9", "203.0.113.9:22", r.inAddr} {
		to(outside)
		if w := tried(t, r.outAddr); w != nil {
			_, _ = io.WriteString(w, "GET /ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")
			_, _ = io.ReadAll(w.r)
		}
		select {
		case got := <-asked:
			if got != outside {
				t.Errorf("%s: the gateway was asked for %s", outside, got)
			}
		default:
			t.Errorf("%s: the gateway was not asked", outside)
		}
	}
}

func TestACapturedConnectionAsksTheNextGateway(t *testing.T) {
	r, to := capturedRig(t, app(t, hello), true)
	var asked atomic.Int32
	fakeGateway(t, r, func(c net.Conn, br *bufio.Reader, _ *http.Request) {
		if asked.Add(1) < maxGateways { // ends instead of answering
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
		_, _ = io.Copy(c, br)
	})
	to("203.0.113.7:443")
	w := r.dial()
	w.say("bytes")
	_ = w.Conn.(*net.TCPConn).CloseWrite()
	if got := w.ended(); got != "bytes" || asked.Load() != maxGateways {
		t.Errorf("after %d gateways came %q", asked.Load(), got)
	}
}
