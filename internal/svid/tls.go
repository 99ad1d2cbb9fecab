package svid

import (
	"crypto/tls"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ServerTLS gives the settings of a listener that shows the SVID of s and
// demands one of the caller. Every handshake reads s anew. The caller's chain
// and then its identity, by authorize, are checked in VerifyConnection, which
// runs on resumed sessions too; tickets are off besides. A nil authorize
// refuses everybody.
func ServerTLS(s *Source, authorize func(spiffeid.ID) error, alpn ...string) *tls.Config {
	c := base(s, authorize, alpn)
	c.ClientAuth = tls.RequireAnyClientCert
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.Certificate() }
	return c
}

// ClientTLS gives the settings to call the server want, and only it: any other
// identity ends the handshake, whatever its certificate. The zero ID refuses
// every server.
func ClientTLS(s *Source, want spiffeid.ID, alpn ...string) *tls.Config {
	c := base(s, func(id spiffeid.ID) error {
		if want.IsZero() || id != want {
			return fmt.Errorf("server is %s, want %s", id, want)
		}
		return nil
	}, alpn)
	// Names and roots of the public web say nothing here; VerifyConnection
	// does the whole check.
	c.InsecureSkipVerify = true
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return s.Certificate() }
	return c
}

func base(s *Source, authorize func(spiffeid.ID) error, alpn []string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		NextProtos:             alpn,
		// Small records at the start of a transfer help a browser far away,
		// and cost others a header and a tag for each 1.2 KB.
		DynamicRecordSizingDisabled: true,
		CurvePreferences:            s.curves(),
		VerifyConnection: func(cs tls.ConnectionState) error {
			if cs.Version < tls.VersionTLS13 {
				return errors.New("TLS 1.3 is required")
			}
			id, err := s.Current().verifyPeer(cs.PeerCertificates, s.now())
			if err != nil {
				return err
			}
			if err := s.checkRevoked(cs.PeerCertificates[0]); err != nil {
				return fmt.Errorf("peer %s: %w", id, err)
			}
			if authorize == nil {
				return fmt.Errorf("peer %s: nobody is authorized here", id)
			}
			if err := authorize(id); err != nil {
				return fmt.Errorf("peer %s: %w", id, err)
			}
			return nil
		},
	}
}

// Certificate is the own SVID for one handshake; an expired one is an error.
func (s *Source) Certificate() (*tls.Certificate, error) {
	id, err := s.identity()
	if err != nil {
		return nil, err
	}
	c := &tls.Certificate{PrivateKey: id.Key, Leaf: id.Chain[0]}
	for _, x := range id.Chain {
		c.Certificate = append(c.Certificate, x.Raw)
	}
	return c, nil
}

// PeerID names the peer of a connection whose handshake was made with
// ServerTLS or ClientTLS, which have verified its chain. It is an error before
// the handshake.
func PeerID(cs tls.ConnectionState) (spiffeid.ID, error) {
	if !cs.HandshakeComplete || len(cs.PeerCertificates) == 0 {
		return spiffeid.ID{}, errors.New("peer identity: handshake is not complete")
	}
	return leafID(cs.PeerCertificates[0])
}
