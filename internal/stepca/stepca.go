// Package stepca asks a step-ca for CA certificates, behind smallstep's CAS
// interface. It is a client of three calls and no more: the packages of step-ca
// itself would bring an authority along.
//
// What authenticates step-ca is its root, pinned by fingerprint; what
// authenticates us is the key of a JWK provisioner. It owns no goroutine.
package stepca

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/smallstep/certificates/cas/apiv1"

	"sallyport/internal/daemon"
)

const (
	// patience bounds one call; the caller tries again later.
	patience = 10 * time.Second
	// most bounds what step-ca may answer, bytes.
	most = 1 << 20
	// maxCerts bounds the chain in an answer.
	maxCerts = 8
)

// Config says which step-ca to ask, and as whom.
type Config struct {
	// URL is https://host:port. Required.
	URL string
	// Fingerprints are the SHA-256 of the roots that may be trusted, in hex: the
	// present one, and the next one before step-ca changes to it. Required.
	Fingerprints []string
	// Provisioner is the name of a JWK provisioner. Required.
	Provisioner string
	// Key is that of the provisioner. Required.
	Key Key
	// Now is the clock. Default time.Now.
	Now func() time.Time
}

// Validate reports every mistake, each by the name of its field.
func (c Config) Validate() error {
	var errs []error
	u, err := url.Parse(c.URL)
	if c.URL == "" {
		errs = append(errs, errors.New(`url: missing; write that of step-ca, such as "https://ca.corp.example:9000"`))
	} else if err != nil || u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		errs = append(errs, errors.New(`url: not of the form "https://ca.corp.example:9000"`))
	}
	if len(c.Fingerprints) == 0 {
		errs = append(errs, errors.New("fingerprints: missing; write what \"step certificate fingerprint root_ca.crt\" prints"))
	}
	for i, f := range c.Fingerprints {
		if _, err := fingerprint(f); err != nil {
			errs = append(errs, fmt.Errorf("fingerprints[%d]: %w", i, err))
		}
	}
	if c.Provisioner == "" {
		errs = append(errs, errors.New("provisioner: missing; write the name of a JWK provisioner of step-ca"))
	}
	return errors.Join(errs...)
}

// fingerprint reads 32 bytes of hex, with or without colons.
func fingerprint(s string) (string, error) {
	s = strings.ToLower(strings.ReplaceAll(s, ":", ""))
	if b, err := hex.DecodeString(s); err != nil || len(b) != sha256.Size {
		return "", errors.New("not a SHA-256 in hex, 64 digits")
	}
	return s, nil
}

// A Client asks one step-ca. It is an apiv1.CertificateAuthorityService, and
// safe for concurrent use.
type Client struct {
	cfg  Config
	base string
	pins []string

	mu    sync.Mutex // guards roots
	roots map[string]*x509.Certificate
}

// New returns a client that has not called anyone yet.
func New(cfg Config) (*Client, error) {
	err := cfg.Validate()
	if err == nil && cfg.Key.signer == nil {
		err = errors.New("key_file: missing")
	}
	if err != nil {
		return nil, err
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	c := &Client{cfg: cfg, base: strings.TrimRight(cfg.URL, "/"), roots: map[string]*x509.Certificate{}}
	for _, f := range cfg.Fingerprints {
		pin, _ := fingerprint(f) // Validate has read it
		if !slices.Contains(c.pins, pin) {
			c.pins = append(c.pins, pin)
		}
	}
	return c, nil
}

// CreateCertificate asks for the CA certificate of req.CSR. The chain it returns
// leads to a pinned root, which is its last.
func (c *Client) CreateCertificate(req *apiv1.CreateCertificateRequest) (*apiv1.CreateCertificateResponse, error) {
	roots, err := c.pinned()
	if err != nil {
		return nil, err
	}
	token, err := c.token(req.CSR, roots[0])
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(map[string]string{
		"csr":      string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: req.CSR.Raw})),
		"ott":      token,
		"notAfter": req.Lifetime.String(),
	})
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, r := range roots {
		pool.AddCert(r)
	}
	var out struct {
		CertChain []string `json:"certChain"`
	}
	if err := c.call(&tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool}, http.MethodPost, "/1.0/sign", body, &out); err != nil {
		return nil, err
	}
	chain, err := parse(out.CertChain)
	if err != nil {
		return nil, err
	}
	if chain, err = anchored(chain, roots); err != nil {
		return nil, err
	}
	return &apiv1.CreateCertificateResponse{Certificate: chain[0], CertificateChain: chain[1:]}, nil
}

