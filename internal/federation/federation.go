// Package federation is the public face of a trust domain and its eyes on
// others: SPIFFE bundle documents, the endpoint that serves ours, the client
// that follows those of others, and OIDC discovery for verifiers that know no
// SPIFFE.
//
// It signs nothing and never merges the bundles of two trust domains.
// Follower.Run owns the only goroutines; the handlers hold none.
package federation

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/jose"
)

const (
	// MaxDocument bounds a bundle document, bytes: ten RSA roots and as many
	// keys are about 40 KiB.
	MaxDocument = 1 << 20
	maxKeys     = 256
	maxHint     = 365 * 24 * time.Hour
)

// A Bundle is what verifies the SVIDs of one trust domain.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	// X509 are the CA certificates.
	X509 []*x509.Certificate
	// JWT are the keys of JWT-SVIDs, in the order of publication.
	JWT []Key
	// Sequence grows with each change; 0 when the document gives none.
	Sequence uint64
	// RefreshHint is how often to look for a new document; 0 when not given.
	RefreshHint time.Duration
}

// A Key verifies JWT-SVIDs.
type Key struct {
	ID     string
	Public crypto.PublicKey
}

// X509Bundle gives the CA certificates in go-spiffe's type. It is empty, and
// verifies nobody, when the document has none.
func (b *Bundle) X509Bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(b.TrustDomain, b.X509)
}

// JWTKeys gives the keys by their ID.
func (b *Bundle) JWTKeys() map[string]crypto.PublicKey {
	out := make(map[string]crypto.PublicKey, len(b.JWT))
	for _, k := range b.JWT {
		out[k.ID] = k.Public
	}
	return out
}

// The uses of SPIFFE Trust Domain and Bundle section 4.2.2, and OIDC's.
const (
	useX509 = "x509-svid"
	useJWT  = "jwt-svid"
	useSig  = "sig"
)

type jwk struct {
	Kty string   `json:"kty"`
	Use string   `json:"use"`
	Kid string   `json:"kid,omitempty"`
	Alg string   `json:"alg,omitempty"`
	Crv string   `json:"crv,omitempty"`
	X   string   `json:"x,omitempty"`
	Y   string   `json:"y,omitempty"`
	N   string   `json:"n,omitempty"`
	E   string   `json:"e,omitempty"`
	X5c []string `json:"x5c,omitempty"`
}

type document struct {
	Keys        []jwk  `json:"keys"`
	Sequence    uint64 `json:"spiffe_sequence,omitempty"`
	RefreshHint int64  `json:"spiffe_refresh_hint,omitempty"`
}

// Encode writes the bundle document (SPIFFE Trust Domain and Bundle section 4,
// X509-SVID section 6, JWT-SVID section 6). Equal bundles give equal bytes.
func (b *Bundle) Encode() ([]byte, error) {
	d := document{Keys: []jwk{}, Sequence: b.Sequence, RefreshHint: int64(b.RefreshHint / time.Second)}
	for _, c := range b.X509 {
		k, err := publicJWK(c.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("encode bundle of %s: certificate %s: %w", b.TrustDomain, c.Subject, err)
		}
		k.Use, k.X5c = useX509, []string{base64.StdEncoding.EncodeToString(c.Raw)}
		d.Keys = append(d.Keys, k)
	}
	for _, key := range b.JWT {
		k, err := publicJWK(key.Public)
		if err != nil {
			return nil, fmt.Errorf("encode bundle of %s: key %s: %w", b.TrustDomain, key.ID, err)
		}
		k.Use, k.Kid = useJWT, key.ID
		d.Keys = append(d.Keys, k)
	}
	return json.Marshal(d)
}

// publicJWK is RFC 7518 sections 6.2.1 and 6.3.1.
func publicJWK(key crypto.PublicKey) (jwk, error) {
	b64 := base64.RawURLEncoding.EncodeToString
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		raw, err := k.Bytes() // 4, X, Y
		if err != nil {
			return jwk{}, err
		}
		half := (len(raw) - 1) / 2
		return jwk{Kty: "EC", Crv: k.Params().Name, X: b64(raw[1 : 1+half]), Y: b64(raw[1+half:])}, nil
	case *rsa.PublicKey:
		return jwk{Kty: "RSA", N: b64(k.N.Bytes()), E: b64(big.NewInt(int64(k.E)).Bytes())}, nil
	}
	return jwk{}, fmt.Errorf("a key of type %T has no place in a bundle: use EC or RSA", key)
}

