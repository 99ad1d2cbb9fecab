// Package jose reads what strangers sign: compact tokens (RFC 7515, RFC 7519)
// and sets of public keys (RFC 7517), more strictly than the RFCs and than the
// libraries ask. It signs nothing, fetches nothing and keeps nothing.
//
// A Profile says what a kind of token may look like, Token.Verify holds it to
// a key, Token.Check to its claims. Nothing in a Token is true before Verify.
// No error quotes any part of a token.
package jose

import (
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	maxHeader  = 1 << 10 // bytes, decoded
	maxMembers = 64      // of the header or of the claims, at all depths
	maxKeyID   = 256     // bytes
	// MaxAudiences is how many audiences one token may be for.
	MaxAudiences = 16
	// Skew is by how much the clocks of issuer and verifier may differ.
	Skew = 30 * time.Second
	// MaxSkew is the most that a Claims may ask for.
	MaxSkew = time.Minute
)

// ErrExpired says that the token was good before.
var ErrExpired = errors.New("token has expired")

// A Profile says what one kind of token may look like.
type Profile struct {
	// Algs are the algorithms that are accepted. Required. "none" and shared
	// secrets cannot be accepted.
	Algs []string
	// Types are the values of typ that are accepted, compared without regard to
	// case and to a leading "application/"; "" stands for no typ at all. Default:
	// "" and "JWT".
	Types []string
	// Header names what may stand in the header beside alg, kid and typ. It does
	// not choose the key. crit, b64, zip, cty and enc cannot be accepted.
	Header []string
	// MaxBytes is how long the whole token may be. Default 8 KiB.
	MaxBytes int
	// NeedKeyID refuses a token without kid.
	NeedKeyID bool
}

// A Token is a signed token that was taken apart.
type Token struct {
	Alg    string
	KeyID  string // empty if there is none
	Type   string // as it stands; empty if there is none
	Header Object
	Claims Object

	signed string // what the signature is over
	sig    []byte
}

// Parse takes a compact token apart. It has not been verified.
func (p Profile) Parse(s string) (*Token, error) {
	if limit := cmp.Or(p.MaxBytes, 8<<10); len(s) > limit {
		return nil, fmt.Errorf("token of %d bytes, want at most %d", len(s), limit)
	}
	if n := strings.Count(s, "."); n != 2 {
		return nil, fmt.Errorf("token has %d parts, want 3", n+1)
	}
	part := strings.Split(s, ".")
	var raw [3][]byte
	for i, p := range part {
		b, err := Decode64(base64.RawURLEncoding, p)
		if err != nil || len(b) == 0 {
			return nil, errors.New("token is not base64url")
		}
		raw[i] = b
	}
	t := &Token{signed: s[:len(part[0])+1+len(part[1])], sig: raw[2]}
	if err := p.header(t, raw[0]); err != nil {
		return nil, fmt.Errorf("token header: %w", err)
	}
	var err error
	if t.Claims, err = parseObject(raw[1], &jsonReader{members: maxMembers, plain: true}); err != nil {
		return nil, fmt.Errorf("token claims: %w", err)
	}
	return t, nil
}

// header settles the algorithm before anything else is looked at.
func (p Profile) header(t *Token, b []byte) (err error) {
	if len(b) > maxHeader {
		return fmt.Errorf("%d bytes, want at most %d", len(b), maxHeader)
	}
	if t.Header, err = parseObject(b, &jsonReader{members: maxMembers, plain: true}); err != nil {
		return err
	}
	if t.Alg, err = t.Header.Text("alg"); err != nil {
		return err
	}
	if _, ours := algs[t.Alg]; !ours || !slices.Contains(p.Algs, t.Alg) {
		return fmt.Errorf("alg is none of %s", strings.Join(p.Algs, ", "))
	}
	for _, name := range []string{"crit", "b64", "zip", "cty", "enc"} {
		if _, has := t.Header[name]; has {
			return fmt.Errorf("%s is not understood", name)
		}
	}
	if err := t.Header.Only(append([]string{"alg", "kid", "typ"}, p.Header...)...); err != nil {
		return err
	}
	if _, has := t.Header["kid"]; has || p.NeedKeyID {
		if t.KeyID, err = t.Header.Text("kid"); err != nil {
			return err
		}
	}
	if len(t.KeyID) > maxKeyID {
		return fmt.Errorf("kid of %d bytes, want at most %d", len(t.KeyID), maxKeyID)
	}
	return p.typ(t)
}

