package mesh

import (
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"
)

// tokenAlgorithms are the signatures that can be checked. There is neither
// "none" nor a shared secret among them.
var tokenAlgorithms = []string{"ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "EdDSA"}

var (
	tokenProfiles = []string{string(ProfileAccess), string(ProfileJWT), string(ProfileSVID)}
	tokenBindings = []string{string(BindNone), string(BindCert), string(BindDPoP), string(BindEither)}
)

// MaxAudiences bounds the audiences of a token and of an issuer.
const MaxAudiences = 16

func (v *validator) tokens() {
	t := v.p.Tokens
	if t == nil {
		return
	}
	seen := map[string]Origin{}
	for i := range t.Issuers {
		is := &t.Issuers[i]
		v.tokenIssuer(is)
		if is.Name() != "" && (is.Profile != ProfileSVID || !is.TrustDomain.IsZero()) {
			twice(v, seen, is.Name(), is.Origin, "issuer")
		}
	}
	v.apiKeys(t)
	for _, r := range t.Revoked {
		v.revocation(r, seen)
	}
	v.dpop(&t.DPoP)
}

// shown checks the tokens that calls take their route by, as those that they are
// judged by.
func (v *validator) shown(t *Tokens) {
	own := v.p.Tokens
	v.p.Tokens = t
	v.tokens()
	v.p.Tokens = own
}

func (v *validator) tokenIssuer(i *TokenIssuer) {
	o := i.Origin
	v.tokenName(i)
	switch {
	case i.Profile == "":
		v.missing(o, "profile")
	case !slices.Contains(tokenProfiles, string(i.Profile)):
		v.item(o, string(i.Profile), "unknown profile %q%s", clip(string(i.Profile)), didYouMean(string(i.Profile), tokenProfiles))
	}
	if len(i.Audiences) == 0 {
		if !v.spoiled[o]["audiences"] {
			v.item(o, "audiences:", "audiences are missing: without them a token for anybody else would count here")
		}
	} else if len(i.Audiences) > MaxAudiences {
		v.item(o, "audiences:", "%d audiences, want 1 to %d", len(i.Audiences), MaxAudiences)
	}
	seen := map[string]Origin{}
	for _, a := range i.Audiences {
		if err := checkTokenText(a); err != nil {
			v.item(o, a, "audience %s", err)
		} else {
			twice(v, seen, a, o, "audience")
		}
	}
	v.algorithms(i)
	v.keySet(i)
	v.serviceRefs(o, i.Services)
	v.tokenLimits(i)
	if !slices.Contains(tokenBindings, string(i.Binding)) {
		v.item(o, string(i.Binding), "unknown binding %q%s", clip(string(i.Binding)), didYouMean(string(i.Binding), tokenBindings))
	}
	names := map[string]Origin{}
	for _, h := range i.Headers {
		if err := checkClaimHeader(h.Header); err != nil {
			v.item(o, h.Header, "%s", err)
		} else {
			twice(v, names, strings.ReplaceAll(h.Header, "_", "-"), o, "header")
		}
		if h.Claim == "" || len(h.Claim) > 256 {
			v.item(o, h.Header, "header %q names no claim", h.Header)
		}
	}
}

func (v *validator) tokenName(i *TokenIssuer) {
	o := i.Origin
	if i.Profile == ProfileSVID {
		if i.TrustDomain.IsZero() {
			v.missing(o, "trust_domain")
		}
		if i.Issuer != "" {
			v.item(o, "issuer:", "issuer has no meaning for profile jwt-svid: the trust domain of the subject counts")
		}
		return
	}
	if !i.TrustDomain.IsZero() {
		v.item(o, "trust_domain:", "trust_domain has a meaning for profile jwt-svid only")
	}
	switch err := checkTokenText(i.Issuer); {
	case i.Issuer == "":
		v.missing(o, "issuer")
	case err != nil:
		v.item(o, "issuer:", "issuer %s", err)
	case i.Issuer == APIKeyIssuer || strings.HasPrefix(i.Issuer, "spiffe://"):
		v.item(o, i.Issuer, "issuer %q is the name of something else: %q stands for API keys, spiffe:// for JWT-SVIDs", clip(i.Issuer), APIKeyIssuer)
	}
}

func (v *validator) algorithms(i *TokenIssuer) {
	seen := map[string]Origin{}
	for _, a := range i.Algorithms {
		switch {
		case strings.EqualFold(a, "none") || strings.HasPrefix(a, "HS"):
			v.item(i.Origin, a, "algorithm %q is refused: anybody who can check such a token can make one", clip(a))
		case !slices.Contains(tokenAlgorithms, a):
			v.item(i.Origin, a, "unknown algorithm %q%s", clip(a), didYouMean(a, tokenAlgorithms))
		case a == "EdDSA" && i.Profile == ProfileSVID:
			v.item(i.Origin, a, "algorithm %q is not one of JWT-SVID", a)
		default:
			twice(v, seen, a, i.Origin, "algorithm")
		}
	}
	if len(i.Algorithms) == 0 {
		v.missing(i.Origin, "algorithms")
	}
}

func (v *validator) keySet(i *TokenIssuer) {
	o, k := i.Origin, i.Keys
	n := 0
	for _, s := range []string{k.URL, k.File, k.Inline} {
		if s != "" {
			n++
		}
	}
	switch {
	case i.Profile == ProfileSVID:
		if k != (KeySet{}) {
			v.item(o, "jwks:", "jwks has no meaning for profile jwt-svid: the keys are those of the trust domain's bundle")
		}
		return
	case v.spoiled[o]["jwks"]:
		return
	case n == 0:
		v.item(o, "jwks:", "jwks is missing: write url, file or inline below it")
		return
	case n > 1:
		v.item(o, "jwks:", "jwks has more than one of url, file and inline")
		return
	case k.CA != "" && k.URL == "":
		v.item(o, "ca:", "ca has a meaning beside url only")
	case k.CA != "":
		if b, _ := pem.Decode([]byte(k.CA)); b == nil || b.Type != "CERTIFICATE" {
			v.item(o, "ca:", "ca is not a certificate in PEM")
		}
	}
	switch {
	case k.URL != "":
		if err := checkKeyURL(k.URL); err != nil {
			v.item(o, k.URL, "jwks url %s", err)
		}
	case k.File != "" && !strings.HasPrefix(k.File, "/"):
		v.item(o, k.File, "jwks file %q is not an absolute path", clip(k.File))
	case k.Inline != "":
		if err := checkInlineKeys(k.Inline); err != nil {
			v.item(o, "inline:", "jwks inline %s", err)
		}
	}
}

// checkKeyURL refuses what could fetch keys from somebody else.
func checkKeyURL(s string) error {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Host == "" || u.Opaque != "":
		return fmt.Errorf("%q is not a URL", clip(s))
	case u.Scheme != "https":
		return fmt.Errorf("%q is not https: who can change keys on the way can sign", clip(s))
	case u.User != nil || u.Fragment != "":
		return errors.New("has a user or a fragment")
	}
	return nil
}

