// Package store keeps what an issuer must not forget: records by kind and key,
// and the list of changes that orders every write.
//
// It knows nothing of what the records mean. Each backend passes the suite in
// storetest. A store at rest holds no goroutine; expiry is read from the clock
// when a call asks.
package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// A Kind names a family of records. Keys are unique within a kind.
type Kind string

// The kinds an issuer keeps.
const (
	KindEntry     Kind = "entry"
	KindPolicy    Kind = "policy"
	KindEndpoint  Kind = "endpoint"
	KindBundle    Kind = "bundle"
	KindAuthority Kind = "authority"
	KindToken     Kind = "token"
	KindAgent     Kind = "agent"
	KindLease     Kind = "lease"
	KindRollout   Kind = "rollout"
	// KindAuditHead is the newest state of an audit log that was cosigned.
	KindAuditHead Kind = "audithead"
	// KindIssued is what was given out, KindRevocation what was taken back.
	KindIssued     Kind = "issued"
	KindRevocation Kind = "revocation"
	// KindEdges is who called whom in a stretch of time.
	KindEdges Kind = "edges"
	// KindFaultStop are the faults that an operator has stopped.
	KindFaultStop Kind = "faultstop"
)

// Limits that every backend holds to.
const (
	// MaxKey is the longest kind or key, in bytes.
	MaxKey = 1024
	// MaxValue is the largest value, in bytes: a policy of 100,000 long rows.
	MaxValue = 24 << 20
	// MaxPage is the most rows that one List or Changes returns.
	MaxPage = 10_000
	// KeepChanges is how many of the newest changes are kept at least.
	KeepChanges = 100_000
)

var (
	// ErrNotFound says that no live record has the kind and key.
	ErrNotFound = errors.New("record not found")
	// ErrConflict says that a record was not at the revision a write expected.
	// Nothing was written.
	ErrConflict = errors.New("record changed meanwhile")
	// ErrInvalid says that a call can never succeed as it stands, such as an
	// empty key. Nothing was written.
	ErrInvalid = errors.New("invalid request")
	// ErrCompacted says that changes after the given revision are no longer
	// all kept: read the Revision, list everything, and go on from there.
	ErrCompacted = errors.New("changes are compacted")
	// ErrClosed says that the store was closed.
	ErrClosed = errors.New("store is closed")
)

// A Record is one value as it was last written.
type Record struct {
	Kind Kind
	Key  string
	// Value is the caller's own copy, never nil.
	Value []byte
	// Revision is that of the write that made this value; at least 1.
	Revision int64
	// Expires is when the record ceases to exist, UTC, to the microsecond.
	// Zero means never.
	Expires time.Time
}

// An Op is one step of a Write: it puts or deletes a record.
type Op struct {
	Kind Kind
	// Key is UTF-8 without NUL, 1 to MaxKey bytes.
	Key string
	// Value is what to put, up to MaxValue bytes. Ignored by a delete.
	Value []byte
	// Delete removes the record. Deleting what is absent changes nothing.
	Delete bool
	// IfRevision, when set, lets the whole Write succeed only if the record is
	// at this revision; 0 means it must not exist. An expired record does not
	// exist.
	IfRevision *int64
	// Expires is when the record ceases to exist, rounded down to the
	// microsecond. Zero means never. A put replaces the earlier expiry.
	Expires time.Time
}

// A Change says that a record was put or deleted. Expiry makes no change: who
// cares for it keeps Expires.
type Change struct {
	Revision int64
	Kind     Kind
	Key      string
	Deleted  bool
	// At is when it was written by the clock of the store, UTC. Only Revision
	// orders changes: a clock may step back.
	At time.Time
}

// A Store is durable state, shared by everything that runs in an issuer.
// Every method is safe for concurrent use. None retries for the caller, except
// that waiting for another writer is inside Write, bounded by ctx.
//
// A read sees every Write that returned before the read began, and one moment:
// never a part of a Write. Expired records are invisible to every read.
type Store interface {
	// Get returns one record, or ErrNotFound.
	Get(ctx context.Context, kind Kind, key string) (Record, error)

	// List returns the records of a kind whose key is greater than after, in
	// byte order of the key, at most limit of them (0 or more than MaxPage
	// means MaxPage). The next page begins after the last key; pages are not
	// one moment together.
	List(ctx context.Context, kind Kind, after string, limit int) ([]Record, error)

	// Write applies the ops in order, all or none, serialised with every other
	// Write. When it returns nil the ops survive a crash of the process, the
	// system and the power. Each op that changes something takes the next
	// revision; Write returns the last one taken, or the current revision if
	// nothing changed. ErrConflict and ErrInvalid promise that nothing was
	// written; after any other error the caller must read to know.
	Write(ctx context.Context, ops ...Op) (revision int64, err error)

	// Revision returns the revision of the newest change, 0 before the first.
	Revision(ctx context.Context) (int64, error)

	// Changes returns the changes after a revision, oldest first, at most limit
	// of them (0 or more than MaxPage means MaxPage). Revisions only grow: once
	// a change was seen, none with a smaller revision appears. At least the
	// newest KeepChanges are kept; if some after the given revision are gone,
	// the error is ErrCompacted.
	Changes(ctx context.Context, after int64, limit int) ([]Change, error)

	// Watch blocks until the revision is greater than after and returns it: at
	// once if it is already. It sees the writes of every process, those of
	// others within two seconds. Who asks again with what was returned, and
	// reads Changes in between, misses none.
	Watch(ctx context.Context, after int64) (revision int64, err error)

	// Close ends each Watch, waits for calls under way and releases everything. Every later
	// call returns ErrClosed, but Close itself may be called again.
	Close() error
}

// check says why an op can never be written, or nil.
func (o Op) check() error {
	if err := checkName("kind", string(o.Kind)); err != nil {
		return err
	}
	if err := checkName("key", o.Key); err != nil {
		return err
	}
	if o.Delete {
		return nil
	}
	if len(o.Value) > MaxValue {
		return fmt.Errorf("%w: the value of %s %q has %d bytes, at most %d are kept", ErrInvalid, o.Kind, o.Key, len(o.Value), MaxValue)
	}
	if !o.Expires.IsZero() && o.Expires.UnixMicro() <= 0 {
		return fmt.Errorf("%w: %s %q expires before 1970", ErrInvalid, o.Kind, o.Key)
	}
	return nil
}

func checkName(what, s string) error {
	switch {
	case s == "":
		return fmt.Errorf("%w: the %s is empty", ErrInvalid, what)
	case len(s) > MaxKey:
		return fmt.Errorf("%w: the %s has %d bytes, at most %d are kept", ErrInvalid, what, len(s), MaxKey)
	case !utf8.ValidString(s) || strings.ContainsRune(s, 0):
		return fmt.Errorf("%w: the %s is not UTF-8 text without NUL", ErrInvalid, what)
	}
	return nil
}

// page turns a limit as asked into the limit that holds.
func page(limit int) int {
	if limit <= 0 || limit > MaxPage {
		return MaxPage
	}
	return limit
}
