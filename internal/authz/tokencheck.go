package authz

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

// mostToken is the size of the largest token, in bytes.
const mostToken = 8 << 10

// keyHeaders bring a key or say where one is. They never choose the key.
var keyHeaders = []string{"jku", "jwk", "x5u", "x5c", "x5t", "x5t#S256"}

// newState makes tokens.yaml ready to check by.
func newState(t *mesh.Tokens) (*verifierState, error) {
	st := &verifierState{
		issuers: map[string]*issuer{}, cache: newTokenCache(), origins: map[string]bool{},
		window: cmp.Or(t.DPoP.Window, time.Minute), nonce: t.DPoP.Nonce,
	}
	st.first = jose.Profile{Types: []string{"", "JWT", "JOSE", "at+jwt"}, Header: keyHeaders, MaxBytes: mostToken}
	for _, o := range t.DPoP.Origins {
		st.origins[o] = true
	}
	for i := range t.Issuers {
		is, err := compileIssuer(t.Issuers[i])
		if err != nil {
			return nil, err
		}
		st.issuers[is.name] = is
		for _, a := range is.profile.Algs {
			if !slices.Contains(st.first.Algs, a) {
				st.first.Algs = append(st.first.Algs, a)
			}
		}
		st.bearer = st.bearer || is.cfg.Binding != mesh.BindDPoP
		st.dpop = st.dpop || is.cfg.Binding == mesh.BindDPoP || is.cfg.Binding == mesh.BindEither
		for _, h := range is.cfg.Headers {
			st.drop = append(st.drop, h.Header)
		}
	}
	if len(t.Issuers) > 0 {
		st.drop = append(st.drop, "dpop")
	}
	for _, r := range t.Revoked {
		if st.revoked == nil {
			st.revoked = map[string]*revocations{}
		}
		if st.revoked[r.Issuer] == nil {
			st.revoked[r.Issuer] = &revocations{jti: map[string]bool{}, sub: map[string]time.Time{}}
		}
		st.revoked[r.Issuer].add(r)
	}
	if len(t.APIKeys) == 0 {
		return st, nil
	}
	var err error
	if st.keys, err = compileKeys(t); err != nil {
		return nil, err
	}
	st.drop = append(st.drop, st.keys.header)
	return st, nil
}

func compileIssuer(cfg mesh.TokenIssuer) (*issuer, error) {
	rules, err := rulesOf(cfg)
	if err != nil {
		return nil, fmt.Errorf("issuer %q: %w", cfg.Name(), err)
	}
	is := &issuer{name: cfg.Name(), cfg: cfg, rules: rules}
	if is.name == "" || is.name == mesh.APIKeyIssuer || len(cfg.Audiences) == 0 || len(cfg.Algorithms) == 0 {
		return nil, fmt.Errorf("issuer %q: name, audiences or algorithms: missing", is.name)
	}
	is.profile = jose.Profile{Algs: cfg.Algorithms, MaxBytes: cfg.MaxBytes}
	if !cfg.RefuseKeyHeaders {
		is.profile.Header = keyHeaders
	}
	is.claims = jose.Claims{Issuer: cfg.Issuer, Audiences: cfg.Audiences, Skew: max(cfg.Leeway, 1), MaxLife: cfg.MaxLifetime, NeedIssuedAt: cfg.MaxAge > 0}
	switch cfg.Profile {
	case mesh.ProfileAccess:
		is.profile.Types = []string{"at+jwt"}
		is.claims.NeedIssuedAt = true
	case mesh.ProfileJWT:
		is.profile.Types = []string{"", "JWT"}
	case mesh.ProfileSVID:
		is.profile.Types, is.profile.Header, is.profile.NeedKeyID = []string{"", "JWT", "JOSE"}, nil, true
		is.claims.Issuer = ""
	default:
		return nil, fmt.Errorf("issuer %q: unknown profile %q", is.name, cfg.Profile)
	}
	return is, nil
}

// verify checks a token that is not known yet.
func (v *Verifier) verify(ctx context.Context, st *verifierState, text string, now time.Time) (*verified, *Fault) {
	t, err := st.first.Parse(text)
	if err != nil {
		return nil, fault(FaultForm, err.Error())
	}
	is := st.issuerOf(t)
	if is == nil {
		return nil, fault(FaultIssuer, "token is of an issuer that does not count here")
	}
	if t, err = is.profile.Parse(text); err != nil { // the limits of this issuer
		return nil, fault(FaultForm, err.Error())
	}
	if len(t.Claims) > is.cfg.MaxClaims {
		return nil, fault(FaultForm, "token has more claims than its issuer may write")
	}
	// Read before the key: keys that change in between make the entry old.
	e := &verified{issuer: is, generation: v.cfg.Keys.Generation(is.name), size: len(text)}
	key, known, err := v.cfg.Keys.Find(ctx, is.name, t)
	switch {
	case err != nil:
		return nil, fault(FaultUnavailable, fmt.Sprintf("keys of issuer %q are not available", is.name))
	case !known:
		return nil, fault(FaultKey, fmt.Sprintf("issuer %q has no such key", is.name))
	}
	if err := t.Verify(key); err != nil {
		return nil, fault(FaultSignature, err.Error())
	}
	e.names, e.key = namesOf(t), key.Public
	if f := e.fill(t, now); f != nil {
		return nil, f
	}
	if e.cnf.jkt != "" {
		sum := sha256.Sum256([]byte(text))
		e.ath = base64.RawURLEncoding.EncodeToString(sum[:])
	}
	return e, nil
}

