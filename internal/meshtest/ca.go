// Package meshtest is what tests stand on: a certificate authority of their
// own, identities, policies from text, and a network in memory.
//
// Only tests import it. Everything in it works inside a synctest bubble: time
// is time.Now, waiting is on channels and conditions. It owns no goroutine.
package meshtest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/svid"
)

// TD is the trust domain of the policies in the folder policies/, and what
// tests use unless they need another.
var TD = spiffeid.RequireTrustDomainFromString("demo.sallyport")

// ID is an identity in TD, such as ID("/ns/shop/sa/billing").
func ID(path string) spiffeid.ID { return spiffeid.RequireFromPath(TD, path) }

// AgentID is the agent of TD that a join token made under a name.
func AgentID(name string) spiffeid.ID { return ID("/spire/agent/join_token/" + name) }

// A CA is the root and the intermediate of a trust domain. Its methods may be
// called from any goroutine.
type CA struct {
	td    spiffeid.TrustDomain
	root  *x509.Certificate
	inter *x509.Certificate
	key   *ecdsa.PrivateKey // of inter
}

// NewCA makes the CA of a trust domain, valid for 30 days from now.
func NewCA(t testing.TB, td spiffeid.TrustDomain) *CA {
	t.Helper()
	c := &CA{td: td, key: NewKey(t)}
	rootKey := NewKey(t)
	tpl := c.authority("root")
	var err error
	if c.root, err = sign(tpl, tpl, rootKey.Public(), rootKey); err != nil {
		t.Fatalf("sign root: %v", err)
	}
	if c.inter, err = sign(c.authority("intermediate"), c.root, c.key.Public(), rootKey); err != nil {
		t.Fatalf("sign intermediate: %v", err)
	}
	return c
}

// NewKey makes a P-256 key.
func NewKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatalf("make key: %v", err)
	}
	return key
}

// TrustDomain is that of the CA.
func (c *CA) TrustDomain() spiffeid.TrustDomain { return c.td }

// Root is the certificate that peers must trust.
func (c *CA) Root() *x509.Certificate { return c.root }

// Bundle holds the root.
func (c *CA) Bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(c.td, []*x509.Certificate{c.root})
}

// Sign returns the leaf of an X.509-SVID and the intermediate.
func (c *CA) Sign(id spiffeid.ID, key crypto.PublicKey, ttl time.Duration, dns ...string) ([]*x509.Certificate, error) {
	now := time.Now()
	leaf, err := sign(&x509.Certificate{
		SerialNumber: serial(), URIs: []*url.URL{id.URL()}, DNSNames: dns,
		NotBefore: now.Add(-10 * time.Second), NotAfter: now.Add(ttl),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, c.inter, key, c.key)
	if err != nil {
		return nil, err
	}
	return []*x509.Certificate{leaf, c.inter}, nil
}

// Issue makes an identity with a key of its own. A ttl below zero makes one
// that has expired.
func (c *CA) Issue(t testing.TB, id spiffeid.ID, ttl time.Duration) svid.Identity {
	t.Helper()
	key := NewKey(t)
	chain, err := c.Sign(id, key.Public(), ttl)
	if err != nil {
		t.Fatalf("sign %s: %v", id, err)
	}
	return svid.Identity{ID: id, Chain: chain, Key: key, EntryID: "entry" + id.Path()}
}

// Identity makes an identity that is valid for an hour.
func Identity(t testing.TB, ca *CA, id spiffeid.ID) svid.Identity {
	t.Helper()
	return ca.Issue(t, id, time.Hour)
}

// Source makes a source that holds identities valid for an hour; the first is
// shown to peers.
func Source(t testing.TB, ca *CA, ids ...spiffeid.ID) *svid.Source {
	t.Helper()
	state := &svid.State{Bundle: ca.Bundle()}
	for _, id := range ids {
		state.Identities = append(state.Identities, Identity(t, ca, id))
	}
	s := svid.NewSource()
	if err := s.Set(state); err != nil {
		t.Fatalf("set identities: %v", err)
	}
	return s
}

func (c *CA) authority(name string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: c.td.Name() + " " + name},
		URIs:      []*url.URL{c.td.ID().URL()},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(30 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
}

func serial() *big.Int {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[0] = b[0]&0x3f | 0x40
	return new(big.Int).SetBytes(b[:])
}

func sign(tpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, tpl, parent, pub, key)
	if err != nil {
		return nil, fmt.Errorf("create certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}
