package registry_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
	"sallyport/internal/registry"
	"sallyport/internal/store"
)

const bake = 5 * time.Minute

// A trial is an issuer with a pushed set in force, two proxies on it, and
// another set that the first of them is to try.
type trial struct {
	*issuer
	first, second, fallback *policyset.Signed
	steps                   []registry.RolloutStep
	fail                    error // of the next step
	stopRun                 func()
}

func newTrial(t *testing.T) *trial {
	in := &trial{issuer: &issuer{t: t, path: t.TempDir() + "/s.sqlite"}}
	in.onRollout = func(s registry.RolloutStep) error {
		in.steps = append(in.steps, s)
		return in.fail
	}
	in.restart()
	t.Cleanup(in.stop)
	in.first = pushable(t, 1, "", "# first\n")
	in.second = pushable(t, 2, in.first.Hash(), "p, guard, in, **, **, *, *, **, -, deny\n")
	in.fallback = pushable(t, 3, in.first.Hash(), "# first\n")
	if err := in.PushPolicies(t.Context(), in.first); err != nil {
		t.Fatal(err)
	}
	in.says("canary", 1)
	in.says("other", 1)
	return in
}

// runs lets the issuer work in the background.
func (in *trial) runs() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- in.Run(ctx) }()
	in.stopRun = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			in.t.Error(err)
		}
	})
	in.t.Cleanup(in.stopRun)
}

func proxyOf(name string, revision uint64) mesh.Proxy {
	return mesh.Proxy{Agent: agent(name), Workload: id("/ns/shop/sa/" + name), Kind: "sidecar", Connected: true, PolicyRevision: revision}
}

// says lets a proxy acknowledge a revision.
func (in *trial) says(name string, revision uint64) { in.ReportProxy(proxyOf(name, revision)) }

func (in *trial) refuses(name string, revision uint64, why string) {
	p := proxyOf(name, revision)
	p.State, p.Reason = mesh.Rejected, why
	in.ReportProxy(p)
}

func (in *trial) leaves(name string, revision uint64) {
	p := proxyOf(name, revision)
	p.Connected = false
	in.ReportProxy(p)
}

func (in *trial) whole() registry.Trial {
	return registry.Trial{
		Set: in.second, Fallback: in.fallback, Group: []string{"agent=" + agent("canary").String()}, Bake: bake, By: "boss",
	}
}

func (in *trial) begin(t registry.Trial) {
	in.t.Helper()
	if err := in.TryPolicies(context.Background(), t); err != nil {
		in.t.Fatal(err)
	}
}

// acts checks which revision each of the two is to act on.
func (in *trial) acts(canary, other uint64) {
	in.t.Helper()
	for name, want := range map[string]uint64{"canary": canary, "other": other} {
		p := proxyOf(name, 0)
		if s, _ := in.SnapshotFor(p.Agent, p.Workload, p.Kind); s.PolicyRevision != want {
			in.t.Errorf("%s is to act on revision %d, want %d", name, s.PolicyRevision, want)
		}
	}
}

func (in *trial) is(how mesh.RolloutState, why string) {
	in.t.Helper()
	if ro := in.Status().Rollout; ro == nil || ro.State != how || !strings.Contains(ro.Why, why) {
		in.t.Errorf("the rollout is %+v, want %s because %q", ro, how, why)
	}
}

// of lists the states of the proxies.
func (in *trial) of() (out []string) {
	for _, p := range in.Proxies() {
		out = append(out, fmt.Sprintf("%s %s has %d wants %d %s", p.Workload.Path()[len("/ns/shop/sa/"):], p.Group, p.PolicyRevision, p.Wanted, p.State))
	}
	return out
}

