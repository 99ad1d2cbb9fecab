package authz

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

var downDomain = spiffeid.RequireTrustDomainFromString("down.example")

func decoded(s string) []byte {
	b, err := base64.RawURLEncoding.DecodeString(s)
	must(err)
	return b
}

// signPSS signs by PS256 with a salt of this many bytes.
func signPSS(header, claims string, salt int) string {
	text := e64([]byte(header)) + "." + e64([]byte(claims))
	sum := sha256.Sum256([]byte(text))
	sig, err := rsa.SignPSS(rand.Reader, ourKeys()["rsa"].(*rsa.PrivateKey), crypto.SHA256, sum[:], &rsa.PSSOptions{SaltLength: salt})
	must(err)
	return text + "." + e64(sig)
}

// signDER signs by ES256 and writes the signature as certificates have it.
func signDER(header, claims string) string {
	text := e64([]byte(header)) + "." + e64([]byte(claims))
	sum := sha256.Sum256([]byte(text))
	sig, err := ecdsa.SignASN1(rand.Reader, ourKeys()["ec"].(*ecdsa.PrivateKey), sum[:])
	must(err)
	return text + "." + e64(sig)
}

// rocaKey is an RSA key as the chips of CVE-2017-15361 made them: each prime is
// a power of 65537 modulo the product of the first primes.
var rocaKey = sync.OnceValue(func() *rsa.PrivateKey {
	m, g := big.NewInt(1), big.NewInt(65537)
	for n, p := 0, int64(2); n < 126; p++ {
		if big.NewInt(p).ProbablyPrime(0) {
			m.Mul(m, big.NewInt(p))
			n++
		}
	}
	one := big.NewInt(1)
	prime := func() *big.Int {
		for {
			a, err := rand.Int(rand.Reader, m)
			must(err)
			k, err := rand.Int(rand.Reader, new(big.Int).Lsh(one, uint(1023-m.BitLen())))
			must(err)
			k.SetBit(k, 1023-m.BitLen(), 1)
			p := new(big.Int).Exp(g, a, m)
			if p.Add(p, k.Mul(k, m)); p.BitLen() == 1024 && p.Bit(1022) == 1 && p.ProbablyPrime(8) {
				return p
			}
		}
	}
	p, q := prime(), prime()
	n := new(big.Int).Mul(p, q)
	return &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: n, E: 65537}}
})

// attackClasses are those of the public vectors for JWS and JWK, made anew
// with keys of our own: each gives tokens that must not count.
var attackClasses = map[string]func() []string{
	"none":               attackNone,
	"JSON serialisation": attackJSON,
	"padding":            attackPadding,
	"wrong key type":     attackKeyType,
	"broken signatures":  attackSignature,
	"borrowed keys":      attackHeaderKeys,
	"critical headers":   attackCritical,
	"kid":                attackKeyID,
	"repeated names":     attackRepeated,
}

func attackNone() (out []string) {
	c := e64([]byte(object(baseClaims())))
	for _, alg := range []string{"none", "None", "NONE", "nOnE", "", " none", "none\u0000"} {
		h := e64([]byte(object(baseHeader(), over{"alg": jsonText(alg)})))
		sig := good(nil, nil)[strings.LastIndex(good(nil, nil), ".")+1:]
		out = append(out, h+"."+c+".", h+"."+c, h+"."+c+"."+sig, h+"."+c+".AA")
	}
	return append(out, e64([]byte(`{"kid":"ec"}`))+"."+c+".", e64([]byte(`{"alg":null,"kid":"ec"}`))+"."+c+".AA")
}

func attackJSON() (out []string) {
	p := strings.Split(good(nil, nil), ".")
	sig := fmt.Sprintf(`{"protected":%q,"signature":%q}`, p[0], p[2])
	return []string{
		fmt.Sprintf(`{"payload":%q,"protected":%q,"signature":%q}`, p[1], p[0], p[2]),
		fmt.Sprintf(`{"payload":%q,"signatures":[%s]}`, p[1], sig),
		fmt.Sprintf(`{"payload":%q,"signatures":[%s,%s]}`, p[1], sig, sig),
		fmt.Sprintf(`{"payload":%q,"header":{"alg":"ES256","kid":"ec"},"signature":%q}`, p[1], p[2]),
		`{"payload":"` + p[1] + `"}`, `{}`, `[]`, `null`, `""`,
	}
}