// Decode reads a bundle document of td. Elements of an unknown type or use, and
// those without use, are passed over, as are X.509 elements without
// certificate; a known element that is malformed refuses the whole document.
// No key at all is a valid document: it trusts nobody.
func Decode(td spiffeid.TrustDomain, doc []byte) (*Bundle, error) {
	b, err := decode(td, doc)
	if err != nil {
		return nil, fmt.Errorf("bundle document of %s: %w", td, err)
	}
	return b, nil
}

func decode(td spiffeid.TrustDomain, doc []byte) (*Bundle, error) {
	if len(doc) > MaxDocument {
		return nil, fmt.Errorf("%d bytes, want at most %d", len(doc), MaxDocument)
	}
	o, err := jose.ParseObject(doc)
	if err != nil {
		return nil, err
	}
	b := &Bundle{TrustDomain: td}
	if b.Sequence, err = whole(o, "spiffe_sequence"); err != nil {
		return nil, err
	}
	hint, err := whole(o, "spiffe_refresh_hint")
	if err != nil {
		return nil, err
	}
	b.RefreshHint = maxHint
	if hint < uint64(maxHint/time.Second) {
		b.RefreshHint = time.Duration(hint) * time.Second
	}
	keys, ok := o["keys"].([]any)
	if !ok {
		return nil, errors.New("keys is missing or not a list")
	}
	if len(keys) > maxKeys {
		return nil, fmt.Errorf("%d keys, want at most %d", len(keys), maxKeys)
	}
	for i, v := range keys {
		if err := b.add(v); err != nil {
			return nil, fmt.Errorf("key %d: %w", i+1, err)
		}
	}
	return b, nil
}

// whole reads an optional non-negative integer.
func whole(o jose.Object, name string) (uint64, error) {
	v, has := o[name]
	if !has {
		return 0, nil
	}
	n, _ := v.(json.Number)
	u, err := strconv.ParseUint(n.String(), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s is not a whole number", name)
	}
	return u, nil
}

// text reads a member that is a string when it is there.
func text(o jose.Object, name string) (string, error) {
	v, has := o[name]
	s, ok := v.(string)
	if has && !ok {
		return "", fmt.Errorf("%s is not a string", name)
	}
	return s, nil
}

func (b *Bundle) add(v any) error {
	m, ok := v.(map[string]any)
	if !ok {
		return errors.New("not a JSON object")
	}
	o := jose.Object(m)
	kty, _ := o["kty"].(string)
	use, _ := o["use"].(string)
	if kty != "EC" && kty != "RSA" || use != useX509 && use != useJWT {
		return nil
	}
	if _, private := o["d"]; private {
		return errors.New("holds a private key; whoever published it must replace that key")
	}
	if use == useX509 {
		return b.addX509(o)
	}
	kid, err := text(o, "kid")
	if err != nil || kid == "" {
		return errors.New("kid is missing: a JWT-SVID key must have one")
	}
	if slices.ContainsFunc(b.JWT, func(k Key) bool { return k.ID == kid }) {
		return errors.New("kid stands twice")
	}
	pub, err := publicKey(o)
	if err != nil {
		return err
	}
	b.JWT = append(b.JWT, Key{kid, pub})
	return nil
}

// addX509 takes the first certificate of x5c; the others do not count.
func (b *Bundle) addX509(o jose.Object) error {
	list, has := o["x5c"].([]any)
	if !has && o["x5c"] != nil {
		return errors.New("x5c is not a list")
	}
	if len(list) == 0 {
		return nil
	}
	s, _ := list[0].(string)
	der, err := jose.Decode64(base64.StdEncoding, s)
	if err != nil || len(der) == 0 {
		return errors.New("x5c is not base64 (the kind with +, / and padding)")
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return errors.New("x5c is not the DER of one certificate")
	}
	if !c.BasicConstraintsValid || !c.IsCA {
		return errors.New("x5c is not a CA certificate")
	}
	pub, err := publicKey(o)
	if err != nil {
		return err
	}
	if k, ok := c.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(pub) {
		return errors.New("the certificate in x5c has another key than the element")
	}
	if !slices.ContainsFunc(b.X509, func(x *x509.Certificate) bool { return bytes.Equal(x.Raw, c.Raw) }) {
		b.X509 = append(b.X509, c)
	}
	return nil
}

// publicKey reads the key of an element, which is of a kind that we know.
func publicKey(o jose.Object) (crypto.PublicKey, error) {
	k, err := jose.PublicKey(o)
	if err == nil && k == nil {
		err = errors.New("crv is not P-256, P-384 or P-521")
	}
	return k, err
}
