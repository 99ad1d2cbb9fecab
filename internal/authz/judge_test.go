package authz

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
)

// recorder is a Recorder that does as a test says.
type recorder func(*audit.Record) error

func (f recorder) Append(r *audit.Record) error { return f(r) }

func payCall() *Call {
	return &Call{Dir: mesh.In, Src: pay, Dst: bill.String(), Port: 8443, Verb: "POST", Path: "/v1/charges/42",
		Peer: "127.0.0.1:5000", Trace: "4bf92f3577b34da6a3ce929d0e0e4736", Now: mon}
}

func denial(t *testing.T, g Grant, err error) *Denial {
	t.Helper()
	var d *Denial
	if !errors.As(err, &d) || g.Valid() || g != (Grant{}) {
		t.Fatalf("grant %+v, error %v: not a denial", g, err)
	}
	if d.ID != "" && !strings.Contains(d.Error(), d.ID) || d.ID == "" && !strings.Contains(d.Error(), "not be recorded") {
		t.Errorf("denial %+v says %v", *d, d)
	}
	return d
}

func TestGrantComesAfterTheRecord(t *testing.T) {
	log := audit.NewMemory()
	j := judgeWith(t, log, compile(t, shop))
	g, err := j.Judge(payCall())
	if err != nil || !g.Valid() || g.Rule() != "pay-bill-1" {
		t.Fatalf("%+v %v", g, err)
	}
	r := log.Records()
	want := audit.Record{
		Seq: 1, Time: r[0].Time, Kind: audit.KindDecision, ID: g.ID(), Decision: "allow", Reason: "rule", Rule: "pay-bill-1", Dir: "in",
		Src: pay.String(), Dst: bill.String(), Port: 8443, Verb: "POST", Path: "/v1/charges/42", Revision: 7,
		Trace: "4bf92f3577b34da6a3ce929d0e0e4736", Peer: "127.0.0.1:5000",
	}
	if len(r) != 1 || r[0] != want {
		t.Errorf("recorded %+v", r)
	}
	if !g.Covers(bill.String(), 8443) || g.Covers(bill.String(), 1) || g.Covers(inv.String(), 8443) {
		t.Error("the grant covers what it was not given for")
	}
	if zero := (Grant{}); zero.Valid() || zero.Covers("", 0) {
		t.Error("the zero grant allows")
	}
}

func TestDenialIsRecorded(t *testing.T) {
	log := audit.NewMemory()
	j := judgeWith(t, log, compile(t, shop))
	c := payCall()
	c.Path = "/admin/x"
	g, err := j.Judge(c)
	d := denial(t, g, err)
	if r := log.Records(); len(r) != 1 || r[0].ID != d.ID || r[0].Decision != "deny" || r[0].Rule != "guard-admin" || d.Rule != "guard-admin" || d.Reason != ByRule {
		t.Errorf("denial %+v, recorded %+v", d, r)
	}
	g, err = j.Judge(&Call{})
	if d := denial(t, g, err); d.Reason != BadRequest {
		t.Errorf("the empty call: %+v", d)
	}
}

func TestJudgeFailsClosed(t *testing.T) {
	set := compile(t, shop)
	broken := compile(t, shop)
	broken.in = nil // any use of it panics
	fine := func(r *audit.Record) error { r.ID = "x-1"; return nil }
	for name, tc := range map[string]struct {
		rec  recorder
		set  *Set
		want Denial
	}{
		"no policy":                 {fine, nil, Denial{ID: "x-1", Reason: NoPolicy}},
		"a policy without rows":     {fine, compile(t, ""), Denial{ID: "x-1", Reason: NoPolicy}},
		"no record":                 {func(*audit.Record) error { return errors.New("disk full") }, set, Denial{Reason: Unrecorded}},
		"a record without id":       {func(*audit.Record) error { return nil }, set, Denial{Reason: Unrecorded}},
		"a panic in the index":      {fine, broken, Denial{ID: "x-1", Reason: Internal}},
		"a panic in the recorder":   {func(*audit.Record) error { panic("no") }, set, Denial{Reason: Internal}},
		"both panic":                {func(*audit.Record) error { panic("no") }, broken, Denial{Reason: Internal}},
		"a panic, then no record":   {func(*audit.Record) error { return errors.New("disk full") }, broken, Denial{Reason: Unrecorded}},
		"no policy and no record":   {func(*audit.Record) error { return errors.New("disk full") }, nil, Denial{Reason: Unrecorded}},
		"a policy that lost Casbin": {fine, withoutOracle(t), Denial{ID: "x-1", Reason: Internal}},
	} {
		t.Run(name, func(t *testing.T) {
			j := judgeWith(t, tc.rec, tc.set)
			if strings.Contains(name, "Casbin") {
				j.doubted.Store(tc.set)
			}
			g, err := j.Judge(payCall())
			if d := denial(t, g, err); *d != tc.want {
				t.Errorf("got %+v, want %+v", *d, tc.want)
			}
			g, err = j.Conn(mesh.In, pay, bill.String(), 8443).Judge(payCall())
			if d := denial(t, g, err); *d != tc.want {
				t.Errorf("on a connection: got %+v, want %+v", *d, tc.want)
			}
		})
	}
}

func withoutOracle(t *testing.T) *Set {
	s := compile(t, shop)
	s.oracle = nil
	return s
}

