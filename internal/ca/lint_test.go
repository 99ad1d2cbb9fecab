package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/smallstep/certificates/cas/apiv1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestLintOfLeaves changes one thing in a good template and expects the linter
// to name it. The numbers are those of the list of demands of the SPIFFE
// specifications.
func TestLintOfLeaves(t *testing.T) {
	c := open(t, config(t))
	uri := func(s ...string) func(*x509.Certificate) {
		return func(x *x509.Certificate) {
			x.URIs = nil
			for _, text := range s {
				u, err := url.Parse(text)
				if err != nil {
					t.Fatal(err)
				}
				x.URIs = append(x.URIs, u)
			}
		}
	}
	extension := func(id asn1.ObjectIdentifier, critical bool, value any) func(*x509.Certificate) {
		der := must1(asn1.Marshal(value))
		return func(x *x509.Certificate) {
			x.ExtraExtensions = append(x.ExtraExtensions, pkix.Extension{Id: id, Critical: critical, Value: der})
		}
	}
	digitalSignature := asn1.BitString{Bytes: []byte{0x80}, BitLength: 1}
	for name, tc := range map[string]struct {
		change func(*x509.Certificate)
		want   string // "" for none
	}{
		"a good one":                   {func(*x509.Certificate) {}, ""},
		"5: the host is in upper case": {uri("spiffe://CORP.example/ns/shop/sa/web"), "SPIFFE ID"},
		"2: a query":                   {uri(web.String() + "?a=b"), "no SPIFFE ID"},
		"3: a fragment":                {uri(web.String() + "#a"), "no SPIFFE ID"},
		"4: a port":                    {uri("spiffe://corp.example:1/ns/shop/sa/web"), "no SPIFFE ID"},
		"9: percent-encoding":          {uri("spiffe://corp.example/ns/shop/sa/w%65b"), "SPIFFE ID"},
		"10: an empty segment":         {uri("spiffe://corp.example//web"), "no SPIFFE ID"},
		"11: a trailing slash":         {uri(web.String() + "/"), "no SPIFFE ID"},
		"17: no URI":                   {uri(), "0 URI SANs"},
		"18: two URIs":                 {uri(web.String(), "https://corp.example"), "2 URI SANs"},
		"18: the same URI twice":       {uri(web.String(), web.String()), "2 URI SANs"},
		"19 and 33: a root path":       {uri("spiffe://corp.example"), "no path"},
		"32: another scheme":           {uri("https://corp.example/ns/shop/sa/web"), "no SPIFFE ID"},
		"another identity":             {uri("spiffe://corp.example/ns/shop/sa/payment"), "not the one asked for"},
		"20: an empty subject, SAN not critical": {func(x *x509.Certificate) {
			raw := asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(web.String())}
			x.URIs = nil
			extension(oidSAN, false, []asn1.RawValue{raw})(x)
		}, "SAN is not critical"},
		"23 and 30: a leaf that is a CA":       {func(x *x509.Certificate) { x.IsCA, x.KeyUsage = true, x.KeyUsage|x509.KeyUsageCertSign }, "a leaf says cA"},
		"23: no basic constraints":             {func(x *x509.Certificate) { x.BasicConstraintsValid = false }, "no basic constraints"},
		"24: no key usage":                     {func(x *x509.Certificate) { x.KeyUsage = 0 }, "no key usage"},
		"24: a key usage that is not critical": {func(x *x509.Certificate) { x.KeyUsage = 0; extension(oidKeyUsage, false, digitalSignature)(x) }, "key usage is not critical"},
		"26: no digitalSignature":              {func(x *x509.Certificate) { x.KeyUsage = x509.KeyUsageKeyEncipherment }, "digitalSignature"},
		"27 and 31: keyCertSign":               {func(x *x509.Certificate) { x.KeyUsage |= x509.KeyUsageCertSign }, "digitalSignature alone"},
		"27 and 31: cRLSign":                   {func(x *x509.Certificate) { x.KeyUsage |= x509.KeyUsageCRLSign }, "digitalSignature alone"},
		"28: no serverAuth":                    {func(x *x509.Certificate) { x.ExtKeyUsage = x.ExtKeyUsage[1:] }, "serverAuth and clientAuth"},
		"28: no clientAuth":                    {func(x *x509.Certificate) { x.ExtKeyUsage = x.ExtKeyUsage[:1] }, "serverAuth and clientAuth"},
		"28: codeSigning beside them":          {func(x *x509.Certificate) { x.ExtKeyUsage = append(x.ExtKeyUsage, x509.ExtKeyUsageCodeSigning) }, "serverAuth and clientAuth"},
		"28: serverAuth twice":                 {func(x *x509.Certificate) { x.ExtKeyUsage[1] = x.ExtKeyUsage[0] }, "serverAuth and clientAuth"},
		"28: an unknown usage":                 {func(x *x509.Certificate) { x.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}} }, "serverAuth and clientAuth"},
		"29: an unknown critical extension":    {extension(asn1.ObjectIdentifier{1, 2, 3, 4}, true, 1), "unknown critical extension"},
		"an extension that we never set":       {extension(asn1.ObjectIdentifier{1, 2, 3, 4}, false, 1), "which we never set"},
		"a DNS name that nobody asked for":     {func(x *x509.Certificate) { x.DNSNames = []string{"evil.example"} }, "DNS names"},
		"an address":                           {func(x *x509.Certificate) { x.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)} }, "other than URI and DNS"},
		"a mail address":                       {func(x *x509.Certificate) { x.EmailAddresses = []string{"a@corp.example"} }, "other than URI and DNS"},
		"a small serial number":                {func(x *x509.Certificate) { x.SerialNumber = big.NewInt(1) }, "serial number"},
		"dates in the wrong order":             {func(x *x509.Certificate) { x.NotBefore = x.NotAfter.Add(time.Second) }, "ends before it begins"},
		"a life beyond the intermediate":       {func(x *x509.Certificate) { x.NotAfter = c.Status().IntermediateExpires.Add(time.Second) }, "outlives"},
		"a name constraint":                    {func(x *x509.Certificate) { x.PermittedDNSDomains = []string{"a"} }, "which we never set"},
	} {
		t.Run(name, func(t *testing.T) {
			d := must1(c.Prepare(X509Request{ID: web, PublicKey: anyKey.Public()})).d
			tc.change(d.template)
			err := lintLeaf(byStdlib(t, d), d.want)
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("got %v, want a word on %q", err, tc.want)
			}
		})
	}
}

