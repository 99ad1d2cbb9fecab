package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"sallyport/internal/capture"
)

// openTable maps the file with the counts, and makes it when there is none.
// All its blocks are written before it gets its name. The file is locked as long
// as it is open: who counts in it lives.
func openTable(path string) (f *os.File, table *capture.Words, err error) {
	f, err = os.OpenFile(path, os.O_RDWR|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = makeTable(path)
	}
	if err != nil {
		return nil, nil, err
	}
	st, err := f.Stat()
	switch {
	case err != nil:
	case !st.Mode().IsRegular() || st.Size() != tableWords*8:
		err = fmt.Errorf("it is no file of %d bytes; move it away to count from 0", tableWords*8)
	case syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil:
		err = ErrLocked
	case st.Mode().Perm() != 0o600:
		err = f.Chmod(0o600)
	}
	if err == nil {
		table, err = capture.MapWords(f, tableWords)
	}
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return f, table, nil
}

func makeTable(path string) (*os.File, error) {
	name := path + ".new"
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	zero := make([]byte, 64<<10)
	for left := tableWords * 8; left > 0; left -= len(zero) {
		if _, err := f.Write(zero[:min(left, len(zero))]); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	if err := errors.Join(f.Sync(), os.Rename(name, path), syncDir(filepath.Dir(path))); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// bootID is a number that changes when the machine starts.
func bootID() uint64 {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return 1 // no Linux: a restart of the machine is not told apart
	}
	h := fnv.New64a()
	h.Write(b)
	return h.Sum64() | 1
}

// recover reads what another process has counted and makes it ours. It writes
// roll-ups for what that process could not tell any more.
func (l *Ledger) recover() error {
	w := l.table.W
	boot := bootID()
	fresh := atomic.LoadUint64(&w[hMagic]) == 0
	if !fresh && atomic.LoadUint64(&w[hMagic]) != tableMagic {
		return errors.New("it does not hold counts; move it away to count from 0")
	}
	if fresh {
		seq, _ := l.log.Head()
		atomic.StoreUint64(&w[hFrom], seq)
		atomic.StoreUint64(&w[hMagic], tableMagic)
	}
	found, err := l.adopt()
	if err != nil {
		return err
	}
	if !fresh && atomic.LoadUint64(&w[hBoot]) != boot && atomic.LoadUint64(&w[hClean]) == 0 {
		if err := l.log.Append(&Record{Kind: KindGap, Reason: "power", Detail: "the machine stopped while calls were counted; the counts of at most the last second before are missing"}); err != nil {
			return err
		}
	}
	// What the log refused while it was opened has no number from before.
	atomic.AddUint64(&w[hRefused], *l.log.refused)
	l.log.refused, l.log.refusedTold = &w[hRefused], &w[hRefusedTold]
	atomic.StoreUint64(&w[hBoot], boot)
	atomic.StoreUint64(&w[hClean], 0)
	if found {
		return l.Flush(context.Background())
	}
	return nil
}

// adopt takes over the cells in the file, and reports whether there are any.
func (l *Ledger) adopt() (found bool, err error) {
	told, err := l.toldSince()
	if err != nil {
		return false, err
	}
	for index := maxCells - 1; index >= 0; index-- {
		c := l.at(index)
		gen := c.load(cGen)
		if gen == 0 {
			l.free = append(l.free, index)
			continue
		}
		found = true
		c.key, err = parseKey(c.text[cText*8:])
		if err != nil {
			return false, fmt.Errorf("cell %d: %w; move the file away to count from 0", index, err)
		}
		c.id, c.budget, c.fresh = cellID(l.log.nonce, index, gen), l.cfg.Budget, c.key.what.counted()
		c.reconcile(told[cellName{index, gen}])
		l.seen(c.key).templates++
		sh := l.shard(&c.key, len(c.key.path))
		sh.cells[c.key] = c
	}
	return found, nil
}

// reconcile counts as lost what was begun and never ended, and takes what the
// log has told already for told.
func (c *cell) reconcile(told [classes]uint64) {
	for class, n := range told {
		// After a loss of power the log may be ahead of the counts.
		c.store(cTold+class, max(n, c.load(cTold+class)))
		c.store(cSettled+class, max(c.load(cTold+class), c.load(cSettled+class)))
		if c.load(cMark+class)&writing != 0 {
			c.store(cMark+class, noTrace) // half a trace
		}
	}
	if n, ended := c.load(cDecided), c.settled(); n > ended {
		atomic.AddUint64(&c.w[cSettled+classLost], n-ended)
	} else {
		c.store(cDecided, ended)
	}
}

type cellName struct {
	index int
	gen   uint64
}

// toldSince reads what the log tells after the last telling began: the death of
// the process may have come between a roll-up and the note that it is written.
func (l *Ledger) toldSince() (map[cellName][classes]uint64, error) {
	told := map[cellName][classes]uint64{}
	from := atomic.LoadUint64(&l.table.W[hFrom])
	err := l.log.since(from, func(r *Record) {
		switch {
		case r.Kind == KindGap && r.Reason == "lost":
			w := &l.table.W[hTold]
			atomic.StoreUint64(w, max(atomic.LoadUint64(w), r.Total))
		case r.Kind == KindGap && r.Reason == "refused":
			w := &l.table.W[hRefusedTold]
			atomic.StoreUint64(w, max(atomic.LoadUint64(w), r.Total))
		case r.Kind == KindRollup:
			if index, gen, ok := cellOf(r.ID); ok {
				n := told[cellName{index, gen}]
				class := classByName(r.Class)
				n[class] = max(n[class], r.Total)
				told[cellName{index, gen}] = n
			}
		}
	})
	if err != nil {
		return nil, fmt.Errorf("read what was told: %w", err)
	}
	return told, nil
}

// since reads the records after a number.
func (l *Log) since(after uint64, f func(*Record)) error {
	head, _ := l.Head()
	if l.mem != nil {
		for b := range bytes.Lines(l.Lines()) {
			if r, _, err := ParseLine(b); err == nil && r.Seq > after {
				f(&r)
			}
		}
		return nil
	}
	if after >= head {
		return nil // nothing was written, or this is another log
	}
	return l.lines(after, head, func(b []byte) error {
		r, _, err := ParseLine(b)
		if err == nil {
			f(&r)
		}
		return err
	})
}

// lines reads the lines of the records after one number up to another.
func (l *Log) lines(after, to uint64, f func([]byte) error) error {
	return readLines(l.cfg.Path, after, to, f)
}

// readLines reads the lines of the records after one number up to another.
func readLines(path string, after, to uint64, f func([]byte) error) error {
	t, err := OpenTail(path, after)
	if err != nil {
		return err
	}
	defer t.Close()
	for seq := after; seq < to; {
		b, n, err := t.poll()
		if err != nil {
			return err
		}
		if b == nil {
			return fmt.Errorf("record %d is not there", seq+1)
		}
		if err := f(b); err != nil {
			return fmt.Errorf("record %d: %w", n, err)
		}
		seq = n
	}
	return nil
}

// Flush tells what was counted since it was told last, and returns once that is
// on the disk. What cannot be told now is told later.
func (l *Ledger) Flush(ctx context.Context) error {
	l.telling.Lock()
	defer l.telling.Unlock()
	if l.closed.Load() {
		return nil
	}
	if len(l.said) == 0 {
		seq, _ := l.log.Head()
		atomic.StoreUint64(&l.table.W[hFrom], seq)
	}
	err := l.tellLost()
	for i := range l.shards {
		for _, c := range l.shards[i].all() {
			if err == nil {
				err = l.tell(&l.shards[i], c)
			}
		}
	}
	if e := l.log.Sync(ctx); e != nil {
		return errors.Join(err, e)
	}
	for c, n := range l.said {
		for class, total := range n {
			c.store(cTold+class, max(total, c.load(cTold+class)))
		}
	}
	clear(l.said)
	for i := range l.shards {
		l.retire(&l.shards[i])
	}
	return err
}

func (s *shard) all() []*cell {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*cell, 0, len(s.cells))
	for _, c := range s.cells {
		out = append(out, c)
	}
	return out
}

