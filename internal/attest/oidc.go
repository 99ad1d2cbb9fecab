package attest

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

// OIDC is the name of the attestation by a token of an OpenID Connect issuer,
// such as GitHub Actions or GitLab give to each job.
const OIDC = "oidc"

// OIDCConfig says whose tokens admit a node.
type OIDCConfig struct {
	// Issuers by a name of ours, which becomes part of the agent's ID. Required.
	Issuers map[string]OIDCIssuer `yaml:"issuers"`
}

// OIDCIssuer says which tokens of one issuer admit a node.
type OIDCIssuer struct {
	// Issuer is what the token's iss says, an https URL. Required.
	Issuer string `yaml:"issuer"`
	// Audience must be in the token's aud. Required.
	Audience string `yaml:"audience"`
	// JWKSFile holds the issuer's keys. Without it they are fetched from
	// JWKSURL, or from where the issuer's discovery document says.
	JWKSFile string `yaml:"jwks_file"`
	JWKSURL  string `yaml:"jwks_url"`
	// CAFile is a PEM file with the roots for that, instead of the system's.
	CAFile string `yaml:"ca_file"`
	// Require are claims that a token must have, each with its value. Required:
	// a public issuer signs for everybody.
	Require map[string]string `yaml:"require"`
	// AgentClaim is the claim that names the agent. It should differ between
	// nodes that run at the same time, as run_id and job_id do. Default: the
	// hash of sub.
	AgentClaim string `yaml:"agent_claim"`
	// Selectors are the claims that become node selectors, oidc:NAME:CLAIM:VALUE.
	Selectors []string `yaml:"selectors"`
}

func (c *OIDCConfig) validate(field string) []error {
	var errs []error
	if len(c.Issuers) == 0 {
		errs = append(errs, fmt.Errorf("%s.issuers: missing; write at least one", field))
	}
	by := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(c.Issuers)) {
		i, f := c.Issuers[name], field+".issuers."+name
		need := func(ok bool, name, what string) {
			if !ok {
				errs = append(errs, fmt.Errorf("%s.%s: %s", f, name, what))
			}
		}
		if err := spiffeid.ValidatePathSegment(name); err != nil {
			errs = append(errs, fmt.Errorf("%s: %q cannot be part of an agent's ID: use letters, digits, and . - _", f, name))
		}
		need(checkHTTPS(i.Issuer) == nil, "issuer", `missing or not an https URL; write what the token says, such as "https://token.actions.githubusercontent.com"`)
		need(i.Audience != "", "audience", "missing; write the audience that nodes ask their token for")
		need(len(i.Require) > 0, "require", "missing; write the claims that are yours, such as repository_owner: corp, or anybody with an account there could join")
		need(i.JWKSFile == "" || i.JWKSURL == "" && i.CAFile == "", "jwks_file", "given beside jwks_url or ca_file; keep one")
		need(i.JWKSURL == "" || checkHTTPS(i.JWKSURL) == nil, "jwks_url", "is not an https URL")
		if other, twice := by[i.Issuer]; twice && i.Issuer != "" {
			errs = append(errs, fmt.Errorf("%s.issuer: is that of %s too; keep one", f, other))
		}
		by[i.Issuer] = name
	}
	return errs
}

// NewOIDC verifies tokens of OpenID Connect issuers. The payload is
// {"token": "..."}. A token counts for the first key that shows it. Agents are
// named spiffe://TD/spire/agent/oidc/ISSUER/NAME.
func NewOIDC(td spiffeid.TrustDomain, c OIDCConfig, seen Seen) (NodeVerifier, error) {
	v := &oidc{td: td, seen: seen, now: time.Now, issuers: map[string]*oidcIssuer{}}
	for name, i := range c.Issuers {
		keys, err := newKeySource(i.Issuer, i.JWKSFile, i.JWKSURL, i.CAFile, func() time.Time { return v.now() })
		if err != nil {
			return nil, fmt.Errorf("oidc issuer %s: %w", name, err)
		}
		v.issuers[i.Issuer] = &oidcIssuer{OIDCIssuer: i, name: name, keys: keys}
	}
	return v, nil
}

// newKeySource reads a file once, to find mistakes at the start.
func newKeySource(issuer, file, page, caFile string, now func() time.Time) (keySource, error) {
	if file == "" {
		return newPageKeys(issuer, page, caFile, now)
	}
	b, err := readSmall(file)
	if err != nil {
		return nil, err
	}
	if _, err := jose.ParseKeys(b); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return fileKeys(file), nil
}

type oidc struct {
	td      spiffeid.TrustDomain
	seen    Seen
	now     func() time.Time
	issuers map[string]*oidcIssuer // by iss
}

type oidcIssuer struct {
	OIDCIssuer
	name string
	keys keySource
}

func (v *oidc) Verify(ctx context.Context, payload []byte, key crypto.PublicKey) (spiffeid.ID, []mesh.Selector, error) {
	id, sel, err := v.verify(ctx, payload, key)
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	return id, sel, nil
}

