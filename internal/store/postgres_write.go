package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	// Of writes that come together at most maxDrafts, or about maxBytes of
	// values, are committed together.
	maxDrafts = 256
	maxBytes  = 2 * MaxValue

	beginText = `BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE`
	lockText  = `SELECT revision FROM head FOR UPDATE`
	findText  = `SELECT r.kind, r.key, r.revision, r.expires FROM records r JOIN unnest($1::text[], $2::text[]) AS w(kind, key) ON r.kind = w.kind AND r.key = w.key`
	doneText  = `SELECT count(*) FROM changes WHERE revision = $1 AND batch = $2`
	putText   = `INSERT INTO records (kind, key, value, revision, expires) SELECT * FROM unnest($1::text[], $2::text[], $3::bytea[], $4::bigint[], $5::bigint[])
		ON CONFLICT (kind, key) DO UPDATE SET value = excluded.value, revision = excluded.revision, expires = excluded.expires`
	removeText = `DELETE FROM records r USING unnest($1::text[], $2::text[]) AS w(kind, key) WHERE r.kind = w.kind AND r.key = w.key`
	noteText   = `INSERT INTO changes (revision, kind, key, deleted, at, batch) SELECT *, $5::bigint, $6::bigint FROM unnest($1::bigint[], $2::text[], $3::text[], $4::boolean[])`
	moveText   = `UPDATE head SET revision = $1`
	notifyText = `SELECT pg_notify('` + channel + `', '')`
)

// A draft is a Write on its way.
type draft struct {
	ops  []Op
	done chan struct{} // closed when rev and err are set
	rev  int64
	err  error
}

// Write implements Store.
func (s *Postgres) Write(ctx context.Context, ops ...Op) (int64, error) {
	if err := s.enter(); err != nil {
		return 0, err
	}
	defer s.leave()
	if err := ctx.Err(); err != nil {
		return 0, s.explain("write", err)
	}
	for _, op := range ops {
		if err := op.check(); err != nil {
			return 0, err
		}
	}
	d := &draft{ops: slices.Clone(ops), done: make(chan struct{})}
	for i := range d.ops {
		// The caller may go away, and change its bytes, while they are sent.
		d.ops[i].Value = bytes.Clone(d.ops[i].Value)
	}
	s.mu.Lock()
	s.queue = append(s.queue, d)
	if !s.writing {
		s.writing = true
		s.work.Go(s.drain)
	}
	s.mu.Unlock()
	select {
	case <-d.done:
		return d.rev, d.err
	case <-ctx.Done():
	}
	s.mu.Lock()
	if i := slices.Index(s.queue, d); i >= 0 {
		s.queue = slices.Delete(s.queue, i, i+1)
		s.mu.Unlock()
		return 0, s.explain("write", ctx.Err())
	}
	s.mu.Unlock()
	return 0, fmt.Errorf("store %s: a write was not awaited and may be done or not: %w", s.name, ctx.Err())
}

// drain commits what is queued until nothing is.
func (s *Postgres) drain() {
	for {
		s.mu.Lock()
		n, size := 0, 0
		for n < len(s.queue) && n < maxDrafts && size < maxBytes {
			for _, op := range s.queue[n].ops {
				size += len(op.Value)
			}
			n++
		}
		group := slices.Clone(s.queue[:n])
		s.queue = slices.Delete(s.queue, 0, n)
		s.writing = n > 0
		s.mu.Unlock()
		if n == 0 {
			return
		}
		s.commit(group)
		for _, d := range group {
			close(d.done)
		}
	}
}

// commit carries a group of drafts out and sets their results.
func (s *Postgres) commit(group []*draft) {
	ctx, cancel := context.WithTimeout(context.Background(), s.cfg.Patience+2*statementTimeout)
	defer cancel()
	var p *plan
	err := s.patiently(ctx, func(ctx context.Context) error { return s.try(ctx, group, &p) })
	for i, d := range group {
		switch {
		case err != nil:
			d.err = s.explain("write", err)
		default:
			d.rev, d.err = p.revs[i], p.errs[i]
		}
	}
}

// try carries a group out in one transaction. *sent is the plan of an earlier
// try whose commit was sent and not answered, if any.
func (s *Postgres) try(ctx context.Context, group []*draft, sent **plan) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	// What is released inside a transaction is closed by the pool.
	defer conn.Release()
	first, found, done, err := s.lock(ctx, conn, group, *sent)
	if err != nil {
		return err
	}
	if done {
		_, err := conn.Exec(ctx, `ROLLBACK`)
		return err
	}
	p := newPlan(group, first, found, s.cfg.Now().UnixMicro())
	if p.last == first {
		*sent = p
		_, err := conn.Exec(ctx, `ROLLBACK`)
		return err
	}
	// From here on the answer may be lost while the commit is not.
	*sent = p
	return s.send(ctx, conn, p)
}

// lock waits for its turn and reads what the group is about. Between its
// return and the end of the transaction nobody else writes.
func (s *Postgres) lock(ctx context.Context, conn *pgxpool.Conn, group []*draft, sent *plan) (first int64, found map[name]state, done bool, err error) {
	kinds, keys := names(group)
	b := new(pgx.Batch)
	b.Queue(beginText)
	b.Queue(lockText).QueryRow(func(row pgx.Row) error { return row.Scan(&first) })
	found = make(map[name]state)
	b.Queue(findText, kinds, keys).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var n name
			var st state
			if err := rows.Scan(&n.kind, &n.key, &st.revision, &st.expires); err != nil {
				return err
			}
			found[n] = st
		}
		return rows.Err()
	})
	if sent != nil {
		b.Queue(doneText, sent.last, sent.batch).QueryRow(func(row pgx.Row) error {
			var n int
			err := row.Scan(&n)
			done = n > 0
			return err
		})
	}
	return first, found, done, conn.SendBatch(ctx, b).Close()
}

