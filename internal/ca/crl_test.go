package ca

import (
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// TestOpenSSLFindsTheRevoked has openssl check two leaves against the list.
func TestOpenSSLFindsTheRevoked(t *testing.T) {
	c := open(t, config(t))
	dir := t.TempDir()
	put := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()})
	bad := issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()})
	crl, err := c.CRL([]Revoked{{bad[0].SerialNumber, time.Now()}, {big.NewInt(7), time.Now()}}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	list := must1(x509.ParseRevocationList(crl))
	if err := list.CheckSignatureFrom(bad[1]); err != nil || len(list.RevokedCertificateEntries) != 2 {
		t.Errorf("%v, %d entries", err, len(list.RevokedCertificateEntries))
	}
	later := must1(x509.ParseRevocationList(must1(c.CRL(nil, time.Hour))))
	if later.Number.Cmp(list.Number) <= 0 {
		t.Error("the number does not grow")
	}
	meshtest.Need(t, "openssl")
	for name, chain := range map[string][]*x509.Certificate{"good": good, "bad": bad} {
		out, err := exec.Command("openssl", "verify", "-x509_strict", "-crl_check",
			"-CAfile", put("root.pem", "CERTIFICATE", c.Bundle().X509[0].Raw), "-CRLfile", put("crl.pem", "X509 CRL", crl),
			"-untrusted", put("inter.pem", "CERTIFICATE", chain[1].Raw), put(name+".pem", "CERTIFICATE", chain[0].Raw)).CombinedOutput()
		if (err == nil) != (name == "good") || name == "bad" && !strings.Contains(string(out), "certificate revoked") {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
	if _, err := c.CRL([]Revoked{{}}, time.Hour); err == nil {
		t.Error("a list without a serial number was signed")
	}
}