// RenewCertificate is not what a CA certificate needs: each has a new key.
func (c *Client) RenewCertificate(*apiv1.RenewCertificateRequest) (*apiv1.RenewCertificateResponse, error) {
	return nil, apiv1.NotImplementedError{Message: "a CA certificate is not renewed but made anew"}
}

// RevokeCertificate is left to whoever runs step-ca: proxies ask no upstream
// authority what it revoked.
func (c *Client) RevokeCertificate(*apiv1.RevokeCertificateRequest) (*apiv1.RevokeCertificateResponse, error) {
	return nil, apiv1.NotImplementedError{Message: "revoke it with step ca revoke"}
}

// pinned returns the roots that step-ca has of those pinned, at least one.
func (c *Client) pinned() ([]*x509.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []*x509.Certificate
	var errs []error
	for _, pin := range c.pins {
		if c.roots[pin] == nil {
			root, err := c.fetch(pin)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			c.roots[pin] = root
		}
		out = append(out, c.roots[pin])
	}
	if len(out) == 0 {
		return nil, errors.Join(errs...)
	}
	return out, nil
}

// fetch gets the root with a fingerprint. Nothing is known of the server yet, so
// its certificate is not looked at: the root is what has the fingerprint,
// whoever sends it.
func (c *Client) fetch(pin string) (*x509.Certificate, error) {
	var out struct {
		CA string `json:"ca"`
	}
	if err := c.call(&tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true}, http.MethodGet, "/root/"+pin, nil, &out); err != nil {
		return nil, fmt.Errorf("fetch root %.16s: %w", pin, err)
	}
	certs, err := parse([]string{out.CA})
	if err != nil {
		return nil, fmt.Errorf("fetch root %.16s: %w", pin, err)
	}
	if sum := sha256.Sum256(certs[0].Raw); hex.EncodeToString(sum[:]) != pin {
		return nil, daemon.Hint(fmt.Errorf("fetch root %.16s: what came has the fingerprint %x", pin, sum), "find out who answers at "+c.base)
	}
	return certs[0], nil
}

// call makes one request over a connection of its own: they are days apart.
func (c *Client) call(conf *tls.Config, method, path string, body []byte, out any) error {
	client := &http.Client{
		Timeout:       patience,
		Transport:     &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	req, err := http.NewRequest(method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("call step-ca: %w", err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, most+1))
	if err != nil {
		return fmt.Errorf("read the answer of step-ca: %w", err)
	}
	if len(data) > most {
		return fmt.Errorf("step-ca answered more than %d bytes", most)
	}
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusCreated {
		var said struct {
			Message string `json:"message"`
		}
		_ = json.Unmarshal(data, &said) // what is no JSON says nothing
		return fmt.Errorf("step-ca answered %d: %.300q", resp.StatusCode, cmp.Or(said.Message, http.StatusText(resp.StatusCode)))
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("step-ca answered no JSON that is known: %w", err)
	}
	return nil
}

// parse reads certificates in PEM, one to each text.
func parse(texts []string) ([]*x509.Certificate, error) {
	if len(texts) == 0 || len(texts) > maxCerts {
		return nil, fmt.Errorf("step-ca sent %d certificates, want 1 to %d", len(texts), maxCerts)
	}
	var out []*x509.Certificate
	for _, text := range texts {
		block, rest := pem.Decode([]byte(text))
		if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
			return nil, errors.New("step-ca sent something else than a certificate in PEM")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("step-ca sent a certificate that is malformed: %w", err)
		}
		out = append(out, cert)
	}
	return out, nil
}

// anchored completes a chain by the pinned root that it leads to.
func anchored(chain, roots []*x509.Certificate) ([]*x509.Certificate, error) {
	last := chain[len(chain)-1]
	for _, root := range roots {
		if last.Equal(root) && len(chain) > 1 {
			return chain, nil
		}
		if last.CheckSignatureFrom(root) == nil {
			return append(chain, root), nil
		}
	}
	return nil, daemon.Hint(fmt.Errorf("step-ca signed under %q, which no pinned root has signed", last.Issuer),
		"add the fingerprint of its root to ca.upstream.fingerprints, if it is meant")
}
