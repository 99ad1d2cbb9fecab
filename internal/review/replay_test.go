package review

import (
	"bytes"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

func recordOf(c *authz.Call, d authz.Decision) audit.Record {
	r := audit.Record{
		Kind: audit.KindDecision, Time: c.Now, Decision: audit.Deny, Reason: string(d.Reason), Rule: d.Rule,
		Dir: string(c.Dir), Src: c.Src.String(), Dst: c.Dst, Port: c.Port, Verb: c.Verb, Path: c.Path,
	}
	if d.Allow {
		r.Decision = audit.Allow
	}
	return r
}

// What replay says for certain is so for each call, and no call that changes
// is missing.
func TestReplayAgreesWithTheJudge(t *testing.T) {
	calls := universe()
	r := rand.New(rand.NewPCG(3, 4))
	sure, open := 0, 0
	for n := range 150 {
		old, new := randomRules(r), randomRules(r)
		if n%2 == 0 {
			*new = *old
			more := randomRules(r)
			new.Rules = append(slices.Clone(old.Rules), more.Rules...)
			if len(new.Memberships) == 0 {
				new.Memberships = more.Memberships
			}
			for i := range new.Rules {
				new.Rules[i].ID = "r" + string(rune('0'+i))
			}
		}
		was, err := judgeOf(old)
		if err != nil {
			t.Fatal(err)
		}
		is, err := judgeOf(new)
		if err != nil {
			t.Fatal(err)
		}
		for _, known := range []*mesh.Policies{nil, old} {
			var tr Traffic
			if err := tr.Read(strings.NewReader("")); err != nil {
				t.Fatal(err)
			}
			for i := range calls {
				rec := recordOf(&calls[i], was.Decide(&calls[i]))
				tr.add(&rec)
			}
			rs, err := Replay(new, known, "", &tr)
			if err != nil {
				t.Fatal(err)
			}
			said := map[Observed]string{}
			for _, x := range rs {
				said[keyOf(&x.Observed)] = x.Now
				if x.Now == Depends {
					open++
				} else {
					sure++
				}
			}
			for i := range calls {
				d := was.Decide(&calls[i])
				rec := recordOf(&calls[i], d)
				var one Traffic
				_ = one.Read(strings.NewReader(""))
				one.add(&rec)
				now := is.Decide(&calls[i]).Allow
				switch got := said[keyOf(&one.Observed[0])]; {
				case got == "" && now != d.Allow:
					t.Fatalf("%+v changes, which replay does not say\nold %+v\nnew %+v", calls[i], old.Rules, new.Rules)
				case got == "allow" && !now, got == "deny" && now:
					t.Fatalf("%+v: replay says %s\nold %+v\nnew %+v", calls[i], got, old.Rules, new.Rules)
				}
			}
		}
	}
	t.Logf("%d kinds of calls change for certain, %d depend", sure, open)
	if sure < 500 || open < 100 {
		t.Error("too few to show anything")
	}
}

// keyOf leaves what tells kinds of calls apart.
func keyOf(o *Observed) Observed {
	k := *o
	k.Calls, k.Example, k.First, k.Last = 0, "", time.Time{}, time.Time{}
	return k
}

func TestFitPath(t *testing.T) {
	for _, tt := range []struct {
		pattern, path string
		want          fit
	}{
		{"/a/*", "/a/{}", yes}, {"/a/**", "/a/{}", yes}, {"**", "/a/{}", yes}, {"/**", "/a/{}", yes},
		{"/a/b", "/a/{}", maybe}, {"/a/*/c", "/a/{}/c", yes}, {"/a/b/c", "/a/{}/d", no}, {"/a", "/a/{}", no},
		{"/a/{}", "/a/{}", maybe}, {"/*", "/a/{}", no}, {"-", "/a/{}", no}, {"/a/*/**", "/a/{}", yes},
		{"/a/*", "/a/**", maybe}, {"/a/**", "/a/**", yes}, {"/a", "/a/**", maybe}, {"/b", "/a/**", no},
		{"/a", "**", maybe}, {"**", "**", yes}, {"-", "**", no}, {"-", "-", yes},
		{"/a/*", "/a/[redacted]", yes}, {"/a/b", "/a/[redacted]", maybe}, {"/a/b/c", "/a/b…", maybe}, {"/a/**", "/a/b…", yes},
		{"/a/b", "/a/b", yes}, {"/a/b", "/a/c", no}, {"/a/*", "/a/", no},
	} {
		if got := fitPath(tt.pattern, tt.path); got != tt.want {
			t.Errorf("pattern %s, path %s: got %v, want %v", tt.pattern, tt.path, got, tt.want)
		}
	}
}

// traffic is what the ledger of a proxy keeps of some calls by the policies.
func traffic(t *testing.T, p *mesh.Policies, calls []authz.Call) (*Traffic, *authz.Set) {
	t.Helper()
	set, err := judgeOf(p)
	if err != nil {
		t.Fatal(err)
	}
	log := audit.NewMemory()
	ledger, err := audit.NewMemoryLedger(log, audit.LedgerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	judge, err := authz.NewJudge(authz.JudgeConfig{Audit: ledger, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	judge.Use(set)
	for i := range calls {
		g, err := judge.Judge(&calls[i])
		if err == nil {
			g.Done(200, "")
		}
	}
	if err := ledger.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	tr := new(Traffic)
	if err := tr.Read(bytes.NewReader(log.Lines())); err != nil {
		t.Fatal(err)
	}
	return tr, set
}

func shopCall(src, dst, verb, path string) authz.Call {
	c := authz.Call{
		Dir: mesh.In, Src: spiffeid.RequireFromString("spiffe://demo.sallyport/ns/shop/sa/" + src),
		Dst: "spiffe://demo.sallyport/ns/shop/sa/" + dst, Port: 8443, Verb: verb, Path: path,
	}
	if strings.HasPrefix(dst, "host:") {
		c.Dir, c.Dst, c.Port, c.SNI = mesh.Out, dst, 443, strings.TrimPrefix(dst, "host:")
	}
	return c
}

func shopCalls() []authz.Call {
	return []authz.Call{
		shopCall("payment", "billing", "POST", "/v1/charges"), shopCall("payment", "billing", "GET", "/v1/charges/17"),
		shopCall("payment", "billing", "GET", "/v1/charges/18"), shopCall("payment", "billing", "GET", "/v1/charges/19/lines"),
		shopCall("billing", "host:api.stripe.test", "CONNECT", "-"),
		shopCall("batch", "billing", "POST", "/v1/charges"), // a guardrail
		shopCall("web", "billing", "GET", "/v1/balance"), shopCall("web", "payment", "DELETE", "/v1/pay"),
		shopCall("inventory", "host:evil.test", "CONNECT", "-"),
	}
}

func TestSuggestIsLeastPrivilege(t *testing.T) {
	p := demo(t)
	tr, was := traffic(t, p, shopCalls())
	var got []string
	next := *p
	next.Rules = nil
	for _, s := range Suggest(p, tr, false) {
		if s.Doubt != "" {
			t.Errorf("%s is in doubt: %s", s.Rule.Row(), s.Doubt)
		}
		got = append(got, s.Rule.Row()+" # "+strings.Join(s.Today, " "))
		next.Rules = append(next.Rules, s.Rule)
	}
	want := []string{
		"p, billing-api.stripe.test-1, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:api.stripe.test, 443, CONNECT, -, env.sni=same, allow # bill-out-1",
		"p, payment-billing-1, in, spiffe://demo.sallyport/ns/shop/sa/payment, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, POST, /v1/charges, -, allow # pay-bill-1",
		"p, payment-billing-2, in, spiffe://demo.sallyport/ns/shop/sa/payment, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, GET, /v1/charges/*, -, allow # pay-bill-1",
		"p, payment-billing-3, in, spiffe://demo.sallyport/ns/shop/sa/payment, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, GET, /v1/charges/*/lines, -, allow # pay-bill-1",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	next.Cases = nil
	is, err := judgeOf(&next)
	if err != nil {
		t.Fatal(err)
	}
	calls := shopCalls()
	for i := range calls {
		if b, a := was.Decide(&calls[i]).Allow, is.Decide(&calls[i]).Allow; a != b {
			t.Errorf("%+v: was %v, is %v with the rows alone", calls[i], b, a)
		}
	}
	cells, err := Diff(p, &next, now)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range cells {
		if c.Effect == mesh.Allow {
			t.Errorf("the rows allow %s, which was not allowed", c.Calls())
		}
	}
}

func TestSuggestForWhatWasDenied(t *testing.T) {
	p := demo(t)
	tr, _ := traffic(t, p, shopCalls())
	var got, doubt []string
	for _, s := range Suggest(p, tr, true) {
		if s.Today[0] == "no_row" {
			got = append(got, s.Rule.Row())
		}
		if s.Doubt != "" {
			doubt = append(doubt, s.Doubt)
		}
	}
	want := []string{
		"p, inventory-evil.test-1, out, spiffe://demo.sallyport/ns/shop/sa/inventory, host:evil.test, 443, CONNECT, -, env.sni=same, allow",
		"p, web-billing-1, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, GET, /v1/balance, -, allow",
		"p, web-payment-1, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/payment, 8443, DELETE, /v1/pay, -, allow",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if len(doubt) > 0 {
		t.Errorf("doubts %q", doubt)
	}
	noSNI := shopCall("billing", "host:api.stripe.test", "CONNECT", "-")
	noSNI.SNI = ""
	tr, _ = traffic(t, p, []authz.Call{noSNI})
	if ss := Suggest(p, tr, true); len(ss) != 1 || !strings.Contains(ss[0].Doubt, "when its conditions hold") {
		t.Errorf("a call whose condition failed: %+v", ss)
	}
}

func TestSuggestDoubtsWhatItDoesNotKnow(t *testing.T) {
	p := demo(t)
	for _, tt := range []struct {
		name, want string
		o          Observed
	}{
		{"a row that is gone", "row gone-1", Observed{Rule: "gone-1", Reason: "rule", Path: "/a", Verb: "GET"}},
		{"too many paths", "more paths", Observed{Reason: "observe", Path: "**", Verb: "GET"}},
		{"a path that was cut", "whole path", Observed{Reason: "observe", Path: "/a/b…", Verb: "GET"}},
		{"a secret in the path", "whole path", Observed{Reason: "observe", Path: "/a/[redacted]", Verb: "GET"}},
		{"a star in the path", "would be a pattern", Observed{Reason: "observe", Path: "/a/*", Verb: "GET"}},
		{"a comma in the path", "row has 11 fields", Observed{Reason: "observe", Path: "/a,b", Verb: "GET"}},
		{"a verb without a name", "which verb", Observed{Reason: "observe", Path: "/a", Verb: "*"}},
	} {
		tt.o.Dir, tt.o.Src, tt.o.Dst, tt.o.Port, tt.o.Allowed = mesh.In, "spiffe://demo.sallyport/a", "spiffe://demo.sallyport/b", 8443, true
		ss := Suggest(p, &Traffic{Observed: []Observed{tt.o}}, false)
		if len(ss) != 1 || !strings.Contains(ss[0].Doubt, tt.want) {
			t.Errorf("%s: %+v, want a doubt %q", tt.name, ss, tt.want)
		}
	}
}

func TestReplayOfModes(t *testing.T) {
	p := demo(t)
	tr, _ := traffic(t, p, shopCalls())
	rs, err := Replay(p, p, "", tr)
	if err != nil || len(rs) != 0 {
		t.Fatalf("the same policies change %+v, %v", rs, err)
	}
	p.Modes = []mesh.FileMode{{File: "access.csv", Mode: mesh.Observe}}
	if rs, err = Replay(p, nil, "", tr); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range rs {
		got = append(got, r.Now+" "+r.Src[len("spiffe://demo.sallyport/ns/shop/sa/"):])
	}
	// What the guardrail denies is still denied.
	if want := []string{"allow inventory", "allow web", "allow web"}; !slices.Equal(got, want) {
		t.Errorf("access.csv in mode observe: %q, want %q", got, want)
	}
}

// TestReplayOfModeOfHost lets through what the mode of one host does, and no more.
func TestReplayOfModeOfHost(t *testing.T) {
	p := demo(t)
	call := func(dst string) Observed {
		return Observed{Dir: mesh.Out, Src: "spiffe://demo.sallyport/ns/shop/sa/web", Dst: dst, Port: 443, Verb: "CONNECT", Path: "-"}
	}
	p.Destinations = append(p.Destinations, mesh.Destination{Host: "new.example.com", Proto: "tls", SNI: "strict", Mode: mesh.Observe})
	j, err := newReplayer(p, "")
	if err != nil {
		t.Fatal(err)
	}
	for dst, want := range map[string]string{"host:new.example.com": "allow egress.yaml", "host:other.example.com": "deny no_row"} {
		o := call(dst)
		if d := j.decide(&o, nil); d.Now+" "+d.Is != want {
			t.Errorf("%s: %s %s, want %s", dst, d.Now, d.Is, want)
		}
	}
}

func FuzzTrafficRead(f *testing.F) {
	f.Add([]byte(`{"v":1,"seq":1,"time":"2026-11-23T10:00:00.000000000Z","kind":"decision","id":"a","decision":"allow","reason":"rule","rule":"a","dir":"in","src":"spiffe://a/b","dst":"spiffe://a/c","port":1,"verb":"GET","path":"/a","prev":"0000000000000000000000000000000000000000000000000000000000000000"}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var tr Traffic
		if tr.Read(bytes.NewReader(b)) != nil {
			return
		}
		p := demo(t)
		for _, s := range Suggest(p, &tr, true) {
			if s.Doubt == "" && s.Rule.Writable(p.TrustDomain) != nil {
				t.Errorf("%+v cannot be written", s)
			}
		}
	})
}
