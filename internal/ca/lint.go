package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The object identifiers of the extensions that our certificates may carry.
var (
	oidSKI              = asn1.ObjectIdentifier{2, 5, 29, 14}
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidSAN              = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidNameConstraints  = asn1.ObjectIdentifier{2, 5, 29, 30}
	oidAKI              = asn1.ObjectIdentifier{2, 5, 29, 35}
	oidEKU              = asn1.ObjectIdentifier{2, 5, 29, 37}
)

// want is what a leaf must say, apart from what all leaves must say.
type want struct {
	id     spiffeid.ID
	key    []byte // PKIX
	dns    []string
	issuer *x509.Certificate
}

// A check is one demand of a specification.
type check struct {
	ok   bool
	text string
}

func failed(checks []check) error {
	var errs []error
	for _, c := range checks {
		if !c.ok {
			errs = append(errs, errors.New(c.text))
		}
	}
	return errors.Join(errs...)
}

// lintLeaf checks a leaf against X509-SVID sections 2 to 5 and appendix A and
// RFC 5280 section 4, and reports every fault. It does not check the
// signature.
func lintLeaf(cert *x509.Certificate, w want) error {
	checks := append(lintAny(cert),
		check{slices.Equal(cert.DNSNames, w.dns), "its DNS names are not those asked for"},
		check{!cert.IsCA, "a leaf says cA"},
		check{cert.MaxPathLen <= 0 && !cert.MaxPathLenZero, "a leaf has a path length"},
		check{cert.KeyUsage == x509.KeyUsageDigitalSignature, "its key usage is not digitalSignature alone"},
		check{len(cert.ExtKeyUsage) == 2 && slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageServerAuth) &&
			slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageClientAuth) && len(cert.UnknownExtKeyUsage) == 0,
			"its extended key usage is not serverAuth and clientAuth"},
		check{len(cert.Subject.Names) > 0 || criticalSAN(cert), "its subject is empty and the SAN is not critical"},
		check{len(cert.AuthorityKeyId) > 0 && bytes.Equal(cert.AuthorityKeyId, w.issuer.SubjectKeyId), "its authority key ID is not that of the issuer"},
		check{bytes.Equal(cert.RawIssuer, w.issuer.RawSubject), "its issuer is not the intermediate"},
		check{!cert.NotAfter.After(w.issuer.NotAfter), "it outlives the intermediate"},
		check{bytes.Equal(cert.RawSubjectPublicKeyInfo, w.key), "its public key is not the one asked for"},
	)
	if len(cert.URIs) != 1 {
		checks = append(checks, check{false, fmt.Sprintf("it has %d URI SANs, want exactly one", len(cert.URIs))})
	} else if id, err := spiffeid.FromURI(cert.URIs[0]); err != nil {
		checks = append(checks, check{false, fmt.Sprintf("its URI SAN is no SPIFFE ID: %v", err)})
	} else {
		checks = append(checks,
			check{id == w.id && cert.URIs[0].String() == w.id.String(), "its SPIFFE ID is not the one asked for"},
			check{id.Path() != "", "its SPIFFE ID has no path"},
		)
	}
	if err := checkKey(cert.PublicKey); err != nil {
		checks = append(checks, check{false, err.Error()})
	}
	return failed(checks)
}

// lintCA checks a root or an intermediate. Those made before issuers could
// stand below this one have the path length given, others one more.
func lintCA(cert *x509.Certificate, td spiffeid.TrustDomain, pathLen int) error {
	checks := append(lintAny(cert),
		check{cert.IsCA, "it does not say cA"},
		check{cert.MaxPathLen == pathLen || cert.MaxPathLen == pathLen+1, fmt.Sprintf("its path length is %d, want %d or %d", cert.MaxPathLen, pathLen, pathLen+1)},
		check{cert.KeyUsage == x509.KeyUsageCertSign|x509.KeyUsageCRLSign, "its key usage is not keyCertSign and cRLSign"},
		check{len(cert.ExtKeyUsage) == 0 && len(cert.UnknownExtKeyUsage) == 0, "it has an extended key usage"},
		check{len(cert.DNSNames) == 0, "it has DNS names"},
		check{len(cert.Subject.Names) > 0, "its subject is empty"},
		check{len(cert.URIs) == 1 && cert.URIs[0].String() == td.IDString(), "its URI SAN is not " + td.IDString() + " alone"},
	)
	return failed(checks)
}

