package authz

import (
	"errors"
	"log/slog"
	"strings"
	"testing"

	jwt "github.com/golang-jwt/jwt/v5"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
)

const tokenRowsCSV = `p, pay, in, spiffe://corp.example/ns/shop/sa/web, spiffe://corp.example/ns/shop/sa/billing, 8443, POST, /v1/pay, iss=https://ci.example aud=billing scope~pay, allow
p, ref, in, spiffe://corp.example/ns/shop/sa/web, spiffe://corp.example/ns/shop/sa/billing, 8443, POST, /v1/deploy, iss=https://ci.example claim.ref=refs/heads/main acr>=2, allow
p, bnd, in, spiffe://corp.example/ns/shop/sa/web, spiffe://corp.example/ns/shop/sa/billing, 8443, POST, /v1/bound, bound, allow
p, key, in, spiffe://corp.example/ns/shop/sa/web, spiffe://corp.example/ns/shop/sa/billing, 8443, POST, /v1/orders, iss=apikey claim.sub=acme scope~orders claim.tier=gold, allow
p, svid, in, spiffe://corp.example/ns/shop/sa/web, spiffe://corp.example/ns/shop/sa/billing, 8443, POST, /v1/partner, iss=spiffe://partner.example claim.sub=spiffe://partner.example/ns/a/sa/b, allow
p, stop, in, **, spiffe://corp.example/ns/shop/sa/billing, 8443, *, **, claim.blocked=true, deny
`