func TestConnFollowsThePolicy(t *testing.T) {
	log := audit.NewMemory()
	j := judgeWith(t, log, nil)
	cn := j.Conn(mesh.In, pay, bill.String(), 8443)
	ask := func() error {
		c := Call{Verb: "GET", Path: "/v1/charges"}
		_, err := cn.Judge(&c)
		return err
	}
	if ask() == nil {
		t.Error("allowed without a policy")
	}
	j.Use(compile(t, shop))
	if err := ask(); err != nil {
		t.Error(err)
	}
	j.Use(compile(t, shop+"p, stop, in, **, *, *, *, **, -, deny"))
	var d *Denial
	if err := ask(); !errors.As(err, &d) || d.Rule != "stop" {
		t.Errorf("after the change: %v", err)
	}
	j.Use(nil)
	if ask() == nil {
		t.Error("allowed without a policy")
	}
	if n := len(log.Records()); n != 4 {
		t.Errorf("%d records", n)
	}
}

func TestEnvironmentIsTheJudges(t *testing.T) {
	j, err := NewJudge(JudgeConfig{Audit: audit.NewMemory(), Log: slog.New(slog.DiscardHandler), Environment: "test"})
	if err != nil {
		t.Fatal(err)
	}
	j.Use(compile(t, shop))
	c := Call{Dir: mesh.Out, Src: ci, Dst: "host:api.github.com", Port: 443, Verb: "GET", Path: "/repos/x", Environment: "prod"}
	if _, err := j.Judge(&c); err == nil {
		t.Error("the caller chose its environment")
	}
}

func TestJudgeIsSafeForConcurrentUse(t *testing.T) {
	j := judgeWith(t, audit.NewMemory(), nil)
	a, b := compile(t, shop), compile(t, fleet(100))
	cn := j.Conn(mesh.In, pay, bill.String(), 8443)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 300 {
				switch i {
				case 0:
					j.Use([]*Set{a, b, nil}[n%3])
				case 1, 2, 3:
					cn.Judge(payCall())
				default:
					j.Judge(payCall())
				}
			}
		})
	}
	wg.Wait()
	j.Use(a)
	if _, err := cn.Judge(payCall()); err != nil {
		t.Error(err)
	}
}

// TestOracleWatches gives the index a row that Casbin does not have: Run must
// see it, say so, and from then on the denial must count.
func TestOracleWatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := audit.NewMemory()
		var alarms bytes.Buffer
		j, err := NewJudge(JudgeConfig{Audit: log, Log: slog.New(slog.NewTextHandler(&alarms, nil)), CheckEvery: 4})
		if err != nil {
			t.Fatal(err)
		}
		s := compile(t, shop)
		j.Use(s)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- j.Run(ctx) }()
		for range 8 {
			if _, err := j.Judge(payCall()); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		if j.Checked() != 2 || j.Mismatches() != 0 {
			t.Fatalf("checked %d, mismatches %d", j.Checked(), j.Mismatches())
		}

		row := mesh.Rule{ID: "phantom", Dir: mesh.In, Src: "**", Dst: "*", Port: "*", Verb: "*", Path: "**", Cond: "-", Effect: mesh.Allow}
		s.in.add(&row, rule{id: row.ID, row: 99, verbs: anyVerb, kind: anyPath}, nil)
		s.in.seal()
		c := payCall()
		c.Path = "/secret"
		for range 4 {
			if _, err := j.Judge(c); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		if j.Mismatches() != 1 || !strings.Contains(alarms.String(), "ALARM") {
			t.Fatalf("mismatches %d, log %s", j.Mismatches(), &alarms)
		}
		g, err := j.Judge(c)
		if d := denial(t, g, err); d.Reason != NoRow {
			t.Errorf("after the alarm: %+v", d)
		}
		if _, err := j.Judge(payCall()); err != nil {
			t.Errorf("what both allow: %v", err)
		}
		j.Use(compile(t, shop))
		if _, err := j.Judge(payCall()); err != nil {
			t.Errorf("with a new policy: %v", err)
		}
		found := false
		for _, r := range log.Records() {
			found = found || r.Reason == "oracle_mismatch" && r.Decision == "deny" && strings.Contains(r.Detail, "phantom")
		}
		if !found {
			t.Error("the disagreement is not in the audit log")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestSamplesNeverBlock(t *testing.T) {
	j, err := NewJudge(JudgeConfig{Audit: audit.NewMemory(), Log: slog.New(slog.DiscardHandler), CheckEvery: 1})
	if err != nil {
		t.Fatal(err)
	}
	j.Use(compile(t, shop))
	for range 10 { // nobody runs Run
		if _, err := j.Judge(payCall()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestJudgeConfig(t *testing.T) {
	_, err := NewJudge(JudgeConfig{CheckEvery: 3})
	for _, want := range []string{"audit: missing", "log: missing", "check every: 3"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
}

// A proxy judges the requests of a connection with one Call: the time of the
// first must not stick.
func TestCallCanBeUsedAgain(t *testing.T) {
	now := mon
	j, err := NewJudge(JudgeConfig{Audit: audit.NewMemory(), Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	j.Use(compile(t, "p, r, in, **, *, *, *, **, until=2026-11-23T10:00:01Z, allow"))
	cn := j.Conn(mesh.In, pay, bill.String(), 8443)
	c := Call{Dir: mesh.In, Src: pay, Dst: bill.String(), Port: 8443, Verb: "GET", Path: "/"}
	before := c
	for _, judge := range []func(*Call) (Grant, error){j.Judge, cn.Judge} {
		now = mon
		if _, err := judge(&c); err != nil {
			t.Error(err)
		}
		now = mon.Add(time.Second)
		if _, err := judge(&c); err == nil {
			t.Error("the row has ended, but the call is allowed")
		}
	}
	if c != before {
		t.Errorf("the call was changed: %+v", c)
	}
}
