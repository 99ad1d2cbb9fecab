package svid

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// maxID is the length in bytes that SPIFFE-ID section 2.3 asks to support.
	maxID = 2048
	// maxChain bounds the work an unverified peer can ask for. A chain has a
	// leaf and one intermediate; federation adds one or two.
	maxChain = 6
	minRSA   = 2048 // bits
)

var (
	oidKeyUsage       = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
)

// VerifyChain checks an X.509-SVID as X509-SVID sections 2 to 5 and RFC 5280
// demand, and gives its identity. The bundle is that of the leaf's trust
// domain. It refuses more than go-spiffe does: a leaf without critical
// KeyUsage, with half an ExtKeyUsage, a root path, an ID over 2048 bytes.
func VerifyChain(certs []*x509.Certificate, b *x509bundle.Bundle, now time.Time) (spiffeid.ID, error) {
	if b == nil {
		return spiffeid.ID{}, errors.New("verify SVID: no bundle")
	}
	got, err := verifyChain(certs, b.TrustDomain(), poolOf(b), now)
	return got.id, err
}

// verifyPeer chooses the bundle by the leaf's trust domain. Of a chain that it
// has verified before it looks at the times alone.
func (st *State) verifyPeer(certs []*x509.Certificate, now time.Time) (spiffeid.ID, error) {
	if st == nil {
		return spiffeid.ID{}, ErrNoIdentity
	}
	if len(certs) == 0 {
		return spiffeid.ID{}, errors.New("verify SVID: peer sent no certificate")
	}
	key := chainKey(certs)
	if got, ok := st.proven.find(key, now); ok {
		return got.id, nil
	}
	id, err := leafID(certs[0])
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("verify SVID: %w", err)
	}
	roots, ok := st.roots[id.TrustDomain()]
	if !ok {
		return spiffeid.ID{}, fmt.Errorf("verify SVID of %s: no bundle for its trust domain", id)
	}
	got, err := verifyChain(certs, id.TrustDomain(), roots, now)
	if err != nil {
		return spiffeid.ID{}, err
	}
	st.proven.add(key, got)
	return got.id, nil
}

func verifyChain(certs []*x509.Certificate, td spiffeid.TrustDomain, roots *x509.CertPool, now time.Time) (proof, error) {
	if len(certs) == 0 || len(certs) > maxChain {
		return proof{}, fmt.Errorf("verify SVID: chain of %d certificates, want 1 to %d", len(certs), maxChain)
	}
	leaf := certs[0]
	id, err := leafID(leaf)
	if err != nil {
		return proof{}, fmt.Errorf("verify SVID: %w", err)
	}
	if id.TrustDomain() != td {
		return proof{}, fmt.Errorf("verify SVID of %s: trust domain is not %s", id, td)
	}
	if err := checkLeaf(leaf); err != nil {
		return proof{}, fmt.Errorf("verify SVID of %s: %w", id, err)
	}
	if err := checkTime(leaf, now); err != nil {
		return proof{}, fmt.Errorf("verify SVID of %s: %w", id, err)
	}
	inter := x509.NewCertPool()
	for i, c := range certs[1:] {
		if err := checkSigner(c, td); err != nil {
			return proof{}, fmt.Errorf("verify SVID of %s: intermediate %d: %w", id, i+1, err)
		}
		inter.AddCert(c)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: inter, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, // checkLeaf is stricter
	})
	if err != nil {
		return proof{}, fmt.Errorf("verify SVID of %s: %w", id, err)
	}
	got := proof{id: id, from: leaf.NotBefore, until: leaf.NotAfter}
	for _, c := range chains[0] {
		if c.NotBefore.After(got.from) {
			got.from = c.NotBefore
		}
		if c.NotAfter.Before(got.until) {
			got.until = c.NotAfter
		}
	}
	return got, nil
}

// leafID reads the one URI of the subject alternative name as it was written:
// crypto/x509 keeps a url.URL, which has already lowered the scheme.
func leafID(c *x509.Certificate) (spiffeid.ID, error) {
	uris, err := URINames(c)
	if err != nil {
		return spiffeid.ID{}, err
	}
	if len(uris) != 1 {
		return spiffeid.ID{}, fmt.Errorf("certificate has %d URI names, want exactly one", len(uris))
	}
	if len(uris[0]) > maxID {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID has %d bytes, want at most %d", len(uris[0]), maxID)
	}
	id, err := spiffeid.FromString(uris[0])
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("URI name is no SPIFFE ID: %w", err)
	}
	if id.Path() == "" {
		return spiffeid.ID{}, fmt.Errorf("%s has no path: a trust domain is not a workload", id)
	}
	return id, nil
}

