package authz

import (
	"bytes"
	"context"
	"crypto"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

// countingKeys counts how often a key is asked for, that is, a token verified.
type countingKeys struct {
	Keys
	finds      atomic.Int64
	generation atomic.Uint64
}

func (k *countingKeys) Find(ctx context.Context, issuer string, t *jose.Token) (jose.Key, bool, error) {
	k.finds.Add(1)
	return k.Keys.Find(ctx, issuer, t)
}

func (k *countingKeys) Generation(issuer string) uint64 {
	return k.Keys.Generation(issuer) + k.generation.Load()
}

func counted(r *tokenRig) *countingKeys {
	k := &countingKeys{Keys: r.v.cfg.Keys}
	r.v.cfg.Keys = k
	return k
}

// Rule 37: what was verified is not verified again until it ends, its issuer's
// keys change or the policy does.
func TestJWTRule37VerifiedTokensAreKnown(t *testing.T) {
	r := newTokenRig(t, nil)
	keys := counted(r)
	tok := good(nil, nil)
	want := int64(0)
	step := func(what string, verified bool, code FaultCode) {
		t.Helper()
		if verified {
			want++
		}
		if _, f := r.check(bearer(tok)); f != code {
			t.Errorf("%s: %q, want %q", what, f, code)
		}
		if got := keys.finds.Load(); got != want {
			t.Errorf("%s: verified %d times, want %d", what, got, want)
			want = got
		}
	}
	step("first", true, "")
	step("again", false, "")
	r.now = r.now.Add(maxCached - time.Second)
	step("shortly before five minutes", false, "")
	r.now = r.now.Add(time.Second)
	step("after five minutes", true, "")
	keys.generation.Add(1)
	step("after the keys changed", true, "")
	step("again", false, "")
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	step("after the same policy again", false, "")
	r.noun.Revoked = append(r.noun.Revoked, mesh.Revocation{Issuer: ciIssuer, JTI: "other"})
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	step("after another policy", true, "")
	r.noun.Revoked = append(r.noun.Revoked, mesh.Revocation{Issuer: ciIssuer, JTI: "j1"})
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	step("after it was revoked", true, FaultRevoked)
	r.noun.Revoked = nil
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	step("after that was taken back", true, "")
	r.now = at.Add(5*time.Minute + 30*time.Second)
	step("after its end", true, FaultExpired)
}

// One byte of difference is another token, although the signature may hold.
func TestJWTRule37KeyIsOfTheExactBytes(t *testing.T) {
	r := newTokenRig(t, nil)
	keys := counted(r)
	a, b := good(nil, nil), good(nil, nil) // two signatures over one text
	for _, tok := range []string{a, b, a, b} {
		if _, f := r.check(bearer(tok)); f != "" {
			t.Fatal(f)
		}
	}
	if n := keys.finds.Load(); n != 2 {
		t.Errorf("verified %d times, want 2", n)
	}
}

// The proofs that a token is bound by are checked although it is known.
func TestJWTRule37BindingIsCheckedEachTime(t *testing.T) {
	r := newTokenRig(t, nil)
	keys := counted(r)
	tok := good(nil, boundTo("me"))
	mine, yours := bearer(tok), bearer(tok)
	mine.Thumbprint, yours.Thumbprint = thumbOf("me"), thumbOf("you")
	for range 3 {
		if tok, f := r.check(mine); f != "" || !tok.Bound {
			t.Errorf("mine: %q", f)
		}
		if _, f := r.check(yours); f != FaultBinding {
			t.Errorf("yours: %q", f)
		}
	}
	if n := keys.finds.Load(); n != 1 {
		t.Errorf("verified %d times, want 1", n)
	}
}

// Rule 38: who makes tokens up fills nothing.
func TestJWTRule38FailuresAreNotKept(t *testing.T) {
	r := newTokenRig(t, nil)
	for i := range 100 {
		if _, f := r.check(bearer(good(over{"kid": fmt.Sprintf(`"k%d"`, i)}, nil))); f != FaultKey {
			t.Fatal(f)
		}
		if _, f := r.check(bearer(good(nil, over{"exp": in(-time.Hour)}))); f != FaultExpired {
			t.Fatal(f)
		}
	}
	st := r.v.state.Load()
	for i := range st.cache.shard {
		if n := len(st.cache.shard[i].held); n != 0 {
			t.Errorf("%d failures are kept", n)
		}
	}
	if _, f := r.check(bearer(good(nil, nil))); f != "" {
		t.Fatal(f)
	}
	kept := 0
	for i := range st.cache.shard {
		kept += len(st.cache.shard[i].held)
	}
	if kept != 1 {
		t.Errorf("%d tokens are kept, want 1", kept)
	}
}

func TestTokenCacheIsBounded(t *testing.T) {
	c := newTokenCache()
	key := func(i int) []byte { return fmt.Appendf(nil, "header.claims.%d", i) }
	now := time.Now()
	e := &verified{until: now.Add(time.Minute), size: 8 << 10}
	n := 2 * cacheBytes / cost(e)
	for i := range n {
		c.put(key(i), e, now)
		c.get(key(0), now)
	}
	held, total := 0, 0
	for i := range c.shard {
		s := &c.shard[i]
		if len(s.held) != s.order.Len() || s.bytes != len(s.held)*cost(e) {
			t.Errorf("shard %d: %d held, %d in order, %d bytes", i, len(s.held), s.order.Len(), s.bytes)
		}
		held += len(s.held)
		total += s.bytes
	}
	if total > cacheBytes || held < n/4 {
		t.Errorf("%d tokens of %d bytes are held", held, total)
	}
	if c.get(key(0), now) == nil {
		t.Error("the one that was used all the time is gone")
	}
	if c.get(key(n-1), now) == nil {
		t.Error("the last one is gone")
	}
	if c.get(key(0), now.Add(time.Hour)) != nil {
		t.Error("an old one counts")
	}
	c.put(key(-1), e, now.Add(time.Hour))
	if c.get(key(-1), now) != nil {
		t.Error("one that had ended was taken")
	}
}

// A signature that is known does not make another text known.
func TestJWTRule37KnownSignatureUnderAnotherText(t *testing.T) {
	r := newTokenRig(t, nil)
	keys := counted(r)
	tok := good(nil, nil)
	if _, f := r.check(bearer(tok)); f != "" {
		t.Fatal(f)
	}
	sig := tok[strings.LastIndexByte(tok, '.')+1:]
	root := good(nil, over{"sub": `"root"`})
	forged := root[:strings.LastIndexByte(root, '.')+1] + sig
	for range 2 {
		if _, f := r.check(bearer(forged)); f != FaultSignature {
			t.Errorf("the signature of one token under the text of another: %q", f)
		}
	}
	for _, part := range []string{sig, "." + sig, "x." + sig, strings.TrimSuffix(tok, sig)} {
		if _, f := r.check(bearer(part)); f == "" {
			t.Errorf("a part of the token counts: %q", part)
		}
	}
	if n := keys.finds.Load(); n != 3 {
		t.Errorf("verified %d times, want 3: once, and each forgery", n)
	}
	if got, f := r.check(bearer(tok)); f != "" || got.Subject != "alice" {
		t.Errorf("afterwards the token is %v, %q", got, f)
	}
	if n := keys.finds.Load(); n != 3 {
		t.Errorf("forgeries made the token unknown")
	}
}

// What is kept of a token cannot be shown for it.
func TestTokenCacheHoldsNoSignature(t *testing.T) {
	r := newTokenRig(t, nil)
	tok := good(nil, nil)
	if _, f := r.check(bearer(tok)); f != "" {
		t.Fatal(f)
	}
	sig := tok[strings.LastIndexByte(tok, '.')+1:]
	kept := 0
	for i := range r.v.state.Load().cache.shard {
		for _, el := range r.v.state.Load().cache.shard[i].held {
			kept++
			c := el.Value.(*cached)
			if c.signed+sig != tok {
				t.Errorf("kept %q of %q", c.signed, tok)
			}
			if text := fmt.Sprintf("%+v %+v", c.e, c.e.token); strings.Contains(text, sig) {
				t.Errorf("the signature is kept in %s", text)
			}
		}
	}
	if kept != 1 {
		t.Errorf("%d tokens are kept, want 1", kept)
	}
}

// Whatever is put, what is got was put for exactly these bytes.
func FuzzTokenCache(f *testing.F) {
	f.Add([]byte("a.b.c a.b.d a.x.c a.b.c .c c. c"))
	f.Add([]byte(".. . ... a a. .a a.a"))
	f.Fuzz(func(t *testing.T, script []byte) {
		c, now := newTokenCache(), time.Now()
		put := map[string]*verified{}
		texts := bytes.Split(script, []byte(" "))
		for i, text := range texts {
			if got := c.get(text, now); got != nil && got != put[string(text)] {
				t.Fatalf("%q gave what was put for another", text)
			}
			if i%3 != 0 {
				put[string(text)] = &verified{until: now.Add(time.Minute), size: len(text)}
				c.put(text, put[string(text)], now)
				if c.get(text, now) != put[string(text)] {
					t.Fatalf("%q is not known", text)
				}
			}
		}
	})
}

func TestVerifierIsSafeForConcurrentUse(t *testing.T) {
	r := newTokenRig(t, withAPIKey)
	tokens := []string{good(nil, nil), good(nil, over{"sub": `"bob"`}), good(nil, over{"exp": in(-time.Hour)})}
	other := r.noun
	other.Issuers = []mesh.TokenIssuer{baseIssuer()}
	other.Issuers[0].Forward = true
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			p := newProver()
			p.next = 1000 * i
			for n := range 100 {
				c := bearer(tokens[n%3])
				if _, f := r.v.Check(t.Context(), c); (f == nil) != (n%3 != 2) {
					t.Errorf("token %d: %v", n%3, f)
				}
				c = p.shows(p.token(nil), nil, nil)
				c.Method, c.Path, c.Host = "POST", "/v1/pay", "billing.mesh.internal"
				if _, f := r.v.Check(t.Context(), c); f != nil {
					t.Errorf("proof: %+v", f)
				}
			}
		})
	}
	all.Go(func() {
		for i := range 50 {
			noun := r.noun
			if i%2 == 0 {
				noun = other
			}
			set, err := CompileTokens(&noun)
			if err != nil {
				t.Error(err)
				return
			}
			r.v.Use(set)
		}
	})
	all.Wait()
}

