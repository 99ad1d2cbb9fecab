package federation

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	discoveryPath = "/.well-known/openid-configuration"
	keysPath      = "/keys"
	// maxAge bounds how long a cache may keep the keys: a new key is published
	// long before its first use, and an emergency must be seen soon.
	maxAge = 5 * time.Minute
	// discoveryAge is for a document that changes with the configuration only.
	discoveryAge = time.Hour
)

// BundleHandler serves the newest bundle document at every path that it is
// mounted on, to anyone: it is public (SPIFFE Federation section 5).
func BundleHandler(bundle func() *Bundle, log *slog.Logger) http.Handler {
	return published(log, func() ([]byte, time.Duration, error) {
		b := bundle()
		if b == nil {
			return nil, 0, errors.New("no bundle yet")
		}
		doc, err := b.Encode()
		return doc, cacheFor(b), err
	})
}

// cacheFor is a quarter of the refresh hint: a cache on the way must not hide
// a change from who looks as often as he was told to.
func cacheFor(b *Bundle) time.Duration {
	if b.RefreshHint == 0 {
		return maxAge
	}
	return min(b.RefreshHint/4, maxAge)
}

// discovery is the metadata of OpenID Connect Discovery 1.0 section 3.
type discovery struct {
	Issuer        string   `json:"issuer"`
	Authorization string   `json:"authorization_endpoint"`
	JWKS          string   `json:"jwks_uri"`
	ResponseTypes []string `json:"response_types_supported"`
	SubjectTypes  []string `json:"subject_types_supported"`
	Algorithms    []string `json:"id_token_signing_alg_values_supported"`
	Claims        []string `json:"claims_supported"`
}

// CheckIssuer reports whether s can be the issuer of JWT-SVIDs and of the
// discovery document: an https URL without query and fragment, which verifiers
// compare byte by byte.
func CheckIssuer(s string) error {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Scheme != "https" || u.Host == "":
		return fmt.Errorf("%q is not an https URL", s)
	case u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.Contains(s, "#"):
		return fmt.Errorf("%q has user, query or fragment: write the bare URL", s)
	case strings.HasSuffix(s, "/") || u.String() != s:
		return fmt.Errorf("%q is not in its plain form: write no slash at the end and no escapes", s)
	}
	return nil
}

// OIDCHandler serves the discovery document and the key set of an issuer, at
// the paths that follow from its URL. The tokens themselves come from the
// Workload API: there is no login here, and the authorization endpoint, which
// the metadata must name, says so.
func OIDCHandler(issuer string, bundle func() *Bundle, log *slog.Logger) (http.Handler, error) {
	if err := CheckIssuer(issuer); err != nil {
		return nil, fmt.Errorf("OIDC issuer: %w", err)
	}
	u, err := url.Parse(issuer)
	if err != nil {
		return nil, err
	}
	doc, err := json.Marshal(discovery{
		Issuer: issuer, Authorization: issuer + "/authorize", JWKS: issuer + keysPath,
		ResponseTypes: []string{"id_token"}, SubjectTypes: []string{"public"},
		// RS256 must be named (section 3); our own keys are ES256.
		Algorithms: []string{"ES256", "RS256"},
		Claims:     []string{"iss", "sub", "aud", "exp", "iat"},
	})
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle(u.Path+discoveryPath, published(log, func() ([]byte, time.Duration, error) { return doc, discoveryAge, nil }))
	mux.Handle(u.Path+keysPath, published(log, func() ([]byte, time.Duration, error) {
		b := bundle()
		if b == nil {
			return nil, 0, errors.New("no keys yet")
		}
		set, err := b.keySet()
		return set, cacheFor(b), err
	}))
	mux.HandleFunc(u.Path+"/authorize", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(http.StatusBadRequest)
		_, _ = w.Write([]byte(`{"error":"unsupported_response_type","error_description":"tokens come from the SPIFFE Workload API; there is no login here"}`))
	})
	return mux, nil
}

// keySet holds the keys of JWT-SVIDs in the form that OIDC verifiers expect.
func (b *Bundle) keySet() ([]byte, error) {
	set := struct {
		Keys []jwk `json:"keys"`
	}{Keys: []jwk{}}
	for _, key := range b.JWT {
		k, err := publicJWK(key.Public)
		if err != nil {
			return nil, fmt.Errorf("encode key %s: %w", key.ID, err)
		}
		k.Kid, k.Use, k.Alg = key.ID, useSig, "RS256"
		if ec, ok := key.Public.(*ecdsa.PublicKey); ok {
			k.Alg = map[int]string{256: "ES256", 384: "ES384", 521: "ES512"}[ec.Params().BitSize]
		}
		set.Keys = append(set.Keys, k)
	}
	return json.Marshal(set)
}

// published serves a public JSON document for GET and HEAD, with a validator,
// so that a cache asks again at little cost.
func published(log *slog.Logger, doc func() (body []byte, age time.Duration, err error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			h.Set("Allow", "GET, HEAD")
			http.Error(w, "this document can only be read", http.StatusMethodNotAllowed)
			return
		}
		body, age, err := doc()
		if err != nil {
			log.Error("public document not served", "path", r.URL.Path, "err", err)
			h.Set("Cache-Control", "no-store")
			h.Set("Retry-After", "5")
			http.Error(w, "not available now: try again", http.StatusServiceUnavailable)
			return
		}
		sum := sha256.Sum256(body)
		h.Set("Content-Type", "application/json")
		h.Set("Cache-Control", "public, max-age="+strconv.Itoa(int(age/time.Second)))
		h.Set("ETag", `"`+hex.EncodeToString(sum[:16])+`"`)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
	})
}

// NewHTTPServer gives a server with bounds that suit small public documents.
func NewHTTPServer(h http.Handler, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error), log *slog.Logger) *http.Server {
	return &http.Server{
		Handler: h, TLSConfig: ServerTLS(cert), ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 20 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
}

// ServerTLS is Mozilla's intermediate profile, which the federation
// specification asks for. No client certificate is asked for.
func ServerTLS(cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, CipherSuites: intermediate(), GetCertificate: cert, NextProtos: []string{"h2", "http/1.1"}}
}

// intermediate lists the suites for TLS 1.2; those of 1.3 are not chosen.
func intermediate() []uint16 {
	return []uint16{
		tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
		tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
		tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
	}
}
