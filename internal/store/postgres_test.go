package store_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/store"
	"sallyport/internal/store/postgrestest"
	"sallyport/internal/store/storetest"
)

func openPostgres(t testing.TB, c store.PostgresConfig) *store.Postgres {
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

func TestPostgres(t *testing.T) {
	server := postgrestest.Start(t)
	storetest.Run(t, func(t *testing.T, now func() time.Time) store.Store {
		return openPostgres(t, store.PostgresConfig{URL: server.Database(t), Now: now})
	})
	for _, c := range []struct {
		name string
		run  func(*testing.T, *postgrestest.Server)
	}{
		{"two issuers see one order", twoIssuers},
		{"issuers that start together migrate once", startTogether},
		{"changes are compacted", compaction},
		{"what it refuses to open is one sentence", refusals},
		{"a lost announcement is made good by the poll", deaf},
		{"an issuer that is frozen with the lock in hand loses it", frozen},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, server) })
	}
}

// twoIssuers writes through two stores at once while a reader of each follows
// the changes: no revision may be missing or come late.
func twoIssuers(t *testing.T, server *postgrestest.Server) {
	const writers, each = 6, 40
	at := server.Database(t)
	stores := []*store.Postgres{openPostgres(t, store.PostgresConfig{URL: at}), openPostgres(t, store.PostgresConfig{URL: at})}
	var readers, work sync.WaitGroup
	for i, s := range stores {
		readers.Go(func() {
			for seen := int64(0); seen < writers*each; {
				if _, err := s.Watch(t.Context(), seen); err != nil {
					t.Errorf("reader %d: Watch: %v", i, err)
					return
				}
				list, err := s.Changes(t.Context(), seen, 7)
				if err != nil {
					t.Errorf("reader %d: Changes: %v", i, err)
					return
				}
				for _, c := range list {
					if c.Revision != seen+1 {
						t.Errorf("reader %d saw revision %d after %d", i, c.Revision, seen)
						return
					}
					seen = c.Revision
				}
			}
		})
	}
	for w := range writers {
		work.Go(func() {
			for n := range each {
				if _, err := stores[w%2].Write(t.Context(), put(fmt.Sprintf("%d/%d", w, n), "1")); err != nil {
					t.Errorf("Write: %v", err)
				}
			}
		})
	}
	work.Wait()
	readers.Wait()
}

func startTogether(t *testing.T, server *postgrestest.Server) {
	at := server.Database(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { openPostgres(t, store.PostgresConfig{URL: at}) })
	}
	wg.Wait()
}

func compaction(t *testing.T, server *postgrestest.Server) {
	s := openPostgres(t, store.PostgresConfig{URL: server.Database(t), KeepChanges: 100})
	var ops []store.Op
	for i := range 700 {
		ops = append(ops, put(fmt.Sprint(i), "1"))
	}
	for range 2 {
		if _, err := s.Write(t.Context(), ops...); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Changes(t.Context(), 1299, 0); !errors.Is(err, store.ErrCompacted) {
		t.Errorf("Changes(1299) = %v, want ErrCompacted", err)
	}
	if got, err := s.Changes(t.Context(), 1300, 0); err != nil || len(got) != 100 {
		t.Errorf("Changes(1300) = %d of them, %v, want 100", len(got), err)
	}
}

func refusals(t *testing.T, server *postgrestest.Server) {
	good := server.Database(t)
	openPostgres(t, store.PostgresConfig{URL: good})
	newer := server.Database(t)
	openPostgres(t, store.PostgresConfig{URL: newer})
	name := func(at string) string { u, _ := url.Parse(at); return strings.TrimPrefix(u.Path, "/") }
	server.Exec(t, name(newer), `INSERT INTO sallyport.goose_db_version (version_id, is_applied) VALUES (99, true)`)
	server.Exec(t, "postgres", `CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 OWNER sallyport`, `CREATE DATABASE foreign_owner`,
		`CREATE DATABASE careless OWNER sallyport`, `ALTER DATABASE careless SET synchronous_commit = off`)
	for _, c := range []struct{ name, url, want string }{
		{"no URL", "", "must begin with postgres://"},
		{"another scheme", "mysql://s3cret@h/d", "must begin with postgres://"},
		{"not a URL", "postgres://u:s3cret@h:port/d", "cannot be read"},
		{"nobody there", "postgres://u:s3cret@127.0.0.1:1/d", "no PostgreSQL answers there (connection refused)"},
		{"no socket", "postgres://u:s3cret@/d?host=/nonexistent", "no PostgreSQL answers there (no such file"},
		{"a wrong password", strings.Replace(good, "p%40ss", "s3cret", 1), "refused the user or the password"},
		{"no such database", server.URL("absent"), "there is no such database"},
		{"a newer schema", newer, "a newer issuer wrote it (schema 99, this one knows 1)"},
		{"another encoding", server.URL("latin"), "its encoding is LATIN1"},
		{"a database of somebody else", server.URL("foreign_owner"), "the user lacks the right"},
		{"commits that are not awaited", server.URL("careless"), "synchronous_commit is off"},
		{"a network without TLS", "postgres://u:s3cret@db.example/d", "would not be verified"},
		{"TLS that verifies nothing", "postgres://u:s3cret@db.example/d?sslmode=require", "would not be verified"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := store.PostgresConfig{URL: c.url}.Open(t.Context())
			if err == nil {
				s.Close()
				t.Fatal("it opened")
			}
			if got := err.Error(); !strings.Contains(got, c.want) || strings.Contains(got, "s3cret") || strings.Contains(got, "\n") {
				t.Errorf("Open = %q, want one line with %q and no secret", got, c.want)
			}
		})
	}
}

