// Package svid holds the identity of a process: the X.509-SVIDs it may show,
// the bundles it trusts, the TLS settings that follow from both, and the
// Workload API that hands them to local programs.
//
// It does not attest anybody and signs nothing: who a caller is comes through
// Attestor, certificates come through Minter. Its goroutines are those that
// Rotator.Run and WorkloadAPI.Serve block in; both end with their context.
package svid

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

var (
	// ErrNoIdentity says that this process has no valid SVID now.
	ErrNoIdentity = errors.New("no valid SVID: wait for the issuer or attest again")
	// ErrExpired says that an SVID is past its end.
	ErrExpired = errors.New("SVID has expired: fetch a new one")
)

// An Identity is one X.509-SVID with its key.
type Identity struct {
	ID spiffeid.ID
	// Chain is the leaf, then the intermediates below the bundle's roots.
	Chain []*x509.Certificate
	Key   crypto.Signer
	// Hint tells a workload with several identities which is for what.
	Hint string
	// EntryID is the registration entry that the identity follows from.
	EntryID string
	// FederatesWith are the trust domains whose bundles go to the workload
	// beside the own one.
	FederatesWith []spiffeid.TrustDomain
}

// Expires is the end of the leaf's validity.
func (i Identity) Expires() time.Time {
	if len(i.Chain) == 0 {
		return time.Time{}
	}
	return i.Chain[0].NotAfter
}

// Root is the authority of a bundle that signed the end of the chain, or nil.
func (i Identity) Root(b *x509bundle.Bundle) *x509.Certificate {
	if b == nil || len(i.Chain) == 0 {
		return nil
	}
	top := i.Chain[len(i.Chain)-1]
	for _, root := range b.X509Authorities() {
		if top.CheckSignatureFrom(root) == nil {
			return root
		}
	}
	return nil
}

// A State is everything a process holds. It is not changed once given to
// Source.Set. The first identity is the one shown to TLS peers.
type State struct {
	Identities []Identity
	// Bundle is that of the own trust domain.
	Bundle *x509bundle.Bundle
	// Federated are bundles of other trust domains. They are never merged.
	Federated map[spiffeid.TrustDomain]*x509bundle.Bundle
	// JWTKeys verify JWT-SVIDs of the own trust domain, by key ID.
	JWTKeys map[string]crypto.PublicKey
	// FederatedJWT verify those of other trust domains.
	FederatedJWT map[spiffeid.TrustDomain]map[string]crypto.PublicKey

	roots  map[spiffeid.TrustDomain]*x509.CertPool // set by prepare
	proven *proven                                 // by roots alone; set by prepare
}

// Validate reports every way in which the state could not be used at now.
func (st *State) Validate(now time.Time) error {
	_, err := st.prepare(now)
	return err
}

// prepare checks the state and gives a copy that holds the root pools.
func (st *State) prepare(now time.Time) (*State, error) {
	if st == nil || st.Bundle == nil || st.Bundle.Empty() {
		return nil, errors.New("state has no bundle: an empty bundle trusts nobody")
	}
	c := *st
	c.Identities = slices.Clone(st.Identities)
	c.Federated = maps.Clone(st.Federated)
	c.JWTKeys = maps.Clone(st.JWTKeys)
	c.FederatedJWT = maps.Clone(st.FederatedJWT)
	c.proven = new(proven) // of st it would be by other roots
	c.roots = make(map[spiffeid.TrustDomain]*x509.CertPool, 1+len(c.Federated))
	c.roots[c.Bundle.TrustDomain()] = poolOf(c.Bundle)
	var errs []error
	for td, b := range c.Federated {
		switch {
		case b == nil || b.TrustDomain() != td:
			errs = append(errs, fmt.Errorf("federated bundle %s: belongs to another trust domain", td))
		case td == c.Bundle.TrustDomain():
			errs = append(errs, fmt.Errorf("federated bundle %s: is the own trust domain", td))
		default:
			c.roots[td] = poolOf(b)
		}
	}
	if _, own := c.FederatedJWT[c.Bundle.TrustDomain()]; own {
		errs = append(errs, fmt.Errorf("federated JWT keys %s: is the own trust domain", c.Bundle.TrustDomain()))
	}
	for _, id := range c.Identities {
		if err := c.checkIdentity(id, now); err != nil {
			errs = append(errs, fmt.Errorf("identity %s: %w", id.ID, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return &c, nil
}

// checkIdentity applies to our own SVID every rule that a peer would, and
// that the key is the leaf's.
func (st *State) checkIdentity(id Identity, now time.Time) error {
	got, err := verifyChain(id.Chain, st.Bundle.TrustDomain(), poolOf(st.Bundle), now)
	if err != nil {
		return err
	}
	if got.id != id.ID {
		return fmt.Errorf("certificate says %s", got.id)
	}
	if id.Key == nil {
		return errors.New("no private key")
	}
	pub, ok := id.Key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(id.Chain[0].PublicKey) {
		return errors.New("private key is not that of the certificate")
	}
	return nil
}

// poolOf leaves out what is not a CA: crypto/x509 would accept a leaf that
// stands in the pool itself.
func poolOf(b *x509bundle.Bundle) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range b.X509Authorities() {
		if c.BasicConstraintsValid && c.IsCA {
			p.AddCert(c)
		}
	}
	return p
}

// A Source is where everybody in a process reads the current State. It is
// safe for concurrent use.
type Source struct {
	state atomic.Pointer[State]
	// revoked is by serial number. A map is not changed once it is in here.
	revoked atomic.Pointer[map[string]mesh.RevokedSVID]
	now     func() time.Time
	groups  atomic.Pointer[[]Group] // nil: the default

	mu      sync.Mutex    // guards changed, and orders Set and Revoke
	changed chan struct{} // closed and replaced by each Set
}

// NewSource gives a Source without a State.
func NewSource() *Source { return &Source{now: time.Now, changed: make(chan struct{})} }

// Set validates st as strictly as a peer would and makes it current. On error
// the former state stays. A state without identities is valid: it is how an
// entitlement is withdrawn.
func (s *Source) Set(st *State) error {
	c, err := st.prepare(s.now())
	if err != nil {
		return fmt.Errorf("set identity state: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.Store(c)
	close(s.changed)
	s.changed = make(chan struct{})
	return nil
}

// Current is the newest state, nil before the first. It must not be changed.
func (s *Source) Current() *State { return s.state.Load() }

// Changed is closed at the next Set. Take it before Current, so that no
// change falls between them.
func (s *Source) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// WaitReady returns when there is at least one identity that is not expired.
func (s *Source) WaitReady(ctx context.Context) error {
	for {
		ch := s.Changed()
		if _, err := s.identity(); err == nil {
			return nil
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return fmt.Errorf("wait for an SVID: %w", context.Cause(ctx))
		}
	}
}

// identity is the one shown to peers.
func (s *Source) identity() (Identity, error) {
	st := s.Current()
	if st == nil || len(st.Identities) == 0 {
		return Identity{}, ErrNoIdentity
	}
	id := st.Identities[0]
	if !s.now().Before(id.Expires()) {
		return Identity{}, fmt.Errorf("%s: %w", id.ID, ErrExpired)
	}
	if err := s.checkRevoked(id.Chain[0]); err != nil {
		return Identity{}, fmt.Errorf("%s: %w", id.ID, err)
	}
	return id, nil
}
