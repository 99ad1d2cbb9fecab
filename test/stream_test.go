package test

import (
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
	"sallyport/internal/store/postgrestest"
)

// TestStreamPostgreSQL has psql talk to a real PostgreSQL through two sidecars
// that know nothing of its protocol.
func TestStreamPostgreSQL(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "psql")
	database, err := url.Parse(postgrestest.Start(t).Database(t))
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, time.Minute)
	if err := os.RemoveAll(w.path("policies", "tests")); err != nil { // they speak of HTTP
		t.Fatal(err)
	}
	w.rewrite(w.path("policies", "services.yaml"), fmt.Sprintf("services:\n  - {name: billing, identity: %s, port: 5432, protocol: tcp}\n", id("/ns/shop/sa/billing")))
	w.rewrite(w.path("policies", "guardrails.csv"), "")
	row := fmt.Sprintf("p, db, in, %s, %s, 5432, CONNECT, -, -, allow\n", id("/ns/shop/sa/payment"), id("/ns/shop/sa/billing"))
	w.rewrite(w.path("policies", "access.csv"), row)
	w.startIssuer()
	pay, bill := &node{name: "payment"}, &node{name: "billing"}
	w.join(bill)
	w.join(pay)
	bill.app = besideSocket(t, database.Query().Get("host")+"/.s.PGSQL.5432")
	w.write(bill.name, w.sidecarConfig(bill, w.token("billing")))
	w.startWorkload(bill.name)
	payment := w.startNode(pay)
	password, _ := database.User.Password()
	psql := func(sql string) []string {
		host, port, _ := net.SplitHostPort(pay.billing)
		return []string{"psql", "-XAt", fmt.Sprintf("host=%s port=%s user=%s password='%s' dbname=%s sslmode=disable connect_timeout=10",
			host, port, database.User.Username(), password, strings.TrimPrefix(database.Path, "/")), "-c", sql}
	}
	var r runReply
	w.await("the way to the database", func() bool {
		r = ask[runReply](payment, "/run", psql("select 6 * 7"))
		return r.Code == 0
	})
	if strings.TrimSpace(r.Output) != "42" {
		t.Errorf("psql says %q", r.Output)
	}
	r = ask[runReply](payment, "/run", psql("select length(repeat('x', 5000000)), md5(repeat('x', 5000000))"))
	if r.Code != 0 || !strings.HasPrefix(r.Output, "5000000|") {
		t.Errorf("psql ended with %d: %s", r.Code, r.Output)
	}
	t.Run("another program on the machine is refused", func(t *testing.T) {
		line := psql("select 1")
		if r := command(t, line[0], line[1:]...); r.Code == 0 {
			t.Errorf("psql outside of the workload is served: %s", r.Output)
		}
	})
	t.Run("a policy edit ends the session that it forbids", func(t *testing.T) {
		began := make(chan runReply, 1)
		go func() { began <- ask[runReply](payment, "/run", psql("select pg_sleep(25)")) }()
		w.await("the session", func() bool {
			r := ask[runReply](payment, "/run", psql("select count(*) from pg_stat_activity where query like '%pg_sleep(25)%'"))
			return strings.TrimSpace(r.Output) == "2" // and this question
		})
		edit := time.Now()
		w.rewrite(w.path("policies", "access.csv"), "# nobody\n")
		select {
		case r := <-began:
			t.Logf("closed %s after the edit: %s", time.Since(edit).Round(time.Millisecond), strings.TrimSpace(r.Output))
			if r.Code == 0 {
				t.Error("the session went on to its end")
			}
		case <-time.After(within):
			t.Error("the session goes on")
		}
		w.awaitAudit("billing", "the end of the session", func(r auditLine) bool {
			return r.Reason == "revoked" && r.Src == id("/ns/shop/sa/payment")
		})
		if r := ask[runReply](payment, "/run", psql("select 1")); r.Code == 0 {
			t.Errorf("a new session is let in: %s", r.Output)
		}
	})
}

// besideSocket is a loopback address that leads to a Unix socket.
func besideSocket(t *testing.T, socket string) string {
	t.Helper()
	return serves(t, func(c net.Conn) {
		u, err := net.Dial("unix", socket)
		if err != nil {
			return
		}
		defer u.Close()
		go func() {
			_, _ = io.Copy(u, c)
			_ = u.(*net.UnixConn).CloseWrite()
		}()
		_, _ = io.Copy(c, u)
	})
}
