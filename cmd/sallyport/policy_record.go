package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/daemon"
	"sallyport/internal/policyset"
)

const (
	// recordFile is where the record is in the user's directory of states.
	recordFile = "sallyport/signed.json"
	// maxRecord bounds what is read of it, bytes, and keepRecorded how many sets
	// of a trust domain it names: more than an issuer keeps.
	maxRecord    = 1 << 20
	keepRecorded = 64
)

// A recordedState is how far a set has come that was signed here.
type recordedState string

const (
	// signedOnly is handed to an issuer, which has not said that it took it.
	signedOnly recordedState = "signed"
	// signedBack goes with one that is tried, to go back by.
	signedBack recordedState = "fallback"
	tried      recordedState = "tried"
	inForce    recordedState = "in force"
)

// A recordedSet is a set that was signed with this record, or seen in force
// with the signatures of its keys.
type recordedSet struct {
	TrustDomain spiffeid.TrustDomain `json:"trust_domain"`
	Revision    uint64               `json:"revision"`
	Hash        string               `json:"hash"`
	State       recordedState        `json:"state"`
	Time        time.Time            `json:"time"`
}

// A record is what a signer knows without asking an issuer: which sets its keys
// have signed, and which of them it saw in force. While it is open no other
// command signs with it.
type record struct {
	file string
	lock *os.File
	sets []recordedSet // by trust domain and revision
}

// defaultRecord is the file of the record of whoever runs this.
func defaultRecord() (string, error) {
	dir := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(dir) {
		home, err := os.UserHomeDir()
		if err != nil || !filepath.IsAbs(home) {
			return "", usage(errors.New("there is no home directory to keep the record of what is signed in: name a file with --record"))
		}
		dir = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(dir, recordFile), nil
}

// openRecord reads a record, which need not be there yet; "" is the default.
func openRecord(file string) (*record, error) {
	if file == "" {
		var err error
		if file, err = defaultRecord(); err != nil {
			return nil, err
		}
	}
	dir := filepath.Dir(file)
	if err := daemon.OwnDir("--record", dir); err != nil {
		return nil, failed(err)
	}
	lock, err := os.Open(dir)
	if err != nil {
		return nil, failed(fmt.Errorf("open record: %w", err))
	}
	r := &record{file: file, lock: lock}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		err = daemon.Hint(fmt.Errorf("another sallyport signs with the record %s", file), "wait for it, and try again")
		return nil, failed(errors.Join(err, lock.Close()))
	}
	if err := r.read(); err != nil {
		err = daemon.Hint(fmt.Errorf("record %s of what was signed here: %w", file, err), "mend it, or put it away and say what is in force with --in-force")
		return nil, failed(errors.Join(err, lock.Close()))
	}
	return r, nil
}

// Close lets others sign with it.
func (r *record) Close() error { return r.lock.Close() }

func (r *record) read() error {
	f, err := os.OpenFile(r.file, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	// Who may write it says what gets signed.
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("others may use it (mode %04o): chmod 600 it", info.Mode().Perm())
	}
	b, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	switch {
	case err != nil:
		return err
	case len(b) > maxRecord:
		return fmt.Errorf("more than %d bytes", maxRecord)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var all struct {
		Sets []recordedSet `json:"sets"`
	}
	if err := d.Decode(&all); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("something follows the record")
	}
	for i, s := range all.Sets {
		if s.TrustDomain.IsZero() || s.Revision < 1 || s.Revision > policyset.MaxRevision || !policyset.IsHash(s.Hash) ||
			!slices.Contains([]recordedState{signedOnly, signedBack, tried, inForce}, s.State) {
			return fmt.Errorf("sets[%d]: not a set with trust_domain, revision, hash and state", i)
		}
	}
	r.sets = all.Sets
	return nil
}

// save puts it on disk.
func (r *record) save() error {
	slices.SortFunc(r.sets, func(a, b recordedSet) int {
		return cmp.Or(a.TrustDomain.Compare(b.TrustDomain), cmp.Compare(a.Revision, b.Revision), cmp.Compare(a.Hash, b.Hash))
	})
	b, err := json.MarshalIndent(map[string]any{"sets": r.sets}, "", "  ")
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	return daemon.WriteFile(r.file, append(b, '\n'), 0o600)
}

// sign signs a set and notes it, unless another one was signed under its revision.
func (r *record) sign(s *policyset.Signed, keys signers, state recordedState) error {
	if hash := r.hash(s.TrustDomain, s.Revision); hash != "" && hash != s.Hash() {
		return failed(fmt.Errorf("revision %d was signed here already, as set %s; take a higher one", s.Revision, hash))
	}
	keys.sign(s)
	if !r.has(s) {
		r.note(s, state)
	}
	return nil
}

// note says how far a set has come, and forgets the oldest of too many.
func (r *record) note(s *policyset.Signed, state recordedState) {
	at := time.Now().UTC().Truncate(time.Second)
	for i := range r.sets {
		if old := &r.sets[i]; old.TrustDomain == s.TrustDomain && old.Hash == s.Hash() {
			old.State, old.Time = state, at
			return
		}
	}
	r.sets = append(r.sets, recordedSet{s.TrustDomain, s.Revision, s.Hash(), state, at})
	if all := r.of(s.TrustDomain); len(all) > keepRecorded {
		r.sets = slices.DeleteFunc(r.sets, func(old recordedSet) bool { return old == all[0] })
	}
}

// of are the sets of a trust domain in one of some states, or in any, in the
// order of their revisions.
func (r *record) of(td spiffeid.TrustDomain, states ...recordedState) (out []recordedSet) {
	for _, s := range r.sets {
		if s.TrustDomain == td && (len(states) == 0 || slices.Contains(states, s.State)) {
			out = append(out, s)
		}
	}
	slices.SortStableFunc(out, func(a, b recordedSet) int { return cmp.Compare(a.Revision, b.Revision) })
	return out
}

// newest is the highest revision among them, 0 without any.
func (r *record) newest(td spiffeid.TrustDomain, states ...recordedState) uint64 {
	if all := r.of(td, states...); len(all) > 0 {
		return all[len(all)-1].Revision
	}
	return 0
}

// only reports whether all sets are of a trust domain, and there are some.
func (r *record) only(td spiffeid.TrustDomain) bool {
	return len(r.sets) > 0 && !slices.ContainsFunc(r.sets, func(s recordedSet) bool { return s.TrustDomain != td })
}

// has reports whether a set is in the record.
func (r *record) has(set *policyset.Signed) bool {
	return slices.ContainsFunc(r.sets, func(s recordedSet) bool { return s.TrustDomain == set.TrustDomain && s.Hash == set.Hash() })
}

// saw notes that a set of the record is in force.
func (r *record) saw(td spiffeid.TrustDomain, revision uint64, hash string) {
	for i, s := range r.sets {
		if s.TrustDomain == td && s.Revision == revision && s.Hash == hash {
			r.sets[i].State = inForce
		}
	}
}

// hash is that of the set of a revision, empty when none is recorded. What was
// in force goes before what was refused.
func (r *record) hash(td spiffeid.TrustDomain, revision uint64) (hash string) {
	for _, s := range r.of(td) {
		if s.Revision == revision && (hash == "" || s.State == inForce) {
			hash = s.Hash
		}
	}
	return hash
}
