package audit

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Config says where a log is kept.
type Config struct {
	// Path of the file, made with mode 0600. Required.
	Path string
	// Log receives failures and repairs. Required.
	Log *slog.Logger
	// SyncEvery is how often Run brings new records to the disk. Default 10 ms.
	SyncEvery time.Duration
	// MaxFile is the size in bytes at which the file is put aside as
	// Path.<number of its first record> and a new one continues the chain.
	// Default 256 MiB.
	MaxFile int64
	// Heads tells what witnesses have signed of the log that is copied here, now
	// and before, for a Mirror. Default: nobody signs it.
	Heads func(context.Context) ([]Head, error)
	// Counted is told of each record that was written. It is called under a lock
	// and must be quick. Optional.
	Counted func(Kind)
}

// Validate reports every mistake by field name.
func (c Config) Validate() error {
	var errs []error
	if c.Path == "" {
		errs = append(errs, errors.New("path: missing"))
	}
	if c.Log == nil {
		errs = append(errs, errors.New("log: missing"))
	}
	if c.SyncEvery < 0 {
		errs = append(errs, fmt.Errorf("sync every: %v is negative", c.SyncEvery))
	}
	if c.MaxFile < 0 {
		errs = append(errs, fmt.Errorf("max file: %d is negative", c.MaxFile))
	}
	return errors.Join(errs...)
}

const defaultMaxFile = 256 << 20

// disk is what a log needs of its file.
type disk interface {
	Write([]byte) (int, error)
	Truncate(int64) error
	Sync() error
	Close() error
}

// A Log is an open audit log. It is safe for concurrent use.
type Log struct {
	cfg   Config
	nonce string

	// syncing is the right to call fsync: a semaphore of one.
	syncing chan struct{}

	// blocked is set while records cannot be written.
	blocked atomic.Bool

	// mu guards all that follows.
	mu     sync.Mutex
	file   disk
	size   int64 // of the whole lines in the file
	first  uint64
	seq    uint64
	synced uint64
	prev   hash
	buf    []byte
	ids    strings.Builder // hands out ids without an allocation for each
	closed bool
	// flushing is set while the file is brought to the disk without mu, due when
	// it is to be put aside as soon as that is over: of two fsyncs at once the
	// kernel tells a failure to one, and the other would take the file for safe.
	flushing, due bool
	// torn is set while the file may end in a part of a line.
	torn bool
	// fail is why the last Append failed.
	fail error
	// refused counts the records that were refused with what they stand for,
	// and refusedTold how many of them a gap record speaks of. A Ledger keeps
	// both where they survive the process.
	refused, refusedTold *uint64
	// noRoom and noDisk count the records that were not kept, by why.
	noRoom, noDisk uint64
	// spool bounds what waits to be delivered; nil when nothing does.
	spool *Spool
	// dead is set when fsync failed: the kernel may have dropped pages, so
	// nothing that follows could be trusted until all was written anew. mended
	// is when that was tried last.
	dead   error
	mended time.Time
	mem    *bytes.Buffer

	// copied is set for the log inside a Mirror, which writes no record of its
	// own.
	copied bool

	// writer writes the log until mine is closed. Both are nil for a log that
	// was ours from the start.
	writer Writer
	mine   chan struct{}
}

func newLog(cfg Config) *Log {
	cfg.SyncEvery = cmp.Or(cfg.SyncEvery, 10*time.Millisecond)
	cfg.MaxFile = cmp.Or(cfg.MaxFile, defaultMaxFile)
	return &Log{
		cfg:     cfg,
		nonce:   strings.ToLower(rand.Text()[:6]) + "-",
		syncing: make(chan struct{}, 1),
		buf:     make([]byte, 0, 4096),
		refused: new(uint64), refusedTold: new(uint64),
	}
}

