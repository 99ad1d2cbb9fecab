package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

func rawSAN(critical bool, uris ...string) pkix.Extension {
	var names []asn1.RawValue
	for _, u := range uris {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(u)})
	}
	der, err := asn1.Marshal(names)
	if err != nil {
		panic(err)
	}
	return pkix.Extension{Id: oidSubjectAltName, Critical: critical, Value: der}
}

func TestVerifyChainRefusesTheLeaf(t *testing.T) {
	ca := newCA(t, td)
	weak, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		must   int // number in the list of SPIFFE rules, 0 for ours
		change func(*x509.Certificate)
		key    crypto.PublicKey
		want   string // "" accepts
		lax    bool   // go-spiffe accepts it
	}{
		{name: "right in every way", change: func(*x509.Certificate) {}},
		{name: "without any extended key usage", must: 28, change: func(c *x509.Certificate) { c.ExtKeyUsage = nil }},
		{name: "with more usages than the two", must: 28, change: func(c *x509.Certificate) {
			c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageCodeSigning)
		}},
		{name: "no URI", must: 17, change: func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"a.example.org"} }, want: "0 URI names"},
		{name: "two SPIFFE URIs", must: 18, change: func(c *x509.Certificate) { c.URIs = append(c.URIs, uri("spiffe://example.org/y")...) }, want: "2 URI names"},
		{name: "a SPIFFE and another URI", must: 18, change: func(c *x509.Certificate) { c.URIs = append(c.URIs, uri("https://x/y")...) }, want: "2 URI names"},
		{name: "https scheme", must: 32, change: func(c *x509.Certificate) { c.URIs = uri("https://example.org/x") }, want: "no SPIFFE ID"},
		{name: "upper-case scheme", must: 32, change: func(c *x509.Certificate) {
			c.URIs = nil
			c.ExtraExtensions = []pkix.Extension{rawSAN(true, "SPIFFE://example.org/x")}
		}, want: "no SPIFFE ID", lax: true},
		{name: "upper-case trust domain", must: 5, change: func(c *x509.Certificate) { c.URIs = uri("spiffe://EXAMPLE.org/x") }, want: "no SPIFFE ID"},
		{name: "query", must: 2, change: func(c *x509.Certificate) { c.URIs = uri("spiffe://example.org/x?a") }, want: "no SPIFFE ID"},
		{name: "fragment", must: 3, change: func(c *x509.Certificate) { c.URIs = uri("spiffe://example.org/x#a") }, want: "no SPIFFE ID"},
		{name: "user", must: 4, change: func(c *x509.Certificate) { c.URIs = uri("spiffe://u@example.org/x") }, want: "no SPIFFE ID"},
		{name: "port", must: 4, change: func(c *x509.Certificate) { c.URIs = uri("spiffe://example.org:80/x") }, want: "no SPIFFE ID"},
		{name: "percent-encoding", must: 9, change: func(c *x509.Certificate) { c.URIs = uri("spiffe://example.org/%41") }, want: "no SPIFFE ID"},
		{name: "dot segment", must: 10, change: func(c *x509.Certificate) { c.URIs = uri("spiffe://example.org/a/../x") }, want: "no SPIFFE ID"},
		{name: "empty segment", must: 10, change: func(c *x509.Certificate) { c.URIs = uri("spiffe://example.org/a//x") }, want: "no SPIFFE ID"},
		{name: "trailing slash", must: 11, change: func(c *x509.Certificate) { c.URIs = uri("spiffe://example.org/x/") }, want: "no SPIFFE ID"},
		{name: "root path", must: 33, change: func(c *x509.Certificate) { c.URIs = uri("spiffe://example.org") }, want: "has no path", lax: true},
		{name: "longest ID", must: 13, change: func(c *x509.Certificate) {
			c.URIs = uri("spiffe://example.org/" + strings.Repeat("a", maxID-len("spiffe://example.org/")))
		}},
		{name: "ID one byte too long", must: 13, change: func(c *x509.Certificate) {
			c.URIs = uri("spiffe://example.org/" + strings.Repeat("a", maxID+1-len("spiffe://example.org/")))
		}, want: "2049 bytes", lax: true},
		{name: "other trust domain", must: 82, change: func(c *x509.Certificate) { c.URIs = uri("spiffe://example.net/x") }, want: "trust domain is not"},
		{name: "no key usage", must: 24, change: func(c *x509.Certificate) { c.KeyUsage = 0 }, want: "no key usage", lax: true},
		{name: "key usage not critical", must: 24, change: func(c *x509.Certificate) {
			c.KeyUsage = 0
			c.ExtraExtensions = []pkix.Extension{{Id: oidKeyUsage, Value: []byte{3, 2, 7, 0x80}}}
		}, want: "not critical", lax: true},
		{name: "only keyEncipherment", must: 26, change: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }, want: "digitalSignature", lax: true},
		{name: "may sign certificates", must: 31, change: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, want: "keyCertSign"},
		{name: "may sign CRLs", must: 31, change: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }, want: "keyCertSign"},
		{name: "is a CA", must: 30, change: func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign }, want: "is a CA"},
		{name: "only codeSigning", must: 28, change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }, want: "both serverAuth and clientAuth", lax: true},
		{name: "only clientAuth", must: 28, change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }, want: "both serverAuth and clientAuth", lax: true},
		{name: "only serverAuth", must: 28, change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, want: "both serverAuth and clientAuth", lax: true},
		{name: "any usage", must: 28, change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }, want: "both serverAuth and clientAuth", lax: true},
		{name: "unknown usage only", must: 28, change: func(c *x509.Certificate) {
			c.ExtKeyUsage, c.UnknownExtKeyUsage = nil, []asn1.ObjectIdentifier{{1, 2, 3}}
		}, want: "both serverAuth and clientAuth", lax: true},
		{name: "empty subject, SAN not critical", must: 20, change: func(c *x509.Certificate) {
			c.URIs = nil
			c.ExtraExtensions = []pkix.Extension{rawSAN(false, "spiffe://example.org/x")}
		}, want: "not critical", lax: true},
		{name: "unknown critical extension", must: 29, change: func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}, want: "unhandled critical extension"},
		{name: "expired", must: 29, change: func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }, want: "expired"},
		{name: "not yet valid", must: 29, change: func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }, want: "check both clocks"},
		{name: "P-224 key", change: func(*x509.Certificate) {}, key: weak.Public(), want: "224 bits", lax: true},
		{name: "RSA key of 1024 bits", change: func(*x509.Certificate) {}, key: small.Public(), want: "1024 bits", lax: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			tpl := ca.leaf("spiffe://example.org/x", time.Hour)
			c.change(tpl)
			if c.key == nil {
				c.key = newKey(t).Public()
			}
			chain := ca.issue(tpl, c.key)
			got, err := VerifyChain(chain, ca.bundle(), time.Now())
			_, _, laxErr := x509svid.Verify(chain, ca.bundle())
			switch {
			case c.want == "" && (err != nil || got.TrustDomain() != td):
				t.Errorf("refused: %v", err)
			case c.want != "" && err == nil:
				t.Errorf("accepted as %s", got)
			case c.want != "" && !strings.Contains(err.Error(), c.want):
				t.Errorf("refused with %q, want %q in it", err, c.want)
			}
			if (laxErr == nil) != (c.lax || c.want == "") {
				t.Errorf("go-spiffe: accepted = %v, the table says %v: %v", laxErr == nil, c.lax, laxErr)
			}
		})
	}
}

