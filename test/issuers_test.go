package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/store/postgrestest"
	"sallyport/policies"
)

// shares lets the world's issuer keep its state in a database.
func (w *world) shares(url string, life time.Duration, more string) {
	w.t.Helper()
	w.write("issuer", fmt.Sprintf(`trust_domain: %s
data_dir: %s
listen: %s
policies: %s
database: {url: %q}
ca: {x509_ttl: %s, agent_ttl: 1m, allow_short_ttl: true%s}
`, trustDomain, w.path("issuer"), w.issuer, w.policy, url, life, more))
}

// beside makes a world for another issuer of the same trust domain.
func (w *world) beside(name string) *world {
	w.t.Helper()
	o := &world{t: w.t, dir: w.path(name), issuer: freePort(w.t), policy: w.path(name, "policies")}
	if err := os.CopyFS(o.policy, policies.FS); err != nil {
		w.t.Fatal(err)
	}
	return o
}

// copyRoot copies the root of the world's issuer, as an operator does for
// another one, and returns the directory.
func (w *world) copyRoot() string {
	w.t.Helper()
	dir := w.path("root")
	if err := os.Mkdir(dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	for _, name := range []string{"root.crt", "root.key"} {
		data, err := os.ReadFile(w.path("issuer", "ca", name))
		if err != nil {
			w.t.Fatal(err)
		}
		w.put(filepath.Join(dir, name), string(data))
	}
	return dir
}

// twoIssuersPair starts billing and payment, which calls it. A token of one
// issuer is good at the other; each proxy knows both.
func (w *world) twoIssuersPair(second *world) (payment *hand) {
	w.t.Helper()
	for _, name := range []string{"billing", "payment"} {
		n := &node{name: name, in: freePort(w.t), app: freePort(w.t), out: freePort(w.t), billing: freePort(w.t)}
		conf := w.sidecarConfig(n, w.token(name))
		w.write(name, strings.Replace(conf, fmt.Sprintf("[%q]", w.issuer), fmt.Sprintf("[%q, %q]", second.issuer, w.issuer), 1))
		payment = w.startNode(n)
	}
	return payment
}

// sees says if the issuer shows every named proxy as connected and in step.
func (w *world) sees(revision uint64, workloads ...string) func() bool {
	return func() bool {
		a := w.admin()
		defer a.Close()
		st, err := a.Status(w.t.Context())
		if err != nil || st.PolicyRevision != revision {
			return false
		}
		list, err := a.Proxies(w.t.Context())
		if err != nil {
			return false
		}
		n := 0
		for _, p := range list {
			for _, name := range workloads {
				if strings.HasSuffix(p.Workload.Path(), "/"+name) && p.Connected && p.State == mesh.Synced {
					n++
				}
			}
		}
		return n == len(workloads)
	}
}

// outageLife is how long SVIDs live where the database crashes.
const outageLife = 20 * time.Second

// renewedSince says if each named proxy has an SVID that was issued after a
// moment. Validity ends at a whole second.
func (w *world) renewedSince(moment time.Time, life time.Duration, workloads ...string) func() bool {
	return func() bool {
		a := w.admin()
		defer a.Close()
		list, err := a.Proxies(w.t.Context())
		if err != nil {
			return false
		}
		n := 0
		for _, p := range list {
			for _, name := range workloads {
				if strings.HasSuffix(p.Workload.Path(), "/"+name) && p.SVIDExpires.After(moment.Add(life-time.Second)) {
					n++
				}
			}
		}
		return n == len(workloads)
	}
}

// TestFailoverOfIssuers runs two issuers on one PostgreSQL, kills one of them
// and the database, and calls through the mesh all the while.
func TestFailoverOfIssuers(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	server := postgrestest.Start(t)
	at := server.Database(t)
	// An SVID is renewed at 40 to 60 % of its life, so calls are promised to
	// outlast what lets none be issued for 40 % of it: here 8 s, in which a
	// database that crashed recovers. With 4 s in all it did so by luck.
	first := newWorld(t, outageLife)
	first.shares(at, outageLife, "")
	first.startIssuer()

	// The second signs under the root of the first; without it, it refuses.
	second := first.beside("second")
	second.shares(at, outageLife, "")
	if r := command(t, filepath.Join(bin, "issuer"), "run", "--config", second.path("issuer", "config.yaml")); r.Code != 1 || !strings.Contains(r.Output, "another root") {
		t.Errorf("an issuer with a root of its own ended with %d:\n%s", r.Code, r.Output)
	}
	if err := os.RemoveAll(second.path("issuer")); err != nil {
		t.Fatal(err)
	}
	second.shares(at, outageLife, ", root_dir: "+first.copyRoot())
	other := second.startIssuer()
	caller := first.twoIssuersPair(second)
	names := []string{"billing", "payment"}
	first.await("see every proxy at the first issuer", first.sees(1, names...))
	first.await("see every proxy at the second issuer", second.sees(1, names...))

	// Calls go on from here to the end.
	made, failed, stop, ended := 0, 0, make(chan struct{}), make(chan struct{})
	halt := sync.OnceFunc(func() { close(stop); <-ended })
	defer halt() // also when the test fails
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			default:
			}
			made++
			if r, err := try[runReply](caller, "/run", curl("http://billing.mesh.internal/v1/charges/7")); err != nil || !strings.Contains(r.Output, " 200 ") {
				failed++
				t.Logf("a call failed: %v %s", err, r.Output)
			}
		}
	}()

	// An edit at the first is in force everywhere.
	file := filepath.Join(first.policy, "access.csv")
	rows, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	first.put(file, string(rows)+"p, another-1, in, "+id("/ns/shop/sa/payment")+", "+id("/ns/shop/sa/billing")+", 8443, GET, /v1/more, -, allow\n")
	first.await("have the edit at the second issuer", second.sees(2, names...))
	first.await("have the edit at the first issuer", first.sees(2, names...))

	// One issuer crashes, then the database.
	other.kill()
	first.await("have every proxy at the issuer that is left", first.sees(2, names...))
	server.Kill()
	server.Run(t)
	first.await("serve after the database crashed", first.sees(2, names...))
	if first.token("web") == "" {
		t.Error("no token after the database crashed")
	}

	// It comes back with a policy folder of yesterday, which changes nothing.
	second.startIssuer()
	first.await("serve at the issuer that came back", second.sees(2, names...))
	if want := first.sees(2, names...); !want() {
		t.Error("the old folder of the second issuer is in force again")
	}
	recovered := time.Now()
	first.await("renew every SVID after the crashes", first.renewedSince(recovered, outageLife, names...))
	halt()
	t.Logf("%d calls while an issuer and the database were killed, %d failed", made, failed)
	if failed > 0 || made < 20 {
		t.Errorf("%d of %d calls failed", failed, made)
	}
}