// byStdlib is the draft as crypto/x509 encodes its template, signed by a key
// that is not the issuer's.
func byStdlib(t testing.TB, d *draft) *x509.Certificate {
	t.Helper()
	key := newKey()
	issuer, template := *d.want.issuer, *d.template
	issuer.PublicKey = key.Public()
	raw, err := x509.CreateCertificate(rand.Reader, &template, &issuer, d.template.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(raw)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestLintNamesEveryFault(t *testing.T) {
	c := open(t, config(t))
	d := must1(c.Prepare(X509Request{ID: web, PublicKey: anyKey.Public()})).d
	d.template.KeyUsage |= x509.KeyUsageCRLSign
	d.template.DNSNames = []string{"evil.example"}
	err := lintLeaf(byStdlib(t, d), d.want)
	if err == nil || !strings.Contains(err.Error(), "digitalSignature") || !strings.Contains(err.Error(), "DNS names") {
		t.Errorf("got %v", err)
	}
}

func TestLintComparesWithTheIssuerAndTheKey(t *testing.T) {
	c, other := open(t, config(t)), open(t, config(t))
	leaf := issue(t, other, X509Request{ID: web, PublicKey: anyKey.Public()})[0]
	w := want{id: web, key: publicDER(newKey().Public()), issuer: c.current.Load().intermediate}
	err := lintLeaf(leaf, w)
	for _, text := range []string{"authority key ID", "not the intermediate", "public key"} {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, want a word on %q", err, text)
		}
	}
}

// TestLintOfAuthorities does the same for roots and intermediates.
func TestLintOfAuthorities(t *testing.T) {
	c := open(t, config(t))
	for name, tc := range map[string]struct {
		change func(*x509.Certificate)
		want   string
	}{
		"a good one":            {func(*x509.Certificate) {}, ""},
		"21: an ID with a path": {func(x *x509.Certificate) { x.URIs = []*url.URL{web.URL()} }, "its URI SAN"},
		"21: no ID":             {func(x *x509.Certificate) { x.URIs = nil }, "its URI SAN"},
		"another trust domain": {func(x *x509.Certificate) {
			x.URIs = []*url.URL{spiffeid.RequireTrustDomainFromString("other.example").ID().URL()}
		}, "its URI SAN"},
		"23: no CA":             {func(x *x509.Certificate) { x.IsCA, x.MaxPathLen, x.MaxPathLenZero = false, 0, false }, "does not say cA"},
		"24: no key usage":      {func(x *x509.Certificate) { x.KeyUsage = 0 }, "no key usage"},
		"25: no keyCertSign":    {func(x *x509.Certificate) { x.KeyUsage = x509.KeyUsageCRLSign }, "keyCertSign"},
		"a right to sign more":  {func(x *x509.Certificate) { x.KeyUsage |= x509.KeyUsageDigitalSignature }, "keyCertSign"},
		"an extended key usage": {func(x *x509.Certificate) { x.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, "extended key usage"},
		"a longer path":         {func(x *x509.Certificate) { x.MaxPathLen, x.MaxPathLenZero = 2, false }, "path length"},
		"no bound of the path":  {func(x *x509.Certificate) { x.MaxPathLen, x.MaxPathLenZero = -1, false }, "path length"},
		"a DNS name":            {func(x *x509.Certificate) { x.DNSNames = []string{"a"} }, "DNS names"},
		"an empty subject":      {func(x *x509.Certificate) { x.Subject = pkix.Name{} }, "subject is empty"},
	} {
		t.Run(name, func(t *testing.T) {
			now := time.Now()
			template := must1(c.caTemplate("intermediate", 0, now, now.Add(time.Hour)))
			tc.change(template)
			key := newKey()
			if template.SubjectKeyId == nil {
				template.SubjectKeyId = []byte("01234567890123456789")
			}
			cert := must1(x509.ParseCertificate(must1(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))))
			err := lintCA(cert, td, 0)
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("got %v, want a word on %q", err, tc.want)
			}
		})
	}
	now := time.Now()
	template := must1(c.caTemplate("intermediate", 0, now, now.Add(time.Hour)))
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SignatureAlgorithm = x509.PureEd25519
	cert := must1(x509.ParseCertificate(must1(x509.CreateCertificate(rand.Reader, template, template, pub, key))))
	if err := lintCA(cert, td, 0); err == nil || !strings.Contains(err.Error(), "its signature is not ECDSA") {
		t.Errorf("an Ed25519 signature: %v", err)
	}
}

