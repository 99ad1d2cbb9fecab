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

// both is the authority of an issuer between two roots.
type both struct {
	*ca
	old *ca
}

func (b both) X509Bundle() []*x509.Certificate {
	return append(b.ca.X509Bundle(), b.old.X509Bundle()...)
}

// A root whose key may be with another is nothing for a machine to begin with.
func TestIntroduceWithoutTaintedRoots(t *testing.T) {
	young, old := newCA(t, td), newCA(t, td)
	hash := func(c *ca) [sha256.Size]byte { return sha256.Sum256(c.root.Raw) }
	for _, tt := range []struct {
		name    string
		proves  *ca
		expects []*ca
		err     error
	}{
		{"by the root that stays", young, []*ca{young}, nil},
		{"by the root that stays, with both expected", young, []*ca{young, old}, nil},
		{"by the root that goes", old, []*ca{old}, ErrUntrusted},
		{"by the root that goes, with both expected", old, []*ca{young, old}, ErrUntrusted},
	} {
		t.Run(tt.name, func(t *testing.T) {
			other := young
			if tt.proves == young {
				other = old
			}
			r := newRig(t, tt.proves, func(c *ServerConfig) {
				c.Authority = both{tt.proves, other}
				c.Roots = &mover{tainted: old.X509Bundle()}
			})
			in := Introduction{Addresses: []string{r.addr}, TrustDomain: td}
			for _, c := range tt.expects {
				in.Roots = append(in.Roots, hash(c))
			}
			b, err := Introduce(t.Context(), in)
			if !errors.Is(err, tt.err) {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			if err == nil && (!slices.EqualFunc(b.X509, young.X509Bundle(), (*x509.Certificate).Equal) || len(b.Tainted) > 0) {
				t.Errorf("the bundle has %d certificates, %d tainted, and is not the one that stays", len(b.X509), len(b.Tainted))
			}
		})
	}
}
