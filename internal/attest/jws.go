package attest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	_ "crypto/sha256" // for crypto.SHA256.New
	_ "crypto/sha512" // for crypto.SHA384.New and SHA512
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"
)

const (
	maxToken64   = 16 << 10       // bytes of a signed token; GitHub's have 2 KiB
	maxKeys      = 64             // of one key set
	maxAudiences = 16             // of one token
	maxTokenLife = 24 * time.Hour // from iat to exp
)

// A signature is one of the algorithms that tokens of platforms are signed
// with. There is neither "none" nor a shared secret.
type signature struct {
	kind string // "RS", "PS", "ES" or "Ed"
	hash crypto.Hash
	bits int // of the curve, for ES
}

var signatures = map[string]signature{
	"RS256": {"RS", crypto.SHA256, 0}, "RS384": {"RS", crypto.SHA384, 0}, "RS512": {"RS", crypto.SHA512, 0},
	"PS256": {"PS", crypto.SHA256, 0}, "PS384": {"PS", crypto.SHA384, 0}, "PS512": {"PS", crypto.SHA512, 0},
	"ES256": {"ES", crypto.SHA256, 256}, "ES384": {"ES", crypto.SHA384, 384}, "ES512": {"ES", crypto.SHA512, 521},
	"EdDSA": {"Ed", 0, 0},
}

// A token is a signed token that was taken apart. Nothing in it is true before
// check.
type token struct {
	alg    string
	kid    string
	signed string // what the signature is over; it names the token
	sig    []byte
	claims object
}

// parseToken takes a compact JWS apart.
func parseToken(s string) (*token, error) {
	if len(s) > maxToken64 {
		return nil, fmt.Errorf("token of %d bytes, want at most %d", len(s), maxToken64)
	}
	part := strings.Split(s, ".")
	if len(part) != 3 {
		return nil, fmt.Errorf("token has %d parts, want 3", len(part))
	}
	var raw [3][]byte
	for i, p := range part {
		b, err := decode64(base64.RawURLEncoding, p)
		if err != nil || len(b) == 0 {
			return nil, errors.New("token is not base64url")
		}
		raw[i] = b
	}
	t := &token{signed: part[0] + "." + part[1], sig: raw[2]}
	h, err := parseObject(raw[0])
	if err != nil {
		return nil, fmt.Errorf("token header: %w", err)
	}
	// x5t and x5t#S256 name a certificate and are not followed. A header that
	// brings its own key (jwk, jku, x5c, x5u) or must be understood (crit) is
	// refused.
	if err := h.only("alg", "kid", "typ", "x5t", "x5t#S256"); err != nil {
		return nil, fmt.Errorf("token header: %w", err)
	}
	if typ, has := h["typ"]; has && typ != "JWT" {
		return nil, errors.New("token header: typ is not JWT")
	}
	if t.alg, err = h.text("alg"); err != nil {
		return nil, fmt.Errorf("token header: %w", err)
	}
	if _, ok := signatures[t.alg]; !ok {
		return nil, errors.New("token header: alg is none of RS, PS, ES with 256, 384, 512, and EdDSA")
	}
	if t.kid, err = h.text("kid"); err != nil {
		return nil, fmt.Errorf("token header: %w", err)
	}
	if t.claims, err = parseObject(raw[1]); err != nil {
		return nil, fmt.Errorf("token claims: %w", err)
	}
	return t, nil
}

// check verifies the signature by the key of the issuer that kid names.
func (t *token) check(ctx context.Context, keys keySource) error {
	k, err := keys.find(ctx, t.kid)
	if err != nil {
		return err
	}
	if k.alg != "" && k.alg != t.alg {
		return refused("token: alg does not fit the key")
	}
	if err := signatures[t.alg].verify(k.key, []byte(t.signed), t.sig); err != nil {
		return refused("token: %v", err)
	}
	return nil
}

func (a signature) verify(key crypto.PublicKey, signed, sig []byte) error {
	wrong, misfit := errors.New("signature is wrong"), errors.New("alg does not fit the key")
	if k, ok := key.(ed25519.PublicKey); ok {
		switch {
		case a.kind != "Ed":
			return misfit
		case !ed25519.Verify(k, signed, sig):
			return wrong
		}
		return nil
	}
	if a.kind == "Ed" {
		return misfit
	}
	h := a.hash.New()
	h.Write(signed)
	sum := h.Sum(nil)
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		size := (a.bits + 7) / 8
		if a.kind != "ES" || k.Params().BitSize != a.bits {
			return misfit
		}
		if len(sig) != 2*size || !ecdsa.Verify(k, sum, new(big.Int).SetBytes(sig[:size]), new(big.Int).SetBytes(sig[size:])) {
			return wrong
		}
		return nil
	case *rsa.PublicKey:
		err := misfit
		switch {
		case k.N.BitLen() < minRSA:
		case a.kind == "PS":
			err = rsa.VerifyPSS(k, a.hash, sum, sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		case a.kind == "RS":
			err = rsa.VerifyPKCS1v15(k, a.hash, sum, sig)
		}
		if err != nil && !errors.Is(err, misfit) {
			return wrong
		}
		return err
	}
	return misfit
}

