package ca

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport/internal/audit"
)

func TestServerCertificate(t *testing.T) {
	now := time.Now()
	cfg := config(t)
	cfg.Now = func() time.Time { return now }
	rec := cfg.Audit.(*records)
	s := open(t, cfg).NewServer("issuer.corp.example")
	get := func() *tls.Certificate { return must1(s.Certificate(t.Context())) }
	first := get()
	if first.Leaf.URIs[0].String() != "spiffe://corp.example/spire/server" || first.Leaf.DNSNames[0] != "issuer.corp.example" || len(first.Certificate) != 2 {
		t.Errorf("got %v %v", first.Leaf.URIs, first.Leaf.DNSNames)
	}
	now = now.Add(29 * time.Minute)
	if get() != first {
		t.Error("replaced before half of its life")
	}
	now = now.Add(2 * time.Minute)
	rec.fail = func(audit.Record) error { return errors.New("disk full") }
	if get() != first {
		t.Error("the old one does not serve while no new one can be made")
	}
	rec.fail = nil
	if second := get(); second == first || samePublicKey(second.Leaf.PublicKey, first.Leaf.PublicKey) {
		t.Error("not replaced after half of its life")
	}
	rec.fail = func(audit.Record) error { return errors.New("disk full") }
	now = now.Add(2 * time.Hour)
	if cert, err := s.Certificate(t.Context()); err == nil {
		t.Errorf("an expired certificate serves: %v", cert.Leaf.NotAfter)
	}
}

func TestServerCertificateInAHandshake(t *testing.T) {
	c := open(t, config(t))
	s := c.NewServer("issuer.corp.example")
	server, client := net.Pipe()
	go tls.Server(server, &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.Certificate(t.Context()) }}).Handshake()
	roots := x509.NewCertPool()
	roots.AddCert(c.Bundle().X509[0])
	conn := tls.Client(client, &tls.Config{RootCAs: roots, ServerName: "issuer.corp.example"})
	if err := conn.HandshakeContext(t.Context()); err != nil {
		t.Error(err)
	}
}

// tires is a key store that makes one key and then no more.
type tires struct {
	keyStore
	made *int
}

func (k tires) create(name string) (crypto.Signer, error) {
	if *k.made++; *k.made > 1 {
		return nil, errors.New("token is full")
	}
	return k.keyStore.create(name)
}

func TestFailedRenewalLeavesNothingBehind(t *testing.T) {
	cfg := config(t)
	c := open(t, cfg)
	files := func() []string { return must1(filepath.Glob(filepath.Join(cfg.Dir, "*"))) }
	before, status := files(), c.Status()
	c.keys = tires{c.keys, new(int)}
	c.mu.Lock()
	err := c.rotate(t.Context(), c.current.Load(), time.Now())
	c.mu.Unlock()
	if err == nil || !strings.Contains(err.Error(), "token is full") {
		t.Errorf("got %v", err)
	}
	if d := cmp.Diff(before, files()); d != "" || c.Status() != status {
		t.Errorf("files %s, status %+v", d, c.Status())
	}
	issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()})
	c.Close()
	open(t, cfg)
}
