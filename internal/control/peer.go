package control

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxChain bounds the work that an unverified peer can ask for.
const maxChain = 6

// maxID is the longest SPIFFE ID that must be accepted, bytes (SPIFFE-ID 2.3).
const maxID = 2048

// errOutsideValidity says that only the time is wrong with a certificate.
var errOutsideValidity = errors.New("outside its validity")

// tlsConfig is that of the listener for agents. A client certificate is asked
// for and not required, since a node has none before it attests; one that is
// presented must be good. Sessions are not resumed: a resumed session would
// skip the look at the bundle.
func (s *Server) tlsConfig() *tls.Config {
	base := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2"},
		ClientAuth:             tls.RequestClientCert,
		SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return s.cfg.Authority.ServerCertificate()
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return nil
			}
			_, err := verifyPeer(cs.PeerCertificates, s.cfg.Authority.X509Bundle(), s.cfg.TrustDomain, s.cfg.Now())
			return err
		},
	}
	return base
}

// ownChain is a leaf, an intermediate and a root. An issuer below this one could
// sign any identity, those of agents and operators among them.
const ownChain = 3

// bySelf says that this issuer's intermediate has signed the leaf of a chain, or
// another's beside it under the same root. A root that does not bear the name of
// the trust domain is an upstream authority's: there the chain may be longer,
// and ours is the only one in it that bears the name, since one below does, too.
func bySelf(chain []*x509.Certificate, td spiffeid.TrustDomain) bool {
	ours := func(c *x509.Certificate) bool { return len(c.URIs) == 1 && c.URIs[0].String() == td.IDString() }
	if len(chain) <= ownChain {
		return true
	}
	return !ours(chain[len(chain)-1]) && ours(chain[1]) && !slices.ContainsFunc(chain[2:], ours)
}

// verifyPeer checks a peer's chain as X509-SVID section 5 demands, and more
// strictly than RFC 5280 alone: one URI SAN, a path, no CA bit, KeyUsage present
// with digitalSignature and without the two signing usages.
func verifyPeer(certs, roots []*x509.Certificate, td spiffeid.TrustDomain, now time.Time) (spiffeid.ID, error) {
	if len(certs) == 0 {
		return spiffeid.ID{}, errors.New("peer presented no certificate")
	}
	if len(certs) > maxChain {
		return spiffeid.ID{}, fmt.Errorf("peer presented %d certificates, at most %d are looked at", len(certs), maxChain)
	}
	id, err := leafID(certs[0])
	if err != nil {
		return spiffeid.ID{}, err
	}
	if !id.MemberOf(td) {
		return id, fmt.Errorf("%w: peer is %s, want a member of %s", ErrTrustDomain, id, td)
	}
	opts := x509.VerifyOptions{
		Roots:         x509.NewCertPool(),
		Intermediates: x509.NewCertPool(),
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, c := range roots {
		opts.Roots.AddCert(c)
	}
	for _, c := range certs[1:] {
		opts.Intermediates.AddCert(c)
	}
	chains, err := certs[0].Verify(opts)
	if err == nil && !slices.ContainsFunc(chains, func(c []*x509.Certificate) bool { return bySelf(c, td) }) {
		return id, fmt.Errorf("certificate of %s is from an issuer below this one: such count between proxies, and not here", id)
	}
	if err == nil {
		return id, nil
	}
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		from, to := validity(certs)
		opts.CurrentTime = from.Add(to.Sub(from) / 2)
		if _, again := certs[0].Verify(opts); again == nil {
			return id, fmt.Errorf("certificate of %s is good from %s to %s: %w", id, stamp(from), stamp(to), errOutsideValidity)
		}
	}
	return id, fmt.Errorf("certificate of %s does not chain to the bundle of %s: %w", id, td, err)
}

// leafID reads the one SPIFFE ID of a leaf that may authenticate.
func leafID(leaf *x509.Certificate) (spiffeid.ID, error) {
	switch {
	case len(leaf.URIs) != 1:
		return spiffeid.ID{}, fmt.Errorf("certificate has %d URI names, an X509-SVID has exactly one", len(leaf.URIs))
	case leaf.IsCA:
		return spiffeid.ID{}, errors.New("certificate is a CA's, a CA never authenticates")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return spiffeid.ID{}, errors.New("certificate lacks key usage digitalSignature")
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return spiffeid.ID{}, errors.New("certificate may sign certificates, a leaf must not")
	case !critical(leaf, 15):
		return spiffeid.ID{}, errors.New("certificate's key usage is not critical")
	case len(leaf.Subject.Names) == 0 && !critical(leaf, 17):
		return spiffeid.ID{}, errors.New("certificate has an empty subject and a name that is not critical")
	case len(leaf.URIs[0].String()) > maxID:
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID is longer than %d bytes", maxID)
	}
	if len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) > 0 && !bothUsages(leaf.ExtKeyUsage) {
		return spiffeid.ID{}, errors.New("certificate's extended key usage lacks serverAuth or clientAuth")
	}
	id, err := spiffeid.FromURI(leaf.URIs[0])
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("read SPIFFE ID: %w", err)
	}
	if id.Path() == "" {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID %s has no path, a leaf's must", id)
	}
	return id, nil
}

// critical reports whether c has an extension of id-ce (2.5.29), and it is
// critical: 15 is the key usage, 17 the subject alternative name.
func critical(c *x509.Certificate, last int) bool {
	return slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool {
		return e.Critical && e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, last})
	})
}

func bothUsages(have []x509.ExtKeyUsage) bool {
	var server, client bool
	for _, u := range have {
		server = server || u == x509.ExtKeyUsageServerAuth
		client = client || u == x509.ExtKeyUsageClientAuth
	}
	return server && client
}

// validity is the time in which every certificate presented is good.
func validity(certs []*x509.Certificate) (from, to time.Time) {
	from, to = certs[0].NotBefore, certs[0].NotAfter
	for _, c := range certs[1:] {
		if c.NotBefore.After(from) {
			from = c.NotBefore
		}
		if c.NotAfter.Before(to) {
			to = c.NotAfter
		}
	}
	return from, to
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
