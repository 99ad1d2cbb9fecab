package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Postgres is a Store in a PostgreSQL database, which several issuers share.
//
// Writes of one process that come together are committed together, by a
// goroutine that lives while there are any. A call waits while the database is
// away, as long as Patience says, and a Write is done once at most even if the
// connection breaks during its commit.
type Postgres struct {
	cfg  PostgresConfig
	pool *pgxpool.Pool
	// name is where the database is, without any secret.
	name string

	// gate is held for reading by every call, so that Close waits for them.
	gate   sync.RWMutex
	closed bool
	// life ends when Close begins: whoever waits, waits no longer.
	life context.Context
	end  context.CancelFunc

	// mu guards the fields below. It is taken after gate.
	mu      sync.Mutex
	queue   []*draft
	writing bool
	work    sync.WaitGroup
	// ear is a connection that hears of commits, when no Watch has it.
	ear *pgx.Conn
}

var _ Store = (*Postgres)(nil)

// enter begins a call; leave ends it.
func (s *Postgres) enter() error {
	s.gate.RLock()
	if s.closed {
		s.gate.RUnlock()
		return ErrClosed
	}
	return nil
}

func (s *Postgres) leave() { s.gate.RUnlock() }

// query runs one statement, which sees one moment, and scans each of its rows.
// It begins again if the connection is lost: it changes nothing.
func (s *Postgres) query(ctx context.Context, doing string, begin func(), scan func(pgx.Rows) error, text string, args ...any) error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	err := s.patiently(ctx, func(ctx context.Context) error {
		begin()
		rows, err := s.pool.Query(ctx, text, args...)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			if err := scan(rows); err != nil {
				return err
			}
		}
		return rows.Err()
	})
	if err != nil {
		return s.explain(doing, err)
	}
	return nil
}

// patiently repeats what failed for want of a connection.
func (s *Postgres) patiently(ctx context.Context, try func(context.Context) error) error {
	until := time.Now().Add(s.cfg.Patience)
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		err := try(ctx)
		if err == nil || ctx.Err() != nil || !lost(err) || time.Now().Add(wait).After(until) {
			return err
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-s.life.Done():
			timer.Stop()
			return err
		}
	}
}

// Get implements Store.
func (s *Postgres) Get(ctx context.Context, kind Kind, key string) (Record, error) {
	var out []Record
	// No record has such a name, and the database would refuse the question.
	if checkName("kind", string(kind)) == nil && checkName("key", key) == nil {
		err := s.query(ctx, "read "+string(kind), func() { out = nil }, func(rows pgx.Rows) error {
			r, expires := Record{Kind: kind, Key: key}, int64(0)
			err := rows.Scan(&r.Value, &r.Revision, &expires)
			r.fix(expires)
			out = append(out, r)
			return err
		}, `SELECT value, revision, expires FROM records WHERE kind = $1 AND key = $2 AND (expires = 0 OR expires > $3)`,
			string(kind), key, s.cfg.Now().UnixMicro())
		if err != nil {
			return Record{}, err
		}
	}
	if len(out) == 0 {
		return Record{}, fmt.Errorf("%s %q: %w", kind, key, ErrNotFound)
	}
	return out[0], nil
}

// List implements Store.
func (s *Postgres) List(ctx context.Context, kind Kind, after string, limit int) ([]Record, error) {
	var out []Record
	err := s.query(ctx, "list "+string(kind), func() { out = nil }, func(rows pgx.Rows) error {
		r, expires := Record{Kind: kind}, int64(0)
		err := rows.Scan(&r.Key, &r.Value, &r.Revision, &expires)
		r.fix(expires)
		out = append(out, r)
		return err
	}, `SELECT key, value, revision, expires FROM records WHERE kind = $1 AND key > $2 AND (expires = 0 OR expires > $3) ORDER BY key LIMIT $4`,
		string(kind), after, s.cfg.Now().UnixMicro(), page(limit))
	return out, err
}

// Revision implements Store.
func (s *Postgres) Revision(ctx context.Context) (int64, error) {
	var rev int64
	err := s.query(ctx, "read the revision", func() {}, func(rows pgx.Rows) error { return rows.Scan(&rev) }, `SELECT revision FROM head`)
	return rev, err
}

// Changes implements Store.
func (s *Postgres) Changes(ctx context.Context, after int64, limit int) ([]Change, error) {
	after = max(after, 0)
	var out []Change
	err := s.query(ctx, "read changes", func() { out = nil }, func(rows pgx.Rows) error {
		var c Change
		var at int64
		err := rows.Scan(&c.Revision, &c.Kind, &c.Key, &c.Deleted, &at)
		c.At = time.UnixMicro(at).UTC()
		out = append(out, c)
		return err
	}, `SELECT revision, kind, key, deleted, at FROM changes WHERE revision > $1 ORDER BY revision LIMIT $2`, after, page(limit))
	if err != nil {
		return nil, err
	}
	// Revisions have no gaps, so a first row further on means a cut.
	if len(out) > 0 && out[0].Revision != after+1 {
		return nil, fmt.Errorf("changes after %d: %w", after, ErrCompacted)
	}
	return out, nil
}

// Watch implements Store. Commits are announced by NOTIFY; since that is lost
// with a connection, the revision is read every two seconds as well.
func (s *Postgres) Watch(ctx context.Context, after int64) (int64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.life, cancel)()
	ear := s.listen(ctx)
	defer func() { s.hang(ear) }()
	for {
		rev, err := s.Revision(ctx)
		switch {
		case s.life.Err() != nil:
			return 0, ErrClosed
		case err != nil:
			return 0, err
		case rev > after:
			return rev, nil
		}
		poll, stop := context.WithTimeout(ctx, pollEvery)
		if ear == nil {
			<-poll.Done()
			ear = s.listen(ctx)
		} else if _, err := ear.WaitForNotification(poll); err != nil && poll.Err() == nil {
			s.hang(ear)
			ear = nil
		}
		stop()
	}
}

// listen returns a connection that hears of commits from now on, nil if none
// can be had.
func (s *Postgres) listen(ctx context.Context) *pgx.Conn {
	s.mu.Lock()
	ear := s.ear
	s.ear = nil
	s.mu.Unlock()
	if ear != nil {
		return ear
	}
	ear, err := pgx.ConnectConfig(ctx, s.pool.Config().ConnConfig)
	if err != nil {
		return nil
	}
	if _, err := ear.Exec(ctx, `LISTEN `+channel); err != nil {
		s.hang(ear)
		return nil
	}
	return ear
}

// hang keeps a listening connection for the next Watch, or closes it.
func (s *Postgres) hang(ear *pgx.Conn) {
	if ear == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ear == nil && s.life.Err() == nil && !ear.IsClosed() {
		s.ear = ear
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = ear.Close(ctx) // the server ends it if we cannot
}

// Close implements Store.
func (s *Postgres) Close() error {
	s.end()
	s.gate.Lock()
	defer s.gate.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	s.work.Wait()
	s.mu.Lock()
	ear := s.ear
	s.ear = nil
	s.mu.Unlock()
	s.hang(ear)
	if s.pool != nil {
		s.pool.Close()
	}
	return nil
}

// isCancel says that a caller went away.
func isCancel(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