// keepsKey is a service that signs but does not hand out its key.
type keepsKey struct {
	apiv1.CertificateAuthorityService
}

// forges is a service that signs something else.
type forges struct {
	apiv1.CertificateAuthorityService
}

func (f forges) CreateCertificate(r *apiv1.CreateCertificateRequest) (*apiv1.CreateCertificateResponse, error) {
	r.Template.DNSNames = []string{"evil.example"}
	return f.CertificateAuthorityService.CreateCertificate(r)
}

// slips signs with a key that is not the intermediate's.
type slips struct {
	apiv1.CertificateAuthoritySigner
	apiv1.CertificateAuthorityService
}

func (slips) GetSigner() (crypto.Signer, error) { return newKey(), nil }

// TestWhatIsSignedIsWhatWasLinted compares the bytes, for both ways to sign.
func TestWhatIsSignedIsWhatWasLinted(t *testing.T) {
	c := open(t, config(t))
	own := c.current.Load().service
	for name, service := range map[string]apiv1.CertificateAuthorityService{"the built-in service": own, "a service that keeps its key": keepsKey{own}} {
		d := must1(c.Prepare(X509Request{ID: web, PublicKey: anyKey.Public(), DNSNames: []string{"web.corp.example"}}))
		d.d.with.service = service
		linted := must1(unsigned(d.d.linted))
		chain, err := c.Sign(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		if string(chain[0].RawTBSCertificate) != string(linted.RawTBSCertificate) {
			t.Errorf("%s: the bytes differ", name)
		}
		// What is handed out without being read says what a reader finds in it.
		if read := must1(x509.ParseCertificate(chain[0].Raw)); !reflect.DeepEqual(read, chain[0]) {
			t.Errorf("%s: it is read as\n%+v, handed out as\n%+v", name, read, chain[0])
		}
		if err := chain[0].CheckSignatureFrom(chain[1]); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if linted.CheckSignatureFrom(chain[1]) == nil {
			t.Errorf("%s: what the linter saw is valid", name)
		}
	}
	d := must1(c.Prepare(X509Request{ID: web, PublicKey: anyKey.Public()}))
	d.d.with.service = forges{own}
	if chain, err := c.Sign(t.Context(), d); err == nil || chain != nil || !strings.Contains(err.Error(), "not the one drafted") {
		t.Errorf("a service that signs something else: %v", err)
	}
	d = must1(c.Prepare(X509Request{ID: web, PublicKey: anyKey.Public()}))
	d.d.with.service = slips{own.(apiv1.CertificateAuthoritySigner), own}
	if chain, err := c.Sign(t.Context(), d); err == nil || chain != nil || !strings.Contains(err.Error(), "not that of the intermediate") {
		t.Errorf("a service whose key is another: %v", err)
	}
	if got := c.cfg.Audit.(*records).reasons(); got != "intent done intent done intent failed intent failed" {
		t.Errorf("audit has %s", got)
	}
}

func TestCheckKeyOnOtherCurves(t *testing.T) {
	if err := checkKey(must1(ecdsa.GenerateKey(elliptic.P224(), rand.Reader)).Public()); err == nil {
		t.Error("P-224 was accepted")
	}
}