// lintAny holds what every certificate of ours must be.
func lintAny(cert *x509.Certificate) []check {
	checks := []check{
		{cert.Version == 3, "it is not of version 3"},
		{cert.SerialNumber != nil && cert.SerialNumber.Sign() > 0 && cert.SerialNumber.BitLen() > 64 && cert.SerialNumber.BitLen() <= 159,
			"its serial number is not random enough or too long"},
		{cert.NotBefore.Before(cert.NotAfter), "it ends before it begins"},
		{cert.BasicConstraintsValid, "it has no basic constraints"},
		{len(cert.EmailAddresses) == 0 && len(cert.IPAddresses) == 0, "it has SANs other than URI and DNS"},
		{len(cert.SubjectKeyId) > 0, "it has no subject key ID"},
		{len(cert.UnhandledCriticalExtensions) == 0, "it has an unknown critical extension"},
		{cert.SignatureAlgorithm == x509.ECDSAWithSHA256 || cert.SignatureAlgorithm == x509.ECDSAWithSHA384, "its signature is not ECDSA with SHA-256 or SHA-384"},
	}
	usage := false
	for _, e := range cert.Extensions {
		switch {
		case e.Id.Equal(oidKeyUsage):
			usage = true
			checks = append(checks, check{e.Critical, "its key usage is not critical"})
		case e.Id.Equal(oidBasicConstraints):
			checks = append(checks, check{e.Critical, "its basic constraints are not critical"})
		case e.Id.Equal(oidSAN), e.Id.Equal(oidSKI), e.Id.Equal(oidAKI), e.Id.Equal(oidEKU):
		default:
			checks = append(checks, check{false, "it has the extension " + e.Id.String() + ", which we never set"})
		}
	}
	return append(checks, check{usage, "it has no key usage"})
}

func criticalSAN(cert *x509.Certificate) bool {
	return slices.ContainsFunc(cert.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidSAN) && e.Critical })
}

// checkKey accepts EC P-256 and P-384, Ed25519, and RSA of 2048 to 4096 bits.
// Larger ones cost every verifier more than they give.
func checkKey(key crypto.PublicKey) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k == nil || k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return errors.New("its EC key is not on P-256 or P-384")
		}
		//lint:ignore SA1019 ECDH panics on a key that has no coordinates
		if k.X == nil || k.Y == nil {
			return errors.New("its EC key is not a point of the curve")
		}
		if _, err := k.ECDH(); err != nil {
			return errors.New("its EC key is not a point of the curve")
		}
	case ed25519.PublicKey:
		if len(k) != ed25519.PublicKeySize {
			return errors.New("its Ed25519 key has the wrong length")
		}
	case *rsa.PublicKey:
		if k == nil || k.N == nil || k.N.BitLen() < 2048 || k.N.BitLen() > 4096 || k.N.Bit(0) == 0 {
			return errors.New("its RSA key is not of 2048 to 4096 bits")
		}
		if k.E != 65537 {
			return errors.New("its RSA key has an exponent other than 65537")
		}
	default:
		return fmt.Errorf("its key is a %T, want EC P-256 or P-384, Ed25519 or RSA", key)
	}
	return nil
}

// checkDNS accepts what RFC 1123 calls a host name, in lower case: no
// wildcard, no address, no final dot.
func checkDNS(name string) error {
	if len(name) == 0 || len(name) > 253 {
		return fmt.Errorf("DNS name of %d bytes, want 1 to 253", len(name))
	}
	numeric := false
	for label := range strings.SplitSeq(name, ".") {
		if len(label) == 0 || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("DNS name %q has a label that is empty, too long or begins or ends with a dash", name)
		}
		numeric = true
		for i := range len(label) {
			b := label[i]
			digit := b >= '0' && b <= '9'
			if !digit && !(b >= 'a' && b <= 'z') && b != '-' {
				return fmt.Errorf("DNS name %q has the byte %q, want lower-case letters, digits and dashes", name, b)
			}
			numeric = numeric && digit
		}
	}
	if numeric {
		return fmt.Errorf("DNS name %q looks like an address", name)
	}
	return nil
}