func TestRollout(t *testing.T) {
	for _, tt := range []struct {
		name  string
		steps func(in *trial)
	}{
		{"the fleet follows after the bake", func(in *trial) {
			in.says("canary", 2)
			time.Sleep(bake - time.Second)
			in.acts(2, 1)
			time.Sleep(2 * time.Second)
			in.acts(2, 2)
			in.is(mesh.Promoted, "1 of 1 canary proxies acknowledged and did well for 5m0s")
			if st := in.Status(); st.PolicySet != in.second.Hash() || st.NextRevision != 4 {
				in.t.Errorf("in force is %+v", st)
			}
			if b, err := in.PolicySet(in.t.Context(), 2); err != nil || string(b) != string(in.second.Encode()) {
				in.t.Errorf("the set that was promoted is not kept: %v", err)
			}
		}},
		{"a refusal takes it back under a higher revision", func(in *trial) {
			in.refuses("canary", 2, "access.csv:1: guard: dst")
			time.Sleep(2 * time.Second)
			in.acts(3, 3)
			in.is(mesh.TakenBack, "sa/canary refuses revision 2: access.csv:1: guard: dst")
			if st := in.Status(); st.PolicySet != in.fallback.Hash() || st.PolicyHash == "" || len(in.Current().Rules) != 0 {
				in.t.Errorf("in force is %+v", st)
			}
			if _, err := in.PolicySet(in.t.Context(), 1); !errors.Is(err, mesh.ErrNotFound) {
				in.t.Errorf("the set that the fallback repeats: %v", err)
			}
		}},
		{"the refusal of another proxy does not matter", func(in *trial) {
			in.refuses("other", 1, "no")
			in.says("canary", 2)
			time.Sleep(bake + 2*time.Second)
			in.acts(2, 2)
		}},
		{"a lost proxy takes it back, a short absence does not", func(in *trial) {
			in.says("canary", 2)
			in.leaves("canary", 2)
			time.Sleep(20 * time.Second)
			in.says("canary", 2)
			time.Sleep(time.Minute)
			in.acts(2, 1)
			in.leaves("canary", 2)
			time.Sleep(32 * time.Second)
			in.acts(3, 3)
			in.is(mesh.TakenBack, "sa/canary is lost: not connected since")
		}},
		{"silence until the end takes it back", func(in *trial) {
			time.Sleep(bake + 25*time.Second)
			in.acts(2, 1)
			time.Sleep(10 * time.Second)
			in.acts(3, 3)
			in.is(mesh.TakenBack, "has not answered for revision 2 within 5m0s")
		}},
		{"one that acknowledged late bakes it all the time", func(in *trial) {
			time.Sleep(bake - time.Minute)
			in.says("canary", 2)
			time.Sleep(bake - time.Second)
			in.acts(2, 1)
			time.Sleep(2 * time.Second)
			in.acts(2, 2)
		}},
		{"one that went back to what it had bakes it anew", func(in *trial) {
			in.says("canary", 2)
			time.Sleep(bake - time.Minute)
			in.says("canary", 1)
			in.says("canary", 2)
			time.Sleep(bake - time.Second)
			in.acts(2, 1)
			time.Sleep(2 * time.Second)
			in.acts(2, 2)
		}},
		{"one that is away at the end is waited for", func(in *trial) {
			in.says("canary", 2)
			time.Sleep(bake - 10*time.Second)
			in.leaves("canary", 2)
			time.Sleep(20 * time.Second)
			in.acts(2, 1)
			in.says("canary", 2)
			time.Sleep(2 * time.Second)
			in.acts(2, 2)
		}},
		{"a proxy that comes later is a canary too", func(in *trial) {
			in.says("canary", 2)
			late := proxyOf("late", 1)
			late.Agent = agent("canary")
			in.ReportProxy(late)
			time.Sleep(bake + 2*time.Second)
			in.acts(2, 1)
			late.PolicyRevision = 2
			in.ReportProxy(late)
			time.Sleep(2 * time.Second)
			in.acts(2, 2)
			in.is(mesh.Promoted, "2 of 2")
		}},
		{"a restart forgets nothing", func(in *trial) {
			in.says("canary", 2)
			time.Sleep(time.Minute)
			in.stopRun()
			in.restart()
			in.acts(2, 1)
			in.is(mesh.Baking, "")
			in.runs()
			// Who does not come back is missed.
			time.Sleep(29 * time.Second)
			in.acts(2, 1)
			time.Sleep(3 * time.Second)
			in.acts(3, 3)
			in.is(mesh.TakenBack, "sa/canary is lost")
		}},
		{"an operator promotes, but not before all acknowledged", func(in *trial) {
			err := in.PromotePolicies(in.t.Context(), 2, false, "boss")
			if !errors.Is(err, registry.ErrRolling) || !strings.Contains(err.Error(), "0 of 1 canary proxies acknowledged; not yet: spiffe://corp.example/ns/shop/sa/canary") {
				in.t.Errorf("too early: %v", err)
			}
			in.says("canary", 2)
			if err := in.PromotePolicies(in.t.Context(), 7, false, "boss"); !errors.Is(err, registry.ErrRolling) {
				in.t.Errorf("another revision: %v", err)
			}
			for range 2 { // the first reply was lost
				if err := in.PromotePolicies(in.t.Context(), 2, false, "boss"); err != nil {
					in.t.Error(err)
				}
			}
			in.acts(2, 2)
		}},
		{"an operator forces", func(in *trial) {
			if err := in.PromotePolicies(in.t.Context(), 0, true, "boss"); err != nil {
				in.t.Error(err)
			}
			in.acts(2, 2)
		}},
		{"an operator takes it back", func(in *trial) {
			in.says("canary", 2)
			if err := in.TakeBackPolicies(in.t.Context(), 0, "boss"); err != nil {
				in.t.Error(err)
			}
			in.acts(3, 3)
			in.is(mesh.TakenBack, "asked for by boss")
			if err := in.TakeBackPolicies(in.t.Context(), 0, "boss"); !errors.Is(err, registry.ErrRolling) {
				in.t.Errorf("twice: %v", err)
			}
		}},
		{"another push waits, or overtakes", func(in *trial) {
			next := pushable(in.t, 4, in.first.Hash(), "# next\n")
			if err := in.PushPolicies(in.t.Context(), next); !errors.Is(err, registry.ErrRolling) || !strings.Contains(err.Error(), "revision 2 is tried by the canary group (agent=") {
				in.t.Errorf("a push meanwhile: %v", err)
			}
			low := pushable(in.t, 3, in.first.Hash(), "# next\n")
			if err := in.OvertakePolicies(in.t.Context(), low); !errors.Is(err, registry.ErrStale) || !strings.Contains(err.Error(), "the next is 4") {
				in.t.Errorf("a revision that the fallback has: %v", err)
			}
			if err := in.OvertakePolicies(in.t.Context(), next); err != nil {
				in.t.Error(err)
			}
			in.acts(4, 4)
			in.is(mesh.Overtaken, "revision 4")
		}},
		{"an edit of the files overtakes under a revision of its own", func(in *trial) {
			if rev := in.apply(policies("pay")); rev != 4 {
				in.t.Errorf("the edit has revision %d", rev)
			}
			in.acts(4, 4)
			in.is(mesh.Overtaken, "an edit of the policy files")
		}},
		{"the next snapshot of the fleet is newer than that of the canaries", func(in *trial) {
			before, _ := in.SnapshotFor(agent("canary"), id("/x"), "sidecar")
			if err := in.PromotePolicies(in.t.Context(), 2, true, "boss"); err != nil {
				in.t.Fatal(err)
			}
			if now := in.Current(); now.Revision <= before.Revision {
				in.t.Errorf("the fleet's snapshot has revision %d after the canary's %d", now.Revision, before.Revision)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				in := newTrial(t)
				in.runs()
				in.begin(in.whole())
				in.begin(in.whole()) // its reply was lost
				in.acts(2, 1)
				want := []string{"canary canary has 1 wants 2 STALE", "other fleet has 1 wants 1 SYNCED"}
				if got := in.of(); !slices.Equal(got, want) {
					t.Errorf("the proxies are %q, want %q", got, want)
				}
				tt.steps(in)
			})
		})
	}
}

