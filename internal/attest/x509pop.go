package attest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // names a certificate as SPIRE does; nothing is trusted by it
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

// X509PoP is the name of the attestation by a certificate that the node
// already has, and the proof that it holds the key.
const X509PoP = "x509pop"

const (
	maxChain  = 8    // certificates a node shows
	nonceSize = 32   // bytes, as SPIRE
	minRSA    = 2048 // bits
)

// A Challenger is a NodeVerifier whose evidence proves something only together
// with the answer to a fresh question. ask sends the question and returns the
// answer; its error ends the attestation.
type Challenger interface {
	NodeVerifier
	VerifyAnswer(ctx context.Context, payload []byte, key crypto.PublicKey, ask func(challenge []byte) (answer []byte, err error)) (agent spiffeid.ID, selectors []mesh.Selector, err error)
}

// X509PoPConfig says which certificates admit a node.
type X509PoPConfig struct {
	// CAFile is a PEM file with the roots that node certificates chain to. It
	// is read at each attestation. Required.
	CAFile string `yaml:"ca_file"`
}

func (c *X509PoPConfig) validate(field string) []error {
	if c.CAFile == "" {
		return []error{fmt.Errorf("%s.ca_file: missing; write the PEM file with the roots of the node certificates", field)}
	}
	return nil
}

// NewX509PoP verifies certificates by challenge and response. Payload, question
// and answer are those of SPIRE's x509pop. Agents are named
// spiffe://TD/spire/agent/x509pop/FINGERPRINT, the SHA-1 of the certificate.
func NewX509PoP(td spiffeid.TrustDomain, c X509PoPConfig) (Challenger, error) {
	if _, err := readCertificates(c.CAFile); err != nil {
		return nil, fmt.Errorf("x509pop.ca_file: %w", err)
	}
	return &x509PoP{td: td, cfg: c, now: time.Now}, nil
}

type x509PoP struct {
	td  spiffeid.TrustDomain
	cfg X509PoPConfig
	now func() time.Time
}

// Verify refuses: a certificate is public and proves nothing without an answer.
func (*x509PoP) Verify(context.Context, []byte, crypto.PublicKey) (spiffeid.ID, []mesh.Selector, error) {
	return spiffeid.ID{}, nil, refused("x509pop evidence needs the answer to a challenge")
}

func (v *x509PoP) VerifyAnswer(ctx context.Context, payload []byte, key crypto.PublicKey, ask func([]byte) ([]byte, error)) (spiffeid.ID, []mesh.Selector, error) {
	fail := func(err error) (spiffeid.ID, []mesh.Selector, error) { return spiffeid.ID{}, nil, err }
	if _, err := begin(ctx, X509PoP, payload, key); err != nil {
		return fail(err)
	}
	chain, err := parsePoPPayload(payload)
	if err != nil {
		return fail(refused("x509pop: %v", err))
	}
	chains, err := v.trusted(chain)
	if err != nil {
		return fail(err)
	}
	nonce := make([]byte, nonceSize)
	rand.Read(nonce) // never fails
	leaf := chain[0]
	answer, err := ask(popChallenge(leaf.PublicKey, nonce))
	if err != nil {
		return fail(fmt.Errorf("x509pop: ask for proof of the key: %w", err))
	}
	if err := checkPoPAnswer(leaf.PublicKey, nonce, answer); err != nil {
		return fail(refused("x509pop: answer: %v", err))
	}
	sum := sha1.Sum(leaf.Raw) //nolint:gosec // a name
	id, err := spiffeid.FromSegments(v.td, "spire", "agent", X509PoP, hex.EncodeToString(sum[:]))
	if err != nil {
		return fail(fmt.Errorf("x509pop: name the agent: %w", err))
	}
	return id, popSelectors(leaf, chains), nil
}

// trusted gives the chains from the leaf to a root that we know.
func (v *x509PoP) trusted(chain []*x509.Certificate) ([][]*x509.Certificate, error) {
	roots, err := readCertificates(v.cfg.CAFile)
	if err != nil {
		return nil, fmt.Errorf("x509pop.ca_file: %w", err)
	}
	o := x509.VerifyOptions{
		Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(),
		CurrentTime: v.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, r := range roots {
		o.Roots.AddCert(r)
	}
	for _, c := range chain[1:] {
		o.Intermediates.AddCert(c)
	}
	leaf := chain[0]
	switch {
	case leaf.IsCA:
		return nil, refused("x509pop: the certificate is one of an authority")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return nil, refused("x509pop: the certificate is not for digital signatures")
	case popChallenge(leaf.PublicKey, nil) == nil:
		return nil, refused("x509pop: the key is neither ECDSA nor RSA of %d bits or more", minRSA)
	}
	chains, err := leaf.Verify(o)
	if err != nil {
		return nil, refused("x509pop: the certificate is not trusted: %v", err)
	}
	return chains, nil
}

// parsePoPPayload reads {"certificates": [base64 DER, leaf first]}.
func parsePoPPayload(payload []byte) ([]*x509.Certificate, error) {
	o, err := jose.ParseObject(payload)
	if err == nil {
		err = o.Only("certificates")
	}
	if err != nil {
		return nil, err
	}
	list, _ := o["certificates"].([]any)
	if len(list) == 0 || len(list) > maxChain {
		return nil, fmt.Errorf("%d certificates, want 1 to %d", len(list), maxChain)
	}
	out := make([]*x509.Certificate, len(list))
	for i, e := range list {
		s, _ := e.(string)
		der, err := jose.Decode64(base64.StdEncoding, s)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i+1, err)
		}
		if out[i], err = x509.ParseCertificate(der); err != nil {
			return nil, fmt.Errorf("certificate %d is malformed", i+1)
		}
	}
	return out, nil
}

