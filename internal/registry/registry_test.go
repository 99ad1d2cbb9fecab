package registry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
	"sallyport/internal/registry"
	"sallyport/internal/store"
)

var td = spiffeid.RequireTrustDomainFromString("corp.example")

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func agent(name string) spiffeid.ID { return id("/spire/agent/join_token/" + name) }

// policies returns a set in which agent "<service>-1" and "<service>-2" may
// hold the identity of each named service.
func policies(services ...mesh.ServiceName) *mesh.Policies {
	p := &mesh.Policies{TrustDomain: td}
	for i, name := range services {
		svc := id("/ns/shop/sa/" + string(name))
		p.Services = append(p.Services, mesh.Service{Name: name, ID: svc, Port: uint16(8000 + i), Protocol: "http"})
		for n := 1; n <= 2; n++ {
			p.Entries = append(p.Entries, mesh.Entry{
				ID: fmt.Sprintf("%s-%d", name, n), SPIFFEID: svc, ParentID: agent(fmt.Sprintf("%s-%d", name, n)),
				Selectors: []mesh.Selector{{Type: "unix", Value: fmt.Sprint("uid:", 1000+10*i+n)}},
			})
		}
	}
	return p
}

func endpoint(service mesh.ServiceName, n int, address string) mesh.Endpoint {
	return mesh.Endpoint{Service: service, Agent: agent(fmt.Sprintf("%s-%d", service, n)), Address: netip.MustParseAddrPort(address)}
}

// An issuer is a registry on a store file, which can start again.
type issuer struct {
	*registry.Registry
	t     *testing.T
	path  string
	store *store.SQLite
	log   bytes.Buffer
	check func(*mesh.Policies) error
	// verify and unsigned are the Config's Verify and OnUnsigned.
	verify   func(*policyset.Signed) error
	unsigned func(error)
	// floor is the Config's Floor, as OnFloor has kept it.
	floor registry.Floor
	// onRollout is the Config's OnRollout.
	onRollout func(registry.RolloutStep) error
	// onStop is the Config's OnFaultStop.
	onStop func(mesh.FaultStop) error
}

func start(t *testing.T) *issuer {
	t.Helper()
	in := &issuer{t: t, path: filepath.Join(t.TempDir(), "s.sqlite")}
	in.restart()
	t.Cleanup(in.stop)
	return in
}

func (in *issuer) stop() {
	if err := in.store.Close(); err != nil {
		in.t.Errorf("Close: %v", err)
	}
}

func (in *issuer) restart() {
	in.t.Helper()
	if in.store != nil {
		in.stop()
	}
	s, err := store.OpenSQLite(context.Background(), in.path)
	if err != nil {
		in.t.Fatalf("OpenSQLite: %v", err)
	}
	in.store = s
	in.Registry, err = registry.New(registry.Config{
		Store: s, TrustDomain: td, Log: slog.New(slog.NewTextHandler(&in.log, nil)),
		Check: func(c *mesh.Checked) error {
			if in.check != nil {
				return in.check(c.Policies())
			}
			return nil
		},
		Verify: in.verify, OnUnsigned: in.unsigned, OnRollout: in.onRollout, OnFaultStop: in.onStop,
		Floor: in.floor, OnFloor: func(f registry.Floor) { in.floor = f },
	})
	if err != nil {
		in.t.Fatalf("New: %v", err)
	}
	if err := in.Load(context.Background()); err != nil {
		in.t.Fatalf("Load: %v", err)
	}
}

func (in *issuer) apply(p *mesh.Policies) uint64 {
	in.t.Helper()
	rev, err := in.ApplyPolicies(context.Background(), p)
	if err != nil {
		in.t.Fatalf("ApplyPolicies: %v", err)
	}
	return rev
}

