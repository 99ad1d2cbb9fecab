package authz

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"sync"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

// proofs says what a DPoP proof may look like (RFC 9449 section 4.2).
var proofs = jose.Profile{Algs: mesh.DefaultAlgorithms, Types: []string{"dpop+jwt"}, Header: []string{"jwk"}, MaxBytes: 4 << 10}

// proof checks that the caller holds the key that the token is bound to, for
// this request and this token, once.
func (v *Verifier) proof(st *verifierState, e *verified, c *Credential, now time.Time) *Fault {
	if c.Proof == nil {
		return fault(FaultProof, "token is bound to a key, and there is no proof")
	}
	t, err := proofs.Parse(string(c.Proof))
	if err != nil {
		return fault(FaultProof, err.Error())
	}
	key, err := publicOnly(t.Header.Child("jwk"))
	if err != nil {
		return fault(FaultProof, err.Error())
	}
	if subtle.ConstantTimeCompare([]byte(Thumbprint(key)), []byte(e.cnf.jkt)) != 1 {
		return fault(FaultBinding, "proof is by another key than the token is bound to")
	}
	if err := t.Verify(jose.Key{Public: key}); err != nil {
		return fault(FaultProof, err.Error())
	}
	jti, iat, err := st.proofClaims(t, e, c, now)
	if err != nil {
		return fault(FaultProof, err.Error())
	}
	if nonce, _ := t.Claims["nonce"].(string); st.nonce && !v.nonces.good(nonce, now, st.window) {
		return &Fault{Code: FaultNonce, Detail: "proof is without a nonce of ours, or with an old one", nonce: v.nonces.at(now, st.window)}
	}
	switch v.replays.use(e.cnf.jkt, jti, iat, now, st.window) {
	case usedBefore:
		return fault(FaultReplay, "proof was used before")
	case forgotten:
		return fault(FaultReplay, "proof is older than what is remembered of proofs")
	case tooMany:
		return fault(FaultUnavailable, "more proofs than can be remembered")
	}
	return nil
}

// proofClaims checks what the proof is for.
func (st *verifierState) proofClaims(t *jose.Token, e *verified, c *Credential, now time.Time) (jti string, iat time.Time, err error) {
	if jti, err = t.Claims.Text("jti"); err != nil || len(jti) > 256 {
		return "", iat, errors.New("jti is missing or too long")
	}
	if htm, _ := t.Claims["htm"].(string); htm != c.Method {
		return "", iat, errors.New("proof is for another method")
	}
	htu, _ := t.Claims["htu"].(string)
	if !st.isHere(htu, c) {
		return "", iat, errors.New("proof is for another place")
	}
	ath, _ := t.Claims["ath"].(string)
	if ath != e.ath {
		return "", iat, errors.New("proof is for another token")
	}
	var has bool
	if iat, has, err = t.Claims.Time("iat"); err != nil || !has || now.Sub(iat).Abs() > st.window {
		return "", iat, errors.New("proof is not of this moment: check both clocks")
	}
	return jti, iat, nil
}

// isHere compares htu with what we are called and the path of the request,
// without query and fragment. The Host of the request has no say: a proof that
// was made for another service would come with that service's name.
func (st *verifierState) isHere(htu string, c *Credential) bool {
	u, err := url.Parse(htu)
	if err != nil || u.Host == "" || u.User != nil || u.Opaque != "" {
		return false
	}
	origin := normalHost(u.Scheme, u.Host)
	ours := st.origins[origin] || c.Host != "" && (origin == "http://"+c.Host || origin == "https://"+c.Host)
	path := u.EscapedPath()
	if path == "" {
		path = "/"
	}
	clean, err := http1.CleanPath(nil, []byte(path), true)
	return ours && err == nil && string(clean) == c.Path
}

// publicOnly reads the key in the header of a proof.
func publicOnly(o jose.Object) (crypto.PublicKey, error) {
	if o.HoldsSecret() {
		return nil, errors.New("jwk of the proof holds a secret")
	}
	key, err := jose.PublicKey(o)
	if err != nil {
		return nil, fmt.Errorf("jwk of the proof: %w", err)
	}
	if key == nil {
		return nil, errors.New("jwk of the proof is missing or of an unknown kind")
	}
	return key, nil
}

