package authz

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/jose"
	"sallyport/internal/keyset"
	"sallyport/internal/mesh"
)

var e64 = base64.RawURLEncoding.EncodeToString

// ourKeys are made once: RSA keys take time.
var ourKeys = sync.OnceValue(func() map[string]crypto.Signer {
	ks := map[string]crypto.Signer{}
	for kid, c := range map[string]elliptic.Curve{"ec": elliptic.P256(), "ec2": elliptic.P256(), "p384": elliptic.P384(), "p521": elliptic.P521()} {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			panic(err)
		}
		ks[kid] = k
	}
	for kid, bits := range map[string]int{"rsa": 2048, "weak": 1024} {
		k, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			panic(err)
		}
		ks[kid] = k
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	ks["ed"] = ed
	return ks
})

// jwkOf is a public key in a key set; more are further members.
func jwkOf(kid string, pub crypto.PublicKey, more string) string {
	if kid != "" {
		more = fmt.Sprintf(`,"kid":%q`, kid) + more
	}
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		b, err := k.Bytes()
		if err != nil {
			panic(err)
		}
		half := len(b) / 2
		return fmt.Sprintf(`{"kty":"EC","crv":%q,"x":%q,"y":%q%s}`, k.Params().Name, e64(b[1:1+half]), e64(b[1+half:]), more)
	case *rsa.PublicKey:
		return fmt.Sprintf(`{"kty":"RSA","n":%q,"e":%q%s}`, e64(k.N.Bytes()), e64(big.NewInt(int64(k.E)).Bytes()), more)
	case ed25519.PublicKey:
		return fmt.Sprintf(`{"kty":"OKP","crv":"Ed25519","x":%q%s}`, e64(k), more)
	}
	panic("unknown key")
}

func jwks(list ...string) string { return `{"keys":[` + strings.Join(list, ",") + `]}` }

// allKeys are the good keys of our issuer.
func allKeys() string {
	var list []string
	for _, kid := range []string{"ec", "ed", "p384", "p521", "rsa"} {
		list = append(list, jwkOf(kid, ourKeys()[kid].Public(), ""))
	}
	return jwks(list...)
}

// signAs signs by an algorithm, whatever the header says.
func signAs(alg string, key crypto.Signer, header, claims string) string {
	text := e64([]byte(header)) + "." + e64([]byte(claims))
	return text + "." + e64(signature(alg, key, text))
}

