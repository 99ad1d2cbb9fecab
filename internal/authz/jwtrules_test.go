package authz

import (
	"crypto/sha256"
	"flag"
	"fmt"
	"strings"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
)

// A ruleCase is one request, and whether it counts.
type ruleCase struct {
	rule int
	name string
	edit func(*mesh.Tokens)        // of the policy
	show func(*prover) *Credential // what the request shows
	want FaultCode                 // "" counts; "load" is a policy that is refused
}

func editIssuer(f func(*mesh.TokenIssuer)) func(*mesh.Tokens) {
	return func(t *mesh.Tokens) { f(&t.Issuers[0]) }
}

// with shows a good token with changes; the other shows are made of text.
func with(header, claims over) func(*prover) *Credential {
	return func(*prover) *Credential { return bearer(good(header, claims)) }
}

func by(alg, kid string, header over) func(*prover) *Credential {
	return func(*prover) *Credential {
		h := over{"alg": `"` + alg + `"`, "kid": `"` + kid + `"`}
		return bearer(signAs(alg, ourKeys()[kid], object(baseHeader(), h, header), object(baseClaims())))
	}
}

func raw(header, claims string) func(*prover) *Credential {
	return func(*prover) *Credential { return bearer(signAs("ES256", ourKeys()["ec"], header, claims)) }
}

func turned(f func(string) string) func(*prover) *Credential {
	return func(*prover) *Credential { return bearer(f(good(nil, nil))) }
}

func algs(list ...string) func(*mesh.Tokens) {
	return editIssuer(func(i *mesh.TokenIssuer) { i.Algorithms = list })
}

func keysAre(f func() string) func(*mesh.Tokens) {
	return editIssuer(func(i *mesh.TokenIssuer) { i.Keys.Inline = f() })
}

var access = editIssuer(func(i *mesh.TokenIssuer) { i.Profile = mesh.ProfileAccess })

func accessToken(header, claims over) func(*prover) *Credential {
	h := over{"typ": `"at+jwt"`}
	c := over{"client_id": `"cli"`}
	for k, v := range header {
		h[k] = v
	}
	for k, v := range claims {
		c[k] = v
	}
	return with(h, c)
}

func svidIssuer(t *mesh.Tokens) {
	t.Issuers = append(t.Issuers, mesh.TokenIssuer{TrustDomain: partner, Profile: mesh.ProfileSVID, Audiences: []string{ciAudience},
		Algorithms: []string{"ES256"}, Leeway: 30 * time.Second, MaxLifetime: time.Hour, MaxBytes: 8192, MaxClaims: 64, Binding: mesh.BindNone})
}

func svid(header, claims over) func(*prover) *Credential {
	return func(*prover) *Credential {
		h := object(over{"alg": `"ES256"`, "kid": `"svid"`}, header)
		c := object(over{"aud": `["billing"]`, "sub": `"spiffe://partner.example/ns/a/sa/b"`, "exp": in(5 * time.Minute), "iat": in(0)}, claims)
		return bearer(signAs("ES256", ourKeys()["ec2"], h, c))
	}
}

func thumbOf(s string) [32]byte { return sha256.Sum256([]byte(s)) }

func boundTo(cert string) over {
	x := thumbOf(cert)
	return over{"cnf": `{"x5t#S256":"` + e64(x[:]) + `"}`}
}

// dpop shows a token that is bound to the prover's key, and a proof of it.
func dpop(header, claims over) func(*prover) *Credential {
	return func(p *prover) *Credential { return p.shows(p.token(nil), header, claims) }
}

// token is bound to the prover's key.
func (p *prover) token(claims over) string {
	c := over{"cnf": `{"jkt":"` + p.thumb() + `"}`}
	for k, v := range claims {
		c[k] = v
	}
	return good(nil, c)
}

func deepClaims(n int) over {
	return over{"x": strings.Repeat(`{"a":`, n) + "1" + strings.Repeat("}", n)}
}

func manyClaims(n int) over {
	o := over{}
	for i := range n {
		o[fmt.Sprintf("c%02d", i)] = "1"
	}
	return o
}

func jsonList(n int, v string) string {
	return "[" + strings.TrimSuffix(strings.Repeat(v+",", n), ",") + "]"
}

