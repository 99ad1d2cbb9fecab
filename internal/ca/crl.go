package ca

import (
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/smallstep/certificates/cas/apiv1"
)

// A Revoked is a certificate that is not to be trusted before its end.
type Revoked struct {
	Serial *big.Int
	At     time.Time
}

// CRL signs a list of revoked certificates (RFC 5280 section 5) in DER. It is
// for those outside of the mesh who ask for one: proxies are told at once and
// over their own stream. The list is of the intermediate in use, so it speaks
// of leaves under that one, and is good for life.
func (c *CA) CRL(revoked []Revoked, life time.Duration) ([]byte, error) {
	now := c.cfg.Now()
	s, err := c.active(now)
	if err != nil {
		return nil, fmt.Errorf("sign CRL: %w", err)
	}
	holder, ok := s.service.(apiv1.CertificateAuthoritySigner)
	if !ok {
		return nil, errors.New("sign CRL: the authority signs certificates only")
	}
	signer, err := holder.GetSigner()
	if err != nil {
		return nil, fmt.Errorf("sign CRL: %w", err)
	}
	list := &x509.RevocationList{
		// Numbers must grow (section 5.2.3), over restarts too.
		Number:     big.NewInt(now.UnixNano()),
		ThisUpdate: now.Add(-backdate), NextUpdate: now.Add(life),
		SignatureAlgorithm: x509.ECDSAWithSHA256,
	}
	for _, r := range revoked {
		if r.Serial == nil || r.Serial.Sign() <= 0 {
			return nil, errors.New("sign CRL: a serial number is not above zero")
		}
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: r.Serial, RevocationTime: r.At.UTC()})
	}
	slices.SortFunc(list.RevokedCertificateEntries, func(a, b x509.RevocationListEntry) int { return a.SerialNumber.Cmp(b.SerialNumber) })
	der, err := x509.CreateRevocationList(rand.Reader, list, s.intermediate, signer)
	if err != nil {
		return nil, fmt.Errorf("sign CRL: %w", err)
	}
	return der, nil
}