// send writes a plan and commits it.
func (s *Postgres) send(ctx context.Context, conn *pgxpool.Conn, p *plan) error {
	b := new(pgx.Batch)
	var w puts
	for n, st := range p.after {
		if st.revision == 0 {
			w.goneKinds, w.goneKeys = append(w.goneKinds, n.kind), append(w.goneKeys, n.key)
			continue
		}
		w.kinds, w.keys = append(w.kinds, n.kind), append(w.keys, n.key)
		w.values, w.revs, w.expires = append(w.values, st.value), append(w.revs, st.revision), append(w.expires, st.expires)
	}
	if len(w.kinds) > 0 {
		b.Queue(putText, w.kinds, w.keys, w.values, w.revs, w.expires)
	}
	if len(w.goneKinds) > 0 {
		b.Queue(removeText, w.goneKinds, w.goneKeys)
	}
	b.Queue(noteText, p.noteRevs, p.noteKinds, p.noteKeys, p.noteDeleted, p.now, p.batch)
	b.Queue(moveText, p.last)
	if p.last/tidyEvery != p.first/tidyEvery {
		b.Queue(`DELETE FROM changes WHERE revision <= $1`, p.last-s.cfg.KeepChanges)
		b.Queue(`DELETE FROM records WHERE expires > 0 AND expires <= $1`, p.now-purgeAfter.Microseconds())
	}
	b.Queue(notifyText)
	b.Queue(`COMMIT`)
	return conn.SendBatch(ctx, b).Close()
}

type puts struct {
	kinds, keys, goneKinds, goneKeys []string
	values                           [][]byte
	revs, expires                    []int64
}

type name struct{ kind, key string }

// state is a record as a plan sees it; revision 0 means there is none.
type state struct {
	revision, expires int64
	value             []byte
}

func names(group []*draft) (kinds, keys []string) {
	seen := make(map[name]bool)
	for _, d := range group {
		for _, op := range d.ops {
			if n := (name{string(op.Kind), op.Key}); !seen[n] {
				seen[n] = true
				kinds, keys = append(kinds, n.kind), append(keys, n.key)
			}
		}
	}
	return kinds, keys
}

// A plan is what a group of drafts comes to.
type plan struct {
	first, last int64
	now, batch  int64
	revs        []int64
	errs        []error

	// after holds the records that are others in the end.
	after map[name]state

	noteRevs            []int64
	noteKinds, noteKeys []string
	noteDeleted         []bool
}

// newPlan applies drafts one after the other to the records found. One that
// conflicts leaves no trace.
func newPlan(group []*draft, first int64, found map[name]state, now int64) *plan {
	p := &plan{first: first, last: first, now: now, batch: rand.Int64(), after: make(map[name]state)}
	for _, d := range group {
		rev, err := p.apply(d.ops, found)
		p.revs, p.errs = append(p.revs, rev), append(p.errs, err)
	}
	return p
}

func (p *plan) apply(ops []Op, found map[name]state) (int64, error) {
	mine := make(map[name]state)
	rev, notes := p.last, len(p.noteRevs)
	for _, op := range ops {
		n := name{string(op.Kind), op.Key}
		have, ok := mine[n]
		if !ok {
			have, ok = p.after[n]
		}
		if !ok {
			have = found[n]
		}
		if have.expires > 0 && have.expires <= p.now {
			have.revision = 0
		}
		if op.IfRevision != nil && *op.IfRevision != have.revision {
			p.noteRevs, p.noteKinds = p.noteRevs[:notes], p.noteKinds[:notes]
			p.noteKeys, p.noteDeleted = p.noteKeys[:notes], p.noteDeleted[:notes]
			return 0, fmt.Errorf("%s %q is at revision %d, not %d: %w", op.Kind, op.Key, have.revision, *op.IfRevision, ErrConflict)
		}
		if op.Delete && have.revision == 0 {
			continue
		}
		rev++
		next := state{}
		if !op.Delete {
			next = state{revision: rev, value: op.Value}
			if next.value == nil {
				next.value = []byte{}
			}
			if !op.Expires.IsZero() {
				next.expires = op.Expires.UnixMicro()
			}
		}
		mine[n] = next
		p.noteRevs, p.noteKinds = append(p.noteRevs, rev), append(p.noteKinds, n.kind)
		p.noteKeys, p.noteDeleted = append(p.noteKeys, n.key), append(p.noteDeleted, op.Delete)
	}
	for n, st := range mine {
		p.after[n] = st
	}
	p.last = rev
	return rev, nil
}

// lost says that an error is one of the way to the database, not of what was
// asked: the same may succeed on another connection, or in a moment.
func lost(err error) bool {
	if isCancel(err) || errors.Is(err, pgx.ErrNoRows) {
		return false
	}
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		var scan pgx.ScanArgError
		return !errors.As(err, &scan)
	}
	switch pg.Code {
	case "57P01", "57P02", "57P03", // it is stopped, has crashed, or starts
		"53300", // too many connections
		"25P03": // we were too slow in a transaction, or stopped in it
		return true
	}
	return pg.Code[:min(2, len(pg.Code))] == "08"
}

const statementTimeout = 10 * time.Second
