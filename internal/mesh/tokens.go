package mesh

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A TokenProfile says which kind of JWT an issuer signs.
type TokenProfile string

// The profiles. Anything else, an ID token among them, is refused.
const (
	ProfileAccess TokenProfile = "at+jwt"   // RFC 9068, typ at+jwt
	ProfileJWT    TokenProfile = "jwt"      // typ JWT, or none
	ProfileSVID   TokenProfile = "jwt-svid" // SPIFFE JWT-SVID, typ JWT, JOSE or none
)

// A TokenBinding says by which proof of a key a token must be accompanied. A
// token that is bound is held to its binding whatever this says.
type TokenBinding string

// The bindings.
const (
	BindNone   TokenBinding = "none"
	BindCert   TokenBinding = "x5t#S256" // RFC 8705: the certificate of the connection
	BindDPoP   TokenBinding = "dpop"     // RFC 9449: a proof in each request
	BindEither TokenBinding = "either"
)

// APIKeyIssuer is the issuer that the condition iss= sees for an API key.
const APIKeyIssuer = "apikey"

// DefaultAPIKeyHeader is where an API key stands unless tokens.yaml says
// otherwise.
const DefaultAPIKeyHeader = "x-api-key"

// DefaultAlgorithms are those of an issuer that names none. HMAC and "none" are
// not possible at all.
var DefaultAlgorithms = []string{"ES256", "ES384", "EdDSA", "RS256", "PS256"}

// Tokens is tokens.yaml: whose tokens count, which API keys there are, and
// what was revoked before its time.
type Tokens struct {
	Issuers []TokenIssuer `json:"issuers,omitempty"`
	APIKeys []APIKey      `json:"api_keys,omitempty"`
	// APIKeyHeader is the lower-case name of the header of API keys.
	APIKeyHeader string       `json:"api_key_header,omitempty"`
	Revoked      []Revocation `json:"revoked,omitempty"`
	DPoP         DPoP         `json:"dpop"`
}

// A TokenIssuer is one issuer of tokens, and what its tokens must be like.
type TokenIssuer struct {
	// Issuer is the claim iss, compared as text. Empty for ProfileSVID.
	Issuer string `json:"issuer,omitempty"`
	// TrustDomain is whose JWT-SVIDs count, for ProfileSVID: ours or a
	// federated one. Its keys come with the bundles.
	TrustDomain spiffeid.TrustDomain `json:"trust_domain,omitzero"`
	Profile     TokenProfile         `json:"profile"`
	// Audiences are our own names; aud must hold one of them. Required.
	Audiences []string `json:"audiences"`
	// SingleAudience refuses tokens that are for somebody else, too.
	SingleAudience bool     `json:"single_audience,omitempty"`
	Algorithms     []string `json:"algorithms"`
	Keys           KeySet   `json:"keys,omitzero"`
	// Services are those whose sidecars check such tokens although no row asks
	// for one.
	Services []ServiceName `json:"services,omitempty"`
	// Leeway is for clocks that differ. Default 30 s, at most 60 s.
	Leeway time.Duration `json:"leeway"`
	// MaxLifetime bounds exp - iat. Default 24 h, of a JWT-SVID 1 h.
	MaxLifetime time.Duration `json:"max_lifetime"`
	// MaxAge bounds the time since iat, which must then be there. Zero: none.
	MaxAge time.Duration `json:"max_age,omitempty"`
	// MaxBytes bounds the whole token. Default and most 8192.
	MaxBytes int `json:"max_bytes"`
	// MaxClaims bounds the members of the claims. Default and most 64.
	MaxClaims int          `json:"max_claims"`
	Binding   TokenBinding `json:"binding"`
	// RefuseKeyHeaders refuses tokens whose header brings a key or says where
	// one is (jku, jwk, x5u, x5c, x5t). They are never followed.
	RefuseKeyHeaders bool `json:"refuse_key_headers,omitempty"`
	// Headers tell the application about claims, by header name.
	Headers []ClaimHeader `json:"headers,omitempty"`
	// Forward leaves the token in the request that the application sees.
	Forward bool   `json:"forward,omitempty"`
	Origin  Origin `json:"origin"`
}

// A KeySet is where the public keys of an issuer are: exactly one of URL, File
// and Inline.
type KeySet struct {
	// URL is an https page; CA, in PEM, is trusted for it instead of the
	// system's roots.
	URL string `json:"url,omitempty"`
	CA  string `json:"ca,omitempty"`
	// File is an absolute path on the machine of the proxy.
	File   string `json:"file,omitempty"`
	Inline string `json:"inline,omitempty"`
}

// A ClaimHeader is a header that carries one claim to the application.
type ClaimHeader struct {
	Header string `json:"header"`
	Claim  string `json:"claim"`
}

// An APIKey is one caller that shows a secret text instead of a token.
type APIKey struct {
	Name string `json:"name"`
	// Hashes are of the live keys, two while one replaces the other:
	// "sha256:" and hex of a random key, or an argon2id hash in PHC form.
	Hashes []string          `json:"hashes"`
	Scopes []string          `json:"scopes,omitempty"`
	Claims map[string]string `json:"claims,omitempty"`
	// Services are those that know the key. None means every service with a
	// row that asks for a token.
	Services []ServiceName `json:"services,omitempty"`
	// Rate bounds the calls with this key at each proxy. Zero: unbounded.
	Rate Rate `json:"rate,omitzero"`
	// NotAfter ends the key; zero means never.
	NotAfter time.Time `json:"not_after,omitzero"`
	Origin   Origin    `json:"origin"`
}