func attackPadding() (out []string) {
	s := good(nil, nil)
	p := strings.Split(s, ".")
	for i := range p {
		for _, pad := range []string{"=", "==", "%3d", "\n", "\r\n", " ", "\t", "\x00", "?", "!", "é"} {
			for _, at := range []int{0, len(p[i]) / 2, len(p[i])} {
				q := append([]string{}, p...)
				q[i] = q[i][:at] + pad + q[i][at:]
				out = append(out, strings.Join(q, "."))
			}
		}
	}
	out = append(out, "."+s, s+".", strings.Replace(s, ".", "..", 1), s+"."+p[2], p[0]+"."+p[1]+"."+p[2]+"."+p[2]+"."+p[2])
	return out
}

// attackKeyType signs with what anybody has: the public key as a shared
// secret, or a key of one kind under the name of another.
func attackKeyType() (out []string) {
	for kid, k := range ourKeys() {
		der, err := x509.MarshalPKIXPublicKey(k.Public())
		must(err)
		for _, secret := range [][]byte{der, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), []byte(jwkOf(kid, k.Public(), "")), nil} {
			text := e64([]byte(object(baseHeader(), over{"alg": `"HS256"`, "kid": jsonText(kid)}))) + "." + e64([]byte(object(baseClaims())))
			m := hmac.New(sha256.New, secret)
			m.Write([]byte(text))
			out = append(out, text+"."+e64(m.Sum(nil)))
		}
	}
	algOf := map[string]string{"ec": "ES256", "rsa": "RS256", "ed": "EdDSA", "p384": "ES384"}
	for kid, own := range algOf {
		for _, alg := range append([]string{"HS384", "HS512", "ES256K", "A128KW", "dir", "RSA1_5", "RS1"}, mesh.DefaultAlgorithms...) {
			if alg == own || alg == "PS256" && own == "RS256" {
				continue
			}
			out = append(out, signAs(own, ourKeys()[kid], object(baseHeader(), over{"alg": jsonText(alg), "kid": jsonText(kid)}), object(baseClaims())))
		}
	}
	return out
}

func attackSignature() (out []string) {
	s := good(nil, nil)
	text, sig := s[:strings.LastIndex(s, ".")], decoded(s[strings.LastIndex(s, ".")+1:])
	add := func(b []byte) { out = append(out, text+"."+e64(b)) }
	for i := range sig {
		b := append([]byte{}, sig...)
		b[i] ^= 1
		add(b)
	}
	n := elliptic.P256().Params().N
	r, z := sig[:32], make([]byte, 32)
	for _, b := range [][]byte{
		make([]byte, 64), append(append([]byte{}, r...), z...), append(append([]byte{}, z...), sig[32:]...),
		append(append([]byte{}, n.Bytes()...), n.Bytes()...), append(append([]byte{}, n.Bytes()...), sig[32:]...),
		sig[:63], sig[:32], append([]byte{0}, sig...), append(append([]byte{}, sig...), 0), make([]byte, 96), {0}, sig[32:],
	} {
		add(b)
	}
	out = append(out, signDER(object(baseHeader()), object(baseClaims())), signPSS(object(baseHeader(), over{"alg": `"PS256"`, "kid": `"rsa"`}), object(baseClaims()), 0))
	for _, salt := range []int{0, 20, 31, 33, 64} {
		out = append(out, signPSS(object(baseHeader(), over{"alg": `"PS256"`, "kid": `"rsa"`}), object(baseClaims()), salt))
	}
	// Ed25519 with S + L, the other writing of one signature.
	ed := signAs("EdDSA", ourKeys()["ed"], object(baseHeader(), over{"alg": `"EdDSA"`, "kid": `"ed"`}), object(baseClaims()))
	edText, edSig := ed[:strings.LastIndex(ed, ".")], decoded(ed[strings.LastIndex(ed, ".")+1:])
	l, _ := new(big.Int).SetString("7237005577332262213973186563042994240857116359379907606001950938285454250989", 10)
	le := func(b []byte) *big.Int {
		r := make([]byte, len(b))
		for i := range b {
			r[len(b)-1-i] = b[i]
		}
		return new(big.Int).SetBytes(r)
	}
	big := le(edSig[32:])
	big.Add(big, l)
	be := big.FillBytes(make([]byte, 32))
	for i := range be {
		edSig[32+i] = be[31-i]
	}
	out = append(out, edText+"."+e64(edSig), edText+"."+e64(make([]byte, ed25519.SignatureSize)))
	// Claims and header of one token with the signature of another.
	o := strings.Split(good(nil, over{"sub": `"mallory"`}), ".")
	p := strings.Split(s, ".")
	return append(out, p[0]+"."+o[1]+"."+p[2], o[0]+"."+p[1]+"."+o[2])
}

