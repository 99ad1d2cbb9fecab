package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

// A testCA signs whatever it is told to, right or wrong.
type testCA struct {
	t     testing.TB
	td    spiffeid.TrustDomain
	root  *x509.Certificate
	inter *x509.Certificate
	key   crypto.Signer // of inter
	rkey  crypto.Signer
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func serial(t testing.TB) *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func uri(s string) []*url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return []*url.URL{u}
}

func sign(t testing.TB, tpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tpl, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newCA(t testing.TB, td spiffeid.TrustDomain) *testCA {
	t.Helper()
	ca := &testCA{t: t, td: td, rkey: newKey(t)}
	tpl := ca.signer()
	ca.root = sign(t, tpl, tpl, ca.rkey.Public(), ca.rkey)
	ca.key = newKey(t)
	ca.inter = sign(t, ca.signer(), ca.root, ca.key.Public(), ca.rkey)
	return ca
}

func (ca *testCA) signer() *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: serial(ca.t), Subject: pkix.Name{CommonName: ca.td.Name() + " " + serial(ca.t).String()}, URIs: uri(ca.td.IDString()),
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(30 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
}

func (ca *testCA) leaf(id string, ttl time.Duration) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: serial(ca.t), URIs: uri(id),
		NotBefore: time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(ttl),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

func (ca *testCA) issue(tpl *x509.Certificate, pub crypto.PublicKey) []*x509.Certificate {
	return []*x509.Certificate{sign(ca.t, tpl, ca.inter, pub, ca.key), ca.inter}
}

func (ca *testCA) bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(ca.td, []*x509.Certificate{ca.root})
}

func (ca *testCA) identity(who spiffeid.ID, ttl time.Duration) Identity {
	k := newKey(ca.t)
	return Identity{ID: who, Chain: ca.issue(ca.leaf(who.String(), ttl), k.Public()), Key: k, EntryID: "entry" + who.Path()}
}

func (ca *testCA) source(who ...spiffeid.ID) *Source {
	ca.t.Helper()
	st := &State{Bundle: ca.bundle()}
	for _, w := range who {
		st.Identities = append(st.Identities, ca.identity(w, time.Hour))
	}
	s := NewSource()
	if err := s.Set(st); err != nil {
		ca.t.Fatal(err)
	}
	return s
}
