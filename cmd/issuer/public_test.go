package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/ca"
	"sallyport/internal/federation"
	"sallyport/internal/meshtest"
	"sallyport/internal/svid"
)

// publicIssuer is an issuer of which only the CA and the public listeners run.
func publicIssuer(t *testing.T, td, url string) (*issuer, []string) {
	t.Helper()
	trust := spiffeid.RequireTrustDomainFromString(td)
	c, err := ca.Open(t.Context(), ca.Config{TrustDomain: trust, Dir: filepath.Join(t.TempDir(), "ca"), Audit: audit.NewMemory(), JWTIssuer: url})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	in := &issuer{cfg: &Config{TrustDomain: trust, OIDC: OIDCConfig{Issuer: url}}, log: slog.New(slog.DiscardHandler), ca: c}
	in.cfg.BundleEndpoint.Listen = "localhost:0"
	if url != "" {
		in.cfg.OIDC.Listen = "127.0.0.1:0"
	}
	doors, err := in.publicDoors()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	var addrs []string
	for _, d := range doors {
		addrs = append(addrs, d.ln.Addr().String())
		go func() { done <- d.run(ctx) }()
	}
	t.Cleanup(func() {
		cancel()
		for range doors {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
	return in, addrs
}

// A verifier is what an OIDC relying party does, written from OpenID Connect
// Discovery 1.0 and Core 1.0 section 3.1.3.7 alone.
type verifier struct {
	issuer, audience string
	http             *http.Client
}

func (v verifier) get(url string, into any) error {
	r, err := v.http.Get(url)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	if r.StatusCode != 200 || r.Header.Get("Content-Type") != "application/json" || r.Header.Get("Cache-Control") == "" {
		return fmt.Errorf("%s: %s, %v", url, r.Status, r.Header)
	}
	return json.NewDecoder(r.Body).Decode(into)
}

func (v verifier) verify(token string) (sub string, err error) {
	var meta map[string]any
	if err := v.get(v.issuer+"/.well-known/openid-configuration", &meta); err != nil {
		return "", err
	}
	if meta["issuer"] != v.issuer {
		return "", fmt.Errorf("metadata is of issuer %v", meta["issuer"])
	}
	for _, must := range []string{"authorization_endpoint", "jwks_uri", "response_types_supported", "subject_types_supported", "id_token_signing_alg_values_supported"} {
		if meta[must] == nil {
			return "", fmt.Errorf("metadata lacks %s", must)
		}
	}
	algs, _ := meta["id_token_signing_alg_values_supported"].([]any)
	if !slices.Contains(algs, any("ES256")) || !slices.Contains(algs, any("RS256")) {
		return "", fmt.Errorf("algorithms %v", algs)
	}
	var set struct{ Keys []map[string]string }
	if err := v.get(meta["jwks_uri"].(string), &set); err != nil {
		return "", err
	}
	part := strings.Split(token, ".")
	var head, claims map[string]any
	for i, into := range []any{&head, &claims} {
		b, err := base64.RawURLEncoding.DecodeString(part[i])
		if err == nil {
			err = json.Unmarshal(b, into)
		}
		if err != nil {
			return "", err
		}
	}
	at := slices.IndexFunc(set.Keys, func(k map[string]string) bool { return k["kid"] == head["kid"] })
	if at < 0 || head["alg"] != "ES256" || set.Keys[at]["alg"] != "ES256" || set.Keys[at]["use"] != "sig" {
		return "", fmt.Errorf("no key for %v in %v", head, set.Keys)
	}
	point := []byte{4} // uncompressed (SEC 1 section 2.3.3)
	for _, name := range []string{"x", "y"} {
		b, err := base64.RawURLEncoding.DecodeString(set.Keys[at][name])
		if err != nil {
			return "", err
		}
		point = append(point, b...)
	}
	sig, err := base64.RawURLEncoding.DecodeString(part[2])
	if err != nil || len(sig) != 64 {
		return "", fmt.Errorf("signature of %d bytes, %v", len(sig), err)
	}
	sum := sha256.Sum256([]byte(part[0] + "." + part[1]))
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		return "", err
	}
	if !ecdsa.Verify(key, sum[:], new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])) {
		return "", errors.New("signature is wrong")
	}
	aud, _ := claims["aud"].([]any)
	exp, _ := claims["exp"].(float64)
	if claims["iss"] != v.issuer || !slices.Contains(aud, any(v.audience)) || int64(exp) <= time.Now().Unix() {
		return "", fmt.Errorf("claims %v", claims)
	}
	return claims["sub"].(string), nil
}

