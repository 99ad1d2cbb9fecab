package attest

import (
	"context"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/attest/attesttest"
	"sallyport/internal/jose"
	"sallyport/internal/jose/josetest"
	"sallyport/internal/mesh"
)

// memSeen is the contract of Seen in its shortest form.
type memSeen struct {
	mu   sync.Mutex // guards seen
	seen map[[32]byte][32]byte
}

func (m *memSeen) Claim(ctx context.Context, what, key [32]byte, _ time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if m.seen == nil {
		m.seen = map[[32]byte][32]byte{}
	}
	if k, ok := m.seen[what]; ok && k != key {
		return ErrSeen
	}
	m.seen[what] = key
	return nil
}

// A signer is an issuer of tokens.
type signer struct {
	t   testing.TB
	kid string
	alg string
	key crypto.Signer
}

func newSigner(t testing.TB, alg string) signer {
	t.Helper()
	s := signer{t: t, kid: "key-1", alg: alg}
	if strings.HasPrefix(alg, "RS") || strings.HasPrefix(alg, "PS") {
		s.key = rsaKey(t)
	} else {
		s.key = josetest.NewKey(t, alg)
	}
	return s
}

// jwk is the public key as a key set shows it.
func (s signer) jwk() map[string]any {
	m := josetest.JWK(s.t, s.key.Public())
	m["kid"], m["use"], m["alg"] = s.kid, "sig", s.alg
	return m
}

func (s signer) jwks() []byte {
	return jsonOf(s.t, map[string]any{"keys": []any{
		map[string]any{"kty": "RSA", "use": "enc", "kid": "for-secrets"}, s.jwk(),
	}})
}

// raw signs a header and claims as they stand.
func (s signer) raw(header, claims string) string {
	return josetest.Sign(s.t, s.alg, s.key, header, claims)
}

func (s signer) header() string { return `{"typ":"JWT","alg":"` + s.alg + `","kid":"` + s.kid + `"}` }

func (s signer) sign(claims map[string]any) string {
	s.t.Helper()
	return s.raw(s.header(), string(jsonOf(s.t, claims)))
}

// with is claims with some changed; nil takes one away.
func with(claims map[string]any, change ...any) map[string]any {
	out := maps.Clone(claims)
	for i := 0; i < len(change); i += 2 {
		if change[i+1] == nil {
			delete(out, change[i].(string))
		} else {
			out[change[i].(string)] = change[i+1]
		}
	}
	return out
}

const github = "https://token.actions.githubusercontent.com"

// githubClaims are those that GitHub documents for a job.
func githubClaims() map[string]any {
	now := time.Now().Unix()
	return map[string]any{
		"jti": "example-id", "sub": "repo:octo-org/octo-repo:environment:prod", "environment": "prod", "aud": "https://sallyport.example",
		"ref": "refs/heads/main", "sha": "example-sha", "repository": "octo-org/octo-repo", "repository_owner": "octo-org",
		"actor_id": "12", "repository_visibility": "private", "run_id": "17", "run_number": "10", "run_attempt": "2",
		"runner_environment": "github-hosted", "actor": "octocat", "workflow": "example-workflow", "event_name": "workflow_dispatch",
		"ref_type": "branch", "job_workflow_ref": "octo-org/octo-automation/.github/workflows/oidc.yml@refs/heads/main",
		"iss": github, "nbf": now - 10, "exp": now + 900, "iat": now - 10,
	}
}

func oidcPayload(t testing.TB, token string) []byte {
	return jsonOf(t, map[string]string{"token": token})
}

