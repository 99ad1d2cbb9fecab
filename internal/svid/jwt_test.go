package svid

import (
	"crypto"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/jose/josetest"
)

func b64(s string) string { return josetest.B64([]byte(s)) }

// signJWT signs whatever it is given.
func signJWT(t testing.TB, alg string, key crypto.Signer, header, claims string) string {
	t.Helper()
	return josetest.Sign(t, alg, key, header, claims)
}

func TestVerifyJWT(t *testing.T) {
	ca := newCA(t, td)
	keys := map[string]crypto.Signer{}
	for _, name := range []string{"ES256", "ES384", "ES512"} {
		keys[name] = josetest.NewKey(t, name)
	}
	r := josetest.NewKey(t, "RS256")
	st := &State{Bundle: ca.bundle(), JWTKeys: map[string]crypto.PublicKey{}}
	for _, name := range []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"} {
		keys[name] = r
	}
	for name, k := range keys {
		st.JWTKeys["k-"+name] = k.Public()
	}
	now := time.Unix(1_800_000_000, 0)
	claims := func(more string) string {
		return fmt.Sprintf(`{"sub":"spiffe://example.org/x","aud":["a"],"exp":%d%s}`, now.Add(time.Minute).Unix(), more)
	}
	header := func(alg string) string { return `{"alg":"` + alg + `","kid":"k-` + alg + `","typ":"JWT"}` }
	for alg, key := range keys {
		if got, _, err := st.VerifyJWT(signJWT(t, alg, key, header(alg), claims("")), "a", now); err != nil || got != id("/x") {
			t.Errorf("%s: %v, %v", alg, got, err)
		}
	}
	es := keys["ES256"]
	good := signJWT(t, "ES256", es, header("ES256"), claims(""))
	other := newKey(t)
	swap := func(i int, s string) string { p := strings.Split(good, "."); p[i] = s; return strings.Join(p, ".") }
	signed := func(h, c string) string { return signJWT(t, "ES256", es, h, c) }
	h := header("ES256")
	exp := func(v string) string { return `{"sub":"spiffe://example.org/x","aud":["a"],"exp":` + v + `}` }
	for _, c := range []struct {
		name, token, aud string
		must             int
		ok               bool
	}{
		{name: "right", token: good, aud: "a", ok: true},
		{name: "aud is a string", token: signed(h, strings.Replace(claims(""), `["a"]`, `"a"`, 1)), aud: "a", ok: true},
		{name: "typ JOSE", token: signed(strings.Replace(h, "JWT", "JOSE", 1), claims("")), aud: "a", ok: true},
		{name: "no typ", token: signed(`{"alg":"ES256","kid":"k-ES256"}`, claims("")), aud: "a", ok: true},
		{name: "expired within the leeway", token: signed(h, exp(fmt.Sprint(now.Unix()-29))), aud: "a", ok: true},
		{name: "more claims", token: signed(h, claims(`,"x":{"y":[1,true,null]}`)), aud: "a", ok: true},
		{name: "JSON serialisation", must: 40, token: `{"payload":"x"}`, aud: "a"},
		{name: "five parts", must: 40, token: good + ".x.y", aud: "a"},
		{name: "empty", must: 40, token: "", aud: "a"},
		{name: "line end in the signature", must: 40, token: good[:len(good)-4] + "\n" + good[len(good)-4:], aud: "a"},
		{name: "padding", must: 40, token: good + "=", aud: "a"},
		{name: "header foo", must: 41, token: signed(h[:len(h)-1]+`,"foo":"bar"}`, claims("")), aud: "a"},
		{name: "header jku", must: 41, token: signed(h[:len(h)-1]+`,"jku":"https://x"}`, claims("")), aud: "a"},
		{name: "header crit", must: 41, token: signed(h[:len(h)-1]+`,"crit":["b64"]}`, claims("")), aud: "a"},
		{name: "alg none", must: 43, token: b64(`{"alg":"none","kid":"k-ES256"}`) + "." + b64(claims("")) + ".", aud: "a"},
		{name: "alg HS256", must: 43, token: signed(strings.Replace(h, `"ES256"`, `"HS256"`, 1), claims("")), aud: "a"},
		{name: "alg EdDSA", must: 43, token: signed(strings.Replace(h, `"ES256"`, `"EdDSA"`, 1), claims("")), aud: "a"},
		{name: "alg in lower case", must: 43, token: signed(strings.Replace(h, `"ES256"`, `"es256"`, 1), claims("")), aud: "a"},
		{name: "alg of another key", must: 43, token: signed(strings.Replace(h, `"ES256"`, `"ES384"`, 1), claims("")), aud: "a"},
		{name: "alg RS with an EC key", must: 43, token: signed(strings.Replace(h, `"ES256"`, `"RS256"`, 1), claims("")), aud: "a"},
		{name: "duplicate alg", must: 43, token: signed(`{"alg":"none",`+h[1:], claims("")), aud: "a"},
		{name: "typ wit+jwt", must: 44, token: signed(strings.Replace(h, `"JWT"`, `"wit+jwt"`, 1), claims("")), aud: "a"},
		{name: "no kid", token: signed(`{"alg":"ES256"}`, claims("")), aud: "a"},
		{name: "numeric kid", token: signed(`{"alg":"ES256","kid":1}`, claims("")), aud: "a"},
		{name: "unknown kid", must: 54, token: signed(`{"alg":"ES256","kid":"k9"}`, claims("")), aud: "a"},
		{name: "signed by another", token: signJWT(t, "ES256", other, h, claims("")), aud: "a"},
		{name: "claims changed", token: swap(1, b64(claims(`,"admin":true`))), aud: "a"},
		{name: "signature cut", token: good[:len(good)-8], aud: "a"},
		{name: "no aud", must: 47, token: signed(h, strings.Replace(claims(""), `"aud":["a"],`, "", 1)), aud: "a"},
		{name: "no aud and none asked", must: 47, token: signed(h, strings.Replace(claims(""), `"aud":["a"],`, "", 1)), aud: ""},
		{name: "aud but none asked", must: 48, token: good, aud: ""},
		{name: "empty aud", must: 47, token: signed(h, strings.Replace(claims(""), `["a"]`, `[]`, 1)), aud: "a"},
		{name: "aud of mixed types", must: 46, token: signed(h, strings.Replace(claims(""), `["a"]`, `["a",1]`, 1)), aud: "a"},
		{name: "other audience", must: 48, token: good, aud: "b"},
		{name: "audience differs in case", must: 48, token: good, aud: "A"},
		{name: "no exp", must: 50, token: signed(h, `{"sub":"spiffe://example.org/x","aud":["a"]}`), aud: "a"},
		{name: "EXP instead of exp", must: 50, token: signed(h, strings.Replace(claims(""), "exp", "EXP", 1)), aud: "a"},
		{name: "exp past the leeway", must: 50, token: signed(h, exp(fmt.Sprint(now.Unix()-30))), aud: "a"},
		{name: "exp as text", must: 50, token: signed(h, exp(`"9999999999"`)), aud: "a"},
		{name: "exp overflows", must: 51, token: signed(h, exp("1e300")), aud: "a"},
		{name: "exp negative", must: 51, token: signed(h, exp("-1")), aud: "a"},
		{name: "exp null", must: 51, token: signed(h, exp("null")), aud: "a"},
		{name: "nbf in the future", must: 51, token: signed(h, claims(fmt.Sprintf(`,"nbf":%d`, now.Unix()+31))), aud: "a"},
		{name: "nbf overflows", must: 51, token: signed(h, claims(`,"nbf":1e300`)), aud: "a"},
		{name: "iat in the future", must: 51, token: signed(h, claims(fmt.Sprintf(`,"iat":%d`, now.Unix()+31))), aud: "a"},
		{name: "duplicate claim", must: 51, token: signed(h, claims(`,"sub":"spiffe://example.org/admin"`)), aud: "a"},
		{name: "duplicate claim below", must: 51, token: signed(h, claims(`,"x":{"a":1,"a":2}`)), aud: "a"},
		{name: "bytes after the claims", must: 51, token: signed(h, claims("")+"{}"), aud: "a"},
		{name: "claims nested too deep", must: 51, token: signed(h, claims(`,"x":`+strings.Repeat("[", 9)+strings.Repeat("]", 9))), aud: "a"},
		{name: "claims not UTF-8", must: 51, token: signed(h, claims(",\"x\":\"\xff\"")), aud: "a"},
		{name: "no sub", must: 45, token: signed(h, strings.Replace(claims(""), "sub", "sup", 1)), aud: "a"},
		{name: "sub is no SPIFFE ID", must: 45, token: signed(h, strings.Replace(claims(""), "spiffe:", "https:", 1)), aud: "a"},
		{name: "sub without path", must: 45, token: signed(h, strings.Replace(claims(""), "org/x", "org", 1)), aud: "a"},
		{name: "sub of another trust domain", must: 55, token: signed(h, strings.Replace(claims(""), "example.org", "example.net", 1)), aud: "a"},
		{name: "too long", token: good + strings.Repeat("A", 8<<10), aud: "a"},
	} {
		got, _, err := st.VerifyJWT(c.token, c.aud, now)
		if (err == nil) != c.ok {
			t.Errorf("%s (rule %d): got %v, %v", c.name, c.must, got, err)
		}
		if err != nil && (!got.IsZero() || len(c.token) > 20 && strings.Contains(err.Error(), c.token)) {
			t.Errorf("%s: the refusal says too much: %v, %v", c.name, got, err)
		}
	}
}

