package jose_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"sallyport/internal/jose"
	"sallyport/internal/jose/josetest"
)

var (
	now = time.Unix(1_800_000_000, 0)
	all = []string{
		jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512,
		jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
	}
)

func claims(more string) string {
	return fmt.Sprintf(`{"iss":"https://i","aud":"a","iat":%d,"exp":%d%s}`, now.Unix(), now.Add(time.Minute).Unix(), more)
}

func TestEachAlgorithmVerifiesItsOwnKeyOnly(t *testing.T) {
	keys := map[string]crypto.Signer{"RS256": josetest.NewKey(t, "RS256"), "EdDSA": josetest.NewKey(t, "EdDSA")}
	for _, a := range []string{"ES256", "ES384", "ES512"} {
		keys[a] = josetest.NewKey(t, a)
	}
	for _, a := range []string{"RS384", "RS512", "PS256", "PS384", "PS512"} {
		keys[a] = keys["RS256"]
	}
	p := jose.Profile{Algs: all}
	for _, a := range all {
		tok, err := p.Parse(josetest.Sign(t, a, keys[a], `{"alg":"`+a+`"}`, claims("")))
		if err != nil {
			t.Fatalf("%s: %v", a, err)
		}
		for other, k := range keys {
			kind := func(a string) string { return strings.NewReplacer("PS", "RSA", "RS", "RSA").Replace(a)[:3] }
			err := tok.Verify(jose.Key{Public: k.Public()})
			if fits := a == other || kind(a) == "RSA" && kind(other) == "RSA"; (err == nil) != fits {
				t.Errorf("%s by the key of %s: %v", a, other, err)
			}
			if err := tok.Verify(jose.Key{Public: k.Public(), Alg: other}); (err == nil) != (a == other) {
				t.Errorf("%s by the key that is for %s only: %v", a, other, err)
			}
		}
		if err := tok.Verify(jose.Key{}); err == nil {
			t.Errorf("%s by no key: accepted", a)
		}
		another := josetest.NewKey(t, a)
		if err := tok.Verify(jose.Key{Public: another.Public()}); err == nil {
			t.Errorf("%s by another key of its kind: accepted", a)
		}
	}
}