// Rules 34 to 36 and 44: each condition decides by what a verified token says,
// in the index, in a connection's slice and in Casbin alike, and the record
// names the token beside the certificate.
func TestTokensDecide(t *testing.T) {
	r := newTokenRig(t, func(n *mesh.Tokens) { withAPIKey(n); svidIssuer(n) })
	set := compile(t, tokenRowsCSV)
	log := audit.NewMemory()
	j, err := NewJudge(JudgeConfig{Audit: log, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	j.Use(set)
	p := newProver()
	for _, tt := range []struct {
		name, path string
		show       *Credential
		rule       string // of the row that allows
		reason     Reason
		detail     string // in the record
	}{
		{"the scope", "/v1/pay", bearer(good(nil, nil)), "pay", ByRule, `token of "https://ci.example" for "alice", kid "ec", jti sha256:`},
		{"another scope", "/v1/pay", bearer(good(nil, over{"scope": `"read"`})), "", FailedToken, "alice"},
		{"a scope that begins alike", "/v1/pay", bearer(good(nil, over{"scope": `"payments"`})), "", FailedToken, "alice"},
		{"a scope in a list", "/v1/pay", bearer(good(nil, over{"scope": "", "scp": `["pay"]`})), "pay", ByRule, "alice"},
		{"no token", "/v1/pay", &Credential{}, "", FailedToken, ""},
		{"claim and acr", "/v1/deploy", bearer(good(nil, over{"ref": `"refs/heads/main"`, "acr": `"2"`})), "ref", ByRule, "alice"},
		{"acr below", "/v1/deploy", bearer(good(nil, over{"ref": `"refs/heads/main"`, "acr": `"1"`})), "", FailedToken, "alice"},
		{"acr that is no number", "/v1/deploy", bearer(good(nil, over{"ref": `"refs/heads/main"`, "acr": `"gold9"`})), "", FailedToken, "alice"},
		{"no acr", "/v1/deploy", bearer(good(nil, over{"ref": `"refs/heads/main"`})), "", FailedToken, "alice"},
		{"another claim", "/v1/deploy", bearer(good(nil, over{"ref": `"refs/heads/main2"`, "acr": `"2"`})), "", FailedToken, "alice"},
		{"a claim with two values", "/v1/deploy", bearer(good(nil, over{"ref": `["refs/heads/main"]`, "acr": `"2"`})), "", FailedToken, "alice"},
		{"bound", "/v1/bound", p.shows(p.token(nil), nil, nil), "bnd", ByRule, ", bound"},
		{"not bound", "/v1/bound", bearer(good(nil, nil)), "", FailedToken, "alice"},
		{"an API key", "/v1/orders", shows(testAPIKey), "key", ByRule, `API key "acme"`},
		{"a token where a key is meant", "/v1/orders", bearer(good(nil, over{"sub": `"acme"`, "scope": `"orders"`, "tier": `"gold"`})), "", FailedToken, "acme"},
		{"a JWT-SVID", "/v1/partner", svid(nil, nil)(nil), "svid", ByRule, "partner.example"},
		{"another JWT-SVID", "/v1/partner", svid(nil, over{"sub": `"spiffe://partner.example/ns/a/sa/c"`})(nil), "", FailedToken, "partner.example"},
		{"a claim that denies", "/v1/pay", bearer(good(nil, over{"blocked": `true`})), "stop", ByRule, "alice"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if len(tt.show.Proof) > 0 {
				sum := string(tt.show.Authorization[len("DPoP "):])
				tt.show.Proof = p.proof(sum, nil, over{"htu": `"http://billing.mesh.internal` + tt.path + `"`})
			}
			tt.show.Method, tt.show.Path, tt.show.Host = "POST", tt.path, "billing.mesh.internal"
			tok, f := r.check(tt.show)
			if f != "" {
				t.Fatal(f)
			}
			c := &Call{Dir: mesh.In, Src: id("spiffe://corp.example/ns/shop/sa/web"), Dst: "spiffe://corp.example/ns/shop/sa/billing", Port: 8443,
				Verb: "POST", Path: tt.path, Token: tok, Now: at}
			allow := tt.rule != "" && tt.rule != "stop"
			for how, d := range map[string]Decision{"index": set.Decide(c), "slice": set.Slice(c.Dir, c.Src, c.Dst, c.Port).Decide(c)} {
				if d.Allow != allow || d.Reason != tt.reason || d.Rule != tt.rule {
					t.Errorf("%s says %+v", how, d)
				}
			}
			if d, err := set.Oracle(c); err != nil || d.Allow != allow || d.Rule != tt.rule {
				t.Errorf("casbin says %+v, %v", d, err)
			}
			g, err := j.Conn(c.Dir, c.Src, c.Dst, c.Port).Judge(c)
			if d := (*Denial)(nil); allow != g.Valid() || !allow && (!errors.As(err, &d) || d.Reason != tt.reason) {
				t.Errorf("the judge says %v, %v", g, err)
			}
			all := log.Records()
			rec := all[len(all)-1]
			if rec.Src != c.Src.String() || !strings.Contains(rec.Detail, tt.detail) || tt.detail == "" && rec.Detail != "" {
				t.Errorf("the record says %q of %s", rec.Detail, rec.Src)
			}
			for _, secret := range []string{string(tt.show.Authorization), testAPIKey, "j1\""} {
				if secret != "" && strings.Contains(rec.Detail, secret) {
					t.Errorf("the record holds what can be shown again: %q", rec.Detail)
				}
			}
		})
	}
}

// Rule 41: the application gets claims with one value, in one line each, and
// the token itself only when the issuer says so.
func TestJWTRule41ClaimsToHeaders(t *testing.T) {
	r := newTokenRig(t, editIssuer(func(i *mesh.TokenIssuer) {
		i.Headers = []mesh.ClaimHeader{{Header: "x-user", Claim: "sub"}, {Header: "x-groups", Claim: "groups"}, {Header: "x-level", Claim: "level"}, {Header: "x-admin", Claim: "admin"}}
	}))
	for _, tt := range []struct {
		name   string
		claims over
		want   string
	}{
		{"text", nil, "x-user: alice\r\n"},
		{"number and truth", over{"level": `7`, "admin": `false`}, "x-user: alice\r\nx-level: 7\r\nx-admin: false\r\n"},
		{"a list and an object", over{"groups": `["a"]`, "admin": `{"a":1}`}, "x-user: alice\r\n"},
		{"null", over{"groups": `null`}, "x-user: alice\r\n"},
		{"beyond ASCII", over{"sub": `"Zoë 100%"`}, "x-user: Zo%C3%AB 100%25\r\n"},
		{"blanks around", over{"sub": `" a "`}, "x-user: %20a%20\r\n"},
		{"too long", over{"groups": jsonText(strings.Repeat("g", mostField+1))}, "x-user: alice\r\n"},
	} {
		tok, f := r.check(bearer(good(nil, tt.claims)))
		if f != "" {
			t.Fatalf("%s: %s", tt.name, f)
		}
		if got := string(tok.Fields()); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
		if !tok.Ours() {
			t.Errorf("%s: the token itself is forwarded", tt.name)
		}
	}
	shown := bearer(good(nil, nil))
	if _, f := r.v.Check(t.Context(), shown); f != nil {
		t.Fatal(f)
	}
	if got := strings.Join(shown.Drop, " "); got != "x-user x-groups x-level x-admin dpop" {
		t.Errorf("drops %q", got)
	}
	r.noun.Issuers[0].Forward = true
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	if tok, _ := r.check(bearer(good(nil, nil))); tok.Ours() {
		t.Error("the token is not forwarded")
	}
}

// Rule 35: what the client is told says what to do, and nothing of what was
// wrong.
func TestJWTRule35Challenges(t *testing.T) {
	r := newTokenRig(t, func(n *mesh.Tokens) {
		withAPIKey(n)
		n.Issuers[0].Binding = mesh.BindEither
	})
	v := r.v
	const bearerLine, dpopLine, keyLine = `WWW-Authenticate: Bearer realm="r"`, `WWW-Authenticate: DPoP realm="r", algs="ES256 ES384 EdDSA RS256 PS256"`, "WWW-Authenticate: APIKey realm=\"r\"\r\n"
	if got := v.Missing("r"); got != bearerLine+"\r\n"+dpopLine+"\r\n"+keyLine {
		t.Errorf("missing: %q", got)
	}
	if got := v.Insufficient("r"); got != bearerLine+`, error="insufficient_scope"`+"\r\n"+dpopLine+`, error="insufficient_scope"`+"\r\n"+keyLine {
		t.Errorf("insufficient: %q", got)
	}
	same := map[string]bool{}
	for _, code := range []FaultCode{FaultForm, FaultIssuer, FaultKey, FaultSignature, FaultExpired, FaultClaims, FaultBinding, FaultRevoked} {
		f := fault(code, "secret detail")
		if f.Status() != 401 {
			t.Errorf("%s: status %d", code, f.Status())
		}
		same[v.Challenge(f, "r")] = true
	}
	if want := bearerLine + `, error="invalid_token"` + "\r\n" + dpopLine + `, error="invalid_token"` + "\r\n" + keyLine; len(same) != 1 || !same[want] {
		t.Errorf("invalid tokens are told apart: %v", same)
	}
	for code, want := range map[FaultCode]int{FaultRequest: 400, FaultRate: 429, FaultUnavailable: 503, FaultInternal: 503, FaultAPIKey: 401, FaultProof: 401, FaultReplay: 401, FaultNonce: 401} {
		f := &Fault{Code: code, Detail: "secret detail", nonce: "n"}
		got := v.Challenge(f, "r\r\nX: \"y")
		if f.Status() != want || strings.Contains(got, "secret") || strings.Contains(got, "\r\nX") || got == "" {
			t.Errorf("%s: %d, %q", code, f.Status(), got)
		}
		if (code == FaultNonce) != strings.Contains(got, "DPoP-Nonce: n\r\n") {
			t.Errorf("%s: %q", code, got)
		}
	}
}

// Credentials that are not for us pass.
func TestOtherCredentialsPass(t *testing.T) {
	r := newTokenRig(t, withAPIKey)
	for _, a := range []string{"Basic YWxpY2U6c2VjcmV0", "Negotiate YII", "Digest username=\"x\"", "bearers abc"} {
		if tok, f := r.check(&Credential{Authorization: []byte(a)}); tok != nil || f != "" && a != "Digest username=\"x\"" {
			t.Errorf("%s: %v, %q", a, tok, f)
		}
	}
	r.noun.Issuers = nil
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	if tok, f := r.check(bearer("opaque")); tok != nil || f != "" {
		t.Errorf("without an issuer: %v, %q", tok, f)
	}
}

// FuzzToken: no header makes the verifier panic, and what counts is a token
// that golang-jwt accepts by the same key.
func FuzzToken(f *testing.F) {
	r := newTokenRig(f, nil)
	f.Add([]byte("Bearer " + good(nil, nil)))
	f.Add([]byte("DPoP " + newProver().token(nil)))
	for _, make := range []func() []string{attackNone, attackJSON, attackRepeated, attackCritical} {
		for _, v := range make() {
			f.Add([]byte("Bearer " + v))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := *r
		r.t = t
		tok, fault := r.v.Check(t.Context(), &Credential{Authorization: b, Method: "GET", Path: "/"})
		switch {
		case fault != nil && (fault.Code == FaultInternal || tok != nil):
			t.Fatalf("%+v", fault)
		case tok == nil:
			return
		}
		_, err := jwt.Parse(string(b[len("Bearer "):]), func(jt *jwt.Token) (any, error) {
			kid, _ := jt.Header["kid"].(string)
			if kid == "" {
				return ourKeys()["ec"].Public(), nil
			}
			return ourKeys()[kid].Public(), nil
		}, jwt.WithoutClaimsValidation(), jwt.WithStrictDecoding())
		if err != nil {
			t.Errorf("accepted what golang-jwt refuses: %v", err)
		}
	})
}

// FuzzProof: no proof makes the verifier panic, and none that is not signed by
// the key counts.
func FuzzProof(f *testing.F) {
	r, p := newTokenRig(f, nil), newProver()
	tok := p.token(nil)
	f.Add(p.proof(tok, nil, nil))
	f.Add(p.proof(tok, over{"jwk": `{"kty":"oct"}`}, nil))
	f.Add([]byte("a.b.c"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &Credential{Authorization: []byte("DPoP " + tok), Proof: b, Method: "POST", Path: "/v1/pay", Host: "billing.mesh.internal"}
		got, fault := r.v.Check(t.Context(), c)
		if fault != nil && fault.Code == FaultInternal {
			t.Fatal(fault.Detail)
		}
		if got == nil {
			return
		}
		_, err := jwt.Parse(string(b), func(*jwt.Token) (any, error) { return p.key.Public(), nil }, jwt.WithoutClaimsValidation(), jwt.WithStrictDecoding())
		if err != nil {
			t.Errorf("accepted what golang-jwt refuses: %v", err)
		}
	})
}

func BenchmarkToken(b *testing.B) {
	r := newTokenRig(b, withAPIKey)
	hit := func(name string, c *Credential) {
		b.Run(name, func(b *testing.B) {
			if _, f := r.v.Check(b.Context(), c); f != nil {
				b.Fatal(f)
			}
			b.ReportAllocs()
			for b.Loop() {
				if tok, f := r.v.Check(b.Context(), c); tok == nil {
					b.Fatal(f)
				}
			}
		})
	}
	c := bearer(good(nil, nil))
	hit("hit", c)
	hit("hit-2KB", bearer(good(nil, over{"x": jsonText(strings.Repeat("a", 1200))})))
	hit("apikey", shows(testAPIKey))
	b.Run("hit-parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if tok, f := r.v.Check(b.Context(), c); tok == nil {
					b.Fatal(f)
				}
			}
		})
	})
	for _, a := range []struct{ alg, kid string }{{"ES256", "ec"}, {"RS256", "rsa"}, {"EdDSA", "ed"}} {
		c := by(a.alg, a.kid, nil)(nil)
		b.Run("verify-"+a.alg, func(b *testing.B) {
			st := r.v.state.Load()
			text := string(c.Authorization[len("Bearer "):])
			b.ReportAllocs()
			for b.Loop() {
				if _, f := r.v.verify(b.Context(), st, text, at); f != nil {
					b.Fatal(f)
				}
			}
		})
	}
	b.Run("dpop", func(b *testing.B) {
		p := newProver()
		tok := p.token(nil)
		b.ReportAllocs()
		for b.Loop() {
			b.StopTimer()
			c := p.shows(tok, nil, nil)
			c.Method, c.Path, c.Host = "POST", "/v1/pay", "billing.mesh.internal"
			b.StartTimer()
			if _, f := r.v.Check(b.Context(), c); f != nil && f.Code != FaultUnavailable {
				b.Fatal(f)
			}
		}
	})
}

func TestKnownTokensDoNotAllocate(t *testing.T) {
	r := newTokenRig(t, withAPIKey)
	for name, c := range map[string]*Credential{"a token": bearer(good(nil, nil)), "an API key": shows(testAPIKey)} {
		if _, f := r.check(c); f != "" {
			t.Fatal(f)
		}
		if n := testing.AllocsPerRun(1000, func() { r.v.Check(t.Context(), c) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
