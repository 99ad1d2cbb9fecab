package egress

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/meshtest"
)

// pemFiles writes an SVID the way curl and openssl read it.
func (w *world) pemFiles(t *testing.T) (cert, key string) {
	t.Helper()
	id := meshtest.Identity(t, w.ca, billing)
	var chain []byte
	for _, c := range id.Chain {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	der, err := x509.MarshalPKCS8PrivateKey(id.Key)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(t.TempDir(), "svid.pem"), filepath.Join(t.TempDir(), "key.pem")
	if err := os.WriteFile(cert, chain, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// TestCurl has a program that is not ours go through the gateway on its SVID.
func TestCurl(t *testing.T) {
	meshtest.Need(t, "curl")
	w := newWorld(t, nil)
	origin := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		_, _ = rw.Write([]byte("charged through " + r.Host))
	}), ErrorLog: log.New(io.Discard, "", 0)}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer origin.Close()
	key := meshtest.NewKey(t)
	dir := t.TempDir()
	chain, err := w.ca.Sign(meshtest.ID("/origin"), key.Public(), time.Hour, "api.stripe.test")
	if err != nil {
		t.Fatal(err)
	}
	var certPEM []byte
	for _, c := range chain {
		certPEM = append(certPEM, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	originCert, originKey := filepath.Join(dir, "c.pem"), filepath.Join(dir, "k.pem")
	for f, b := range map[string][]byte{originCert: certPEM, originKey: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})} {
		if err := os.WriteFile(f, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	go origin.ServeTLS(ln, originCert, originKey)
	w.stripe.addr = ln.Addr().String()
	w.use(w.policy(access, ""))
	cert, ckey := w.pemFiles(t)
	curl := func(url string, extra ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		args := append([]string{
			"-sS", "-k", "-x", "https://" + w.addr, "--proxy-insecure", "--proxy-cert", cert, "--proxy-key", ckey, "-i",
		}, append(extra, url)...)
		cmd := exec.CommandContext(ctx, "curl", args...)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "NO_PROXY="}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := curl("https://api.stripe.test/v1/charges"); err != nil || !strings.Contains(out, "charged through api.stripe.test") {
		t.Errorf("allowed: %v\n%s", err, out)
	}
	if help, _ := exec.Command("curl", "--help", "all").Output(); strings.Contains(string(help), "--proxy-http2") {
		if out, err := curl("https://api.stripe.test/v1/charges", "--proxy-http2"); err != nil || !strings.Contains(out, "charged through api.stripe.test") {
			t.Errorf("allowed, over HTTP/2: %v\n%s", err, out)
		}
	}
	if out, err := curl("https://evil.test/"); err == nil || !strings.Contains(out, "403") || !strings.Contains(strings.ToLower(out), "sallyport-decision: ") {
		t.Errorf("denied: %v\n%s", err, out)
	}
	// The right CONNECT and another name inside: curl is told to call
	// evil.test by way of the tunnel to api.stripe.test.
	if out, err := curl("https://evil.test/", "--connect-to", "evil.test:443:api.stripe.test:443"); err == nil {
		t.Errorf("another server name: %s", out)
	}
	w.until("the mismatch", func(r audit.Record) bool { return r.Reason == string(ReasonSNI) })
}