func (p Profile) typ(t *Token) (err error) {
	if _, has := t.Header["typ"]; has {
		if t.Type, err = t.Header.Text("typ"); err != nil {
			return err
		}
	}
	types := p.Types
	if len(types) == 0 {
		types = []string{"", "JWT"}
	}
	const media = "application/"
	short := t.Type
	if len(short) > len(media) && strings.EqualFold(short[:len(media)], media) {
		short = short[len(media):]
	}
	if !slices.ContainsFunc(types, func(want string) bool { return strings.EqualFold(want, short) }) {
		return errors.New("typ is of another kind of token")
	}
	return nil
}

// ID names what was signed: two tokens with one ID say the same. The signature
// does not count, because some can be written in more than one way.
func (t *Token) ID() [32]byte { return sha256.Sum256([]byte(t.signed)) }

// Verify checks the signature by one key, which must be for the token's
// algorithm.
func (t *Token) Verify(k Key) error {
	if k.Alg != "" && k.Alg != t.Alg {
		return errMisfit
	}
	return verify(t.Alg, k.Public, []byte(t.signed), t.sig)
}

// Claims is what the claims of a token are held to.
type Claims struct {
	// Now is the verifier's time. Required.
	Now time.Time
	// Issuer is what iss must be. Empty: iss is not looked at, because the keys
	// say who signed.
	Issuer string
	// Audiences are those of which aud must name one. Required.
	Audiences []string
	// Skew is by how much the clocks may differ. Default 30 s, at most 1 min.
	Skew time.Duration
	// MaxLife bounds exp - iat, or what is left where iat may be missing.
	// Default: no bound.
	MaxLife time.Duration
	// NeedIssuedAt refuses a token without iat.
	NeedIssuedAt bool
}

// Check holds the claims to c and gives the time from which on the token is
// refused. exp must be there; iat and nbf count when they are.
func (t *Token) Check(c Claims) (until time.Time, err error) {
	if iss, _ := t.Claims["iss"].(string); c.Issuer != "" && iss != c.Issuer {
		return time.Time{}, errors.New("token is of another issuer")
	}
	if err := t.checkAudience(c.Audiences); err != nil {
		return time.Time{}, err
	}
	skew := min(cmp.Or(c.Skew, Skew), MaxSkew)
	exp, hasExp, err1 := t.Claims.Time("exp")
	iat, hasIat, err2 := t.Claims.Time("iat")
	nbf, hasNbf, err3 := t.Claims.Time("nbf")
	for _, err := range []error{err1, err2, err3} {
		if err != nil {
			return time.Time{}, fmt.Errorf("token: %w", err)
		}
	}
	from, late := c.Now, c.Now.Add(skew)
	if hasIat {
		from = iat
	}
	switch until = exp.Add(skew); {
	case !hasExp:
		return time.Time{}, errors.New("token: exp is missing")
	case c.NeedIssuedAt && !hasIat:
		return time.Time{}, errors.New("token: iat is missing")
	case !c.Now.Before(until):
		return time.Time{}, ErrExpired
	case hasIat && late.Before(iat) || hasNbf && late.Before(nbf):
		return time.Time{}, errors.New("token: iat or nbf is in the future: check both clocks")
	case c.MaxLife > 0 && exp.Sub(from) > c.MaxLife:
		return time.Time{}, fmt.Errorf("token lives longer than %s", c.MaxLife)
	}
	return until, nil
}

func (t *Token) checkAudience(ours []string) error {
	theirs, err := t.Claims.Texts("aud", MaxAudiences)
	if err != nil {
		return fmt.Errorf("token: %w", err)
	}
	if theirs == nil {
		return errors.New("token: aud is missing")
	}
	if !slices.ContainsFunc(ours, func(a string) bool { return a != "" && slices.Contains(theirs, a) }) {
		return errors.New("token is for another audience")
	}
	return nil
}