// putAgent keeps an agent in the place of whatever is there.
func putAgent(t *testing.T, r *registry.Registry, a mesh.Agent) {
	t.Helper()
	old, err := r.GetAgent(t.Context(), a.ID)
	if err != nil && !errors.Is(err, mesh.ErrNotFound) {
		t.Fatal(err)
	}
	a.Revision = old.Revision
	if err := r.PutAgent(t.Context(), a); err != nil {
		t.Fatal(err)
	}
}

func (in *issuer) announce(e mesh.Endpoint) {
	in.t.Helper()
	if err := in.Announce(context.Background(), e, time.Minute); err != nil {
		in.t.Fatalf("Announce: %v", err)
	}
}

// addresses returns what is distributed, as "service@address".
func (in *issuer) addresses() []string {
	var out []string
	for _, e := range in.Current().Endpoints {
		out = append(out, fmt.Sprintf("%s@%s", e.Service, e.Address))
	}
	return out
}

func (in *issuer) want(addresses ...string) {
	in.t.Helper()
	if diff := cmp.Diff(addresses, in.addresses()); diff != "" {
		in.t.Errorf("endpoints, -want +got:\n%s", diff)
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func TestNewNamesEveryMistake(t *testing.T) {
	_, err := registry.New(registry.Config{})
	for _, field := range []string{"store: missing", "trust domain: missing", "log: missing"} {
		if err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("New = %v, want %q in it", err, field)
		}
	}
}

func TestBeforeTheFirstPolicies(t *testing.T) {
	in := start(t)
	if in.Current() != nil || in.Entries() != nil || in.EntriesFor(agent("a")) != nil {
		t.Error("something is known before the first policies")
	}
	in.announce(endpoint("billing", 1, "10.0.0.1:15006"))
	if st := in.Status(); st.TrustDomain != td || st.Revision != 0 || st.PolicyRevision != 0 {
		t.Errorf("Status = %+v", st)
	}
	in.apply(policies("billing"))
	in.want("billing@10.0.0.1:15006")
}

func TestApplyPublishesAndUnchangedIsNothing(t *testing.T) {
	in := start(t)
	changed := in.Changed()
	if rev := in.apply(policies("billing")); rev != 1 {
		t.Errorf("first policy revision = %d, want 1", rev)
	}
	if !isClosed(changed) {
		t.Error("Changed did not fire")
	}
	first, changed := in.Current(), in.Changed()
	if first.PolicyHash != policies("billing").Hash() || first.Revision == 0 || len(first.Services) != 1 {
		t.Errorf("snapshot = %+v", first)
	}
	if rev := in.apply(policies("billing")); rev != 1 || in.Current() != first || isClosed(changed) {
		t.Errorf("the same set again: revision %d, snapshot new: %v, changed: %v", rev, in.Current() != first, isClosed(changed))
	}
	if rev := in.apply(policies("billing", "payment")); rev != 2 || in.Current().Revision <= first.Revision || !isClosed(changed) {
		t.Errorf("another set: policy revision %d, revision %d after %d", rev, in.Current().Revision, first.Revision)
	}
	if got := in.EntriesFor(agent("payment-2")); len(got) != 1 || got[0].SPIFFEID != id("/ns/shop/sa/payment") {
		t.Errorf("EntriesFor = %v", got)
	}
	if got := in.Entries(); len(got) != 4 {
		t.Errorf("%d entries, want 4", len(got))
	}
}

func TestRefusedPoliciesLeaveTheOldInForce(t *testing.T) {
	in := start(t)
	in.apply(policies("billing"))
	old, changed := in.Current(), in.Changed()

	foreign := policies("payment")
	foreign.TrustDomain = spiffeid.RequireTrustDomainFromString("other.example")
	invalid := policies("payment", "payment")
	for name, c := range map[string]struct {
		set   *mesh.Policies
		check error
		want  string
	}{
		"nothing":              {nil, nil, "there are none"},
		"another trust domain": {foreign, nil, `trust domain "other.example", this issuer serves "corp.example"`},
		"a mistake":            {invalid, nil, "payment"},
		"a red test":           {policies("payment"), errors.New("tests/a.yaml:3: want allow, got deny"), "tests/a.yaml:3"},
	} {
		in.check = func(*mesh.Policies) error { return c.check }
		_, err := in.ApplyPolicies(t.Context(), c.set)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: ApplyPolicies = %v, want %q in it", name, err, c.want)
			continue
		}
		if in.LastRefusal() != err.Error() || in.Status().LastRefusal != err.Error() {
			t.Errorf("%s: LastRefusal = %q", name, in.LastRefusal())
		}
	}
	if in.Current() != old || isClosed(changed) {
		t.Error("a refused set changed what is in force")
	}
	in.check = nil
	in.Refuse(errors.New("access.csv:3:1: no"))
	if in.LastRefusal() != "access.csv:3:1: no" {
		t.Errorf("LastRefusal = %q", in.LastRefusal())
	}
	in.apply(policies("billing"))
	if in.LastRefusal() != "" {
		t.Errorf("LastRefusal = %q once the edit was taken back", in.LastRefusal())
	}
}

