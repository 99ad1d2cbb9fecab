package audit

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/tlog"
)

// A Proof shows that a record is in a log, to who has neither the log nor access
// to it: the record, the hashes beside its way up the tree, and the checkpoint
// that signs the root.
type Proof struct {
	Seq        uint64   `json:"seq"`
	Record     string   `json:"record"`
	Hashes     [][]byte `json:"hashes"`
	Checkpoint string   `json:"checkpoint"`
	// Key verifies the signature of the log.
	Key string `json:"key"`
}

// Prove makes the proof for record seq of the log at path, on the newest
// checkpoint that a witness has signed, or else on the log's own.
func Prove(path string, seq uint64) (p Proof, err error) {
	dir := TreeDir(path)
	key, err := os.ReadFile(filepath.Join(dir, verifierFile))
	if err != nil {
		return p, fmt.Errorf("prove record %d: %w", seq, err)
	}
	p.Seq, p.Key = seq, strings.TrimSpace(string(key))
	public, err := publicKey(p.Key)
	if err != nil {
		return p, err
	}
	var c Checkpoint
	for _, file := range []string{cosignedFile, checkpointFile} {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return p, fmt.Errorf("prove record %d: %w", seq, err)
		}
		name, _, _ := strings.Cut(string(b), "\n")
		p.Checkpoint, p.Key = string(b), verifierText(name, public)
		if c, err = OpenCheckpoint(b, p.Key); err != nil {
			return p, fmt.Errorf("prove record %d: %s: %w", seq, file, err)
		}
		if c.Size >= seq {
			break
		}
	}
	if seq == 0 || c.Size < seq {
		return p, fmt.Errorf("prove record %d: the newest checkpoint speaks of %d records", seq, c.Size)
	}
	r := tlog.TileHashReader(tlog.Tree{N: int64(c.Size), Hash: tlog.Hash(c.Root)}, tiles(dir)) //nolint:gosec // at most 63 bits
	hs, err := tlog.ProveRecord(int64(c.Size), int64(seq-1), r)                                //nolint:gosec // as above
	if err != nil {
		return p, fmt.Errorf("prove record %d: %w", seq, err)
	}
	p.Hashes = hashes(hs)
	gone, err := kept(path)
	if err == nil && gone.last() >= seq {
		err = goneError(gone)
	}
	if err != nil {
		return p, fmt.Errorf("prove record %d: %w", seq, err)
	}
	err = readLines(path, seq-1, seq, func(b []byte) error { p.Record = string(b); return nil })
	if err != nil {
		return p, fmt.Errorf("prove record %d: %w", seq, err)
	}
	return p, nil
}

// Proved is what a proof shows.
type Proved struct {
	Record Record
	// Owner is whose log it is in; the zero LogOwner when no witness has signed
	// under a name.
	Owner LogOwner
	// Signed is when a witness signed it; zero when none of those given has.
	Signed time.Time
}

// Check returns what the proof shows to who trusts the witnesses.
func (p Proof) Check(witnesses []string) (out Proved, err error) {
	c, at, err := OpenCosigned([]byte(p.Checkpoint), p.Key, witnesses)
	if err != nil && !errors.Is(err, errNoWitness) {
		return out, err
	}
	hs, err := parseHashes(p.Hashes)
	if err != nil {
		return out, err
	}
	if p.Seq == 0 || p.Seq > c.Size {
		return out, fmt.Errorf("record %d is not among the %d of the checkpoint", p.Seq, c.Size)
	}
	err = tlog.CheckRecord(hs, int64(c.Size), tlog.Hash(c.Root), int64(p.Seq-1), tlog.RecordHash([]byte(p.Record))) //nolint:gosec // at most 63 bits
	if err != nil {
		return out, fmt.Errorf("record %d is not what was signed: %w", p.Seq, err)
	}
	r, _, err := ParseLine([]byte(p.Record))
	if err == nil && r.Seq != p.Seq {
		err = fmt.Errorf("it is record %d, not %d", r.Seq, p.Seq)
	}
	if err != nil {
		return out, err
	}
	out.Record, out.Signed = r, at
	if !at.IsZero() {
		out.Owner, _ = ParseLogName(c.Origin)
	}
	return out, nil
}