func newGitHub(t testing.TB, s signer, change ...func(*OIDCIssuer)) NodeVerifier {
	t.Helper()
	i := OIDCIssuer{
		Issuer: github, Audience: "https://sallyport.example", JWKSFile: writeFile(t, s.jwks()),
		Require: map[string]string{"repository": "octo-org/octo-repo"}, AgentClaim: "run_id", Selectors: []string{"ref", "environment"},
	}
	for _, f := range change {
		f(&i)
	}
	c := OIDCConfig{Issuers: map[string]OIDCIssuer{"github": i}}
	if errs := c.validate("oidc"); len(errs) > 0 {
		t.Fatal(errs)
	}
	v, err := NewOIDC(td, c, &memSeen{})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestOIDC(t *testing.T) {
	for _, alg := range []string{"RS256", "ES256", "PS384", "ES512", "EdDSA"} {
		s, other := newSigner(t, alg), newSigner(t, alg)
		attesttest.Run(t, func(t *testing.T) attesttest.Fixture {
			c, now := githubClaims(), time.Now().Unix()
			say := func(change ...any) []byte { return oidcPayload(t, s.sign(with(c, change...))) }
			raw := func(header, claims string) []byte { return oidcPayload(t, s.raw(header, claims)) }
			text := string(jsonOf(t, c))
			header := func(more string) []byte { return raw(strings.TrimSuffix(s.header(), "}")+more+"}", text) }
			return attesttest.Fixture{
				Verifier: newGitHub(t, s), SingleUse: true,
				Agent: spiffeid.RequireFromString("spiffe://example.org/spire/agent/oidc/github/17"),
				Good:  say(),
				Stale: [][]byte{
					say("exp", now-31), say("exp", nil), say("iat", nil), say("nbf", now+40), say("iat", now+40),
					say("exp", now+90000), say("exp", "9"), say("exp", 1e300), say("exp", -1), say("nbf", "x"),
				},
				Foreign: [][]byte{
					oidcPayload(t, other.sign(c)), say("iss", "https://gitlab.example"), say("iss", nil), say("iss", 7),
					say("aud", "https://other.example"), say("aud", nil), say("aud", []string{}), say("aud", []any{"https://sallyport.example", 7}), say("aud", ""),
					say("repository", "evil/octo-repo"), say("repository", nil), say("repository", []string{"octo-org/octo-repo", "evil/evil"}),
				},
				Forged: [][]byte{
					[]byte(s.sign(c)), oidcPayload(t, ""), oidcPayload(t, "a.b"), oidcPayload(t, "a.b.c.d"), oidcPayload(t, s.sign(c)+"\n"),
					oidcPayload(t, strings.TrimRight(s.sign(c), "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")),
					raw(`{"alg":"none","kid":"key-1"}`, text), raw(`{"alg":"HS256","kid":"key-1"}`, text), raw(`{"alg":"RS1","kid":"key-1"}`, text),
					raw(`{"alg":"`+s.alg+`"}`, text), raw(`{"alg":"`+s.alg+`","kid":"key-2"}`, text), raw(`{"alg":"`+s.alg+`","kid":"shared"}`, text),
					header(`,"crit":["exp"]`), header(`,"jwk":{}`), header(`,"jku":"https://evil.example"`), header(`,"x5c":[]`),
					header(`,"alg":"` + s.alg + `"`), header(`,"typ":"at+jwt"`),
					raw(s.header(), strings.TrimSuffix(text, "}")+`,"repository":"octo-org/octo-repo"}`),
					raw(s.header(), text+"{}"), raw(s.header(), "[]"), raw(s.header(), "\xff"),
					say("run_id", nil), say("run_id", "../../server"), say("run_id", []string{"1", "2"}), say("run_id", strings.Repeat("9", 200)), say("sub", nil),
				},
			}
		})
	}
}

func TestOIDCSelectorsAndNames(t *testing.T) {
	s := newSigner(t, "RS256")
	_, sel, err := newGitHub(t, s).Verify(t.Context(), oidcPayload(t, s.sign(githubClaims())), attesttest.Key(t))
	want := []mesh.Selector{{Type: "oidc", Value: "github:ref:refs/heads/main"}, {Type: "oidc", Value: "github:environment:prod"}}
	if err != nil || !slices.Equal(sel, want) {
		t.Errorf("selectors %v, %v; want %v", sel, err, want)
	}
	id, _, err := newGitHub(t, s, func(i *OIDCIssuer) { i.AgentClaim = "" }).Verify(t.Context(), oidcPayload(t, s.sign(githubClaims())), attesttest.Key(t))
	if err != nil || len(id.Path()) != len("/spire/agent/oidc/github/")+32 {
		t.Errorf("without a claim the agent is %s, %v", id, err)
	}
}

// page is an issuer on the network.
type page struct {
	mu   sync.Mutex // guards the fields below
	keys []byte
	doc  func(base string) any
	down bool
	hits int
}

func (p *page) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hits++
	switch {
	case p.down:
		http.Error(w, "no", http.StatusServiceUnavailable)
	case r.URL.Path == "/.well-known/openid-configuration":
		jsonTo(w, p.doc("https://"+r.Host))
	case r.URL.Path == "/keys":
		w.Write(p.keys)
	case r.URL.Path == "/moved":
		http.Redirect(w, r, "/keys", http.StatusFound)
	default:
		http.NotFound(w, r)
	}
}

