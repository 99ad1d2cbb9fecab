package registry_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
	"sallyport/internal/registry"
	"sallyport/internal/store"
	"sallyport/internal/store/postgrestest"
)

// A fleet is some issuers that share a store, and their clock.
type fleet struct {
	t     *testing.T
	ahead atomic.Int64
	open  func(now func() time.Time) store.Store
	// verify is the Verify of every Config.
	verify func(*policyset.Signed) error
}

func (f *fleet) now() time.Time { return time.Now().Add(time.Duration(f.ahead.Load())) }

// A member is one issuer of a fleet.
type member struct {
	*registry.Registry
	store store.Store
	log   *journal
	stop  func()
}

// A journal is a log that a test reads meanwhile.
type journal struct {
	mu   sync.Mutex
	text strings.Builder
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(b)
}

func (j *journal) says(what string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Contains(j.text.String(), what)
}

// join starts an issuer. Without run it is as one that was killed: it says
// nothing, neither that it lives nor that it goes.
func (f *fleet) join(name string, run bool) *member {
	f.t.Helper()
	s, log := f.open(f.now), new(journal)
	r, err := registry.New(registry.Config{
		Store: s, TrustDomain: td, Log: slog.New(slog.NewTextHandler(log, nil)), Instance: name, Now: f.now, Verify: f.verify,
	})
	if err != nil {
		f.t.Fatal(err)
	}
	if err := r.Load(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
	m := &member{Registry: r, store: s, log: log, stop: func() {}}
	if run {
		f.run(m)
	}
	return m
}

// run has an issuer say that it lives, and follow the others.
func (f *fleet) run(m *member) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := m.Run(ctx); err != nil {
			f.t.Errorf("Run: %v", err)
		}
	})
	m.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	f.t.Cleanup(m.stop)
}

