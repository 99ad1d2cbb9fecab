package test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"
)

// TestANodeJoinsByItsCertificate attests by x509pop instead of a token, again
// after the node's identity has expired, and is refused with a certificate of
// another authority.
func TestANodeJoinsByItsCertificate(t *testing.T) {
	w := newWorld(t, 10*time.Second)
	ours, theirs := newNodeCA(t), newNodeCA(t)
	conf, err := os.ReadFile(w.path("issuer", "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	w.write("issuer", string(conf)+"attestors: {x509pop: {ca_file: "+w.keep("nodes.pem", ours.pem())+"}}\n")
	node := ours.node(t, w, "web")
	file := w.path("policies", "entries.yaml")
	entries, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	agent := "/spire/agent/x509pop/" + node
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(string(entries), "/spire/agent/join_token/web\n", agent+"\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	w.startIssuer()

	app := func() *proc {
		return w.start("web", nil, "sidecar", "run", "--config", w.path("web", "config.yaml"), "--", "sh", "-c", "echo ran")
	}
	p := app()
	if code := p.end(); code != 0 || !strings.Contains(p.out.String(), "ran\n") {
		t.Fatalf("exit %d", code)
	}
	joined := func(l auditLine) bool {
		return l.Kind == "attest" && l.Decision == "allow" && l.Detail == "x509pop" && l.Src == id(agent)
	}
	w.awaitAudit("issuer", "the attestation", joined)
	// A node whose identity is of no use any more proves itself anew.
	for _, f := range []string{"node.json", "svids.json"} {
		if err := os.Remove(w.path("web", f)); err != nil {
			t.Fatal(err)
		}
	}
	if code := app().end(); code != 0 {
		t.Fatalf("the second time: exit %d", code)
	}

	theirs.node(t, w, "stranger")
	p = w.start("stranger", nil, "sidecar", "run", "--config", w.path("stranger", "config.yaml"))
	<-p.done
	if code := p.cmd.ProcessState.ExitCode(); code == 0 || !strings.Contains(p.out.String(), "node attestation failed") {
		t.Errorf("a stranger: exit %d", code)
	}
	w.awaitAudit("issuer", "the refusal", func(l auditLine) bool {
		return l.Kind == "attest" && l.Decision == "deny" && l.Detail == "x509pop" && l.Reason == "evidence"
	})
}

// keep writes a file of the world and gives its path.
func (w *world) keep(name string, b []byte) string {
	w.t.Helper()
	w.put(w.path(name), string(b))
	return w.path(name)
}

// A nodeCA gives nodes their certificates, as a factory does.
type nodeCA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newNodeCA(t *testing.T) nodeCA {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "nodes"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return nodeCA{cert, key}
}

func (c nodeCA) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw})
}

// node writes certificate, key and configuration of a sidecar and gives the
// fingerprint of the certificate.
func (c nodeCA) node(t *testing.T, w *world, name string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, c.cert, key.Public(), c.key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	w.write(name, fmt.Sprintf(`trust_domain: %s
data_dir: %s
issuer:
  addresses: [%q]
  bundle: %s
  attest: {kind: x509pop, certificate_file: %s, key_file: %s}
`, trustDomain, w.path(name), w.issuer, w.path("issuer", "bundle.pem"),
		w.keep(name+".pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		w.keep(name+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}))))
	sum := sha1.Sum(der)
	return hex.EncodeToString(sum[:])
}
