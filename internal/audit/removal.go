package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const (
	// keptSuffix names the evidence of what was removed from a log, plannedSuffix
	// that of a removal which may not have begun.
	keptSuffix    = ".kept"
	plannedSuffix = ".kept.planned"

	removalHead = "sallyport audit removal\n"
	// maxRemoval bounds the evidence: eight levels of 255 hashes are the most
	// that a tree of 2^63 records has.
	maxRemoval = 512 << 10
)

// A removal is the evidence of records that are no longer there: what they were,
// and what the log that is left goes on from. Each one takes the place of the
// one before; that is in the chain.
type removal struct {
	// Log is the hash of record 1. It names the log.
	Log sum `json:"log"`
	// First to Last are the records that this one removed; what is kept begins
	// after Last.
	First uint64    `json:"first"`
	Last  uint64    `json:"last"`
	Since time.Time `json:"since"`
	Until time.Time `json:"until"`
	// At is when, Rule by which rule of the configuration.
	At   time.Time `json:"at"`
	Rule string    `json:"rule"`
	// Prev is the hash of the line of Last, Root of the tree up to it.
	Prev  sum        `json:"prev"`
	Root  sum        `json:"root"`
	Files []goneFile `json:"files"`
	// After is the newest record, at the time, of the log that has the record of
	// the removal.
	After uint64 `json:"after"`
	// Tree is the right side of the tree up to Last, by level.
	Tree [][]sum `json:"tree"`
}

// goneFile is a file that was removed.
type goneFile struct {
	Name string `json:"name"`
	Hash sum    `json:"sha256"`
}

// sum is a hash that is hex in JSON.
type sum hash

func (s sum) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, s[:]), nil }

func (s *sum) UnmarshalText(b []byte) error {
	if n, err := hex.Decode(s[:], b[:min(len(b), 2*len(s))]); err != nil || n != len(s) || len(b) != 2*len(s) {
		return errors.New("not a SHA-256 in hex")
	}
	return nil
}

// text is what is signed.
func (r *removal) text() (string, error) {
	b, err := json.Marshal(r)
	return removalHead + string(b) + "\n", err
}

// edge is the tree of the records that were removed, up to Last. A nil removal
// removed none.
func (r *removal) edge() (e edge) {
	if r == nil {
		return e
	}
	e.size = r.Last
	for _, level := range r.Tree {
		hs := make([]tlog.Hash, 0, tileWidth)
		for _, h := range level {
			hs = append(hs, tlog.Hash(h))
		}
		e.levels = append(e.levels, hs)
	}
	return e
}

func (r *removal) setEdge(e edge) {
	r.Root, r.Tree = sum(e.root()), make([][]sum, len(e.levels))
	for i, hs := range e.levels {
		r.Tree[i] = make([]sum, 0, len(hs))
		for _, h := range hs {
			r.Tree[i] = append(r.Tree[i], sum(h))
		}
	}
}

// last is the newest record that was removed, 0 of a nil removal.
func (r *removal) last() uint64 {
	if r == nil {
		return 0
	}
	return r.Last
}

// name is the hash of record 1, which names the log.
func (r *removal) name() hash {
	if r == nil {
		return hash{}
	}
	return hash(r.Log)
}

// prev is what the first record that is kept holds.
func (r *removal) prev() hash {
	if r == nil {
		return hash{}
	}
	return hash(r.Prev)
}

// covers says that a file put aside, by its name, holds only records that were
// removed.
func (r *removal) covers(path, name string) bool {
	digits := strings.TrimPrefix(name, path+".")
	first, err := strconv.ParseUint(digits, 10, 64)
	return r != nil && err == nil && len(digits) == 20 && first <= r.Last
}

// A signedRemoval is evidence as it is in its file.
type signedRemoval struct {
	*removal
	signed []byte
}

// readRemoval reads the evidence in a file, and whether it makes sense; who has
// signed it is not looked at. Both are nil when there is no file.
func readRemoval(name string) (s signedRemoval, err error) {
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	if s.removal, err = parseRemoval(b); err != nil {
		return s, fmt.Errorf("%s: %w", filepath.Base(name), err)
	}
	s.signed = b
	return s, nil
}

