package test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// dialAPI connects to the issuer as who has an SVID in a folder that the CLI
// wrote; as nobody without one.
func (w *world) dialAPI(folder string) *grpc.ClientConn {
	w.t.Helper()
	// Whose server it is, others test.
	c := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	if folder != "" {
		cert, err := tls.LoadX509KeyPair(w.path(folder, "svid.pem"), w.path(folder, "key.pem"))
		if err != nil {
			w.t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	cc, err := grpc.NewClient(w.issuer, grpc.WithTransportCredentials(credentials.NewTLS(c)))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { cc.Close() })
	return cc
}

// minted has an SVID of a path written to a folder.
func (w *world) minted(path, folder string) {
	w.t.Helper()
	if out, err := w.operate("svid mint spiffe://" + trustDomain + path + " --ttl 10m --write " + w.path(folder)); err != nil {
		w.t.Fatalf("mint: %v: %s", err, out)
	}
}

// TestAnIssuerBelow does what a spire-server does by its UpstreamAuthority
// "spire", call for call on one connection: it is certified by a real issuer,
// publishes its JWT key, and looks at the bundle. Then it signs for a workload.
func TestAnIssuerBelow(t *testing.T) {
	t.Parallel()
	w := newWorld(t, time.Minute)
	w.startIssuer()
	const id = "spiffe://" + trustDomain + "/ns/edge/sa/issuer"
	if out, err := w.operate("entry create " + id + " --downstream --selector unix:uid:5 --id edge --parent spiffe://" + trustDomain + "/spire/agent/join_token/edge"); err != nil {
		t.Fatalf("create: %v: %s", err, out)
	}
	w.minted("/ns/edge/sa/issuer", "edge")
	w.minted("/ns/edge/sa/other", "other")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	// As spire-server asks: a subject, and the trust domain for a name.
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIFFE"}}, URIs: []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	req := &svidv1.NewDownstreamX509CARequest{Csr: csr, PreferredTtl: 3600}
	if _, err := svidv1.NewSVIDClient(w.dialAPI("other")).NewDownstreamX509CA(t.Context(), req); status.Code(err) != codes.PermissionDenied {
		t.Errorf("another workload: %v", err)
	}
	cc := w.dialAPI("edge")
	resp, err := svidv1.NewSVIDClient(cc).NewDownstreamX509CA(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	w.verifyBelow(resp, key)

	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	jwt := &types.JWTKey{KeyId: "edge-1", PublicKey: public, ExpiresAt: time.Now().Add(time.Hour).Unix()}
	// It publishes again after a restart; the answer is what its bundle becomes.
	for range 2 {
		published, err := bundlev1.NewBundleClient(cc).PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: jwt})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(published.JwtAuthorities, func(k *types.JWTKey) bool { return k.KeyId == jwt.KeyId && bytes.Equal(k.PublicKey, public) }) {
			t.Errorf("the answer lacks the key: %v", published)
		}
	}
	polled, err := bundlev1.NewBundleClient(cc).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(polled.X509Authorities) != len(resp.X509Authorities) || len(polled.X509Authorities) == 0 || !bytes.Equal(polled.X509Authorities[0].Asn1, resp.X509Authorities[0]) || polled.RefreshHint <= 0 {
		t.Errorf("the bundle %v has other roots than the answer to the request, or no time to look again", polled)
	}
	// The lifetime is ours to choose when it does not ask for one.
	if _, err := svidv1.NewSVIDClient(cc).NewDownstreamX509CA(t.Context(), &svidv1.NewDownstreamX509CARequest{Csr: csr}); err != nil {
		t.Error(err)
	}
	holds := func() bool {
		b, err := bundlev1.NewBundleClient(w.dialAPI("")).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range b.JwtAuthorities {
			if k.KeyId == "edge-1" {
				return true
			}
		}
		return false
	}
	if !holds() {
		t.Error("the bundle lacks the key of the issuer below")
	}
	if out, err := w.operate("entry delete edge"); err != nil {
		t.Fatalf("delete: %v: %s", err, out)
	}
	if holds() {
		t.Error("the bundle has the key of an issuer that is none any more")
	}
	if _, err := svidv1.NewSVIDClient(cc).NewDownstreamX509CA(t.Context(), req); status.Code(err) != codes.PermissionDenied {
		t.Errorf("without its entry: %v", err)
	}
	log, err := os.ReadFile(w.path("issuer", "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"x509 downstream CA serial ", `"svid.NewDownstreamX509CA"`, `"bundle.PublishJWTAuthority"`} {
		if !strings.Contains(string(log), want) {
			t.Errorf("the audit does not hold %s", want)
		}
	}
}

// verifyBelow lets the issuer below sign for a workload, and verifies that up
// to the root that the issuer wrote to its file.
func (w *world) verifyBelow(resp *svidv1.NewDownstreamX509CAResponse, key *ecdsa.PrivateKey) {
	w.t.Helper()
	roots, mids := x509.NewCertPool(), x509.NewCertPool()
	pem, err := os.ReadFile(w.path("issuer", "bundle.pem"))
	if err != nil || !roots.AppendCertsFromPEM(pem) {
		w.t.Fatal(err)
	}
	var chain []*x509.Certificate
	for _, der := range resp.CaCertChain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			w.t.Fatal(err)
		}
		chain = append(chain, c)
		mids.AddCert(c)
	}
	// What spire-server asks of the certificate before it signs by it.
	const may = x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature
	if c := chain[0]; !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0 || c.KeyUsage&^may != 0 || len(c.URIs) > 1 || len(c.URIs) == 1 && c.URIs[0].String() != "spiffe://"+trustDomain {
		w.t.Errorf("a spire-server would refuse the CA certificate: key usage %b, names %v", c.KeyUsage, c.URIs)
	}
	for id, good := range map[string]bool{"spiffe://" + trustDomain + "/ns/edge/sa/till": true, "spiffe://other.example/x": false} {
		u, err := url.Parse(id)
		if err != nil {
			w.t.Fatal(err)
		}
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Second), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, URIs: []*url.URL{u},
		}, chain[0], key.Public(), key)
		if err != nil {
			w.t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			w.t.Fatal(err)
		}
		_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: mids, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		if (err == nil) != good {
			w.t.Errorf("%s below: %v", id, err)
		}
	}
}
