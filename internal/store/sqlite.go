package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

const (
	// readers is how many reads run beside each other; WAL lets them run
	// beside the writer too.
	readers = 4
	// tidyEvery is how many revisions pass between two rounds of tidying, so
	// that its cost is spread over many writes.
	tidyEvery = 1024
	// purgeAfter is how long an expired record stays in the file. It is
	// invisible all that time; the delay lets a wrong clock be set right
	// before anything is lost.
	purgeAfter = 7 * 24 * time.Hour
)

// SQLite is a Store in one file, for one issuer.
//
// There is a single connection that writes, so that writers queue for it in Go
// and never meet SQLITE_BUSY, and a small pool that reads. A second process
// cannot open the same file meanwhile.
type SQLite struct {
	path string
	keep int64
	now  func() time.Time
	// lock is held from open to close; the kernel drops it if we are killed.
	lock  *os.File
	write *sql.DB
	read  *sql.DB

	// mu is held for reading by every call, so that Close waits for them.
	mu     sync.RWMutex
	closed bool

	// bell is closed and replaced by each commit. It has its own lock, since a
	// Watch must not keep Close waiting.
	bellMu sync.Mutex
	bell   chan struct{}

	find, put, remove, note *sql.Stmt // on write
	get, list, head, since  *sql.Stmt // on read
}

var _ Store = (*SQLite)(nil)

// Get implements Store.
func (s *SQLite) Get(ctx context.Context, kind Kind, key string) (Record, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return Record{}, ErrClosed
	}
	r := Record{Kind: kind, Key: key}
	var expires int64
	err := s.get.QueryRowContext(ctx, string(kind), key, s.now().UnixMicro()).Scan(&r.Value, &r.Revision, &expires)
	if errors.Is(err, sql.ErrNoRows) {
		return Record{}, fmt.Errorf("%s %q: %w", kind, key, ErrNotFound)
	}
	if err != nil {
		return Record{}, s.explain("read "+string(kind), err)
	}
	r.fix(expires)
	return r, nil
}

// List implements Store.
func (s *SQLite) List(ctx context.Context, kind Kind, after string, limit int) ([]Record, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, ErrClosed
	}
	rows, err := s.list.QueryContext(ctx, string(kind), after, s.now().UnixMicro(), page(limit))
	if err != nil {
		return nil, s.explain("list "+string(kind), err)
	}
	defer rows.Close()
	var out []Record
	for rows.Next() {
		r := Record{Kind: kind}
		var expires int64
		if err := rows.Scan(&r.Key, &r.Value, &r.Revision, &expires); err != nil {
			return nil, s.explain("list "+string(kind), err)
		}
		r.fix(expires)
		out = append(out, r)
	}
	if err := rows.Err(); err != nil {
		return nil, s.explain("list "+string(kind), err)
	}
	return out, nil
}

// Revision implements Store.
func (s *SQLite) Revision(ctx context.Context) (int64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return 0, ErrClosed
	}
	var rev int64
	if err := s.head.QueryRowContext(ctx).Scan(&rev); err != nil {
		return 0, s.explain("read the revision", err)
	}
	return rev, nil
}

// Changes implements Store.
func (s *SQLite) Changes(ctx context.Context, after int64, limit int) ([]Change, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, ErrClosed
	}
	rows, err := s.since.QueryContext(ctx, max(after, 0), page(limit))
	if err != nil {
		return nil, s.explain("read changes", err)
	}
	defer rows.Close()
	var out []Change
	for rows.Next() {
		var c Change
		var at int64
		if err := rows.Scan(&c.Revision, &c.Kind, &c.Key, &c.Deleted, &at); err != nil {
			return nil, s.explain("read changes", err)
		}
		c.At = time.UnixMicro(at).UTC()
		out = append(out, c)
	}
	if err := rows.Err(); err != nil {
		return nil, s.explain("read changes", err)
	}
	// Revisions have no gaps, so a first row further on means a cut.
	if len(out) > 0 && out[0].Revision != max(after, 0)+1 {
		return nil, fmt.Errorf("changes after %d: %w", after, ErrCompacted)
	}
	return out, nil
}

