package registry_test

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/attest"
	"sallyport/internal/mesh"
	"sallyport/internal/registry"
	"sallyport/internal/store"
)

func hash(text string) [32]byte { return sha256.Sum256([]byte(text)) }

// token creates a join token and returns the hash of its text.
func token(t *testing.T, in *issuer, name string, ttl time.Duration) [32]byte {
	t.Helper()
	text, _, err := in.CreateToken(t.Context(), name, ttl)
	if err != nil {
		t.Fatalf("CreateToken: %v", err)
	}
	return hash(text)
}

func TestTokenTextIsKeptNowhere(t *testing.T) {
	in := start(t)
	text, expires, err := in.CreateToken(t.Context(), "web-1", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := hex.DecodeString(text)
	if err != nil || len(raw) != 32 {
		t.Errorf("token %d bytes, %v, want 64 hex digits", len(raw), err)
	}
	if left := time.Until(expires); left < 59*time.Minute || left > time.Hour {
		t.Errorf("expires in %v, want an hour", left)
	}
	records, err := in.store.List(t.Context(), store.KindToken, "", 0)
	if err != nil || len(records) != 1 {
		t.Fatalf("%d token records, %v", len(records), err)
	}
	if all := records[0].Key + string(records[0].Value) + in.log.String(); strings.Contains(all, text) || strings.Contains(all, string(raw)) {
		t.Error("the text of the token is in the store or the log")
	}
	other, _, err := in.CreateToken(t.Context(), "web-1", time.Hour)
	if err != nil || other == text {
		t.Errorf("two tokens are the same, or %v", err)
	}
}

func TestRedeem(t *testing.T) {
	const lasts = time.Minute
	tests := []struct {
		name  string
		steps func(redeem func(at time.Duration, key string, want error))
	}{
		{"the first key wins", func(redeem func(time.Duration, string, error)) {
			redeem(0, "a", nil)
			redeem(0, "b", registry.ErrTokenUsed)
		}},
		{"the same key may try again within the grace", func(redeem func(time.Duration, string, error)) {
			redeem(time.Second, "a", nil)
			redeem(time.Second, "a", nil)
			redeem(time.Second+registry.Grace-1, "a", nil)
			redeem(time.Second+registry.Grace, "a", registry.ErrTokenUsed)
		}},
		{"another key in between changes nothing", func(redeem func(time.Duration, string, error)) {
			redeem(0, "a", nil)
			redeem(1, "b", registry.ErrTokenUsed)
			redeem(2, "a", nil)
		}},
		{"an expired token is good for nobody", func(redeem func(time.Duration, string, error)) {
			redeem(lasts, "a", registry.ErrTokenExpired)
			redeem(lasts+time.Hour, "a", registry.ErrTokenExpired)
		}},
		{"the grace outlasts the token for the key that has it", func(redeem func(time.Duration, string, error)) {
			redeem(lasts-time.Second, "a", nil)
			redeem(lasts+time.Second, "a", nil)
			redeem(lasts+time.Second, "b", registry.ErrTokenUsed)
		}},
		{"in time is in time", func(redeem func(time.Duration, string, error)) {
			redeem(lasts-1, "a", nil)
		}},
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				in := start(t)
				tok, began := token(t, in, "web-1", lasts), time.Now()
				c.steps(func(at time.Duration, key string, want error) {
					t.Helper()
					name, err := in.Redeem(t.Context(), tok, hash(key), began.Add(at))
					if !errors.Is(err, want) || (err == nil) != (want == nil) || (name == "web-1") != (want == nil) {
						t.Errorf("Redeem(%v, %s) = %q, %v, want %v", at, key, name, err, want)
					}
				})
			})
		})
	}
}

func TestRedeemOverARestart(t *testing.T) {
	in := start(t)
	tok := token(t, in, "web-1", time.Minute)
	if _, err := in.Redeem(t.Context(), tok, hash("a"), time.Time{}); err != nil {
		t.Fatal(err)
	}
	in.restart()
	if name, err := in.Redeem(t.Context(), tok, hash("a"), time.Time{}); name != "web-1" || err != nil {
		t.Errorf("the same key = %q, %v", name, err)
	}
	if _, err := in.Redeem(t.Context(), tok, hash("b"), time.Time{}); !errors.Is(err, registry.ErrTokenUsed) {
		t.Errorf("another key = %v, want ErrTokenUsed", err)
	}
	if _, err := in.Redeem(t.Context(), hash("guess"), hash("a"), time.Time{}); !errors.Is(err, registry.ErrTokenUnknown) {
		t.Errorf("an unknown token = %v, want ErrTokenUnknown", err)
	}
}