// Rule 43: a panic is a refusal, and the next request is served.
func TestJWTRule43PanicRefuses(t *testing.T) {
	r := newTokenRig(t, nil)
	sound := r.v.cfg.Keys
	r.v.cfg.Keys = panicking{}
	if tok, f := r.check(bearer(good(nil, nil))); tok != nil || f != FaultInternal {
		t.Errorf("got %v, %q", tok, f)
	}
	r.v.cfg.Keys = sound
	if _, f := r.check(bearer(good(nil, nil))); f != "" {
		t.Errorf("afterwards: %q", f)
	}
}

type panicking struct{}

func (panicking) Find(context.Context, string, *jose.Token) (jose.Key, bool, error) { panic("no") }
func (panicking) Has(string, *jose.Token, crypto.PublicKey) bool                    { panic("no") }
func (panicking) Generation(string) uint64                                          { return 1 }

func TestVerifierConfig(t *testing.T) {
	if _, err := NewVerifier(VerifierConfig{Log: slog.New(slog.DiscardHandler)}); err == nil {
		t.Error("a verifier without keys")
	}
	if _, err := NewVerifier(VerifierConfig{Keys: panicking{}}); err == nil {
		t.Error("a verifier without log")
	}
}

// Replays are remembered for as long as a proof could come again, whatever
// becomes of the window meanwhile.
func TestReplaysAreRemembered(t *testing.T) {
	const w = time.Minute
	type step struct {
		after  time.Duration
		jti    string
		iat    time.Duration // from at
		window time.Duration
		want   replayVerdict
	}
	for name, steps := range map[string][]step{
		"one window": {
			{0, "a", 0, w, firstUse}, {0, "a", 0, w, usedBefore}, {0, "b", w, w, firstUse}, {w, "a", 0, w, usedBefore},
			{0, "c", w, w, firstUse}, {w, "b", w, w, usedBefore}, {0, "c", w, w, usedBefore}, {0, "d", 2 * w, w, firstUse}, {10 * w, "e", 12 * w, w, firstUse},
			{0, "d", 2 * w, w, forgotten},
		},
		"one that becomes longer": {
			{0, "a", 0, w, firstUse}, {2 * w, "b", 2 * w, w, firstUse}, {2 * w, "c", 4 * w, w, firstUse}, {2 * w, "d", 6 * w, w, firstUse},
			{0, "a", 0, 10 * w, forgotten}, {0, "b", 2 * w, 10 * w, forgotten}, {0, "c", 4 * w, 10 * w, forgotten}, {0, "d", 6 * w, 10 * w, usedBefore},
			{0, "e", 6*w + 1, 10 * w, firstUse}, {9 * w, "e", 6*w + 1, 10 * w, usedBefore},
		},
		"one that becomes shorter": {
			{0, "ahead", 10 * w, 10 * w, firstUse}, {w, "a", w, w, firstUse}, {4 * w, "b", 5 * w, w, firstUse}, {4 * w, "c", 9 * w, w, firstUse},
			{w, "ahead", 10 * w, w, usedBefore}, {w, "ahead", 10 * w, w, usedBefore}, {5 * w, "d", 16 * w, w, firstUse}, {0, "ahead", 10 * w, 10 * w, forgotten},
		},
		"a clock that goes forth and back": {
			{0, "a", 0, w, firstUse}, {100 * w, "b", 100 * w, w, firstUse}, {-100 * w, "a", 0, w, forgotten}, {0, "b", 100 * w, 100 * w, usedBefore},
		},
	} {
		r, now := newReplays(), at
		for i, s := range steps {
			now = now.Add(s.after)
			if got := r.use("k", s.jti, at.Add(s.iat), now, s.window); got != s.want {
				t.Errorf("%s: step %d, %s at %s: %v, want %v", name, i+1, s.jti, now.Sub(at), got, s.want)
			}
		}
	}
	r := newReplays()
	r.use("k", "c", at, at, w)
	if got := r.use("other key", "c", at, at, w); got != firstUse {
		t.Errorf("the same name by another key: %v", got)
	}
}

