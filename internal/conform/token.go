package conform

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	_ "crypto/sha512" // for the hashes of ES384 and ES512
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"sallyport/internal/jose"
)

var algorithms = map[string]crypto.Hash{
	"RS256": crypto.SHA256, "RS384": crypto.SHA384, "RS512": crypto.SHA512,
	"ES256": crypto.SHA256, "ES384": crypto.SHA384, "ES512": crypto.SHA512,
	"PS256": crypto.SHA256, "PS384": crypto.SHA384, "PS512": crypto.SHA512,
}

// A lie is a token that a validator must refuse, and under which demand.
type lie struct {
	must  int
	name  string
	token string
}

// A forger makes tokens of a Domain.
type forger struct {
	d   *Domain
	now time.Time
	err error // the first that went wrong
}

// claims are those of a good token, changed: a nil value takes one away.
func (f *forger) claims(change map[string]any) map[string]any {
	c := map[string]any{"sub": f.d.id("/conform"), "aud": []string{audience}, "iat": f.now.Unix(), "exp": f.now.Add(5 * time.Minute).Unix()}
	maps.Copy(c, change)
	maps.DeleteFunc(c, func(_ string, v any) bool { return v == nil })
	return c
}

func (f *forger) header(change map[string]any) map[string]any {
	h := map[string]any{"alg": "ES256", "kid": kidES256, "typ": "JWT"}
	maps.Copy(h, change)
	maps.DeleteFunc(h, func(_ string, v any) bool { return v == nil })
	return h
}

// token signs what it is given with the key, as the header's algorithm says
// when that fits the key.
func (f *forger) token(header, claims map[string]any, key crypto.Signer) string {
	alg, _ := header["alg"].(string)
	return f.sign(f.part(header)+"."+f.part(claims), alg, key)
}

func (f *forger) sign(text, alg string, key crypto.Signer) string {
	hash, ok := algorithms[alg]
	if !ok {
		hash = crypto.SHA256
	}
	h := hash.New()
	h.Write([]byte(text))
	sum := h.Sum(nil)
	var sig []byte
	var err error
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		size := (k.Params().BitSize + 7) / 8
		sig = make([]byte, 2*size)
		r, s, serr := ecdsa.Sign(rand.Reader, k, sum)
		if err = serr; err == nil {
			r.FillBytes(sig[:size])
			s.FillBytes(sig[size:])
		}
	case *rsa.PrivateKey:
		if strings.HasPrefix(alg, "PS") {
			sig, err = rsa.SignPSS(rand.Reader, k, hash, sum, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		} else {
			sig, err = rsa.SignPKCS1v15(rand.Reader, k, hash, sum)
		}
	case ed25519.PrivateKey:
		sig = ed25519.Sign(k, []byte(text))
	}
	f.err = errors.Join(f.err, err)
	return text + "." + base64.RawURLEncoding.EncodeToString(sig)
}

func (f *forger) part(v any) string {
	b, err := json.Marshal(v)
	f.err = errors.Join(f.err, err)
	return base64.RawURLEncoding.EncodeToString(b)
}

// es signs with the domain's first key.
func (f *forger) es(header, claims map[string]any) string {
	return f.token(f.header(header), f.claims(claims), f.d.jwt[kidES256])
}

// truths are tokens that must be accepted, each under one more of the nine.
func (f *forger) truths() map[string]string {
	sign := func(alg, kid string) string {
		return f.token(f.header(map[string]any{"alg": alg, "kid": kid}), f.claims(nil), f.d.jwt[kid])
	}
	return map[string]string{
		"ES256": sign("ES256", kidES256), "ES384": sign("ES384", kidES384),
		"RS256": sign("RS256", kidRSA), "RS512": sign("RS512", kidRSA), "PS256": sign("PS256", kidRSA), "PS384": sign("PS384", kidRSA),
	}
}

