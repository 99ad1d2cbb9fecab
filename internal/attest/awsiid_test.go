package attest

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/attest/attesttest"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
)

// rsaKey gives one of three keys in turn, so that those of one test differ:
// making one takes seconds under the race detector.
func rsaKey(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	k, err := rsaKeys[rsaGiven.Add(1)%3]()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

var (
	rsaGiven atomic.Uint32
	rsaKeys  = [3]func() (*rsa.PrivateKey, error){sync.OnceValues(makeRSA), sync.OnceValues(makeRSA), sync.OnceValues(makeRSA)}
)

func makeRSA() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) }

func der(t testing.TB, v any, params string) []byte {
	t.Helper()
	b, err := asn1.MarshalWithParams(v, params)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// cms is how a SignedData of the test is made.
type cms struct {
	by       authority
	detached bool
	attrs    bool
	withCert bool
	signers  int
	over     []byte // what the attributes' digest is over, if not the content
	typed    asn1.ObjectIdentifier
}

var oidData = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}

func (c cms) sign(t testing.TB, content []byte) []byte {
	t.Helper()
	null := []byte{5, 0}
	sha := encode(0x30, slices.Concat(der(t, digests[0].oid, ""), null))
	digestOf := content
	if c.over != nil {
		digestOf = c.over
	}
	if c.typed == nil {
		c.typed = oidData
	}
	sum := sha256.Sum256(digestOf)
	var attrs []byte
	if c.attrs {
		attr := func(oid asn1.ObjectIdentifier, v any) []byte {
			return encode(0x30, slices.Concat(der(t, oid, ""), encode(0x31, der(t, v, ""))))
		}
		list := slices.Concat(attr(oidContentType, c.typed), attr(oidMessageDigest, sum[:]))
		sum = sha256.Sum256(encode(0x31, list))
		attrs = encode(0xa0, list)
	}
	sig, err := rsa.SignPKCS1v15(rand.Reader, c.by.key.(*rsa.PrivateKey), crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	sid := encode(0x30, slices.Concat(c.by.cert.RawIssuer, der(t, c.by.cert.SerialNumber, "")))
	info := encode(0x30, slices.Concat(der(t, 1, ""), sid, sha, attrs, encode(0x30, slices.Concat(der(t, oidRSA, ""), null)), encode(0x04, sig)))
	inner := der(t, oidData, "")
	if !c.detached {
		inner = append(inner, encode(0xa0, encode(0x04, content))...)
	}
	var certs []byte
	if c.withCert {
		certs = encode(0xa0, c.by.cert.Raw)
	}
	if c.signers == 0 {
		c.signers = 1
	}
	signers := bytes.Repeat(info, c.signers)
	sd := encode(0x30, slices.Concat(der(t, 1, ""), encode(0x31, sha), encode(0x30, inner), certs, encode(0x31, signers)))
	return encode(0x30, slices.Concat(der(t, oidSignedData, ""), encode(0xa0, sd)))
}

// indefinite writes DER as AWS does: no lengths, and octet strings in parts.
func indefinite(t testing.TB, b []byte) []byte {
	var v asn1.RawValue
	rest, err := asn1.Unmarshal(b, &v)
	if err != nil {
		t.Fatal(err)
	}
	switch {
	case v.IsCompound:
		out := []byte{b[0], 0x80}
		for in := v.Bytes; len(in) > 0; {
			var part asn1.RawValue
			if in, err = asn1.Unmarshal(in, &part); err != nil {
				t.Fatal(err)
			}
			out = append(out, indefinite(t, part.FullBytes)...)
		}
		b = append(out, 0, 0)
	case b[0] == 0x04 && len(v.Bytes) > 300:
		out := []byte{0x24, 0x80}
		for part := range slices.Chunk(v.Bytes, 200) {
			out = append(out, encode(0x04, part)...)
		}
		b = append(out, 0, 0)
	default:
		b = v.FullBytes
	}
	return append(b, rest...)
}

// awsDocument is the sample of Amazon's manual with a time of today.
func awsDocument(t testing.TB, change ...any) []byte {
	return jsonOf(t, with(map[string]any{
		"devpayProductCodes": nil, "marketplaceProductCodes": []string{"1abc2defghijklm3nopqrs4tu"}, "availabilityZone": "us-west-2b",
		"privateIp": "10.158.112.84", "version": "2017-09-30", "instanceId": "i-1234567890abcdef0", "billingProducts": nil,
		"instanceType": "t2.micro", "accountId": "123456789012", "imageId": "ami-5fb8c835", "pendingTime": time.Now().Add(-time.Hour).UTC().Format(time.RFC3339),
		"architecture": "x86_64", "kernelId": nil, "ramdiskId": nil, "region": "us-west-2",
	}, change...))
}

// awsLines breaks base64 as the metadata service does.
func awsLines(b []byte) string {
	var out []string
	for l := range slices.Chunk([]byte(base64.StdEncoding.EncodeToString(b)), 64) {
		out = append(out, string(l))
	}
	return strings.Join(out, "\n")
}

func awsPayload(t testing.TB, doc, sig []byte) []byte {
	return jsonOf(t, map[string]string{"document": string(doc), "rsa2048": awsLines(sig)})
}

func newAWS(t testing.TB, certs ...*x509.Certificate) *awsIID {
	t.Helper()
	c := AWSIIDConfig{Accounts: []string{"123456789012"}, Certificates: map[string]string{"us-west-2": pemFile(t, certs...)}}
	if errs := c.validate("aws_iid"); len(errs) > 0 {
		t.Fatal(errs)
	}
	v, err := NewAWSIID(td, c, &memSeen{})
	if err != nil {
		t.Fatal(err)
	}
	return v.(*awsIID)
}

func TestAWSIID(t *testing.T) {
	amazon, former, other := authority{}.sign(t, rsaKey(t)), authority{}.sign(t, rsaKey(t)), authority{}.sign(t, rsaKey(t))
	for name, c := range map[string]cms{
		"with attributes": {by: amazon, attrs: true}, "without": {by: amazon}, "detached": {by: amazon, attrs: true, detached: true}, "with its certificate": {by: amazon, withCert: true},
	} {
		t.Run(name, func(t *testing.T) {
			attesttest.Run(t, func(t *testing.T) attesttest.Fixture {
				say := func(change ...any) []byte {
					d := awsDocument(t, change...)
					return awsPayload(t, d, c.sign(t, d))
				}
				doc := awsDocument(t)
				by := func(change func(*cms)) []byte {
					m := c
					change(&m)
					return awsPayload(t, doc, m.sign(t, doc))
				}
				at := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(time.RFC3339) }
				return attesttest.Fixture{
					Verifier: newAWS(t, former.cert, amazon.cert), SingleUse: true,
					Agent: spiffeid.RequireFromString("spiffe://example.org/spire/agent/aws_iid/123456789012/us-west-2/i-1234567890abcdef0"),
					Good:  awsPayload(t, doc, indefinite(t, c.sign(t, doc))),
					Stale: [][]byte{say("pendingTime", at(-25*time.Hour)), say("pendingTime", at(time.Minute)), say("pendingTime", nil), say("pendingTime", "today")},
					Foreign: [][]byte{
						by(func(m *cms) { m.by = other }), say("accountId", "210987654321"), say("accountId", nil), say("region", "eu-west-1"), say("region", nil),
					},
					Forged: [][]byte{
						awsPayload(t, awsDocument(t, "instanceId", "i-aaaaaaaaaaaaaaaaa"), c.sign(t, doc)), // another document
						by(func(m *cms) { m.attrs, m.over = true, []byte("x") }),
						by(func(m *cms) { m.attrs, m.typed = true, oidSignedData }),
						by(func(m *cms) { m.signers = 2 }),
						say("instanceId", "../../server"), say("instanceId", nil), say("instanceId", "i-"),
						awsPayload(t, doc, nil), awsPayload(t, doc, []byte{0x30, 0x80}), awsPayload(t, nil, c.sign(t, doc)),
						awsPayload(t, doc, append(c.sign(t, doc), 0)),
						jsonOf(t, map[string]string{"document": string(doc), "signature": "AAAA"}),
						jsonOf(t, map[string]string{"document": string(doc), "rsa2048": awsLines(c.sign(t, doc)), "pkcs7": "x"}),
					},
				}
			})
		})
	}
}