func TestOIDCVerifierAcceptsJWTSVIDs(t *testing.T) {
	const issuer = "https://oidc.corp.example/td"
	in, addrs := publicIssuer(t, "corp.example", issuer)
	roots := x509.NewCertPool()
	roots.AddCert(in.ca.Bundle().X509[0])
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, addrs[0])
	}
	v := verifier{issuer, "aws", &http.Client{Transport: &http.Transport{DialContext: dial, TLSClientConfig: &tls.Config{RootCAs: roots}}}}
	id := spiffeid.RequireFromPath(in.cfg.TrustDomain, "/ns/ci/sa/runner")
	token, _, _, err := in.ca.SignJWT(t.Context(), id, []string{"aws"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if sub, err := v.verify(token); err != nil || sub != id.String() {
		t.Errorf("got %q, %v", sub, err)
	}
	v.audience = "gcp"
	if _, err := v.verify(token); err == nil {
		t.Error("the verifier of this test checks nothing")
	}
	// The claim iss does not make it less of a JWT-SVID.
	st := &svid.State{Bundle: x509bundle.FromX509Authorities(in.cfg.TrustDomain, in.ca.Bundle().X509), JWTKeys: in.bundleDocument().JWTKeys()}
	if got, _, err := st.VerifyJWT(token, "aws", time.Now()); err != nil || got != id {
		t.Errorf("as a JWT-SVID: %s, %v", got, err)
	}
}

func TestTwoTrustDomainsFederate(t *testing.T) {
	near, _ := publicIssuer(t, "near.example", "")
	far, addrs := publicIssuer(t, "far.example", "")
	r := federation.Relationship{
		TrustDomain: far.cfg.TrustDomain, URL: "https://" + addrs[0], Profile: federation.ProfileSPIFFE,
		EndpointID: spiffeid.RequireFromPath(far.cfg.TrustDomain, "/spire/server"),
	}
	f, err := federation.NewFollower(federation.FollowerConfig{
		Relationships: []federation.Relationship{r}, Own: near.cfg.TrustDomain, Log: near.log,
		OwnBundle: func() *x509bundle.Bundle { return near.bundleDocument().X509Bundle() },
		Start:     map[spiffeid.TrustDomain]*federation.Bundle{far.cfg.TrustDomain: {TrustDomain: far.cfg.TrustDomain, X509: far.ca.Bundle().X509}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Refresh(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	got := f.Bundle(far.cfg.TrustDomain)
	if len(got.JWT) == 0 || got.RefreshHint == 0 || got.Sequence == 0 {
		t.Errorf("got %+v", got)
	}
}

func TestPublicConfig(t *testing.T) {
	for say, c := range map[string]Config{
		"oidc.issuer: \"\" is not an https URL": {OIDC: OIDCConfig{Listen: ":1"}},
		"oidc.key_file: cert_file and":          {OIDC: OIDCConfig{Listen: ":1", Issuer: "https://a.example", CertFile: "x"}},
		"bundle_endpoint.key_file":              {BundleEndpoint: BundleEndpointConfig{Listen: ":1", CertFile: "x"}},
		"bundle_endpoint.cert_file: differs":    {OIDC: OIDCConfig{Listen: ":1", Issuer: "https://a.example"}, BundleEndpoint: BundleEndpointConfig{Listen: ":1", CertFile: "x", KeyFile: "y"}},
	} {
		if err := c.validatePublic(); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("got %v, want an error that says %q", err, say)
		}
	}
	if err := (&Config{}).validatePublic(); err != nil {
		t.Errorf("without any: %v", err)
	}
}

func TestOneListenerForBoth(t *testing.T) {
	in, _ := publicIssuer(t, "corp.example", "https://oidc.corp.example")
	ln := meshtest.Listen(t, "")
	addr := ln.Addr().String()
	ln.Close()
	in.cfg.OIDC.Listen, in.cfg.BundleEndpoint.Listen = addr, addr
	doors, err := in.publicDoors()
	if err != nil || len(doors) != 1 {
		t.Fatalf("%d listeners, %v", len(doors), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- doors[0].run(ctx) }()
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	for path, want := range map[string]string{"/": "x509-svid", "/keys": `"sig"`, "/.well-known/openid-configuration": "jwks_uri", "/other": "404"} {
		r, err := c.Get("https://" + addr + path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r.Body)
		r.Body.Close()
		if err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%s: %s, %v", path, b, err)
		}
	}
	c.CloseIdleConnections()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
