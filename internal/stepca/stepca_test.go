package stepca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/smallstep/certificates/cas/apiv1"
	"go.step.sm/crypto/jose"
)

// A fake is step-ca by its wire.
type fake struct {
	t       *testing.T
	root    *x509.Certificate
	rootKey *ecdsa.PrivateKey
	server  *httptest.Server
	key     *ecdsa.PrivateKey // of the provisioner
	// answer replaces the answer to /1.0/sign.
	answer http.HandlerFunc
	seen   jwt.MapClaims
	rootIs *x509.Certificate // what /root sends
}

func newFake(t *testing.T) *fake {
	f := &fake{t: t}
	f.root, f.rootKey = f.cert("root", nil, nil, true)
	f.rootIs = f.root
	server, key := f.cert("server", f.root, f.rootKey, false)
	f.server = httptest.NewUnstartedServer(http.HandlerFunc(f.serve))
	f.server.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{server.Raw}, PrivateKey: key}}}
	f.server.Config.ErrorLog = log.New(new(bytes.Buffer), "", 0)
	f.server.StartTLS()
	t.Cleanup(f.server.Close)
	return f
}

func (f *fake) cert(name string, parent *x509.Certificate, by *ecdsa.PrivateKey, isCA bool) (*x509.Certificate, *ecdsa.PrivateKey) {
	f.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: isCA, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	if parent == nil {
		parent, by = template, key
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
	if err != nil {
		f.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(raw)
	if err != nil {
		f.t.Fatal(err)
	}
	return cert, key
}

func text(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

func send(w http.ResponseWriter, code int, v any) {
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v)
}

func (f *fake) serve(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/root/") {
		send(w, 200, map[string]string{"ca": text(f.rootIs)})
		return
	}
	if f.answer != nil {
		f.answer(w, r)
		return
	}
	var in struct{ CSR, OTT, NotAfter string }
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil || in.NotAfter != "1h0m0s" || r.URL.Path != "/1.0/sign" {
		send(w, 400, map[string]string{"message": fmt.Sprintf("%v %+v", err, in)})
		return
	}
	f.seen = jwt.MapClaims{}
	token, err := jwt.ParseWithClaims(in.OTT, f.seen, func(*jwt.Token) (any, error) { return f.key.Public(), nil }, jwt.WithAudience(f.server.URL+"/1.0/sign"), jwt.WithIssuer("sallyport"), jwt.WithExpirationRequired())
	if err != nil || token.Header["kid"] == "" {
		send(w, 401, map[string]string{"message": fmt.Sprint(err)})
		return
	}
	block, _ := pem.Decode([]byte(in.CSR))
	sum := sha256.Sum256(block.Bytes)
	if got := f.seen["cnf"].(map[string]any)["x5rt#S256"]; got != base64.RawURLEncoding.EncodeToString(sum[:]) {
		send(w, 403, map[string]string{"message": "another CSR"})
		return
	}
	cert, _ := f.cert("signed", f.root, f.rootKey, true)
	send(w, 201, map[string]any{"certChain": []string{text(cert)}})
}

func (f *fake) client() (*Client, error) {
	jwk, err := jose.GenerateJWK("EC", "P-256", "ES256", "sig", "k1", 0)
	if err != nil {
		f.t.Fatal(err)
	}
	f.key = jwk.Key.(*ecdsa.PrivateKey)
	data, err := json.Marshal(jwk)
	if err != nil {
		f.t.Fatal(err)
	}
	file := filepath.Join(f.t.TempDir(), "key.jwk")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		f.t.Fatal(err)
	}
	key, err := LoadKey(file, nil)
	if err != nil {
		f.t.Fatal(err)
	}
	sum := sha256.Sum256(f.root.Raw)
	return New(Config{URL: f.server.URL + "/", Fingerprints: []string{strings.ToUpper(hex.EncodeToString(sum[:]))}, Provisioner: "sallyport", Key: key})
}

func (f *fake) ask() (*apiv1.CreateCertificateResponse, error) {
	f.t.Helper()
	c, err := f.client()
	if err != nil {
		f.t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.t.Fatal(err)
	}
	raw, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "us"}}, key)
	if err != nil {
		f.t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(raw)
	if err != nil {
		f.t.Fatal(err)
	}
	return c.CreateCertificate(&apiv1.CreateCertificateRequest{CSR: csr, Lifetime: time.Hour})
}

