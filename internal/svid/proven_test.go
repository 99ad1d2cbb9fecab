package svid

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"sallyport/internal/mesh"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
)

func TestProvenChain(t *testing.T) {
	ca, now := newCA(t, td), time.Now()
	for _, c := range []struct {
		name   string
		leaf   time.Duration // from now until its end
		at     time.Duration // when it comes again
		again  bool
		expiry bool
	}{
		{name: "at once", leaf: time.Hour, again: true},
		{name: "just before its end", leaf: time.Hour, at: time.Hour - 2*time.Second, again: true},
		{name: "after its end", leaf: time.Hour, at: time.Hour + time.Second, expiry: true},
		{name: "before its beginning, by a clock that was put back", leaf: time.Hour, at: -time.Minute},
		{name: "after the end of its authorities", leaf: 60 * 24 * time.Hour, at: 31 * 24 * time.Hour},
	} {
		t.Run(c.name, func(t *testing.T) {
			st, chain := ca.source().Current(), ca.identity(id("/payment"), c.leaf).Chain
			if got, err := st.verifyPeer(chain, now); err != nil || got != id("/payment") {
				t.Fatalf("the first time: %v, %v", got, err)
			}
			got, err := st.verifyPeer(chain, now.Add(c.at))
			if c.again && (err != nil || got != id("/payment")) {
				t.Errorf("again: %v, %v", got, err)
			}
			if !c.again && (err == nil || !got.IsZero()) {
				t.Errorf("again: %v was accepted", got)
			}
			if c.expiry && !errors.Is(err, ErrExpired) {
				t.Errorf("again: %v, want ErrExpired", err)
			}
		})
	}
}

// TestProvenAsksNoRootAgain is why there is a memory at all.
func TestProvenAsksNoRootAgain(t *testing.T) {
	ca := newCA(t, td)
	st, chain := ca.source().Current(), ca.identity(id("/payment"), time.Hour).Chain
	for range 2 {
		if _, err := st.verifyPeer(chain, time.Now()); err != nil {
			t.Fatal(err)
		}
		st.roots = nil
	}
}

func TestProvenIsOfTheseBytesAlone(t *testing.T) {
	ca := newCA(t, td)
	st, chain := ca.source().Current(), ca.identity(id("/payment"), time.Hour).Chain
	if _, err := st.verifyPeer(chain, time.Now()); err != nil {
		t.Fatal(err)
	}
	for name, other := range map[string][]*x509.Certificate{
		"a signature that was changed": {changed(t, chain[0]), chain[1]},
		"without its intermediate":     chain[:1],
		"of another CA":                newCA(t, td).identity(id("/payment"), time.Hour).Chain,
		"another before it":            {newCA(t, td).inter, chain[0], chain[1]},
	} {
		if got, err := st.verifyPeer(other, time.Now()); err == nil {
			t.Errorf("%s: %v was accepted", name, got)
		}
	}
	if n := len(st.proven.known); n != 1 {
		t.Errorf("%d chains are remembered, want the good one alone", n)
	}
	// Where one certificate ends is a part of the key.
	whole := append(bytes.Clone(chain[0].Raw), binary.BigEndian.AppendUint64(nil, uint64(len(chain[1].Raw)))...)
	whole = append(whole, chain[1].Raw...)
	if chainKey(chain) == chainKey([]*x509.Certificate{{Raw: whole}}) {
		t.Error("one certificate has the key of two")
	}
}

// changed gives the certificate with one bit of its signature turned.
func changed(t *testing.T, c *x509.Certificate) *x509.Certificate {
	t.Helper()
	der := bytes.Clone(c.Raw)
	der[len(der)-1] ^= 1
	other, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return other
}

func TestProvenForgetsWithTheBundle(t *testing.T) {
	ca, other := newCA(t, td), newCA(t, td)
	s, chain := ca.source(id("/billing")), ca.identity(id("/payment"), time.Hour).Chain
	if _, err := s.Current().verifyPeer(chain, time.Now()); err != nil {
		t.Fatal(err)
	}
	next := *s.Current() // and all that it remembers
	next.Identities, next.Bundle = nil, x509bundle.FromX509Authorities(td, []*x509.Certificate{other.root})
	if err := s.Set(&next); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Current().verifyPeer(chain, time.Now()); err == nil {
		t.Errorf("%v was accepted without its authority", got)
	}
}

func TestProvenIsNoStanding(t *testing.T) {
	ca := newCA(t, td)
	billing, payment := ca.source(id("/billing")), ca.source(id("/payment"))
	server := ServerTLS(billing, anybody)
	if _, _, cerr, serr := shake(t, server, ClientTLS(payment, id("/billing"))); cerr != nil || serr != nil {
		t.Fatal(cerr, serr)
	}
	thief := ClientTLS(payment, id("/billing"))
	thief.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		c, err := payment.Certificate()
		if err == nil {
			c.PrivateKey = newKey(t)
		}
		return c, err
	}
	if _, _, _, err := shake(t, server, thief); err == nil {
		t.Error("a chain that was proven was taken without its key")
	}
	leaf := payment.Current().Identities[0].Chain[0]
	billing.Revoke([]mesh.RevokedSVID{{Serial: mesh.SerialText(leaf.SerialNumber), Until: time.Now().Add(time.Hour), Why: "stolen"}})
	if _, _, _, err := shake(t, server, ClientTLS(payment, id("/billing"))); !errors.Is(err, ErrRevoked) {
		t.Errorf("a chain that was proven and then revoked: %v, want ErrRevoked", err)
	}
}

func TestProvenIsBounded(t *testing.T) {
	var p proven
	for n := range maxProven + 10 {
		p.add([32]byte{byte(n), byte(n >> 8)}, proof{id: id("/payment"), until: time.Now().Add(time.Hour)})
	}
	if len(p.known) != maxProven {
		t.Errorf("%d chains, want %d", len(p.known), maxProven)
	}
	last := [32]byte{byte((maxProven + 9) & 255), (maxProven + 9) >> 8}
	if _, ok := p.find(last, time.Now()); !ok {
		t.Error("the last one was not kept")
	}
}
