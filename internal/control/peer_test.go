package control

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestAPeerIsHeldToTheSpecification signs leaves with the right authority that
// are wrong in one thing. The numbers are those of docs/conformance.md.
func TestAPeerIsHeldToTheSpecification(t *testing.T) {
	a := newCA(t, td)
	to := func(text string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			u, err := url.Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			c.URIs = []*url.URL{u}
		}
	}
	for name, tt := range map[string]struct {
		change func(*x509.Certificate)
		want   string
	}{
		"right":                   {func(*x509.Certificate) {}, ""},
		"18 two names":            {func(c *x509.Certificate) { c.URIs = append(c.URIs, billing.URL()) }, "2 URI names"},
		"17 no name":              {func(c *x509.Certificate) { c.URIs = nil }, "0 URI names"},
		"30 cA":                   {func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign }, "a CA never authenticates"},
		"31 keyCertSign":          {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, "may sign certificates"},
		"31 cRLSign":              {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }, "may sign certificates"},
		"32 an https URI":         {to("https://corp.example/x"), "read SPIFFE ID"},
		"33 no path":              {to("spiffe://corp.example"), "has no path"},
		"26 no digitalSignature":  {func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }, "lacks key usage"},
		"24 no key usage":         {func(c *x509.Certificate) { c.KeyUsage = 0 }, "lacks key usage"},
		"28 clientAuth alone":     {func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }, "lacks serverAuth"},
		"55 another trust domain": {to("spiffe://other.example/x"), "want a member"},
		"29 expired":              {func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }, "outside its validity"},
		"29 an unknown critical extension": {func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}, "unhandled critical extension"},
		"24 key usage not critical": {func(c *x509.Certificate) {
			c.KeyUsage = 0
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Value: []byte{3, 2, 7, 0x80}}}
		}, "key usage is not critical"},
		"20 an empty subject, name not critical": {func(c *x509.Certificate) {
			name := append([]byte{0x86, byte(len(payment.String()))}, payment.String()...)
			c.URIs, c.Subject = nil, pkix.Name{}
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: append([]byte{0x30, byte(len(name))}, name...)}}
		}, "empty subject"},
	} {
		leaf := a.issue(t, payment, newKey(t), tt.change).Leaf
		got, err := verifyPeer([]*x509.Certificate{leaf, a.mid}, a.X509Bundle(), td, time.Now())
		switch {
		case tt.want == "" && (err != nil || got != payment):
			t.Errorf("%s: %v, %v", name, got, err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s: %v, %v; want an error that says %q", name, got, err, tt.want)
		}
	}
	var none spiffeid.ID
	if got, err := verifyPeer(nil, a.X509Bundle(), td, time.Now()); err == nil || got != none {
		t.Errorf("no certificate: %v", got)
	}
}

// An issuer below may sign any identity. Here it counts for none.
func TestALeafOfAnIssuerBelowIsNoPeer(t *testing.T) {
	a := newCA(t, td)
	key := newKey(t)
	below := sign(t, asCA(template(a.nextSerial(), nil, time.Hour)), a.mid, key.Public(), a.midKey)
	leaf := sign(t, template(a.nextSerial(), &payment, time.Hour), below, newKey(t).Public(), key)
	if _, err := verifyPeer([]*x509.Certificate{leaf, below, a.mid}, a.X509Bundle(), td, time.Now()); err == nil || !strings.Contains(err.Error(), "issuer below") {
		t.Errorf("got %v", err)
	}
}

// Under an upstream authority a chain is longer, and one below ours counts for
// none all the same.
func TestChainsUnderAnUpstreamAuthority(t *testing.T) {
	named := &x509.Certificate{URIs: []*url.URL{td.ID().URL()}}
	bare, leaf := &x509.Certificate{}, &x509.Certificate{URIs: []*url.URL{payment.URL()}}
	for _, tt := range []struct {
		name  string
		chain []*x509.Certificate
		want  bool
	}{
		{"ours under our root", []*x509.Certificate{leaf, named, named}, true},
		{"one below, under our root", []*x509.Certificate{leaf, named, named, named}, false},
		{"one without a name below, under our root", []*x509.Certificate{leaf, bare, named, named}, false},
		{"a foreign one above ours, under our root", []*x509.Certificate{leaf, named, bare, named}, false},
		{"ours under a foreign root", []*x509.Certificate{leaf, named, bare}, true},
		{"ours under a foreign chain", []*x509.Certificate{leaf, named, bare, bare, bare}, true},
		{"one below, under a foreign root", []*x509.Certificate{leaf, named, named, bare}, false},
		{"one below, under a foreign chain", []*x509.Certificate{leaf, named, named, bare, bare}, false},
		{"one without a name below", []*x509.Certificate{leaf, bare, named, bare}, false},
		{"a foreign one", []*x509.Certificate{leaf, bare, bare, bare}, false},
	} {
		if got := bySelf(tt.chain, td); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}
