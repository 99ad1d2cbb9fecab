package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
)

const (
	maxAudiences   = 16
	maxAudienceLen = 256
	maxJWTTTL      = 24 * time.Hour
)

// SignJWT signs a JWT-SVID for id: ES256, the header alg, kid and typ, the
// claims sub, aud, iat and exp. A ttl of 0 means Config.JWTTTL. The error is
// ErrRefused when the request is at fault.
func (c *CA) SignJWT(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (token string, issued, expires time.Time, err error) {
	fail := func(err error) (string, time.Time, time.Time, error) { return "", time.Time{}, time.Time{}, err }
	if err := ctx.Err(); err != nil {
		return fail(fmt.Errorf("sign JWT: %w", err))
	}
	now := c.cfg.Now()
	s, err := c.active(now)
	if err != nil {
		return fail(err)
	}
	if ttl == 0 {
		ttl = c.cfg.JWTTTL
	}
	if err := c.checkJWT(id, audience, ttl); err != nil {
		return fail(fmt.Errorf("%w: %w", ErrRefused, err))
	}
	// The claims count whole seconds: a token never begins later than now.
	issued = now.UTC().Truncate(time.Second)
	expires = now.UTC().Add(ttl).Truncate(time.Second)
	if last := s.jwt.expires.UTC().Truncate(time.Second); expires.After(last) {
		expires = last
	}
	if !expires.After(now) {
		return fail(fmt.Errorf("sign JWT: key %s expired at %s", s.jwt.id, utc(s.jwt.expires)))
	}
	t := jwt.NewWithClaims(jwt.SigningMethodES256, jwt.RegisteredClaims{
		Issuer:    c.cfg.JWTIssuer,
		Subject:   id.String(),
		Audience:  slices.Clone(audience),
		IssuedAt:  jwt.NewNumericDate(issued),
		ExpiresAt: jwt.NewNumericDate(expires),
	})
	t.Header["kid"] = s.jwt.id
	detail := fmt.Sprintf("jwt for %q by key %s until %s", audience, s.jwt.id, utc(expires))
	if err := c.record(id, "intent", "", detail); err != nil {
		return fail(fmt.Errorf("sign JWT: record intent: %w", err))
	}
	token, err = signES256(t, s.jwt.signer)
	if err != nil {
		err = fmt.Errorf("sign JWT: %w", err)
		return fail(errors.Join(err, c.record(id, "failed", audit.Deny, detail)))
	}
	if err := c.record(id, "done", audit.Allow, detail); err != nil {
		return fail(fmt.Errorf("sign JWT: record result: %w", err))
	}
	return token, issued, expires, nil
}

// signES256 is t.SignedString for a key that may be in a token: the library
// takes the key itself.
func signES256(t *jwt.Token, key crypto.Signer) (string, error) {
	text, err := t.SigningString()
	if err != nil {
		return "", fmt.Errorf("encode: %w", err)
	}
	digest := sha256.Sum256([]byte(text))
	der, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return "", err
	}
	var sig struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(der, &sig); err != nil || len(rest) > 0 {
		return "", errors.New("the key gave no ECDSA signature")
	}
	// A wrong signature could give away the key that made it, so none leaves.
	if public, ok := key.Public().(*ecdsa.PublicKey); !ok || !ecdsa.Verify(public, digest[:], sig.R, sig.S) {
		return "", errors.New("the signature is not that of the key")
	}
	// RFC 7518 section 3.4: both numbers in 32 octets. Verify bounded them.
	raw := make([]byte, 64)
	sig.R.FillBytes(raw[:32])
	sig.S.FillBytes(raw[32:])
	return text + "." + t.EncodeSegment(raw), nil
}

func (c *CA) checkJWT(id spiffeid.ID, audience []string, ttl time.Duration) error {
	switch {
	case id.IsZero():
		return errors.New("no SPIFFE ID is given")
	case !id.MemberOf(c.cfg.TrustDomain):
		return fmt.Errorf("%s is not in trust domain %s", id, c.cfg.TrustDomain)
	case id.Path() == "" || reserved(id):
		return fmt.Errorf("%s is not a workload", id)
	case len(id.String()) > maxIDLen:
		return fmt.Errorf("the SPIFFE ID has %d bytes, want at most %d", len(id.String()), maxIDLen)
	case ttl < c.cfg.floor() || ttl > maxJWTTTL:
		return fmt.Errorf("a life of %v is not between %v and %v", ttl, c.cfg.floor(), maxJWTTTL)
	case len(audience) == 0 || len(audience) > maxAudiences:
		return fmt.Errorf("%d audiences, want 1 to %d", len(audience), maxAudiences)
	}
	for i, a := range audience {
		if a == "" || len(a) > maxAudienceLen {
			return fmt.Errorf("an audience of %d bytes, want 1 to %d", len(a), maxAudienceLen)
		}
		if slices.Contains(audience[:i], a) {
			return fmt.Errorf("audience %q is given twice", a)
		}
	}
	return nil
}
