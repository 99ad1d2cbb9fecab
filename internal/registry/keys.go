package registry

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

// rootsKey is the key of the roots of the trust domain, as DER.
const rootsKey = "x509"

// ErrOtherRoot says that the issuers of a store have not one root.
var ErrOtherRoot = errors.New("this issuer has another root than the trust domain")

// ErrManyKeys says that a downstream issuer has as many keys as it may.
var ErrManyKeys = errors.New("too many JWT keys")

// A Key verifies the JWT-SVIDs of one issuer.
type Key struct {
	KeyID     string
	PublicKey crypto.PublicKey
	// ExpiresAt is when no token by the key is valid any more.
	ExpiresAt time.Time
}

// keyring is the keys of all issuers.
type keyring struct {
	mu      sync.Mutex // guards the fields below
	all     map[string]Key
	owners  map[string]string // by key ID
	changed chan struct{}
}

// keyRecord is a Key in the store.
type keyRecord struct {
	// Owner is the issuer that signs with it.
	Owner     string    `json:"owner"`
	PublicKey []byte    `json:"public_key"` // PKIX
	Expires   time.Time `json:"expires"`
}

// CheckRoot compares this issuer's root, as DER, with that of the trust
// domain. The first issuer's becomes it. Else the error is ErrOtherRoot: what
// this issuer signs would be refused by the proxies of others.
func (r *Registry) CheckRoot(ctx context.Context, root []byte) error {
	none := int64(0)
	_, err := r.write(ctx, store.Op{Kind: store.KindAuthority, Key: rootsKey, Value: root, IfRevision: &none})
	if !errors.Is(err, store.ErrConflict) {
		return err
	}
	rec, err := r.cfg.Store.Get(ctx, store.KindAuthority, rootsKey)
	switch {
	case err != nil:
		return fmt.Errorf("check root: %w", err)
	case !bytes.Equal(rec.Value, root):
		return daemon.Hint(ErrOtherRoot, "copy root.crt and root.key of the first issuer, and name their directory in ca.root_dir")
	}
	return nil
}

// PublishKeys lets the other issuers hand out the JWT keys of this one, and no
// others of it. Owner is its name over restarts. When PublishKeys returns, each
// issuer that asks the store has them.
func (r *Registry) PublishKeys(ctx context.Context, owner string, keys []Key) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.loadKeys(ctx); err != nil {
		return err
	}
	var ops []store.Op
	known, owners := r.keys.get()
	for id := range known {
		if owners[id] == owner && !slices.ContainsFunc(keys, func(k Key) bool { return k.KeyID == id }) {
			ops = append(ops, store.Op{Kind: store.KindAuthority, Key: jwtKeys + id, Delete: true})
		}
	}
	for _, k := range keys {
		if _, told := known[k.KeyID]; told {
			continue
		}
		der, err := x509.MarshalPKIXPublicKey(k.PublicKey)
		if err != nil {
			return fmt.Errorf("publish JWT key %s: %w", k.KeyID, err)
		}
		value, err := json.Marshal(keyRecord{owner, der, k.ExpiresAt.UTC()})
		if err != nil {
			return fmt.Errorf("publish JWT key %s: %w", k.KeyID, err)
		}
		ops = append(ops, store.Op{Kind: store.KindAuthority, Key: jwtKeys + k.KeyID, Value: value, Expires: k.ExpiresAt})
	}
	if len(ops) == 0 {
		return nil
	}
	if _, err := r.write(ctx, ops...); err != nil {
		return fmt.Errorf("publish JWT keys: %w", err)
	}
	return r.loadKeys(ctx)
}

// maxOwnedKeys bounds the keys of one downstream issuer.
const maxOwnedKeys = 16