func TestOneOfManyKeysRedeems(t *testing.T) {
	in := start(t)
	tok := token(t, in, "web-1", time.Minute)
	var mu sync.Mutex
	var won, used int
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			_, err := in.Redeem(t.Context(), tok, hash(fmt.Sprint(i)), time.Time{})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				won++
			case errors.Is(err, registry.ErrTokenUsed):
				used++
			default:
				t.Errorf("Redeem = %v", err)
			}
		})
	}
	wg.Wait()
	if won != 1 || used != 19 {
		t.Errorf("%d keys redeemed and %d were refused, want 1 and 19", won, used)
	}
}

func TestTokenRefusalsNameTheNextStep(t *testing.T) {
	for _, err := range []error{registry.ErrTokenUnknown, registry.ErrTokenExpired, registry.ErrTokenUsed} {
		if !strings.HasSuffix(err.Error(), "create a new one: sallyport token create") {
			t.Errorf("%q does not name the next step", err)
		}
		if !errors.Is(err, attest.ErrEvidence) {
			t.Errorf("%q is not evidence", err)
		}
	}
}

func TestCreateTokenRefuses(t *testing.T) {
	in := start(t)
	for _, name := range []string{"", ".", "..", "a/b", "a b", "ä", "a\n", "a%20", strings.Repeat("a", 129)} {
		if _, _, err := in.CreateToken(t.Context(), name, time.Hour); !errors.Is(err, registry.ErrBadAgentName) {
			t.Errorf("CreateToken(%q) = %v, want ErrBadAgentName", name, err)
		}
	}
	for _, name := range []string{"web-1", "Web_1.b", strings.Repeat("a", 128)} {
		if _, _, err := in.CreateToken(t.Context(), name, 0); err != nil {
			t.Errorf("CreateToken(%q) = %v", name, err)
		}
	}
	before := time.Now()
	if _, expires, err := in.CreateToken(t.Context(), "a", time.Second); err != nil || !before.Before(expires) {
		t.Errorf("a token for one second expires at %v, %v", expires, err)
	}
	for _, ttl := range []time.Duration{-1, time.Second - 1, registry.MaxTokenTTL + 1} {
		if _, _, err := in.CreateToken(t.Context(), "a", ttl); err == nil {
			t.Errorf("CreateToken with lifetime %v succeeded", ttl)
		}
	}
}

func TestAgents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := start(t)
		a := mesh.Agent{
			ID: agent("web-1"), AttestationType: "join_token", Serial: "123", NextSerial: "124",
			Selectors: []mesh.Selector{{Type: "join_token", Value: "web-1"}},
			ExpiresAt: time.Now().Add(time.Hour).UTC(),
		}
		banned := mesh.Agent{ID: agent("evil"), Serial: "1", ExpiresAt: a.ExpiresAt, Banned: true}
		for _, agent := range []mesh.Agent{a, banned} {
			if err := in.PutAgent(t.Context(), agent); err != nil {
				t.Fatal(err)
			}
		}
		in.restart()
		got, err := in.GetAgent(t.Context(), a.ID)
		if got.Revision == 0 {
			t.Error("an agent that was read has no revision")
		}
		got.Revision = 0
		if diff := cmp.Diff(a, got, cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b }), cmpopts.EquateApproxTime(0)); diff != "" || err != nil {
			t.Errorf("GetAgent = %v, -want +got:\n%s", err, diff)
		}
		list := func() (names []string) {
			t.Helper()
			agents, err := in.ListAgents(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range agents {
				names = append(names, a.ID.Path())
			}
			return names
		}
		want := []string{"/spire/agent/join_token/evil", "/spire/agent/join_token/web-1"}
		if diff := cmp.Diff(want, list()); diff != "" {
			t.Errorf("ListAgents, -want +got:\n%s", diff)
		}
		// An expired agent is still told from one that never was; a banned one
		// is never forgotten.
		time.Sleep(48 * time.Hour)
		if _, err := in.GetAgent(t.Context(), a.ID); err != nil {
			t.Errorf("GetAgent two days later: %v", err)
		}
		time.Sleep(365 * 24 * time.Hour)
		if diff := cmp.Diff(want[:1], list()); diff != "" {
			t.Errorf("ListAgents a year later, -want +got:\n%s", diff)
		}
		for _, id := range []spiffeid.ID{a.ID, agent("never"), {}} {
			if _, err := in.GetAgent(t.Context(), id); !errors.Is(err, mesh.ErrNotFound) {
				t.Errorf("GetAgent(%s) = %v, want ErrNotFound", id, err)
			}
		}
		if err := in.PutAgent(t.Context(), mesh.Agent{ID: spiffeid.RequireFromString("spiffe://other.example/a")}); err == nil {
			t.Error("an agent of another trust domain was kept")
		}
	})
}