func TestAnInstanceCountsOnceForEver(t *testing.T) {
	amazon := authority{}.sign(t, rsaKey(t))
	v := newAWS(t, amazon.cert)
	first, second := awsDocument(t), awsDocument(t, "privateIp", "10.0.0.1")
	key := attesttest.Key(t)
	_, sel, err := v.Verify(t.Context(), awsPayload(t, first, cms{by: amazon}.sign(t, first)), key)
	for _, want := range []string{"account:123456789012", "region:us-west-2", "az:us-west-2b", "image:id:ami-5fb8c835", "instance:id:i-1234567890abcdef0", "instance:type:t2.micro"} {
		if err != nil || !slices.Contains(sel, mesh.Selector{Type: AWSIID, Value: want}) {
			t.Errorf("no selector %s in %v, %v", want, sel, err)
		}
	}
	if _, _, err := v.Verify(t.Context(), awsPayload(t, second, cms{by: amazon}.sign(t, second)), attesttest.Key(t)); err == nil {
		t.Error("another document of the same instance was accepted for another key")
	}
	both := jsonOf(t, map[string]string{"document": string(second), "rsa2048": awsLines(cms{by: amazon}.sign(t, second)), "signature": "AAAA"})
	if _, _, err := v.Verify(t.Context(), both, key); err != nil {
		t.Errorf("the same key: %v", err)
	}
}