// eventually waits until something is so: other issuers see a write late.
func (f *fleet) eventually(what string, so func() bool) {
	f.t.Helper()
	until := time.After(time.Minute)
	for !so() {
		select {
		case <-until:
			f.t.Fatalf("it never came that %s", what)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (m *member) has(addresses ...string) func() bool {
	return func() bool {
		var got []string
		if s := m.Current(); s != nil {
			for _, e := range s.Endpoints {
				got = append(got, e.Address.String())
			}
		}
		return slices.Equal(got, addresses)
	}
}

func (f *fleet) announce(m *member, e mesh.Endpoint, lease time.Duration) {
	f.t.Helper()
	if err := m.Announce(f.t.Context(), e, lease); err != nil {
		f.t.Fatalf("Announce: %v", err)
	}
}

func TestIssuersThatShareAStore(t *testing.T) {
	server := postgrestest.Start(t)
	for _, c := range []struct {
		name string
		run  func(*fleet)
	}{
		{"policies of one are in force at all", sharedPolicies},
		{"policies that nobody signed are in force at none", sharedUnsigned},
		{"a rollout is the same at all, and outlives who began it", sharedRollout},
		{"of a rollout and a push at once there is one", racingRollout},
		{"edits at once follow on each other", racingPolicies},
		{"a token counts once in all", sharedTokens},
		{"an alias holds at all", sharedAliases},
		{"an entry ends at all, and counts once", sharedLapse},
		{"an endpoint moves with its proxy", movingEndpoints},
		{"the endpoints of a dead issuer end after a lease", deadIssuer},
		{"an issuer that only slept keeps its endpoints", slowIssuer},
		{"a ban ends endpoints everywhere", sharedBan},
		{"a forgotten agent wakes every issuer", sharedEviction},
		{"entries made by calls are known to all", sharedEntries},
		{"what one revokes is revoked by all", sharedRevocations},
		{"what one stops is stopped by all", sharedStops},
		{"a rollout of a route is the same at all, and one at a time moves it", sharedDelivery},
		{"every issuer knows every proxy", sharedProxies},
		{"keys are known to all, and there is one root", sharedKeys},
		{"one issuer at a time edits the plan of the roots", sharedRoots},
		{"an issuer that slept in an edit writes nothing", sleepyEditor},
		{"live issuers are heard, dead ones are not", issuersSpeak},
		{"federations are known to all", sharedFederations},
	} {
		t.Run(c.name+"/postgres", func(t *testing.T) {
			at := server.Database(t)
			c.run(&fleet{t: t, open: func(now func() time.Time) store.Store {
				s, err := store.PostgresConfig{URL: at, Now: now}.Open(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { s.Close() })
				return s
			}})
		})
		t.Run(c.name+"/sqlite", func(t *testing.T) {
			var one *store.SQLite
			c.run(&fleet{t: t, open: func(now func() time.Time) store.Store {
				if one == nil {
					var err error
					if one, err = (store.SQLiteConfig{Path: filepath.Join(t.TempDir(), "s.sqlite"), Now: now}).Open(t.Context()); err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { one.Close() })
				}
				return one
			}})
		})
	}
}

func sharedPolicies(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	rev, err := a.ApplyPolicies(f.t.Context(), policies("pay"))
	if err != nil {
		f.t.Fatal(err)
	}
	f.eventually("b has the policies of a", func() bool { return b.Status().PolicyRevision == rev })
	if len(b.EntriesFor(agent("pay-1"))) != 1 {
		f.t.Error("b has no entries")
	}
	if again, err := b.ApplyPolicies(f.t.Context(), policies("pay")); again != rev || err != nil {
		f.t.Errorf("the same policies at b: revision %d, %v, want %d", again, err, rev)
	}
	if rev, err = b.ApplyPolicies(f.t.Context(), policies("pay", "bill")); err != nil || rev != 2 {
		f.t.Errorf("other policies at b: revision %d, %v, want 2", rev, err)
	}
	f.eventually("a has the policies of b", func() bool { return a.Status().PolicyHash == b.Status().PolicyHash })
	// A third, later, starts with what is in force.
	if c := f.join("c", false); c.Status().PolicyHash != a.Status().PolicyHash {
		f.t.Error("c starts with other policies")
	}
}

func racingPolicies(f *fleet) {
	members := []*member{f.join("a", true), f.join("b", true), f.join("c", true)}
	names := []mesh.ServiceName{"a", "b", "c"}
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := map[uint64]bool{}
	for i, m := range members {
		wg.Go(func() {
			for n := range 5 {
				set := policies(names[i], mesh.ServiceName(strings.Repeat("x", n+1)))
				rev, err := m.ApplyPolicies(f.t.Context(), set)
				mu.Lock()
				if err != nil || seen[rev] {
					f.t.Errorf("ApplyPolicies = %d (seen: %v), %v", rev, seen[rev], err)
				}
				seen[rev] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	f.eventually("all have the newest", func() bool {
		return !slices.ContainsFunc(members, func(m *member) bool {
			return m.Status().PolicyRevision != 15 || m.Status().PolicyHash != members[0].Status().PolicyHash
		})
	})
}

func sharedTokens(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	text, _, err := a.CreateToken(f.t.Context(), "web-1", time.Minute)
	if err != nil {
		f.t.Fatal(err)
	}
	var wg sync.WaitGroup
	var won atomic.Int64
	for i := range 10 {
		wg.Go(func() {
			_, err := []*member{a, b}[i%2].Redeem(f.t.Context(), sha256.Sum256([]byte(text)), [32]byte{byte(i)}, time.Time{})
			switch {
			case err == nil:
				won.Add(1)
			case !errors.Is(err, registry.ErrTokenUsed):
				f.t.Errorf("Redeem: %v", err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		f.t.Errorf("%d keys redeemed one token", won.Load())
	}
}

func movingEndpoints(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	if _, err := a.ApplyPolicies(f.t.Context(), policies("pay")); err != nil {
		f.t.Fatal(err)
	}
	e := endpoint("pay", 1, "10.0.0.1:8000")
	f.announce(a, e, time.Minute)
	f.eventually("b distributes the endpoint", b.has("10.0.0.1:8000"))
	f.announce(a, e, time.Second) // short only once b has seen it
	// The proxy leaves a, and comes to b before its lease is over.
	if err := a.Withdraw(f.t.Context(), e.Agent); err != nil {
		f.t.Fatal(err)
	}
	f.announce(b, e, time.Hour)
	f.announce(a, endpoint("pay", 2, "10.0.0.2:8000"), time.Second)
	f.eventually("the endpoint that nobody renews ends", a.has("10.0.0.1:8000"))
	f.eventually("at b as well", b.has("10.0.0.1:8000"))
}

func deadIssuer(f *fleet) {
	b := f.join("b", true)
	if _, err := b.ApplyPolicies(f.t.Context(), policies("pay")); err != nil {
		f.t.Fatal(err)
	}
	a := f.join("a", false) // dead from now on
	f.announce(a, endpoint("pay", 1, "10.0.0.1:8000"), time.Minute)
	f.announce(a, endpoint("pay", 2, "10.0.0.2:8000"), time.Minute)
	f.eventually("b distributes both", b.has("10.0.0.1:8000", "10.0.0.2:8000"))
	c := f.join("c", true)
	f.ahead.Add(int64(20 * time.Second))
	gone := "an issuer is gone"
	f.eventually("b and c see that a is gone", func() bool { return b.log.says(gone) && c.log.says(gone) })
	// One proxy comes to c in time.
	f.announce(c, endpoint("pay", 1, "10.0.0.1:8000"), time.Hour)
	f.eventually("both are still held", b.has("10.0.0.1:8000", "10.0.0.2:8000"))
	f.ahead.Add(int64(time.Minute))
	f.announce(c, endpoint("pay", 2, "10.0.0.3:8000"), time.Hour)
	f.eventually("the one that did not come ends", b.has("10.0.0.1:8000", "10.0.0.3:8000"))
	f.eventually("at c as well", c.has("10.0.0.1:8000", "10.0.0.3:8000"))
}

// slowIssuer lets one issuer believe that another is gone, and end what it
// has.
func slowIssuer(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	if _, err := a.ApplyPolicies(f.t.Context(), policies("pay")); err != nil {
		f.t.Fatal(err)
	}
	e := endpoint("pay", 1, "10.0.0.1:8000")
	f.announce(a, e, time.Hour)
	f.eventually("b distributes the endpoint", b.has("10.0.0.1:8000"))
	for range 3 {
		rev, err := b.store.Write(f.t.Context(), store.Op{Kind: store.KindEndpoint, Key: e.Agent.String() + " pay 10.0.0.1:8000", Delete: true})
		if err != nil {
			f.t.Fatal(err)
		}
		f.eventually("a puts it back", func() bool {
			list, err := b.store.List(f.t.Context(), store.KindEndpoint, "", 0)
			return err == nil && len(list) == 1 && list[0].Revision > rev
		})
	}
	f.eventually("b has it", b.has("10.0.0.1:8000"))
	// What a gives up itself stays away.
	a.stop()
	if alive, err := b.store.List(f.t.Context(), store.KindLease, "instance/", 0); err != nil || alive[0].Key != "instance/b" {
		f.t.Errorf("a did not say that it goes: %v, %v", alive, err)
	}
}

func sharedBan(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	if _, err := a.ApplyPolicies(f.t.Context(), policies("pay")); err != nil {
		f.t.Fatal(err)
	}
	e := endpoint("pay", 1, "10.0.0.1:8000")
	f.announce(a, e, time.Hour)
	f.eventually("b distributes the endpoint", b.has("10.0.0.1:8000"))
	putAgent(f.t, b.Registry, mesh.Agent{ID: e.Agent, Serial: "1"})
	if got, err := a.HeldAgent(f.t.Context(), e.Agent); err != nil || got.Serial != "1" {
		f.t.Errorf("a holds %+v, %v", got, err)
	}
	putAgent(f.t, b.Registry, mesh.Agent{ID: e.Agent, Serial: "2"})
	f.eventually("a holds the renewed agent", func() bool {
		got, err := a.HeldAgent(f.t.Context(), e.Agent)
		return err == nil && got.Serial == "2"
	})
	renewal, err := a.GetAgent(f.t.Context(), e.Agent)
	if err != nil {
		f.t.Fatal(err)
	}
	woken := a.Changed()
	putAgent(f.t, b.Registry, mesh.Agent{ID: e.Agent, Banned: true})
	if err := a.PutAgent(f.t.Context(), renewal); !errors.Is(err, mesh.ErrChanged) {
		f.t.Errorf("a renewal here undid the ban there: %v", err)
	}
	f.eventually("a is woken and holds the ban", func() bool {
		select {
		case <-woken:
		default:
			return false
		}
		got, err := a.HeldAgent(f.t.Context(), e.Agent)
		return err == nil && got.Banned
	})
	f.eventually("a distributes it no more", a.has())
	if got, err := a.GetAgent(f.t.Context(), e.Agent); err != nil || !got.Banned {
		f.t.Errorf("a does not know of the ban: %+v, %v", got, err)
	}
}

func sharedEviction(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	if err := b.PutAgent(f.t.Context(), mesh.Agent{ID: agent("pay-1"), Serial: "1"}); err != nil {
		f.t.Fatal(err)
	}
	if _, err := a.HeldAgent(f.t.Context(), agent("pay-1")); err != nil {
		f.t.Error(err)
	}
	// What a does not understand keeps it from nothing that follows.
	garbled := store.Op{Kind: store.KindAgent, Key: agent("pay-2").String(), Value: []byte("{")}
	if _, err := b.store.Write(f.t.Context(), garbled); err != nil {
		f.t.Fatal(err)
	}
	if got, err := a.HeldAgent(f.t.Context(), agent("pay-2")); err == nil {
		f.t.Errorf("a garbled agent is %+v", got)
	}
	woken := a.Changed()
	if err := b.DeleteAgent(f.t.Context(), agent("pay-1")); err != nil {
		f.t.Fatal(err)
	}
	f.eventually("a is woken", func() bool {
		select {
		case <-woken:
			return true
		default:
			return false
		}
	})
	f.eventually("a holds it no more", func() bool {
		_, err := a.HeldAgent(f.t.Context(), agent("pay-1"))
		return errors.Is(err, mesh.ErrNotFound)
	})
}

func sharedEntries(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	if _, err := a.ApplyPolicies(f.t.Context(), policies("pay")); err != nil {
		f.t.Fatal(err)
	}
	f.eventually("b has the policies", func() bool { return b.Current() != nil })
	made, err := b.EditEntries(f.t.Context(), []mesh.EntryEdit{create(entryOf("cron", "/cron", "node-c", "unix:uid:7"))})
	if err != nil || made[0].Err != nil {
		f.t.Fatal(made, err)
	}
	f.eventually("a has the entry", func() bool { return len(a.EntriesFor(agent("node-c"))) == 1 })
	if gone, err := a.EditEntries(f.t.Context(), []mesh.EntryEdit{{ID: "cron", Delete: true}}); err != nil || gone[0].Err != nil {
		f.t.Fatal(gone, err)
	}
	f.eventually("b has it no more", func() bool { return len(b.EntriesFor(agent("node-c"))) == 0 })
}

func sharedProxies(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	if _, err := a.ApplyPolicies(f.t.Context(), policies("pay")); err != nil {
		f.t.Fatal(err)
	}
	f.eventually("b has the policies", func() bool { return b.Status().PolicyRevision == 1 })
	p := mesh.Proxy{Agent: agent("pay-1"), Workload: id("/ns/shop/sa/pay"), Kind: "sidecar", PolicyRevision: 1, Connected: true}
	at := func(m *member, connected bool) func() bool {
		return func() bool {
			list := m.Proxies()
			return len(list) == 1 && list[0].Agent == p.Agent && list[0].Connected == connected && list[0].State == mesh.Synced
		}
	}
	a.ReportProxy(p)
	f.eventually("b shows the proxy of a", at(b, true))
	// It moves to b: that it left a does not count.
	b.ReportProxy(p)
	p.Connected = false
	a.ReportProxy(p)
	f.eventually("a shows it as connected to b", at(a, true))
	f.eventually("b too", at(b, true))
	// b is gone, and nobody knows it as connected.
	b.stop()
	f.eventually("a shows it as gone", at(a, false))
}

func sharedKeys(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.t.Fatal(err)
	}
	changed := b.KeysChanged()
	mine := registry.Key{KeyID: "jwt-1", PublicKey: key.Public(), ExpiresAt: f.now().Add(time.Hour)}
	if err := a.PublishKeys(f.t.Context(), "a", []registry.Key{mine}); err != nil {
		f.t.Fatal(err)
	}
	<-changed
	if got := b.Keys(); len(got) != 1 || got[0].KeyID != "jwt-1" || !key.PublicKey.Equal(got[0].PublicKey) {
		f.t.Errorf("Keys = %+v", got)
	}
	// A key that a gives up is gone at b; what b does leaves it.
	if err := b.PublishKeys(f.t.Context(), "b", nil); err != nil || len(b.Keys()) != 1 {
		f.t.Errorf("PublishKeys of b: %v, keys %+v", err, b.Keys())
	}
	if err := a.PublishKeys(f.t.Context(), "a", nil); err != nil {
		f.t.Fatal(err)
	}
	f.eventually("b has no key", func() bool { return len(b.Keys()) == 0 })
	if err := a.PublishKeys(f.t.Context(), "a", []registry.Key{mine}); err != nil {
		f.t.Fatal(err)
	}
	f.eventually("b has the key again", func() bool { return len(b.Keys()) == 1 })
	f.ahead.Add(int64(2 * time.Hour))
	if got := b.Keys(); len(got) != 0 {
		f.t.Errorf("Keys after their end = %+v", got)
	}
	for range 2 {
		if err := a.CheckRoot(f.t.Context(), []byte("root")); err != nil {
			f.t.Errorf("CheckRoot: %v", err)
		}
	}
	if err := b.CheckRoot(f.t.Context(), []byte("another")); !errors.Is(err, registry.ErrOtherRoot) || !strings.Contains(err.Error(), "ca.root_dir") {
		f.t.Errorf("CheckRoot = %v, want ErrOtherRoot and the next step", err)
	}
}