// TestHeldAgent asks again after each write, and while others write.
func TestHeldAgent(t *testing.T) {
	in := start(t)
	id := agent("web-1")
	if _, err := in.HeldAgent(t.Context(), id); !errors.Is(err, mesh.ErrNotFound) {
		t.Errorf("before it attests: %v, want ErrNotFound", err)
	}
	var readers sync.WaitGroup
	done := make(chan struct{})
	for range 4 {
		readers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					_, _ = in.HeldAgent(t.Context(), id)
				}
			}
		})
	}
	for n := range 50 {
		want := mesh.Agent{ID: id, Serial: strconv.Itoa(n), Banned: n%2 == 1}
		putAgent(t, in.Registry, want)
		if got, err := in.HeldAgent(t.Context(), id); err != nil || got.Serial != want.Serial || got.Banned != want.Banned {
			t.Fatalf("after write %d: %+v, %v", n, got, err)
		}
	}
	close(done)
	readers.Wait()
	if err := in.DeleteAgent(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if _, err := in.HeldAgent(t.Context(), id); !errors.Is(err, mesh.ErrNotFound) {
		t.Errorf("after it was forgotten: %v, want ErrNotFound", err)
	}
}

// TestPutAgentReplacesOnlyWhatWasRead: a renewal under way undoes neither the
// ban nor the removal of its agent.
func TestPutAgentReplacesOnlyWhatWasRead(t *testing.T) {
	in := start(t)
	id := agent("web-1")
	putAgent(t, in.Registry, mesh.Agent{ID: id, Serial: "1"})
	renewal, err := in.GetAgent(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	putAgent(t, in.Registry, mesh.Agent{ID: id, Serial: "1", Banned: true})
	renewal.NextSerial = "2"
	if err := in.PutAgent(t.Context(), renewal); !errors.Is(err, mesh.ErrChanged) {
		t.Errorf("a renewal in the place of a ban: %v, want ErrChanged", err)
	}
	if got, err := in.HeldAgent(t.Context(), id); err != nil || !got.Banned {
		t.Errorf("after the renewal: %+v, %v, want the ban", got, err)
	}
	if err := in.DeleteAgent(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := in.PutAgent(t.Context(), renewal); !errors.Is(err, mesh.ErrChanged) {
		t.Errorf("a renewal of who was removed: %v, want ErrChanged", err)
	}
	if _, err := in.HeldAgent(t.Context(), id); !errors.Is(err, mesh.ErrNotFound) {
		t.Errorf("after it was removed: %v, want ErrNotFound", err)
	}
}

// TestHeldAgentFailsWithTheStore: what is not held is not guessed.
func TestHeldAgentFailsWithTheStore(t *testing.T) {
	in := start(t)
	id := agent("web-1")
	putAgent(t, in.Registry, mesh.Agent{ID: id, Serial: "1"})
	if err := in.store.Close(); err != nil {
		t.Fatal(err)
	}
	if a, err := in.HeldAgent(t.Context(), id); !errors.Is(err, store.ErrClosed) || !a.ID.IsZero() {
		t.Errorf("without a store: %+v, %v, want ErrClosed", a, err)
	}
}

func TestABanEndsEndpoints(t *testing.T) {
	in := start(t)
	in.apply(policies("billing"))
	in.announce(endpoint("billing", 1, "10.0.0.1:15006"))
	in.announce(endpoint("billing", 2, "10.0.0.2:15006"))
	if err := in.PutAgent(t.Context(), mesh.Agent{ID: agent("billing-1"), Banned: true}); err != nil {
		t.Fatal(err)
	}
	in.want("billing@10.0.0.2:15006")
}

// An agent without endpoints has streams too.
func TestABanWakesWhoeverWaits(t *testing.T) {
	in := start(t)
	for _, when := range []string{"before the first policies", "with policies"} {
		changed, before := in.Changed(), in.Current()
		putAgent(t, in.Registry, mesh.Agent{ID: agent("billing-1"), Serial: when, Banned: true})
		select {
		case <-changed:
		default:
			t.Errorf("%s: a ban woke nobody", when)
		}
		if in.Current() != before {
			t.Errorf("%s: a ban distributed something new", when)
		}
		in.apply(policies("billing"))
	}
}

func TestProxyState(t *testing.T) {
	in := start(t)
	p := mesh.Proxy{Agent: agent("billing-1"), Workload: id("/ns/shop/sa/billing"), Kind: "sidecar", Connected: true}
	state := func(step string, state mesh.ProxyState, reason string) {
		t.Helper()
		got := in.Proxies()
		if len(got) != 1 || got[0].State != state || got[0].Reason != reason || got[0].LastSeen.IsZero() {
			t.Errorf("%s: %+v, want %s %q", step, got, state, reason)
		}
	}
	report := func(change func(*mesh.Proxy)) {
		change(&p)
		in.ReportProxy(p)
	}
	report(func(p *mesh.Proxy) { p.State = mesh.Synced })
	state("before the first policies", mesh.Stale, "")
	in.apply(policies("billing"))
	state("before the first answer", mesh.Stale, "")
	report(func(p *mesh.Proxy) { p.PolicyRevision = 1 })
	state("acknowledged", mesh.Synced, "")
	in.announce(endpoint("billing", 1, "10.0.0.1:15006"))
	state("endpoints are no policy", mesh.Synced, "")
	in.apply(policies("billing", "payment"))
	state("a new set", mesh.Stale, "")
	report(func(p *mesh.Proxy) { p.State, p.Reason, p.PolicyRevision = mesh.Rejected, "row 3: no", 2 })
	state("refused", mesh.Rejected, "row 3: no")
	if got := in.Proxies()[0].PolicyRevision; got != 1 {
		t.Errorf("policy revision of a proxy that refused 2 = %d, want the acknowledged 1", got)
	}
	in.apply(policies("payment"))
	state("a set after the refused one", mesh.Stale, "")
	report(func(*mesh.Proxy) {})
	state("the old refusal once more", mesh.Stale, "")
	report(func(p *mesh.Proxy) { p.PolicyRevision = 0 })
	state("what is in force is refused", mesh.Rejected, "row 3: no")
	report(func(p *mesh.Proxy) { p.State, p.Reason, p.PolicyRevision = "", "", 3 })
	state("acknowledged again", mesh.Synced, "")
}

func TestProxiesAreForgottenADayAfterTheyLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := start(t)
		in.ReportProxy(mesh.Proxy{Agent: agent("b"), Workload: id("/b"), Connected: true})
		in.ReportProxy(mesh.Proxy{Agent: agent("a"), Workload: id("/a")})
		in.ReportProxy(mesh.Proxy{Agent: agent("a"), Workload: id("/a"), Kind: "gateway"})
		if got := in.Proxies(); len(got) != 2 || got[0].Kind != "gateway" || got[1].Workload != id("/b") {
			t.Errorf("Proxies = %+v, want two in the order of their workloads", got)
		}
		time.Sleep(25 * time.Hour)
		if got := in.Proxies(); len(got) != 1 || got[0].Workload != id("/b") {
			t.Errorf("Proxies a day later = %+v, want the connected one", got)
		}
	})
}

