package test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// closeWithin bounds how long a connection of a revoked identity may stay open
// here, where the machine may be busy. What it takes is logged.
const closeWithin = 20 * time.Second

// A thief has an SVID with its key and no proxy.
type thief struct {
	w      *world
	cert   tls.Certificate
	serial string
}

// steal has an operator mint an SVID, as if it were copied from a workload.
func (w *world) steal(workload string) *thief {
	w.t.Helper()
	dir := w.path("stolen-" + workload)
	if r := w.sallyport("svid", "mint", id("/ns/shop/sa/"+workload), "--ttl", "10m", "--write", dir); r.Code != 0 {
		w.t.Fatal(r.Output)
	}
	cert, err := tls.LoadX509KeyPair(dir+"/svid.pem", dir+"/key.pem")
	if err != nil {
		w.t.Fatal(err)
	}
	return &thief{w, cert, cert.Leaf.SerialNumber.Text(16)}
}

// dial connects to a proxy. What the proxy proves is none of the thief's
// business.
func (s *thief) dial(addr string) (*tls.Conn, error) {
	d := &net.Dialer{Timeout: within}
	c, err := tls.DialWithDialer(d, "tcp", addr, &tls.Config{
		Certificates: []tls.Certificate{s.cert}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"},
	})
	if err == nil {
		s.w.t.Cleanup(func() { c.Close() })
	}
	return c, err
}

// call makes one call on a connection and leaves it open.
func call(c net.Conn, br *bufio.Reader, head string, method string) (int, error) {
	_ = c.SetDeadline(time.Now().Add(within))
	defer c.SetDeadline(time.Time{})
	if _, err := io.WriteString(c, head); err != nil {
		return 0, err
	}
	resp, err := http.ReadResponse(br, &http.Request{Method: method})
	if err != nil {
		return 0, err
	}
	if method != "CONNECT" {
		_, err = io.Copy(io.Discard, resp.Body)
	}
	return resp.StatusCode, err
}

const chargesCall = "GET /v1/charges HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n"

// keepAlive is a connection to a sidecar that has carried a call.
func (s *thief) keepAlive(addr string) (io.Reader, error) {
	c, err := s.dial(addr)
	if err != nil {
		return nil, err
	}
	br := bufio.NewReader(c)
	if status, err := call(c, br, chargesCall, "GET"); err != nil || status != 200 {
		return nil, fmt.Errorf("status %d, %w", status, err)
	}
	return br, nil
}