func TestRolloutWithoutFallback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newTrial(t)
		in.runs()
		tr := in.whole()
		tr.Fallback = nil
		in.begin(tr)
		in.refuses("canary", 2, "no")
		time.Sleep(bake * 2)
		in.acts(2, 1)
		in.is(mesh.Held, "sa/canary refuses revision 2: no")
		if err := in.TakeBackPolicies(t.Context(), 0, "boss"); !errors.Is(err, registry.ErrRolling) || !strings.Contains(err.Error(), "without a set to go back by") {
			t.Errorf("back: %v", err)
		}
		in.stopRun()
		in.restart()
		in.runs()
		in.is(mesh.Held, "no")
		in.acts(2, 1)
		if err := in.OvertakePolicies(t.Context(), pushable(t, 3, in.first.Hash(), "# first\n")); err != nil {
			t.Fatal(err)
		}
		in.acts(3, 3)
	})
}

// TestRolloutByHand waits for the operator, however long.
func TestRolloutByHand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newTrial(t)
		in.runs()
		tr := in.whole()
		tr.Bake = 0
		in.begin(tr)
		time.Sleep(time.Hour)
		in.says("canary", 2)
		time.Sleep(time.Hour)
		in.acts(2, 1)
		if err := in.PromotePolicies(t.Context(), 0, false, "boss"); err != nil {
			t.Error(err)
		}
		in.acts(2, 2)
	})
}