// lies are tokens of the domain that must be refused. own is the trust domain
// of the validator.
func (f *forger) lies(own string) []lie {
	good := f.es(nil, nil)
	parts := strings.Split(good, ".")
	h := func(change map[string]any) string { return f.es(change, nil) }
	c := func(change map[string]any) string { return f.es(nil, change) }
	signer := func(kid string) string {
		return f.token(f.header(map[string]any{"kid": kid}), f.claims(nil), f.d.jwt[kid])
	}
	object := func(v any) string {
		b, err := json.Marshal(v)
		f.err = errors.Join(f.err, err)
		return string(b)
	}
	out := []lie{
		{16, "a certificate in place of a token", base64.StdEncoding.EncodeToString(f.d.root.Raw)},
		{16, "a token with typ at+jwt", h(map[string]any{"typ": "at+jwt"})},
		{40, "flattened JSON serialisation", object(map[string]any{"protected": parts[0], "payload": parts[1], "signature": parts[2]})},
		{40, "general JSON serialisation", object(map[string]any{"payload": parts[1], "signatures": []any{map[string]any{"protected": parts[0], "signature": parts[2]}}})},
		{41, "the header jku", h(map[string]any{"jku": "https://conform.example/keys"})},
		{41, "the header jwk", h(map[string]any{"jwk": jwk(f.d.jwt[kidES256].Public())})},
		{41, "the header crit", h(map[string]any{"crit": []string{"b64"}, "b64": true})},
		{41, "a header of our own", h(map[string]any{"conform": 1})},
		{43, "alg none", f.part(f.header(map[string]any{"alg": "none"})) + "." + parts[1] + "."},
		{43, "alg none with a signature", h(map[string]any{"alg": "none"})},
		{43, "alg HS256 with the public key", f.mac()},
		{43, "alg EdDSA", f.edwards()},
		{43, "alg in lower case", h(map[string]any{"alg": "es256"})},
		{43, "no alg", h(map[string]any{"alg": nil})},
		{43, "alg of another kind of key", h(map[string]any{"alg": "RS256"})},
		{44, "typ wit+jwt", h(map[string]any{"typ": "wit+jwt"})},
		{45, "no sub", c(map[string]any{"sub": nil})},
		{45, "a sub that is no SPIFFE ID", c(map[string]any{"sub": "conform"})},
		{45, "a sub without path", c(map[string]any{"sub": f.d.id("")})},
		{45, "a sub that is a list", c(map[string]any{"sub": []string{f.d.id("/conform")}})},
		{47, "no aud", c(map[string]any{"aud": nil})},
		{47, "an empty aud", c(map[string]any{"aud": []string{}})},
		{48, "another audience", c(map[string]any{"aud": []string{audience + "-other"}})},
		{48, "an audience in upper case", c(map[string]any{"aud": strings.ToUpper(audience)})},
		{50, "no exp", c(map[string]any{"exp": nil})},
		{50, "exp an hour ago", c(map[string]any{"exp": f.now.Add(-time.Hour).Unix()})},
		{50, "exp as text", c(map[string]any{"exp": fmt.Sprint(f.now.Add(time.Hour).Unix())})},
		{51, "nbf in an hour", c(map[string]any{"nbf": f.now.Add(time.Hour).Unix()})},
		{51, "claims that were changed after the signature", parts[0] + "." + f.part(f.claims(map[string]any{"sub": f.d.id("/admin")})) + "." + parts[2]},
		{51, "a signature that was cut short", good[:len(good)-8]},
		{51, "claims that are no object", f.listed(parts[0])},
		{51, "two parts", parts[0] + "." + parts[1]},
		{53, "no kid", h(map[string]any{"kid": nil})},
		{54, "the key of the X.509 authority", f.token(f.header(map[string]any{"kid": f.d.td.Name()}), f.claims(nil), f.d.key)},
		{54, "the X.509 authority's key under another key's ID", f.token(f.header(nil), f.claims(nil), f.d.key)},
		{54, "a key with use wit-svid", signer(kidWIT)},
		{54, "a key without use", signer(kidNone)},
		{55, "the validator's own trust domain", c(map[string]any{"sub": "spiffe://" + own + "/conform"})},
		{55, "a trust domain that nobody knows", c(map[string]any{"sub": "spiffe://unknown." + f.d.td.Name() + "/conform"})},
	}
	for _, b := range badNames {
		out = append(out, lie{b.must, "the sub " + b.of("TD"), c(map[string]any{"sub": b.of(f.d.td.Name())})})
	}
	return out
}

