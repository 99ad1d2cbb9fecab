package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/ca"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/registry"
)

// authority is the CA as the control server sees it.
type authority struct {
	ca       *ca.CA
	server   *ca.Server
	agentTTL time.Duration
	// others returns the JWT keys of all issuers that share the store, and of
	// those below them; publish adds one of the latter.
	others  func() []registry.Key
	publish func(ctx context.Context, owner string, k registry.Key) error
}

// sign redeems a draft that was made without error.
func (a *authority) sign(ctx context.Context, d ca.Draft, err error) ([]*x509.Certificate, error) {
	if err != nil {
		return nil, told(err)
	}
	return a.ca.Sign(ctx, d)
}

// told lets the caller know why nothing is signed, when it lies with the
// request.
func told(err error) error {
	switch {
	case errors.Is(err, ca.ErrRefused):
		return control.Unfit(err)
	case errors.Is(err, ca.ErrNoDepth):
		return control.Unready(daemon.Hint(err, "replace the root: sallyport ca rotate"))
	}
	return err
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
	token, issued, expires, err = a.ca.SignJWT(ctx, id, audience, ttl)
	if err != nil {
		err = told(err)
	}
	return token, issued, expires, err
}

// SignDownstream is control.Downstream.
func (a *authority) SignDownstream(ctx context.Context, id spiffeid.ID, key crypto.PublicKey, ttl time.Duration) ([]*x509.Certificate, error) {
	d, err := a.ca.DraftDownstream(ca.DownstreamRequest{ID: id, PublicKey: key, TTL: ttl})
	return a.sign(ctx, d, err)
}

// PublishJWTKey is control.Downstream.
func (a *authority) PublishJWTKey(ctx context.Context, id spiffeid.ID, k control.JWTKey) error {
	if slices.ContainsFunc(a.ca.Bundle().JWT, func(own ca.JWTKey) bool { return own.KeyID == k.KeyID }) {
		return mesh.ErrExists
	}
	err := a.publish(ctx, id.String(), registry.Key{KeyID: k.KeyID, PublicKey: k.PublicKey, ExpiresAt: k.ExpiresAt})
	if errors.Is(err, registry.ErrManyKeys) {
		return control.Unready(err)
	}
	return err
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
