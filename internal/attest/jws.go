package attest

import (
	"context"
	"fmt"
	"time"

	"sallyport/internal/jose"
)

// maxTokenLife is the most that lies between iat and exp.
const maxTokenLife = 24 * time.Hour

// tokens is what the token of a platform looks like. x5t and x5t#S256 name a
// certificate and are not followed; a header that brings its own key (jwk, jku,
// x5c, x5u) is refused.
var tokens = jose.Profile{
	Algs: []string{
		jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512,
		jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
	},
	Header:    []string{"x5t", "x5t#S256"},
	MaxBytes:  16 << 10, // GitHub's have 2 KiB
	NeedKeyID: true,
}

// A keySource knows the keys of one issuer of tokens.
type keySource interface {
	// find gives the key with this ID. A refusal says that the issuer has none;
	// any other error, that it cannot be known now.
	find(ctx context.Context, t *jose.Token) (jose.Key, error)
}

// verifyToken verifies the signature by the key of the issuer that kid names.
func verifyToken(ctx context.Context, t *jose.Token, keys keySource) error {
	k, err := keys.find(ctx, t)
	if err != nil {
		return err
	}
	if err := t.Verify(k); err != nil {
		return refused("%v", err)
	}
	return nil
}

// checkClaims checks issuer, audience and times and gives the end of the
// token's life.
func checkClaims(t *jose.Token, issuer, audience string, now time.Time) (time.Time, error) {
	if issuer == "" {
		return time.Time{}, refused("token is of no issuer")
	}
	until, err := t.Check(jose.Claims{
		Now: now, Issuer: issuer, Audiences: []string{audience}, NeedIssuedAt: true, MaxLife: maxTokenLife,
	})
	if err != nil {
		return time.Time{}, fmt.Errorf("%w: %w", ErrEvidence, err)
	}
	return until, nil
}
