package store_test

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport/internal/store"
	"sallyport/internal/store/storetest"
)

// childPath, when set, makes the test binary write to that store for ever.
const childPath = "SALLYPORT_TEST_STORE"

func TestMain(m *testing.M) {
	if path := os.Getenv(childPath); path != "" {
		fmt.Fprintln(os.Stderr, writeForEver(path))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func open(t testing.TB, c store.SQLiteConfig) *store.SQLite {
	t.Helper()
	s, err := c.Open(t.Context())
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return s
}

func file(t testing.TB) string { return filepath.Join(t.TempDir(), "issuer db?100%.sqlite") }

func put(key, value string) store.Op {
	return store.Op{Kind: store.KindEntry, Key: key, Value: []byte(value)}
}

func TestSQLite(t *testing.T) {
	storetest.Run(t, func(t *testing.T, now func() time.Time) store.Store {
		return open(t, store.SQLiteConfig{Path: file(t), Now: now})
	})
}

func TestSQLiteKeepsEverythingOverReopen(t *testing.T) {
	path := file(t)
	s := open(t, store.SQLiteConfig{Path: path})
	op := put("a", "1")
	op.Expires = time.Now().Add(time.Hour)
	if _, err := s.Write(t.Context(), op, put("b", "2")); err != nil {
		t.Fatal(err)
	}
	before, _ := s.List(t.Context(), store.KindEntry, "", 0)
	changes, _ := s.Changes(t.Context(), 0, 0)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, store.SQLiteConfig{Path: path})
	after, err := s.List(t.Context(), store.KindEntry, "", 0)
	if diff := cmp.Diff(before, after); diff != "" || err != nil || len(after) != 2 {
		t.Errorf("records over a reopen (%v), -before +after:\n%s", err, diff)
	}
	again, err := s.Changes(t.Context(), 0, 0)
	if diff := cmp.Diff(changes, again); diff != "" || err != nil {
		t.Errorf("changes over a reopen (%v), -before +after:\n%s", err, diff)
	}
	if rev, err := s.Write(t.Context(), put("c", "3")); rev != 3 || err != nil {
		t.Errorf("Write = %d, %v, want revision 3", rev, err)
	}
}

// writeForEver prints each key once its write was acknowledged.
func writeForEver(path string) error {
	ctx := context.Background()
	s, err := store.OpenSQLite(ctx, path)
	if err != nil {
		return err
	}
	rev, err := s.Revision(ctx)
	if err != nil {
		return err
	}
	for i := rev; ; i += 2 {
		key := fmt.Sprintf("%08d", i)
		if _, err := s.Write(ctx, put("left"+key, key), put("right"+key, key)); err != nil {
			return err
		}
		if _, err := fmt.Println(key); err != nil {
			return err
		}
	}
}

func TestSQLiteLosesNoAcknowledgedWriteToAKill(t *testing.T) {
	path := file(t)
	var acknowledged []string
	for round := range 4 {
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), childPath+"="+path)
		child.Stderr = os.Stderr
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			acknowledged = append(acknowledged, lines.Text())
			if n == 40+17*round {
				// The child goes on writing meanwhile, and is cut anywhere.
				if err := child.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		var exit *exec.ExitError
		if err := child.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("the child ended with %v, want killed", err)
		}
	}
	s := open(t, store.SQLiteConfig{Path: path})
	for _, key := range acknowledged {
		for _, side := range []string{"left", "right"} {
			if r, err := s.Get(t.Context(), store.KindEntry, side+key); err != nil || string(r.Value) != key {
				t.Errorf("acknowledged write %s%s: %q, %v", side, key, r.Value, err)
			}
		}
	}
	list, err := s.List(t.Context(), store.KindEntry, "", 0)
	if err != nil || len(list)%2 != 0 || len(list) < 2*len(acknowledged) {
		t.Errorf("%d records of %d acknowledged pairs, %v", len(list), len(acknowledged), err)
	}
}

