package authz

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
)

const (
	inForce = `p, pay-1, in, spiffe://corp.example/ns/shop/sa/payment, spiffe://corp.example/ns/shop/sa/billing, 8443, POST, /v1/charges, -, allow
p, pay-2, in, spiffe://corp.example/ns/shop/sa/payment, spiffe://corp.example/ns/shop/sa/billing, 8443, GET, /v1/**, -, allow
`
	toTry = `p, pay-2, in, spiffe://corp.example/ns/shop/sa/payment, spiffe://corp.example/ns/shop/sa/billing, 8443, GET|PUT, /v1/**, -, allow
p, stop-1, in, spiffe://corp.example/ns/shop/sa/payment, spiffe://corp.example/ns/shop/sa/billing, 8443, GET, /v1/secret, -, deny
`
)

// trial is a judge with a set in force and a candidate, and what it records.
func trial(t *testing.T) (*Judge, *[]audit.Record) {
	t.Helper()
	var kept []audit.Record
	j := judgeWith(t, recorder(func(r *audit.Record) error {
		if r.ID == "" {
			r.ID = fmt.Sprintf("x-%d", len(kept))
		}
		kept = append(kept, *r)
		return nil
	}), compile(t, inForce))
	if err := j.Try(rows(t, toTry)); err != nil {
		t.Fatal(err)
	}
	return j, &kept
}

func payWith(verb, path string) *Call {
	c := payCall()
	c.Verb, c.Path = verb, path
	return c
}

func TestACandidateTellsDifferences(t *testing.T) {
	for name, c := range map[string]struct {
		call                     *Call
		want                     Reason // empty: none
		rule, inForce, candidate string
	}{
		"both allow":              {call: payWith("GET", "/v1/x")},
		"both deny":               {call: payWith("DELETE", "/v1/x")},
		"no row of the candidate": {payWith("POST", "/v1/charges"), NewlyDenied, "pay-1", "allowed by row pay-1", "denied, no_row"},
		"a deny row is new":       {payWith("GET", "/v1/secret"), NewlyDenied, "stop-1", "allowed by row pay-2", "denied by row stop-1"},
		"a row is wider":          {payWith("PUT", "/v1/x"), NewlyAllowed, "pay-2", "denied, no_row", "allowed by row pay-2"},
		"not a call":              {call: payWith("PUT", "/v1/../x")},
	} {
		t.Run(name, func(t *testing.T) {
			j, kept := trial(t)
			cn := j.Conn(c.call.Dir, c.call.Src, c.call.Dst, c.call.Port)
			_, err := j.Judge(c.call)
			_, err2 := cn.Judge(c.call)
			if (err == nil) != (err2 == nil) {
				t.Fatal(err, err2)
			}
			got := j.Candidate().Differences
			if c.want == "" {
				if len(got) != 0 || len(*kept) != 2 {
					t.Fatalf("differences %+v, records %+v", got, *kept)
				}
				return
			}
			if len(got) != 1 || got[0].Kind != c.want || got[0].Rule != c.rule || got[0].InForce != c.inForce || got[0].Candidate != c.candidate || got[0].Count != 2 {
				t.Fatalf("got %+v", got)
			}
			first, r := (*kept)[0], (*kept)[1]
			decision := audit.Deny
			if c.want == NewlyAllowed {
				decision = audit.Allow
			}
			if r.Kind != audit.KindShadow || r.Decision != decision || r.Reason != string(c.want) || r.Rule != c.rule || r.ID != first.ID || !r.Open ||
				r.Detail != "in force: "+c.inForce+"; candidate: "+c.candidate {
				t.Errorf("recorded %+v", r)
			}
			if got[0].ID != first.ID {
				t.Errorf("the difference has id %q, the caller was told %q", got[0].ID, first.ID)
			}
		})
	}
}