// issuerOf finds whose rules a token is held to. The claims are not believed
// yet: they only choose the keys. iss goes before sub, and both are compared
// as text.
func (st *verifierState) issuerOf(t *jose.Token) *issuer {
	iss, _ := t.Claims["iss"].(string)
	if is := st.issuers[iss]; is != nil && is.cfg.Profile != mesh.ProfileSVID {
		return is
	}
	sub, _ := t.Claims["sub"].(string)
	id, err := spiffeid.FromString(sub)
	if err != nil {
		return nil
	}
	if is := st.issuers[id.TrustDomain().IDString()]; is != nil && is.cfg.Profile == mesh.ProfileSVID {
		return is
	}
	return nil
}

// fill holds the claims to the rules and keeps what a request needs of them.
func (e *verified) fill(t *jose.Token, now time.Time) *Fault {
	is := e.issuer
	claims := is.claims
	claims.Now = now
	until, err := t.Check(claims)
	if errors.Is(err, jose.ErrExpired) {
		return fault(FaultExpired, err.Error())
	}
	if err != nil {
		return fault(FaultClaims, err.Error())
	}
	e.until = until
	if e.issued, _, err = t.Claims.Time("iat"); err != nil {
		return fault(FaultClaims, err.Error())
	}
	if is.cfg.MaxAge > 0 {
		end := e.issued.Add(is.cfg.MaxAge + is.cfg.Leeway)
		if !now.Before(end) {
			return fault(FaultExpired, "token is older than its issuer's may be")
		}
		e.until = earlier(e.until, end)
	}
	e.ends, e.until = e.until, earlier(e.until, now.Add(maxCached))
	sub, err := subject(is, t)
	if err != nil {
		return fault(FaultClaims, err.Error())
	}
	if e.cnf, err = confirmationOf(t.Claims); err != nil {
		return fault(FaultBinding, err.Error())
	}
	if e.token, err = tokenOf(is, t, sub, e.cnf); err != nil {
		return fault(FaultClaims, err.Error())
	}
	if is.cfg.SingleAudience && len(e.token.Audience) > 1 {
		return fault(FaultClaims, "token is for others, too")
	}
	e.jti = e.token.Claims["jti"]
	e.token.basis.jwt = e
	return nil
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// subject checks who the token speaks of, and what else its profile demands.
func subject(is *issuer, t *jose.Token) (string, error) {
	sub, err := t.Claims.Text("sub")
	if err != nil {
		return "", err
	}
	if _, has := t.Claims["jti"]; has || is.cfg.Profile == mesh.ProfileAccess {
		if _, err := t.Claims.Text("jti"); err != nil {
			return "", err
		}
	}
	switch is.cfg.Profile {
	case mesh.ProfileAccess:
		_, err = t.Claims.Text("client_id")
		return sub, err
	case mesh.ProfileSVID:
		id, err := spiffeid.FromString(sub)
		if err != nil || id.Path() == "" || !id.MemberOf(is.cfg.TrustDomain) {
			return "", errors.New("sub is not the SPIFFE ID of a workload of the trust domain")
		}
	}
	return sub, nil
}

// A confirmation says which key a token is bound to (RFC 7800).
type confirmation struct {
	cert bool
	x5t  [32]byte
	jkt  string
}

func (c *confirmation) bound() bool { return c.cert || c.jkt != "" }

// confirmationOf reads cnf. One that is not understood is an error: the token
// is not for whoever bears it.
func confirmationOf(claims jose.Object) (c confirmation, err error) {
	if _, has := claims["cnf"]; !has {
		return c, nil
	}
	cnf := claims.Child("cnf")
	if len(cnf) == 0 {
		return c, errors.New("cnf is not understood")
	}
	for name := range cnf {
		s, err := cnf.Text(name)
		if err != nil {
			return c, fmt.Errorf("cnf is not understood: %w; want x5t#S256 or jkt", err)
		}
		b, err := jose.Decode64(base64.RawURLEncoding, s)
		if err != nil || len(b) != len(c.x5t) {
			return c, errors.New("cnf is not the hash of a key")
		}
		switch name {
		case "x5t#S256":
			c.cert, c.x5t = true, [32]byte(b)
		case "jkt":
			c.jkt = s
		default:
			return c, errors.New("cnf is of a kind that is not understood")
		}
	}
	return c, nil
}

// revocations are those of one issuer.
type revocations struct {
	jti map[string]bool
	sub map[string]time.Time // zero: all of the subject
}

func (r *revocations) add(n mesh.Revocation) {
	if n.JTI != "" {
		r.jti[n.JTI] = true
		return
	}
	if old, has := r.sub[n.Subject]; !has || !old.IsZero() && (n.Before.IsZero() || n.Before.After(old)) {
		r.sub[n.Subject] = n.Before
	}
}

// holds says whether a token was taken back.
func (r *revocations) holds(e *verified) bool {
	if r == nil {
		return false
	}
	if e.jti != "" && r.jti[e.jti] {
		return true
	}
	before, has := r.sub[e.token.Subject]
	return has && (before.IsZero() || e.issued.Before(before))
}

// normalHost gives scheme and host of a URL as origins are written.
func normalHost(scheme, host string) string {
	scheme, host = strings.ToLower(scheme), strings.ToLower(host)
	if port, ok := map[string]string{"https": ":443", "http": ":80"}[scheme]; ok {
		host = strings.TrimSuffix(host, port)
	}
	return scheme + "://" + host
}
