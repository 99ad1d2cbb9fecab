package authz

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync/atomic"
	"time"

	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

// Keys knows the keys of issuers of tokens, by the name that iss= compares
// with. It is safe for concurrent use.
type Keys interface {
	// Find gives the key that signed the token; known is false when the issuer
	// has none such, and an error says that this cannot be known now.
	Find(ctx context.Context, issuer string, t *jose.Token) (key jose.Key, known bool, err error)
	// Generation changes whenever the keys of the issuer do. Zero means that
	// there are none.
	Generation(issuer string) uint64
	// Has reports whether Find would give this key for the token, by what is
	// known now. It asks nobody.
	Has(issuer string, t *jose.Token, key crypto.PublicKey) bool
}

// VerifierConfig is what a Verifier needs.
type VerifierConfig struct {
	// Keys are those of the issuers. Required.
	Keys Keys
	// Log receives panics. Required.
	Log *slog.Logger
	// Now is the clock. Default time.Now.
	Now func() time.Time
}

// A Verifier checks what a request shows of its caller. It is safe for
// concurrent use and holds no goroutine.
type Verifier struct {
	cfg     VerifierConfig
	state   atomic.Pointer[verifierState]
	replays *replays
	nonces  nonces
	limits  *limits
	secret  [32]byte // makes what is kept of an API key useless elsewhere
}