// TestSignaturesOfOtherForms holds signatures to the one form of RFC 7518.
func TestSignaturesOfOtherForms(t *testing.T) {
	es, rs := josetest.NewKey(t, "ES256").(*ecdsa.PrivateKey), josetest.NewKey(t, "RS256").(*rsa.PrivateKey)
	sum := func(text string) []byte { h := crypto.SHA256.New(); h.Write([]byte(text)); return h.Sum(nil) }
	for name, tt := range map[string]struct {
		alg string
		key crypto.PublicKey
		sig func(text string) ([]byte, error)
	}{
		"ECDSA in DER": {"ES256", es.Public(), func(s string) ([]byte, error) { return ecdsa.SignASN1(rand.Reader, es, sum(s)) }},
		"ECDSA with a zero more": {"ES256", es.Public(), func(s string) ([]byte, error) {
			return append(josetest.Signature(t, "ES256", es, []byte(s)), 0), nil
		}},
		"ECDSA of zeros": {"ES256", es.Public(), func(string) ([]byte, error) { return make([]byte, 64), nil }},
		"PSS with a salt of another length": {"PS256", rs.Public(), func(s string) ([]byte, error) {
			return rsa.SignPSS(rand.Reader, rs, crypto.SHA256, sum(s), &rsa.PSSOptions{SaltLength: 20})
		}},
		"PKCS#1 for PSS": {"PS256", rs.Public(), func(s string) ([]byte, error) {
			return rsa.SignPKCS1v15(rand.Reader, rs, crypto.SHA256, sum(s))
		}},
	} {
		text := josetest.B64([]byte(`{"alg":"`+tt.alg+`"}`)) + "." + josetest.B64([]byte(claims("")))
		sig, err := tt.sig(text)
		if err != nil {
			t.Fatal(err)
		}
		tok, err := jose.Profile{Algs: all}.Parse(text + "." + josetest.B64(sig))
		if err != nil {
			t.Fatal(err)
		}
		if err := tok.Verify(jose.Key{Public: tt.key}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestParse(t *testing.T) {
	k := josetest.NewKey(t, "ES256")
	sign := func(h, c string) string { return josetest.Sign(t, "ES256", k, h, c) }
	good := sign(`{"alg":"ES256","kid":"k"}`, claims(""))
	head := func(more string) string { return sign(`{"alg":"ES256","kid":"k"`+more+`}`, claims("")) }
	body := func(more string) string { return sign(`{"alg":"ES256","kid":"k"}`, claims(more)) }
	part := strings.Split(good, ".")
	strict := jose.Profile{Algs: []string{"ES256"}}
	for _, tt := range []struct {
		name  string
		p     jose.Profile
		token string
		want  string // a part of the error; empty if it is accepted
	}{
		{"good", strict, good, ""},
		{"typ JWT", strict, head(`,"typ":"JWT"`), ""},
		{"typ jwt", strict, head(`,"typ":"jwt"`), ""},
		{"typ application/JWT", strict, head(`,"typ":"application/JWT"`), ""},
		{"at+jwt where asked", jose.Profile{Algs: all, Types: []string{"at+jwt"}}, head(`,"typ":"application/AT+jwt"`), ""},
		{"no typ where at+jwt is asked", jose.Profile{Algs: all, Types: []string{"at+jwt"}}, good, "another kind"},
		{"typ logout+jwt", strict, head(`,"typ":"logout+jwt"`), "another kind"},
		{"typ application/", strict, head(`,"typ":"application/"`), "another kind"},
		{"typ empty", strict, head(`,"typ":""`), "typ is missing"},
		{"typ a number", strict, head(`,"typ":1`), "typ is missing"},
		{"no kid", strict, sign(`{"alg":"ES256"}`, claims("")), ""},
		{"no kid where asked", jose.Profile{Algs: all, NeedKeyID: true}, sign(`{"alg":"ES256"}`, claims("")), "kid is missing"},
		{"kid a number", strict, sign(`{"alg":"ES256","kid":7}`, claims("")), "kid is missing"},
		{"kid empty", strict, sign(`{"alg":"ES256","kid":""}`, claims("")), "kid is missing"},
		{"kid long", strict, sign(`{"alg":"ES256","kid":"`+strings.Repeat("k", 257)+`"}`, claims("")), "kid of 257"},
		{"kid with a line feed", strict, sign(`{"alg":"ES256","kid":"a\nb"}`, claims("")), "control"},
		{"alg beside the list", jose.Profile{Algs: []string{"EdDSA"}}, good, "none of EdDSA"},
		{"alg none in the list", jose.Profile{Algs: []string{"none"}}, sign(`{"alg":"none"}`, claims("")), "none of none"},
		{"alg HS256 in the list", jose.Profile{Algs: []string{"HS256"}}, sign(`{"alg":"HS256"}`, claims("")), "alg is none"},
		{"alg in lower case", strict, sign(`{"alg":"es256"}`, claims("")), "alg is none"},
		{"alg twice", strict, sign(`{"alg":"ES256","alg":"ES256"}`, claims("")), "duplicate"},
		{"alg in two cases", strict, sign(`{"alg":"ES256","ALG":"none"}`, claims("")), "beside"},
		{"no alg", strict, sign(`{}`, claims("")), "alg is missing"},
		{"empty Profile", jose.Profile{}, good, "alg is none"},
		{"crit", jose.Profile{Algs: all, Header: []string{"crit"}}, head(`,"crit":["exp"]`), "crit is not understood"},
		{"b64", jose.Profile{Algs: all, Header: []string{"b64"}}, head(`,"b64":false`), "b64 is not understood"},
		{"zip", strict, head(`,"zip":"DEF"`), "zip is not understood"},
		{"cty", strict, head(`,"cty":"JWT"`), "cty is not understood"},
		{"jku", strict, head(`,"jku":"https://x"`), "beside"},
		{"jku where it may stand", jose.Profile{Algs: all, Header: []string{"jku"}}, head(`,"jku":"https://x"`), ""},
		{"header long", strict, head(`,"x":"` + strings.Repeat("x", 1024) + `"`), "want at most 1024"},
		{"header a list", strict, sign(`["alg"]`, claims("")), "not a JSON object"},
		{"claims a text", strict, sign(`{"alg":"ES256"}`, `"x"`), "not a JSON object"},
		{"claims twice", strict, sign(`{"alg":"ES256"}`, claims("")+"{}"), "bytes after"},
		{"a claim twice", strict, body(`,"aud":"b"`), "duplicate"},
		{"a claim twice below", strict, body(`,"x":[{"y":1,"y":2}]`), "duplicate"},
		{"a claim twice, once escaped", strict, body(`,"\u0061ud":"b"`), "duplicate"},
		{"claims in two cases are two", strict, body(`,"AUD":"b"`), ""},
		{"64 members", strict, body(`,"x":[` + strings.Repeat("1,", 58) + `1]`), ""},
		{"65 members", strict, body(`,"x":[` + strings.Repeat("1,", 60) + `1]`), "too many"},
		{"depth 8", strict, body(`,"x":` + strings.Repeat("[", 7) + strings.Repeat("]", 7)), ""},
		{"depth 9", strict, body(`,"x":` + strings.Repeat("[", 8) + strings.Repeat("]", 8)), "deeper"},
		{"depth 9000", jose.Profile{Algs: all, MaxBytes: 1 << 20}, body(`,"x":` + strings.Repeat("[", 9000)), "deeper"},
		{"not UTF-8", strict, body(",\"x\":\"\xff\""), "UTF-8"},
		{"half of a pair", strict, body(`,"x":"\ud800"`), "half"},
		{"NUL", strict, body(`,"x":"\u0000"`), "control"},
		{"DEL in a name", strict, body(",\"x\x7f\":1"), "control"},
		{"a comma too many", strict, body(`,`), "malformed"},
		{"empty", strict, "", "1 parts"},
		{"two parts", strict, part[0] + "." + part[1], "2 parts"},
		{"five parts, a JWE", strict, good + ".x.y", "5 parts"},
		{"JSON serialisation", strict, `{"payload":"eyJ9","signature":"x"}`, "1 parts"},
		{"no signature", strict, part[0] + "." + part[1] + ".", "base64url"},
		{"padding", strict, good + "==", "base64url"},
		{"line feed in the signature", strict, good[:len(good)-4] + "\n" + good[len(good)-4:], "base64url"},
		{"space before", strict, " " + good, "base64url"},
		{"plus for minus", strict, part[0] + ".+." + part[2], "base64url"},
		{"bits after the last byte", strict, part[0] + "." + part[1] + "." + part[2][:len(part[2])-1] + "_", "base64url"},
		{"long", strict, good + strings.Repeat("A", 8<<10), "want at most 8192"},
		{"long where it may be", jose.Profile{Algs: all, MaxBytes: 16 << 10}, sign(`{"alg":"ES256"}`, claims(`,"x":"`+strings.Repeat("x", 8<<10)+`"`)), ""},
	} {
		tok, err := tt.p.Parse(tt.token)
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", tt.name, err)
		case tt.want == "" && tok.Verify(jose.Key{Public: k.Public()}) != nil:
			t.Errorf("%s: the signature is lost", tt.name)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s: got %v, want an error with %q", tt.name, err, tt.want)
		case err != nil && tok != nil:
			t.Errorf("%s: a token beside an error", tt.name)
		}
	}
}

func TestCheck(t *testing.T) {
	at := func(d time.Duration) string { return fmt.Sprint(now.Add(d).Unix()) }
	aud, min := `"aud":"a"`, time.Minute
	for _, tt := range []struct {
		name, claims string
		c            jose.Claims
		want         string
	}{
		{"exp alone", `{` + aud + `,"exp":` + at(min) + `}`, jose.Claims{}, ""},
		{"one of ours", `{"aud":["x","b"],"exp":` + at(min) + `}`, jose.Claims{Audiences: []string{"a", "b"}}, ""},
		{"within the skew", `{` + aud + `,"exp":` + at(-29*time.Second) + `}`, jose.Claims{}, ""},
		{"past the skew", `{` + aud + `,"exp":` + at(-30*time.Second) + `}`, jose.Claims{}, "expired"},
		{"a skew of an hour is a minute", `{` + aud + `,"exp":` + at(-time.Minute) + `}`, jose.Claims{Skew: time.Hour}, "expired"},
		{"no exp", `{` + aud + `}`, jose.Claims{}, "exp is missing"},
		{"exp a text", `{` + aud + `,"exp":"` + at(min) + `"}`, jose.Claims{}, "not a number"},
		{"exp 1e300", `{` + aud + `,"exp":1e300}`, jose.Claims{}, "exp is not a whole number"},
		{"exp 1e10", `{` + aud + `,"exp":1e10}`, jose.Claims{}, "exp is not a whole number"},
		{"exp with a fraction", `{` + aud + `,"exp":` + at(min) + `.5}`, jose.Claims{}, "exp is not a whole number"},
		{"exp 2^53", `{` + aud + `,"exp":9007199254740992}`, jose.Claims{}, "range"},
		{"exp 2^53-1", `{` + aud + `,"exp":9007199254740991}`, jose.Claims{}, ""},
		{"exp 2^64", `{` + aud + `,"exp":18446744073709551616}`, jose.Claims{}, "range"},
		{"exp zero", `{` + aud + `,"exp":0}`, jose.Claims{}, "range"},
		{"exp below zero", `{` + aud + `,"exp":-1}`, jose.Claims{}, "range"},
		{"EXP", `{` + aud + `,"EXP":` + at(min) + `}`, jose.Claims{}, "exp is missing"},
		{"nbf ahead", `{` + aud + `,"exp":` + at(min) + `,"nbf":` + at(31*time.Second) + `}`, jose.Claims{}, "future"},
		{"nbf within the skew", `{` + aud + `,"exp":` + at(min) + `,"nbf":` + at(30*time.Second) + `}`, jose.Claims{}, ""},
		{"nbf 1e300", `{` + aud + `,"exp":` + at(min) + `,"nbf":1e300}`, jose.Claims{}, "nbf"},
		{"nbf null", `{` + aud + `,"exp":` + at(min) + `,"nbf":null}`, jose.Claims{}, "nbf"},
		{"iat ahead", `{` + aud + `,"exp":` + at(min) + `,"iat":` + at(31*time.Second) + `}`, jose.Claims{}, "future"},
		{"no iat where asked", `{` + aud + `,"exp":` + at(min) + `}`, jose.Claims{NeedIssuedAt: true}, "iat is missing"},
		{"long life by iat", `{` + aud + `,"exp":` + at(min) + `,"iat":` + at(-time.Hour) + `}`, jose.Claims{MaxLife: time.Hour}, "lives longer"},
		{"long life without iat", `{` + aud + `,"exp":` + at(2*time.Hour) + `}`, jose.Claims{MaxLife: time.Hour}, "lives longer"},
		{"life at the bound", `{` + aud + `,"exp":` + at(min) + `,"iat":` + at(-59*min) + `}`, jose.Claims{MaxLife: time.Hour}, ""},
		{"no aud", `{"exp":` + at(min) + `}`, jose.Claims{}, "aud is missing"},
		{"aud empty", `{"aud":"","exp":` + at(min) + `}`, jose.Claims{}, "something else"},
		{"aud an empty list", `{"aud":[],"exp":` + at(min) + `}`, jose.Claims{}, "1 to 16"},
		{"aud null", `{"aud":null,"exp":` + at(min) + `}`, jose.Claims{}, "1 to 16"},
		{"aud of 17", `{"aud":["a"` + strings.Repeat(`,"b"`, 16) + `],"exp":` + at(min) + `}`, jose.Claims{}, "1 to 16"},
		{"aud of mixed kinds", `{"aud":["a",1],"exp":` + at(min) + `}`, jose.Claims{}, "something else"},
		{"aud nested", `{"aud":[["a"]],"exp":` + at(min) + `}`, jose.Claims{}, "something else"},
		{"aud in another case", `{"aud":"A","exp":` + at(min) + `}`, jose.Claims{}, "another audience"},
		{"no audience of ours", `{` + aud + `,"exp":` + at(min) + `}`, jose.Claims{Audiences: []string{}}, "another audience"},
		{"an empty audience of ours", `{` + aud + `,"exp":` + at(min) + `}`, jose.Claims{Audiences: []string{""}}, "another audience"},
		{"issuer", `{"iss":"https://i",` + aud + `,"exp":` + at(min) + `}`, jose.Claims{Issuer: "https://i"}, ""},
		{"issuer with a slash", `{"iss":"https://i/",` + aud + `,"exp":` + at(min) + `}`, jose.Claims{Issuer: "https://i"}, "another issuer"},
		{"issuer a list", `{"iss":["https://i"],` + aud + `,"exp":` + at(min) + `}`, jose.Claims{Issuer: "https://i"}, "another issuer"},
		{"no issuer", `{` + aud + `,"exp":` + at(min) + `}`, jose.Claims{Issuer: "https://i"}, "another issuer"},
	} {
		tok, err := jose.Profile{Algs: all}.Parse(josetest.B64([]byte(`{"alg":"ES256"}`)) + "." + josetest.B64([]byte(tt.claims)) + ".AAAA")
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if tt.c.Now = now; tt.c.Audiences == nil {
			tt.c.Audiences = []string{"a"}
		}
		until, err := tok.Check(tt.c)
		if tt.want == "" && (err != nil || !until.After(now)) || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: got %v, want an error with %q", tt.name, err, tt.want)
		}
		if errors.Is(err, jose.ErrExpired) != (tt.want == "expired") {
			t.Errorf("%s: ErrExpired does not tell what happened: %v", tt.name, err)
		}
	}
}

func TestKeySets(t *testing.T) {
	es, rs := josetest.NewKey(t, "ES256"), josetest.NewKey(t, "RS256")
	small, err := rsa.GenerateKey(rand.Reader, 1024) //nolint:gosec // to be refused
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	with := func(k crypto.Signer, more ...any) map[string]any {
		m := josetest.JWK(t, k.Public())
		for i := 0; i < len(more); i += 2 {
			m[more[i].(string)] = more[i+1]
		}
		return m
	}
	oct := map[string]any{"kty": "oct", "kid": "s", "k": "AAAA"}
	for _, tt := range []struct {
		name string
		keys []map[string]any
		ids  string // of those that stay, in their order; empty if the set is refused
	}{
		{"two", []map[string]any{with(es, "kid", "a"), with(rs, "kid", "b")}, "a b"},
		{"for encryption", []map[string]any{with(es, "kid", "a"), with(rs, "kid", "b", "use", "enc")}, "a"},
		{"key_ops with verify", []map[string]any{with(es, "kid", "a", "key_ops", []string{"verify"})}, "a"},
		{"key_ops without verify", []map[string]any{with(es, "kid", "a"), with(rs, "kid", "b", "key_ops", []string{"encrypt"})}, "a"},
		{"key_ops of another type", []map[string]any{with(es, "kid", "a"), with(rs, "kid", "b", "key_ops", "verify")}, "a"},
		{"an algorithm not ours", []map[string]any{with(es, "kid", "a"), with(rs, "kid", "b", "alg", "RSA-OAEP")}, "a"},
		{"a curve not ours", []map[string]any{with(es, "kid", "a"), with(p224, "kid", "b")}, "a"},
		{"one ID twice drops both", []map[string]any{with(es, "kid", "a"), with(rs, "kid", "a"), with(es, "kid", "b")}, "b"},
		{"a shared secret", []map[string]any{with(es, "kid", "a"), oct}, ""},
		{"a private key", []map[string]any{with(es, "kid", "a"), with(rs, "kid", "b", "d", "AQ")}, ""},
		{"alg of another kind of key", []map[string]any{with(es, "kid", "a", "alg", "RS256")}, ""},
		{"alg of another curve", []map[string]any{with(es, "kid", "a", "alg", "ES384")}, ""},
		{"kid a number", []map[string]any{with(es, "kid", 1)}, ""},
		{"kid long", []map[string]any{with(es, "kid", strings.Repeat("k", 257))}, ""},
		{"RSA of 1024 bits", []map[string]any{with(small, "kid", "a")}, ""},
		{"RSA with e = 1", []map[string]any{with(rs, "kid", "a", "e", "AQ")}, ""},
		{"RSA with an even e", []map[string]any{with(rs, "kid", "a", "e", "Bg")}, ""},
		{"RSA with a huge e", []map[string]any{with(rs, "kid", "a", "e", "AQAAAAAAAAAB")}, ""},
		{"EC beside its curve", []map[string]any{with(es, "kid", "a", "y", josetest.B64(make([]byte, 32)))}, ""},
		{"EC with a short x", []map[string]any{with(es, "kid", "a", "x", "AQ")}, ""},
		{"Ed25519 of 31 bytes", []map[string]any{{"kty": "OKP", "crv": "Ed25519", "kid": "a", "x": josetest.B64(make([]byte, 31))}}, ""},
		{"no key", nil, ""},
		{"too many", make([]map[string]any, 101), ""},
		{"an element that is none", []map[string]any{with(es, "kid", "a"), nil}, ""},
	} {
		keys, err := jose.ParseKeys(josetest.Set(t, tt.keys...))
		var ids []string
		for _, k := range keys {
			ids = append(ids, k.ID)
		}
		if got := strings.Join(ids, " "); got != tt.ids || (err == nil) != (tt.ids != "") {
			t.Errorf("%s: keys %q, %v; want %q", tt.name, got, err, tt.ids)
		}
	}
}

func TestATokenWithoutKeyIDHasTheOnlyKey(t *testing.T) {
	a, b, rs := josetest.NewKey(t, "ES256"), josetest.NewKey(t, "ES256"), josetest.NewKey(t, "RS256")
	for _, tt := range []struct {
		name, kid string
		keys      jose.Keys
		want      crypto.PublicKey
	}{
		{"one of its kind", "", jose.Keys{{ID: "1", Public: rs.Public()}, {Public: a.Public()}}, a.Public()},
		{"two of its kind", "", jose.Keys{{ID: "1", Public: a.Public()}, {ID: "2", Public: b.Public()}}, nil},
		{"two, one for another algorithm", "", jose.Keys{{Alg: "ES384", Public: a.Public()}, {ID: "2", Public: b.Public()}}, b.Public()},
		{"by ID", "2", jose.Keys{{ID: "1", Public: a.Public()}, {ID: "2", Public: b.Public()}}, b.Public()},
		{"by an unknown ID, although one fits", "3", jose.Keys{{ID: "1", Public: a.Public()}}, nil},
		{"by an ID where the key has none", "3", jose.Keys{{Public: a.Public()}}, nil},
		{"none", "", nil, nil},
	} {
		k, ok := tt.keys.Find(&jose.Token{Alg: "ES256", KeyID: tt.kid})
		if ok != (tt.want != nil) || k.Public != tt.want {
			t.Errorf("%s: got %+v, %v", tt.name, k, ok)
		}
	}
}

func FuzzParse(f *testing.F) {
	k := josetest.NewKey(f, "ES256")
	f.Add(josetest.Sign(f, "ES256", k, `{"alg":"ES256","kid":"k"}`, claims("")))
	f.Add("a.b.c")
	f.Add(josetest.Sign(f, "ES256", k, `{"alg":"ES256","typ":"at+jwt"}`, `{"exp":1e400,"aud":[[]]}`))
	p := jose.Profile{Algs: all}
	stranger := josetest.NewKey(f, "EdDSA")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := p.Parse(s)
		if err != nil {
			return
		}
		if tok.Alg == "" || tok.Claims == nil || tok.Header == nil {
			t.Errorf("a token without %+v was read", tok)
		}
		// What we accept, the library's decoder reads too.
		for _, part := range strings.Split(s, ".")[:2] {
			b, err := jose.Decode64(base64.RawURLEncoding, part)
			if err != nil || !json.Valid(b) {
				t.Errorf("%q is no JSON in base64url", part)
			}
		}
		if until, err := tok.Check(jose.Claims{Now: now, Issuer: "https://i", Audiences: []string{"a"}}); err == nil {
			if tok.Claims["iss"] != "https://i" || !until.After(now) {
				t.Error("a foreign or expired token passed")
			}
		}
		if tok.Verify(jose.Key{Public: stranger.Public()}) == nil {
			t.Error("forged")
		}
	})
}