func TestTryRefuses(t *testing.T) {
	in := newTrial(t)
	other := func(revision uint64, previous, rows string) *policyset.Signed {
		return pushable(t, revision, previous, rows)
	}
	hash := in.first.Hash()
	for _, tt := range []struct {
		name string
		edit func(*registry.Trial)
		is   error
		want string
	}{
		{"nobody in the group", func(r *registry.Trial) { r.Group = []string{"kind=gateway"} }, registry.ErrUnfit, "none of the 2 connected proxies is in the canary group (kind=gateway)"},
		{"a bad selector", func(r *registry.Trial) { r.Group = []string{"x"} }, registry.ErrUnfit, "chooses no proxy"},
		{"a negative bake", func(r *registry.Trial) { r.Bake = -1 }, registry.ErrUnfit, "bake"},
		{"an endless bake", func(r *registry.Trial) { r.Bake = mesh.MaxBake + 1 }, registry.ErrUnfit, "bake"},
		{"a bad row", func(r *registry.Trial) { r.Set = other(2, hash, "p, a\n") }, registry.ErrUnfit, "access.csv:1"},
		{"a stale set", func(r *registry.Trial) { r.Set = other(1, hash, "#\n") }, registry.ErrStale, "in force is revision 1"},
		{"a set that does not follow", func(r *registry.Trial) { r.Set = other(2, "", "#\n") }, registry.ErrStale, "follows on set none"},
		{"a fallback that says something else", func(r *registry.Trial) { r.Fallback = other(3, hash, "p, a, in, **, **, *, *, **, -, deny\n") }, registry.ErrUnfit, "does not say what revision 1 says"},
		{"a fallback that cannot be read", func(r *registry.Trial) { r.Fallback = other(3, hash, "p\n") }, registry.ErrUnfit, "fallback: access.csv:1"},
		{"a fallback that follows on another", func(r *registry.Trial) { r.Fallback = other(3, in.second.Hash(), "# first\n") }, registry.ErrStale, "the fallback follows on"},
		{"a fallback that is not above", func(r *registry.Trial) { r.Fallback = other(2, hash, "# first\n") }, registry.ErrStale, "not above revision 2"},
	} {
		r := in.whole()
		tt.edit(&r)
		if err := in.TryPolicies(t.Context(), r); !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		in.acts(1, 1)
	}
	if len(in.steps) > 0 {
		t.Errorf("steps are recorded: %+v", in.steps)
	}

	// What cannot be recorded does not happen.
	in.fail = errors.New("disk full")
	if err := in.TryPolicies(t.Context(), in.whole()); err == nil || in.Status().Rollout != nil {
		t.Errorf("unrecorded: %v", err)
	}
	in.acts(1, 1)
	in.fail = nil
	in.begin(in.whole())
	in.fail = errors.New("disk full")
	if in.PromotePolicies(t.Context(), 0, true, "boss") == nil || in.TakeBackPolicies(t.Context(), 0, "boss") == nil {
		t.Error("unrecorded, and done")
	}
	in.acts(2, 1)
	got := in.steps[1]
	if got.Step != "try" || got.Revision != 2 || got.By != "boss" || got.Members != 1 || got.Set != in.second.Hash() || !strings.Contains(got.Why, "to 1 of 2 connected proxies (agent=") {
		t.Errorf("recorded is %+v", got)
	}

	// The first set of all has nothing for the fleet to stay on.
	bare := start(t)
	if err := bare.TryPolicies(t.Context(), registry.Trial{Set: in.first, Group: []string{"5%"}}); !errors.Is(err, registry.ErrUnfit) || !strings.Contains(err.Error(), "no pushed set to stay on") {
		t.Errorf("the first of all: %v", err)
	}
}

