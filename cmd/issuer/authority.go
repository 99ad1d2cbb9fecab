package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/ca"
	"sallyport/internal/control"
	"sallyport/internal/registry"
)

// authority is the CA as the control server sees it.
type authority struct {
	ca       *ca.CA
	server   *ca.Server
	agentTTL time.Duration
	// others returns the JWT keys of all issuers that share the store.
	others func() []registry.Key
}

// sign redeems a draft that was made without error.
func (a *authority) sign(ctx context.Context, d ca.Draft, err error) ([]*x509.Certificate, error) {
	if err != nil {
		return nil, err
	}
	return a.ca.Sign(ctx, d)
}

// SignX509 is control.Authority.
func (a *authority) SignX509(ctx context.Context, id spiffeid.ID, key crypto.PublicKey, ttl time.Duration, dns []string) ([]*x509.Certificate, error) {
	d, err := a.ca.Prepare(ca.X509Request{ID: id, PublicKey: key, TTL: ttl, DNSNames: dns})
	return a.sign(ctx, d, err)
}

// SignAgent is control.Authority.
func (a *authority) SignAgent(ctx context.Context, id spiffeid.ID, key crypto.PublicKey) ([]*x509.Certificate, error) {
	d, err := a.ca.DraftAgent(id, key, a.agentTTL)
	return a.sign(ctx, d, err)
}

// SignJWT is control.Authority.
func (a *authority) SignJWT(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (token string, issued, expires time.Time, err error) {
	return a.ca.SignJWT(ctx, id, audience, ttl)
}

// X509Bundle is control.Authority.
func (a *authority) X509Bundle() []*x509.Certificate { return a.ca.Bundle().X509 }

// JWTKeys is control.Authority.
func (a *authority) JWTKeys() []control.JWTKey {
	keys := a.ca.Bundle().JWT
	out := make([]control.JWTKey, len(keys))
	for i, k := range keys {
		out[i] = control.JWTKey{KeyID: k.KeyID, PublicKey: k.PublicKey, ExpiresAt: k.ExpiresAt, Tainted: k.Tainted}
	}
	for _, k := range a.others() {
		if !slices.ContainsFunc(out, func(own control.JWTKey) bool { return own.KeyID == k.KeyID }) {
			out = append(out, control.JWTKey{KeyID: k.KeyID, PublicKey: k.PublicKey, ExpiresAt: k.ExpiresAt})
		}
	}
	return out
}

// ServerCertificate is control.Authority.
func (a *authority) ServerCertificate() (*tls.Certificate, error) {
	return a.server.Certificate(context.Background())
}

// bundlePEM is the trust domain's roots as a file.
func bundlePEM(c *ca.CA) []byte {
	var b bytes.Buffer
	for _, x := range c.Bundle().X509 {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: x.Raw}) // a Buffer does not fail
	}
	return b.Bytes()
}