// Whatever the candidate says, the answer is that of the rows in force.
func TestACandidateNeverChangesTheAnswer(t *testing.T) {
	random := rand.NewChaCha8([32]byte{7})
	differ := 0
	for range 150 {
		b := make([]byte, 8192)
		random.Read(b)
		d := &dice{b}
		snap, next := d.snapshot(12), d.snapshot(12)
		set, err := Compile(snap)
		if err != nil {
			continue
		}
		alone, beside := judgeWith(t, recorder(sayID), set), judgeWith(t, recorder(sayID), set)
		if beside.Try(next) != nil {
			continue
		}
		for range 100 {
			c := d.call()
			g, err := alone.Judge(c)
			g2, err2 := beside.Judge(c)
			_, err3 := beside.Conn(c.Dir, c.Src, c.Dst, c.Port).Judge(c)
			if fmt.Sprint(g, err) != fmt.Sprint(g2, err2) || fmt.Sprint(err) != fmt.Sprint(err3) {
				t.Fatalf("%+v: alone %v %v, beside a candidate %v %v, on a connection %v", c, g, err, g2, err2, err3)
			}
		}
		for _, x := range beside.Candidate().Differences {
			differ += int(x.Count)
		}
	}
	if differ < 100 {
		t.Errorf("only %d differences: the test shows nothing", differ)
	}
}

func sayID(r *audit.Record) error {
	r.ID = "x-1"
	return nil
}

func TestABadCandidateHurtsNobody(t *testing.T) {
	bad := rows(t, toTry)
	bad.Rules[1].Cond = "scop~admin"
	huge := rows(t, toTry)
	huge.Rules[0].Port = "99999"
	for name, c := range map[string]struct {
		rows *mesh.Snapshot
		want string
	}{
		"unknown condition": {bad, "scop~admin"},
		"no port":           {huge, "99999"},
		"another domain":    {&mesh.Snapshot{Rules: bad.Rules}, "trust domain"},
	} {
		t.Run(name, func(t *testing.T) {
			j, _ := trial(t)
			err := j.Try(c.rows)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v", err)
			}
			rep := j.Candidate()
			if rep.Tried || !strings.Contains(rep.Refused, c.want) {
				t.Errorf("reported %+v", rep)
			}
			if g, err := j.Judge(payWith("POST", "/v1/charges")); !g.Valid() || err != nil {
				t.Error("the set in force does not answer any more", err)
			}
			if err := j.Try(rows(t, toTry)); err != nil || !j.Candidate().Tried {
				t.Error("a good candidate does not follow on a bad one", err)
			}
		})
	}
}

func TestACandidateThatPanicsIsGivenUp(t *testing.T) {
	j, _ := trial(t)
	broken := *j.candidate.Load()
	set := *broken.set
	set.in = nil
	broken.set = &set
	j.candidate.Store(&broken)
	if g, err := j.Judge(payWith("POST", "/v1/charges")); !g.Valid() || err != nil {
		t.Fatal("the call was not allowed", err)
	}
	if rep := j.Candidate(); rep.Tried || !strings.HasPrefix(rep.Refused, "panic: ") {
		t.Errorf("reported %+v", rep)
	}
}

// A record that cannot be kept changes nothing for the caller.
func TestDifferencesThatCannotBeRecorded(t *testing.T) {
	j := judgeWith(t, recorder(func(r *audit.Record) error {
		if r.Kind == audit.KindShadow {
			return errors.New("disk on fire")
		}
		return sayID(r)
	}), compile(t, inForce))
	if err := j.Try(rows(t, toTry)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if g, err := j.Judge(payWith("POST", "/v1/charges")); !g.Valid() || err != nil {
			t.Fatal(err)
		}
	}
	if got := j.Candidate().Differences; len(got) != 1 || got[0].Count != 3 {
		t.Errorf("counted %+v", got)
	}
}

// Two sets are compared only when they are of one policy revision: between the
// two steps of an edit there are none.
func TestOnlySetsOfOneRevisionAreCompared(t *testing.T) {
	j, _ := trial(t)
	j.Judge(payWith("POST", "/v1/charges"))
	next := rows(t, inForce)
	next.PolicyRevision++
	set, err := Compile(next)
	if err != nil {
		t.Fatal(err)
	}
	j.Use(set)
	j.Judge(payWith("POST", "/v1/charges"))
	count := func() uint64 { return j.Candidate().Differences[0].Count }
	if n := count(); n != 1 {
		t.Errorf("%d differences, want the one of before", n)
	}
	same := rows(t, toTry)
	same.PolicyRevision++
	if err := j.Try(same); err != nil {
		t.Fatal(err)
	}
	j.Judge(payWith("POST", "/v1/charges"))
	if n := count(); n != 2 {
		t.Errorf("%d differences, want 2: what was counted for the same rows stays", n)
	}
	if err := j.Try(nil); err != nil || j.Candidate().Tried || len(j.Candidate().Differences) != 0 {
		t.Error("a candidate that is gone is still there", err)
	}
}