func TestSQLiteFilesArePrivate(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	path := filepath.Join(t.TempDir(), "s.sqlite")
	if err := os.Chmod(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	s := open(t, store.SQLiteConfig{Path: path})
	if _, err := s.Write(t.Context(), put("a", "1")); err != nil {
		t.Fatal(err)
	}
	for _, end := range []string{"", "-wal", "-shm", "-lock"} {
		info, err := os.Stat(path + end)
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("mode of %s: %v, %v, want 0600", path+end, info.Mode(), err)
		}
	}
}

func TestSQLiteCompactsChanges(t *testing.T) {
	s := open(t, store.SQLiteConfig{Path: file(t), KeepChanges: 100})
	var ops []store.Op
	for i := range 700 {
		ops = append(ops, put(fmt.Sprint(i), "1"))
	}
	for range 2 {
		if _, err := s.Write(t.Context(), ops...); err != nil {
			t.Fatal(err)
		}
	}
	rev, err := s.Revision(t.Context())
	if rev != 1400 || err != nil {
		t.Fatalf("Revision = %d, %v, want 1400", rev, err)
	}
	for _, after := range []int64{0, 1, 1299} {
		if _, err := s.Changes(t.Context(), after, 0); !errors.Is(err, store.ErrCompacted) {
			t.Errorf("Changes(%d) = %v, want ErrCompacted", after, err)
		}
	}
	got, err := s.Changes(t.Context(), 1300, 0)
	if err != nil || len(got) != 100 || got[0].Revision != 1301 {
		t.Errorf("Changes(1300) = %d of them, %v, want 100", len(got), err)
	}
}

func TestSQLitePurgesWhatExpiredLongAgo(t *testing.T) {
	now := time.Now()
	s := open(t, store.SQLiteConfig{Path: file(t), Now: func() time.Time { return now }})
	op := put("token", "1")
	op.Expires = now.Add(time.Hour)
	fill := func() {
		t.Helper()
		var ops []store.Op
		for range 1100 {
			ops = append(ops, put("x", "1"))
		}
		if _, err := s.Write(t.Context(), ops...); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Write(t.Context(), op); err != nil {
		t.Fatal(err)
	}
	// A clock that ran ahead for a while loses nothing.
	now = now.Add(25 * time.Hour)
	fill()
	now = now.Add(-25 * time.Hour)
	if _, err := s.Get(t.Context(), store.KindEntry, "token"); err != nil {
		t.Errorf("Get once the clock is right again: %v", err)
	}
	now = now.Add(30 * 24 * time.Hour)
	fill()
	now = now.Add(-30 * 24 * time.Hour)
	if _, err := s.Get(t.Context(), store.KindEntry, "token"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Get = %v, want ErrNotFound: it was purged", err)
	}
}

func TestSQLiteOpenRefuses(t *testing.T) {
	write := func(t *testing.T, path string, data []byte, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, data, mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name    string
		prepare func(t *testing.T, path string) string
		want    string
	}{
		{"no path", func(*testing.T, string) string { return "" }, "the path is missing"},
		{"a directory that is absent", func(_ *testing.T, path string) string { return filepath.Join(path, "x", "y") }, "create it: mkdir -m 700 "},
		{"a file in place of the directory", func(t *testing.T, path string) string {
			write(t, path, nil, 0o600)
			return filepath.Join(path, "x")
		}, "is not a directory"},
		{"a directory for everyone", func(t *testing.T, path string) string {
			if err := os.Chmod(filepath.Dir(path), 0o777); err != nil {
				t.Fatal(err)
			}
			return path
		}, "run: chmod o-w "},
		{"a file that others can read", func(t *testing.T, path string) string {
			write(t, path, nil, 0o644)
			return path
		}, "run: chmod 600 "},
		{"a symbolic link", func(t *testing.T, path string) string {
			if err := os.Symlink(path+"2", path); err != nil {
				t.Fatal(err)
			}
			return path
		}, "is a symbolic link"},
		{"a directory as the file", func(t *testing.T, path string) string {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
			return path
		}, "is a directory"},
		{"a file that is no database", func(t *testing.T, path string) string {
			write(t, path, []byte(strings.Repeat("not a database. ", 300)), 0o600)
			return path
		}, "is damaged ("},
		{"a store with an overwritten page", func(t *testing.T, path string) string {
			fillAndClose(t, path)
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte(strings.Repeat("\xaa", 8192)), 4*4096); err != nil {
				t.Fatal(err)
			}
			return path
		}, "restore it from a backup"},
		{"a store that was cut short", func(t *testing.T, path string) string {
			fillAndClose(t, path)
			if err := os.Truncate(path, 5000); err != nil {
				t.Fatal(err)
			}
			return path
		}, "restore it from a backup"},
		{"a store that is open already", func(t *testing.T, path string) string {
			open(t, store.SQLiteConfig{Path: path})
			return path
		}, "another process has it open"},
		{"a store of a newer issuer", func(t *testing.T, path string) string {
			fillAndClose(t, path)
			execute(t, path, `INSERT INTO goose_db_version (version_id, is_applied) VALUES (999, 1)`)
			return path
		}, "a newer issuer wrote it (schema 999, this one knows 1)"},
		{"the database of another program", func(t *testing.T, path string) string {
			write(t, path, nil, 0o600)
			execute(t, path, `CREATE TABLE cookies (name TEXT)`)
			return path
		}, "another program"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := c.prepare(t, filepath.Join(t.TempDir(), "s.sqlite"))
			s, err := store.OpenSQLite(t.Context(), path)
			if err == nil {
				s.Close()
				t.Fatal("Open succeeded")
			}
			if !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("Open = %v\nwant %q in it", err, c.want)
			}
		})
	}
}