// A Revocation takes tokens back before they expire: one by its jti, or all of
// a subject, or those of a subject that were issued before a time.
type Revocation struct {
	Issuer  string    `json:"issuer"`
	JTI     string    `json:"jti,omitempty"`
	Subject string    `json:"subject,omitempty"`
	Before  time.Time `json:"before,omitzero"`
	Origin  Origin    `json:"origin"`
}

// DPoP says what proofs of possession must look like (RFC 9449).
type DPoP struct {
	// Origins are what callers know us by, beside our name in the mesh, such
	// as "https://api.corp.example".
	Origins []string `json:"origins,omitempty"`
	// Window is how far iat may be from now. Default 60 s.
	Window time.Duration `json:"window,omitempty"`
	// Nonce demands a nonce of ours in each proof.
	Nonce  bool   `json:"nonce,omitempty"`
	Origin Origin `json:"origin,omitzero"`
}

// Name is what the condition iss= sees: the issuer, or the ID of the trust
// domain of JWT-SVIDs.
func (i *TokenIssuer) Name() string {
	if i.Profile == ProfileSVID {
		return i.TrustDomain.IDString()
	}
	return i.Issuer
}

// Empty reports whether nothing is known of tokens.
func (t *Tokens) Empty() bool {
	return t == nil || len(t.Issuers) == 0 && len(t.APIKeys) == 0
}

// canonical gives a sorted copy, nil when it says nothing.
func (t *Tokens) canonical() *Tokens {
	if t.Empty() {
		return nil
	}
	c := *t
	c.Issuers = slices.Clone(t.Issuers)
	slices.SortStableFunc(c.Issuers, func(a, b TokenIssuer) int { return strings.Compare(a.Name(), b.Name()) })
	c.APIKeys = slices.Clone(t.APIKeys)
	slices.SortStableFunc(c.APIKeys, func(a, b APIKey) int { return strings.Compare(a.Name, b.Name) })
	c.Revoked = slices.Clone(t.Revoked)
	slices.SortStableFunc(c.Revoked, func(a, b Revocation) int {
		return cmp.Or(strings.Compare(a.Issuer, b.Issuer), strings.Compare(a.JTI, b.JTI), strings.Compare(a.Subject, b.Subject))
	})
	return &c
}

// withoutOrigins gives a copy that does not say where it was written.
func (t *Tokens) withoutOrigins() *Tokens {
	c := t.canonical()
	if c == nil {
		return nil
	}
	for i := range c.Issuers {
		c.Issuers[i].Origin = Origin{}
	}
	for i := range c.APIKeys {
		c.APIKeys[i].Origin = Origin{}
	}
	c.DPoP.Origin = Origin{}
	for i := range c.Revoked {
		c.Revoked[i].Origin = Origin{}
	}
	return c
}

// project returns what a sidecar needs that serves svc and judges calls to it
// by these rows: the issuers and keys that a row asks for or that name the
// service.
func (t *Tokens) project(svc ServiceName, rows []Rule) *Tokens {
	if t.Empty() {
		return nil
	}
	asked, any := map[string]bool{}, false
	for i := range rows {
		name, needs := rows[i].tokenIssuer()
		any = any || needs && name == ""
		if needs {
			asked[name] = true
		}
	}
	wanted := func(name string, services []ServiceName) bool {
		return any || asked[name] || svc != "" && slices.Contains(services, svc)
	}
	out := &Tokens{APIKeyHeader: t.APIKeyHeader, DPoP: t.DPoP}
	names := map[string]bool{}
	for i := range t.Issuers {
		if n := t.Issuers[i].Name(); wanted(n, t.Issuers[i].Services) {
			out.Issuers, names[n] = append(out.Issuers, t.Issuers[i]), true
		}
	}
	for _, k := range t.APIKeys {
		if len(k.Services) > 0 && !slices.Contains(k.Services, svc) {
			continue
		}
		if wanted(APIKeyIssuer, k.Services) {
			out.APIKeys = append(out.APIKeys, k)
		}
	}
	for _, r := range t.Revoked {
		if names[r.Issuer] {
			out.Revoked = append(out.Revoked, r)
		}
	}
	return out.canonical()
}

// shown returns the issuers of the tokens that the sidecars of these services check,
// by the rows about each: what tells a caller's sidecar which claims are true. It
// has no API keys, of whose calls the service counts each once, and asks for no
// nonce, which the service alone gives.
func (t *Tokens) shown(at map[ServiceName][]Rule) *Tokens {
	if t.Empty() || len(at) == 0 {
		return nil
	}
	names := map[string]bool{}
	for svc, rows := range at {
		if p := t.project(svc, rows); p != nil {
			for i := range p.Issuers {
				names[p.Issuers[i].Name()] = true
			}
		}
	}
	out := &Tokens{DPoP: DPoP{Origins: t.DPoP.Origins, Window: t.DPoP.Window}}
	for i := range t.Issuers {
		if names[t.Issuers[i].Name()] {
			out.Issuers = append(out.Issuers, t.Issuers[i])
		}
	}
	for _, r := range t.Revoked {
		if names[r.Issuer] {
			out.Revoked = append(out.Revoked, r)
		}
	}
	return out.canonical()
}

// tokenIssuer says whether the row asks for a token, and of which issuer; an
// empty name means any.
func (r *Rule) tokenIssuer() (name string, needs bool) {
	conds, err := ParseCond(r.Cond)
	if err != nil {
		return "", true // refused elsewhere; until then it asks for all
	}
	for i := range conds {
		needs = needs || conds[i].NeedsToken()
		if conds[i].Word == CondIssuer {
			name = conds[i].Value
		}
	}
	return name, needs
}