func FuzzVerifyJWT(f *testing.F) {
	k := newKey(f)
	st := &State{Bundle: newCA(f, td).bundle(), JWTKeys: map[string]crypto.PublicKey{"k": k.Public()}}
	f.Add(signJWT(f, "ES256", k, `{"alg":"ES256","kid":"k"}`, `{"sub":"spiffe://example.org/x","aud":"a","exp":9000000000}`))
	f.Add("..")
	f.Fuzz(func(t *testing.T, token string) {
		if got, _, err := st.VerifyJWT(token, "a", time.Unix(1_800_000_000, 0)); err == nil && got != id("/x") {
			t.Errorf("forged %v", got)
		}
	})
}

func TestVerifyJWTOfAnotherTrustDomain(t *testing.T) {
	ca, own, theirs := newCA(t, td), newKey(t), newKey(t)
	far := spiffeid.RequireTrustDomainFromString("example.net")
	st := &State{Bundle: ca.bundle(), JWTKeys: map[string]crypto.PublicKey{"k": own.Public()}, FederatedJWT: map[spiffeid.TrustDomain]map[string]crypto.PublicKey{far: {"k": theirs.Public()}}}
	now := time.Unix(1_800_000_000, 0)
	token := func(key crypto.Signer, sub string) string {
		return signJWT(t, "ES256", key, `{"alg":"ES256","kid":"k"}`, fmt.Sprintf(`{"sub":%q,"aud":"a","exp":%d}`, sub, now.Add(time.Minute).Unix()))
	}
	if got, _, err := st.VerifyJWT(token(theirs, "spiffe://example.net/x"), "a", now); err != nil || got.TrustDomain() != far {
		t.Errorf("federated: %s, %v", got, err)
	}
	for name, tok := range map[string]string{
		"55 their key for our subject": token(theirs, "spiffe://example.org/x"),
		"55 our key for their subject": token(own, "spiffe://example.net/x"),
		"55 a stranger":                token(theirs, "spiffe://example.com/x"),
	} {
		if got, _, err := st.VerifyJWT(tok, "a", now); err == nil {
			t.Errorf("%s: accepted as %s", name, got)
		}
	}
}