// tell writes the roll-ups of one cell, and notes how far each class is told by
// them.
func (l *Ledger) tell(sh *shard, c *cell) error {
	told := l.said[c]
	for class := range told {
		told[class] = max(told[class], c.load(cTold+class))
	}
	sh.mu.Lock()
	from := c.load(cFrom)
	news := false
	for class := range classes {
		news = news || c.load(cSettled+class) > told[class]
	}
	if news {
		next := uint64(0)
		if c.load(cDecided) > c.settled() {
			next = uint64(time.Now().UnixNano()) //nolint:gosec // calls that still run end later
		}
		c.store(cFrom, next)
	}
	sh.mu.Unlock()
	if !news {
		return nil
	}
	for class := range classes {
		n, before := c.load(cSettled+class), told[class]
		if n <= before {
			continue
		}
		r := c.key.record()
		r.ID, r.Class, r.Count, r.Total, r.Trace = c.id, classNames[class], n-before, n, c.trace(class)
		r.Open = true // if it cannot be kept nothing is lost: it is told later
		if from != 0 {
			r.From = time.Unix(0, int64(from)) //nolint:gosec // nanoseconds since 1970 as they were stored
		}
		if err := l.log.Append(&r); err != nil {
			sh.mu.Lock()
			c.store(cFrom, from)
			sh.mu.Unlock()
			return err
		}
		told[class] = n
		l.said[c] = told
	}
	return nil
}