func TestApplyFailsWhenTheStoreDoes(t *testing.T) {
	in := start(t)
	in.apply(policies("billing"))
	old := in.Current()
	in.stop()
	if _, err := in.ApplyPolicies(t.Context(), policies("payment")); !errors.Is(err, store.ErrClosed) {
		t.Errorf("ApplyPolicies = %v, want ErrClosed", err)
	}
	if in.Current() != old {
		t.Error("policies are in force that were not stored")
	}
}

func TestRestartServesWhatWasAccepted(t *testing.T) {
	in := start(t)
	p := policies("billing", "payment")
	p.Rules = []mesh.Rule{{ID: "pay-1", Dir: mesh.In, Src: "spiffe://corp.example/ns/shop/sa/payment", Dst: "spiffe://corp.example/ns/shop/sa/billing",
		Port: "8000", Verb: "POST", Path: "/v1/charges", Cond: "-", Effect: mesh.Allow, Origin: mesh.Origin{File: "access.csv", Line: 1}}}
	in.apply(p)
	in.announce(endpoint("billing", 1, "10.0.0.1:15006"))
	before := in.Current()
	in.restart()
	after := in.Current()
	if after == nil || after.Revision <= before.Revision {
		t.Fatalf("after a restart the snapshot is %+v, want one with a revision above %d", after, before.Revision)
	}
	if after.ContentHash() != before.ContentHash() {
		t.Errorf("content changed over a restart, -before +after:\n%s", cmp.Diff(string(before.Encode()), string(after.Encode())))
	}
	if rev := in.apply(p); rev != 1 || in.Current() != after {
		t.Errorf("the same folder after a restart: policy revision %d", rev)
	}
	if rev := in.apply(policies("billing")); rev != 2 {
		t.Errorf("policy revision after a restart = %d, want 2", rev)
	}
}

func TestRestartInAnotherTrustDomainIsRefused(t *testing.T) {
	in := start(t)
	in.apply(policies("billing"))
	other, err := registry.New(registry.Config{Store: in.store, TrustDomain: spiffeid.RequireTrustDomainFromString("other.example"), Log: slog.Default()})
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Load(t.Context()); err == nil || !strings.Contains(err.Error(), `the store belongs to trust domain "corp.example"`) {
		t.Errorf("Load = %v", err)
	}
}