// deaf cuts the listening session of a Watch under way.
func deaf(t *testing.T, server *postgrestest.Server) {
	at := server.Database(t)
	s, other := openPostgres(t, store.PostgresConfig{URL: at}), openPostgres(t, store.PostgresConfig{URL: at})
	woken := make(chan error, 1)
	go func() {
		rev, err := s.Watch(t.Context(), 0)
		if err == nil && rev != 1 {
			err = fmt.Errorf("Watch = %d, want 1", rev)
		}
		woken <- err
	}()
	server.Exec(t, "postgres", `DO $$ BEGIN WHILE NOT EXISTS (SELECT FROM pg_stat_activity WHERE query = 'LISTEN sallyport_changes') LOOP PERFORM pg_sleep(0.01); PERFORM pg_stat_clear_snapshot(); END LOOP; END $$`,
		`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = 'LISTEN sallyport_changes'`)
	if _, err := other.Write(t.Context(), put("a", "1")); err != nil {
		t.Fatal(err)
	}
	if err := <-woken; err != nil {
		t.Error(err)
	}
}

// frozen holds the writers' lock from a session that does nothing more, with
// the limit that each session of ours has.
func frozen(t *testing.T, server *postgrestest.Server) {
	at := server.Database(t)
	s := openPostgres(t, store.PostgresConfig{URL: at, Patience: time.Minute})
	u, _ := url.Parse(at)
	name := strings.TrimPrefix(u.Path, "/")
	release := server.Hold(t, name, `BEGIN`, `SET LOCAL idle_in_transaction_session_timeout = 300`, `SELECT revision FROM sallyport.head FOR UPDATE`)
	defer release()
	if _, err := s.Write(t.Context(), put("a", "1")); err != nil {
		t.Errorf("Write behind a frozen session: %v", err)
	}
}

// TestPostgresLosesNoAcknowledgedWrite kills and restarts the server under two
// issuers that write all the time.
func TestPostgresLosesNoAcknowledgedWrite(t *testing.T) {
	server := postgrestest.Start(t)
	at := server.Database(t)
	stores := []*store.Postgres{openPostgres(t, store.PostgresConfig{URL: at, Patience: time.Minute}), openPostgres(t, store.PostgresConfig{URL: at, Patience: time.Minute})}
	const writers = 4
	var acknowledged [writers][]string
	var count atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				key := fmt.Sprintf("%d-%06d", w, n)
				none := int64(0)
				left, right := put("left"+key, key), put("right"+key, key)
				// It must not exist: a write that was done twice would conflict.
				left.IfRevision, right.IfRevision = &none, &none
				if _, err := stores[w%2].Write(t.Context(), left, right); err != nil {
					t.Errorf("writer %d: %v", w, err)
					return
				}
				acknowledged[w] = append(acknowledged[w], key)
				count.Add(1)
			}
		})
	}
	for round := range 4 {
		for want := count.Load() + 60; count.Load() < want && !t.Failed(); {
			<-time.After(time.Millisecond)
		}
		if round%2 == 0 {
			server.Kill()
		} else {
			server.Stop()
		}
		server.Run(t)
	}
	for want := count.Load() + 60; count.Load() < want && !t.Failed(); {
		<-time.After(time.Millisecond)
	}
	cancel()
	wg.Wait()
	total := 0
	for _, keys := range acknowledged {
		for _, key := range keys {
			for _, side := range []string{"left", "right"} {
				if r, err := stores[0].Get(t.Context(), store.KindEntry, side+key); err != nil || string(r.Value) != key {
					t.Errorf("acknowledged write %s%s: %q, %v", side, key, r.Value, err)
				}
			}
		}
		total += len(keys)
	}
	list, err := stores[0].List(t.Context(), store.KindEntry, "", 0)
	if err != nil || len(list) != 2*total {
		t.Errorf("%d records of %d acknowledged pairs, %v", len(list), total, err)
	}
	changes, err := stores[1].Changes(t.Context(), 0, 0)
	if err != nil || len(changes) != 2*total || !slices.IsSortedFunc(changes, func(a, b store.Change) int { return int(a.Revision - b.Revision) }) {
		t.Errorf("%d changes of %d acknowledged pairs, %v", len(changes), total, err)
	}
	t.Logf("%d acknowledged writes of 2 records over 2 kills and 2 restarts, none lost, none done twice", total)
}

func BenchmarkPostgresCommit(b *testing.B) {
	s := openPostgres(b, store.PostgresConfig{URL: postgrestest.Start(b).Database(b)})
	value := strings.Repeat("v", 256)
	for _, writers := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			var next atomic.Int64
			var wg sync.WaitGroup
			for range writers {
				wg.Go(func() {
					for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
						if _, err := s.Write(b.Context(), put(fmt.Sprint("k", i%1000), value)); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
		})
	}
}