// checkClaims checks issuer, audience and times and gives the end of the
// token's life. exp and iat must be there; nbf counts when it is.
func (t *token) checkClaims(issuer, audience string, now time.Time) (time.Time, error) {
	if iss, _ := t.claims["iss"].(string); iss != issuer || issuer == "" {
		return time.Time{}, refused("token is of another issuer")
	}
	if err := t.checkAudience(audience); err != nil {
		return time.Time{}, err
	}
	exp, hasExp, err1 := t.claims.when("exp")
	iat, hasIat, err2 := t.claims.when("iat")
	nbf, hasNbf, err3 := t.claims.when("nbf")
	if err := errors.Join(err1, err2, err3); err != nil {
		return time.Time{}, refused("token: %v", err)
	}
	switch late := now.Add(clockSkew); {
	case !hasExp || !hasIat:
		return time.Time{}, refused("token: exp or iat is missing")
	case !now.Before(exp.Add(clockSkew)):
		return time.Time{}, refused("token has expired")
	case late.Before(iat) || hasNbf && late.Before(nbf):
		return time.Time{}, refused("token: iat or nbf is in the future: check both clocks")
	case exp.Sub(iat) > maxTokenLife:
		return time.Time{}, refused("token lives longer than %s", maxTokenLife)
	}
	return exp.Add(clockSkew), nil
}

func (t *token) checkAudience(audience string) error {
	v := t.claims["aud"]
	list, ok := v.([]any)
	if s, one := v.(string); one {
		list, ok = []any{s}, true
	}
	if !ok || len(list) == 0 || len(list) > maxAudiences {
		return refused("token: aud is missing, or not 1 to %d texts", maxAudiences)
	}
	for _, a := range list {
		if s, ok := a.(string); !ok || s == "" {
			return refused("token: aud holds something else than texts")
		}
	}
	if audience == "" || !slices.Contains(list, any(audience)) {
		return refused("token is for another audience")
	}
	return nil
}

// when takes seconds as a whole or decimal number below 2^53, so that no value
// can overflow into the past.
func (o object) when(name string) (time.Time, bool, error) {
	v, has := o[name]
	if !has {
		return time.Time{}, false, nil
	}
	n, ok := v.(json.Number)
	if !ok {
		return time.Time{}, true, fmt.Errorf("%s is not a number", name)
	}
	f, err := n.Float64()
	if err != nil || f <= 0 || f >= 1<<53 {
		return time.Time{}, true, fmt.Errorf("%s is out of range", name)
	}
	return time.Unix(int64(f), 0), true, nil
}

// A webKey is one public key of an issuer of tokens.
type webKey struct {
	key crypto.PublicKey
	alg string // the only one it is for, if the issuer says so
}

// A keySource knows the keys of one issuer of tokens.
type keySource interface {
	// find gives the key with this ID. A refusal says that the issuer has none;
	// any other error, that it cannot be known now.
	find(ctx context.Context, kid string) (webKey, error)
}

// parseKeys reads a JSON Web Key Set. Keys for other uses or of other kinds are
// passed over; one of ours that is damaged, or an ID that comes twice, is an
// error.
func parseKeys(b []byte) (map[string]webKey, error) {
	o, err := parseObject(b)
	if err != nil {
		return nil, fmt.Errorf("key set: %w", err)
	}
	list, ok := o["keys"].([]any)
	if !ok || len(list) > maxKeys {
		return nil, fmt.Errorf("key set: keys is missing or has more than %d", maxKeys)
	}
	out := map[string]webKey{}
	for i, e := range list {
		m, _ := e.(map[string]any)
		j := object(m)
		if use, has := j["use"]; has && use != "sig" {
			continue
		}
		kid, err := j.text("kid")
		if err != nil {
			continue // no token can name it
		}
		k, err := j.publicKey()
		if err != nil {
			return nil, fmt.Errorf("key set: key %d: %w", i+1, err)
		}
		if k == nil {
			continue
		}
		if _, twice := out[kid]; twice {
			return nil, fmt.Errorf("key set: key %d has the ID of another", i+1)
		}
		alg, _ := j["alg"].(string)
		out[kid] = webKey{key: k, alg: alg}
	}
	if len(out) == 0 {
		return nil, errors.New("key set holds no key that signs tokens")
	}
	return out, nil
}

// publicKey is nil for a kind of key that we do not use.
func (o object) publicKey() (crypto.PublicKey, error) {
	number := func(name string) (*big.Int, error) {
		s, err := o.text(name)
		if err != nil {
			return nil, err
		}
		b, err := decode64(base64.RawURLEncoding, s)
		return new(big.Int).SetBytes(b), err
	}
	switch o["kty"] {
	case "RSA":
		n, err1 := number("n")
		e, err2 := number("e")
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		if n.BitLen() < minRSA || n.BitLen() > 16384 || !e.IsInt64() || e.Int64() < 3 || e.Int64() > 1<<31-1 || e.Bit(0) == 0 {
			return nil, fmt.Errorf("RSA key is below %d bits or odd", minRSA)
		}
		return &rsa.PublicKey{N: n, E: int(e.Int64())}, nil
	case "EC":
		return o.ecKey()
	case "OKP":
		s, err := o.text("x")
		if err != nil || o["crv"] != "Ed25519" {
			return nil, err
		}
		b, err := decode64(base64.RawURLEncoding, s)
		if err != nil || len(b) != ed25519.PublicKeySize {
			return nil, errors.New("Ed25519 key is malformed")
		}
		return ed25519.PublicKey(b), nil
	}
	return nil, nil
}

func (o object) ecKey() (crypto.PublicKey, error) {
	var curve elliptic.Curve
	switch o["crv"] {
	case "P-256":
		curve = elliptic.P256()
	case "P-384":
		curve = elliptic.P384()
	case "P-521":
		curve = elliptic.P521()
	default:
		return nil, nil
	}
	point := []byte{4}
	for _, name := range []string{"x", "y"} {
		s, err := o.text(name)
		if err != nil {
			return nil, err
		}
		b, err := decode64(base64.RawURLEncoding, s)
		if err != nil {
			return nil, err
		}
		point = append(point, b...)
	}
	k, err := ecdsa.ParseUncompressedPublicKey(curve, point)
	if err != nil {
		return nil, errors.New("EC key is not on its curve")
	}
	return k, nil
}
