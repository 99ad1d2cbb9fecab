package audit

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// KeepConfig says how long records are kept on this machine. Without it they
// are kept for good.
type KeepConfig struct {
	// Age is how long a record is kept at least; it goes with its file, at most
	// an eighth of that later. Default for good, at least 1h.
	Age time.Duration `yaml:"age"`
	// MaxBytes is how large a log may be. The oldest files go first, whatever
	// their age. Default without a bound, at least 1 MiB.
	MaxBytes int64 `yaml:"max_bytes"`
	// WithoutSink lets records go that nobody else was given: those of an issuer
	// without sinks, and the copies that it keeps of the logs of proxies.
	WithoutSink bool `yaml:"without_sink"`
}

const (
	leastAge  = time.Hour
	leastKept = 1 << 20
	// keepParts is into how many files what is kept is divided: a whole file goes
	// at a time.
	keepParts = 8
	// keepEvery is how often a Keeper looks.
	keepEvery = 10 * time.Second
	// mostGone is how many files one removal takes: their hashes stand in its
	// record.
	mostGone = 4
	ruleOf   = "audit.keep."
)

// Validate reports every mistake by field name.
func (c KeepConfig) Validate() error {
	var errs []error
	if c.Age != 0 && c.Age < leastAge {
		errs = append(errs, fmt.Errorf("age: %v is too short; write at least %v, or leave it out to keep records for good", c.Age, leastAge))
	}
	if c.MaxBytes != 0 && c.MaxBytes < leastKept {
		errs = append(errs, fmt.Errorf("max_bytes: %d is too small; write at least %d, or leave it out to set no bound", c.MaxBytes, leastKept))
	}
	if c.WithoutSink && !c.Set() {
		errs = append(errs, errors.New("without_sink: it says nothing without age or max_bytes"))
	}
	return errors.Join(errs...)
}

// Set says if anything is ever removed.
func (c KeepConfig) Set() bool { return c.Age != 0 || c.MaxBytes != 0 }

// Part is the age at which a log is to put its file aside, 0 for none.
func (c KeepConfig) Part() time.Duration { return c.Age / keepParts }

// MaxFile is the size at which a log is to put its file aside, 0 for the usual.
func (c KeepConfig) MaxFile() int64 { return min(c.MaxBytes/keepParts, defaultMaxFile) }

// A Keeper removes the oldest files of a log, by its rule. Nothing goes that
// somebody has still to get, that no witness has signed, or that is not what was
// signed; and before anything goes, the log says what, in a record that is on the
// disk. A crash at any moment is gone on from. One goroutine uses it.
type Keeper struct {
	cfg KeepConfig
	log *Log
	// into has the record of a removal: log itself, or for a copy the log of who
	// keeps it.
	into *Log
	// key signs the evidence.
	key *noteKey
	// free is the newest record that may go, and what holds the next.
	free func() (seq uint64, why string, err error)
	// agrees says if a tree is the beginning of the one that was signed; nil for
	// a copy, of which only the chain is known.
	agrees func(edge) error
	held   string // what was last said to hold a file
}

// Keep keeps the log by a rule.
func (l *Log) Keep(cfg KeepConfig, t *Tree) *Keeper {
	return l.keeper(cfg, t, func() uint64 { return l.Durable() })
}

// Keep keeps the log by a rule.
func (l *Ledger) Keep(cfg KeepConfig, t *Tree) *Keeper {
	// A restart reads what was told since.
	return l.log.keeper(cfg, t, func() uint64 { return atomic.LoadUint64(&l.table.W[hFrom]) })
}

func (l *Log) keeper(cfg KeepConfig, t *Tree, settled func() uint64) *Keeper {
	k := &Keeper{cfg: cfg, log: l, into: l, key: t.key, agrees: t.agrees}
	k.free = func() (uint64, string, error) {
		seq, why := l.delivered(k.cfg.WithoutSink)
		if n := t.Witnessed(); n < seq {
			seq, why = n, "no witness has signed more"
		}
		if n := settled(); n < seq {
			seq, why = n, "a restart would read it"
		}
		return seq, why, nil
	}
	return k
}

// delivered is the newest record that everybody has who gets the records, and
// who has the least. Who sends asks for the record it sent last, after a
// restart: that one stays.
func (l *Log) delivered(nobody bool) (seq uint64, why string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch s := l.spool; {
	case s != nil && len(s.readers) > 0:
		r := slices.MinFunc(s.readers, func(a, b *Reader) int { return cmp.Compare(a.seq, b.seq) })
		return max(r.seq, 1) - 1, r.name + " does not have it"
	case nobody:
		return l.synced, "it is not on the disk"
	}
	return 0, "there is no sink that has it, and " + ruleOf + "without_sink is not set"
}

