package egress

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	// secretAge is how old a secret may be that was read, before it is read again.
	secretAge = 30 * time.Second
	// secretStale is for how long one serves that cannot be read any more.
	secretStale = 10 * time.Minute
	// secretWait bounds the reading, secretSize what is read.
	secretWait = 5 * time.Second
	secretSize = 16 << 10
	// secretLeast is how many bytes one has at least: what is shorter would be taken
	// out of answers where it means nothing.
	secretLeast = 8
)

// A SecretSource says where a secret is read: File, Env or Vault, one of them.
type SecretSource struct {
	// File has the secret, and perhaps a line feed.
	File string
	// Env is the name of an environment variable.
	Env string
	// Vault is a document that is fetched over HTTPS, as Vault serves them.
	Vault *VaultSource
}

// A VaultSource is a field of a document {"data": {FIELD: ...}}, or, of the second
// version, {"data": {"data": {FIELD: ...}}}.
type VaultSource struct {
	URL, Field string
	// TokenFile has what is sent in X-Vault-Token. It is read each time.
	TokenFile string
	// CAFile has the authorities to trust, in PEM. Default: those of the system.
	CAFile string
}

// Secrets reads what the gateway adds to requests, each in a goroutine that ends with
// the reading. Nothing that it returns may be
// logged or recorded. It is safe for concurrent use.
type Secrets struct {
	byName map[string]*secret
}

// A secret is one of them, as it was read last.
type secret struct {
	from SecretSource

	mu     sync.Mutex // guards what follows
	value  string
	read   time.Time // when value was
	tried  time.Time
	err    error
	flight chan struct{} // closed when what reads it has; nil: nothing does
}

// NewSecrets knows secrets by their names. It reads none.
func NewSecrets(sources map[string]SecretSource) *Secrets {
	s := &Secrets{byName: make(map[string]*secret)}
	for name, from := range sources {
		s.byName[name] = &secret{from: from}
	}
	return s
}

// Value is a secret as it is now. The error says nothing of it.
func (s *Secrets) Value(ctx context.Context, name string) (string, error) {
	var one *secret
	if s != nil {
		one = s.byName[name]
	}
	if one == nil {
		return "", fmt.Errorf("the gateway has no secret %s", clip(name))
	}
	if flight := one.flown(ctx); flight != nil {
		ctx, cancel := context.WithTimeout(ctx, secretWait)
		defer cancel()
		select {
		case <-flight:
		case <-ctx.Done():
			return "", fmt.Errorf("secret %s: it is still being read: %w", name, ctx.Err())
		}
	}
	one.mu.Lock()
	defer one.mu.Unlock()
	if one.value == "" || one.err != nil && time.Since(one.read) >= secretStale {
		return "", fmt.Errorf("secret %s: %w", name, one.err)
	}
	return one.value, nil
}

// flown has the secret read if that is due, and says what to wait for; nil for
// nothing. One reading serves all callers, and outlives the one that it began for,
// who may be gone at once.
func (s *secret) flown(ctx context.Context) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.flight != nil {
		return s.flight
	}
	if now.Sub(s.tried) < secretAge && !s.tried.IsZero() && (s.err == nil || now.Sub(s.tried) < time.Second) {
		return nil
	}
	s.tried = now
	flight := make(chan struct{})
	s.flight = flight
	ctx = context.WithoutCancel(ctx)
	go func() {
		defer close(flight)
		value, err := s.from.fetch(ctx)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.flight, s.err = nil, err; err == nil {
			s.value, s.read = value, now
		}
	}()
	return flight
}

// fetch reads the secret and looks whether it can stand in a header.
func (s SecretSource) fetch(ctx context.Context) (string, error) {
	value, err := s.text(ctx)
	if err != nil {
		return "", err
	}
	value = strings.TrimRight(value, "\r\n")
	switch {
	case len(value) < secretLeast:
		return "", fmt.Errorf("has less than %d characters", secretLeast)
	case strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r >= 0x7f }):
		return "", errors.New("holds something else than printable characters")
	}
	return value, nil
}

func (s SecretSource) text(ctx context.Context) (string, error) {
	switch {
	case s.Vault != nil:
		ctx, cancel := context.WithTimeout(ctx, secretWait)
		defer cancel()
		return s.Vault.fetch(ctx)
	case s.Env != "":
		v, ok := os.LookupEnv(s.Env)
		if !ok {
			return "", fmt.Errorf("environment variable %s is not set", s.Env)
		}
		return v, nil
	}
	return readSmall(s.File)
}

func readSmall(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, secretSize))
	return string(b), err
}

// fetch asks the server. No redirect is followed: the token is for it alone.
func (v *VaultSource) fetch(ctx context.Context) (string, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if v.CAFile != "" {
		pem, err := os.ReadFile(v.CAFile)
		if err != nil {
			return "", err
		}
		if cfg.RootCAs = x509.NewCertPool(); !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return "", fmt.Errorf("%s holds no certificate", v.CAFile)
		}
	}
	token, err := readSmall(v.TokenFile)
	if err != nil {
		return "", err
	}
	tr := &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}
	client := &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, v.URL, nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("X-Vault-Token", strings.TrimSpace(token))
	res, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s answered with status %d", v.URL, res.StatusCode)
	}
	var doc struct {
		Data map[string]json.RawMessage `json:"data"`
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, secretSize)).Decode(&doc); err != nil {
		return "", fmt.Errorf("%s did not answer with a document of Vault", v.URL) // not what it said
	}
	fields := doc.Data
	if inner, ok := fields["data"]; ok {
		var second map[string]json.RawMessage
		if json.Unmarshal(inner, &second) == nil {
			fields = second
		}
	}
	var value string
	if json.Unmarshal(fields[v.Field], &value) != nil || value == "" {
		return "", fmt.Errorf("%s has no text in the field %q", v.URL, v.Field)
	}
	return value, nil
}
