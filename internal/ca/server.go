package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync"
	"time"
)

// A Server keeps the issuer's own certificate, spiffe://TD/spire/server, fresh:
// it is what proxies check before they send anything. Its methods are safe for
// concurrent use.
type Server struct {
	ca  *CA
	dns []string

	mu    sync.Mutex // guards the fields below
	cert  *tls.Certificate
	root  *x509.Certificate // above cert
	renew time.Time
}

// NewServer returns the keeper of the issuer's certificate, with DNS names for
// clients that know no SPIFFE ID.
func (c *CA) NewServer(dns ...string) *Server { return &Server{ca: c, dns: dns} }

// Certificate returns the certificate with its key. At half of its life it is
// replaced, with a new key; while that fails the old one serves until it
// expires. It is replaced at once when another root is to show; that is the
// former one as long as a live proxy may trust no other.
func (s *Server) Certificate(ctx context.Context) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.ca.cfg.Now()
	root := s.ca.serverRoot(now)
	if s.cert != nil && now.Before(s.renew) && !now.Before(s.cert.Leaf.NotBefore) && s.root.Equal(root) {
		return s.cert, nil
	}
	fresh, err := s.issue(ctx)
	if err == nil {
		s.cert, s.root = fresh, root
		s.renew = now.Add(fresh.Leaf.NotAfter.Sub(now) / 2)
		return fresh, nil
	}
	if s.cert != nil && now.Before(s.cert.Leaf.NotAfter) && !now.Before(s.cert.Leaf.NotBefore) {
		s.ca.cfg.Log.Error("issuer certificate not renewed", "err", err, "expires", s.cert.Leaf.NotAfter)
		return s.cert, nil
	}
	return nil, fmt.Errorf("make issuer certificate: %w", err)
}

func (s *Server) issue(ctx context.Context) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	d, err := s.ca.DraftServer(key.Public(), 0, s.dns...)
	if err != nil {
		return nil, err
	}
	chain, err := s.ca.Sign(ctx, d)
	if err != nil {
		return nil, err
	}
	cert := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for _, x := range chain {
		cert.Certificate = append(cert.Certificate, x.Raw)
	}
	return cert, nil
}