func TestVerifyChainRefusesThePath(t *testing.T) {
	ca, other := newCA(t, td), newCA(t, td)
	foreign := newCA(t, spiffeid.RequireTrustDomainFromString("example.net"))
	good := ca.identity(id("/x"), time.Hour).Chain
	under := func(change func(*x509.Certificate)) []*x509.Certificate {
		k, tpl := newKey(t), ca.signer()
		change(tpl)
		inter := sign(t, tpl, ca.root, k.Public(), ca.rkey)
		return []*x509.Certificate{sign(t, ca.leaf("spiffe://example.org/x", time.Hour), inter, newKey(t).Public(), k), inter}
	}
	lk := newKey(t)
	leafSigned := func() []*x509.Certificate { // a workload that signs with its own SVID
		l := ca.issue(ca.leaf("spiffe://example.org/evil", time.Hour), lk.Public())
		return append([]*x509.Certificate{sign(t, ca.leaf("spiffe://example.org/x", time.Hour), l[0], newKey(t).Public(), lk)}, l...)
	}()
	long := slices.Repeat([]*x509.Certificate{ca.inter}, maxChain)
	for _, c := range []struct {
		name   string
		chain  []*x509.Certificate
		bundle *x509bundle.Bundle
		want   string
	}{
		{"whole", good, ca.bundle(), ""},
		{"intermediate without URI", under(func(c *x509.Certificate) { c.URIs = nil }), ca.bundle(), ""},
		{"empty", nil, ca.bundle(), "chain of 0"},
		{"no bundle", good, nil, "no bundle"},
		{"empty bundle", good, x509bundle.New(td), "unknown authority"},
		{"bundle that holds only the leaf", good, x509bundle.FromX509Authorities(td, good[:1]), "unknown authority"},
		{"without its intermediate", good[:1], ca.bundle(), "unknown authority"},
		{"of another CA of the same trust domain", good, other.bundle(), "unknown authority"},
		{"of another trust domain", foreign.identity(spiffeid.RequireFromString("spiffe://example.net/x"), time.Hour).Chain, ca.bundle(), "trust domain is not"},
		{"our ID signed by a foreign CA", foreign.issue(foreign.leaf("spiffe://example.org/x", time.Hour), newKey(t).Public()), ca.bundle(), "must be spiffe://example.org alone"},
		{"signed by a leaf", leafSigned, ca.bundle(), "not a CA"},
		{"longer than is looked at", append(slices.Clone(good[:1]), long...), ca.bundle(), "want 1 to"},
		{"intermediate is no CA", under(func(c *x509.Certificate) { c.IsCA = false; c.KeyUsage = x509.KeyUsageDigitalSignature }), ca.bundle(), "not a CA"},
		{"intermediate without key usage", under(func(c *x509.Certificate) { c.KeyUsage = 0 }), ca.bundle(), "no key usage"},
		{"intermediate that may not sign", under(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }), ca.bundle(), "keyCertSign"},
		{"intermediate with a workload's ID", under(func(c *x509.Certificate) { c.URIs = uri("spiffe://example.org/x") }), ca.bundle(), "alone, or absent"},
		{"intermediate has expired", under(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), ca.bundle(), "expired"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := VerifyChain(c.chain, c.bundle, time.Now())
			if c.want == "" && (err != nil || got != id("/x")) {
				t.Errorf("got %v, %v", got, err)
			}
			if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, %v; want a refusal with %q", got, err, c.want)
			}
		})
	}
}

func TestExpiredIsErrExpired(t *testing.T) {
	ca := newCA(t, td)
	chain := ca.identity(id("/x"), time.Hour).Chain
	if _, err := VerifyChain(chain, ca.bundle(), chain[0].NotAfter); !errors.Is(err, ErrExpired) {
		t.Errorf("got %v, want ErrExpired", err)
	}
}

func FuzzRawURIs(f *testing.F) {
	ext := rawSAN(true, "spiffe://example.org/x")
	f.Add(ext.Value)
	f.Add([]byte{0x30, 0x80})
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &x509.Certificate{Extensions: []pkix.Extension{{Id: oidSubjectAltName, Value: b}}}
		if got, err := leafID(c); err == nil && got.Path() == "" {
			t.Errorf("accepted %v", got)
		}
	})
}
