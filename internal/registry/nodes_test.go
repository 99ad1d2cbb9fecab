package registry_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/mesh"
)

// grouped is a set in which the agents with the fact oidc:g:web may hold the
// identity of pay, by the alias /group/web.
func grouped() *mesh.Policies {
	p := policies("pay")
	p.Entries = []mesh.Entry{
		{ID: "web", SPIFFEID: id("/group/web"), ParentID: id("/spire/server"), Selectors: []mesh.Selector{fact("g:web")}},
		{ID: "pay", SPIFFEID: id("/ns/shop/sa/pay"), ParentID: id("/group/web"), Selectors: []mesh.Selector{{Type: "unix", Value: "uid:7"}}},
	}
	return p
}

func fact(value string) mesh.Selector { return mesh.Selector{Type: "oidc", Value: value} }

// joins keeps an agent as attestation does, with facts.
func joins(t *testing.T, in *issuer, name string, facts ...mesh.Selector) {
	t.Helper()
	putAgent(t, in.Registry, mesh.Agent{ID: agent(name), Serial: "1", Selectors: facts})
}

func (in *issuer) entriesOf(name string) string {
	var out []string
	for _, e := range in.EntriesFor(agent(name)) {
		out = append(out, e.ID)
	}
	return strings.Join(out, " ")
}

func TestAgentsOfAnAliasShareItsEntries(t *testing.T) {
	in := start(t)
	in.apply(grouped())
	joins(t, in, "pay-1", fact("g:web"), fact("more"))
	joins(t, in, "pay-2", fact("g:web"))
	joins(t, in, "other-1", fact("g:other"))
	for n, name := range []string{"pay-1", "pay-2", "other-1"} {
		e := endpoint("pay", 1, fmt.Sprintf("127.0.0.1:%d", 9001+n))
		e.Agent = agent(name)
		in.announce(e)
	}
	check := func() {
		t.Helper()
		for name, want := range map[string]string{"pay-1": "pay", "pay-2": "pay", "other-1": "", "nobody": ""} {
			if got := in.entriesOf(name); got != want {
				t.Errorf("%s has %q, want %q", name, got, want)
			}
		}
		in.want("pay@127.0.0.1:9001", "pay@127.0.0.1:9002")
	}
	check()
	in.restart()
	check()
}

func TestWhatAnAliasLosesIsRevoked(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(*testing.T, *issuer)
		want string
	}{
		{"an agent that attests with the same facts", func(t *testing.T, in *issuer) { joins(t, in, "pay-1", fact("g:web")) }, ""},
		{"an agent that attests with one more", func(t *testing.T, in *issuer) { joins(t, in, "pay-1", fact("g:web"), fact("x")) }, ""},
		{"an agent that attests without the fact", func(t *testing.T, in *issuer) { joins(t, in, "pay-1", fact("g:other")) }, "a1 entry_withdrawn"},
		{"an alias that asks for more", func(t *testing.T, in *issuer) {
			p := grouped()
			p.Entries[0].Selectors = append(p.Entries[0].Selectors, fact("x"))
			in.apply(p)
		}, "a1 entry_withdrawn, a2 entry_withdrawn"},
		{"an alias that is gone, and one agent is named", func(t *testing.T, in *issuer) {
			p := grouped()
			p.Entries[1].ParentID = agent("pay-2")
			p.Entries = p.Entries[1:]
			in.apply(p)
		}, "a1 entry_withdrawn"},
		{"a second alias that holds the same", func(t *testing.T, in *issuer) {
			p := grouped()
			p.Entries[0].Selectors = []mesh.Selector{{Type: "spiffe_id", Value: agent("pay-1").String()}}
			in.apply(p)
		}, "a2 entry_withdrawn"},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := start(t)
			in.apply(grouped())
			joins(t, in, "pay-1", fact("g:web"))
			joins(t, in, "pay-2", fact("g:web"))
			in.announce(endpoint("pay", 1, "127.0.0.1:9001"))
			issue(t, in, "a1", "pay", 1)
			issue(t, in, "a2", "pay", 2)
			woken := in.Changed()
			c.do(t, in)
			if got := revoked(in.Revocations()); got != c.want {
				t.Errorf("revoked %q, want %q", got, c.want)
			}
			if c.want != "" && !isClosed(woken) {
				t.Error("nobody was woken")
			}
			if strings.Contains(c.want, "a1") {
				in.want()
			} else {
				in.want("pay@127.0.0.1:9001")
			}
		})
	}
}

// TestAnAgentThatComesIntoAnAliasIsWoken: its streams are open here when it
// attests anew, perhaps to another issuer.
func TestAnAgentThatComesIntoAnAliasIsWoken(t *testing.T) {
	in := start(t)
	in.apply(grouped())
	first := in.Changed()
	joins(t, in, "pay-1", fact("g:other"))
	if isClosed(first) {
		t.Error("an agent that is new woke everybody")
	}
	joins(t, in, "pay-1", fact("g:web"))
	if !isClosed(first) || in.entriesOf("pay-1") != "pay" {
		t.Errorf("woken: %t, entries %q", isClosed(first), in.entriesOf("pay-1"))
	}
}

