package test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// A node is where the parts of one sidecar listen.
type node struct {
	name              string
	in, app, out      string
	billing, gateways string // outbound ports of their own; addresses of gateways
}

// join writes the configuration of a sidecar that has everything, with a new
// token.
func (w *world) join(n *node) {
	w.t.Helper()
	n.in, n.app, n.out, n.billing = freePort(w.t), freePort(w.t), freePort(w.t), freePort(w.t)
	w.write(n.name, w.sidecarConfig(n, w.token(n.name)))
}

func (w *world) sidecarConfig(n *node, token string) string {
	c := w.proxyConfig(n.name, token) + fmt.Sprintf(`inbound: {listen: %q, app: %q}
outbound:
  listen: %s
  upstreams:
    - {service: billing, listen: %q}
`, n.in, n.app, n.out, n.billing)
	if n.gateways != "" {
		c += fmt.Sprintf("egress: {gateway: %s, addresses: [%q], inspection: %q}\n", id("/ns/edge/sa/gateway"), n.gateways, w.inspection(n))
	}
	return c
}

// inspection is the file by which a node's workload trusts gateways that stand in
// for hosts.
func (w *world) inspection(n *node) string { return w.path(n.name + "-inspection.pem") }

// startNode starts the sidecar and its workload, which serves clear HTTP on
// the node's app port.
func (w *world) startNode(n *node) *hand { return w.startWorkload(n.name, envListen+"="+n.app) }

// startGateway starts a gateway and returns its address.
func (w *world) startGateway() string {
	w.t.Helper()
	addr := freePort(w.t)
	// Nothing here is looked up: the destinations have endpoints.
	w.write("gateway", w.proxyConfig("gateway", w.token("gateway"))+fmt.Sprintf("listen: %s\nresolvers: [%q]\n", addr, freePort(w.t)))
	w.awaitReady(w.start("gateway", nil, "gateway", "run", "--config", w.path("gateway", "config.yaml")))
	return addr
}

// An outside is a TLS server that is no part of the mesh.
type outside struct {
	*httptest.Server
	ca string // the file of the certificate to trust
}

func (w *world) startOutside(host string) *outside {
	w.t.Helper()
	return w.serveOutside(host, http.HandlerFunc(echo))
}

func (w *world) serveOutside(host string, h http.Handler) *outside {
	w.t.Helper()
	return w.serveOutsideAt("", host, h)
}

// serveOutsideAt is serveOutside at an address of the caller's choice.
func (w *world) serveOutsideAt(at, host string, h http.Handler) *outside {
	w.t.Helper()
	o := &outside{Server: httptest.NewUnstartedServer(h), ca: w.path(host + ".pem")}
	if at != "" {
		o.Listener.Close()
		var err error
		if o.Listener, err = net.Listen("tcp", at); err != nil {
			w.t.Fatal(err)
		}
	}
	o.TLS = &tls.Config{Certificates: []tls.Certificate{w.certify(host, o.ca)}}
	o.StartTLS()
	w.t.Cleanup(o.Close)
	return o
}

// certify makes a certificate for a host outside, which is its own authority, and
// writes it to a file for those who are to trust it.
func (w *world) certify(host, file string) tls.Certificate {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: host}, DNSNames: []string{host},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if ip := net.ParseIP(host); ip != nil {
		c.DNSNames, c.IPAddresses = nil, []net.IP{ip}
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		w.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(file, certsPEM(leaf))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// originated describes the server as a destination whose TLS the gateway speaks.
func (o *outside) originated(host string) string {
	pem, err := os.ReadFile(o.ca)
	if err != nil {
		panic(err)
	}
	return fmt.Sprintf("  - host: %s\n    tls: originate\n    private: [127.0.0.1/32]\n    route: {endpoints: [%q]}\n    ca: |\n      %s\n",
		host, strings.TrimPrefix(o.URL, "https://"), strings.ReplaceAll(strings.TrimSpace(string(pem)), "\n", "\n      "))
}

// routeOut points the external host of the demo's policy at the server that
// plays it.
func (w *world) routeOut(o *outside) {
	w.t.Helper()
	file := filepath.Join(w.policy, "egress.yaml")
	b, err := os.ReadFile(file)
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(file, fmt.Sprintf("%s    route: {endpoints: [%q]}\n", b, strings.TrimPrefix(o.URL, "https://")))
}

func (w *world) put(file, text string) {
	w.t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// A page is what curl got.
type page struct {
	status   string
	decision string // of the header
	body     string
}

// curl is the command line of a call whose result page reads.
func curl(args ...string) []string {
	return append([]string{"curl", "-sS", "--max-time", "20", "-i", "--suppress-connect-headers"}, args...)
}

var headLine = regexp.MustCompile(`(?im)^HTTP/[0-9.]+ ([0-9]{3})|^Sallyport-Decision: (\S+)`)

// read takes curl's output apart.
func read(t *testing.T, r runReply) (p page) {
	t.Helper()
	if r.Code != 0 {
		t.Fatalf("curl ended with status %d:\n%s", r.Code, r.Output)
	}
	head, body, _ := strings.Cut(r.Output, "\r\n\r\n")
	p.body = body
	for _, m := range headLine.FindAllStringSubmatch(head, -1) {
		p.status, p.decision = p.status+m[1], p.decision+m[2]
	}
	return p
}

// isRefusal checks that a page is a refusal in the product's one form, and
// returns the id of the decision.
func isRefusal(t *testing.T, p page) string {
	t.Helper()
	var body struct{ Error, Decision string }
	if err := json.Unmarshal([]byte(p.body), &body); err != nil {
		t.Errorf("the body is not JSON: %v: %q", err, p.body)
	}
	if p.status != "403" || p.decision == "" || body.Decision != p.decision || body.Error != "denied by policy" {
		t.Errorf("not a proper refusal: %+v", p)
	}
	return p.decision
}

// isEcho checks that a page comes from the application behind a sidecar, which
// was told the caller.
func isEcho(t *testing.T, p page, method, path, caller string) {
	t.Helper()
	var body struct{ Method, Path, Caller string }
	if err := json.Unmarshal([]byte(p.body), &body); err != nil || p.status != "200" {
		t.Errorf("no answer of the application: %v: %+v", err, p)
	}
	if body.Method != method || body.Path != path || !strings.HasSuffix(body.Caller, "URI="+caller) {
		t.Errorf("the application saw %+v, want %s %s from %s", body, method, path, caller)
	}
}
