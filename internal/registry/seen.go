package registry

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"sallyport/internal/attest"
	"sallyport/internal/store"
)

// Claim ties evidence to the key that showed it first, until a time or for
// ever. It is attest.Seen: the error is attest.ErrSeen for another key, or the
// store's.
func (r *Registry) Claim(ctx context.Context, what, key [32]byte, until time.Time) error {
	name, mine := seenKey(what), hex.EncodeToString(key[:])
	for {
		rec, err := r.cfg.Store.Get(ctx, store.KindToken, name)
		switch {
		case err == nil && string(rec.Value) == mine:
			return nil
		case err == nil:
			return attest.ErrSeen
		case !errors.Is(err, store.ErrNotFound):
			return fmt.Errorf("claim evidence: %w", err)
		}
		none := int64(0)
		_, err = r.write(ctx, store.Op{Kind: store.KindToken, Key: name, Value: []byte(mine), IfRevision: &none, Expires: until})
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, store.ErrConflict):
			return fmt.Errorf("claim evidence: %w", err)
		}
		// Another key, or the same twice, was faster; the next round says.
	}
}

func seenKey(what [32]byte) string { return "seen/" + hex.EncodeToString(what[:]) }
