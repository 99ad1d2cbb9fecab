package authz

import (
	"maps"
	"testing"
	"time"

	"sallyport/internal/mesh"
)

// What let a connection be upgraded is held to what a new call would be.
func TestStanding(t *testing.T) {
	edit := func(f func(*mesh.TokenIssuer)) func(*tokenRig) {
		return func(r *tokenRig) {
			is := r.noun.Issuers[0]
			f(&is)
			r.noun.Issuers = append([]mesh.TokenIssuer{is}, r.noun.Issuers[1:]...)
		}
	}
	wait := func(d time.Duration) func(*tokenRig) { return func(r *tokenRig) { r.now = at.Add(d) } }
	revoke := func(n mesh.Revocation) func(*tokenRig) {
		n.Issuer = ciIssuer
		return func(r *tokenRig) { r.noun.Revoked = append(r.noun.Revoked, n) }
	}
	other := baseIssuer()
	other.Issuer = "https://other.example"
	token, key := bearer(good(nil, nil)), shows(testAPIKey)
	for _, c := range []struct {
		name   string
		by     *Credential
		change func(*tokenRig)
		want   FaultCode
		none   bool // the credential is not looked at any more
		grace  time.Duration
	}{
		{name: "nothing has changed", by: token, change: wait(0)},
		{name: "beyond the time that it is known", by: token, change: wait(5*time.Minute + 29*time.Second)},
		{name: "its end", by: token, change: wait(5*time.Minute + 30*time.Second), want: FaultExpired},
		{name: "beyond its end, within a grace", by: token, change: wait(6*time.Minute + 29*time.Second), grace: time.Minute},
		{name: "its end and the grace", by: token, change: wait(6*time.Minute + 30*time.Second), grace: time.Minute, want: FaultExpired},
		{name: "revoked by name", by: token, change: revoke(mesh.Revocation{JTI: "j1"}), want: FaultRevoked},
		{name: "revoked, and no grace helps", by: token, change: revoke(mesh.Revocation{JTI: "j1"}), grace: time.Minute, want: FaultRevoked},
		{name: "revoked by subject", by: token, change: revoke(mesh.Revocation{Subject: "alice"}), want: FaultRevoked},
		{name: "another one revoked", by: token, change: revoke(mesh.Revocation{JTI: "j2"})},
		{name: "its key is gone", by: token, want: FaultKey,
			change: edit(func(is *mesh.TokenIssuer) { is.Keys.Inline = jwks(jwkOf("ed", ourKeys()["ed"].Public(), "")) })},
		{name: "another key under its name", by: token, want: FaultKey,
			change: edit(func(is *mesh.TokenIssuer) { is.Keys.Inline = jwks(jwkOf("ec", ourKeys()["ec2"].Public(), "")) })},
		{name: "another key beside it", by: token,
			change: edit(func(is *mesh.TokenIssuer) {
				is.Keys.Inline = jwks(jwkOf("ec", ourKeys()["ec"].Public(), ""), jwkOf("x", ourKeys()["ec2"].Public(), ""))
			})},
		{name: "its issuer is held to another audience", by: token, change: edit(func(is *mesh.TokenIssuer) { is.Audiences = []string{"shop"} }), want: FaultClaims},
		{name: "its issuer must bind tokens", by: token, change: edit(func(is *mesh.TokenIssuer) { is.Binding = mesh.BindEither }), want: FaultClaims},
		{name: "its issuer's tokens must be young", by: token, change: edit(func(is *mesh.TokenIssuer) { is.MaxAge = time.Second }), want: FaultClaims},
		{name: "the application is told otherwise", by: token,
			change: edit(func(is *mesh.TokenIssuer) {
				is.Forward, is.Headers = true, []mesh.ClaimHeader{{Header: "x-user", Claim: "sub"}}
			})},
		{name: "its issuer is gone", by: token, change: func(r *tokenRig) { r.noun.Issuers = []mesh.TokenIssuer{other} }, want: FaultIssuer},
		{name: "no token counts", by: token, change: func(r *tokenRig) { r.noun.Issuers = nil }, none: true},
		{name: "nothing counts", by: token, change: func(r *tokenRig) { r.noun = mesh.Tokens{} }, none: true},
		{name: "an API key", by: key, change: wait(time.Hour)},
		{name: "an API key that is gone", by: key, want: FaultAPIKey,
			change: func(r *tokenRig) {
				r.noun.APIKeys = []mesh.APIKey{{Name: "other", Hashes: []string{sha256Hash([]byte("slyk_other"))}}}
			}},
		{name: "an API key of another name", by: key, want: FaultAPIKey,
			change: func(r *tokenRig) { r.noun.APIKeys = []mesh.APIKey{{Name: "other", Hashes: r.noun.APIKeys[0].Hashes}} }},
		{name: "an API key that has ended", by: key, want: FaultAPIKey,
			change: func(r *tokenRig) {
				k := r.noun.APIKeys[0]
				k.NotAfter = at
				r.noun.APIKeys = []mesh.APIKey{k}
			}},
		{name: "no API key counts", by: key, change: func(r *tokenRig) { r.noun.APIKeys = nil }, none: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newTokenRig(t, withAPIKey)
			tok, code := r.check(c.by)
			if code != "" {
				t.Fatal(code)
			}
			c.change(r)
			if err := r.start(); err != nil {
				t.Fatal(err)
			}
			got, f := r.v.Standing(tok, c.grace)
			switch {
			case c.want != "":
				if f == nil || f.Code != c.want || got != nil {
					t.Errorf("got %v, %+v, want %q", got, f, c.want)
				}
			case f != nil || (got == nil) != c.none:
				t.Errorf("got %v, %+v", got, f)
			}
		})
	}
}

// A key of an API has what the policy in force gives it, not what it had.
func TestStandingAPIKeyHasItsNewScopes(t *testing.T) {
	r := newTokenRig(t, withAPIKey)
	old, code := r.check(shows(testAPIKey))
	if code != "" {
		t.Fatal(code)
	}
	k := r.noun.APIKeys[0]
	k.Scopes = []string{"new"}
	r.noun.APIKeys = []mesh.APIKey{k}
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	if now, f := r.v.Standing(old, 0); f != nil || !maps.Equal(now.Scopes, map[string]bool{"new": true}) {
		t.Errorf("got %+v, %+v", now, f)
	}
}

func TestStandingOfWhatNobodyVerified(t *testing.T) {
	r := newTokenRig(t, nil)
	if _, f := r.v.Standing(&Token{Issuer: ciIssuer, Subject: "alice"}, 0); f == nil || f.Code != FaultInternal {
		t.Errorf("got %+v", f)
	}
	if tok, f := r.v.Standing(nil, 0); tok != nil || f != nil {
		t.Errorf("of no token: %v, %+v", tok, f)
	}
	tok, _ := r.check(bearer(good(nil, nil)))
	r.v.cfg.Keys = panicking{}
	if got, f := r.v.Standing(tok, 0); got != nil || f == nil || f.Code != FaultInternal {
		t.Errorf("in a panic: %v, %+v", got, f)
	}
}
