package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"
	"modernc.org/sqlite"
)

//go:embed migrations/*/*.sql
var migrations embed.FS

const (
	// applicationID marks our files; the first migration sets it.
	applicationID = 0x53414c59
	headQuery     = `SELECT coalesce(max(revision), 0) FROM changes`

	// The result codes of SQLite that need another sentence.
	codeCorrupt = 11
	codeFull    = 13
	codeNotADB  = 26
)

// SQLiteConfig says how a SQLite store is opened.
type SQLiteConfig struct {
	// Path of the database file. It is created with mode 0600 if it is absent;
	// its directory must exist and must not be writable by everyone. Beside it
	// appear files with "-wal", "-shm" and "-lock" at the end. Required.
	Path string
	// Now is the clock that expiry is read from. Default time.Now.
	Now func() time.Time
	// KeepChanges is how many of the newest changes are kept. Default
	// KeepChanges; a test makes it smaller.
	KeepChanges int64
}

// OpenSQLite opens or creates the store in the file at path with defaults.
func OpenSQLite(ctx context.Context, path string) (*SQLite, error) {
	return SQLiteConfig{Path: path}.Open(ctx)
}

// Open opens or creates the store: it takes the file for this process alone,
// checks that it is whole, and brings its schema up to date.
func (c SQLiteConfig) Open(ctx context.Context) (*SQLite, error) {
	if c.Path == "" {
		return nil, errors.New("open store: the path is missing")
	}
	path, err := filepath.Abs(c.Path)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", c.Path, err)
	}
	s := &SQLite{path: path, keep: c.KeepChanges, now: c.Now}
	if s.keep <= 0 {
		s.keep = KeepChanges
	}
	if s.now == nil {
		s.now = time.Now
	}
	if err := s.open(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *SQLite) open(ctx context.Context) error {
	if err := s.secure(); err != nil {
		return err
	}
	var err error
	if s.write, err = s.connect(1, "busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)", "trusted_schema(0)"); err != nil {
		return err
	}
	if err := s.inspect(ctx); err != nil {
		return err
	}
	if err := s.migrate(ctx); err != nil {
		return err
	}
	if s.read, err = s.connect(readers, "busy_timeout(5000)", "query_only(1)", "trusted_schema(0)"); err != nil {
		return err
	}
	return s.prepare(ctx)
}

// secure makes sure that the file is ours alone: by its directory, its mode,
// and a lock that no other process holds.
func (s *SQLite) secure() error {
	dir := filepath.Dir(s.path)
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("open store %s: its directory does not exist; create it: mkdir -m 700 %s", s.path, dir)
	case err != nil:
		return fmt.Errorf("open store: %w", err)
	case !info.IsDir():
		return fmt.Errorf("open store %s: %s is not a directory", s.path, dir)
	case info.Mode().Perm()&0o002 != 0:
		return fmt.Errorf("open store %s: anyone may write to its directory (mode %04o); run: chmod o-w %s", s.path, info.Mode().Perm(), dir)
	}
	if s.lock, err = private(s.path + "-lock"); err != nil {
		return err
	}
	if err := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return fmt.Errorf("open store %s: another process has it open; stop that issuer first", s.path)
	}
	// Made here, not by SQLite, so that it never exists with another mode.
	// SQLite gives -wal and -shm the mode of this file.
	file, err := private(s.path)
	if err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	return syncDir(dir)
}

// syncDir makes the names in a directory survive a power cut.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("open store: sync directory %s: %w", dir, err)
	}
	return nil
}

// private opens or creates a regular file of mode 0600 that belongs to us.
func private(path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("open store: %s cannot be read and written by user %d; run the issuer as the owner of the file", path, os.Geteuid())
	case errors.Is(err, syscall.ELOOP):
		return nil, fmt.Errorf("open store: %s is a symbolic link; give the path of the file itself", path)
	case err != nil:
		return nil, fmt.Errorf("open store: %w", err)
	}
	info, err := file.Stat()
	switch {
	case err != nil:
		err = fmt.Errorf("open store: %w", err)
	case !info.Mode().IsRegular():
		err = fmt.Errorf("open store: %s is not a regular file", path)
	case info.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()):
		err = fmt.Errorf("open store: %s belongs to user %d, not to user %d; run the issuer as the owner of the file", path, info.Sys().(*syscall.Stat_t).Uid, os.Geteuid())
	case info.Mode().Perm()&0o077 != 0:
		err = fmt.Errorf("open store: %s is open to others (mode %04o); run: chmod 600 %s", path, info.Mode().Perm(), path)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// connect opens a pool of n connections, each with the given pragmas.
