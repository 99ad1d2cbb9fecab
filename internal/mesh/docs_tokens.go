package mesh

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// tokensFile says whose tokens count.
const tokensFile = "tokens.yaml"

// tokensDoc is tokens.yaml as people write it.
type tokensDoc struct {
	Issuers []issuerDoc     `yaml:"issuers"`
	APIKeys apiKeysDoc      `yaml:"api_keys"`
	Revoked []revocationDoc `yaml:"revoked"`
	DPoP    dpopDoc         `yaml:"dpop"`
}

type issuerDoc struct {
	at               `yaml:"-"`
	Issuer           string               `yaml:"issuer"`
	TrustDomain      spiffeid.TrustDomain `yaml:"trust_domain"`
	Profile          string               `yaml:"profile"`
	Audiences        []string             `yaml:"audiences"`
	SingleAudience   bool                 `yaml:"single_audience"`
	Algorithms       []string             `yaml:"algorithms"`
	JWKS             keySetDoc            `yaml:"jwks"`
	Services         []string             `yaml:"services"`
	Leeway           *time.Duration       `yaml:"leeway"`
	MaxLifetime      *time.Duration       `yaml:"max_lifetime"`
	MaxAge           time.Duration        `yaml:"max_age"`
	MaxBytes         *int                 `yaml:"max_bytes"`
	MaxClaims        *int                 `yaml:"max_claims"`
	Binding          string               `yaml:"binding"`
	RefuseKeyHeaders bool                 `yaml:"refuse_key_headers"`
	Headers          map[string]string    `yaml:"headers"`
	Forward          bool                 `yaml:"forward"`
}

type keySetDoc struct {
	URL    string `yaml:"url"`
	CA     string `yaml:"ca"`
	File   string `yaml:"file"`
	Inline string `yaml:"inline"`
}

type apiKeysDoc struct {
	Header string      `yaml:"header"`
	Keys   []apiKeyDoc `yaml:"keys"`
}

type apiKeyDoc struct {
	at       `yaml:"-"`
	Name     string            `yaml:"name"`
	Hashes   []string          `yaml:"hashes"`
	Scopes   []string          `yaml:"scopes"`
	Claims   map[string]string `yaml:"claims"`
	Services []string          `yaml:"services"`
	Rate     Rate              `yaml:"rate"`
	NotAfter time.Time         `yaml:"not_after"`
}

type revocationDoc struct {
	at      `yaml:"-"`
	Issuer  string    `yaml:"issuer"`
	JTI     string    `yaml:"jti"`
	Subject string    `yaml:"subject"`
	Before  time.Time `yaml:"before"`
}

type dpopDoc struct {
	at      `yaml:"-"`
	Origins []string      `yaml:"origins"`
	Window  time.Duration `yaml:"window"`
	Nonce   bool          `yaml:"nonce"`
}

// Bounds and defaults of tokens.yaml.
const (
	defaultLeeway   = 30 * time.Second
	maxLeeway       = time.Minute
	defaultLifetime = 24 * time.Hour
	svidLifetime    = time.Hour
	maxLifetime     = 30 * 24 * time.Hour
	mostTokenBytes  = 8 << 10
	mostClaims      = 64
	defaultWindow   = time.Minute
	mostWindow      = 10 * time.Minute
)

// noun is nil when the file says nothing.
func (d tokensDoc) noun() *Tokens {
	t := &Tokens{
		APIKeyHeader: cmp.Or(d.APIKeys.Header, DefaultAPIKeyHeader),
		DPoP:         DPoP{Origins: d.DPoP.Origins, Window: cmp.Or(d.DPoP.Window, defaultWindow), Nonce: d.DPoP.Nonce, Origin: d.DPoP.origin},
	}
	for _, i := range d.Issuers {
		if !i.unread() {
			t.Issuers = append(t.Issuers, i.noun())
		}
	}
	for _, k := range d.APIKeys.Keys {
		if k.unread() {
			continue
		}
		t.APIKeys = append(t.APIKeys, APIKey{
			Name: k.Name, Hashes: k.Hashes, Scopes: k.Scopes, Claims: k.Claims, Services: serviceNames(k.Services),
			Rate: k.Rate, NotAfter: k.NotAfter, Origin: k.origin,
		})
	}
	for _, r := range d.Revoked {
		if !r.unread() {
			t.Revoked = append(t.Revoked, Revocation{Issuer: r.Issuer, JTI: r.JTI, Subject: r.Subject, Before: r.Before, Origin: r.origin})
		}
	}
	if len(t.Issuers)+len(t.APIKeys)+len(t.Revoked) == 0 {
		return nil
	}
	return t
}

func (i *issuerDoc) noun() TokenIssuer {
	n := TokenIssuer{
		Issuer: i.Issuer, TrustDomain: i.TrustDomain, Profile: TokenProfile(i.Profile),
		Audiences: i.Audiences, SingleAudience: i.SingleAudience, Algorithms: i.Algorithms,
		Keys: KeySet(i.JWKS), Services: serviceNames(i.Services),
		Leeway: orDefault(i.Leeway, defaultLeeway), MaxLifetime: orDefault(i.MaxLifetime, defaultLifetime), MaxAge: i.MaxAge,
		MaxBytes: orDefault(i.MaxBytes, mostTokenBytes), MaxClaims: orDefault(i.MaxClaims, mostClaims),
		Binding: cmp.Or(TokenBinding(i.Binding), BindNone), RefuseKeyHeaders: i.RefuseKeyHeaders,
		Forward: i.Forward, Origin: i.origin,
	}
	if n.Profile == ProfileSVID && i.MaxLifetime == nil {
		n.MaxLifetime = svidLifetime
	}
	if len(n.Algorithms) == 0 {
		n.Algorithms = slices.Clone(DefaultAlgorithms)
		if n.Profile == ProfileSVID {
			n.Algorithms = []string{"ES256", "ES384", "RS256", "PS256"}
		}
	}
	for _, h := range slices.Sorted(maps.Keys(i.Headers)) {
		n.Headers = append(n.Headers, ClaimHeader{Header: h, Claim: i.Headers[h]})
	}
	return n
}

// orDefault tells a value that is not written from one that is zero.
func orDefault[T any](v *T, def T) T {
	if v == nil {
		return def
	}
	return *v
}

func serviceNames(list []string) []ServiceName {
	var out []ServiceName
	for _, s := range list {
		out = append(out, ServiceName(s))
	}
	return out
}

// A Rate is so many calls in a time, written "50/s", "50/m" or "50/h". Zero
// means no bound.
type Rate struct {
	Calls int
	Per   time.Duration
}

var rateUnits = map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour}

// UnmarshalText reads the form "50/s".
func (r *Rate) UnmarshalText(text []byte) error {
	n, unit, _ := strings.Cut(string(text), "/")
	calls, err := strconv.ParseUint(n, 10, 31)
	per, ok := rateUnits[unit]
	if err != nil || calls == 0 || !ok {
		return fmt.Errorf("%q is not a rate like 50/s, 50/m or 50/h", clip(string(text)))
	}
	*r = Rate{Calls: int(calls), Per: per}
	return nil
}

// MarshalText writes the form "50/s".
func (r Rate) MarshalText() ([]byte, error) {
	for u, per := range rateUnits {
		if per == r.Per {
			return fmt.Appendf(nil, "%d/%s", r.Calls, u), nil
		}
	}
	return nil, errors.New("rate has no unit")
}
