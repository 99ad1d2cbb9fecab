package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

var (
	// ErrForked is returned for a checkpoint that contradicts what the witness
	// has signed: the log was changed, or continued twice.
	ErrForked = errors.New("audit log was changed: its tree does not continue what was cosigned")
	// ErrCut is returned for a log that is shorter than what was cosigned.
	ErrCut = errors.New("audit log was cut: it is shorter than what was cosigned")
	// ErrWrongName is returned for a checkpoint that is not signed under the
	// name of who asks: the log of another, or an attempt to pass for it.
	ErrWrongName = errors.New("audit log is signed under another name than that of who asks")
	// ErrTooSoon is returned for a log with another key while the one before was
	// signed less than logsApart ago.
	ErrTooSoon = errors.New("another audit log takes the place of one that was cosigned a moment ago; ask again later")
	// ErrOtherLog is returned when a log with another key takes the place of
	// one. It is kept beside the other from then on.
	ErrOtherLog = errors.New("another audit log has taken the place of one that was cosigned")
)

// A Heads keeps the heads of logs by name, for all issuers alike.
type Heads interface {
	// Load returns a head and its revision; nil and 0 when there is none.
	Load(ctx context.Context, name string) (head []byte, revision int64, err error)
	// Save replaces the head if it is at the revision; false when it was
	// changed meanwhile.
	Save(ctx context.Context, name string, head []byte, revision int64) (bool, error)
}

// A Head is the newest state of one log that a witness has signed.
type Head struct {
	// Name is whose log it is.
	Name string `json:"name"`
	// Key is the verifier key of the log, Size and Root what was signed, Note
	// the checkpoint with all signatures, Time when.
	Key  string    `json:"key"`
	Size uint64    `json:"size"`
	Root []byte    `json:"root"`
	Note []byte    `json:"note"`
	Time time.Time `json:"time"`
	// Before are the heads of earlier logs of the same name, newest last, at
	// most keepHeads.
	Before []Head `json:"before,omitempty"`
}

// keepHeads bounds the heads of earlier logs: who wipes its log again and again
// fills nothing.
const keepHeads = 8

// logsApart is the least time between two logs of one name: whoever makes one
// after the other to have the first forgotten needs keepHeads times as long, and
// every time is told.
const logsApart = time.Minute

// ParseHead reads a head as a Witness saved it.
func ParseHead(b []byte) (h Head, err error) {
	if err := json.Unmarshal(b, &h); err != nil {
		return h, fmt.Errorf("head of an audit log: %w", err)
	}
	return h, nil
}

// A Witness cosigns the checkpoints of logs that only grow. It is safe for
// concurrent use, and so are several on the same Heads.
type Witness struct {
	key   *noteKey
	heads Heads
}

// OpenWitness opens the witness whose key is in dir, or makes a key.
func OpenWitness(dir string, heads Heads) (*Witness, error) {
	key, name, err := openKey(filepath.Join(dir, "witness.key"), "sallyport-witness-")
	if err != nil {
		return nil, fmt.Errorf("open audit witness: %w", err)
	}
	return &Witness{key: &noteKey{name: name, alg: algCosigned, key: key, now: time.Now}, heads: heads}, nil
}

// Key is what verifies the witness's signatures.
func (w *Witness) Key() string { return w.key.verifier() }

// A CosignRequest asks for a signature.
type CosignRequest struct {
	// Key is the verifier key of the log, Checkpoint what it has signed.
	Key        string
	Checkpoint []byte
	// Proof shows that the log of OldSize is the beginning of it.
	OldSize uint64
	Proof   [][]byte
}

// maxProof bounds the hashes of a proof: twice the height of the highest tree.
const maxProof = 128