func FuzzKeys(f *testing.F) {
	for _, a := range []string{"RS256", "ES256", "EdDSA"} {
		f.Add(josetest.Set(f, josetest.JWK(f, josetest.NewKey(f, a).Public())))
	}
	tokens := []*jose.Token{}
	for _, a := range all {
		tok, err := jose.Profile{Algs: all}.Parse(josetest.B64([]byte(`{"alg":"`+a+`"}`)) + ".e30.eA")
		if err != nil {
			f.Fatal(err)
		}
		tokens = append(tokens, tok)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, err := jose.ParseKeys(b)
		if (err == nil) == (len(keys) == 0) {
			t.Errorf("%d keys beside %v", len(keys), err)
		}
		for _, k := range keys {
			for _, tok := range tokens {
				if tok.Verify(k) == nil {
					t.Error("a signature of one byte is right")
				}
			}
		}
	})
}

func FuzzObject(f *testing.F) {
	f.Add([]byte(`{"a":{"b":[1,2.5e3,null,true,"x"]}}`))
	f.Add([]byte(`{"a":1,"a":2}`))
	f.Add([]byte(`{"a":[1 2]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := jose.ParseObject(b)
		if err != nil {
			return
		}
		if !json.Valid(b) {
			t.Errorf("%q was read", b)
		}
		// The library's decoder, which lets the last of two names win, sees
		// nothing else.
		var lax map[string]any
		d := json.NewDecoder(bytes.NewReader(b))
		d.UseNumber()
		if err := d.Decode(&lax); err != nil || fmt.Sprint(lax) != fmt.Sprint(map[string]any(o)) {
			t.Errorf("%q: %v, the library sees %v, %v", b, o, lax, err)
		}
	})
}
