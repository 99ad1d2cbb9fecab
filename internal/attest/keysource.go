package attest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"sallyport/internal/jose"
)

const (
	fetchTimeout = 10 * time.Second
	// freshKeys is how long fetched keys are used without asking; an unknown key
	// ID asks before, at most once per askAgain. staleKeys is how long they are
	// used when the issuer does not answer.
	freshKeys = 10 * time.Minute
	askAgain  = 10 * time.Second
	staleKeys = 24 * time.Hour
)

// fileKeys are the keys in a file, read at each use.
type fileKeys string

func (f fileKeys) find(_ context.Context, t *jose.Token) (jose.Key, error) {
	b, err := readSmall(string(f))
	if err != nil {
		return jose.Key{}, fmt.Errorf("read key set: %w", err)
	}
	keys, err := jose.ParseKeys(b)
	if err != nil {
		return jose.Key{}, fmt.Errorf("%s: %w", string(f), err)
	}
	return pick(keys, t)
}

func pick(keys jose.Keys, t *jose.Token) (jose.Key, error) {
	k, ok := keys.Find(t)
	if !ok {
		return jose.Key{}, refused("token: its issuer has no key with this key ID")
	}
	return k, nil
}

// pageKeys are the keys that an issuer publishes over https: at the page, or
// where the discovery document of the issuer says.
type pageKeys struct {
	issuer string // when page is empty
	page   string
	client *http.Client
	now    func() time.Time

	// turn holds one token; who has it may use the fields below.
	turn  chan struct{}
	keys  jose.Keys
	got   time.Time // when keys were fetched
	asked time.Time // when last tried
	fault error     // of that try
}

// newPageKeys fetches nothing yet. Without caFile the system's roots count.
func newPageKeys(issuer, page, caFile string, now func() time.Time) (*pageKeys, error) {
	c, err := httpsClient(caFile)
	if err != nil {
		return nil, err
	}
	return &pageKeys{issuer: issuer, page: page, client: c, now: now, turn: make(chan struct{}, 1)}, nil
}

// httpsClient follows no redirect: what it asks for is configured.
func httpsClient(caFile string) (*http.Client, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile != "" {
		certs, err := readCertificates(caFile)
		if err != nil {
			return nil, err
		}
		conf.RootCAs = x509.NewCertPool()
		for _, c := range certs {
			conf.RootCAs.AddCert(c)
		}
	}
	return &http.Client{
		Timeout: fetchTimeout,
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, TLSClientConfig: conf, ForceAttemptHTTP2: true,
			MaxResponseHeaderBytes: 64 << 10, MaxIdleConns: 2, IdleConnTimeout: time.Minute,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

func (p *pageKeys) find(ctx context.Context, t *jose.Token) (jose.Key, error) {
	select {
	case p.turn <- struct{}{}:
		defer func() { <-p.turn }()
	case <-ctx.Done():
		return jose.Key{}, ctx.Err()
	}
	now := p.now()
	_, known := p.keys.Find(t)
	old := now.Sub(p.got) > freshKeys || now.Before(p.got)
	if (!known || old) && (now.Sub(p.asked) > askAgain || now.Before(p.asked)) {
		keys, err := p.fetch(ctx)
		if ctx.Err() != nil {
			return jose.Key{}, ctx.Err()
		}
		p.asked, p.fault = now, err
		if err == nil {
			p.keys, p.got = keys, now
		}
	}
	if p.keys == nil || now.Sub(p.got) > staleKeys {
		if p.fault == nil {
			p.fault = errors.New("the keys are too old")
		}
		return jose.Key{}, fmt.Errorf("keys of the token's issuer: %w", p.fault)
	}
	if _, known := p.keys.Find(t); !known && p.fault != nil {
		return jose.Key{}, fmt.Errorf("keys of the token's issuer: %w", p.fault)
	}
	return pick(p.keys, t)
}

func (p *pageKeys) fetch(ctx context.Context) (jose.Keys, error) {
	page := p.page
	if page == "" {
		b, err := get(ctx, p.client, strings.TrimSuffix(p.issuer, "/")+"/.well-known/openid-configuration", nil)
		if err != nil {
			return nil, err
		}
		o, err := jose.ParseObject(b)
		if err != nil {
			return nil, fmt.Errorf("discovery document: %w", err)
		}
		if o["issuer"] != p.issuer {
			return nil, errors.New("discovery document names another issuer")
		}
		if page, err = o.Text("jwks_uri"); err != nil {
			return nil, fmt.Errorf("discovery document: %w", err)
		}
		if err := checkHTTPS(page); err != nil {
			return nil, fmt.Errorf("discovery document: jwks_uri: %w", err)
		}
	}
	b, err := get(ctx, p.client, page, nil)
	if err != nil {
		return nil, err
	}
	return jose.ParseKeys(b)
}

// checkHTTPS refuses what is not a plain https URL.
func checkHTTPS(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Fragment != "" {
		return fmt.Errorf("%q is not an https URL", s)
	}
	return nil
}

// get fetches a page of at most maxTrust bytes.
func get(ctx context.Context, c *http.Client, page string, header map[string]string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, page, nil)
	if err != nil {
		return nil, err
	}
	return fetch(c, req, header)
}

func fetch(c *http.Client, req *http.Request, header map[string]string) ([]byte, error) {
	for k, v := range header {
		req.Header.Set(k, v)
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusCreated {
		return nil, &httpStatus{page: req.URL.Redacted(), code: resp.StatusCode}
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxTrust+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", req.URL.Redacted(), err)
	}
	if len(b) > maxTrust {
		return nil, fmt.Errorf("%s has more than %d bytes", req.URL.Redacted(), maxTrust)
	}
	return b, nil
}

// An httpStatus is an answer that is no success.
type httpStatus struct {
	page string
	code int
}

func (h *httpStatus) Error() string {
	return fmt.Sprintf("%s answers with status %d", h.page, h.code)
}
