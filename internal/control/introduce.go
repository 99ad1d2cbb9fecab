package control

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// An Introduction is how to meet an issuer for the first time.
type Introduction struct {
	// Addresses of issuers, host:port, the preferred one first. Required.
	Addresses []string
	// TrustDomain that the issuer must serve. Required.
	TrustDomain spiffeid.TrustDomain
	// Roots are the SHA-256 of certificates, of which the issuer must prove itself
	// by one. Required.
	Roots [][sha256.Size]byte
}

// Introduce fetches the bundle of a trust domain for a machine that knows no
// more of it than the hash of a root. What an issuer says before it has proved
// itself counts only as far as a hash vouches for it; the bundle is what it
// says afterwards, without tainted roots: their keys may be with another, and
// whom a machine meets by them first it would believe in all else.
func Introduce(ctx context.Context, in Introduction) (Bundle, error) {
	var roots []*x509.Certificate
	cfg := ClientConfig{
		Addresses: in.Addresses, TrustDomain: in.TrustDomain, Log: slog.New(slog.DiscardHandler),
		Bundle:   func() []*x509.Certificate { return roots },
		Identity: func() (*tls.Certificate, error) { return nil, nil },
	}
	stranger, err := Dial(cfg)
	if err != nil {
		return Bundle{}, err
	}
	defer stranger.Close()
	stranger.unproved = true
	said, err := stranger.GetBundle(ctx)
	if err != nil {
		return Bundle{}, err
	}
	withdrawn := fmt.Errorf("%w: the root with the expected fingerprint is being withdrawn at %s: no machine begins with it", ErrUntrusted, strings.Join(in.Addresses, ", "))
	tainted := 0
	for _, c := range said.X509 {
		switch {
		case !slices.Contains(in.Roots, sha256.Sum256(c.Raw)):
		case slices.ContainsFunc(said.Tainted, c.Equal):
			tainted++
		default:
			roots = append(roots, c)
		}
	}
	if len(roots) == 0 && tainted > 0 {
		return Bundle{}, withdrawn
	}
	if len(roots) == 0 {
		return Bundle{}, fmt.Errorf("%w: who answers at %s knows no root with the expected fingerprint: it is another issuer, or the root was replaced since",
			ErrUntrusted, strings.Join(in.Addresses, ", "))
	}
	c, err := Dial(cfg)
	if err != nil {
		return Bundle{}, err
	}
	defer c.Close()
	b, err := c.GetBundle(ctx)
	if err != nil {
		return Bundle{}, err
	}
	isTainted := func(c *x509.Certificate) bool { return slices.ContainsFunc(b.Tainted, c.Equal) }
	if slices.ContainsFunc(roots, isTainted) { // one of them proved it
		return Bundle{}, withdrawn
	}
	b.X509 = slices.DeleteFunc(b.X509, isTainted)
	b.Tainted = nil
	return b, nil
}