func TestAnnounce(t *testing.T) {
	in := start(t)
	in.apply(policies("billing", "payment"))
	in.announce(endpoint("billing", 2, "10.0.0.2:15006"))
	in.announce(endpoint("billing", 1, "10.0.0.1:15006"))
	in.want("billing@10.0.0.1:15006", "billing@10.0.0.2:15006")

	s, changed := in.Current(), in.Changed()
	head, _ := in.store.Revision(t.Context())
	in.announce(endpoint("billing", 1, "10.0.0.1:15006"))
	in.announce(endpoint("billing", 1, "[::ffff:10.0.0.1]:15006"))
	if now, _ := in.store.Revision(t.Context()); now != head || in.Current() != s || isClosed(changed) {
		t.Errorf("announced again unchanged: store %d after %d, snapshot changed: %v", now, head, in.Current() != s)
	}
	// A sidecar may have several addresses; one that went and came back at
	// another has only that.
	in.announce(endpoint("billing", 1, "10.0.0.7:15006"))
	in.want("billing@10.0.0.1:15006", "billing@10.0.0.2:15006", "billing@10.0.0.7:15006")
	if err := in.Withdraw(t.Context(), agent("billing-1")); err != nil {
		t.Fatal(err)
	}
	in.announce(endpoint("billing", 1, "10.0.0.3:15006"))
	in.want("billing@10.0.0.2:15006", "billing@10.0.0.3:15006")
	if in.Current().Revision <= s.Revision || !isClosed(changed) || in.Current().PolicyRevision != 1 {
		t.Errorf("snapshot after a move: %+v", in.Current())
	}

	// The agent of payment may not speak for billing until the policies say so.
	thief := mesh.Endpoint{Service: "billing", Agent: agent("payment-1"), Address: netip.MustParseAddrPort("10.6.6.6:15006")}
	s = in.Current()
	in.announce(thief)
	if in.Current() != s || !strings.Contains(in.log.String(), "endpoint not distributed") {
		t.Errorf("an endpoint of an agent without an entry was distributed, or nothing was logged: %v", in.addresses())
	}
	// Nor may it take the address of one that may.
	thief.Address = netip.MustParseAddrPort("10.0.0.2:15006")
	in.announce(thief)
	in.want("billing@10.0.0.2:15006", "billing@10.0.0.3:15006")
	granted := policies("billing", "payment")
	granted.Entries[0].ParentID = agent("payment-1")
	in.apply(granted)
	in.want("billing@10.0.0.2:15006", "billing@10.6.6.6:15006")
	if got := in.Current().Endpoints[0].Agent; got != agent("payment-1") {
		t.Errorf("the address belongs to %s, want the latest who may", got)
	}
	in.apply(policies("payment"))
	in.want()
	in.apply(policies("billing", "payment"))
	in.want("billing@10.0.0.2:15006", "billing@10.0.0.3:15006")
}

func TestAnnounceRefuses(t *testing.T) {
	in := start(t)
	in.apply(policies("billing"))
	for name, change := range map[string]func(*mesh.Endpoint){
		"no agent":            func(e *mesh.Endpoint) { e.Agent = spiffeid.ID{} },
		"a foreign agent":     func(e *mesh.Endpoint) { e.Agent = spiffeid.RequireFromString("spiffe://other.example/a") },
		"no service":          func(e *mesh.Endpoint) { e.Service = "" },
		"no address":          func(e *mesh.Endpoint) { e.Address = netip.AddrPort{} },
		"every address":       func(e *mesh.Endpoint) { e.Address = netip.MustParseAddrPort("0.0.0.0:1") },
		"a multicast address": func(e *mesh.Endpoint) { e.Address = netip.MustParseAddrPort("[ff02::1]:1") },
		"no port":             func(e *mesh.Endpoint) { e.Address = netip.MustParseAddrPort("10.0.0.1:0") },
	} {
		e := endpoint("billing", 1, "10.0.0.1:15006")
		change(&e)
		if err := in.Announce(t.Context(), e, time.Minute); !errors.Is(err, registry.ErrBadEndpoint) {
			t.Errorf("%s: Announce = %v, want ErrBadEndpoint", name, err)
		}
	}
	e := endpoint("billing", 1, "10.0.0.1:15006")
	if err := in.Announce(t.Context(), e, -1); !errors.Is(err, registry.ErrBadEndpoint) {
		t.Errorf("negative lease: Announce = %v, want ErrBadEndpoint", err)
	}
	var err error
	for i := range 257 {
		e.Service = mesh.ServiceName(fmt.Sprint("s", i))
		err = in.Announce(t.Context(), e, time.Minute)
	}
	if !errors.Is(err, registry.ErrBadEndpoint) {
		t.Errorf("the 257th service of one agent: %v, want ErrBadEndpoint", err)
	}
}

func TestLeasesEndInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := start(t)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- in.Run(ctx) }()
		in.apply(policies("billing"))
		in.announce(endpoint("billing", 1, "10.0.0.1:15006"))
		time.Sleep(40 * time.Second)
		in.announce(endpoint("billing", 2, "10.0.0.2:15006"))
		in.announce(endpoint("billing", 1, "10.0.0.1:15006"))

		// Both leases end at 100 s, unless one is announced again in time.
		time.Sleep(59 * time.Second)
		in.announce(endpoint("billing", 2, "10.0.0.2:15006"))
		in.want("billing@10.0.0.1:15006", "billing@10.0.0.2:15006")
		s, changed := in.Current(), in.Changed()
		began := time.Now()
		<-changed
		if waited := time.Since(began); waited != time.Second {
			t.Errorf("the endpoint ended after %v, want 1s", waited)
		}
		in.want("billing@10.0.0.2:15006")
		if in.Current().Revision <= s.Revision {
			t.Errorf("revision %d after %d", in.Current().Revision, s.Revision)
		}

		// Withdraw leaves one lease, which a return in time renews.
		time.Sleep(30 * time.Second)
		if err := in.Withdraw(t.Context(), agent("billing-2")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(59 * time.Second)
		in.want("billing@10.0.0.2:15006")
		began = time.Now()
		<-in.Changed()
		if waited := time.Since(began); waited != time.Second {
			t.Errorf("the withdrawn endpoint ended after %v, want 1s", waited)
		}
		in.want()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	})
}

func TestRestartKeepsEndpointsForOneLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := start(t)
		in.apply(policies("billing"))
		in.announce(endpoint("billing", 1, "10.0.0.1:15006"))
		in.announce(endpoint("billing", 2, "10.0.0.2:15006"))
		in.stop()
		in.store = nil
		time.Sleep(time.Hour)
		in.restart()
		in.want("billing@10.0.0.1:15006", "billing@10.0.0.2:15006")

		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- in.Run(ctx) }()
		time.Sleep(30 * time.Second)
		in.announce(endpoint("billing", 1, "10.0.0.1:15006"))
		time.Sleep(30*time.Second + time.Millisecond)
		synctest.Wait()
		in.want("billing@10.0.0.1:15006")
		cancel()
		<-done

		// What has ended stays ended.
		in.restart()
		in.want("billing@10.0.0.1:15006")
	})
}

func TestRunTriesAgainWhenTheStoreFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := start(t)
		in.apply(policies("billing"))
		in.announce(endpoint("billing", 1, "10.0.0.1:15006"))
		in.stop()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- in.Run(ctx) }()
		time.Sleep(61500 * time.Millisecond)
		synctest.Wait()
		if n := strings.Count(in.log.String(), "trying again in 1s"); n != 2 {
			t.Errorf("%d attempts in the 1.5 s after the lease, want 2", n)
		}
		in.want("billing@10.0.0.1:15006")
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	})
}