// Append writes one record and fills its Seq, and Time and ID when they are
// empty. When it returns nil the record survives the death of the process;
// Run, or Sync, make it survive the death of the machine. After an error the
// record is not in the log and the caller must refuse what it stands for; its
// ID is then that of the refusal, which a gap record counts.
func (l *Log) Append(r *Record) error {
	if l.followed() {
		if done, err := l.through(r); done {
			return err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.usable(); errors.Is(err, ErrClosed) {
		return err
	} else if err != nil {
		return l.failed(err, r)
	}
	if l.lost() > 0 && !r.Done {
		if err := l.tellRefused(); err != nil {
			return l.failed(err, r)
		}
	}
	if err := l.write(r); err != nil {
		return l.failed(err, r)
	}
	if !r.Done { // it says nothing of the room for others
		l.writable()
	}
	return nil
}

// writable notes that records are written, under mu. A spool that has just
// become full makes itself felt by what is merely counted, too.
func (l *Log) writable() {
	if l.fail != nil {
		l.cfg.Log.Info("audit log can be written again", "path", l.cfg.Path)
	}
	l.fail = nil
	l.blocked.Store(l.spool != nil && l.spool.fits(usualLine, false) != nil)
}

// usable says why nothing can be written, and mends a torn end if it can.
func (l *Log) usable() error {
	if l.closed {
		return ErrClosed
	}
	if l.dead != nil {
		return l.dead
	}
	if l.torn {
		if err := l.file.Truncate(l.size); err != nil {
			return fmt.Errorf("mend audit log: %w", err)
		}
		l.torn = false
	}
	return nil
}

// failed notes why a record was not written. What is refused therefore is
// counted for the gap record, and gets an id from that count; who lets a call go
// on counts it otherwise.
func (l *Log) failed(err error, r *Record) error {
	if l.fail == nil {
		l.cfg.Log.Error("audit log cannot be written", "path", l.cfg.Path, "error", err)
	}
	l.fail = err
	if errors.Is(err, ErrSpoolFull) {
		l.noRoom++
	} else {
		l.noDisk++
	}
	if r != nil && !r.Open {
		n := atomic.AddUint64(l.refused, 1)
		r.ID = cmp.Or(r.ID, strings.TrimSuffix(l.nonce, "-")+refusalMark+strconv.FormatUint(n, 16))
	}
	l.blocked.Store(true)
	return err
}

// write appends one record, under mu.
func (l *Log) write(r *Record) error {
	rec := *r
	rec.Seq = l.seq + 1
	if rec.Time.IsZero() {
		rec.Time = time.Now()
	}
	if rec.ID == "" {
		rec.ID = l.nextID(rec.Seq)
	}
	clean(&rec)
	// Putting the file aside does not change prev.
	l.buf = appendRecord(l.buf[:0], &rec, &l.prev)
	if l.spool != nil {
		if err := l.spool.fits(len(l.buf), rec.Done); err != nil {
			return err
		}
		l.spool.note(rec.Time)
	}
	if err := l.put(rec.Seq); err != nil {
		return err
	}
	if l.spool != nil {
		l.spool.end += int64(len(l.buf))
	}
	r.Seq, r.Time, r.ID = rec.Seq, rec.Time, rec.ID
	if l.cfg.Counted != nil {
		l.cfg.Counted(rec.Kind)
	}
	return nil
}

// put writes the line in buf, which is record seq, under mu.
func (l *Log) put(seq uint64) error {
	if l.size >= l.cfg.MaxFile && l.mem == nil {
		if err := l.putAside(); err != nil {
			return err
		}
	}
	n, err := l.file.Write(l.buf)
	if err != nil || n != len(l.buf) {
		l.torn = n != 0
		return fmt.Errorf("write audit record: %w", cmp.Or(err, io.ErrShortWrite))
	}
	l.prev = sha256.Sum256(l.buf)
	l.size += int64(n)
	l.seq = seq
	if l.first == 0 {
		l.first = seq
	}
	return nil
}

// nextID makes "<boot nonce>-<seq in hex>". The ids of one KiB share an
// allocation.
func (l *Log) nextID(seq uint64) string {
	var num [16]byte
	hex := strconv.AppendUint(num[:0], seq, 16)
	if l.ids.Cap()-l.ids.Len() < len(l.nonce)+len(hex) {
		l.ids = strings.Builder{}
		l.ids.Grow(1024)
	}
	at := l.ids.Len()
	l.ids.WriteString(l.nonce)
	l.ids.Write(hex)
	return l.ids.String()[at:]
}

// Healthy says why records cannot be written or brought to the disk; nil when
// the last attempt succeeded.
func (l *Log) Healthy() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return cmp.Or(l.dead, l.fail)
}

// Head returns the number of the newest record and the hash of its line.
func (l *Log) Head() (seq uint64, sum [32]byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seq, l.prev
}

// Durable is the number of the newest record that is on the disk.
func (l *Log) Durable() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.synced
}

