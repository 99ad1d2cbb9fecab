package attest

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// JoinToken is the name of the attestation by a secret that an operator gives
// to one node.
const JoinToken = "join_token"

// maxToken is far above the 64 characters of our own tokens.
const maxToken = 512

// Tokens is where join tokens are kept, as hashes.
type Tokens interface {
	// Redeem marks the token as used by the key, durably, and names the agent
	// it was made for. The same token with the same key is redeemed again
	// within a grace window, because the reply may have been lost. Any other
	// use of a used, expired or unknown token is an error for which errors.Is
	// finds ErrEvidence; other errors say that the token could not be looked
	// at. Of concurrent calls with different keys at most one succeeds.
	Redeem(ctx context.Context, token, key [32]byte, now time.Time) (agentName string, err error)
}

// NewJoinToken verifies join tokens. The payload is the text of the token; it
// is hashed as it stands. Agents are named
// spiffe://TD/spire/agent/join_token/NAME, where the name is not the token.
func NewJoinToken(td spiffeid.TrustDomain, tokens Tokens) NodeVerifier {
	return &joinToken{td: td, tokens: tokens, now: time.Now}
}

type joinToken struct {
	td     spiffeid.TrustDomain
	tokens Tokens
	now    func() time.Time
}

func (j *joinToken) Verify(ctx context.Context, payload []byte, key crypto.PublicKey) (spiffeid.ID, []mesh.Selector, error) {
	if err := ctx.Err(); err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("verify join token: %w", err)
	}
	if len(payload) == 0 || len(payload) > maxToken {
		return spiffeid.ID{}, nil, fmt.Errorf("join token of %d bytes, want 1 to %d: %w", len(payload), maxToken, ErrEvidence)
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("join token: public key is not usable: %w", ErrEvidence)
	}
	name, err := j.tokens.Redeem(ctx, sha256.Sum256(payload), sha256.Sum256(der), j.now())
	if err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("redeem join token: %w", err)
	}
	id, err := spiffeid.FromSegments(j.td, "spire", "agent", JoinToken, name)
	if err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("join token is for agent %q, whose name is no path segment: %w", name, ErrEvidence)
	}
	return id, nil, nil
}
