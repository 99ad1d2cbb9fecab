package registry

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/attest"
	"sallyport/internal/store"
)

const (
	// DefaultTokenTTL and MaxTokenTTL bound how long a join token may wait.
	DefaultTokenTTL = 10 * time.Minute
	MaxTokenTTL     = 7 * 24 * time.Hour
	// Grace is how long the key that redeemed a token may do so again, because
	// the answer was lost on the way.
	Grace = 5 * time.Minute
	// remembered is how long after its end a token is still told from one
	// that never was.
	remembered = 30 * 24 * time.Hour
	// maxAgentName is the longest agent name, in bytes.
	maxAgentName = 128
)

// Why a token is refused. Each message ends with what to do, and each is
// attest.ErrEvidence: trying again does not help.
var (
	ErrTokenUnknown error = refusal("join token is unknown; create a new one: sallyport token create")
	ErrTokenExpired error = refusal("join token has expired; create a new one: sallyport token create")
	ErrTokenUsed    error = refusal("join token was already used; create a new one: sallyport token create")
)

type refusal string

func (r refusal) Error() string { return string(r) }

// Is makes a refusal count as refused evidence.
func (refusal) Is(target error) bool { return target == attest.ErrEvidence }

// ErrBadAgentName says that no SPIFFE ID can be made with a name.
var ErrBadAgentName = errors.New("agent name refused")

// token is a join token in the store, under the hash of its text in hex. The
// text itself is known only to who created it.
type token struct {
	Agent   string    `json:"agent"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	// KeyHash is that of the key which redeemed the token, in hex; empty
	// before.
	KeyHash  string    `json:"key_hash,omitempty"`
	Redeemed time.Time `json:"redeemed,omitzero"`
}

// CheckAgentName says why a name cannot be the last segment of an agent's
// SPIFFE ID, or nil.
func CheckAgentName(td spiffeid.TrustDomain, name string) error {
	if name == "" {
		return fmt.Errorf("%w: it is empty; give one, such as web-1", ErrBadAgentName)
	}
	if len(name) > maxAgentName {
		return fmt.Errorf("%w: it has %d bytes, at most %d are allowed", ErrBadAgentName, len(name), maxAgentName)
	}
	if _, err := spiffeid.FromSegments(td, "spire", "agent", "join_token", name); err != nil {
		return fmt.Errorf("%w: %q may hold letters, digits, and . - _ only, and not be . or ..", ErrBadAgentName, name)
	}
	return nil
}

// CreateToken makes a join token that lets one key become the named agent. The
// text is 64 hex digits, 256 random bits, and is not kept. A ttl of 0 means
// DefaultTokenTTL.
func (r *Registry) CreateToken(ctx context.Context, agentName string, ttl time.Duration) (text string, expires time.Time, err error) {
	if err := CheckAgentName(r.cfg.TrustDomain, agentName); err != nil {
		return "", time.Time{}, err
	}
	if ttl == 0 {
		ttl = DefaultTokenTTL
	}
	if ttl < time.Second || ttl > MaxTokenTTL {
		return "", time.Time{}, fmt.Errorf("create join token: the lifetime %s must be between 1s and %s", ttl, MaxTokenTTL)
	}
	var secret [32]byte
	rand.Read(secret[:]) // never fails
	text = hex.EncodeToString(secret[:])
	now := r.cfg.Now().UTC().Round(0)
	expires = now.Add(ttl)
	none := int64(0)
	op, err := tokenOp(sha256.Sum256([]byte(text)), token{Agent: agentName, Created: now, Expires: expires}, &none)
	if err != nil {
		return "", time.Time{}, err
	}
	if _, err := r.write(ctx, op); err != nil {
		return "", time.Time{}, fmt.Errorf("create join token: %w", err)
	}
	return text, expires, nil
}

// Redeem uses a token up for a key and returns the name of the agent that the
// key becomes. The hashes are SHA-256, of the token's text and of the public
// key. The first key wins; it alone may redeem again, within Grace. The errors
// are ErrTokenUnknown, ErrTokenExpired and ErrTokenUsed, or the store's.
func (r *Registry) Redeem(ctx context.Context, tokenHash, keyHash [32]byte, now time.Time) (agentName string, err error) {
	if now.IsZero() {
		now = r.cfg.Now()
	}
	key := hex.EncodeToString(keyHash[:])
	for {
		rec, err := r.cfg.Store.Get(ctx, store.KindToken, hex.EncodeToString(tokenHash[:]))
		if errors.Is(err, store.ErrNotFound) {
			return "", ErrTokenUnknown
		}
		if err != nil {
			return "", fmt.Errorf("redeem join token: %w", err)
		}
		var t token
		if err := json.Unmarshal(rec.Value, &t); err != nil {
			return "", fmt.Errorf("redeem join token: %w", err)
		}
		switch {
		case t.KeyHash == key && now.Sub(t.Redeemed) < Grace:
			return t.Agent, nil
		case t.KeyHash != "":
			return "", ErrTokenUsed
		case !now.Before(t.Expires):
			return "", ErrTokenExpired
		}
		t.KeyHash, t.Redeemed = key, now.UTC().Round(0)
		op, err := tokenOp(tokenHash, t, &rec.Revision)
		if err != nil {
			return "", err
		}
		_, err = r.write(ctx, op)
		switch {
		case err == nil:
			return t.Agent, nil
		case !errors.Is(err, store.ErrConflict):
			return "", fmt.Errorf("redeem join token: %w", err)
		}
		// Another key was faster; the next round says which answer that is.
	}
}

func tokenOp(hash [32]byte, t token, at *int64) (store.Op, error) {
	value, err := json.Marshal(t)
	if err != nil {
		return store.Op{}, fmt.Errorf("encode join token: %w", err)
	}
	return store.Op{
		Kind: store.KindToken, Key: hex.EncodeToString(hash[:]), Value: value,
		IfRevision: at, Expires: t.Expires.Add(remembered),
	}, nil
}