// Sync returns once every record appended before the call is on the disk. One
// fsync serves all callers that wait for it. After a failed fsync the log takes
// nothing more until one of them has written the file anew, which is tried once a
// second.
func (l *Log) Sync(ctx context.Context) error {
	if l.followed() {
		if done, err := l.syncThrough(ctx); done {
			return err
		}
	}
	l.mu.Lock()
	want := l.seq
	l.mu.Unlock()
	select {
	case l.syncing <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("sync audit log: %w", context.Cause(ctx))
	}
	defer func() { <-l.syncing }()

	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return ErrClosed
	case l.dead != nil:
		l.mu.Unlock()
		err := l.mend() // which brings all of it to the disk
		l.mu.Lock()
		return err
	case l.synced >= want:
		return nil
	}
	return l.flush()
}

// flush brings the file to the disk and lets others write meanwhile, under mu
// and with the right to call fsync.
func (l *Log) flush() error {
	file, now := l.file, l.seq
	l.flushing = true
	l.mu.Unlock()
	err := file.Sync()
	l.mu.Lock()
	l.flushing = false
	if err != nil {
		return l.die(err)
	}
	l.synced = now
	if l.due {
		if err := l.rotate(); err != nil {
			l.cfg.Log.Warn("audit log not put aside; trying again", "path", l.cfg.Path, "err", err)
			return l.dead // what was asked for is on the disk, unless rotate has heard otherwise
		}
	}
	return nil
}

// die ends the use of the log, under mu.
func (l *Log) die(err error) error {
	l.dead = fmt.Errorf("sync audit log: %w", err)
	l.blocked.Store(true)
	l.cfg.Log.Error("audit log cannot be synced; records are refused until it is written anew", "path", l.cfg.Path, "error", err)
	return l.dead
}

// Run brings records to the disk every SyncEvery until ctx ends, and once more
// then. A failure is logged where it happens, and mended by a later round. It
// returns nil, or why the last records may not be on the disk.
func (l *Log) Run(ctx context.Context) error {
	tick := time.NewTicker(l.cfg.SyncEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			err := l.Sync(context.WithoutCancel(ctx))
			if errors.Is(err, ErrClosed) {
				return nil
			}
			return err
		case <-tick.C:
			_ = l.Sync(ctx)
		}
	}
}

// Close brings what was appended to the disk and closes the file. Calls after
// the first do nothing.
func (l *Log) Close() error {
	l.syncing <- struct{}{}
	defer func() { <-l.syncing }()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	if l.file == nil { // it never was ours
		return nil
	}
	return errors.Join(l.dead, l.file.Sync(), l.file.Close())
}

// putAside is rotate at once, or when the file has been brought to the disk,
// under mu.
func (l *Log) putAside() error {
	if l.due = l.flushing; l.due {
		return nil
	}
	return l.rotate()
}

// rotate puts the file aside and continues the chain in a new one, under mu.
// The path names a file at every moment, so that nobody can slip in between.
func (l *Log) rotate() error {
	if err := l.file.Sync(); err != nil {
		return l.die(err)
	}
	l.synced = l.seq
	aside, next := segmentName(l.cfg.Path, l.first), l.cfg.Path+".new"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("continue audit log: %w", err)
	}
	f, err := createLog(next)
	if err != nil {
		return fmt.Errorf("continue audit log: %w", err)
	}
	if err := os.Link(l.cfg.Path, aside); err != nil {
		return errors.Join(fmt.Errorf("put audit log aside: %w", err), f.Close(), os.Remove(next))
	}
	if err := os.Rename(next, l.cfg.Path); err != nil {
		return errors.Join(fmt.Errorf("continue audit log: %w", err), f.Close(), os.Remove(next), os.Remove(aside))
	}
	old := l.file
	l.file, l.size, l.first, l.due = f, 0, 0, false
	if err := errors.Join(old.Close(), syncDir(filepath.Dir(aside))); err != nil {
		l.cfg.Log.Warn("putting the audit log aside was not clean", "path", aside, "error", err)
	}
	return nil
}
