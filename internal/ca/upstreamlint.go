package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxAbove is how many authorities may stand between our intermediate and the
// root: a verifier looks at six certificates, with a leaf and an issuer below
// ours among them.
const maxAbove = 3

// tolerated are extensions which say where to learn more, and nothing of what
// is allowed: the places of CRLs and issuers, policies, and the provisioner of
// step-ca.
var tolerated = []asn1.ObjectIdentifier{
	{1, 3, 6, 1, 5, 5, 7, 1, 1},
	{2, 5, 29, 31},
	{2, 5, 29, 32},
	{1, 3, 6, 1, 4, 1, 37476, 9000, 64, 1},
}

// lintUpstream checks what an upstream authority sent: our intermediate, those
// above it and the root. It must be what we would have signed, a leaf under it
// must verify now, and it must last beyond the time given.
func lintUpstream(chain []*x509.Certificate, td spiffeid.TrustDomain, key crypto.PublicKey, now, until time.Time) error {
	cert, above, root := chain[0], chain[1:len(chain)-1], chain[len(chain)-1]
	if len(above) > maxAbove {
		return fmt.Errorf("%d authorities stand between it and the root, at most %d may", len(above), maxAbove)
	}
	errs := []error{lintCA(plain(cert), td, 0), lintUpstreamRoot(root), failed([]check{
		{strong(cert.SignatureAlgorithm), fmt.Sprintf("it is signed with %s", cert.SignatureAlgorithm)},
		{samePublicKey(cert.PublicKey, key), "its public key is not the one in the CSR"},
		{!now.Before(cert.NotBefore), "it begins at " + utc(cert.NotBefore) + ", and the clock says " + utc(now)},
		{cert.NotAfter.After(until), "it ends at " + utc(cert.NotAfter) + ", and the clock says " + utc(now)},
	})}
	for i, x := range above {
		if err := lintAbove(x); err != nil {
			errs = append(errs, fmt.Errorf("authority %d above it, %q: %w", i+1, x.Subject, err))
		}
	}
	for i, x := range chain[1:] {
		if chain[i].NotAfter.After(x.NotAfter) {
			errs = append(errs, fmt.Errorf("%q ends at %s, after its issuer at %s", chain[i].Subject, utc(chain[i].NotAfter), utc(x.NotAfter)))
		}
		if err := chain[i].CheckSignatureFrom(x); err != nil {
			errs = append(errs, fmt.Errorf("%q is not signed by the next in the chain: %w", chain[i].Subject, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return tryLeaf(chain, td, now)
}

// plain is a certificate without what an upstream authority may say and we never
// do: tryLeaf finds out what name constraints mean.
func plain(cert *x509.Certificate) *x509.Certificate {
	bare := *cert
	bare.SignatureAlgorithm = x509.ECDSAWithSHA256
	bare.Extensions = slices.DeleteFunc(slices.Clone(cert.Extensions), func(e pkix.Extension) bool {
		return e.Id.Equal(oidNameConstraints) || !e.Critical && slices.ContainsFunc(tolerated, e.Id.Equal)
	})
	return &bare
}

func strong(a x509.SignatureAlgorithm) bool {
	switch a {
	case x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512, x509.PureEd25519,
		x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
		x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS:
		return true
	}
	return false
}

// lintAbove demands of an authority that is not ours what every proxy does. It
// must not bear our name: that is how its leaves are told from ours.
func lintAbove(cert *x509.Certificate) error {
	usage := slices.ContainsFunc(cert.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidKeyUsage) && e.Critical })
	err := checkKey(cert.PublicKey)
	return errors.Join(err, failed([]check{
		{cert.BasicConstraintsValid && cert.IsCA, "it does not say cA"},
		{usage && cert.KeyUsage&x509.KeyUsageCertSign != 0, "its key usage is not critical with keyCertSign"},
		{len(cert.URIs) == 0, "it has a URI SAN"},
		{len(cert.UnhandledCriticalExtensions) == 0, "it has an unknown critical extension"},
		{strong(cert.SignatureAlgorithm), fmt.Sprintf("it is signed with %s", cert.SignatureAlgorithm)},
	}))
}

func lintUpstreamRoot(root *x509.Certificate) error {
	err := lintAbove(root)
	if err == nil {
		err = root.CheckSignatureFrom(root)
	}
	if err != nil {
		return fmt.Errorf("root %q: %w", root.Subject, err)
	}
	return nil
}

// tryLeaf verifies an SVID under the chain, signed by a key that is thrown away:
// path lengths, name constraints and usages then mean what they would to others.
func tryLeaf(chain []*x509.Certificate, td spiffeid.TrustDomain, now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make key: %w", err)
	}
	issuer := *chain[0]
	issuer.PublicKey, issuer.PublicKeyAlgorithm = key.Public(), x509.ECDSA
	id, err := spiffeid.FromPath(td, "/sallyport/try")
	if err != nil {
		return err
	}
	raw, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), URIs: []*url.URL{id.URL()}, NotBefore: now.Add(-backdate), NotAfter: now.Add(backdate),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}, &issuer, key.Public(), key)
	if err != nil {
		return fmt.Errorf("try a leaf: %w", err)
	}
	leaf, err := x509.ParseCertificate(raw)
	if err != nil {
		return fmt.Errorf("try a leaf: %w", err)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}}
		opts.Roots.AddCert(chain[len(chain)-1])
		opts.Intermediates.AddCert(&issuer)
		for _, x := range chain[1 : len(chain)-1] {
			opts.Intermediates.AddCert(x)
		}
		if _, err := leaf.Verify(opts); err != nil {
			return fmt.Errorf("an SVID under it would not verify: %w", err)
		}
	}
	return nil
}
