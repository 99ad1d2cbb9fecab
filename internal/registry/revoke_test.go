package registry_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

type issuing interface {
	RecordIssued(ctx context.Context, list []mesh.Issued) error
	PutAgent(ctx context.Context, a mesh.Agent) error
	GetAgent(ctx context.Context, id spiffeid.ID) (mesh.Agent, error)
}

// ban bans an agent.
func ban(ctx context.Context, r issuing, name string) error {
	a, err := r.GetAgent(ctx, agent(name))
	if err != nil {
		return err
	}
	a.Banned = true
	return r.PutAgent(ctx, a)
}

// issue records an SVID that the agent "<service>-<n>" got for its service.
func issue(t *testing.T, r issuing, serial, service string, n int) {
	t.Helper()
	name := fmt.Sprintf("%s-%d", service, n)
	if err := r.RecordIssued(t.Context(), []mesh.Issued{{
		Serial: serial, ID: id("/ns/shop/sa/" + service), Entry: name, Agent: agent(name), Until: time.Now().Add(time.Hour),
	}}); err != nil {
		t.Fatal(err)
	}
}

func attested(t *testing.T, r issuing, names ...string) {
	t.Helper()
	for _, n := range names {
		if err := r.PutAgent(t.Context(), mesh.Agent{ID: agent(n), Serial: "1"}); err != nil {
			t.Fatal(err)
		}
	}
}

// revoked are the revocations as "serial why".
func revoked(v *mesh.RevokedSVIDs) string {
	var out []string
	for _, x := range v.All {
		out = append(out, x.Serial+" "+x.Why)
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

func TestWhatIsWithdrawnIsRevoked(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(*issuer) error
		want string
	}{
		{"a policy that is the same for a workload", func(in *issuer) error {
			p := policies("pay", "web")
			p.Services[0].Port = 9999
			_, err := in.ApplyPolicies(t.Context(), p)
			return err
		}, ""},
		{"an entry that is written otherwise", func(in *issuer) error {
			p := policies("pay", "web")
			p.Entries[0].ID, p.Entries[0].DNSNames = "other", []string{"pay.corp.example"}
			_, err := in.ApplyPolicies(t.Context(), p)
			return err
		}, ""},
		{"an entry that left the files", func(in *issuer) error {
			p := policies("pay", "web")
			p.Entries = p.Entries[1:]
			_, err := in.ApplyPolicies(t.Context(), p)
			return err
		}, "a1 entry_withdrawn"},
		{"an entry that is another node's now", func(in *issuer) error {
			p := policies("pay", "web")
			p.Entries[0].ParentID = agent("elsewhere")
			_, err := in.ApplyPolicies(t.Context(), p)
			return err
		}, "a1 entry_withdrawn"},
		{"an agent that is banned", func(in *issuer) error {
			return ban(t.Context(), in, "pay-1")
		}, "9 agent_banned, a1 agent_banned"},
		{"an agent that is forgotten", func(in *issuer) error { return in.DeleteAgent(t.Context(), agent("pay-1")) },
			"9 agent_evicted, a1 agent_evicted"},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := start(t)
			in.apply(policies("pay", "web"))
			attested(t, in, "pay-1", "pay-2", "web-1")
			issue(t, in, "a1", "pay", 1)
			issue(t, in, "a2", "pay", 2)
			issue(t, in, "b1", "web", 1)
			own := mesh.Issued{Serial: "9", ID: agent("pay-1"), Agent: agent("pay-1"), Until: time.Now().Add(time.Hour)}
			minted := mesh.Issued{Serial: "8", ID: id("/ns/shop/sa/pay"), Until: time.Now().Add(time.Hour)}
			if err := in.RecordIssued(t.Context(), []mesh.Issued{own, minted}); err != nil {
				t.Fatal(err)
			}
			woken := in.Changed()
			if err := c.do(in); err != nil {
				t.Fatal(err)
			}
			if got := revoked(in.Revocations()); got != c.want {
				t.Errorf("revoked %q, want %q", got, c.want)
			}
			if c.want != "" && !isClosed(woken) {
				t.Error("nobody was woken")
			}
			in.restart()
			if got := revoked(in.Revocations()); got != c.want {
				t.Errorf("after a restart %q, want %q", got, c.want)
			}
		})
	}
}