// Thumbprint is the name of a public key that tokens are bound to by cnf.jkt
// (RFC 7638): empty for a kind of key that tokens cannot be bound to.
func Thumbprint(key crypto.PublicKey) string {
	e := base64.RawURLEncoding.EncodeToString
	var text string
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		b, err := k.Bytes()
		if err != nil {
			return ""
		}
		half := len(b) / 2
		text = fmt.Sprintf(`{"crv":%q,"kty":"EC","x":%q,"y":%q}`, k.Params().Name, e(b[1:1+half]), e(b[1+half:]))
	case *rsa.PublicKey:
		text = fmt.Sprintf(`{"e":%q,"kty":"RSA","n":%q}`, e(big.NewInt(int64(k.E)).Bytes()), e(k.N.Bytes()))
	case ed25519.PublicKey:
		text = fmt.Sprintf(`{"crv":"Ed25519","kty":"OKP","x":%q}`, e(k))
	default:
		return ""
	}
	sum := sha256.Sum256([]byte(text))
	return e(sum[:])
}

// nonces are values that show that a proof was made a moment ago. They are
// derived from the time, so that none has to be kept; another process has
// others, and answers with its own.
type nonces struct {
	secret [32]byte
}

func (n *nonces) of(turn int64) string {
	m := hmac.New(sha256.New, n.secret[:])
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], uint64(turn))
	m.Write(b[:])
	return base64.RawURLEncoding.EncodeToString(m.Sum(nil)[:18])
}

func (n *nonces) at(now time.Time, window time.Duration) string {
	return n.of(now.UnixNano() / int64(window))
}

// good accepts the nonce of this window and of the one before.
func (n *nonces) good(s string, now time.Time, window time.Duration) bool {
	turn := now.UnixNano() / int64(window)
	this, last := n.of(turn), n.of(turn-1)
	return subtle.ConstantTimeCompare([]byte(s), []byte(this))|subtle.ConstantTimeCompare([]byte(s), []byte(last)) == 1
}

// Bounds of what is remembered of proofs, in each of two generations: 25 MB
// when both are full. With a window of one minute, one key can prove 546 calls
// a second.
const (
	mostProofs     = 1 << 18
	mostProofsEach = 1 << 16 // of one key
)

// replays remembers proofs for as long as they could be used again. When there
// are too many, no more are taken: forgetting would let one be used twice.
type replays struct {
	mu        sync.Mutex // guards the rest
	now, last generation
	of        map[string]int // proofs in now, by key
	// floor is the latest iat of what was forgotten. A policy may make the
	// window longer: what came before the floor may have been used.
	floor time.Time
	// most and mostEach are fields for tests.
	most, mostEach int
}

// A generation is proofs that are forgotten together.
type generation struct {
	used   map[[32]byte]struct{}
	newest time.Time // the latest iat
}

func newReplays() *replays {
	return &replays{most: mostProofs, mostEach: mostProofsEach, of: map[string]int{},
		now: generation{used: map[[32]byte]struct{}{}}, last: generation{used: map[[32]byte]struct{}{}}}
}

type replayVerdict int

const (
	firstUse replayVerdict = iota
	usedBefore
	forgotten
	tooMany
)

// use notes a proof, which counts from window before its iat to window after it.
func (r *replays) use(jkt, jti string, iat, now time.Time, window time.Duration) replayVerdict {
	key := sha256.Sum256([]byte(jkt + "\x00" + jti))
	r.mu.Lock()
	defer r.mu.Unlock()
	for range 2 { // after a long rest both generations are old
		r.turn(now.Add(-window))
	}
	_, a := r.now.used[key]
	_, b := r.last.used[key]
	switch {
	case a || b:
		return usedBefore
	case !iat.After(r.floor):
		return forgotten
	case len(r.now.used) >= r.most || r.of[jkt] >= r.mostEach:
		return tooMany
	}
	r.now.used[key] = struct{}{}
	r.now.newest = later(r.now.newest, iat)
	r.of[jkt]++
	return firstUse
}

// turn forgets the older generation once nothing in it counts any more: all of
// it was made before old.
func (r *replays) turn(old time.Time) {
	if !r.last.newest.Before(old) {
		return
	}
	r.floor = later(r.floor, r.last.newest)
	r.now, r.last = r.last, r.now
	clear(r.now.used)
	clear(r.of)
	r.now.newest = time.Time{}
}
