package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/svid"
)

var below = spiffeid.RequireFromString("spiffe://corp.example/ns/edge/sa/issuer")

// downstream has the certificate of a downstream issuer signed for key.
func downstream(t testing.TB, c *CA, key *ecdsa.PrivateKey, ttl time.Duration) []*x509.Certificate {
	t.Helper()
	d, err := c.DraftDownstream(DownstreamRequest{ID: below, PublicKey: key.Public(), TTL: ttl})
	if err != nil {
		t.Fatal(err)
	}
	return must1(c.Sign(t.Context(), d))
}

// signedBelow is what a downstream issuer signs: a leaf, or an issuer once more.
func signedBelow(parent *x509.Certificate, parentKey *ecdsa.PrivateKey, id string, authority bool, key crypto.PublicKey) *x509.Certificate {
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, URIs: []*url.URL{must1(url.Parse(id))},
	}
	if authority {
		template.IsCA, template.KeyUsage, template.ExtKeyUsage = true, x509.KeyUsageCertSign, nil
		template.Subject.CommonName = "one more"
	}
	return must1(x509.ParseCertificate(must1(x509.CreateCertificate(rand.Reader, template, parent, key, parentKey))))
}

func TestADownstreamIssuerSignsForItsTrustDomainAlone(t *testing.T) {
	recs := new(records)
	cfg := config(t)
	cfg.Audit = recs
	c := open(t, cfg)
	key, leafKey := newKey(), newKey()
	chain := downstream(t, c, key, 0)
	cert := chain[0]
	if !cert.IsCA || cert.MaxPathLen != 0 || !cert.MaxPathLenZero || !slices.Equal(cert.PermittedURIDomains, []string{td.Name()}) || !cert.PermittedDNSDomainsCritical {
		t.Errorf("it may more than sign leaves of %s: path length %d, permitted %v", td, cert.MaxPathLen, cert.PermittedURIDomains)
	}
	if cert.NotAfter.After(chain[1].NotAfter) {
		t.Errorf("it ends at %s, after the intermediate at %s", cert.NotAfter, chain[1].NotAfter)
	}
	if got := recs.reasons(); !strings.HasSuffix(got, "intent done") {
		t.Errorf("audit is %q", got)
	}
	last := recs.all[len(recs.all)-1]
	if last.Dst != below.String() || !strings.HasPrefix(last.Detail, "x509 downstream CA serial ") {
		t.Errorf("audit says %s: %s", last.Dst, last.Detail)
	}

	roots := x509bundle.FromX509Authorities(td, c.Bundle().X509)
	leaf := signedBelow(cert, key, web.String(), false, leafKey.Public())
	if id, err := svid.VerifyChain(append([]*x509.Certificate{leaf}, chain...), roots, time.Now()); err != nil || id != web {
		t.Errorf("a leaf of %s below it: %s, %v", web, id, err)
	}
	pool, mids := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range c.Bundle().X509 {
		pool.AddCert(r)
	}
	for _, m := range chain {
		mids.AddCert(m)
	}
	opts := x509.VerifyOptions{Roots: pool, Intermediates: mids, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	foreign := signedBelow(cert, key, "spiffe://other.example/x", false, leafKey.Public())
	var invalid x509.CertificateInvalidError
	if _, err := foreign.Verify(opts); !errors.As(err, &invalid) || invalid.Reason != x509.CANotAuthorizedForThisName {
		t.Errorf("a leaf of another trust domain below it: %v", err)
	}
	moreKey := newKey()
	more := signedBelow(cert, key, td.IDString(), true, moreKey.Public())
	mids.AddCert(more)
	deep := signedBelow(more, moreKey, web.String(), false, leafKey.Public())
	if _, err := deep.Verify(opts); !errors.As(err, &invalid) || invalid.Reason != x509.TooManyIntermediates {
		t.Errorf("an issuer below it: %v", err)
	}
}

func TestDraftDownstreamRefuses(t *testing.T) {
	c := open(t, config(t))
	for name, tc := range map[string]struct {
		req  DownstreamRequest
		want string
	}{
		"nobody":               {DownstreamRequest{PublicKey: anyKey.Public()}, "no SPIFFE ID"},
		"another trust domain": {DownstreamRequest{ID: spiffeid.RequireFromString("spiffe://other.example/x"), PublicKey: anyKey.Public()}, "not in trust domain"},
		"no key":               {DownstreamRequest{ID: below}, "key"},
		"a key of the CA":      {DownstreamRequest{ID: below, PublicKey: c.current.Load().intermediate.PublicKey}, "one of the CA"},
		"a life too short":     {DownstreamRequest{ID: below, PublicKey: anyKey.Public(), TTL: time.Second}, "below the floor"},
		"a negative life":      {DownstreamRequest{ID: below, PublicKey: anyKey.Public(), TTL: -time.Hour}, "below the floor"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := c.DraftDownstream(tc.req); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want a refusal with a word on %q", err, tc.want)
			}
		})
	}
}

// TestADownstreamIssuerIsShortLived asks for more than there is.
func TestADownstreamIssuerIsShortLived(t *testing.T) {
	c := open(t, config(t))
	chain := downstream(t, c, newKey(), 10*365*24*time.Hour)
	if !chain[0].NotAfter.Equal(chain[1].NotAfter) {
		t.Errorf("it ends at %s, want the end of the intermediate, %s", chain[0].NotAfter, chain[1].NotAfter)
	}
	chain = downstream(t, c, newKey(), time.Hour)
	if life := time.Until(chain[0].NotAfter); life > time.Hour || life < 59*time.Minute {
		t.Errorf("it lives for %s, want what was asked for", life)
	}
}

// TestARootOfOldPermitsNoIssuerBelow: its path length is one shorter. It signs
// on, and a draft is refused with what to do.
func TestARootOfOldPermitsNoIssuerBelow(t *testing.T) {
	c := open(t, config(t))
	s := *c.current.Load()
	old := *s.intermediate
	old.MaxPathLen, old.MaxPathLenZero = 0, true
	s.intermediate = &old
	c.current.Store(&s)
	if _, err := c.DraftDownstream(DownstreamRequest{ID: below, PublicKey: anyKey.Public()}); !errors.Is(err, ErrNoDepth) {
		t.Errorf("got %v, want ErrNoDepth", err)
	}
}

func TestAddressesAreNotConstrained(t *testing.T) {
	for name, want := range map[string]bool{"corp.example": true, "10.0.0.1": false, "1.2.3": true} {
		if got := constrainable(name); got != want {
			t.Errorf("constrainable(%q) = %v", name, got)
		}
	}
}