// formRules are the rules about the form of a token and about keys. Those
// about fetching keys, 10 to 13, are tested in internal/keyset, those about
// requests in internal/proxy.
var formRules = []ruleCase{
	{1, "a token of 8 KiB", nil, with(nil, over{"x": jsonText(strings.Repeat("a", 5500))}), ""},
	{1, "a longer one", nil, with(nil, over{"x": jsonText(strings.Repeat("a", 6500))}), FaultForm},
	{1, "the issuer's limit", editIssuer(func(i *mesh.TokenIssuer) { i.MaxBytes = 256 }), with(nil, nil), FaultForm},
	{1, "a header above 1 KiB", nil, with(over{"x5c": jsonList(1, `"`+strings.Repeat("A", 1100)+`"`)}, nil), FaultForm},
	{1, "7 levels", nil, with(nil, deepClaims(7)), ""},
	{1, "9 levels", nil, with(nil, deepClaims(9)), FaultForm},
	{1, "9000 levels", nil, turned(func(string) string {
		return signAs("ES256", ourKeys()["ec"], object(baseHeader()), strings.Repeat("[", 3000))
	}), FaultForm},
	{1, "50 members", nil, with(nil, manyClaims(50)), ""},
	{1, "70 members", nil, with(nil, manyClaims(70)), FaultForm},
	{1, "more claims than the issuer may write", editIssuer(func(i *mesh.TokenIssuer) { i.MaxClaims = 8 }), with(nil, manyClaims(9)), FaultForm},
	{1, "text beyond ASCII", nil, with(nil, over{"name": `"Zoë"`}), ""},
	{1, "broken UTF-8", nil, with(nil, over{"name": "\"\xff\xfe\""}), FaultForm},
	{1, "half a character, escaped", nil, with(nil, over{"name": `"\ud800"`}), FaultForm},
	{1, "a control character", nil, with(nil, over{"sub": `"al\u0000ice"`}), FaultForm},

	{2, "two dots", nil, with(nil, nil), ""},
	{2, "one dot", nil, turned(func(s string) string { return s[:strings.LastIndex(s, ".")] }), FaultForm},
	{2, "no signature", nil, turned(func(s string) string { return s[:strings.LastIndex(s, ".")+1] }), FaultForm},
	{2, "padding", nil, turned(func(s string) string { return s + "=" }), FaultForm},
	{2, "a line feed in the signature", nil, turned(func(s string) string { return s[:len(s)-5] + "\n" + s[len(s)-5:] }), FaultForm},
	{2, "a carriage return in the header", nil, turned(func(s string) string { return s[:3] + "\r" + s[3:] }), FaultForm},
	{2, "base64 of the other alphabet", nil, turned(func(s string) string { return strings.ReplaceAll(s, "_", "/") + "+" }), FaultForm},
	{2, "bits behind the last byte", nil, turned(func(s string) string {
		const abc = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
		return s[:len(s)-1] + string(abc[strings.IndexByte(abc, s[len(s)-1])|1])
	}), FaultForm},

	{3, "a signed token", nil, with(nil, nil), ""},
	{3, "five segments", nil, turned(func(s string) string { return s + ".AAAA.AAAA" }), FaultForm},
	{3, "JSON serialisation, flat", nil, turned(func(s string) string {
		p := strings.Split(s, ".")
		return fmt.Sprintf(`{"protected":%q,"payload":%q,"signature":%q}`, p[0], p[1], p[2])
	}), FaultRequest}, // it holds a comma, which no token does
	{3, "nested", nil, with(over{"cty": `"JWT"`}, nil), FaultForm},
	{3, "encrypted", nil, with(over{"enc": `"A128GCM"`}, nil), FaultForm},

	{4, "known names", nil, with(over{"x5t": `"abc"`, "jku": `"https://evil.example"`}, nil), ""},
	{4, "an unknown name", nil, with(over{"foo": `1`}, nil), FaultForm},
	{4, "alg twice", nil, raw(`{"alg":"none","alg":"ES256","kid":"ec"}`, object(baseClaims())), FaultForm},
	{4, "ALG", nil, raw(`{"ALG":"ES256","kid":"ec"}`, object(baseClaims())), FaultForm},
	{4, "a list", nil, raw(`["ES256"]`, object(baseClaims())), FaultForm},
	{4, "jku, refused by the issuer", editIssuer(func(i *mesh.TokenIssuer) { i.RefuseKeyHeaders = true }), with(over{"jku": `"https://evil.example"`}, nil), FaultForm},
	{4, "jwk does not choose the key", nil, func(*prover) *Credential {
		h := object(baseHeader(), over{"jwk": jwkOf("ec", ourKeys()["ec2"].Public(), "")})
		return bearer(signAs("ES256", ourKeys()["ec2"], h, object(baseClaims())))
	}, FaultSignature},
	{4, "an SVID has no further names", svidIssuer, svid(over{"jku": `"https://partner.example"`}, nil), FaultForm},

	{5, "nothing critical", nil, with(nil, nil), ""},
	{5, "crit", nil, with(over{"crit": `["exp"]`, "exp": `1`}, nil), FaultForm},
	{5, "empty crit", nil, with(over{"crit": `[]`}, nil), FaultForm},
	{5, "b64", nil, with(over{"b64": `false`}, nil), FaultForm},
	{5, "zip", nil, with(over{"zip": `"DEF"`}, nil), FaultForm},

	{6, "each default", nil, by("EdDSA", "ed", nil), ""},
	{6, "PS256", nil, by("PS256", "rsa", nil), ""},
	{6, "RS256", nil, by("RS256", "rsa", nil), ""},
	{6, "ES384", nil, by("ES384", "p384", nil), ""},
	{6, "ES512 is no default", nil, by("ES512", "p521", nil), FaultForm},
	{6, "ES512 when the issuer has it", algs("ES512"), by("ES512", "p521", nil), ""},
	{6, "not of this issuer", algs("RS256"), with(nil, nil), FaultForm},
	{6, "none", nil, with(over{"alg": `"none"`}, nil), FaultForm},
	{6, "HS256", nil, with(over{"alg": `"HS256"`}, nil), FaultForm},
	{6, "none cannot be allowed", algs("none"), with(over{"alg": `"none"`}, nil), FaultForm},

	{7, "alg and key agree", keysAre(func() string {
		return jwks(jwkOf("ec", ourKeys()["ec"].Public(), `,"alg":"ES256","use":"sig","key_ops":["verify"]`))
	}), with(nil, nil), ""},
	{7, "a key for another alg", keysAre(func() string { return jwks(jwkOf("rsa", ourKeys()["rsa"].Public(), `,"alg":"PS256"`)) }), by("RS256", "rsa", nil), FaultSignature},
	{7, "an RSA key under ES256", nil, with(over{"kid": `"rsa"`}, nil), FaultSignature},
	{7, "a P-384 key under ES256", nil, with(over{"kid": `"p384"`}, nil), FaultSignature},
	{7, "a key for encryption", keysAre(func() string {
		return jwks(jwkOf("ec", ourKeys()["ec"].Public(), `,"use":"enc"`), jwkOf("ec2", ourKeys()["ec2"].Public(), ""))
	}), with(nil, nil), FaultKey},
	{7, "a key that only signs", keysAre(func() string {
		return jwks(jwkOf("ec", ourKeys()["ec"].Public(), `,"key_ops":["sign"]`), jwkOf("ec2", ourKeys()["ec2"].Public(), ""))
	}), with(nil, nil), FaultKey},
	{7, "a secret in the set", keysAre(func() string {
		return jwks(jwkOf("ec", ourKeys()["ec"].Public(), ""), `{"kty":"oct","kid":"h","k":"AAAA"}`)
	}), with(nil, nil), "load"},
	{7, "a private key in the set", keysAre(func() string { return jwks(jwkOf("ec", ourKeys()["ec"].Public(), `,"d":"AAAA"`)) }), with(nil, nil), "load"},

	{8, "RSA of 2048 bits", nil, by("RS256", "rsa", nil), ""},
	{8, "RSA of 1024 bits", keysAre(func() string { return jwks(jwkOf("weak", ourKeys()["weak"].Public(), "")) }), by("RS256", "weak", nil), "load"},
	{8, "RSA with an even exponent", keysAre(func() string {
		return jwks(strings.Replace(jwkOf("rsa", ourKeys()["rsa"].Public(), ""), `"e":"AQAB"`, `"e":"AQAA"`, 1))
	}), by("RS256", "rsa", nil), "load"},
	{8, "a point beside the curve", keysAre(func() string {
		return jwks(`{"kty":"EC","crv":"P-256","kid":"ec","x":"` + e64(make([]byte, 32)) + `","y":"` + e64(make([]byte, 32)) + `"}`)
	}), with(nil, nil), "load"},
	{8, "RSA of a chip with a known flaw", keysAre(func() string { return jwks(jwkOf("roca", &rocaKey().PublicKey, "")) }), with(nil, nil), "load"},

	{9, "kid of the key", nil, with(nil, nil), ""},
	{9, "another kid", nil, with(over{"kid": `"EC"`}, nil), FaultKey},
	{9, "a path", nil, with(over{"kid": `"../../etc/passwd"`}, nil), FaultKey},
	{9, "a number", nil, with(over{"kid": `1`}, nil), FaultForm},
	{9, "too long", nil, with(over{"kid": jsonText(strings.Repeat("k", 257))}, nil), FaultForm},
	{9, "none, and one key of that alg", nil, with(over{"kid": ""}, nil), ""},
	{9, "none, and two", keysAre(func() string {
		return jwks(jwkOf("ec", ourKeys()["ec"].Public(), ""), jwkOf("ec2", ourKeys()["ec2"].Public(), ""))
	}), with(over{"kid": ""}, nil), FaultKey},
	{9, "two keys of one kid", keysAre(func() string {
		return jwks(jwkOf("ec", ourKeys()["ec"].Public(), ""), jwkOf("ec", ourKeys()["ec2"].Public(), ""), jwkOf("ed", ourKeys()["ed"].Public(), ""))
	}), with(nil, nil), FaultKey},
	{9, "an SVID without", svidIssuer, svid(over{"kid": ""}, nil), FaultForm},

	{14, "PSS with a salt like the hash", nil, by("PS256", "rsa", nil), ""},
	{14, "PSS with another salt", nil, func(*prover) *Credential {
		return bearer(signPSS(object(baseHeader(), over{"alg": `"PS256"`, "kid": `"rsa"`}), object(baseClaims()), 20))
	}, FaultSignature},
	{14, "an ECDSA signature in DER", nil, func(*prover) *Credential { return bearer(signDER(object(baseHeader()), object(baseClaims()))) }, FaultSignature},
	{14, "one byte more", nil, turned(func(s string) string {
		i := strings.LastIndex(s, ".") + 1
		return s[:i] + e64(append([]byte{0}, decoded(s[i:])...))
	}), FaultSignature},
	{14, "signed by PKCS 1, shown as PSS", nil, func(*prover) *Credential {
		return bearer(signAs("RS256", ourKeys()["rsa"], object(baseHeader(), over{"alg": `"PS256"`, "kid": `"rsa"`}), object(baseClaims())))
	}, FaultSignature},

	{15, "one object", nil, with(nil, nil), ""},
	{15, "sub twice", nil, raw(object(baseHeader()), strings.TrimSuffix(object(baseClaims()), "}")+`,"sub":"admin"}`), FaultForm},
	{15, "sub twice, once escaped", nil, raw(object(baseHeader()), strings.TrimSuffix(object(baseClaims()), "}")+`,"su\u0062":"admin"}`), FaultForm},
	{15, "bytes behind", nil, raw(object(baseHeader()), object(baseClaims())+" x"), FaultForm},
	{15, "EXP is not exp", nil, with(nil, over{"exp": "", "EXP": in(time.Minute)}), FaultClaims},
	{15, "a list", nil, raw(object(baseHeader()), `["iss"]`), FaultForm},
}

