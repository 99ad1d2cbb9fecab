package test

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// manager has a socket open for each address, before and after the program that
// it is for, as systemd has.
type manager map[string]*os.File

func (m manager) open(t *testing.T, addr string) {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	ln.Close() // the copy stays
	m[addr] = f
	t.Cleanup(func() { f.Close() })
}

// activate starts a program with sockets, each with its name.
func (w *world) activate(m manager, name string, named [][2]string, args ...string) *proc {
	w.t.Helper()
	// The number of the process is known to itself only.
	cmd := exec.Command("sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, filepath.Join(bin, args[0])}, args[1:]...)...)
	var names []string
	for _, n := range named {
		names = append(names, n[0])
		cmd.ExtraFiles = append(cmd.ExtraFiles, m[n[1]])
	}
	return w.launch(name, []string{fmt.Sprintf("LISTEN_FDS=%d", len(named)), "LISTEN_FDNAMES=" + strings.Join(names, ":")}, cmd)
}

// TestSocketActivation has a service manager open the sockets: who connects
// while no process is there is answered once there is one.
func TestSocketActivation(t *testing.T) {
	t.Parallel()
	w, m := newWorld(t, time.Minute), manager{}
	early := map[string]*tls.Conn{}
	waiting := func(addr string) {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(2 * within))
		early[addr] = tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}}) // whose it is, is looked at below
	}
	answers := func(addr, want string) {
		t.Helper()
		c := early[addr]
		if err := c.Handshake(); err != nil {
			t.Fatalf("who came to %s before the process: %v", addr, err)
		}
		if got := c.ConnectionState().PeerCertificates[0].URIs[0].String(); got != want {
			t.Errorf("%s is %s, want %s", addr, got, want)
		}
	}
	m.open(t, w.issuer)
	waiting(w.issuer)
	config := func(name string) string { return w.path(name, "config.yaml") }
	w.awaitReady(w.activate(m, "issuer", [][2]string{{"sallyport-issuer.socket", w.issuer}}, "issuer", "run", "--config", config("issuer")))
	answers(w.issuer, id("/spire/server"))

	web := httptest.NewServer(http.HandlerFunc(echo))
	t.Cleanup(web.Close)
	bill, gate := &node{name: "billing"}, freePort(t)
	w.join(bill)
	bill.app = strings.TrimPrefix(web.URL, "http://")
	w.write("billing", w.sidecarConfig(bill, w.token("billing")))
	w.write("gateway", w.proxyConfig("gateway", w.token("gateway"))+fmt.Sprintf("listen: %s\nresolvers: [%q]\n", gate, freePort(t)))
	for _, addr := range []string{bill.in, bill.out, gate} {
		m.open(t, addr)
	}
	waiting(bill.in)
	waiting(gate)
	environ := w.path("environ")
	sockets := [][2]string{{"inbound.listen", bill.in}, {"unknown", bill.out}}
	run := []string{"sidecar", "run", "--config", config("billing"), "--", "sh", "-c", "env > " + environ + "; exec sleep 300"}
	billing := w.activate(m, "billing", sockets, run...)
	gateway := w.activate(m, "gateway", [][2]string{{"listen", gate}}, "gateway", "run", "--config", config("gateway"))
	w.awaitReady(billing)
	w.awaitReady(gateway)
	answers(bill.in, id("/ns/shop/sa/billing"))
	answers(gate, id("/ns/edge/sa/gateway"))
	pay := &node{name: "payment"}
	w.join(pay)
	w.awaitReach(w.startNode(pay), charges)
	if b, err := os.ReadFile(environ); err != nil || strings.Contains(string(b), "LISTEN_") {
		t.Errorf("the application is told of sockets that are not its own: %v\n%s", err, b)
	}

	// The sockets outlive the process, and can be handed over as well.
	gateway.stop()
	waiting(gate)
	old := w.activate(m, "gateway", [][2]string{{"listen", gate}}, "gateway", "run", "--config", config("gateway"))
	w.awaitReady(old)
	answers(gate, id("/ns/edge/sa/gateway"))
	next := w.activate(m, "gateway", [][2]string{{"listen", gate}}, "gateway", "run", "--config", config("gateway"), "--takeover")
	old.end()
	w.awaitReady(next)
	waiting(gate)
	answers(gate, id("/ns/edge/sa/gateway"))

	// What fits nothing is said, and nothing is served.
	billing.stop()
	astray := freePort(t)
	m.open(t, astray)
	for _, tt := range []struct {
		sockets [][2]string
		want    string
	}{
		{append(sockets, [2]string{"more", astray}), `sidecar: the service manager passed socket "more" at ` + astray + `, and no setting has this address; next: `},
		{[][2]string{{"inbound.listen", astray}}, `sidecar: inbound.listen: the service manager's socket "inbound.listen" at ` + astray + ` is not at ` + bill.in + `, as the configuration says; next: `},
	} {
		p := w.activate(m, "billing", tt.sockets, run...)
		if code := p.end(); code == 0 || !strings.Contains(p.out.String(), tt.want) {
			t.Errorf("ended with %d, want %q:\n%s", code, tt.want, p.out)
		}
	}
}

// TestSocketActivationWithCapture has a sidecar refuse sockets that its own rules
// would not let answer.
func TestSocketActivationWithCapture(t *testing.T) {
	t.Parallel()
	w, m := newWorld(t, time.Minute), manager{}
	out := freePort(t)
	m.open(t, out)
	if err := os.MkdirAll(w.path("payment"), 0o700); err != nil {
		t.Fatal(err)
	}
	w.write("payment", w.proxyConfig("payment", "none")+fmt.Sprintf("outbound: {listen: %q}\ncapture: {users: [\"1001\"], sidecar_user: \"1337\"}\n", out))
	p := w.activate(m, "payment", [][2]string{{"outbound.listen", out}}, "sidecar", "run", "--config", w.path("payment", "config.yaml"))
	if code := p.end(); code == 0 || !strings.Contains(p.out.String(), "capture.sidecar_user: sockets that the service manager has opened") {
		t.Errorf("status %d:\n%s", code, p.out)
	}
}