// attackHeaderKeys bring a key of the attacker's along.
func attackHeaderKeys() (out []string) {
	mine := ourKeys()["ec2"]
	for _, h := range []over{
		{"jwk": jwkOf("", mine.Public(), "")}, {"jwk": jwkOf("ec", mine.Public(), "")}, {"jku": `"https://evil.example/jwks"`},
		{"x5u": `"https://evil.example/cert"`}, {"x5c": `["MIIB"]`}, {"x5t": `"AAAA"`}, {"x5t#S256": `"AAAA"`}, {"kid": `""`}, {"kid": `null`},
	} {
		out = append(out, signAs("ES256", mine, object(baseHeader(), h), object(baseClaims())))
	}
	return out
}

func attackCritical() (out []string) {
	for _, h := range []over{
		{"crit": `["b64"]`, "b64": `false`}, {"crit": `["http://example.com/UNDEFINED"]`}, {"crit": `[]`}, {"crit": `"b64"`}, {"crit": `["alg"]`},
		{"crit": `null`}, {"b64": `true`}, {"b64": `false`}, {"zip": `"DEF"`}, {"enc": `"A256GCM"`}, {"cty": `"JWT"`}, {"cty": `"jwt"`},
	} {
		out = append(out, good(h, nil))
	}
	return out
}

func attackKeyID() (out []string) {
	for _, kid := range []string{
		`"../../../dev/null"`, `"/dev/null"`, `"ec' OR '1'='1"`, `"file:///etc/passwd"`, `"https://evil.example/k"`, `["ec"]`, `{"a":1}`, `0`, `true`,
		`"ec\u0000"`, `" ec"`, `"EC"`, jsonText(strings.Repeat("k", 300)),
	} {
		out = append(out, good(over{"kid": kid}, nil))
	}
	return out
}

func attackRepeated() (out []string) {
	h, c := object(baseHeader()), object(baseClaims())
	cut := func(s string) string { return strings.TrimSuffix(s, "}") }
	sign := func(h, c string) { out = append(out, signAs("ES256", ourKeys()["ec"], h, c)) }
	for _, dup := range []string{`,"alg":"ES256"}`, `,"kid":"ec"}`, `,"typ":"JWT"}`, `,"\u0061lg":"ES256"}`} {
		sign(cut(h)+dup, c)
	}
	for _, dup := range []string{`,"sub":"alice"}`, `,"exp":99999999999}`, `,"aud":"billing"}`, `,"x":{"a":1,"a":2}}`, `,"s\u0075b":"root"}`} {
		sign(h, cut(c)+dup)
	}
	sign(h, c+c)
	sign(h, c+"\n{}")
	sign(h, "["+c+"]")
	sign(h, "\ufeff"+c)
	return out
}

