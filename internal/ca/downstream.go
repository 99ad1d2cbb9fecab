package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ErrNoDepth says that the root was made before issuers could stand below this
// one: its path length leaves no room for one more.
var ErrNoDepth = errors.New("the root of this trust domain permits no issuer below this one")

// A DownstreamRequest asks for the signing certificate of an issuer of the same
// trust domain that stands below this one. Whether it may have one was decided
// by its entry.
type DownstreamRequest struct {
	// ID is who asks, for the audit. It does not stand in the certificate.
	ID spiffeid.ID
	// PublicKey is EC P-256 or P-384, Ed25519, or RSA of 2048 to 4096 bits.
	PublicKey crypto.PublicKey
	// TTL is the life from now; 0 means Config.IntermediateTTL. It never
	// outlives the intermediate.
	TTL time.Duration
}

// DraftDownstream is Prepare for a downstream issuer. Its certificate signs
// leaves of this trust domain alone: the path length forbids one more issuer,
// the name constraints another trust domain, and the URI is the trust domain.
func (c *CA) DraftDownstream(req DownstreamRequest) (Draft, error) {
	now := c.cfg.Now()
	s, err := c.active(now)
	if err != nil {
		return Draft{}, err
	}
	if s.intermediate.MaxPathLen < 1 {
		return Draft{}, ErrNoDepth
	}
	der, err := encodeKey(req.PublicKey)
	if err == nil {
		err = c.check(X509Request{ID: req.ID, PublicKey: req.PublicKey, TTL: req.TTL}, s, der)
	}
	if err != nil {
		return Draft{}, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	ttl := req.TTL
	if ttl == 0 {
		ttl = c.cfg.IntermediateTTL
	}
	end := now.Add(ttl)
	if end.After(s.intermediate.NotAfter) {
		end = s.intermediate.NotAfter
	}
	template, err := c.caTemplate("downstream", 0, now, end)
	if err != nil {
		return Draft{}, err
	}
	// A key of our own: the caller keeps a pointer to the one it gave.
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return Draft{}, fmt.Errorf("%w: decode public key: %w", ErrRefused, err)
	}
	ski := sha256.Sum256(der)
	template.PublicKey, template.SubjectKeyId = key, ski[:20]
	if name := c.cfg.TrustDomain.Name(); constrainable(name) {
		template.PermittedURIDomains, template.PermittedDNSDomainsCritical = []string{name}, true
	}
	d := &draft{ca: c, with: s, made: now, kind: "x509 downstream CA", template: template,
		want: want{id: req.ID, key: der, issuer: s.intermediate}}
	if d.linted, d.cert, err = c.lintDownstream(d); err != nil {
		return Draft{}, fmt.Errorf("%w: the certificate would not conform: %w", ErrRefused, err)
	}
	return Draft{d}, nil
}

// constrainable reports whether a URI name constraint can name the trust
// domain: RFC 5280 section 4.2.1.10 has no such constraint for addresses, and
// verifiers refuse every URI with one.
func constrainable(td string) bool {
	_, err := netip.ParseAddr(td)
	return err != nil
}

// lintDownstream lints the bytes that are to be signed, as lintDraft does.
func (c *CA) lintDownstream(d *draft) ([]byte, *x509.Certificate, error) {
	tbs, err := d.encodeCA()
	if err != nil {
		return nil, nil, err
	}
	cert, err := unsigned(tbs)
	if err != nil {
		return nil, nil, err
	}
	bare := *cert
	bare.Extensions = slices.Clone(cert.Extensions)
	var critical bool
	for i, e := range bare.Extensions {
		if e.Id.Equal(oidNameConstraints) {
			critical = e.Critical
			bare.Extensions = slices.Delete(bare.Extensions, i, i+1)
			break
		}
	}
	name, issuer := c.cfg.TrustDomain.Name(), d.want.issuer
	permits := len(cert.PermittedURIDomains) == 1 && cert.PermittedURIDomains[0] == name && critical
	return tbs, cert, errors.Join(lintCA(&bare, c.cfg.TrustDomain, 0), failed([]check{
		{cert.MaxPathLen == 0 && cert.MaxPathLenZero, "it may sign for another issuer"},
		{permits || !constrainable(name), "its name constraints are not this trust domain, critical"},
		{bytes.Equal(cert.AuthorityKeyId, issuer.SubjectKeyId), "its authority key ID is not that of the issuer"},
		{bytes.Equal(cert.RawIssuer, issuer.RawSubject), "its issuer is not the intermediate"},
		{!cert.NotAfter.After(issuer.NotAfter), "it outlives the intermediate"},
		{bytes.Equal(cert.RawSubjectPublicKeyInfo, d.want.key), "its public key is not the one asked for"},
	}))
}

// encodeCA writes what of the draft is signed, by a signature of a key that is
// thrown away.
func (d *draft) encodeCA() ([]byte, error) {
	throwAway, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	parent := *d.want.issuer
	parent.PublicKey = throwAway.Public()
	raw, err := x509.CreateCertificate(rand.Reader, d.template, &parent, d.template.PublicKey, throwAway)
	if err != nil {
		return nil, fmt.Errorf("encode certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(raw)
	if err != nil {
		return nil, fmt.Errorf("encode certificate: %w", err)
	}
	return cert.RawTBSCertificate, nil
}
