package authz

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/argon2"

	"sallyport/internal/mesh"
)

// The form of a key that NewAPIKey makes: a beginning that scanners for leaked
// secrets can look for, and 256 random bits.
const apiKeyPrefix = "slyk_"

// Bounds of the text of a key, bytes.
const minAPIKey, maxAPIKey = 16, 256

// NewAPIKey makes a random key and its hash for tokens.yaml.
func NewAPIKey() (key, hash string) {
	var b [32]byte
	rand.Read(b[:])
	key = apiKeyPrefix + base64.RawURLEncoding.EncodeToString(b[:])
	return key, sha256Hash([]byte(key))
}

// IsRandomAPIKey says that a key has the form that NewAPIKey gives it.
func IsRandomAPIKey(key []byte) bool {
	text, ours := strings.CutPrefix(string(key), apiKeyPrefix)
	b, err := base64.RawURLEncoding.Strict().DecodeString(text)
	return ours && err == nil && len(b) == 32
}

func sha256Hash(key []byte) string {
	sum := sha256.Sum256(key)
	return mesh.SHA256Prefix + hex.EncodeToString(sum[:])
}

// HashAPIKey gives the hash of a key for tokens.yaml: sha256 of one that is
// random, argon2id of one that a person has chosen.
func HashAPIKey(key []byte, random bool) (string, error) {
	if err := checkAPIKey(key); err != nil {
		return "", err
	}
	if random {
		return sha256Hash(key), nil
	}
	a := mesh.Argon2{Memory: 19 << 10, Time: 2, Threads: 1, Salt: make([]byte, 16)}
	rand.Read(a.Salt)
	a.Sum = argon(&a, key, 32)
	return a.String(), nil
}

func checkAPIKey(key []byte) error {
	if len(key) < minAPIKey || len(key) > maxAPIKey {
		return fmt.Errorf("key has %d bytes, want %d to %d", len(key), minAPIKey, maxAPIKey)
	}
	for _, c := range key {
		if c <= ' ' || c >= 0x7f {
			return errors.New("key holds a blank or a character beyond ASCII")
		}
	}
	return nil
}

func argon(a *mesh.Argon2, key []byte, size uint32) []byte {
	return argon2.IDKey(key, a.Salt, a.Time, a.Memory, a.Threads, size)
}

// apiKeys are the keys of tokens.yaml ready to compare.
type apiKeys struct {
	header string
	// random are found by the first half of their hash, slow are tried in turn.
	random map[[16]byte]*apiKey
	slow   []slowKey
	byHash map[string]*apiKey // by how tokens.yaml has it
	turn   chan struct{}      // held while slow hashes are computed

	mu sync.Mutex // guards the rest
	// known are keys that a slow hash was computed for, by an HMAC; trying are
	// those for which it is being computed.
	known  map[[32]byte]*apiKey
	trying map[[32]byte]*guess
	// next is when a peer may show another unknown key, by its certificate.
	next map[[32]byte]time.Time
	// guessing has the peers whose unknown key is being compared.
	guessing map[[32]byte]bool
}

// A guess is one comparison of an unknown key, for all who show it now. Its
// fields count once done is closed.
type guess struct {
	done chan struct{}
	key  *apiKey // nil: no key of ours
	busy bool    // not compared
}

type apiKey struct {
	name  string
	sum   [32]byte
	until time.Time // zero: no end
	token *Token
}

type slowKey struct {
	hash mesh.Argon2
	key  *apiKey
}

const (
	// slowEvery is between two unknown keys of one peer: guessing is slow, and
	// does not keep others waiting.
	slowEvery = 200 * time.Millisecond
	mostKnown = 1024 // keys, and peers that are made to wait
)

func compileKeys(t *mesh.Tokens) (*apiKeys, error) {
	ks := &apiKeys{header: t.APIKeyHeader, random: map[[16]byte]*apiKey{}, byHash: map[string]*apiKey{}, turn: make(chan struct{}, 1),
		known: map[[32]byte]*apiKey{}, trying: map[[32]byte]*guess{}, next: map[[32]byte]time.Time{}, guessing: map[[32]byte]bool{}}
	if ks.header == "" {
		ks.header = mesh.DefaultAPIKeyHeader
	}
	for i := range t.APIKeys {
		cfg := &t.APIKeys[i]
		tok := &Token{
			Issuer: mesh.APIKeyIssuer, Subject: cfg.Name, Scopes: map[string]bool{}, Claims: map[string]string{},
			record: fmt.Sprintf("API key %q", cfg.Name),
		}
		maps.Copy(tok.Claims, cfg.Claims)
		tok.Claims["iss"], tok.Claims["sub"] = mesh.APIKeyIssuer, cfg.Name
		tok.ACR = level(cfg.Claims["acr"])
		for _, s := range cfg.Scopes {
			tok.Scopes[s] = true
		}
		for _, h := range cfg.Hashes {
			one := *tok
			one.basis.hash = h
			k := &apiKey{name: cfg.Name, until: cfg.NotAfter, token: &one}
			ks.byHash[h] = k
			if err := ks.add(k, h); err != nil {
				return nil, fmt.Errorf("API key %s: %w", cfg.Name, err)
			}
		}
	}
	return ks, nil
}