func TestAsk(t *testing.T) {
	f := newFake(t)
	got, err := f.ask()
	if err != nil {
		t.Fatal(err)
	}
	if len(got.CertificateChain) != 1 || !got.CertificateChain[0].Equal(f.root) {
		t.Errorf("a chain of %d that does not end in the root", len(got.CertificateChain))
	}
	for _, claim := range []string{"jti", "nbf", "iat", "exp"} {
		if f.seen[claim] == nil {
			t.Errorf("the token has no %s", claim)
		}
	}
	if f.seen["sub"] != "us" {
		t.Errorf("the token is about %v", f.seen["sub"])
	}
}

func TestAnswersThatAreRefused(t *testing.T) {
	body := func(code int, s string) func(*fake) {
		return func(f *fake) {
			f.answer = func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code); fmt.Fprint(w, s) }
		}
	}
	for _, tt := range []struct {
		name, want string
		do         func(*fake)
	}{
		{"another root than the pinned one", "has the fingerprint", func(f *fake) { f.rootIs, _ = f.cert("evil", nil, nil, true) }},
		{"a server of another root", "certificate signed by unknown authority", func(f *fake) {
			evil, key := f.cert("evil", nil, nil, true)
			cert, serverKey := f.cert("server", evil, key, false)
			f.server.TLS.Certificates = []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: serverKey}}
		}},
		{"a chain under another root", "which no pinned root has signed", func(f *fake) {
			f.answer = func(w http.ResponseWriter, _ *http.Request) {
				evil, key := f.cert("evil", nil, nil, true)
				cert, _ := f.cert("signed", evil, key, true)
				send(w, 201, map[string]any{"certChain": []string{text(cert), text(evil)}})
			}
		}},
		{"a refusal", `step-ca answered 401: "no\ntoken"`, body(401, `{"status":401,"message":"no\ntoken"}`)},
		{"a refusal without a word", `step-ca answered 500: "Internal Server Error"`, body(500, `oops`)},
		{"a redirect", "step-ca answered 302", func(f *fake) {
			f.answer = func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) }
		}},
		{"no JSON", "no JSON", body(201, "<html>")},
		{"no chain", "sent 0 certificates", body(201, `{}`)},
		{"no PEM", "something else than a certificate", body(201, `{"certChain":["x"]}`)},
		{"a broken certificate", "malformed", body(201, `{"certChain":["-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]}`)},
		{"a flood", "more than", body(201, strings.Repeat("x", most+2))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFake(t)
			tt.do(f)
			if _, err := f.ask(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestLoadKey(t *testing.T) {
	jwk, err := jose.GenerateJWK("EC", "P-256", "ES256", "sig", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := json.Marshal(jwk)
	if err != nil {
		t.Fatal(err)
	}
	public, err := json.Marshal(jwk.Public())
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := jose.EncryptJWK(jwk, []byte("pw"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name     string
		data     []byte
		password string
		perm     os.FileMode
		want     string // of the error
	}{
		{"plain", plain, "", 0o600, ""},
		{"encrypted", []byte(sealed.FullSerialize()), "pw", 0o600, ""},
		{"encrypted, without the password", []byte(sealed.FullSerialize()), "", 0o600, "password_file"},
		{"encrypted, with another password", []byte(sealed.FullSerialize()), "other", 0o600, "the password is wrong"},
		{"open to others", plain, "", 0o640, "chmod 600"},
		{"public", public, "", 0o600, "not a private key"},
		{"something else", []byte("hello"), "", 0o600, "no private JWK"},
		{"huge", bytes.Repeat([]byte("x"), 70<<10), "", 0o600, "larger than a key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "key")
			if err := os.WriteFile(file, tt.data, tt.perm); err != nil {
				t.Fatal(err)
			}
			var password []byte
			if tt.password != "" {
				password = []byte(tt.password)
			}
			k, err := LoadKey(file, password)
			if tt.want == "" {
				if err != nil || k.id == "" {
					t.Errorf("%+v, %v", k.id, err)
				}
			} else if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
	f.Fuzz(func(t *testing.T, s string) {
		if certs, err := parse([]string{s}); err == nil && len(certs) != 1 {
			t.Errorf("%d certificates of one text", len(certs))
		}
	})
}
