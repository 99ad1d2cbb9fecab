package audit

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"
)

// ErrGone is returned by a Writer that has given the log up.
var ErrGone = errors.New("the writer of the audit log has gone")

// A Writer writes a log on behalf of a process that is to have it later: at no
// time do two processes write one chain. It is safe for concurrent use.
type Writer interface {
	// Append does what Log.Append does. An error that wraps ErrGone means that
	// the log can be opened; the record may be in it.
	Append(*Record) error
	// Sync brings to the disk what was appended, and returns the number of the
	// newest record there, or why records cannot be written at present.
	Sync(context.Context) (durable uint64, err error)
}

// Writer writes into the log of the ledger, past what it counts: the process
// that follows counts by itself.
func (l *Ledger) Writer() Writer { return local{l.log} }

type local struct{ *Log }

func (w local) Sync(ctx context.Context) (uint64, error) {
	if err := w.Log.Sync(ctx); err != nil {
		return w.Durable(), err
	}
	return w.Durable(), w.Healthy()
}

const (
	// adoptWithin is how long a record waits between two writers.
	adoptWithin = 10 * time.Second
	// lockEvery is how often the lock of a log is tried whose writer has gone.
	lockEvery = 5 * time.Millisecond
	// farther is by how much the generations of cells lie apart that two
	// processes count in at a time: the log tells cells apart by them.
	farther = 1 << 32
)

// FollowLedger makes a ledger whose records another process writes, of which
// seq were written so far. It counts in a file of its own. Adopt makes the log
// its own.
func FollowLedger(file Config, cfg LedgerConfig, w Writer, seq uint64) (*Ledger, error) {
	if err := file.Validate(); err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	log := newLog(file)
	log.writer, log.mine = w, make(chan struct{})
	log.seq, log.synced = seq, seq
	last, err := lastGeneration(file.Path + countsSuffix)
	if err != nil {
		return nil, fmt.Errorf("follow audit counts: %w", err)
	}
	l, err := countIn(log, file.Path+countsSuffix+"."+strings.TrimSuffix(log.nonce, "-"), cfg)
	if err != nil {
		return nil, err
	}
	atomic.StoreUint64(&l.table.W[hGen], last+farther)
	return l, nil
}

// lastGeneration reads the last generation that was given to a cell.
func lastGeneration(name string) (uint64, error) {
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var b [8]byte
	if _, err := f.ReadAt(b[:], hGen*8); err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return binary.NativeEndian.Uint64(b[:]), nil
}

// followed says that another process writes the log.
func (l *Log) followed() bool {
	if l.mine == nil {
		return false
	}
	select {
	case <-l.mine:
		return false
	default:
		return true
	}
}

// through has the writer append a record. It is not done when the log has come
// to be ours meanwhile.
func (l *Log) through(r *Record) (done bool, err error) {
	err = l.writer.Append(r)
	if errors.Is(err, ErrGone) {
		if l.becomesMine(context.Background()) {
			return false, nil
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		return true, l.failed(err, r)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fail = err // which the writer has counted and logged
	l.blocked.Store(err != nil)
	l.seq = max(l.seq, r.Seq)
	return true, err
}

func (l *Log) syncThrough(ctx context.Context) (done bool, err error) {
	n, err := l.writer.Sync(ctx)
	if errors.Is(err, ErrGone) {
		return !l.becomesMine(ctx), err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.synced = max(l.synced, n)
	l.fail = err
	l.blocked.Store(err != nil)
	return true, err
}

// becomesMine waits until the log is ours, and gives up after a while.
func (l *Log) becomesMine(ctx context.Context) bool {
	t := time.NewTimer(adoptWithin)
	defer t.Stop()
	select {
	case <-l.mine:
		return true
	case <-t.C:
	case <-ctx.Done():
	}
	return false
}

// Adopt makes the log ours once its writer has gone: it waits for the lock,
// continues the chain, and tells what the writer has counted and not told.
// Records that wait for it go on then. It is called once.
func (l *Ledger) Adopt(ctx context.Context) error {
	next, err := awaitLog(ctx, l.log.cfg)
	if err != nil {
		return fmt.Errorf("take audit log over: %w", err)
	}
	own, main := l.countsName, l.log.cfg.Path+countsSuffix
	if err := tellTable(next, main, l.cfg); err != nil && !errors.Is(err, fs.ErrNotExist) {
		aside := main + "." + strings.TrimSuffix(next.nonce, "-")
		l.log.cfg.Log.Error("what the process before has counted is told at the next start", "counts", aside, "err", err)
		if err := os.Rename(main, aside); err != nil {
			return errors.Join(fmt.Errorf("take audit counts over: %w", err), next.Close())
		}
	}
	if err := errors.Join(os.Rename(own, main), syncDir(filepath.Dir(main))); err != nil {
		return errors.Join(fmt.Errorf("take audit counts over: %w", err), next.Close())
	}
	l.log.mu.Lock()
	defer l.log.mu.Unlock()
	if l.log.closed {
		return next.Close()
	}
	l.log.file, l.log.size, l.log.first = next.file, next.size, next.first
	l.log.seq, l.log.synced, l.log.prev = next.seq, next.synced, next.prev
	l.log.fail, l.log.torn, l.log.dead = nil, next.torn, next.dead
	l.log.blocked.Store(false)
	close(l.log.mine)
	return nil
}

// awaitLog opens the log as soon as its last writer has let go of it.
func awaitLog(ctx context.Context, cfg Config) (*Log, error) {
	tick := time.NewTicker(lockEvery)
	defer tick.Stop()
	for {
		log, err := Open(cfg)
		if !errors.Is(err, ErrLocked) {
			return log, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-tick.C:
		}
	}
}

// tellLeft tells what processes have counted that ended before the log was
// theirs. What cannot be told now is told at the next start.
func tellLeft(log *Log, cfg LedgerConfig) {
	dir, prefix := filepath.Split(log.cfg.Path + countsSuffix + ".")
	entries, err := os.ReadDir(filepath.Clean(dir))
	if err != nil {
		log.cfg.Log.Warn("counts of earlier processes are not looked for", "err", err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), prefix) || strings.HasSuffix(e.Name(), ".new") { // half made
			continue
		}
		name := dir + e.Name()
		err := tellTable(log, name, cfg)
		if err == nil {
			err = os.Remove(name)
		}
		if err != nil {
			log.cfg.Log.Warn("counts of an earlier process are not told yet", "counts", name, "err", err)
		}
	}
}

// tellTable tells what stands in a file with counts that nobody counts in any
// more.
func tellTable(log *Log, name string, cfg LedgerConfig) error {
	if _, err := os.Lstat(name); err != nil {
		return err
	}
	l, err := countIn(log, name, cfg)
	if err != nil {
		return err
	}
	err = errors.Join(l.Flush(context.Background()), l.tellRefused(), l.leaveCounts())
	log.refused, log.refusedTold = new(uint64), new(uint64) // they were in that file
	return err
}

// tellRefused writes the gap record that would stand before the next record.
func (l *Ledger) tellRefused() error {
	l.log.mu.Lock()
	defer l.log.mu.Unlock()
	if l.log.lost() == 0 {
		return nil
	}
	return l.log.tellRefused()
}