func (s *SQLite) connect(n int, pragmas ...string) (*sql.DB, error) {
	query := url.Values{"_pragma": pragmas, "_txlock": {"immediate"}}
	dsn := url.URL{Scheme: "file", Path: s.path, RawQuery: query.Encode()}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", s.path, err)
	}
	db.SetMaxOpenConns(n)
	db.SetMaxIdleConns(n)
	return db, nil
}

// inspect refuses a file that is damaged or belongs to another program.
func (s *SQLite) inspect(ctx context.Context) error {
	var id, tables int64
	var verdict string
	err := s.write.QueryRowContext(ctx, `PRAGMA application_id`).Scan(&id)
	if err == nil {
		err = s.write.QueryRowContext(ctx, `SELECT count(*) FROM sqlite_schema WHERE name NOT LIKE 'goose%' AND name NOT LIKE 'sqlite%'`).Scan(&tables)
	}
	if err == nil {
		err = s.write.QueryRowContext(ctx, `PRAGMA quick_check(1)`).Scan(&verdict)
	}
	switch {
	case err != nil:
		return s.explain("open", err)
	case verdict != "ok":
		return s.damaged(verdict)
	case id != applicationID && tables > 0:
		return fmt.Errorf("open store %s: it is the database of another program; give another path", s.path)
	}
	return nil
}

// migrate brings the schema up to the newest migration that we carry.
func (s *SQLite) migrate(ctx context.Context) error {
	dir, err := fs.Sub(migrations, "migrations/sqlite")
	if err != nil {
		return fmt.Errorf("open store %s: %w", s.path, err)
	}
	p, err := goose.NewProvider(database.DialectSQLite3, s.write, dir)
	if err != nil {
		return fmt.Errorf("open store %s: load migrations: %w", s.path, err)
	}
	have, newest, err := p.GetVersions(ctx)
	if err != nil {
		return s.explain("read the schema version", err)
	}
	if have > newest {
		return fmt.Errorf("open store %s: a newer issuer wrote it (schema %d, this one knows %d); run that version or restore an older backup", s.path, have, newest)
	}
	if _, err := p.Up(ctx); err != nil {
		return s.explain("migrate", err)
	}
	return nil
}

func (s *SQLite) prepare(ctx context.Context) error {
	live := ` AND (expires = 0 OR expires > ?3)`
	for _, p := range []struct {
		stmt **sql.Stmt
		db   *sql.DB
		text string
	}{
		{&s.find, s.write, `SELECT revision, expires FROM records WHERE kind = ? AND key = ?`},
		{&s.put, s.write, `INSERT INTO records (kind, key, value, revision, expires) VALUES (?, ?, ?, ?, ?)
			ON CONFLICT (kind, key) DO UPDATE SET value = excluded.value, revision = excluded.revision, expires = excluded.expires`},
		{&s.remove, s.write, `DELETE FROM records WHERE kind = ? AND key = ?`},
		{&s.note, s.write, `INSERT INTO changes (revision, kind, key, deleted, at) VALUES (?, ?, ?, ?, ?)`},
		{&s.get, s.read, `SELECT value, revision, expires FROM records WHERE kind = ?1 AND key = ?2` + live},
		{&s.list, s.read, `SELECT key, value, revision, expires FROM records WHERE kind = ?1 AND key > ?2` + live + ` ORDER BY key LIMIT ?4`},
		{&s.head, s.read, headQuery},
		{&s.since, s.read, `SELECT revision, kind, key, deleted, at FROM changes WHERE revision > ? ORDER BY revision LIMIT ?`},
	} {
		stmt, err := p.db.PrepareContext(ctx, p.text)
		if err != nil {
			return s.explain("prepare", err)
		}
		*p.stmt = stmt
	}
	return nil
}

// explain turns an error of the database into a sentence that an operator can
// act on.
func (s *SQLite) explain(doing string, err error) error {
	var e *sqlite.Error
	if errors.As(err, &e) {
		switch e.Code() & 0xff {
		case codeCorrupt, codeNotADB:
			return s.damaged(err.Error())
		case codeFull:
			return fmt.Errorf("%s: the disk under %s is full; free some space: %w", doing, s.path, err)
		}
	}
	return fmt.Errorf("store %s: %s: %w", s.path, doing, err)
}

func (s *SQLite) damaged(how string) error {
	return fmt.Errorf("store %s is damaged (%s); restore it from a backup, or move it away to start empty", s.path, strings.Join(strings.Fields(how), " "))
}
