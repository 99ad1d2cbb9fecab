// Package josetest signs tokens for tests, good ones and such as no honest
// issuer would.
package josetest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"testing"
)

// NewKey makes a key for an algorithm.
func NewKey(t testing.TB, alg string) crypto.Signer {
	t.Helper()
	var k crypto.Signer
	var err error
	switch alg {
	case "ES256":
		k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ES384":
		k, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "ES512":
		k, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	case "EdDSA":
		_, k, err = ed25519.GenerateKey(rand.Reader)
	default:
		k, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// B64 is base64url without padding.
func B64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// Sign signs a header and claims as they stand. For an alg that is none of
// ours it hashes as ES256 and RS256 do.
func Sign(t testing.TB, alg string, key crypto.Signer, header, claims string) string {
	t.Helper()
	text := B64([]byte(header)) + "." + B64([]byte(claims))
	return text + "." + B64(Signature(t, alg, key, []byte(text)))
}

// Signature is the signature alone.
func Signature(t testing.TB, alg string, key crypto.Signer, text []byte) []byte {
	t.Helper()
	hash := crypto.SHA256
	switch alg[max(0, len(alg)-3):] {
	case "384":
		hash = crypto.SHA384
	case "512":
		hash = crypto.SHA512
	}
	h := hash.New()
	h.Write(text)
	sum := h.Sum(nil)
	var sig []byte
	var err error
	switch k := key.(type) {
	case ed25519.PrivateKey:
		sig = ed25519.Sign(k, text)
	case *ecdsa.PrivateKey:
		r, s, serr := ecdsa.Sign(rand.Reader, k, sum)
		if err = serr; err == nil {
			size := (k.Params().BitSize + 7) / 8
			sig = append(r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))...)
		}
	case *rsa.PrivateKey:
		if alg[:2] == "PS" {
			sig, err = rsa.SignPSS(rand.Reader, k, hash, sum, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		} else {
			sig, err = rsa.SignPKCS1v15(rand.Reader, k, hash, sum)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return sig
}

// JWK is the public half as an element of a key set, without kid, use and alg.
func JWK(t testing.TB, key crypto.PublicKey) map[string]any {
	t.Helper()
	switch k := key.(type) {
	case *rsa.PublicKey:
		return map[string]any{"kty": "RSA", "n": B64(k.N.Bytes()), "e": B64(big.NewInt(int64(k.E)).Bytes())}
	case *ecdsa.PublicKey:
		p, err := k.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		half := (len(p) - 1) / 2
		return map[string]any{"kty": "EC", "crv": k.Params().Name, "x": B64(p[1 : 1+half]), "y": B64(p[1+half:])}
	case ed25519.PublicKey:
		return map[string]any{"kty": "OKP", "crv": "Ed25519", "x": B64(k)}
	}
	t.Fatalf("a key of type %T has no JWK", key)
	return nil
}

// Set is a key set of such elements.
func Set(t testing.TB, keys ...map[string]any) []byte {
	t.Helper()
	b, err := json.Marshal(map[string]any{"keys": keys})
	if err != nil {
		t.Fatal(err)
	}
	return b
}
