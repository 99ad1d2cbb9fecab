package page

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"sallyport/internal/jose"
	"sallyport/internal/keyset"
	"sallyport/internal/mesh"
)

// OIDC says how people enter by an OpenID provider: by the code flow, with PKCE.
type OIDC struct {
	// Issuer is the provider's https URL, as its tokens name it. Required.
	Issuer string
	// Client is the name of this page there. Required. Secret proves it; empty for
	// a public client.
	Client, Secret string
	// URL is where browsers find this page, https://host[:port]: the provider is
	// told to send people to /oidc/callback below it. Required.
	URL string
	// Claim of the ID token has a person's groups. Default "groups".
	Claim string
	// Viewers, Operators and Admins are the groups that have each role. Nobody else
	// enters; the highest counts.
	Viewers, Operators, Admins []string
	// Scopes are asked for beside openid.
	Scopes []string
	// CA, in PEM, is trusted for the provider in place of the system's roots.
	CA string
}

// Validate reports all mistakes at once.
func (o OIDC) Validate() error {
	var errs []error
	need := func(ok bool, field, want string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%s: %s", field, want))
		}
	}
	need(plainHTTPS(o.Issuer), "issuer", "want the provider's https URL, without user, query and fragment")
	u, err := url.Parse(o.URL)
	need(plainHTTPS(o.URL) && err == nil && strings.TrimSuffix(u.Path, "/") == "", "url", "want https://host[:port], where browsers find this page")
	need(o.Client != "", "client", "missing: the name of this page at the provider")
	need(len(o.Viewers)+len(o.Operators)+len(o.Admins) > 0, "viewers", "nobody could enter; name groups in viewers, operators or admins")
	need(!slices.Contains(slices.Concat(o.Viewers, o.Operators, o.Admins), ""), "viewers", "a group in viewers, operators or admins has no name")
	need(o.CA == "" || x509.NewCertPool().AppendCertsFromPEM([]byte(o.CA)), "ca", "holds no certificate in PEM")
	return errors.Join(errs...)
}

func plainHTTPS(s string) bool {
	u, err := url.Parse(s)
	return err == nil && u.Scheme == "https" && u.Host != "" && u.User == nil && u.RawQuery == "" && u.Fragment == ""
}

// role is the highest that groups give; empty for none.
func (o OIDC) role(groups []string) string {
	for _, r := range []struct {
		name string
		of   []string
	}{{roleAdmin, o.Admins}, {roleOperator, o.Operators}, {roleViewer, o.Viewers}} {
		if slices.ContainsFunc(groups, func(g string) bool { return slices.Contains(r.of, g) }) {
			return r.name
		}
	}
	return ""
}

const (
	providerWithin = 5 * time.Second
	// providerFresh is how long what a provider says of itself is not asked anew.
	providerFresh = time.Hour
	// providerAgain is for how long nobody waits for one that has not answered.
	providerAgain = 10 * time.Second
	maxAnswer     = 256 << 10
	// maxGroups is how many groups one person may have.
	maxGroups = 60
)

// A provider is the OpenID provider.
type provider struct {
	cfg    OIDC
	client *http.Client
	keys   *keyset.Keeper

	turn  chan struct{} // whoever has it in there has the fields below
	known *metadata
	at    time.Time
	// failed is why the provider could not be asked at failedAt.
	failed   error
	failedAt time.Time
}

// metadata is what a provider says of itself (OpenID Connect Discovery 1.0).
type metadata struct {
	Issuer        string   `json:"issuer"`
	Authorization string   `json:"authorization_endpoint"`
	Token         string   `json:"token_endpoint"`
	Keys          string   `json:"jwks_uri"`
	Methods       []string `json:"token_endpoint_auth_methods_supported"`
}