func TestTokenAttackVectors(t *testing.T) {
	r := newTokenRig(t, nil)
	for _, alg := range []struct{ alg, kid string }{{"ES256", "ec"}, {"ES384", "p384"}, {"EdDSA", "ed"}, {"RS256", "rsa"}, {"PS256", "rsa"}} {
		if _, f := r.check(by(alg.alg, alg.kid, nil)(nil)); f != "" {
			t.Errorf("a good %s token: %s", alg.alg, f)
		}
	}
	total := 0
	for class, make := range attackClasses {
		vectors := make()
		total += len(vectors)
		for i, v := range vectors {
			for _, scheme := range []string{"Bearer ", "DPoP "} {
				if tok, f := r.check(&Credential{Authorization: []byte(scheme + v)}); tok != nil || f == "" {
					t.Errorf("%s %d counts as %s: %.60q", class, i, scheme, v)
				}
			}
		}
	}
	if total < 250 {
		t.Errorf("only %d vectors", total)
	}
	t.Logf("%d vectors in %d classes, all refused under both schemes", total, len(attackClasses))
}

// A set of keys in which one is not what it should be counts as none, or
// without it.
func TestKeySetAttackVectors(t *testing.T) {
	ec := jwkOf("ec", ourKeys()["ec"].Public(), "")
	for name, tt := range map[string]struct {
		keys string
		want FaultCode // of a token by "ec"
	}{
		"alone":                         {jwks(ec), ""},
		"beside one for encryption":     {jwks(ec, jwkOf("rsa", ourKeys()["rsa"].Public(), `,"use":"enc"`)), ""},
		"beside an unknown kind":        {jwks(ec, `{"kty":"XYZ","kid":"x"}`), ""},
		"beside a curve of nobody":      {jwks(ec, `{"kty":"EC","crv":"secp256k1","kid":"x","x":"AAAA","y":"AAAA"}`), ""},
		"mixed with a shared secret":    {jwks(ec, `{"kty":"oct","kid":"h","k":"c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0"}`), "load"},
		"mixed with a private key":      {jwks(ec, jwkOf("ec2", ourKeys()["ec2"].Public(), `,"d":"AAAA"`)), "load"},
		"mixed with a short RSA key":    {jwks(ec, jwkOf("weak", ourKeys()["weak"].Public(), "")), "load"},
		"mixed with a ROCA key":         {jwks(ec, jwkOf("roca", &rocaKey().PublicKey, "")), "load"},
		"two of one name":               {jwks(ec, jwkOf("ec", ourKeys()["ec2"].Public(), ""), jwkOf("ed", ourKeys()["ed"].Public(), "")), FaultKey},
		"with an even exponent":         {jwks(ec, fmt.Sprintf(`{"kty":"RSA","kid":"r","n":%q,"e":"Ag"}`, e64(ourKeys()["rsa"].Public().(*rsa.PublicKey).N.Bytes()))), "load"},
		"with exponent 1":               {jwks(ec, fmt.Sprintf(`{"kty":"RSA","kid":"r","n":%q,"e":"AQ"}`, e64(ourKeys()["rsa"].Public().(*rsa.PublicKey).N.Bytes()))), "load"},
		"with a point beside the curve": {jwks(ec, `{"kty":"EC","crv":"P-256","kid":"x","x":"`+e64(make([]byte, 32))+`","y":"`+e64(make([]byte, 32))+`"}`), "load"},
		"alg of another curve":          {jwks(jwkOf("ec", ourKeys()["ec"].Public(), `,"alg":"ES384"`)), "load"},
		"keys twice":                    {`{"keys":[` + ec + `],"keys":[` + ec + `]}`, "load"},
		"no list":                       {`{"keys":` + ec + `}`, "load"},
		"a bare key":                    {ec, "load"},
		"empty":                         {jwks(), "load"},
		"too many":                      {jwks(strings.Split(strings.TrimSuffix(strings.Repeat(`{"kty":"X"};`, 101), ";"), ";")...), "load"},
	} {
		t.Run(name, func(t *testing.T) {
			c := ruleCase{edit: keysAre(func() string { return tt.keys }), show: with(nil, nil), want: tt.want}
			c.run(t)
		})
	}
}