// Write implements Store.
func (s *SQLite) Write(ctx context.Context, ops ...Op) (int64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return 0, ErrClosed
	}
	for _, op := range ops {
		if err := op.check(); err != nil {
			return 0, err
		}
	}
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return 0, s.explain("begin a write", err)
	}
	defer tx.Rollback() // after Commit this does nothing
	first, err := revision(ctx, tx)
	if err != nil {
		return 0, s.explain("read the revision", err)
	}
	rev, now := first, s.now().UnixMicro()
	for _, op := range ops {
		changed, err := s.apply(ctx, tx, op, rev+1, now)
		if err != nil {
			return 0, err
		}
		if changed {
			rev++
		}
	}
	if rev == first {
		return rev, nil
	}
	if rev/tidyEvery != first/tidyEvery {
		if err := s.tidy(ctx, tx, rev, now); err != nil {
			return 0, s.explain("tidy up", err)
		}
	}
	if err := tx.Commit(); err != nil {
		return 0, s.explain("commit", err)
	}
	s.ring()
	return rev, nil
}

// ring wakes everyone who watches.
func (s *SQLite) ring() {
	s.bellMu.Lock()
	defer s.bellMu.Unlock()
	if s.bell != nil {
		close(s.bell)
	}
	s.bell = nil
}

// next returns a channel that the next ring closes.
func (s *SQLite) next() <-chan struct{} {
	s.bellMu.Lock()
	defer s.bellMu.Unlock()
	if s.bell == nil {
		s.bell = make(chan struct{})
	}
	return s.bell
}

// Watch implements Store. The file is ours alone, so that every write is seen
// at once.
func (s *SQLite) Watch(ctx context.Context, after int64) (int64, error) {
	for {
		rung := s.next()
		if rev, err := s.Revision(ctx); err != nil || rev > after {
			return rev, err
		}
		select {
		case <-rung:
		case <-ctx.Done():
			return 0, fmt.Errorf("watch store %s: %w", s.path, ctx.Err())
		}
	}
}

// apply runs one op inside a transaction and says if it changed anything.
func (s *SQLite) apply(ctx context.Context, tx *sql.Tx, op Op, rev, now int64) (bool, error) {
	var have, expires int64
	err := tx.StmtContext(ctx, s.find).QueryRowContext(ctx, string(op.Kind), op.Key).Scan(&have, &expires)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return false, s.explain("read "+string(op.Kind), err)
	}
	if expires > 0 && expires <= now {
		have = 0
	}
	if op.IfRevision != nil && *op.IfRevision != have {
		return false, fmt.Errorf("%s %q is at revision %d, not %d: %w", op.Kind, op.Key, have, *op.IfRevision, ErrConflict)
	}
	if op.Delete {
		if have == 0 {
			return false, nil
		}
		_, err = tx.StmtContext(ctx, s.remove).ExecContext(ctx, string(op.Kind), op.Key)
	} else {
		value, until := op.Value, int64(0)
		if value == nil {
			value = []byte{}
		}
		if !op.Expires.IsZero() {
			until = op.Expires.UnixMicro()
		}
		_, err = tx.StmtContext(ctx, s.put).ExecContext(ctx, string(op.Kind), op.Key, value, rev, until)
	}
	if err == nil {
		_, err = tx.StmtContext(ctx, s.note).ExecContext(ctx, rev, string(op.Kind), op.Key, op.Delete, now)
	}
	if err != nil {
		return false, s.explain("write "+string(op.Kind), err)
	}
	return true, nil
}

// tidy drops changes that need not be kept and records that expired long ago.
func (s *SQLite) tidy(ctx context.Context, tx *sql.Tx, rev, now int64) error {
	if _, err := tx.ExecContext(ctx, `DELETE FROM changes WHERE revision <= ?`, rev-s.keep); err != nil {
		return err
	}
	_, err := tx.ExecContext(ctx, `DELETE FROM records WHERE expires > 0 AND expires <= ?`, now-purgeAfter.Microseconds())
	return err
}

// Close implements Store.
func (s *SQLite) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	s.ring()
	// The writer closes last: the last connection out folds the WAL into the
	// file and removes it.
	var errs []error
	if s.read != nil {
		errs = append(errs, s.read.Close())
	}
	if s.write != nil {
		errs = append(errs, s.write.Close())
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close store %s: %w", s.path, err)
	}
	return nil
}

// revision returns the newest revision as a transaction sees it.
func revision(ctx context.Context, tx *sql.Tx) (int64, error) {
	var rev int64
	err := tx.QueryRowContext(ctx, headQuery).Scan(&rev)
	return rev, err
}

// fix completes a record that was scanned.
func (r *Record) fix(expires int64) {
	if r.Value == nil {
		r.Value = []byte{}
	}
	if expires > 0 {
		r.Expires = time.UnixMicro(expires).UTC()
	}
}
