package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control"
)

// remoteAdmin connects to the issuer's port for proxies, under an SVID.
func (c *cli) remoteAdmin() (*control.Admin, error) {
	if c.address == "" || c.identity == "" {
		return nil, usage(errors.New("--address and --identity belong together: where the issuer is, and the SVID to show it"))
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(c.identity, "svid.pem"), filepath.Join(c.identity, "key.pem"))
	if err != nil {
		return nil, usage(fmt.Errorf("--identity: %w", err))
	}
	roots, err := readCertificates(filepath.Join(c.identity, "bundle.pem"))
	if err != nil {
		return nil, usage(fmt.Errorf("--identity: %w", err))
	}
	id, err := svidID(pair.Leaf)
	if err != nil {
		return nil, usage(fmt.Errorf("--identity: %s: %w", filepath.Join(c.identity, "svid.pem"), err))
	}
	if now := time.Now(); now.After(pair.Leaf.NotAfter) {
		return nil, usage(fmt.Errorf("--identity: the SVID of %s expired at %s; mint another: sallyport svid mint", id, pair.Leaf.NotAfter.UTC().Format(time.RFC3339)))
	}
	a, err := control.DialAdminAt(control.ClientConfig{
		Addresses: []string{c.address}, TrustDomain: id.TrustDomain(), Log: slog.New(slog.DiscardHandler),
		Bundle:   func() []*x509.Certificate { return roots },
		Identity: func() (*tls.Certificate, error) { return &pair, nil },
	})
	if err != nil {
		return nil, usage(err)
	}
	return a, nil
}

// svidID is the SPIFFE ID of an X.509-SVID.
func svidID(leaf *x509.Certificate) (spiffeid.ID, error) {
	if len(leaf.URIs) != 1 {
		return spiffeid.ID{}, fmt.Errorf("no X.509-SVID: %d URIs in the certificate, want one", len(leaf.URIs))
	}
	return spiffeid.FromURI(leaf.URIs[0])
}