func TestEdges(t *testing.T) {
	in := start(t)
	early, late := time.Unix(100, 0), time.Unix(200, 0)
	in.AddEdges(agent("a"), []mesh.Edge{
		{Src: "b", Dst: "c", Proto: "http", Allowed: 1, Denied: 2, Errors: 3, First: late, Last: late, MTLS: true},
		{Src: "a", Dst: "c", Proto: "http", Allowed: 7, First: early, Last: early},
	})
	in.AddEdges(agent("a"), []mesh.Edge{{Src: "b", Dst: "c", Proto: "http", Allowed: 10, Denied: 10, Errors: 10, First: early, Last: late, MTLS: true}})
	want := []mesh.Edge{
		{Src: "a", Dst: "c", Proto: "http", Allowed: 7, First: early, Last: early},
		{Src: "b", Dst: "c", Proto: "http", Allowed: 11, Denied: 12, Errors: 13, First: early, Last: late, MTLS: true},
	}
	if diff := cmp.Diff(want, in.edgesNow()); diff != "" {
		t.Errorf("Edges, -want +got:\n%s", diff)
	}
	var many []mesh.Edge
	for i := range 20_010 {
		many = append(many, mesh.Edge{Src: fmt.Sprint("s", i), Dst: "d", Allowed: 1})
	}
	for len(many) > 0 { // of several: one has not all the room
		n := min(len(many), 4000)
		in.AddEdges(agent(fmt.Sprint(len(many))), many[:n])
		many = many[n:]
	}
	total, other := uint64(0), uint64(0)
	for _, e := range in.edgesNow() {
		total += e.Allowed
		if e.Src == "other" {
			other = e.Allowed
		}
	}
	if total != 20_010+18 || other != 12 {
		t.Errorf("%d calls in all, %d among others, want %d and 12", total, other, 20_010+18)
	}
}

// edgesNow are the edges of the last hour, summed.
func (in *issuer) edgesNow() []mesh.Edge {
	in.t.Helper()
	now := time.Now()
	return mesh.SumEdges(in.windows(now.Add(-time.Hour), now.Add(time.Second)))
}

func (in *issuer) windows(from, to time.Time) (list []mesh.Window) {
	in.t.Helper()
	if err := in.EachWindow(in.t.Context(), from, to, func(w mesh.Window) { list = append(list, w) }); err != nil {
		in.t.Fatal(err)
	}
	return list
}