func TestWeakCertificatesAreNoConfiguration(t *testing.T) {
	t.Setenv("GODEBUG", "rsa1024min=0")
	small, err := rsa.GenerateKey(rand.Reader, 1024) //nolint:gosec // to be refused
	if err != nil {
		t.Fatal(err)
	}
	weak := authority{}.sign(t, small)
	c := AWSIIDConfig{Accounts: []string{"123456789012"}, Certificates: map[string]string{"us-west-2": pemFile(t, weak.cert)}}
	if _, err := NewAWSIID(td, c, &memSeen{}); err == nil {
		t.Error("a certificate of 1,024 bits was taken")
	}
	if errs := (&AWSIIDConfig{Accounts: []string{"12"}, Certificates: map[string]string{"Frankfurt": "x"}, MaxAge: -1}).validate("f"); len(errs) != 3 {
		t.Errorf("%d mistakes, want 3: %v", len(errs), errs)
	}
}

// TestSignedDataOfOpenSSL reads what another implementation makes.
func TestSignedDataOfOpenSSL(t *testing.T) {
	amazon := authority{}.sign(t, rsaKey(t))
	keyDER, err := x509.MarshalPKCS8PrivateKey(amazon.key)
	if err != nil {
		t.Fatal(err)
	}
	meshtest.Need(t, "openssl")
	doc, key, out := writeFile(t, awsDocument(t)), writeFile(t, pemBlock("PRIVATE KEY", keyDER)), filepath.Join(t.TempDir(), "out")
	for name, args := range map[string][]string{
		"DER": nil, "in parts": {"-stream", "-indef"}, "without attributes": {"-noattr"},
	} {
		args = append([]string{"cms", "-sign", "-nodetach", "-binary", "-md", "sha256", "-in", doc, "-signer", pemFile(t, amazon.cert), "-inkey", key, "-outform", "DER", "-out", out}, args...)
		if b, err := exec.Command("openssl", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, b)
		}
		ber, err := readSmall(out)
		if err != nil {
			t.Fatal(err)
		}
		sd, err := parseSignedData(ber)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		text, _ := readSmall(doc)
		if err := sd.verify(text, amazon.cert); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAnInstanceAsksItsMetadata(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := r.Header.Get("X-aws-ec2-metadata-token")
		switch r.Method + " " + r.URL.Path {
		case "PUT /latest/api/token":
			if r.Header.Get("X-aws-ec2-metadata-token-ttl-seconds") != "60" {
				t.Error("token without a life")
			}
			w.Write([]byte("session"))
			return
		case "GET /latest/dynamic/instance-identity/document", "GET /latest/dynamic/instance-identity/signature", "GET /latest/dynamic/instance-identity/rsa2048":
			if h == "session" {
				w.Write([]byte(filepath.Base(r.URL.Path) + "\nx"))
				return
			}
		}
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer srv.Close()
	e, err := NewEvidence(NodeConfig{Kind: AWSIID, MetadataURL: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	got, err := e.Payload(t.Context())
	if err != nil || string(got) != `{"document":"document\nx","rsa2048":"rsa2048\nx","signature":"signature\nx"}` {
		t.Errorf("payload %s, %v", got, err)
	}
}

func FuzzSignedData(f *testing.F) {
	amazon := authority{}.sign(f, rsaKey(f))
	doc := awsDocument(f)
	for _, c := range []cms{{by: amazon}, {by: amazon, attrs: true, withCert: true}} {
		f.Add(c.sign(f, doc))
		f.Add(indefinite(f, c.sign(f, doc)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if d, err := normalize(b); err == nil {
			if again, err := normalize(d); err != nil || !bytes.Equal(again, d) {
				t.Errorf("DER is not its own normal form: %v", err)
			}
		}
		sd, err := parseSignedData(b)
		if err != nil {
			return
		}
		if sd.verify([]byte("something else"), amazon.cert) == nil {
			t.Error("a signature over something else is right")
		}
	})
}

func FuzzAWSPayload(f *testing.F) {
	f.Add(awsPayload(f, awsDocument(f), []byte{0x30, 0}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if doc, sig, err := parseAWSPayload(b); err == nil && (doc == nil || sig == nil) {
			t.Error("half a payload")
		}
	})
}