// checkInlineKeys catches what people paste by mistake. Each key is looked at
// where it is used.
func checkInlineKeys(s string) error {
	var set struct {
		Keys []map[string]any `json:"keys"`
	}
	if err := json.Unmarshal([]byte(s), &set); err != nil || len(set.Keys) == 0 {
		return errors.New(`is not a JSON Web Key Set: want {"keys": [...]}`)
	}
	for i, k := range set.Keys {
		if k["kty"] == "oct" || k["d"] != nil || k["k"] != nil {
			return fmt.Errorf("holds a secret key at place %d: publish the public half only", i+1)
		}
	}
	return nil
}

func (v *validator) tokenLimits(i *TokenIssuer) {
	o := i.Origin
	if i.Leeway < 0 || i.Leeway > maxLeeway {
		v.item(o, "leeway:", "leeway %s is not from 0s to 1m", i.Leeway)
	}
	if i.MaxLifetime < time.Second || i.MaxLifetime > maxLifetime {
		v.item(o, "max_lifetime:", "max_lifetime %s is not from 1s to 720h", i.MaxLifetime)
	}
	if i.MaxAge < 0 || i.MaxAge > maxLifetime {
		v.item(o, "max_age:", "max_age %s is not from 0s to 720h", i.MaxAge)
	}
	if i.MaxBytes < 128 || i.MaxBytes > mostTokenBytes {
		v.item(o, "max_bytes:", "max_bytes %d is not from 128 to %d", i.MaxBytes, mostTokenBytes)
	}
	if i.MaxClaims < 1 || i.MaxClaims > mostClaims {
		v.item(o, "max_claims:", "max_claims %d is not from 1 to %d", i.MaxClaims, mostClaims)
	}
}

// checkTokenText accepts what a condition can be compared with.
func checkTokenText(s string) error {
	if s == "" || len(s) > 512 {
		return fmt.Errorf("%q is empty or longer than 512 bytes", clip(s))
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f || s[i] == ',' || s[i] == '"' || s[i] == '\\' {
			return fmt.Errorf("%q holds a blank, comma, quote or a character beyond ASCII", clip(s))
		}
	}
	return nil
}

// checkClaimHeader accepts names that only carry what we put there.
func checkClaimHeader(h string) error {
	if !strings.HasPrefix(h, "x-") || !plainWord(h, 64) || h != strings.ToLower(h) || strings.ContainsAny(h, "._") {
		return fmt.Errorf("header %q is not x- and lower-case letters, digits or hyphens", clip(h))
	}
	for _, r := range []string{"x-forwarded-", "x-envoy-", "x-real-ip"} {
		if strings.HasPrefix(h, r) {
			return fmt.Errorf("header %q is kept for proxies", clip(h))
		}
	}
	return nil
}

func (v *validator) serviceRefs(o Origin, names []ServiceName) {
	if v.valuesOnly {
		return
	}
	known := make([]string, 0, len(v.p.Services))
	for _, s := range v.p.Services {
		known = append(known, string(s.Name))
	}
	for _, n := range names {
		if !slices.Contains(known, string(n)) && !v.partial {
			v.item(o, string(n), "unknown service %q%s", clip(string(n)), didYouMean(string(n), known))
		}
	}
}