func newProvider(cfg OIDC, log *slog.Logger) (*provider, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("oidc: %w", err)
	}
	if cfg.Claim == "" {
		cfg.Claim = "groups"
	}
	cfg.URL = strings.TrimSuffix(cfg.URL, "/")
	keys, err := keyset.New(keyset.Config{Log: log})
	if err != nil {
		return nil, fmt.Errorf("oidc: %w", err)
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CA != "" {
		conf.RootCAs = x509.NewCertPool()
		conf.RootCAs.AppendCertsFromPEM([]byte(cfg.CA)) // it does: Validate
	}
	return &provider{cfg: cfg, keys: keys, turn: make(chan struct{}, 1), client: &http.Client{
		Timeout:   providerWithin,
		Transport: &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true, MaxResponseHeaderBytes: 64 << 10, MaxIdleConns: 1, IdleConnTimeout: time.Minute},
		// A secret and a code go to the host that was named, and nowhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// callback is where the provider sends people to.
func (o *provider) callback() string { return o.cfg.URL + "/oidc/callback" }

// discover asks the provider where its endpoints are, now and then.
func (o *provider) discover(ctx context.Context, now time.Time) (*metadata, error) {
	select {
	case o.turn <- struct{}{}:
		defer func() { <-o.turn }()
	case <-ctx.Done(): // who comes meanwhile waits for the answer, if he stays
		return nil, ctx.Err()
	}
	if o.known != nil && now.Sub(o.at) < providerFresh {
		return o.known, nil
	}
	if o.failed != nil && now.Sub(o.failedAt) < providerAgain {
		return nil, o.failed
	}
	// It is asked to the end, also for who leaves: others wait for the answer, and who
	// comes and goes would have it asked again and again.
	own, cancel := context.WithTimeout(context.WithoutCancel(ctx), providerWithin)
	defer cancel()
	m, err := o.fetch(own)
	if err != nil {
		o.failed, o.failedAt = err, now
		return nil, err
	}
	o.known, o.at, o.failed = m, now, nil
	return m, nil
}

// fetch is discover without a memory. The caller has the turn.
func (o *provider) fetch(ctx context.Context) (*metadata, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(o.cfg.Issuer, "/")+"/.well-known/openid-configuration", nil)
	if err != nil {
		return nil, err
	}
	var m metadata
	if err := o.ask(req, &m); err != nil {
		return nil, fmt.Errorf("discover the provider: %w", err)
	}
	if m.Issuer != o.cfg.Issuer {
		return nil, errors.New("discover the provider: it names itself otherwise than oidc.issuer does")
	}
	for name, u := range map[string]string{"token_endpoint": m.Token, "jwks_uri": m.Keys} {
		if !plainHTTPS(u) {
			return nil, fmt.Errorf("discover the provider: its %s is no plain https URL", name)
		}
	}
	if u, err := url.Parse(m.Authorization); err != nil || u.Scheme != "https" || u.Host == "" || u.Fragment != "" {
		return nil, errors.New("discover the provider: its authorization_endpoint is no https URL")
	}
	if err := o.keys.Use([]mesh.TokenIssuer{{Issuer: m.Issuer, Keys: mesh.KeySet{URL: m.Keys, CA: o.cfg.CA}}}); err != nil {
		return nil, fmt.Errorf("discover the provider: %w", err)
	}
	return &m, nil
}

// ask sends a request and reads an answer of JSON. No error quotes either.
func (o *provider) ask(req *http.Request, into any) error {
	req.Header.Set("Accept", "application/json")
	resp, err := o.client.Do(req)
	if err != nil {
		return errors.Unwrap(err) // without the URL
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return err
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("it answers with status %d", resp.StatusCode)
	case len(b) > maxAnswer:
		return fmt.Errorf("its answer has more than %d bytes", maxAnswer)
	case json.NewDecoder(bytes.NewReader(b)).Decode(into) != nil:
		return errors.New("its answer is no JSON")
	}
	return nil
}

// authorize is the address at which a person proves to the provider who it is.
func (o *provider) authorize(m *metadata, f flow) string {
	u, _ := url.Parse(m.Authorization) // discover has
	q := u.Query()
	sum := sha256.Sum256([]byte(f.verifier))
	for k, v := range map[string]string{
		"response_type": "code", "client_id": o.cfg.Client, "redirect_uri": o.callback(), "scope": strings.Join(append([]string{"openid"}, o.cfg.Scopes...), " "),
		"state": f.state, "nonce": f.nonce, "code_challenge": base64.RawURLEncoding.EncodeToString(sum[:]), "code_challenge_method": "S256",
	} {
		q.Set(k, v)
	}
	u.RawQuery = q.Encode()
	return u.String()
}

// redeem trades a code for an ID token, and believes that if the provider signed
// it for this page and this flow.
func (o *provider) redeem(ctx context.Context, m *metadata, code string, f flow, now time.Time) (*jose.Token, error) {
	form := url.Values{"grant_type": {"authorization_code"}, "code": {code}, "redirect_uri": {o.callback()}, "code_verifier": {f.verifier}}
	basic := o.cfg.Secret != "" && (len(m.Methods) == 0 || slices.Contains(m.Methods, "client_secret_basic"))
	if !basic {
		form.Set("client_id", o.cfg.Client)
		if o.cfg.Secret != "" {
			form.Set("client_secret", o.cfg.Secret)
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, m.Token, strings.NewReader(form.Encode()))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if basic {
		req.SetBasicAuth(url.QueryEscape(o.cfg.Client), url.QueryEscape(o.cfg.Secret)) // RFC 6749, section 2.3.1
	}
	var answer struct {
		ID string `json:"id_token"`
	}
	if err := o.ask(req, &answer); err != nil {
		return nil, fmt.Errorf("redeem the code: %w", err)
	}
	return o.believe(ctx, answer.ID, f, now)
}

// believe checks an ID token (OpenID Connect Core 1.0, section 3.1.3.7).
func (o *provider) believe(ctx context.Context, text string, f flow, now time.Time) (*jose.Token, error) {
	t, err := jose.Profile{
		Algs:     []string{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA},
		Header:   []string{"x5t"},
		MaxBytes: 16 << 10,
	}.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("ID token: %w", err)
	}
	key, known, err := o.keys.Find(ctx, o.cfg.Issuer, t)
	switch {
	case err != nil:
		return nil, fmt.Errorf("ID token: %w", err)
	case !known:
		return nil, errors.New("ID token: signed by a key that the provider does not publish")
	}
	if err := t.Verify(key); err != nil {
		return nil, fmt.Errorf("ID token: %w", err)
	}
	if _, err := t.Check(jose.Claims{Now: now, Issuer: o.cfg.Issuer, Audiences: []string{o.cfg.Client}, NeedIssuedAt: true}); err != nil {
		return nil, fmt.Errorf("ID token: %w", err)
	}
	if err := o.ours(t, f); err != nil {
		return nil, fmt.Errorf("ID token: %w", err)
	}
	return t, nil
}

// ours says that a token is an answer to this flow, and for nobody else.
func (o *provider) ours(t *jose.Token, f flow) error {
	nonce, err := t.Claims.Text("nonce")
	if err != nil || subtle.ConstantTimeCompare([]byte(nonce), []byte(f.nonce)) != 1 {
		return errors.New("nonce is not that of this sign-in")
	}
	aud, err := t.Claims.Texts("aud", jose.MaxAudiences)
	if err != nil {
		return err
	}
	if _, has := t.Claims["azp"]; has || len(aud) > 1 {
		if azp, _ := t.Claims.Text("azp"); azp != o.cfg.Client {
			return errors.New("azp is another client")
		}
	}
	_, err = t.Claims.Text("sub")
	return err
}