// AddKey publishes one more key of a downstream issuer, durably. The owner is
// its SPIFFE ID: that tells it from the names of the issuers of this store. The
// error is mesh.ErrExists when the key ID is another key's.
func (r *Registry) AddKey(ctx context.Context, owner string, k Key) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.loadKeys(ctx); err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(k.PublicKey)
	if err != nil {
		return fmt.Errorf("publish JWT key %s: %w", k.KeyID, err)
	}
	known, owners := r.keys.get()
	n := 0
	for id, of := range owners {
		if of == owner && known[id].ExpiresAt.After(r.cfg.Now()) {
			n++
		}
	}
	old, there := known[k.KeyID]
	switch {
	case there && (owners[k.KeyID] != owner || !samePublic(old.PublicKey, der)):
		return fmt.Errorf("JWT key %s %w", k.KeyID, mesh.ErrExists)
	case there && old.ExpiresAt.Equal(k.ExpiresAt):
		return nil
	case !there && n >= maxOwnedKeys:
		return fmt.Errorf("%w: %s has %d", ErrManyKeys, owner, n)
	}
	value, err := json.Marshal(keyRecord{owner, der, k.ExpiresAt.UTC()})
	if err != nil {
		return fmt.Errorf("publish JWT key %s: %w", k.KeyID, err)
	}
	if _, err := r.write(ctx, store.Op{Kind: store.KindAuthority, Key: jwtKeys + k.KeyID, Value: value, Expires: k.ExpiresAt}); err != nil {
		return fmt.Errorf("publish JWT key %s: %w", k.KeyID, err)
	}
	return r.loadKeys(ctx)
}

func samePublic(key crypto.PublicKey, der []byte) bool {
	have, err := x509.MarshalPKIXPublicKey(key)
	return err == nil && bytes.Equal(have, der)
}

// Keys returns the JWT keys of every issuer that are not past their end, by
// key ID. One of a downstream issuer counts while an entry says that it is one.
func (r *Registry) Keys() []Key {
	all, owners := r.keys.get()
	now := r.cfg.Now()
	downstream := map[string]bool{}
	if slices.ContainsFunc(slices.Collect(maps.Values(owners)), isID) {
		for _, e := range r.Entries() {
			if e.Downstream && !e.Lapsed(now) {
				downstream[e.SPIFFEID.String()] = true
			}
		}
	}
	var out []Key
	for _, id := range slices.Sorted(maps.Keys(all)) {
		if k := all[id]; k.ExpiresAt.After(now) && (!isID(owners[id]) || downstream[owners[id]]) {
			out = append(out, k)
		}
	}
	return out
}

// dropKeys forgets the JWT keys of downstream issuers that are none any more: an
// entry that is made again is for a new key. mu is held.
func (r *Registry) dropKeys(ctx context.Context) error {
	if err := r.loadKeys(ctx); err != nil {
		return err
	}
	below := downstreams(r.state.Load().entries)
	_, owners := r.keys.get()
	var ops []store.Op
	for id, owner := range owners {
		if isID(owner) && !below[owner] {
			ops = append(ops, store.Op{Kind: store.KindAuthority, Key: jwtKeys + id, Delete: true})
		}
	}
	if len(ops) == 0 {
		return nil
	}
	if _, err := r.write(ctx, ops...); err != nil {
		return fmt.Errorf("forget JWT keys: %w", err)
	}
	return r.loadKeys(ctx)
}

// isID tells the owner of a key that is a downstream issuer.
func isID(owner string) bool { return strings.HasPrefix(owner, "spiffe://") }

// KeysChanged returns a channel that is closed when Keys next change.
func (r *Registry) KeysChanged() <-chan struct{} {
	r.keys.mu.Lock()
	defer r.keys.mu.Unlock()
	return r.keys.changed
}

// get returns the keys, which the caller must not change.
func (k *keyring) get() (all map[string]Key, owners map[string]string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.all, k.owners
}

// loadKeys reads the keys of all issuers. mu is held.
func (r *Registry) loadKeys(ctx context.Context) error {
	records, err := r.prefixed(ctx, store.KindAuthority, jwtKeys)
	if err != nil {
		return fmt.Errorf("load JWT keys: %w", err)
	}
	all, owners := make(map[string]Key, len(records)), make(map[string]string, len(records))
	for _, rec := range records {
		var kr keyRecord
		if err := json.Unmarshal(rec.Value, &kr); err != nil {
			return fmt.Errorf("load JWT key %q: %w", rec.Key, err)
		}
		public, err := x509.ParsePKIXPublicKey(kr.PublicKey)
		if err != nil {
			return fmt.Errorf("load JWT key %q: %w", rec.Key, err)
		}
		id := strings.TrimPrefix(rec.Key, jwtKeys)
		owners[id] = kr.Owner
		all[id] = Key{KeyID: id, PublicKey: public, ExpiresAt: kr.Expires}
	}
	r.keys.mu.Lock()
	defer r.keys.mu.Unlock()
	same := maps.EqualFunc(r.keys.all, all, func(a, b Key) bool { return a.ExpiresAt.Equal(b.ExpiresAt) })
	r.keys.all, r.keys.owners = all, owners
	if same {
		return nil
	}
	close(r.keys.changed)
	r.keys.changed = make(chan struct{})
	return nil
}