// TestRolloutSigned tries only what is signed, at a push and from the store.
func TestRolloutSigned(t *testing.T) {
	in := &trial{issuer: &issuer{t: t, path: t.TempDir() + "/s.sqlite", verify: pinned().Verify}}
	in.restart()
	t.Cleanup(in.stop)
	in.first = signed(pushable(t, 1, "", "# first\n"), 1, 2)
	deny := "p, guard, in, **, **, *, *, **, -, deny\n"
	in.second = signed(pushable(t, 2, in.first.Hash(), deny), 1)
	in.fallback = signed(pushable(t, 3, in.first.Hash(), "# first\n"), 1)
	if err := in.PushPolicies(t.Context(), in.first); err != nil {
		t.Fatal(err)
	}
	in.says("canary", 1)
	in.says("other", 1)
	if err := in.TryPolicies(t.Context(), in.whole()); !errors.Is(err, registry.ErrUnfit) || !strings.Contains(err.Error(), "1 of the 2 pinned keys have signed") {
		t.Errorf("a set with one signature: %v", err)
	}
	signed(in.second, 1, 2)
	if err := in.TryPolicies(t.Context(), in.whole()); !errors.Is(err, registry.ErrUnfit) || !strings.Contains(err.Error(), "fallback: ") {
		t.Errorf("a fallback with one signature: %v", err)
	}
	signed(in.fallback, 1, 2)
	in.begin(in.whole())
	canary := proxyOf("canary", 0)
	if s, _ := in.SnapshotFor(canary.Agent, canary.Workload, canary.Kind); s.PolicySet != in.second.Hash() {
		t.Errorf("the canary is told of set %q", s.PolicySet)
	}
	if b, err := in.PolicySetFile(in.second.Hash()); err != nil || string(b) != string(in.second.Encode()) {
		t.Errorf("the file of the set that is tried: %v", err)
	}
	in.restart()
	in.acts(2, 1)

	// Somebody who can write to the store puts what is signed there, and never
	// was tried: it has red tests, another set before it, or another way back.
	write := func(key string, s *policyset.Signed) {
		t.Helper()
		if _, err := in.store.Write(t.Context(), store.Op{Kind: store.KindRollout, Key: key, Value: s.Encode()}); err != nil {
			t.Fatal(err)
		}
		in.restart()
	}
	in.check = func(p *mesh.Policies) error {
		if len(p.Rules) > 1 {
			return errors.New("a red case")
		}
		return nil
	}
	for name, s := range map[string]*policyset.Signed{
		"red":                        pushable(t, 2, in.first.Hash(), deny+strings.Replace(deny, "guard", "other", 1)),
		"on a set that nobody knows": pushable(t, 2, strings.Repeat("ab", 32), deny),
		"on none":                    pushable(t, 2, "", deny),
	} {
		write("policies/set", signed(s, 1, 2))
		if s, canary := in.SnapshotFor(proxyOf("canary", 0).Agent, proxyOf("canary", 0).Workload, "sidecar"); canary || s.PolicyRevision != 1 {
			t.Errorf("a set that is %s is given to the canary", name)
		}
	}
	write("policies/set", in.second)
	in.acts(2, 1)
	for name, s := range map[string]*policyset.Signed{
		"says something else":    pushable(t, 3, in.first.Hash(), deny),
		"follows on another set": pushable(t, 3, in.second.Hash(), "# first\n"),
	} {
		write("policies/fallback", signed(s, 1, 2))
		if s, canary := in.SnapshotFor(proxyOf("canary", 0).Agent, proxyOf("canary", 0).Workload, "sidecar"); canary || s.PolicyRevision != 1 {
			t.Errorf("a set with a way back that %s is given to the canary", name)
		}
	}
	write("policies/fallback", in.fallback)
	in.acts(2, 1)

	// Or widens it.
	if _, err := in.store.Write(t.Context(), store.Op{Kind: store.KindRollout, Key: "policies/set", Value: pushable(t, 2, in.first.Hash(), allowAll).Encode()}); err != nil {
		t.Fatal(err)
	}
	in.restart()
	in.acts(1, 1)
	if err := in.PromotePolicies(t.Context(), 0, true, "boss"); !errors.Is(err, registry.ErrRolling) || !strings.Contains(err.Error(), "cannot read the set") {
		t.Errorf("to promote what nobody signed: %v", err)
	}
	next := signed(pushable(t, 4, in.first.Hash(), "# next\n"), 1, 2)
	if err := in.OvertakePolicies(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	in.acts(4, 4)
}

// TestRolloutEndpoints gives both groups the endpoints of the services that
// each of them knows.
func TestRolloutEndpoints(t *testing.T) {
	in := newTrial(t)
	services := func(names ...string) (out string) {
		out = "services:\n"
		for _, n := range names {
			out += fmt.Sprintf("  - {name: %s, identity: %q, port: 8443, protocol: http}\n", n, id("/ns/shop/sa/"+n))
		}
		return out
	}
	set := func(revision uint64, names ...string) *policyset.Signed {
		s, err := policyset.New(policyset.Set{
			TrustDomain: td, Revision: revision, Previous: in.Status().PolicySet, Created: time.Unix(1_800_000_000, 0).UTC(),
			Files: []policyset.File{
				{Name: "access.csv", Data: []byte("# none\n")},
				{Name: "entries.yaml", Data: fmt.Appendf(nil, "entries:\n  - {spiffe_id: %q, parent_id: %[3]q, selectors: [\"child:true\"]}\n  - {spiffe_id: %[2]q, parent_id: %[3]q, selectors: [\"child:true\"]}\n",
					id("/ns/shop/sa/old"), id("/ns/shop/sa/new"), agent("canary"))},
				{Name: "services.yaml", Data: []byte(services(names...))},
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if err := in.PushPolicies(t.Context(), set(2, "old")); err != nil {
		t.Fatal(err)
	}
	tr := in.whole()
	tr.Set, tr.Fallback = set(3, "old", "new"), set(4, "old")
	in.begin(tr)
	fleet := in.Current()
	for i, name := range []string{"old", "new"} {
		in.announce(mesh.Endpoint{Agent: agent("canary"), Service: mesh.ServiceName(name), Address: netip.MustParseAddrPort(fmt.Sprintf("192.0.2.1:%d", 8000+i))})
	}
	canary, _ := in.SnapshotFor(agent("canary"), id("/ns/shop/sa/canary"), "sidecar")
	if len(canary.Endpoints) != 2 || len(in.Current().Endpoints) != 1 || canary.Revision <= fleet.Revision {
		t.Errorf("the canary has %v, the fleet %v", canary.Endpoints, in.Current().Endpoints)
	}
}

// sharedRollout begins a rollout at one of two issuers, which then dies: the
// other conducts it to its end.
func sharedRollout(f *fleet) {
	a, b := f.join("a", false), f.join("b", true)
	first := pushable(f.t, 1, "", "# first\n")
	second := pushable(f.t, 2, first.Hash(), "# second\n")
	if err := a.PushPolicies(f.t.Context(), first); err != nil {
		f.t.Fatal(err)
	}
	f.eventually("b has the set", func() bool { return b.Status().PolicyRevision == 1 })
	for _, m := range []*member{a, b} {
		m.ReportProxy(proxyOf("canary", 1))
		m.ReportProxy(proxyOf("other", 1))
	}
	if err := a.TryPolicies(f.t.Context(), registry.Trial{
		Set: second, Fallback: pushable(f.t, 3, first.Hash(), "# first\n"), Group: []string{"agent=" + agent("canary").String()}, Bake: bake, By: "boss",
	}); err != nil {
		f.t.Fatal(err)
	}
	on := func(m *member, name string) uint64 {
		p := proxyOf(name, 0)
		s, _ := m.SnapshotFor(p.Agent, p.Workload, p.Kind)
		return s.PolicyRevision
	}
	f.eventually("b has the canary try it", func() bool { return on(b, "canary") == 2 })
	if on(b, "other") != 1 || on(a, "other") != 1 || on(a, "canary") != 2 {
		f.t.Error("the issuers do not agree")
	}
	b.ReportProxy(proxyOf("canary", 2))
	f.ahead.Store(int64(bake))
	f.eventually("b promotes it", func() bool { return b.Status().PolicyRevision == 2 })
	if ro := b.Status().Rollout; ro.State != mesh.Promoted || ro.By != "boss" {
		f.t.Errorf("at b it is %+v", ro)
	}
	// The one that was asleep acts on its view no more.
	if err := a.TakeBackPolicies(f.t.Context(), 2, "boss"); !errors.Is(err, registry.ErrRolling) {
		f.t.Errorf("a takes back what b promoted: %v", err)
	}
	if st := a.Status(); st.PolicyRevision != 2 || st.Rollout.State != mesh.Promoted || st.NextRevision != 4 {
		f.t.Errorf("at a in force is %+v", st)
	}
}

// racingRollout lets one issuer begin a rollout while the other pushes.
func racingRollout(f *fleet) {
	a := f.join("a", false)
	first := pushable(f.t, 1, "", "# first\n")
	if err := a.PushPolicies(f.t.Context(), first); err != nil {
		f.t.Fatal(err)
	}
	b := f.join("b", false)
	a.ReportProxy(proxyOf("canary", 1))
	tried, pushed := pushable(f.t, 2, first.Hash(), "# tried\n"), pushable(f.t, 2, first.Hash(), "# pushed\n")
	// Neither follows the other, as if both wrote at one moment.
	if err := a.TryPolicies(f.t.Context(), registry.Trial{Set: tried, Group: []string{"kind=sidecar"}, Bake: bake}); err != nil {
		f.t.Fatal(err)
	}
	if err := b.PushPolicies(f.t.Context(), pushed); !errors.Is(err, registry.ErrRolling) {
		f.t.Errorf("a push that does not know of the rollout: %v", err)
	}
	if err := b.OvertakePolicies(f.t.Context(), pushed); !errors.Is(err, registry.ErrStale) {
		f.t.Errorf("one revision for two sets: %v", err)
	}
	if err := b.OvertakePolicies(f.t.Context(), pushable(f.t, 3, first.Hash(), "# pushed\n")); err != nil {
		f.t.Fatal(err)
	}
	if err := a.TryPolicies(f.t.Context(), registry.Trial{Set: pushable(f.t, 4, first.Hash(), "# again\n"), Group: []string{"kind=sidecar"}}); !errors.Is(err, registry.ErrRolling) {
		f.t.Errorf("a rollout beside one that it believes is there: %v", err)
	}
	if err := a.PromotePolicies(f.t.Context(), 2, true, "boss"); !errors.Is(err, registry.ErrRolling) {
		f.t.Errorf("to promote what was overtaken: %v", err)
	}
	if st := a.Status(); st.PolicyRevision != 3 || st.Rollout.State != mesh.Overtaken {
		f.t.Errorf("in force at a is %+v, %+v", st, st.Rollout)
	}
}
