package policyset

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// keyPrefix begins a pinned key.
const keyPrefix = "ed25519:"

// A Key is the public key of somebody who signs sets, as configurations pin
// it: "ed25519:" and its 32 bytes in base64.
type Key string

// KeyOf writes a public key.
func KeyOf(pub ed25519.PublicKey) Key {
	return Key(keyPrefix + base64.StdEncoding.EncodeToString(pub))
}

// public reads the key.
func (k Key) public() (ed25519.PublicKey, error) {
	text, ok := strings.CutPrefix(string(k), keyPrefix)
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	// Written anew, because base64 passes over line feeds.
	if !ok || err != nil || len(b) != ed25519.PublicKeySize || KeyOf(b) != k {
		return nil, fmt.Errorf("%.80q is not a key: write ed25519: and 32 bytes in base64, as sallyport policy key prints it", string(k))
	}
	return b, nil
}

// A signature is checked only by Signers.Verify.
type signature struct {
	key Key
	sig []byte
}

func (g signature) good(body []byte) bool {
	pub, err := g.key.public()
	return err == nil && ed25519.Verify(pub, body, g.sig)
}

func (g signature) text() string { return base64.StdEncoding.EncodeToString(g.sig) }

// Sign adds the signature of a key, in the place of an earlier one of it.
func (s *Signed) Sign(k ed25519.PrivateKey) {
	g := signature{KeyOf(k.Public().(ed25519.PublicKey)), ed25519.Sign(k, s.body)}
	s.signatures = slices.DeleteFunc(s.signatures, func(old signature) bool { return old.key == g.key })
	s.signatures = append(s.signatures, g)
	slices.SortFunc(s.signatures, func(a, b signature) int { return strings.Compare(string(a.key), string(b.key)) })
}

// Keys are those whose signatures are good.
func (s *Signed) Keys() []Key {
	var out []Key
	for _, g := range s.signatures {
		if g.good(s.body) {
			out = append(out, g.key)
		}
	}
	return out
}

func (r *reader) signatures() (out []signature) {
	for r.err == nil && len(r.rest) > 0 {
		if len(out) == maxSignatures {
			r.fail("more than %d signatures", maxSignatures)
		}
		key, text, _ := strings.Cut(r.field("signature "), " ")
		g := signature{key: Key(key)}
		_, err := g.key.public()
		if err == nil {
			g.sig, err = base64.StdEncoding.Strict().DecodeString(text)
		}
		if err == nil && len(g.sig) != ed25519.SignatureSize {
			err = fmt.Errorf("a signature has %d bytes, not %d", ed25519.SignatureSize, len(g.sig))
		}
		if err == nil && len(out) > 0 && out[len(out)-1].key >= g.key {
			err = errors.New("signatures are not in the order of their keys, or one key is there twice")
		}
		if err != nil {
			r.fail("%v", err)
		}
		out = append(out, g)
	}
	return out
}

// Signers pin who signs policies: a set counts only with the signatures of
// enough of the keys.
type Signers struct {
	// Keys are those of whoever may sign, as sallyport policy key prints them.
	// Without any, nothing is pinned.
	Keys []Key `yaml:"keys"`
	// Threshold is how many of them must have signed. Default: all.
	Threshold int `yaml:"threshold"`
}

// Pinned reports whether anything is pinned.
func (s Signers) Pinned() bool { return len(s.Keys) > 0 }

// Need is how many signatures a set must have.
func (s Signers) Need() int {
	if s.Threshold == 0 {
		return len(s.Keys)
	}
	return s.Threshold
}

// Validate reports every mistake, by field.
func (s Signers) Validate() error {
	var errs []error
	for i, k := range s.Keys {
		if _, err := k.public(); err != nil {
			errs = append(errs, fmt.Errorf("policy.signers.keys[%d]: %w", i, err))
		}
		if slices.Contains(s.Keys[:i], k) {
			errs = append(errs, fmt.Errorf("policy.signers.keys[%d]: is there twice; it would count once", i))
		}
	}
	switch {
	case len(s.Keys) == 0 && s.Threshold != 0:
		errs = append(errs, errors.New("policy.signers.threshold: given without keys, of which so many must sign"))
	case s.Threshold < 0 || s.Threshold > len(s.Keys):
		errs = append(errs, fmt.Errorf("policy.signers.threshold: %d is not from 1 to the %d keys", s.Threshold, len(s.Keys)))
	}
	return errors.Join(errs...)
}

// Verify says why a set does not have enough good signatures, each key counted
// once. Without keys no set has.
func (s Signers) Verify(set *Signed) error {
	if !s.Pinned() {
		return errors.New("policy set: no keys are pinned that could vouch for it")
	}
	good, known := 0, 0
	// Those of others are not looked at: each costs a hash of the whole set.
	for _, k := range s.Keys {
		i := slices.IndexFunc(set.signatures, func(g signature) bool { return g.key == k })
		if i < 0 {
			continue
		}
		known++
		if set.signatures[i].good(set.body) {
			good++
		}
	}
	if good >= s.Need() {
		return nil
	}
	why := fmt.Sprintf("%d of the %d pinned keys have signed", good, len(s.Keys))
	if known > good {
		why += fmt.Sprintf(" (%d signatures of pinned keys are not of this set)", known-good)
	}
	return fmt.Errorf("policy set %.12s of revision %d: %s, %d must", set.hash, set.Revision, why, s.Need())
}

// ParsePrivate reads a private key: PKCS#8 in PEM, as openssl genpkey writes it.
func ParsePrivate(b []byte) (ed25519.PrivateKey, error) {
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New("not a private key in PEM; make one with: sallyport policy key FILE")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("private key not understood: not PKCS#8")
	}
	ed, ok := k.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("the key is %T, sets are signed by Ed25519; make one with: sallyport policy key FILE", k)
	}
	return ed, nil
}

// EncodePrivate writes what ParsePrivate reads.
func EncodePrivate(k ed25519.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
