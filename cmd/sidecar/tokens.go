package main

import (
	"context"
	"crypto"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/authz"
	"sallyport/internal/jose"
	"sallyport/internal/keyset"
	"sallyport/internal/mesh"
	"sallyport/internal/proxy"
	"sallyport/internal/svid"
)

// keysDir keeps the keys of issuers of tokens inside DataDir.
const keysDir = "token-keys"

// openTokens builds what checks tokens. It fetches nothing.
func (s *sidecar) openTokens() (err error) {
	cfg := keyset.Config{
		Dir: filepath.Join(s.cfg.DataDir, keysDir), Log: s.log,
		Result: func(issuer, result string) { s.metrics.TokenKeyFetches(issuer, result).Inc() },
	}
	if s.gateways != nil {
		// What leaves the mesh leaves by the gateway, and by a row that says so.
		cfg.Dial = func(ctx context.Context, _, address string) (net.Conn, error) {
			return proxy.DialThrough(ctx, s.gateways, address)
		}
	}
	if s.keys, err = keyset.New(cfg); err != nil {
		return err
	}
	verifier := authz.VerifierConfig{
		Keys: &tokenKeys{keeper: s.keys, current: func() *svid.State { return s.agent.Source().Current() }}, Log: s.log,
	}
	if s.tokens, err = authz.NewVerifier(verifier); err != nil {
		return err
	}
	s.shown, err = authz.NewVerifier(verifier)
	return err
}

// bothIssuers are those of two sets, each once: one policy says what they are.
func bothIssuers(sets ...*authz.TokenSet) (all []mesh.TokenIssuer) {
	for _, s := range sets {
		for _, i := range s.Issuers() {
			if !slices.ContainsFunc(all, func(x mesh.TokenIssuer) bool { return x.Name() == i.Name() }) {
				all = append(all, i)
			}
		}
	}
	return all
}

// leaf is the certificate that peers see of the workload.
func (s *sidecar) leaf() []byte {
	c, err := s.agent.Source().Certificate()
	if err != nil {
		return nil // no token is bound to it
	}
	return c.Certificate[0]
}

// tokenKeys are the keys that issuers publish and, for JWT-SVIDs, those of the
// bundles that the workload trusts.
type tokenKeys struct {
	keeper  *keyset.Keeper
	current func() *svid.State

	mu         sync.Mutex // guards the rest
	seen       *svid.State
	generation uint64
}

var errNoBundle = errors.New("no bundle of this trust domain")

// Find is authz.Keys.
func (k *tokenKeys) Find(ctx context.Context, issuer string, t *jose.Token) (jose.Key, bool, error) {
	td, err := spiffeid.TrustDomainFromString(issuer)
	if !isTrustDomain(issuer) || err != nil {
		return k.keeper.Find(ctx, issuer, t)
	}
	keys := bundleKeys(k.current(), td)
	if len(keys) == 0 {
		return jose.Key{}, false, errNoBundle
	}
	pub, known := keys[t.KeyID]
	return jose.Key{ID: t.KeyID, Public: pub}, known, nil
}

// Has is authz.Keys.
func (k *tokenKeys) Has(issuer string, t *jose.Token, key crypto.PublicKey) bool {
	td, err := spiffeid.TrustDomainFromString(issuer)
	if !isTrustDomain(issuer) || err != nil {
		return k.keeper.Has(issuer, t, key)
	}
	return jose.SameKey(bundleKeys(k.current(), td)[t.KeyID], key)
}

// Generation is authz.Keys.
func (k *tokenKeys) Generation(issuer string) uint64 {
	if !isTrustDomain(issuer) {
		return k.keeper.Generation(issuer)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if st := k.current(); st != k.seen {
		k.seen = st
		k.generation++
	}
	return k.generation
}

// isTrustDomain tells the names of trust domains from those of issuers, of
// which none begins like that.
func isTrustDomain(issuer string) bool {
	const scheme = "spiffe://"
	return len(issuer) > len(scheme) && issuer[:len(scheme)] == scheme
}

func bundleKeys(st *svid.State, td spiffeid.TrustDomain) map[string]crypto.PublicKey {
	switch {
	case st == nil:
		return nil
	case td == st.Bundle.TrustDomain():
		return st.JWTKeys
	}
	return st.FederatedJWT[td]
}
