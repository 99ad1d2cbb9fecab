package jose

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"slices"
)

// maxKeys is how many elements a key set may have.
const maxKeys = 100

// A Key is one public key of an issuer of tokens.
type Key struct {
	ID     string // empty if the issuer gives none
	Alg    string // the only algorithm it is for, if the issuer says so
	Public crypto.PublicKey
}

// Keys are the keys of one issuer of tokens.
type Keys []Key

// Find gives the key with exactly this ID. A token without kid has the key
// that is the only one for its algorithm.
func (ks Keys) Find(t *Token) (Key, bool) {
	var found []Key
	for _, k := range ks {
		if t.KeyID != "" && k.ID == t.KeyID || t.KeyID == "" && (k.Alg == "" || k.Alg == t.Alg) && algs[t.Alg].fits(k.Public) {
			found = append(found, k)
		}
	}
	if len(found) != 1 {
		return Key{}, false
	}
	return found[0], true
}

// SameKey compares two public keys.
func SameKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// ParseKeys reads a JSON Web Key Set. Elements for another use than sig, or of
// kinds that no algorithm of ours has, are passed over, and so are all that
// share one ID. One that is damaged, or holds a secret, makes the whole set
// worthless.
func ParseKeys(doc []byte) (Keys, error) {
	o, err := ParseObject(doc)
	if err != nil {
		return nil, fmt.Errorf("key set: %w", err)
	}
	list, ok := o["keys"].([]any)
	if !ok || len(list) > maxKeys {
		return nil, fmt.Errorf("key set: keys is missing or has more than %d", maxKeys)
	}
	var out Keys
	times := map[string]int{}
	for i, e := range list {
		m, _ := e.(map[string]any)
		k, err := parseKey(m)
		if err != nil {
			return nil, fmt.Errorf("key set: key %d: %w", i+1, err)
		}
		if k.Public != nil {
			out = append(out, k)
			times[k.ID]++
		}
	}
	out = slices.DeleteFunc(out, func(k Key) bool { return k.ID != "" && times[k.ID] > 1 })
	if len(out) == 0 {
		return nil, errors.New("key set holds no key that signs tokens")
	}
	return out, nil
}

// HoldsSecret reports whether a JWK has a member that must not be published
// (RFC 7518 section 6).
func (o Object) HoldsSecret() bool {
	for _, name := range []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k"} {
		if _, has := o[name]; has {
			return true
		}
	}
	return false
}

// parseKey gives a Key without Public for one to pass over.
func parseKey(o Object) (Key, error) {
	if o == nil {
		return Key{}, errors.New("not a JSON object")
	}
	if o.HoldsSecret() {
		return Key{}, errors.New("holds a secret; whoever published it must replace that key")
	}
	if use, has := o["use"]; has && use != "sig" {
		return Key{}, nil
	}
	if ops, has := o["key_ops"]; has {
		if list, _ := ops.([]any); !slices.Contains(list, any("verify")) {
			return Key{}, nil
		}
	}
	var k Key
	for name, to := range map[string]*string{"kid": &k.ID, "alg": &k.Alg} {
		v, has := o[name]
		s, ok := v.(string)
		if has && (!ok || len(s) > maxKeyID) {
			return Key{}, fmt.Errorf("%s is not a text of at most %d bytes", name, maxKeyID)
		}
		*to = s
	}
	a, ours := algs[k.Alg]
	if k.Alg != "" && !ours {
		return Key{}, nil
	}
	pub, err := PublicKey(o)
	if err != nil || pub == nil {
		return Key{}, err
	}
	if ours && !a.fits(pub) {
		return Key{}, errors.New("alg does not fit the key")
	}
	k.Public = pub
	return k, nil
}

// PublicKey reads the key of one element of a key set and holds it to our
// floor. It is nil for a kind of key that no algorithm of ours has.
func PublicKey(o Object) (crypto.PublicKey, error) {
	switch o["kty"] {
	case "RSA":
		return rsaKey(o)
	case "EC":
		return ecKey(o)
	case "OKP":
		if o["crv"] != "Ed25519" {
			return nil, nil
		}
		b, err := o.number("x")
		if err != nil {
			return nil, err
		}
		if len(b) != ed25519.PublicKeySize {
			return nil, errors.New("x is not an Ed25519 key")
		}
		return ed25519.PublicKey(b), nil
	}
	return nil, nil
}

// number gives the bytes of a member in base64url.
func (o Object) number(name string) ([]byte, error) {
	s, err := o.Text(name)
	if err != nil {
		return nil, err
	}
	b, err := Decode64(base64.RawURLEncoding, s)
	if err != nil || len(b) == 0 || len(b) > maxRSA/8 {
		return nil, fmt.Errorf("%s is not a number in base64url", name)
	}
	return b, nil
}

func rsaKey(o Object) (crypto.PublicKey, error) {
	n, err := o.number("n")
	if err != nil {
		return nil, err
	}
	e, err := o.number("e")
	if err != nil {
		return nil, err
	}
	exp, k := new(big.Int).SetBytes(e), &rsa.PublicKey{N: new(big.Int).SetBytes(n)}
	bits := k.N.BitLen()
	if bits < minRSA || bits > maxRSA || k.N.Bit(0) == 0 || exp.BitLen() > 31 || exp.Int64() < 3 || exp.Bit(0) == 0 {
		return nil, fmt.Errorf("RSA key is not of %d to %d bits with a sound exponent", minRSA, maxRSA)
	}
	k.E = int(exp.Int64())
	return k, nil
}

func ecKey(o Object) (crypto.PublicKey, error) {
	curves := map[any]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()}
	crv, _ := o["crv"].(string)
	curve, ours := curves[crv]
	if !ours {
		return nil, nil
	}
	x, err := o.number("x")
	if err != nil {
		return nil, err
	}
	y, err := o.number("y")
	if err != nil {
		return nil, err
	}
	k, err := ecdsa.ParseUncompressedPublicKey(curve, slices.Concat([]byte{4}, x, y))
	if err != nil || len(x) != len(y) {
		return nil, fmt.Errorf("x and y are not a point of %s", crv)
	}
	return k, nil
}