// claimRules are about what the claims say.
var claimRules = []ruleCase{
	{16, "the issuer", nil, with(nil, nil), ""},
	{16, "with a slash", nil, with(nil, over{"iss": `"https://ci.example/"`}), FaultIssuer},
	{16, "in capitals", nil, with(nil, over{"iss": `"https://CI.example"`}), FaultIssuer},
	{16, "a list", nil, with(nil, over{"iss": `["https://ci.example"]`}), FaultIssuer},
	{16, "none", nil, with(nil, over{"iss": ""}), FaultIssuer},
	{16, "an API key", nil, with(nil, over{"iss": `"apikey"`}), FaultIssuer},

	{17, "one of several", nil, with(nil, over{"aud": `["other","billing"]`}), ""},
	{17, "another", nil, with(nil, over{"aud": `"billing2"`}), FaultClaims},
	{17, "none", nil, with(nil, over{"aud": ""}), FaultClaims},
	{17, "an empty list", nil, with(nil, over{"aud": `[]`}), FaultClaims},
	{17, "texts and numbers", nil, with(nil, over{"aud": `["billing",1]`}), FaultClaims},
	{17, "seventeen", nil, with(nil, over{"aud": jsonList(17, `"billing"`)}), FaultClaims},
	{17, "an issuer without audience", editIssuer(func(i *mesh.TokenIssuer) { i.Audiences = nil }), with(nil, nil), "load"},

	{18, "an SVID for two", svidIssuer, svid(nil, over{"aud": `["billing","other"]`}), ""},
	{18, "an SVID for two, where one is demanded", func(t *mesh.Tokens) { svidIssuer(t); t.Issuers[1].SingleAudience = true }, svid(nil, over{"aud": `["billing","other"]`}), FaultClaims},

	{19, "exp", nil, with(nil, over{"exp": in(time.Second)}), ""},
	{19, "exp within the skew", nil, with(nil, over{"exp": in(-29 * time.Second)}), ""},
	{19, "exp past the skew", nil, with(nil, over{"exp": in(-30 * time.Second)}), FaultExpired},
	{19, "no exp", nil, with(nil, over{"exp": ""}), FaultClaims},
	{19, "exp as text", nil, with(nil, over{"exp": `"` + in(time.Minute) + `"`}), FaultClaims},
	{19, "exp 0", nil, with(nil, over{"exp": `0`}), FaultClaims},
	{19, "exp 1e18", nil, with(nil, over{"exp": `1e18`}), FaultClaims},
	{19, "exp 2^53", nil, with(nil, over{"exp": `9007199254740992`}), FaultClaims},

	{20, "nbf within the skew", nil, with(nil, over{"nbf": in(29 * time.Second)}), ""},
	{20, "nbf ahead", nil, with(nil, over{"nbf": in(31 * time.Second)}), FaultClaims},
	{20, "nbf 1e300", nil, with(nil, over{"nbf": `1e300`}), FaultClaims},
	{20, "iat ahead", nil, with(nil, over{"iat": in(31 * time.Second)}), FaultClaims},
	{20, "iat of the wrong type", nil, with(nil, over{"iat": `true`}), FaultClaims},

	{21, "no skew", editIssuer(func(i *mesh.TokenIssuer) { i.Leeway = 0 }), with(nil, over{"exp": in(time.Second)}), ""},
	{21, "no skew, expired", editIssuer(func(i *mesh.TokenIssuer) { i.Leeway = 0 }), with(nil, over{"exp": in(-time.Second)}), FaultExpired},
	{21, "a minute is the most", editIssuer(func(i *mesh.TokenIssuer) { i.Leeway = time.Hour }), with(nil, over{"exp": in(-61 * time.Second)}), FaultExpired},

	{22, "a day", nil, with(nil, over{"exp": in(23 * time.Hour)}), ""},
	{22, "longer", nil, with(nil, over{"exp": in(25 * time.Hour)}), FaultClaims},
	{22, "in a hundred years, without iat", nil, with(nil, over{"iat": "", "exp": in(100 * 8766 * time.Hour)}), FaultClaims},
	{22, "an SVID of two hours", svidIssuer, svid(nil, over{"exp": in(2 * time.Hour)}), FaultClaims},
	{22, "older than it may be", editIssuer(func(i *mesh.TokenIssuer) { i.MaxAge = time.Minute }), with(nil, over{"iat": in(-2 * time.Minute)}), FaultExpired},
	{22, "of unknown age", editIssuer(func(i *mesh.TokenIssuer) { i.MaxAge = time.Minute }), with(nil, over{"iat": ""}), FaultClaims},

	{23, "sub", nil, with(nil, nil), ""},
	{23, "no sub", nil, with(nil, over{"sub": ""}), FaultClaims},
	{23, "sub as number", nil, with(nil, over{"sub": `7`}), FaultClaims},
	{23, "empty sub", nil, with(nil, over{"sub": `""`}), FaultClaims},
	{23, "an SVID", svidIssuer, svid(nil, nil), ""},
	{23, "an SVID of another domain", svidIssuer, svid(nil, over{"sub": `"spiffe://other.example/a"`}), FaultIssuer},
	{23, "an SVID of the domain itself", svidIssuer, svid(nil, over{"sub": `"spiffe://partner.example"`}), FaultClaims},
	{23, "an SVID by another key", svidIssuer, func(*prover) *Credential {
		return bearer(signAs("ES256", ourKeys()["ec"], `{"alg":"ES256","kid":"svid"}`, object(baseClaims(), over{"iss": "", "sub": `"spiffe://partner.example/a"`})))
	}, FaultSignature},
	{23, "an SVID by a kid of nobody", svidIssuer, svid(over{"kid": `"other"`}, nil), FaultKey},
	{23, "the claim of an issuer goes before the subject", svidIssuer, svid(nil, over{"iss": `"` + ciIssuer + `"`}), FaultKey},

	{24, "an access token", access, accessToken(nil, nil), ""},
	{24, "typ JWT where at+jwt is demanded", access, accessToken(over{"typ": `"JWT"`}, nil), FaultForm},
	{24, "no typ where at+jwt is demanded", access, accessToken(over{"typ": ""}, nil), FaultForm},
	{24, "no client_id", access, accessToken(nil, over{"client_id": ""}), FaultClaims},
	{24, "no jti", access, accessToken(nil, over{"jti": ""}), FaultClaims},
	{24, "no iat", access, accessToken(nil, over{"iat": ""}), FaultClaims},
	{24, "no typ", nil, with(over{"typ": ""}, nil), ""},
	{24, "a logout token", nil, with(over{"typ": `"logout+jwt"`}, nil), FaultForm},
	{24, "an access token where JWT is demanded", nil, with(over{"typ": `"at+jwt"`}, nil), FaultForm},
	{24, "an SVID of type JOSE", svidIssuer, svid(over{"typ": `"JOSE"`}, nil), ""},
	{24, "JOSE is no JWT", nil, with(over{"typ": `"JOSE"`}, nil), FaultForm},

	{25, "application/at+jwt", access, accessToken(over{"typ": `"application/at+jwt"`}, nil), ""},
	{25, "AT+JWT", access, accessToken(over{"typ": `"AT+JWT"`}, nil), ""},
	{25, "text/at+jwt", access, accessToken(over{"typ": `"text/at+jwt"`}, nil), FaultForm},

	{26, "scope as text, scp as list", nil, with(nil, over{"scope": `"a b"`, "scp": `["c"]`}), ""},
	{26, "scope as number", nil, with(nil, over{"scope": `1`}), FaultClaims},
	{26, "scope as list", nil, with(nil, over{"scope": `["a"]`}), FaultClaims},
	{26, "scp with a number", nil, with(nil, over{"scp": `[1]`}), FaultClaims},
}