func (ks *apiKeys) add(k *apiKey, hash string) error {
	if err := mesh.CheckKeyHash(hash); err != nil {
		return err
	}
	s, random := strings.CutPrefix(hash, mesh.SHA256Prefix)
	if !random {
		a, err := mesh.ParseArgon2(hash)
		ks.slow = append(ks.slow, slowKey{a, k})
		return err
	}
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(k.sum) {
		return errors.New("hash is malformed")
	}
	k.sum = [32]byte(b)
	ks.random[[16]byte(b)] = k
	return nil
}

// apiKey finds whose key it is.
func (v *Verifier) apiKey(ctx context.Context, st *verifierState, c *Credential) (*Token, *Fault) {
	now, text := v.cfg.Now(), c.APIKey
	if checkAPIKey(text) != nil {
		return nil, unknownKey()
	}
	// How long the look-up takes tells of a hash, from which no key follows.
	sum := sha256.Sum256(text)
	k := st.keys.random[[16]byte(sum[:16])]
	if k != nil && subtle.ConstantTimeCompare(k.sum[:], sum[:]) != 1 {
		k = nil
	}
	if k == nil && len(st.keys.slow) > 0 {
		m := hmac.New(sha256.New, v.secret[:])
		m.Write(text)
		var busy bool
		if k, busy = st.keys.slowKey(ctx, [32]byte(m.Sum(nil)), c.Thumbprint, text, v.cfg.Now); busy {
			return nil, fault(FaultRate, "more unknown API keys than are compared in this time")
		}
	}
	if k == nil || k.ended(now) {
		return nil, unknownKey()
	}
	if !v.limits.allow(k.name, now) {
		return nil, fault(FaultRate, fmt.Sprintf("API key %q makes more calls than it may", k.name))
	}
	return k.token, nil
}

func unknownKey() *Fault { return fault(FaultAPIKey, "API key is unknown or has ended") }

// slowKey finds a key that was compared before by its name, an HMAC, or has it
// compared: once for all who show it now, and one key of a peer at a time.
func (ks *apiKeys) slowKey(ctx context.Context, name, peer [32]byte, text []byte, clock func() time.Time) (k *apiKey, busy bool) {
	now := clock()
	ks.mu.Lock()
	k, g := ks.known[name], ks.trying[name]
	if k != nil {
		ks.mu.Unlock()
		return k, false
	}
	if g != nil {
		ks.mu.Unlock()
		select {
		case <-g.done:
			return g.key, g.busy
		case <-ctx.Done():
			return nil, true
		}
	}
	if ks.guessing[peer] || now.Before(ks.next[peer]) || !ks.delay(peer, now) {
		ks.mu.Unlock()
		return nil, true
	}
	g = &guess{done: make(chan struct{}), busy: true}
	ks.trying[name], ks.guessing[peer] = g, true
	ks.mu.Unlock()
	defer func() {
		ks.mu.Lock()
		defer ks.mu.Unlock()
		delete(ks.trying, name)
		delete(ks.guessing, peer)
		if g.key != nil {
			if len(ks.known) >= mostKnown {
				clear(ks.known)
			}
			ks.known[name] = g.key
			delete(ks.next, peer)
		} else {
			ks.next[peer] = clock().Add(slowEvery)
		}
		close(g.done)
	}()
	select {
	case ks.turn <- struct{}{}:
		defer func() { <-ks.turn }()
		g.key, g.busy = ks.compare(text), false
	case <-ctx.Done():
	}
	return g.key, g.busy
}

// delay makes a peer wait before its next unknown key; false when too many are
// waiting. It is called with the lock held.
func (ks *apiKeys) delay(peer [32]byte, now time.Time) bool {
	if len(ks.next) >= mostKnown {
		maps.DeleteFunc(ks.next, func(_ [32]byte, t time.Time) bool { return !now.Before(t) })
	}
	if len(ks.next) >= mostKnown {
		return false
	}
	ks.next[peer] = now.Add(slowEvery)
	return true
}

// compare computes each slow hash of the text, whether one has fitted or not.
func (ks *apiKeys) compare(text []byte) (k *apiKey) {
	for i := range ks.slow {
		s := &ks.slow[i]
		if subtle.ConstantTimeCompare(argon(&s.hash, text, uint32(len(s.hash.Sum))), s.hash.Sum) == 1 {
			k = s.key
		}
	}
	return k
}

// limits bound the calls with each key, over changes of the policy.
type limits struct {
	mu sync.Mutex // guards of
	of map[string]*limit
}

// A limit allows as many calls at once as fit into its time, and then one for
// each step.
type limit struct {
	rate mesh.Rate
	// free is when all calls that were allowed have had their step.
	free time.Time
}

func newLimits() *limits { return &limits{of: map[string]*limit{}} }

// use takes over the rates of the policy; a rate that is as before keeps its
// count.
func (l *limits) use(keys []mesh.APIKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	next := map[string]*limit{}
	for _, k := range keys {
		if k.Rate == (mesh.Rate{}) {
			continue
		}
		if old := l.of[k.Name]; old != nil && old.rate == k.Rate {
			next[k.Name] = old
		} else {
			next[k.Name] = &limit{rate: k.Rate}
		}
	}
	l.of = next
}

func (l *limits) allow(name string, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.of[name]
	if b == nil {
		return true
	}
	if b.free.Before(now) {
		b.free = now
	}
	free := b.free.Add(b.rate.Per / time.Duration(b.rate.Calls))
	if free.Sub(now) > b.rate.Per {
		return false
	}
	b.free = free
	return true
}