// URINames gives the URIs of the subject alternative name as they were written:
// crypto/x509 keeps url.URL, which has already mended some faults.
func URINames(c *x509.Certificate) ([]string, error) {
	ext, ok := extension(c, oidSubjectAltName)
	if !ok {
		return nil, nil
	}
	var seq asn1.RawValue
	rest, err := asn1.Unmarshal(ext.Value, &seq)
	if err != nil || len(rest) > 0 || seq.Class != asn1.ClassUniversal || seq.Tag != asn1.TagSequence {
		return nil, errors.New("certificate has a malformed subject alternative name")
	}
	var out []string
	for rest := seq.Bytes; len(rest) > 0; {
		var name asn1.RawValue
		if rest, err = asn1.Unmarshal(rest, &name); err != nil {
			return nil, errors.New("certificate has a malformed subject alternative name")
		}
		if name.Class == asn1.ClassContextSpecific && name.Tag == 6 { // uniformResourceIdentifier
			out = append(out, string(name.Bytes))
		}
	}
	return out, nil
}

func extension(c *x509.Certificate, oid asn1.ObjectIdentifier) (pkix.Extension, bool) {
	for _, e := range c.Extensions {
		if e.Id.Equal(oid) {
			return e, true
		}
	}
	return pkix.Extension{}, false
}

// checkLeaf is X509-SVID sections 4 and 5 for a leaf.
func checkLeaf(c *x509.Certificate) error {
	if c.IsCA {
		return errors.New("certificate is a CA: signing certificates do not authenticate")
	}
	if err := checkKeyUsage(c); err != nil {
		return err
	}
	if c.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return errors.New("key usage lacks digitalSignature")
	}
	if c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return errors.New("key usage has keyCertSign or cRLSign: signing certificates do not authenticate")
	}
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0 &&
		!(slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) && slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth)) {
		return errors.New("extended key usage must hold both serverAuth and clientAuth, or be absent")
	}
	if san, ok := extension(c, oidSubjectAltName); ok && !san.Critical && len(c.Subject.Names) == 0 {
		return errors.New("subject is empty and the subject alternative name is not critical")
	}
	return checkKey(c)
}

// checkSigner is the same for what stands between leaf and bundle.
func checkSigner(c *x509.Certificate, td spiffeid.TrustDomain) error {
	if !c.BasicConstraintsValid || !c.IsCA {
		return errors.New("certificate is not a CA")
	}
	if err := checkKeyUsage(c); err != nil {
		return err
	}
	if c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return errors.New("key usage lacks keyCertSign")
	}
	uris, err := URINames(c)
	if err != nil {
		return err
	}
	if len(uris) > 1 || len(uris) == 1 && uris[0] != td.IDString() {
		return fmt.Errorf("URI name of a signing certificate must be %s alone, or absent", td.IDString())
	}
	return checkKey(c)
}

// checkTime says which way the leaf is out of its time, because the cause may
// as well be the clock here.
func checkTime(c *x509.Certificate, now time.Time) error {
	const form = "2006-01-02 15:04:05 MST"
	if now.Before(c.NotBefore) {
		return fmt.Errorf("certificate is valid from %s, and the clock here says %s: check both clocks",
			c.NotBefore.UTC().Format(form), now.UTC().Format(form))
	}
	if !now.Before(c.NotAfter) {
		return fmt.Errorf("%w (valid until %s, and the clock here says %s)", ErrExpired,
			c.NotAfter.UTC().Format(form), now.UTC().Format(form))
	}
	return nil
}

func checkKeyUsage(c *x509.Certificate) error {
	ku, ok := extension(c, oidKeyUsage)
	if !ok {
		return errors.New("certificate has no key usage")
	}
	if !ku.Critical {
		return errors.New("key usage is not critical")
	}
	return nil
}

func checkKey(c *x509.Certificate) error {
	switch k := c.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if k.Params().BitSize < 256 {
			return fmt.Errorf("ECDSA key of %d bits, want 256 or more", k.Params().BitSize)
		}
	case *rsa.PublicKey:
		if k.N.BitLen() < minRSA {
			return fmt.Errorf("RSA key of %d bits, want %d or more", k.N.BitLen(), minRSA)
		}
	case ed25519.PublicKey:
	default:
		return fmt.Errorf("public key algorithm %s is not supported", c.PublicKeyAlgorithm)
	}
	return nil
}