func TestKeysAreFetchedAndKept(t *testing.T) {
	s, next := newSigner(t, "ES256"), newSigner(t, "ES256")
	next.kid = "key-2"
	p := &page{keys: s.jwks(), doc: func(base string) any { return map[string]string{"issuer": base, "jwks_uri": base + "/keys"} }}
	srv := httptest.NewTLSServer(p)
	defer srv.Close()
	now := time.Now()
	k, err := newPageKeys(srv.URL, "", pemFile(t, srv.Certificate()), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	step := func(what, kid string, wantErr, wantRefusal bool, wantHits int) {
		t.Helper()
		before := p.hits
		_, err := k.find(t.Context(), &jose.Token{KeyID: kid})
		if (err != nil) != wantErr || errors.Is(err, ErrEvidence) != wantRefusal || p.hits-before != wantHits {
			t.Errorf("%s: %v with %d requests; want error %t, refusal %t, %d requests", what, err, p.hits-before, wantErr, wantRefusal, wantHits)
		}
	}
	step("the first use asks", "key-1", false, false, 2)
	step("the second does not", "key-1", false, false, 0)
	step("an unknown key does not ask again at once", "key-2", true, true, 0)
	p.keys = next.jwks()
	now = now.Add(askAgain + time.Second)
	step("but soon", "key-2", false, false, 2)
	step("the old key is gone", "key-1", true, true, 0)
	p.down = true
	now = now.Add(freshKeys + time.Second)
	step("an outage leaves the keys in use", "key-2", false, false, 1)
	step("and refuses nobody for good", "key-1", true, false, 0)
	now = now.Add(staleKeys)
	step("but not for ever", "key-2", true, false, 1)
	p.down = false
	now = now.Add(askAgain + time.Second)
	step("and it recovers", "key-2", false, false, 2)
}

func TestPagesThatAreNotTrusted(t *testing.T) {
	s := newSigner(t, "ES256")
	p := &page{keys: s.jwks()}
	srv := httptest.NewTLSServer(p)
	defer srv.Close()
	ca := pemFile(t, srv.Certificate())
	for name, tt := range map[string]struct {
		doc      func(string) any
		keys     []byte
		page, ca string
	}{
		"another issuer":    {doc: func(b string) any { return map[string]string{"issuer": b + "/", "jwks_uri": b + "/keys"} }},
		"keys without TLS":  {doc: func(b string) any { return map[string]string{"issuer": b, "jwks_uri": "http://127.0.0.1/keys"} }},
		"no keys":           {doc: func(b string) any { return map[string]string{"issuer": b} }},
		"no document":       {doc: func(string) any { return []string{} }},
		"a redirect":        {page: "/moved"},
		"another authority": {page: "/keys", ca: pemFile(t, authority{}.sign(t, nil, isCA).cert)},
		"a huge page":       {page: "/keys", keys: []byte(strings.Repeat(" ", maxTrust+1))},
		"an empty set":      {page: "/keys", keys: []byte(`{"keys":[]}`)},
		"one key twice":     {page: "/keys", keys: jsonOf(t, map[string]any{"keys": []any{s.jwk(), s.jwk()}})},
		"a point off curve": {page: "/keys", keys: jsonOf(t, map[string]any{"keys": []any{with(s.jwk(), "x", base64.RawURLEncoding.EncodeToString(make([]byte, 32)))}})},
		"a weak key":        {page: "/keys", keys: []byte(`{"keys":[{"kty":"RSA","kid":"key-1","n":"` + strings.Repeat("x", 171) + `","e":"AQAB"}]}`)},
	} {
		p.doc, p.keys = tt.doc, tt.keys
		if p.keys == nil {
			p.keys = s.jwks()
		}
		if tt.ca == "" {
			tt.ca = ca
		}
		if tt.page != "" {
			tt.page = srv.URL + tt.page
		}
		k, err := newPageKeys(srv.URL, tt.page, tt.ca, time.Now)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := k.find(t.Context(), &jose.Token{KeyID: "key-1"}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func jsonTo(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

func TestAJobOfGitHubAsksForItsToken(t *testing.T) {
	var asked string
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = r.URL.RawQuery + " " + r.Header.Get("Authorization")
		jsonTo(w, map[string]any{"count": 1857, "value": "a.b.c"})
	}))
	defer srv.Close()
	env := map[string]string{"ACTIONS_ID_TOKEN_REQUEST_URL": srv.URL + "/idtoken?api-version=2.0", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "secret"}
	e := oidcEvidence{audience: "https://sallyport.example", client: srv.Client(), env: func(k string) string { return env[k] }}
	got, err := e.Payload(t.Context())
	if err != nil || string(got) != `{"token":"a.b.c"}` || asked != "api-version=2.0&audience=https%3A%2F%2Fsallyport.example bearer secret" {
		t.Errorf("payload %s, %v; asked %s", got, err, asked)
	}
	delete(env, "ACTIONS_ID_TOKEN_REQUEST_TOKEN")
	if _, err := e.Payload(t.Context()); err == nil {
		t.Error("asked without a right to")
	}
	e.file = writeFile(t, []byte("x.y.z\n"))
	if got, err := e.Payload(t.Context()); err != nil || string(got) != `{"token":"x.y.z"}` {
		t.Errorf("from a file: %s, %v", got, err)
	}
}

func FuzzToken(f *testing.F) {
	s := newSigner(f, "ES256")
	f.Add(s.sign(githubClaims()))
	f.Add("a.b.c")
	f.Add(s.raw(s.header(), `{"exp":1e400,"aud":[[]]}`))
	f.Fuzz(func(t *testing.T, text string) {
		tok, err := tokens.Parse(text)
		if err != nil {
			return
		}
		if tok.Alg == "" || tok.KeyID == "" || tok.Claims == nil {
			t.Errorf("a token without %+v was read", tok)
		}
		if _, err := checkClaims(tok, github, "https://sallyport.example", time.Unix(1e9, 0)); err == nil && tok.Claims["iss"] != github {
			t.Error("a foreign token passed")
		}
		for _, v := range tok.Claims {
			claimTexts(v)
		}
	})
}
