package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"
)

const (
	// schema holds our tables, so that we never meet another program's.
	schema = "sallyport"
	// channel is where commits are announced.
	channel = "sallyport_changes"
	// migrationLock keeps issuers that start together from migrating together.
	migrationLock = applicationID
	// pollEvery bounds how late a commit is seen when its announcement is lost.
	pollEvery = 2 * time.Second
)

// PostgresConfig says how a PostgreSQL store is opened.
type PostgresConfig struct {
	// URL names the database: postgres://user:password@host:5432/name. The
	// database must exist, in UTF-8, and the user must own it or be allowed to
	// create a schema in it. A host that is neither a socket nor this machine
	// needs sslmode=verify-full. Required; it holds a secret.
	URL string
	// Patience is how long a call waits for a database that is away, such as
	// during its restart. Default 10 s.
	Patience time.Duration
	// Now is the clock that expiry is read from. Issuers that share a database
	// need clocks that agree within a second. Default time.Now.
	Now func() time.Time
	// KeepChanges is how many of the newest changes are kept. Default
	// KeepChanges; a test makes it smaller.
	KeepChanges int64
}

// Open opens the store and brings its schema up to date. Each way in which the
// database can be wrong is one sentence.
func (c PostgresConfig) Open(ctx context.Context) (*Postgres, error) {
	if c.Patience <= 0 {
		c.Patience = 10 * time.Second
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.KeepChanges <= 0 {
		c.KeepChanges = KeepChanges
	}
	cfg, err := c.parse()
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s := &Postgres{cfg: c, name: where(cfg.ConnConfig)}
	s.life, s.end = context.WithCancel(context.Background())
	if err := s.open(ctx, cfg); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// parse reads the URL. Its errors never quote it.
func (c PostgresConfig) parse() (*pgxpool.Config, error) {
	if !strings.HasPrefix(c.URL, "postgres://") && !strings.HasPrefix(c.URL, "postgresql://") {
		return nil, errors.New("the database URL must begin with postgres://, as in postgres://sallyport@db.example:5432/sallyport?sslmode=verify-full")
	}
	cfg, err := pgxpool.ParseConfig(c.URL)
	if err != nil {
		return nil, errors.New("the database URL cannot be read, or names a file that cannot; write it as postgres://user:password@host:5432/name, with special characters of the password in percent form")
	}
	if err := verifiedOnly(cfg.ConnConfig); err != nil {
		return nil, err
	}
	if !strings.Contains(c.URL, "pool_max_conns") {
		cfg.MaxConns = 8
	}
	conn := cfg.ConnConfig
	if conn.ConnectTimeout == 0 {
		conn.ConnectTimeout = 5 * time.Second
	}
	ms := strconv.FormatInt(statementTimeout.Milliseconds(), 10)
	for k, v := range map[string]string{
		"application_name":  "sallyport-issuer",
		"search_path":       schema,
		"statement_timeout": ms,
		// An issuer that is frozen with the lock in hand loses it.
		"idle_in_transaction_session_timeout": ms,
	} {
		conn.RuntimeParams[k] = v
	}
	return cfg, nil
}

// verifiedOnly refuses to send what decides over access through a network where
// anyone could change it.
func verifiedOnly(c *pgx.ConnConfig) error {
	check := func(host string, verified bool) error {
		if verified || strings.HasPrefix(host, "/") || host == "localhost" {
			return nil
		}
		if ip := net.ParseIP(host); ip != nil && ip.IsLoopback() {
			return nil
		}
		return fmt.Errorf("the connection to %s would not be verified; add sslmode=verify-full to the database URL, and sslrootcert= if its certificate is of your own CA", host)
	}
	verified := func(c *pgconn.Config) bool {
		return c.TLSConfig != nil && (!c.TLSConfig.InsecureSkipVerify || c.TLSConfig.VerifyPeerCertificate != nil)
	}
	if err := check(c.Host, verified(&c.Config)); err != nil {
		return err
	}
	for _, f := range c.Fallbacks {
		if err := check(f.Host, f.TLSConfig != nil && (!f.TLSConfig.InsecureSkipVerify || f.TLSConfig.VerifyPeerCertificate != nil)); err != nil {
			return err
		}
	}
	return nil
}

// where is the database without any secret.
func where(c *pgx.ConnConfig) string {
	if strings.HasPrefix(c.Host, "/") {
		return fmt.Sprintf("%s at %s", c.Database, c.Host)
	}
	return fmt.Sprintf("%s at %s", c.Database, net.JoinHostPort(c.Host, strconv.Itoa(int(c.Port))))
}

func (s *Postgres) open(ctx context.Context, cfg *pgxpool.Config) error {
	// Migrations take the time they need.
	single := cfg.ConnConfig.Copy()
	single.RuntimeParams["statement_timeout"] = "0"
	conn, err := pgx.ConnectConfig(ctx, single)
	if err != nil {
		return s.unreachable(err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := s.inspect(ctx, conn); err != nil {
		return err
	}
	if err := s.migrate(ctx, conn, single); err != nil {
		return err
	}
	if s.pool, err = pgxpool.NewWithConfig(ctx, cfg); err != nil {
		return s.unreachable(err)
	}
	return nil
}

// inspect refuses a database that cannot keep what we promise.
func (s *Postgres) inspect(ctx context.Context, conn *pgx.Conn) error {
	var encoding, fsync, synchronous string
	var standby bool
	err := conn.QueryRow(ctx, `SELECT current_setting('server_encoding'), current_setting('fsync'), current_setting('synchronous_commit'), pg_is_in_recovery()`).
		Scan(&encoding, &fsync, &synchronous, &standby)
	switch {
	case err != nil:
		return s.explain("open", err)
	case standby:
		return fmt.Errorf("open store %s: it is a standby, which takes no writes; give the address of the primary", s.name)
	case encoding != "UTF8":
		return fmt.Errorf("open store %s: its encoding is %s; create the database with: createdb --encoding=UTF8 --template=template0", s.name, encoding)
	case fsync == "off":
		return fmt.Errorf("open store %s: the server runs with fsync off and would lose writes that we acknowledged; set fsync = on", s.name)
	case synchronous == "off":
		return fmt.Errorf("open store %s: synchronous_commit is off and would lose writes that we acknowledged; run: ALTER ROLE CURRENT_USER SET synchronous_commit = on", s.name)
	}
	return nil
}

// migrate brings the schema up to the newest migration that we carry. A newer
// issuer may migrate while older ones run, so that a migration first only adds
// what they do not mind; what they used goes in a later version.
func (s *Postgres) migrate(ctx context.Context, conn *pgx.Conn, cfg *pgx.ConnConfig) error {
	if _, err := conn.Exec(ctx, `SELECT pg_advisory_lock($1)`, int64(migrationLock)); err != nil {
		return s.explain("wait for another issuer to migrate", err)
	}
	// The lock ends with the connection.
	if _, err := conn.Exec(ctx, `CREATE SCHEMA IF NOT EXISTS `+schema); err != nil {
		return s.explain("create the schema "+schema, err)
	}
	dir, err := fs.Sub(migrations, "migrations/postgres")
	if err != nil {
		return fmt.Errorf("open store %s: %w", s.name, err)
	}
	db := stdlib.OpenDB(*cfg)
	defer db.Close()
	p, err := goose.NewProvider(database.DialectPostgres, db, dir)
	if err != nil {
		return fmt.Errorf("open store %s: load migrations: %w", s.name, err)
	}
	have, newest, err := p.GetVersions(ctx)
	if err != nil {
		return s.explain("read the schema version", err)
	}
	if have > newest {
		return fmt.Errorf("open store %s: a newer issuer wrote it (schema %d, this one knows %d); run that version or restore an older backup", s.name, have, newest)
	}
	if _, err := p.Up(ctx); err != nil {
		return s.explain("migrate", err)
	}
	return nil
}

// unreachable says why no connection came about.
func (s *Postgres) unreachable(err error) error {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return s.explain("connect", err)
	}
	if isCancel(err) && !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("store %s: connect: %w", s.name, context.Canceled)
	}
	return fmt.Errorf("open store %s: no PostgreSQL answers there (%s); start it, or correct the database URL", s.name, innermost(err))
}

// explain turns an error of the database into a sentence that an operator can
// act on. It never quotes the URL or a value.
func (s *Postgres) explain(doing string, err error) error {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		if lost(err) {
			return fmt.Errorf("store %s: %s: the connection to the database was lost: %s", s.name, doing, innermost(err))
		}
		return fmt.Errorf("store %s: %s: %w", s.name, doing, err)
	}
	at := fmt.Sprintf("store %s: %s", s.name, doing)
	switch pg.Code {
	case "28P01", "28000":
		return fmt.Errorf("%s: the server refused the user or the password; correct the database URL, or pg_hba.conf of the server", at)
	case "3D000":
		return fmt.Errorf("%s: there is no such database; create it with: createdb --encoding=UTF8 --template=template0 NAME", at)
	case "42501":
		return fmt.Errorf("%s: the user lacks the right (%s); make it the owner: ALTER DATABASE NAME OWNER TO USER", at, pg.Message)
	case "53300":
		return fmt.Errorf("%s: the server has no connection left; raise max_connections, or lower pool_max_conns in the database URL", at)
	case "53100":
		return fmt.Errorf("%s: the disk of the server is full; free some space", at)
	case "57P03":
		return fmt.Errorf("%s: the server is starting or stopping; try again in a moment", at)
	case "57014":
		return fmt.Errorf("%s: the server took longer than %s; see what holds it up in pg_stat_activity", at, statementTimeout)
	case "25006":
		return fmt.Errorf("%s: the server takes no writes; give the address of the primary", at)
	}
	return fmt.Errorf("%s: %s (SQLSTATE %s)", at, pg.Message, pg.Code)
}

// innermost is the text of the cause of an error in one line, without the
// connection string that pgx puts around it.
func innermost(err error) string {
	for {
		switch e := err.(type) {
		case interface{ Unwrap() error }:
			if next := e.Unwrap(); next != nil {
				err = next
				continue
			}
		case interface{ Unwrap() []error }:
			if next := e.Unwrap(); len(next) > 0 {
				err = next[len(next)-1]
				continue
			}
		}
		return strings.Join(strings.Fields(err.Error()), " ")
	}
}