// boundRules are about proofs, places and what is kept.
var boundRules = []ruleCase{
	{27, "the certificate of the connection", nil, func(*prover) *Credential {
		c := bearer(good(nil, boundTo("me")))
		c.Thumbprint = thumbOf("me")
		return c
	}, ""},
	{27, "another certificate", nil, func(*prover) *Credential {
		c := bearer(good(nil, boundTo("me")))
		c.Thumbprint = thumbOf("you")
		return c
	}, FaultBinding},
	{27, "no hash", nil, with(nil, over{"cnf": `{"x5t#S256":"AAAA"}`}), FaultBinding},

	{28, "a proof", nil, dpop(nil, nil), ""},
	{28, "https in front of us", nil, dpop(nil, over{"htu": `"https://billing.mesh.internal/v1/pay?x=1#y"`}), ""},
	{28, "a name of ours", func(t *mesh.Tokens) { t.DPoP.Origins = []string{"https://api.example"} }, dpop(nil, over{"htu": `"HTTPS://API.example:443/v1/%70ay"`}), ""},
	{28, "typ", nil, dpop(over{"typ": `"JWT"`}, nil), FaultProof},
	{28, "alg", nil, dpop(over{"alg": `"none"`}, nil), FaultProof},
	{28, "no key", nil, dpop(over{"jwk": ""}, nil), FaultProof},
	{28, "a secret key", nil, func(p *prover) *Credential {
		return p.shows(p.token(nil), over{"jwk": jwkOf("", p.key.Public(), `,"d":"AAAA"`)}, nil)
	}, FaultProof},
	{28, "another key", nil, func(p *prover) *Credential {
		tok := p.token(nil)
		other := &prover{key: ourKeys()["ec"], alg: "ES256"}
		return other.shows(tok, nil, nil)
	}, FaultBinding},
	{28, "signed by another", nil, func(p *prover) *Credential {
		c := p.shows(p.token(nil), nil, nil)
		c.Proof[len(c.Proof)-3] ^= 1
		return c
	}, FaultProof},
	{28, "method", nil, dpop(nil, over{"htm": `"GET"`}), FaultProof},
	{28, "method in small letters", nil, dpop(nil, over{"htm": `"post"`}), FaultProof},
	{28, "place", nil, dpop(nil, over{"htu": `"http://billing.mesh.internal/v1/other"`}), FaultProof},
	{28, "another service", nil, dpop(nil, over{"htu": `"http://inventory.mesh.internal/v1/pay"`}), FaultProof},
	{28, "a name that nobody gave us", nil, dpop(nil, over{"htu": `"https://api.example/v1/pay"`}), FaultProof},
	{28, "no place", nil, dpop(nil, over{"htu": `"/v1/pay"`}), FaultProof},
	{28, "half a minute ago", nil, dpop(nil, over{"iat": in(-30 * time.Second)}), ""},
	{28, "old", nil, dpop(nil, over{"iat": in(-61 * time.Second)}), FaultProof},
	{28, "ahead", nil, dpop(nil, over{"iat": in(61 * time.Second)}), FaultProof},
	{28, "no iat", nil, dpop(nil, over{"iat": ""}), FaultProof},
	{28, "another token", nil, dpop(nil, over{"ath": `"AAAA"`}), FaultProof},
	{28, "no ath", nil, dpop(nil, over{"ath": ""}), FaultProof},
	{28, "no jti", nil, dpop(nil, over{"jti": ""}), FaultProof},
	{28, "no nonce where one is demanded", func(t *mesh.Tokens) { t.DPoP.Nonce = true }, dpop(nil, nil), FaultNonce},
	{28, "a nonce of somebody else", func(t *mesh.Tokens) { t.DPoP.Nonce = true }, dpop(nil, over{"nonce": `"abc"`}), FaultNonce},

	{29, "a proof for a bound token", nil, dpop(nil, nil), ""},
	{29, "cnf of an unknown kind", nil, with(nil, over{"cnf": `{"kid":"1"}`}), FaultBinding},
	{29, "cnf with a key", nil, with(nil, over{"cnf": `{"jwk":{"kty":"EC"}}`}), FaultBinding},
	{29, "empty cnf", nil, with(nil, over{"cnf": `{}`}), FaultBinding},
	{29, "cnf as text", nil, with(nil, over{"cnf": `"x"`}), FaultBinding},
	{29, "a known and an unknown kind", nil, with(nil, over{"cnf": `{"jkt":"` + newProver().thumb() + `","x":"` + newProver().thumb() + `"}`}), FaultBinding},
	{29, "a bound token as Bearer", nil, func(p *prover) *Credential { return bearer(p.token(nil)) }, FaultBinding},
	{29, "a bound token as Bearer, with a proof", nil, func(p *prover) *Credential {
		c := p.shows(p.token(nil), nil, nil)
		c.Authorization = []byte("Bearer " + string(c.Authorization[len("DPoP "):]))
		return c
	}, FaultBinding},
	{29, "an unbound token as DPoP", nil, func(p *prover) *Credential { return p.shows(good(nil, nil), nil, nil) }, FaultBinding},

	{30, "a bound one where it is demanded", editIssuer(func(i *mesh.TokenIssuer) { i.Binding = mesh.BindEither }), dpop(nil, nil), ""},
	{30, "an unbound one where either is", editIssuer(func(i *mesh.TokenIssuer) { i.Binding = mesh.BindEither }), with(nil, nil), FaultBinding},
	{30, "DPoP where a certificate is", editIssuer(func(i *mesh.TokenIssuer) { i.Binding = mesh.BindCert }), dpop(nil, nil), FaultBinding},
	{30, "a certificate where DPoP is", editIssuer(func(i *mesh.TokenIssuer) { i.Binding = mesh.BindDPoP }), func(*prover) *Credential {
		c := bearer(good(nil, boundTo("me")))
		c.Thumbprint = thumbOf("me")
		return c
	}, FaultBinding},

	{31, "one credential", nil, with(nil, nil), ""},
	{31, "two", nil, func(*prover) *Credential { c := bearer(good(nil, nil)); c.Doubled = true; return c }, FaultRequest},
	{31, "a token and an API key", withAPIKey, func(*prover) *Credential {
		c := bearer(good(nil, nil))
		c.APIKey = []byte(testAPIKey)
		return c
	}, FaultRequest},
	{32, "none in the query", nil, with(nil, nil), ""},
	{32, "one in the query", nil, func(*prover) *Credential { return &Credential{InQuery: true} }, FaultRequest},

	{33, "bEARER", nil, func(*prover) *Credential { return &Credential{Authorization: []byte("bEARER " + good(nil, nil))} }, ""},
	{33, "two blanks", nil, func(*prover) *Credential { return &Credential{Authorization: []byte("Bearer  " + good(nil, nil))} }, FaultRequest},
	{33, "a list", nil, func(*prover) *Credential {
		return &Credential{Authorization: []byte("Bearer " + good(nil, nil) + ", Basic YTpi")}
	}, FaultRequest},
	{33, "no token", nil, func(*prover) *Credential { return &Credential{Authorization: []byte("Bearer")} }, FaultRequest},
	{33, "a tab", nil, func(*prover) *Credential { return &Credential{Authorization: []byte("Bearer\t" + good(nil, nil))} }, FaultRequest},

	{39, "another was revoked", revoke(mesh.Revocation{Issuer: ciIssuer, JTI: "j2"}), with(nil, nil), ""},
	{39, "its jti was", revoke(mesh.Revocation{Issuer: ciIssuer, JTI: "j1"}), with(nil, nil), FaultRevoked},
	{39, "its subject was", revoke(mesh.Revocation{Issuer: ciIssuer, Subject: "alice"}), with(nil, nil), FaultRevoked},
	{39, "its subject was, before it was issued", revoke(mesh.Revocation{Issuer: ciIssuer, Subject: "alice", Before: at.Add(-time.Minute)}), with(nil, nil), ""},
	{39, "its subject was, after it was issued", revoke(mesh.Revocation{Issuer: ciIssuer, Subject: "alice", Before: at}), with(nil, nil), FaultRevoked},
	{39, "its subject was, and it does not say when it was issued", revoke(mesh.Revocation{Issuer: ciIssuer, Subject: "alice", Before: at}), with(nil, over{"iat": ""}), FaultRevoked},

	{43, "keys that are known", svidIssuer, svid(nil, nil), ""},
	{43, "keys that are not", func(t *mesh.Tokens) {
		svidIssuer(t)
		t.Issuers[1].TrustDomain = downDomain
	}, svid(nil, over{"sub": `"spiffe://down.example/a"`}), FaultUnavailable},
}

