package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/mod/sumdb/tlog"
)

// CopyName names the file of the issuer's copy of a log. SPIFFE path segments
// hold neither '~' nor '@', so that two logs never share a name; one too long
// for a file is hashed.
func CopyName(workload, agent spiffeid.ID) string {
	flat := func(s string) string { return strings.ReplaceAll(s, "/", "~") }
	name := flat(strings.TrimPrefix(workload.Path(), "/")) + "@" + flat(strings.TrimPrefix(agent.Path(), agentPath))
	if len(name) > 200 { // a file system takes 255, and names are added to
		sum := sha256.Sum256([]byte(name))
		name = "long-" + hex.EncodeToString(sum[:])
	}
	return name + ".jsonl"
}

// HeadsOf picks the heads of the log that the file with a name is a copy of.
func HeadsOf(heads []Head, copyName string) (out []Head, owner LogOwner) {
	for _, h := range heads {
		if o, ok := ParseLogName(h.Name); ok && o.Issuer == "" && CopyName(o.Workload, o.Agent) == copyName {
			out, owner = append(out, h), o
		}
	}
	return out, owner
}

// ProveCopy makes the proof for record seq of a log whose tree is not here: of
// the copy that an issuer keeps. It stands on the newest of the heads that fits
// the copy.
func ProveCopy(path string, seq uint64, heads []Head) (p Proof, err error) {
	gone, err := kept(path)
	if err == nil && gone.last() >= seq && seq > 0 {
		err = goneError(gone)
	}
	var h Head
	if err == nil {
		h, err = fitting(path, seq, heads, gone.removal)
	}
	if err != nil {
		return p, fmt.Errorf("prove record %d: %w", seq, err)
	}
	p = Proof{Seq: seq, Checkpoint: string(h.Note), Key: h.Key}
	way := beside(seq-1, 0, h.Size)
	order := slices.Clone(way)
	slices.SortFunc(order, func(a, b *stretch) int { return int(a.from) - int(b.from) }) //nolint:gosec // counts records
	n := gone.last()
	e := gone.edge()
	before := e.spine()
	for _, s := range order {
		s.begin(before)
	}
	err = readLines(path, n, h.Size, func(b []byte) error {
		if n == seq-1 {
			p.Record = string(b)
		} else {
			for n >= order[0].to {
				order = order[1:]
			}
			order[0].tree.add(tlog.RecordHash(b))
		}
		n++
		return nil
	})
	if err != nil {
		return p, fmt.Errorf("prove record %d: %w", seq, err)
	}
	for _, s := range way {
		root := s.tree.root()
		p.Hashes = append(p.Hashes, bytes.Clone(root[:]))
	}
	return p, nil
}

// A stretch is the records of one subtree, from and to not included.
type stretch struct {
	from, to uint64
	tree     spine
}

// begin takes what was removed from the subtree. Nothing in it is divided: a
// subtree of what was removed that is not whole in this one holds the leaf.
func (s *stretch) begin(gone spine) {
	at := uint64(0)
	for _, n := range gone.nodes {
		if at >= s.from && at+n.width <= s.to {
			s.tree.push(n)
		}
		at += n.width
	}
}

func goneError(gone signedRemoval) error {
	k := Kept{From: gone.Last + 1, Removed: gone.Last, At: gone.At, Rule: gone.Rule}
	return fmt.Errorf("it was removed: the log is %v", &k)
}

// beside lists the subtrees next to the way from a leaf up to the root of the
// leaves given, the lowest first (RFC 6962, section 2.1.1).
func beside(leaf, from, to uint64) []*stretch {
	if to-from <= 1 {
		return nil
	}
	half := uint64(1)
	for half*2 < to-from {
		half *= 2
	}
	if mid := from + half; leaf < mid {
		return append(beside(leaf, from, mid), &stretch{from: mid, to: to})
	}
	return append(beside(leaf, from+half, to), &stretch{from: from, to: from + half})
}

func keepNothing(int, uint64, []tlog.Hash) error { return nil }

var errNoneFits = errors.New("no head that was given fits")

// fitting finds the newest head whose tree is that of the copy's first records.
func fitting(path string, seq uint64, heads []Head, gone *removal) (best Head, err error) {
	last, err := LastSeq(path)
	if err != nil {
		return best, err
	}
	var all []Head
	for _, newest := range heads {
		all = append(append(all, newest), newest.Before...)
	}
	all = slices.DeleteFunc(all, func(h Head) bool { return seq == 0 || h.Size < seq || h.Size > last })
	if len(all) == 0 {
		return best, fmt.Errorf("%w: none that was given speaks of it and is within the %d records of the copy", errNoneFits, last)
	}
	slices.SortFunc(all, func(a, b Head) int { return int(a.Size) - int(b.Size) }) //nolint:gosec // counts records
	e := gone.edge()
	tree := e.spine()
	err = readLines(path, tree.size, all[len(all)-1].Size, func(b []byte) error {
		tree.add(tlog.RecordHash(b))
		for ; len(all) > 0 && all[0].Size == tree.size; all = all[1:] {
			c, err := OpenCheckpoint(all[0].Note, all[0].Key)
			if root := tree.root(); err == nil && c.Size == tree.size && bytes.Equal(c.Root[:], root[:]) {
				best = all[0]
			}
		}
		return nil
	})
	if err == nil && best.Size == 0 {
		err = fmt.Errorf("%w the copy: it is of another log, or was changed", errNoneFits)
	}
	return best, err
}