func (v *oidc) verify(ctx context.Context, payload []byte, key crypto.PublicKey) (id spiffeid.ID, sel []mesh.Selector, err error) {
	keyHash, err := begin(ctx, OIDC, payload, key)
	if err != nil {
		return id, nil, err
	}
	t, err := tokenOf(payload, "token")
	if err != nil {
		return id, nil, refused("oidc: %v", err)
	}
	iss, _ := t.Claims["iss"].(string)
	i := v.issuers[iss]
	if i == nil {
		return id, nil, refused("oidc: token is of an issuer that is not configured")
	}
	if err := verifyToken(ctx, t, i.keys); err != nil {
		return id, nil, fmt.Errorf("oidc issuer %s: %w", i.name, err)
	}
	until, err := checkClaims(t, i.Issuer, i.Audience, v.now())
	if err != nil {
		return id, nil, fmt.Errorf("oidc issuer %s: %w", i.name, err)
	}
	for name, want := range i.Require {
		if got := claimTexts(t.Claims[name]); len(got) != 1 || got[0] != want {
			return id, nil, refused("oidc issuer %s: claim %s is not what is required", i.name, name)
		}
	}
	if id, err = i.agent(v.td, t.Claims); err != nil {
		return id, nil, err
	}
	for _, name := range i.Selectors {
		for _, value := range claimTexts(t.Claims[name]) {
			sel = append(sel, mesh.Selector{Type: OIDC, Value: i.name + ":" + name + ":" + value})
		}
	}
	return id, sel, claimToken(ctx, v.seen, t, keyHash, until)
}

// agent names the agent by the chosen claim, or by the hash of the subject.
func (i *oidcIssuer) agent(td spiffeid.TrustDomain, claims jose.Object) (spiffeid.ID, error) {
	sub, err := claims.Text("sub")
	if err != nil {
		return spiffeid.ID{}, refused("oidc issuer %s: %v", i.name, err)
	}
	sum := sha256.Sum256([]byte(sub))
	name := hex.EncodeToString(sum[:16])
	if i.AgentClaim != "" {
		got := claimTexts(claims[i.AgentClaim])
		if len(got) != 1 || len(got[0]) > 128 {
			return spiffeid.ID{}, refused("oidc issuer %s: claim %s, which names the agent, is missing or too long", i.name, i.AgentClaim)
		}
		name = got[0]
	}
	id, err := spiffeid.FromSegments(td, "spire", "agent", OIDC, i.name, name)
	if err != nil {
		return spiffeid.ID{}, refused("oidc issuer %s: claim %s cannot be part of an agent's ID", i.name, i.AgentClaim)
	}
	return id, nil
}

// claimTexts gives a claim as texts: a text, number or truth value as one, a
// list of texts as many. Anything else is none.
func claimTexts(v any) []string {
	switch v := v.(type) {
	case string:
		return []string{v}
	case json.Number:
		return []string{v.String()}
	case bool:
		return []string{fmt.Sprint(v)}
	case []any:
		var out []string
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil
			}
			out = append(out, s)
		}
		return out
	}
	return nil
}

// tokenOf reads a payload that holds a token under one of its names.
func tokenOf(payload []byte, name string, others ...string) (*jose.Token, error) {
	o, err := jose.ParseObject(payload)
	if err == nil {
		err = o.Only(append(others, name)...)
	}
	if err != nil {
		return nil, err
	}
	s, err := o.Text(name)
	if err != nil {
		return nil, err
	}
	return tokens.Parse(s)
}

// oidcEvidence is the node's side: a token in a file, as GitLab and most
// platforms give it, or asked from GitHub Actions.
type oidcEvidence struct {
	file     string
	audience string // asks GitHub when there is no file
	client   *http.Client
	env      func(string) string
}

func (oidcEvidence) Kind() string { return OIDC }

func (oidcEvidence) Answer([]byte) ([]byte, error) { return nil, errNoChallenge }

var errNoChallenge = errors.New("this kind of evidence answers no challenge")

func (e oidcEvidence) Payload(ctx context.Context) ([]byte, error) {
	if e.file != "" {
		t, err := readToken(e.file)
		if err != nil {
			return nil, err
		}
		return json.Marshal(map[string]string{"token": t})
	}
	page, secret := e.env("ACTIONS_ID_TOKEN_REQUEST_URL"), e.env("ACTIONS_ID_TOKEN_REQUEST_TOKEN")
	if page == "" || secret == "" {
		return nil, errors.New(`this is no job of GitHub Actions that may ask for a token; give the job "permissions: id-token: write", or write token_file`)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, page, nil)
	if err != nil {
		return nil, errors.New("ACTIONS_ID_TOKEN_REQUEST_URL is not a URL")
	}
	q := req.URL.Query()
	q.Set("audience", e.audience)
	req.URL.RawQuery = q.Encode()
	b, err := fetch(e.client, req, map[string]string{"Authorization": "bearer " + secret, "Accept": "application/json"})
	if err != nil {
		return nil, fmt.Errorf("ask GitHub for a token: %w", err)
	}
	o, err := jose.ParseObject(b)
	if err != nil {
		return nil, fmt.Errorf("answer of GitHub: %w", err)
	}
	t, err := o.Text("value")
	if err != nil {
		return nil, fmt.Errorf("answer of GitHub: %w", err)
	}
	return json.Marshal(map[string]string{"token": t})
}

// readToken reads a file that holds one token.
func readToken(file string) (string, error) {
	b, err := readSmall(file)
	if err != nil {
		return "", fmt.Errorf("read token_file: %w", err)
	}
	t := string(bytes.TrimSpace(b))
	if t == "" || strings.ContainsAny(t, " \t\r\n") {
		return "", fmt.Errorf("token_file %s does not hold one token", file)
	}
	return t, nil
}

func newOIDCEvidence(c NodeConfig) (Evidence, error) {
	client, err := httpsClient("")
	if err != nil {
		return nil, err
	}
	return oidcEvidence{file: c.TokenFile, audience: cmp.Or(c.Audience, "sallyport"), client: client, env: os.Getenv}, nil
}