// tellLost writes the gap record for what could not be kept.
func (l *Ledger) tellLost() error {
	w := l.table.W
	lost, told := atomic.LoadUint64(&w[hLost]), atomic.LoadUint64(&w[hTold])
	if lost == told {
		return nil
	}
	err := l.log.Append(&Record{
		Kind: KindGap, Reason: "lost", Count: lost - told, Total: lost, Open: true,
		Detail: "records could not be kept; the calls went on, as their route says",
	})
	if err == nil {
		atomic.StoreUint64(&w[hTold], lost)
	}
	return err
}

// retire frees the cells that nothing was counted in for a while, and gives the
// others a new budget.
func (l *Ledger) retire(sh *shard) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	for k, c := range sh.cells {
		c.budget = l.cfg.Budget
		c.fresh = c.fresh || l.due(k)
		if c.idle++; c.idle <= idleWindows || c.pins > 0 || !c.quiet() {
			continue
		}
		c.store(cGen, 0)
		delete(sh.cells, k)
		l.free = append(l.free, c.index)
		l.short = false
		if s := l.seen(k); s.templates > 0 {
			s.templates--
		}
	}
}

// quiet says that everything which began has ended and was told.
func (c *cell) quiet() bool {
	var told uint64
	for class := range classes {
		told += c.load(cTold + class)
	}
	return told == c.load(cDecided)
}

// Close tells everything and closes the log.
func (l *Ledger) Close() error {
	err := l.Flush(context.Background())
	l.telling.Lock()
	defer l.telling.Unlock()
	if l.closed.Swap(true) {
		return nil
	}
	if err == nil {
		atomic.StoreUint64(&l.table.W[hClean], 1)
	}
	err = errors.Join(err, l.table.Sync())
	return errors.Join(err, l.leaveCounts(), l.log.Close())
}

// leaveCounts lets go of the file with the counts. Closing it is not enough: the
// mapping, which stays, holds the lock.
func (l *Ledger) leaveCounts() error {
	if l.counts == nil {
		return nil
	}
	return errors.Join(syscall.Flock(int(l.counts.Fd()), syscall.LOCK_UN), l.counts.Close())
}