// sharedAliases: an agent attests to one issuer and is served by the other.
func sharedAliases(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	if _, err := a.ApplyPolicies(f.t.Context(), grouped()); err != nil {
		f.t.Fatal(err)
	}
	f.eventually("b has the policies", func() bool { return b.Current() != nil })
	attested := mesh.Agent{ID: agent("pay-1"), Serial: "1", Selectors: []mesh.Selector{fact("g:web")}}
	putAgent(f.t, a.Registry, attested)
	// To be let in is enough: b need not have followed yet.
	if _, err := b.GetAgent(f.t.Context(), agent("pay-1")); err != nil || len(b.EntriesFor(agent("pay-1"))) != 1 {
		f.t.Errorf("entries at b %v, %v", b.EntriesFor(agent("pay-1")), err)
	}
	issue(f.t, b, "a1", "pay", 1)
	attested.Selectors = []mesh.Selector{fact("g:other")}
	putAgent(f.t, a.Registry, attested)
	f.eventually("b gives it nothing", func() bool { return len(b.EntriesFor(agent("pay-1"))) == 0 })
	f.eventually("b knows the revocation", func() bool { return revoked(b.Revocations()) == "a1 entry_withdrawn" })
	attested.Selectors = []mesh.Selector{fact("g:web")}
	woken := b.Changed()
	putAgent(f.t, a.Registry, attested)
	<-woken
	f.eventually("b gives it the entry again", func() bool { return len(b.EntriesFor(agent("pay-1"))) == 1 })
}

// TestAnEntryThatEndsIsWithdrawn: nobody has to edit anything, and the wall clock
// decides.
func TestAnEntryThatEndsIsWithdrawn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := start(t)
		in.apply(policies("pay"))
		attested(t, in, "pay-1", "node-j")
		for i, after := range []time.Duration{time.Hour, 2 * time.Hour} {
			e := entryOf(fmt.Sprintf("job-%d", i), fmt.Sprintf("/ns/shop/sa/job-%d", i), "node-j", "unix:uid:5")
			e.ExpiresAt = time.Now().Add(after)
			if out := in.edit(create(e)); out[0].Err != nil {
				t.Fatal(out[0].Err)
			}
			if err := in.RecordIssued(t.Context(), []mesh.Issued{{
				Serial: fmt.Sprintf("c%d", i), ID: e.SPIFFEID, Entry: e.ID, Agent: agent("node-j"), Until: time.Now().Add(24 * time.Hour),
			}}); err != nil {
				t.Fatal(err)
			}
		}
		issue(t, in, "a1", "pay", 1)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- in.Run(ctx) }()
		time.Sleep(time.Hour - time.Second)
		woken := in.Changed()
		if got := revoked(in.Revocations()); got != "" || in.entriesOf("node-j") != "job-0 job-1" {
			t.Errorf("before the end revoked %q, entries %q", got, in.entriesOf("node-j"))
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := revoked(in.Revocations()); got != "c0 entry_withdrawn" || !isClosed(woken) || in.entriesOf("node-j") != "job-1" {
			t.Errorf("at the end revoked %q, woken %t, entries %q", got, isClosed(woken), in.entriesOf("node-j"))
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if got := revoked(in.Revocations()); got != "c0 entry_withdrawn, c1 entry_withdrawn" {
			t.Errorf("an hour later revoked %q", got)
		}
		if !strings.Contains(in.log.String(), "entry ended") {
			t.Error("the log does not say that an entry ended")
		}
		cancel()
		<-done
	})
}

// sharedLapse: an entry ends at every issuer, and what was issued for it is
// revoked once.
func sharedLapse(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	if _, err := a.ApplyPolicies(f.t.Context(), policies("pay")); err != nil {
		f.t.Fatal(err)
	}
	f.eventually("b has the policies", func() bool { return b.Current() != nil })
	attested(f.t, a, "node-j")
	e := entryOf("job", "/ns/shop/sa/job", "node-j", "unix:uid:5")
	e.ExpiresAt = f.now().Add(20 * time.Second)
	if made, err := a.EditEntries(f.t.Context(), []mesh.EntryEdit{create(e)}); err != nil || made[0].Err != nil {
		f.t.Fatal(made, err)
	}
	if err := b.RecordIssued(f.t.Context(), []mesh.Issued{{Serial: "c1", ID: e.SPIFFEID, Entry: e.ID, Agent: agent("node-j"), Until: f.now().Add(time.Hour)}}); err != nil {
		f.t.Fatal(err)
	}
	f.eventually("b has the entry", func() bool { return len(b.EntriesFor(agent("node-j"))) == 1 }) // else it never ends there
	f.ahead.Add(int64(20 * time.Second))
	for _, m := range []*member{a, b} {
		f.eventually("it is revoked", func() bool { return revoked(m.Revocations()) == "c1 entry_withdrawn" })
		f.eventually("the entry ended", func() bool { return m.log.says("entry ended") })
	}
	if a.log.says("SVID revoked") == b.log.says("SVID revoked") {
		f.t.Error("not exactly one issuer told of the revocation")
	}
}