func signature(alg string, key crypto.Signer, text string) []byte {
	hash := map[string]crypto.Hash{"256": crypto.SHA256, "384": crypto.SHA384, "512": crypto.SHA512}[alg[2:]]
	if alg == "EdDSA" {
		sig, err := key.Sign(nil, []byte(text), crypto.Hash(0))
		must(err)
		return sig
	}
	h := hash.New()
	h.Write([]byte(text))
	sum := h.Sum(nil)
	switch alg[:2] {
	case "ES":
		k := key.(*ecdsa.PrivateKey)
		r, s, err := ecdsa.Sign(rand.Reader, k, sum)
		must(err)
		size := (k.Params().BitSize + 7) / 8
		return append(r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))...)
	case "RS":
		sig, err := rsa.SignPKCS1v15(rand.Reader, key.(*rsa.PrivateKey), hash, sum)
		must(err)
		return sig
	}
	sig, err := rsa.SignPSS(rand.Reader, key.(*rsa.PrivateKey), hash, sum, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
	must(err)
	return sig
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// object writes members, each value as JSON stands; an empty one leaves the
// member out.
func object(base map[string]string, over ...map[string]string) string {
	all := maps.Clone(base)
	for _, o := range over {
		maps.Copy(all, o)
	}
	var list []string
	for _, k := range slices.Sorted(maps.Keys(all)) {
		if all[k] != "" {
			list = append(list, fmt.Sprintf("%q:%s", k, all[k]))
		}
	}
	return "{" + strings.Join(list, ",") + "}"
}

// over is a set of members to change.
type over = map[string]string

const ciIssuer, ciAudience = "https://ci.example", "billing"

// at is the time of the tests; in is a moment beside it, as JSON.
var at = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

func in(d time.Duration) string { return fmt.Sprint(at.Add(d).Unix()) }

func baseClaims() over {
	return over{"iss": `"` + ciIssuer + `"`, "aud": `"` + ciAudience + `"`, "sub": `"alice"`, "iat": in(-10 * time.Second), "exp": in(5 * time.Minute), "jti": `"j1"`, "scope": `"pay read"`}
}

func baseHeader() over { return over{"alg": `"ES256"`, "kid": `"ec"`, "typ": `"JWT"`} }

// good is a token that counts, with changes.
func good(header, claims over) string {
	return signAs("ES256", ourKeys()["ec"], object(baseHeader(), header), object(baseClaims(), claims))
}

func baseIssuer() mesh.TokenIssuer {
	return mesh.TokenIssuer{
		Issuer: ciIssuer, Profile: mesh.ProfileJWT, Audiences: []string{ciAudience}, Algorithms: slices.Clone(mesh.DefaultAlgorithms),
		Keys: mesh.KeySet{Inline: allKeys()}, Leeway: 30 * time.Second, MaxLifetime: 24 * time.Hour, MaxBytes: 8192, MaxClaims: 64, Binding: mesh.BindNone,
	}
}

// A rig is a Verifier with one issuer, at a time that stands still.
type tokenRig struct {
	t      testing.TB
	v      *Verifier
	keeper *keyset.Keeper
	noun   mesh.Tokens
	now    time.Time
}

func newTokenRig(t testing.TB, edit func(*mesh.Tokens)) *tokenRig {
	t.Helper()
	r := &tokenRig{t: t, now: at, noun: mesh.Tokens{Issuers: []mesh.TokenIssuer{baseIssuer()}, DPoP: mesh.DPoP{Window: time.Minute}}}
	if edit != nil {
		edit(&r.noun)
	}
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	return r
}

// start puts the noun in force, or says why it cannot be.
func (r *tokenRig) start() error {
	quiet := slog.New(slog.DiscardHandler)
	if r.v == nil {
		var err error
		if r.keeper, err = keyset.New(keyset.Config{Log: quiet}); err != nil {
			return err
		}
		if r.v, err = NewVerifier(VerifierConfig{Keys: withSVID{r.keeper}, Log: quiet, Now: func() time.Time { return r.now }}); err != nil {
			return err
		}
	}
	noun := r.noun
	set, err := CompileTokens(&noun)
	if err != nil {
		return err
	}
	if err := r.keeper.Use(set.Issuers()); err != nil {
		return err
	}
	r.v.Use(set)
	return nil
}

// withSVID knows one key of the trust domain partner.example, too.
type withSVID struct{ *keyset.Keeper }

func (w withSVID) Find(ctx context.Context, issuer string, t *jose.Token) (jose.Key, bool, error) {
	switch issuer {
	case "spiffe://partner.example":
		return jose.Key{Public: ourKeys()["ec2"].Public()}, t.KeyID == "svid", nil
	case "spiffe://down.example":
		return jose.Key{}, false, keyset.ErrUnavailable
	}
	return w.Keeper.Find(ctx, issuer, t)
}

func (w withSVID) Has(issuer string, t *jose.Token, key crypto.PublicKey) bool {
	if issuer == "spiffe://partner.example" {
		return t.KeyID == "svid"
	}
	return w.Keeper.Has(issuer, t, key)
}

func (w withSVID) Generation(issuer string) uint64 {
	if issuer == "spiffe://partner.example" {
		return 1
	}
	return w.Keeper.Generation(issuer)
}

// bearer is what a request shows with this token.
func bearer(token string) *Credential { return &Credential{Authorization: []byte("Bearer " + token)} }

// check gives the code of the fault, or "".
func (r *tokenRig) check(c *Credential) (*Token, FaultCode) {
	r.t.Helper()
	if c.Method == "" {
		c.Method, c.Path, c.Host = "POST", "/v1/pay", "billing.mesh.internal"
	}
	tok, f := r.v.Check(r.t.Context(), c)
	switch {
	case f == nil:
		return tok, ""
	case tok != nil:
		r.t.Error("a token and a fault")
	}
	if strings.Contains(f.Detail, string(c.Authorization[max(0, len(c.Authorization)-20):])) && len(c.Authorization) > 0 {
		r.t.Errorf("detail %q holds the credential", f.Detail)
	}
	return nil, f.Code
}

// A prover is a client with a key of its own.
type prover struct {
	key  crypto.Signer
	alg  string
	next int
}

func newProver() *prover { return &prover{key: ourKeys()["ec2"], alg: "ES256"} }

func (p *prover) thumb() string { return Thumbprint(p.key.Public()) }

// proof is a proof for a token, with changes.
func (p *prover) proof(token string, header, claims over) []byte {
	p.next++
	sum := sha256.Sum256([]byte(token))
	h := object(over{"typ": `"dpop+jwt"`, "alg": `"` + p.alg + `"`, "jwk": jwkOf("", p.key.Public(), "")}, header)
	c := object(over{"jti": fmt.Sprintf(`"p%d"`, p.next), "htm": `"POST"`, "htu": `"http://billing.mesh.internal/v1/pay"`, "iat": in(0), "ath": `"` + e64(sum[:]) + `"`}, claims)
	return []byte(signAs(p.alg, p.key, h, c))
}

// shows is a request with a token and a proof of it.
func (p *prover) shows(token string, header, claims over) *Credential {
	return &Credential{Authorization: []byte("DPoP " + token), Proof: p.proof(token, header, claims)}
}

func jsonText(s string) string {
	b, err := json.Marshal(s)
	must(err)
	return string(b)
}

var partner = spiffeid.RequireTrustDomainFromString("partner.example")