func parseRemoval(b []byte) (*removal, error) {
	text, _, _ := strings.Cut(string(b), "\n\n")
	body, ok := strings.CutPrefix(text, removalHead)
	if !ok || len(b) > maxRemoval {
		return nil, errors.New("it is no evidence of a removal")
	}
	d := json.NewDecoder(strings.NewReader(body))
	d.DisallowUnknownFields()
	r := new(removal)
	if err := d.Decode(r); err != nil {
		return nil, fmt.Errorf("it is no evidence of a removal: %w", err)
	}
	if again, err := r.text(); err != nil || again != text+"\n" {
		return nil, errors.New("evidence of a removal is not in the form in which it was written")
	}
	if r.First == 0 || r.Last < r.First || len(r.Tree) > 8 {
		return nil, fmt.Errorf("evidence of a removal of records %d to %d", r.First, r.Last)
	}
	for level, hs := range r.Tree {
		if n := r.Last >> (level * tileHeight) % tileWidth; uint64(len(hs)) != n {
			return nil, fmt.Errorf("evidence of a removal has %d hashes at level %d of the tree of %d records, not %d", len(hs), level, r.Last, n)
		}
	}
	if e := r.edge(); r.Last>>(len(r.Tree)*tileHeight) > 0 || sum(e.root()) != r.Root {
		return nil, errors.New("evidence of a removal contradicts itself: its hashes do not make its root")
	}
	return r, nil
}

// signedBy says if the evidence has a good signature of a key.
func (s signedRemoval) signedBy(v note.Verifier) error {
	_, err := note.Open(s.signed, note.VerifierList(v))
	return err
}

// digest is the hash of what was signed, by which the record of the removal
// names it.
func (s signedRemoval) digest() (hash, error) {
	text, err := s.text()
	return sha256.Sum256([]byte(text)), err
}

// kept reads the evidence of what was removed from the log at path. It is nil
// when nothing was.
func kept(path string) (signedRemoval, error) { return readRemoval(path + keptSuffix) }

const removedDigest = "; evidence "

// record is what the log says of a removal: all of it but the hashes that only
// a program has a use for, of which it has the digest. When it cannot be kept
// nothing is removed, and no refusal is counted.
func (s signedRemoval) record(log string) (Record, error) {
	digest, err := s.digest()
	var files []string
	for _, f := range s.Files {
		n := len(f.Name)
		files = append(files, f.Name[max(0, n-20):]+" "+hex.EncodeToString(f.Hash[:]))
	}
	rule, _, _ := strings.Cut(s.Rule, " ")
	return Record{
		Kind: KindRemoved, Reason: strings.TrimPrefix(rule, ruleOf), Count: s.Last - s.First + 1, Total: s.Last, From: s.Since, Done: true, Open: true,
		Detail: fmt.Sprintf("records %d to %d of %s, %s to %s, by %s; last %x; root %x; files %s%s%x", s.First, s.Last, log,
			s.Since.Format(time.RFC3339), s.Until.Format(time.RFC3339), s.Rule, s.Prev, s.Root, strings.Join(files, " "), removedDigest, digest),
	}, err
}

// tells says if a record is that of a removal with this digest.
func tells(r *Record, digest hash) bool {
	return r.Kind == KindRemoved && strings.HasSuffix(r.Detail, removedDigest+hex.EncodeToString(digest[:]))
}

// beginning is the oldest record that is kept by rule, 1 unless some were removed.
func beginning(path string) (uint64, error) {
	gone, err := kept(path)
	return gone.last() + 1, err
}

// Begin says how a log begins: the hash of its record 1, which names it, and the
// oldest record that is there. The hash is known when that is record 1, or when
// those before were removed with evidence; otherwise it is of the oldest.
func Begin(path string) (id [32]byte, first uint64, known bool, err error) {
	gone, name, line, err := oldest(path)
	if err != nil {
		return id, 0, false, err
	}
	first, ok := lineSeq(line)
	if !ok {
		return id, 0, false, fmt.Errorf("%s does not start with an audit record", name)
	}
	if gone.removal != nil {
		return hash(gone.Log), first, true, nil
	}
	return sha256.Sum256(line), first, first == 1, nil
}

// oldest is the oldest file of a log, with its first line, and what is said to have
// been removed before it. It looks again when that file was removed meanwhile.
func oldest(path string) (gone signedRemoval, name string, line []byte, err error) {
	for {
		if gone, err = kept(path); err != nil {
			return gone, "", nil, err
		}
		names, err := Segments(path)
		if err != nil {
			return gone, "", nil, err
		}
		if line, err = firstLine(names[0]); !errors.Is(err, fs.ErrNotExist) || names[0] == name {
			return gone, names[0], line, err
		}
		name = names[0]
	}
}

// firstLine is the first line of a file, with its line feed.
func firstLine(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	buf := make([]byte, maxLine)
	n, err := f.ReadAt(buf, 0)
	i := bytes.IndexByte(buf[:n], '\n')
	if i < 0 {
		return nil, errors.Join(err, fmt.Errorf("%s does not start with an audit record", name))
	}
	return slices.Clone(buf[:i+1]), nil
}