// mac is the old trick: the public key as the secret of an HMAC.
func (f *forger) mac() string {
	text := f.part(f.header(map[string]any{"alg": "HS256"})) + "." + f.part(f.claims(nil))
	raw, _ := json.Marshal(jwk(f.d.jwt[kidES256].Public()))
	m := hmac.New(sha256.New, raw)
	m.Write([]byte(text))
	return text + "." + base64.RawURLEncoding.EncodeToString(m.Sum(nil))
}

func (f *forger) edwards() string {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	f.err = errors.Join(f.err, err)
	return f.token(f.header(map[string]any{"alg": "EdDSA"}), f.claims(nil), key)
}

// listed signs claims that are a JSON list.
func (f *forger) listed(header string) string {
	return f.sign(header+"."+base64.RawURLEncoding.EncodeToString([]byte(`["sub"]`)), "ES256", f.d.jwt[kidES256])
}

// A token as it was written.
type token struct {
	header, claims map[string]any
}

func readToken(text string) (token, error) {
	parts := strings.Split(text, ".")
	if len(parts) != 3 {
		return token{}, fmt.Errorf("it has %d parts, want 3", len(parts))
	}
	var out [2]map[string]any
	for i := range out {
		b, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err != nil {
			return token{}, errors.New("it is not base64url")
		}
		if out[i], err = jose.ParseObject(b); err != nil {
			return token{}, err
		}
	}
	return token{out[0], out[1]}, nil
}

// tokenMusts are the demands on a JWT-SVID that somebody signed.
var tokenMusts = []int{40, 41, 42, 44, 45, 46, 49, 53}

// jwt holds a JWT-SVID that the implementation signed to tokenMusts. keys are
// the key IDs of its bundle.
func (r *report) jwt(text, id string, keys []string) {
	t, err := readToken(text)
	r.say("the token of "+id, err, 40)
	if err != nil {
		return
	}
	alone := error(nil)
	for k := range t.header {
		if k != "alg" && k != "kid" && k != "typ" {
			alone = fmt.Errorf("it has the header %.50q", k)
		}
	}
	alg, _ := t.header["alg"].(string)
	kid, _ := t.header["kid"].(string)
	typ, has := t.header["typ"]
	_, nine := algorithms[alg]
	what := "the token of " + id
	r.say(what, alone, 41)
	r.say(what, fails(nine, "its alg is %.20q", alg), 42)
	r.say(what, fails(!has || typ == "JWT" || typ == "JOSE", "its typ is %.50v", typ), 44)
	r.say(what, fails(t.claims["sub"] == id, "its sub is %.100v", t.claims["sub"]), 45)
	aud := audiences(t.claims["aud"])
	r.say(what, fails(len(aud) > 0, "it has no aud"), 46)
	_, isNumber := t.claims["exp"].(json.Number)
	r.say(what, fails(isNumber, "it has no exp"), 49)
	r.say(what, fails(kid != "" && slices.Contains(keys, kid), "its kid %.50q is not in the bundle", kid), 53)
}

func audiences(v any) (out []string) {
	if s, ok := v.(string); ok {
		return []string{s}
	}
	list, _ := v.([]any)
	for _, a := range list {
		if s, ok := a.(string); ok {
			out = append(out, s)
		}
	}
	return out
}