// However the window and the clock go, no proof counts twice, and one that is
// made now counts once.
func TestNoProofCountsTwice(t *testing.T) {
	windows := []time.Duration{time.Second, 7 * time.Second, time.Minute, 10 * time.Minute}
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 4))
		r, now, window := newReplays(), at, time.Minute
		iats, used := map[string]time.Time{}, map[string]bool{}
		for i := range 3000 {
			now = now.Add(time.Duration(rnd.Int64N(int64(10 * time.Second))))
			if rnd.IntN(50) == 0 {
				window = windows[rnd.IntN(len(windows))]
			}
			jti, iat := fmt.Sprint(rnd.IntN(i+1)), now
			if old, has := iats[jti]; has {
				iat = old
			} else if rnd.IntN(3) == 0 {
				iat = now.Add(time.Duration((2*rnd.Float64() - 1) * float64(window))).Truncate(time.Second)
			}
			if now.Sub(iat).Abs() > window {
				continue // proofClaims has refused it
			}
			iats[jti] = iat
			got := r.use("k", jti, iat, now, window)
			if got == firstUse && used[jti] {
				t.Fatalf("seed %d: %s of %s counts again at %s with a window of %s", seed, jti, iat.Sub(at), now.Sub(at), window)
			}
			if got != firstUse && !used[jti] && iat.Equal(now) {
				t.Fatalf("seed %d: a proof of this moment: %v", seed, got)
			}
			used[jti] = used[jti] || got == firstUse
		}
	}
}