func TestRevokeEndsWhatIsNamed(t *testing.T) {
	for _, c := range []struct {
		name  string
		order mesh.RevokeOrder
		want  string
	}{
		{"a serial number", mesh.RevokeOrder{Serial: "a1"}, "a1"},
		{"an entry", mesh.RevokeOrder{Entry: "pay-2"}, "a2,a3"},
		{"an identity, minted too", mesh.RevokeOrder{ID: id("/ns/shop/sa/pay")}, "8,a1,a2,a3"},
		{"what nobody has", mesh.RevokeOrder{Serial: "77"}, "none"},
		{"an entry without SVIDs", mesh.RevokeOrder{Entry: "pay-9"}, "none"},
		{"a node, which is banned instead", mesh.RevokeOrder{Serial: "9"}, "none"},
		{"one that has ended", mesh.RevokeOrder{Serial: "dead"}, "none"},
		{"nothing", mesh.RevokeOrder{}, "none"},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := start(t)
			in.apply(policies("pay", "web"))
			attested(t, in, "pay-1", "pay-2", "web-1")
			issue(t, in, "a1", "pay", 1)
			issue(t, in, "a2", "pay", 2)
			issue(t, in, "a3", "pay", 2)
			issue(t, in, "b1", "web", 1)
			if err := in.RecordIssued(t.Context(), []mesh.Issued{
				{Serial: "9", ID: agent("pay-1"), Agent: agent("pay-1"), Until: time.Now().Add(time.Hour)},
				{Serial: "8", ID: id("/ns/shop/sa/pay"), Until: time.Now().Add(time.Hour)},
				{Serial: "dead", ID: id("/ns/shop/sa/pay"), Until: time.Now().Add(-time.Second)},
			}); err != nil {
				t.Fatal(err)
			}
			res, err := in.Revoke(t.Context(), c.order)
			if c.want == "none" {
				if !errors.Is(err, mesh.ErrNotFound) || len(in.Revocations().All) > 0 {
					t.Fatalf("revoked %+v, %v; want ErrNotFound", res, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var serials []string
			for _, v := range res.SVIDs {
				serials = append(serials, v.Serial)
			}
			slices.Sort(serials)
			if got := strings.Join(serials, ","); got != c.want {
				t.Errorf("revoked %s, want %s", got, c.want)
			}
			known := in.Revocations()
			if res.Revision == 0 || res.Revision != known.Revision || len(known.After(0, time.Now())) != len(serials) || len(known.After(res.Revision, time.Now())) != 0 {
				t.Errorf("result has revision %d, known are %+v", res.Revision, known)
			}
			again, err := in.Revoke(t.Context(), c.order)
			if err != nil || len(again.SVIDs) != 0 || again.Revision != res.Revision {
				t.Errorf("a second time: %+v, %v", again, err)
			}
		})
	}
}

func TestRevocationsEndWithTheirSVID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := start(t)
		in.apply(policies("pay"))
		attested(t, in, "pay-1")
		until := time.Now().Add(time.Hour)
		if err := in.RecordIssued(t.Context(), []mesh.Issued{{Serial: "a1", ID: id("/ns/shop/sa/pay"), Agent: agent("pay-1"), Entry: "pay-1", Until: until}}); err != nil {
			t.Fatal(err)
		}
		res, err := in.Revoke(t.Context(), mesh.RevokeOrder{Serial: "a1"})
		if err != nil || len(res.SVIDs) != 1 {
			t.Fatal(res, err)
		}
		if left := in.Revocations().After(0, until.Add(time.Millisecond)); len(left) != 0 {
			t.Errorf("%+v is still told when its SVID has ended", left)
		}
		time.Sleep(time.Until(until))
		if records, err := in.store.List(t.Context(), store.KindRevocation, "", 0); err != nil || len(records) != 0 {
			t.Errorf("the store still has %v, %v", records, err)
		}
		if records, err := in.store.List(t.Context(), store.KindIssued, "", 0); err != nil || len(records) != 0 {
			t.Errorf("the store still has %v, %v", records, err)
		}
	})
}

func TestTheLedgerTakesManyAtOnce(t *testing.T) {
	in := start(t)
	in.apply(policies("pay"))
	attested(t, in, "pay-1")
	var wg sync.WaitGroup
	for n := range 64 {
		wg.Go(func() {
			if err := in.RecordIssued(context.Background(), []mesh.Issued{{
				Serial: fmt.Sprintf("%x", n+1), ID: id("/ns/shop/sa/pay"), Agent: agent("pay-1"), Entry: "pay-1", Until: time.Now().Add(time.Hour),
			}}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	res, err := in.Revoke(t.Context(), mesh.RevokeOrder{ID: spiffeid.RequireFromPath(td, "/ns/shop/sa/pay")})
	if err != nil || len(res.SVIDs) != 64 {
		t.Errorf("revoked %d of 64, %v", len(res.SVIDs), err)
	}
}

func TestWhatCannotBeRecordedIsNotIssued(t *testing.T) {
	in := start(t)
	in.apply(policies("pay"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := in.RecordIssued(ctx, []mesh.Issued{{Serial: "1", ID: id("/x"), Until: time.Now().Add(time.Hour)}}); err != nil {
		t.Errorf("a caller that left keeps others from their record: %v", err)
	}
	if err := in.store.Close(); err != nil {
		t.Fatal(err)
	}
	if err := in.RecordIssued(t.Context(), []mesh.Issued{{Serial: "2", ID: id("/x"), Until: time.Now().Add(time.Hour)}}); !errors.Is(err, store.ErrClosed) {
		t.Errorf("got %v, want ErrClosed", err)
	}
	in.store = nil
	in.restart()
}

func sharedRevocations(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	if _, err := a.ApplyPolicies(f.t.Context(), policies("pay")); err != nil {
		f.t.Fatal(err)
	}
	f.eventually("b has the policies", func() bool { return b.Current() != nil })
	attested(f.t, a, "pay-1", "pay-2")
	issue(f.t, a, "a1", "pay", 1)
	issue(f.t, b, "a2", "pay", 2)
	if _, err := b.Revoke(f.t.Context(), mesh.RevokeOrder{Serial: "a1"}); err != nil {
		f.t.Fatal(err)
	}
	f.eventually("a knows what b revoked", func() bool { return revoked(a.Revocations()) == "a1 svid_revoked" })
	if err := ban(f.t.Context(), a, "pay-2"); err != nil {
		f.t.Fatal(err)
	}
	const all = "a1 svid_revoked, a2 agent_banned"
	for _, m := range []*member{a, b} {
		f.eventually("both know "+all, func() bool { return revoked(m.Revocations()) == all })
	}
}
