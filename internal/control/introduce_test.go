package control

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// parrot is the authority of an impostor: it repeats the bundle of another.
type parrot struct {
	*ca
	heard *ca
}

func (p parrot) X509Bundle() []*x509.Certificate { return p.heard.X509Bundle() }

func TestIntroduce(t *testing.T) {
	real := newCA(t, td)
	honest := newRig(t, real)
	other := newCA(t, td)
	impostor := newRig(t, other, func(c *ServerConfig) { c.Authority = parrot{other, real} })
	hash := func(c *ca) [sha256.Size]byte { return sha256.Sum256(c.root.Raw) }
	for _, tt := range []struct {
		name string
		in   Introduction
		err  error
	}{
		{"the issuer itself", Introduction{Addresses: []string{honest.addr}, TrustDomain: td, Roots: [][sha256.Size]byte{hash(real)}}, nil},
		{"one of two roots", Introduction{Addresses: []string{honest.addr}, TrustDomain: td, Roots: [][sha256.Size]byte{hash(other), hash(real)}}, nil},
		{"another issuer", Introduction{Addresses: []string{honest.addr}, TrustDomain: td, Roots: [][sha256.Size]byte{hash(other)}}, ErrUntrusted},
		{"one that repeats the bundle and has no key", Introduction{Addresses: []string{impostor.addr}, TrustDomain: td, Roots: [][sha256.Size]byte{hash(real)}}, ErrUntrusted},
		{"no fingerprint", Introduction{Addresses: []string{honest.addr}, TrustDomain: td}, ErrUntrusted},
		{"another trust domain", Introduction{Addresses: []string{honest.addr}, TrustDomain: spiffeid.RequireTrustDomainFromString("other.example"), Roots: [][sha256.Size]byte{hash(real)}}, ErrTrustDomain},
		{"nobody there", Introduction{Addresses: []string{"127.0.0.1:1"}, TrustDomain: td, Roots: [][sha256.Size]byte{hash(real)}}, ErrUnreachable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b, err := Introduce(t.Context(), tt.in)
			if !errors.Is(err, tt.err) {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			if err == nil && !slices.EqualFunc(b.X509, real.X509Bundle(), (*x509.Certificate).Equal) {
				t.Errorf("the bundle has %d certificates and is not the issuer's", len(b.X509))
			}
		})
	}
}
