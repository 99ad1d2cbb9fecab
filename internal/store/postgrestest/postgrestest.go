// Package postgrestest starts a real PostgreSQL for a test, from the programs
// of the system, on a Unix socket only.
//
// It is never skipped: a test that needs it fails when it is not installed.
// Each Server owns one goroutine, which ends with the process it waits for.
package postgrestest

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"sallyport/internal/meshtest"
)

const (
	// Role and password of the databases; it is no superuser.
	role, password = "sallyport", "p@ss/word %"

	patience = 60 * time.Second
	ready    = "database system is ready to accept connections"
)

// A Server is a PostgreSQL that ends with the test.
type Server struct {
	dir, bin string
	cred     *syscall.Credential

	proc *os.Process
	gone chan struct{} // closed when proc has ended

	mu  sync.Mutex // guards log and n
	log []string
	n   int
}

// Start makes a cluster and starts it, fsync on.
func Start(t testing.TB) *Server {
	t.Helper()
	s := &Server{bin: programs(t)}
	var err error
	// Not t.TempDir: the path of a socket holds 107 bytes.
	if s.dir, err = os.MkdirTemp("", "pg"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(s.dir) })
	if os.Geteuid() == 0 {
		s.cred = other(t)
		if err := os.Chown(s.dir, int(s.cred.Uid), int(s.cred.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	init := s.command("initdb", "-D", s.data(), "-U", "postgres", "-A", "trust", "--no-locale", "-E", "UTF8", "-N")
	if out, err := init.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	hba := "local all postgres trust\nlocal all all scram-sha-256\n"
	if err := os.WriteFile(filepath.Join(s.data(), "pg_hba.conf"), []byte(hba), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Run(t)
	t.Cleanup(func() { s.end(syscall.SIGQUIT) })
	s.Exec(t, "postgres", fmt.Sprintf(`CREATE ROLE %s LOGIN PASSWORD '%s'`, role, password))
	return s
}

// programs finds where initdb and postgres are.
func programs(t testing.TB) string {
	t.Helper()
	if path, err := exec.LookPath("initdb"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err == nil {
			return filepath.Dir(path)
		}
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		meshtest.Missing(t, "postgresql")
	}
	return filepath.Dir(slices.MaxFunc(found, func(a, b string) int { return version(a) - version(b) }))
}

func version(path string) int {
	n, _ := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(path))))
	return n
}

// other is a user to run as, since PostgreSQL refuses to run as root.
func other(t testing.TB) *syscall.Credential {
	t.Helper()
	for _, name := range []string{"postgres", "nobody"} {
		if u, err := user.Lookup(name); err == nil {
			uid, _ := strconv.ParseUint(u.Uid, 10, 32)
			gid, _ := strconv.ParseUint(u.Gid, 10, 32)
			return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		}
	}
	t.Fatal("PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody")
	return nil
}

// Socket is the Unix socket that it answers on.
func (s *Server) Socket() string { return filepath.Join(s.dir, ".s.PGSQL.5432") }

func (s *Server) data() string { return filepath.Join(s.dir, "data") }

func (s *Server) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, name), args...)
	cmd.Dir, cmd.Env = s.dir, []string{"PATH=" + s.bin, "LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred, Pdeathsig: syscall.SIGQUIT}
	return cmd
}

// Run starts the server, anew after Kill or Stop, and returns when it answers.
// What a killed server leaves behind may refuse a new one for a moment.
func (s *Server) Run(t testing.TB) {
	t.Helper()
	until := time.Now().Add(patience)
	for !s.start(t) {
		if time.Now().After(until) {
			t.Fatalf("PostgreSQL does not start:\n%s", s.Log())
		}
		<-time.After(100 * time.Millisecond)
	}
}

func (s *Server) start(t testing.TB) bool {
	t.Helper()
	up, failed := make(chan struct{}), make(chan error, 1)
	s.gone = make(chan struct{})
	go s.attend(up, failed, s.gone)
	select {
	case <-up:
		return true
	case err := <-failed:
		t.Fatalf("start postgres: %v", err)
	case <-s.gone:
	case <-time.After(patience):
		t.Fatalf("PostgreSQL says nothing of being ready:\n%s", s.Log())
	}
	return false
}

// attend starts the server and waits for its end. It stays on its thread: the
// server is told to end when that thread does. It gives the thread back, since
// Go ends one that is still locked, and the kernel would then kill whatever
// other tests had started from it.
func (s *Server) attend(up chan<- struct{}, failed chan<- error, gone chan<- struct{}) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := s.command("postgres", "-D", s.data(), "-k", s.dir, "-c", "listen_addresses=", "-c", "shared_buffers=32MB", "-c", "max_connections=60")
	out, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		failed <- err
		return
	}
	s.proc = cmd.Process
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		s.mu.Lock()
		s.log = append(s.log, lines.Text())
		s.mu.Unlock()
		if up != nil && bytes.HasSuffix(lines.Bytes(), []byte(ready)) {
			close(up)
			up = nil
		}
	}
	_ = cmd.Wait() // killed servers end badly
	close(gone)
}

// Log is what the server said.
func (s *Server) Log() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.log[max(0, len(s.log)-40):], "\n")
}

func (s *Server) end(how syscall.Signal) {
	_ = s.proc.Signal(how) // gone already is as good
	<-s.gone
}

// Kill ends the server with SIGKILL: nothing is flushed.
func (s *Server) Kill() { s.end(syscall.SIGKILL) }

// Stop ends the server as an administrator does: sessions are cut, what they
// had begun is rolled back.
func (s *Server) Stop() { s.end(syscall.SIGINT) }

// Exec runs statements as the superuser.
func (s *Server) Exec(t testing.TB, database string, statements ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.url("postgres", "", database))
	if err != nil {
		t.Fatalf("connect: %v\n%s", err, s.Log())
	}
	defer conn.Close(ctx)
	for _, text := range statements {
		if _, err := conn.Exec(ctx, text); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
}

// Hold runs statements as the superuser in a session that stays open, and
// silent, until the returned function is called.
func (s *Server) Hold(t testing.TB, database string, statements ...string) (release func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.url("postgres", "", database))
	if err != nil {
		t.Fatalf("connect: %v\n%s", err, s.Log())
	}
	for _, text := range statements {
		if _, err := conn.Exec(ctx, text); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Close(ctx) // the server may have ended it
	}
}

// Database makes an empty database and returns its URL.
func (s *Server) Database(t testing.TB) string {
	t.Helper()
	s.mu.Lock()
	s.n++
	name := fmt.Sprintf("test%d", s.n)
	s.mu.Unlock()
	s.Exec(t, "postgres", fmt.Sprintf(`CREATE DATABASE %s OWNER %s`, name, role))
	return s.URL(name)
}

// URL is that of a database of the role.
func (s *Server) URL(database string) string { return s.url(role, password, database) }

func (s *Server) url(user, password, database string) string {
	u := url.URL{Scheme: "postgres", User: url.User(user), Path: "/" + database, RawQuery: url.Values{"host": {s.dir}}.Encode()}
	if password != "" {
		u.User = url.UserPassword(user, password)
	}
	return u.String()
}