func (v *validator) apiKeys(t *Tokens) {
	if h := t.APIKeyHeader; len(t.APIKeys) > 0 && (checkHeaderName(h) != nil) {
		v.item(t.APIKeys[0].Origin, h, "api_keys: %s", checkHeaderName(h))
	}
	names, hashes := map[string]Origin{}, map[string]Origin{}
	argon := 0
	for _, k := range t.APIKeys {
		if k.Name == "" {
			v.missing(k.Origin, "name")
		} else if !plainWord(k.Name, 64) {
			v.item(k.Origin, k.Name, "name %q is not 1 to 64 letters, digits, hyphens, dots or underscores", clip(k.Name))
		} else {
			twice(v, names, k.Name, k.Origin, "API key")
		}
		if n := len(k.Hashes); n == 0 {
			v.missing(k.Origin, "hashes")
		} else if n > 2 {
			v.item(k.Origin, "hashes:", "%d live keys: two are enough to replace one by the other", n)
		}
		for _, h := range k.Hashes {
			if err := CheckKeyHash(h); err != nil {
				v.item(k.Origin, "hashes:", "%s", err)
				continue
			}
			if strings.HasPrefix(h, Argon2Prefix) {
				argon++
			}
			if first, ok := hashes[h]; ok {
				v.item(k.Origin, "hashes:", "the same key is written twice, first at %s", first)
			}
			hashes[h] = k.Origin
		}
		for _, s := range k.Scopes {
			if err := checkTokenText(s); err != nil {
				v.item(k.Origin, "scopes:", "scope %s", err)
			}
		}
		for _, c := range sortedKeys(k.Claims) {
			if c == "sub" || c == "iss" || checkTokenText(c) != nil {
				v.item(k.Origin, "claims:", "claim %q cannot be given to a key", clip(c))
			}
		}
		v.serviceRefs(k.Origin, k.Services)
	}
	if argon > maxArgon {
		v.item(t.APIKeys[0].Origin, "", "%d argon2id hashes, more than %d: each costs 19 MiB and 20 ms to compare; write sha256 hashes of random keys", argon, maxArgon)
	}
}

// maxArgon bounds the work that one unknown key can cause.
const maxArgon = 8

// The forms of a hash of an API key.
const (
	SHA256Prefix = "sha256:"
	Argon2Prefix = "$argon2id$"
)

// CheckKeyHash accepts the two forms of a hash; it never quotes it.
func CheckKeyHash(h string) error {
	if s, ok := strings.CutPrefix(h, SHA256Prefix); ok {
		if b, err := hex.DecodeString(s); err != nil || len(b) != 32 || s != strings.ToLower(s) {
			return errors.New("a sha256 hash is not 64 lower-case hex digits: make one with sallyport apikey hash")
		}
		return nil
	}
	if strings.HasPrefix(h, Argon2Prefix) {
		_, err := ParseArgon2(h)
		return err
	}
	return fmt.Errorf("a hash starts with neither %q nor %q: make one with sallyport apikey create or hash", SHA256Prefix, Argon2Prefix)
}

// checkHeaderName accepts where an API key may stand.
func checkHeaderName(h string) error {
	if !plainWord(h, 64) || h != strings.ToLower(h) || strings.ContainsAny(h, "._") {
		return fmt.Errorf("header %q is not lower-case letters, digits and hyphens", clip(h))
	}
	for _, r := range []string{"authorization", "dpop", "host", "connection", "content-length", "cookie", "te", "trailer", "transfer-encoding", "upgrade", "expect"} {
		if h == r {
			return fmt.Errorf("header %q has another meaning", h)
		}
	}
	return nil
}

func (v *validator) revocation(r Revocation, issuers map[string]Origin) {
	switch _, known := issuers[r.Issuer]; {
	case r.Issuer == "":
		v.missing(r.Origin, "issuer")
	case !known && !v.valuesOnly:
		v.item(r.Origin, r.Issuer, "issuer %q is not one of tokens.yaml%s", clip(r.Issuer), didYouMean(r.Issuer, sortedKeys(issuers)))
	case (r.JTI == "") == (r.Subject == ""):
		v.item(r.Origin, "", "a revocation names either jti or subject")
	case r.JTI != "" && !r.Before.IsZero():
		v.item(r.Origin, "before:", "before has a meaning beside subject only")
	}
}

func (v *validator) dpop(d *DPoP) {
	o := d.Origin
	if d.Window < 0 || d.Window > mostWindow {
		v.item(o, "window:", "dpop: window %s is not from 1s to 10m", d.Window)
	}
	for _, s := range d.Origins {
		u, err := url.Parse(s)
		if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || s != strings.ToLower(u.Scheme+"://"+u.Host) {
			v.item(o, s, "dpop: origin %q is not a lower-case scheme and host, such as https://api.corp.example", clip(s))
		}
	}
}
