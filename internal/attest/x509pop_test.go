package attest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/attest/attesttest"
	"sallyport/internal/mesh"
)

var serial = big.NewInt(1000)

// authority is a CA of the test, or a leaf when it signs nothing.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// sign makes a certificate; the zero authority signs itself.
func (a authority) sign(t testing.TB, key crypto.Signer, change ...func(*x509.Certificate)) authority {
	t.Helper()
	if key == nil {
		key, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	serial = new(big.Int).Add(serial, big.NewInt(1))
	tpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "node-1"}, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
	}
	for _, f := range change {
		f(tpl)
	}
	parent := a
	if a.cert == nil {
		parent = authority{tpl, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, parent.cert, key.Public(), parent.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, key}
}

func isCA(c *x509.Certificate) {
	c.IsCA, c.KeyUsage, c.Subject.CommonName = true, x509.KeyUsageCertSign, "authority"
}

// file writes the certificates as PEM.
func pemFile(t testing.TB, certs ...*x509.Certificate) string {
	t.Helper()
	var b []byte
	for _, c := range certs {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return writeFile(t, b)
}

func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func writeFile(t testing.TB, b []byte) string {
	t.Helper()
	f := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(f, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

func jsonOf(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func popPayload(t testing.TB, certs ...*x509.Certificate) []byte {
	var raw [][]byte
	for _, c := range certs {
		raw = append(raw, c.Raw)
	}
	return jsonOf(t, map[string]any{"certificates": raw})
}

// answering is a Challenger together with a node that answers.
type answering struct {
	c   Challenger
	key crypto.PrivateKey
}

func (a answering) Verify(ctx context.Context, payload []byte, key crypto.PublicKey) (spiffeid.ID, []mesh.Selector, error) {
	return a.c.VerifyAnswer(ctx, payload, key, func(challenge []byte) ([]byte, error) { return answerPoP(a.key, challenge) })
}

func newPoP(t testing.TB, roots ...*x509.Certificate) Challenger {
	t.Helper()
	v, err := NewX509PoP(td, X509PoPConfig{CAFile: pemFile(t, roots...)})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func fingerprint(c *x509.Certificate) string {
	sum := sha1.Sum(c.Raw)
	return hex.EncodeToString(sum[:])
}

func TestX509PoP(t *testing.T) {
	for name, key := range map[string]crypto.Signer{"ECDSA": nil, "RSA": rsaKey(t)} {
		t.Run(name, func(t *testing.T) {
			root := authority{}.sign(t, nil, isCA)
			middle := root.sign(t, nil, isCA)
			node := middle.sign(t, key)
			attesttest.Run(t, func(t *testing.T) attesttest.Fixture {
				other := authority{}.sign(t, nil, isCA)
				old := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
				return attesttest.Fixture{
					Verifier: answering{newPoP(t, root.cert), node.key},
					Agent:    spiffeid.RequireFromString("spiffe://example.org/spire/agent/x509pop/" + fingerprint(node.cert)),
					Good:     popPayload(t, node.cert, middle.cert),
					Stale: [][]byte{
						popPayload(t, middle.sign(t, node.key, old).cert, middle.cert),
						popPayload(t, middle.sign(t, node.key, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }).cert, middle.cert),
					},
					Foreign: [][]byte{popPayload(t, other.sign(t, node.key).cert, other.cert)},
					Forged: [][]byte{
						popPayload(t, middle.sign(t, nil).cert, middle.cert), // of another key
						popPayload(t, node.cert),                             // without the chain
						popPayload(t, authority{}.sign(t, node.key).cert),
						popPayload(t, middle.sign(t, node.key, isCA).cert, middle.cert),
						popPayload(t, middle.sign(t, node.key, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }).cert, middle.cert),
						popPayload(t, slices.Repeat([]*x509.Certificate{node.cert}, maxChain+1)...),
						[]byte(`{"certificates":[]}`), []byte(`{"certificates":["AA=="]}`), []byte(`{"certificates":null}`),
						[]byte(`{"certificates":[],"certificates":[]}`), []byte(`[]`), []byte(`{"Certificates":[]}`),
					},
				}
			})
		})
	}
}

func TestX509PoPSaysWhatSPIRESays(t *testing.T) {
	root := authority{}.sign(t, nil, isCA)
	node := root.sign(t, nil)
	_, got, err := answering{newPoP(t, root.cert), node.key}.Verify(t.Context(), popPayload(t, node.cert), attesttest.Key(t))
	if err != nil {
		t.Fatal(err)
	}
	want := []mesh.Selector{
		{Type: "x509pop", Value: "subject:cn:node-1"},
		{Type: "x509pop", Value: "serialnumber:" + hex.EncodeToString(node.cert.SerialNumber.Bytes())},
		{Type: "x509pop", Value: "ca:fingerprint:" + fingerprint(root.cert)},
	}
	if !slices.Equal(got, want) {
		t.Errorf("selectors %v, want %v", got, want)
	}
}

func TestX509PoPRefusesWrongAnswers(t *testing.T) {
	root := authority{}.sign(t, nil, isCA)
	node := root.sign(t, nil)
	v := newPoP(t, root.cert)
	payload := popPayload(t, node.cert)
	var first []byte // an answer to another challenge
	for name, answer := range map[string]func(challenge []byte) []byte{
		"nothing": func([]byte) []byte { return nil },
		"no JSON": func([]byte) []byte { return []byte("yes") },
		"an echo": func(c []byte) []byte { return c },
		"another": func([]byte) []byte { return first },
		"zero r, s": func([]byte) []byte {
			return jsonOf(t, map[string]any{"ecdsa_signature": map[string][]byte{"nonce": make([]byte, 32), "r": {0}, "s": {0}}})
		},
		"long r": func([]byte) []byte {
			return jsonOf(t, map[string]any{"ecdsa_signature": map[string][]byte{"nonce": make([]byte, 32), "r": make([]byte, 33), "s": {1}}})
		},
		"short": func([]byte) []byte {
			return jsonOf(t, map[string]any{"ecdsa_signature": map[string][]byte{"nonce": make([]byte, 31), "r": {1}, "s": {1}}})
		},
		"as RSA": func([]byte) []byte {
			return jsonOf(t, map[string]any{"rsa_signature": map[string][]byte{"nonce": make([]byte, 32), "signature": {1}}})
		},
		"a huge one": func([]byte) []byte { return []byte(strings.Repeat(" ", maxEvidence) + "{}") },
	} {
		if _, _, err := v.VerifyAnswer(t.Context(), payload, attesttest.Key(t), func(c []byte) ([]byte, error) {
			if first == nil {
				first, _ = answerPoP(node.key, c)
				return []byte("{}"), nil
			}
			return answer(c), nil
		}); !errors.Is(err, ErrEvidence) {
			t.Errorf("answer %s: %v", name, err)
		}
	}
	if _, _, err := v.Verify(t.Context(), payload, attesttest.Key(t)); !errors.Is(err, ErrEvidence) {
		t.Errorf("without a challenge: %v", err)
	}
}

func TestX509PoPAnswersFromFiles(t *testing.T) {
	root := authority{}.sign(t, nil, isCA)
	node := root.sign(t, nil)
	der, err := x509.MarshalPKCS8PrivateKey(node.key)
	if err != nil {
		t.Fatal(err)
	}
	e, err := NewEvidence(NodeConfig{
		Kind: X509PoP, CertificateFile: pemFile(t, node.cert),
		KeyFile: writeFile(t, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
	})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := e.Payload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := newPoP(t, root.cert).VerifyAnswer(t.Context(), payload, attesttest.Key(t), e.Answer); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "{}", `{"ecdsa_signature":{"nonce":"AA=="}}`, `{"rsa_signature":{"nonce":"` + strings.Repeat("A", 43) + `="}}`} {
		if _, err := e.Answer([]byte(bad)); err == nil {
			t.Errorf("challenge %q was answered", bad)
		}
	}
}

func FuzzX509PoP(f *testing.F) {
	root := authority{}.sign(f, nil, isCA)
	node := root.sign(f, nil)
	v := newPoP(f, root.cert)
	good, _ := answerPoP(node.key, popChallenge(node.key.Public(), make([]byte, nonceSize)))
	f.Add(popPayload(f, node.cert), good)
	f.Add([]byte("{}"), []byte("{}"))
	f.Fuzz(func(t *testing.T, payload, answer []byte) {
		if id, _, err := v.VerifyAnswer(context.Background(), payload, node.key.Public(), func([]byte) ([]byte, error) { return answer, nil }); err == nil {
			t.Errorf("accepted as %s", id)
		}
		_, _ = answerPoP(node.key, answer)
	})
}
