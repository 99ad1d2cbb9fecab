package jose

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	_ "crypto/sha256" // for crypto.SHA256.New
	_ "crypto/sha512" // for crypto.SHA384.New and SHA512
	"errors"
	"math/big"
)

// The algorithms that a Profile can accept. There is neither "none" nor one
// with a shared secret.
const (
	RS256, RS384, RS512 = "RS256", "RS384", "RS512"
	PS256, PS384, PS512 = "PS256", "PS384", "PS512"
	ES256, ES384, ES512 = "ES256", "ES384", "ES512"
	EdDSA               = "EdDSA" // with Ed25519
)

// minRSA and maxRSA bound the modulus of a key, bits. A longer one costs more
// time than a stranger may ask for.
const minRSA, maxRSA = 2048, 8192

type alg struct {
	kind string // "RS", "PS", "ES" or "Ed"
	hash crypto.Hash
	bits int // of the curve, for ES
}

var algs = map[string]alg{
	RS256: {"RS", crypto.SHA256, 0}, RS384: {"RS", crypto.SHA384, 0}, RS512: {"RS", crypto.SHA512, 0},
	PS256: {"PS", crypto.SHA256, 0}, PS384: {"PS", crypto.SHA384, 0}, PS512: {"PS", crypto.SHA512, 0},
	ES256: {"ES", crypto.SHA256, 256}, ES384: {"ES", crypto.SHA384, 384}, ES512: {"ES", crypto.SHA512, 521},
	EdDSA: {"Ed", 0, 0},
}

var (
	errWrong  = errors.New("token: signature is wrong")
	errMisfit = errors.New("token: alg does not fit the key")
)

// fits says whether a key of this kind can sign by the algorithm.
func (a alg) fits(key crypto.PublicKey) bool {
	switch k := key.(type) {
	case ed25519.PublicKey:
		return a.kind == "Ed" && len(k) == ed25519.PublicKeySize
	case *ecdsa.PublicKey:
		return a.kind == "ES" && k.Params().BitSize == a.bits
	case *rsa.PublicKey:
		n := k.N.BitLen()
		return (a.kind == "RS" || a.kind == "PS") && n >= minRSA && n <= maxRSA
	}
	return false
}

// verify checks a signature of exactly the form that RFC 7518 gives.
func verify(name string, key crypto.PublicKey, signed, sig []byte) error {
	a, ours := algs[name]
	if !ours || !a.fits(key) {
		return errMisfit
	}
	if k, ok := key.(ed25519.PublicKey); ok {
		if !ed25519.Verify(k, signed, sig) {
			return errWrong
		}
		return nil
	}
	h := a.hash.New()
	h.Write(signed)
	sum := h.Sum(nil)
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		size := (a.bits + 7) / 8
		if len(sig) == 2*size && ecdsa.Verify(k, sum, new(big.Int).SetBytes(sig[:size]), new(big.Int).SetBytes(sig[size:])) {
			return nil
		}
	case *rsa.PublicKey:
		if a.kind == "PS" && rsa.VerifyPSS(k, a.hash, sum, sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil {
			return nil
		}
		if a.kind == "RS" && rsa.VerifyPKCS1v15(k, a.hash, sum, sig) == nil {
			return nil
		}
	}
	return errWrong
}