// Cosign signs the checkpoint of the log with a name, which the checkpoint must
// have as its origin, when it continues the one
// signed last. have is the size signed last: when it is not the OldSize of the
// request, there is no signature and the request is to be made again with it.
// ErrOtherLog comes together with a signature.
func (w *Witness) Cosign(ctx context.Context, name string, q CosignRequest) (cosignature []byte, have uint64, err error) {
	if len(q.Proof) > maxProof || len(q.Key) > 4<<10 {
		return nil, 0, errors.New("cosign: the request is too large")
	}
	c, err := OpenCheckpoint(q.Checkpoint, q.Key)
	if err != nil {
		return nil, 0, fmt.Errorf("cosign: %w", err)
	}
	if c.Origin != name {
		return nil, 0, fmt.Errorf("%w: %s, not %s", ErrWrongName, cut(c.Origin, 300), name)
	}
	raw, revision, err := w.heads.Load(ctx, name)
	if err != nil {
		return nil, 0, fmt.Errorf("cosign: %w", err)
	}
	var head Head
	if raw != nil {
		if head, err = ParseHead(raw); err != nil {
			return nil, 0, err
		}
	}
	next, other := head.under(q.Key)
	switch {
	case q.OldSize != next.Size:
		// Not yet a contradiction, even if the checkpoint is the smaller one:
		// a request that was slow is overtaken by the one after it.
		return nil, next.Size, nil
	case other && head.Time.After(w.key.now().Add(-logsApart)):
		return nil, next.Size, ErrTooSoon
	}
	if err := next.continued(c, q.Proof); err != nil {
		return nil, next.Size, err
	}
	signed, err := w.sign(q.Checkpoint, q.Key)
	if err != nil {
		return nil, 0, fmt.Errorf("cosign: %w", err)
	}
	next.Name, next.Key, next.Size, next.Root, next.Note, next.Time = name, q.Key, c.Size, c.Root[:], signed, w.key.now().UTC()
	if raw, err = json.Marshal(next); err != nil {
		return nil, 0, fmt.Errorf("cosign: %w", err)
	}
	switch ok, err := w.heads.Save(ctx, name, raw, revision); {
	case err != nil:
		return nil, 0, fmt.Errorf("cosign: %w", err)
	case !ok:
		return nil, head.Size, errors.New("cosign: the head was changed meanwhile; ask again")
	}
	if other {
		return signed, c.Size, ErrOtherLog
	}
	return signed, c.Size, nil
}

// under is the head of the log with a key among those of one name, as the
// newest. other says that there was one and it had another key.
func (h Head) under(key string) (next Head, other bool) {
	if h.Key == key || h.Key == "" {
		return h, false
	}
	before := append(h.Before, Head{Name: h.Name, Key: h.Key, Size: h.Size, Root: h.Root, Note: h.Note, Time: h.Time})
	for i, b := range before {
		if b.Key == key { // the earlier log again: it may not forget, either
			next = b
			before = append(before[:i:i], before[i+1:]...)
			break
		}
	}
	next.Before = before[max(0, len(before)-keepHeads):]
	return next, true
}

// continued says how a checkpoint contradicts the head.
func (h Head) continued(c Checkpoint, proof [][]byte) error {
	var root tlog.Hash
	copy(root[:], h.Root)
	switch {
	case h.Size == 0:
		return nil
	case c.Size < h.Size:
		return fmt.Errorf("%w: it has %d records, %d were cosigned at %s", ErrCut, c.Size, h.Size, h.Time.Format(time.RFC3339))
	case c.Size == h.Size && tlog.Hash(c.Root) == root:
		return nil
	case c.Size == h.Size:
		return fmt.Errorf("%w: two trees of %d records", ErrForked, c.Size)
	}
	p, err := parseHashes(proof)
	if err == nil {
		err = tlog.CheckTree(p, int64(c.Size), tlog.Hash(c.Root), int64(h.Size), root) //nolint:gosec // parsed as at most 63 bits
	}
	if err != nil {
		return fmt.Errorf("%w: from %d to %d records: %w", ErrForked, h.Size, c.Size, err)
	}
	return nil
}

// sign adds a cosignature to a checkpoint and returns all of it.
func (w *Witness) sign(checkpoint []byte, key string) ([]byte, error) {
	v, err := note.NewVerifier(key)
	if err != nil {
		return nil, err
	}
	n, err := note.Open(checkpoint, note.VerifierList(v))
	if err != nil {
		return nil, err
	}
	n.UnverifiedSigs = nil // what others have signed is not vouched for
	return note.Sign(n, w.key)
}