// tunnel is a tunnel through the gateway that has carried TLS.
func (s *thief) tunnel(gateway string, out *outside) (io.Reader, error) {
	c, err := s.dial(gateway)
	if err != nil {
		return nil, err
	}
	br := bufio.NewReader(c)
	if status, err := call(c, br, "CONNECT api.stripe.test:443 HTTP/1.1\r\nHost: api.stripe.test:443\r\n\r\n", "CONNECT"); err != nil || status != 200 {
		return nil, fmt.Errorf("status %d, %w", status, err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(out.Certificate())
	_ = c.SetDeadline(time.Now().Add(within))
	inner := tls.Client(c, &tls.Config{RootCAs: roots, ServerName: "api.stripe.test"})
	if err := inner.Handshake(); err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Time{})
	return inner, nil
}

// ends reports when a connection is closed.
func ends(r io.Reader) <-chan time.Time {
	at := make(chan time.Time, 1)
	go func() {
		_, _ = io.Copy(io.Discard, r)
		at <- time.Now()
	}()
	return at
}

// closed waits for the end of a connection and logs how long it took.
func closed(t *testing.T, what string, since time.Time, at <-chan time.Time) {
	t.Helper()
	select {
	case when := <-at:
		took := when.Sub(since)
		t.Logf("%s: closed %s after the command began", what, took.Round(time.Millisecond))
		if took > closeWithin {
			t.Errorf("%s: it took %s, want less than %s", what, took, closeWithin)
		}
	case <-time.After(within):
		t.Errorf("%s: it is still open", what)
	}
}

// revoke runs the command and checks that it ended some SVIDs and that every
// proxy confirmed it.
func (w *world) revoke(svids, proxies int, args ...string) {
	w.t.Helper()
	out, err := exec.Command(bin+"/sallyport", append([]string{"revoke", "-o", "json", "--wait", "30s", "--socket", w.path("issuer", "run", "api.sock")}, args...)...).Output()
	var got struct {
		SVIDs                []json.RawMessage
		Confirmed, Connected int
	}
	if err == nil {
		err = json.Unmarshal(out, &got)
	}
	if err != nil || len(got.SVIDs) < svids || got.Confirmed != proxies || got.Connected != proxies {
		w.t.Fatalf("revoke %v: %v: %s", args, err, out)
	}
}

// TestRevocation ends stolen SVIDs, an entry's and a node's while what they
// opened is in use at two sidecars and a gateway.
func TestRevocation(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	meshtest.Need(t, "openssl")
	w := newWorld(t, 10*time.Minute)
	stripe := w.startOutside("api.stripe.test")
	w.routeOut(stripe)
	issuer := w.startIssuer()
	gateway := w.startGateway()
	pay, bill := &node{name: "payment"}, &node{name: "billing", gateways: gateway}
	w.join(bill)
	w.join(pay)
	billing, payment := w.startNode(bill), w.startNode(pay)
	const url = "http://billing.mesh.internal/v1/charges"
	w.awaitReach(payment, url)

	caller, leaver := w.steal("payment"), w.steal("billing")
	kept, err := caller.keepAlive(bill.in)
	if err != nil {
		t.Fatalf("call billing: %v", err)
	}
	out, err := leaver.tunnel(gateway, stripe)
	if err != nil {
		t.Fatalf("tunnel: %v", err)
	}
	honest := w.honestTunnel(billing, bill, stripe)

	keptEnd, outEnd := ends(kept), ends(out)
	began := time.Now()
	w.revoke(1, 3, "svid", caller.serial)
	closed(t, "revoke svid SERIAL, a kept connection", began, keptEnd)
	began = time.Now()
	w.revoke(1, 3, "svid", leaver.serial)
	closed(t, "revoke svid SERIAL, a tunnel", began, outEnd)
	if _, err := caller.keepAlive(bill.in); err == nil {
		t.Error("a revoked SVID still calls")
	}
	if _, err := leaver.tunnel(gateway, stripe); err == nil {
		t.Error("a revoked SVID still opens tunnels")
	}
	w.awaitAudit("billing", "the closed connection", func(l auditLine) bool {
		return l.Kind == "tls" && l.Reason == "svid_revoked" && l.Src == id("/ns/shop/sa/payment")
	})
	w.awaitAudit("gateway", "the closed tunnel", func(l auditLine) bool { return l.Kind == "egress_close" && l.Reason == "svid_revoked" })
	w.awaitAudit("issuer", "the revocation", func(l auditLine) bool { return l.Reason == "svid_revoked" && strings.Contains(l.Detail, caller.serial) })
	w.inCRL(caller.serial, leaver.serial)
	w.awaitReach(payment, url) // whose SVID is another
	select {
	case <-honest:
		t.Error("the tunnel by another SVID of the identity was closed too")
	default:
	}

	// The issuer is down, and a sidecar starts anew.
	issuer.kill()
	billing.stop()
	w.write(bill.name, w.sidecarConfig(bill, ""))
	billing = w.startNode(bill)
	if _, err := caller.keepAlive(bill.in); err == nil {
		t.Error("a sidecar that was restarted without issuer has forgotten a revocation")
	}
	w.startIssuer()
	w.await("see all proxies again", func() bool { return w.connected() == 3 })
	honest = w.honestTunnel(billing, bill, stripe)

	// All that was issued for an entry: its proxy gets a new SVID and goes on.
	began = time.Now()
	w.revoke(1, 3, "svid", id("/ns/shop/sa/payment"))
	w.awaitReach(payment, url)
	t.Logf("revoke svid SPIFFE-ID: payment calls again with a new SVID %s after the command began", time.Since(began).Round(time.Millisecond))

	// A node: what its workload has open to others, and they to it.
	began = time.Now()
	if r := w.sallyport("agent", "ban", id("/spire/agent/join_token/billing")); r.Code != 0 {
		t.Fatal(r.Output)
	}
	closed(t, "agent ban, the node's own tunnel", began, honest)
	w.awaitAudit("payment", "that what it had open to billing was closed", func(l auditLine) bool {
		return l.Kind == "tls" && l.Reason == "svid_revoked" && l.Dst == id("/ns/shop/sa/billing")
	})
	if p := read(t, ask[runReply](payment, "/run", curl(url))); p.status == "200" {
		t.Errorf("the service of a banned node still answers: %+v", p)
	}
}

// honestTunnel has the workload of a node hold a tunnel open through its
// sidecar, and reports its end.
func (w *world) honestTunnel(h *hand, n *node, out *outside) <-chan time.Time {
	w.t.Helper()
	opened := func() (k int) {
		for _, l := range w.audit("gateway") {
			if l.Kind == "egress_open" && l.Src == id("/ns/shop/sa/billing") {
				k++
			}
		}
		return k
	}
	before := opened()
	at := make(chan time.Time, 1)
	go func() {
		_, _ = try[runReply](h, "/run", []string{"openssl", "s_client", "-quiet", "-proxy", n.out, "-connect", "api.stripe.test:443",
			"-servername", "api.stripe.test", "-CAfile", out.ca})
		at <- time.Now()
	}()
	w.await("open a tunnel by the workload", func() bool { return opened() > before })
	return at
}

// connected counts the proxies that the issuer has a stream to.
func (w *world) connected() (n int) {
	a := w.admin()
	defer a.Close()
	ps, err := a.Proxies(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	for _, p := range ps {
		if p.Connected {
			n++
		}
	}
	return n
}

// inCRL waits until the published list names the serial numbers.
func (w *world) inCRL(serials ...string) {
	w.t.Helper()
	w.await("find the serial numbers in crl.der", func() bool {
		der, err := os.ReadFile(w.path("issuer", "crl.der"))
		if err != nil {
			return false
		}
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			w.t.Fatal(err)
		}
		var have []string
		for _, e := range list.RevokedCertificateEntries {
			have = append(have, e.SerialNumber.Text(16))
		}
		return !slices.ContainsFunc(serials, func(s string) bool { return !slices.Contains(have, s) })
	})
}