// popChallenge is nil for a key that cannot answer.
func popChallenge(key crypto.PublicKey, nonce []byte) []byte {
	var b []byte
	n := base64.StdEncoding.EncodeToString(nonce)
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		b, _ = json.Marshal(map[string]any{"rsa_signature": nil, "ecdsa_signature": map[string]string{"nonce": n}})
	case *rsa.PublicKey:
		if k.N.BitLen() >= minRSA {
			b, _ = json.Marshal(map[string]any{"rsa_signature": map[string]string{"nonce": n}, "ecdsa_signature": nil})
		}
	}
	return b
}

// checkPoPAnswer verifies the signature over SHA-256(our nonce, their nonce).
func checkPoPAnswer(key crypto.PublicKey, nonce, answer []byte) error {
	if len(answer) > maxEvidence {
		return fmt.Errorf("%d bytes, want at most %d", len(answer), maxEvidence)
	}
	o, err := jose.ParseObject(answer)
	if err == nil {
		err = o.Only("rsa_signature", "ecdsa_signature")
	}
	if err != nil {
		return err
	}
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		a := o.Child("ecdsa_signature")
		sum, err := popDigest(a, nonce)
		if err != nil {
			return err
		}
		r, err1 := binary(a, "r")
		s, err2 := binary(a, "s")
		size := (k.Params().BitSize + 7) / 8
		if err1 != nil || err2 != nil || len(r) > size || len(s) > size {
			return errors.New("r or s is missing or too long")
		}
		if !ecdsa.Verify(k, sum, new(big.Int).SetBytes(r), new(big.Int).SetBytes(s)) {
			return errors.New("signature is wrong")
		}
	case *rsa.PublicKey:
		a := o.Child("rsa_signature")
		sum, err := popDigest(a, nonce)
		if err != nil {
			return err
		}
		sig, err := binary(a, "signature")
		if err != nil {
			return err
		}
		if rsa.VerifyPSS(k, crypto.SHA256, sum, sig, nil) != nil {
			return errors.New("signature is wrong")
		}
	default:
		return errors.New("key is of another kind")
	}
	return nil
}

func popDigest(a jose.Object, ours []byte) ([]byte, error) {
	theirs, err := binary(a, "nonce")
	if err != nil {
		return nil, err
	}
	if len(theirs) != nonceSize || len(ours) != nonceSize {
		return nil, fmt.Errorf("nonce of %d bytes, want %d", len(theirs), nonceSize)
	}
	sum := sha256.Sum256(append(slices.Clone(ours), theirs...))
	return sum[:], nil
}

// popSelectors are SPIRE's: the common name, the serial number and each
// authority on the way to a root.
func popSelectors(leaf *x509.Certificate, chains [][]*x509.Certificate) []mesh.Selector {
	var out []mesh.Selector
	add := func(value string) {
		if s := (mesh.Selector{Type: X509PoP, Value: value}); !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	if leaf.Subject.CommonName != "" {
		add("subject:cn:" + leaf.Subject.CommonName)
	}
	add("serialnumber:" + hex.EncodeToString(leaf.SerialNumber.Bytes()))
	for _, c := range chains {
		for _, authority := range c[1:] {
			sum := sha1.Sum(authority.Raw) //nolint:gosec // a name
			add("ca:fingerprint:" + hex.EncodeToString(sum[:]))
		}
	}
	return out
}

// popEvidence is the node's side: a certificate and its key on disk, read at
// each attestation.
type popEvidence struct{ certificate, key string }

func (popEvidence) Kind() string { return X509PoP }

func (e popEvidence) Payload(context.Context) ([]byte, error) {
	pair, err := tls.LoadX509KeyPair(e.certificate, e.key)
	if err != nil {
		return nil, fmt.Errorf("read the node's certificate: %w", err)
	}
	return json.Marshal(map[string][][]byte{"certificates": pair.Certificate})
}

func (e popEvidence) Answer(challenge []byte) ([]byte, error) {
	pair, err := tls.LoadX509KeyPair(e.certificate, e.key)
	if err != nil {
		return nil, fmt.Errorf("read the node's key: %w", err)
	}
	return answerPoP(pair.PrivateKey, challenge)
}

func answerPoP(key crypto.PrivateKey, challenge []byte) ([]byte, error) {
	o, err := jose.ParseObject(challenge)
	if err != nil {
		return nil, fmt.Errorf("challenge of the issuer: %w", err)
	}
	ours := make([]byte, nonceSize)
	rand.Read(ours) // never fails
	digest := func(kind string) ([]byte, error) {
		theirs, err := binary(o.Child(kind), "nonce")
		if err != nil || len(theirs) != nonceSize {
			return nil, fmt.Errorf("challenge of the issuer has no nonce of %d bytes for this key", nonceSize)
		}
		sum := sha256.Sum256(append(theirs, ours...))
		return sum[:], nil
	}
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		sum, err := digest("ecdsa_signature")
		if err != nil {
			return nil, err
		}
		r, s, err := ecdsa.Sign(rand.Reader, k, sum)
		if err != nil {
			return nil, err
		}
		return json.Marshal(map[string]any{"rsa_signature": nil, "ecdsa_signature": map[string][]byte{"nonce": ours, "r": r.Bytes(), "s": s.Bytes()}})
	case *rsa.PrivateKey:
		sum, err := digest("rsa_signature")
		if err != nil {
			return nil, err
		}
		sig, err := rsa.SignPSS(rand.Reader, k, crypto.SHA256, sum, nil)
		if err != nil {
			return nil, err
		}
		return json.Marshal(map[string]any{"rsa_signature": map[string][]byte{"nonce": ours, "signature": sig}, "ecdsa_signature": nil})
	}
	return nil, errors.New("the node's key is neither ECDSA nor RSA")
}