// A proof that was used does not count again when the policy makes the window
// longer.
func TestALongerWindowBringsNoProofBack(t *testing.T) {
	r := newTokenRig(t, func(n *mesh.Tokens) { n.DPoP.Window = 10 * time.Second })
	p := newProver()
	tok := p.token(nil)
	first := p.shows(tok, nil, nil)
	step := func(what string, c *Credential, want FaultCode) {
		t.Helper()
		if _, got := r.check(c); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	step("first", first, "")
	for _, s := range []time.Duration{25 * time.Second, 50 * time.Second, 75 * time.Second} {
		r.now = at.Add(s)
		step("first, too late", first, FaultProof)
		step("another", p.shows(tok, nil, over{"iat": in(s)}), "")
	}
	r.noun.DPoP.Window = 5 * time.Minute
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	step("first, within the longer window", first, FaultReplay)
	step("a new one", p.shows(tok, nil, over{"iat": in(75 * time.Second)}), "")
}

func TestReplaysAreBounded(t *testing.T) {
	r := newReplays()
	use := func(k, jti string) replayVerdict { return r.use(k, jti, at, at, time.Minute) }
	r.most, r.mostEach = 64, 16
	use("first", "of all") // is alone in the generation before
	for i := range r.mostEach {
		if got := use("k", fmt.Sprint(i)); got != firstUse {
			t.Fatal(i, got)
		}
	}
	if got := use("k", "more"); got != tooMany {
		t.Errorf("more of one key: %v", got)
	}
	if got := use("other", "more"); got != firstUse {
		t.Errorf("another key is held up: %v", got)
	}
	if got := use("k", "0"); got != usedBefore {
		t.Errorf("a known one: %v", got)
	}
	for k := range 6 {
		for i := range r.mostEach {
			use(fmt.Sprint("k", k), fmt.Sprint(i))
		}
	}
	if len(r.now.used) != r.most {
		t.Errorf("%d are remembered", len(r.now.used))
	}
}

func TestNonces(t *testing.T) {
	r := newTokenRig(t, func(n *mesh.Tokens) { n.DPoP.Nonce = true })
	p := newProver()
	tok := p.token(nil)
	first := p.shows(tok, nil, nil)
	first.Method, first.Path, first.Host = "POST", "/v1/pay", "billing.mesh.internal"
	_, f := r.v.Check(t.Context(), first)
	if f == nil || f.Code != FaultNonce || f.nonce == "" {
		t.Fatalf("got %+v", f)
	}
	for _, s := range []struct {
		after time.Duration
		want  FaultCode
	}{{0, ""}, {30 * time.Second, ""}, {119 * time.Second, ""}, {120 * time.Second, FaultNonce}} {
		r.now = at.Add(s.after)
		if _, got := r.check(p.shows(tok, nil, over{"nonce": jsonText(f.nonce), "iat": in(s.after)})); got != s.want {
			t.Errorf("after %s: %q, want %q", s.after, got, s.want)
		}
	}
	var other nonces
	if other.good(f.nonce, at, time.Minute) {
		t.Error("another process takes the nonce")
	}
}

// The example of RFC 7638 section 3.1.
func TestThumbprint(t *testing.T) {
	o, err := jose.ParseObject([]byte(`{"kty":"RSA","n":"0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw","e":"AQAB"}`))
	if err != nil {
		t.Fatal(err)
	}
	k, err := jose.PublicKey(o)
	if err != nil {
		t.Fatal(err)
	}
	if got := Thumbprint(k); got != "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs" {
		t.Errorf("got %s", got)
	}
	// RFC 8037 appendix A.3.
	if o, err = jose.ParseObject([]byte(`{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`)); err != nil {
		t.Fatal(err)
	}
	if k, err = jose.PublicKey(o); err != nil {
		t.Fatal(err)
	}
	if got := Thumbprint(k); got != "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k" {
		t.Errorf("got %s", got)
	}
}