// Run keeps the log by its rule until ctx ends. What hinders it is logged and
// tried again.
func (k *Keeper) Run(ctx context.Context) error {
	tick := time.NewTicker(keepEvery)
	defer tick.Stop()
	for said := ""; ; {
		err := k.Sweep(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && err.Error() != said {
			k.log.cfg.Log.Error("old audit records not removed; trying again", "err", err)
		}
		if said = ""; err != nil {
			said = err.Error()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Sweep ends a removal that a crash has cut short, and removes what may go.
func (k *Keeper) Sweep(ctx context.Context) error {
	err := k.finish()
	for err == nil && k.cfg.Set() && ctx.Err() == nil {
		var files []aside
		var rule string
		if files, rule, err = k.plan(); err != nil || len(files) == 0 {
			break
		}
		var s signedRemoval
		if s, err = k.describe(files, rule); err != nil {
			break
		}
		for _, step := range k.steps(ctx, s) {
			if err = step(); err != nil {
				break
			}
		}
		if err == nil {
			k.log.cfg.Log.Info("old audit records removed", "path", k.log.cfg.Path, "first", s.First, "last", s.Last, "rule", s.Rule)
		}
	}
	if err != nil {
		return fmt.Errorf("keep audit log %s: %w", filepath.Base(k.log.cfg.Path), err)
	}
	return nil
}

// steps are what a removal does, in this order: what comes later is done only
// when everything before it is on the disk.
func (k *Keeper) steps(ctx context.Context, s signedRemoval) []func() error {
	path := k.log.cfg.Path
	out := []func() error{
		func() error { return replaceFile(path+plannedSuffix, s.signed) },
		func() error { return k.tell(ctx, s) },
		k.commit,
	}
	for _, f := range s.Files {
		out = append(out, func() error { return k.remove(f) })
	}
	return out
}

// tell writes the record of a removal.
func (k *Keeper) tell(ctx context.Context, s signedRemoval) error {
	r, err := s.record(filepath.Base(k.log.cfg.Path))
	if err != nil {
		return err
	}
	if err := k.into.Append(&r); err != nil {
		return err
	}
	return k.into.Sync(ctx)
}

// commit makes the evidence that of the log: from then on its files are gone for
// who verifies.
func (k *Keeper) commit() error {
	path := k.log.cfg.Path
	return errors.Join(os.Rename(path+plannedSuffix, path+keptSuffix), syncDir(filepath.Dir(path)))
}

// remove removes a file that evidence speaks of.
func (k *Keeper) remove(f goneFile) error {
	name := filepath.Join(filepath.Dir(k.log.cfg.Path), f.Name)
	got, err := hashFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case got != hash(f.Hash):
		return fmt.Errorf("%s was changed after its hash was signed: it is not removed; keep a copy, and call for help", f.Name)
	}
	return errors.Join(os.Remove(name), syncDir(filepath.Dir(name)))
}

func hashFile(name string) (out hash, err error) {
	f, err := os.Open(name)
	if err != nil {
		return out, err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return hash(h.Sum(nil)), err
}

// finish goes on with a removal that was cut short.
func (k *Keeper) finish() error {
	path := k.log.cfg.Path
	planned, err := readRemoval(path + plannedSuffix)
	if err != nil {
		return err
	}
	gone, err := k.kept()
	if err != nil {
		return err
	}
	if planned.removal != nil {
		told, err := k.told(planned)
		switch {
		case err != nil:
			return err
		case told && planned.First == gone.last()+1:
			if err := k.commit(); err != nil {
				return err
			}
			gone = planned
		default: // nothing was done, and it is planned anew
			if err := errors.Join(os.Remove(path+plannedSuffix), syncDir(filepath.Dir(path))); err != nil {
				return err
			}
		}
	}
	names, err := asideFiles(path)
	if err != nil || gone.removal == nil {
		return err
	}
	for _, name := range names {
		if !gone.covers(path, name) {
			break
		}
		i := slices.IndexFunc(gone.Files, func(f goneFile) bool { return f.Name == filepath.Base(name) })
		if i < 0 {
			return fmt.Errorf("%s is older than what is kept, and no evidence names it; move it away", filepath.Base(name))
		}
		if err := k.remove(gone.Files[i]); err != nil {
			return err
		}
	}
	return nil
}

// kept is the evidence of what was removed before.
func (k *Keeper) kept() (signedRemoval, error) {
	gone, err := kept(k.log.cfg.Path)
	if err != nil || gone.removal == nil {
		return gone, err
	}
	return gone, k.signed(gone)
}

func (k *Keeper) signed(s signedRemoval) error {
	v, err := k.key.opener()
	if err == nil {
		err = s.signedBy(v)
	}
	if err != nil {
		return fmt.Errorf("%s: %w; put it back as it was, or move the whole log away to begin another", filepath.Base(k.log.cfg.Path)+keptSuffix, err)
	}
	return nil
}

// told says if the record of a removal is in the log.
func (k *Keeper) told(s signedRemoval) (found bool, err error) {
	if k.signed(s) != nil {
		return false, nil
	}
	digest, err := s.digest()
	if err != nil {
		return false, err
	}
	gone, err := kept(k.into.cfg.Path)
	if err != nil {
		return false, err
	}
	err = k.into.since(max(s.After, gone.last()), func(r *Record) { found = found || tells(r, digest) })
	return found, err
}

// describe makes the evidence for files, which are the oldest. It reads all of
// them: what is not what was written stays, since it is to be looked at.
func (k *Keeper) describe(files []aside, rule string) (s signedRemoval, err error) {
	gone, err := k.kept()
	if err != nil {
		return s, err
	}
	r := &removal{First: files[0].first, Last: files[len(files)-1].last, At: time.Now().UTC(), Rule: rule}
	if gone.removal != nil {
		r.Log = gone.Log
	}
	r.After, _ = k.into.Head()
	w := walk{edge: gone.edge(), prev: gone.prev(), seq: gone.last()}
	for _, f := range files {
		h, err := w.file(f.name)
		if err != nil {
			return s, fmt.Errorf("%s: %w; it is not removed: run audit verify", filepath.Base(f.name), err)
		}
		if w.seq != f.last {
			return s, fmt.Errorf("%s ends with record %d, not %d; it is not removed: run audit verify", filepath.Base(f.name), w.seq, f.last)
		}
		r.Files = append(r.Files, goneFile{filepath.Base(f.name), sum(h)})
	}
	if gone.removal == nil {
		r.Log = sum(w.begin)
	}
	r.Since, r.Until, r.Prev = w.since, w.until, sum(w.prev)
	r.setEdge(w.edge)
	if k.agrees != nil {
		if err := k.agrees(w.edge); err != nil {
			return s, err
		}
	}
	text, err := r.text()
	if err != nil {
		return s, err
	}
	signed, err := note.Sign(&note.Note{Text: text}, k.key)
	return signedRemoval{r, signed}, err
}

// A walk goes over the lines of a log from some record on.
type walk struct {
	edge         edge
	prev         hash
	seq          uint64
	begin        hash // of the first line, if it is record 1
	since, until time.Time
}

// file goes over one file and returns its hash.
func (w *walk) file(name string) (out hash, err error) {
	f, err := os.Open(name)
	if err != nil {
		return out, err
	}
	defer f.Close()
	h := sha256.New()
	err = w.lines(io.TeeReader(f, h), true)
	return hash(h.Sum(nil)), err
}

// lines goes over lines, for the tree too if leaves is set.
func (w *walk) lines(r io.Reader, leaves bool) error {
	var wrong error
	err := readBlocks(r, leaves, func(l *read) {
		switch {
		case wrong != nil:
			return
		case l.err != nil:
			wrong = fmt.Errorf("after record %d: %w", w.seq, l.err)
			return
		case l.rec.Seq != w.seq+1 || l.prev != w.prev:
			wrong = fmt.Errorf("record %d does not continue record %d", l.rec.Seq, w.seq)
			return
		}
		if w.since.IsZero() {
			w.since = l.rec.Time
		}
		if l.rec.Seq == 1 {
			w.begin = l.sum
		}
		w.seq, w.prev, w.until = l.rec.Seq, l.sum, l.rec.Time
		if leaves {
			_ = w.edge.add(l.leaf, keepNothing)
		}
	}, func() { wrong = cmp.Or(wrong, errors.New("its last line is torn")) })
	return cmp.Or(err, wrong)
}

// agrees says if a tree is the beginning of the one that was signed.
func (t *Tree) agrees(e edge) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := tlog.TileHashReader(tlog.Tree{N: int64(t.size), Hash: t.signedRoot}, tiles(t.dir)) //nolint:gosec // counts records
	p, err := tlog.ProveTree(int64(t.size), int64(e.size), r)                               //nolint:gosec // as above
	if err == nil {
		err = tlog.CheckTree(p, int64(t.size), t.signedRoot, int64(e.size), e.root()) //nolint:gosec // as above
	}
	if err != nil {
		return fmt.Errorf("records up to %d are not what the checkpoint speaks of, and not removed: run audit verify: %w", e.size, err)
	}
	return nil
}