func revoke(r ...mesh.Revocation) func(*mesh.Tokens) {
	return func(t *mesh.Tokens) { t.Revoked = append(t.Revoked, r...) }
}

var update = flag.Bool("update", false, "write the ledger of rules on tokens")

// Each of the 44 rules on tokens has a case that counts and one that does not:
// here, in internal/keyset what speaks of fetching keys, in internal/proxy what
// speaks of requests.
func TestJWTRules(t *testing.T) {
	ledger := meshtest.Ledger{Path: "testdata/jwt-rules.golden", Room: "authz"}
	for _, cases := range [][]ruleCase{formRules, claimRules, boundRules} {
		for _, c := range cases {
			ledger.Add(c.rule, c.want == "", c.name)
			t.Run(fmt.Sprintf("%02d %s", c.rule, c.name), func(t *testing.T) { c.run(t) })
		}
	}
	for _, c := range keptRules {
		ledger.Add(c.rule, c.accept, c.name)
		t.Run(fmt.Sprintf("%02d %s", c.rule, c.name), func(t *testing.T) {
			r := newTokenRig(t, nil)
			c.run(t, r, counted(r))
		})
	}
	ledger.Check(t, *update)
	t.Logf("44 rules, %d cases", ledger.Complete(t, 44))
}

// keptRules are about what is kept of one request for the next.
var keptRules = []struct {
	rule   int
	accept bool
	name   string
	run    func(*testing.T, *tokenRig, *countingKeys)
}{
	{37, true, "a token that was verified is known", func(t *testing.T, r *tokenRig, keys *countingKeys) {
		tok := good(nil, nil)
		for range 3 {
			r.want(bearer(tok), "")
		}
		keys.want(t, 1)
	}},
	{37, false, "not once it has ended", func(t *testing.T, r *tokenRig, keys *countingKeys) {
		tok := good(nil, over{"exp": in(time.Second)})
		r.want(bearer(tok), "")
		r.now = r.now.Add(31 * time.Second)
		r.want(bearer(tok), FaultExpired)
	}},
	{37, false, "not for the key of another connection", func(t *testing.T, r *tokenRig, keys *countingKeys) {
		mine, yours := bearer(good(nil, boundTo("me"))), new(Credential)
		*yours = *mine
		mine.Thumbprint, yours.Thumbprint = thumbOf("me"), thumbOf("you")
		r.want(mine, "")
		r.want(yours, FaultBinding)
		keys.want(t, 1)
	}},
	{38, true, "what failed for want of a key counts once there is one", func(t *testing.T, r *tokenRig, keys *countingKeys) {
		tok := bearer(signAs("ES256", ourKeys()["ec2"], object(baseHeader(), over{"kid": `"ec2"`}), object(baseClaims())))
		r.want(tok, FaultKey)
		r.noun.Issuers[0].Keys.Inline = jwks(jwkOf("ec2", ourKeys()["ec2"].Public(), ""))
		if err := r.start(); err != nil {
			t.Fatal(err)
		}
		r.want(tok, "")
	}},
	{38, false, "a token that fails is looked at each time", func(t *testing.T, r *tokenRig, keys *countingKeys) {
		tok := bearer(good(nil, over{"aud": `"other"`}))
		for range 3 {
			r.want(tok, FaultClaims)
		}
		keys.want(t, 3)
	}},
}