// Modes count for both: what is not enforced makes no difference.
func TestModesOfTheCandidate(t *testing.T) {
	observed := func(csv string) *mesh.Snapshot {
		s := rows(t, csv)
		s.Modes = []mesh.FileMode{{File: "access.csv", Mode: mesh.Observe}}
		return s
	}
	set, err := Compile(observed(inForce))
	if err != nil {
		t.Fatal(err)
	}
	j := judgeWith(t, recorder(sayID), set)
	if err := j.Try(observed(toTry)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*Call{payWith("POST", "/v1/charges"), payWith("PUT", "/v1/x"), payWith("GET", "/v1/secret")} {
		if _, err := j.Judge(c); err != nil {
			t.Fatal(err)
		}
	}
	if got := j.Candidate().Differences; len(got) != 0 {
		t.Errorf("got %+v", got)
	}
}

// A caller that makes up destinations fills neither the memory nor the metric.
func TestDifferencesAreBounded(t *testing.T) {
	metrics := telemetry.NewRegistry()
	j, err := NewJudge(JudgeConfig{Audit: recorder(sayID), Log: judgeWith(t, recorder(sayID), nil).cfg.Log, Metrics: metrics})
	if err != nil {
		t.Fatal(err)
	}
	j.Use(compile(t, "p, a-1, out, spiffe://corp.example/ns/shop/sa/payment, host:a.example, 443, CONNECT, -, -, allow\n"))
	if err := j.Try(rows(t, "p, wide-1, out, spiffe://corp.example/ns/shop/sa/payment, host:*.a.example, 443, CONNECT, -, -, allow\n")); err != nil {
		t.Fatal(err)
	}
	const calls = maxDifferences + 500
	for i := range calls {
		c := payCall()
		c.Dir, c.Dst, c.Port, c.Verb, c.Path = mesh.Out, fmt.Sprintf("host:h%d.a.example", i), 443, "CONNECT", "-"
		j.Judge(c)
	}
	got := j.Candidate().Differences
	if len(got) != maxDifferences+1 || got[0].Rule != "" || got[0].Count != calls-maxDifferences {
		t.Errorf("%d differences, the first %+v", len(got), got[0])
	}
}

func TestTryingDoesNotAllocate(t *testing.T) {
	l, err := audit.NewMemoryLedger(audit.NewMemory(), audit.LedgerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	j, err := NewJudge(JudgeConfig{Audit: l, Log: judgeWith(t, recorder(sayID), nil).cfg.Log, Metrics: telemetry.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	j.Use(compile(t, inForce))
	if err := j.Try(rows(t, toTry)); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]*Call{"same": payWith("GET", "/v1/x"), "newly denied": payWith("POST", "/v1/charges")} {
		cn := j.Conn(c.Dir, c.Src, c.Dst, c.Port)
		if n := testing.AllocsPerRun(1000, func() { cn.Judge(c) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// BenchmarkJudgeCandidate is a recorded decision on a connection, without a
// candidate, beside one that agrees and beside one that does not.
func BenchmarkJudgeCandidate(b *testing.B) {
	snap := rows(b, fleet(10_000))
	set := compile(b, fleet(10_000))
	c := benchCall(b, set)
	for _, name := range []string{"none", "agrees", "differs"} {
		b.Run(name, func(b *testing.B) {
			l, err := audit.NewMemoryLedger(audit.NewMemory(), audit.LedgerConfig{})
			if err != nil {
				b.Fatal(err)
			}
			j := judgeWith(b, l, set)
			if name != "none" {
				next := *snap
				if name == "differs" {
					next.Rules = next.Rules[:1]
				}
				if err := j.Try(&next); err != nil {
					b.Fatal(err)
				}
			}
			cn := j.Conn(c.Dir, c.Src, c.Dst, c.Port)
			b.ReportAllocs()
			for b.Loop() {
				if g, err := cn.Judge(c); !g.Valid() || err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