func TestEveryChangeIsSeenByManyReaders(t *testing.T) {
	in := start(t)
	in.apply(policies("billing"))
	const writers, each = 4, 10
	var readers, writing sync.WaitGroup
	last := policies("billing", "payment")
	for range 4 {
		readers.Go(func() {
			var rev uint64
			for {
				changed := in.Changed()
				s := in.Current()
				if s.Revision < rev {
					t.Errorf("revision %d after %d", s.Revision, rev)
				}
				rev = s.Revision
				if !slices.IsSortedFunc(s.Endpoints, func(a, b mesh.Endpoint) int { return a.Address.Compare(b.Address) }) {
					t.Errorf("endpoints are not in order: %v", s.Endpoints)
				}
				if s.PolicyRevision == 2 {
					return
				}
				<-changed
			}
		})
	}
	for w := range writers {
		writing.Go(func() {
			for i := range each {
				in.announce(endpoint("billing", 1+w%2, fmt.Sprintf("10.0.%d.%d:15006", w, i+1)))
				in.ReportProxy(mesh.Proxy{Agent: agent(fmt.Sprint(w)), PolicyRevision: 1})
				in.AddEdges(agent("a"), []mesh.Edge{{Src: "a", Dst: "b", Allowed: 1}})
				in.Proxies()
			}
		})
	}
	writing.Wait()
	in.apply(last)
	readers.Wait()
	if got := in.edgesNow(); len(got) != 1 || got[0].Allowed != writers*each {
		t.Errorf("Edges = %+v", got)
	}
}

func TestRestartRefusesPoliciesItCannotRead(t *testing.T) {
	in := start(t)
	in.apply(policies("billing"))
	rec, err := in.store.Get(t.Context(), store.KindPolicy, "current")
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"nothing":         "",
		"half of it":      string(rec.Value[:len(rec.Value)/2]),
		"no policies":     `{"revision":1}`,
		"a later version": strings.Replace(string(rec.Value), `"services":`, `"forbidden":[],"services":`, 1),
	} {
		if _, err := in.store.Write(t.Context(), store.Op{Kind: store.KindPolicy, Key: "current", Value: []byte(value)}); err != nil {
			t.Fatal(err)
		}
		r, err := registry.New(registry.Config{Store: in.store, TrustDomain: td, Log: slog.Default()})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Load(t.Context()); err == nil || !strings.Contains(err.Error(), "run the version that wrote it") {
			t.Errorf("%s: Load = %v", name, err)
		}
	}
}

func TestEndpointsAreInTheOrderOfCompile(t *testing.T) {
	in := start(t)
	in.apply(policies("billing", "payment"))
	for i, a := range []string{"10.0.0.9:1", "10.0.0.10:1", "[::1]:5", "10.0.0.9:2"} {
		in.announce(endpoint([]mesh.ServiceName{"payment", "billing"}[i%2], 1+i/2, a))
	}
	s := in.Current()
	shuffled := slices.Clone(s.Endpoints)
	slices.Reverse(shuffled)
	compiled, err := mesh.Compile(policies("billing", "payment"), s.Revision, s.PolicyRevision, shuffled)
	if err != nil || string(compiled.Encode()) != string(s.Encode()) {
		t.Errorf("%v, -compiled +published:\n%s", err, cmp.Diff(string(compiled.Encode()), string(s.Encode())))
	}
}

// All sidecars of a mesh connect at once after an issuer was away.
func BenchmarkAnnounce1000(b *testing.B) {
	p := policies("billing")
	p.Entries = nil
	var all []mesh.Endpoint
	for i := range 1000 {
		a := agent(fmt.Sprint("a", i))
		p.Entries = append(p.Entries, mesh.Entry{ID: fmt.Sprint(i), SPIFFEID: p.Services[0].ID, ParentID: a, Selectors: []mesh.Selector{{Type: "unix", Value: "uid:1"}}})
		all = append(all, mesh.Endpoint{Service: "billing", Agent: a, Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i / 250), byte(1 + i%250)}), 15006)})
	}
	for b.Loop() {
		s, err := store.OpenSQLite(b.Context(), filepath.Join(b.TempDir(), "s.sqlite"))
		if err != nil {
			b.Fatal(err)
		}
		r, err := registry.New(registry.Config{Store: s, TrustDomain: td, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := r.ApplyPolicies(b.Context(), p); err != nil {
			b.Fatal(err)
		}
		for _, e := range all {
			if err := r.Announce(b.Context(), e, time.Minute); err != nil {
				b.Fatal(err)
			}
		}
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