// NewVerifier returns a Verifier that knows no issuer and takes no credential.
func NewVerifier(cfg VerifierConfig) (*Verifier, error) {
	if cfg.Keys == nil || cfg.Log == nil {
		return nil, errors.New("token verifier: keys or log: missing")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	v := &Verifier{cfg: cfg, replays: newReplays(), limits: newLimits()}
	rand.Read(v.secret[:])
	rand.Read(v.nonces.secret[:])
	return v, nil
}

// verifierState is tokens.yaml ready to check by. It is immutable but for its
// cache, which goes with it: what was revoked does not survive in it.
type verifierState struct {
	noun    *mesh.Tokens
	text    []byte // of the noun, to see whether a new one differs
	issuers map[string]*issuer
	first   jose.Profile // accepts what any issuer could, to learn which it is
	revoked map[string]*revocations
	keys    *apiKeys
	cache   *tokenCache
	drop    []string
	// bearer and dpop are the schemes that are possible.
	bearer, dpop bool
	origins      map[string]bool
	window       time.Duration
	nonce        bool
}

// An issuer is a mesh.TokenIssuer ready to check by.
type issuer struct {
	name    string
	cfg     mesh.TokenIssuer
	rules   string // of cfg, to compare
	profile jose.Profile
	claims  jose.Claims
}

// A TokenSet is tokens.yaml ready to check by, for one Verifier. Nil takes no
// credential.
type TokenSet struct{ st *verifierState }

// CompileTokens makes the set of tokens.yaml; of nil, the nil set.
func CompileTokens(t *mesh.Tokens) (*TokenSet, error) {
	if t.Empty() {
		return nil, nil
	}
	text, err := json.Marshal(t)
	if err != nil {
		return nil, fmt.Errorf("compile tokens: %w", err)
	}
	st, err := newState(t)
	if err != nil {
		return nil, fmt.Errorf("compile tokens: %w", err)
	}
	st.noun, st.text = t, text
	return &TokenSet{st}, nil
}

// Issuers are those whose keys are needed.
func (s *TokenSet) Issuers() []mesh.TokenIssuer {
	if s == nil {
		return nil
	}
	return s.st.noun.Issuers
}

// Use puts a set in force for all calls from now on. When it says what the one
// before said, that one stays, with the tokens that it knows.
func (v *Verifier) Use(s *TokenSet) {
	if s == nil {
		v.limits.use(nil)
		v.state.Store(nil)
		return
	}
	if old := v.state.Load(); old == nil || !bytes.Equal(old.text, s.st.text) {
		v.limits.use(s.st.noun.APIKeys)
		v.state.Store(s.st)
	}
}

// APIKeyHeader is where an API key is looked for, empty when there is none.
func (v *Verifier) APIKeyHeader() string {
	if st := v.state.Load(); st != nil && st.keys != nil {
		return st.keys.header
	}
	return ""
}

// Active says that there is something to check credentials by.
func (v *Verifier) Active() bool { return v.state.Load() != nil }

// A Credential is what a request shows of its caller: views that are not kept.
type Credential struct {
	// Authorization, Proof and APIKey are the values of the fields
	// Authorization, DPoP and APIKeyHeader; nil when absent.
	Authorization, Proof, APIKey []byte
	// Doubled says that one of them was there twice.
	Doubled bool
	// InQuery says that a token stood in the query.
	InQuery bool
	// Method and Path are those of the request, the path as it is judged.
	Method, Path string
	// Host is our name in the mesh, empty when there is none.
	Host string
	// Thumbprint is the SHA-256 of the certificate that the peer of this
	// connection proved to hold.
	Thumbprint [32]byte

	// Drop is filled by Check. It names the headers that no caller may bring
	// past us: those that tell the application of claims, and the credentials
	// that were for us. The slice is the same one until the next Use that
	// changes something.
	Drop []string
}

// Check verifies what the request shows. No token and no fault means that it
// shows nothing that is for us: whether that is enough is for the rows to say.
func (v *Verifier) Check(ctx context.Context, c *Credential) (t *Token, f *Fault) {
	st := v.state.Load()
	if st == nil {
		return nil, nil
	}
	c.Drop = st.drop
	defer func() {
		if p := recover(); p != nil {
			v.cfg.Log.Error("checking a credential panicked; the call was refused", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			t, f = nil, fault(FaultInternal, "checking the credential failed")
		}
	}()
	scheme, text, f := st.scheme(c.Authorization)
	switch {
	case f != nil:
		return nil, f
	case c.Doubled, c.InQuery && len(st.issuers) > 0:
		return nil, fault(FaultRequest, "more than one credential, or one in the query")
	case st.keys != nil && c.APIKey != nil:
		if scheme != 0 {
			return nil, fault(FaultRequest, "a token and an API key: one of them is meant")
		}
		return v.apiKey(ctx, st, c)
	case scheme == 0:
		return nil, nil
	}
	return v.token(ctx, st, c, scheme, text)
}

// The schemes of RFC 6750 and RFC 9449.
const (
	schemeBearer = 1
	schemeDPoP   = 2
)

// scheme tells a credential that is for us from any other, and takes it apart.
func (st *verifierState) scheme(auth []byte) (scheme int, token []byte, f *Fault) {
	if auth == nil || len(st.issuers) == 0 {
		return 0, nil, nil
	}
	name, rest, spaced := bytes.Cut(auth, []byte(" "))
	switch {
	case bytes.EqualFold(name, []byte("Bearer")):
		scheme = schemeBearer
	case bytes.EqualFold(name, []byte("DPoP")):
		scheme = schemeDPoP
	default:
		// A lenient application might read as Bearer what we do not.
		if !isScheme(name) {
			return 0, nil, fault(FaultRequest, "Authorization does not begin with a scheme")
		}
		return 0, nil, nil
	}
	if !spaced || len(rest) == 0 || holdsAny(rest, ' ', '\t', ',') {
		return 0, nil, fault(FaultRequest, "Authorization is not a scheme, one blank and a token")
	}
	return scheme, rest, nil
}

// holdsAny is bytes.ContainsAny at the speed of the machine: a token of 2 KB is
// searched for each call.
func holdsAny(b []byte, chars ...byte) bool {
	for _, c := range chars {
		if bytes.IndexByte(b, c) >= 0 {
			return true
		}
	}
	return false
}

// isScheme accepts the characters that the names of schemes are made of.
func isScheme(name []byte) bool {
	for _, c := range name {
		letter := c|0x20 >= 'a' && c|0x20 <= 'z'
		if !letter && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return false
		}
	}
	return len(name) > 0
}

// maxCached is how long a token counts as verified without being looked at.
const maxCached = 5 * time.Minute

// token checks a token, or finds that it was checked.
func (v *Verifier) token(ctx context.Context, st *verifierState, c *Credential, scheme int, text []byte) (*Token, *Fault) {
	if len(text) > mostToken {
		return nil, fault(FaultForm, "token is too long")
	}
	now := v.cfg.Now()
	e := st.cache.get(text, now)
	if e == nil || e.generation != v.cfg.Keys.Generation(e.issuer.name) {
		var f *Fault
		if e, f = v.verify(ctx, st, string(text), now); f != nil {
			return nil, f
		}
		if e.generation != 0 {
			st.cache.put(text, e, now)
		}
	}
	if st.revoked != nil && st.revoked[e.issuer.name].holds(e) {
		return nil, fault(FaultRevoked, "token was revoked")
	}
	if f := v.bound(st, e, c, scheme, now); f != nil {
		return nil, f
	}
	return e.token, nil
}

// A verified is a token that was checked.
type verified struct {
	token      *Token
	issuer     *issuer
	generation uint64    // of the issuer's keys
	until      time.Time // it is known without being looked at
	ends       time.Time // it counts
	names      jose.Token
	key        crypto.PublicKey
	size       int // bytes that the cache counts for it
	cnf        confirmation
	ath        string // what a proof calls the token, if it needs one
	jti        string
	issued     time.Time
}

// bound holds a token to the key that it names, for each request anew.
func (v *Verifier) bound(st *verifierState, e *verified, c *Credential, scheme int, now time.Time) *Fault {
	switch want := e.issuer.cfg.Binding; {
	case want == mesh.BindCert && !e.cnf.cert, want == mesh.BindDPoP && e.cnf.jkt == "", want == mesh.BindEither && !e.cnf.bound():
		return fault(FaultBinding, "token is not bound, its issuer must bind it")
	case e.cnf.cert && subtle.ConstantTimeCompare(e.cnf.x5t[:], c.Thumbprint[:]) != 1:
		return fault(FaultBinding, "token is bound to another certificate than that of this connection")
	case e.cnf.jkt == "" && scheme == schemeDPoP:
		return fault(FaultBinding, "token is not bound to a key, but shown as if it were")
	case e.cnf.jkt == "":
		return nil
	case scheme != schemeDPoP:
		return fault(FaultBinding, "token is bound to a key, but shown without a proof")
	}
	return v.proof(st, e, c, now)
}

// shortHash stands for a text in the audit.
func shortHash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:8])
}