func (r *tokenRig) want(c *Credential, code FaultCode) {
	r.t.Helper()
	if _, got := r.check(c); got != code {
		r.t.Errorf("got %q, want %q", got, code)
	}
}

func (k *countingKeys) want(t *testing.T, n int64) {
	t.Helper()
	if got := k.finds.Load(); got != n {
		t.Errorf("verified %d times, want %d", got, n)
	}
}

func (c *ruleCase) run(t *testing.T) {
	r := &tokenRig{t: t, now: at, noun: mesh.Tokens{Issuers: []mesh.TokenIssuer{baseIssuer()}, DPoP: mesh.DPoP{Window: time.Minute}}}
	if c.edit != nil {
		c.edit(&r.noun)
	}
	if err := r.start(); err != nil {
		if c.want != "load" {
			t.Errorf("the policy is refused: %v", err)
		}
		return
	}
	if c.want == "load" {
		t.Fatal("the policy is accepted")
	}
	p := newProver()
	shown := c.show(p)
	for again := range 2 { // the second time from the cache, if it counts
		tok, got := r.check(shown)
		if again == 1 && c.want == "" && shown.Proof != nil {
			if got != FaultReplay {
				t.Errorf("the same proof again gives %q, want %q", got, FaultReplay)
			}
			return
		}
		if got != c.want || (tok == nil) != (c.want != "") {
			t.Errorf("try %d: got %q and token %v, want %q", again+1, got, tok != nil, c.want)
		}
	}
}