func TestSQLiteRefusesAFileOfAnotherUser(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sqlite")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want := "belongs to user 4242"
	if os.Geteuid() != 0 {
		// Without root, a file that nobody may read stands for it.
		want = "cannot be read and written"
		if err := os.Chmod(path, 0); err != nil {
			t.Fatal(err)
		}
	} else if err := os.Chown(path, 4242, -1); err != nil {
		t.Fatal(err)
	}
	if _, err := store.OpenSQLite(t.Context(), path); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Open = %v, want %q in it", err, want)
	}
}

func TestSQLiteOpensAgainAfterARefusal(t *testing.T) {
	path := file(t)
	first := open(t, store.SQLiteConfig{Path: path})
	if _, err := store.OpenSQLite(t.Context(), path); err == nil {
		t.Fatal("a second Open succeeded")
	}
	if _, err := first.Write(t.Context(), put("a", "1")); err != nil {
		t.Errorf("Write after another Open was refused: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second := open(t, store.SQLiteConfig{Path: path})
	if _, err := second.Get(t.Context(), store.KindEntry, "a"); err != nil {
		t.Errorf("Get: %v", err)
	}
}

func fillAndClose(t *testing.T, path string) {
	t.Helper()
	s := open(t, store.SQLiteConfig{Path: path})
	for i := range 50 {
		if _, err := s.Write(t.Context(), put(fmt.Sprint(i), strings.Repeat("x", 2000))); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// execute changes a store file behind the back of the store.
func execute(t *testing.T, path, statement string) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), statement); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkSQLiteWrite(b *testing.B) {
	s := open(b, store.SQLiteConfig{Path: file(b)})
	value := strings.Repeat("x", 500)
	b.Run("single", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			if _, err := s.Write(b.Context(), put(fmt.Sprint(i%1000), value)); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
	})
	b.Run("get", func(b *testing.B) {
		for b.Loop() {
			if _, err := s.Get(b.Context(), store.KindEntry, "0"); err != nil {
				b.Fatal(err)
			}
		}
	})
}
