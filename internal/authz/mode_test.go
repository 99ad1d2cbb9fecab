package authz

import (
	"strings"
	"testing"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
)

// modeRows has pay-1 and stop-1 in access.csv and guard-1 in guardrails.csv.
func modeRows(t *testing.T, access, guard mesh.Mode) *Set {
	t.Helper()
	snap := rows(t, `p, pay-1, in, spiffe://corp.example/ns/shop/sa/payment, spiffe://corp.example/ns/shop/sa/billing, 8443, POST, /v1/**, -, allow
p, stop-1, in, spiffe://corp.example/ns/shop/sa/payment, spiffe://corp.example/ns/shop/sa/billing, 8443, POST, /v1/refunds, -, deny
p, guard-1, in, **, spiffe://corp.example/ns/shop/sa/billing, *, *, /v1/admin/**, -, deny
`)
	return compileModal(t, snap, access, guard)
}

// compileModal takes the rows named guard for guardrails.
func compileModal(t *testing.T, snap *mesh.Snapshot, access, guard mesh.Mode) *Set {
	t.Helper()
	for i := range snap.Rules {
		snap.Rules[i].Origin.File = "access.csv"
		if strings.HasPrefix(snap.Rules[i].ID, "guard") {
			snap.Rules[i].Origin.File = "guardrails.csv"
		}
	}
	for file, m := range map[string]mesh.Mode{"access.csv": access, "guardrails.csv": guard} {
		if m != mesh.Enforce {
			snap.Modes = append(snap.Modes, mesh.FileMode{File: file, Mode: m})
		}
	}
	s, err := Compile(snap)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestModes(t *testing.T) {
	const allowed, row, none, admin = "/v1/charges", "/v1/refunds", "/v2", "/v1/admin/x"
	for _, c := range []struct {
		access, guard mesh.Mode
		path          string
		want          Reason // of an allowed call; empty: denied
		rule          string
	}{
		{mesh.Enforce, mesh.Enforce, allowed, ByRule, "pay-1"},
		{mesh.Enforce, mesh.Enforce, row, "", "stop-1"},
		{mesh.Enforce, mesh.Enforce, admin, "", "guard-1"},
		// Rows of access.csv are not enforced: its denials and what it leaves out pass.
		{mesh.Observe, mesh.Enforce, allowed, ByRule, "pay-1"},
		{mesh.Observe, mesh.Enforce, row, Observed, "stop-1"},
		{mesh.Observe, mesh.Enforce, none, Observed, ""},
		{mesh.Observe, mesh.Enforce, admin, "", "guard-1"},
		{mesh.Warn, mesh.Enforce, none, Warned, ""},
		// Guardrails are not enforced: what access.csv does not allow is denied.
		{mesh.Enforce, mesh.Observe, admin, Observed, "guard-1"},
		{mesh.Enforce, mesh.Observe, row, "", "stop-1"},
		{mesh.Enforce, mesh.Observe, none, "", ""},
		{mesh.Enforce, mesh.Warn, admin, Warned, "guard-1"},
		// Each denial has the mode of its file.
		{mesh.Warn, mesh.Observe, admin, Observed, "guard-1"},
		{mesh.Warn, mesh.Observe, none, Warned, ""},
	} {
		var kept []audit.Record
		keep := func(r *audit.Record) error {
			r.ID = "x-1"
			kept = append(kept, *r)
			return nil
		}
		j := judgeWith(t, recorder(keep), modeRows(t, c.access, c.guard))
		call := payCall()
		call.Path = c.path
		g, err := j.Judge(call)
		onConn := *call
		cg, cerr := j.Conn(mesh.In, pay, bill.String(), 8443).Judge(&onConn)
		name := string(c.access) + " " + string(c.guard) + " " + c.path
		if (err == nil) != (c.want != "") || (cerr == nil) != (err == nil) || j.Allows(call) != (err == nil) {
			t.Errorf("%s: %v, on a connection %v, again %v", name, err, cerr, j.Allows(call))
			continue
		}
		r := kept[0]
		if r.Rule != c.rule || c.want != "" && (r.Reason != string(c.want) || r.Decision != audit.Allow || g.Rule() != c.rule) {
			t.Errorf("%s: recorded %+v", name, r)
		}
		if soft := c.want == Observed || c.want == Warned; soft != r.Full || soft != (r.Detail != "") {
			t.Errorf("%s: recorded %+v", name, r)
		}
		if g.Warn() != (c.want == Warned) || cg.Warn() != g.Warn() {
			t.Errorf("%s: the caller is warned: %v", name, g.Warn())
		}
	}
}

func TestWhatIsNotACallPassesInNoMode(t *testing.T) {
	s := modeRows(t, mesh.Observe, mesh.Observe)
	j := judgeWith(t, audit.NewMemory(), s)
	for _, c := range []*Call{{}, {Dir: mesh.In, Src: pay, Dst: bill.String(), Port: 8443, Verb: "GET", Path: "/a/../b"}} {
		if g, err := j.Judge(c); denial(t, g, err).Reason != BadRequest {
			t.Errorf("%+v: %v", c, err)
		}
	}
	j.doubted.Store(s)
	c := payCall()
	c.Path = "/v2"
	if g, err := j.Judge(c); denial(t, g, err).Reason != NoRow {
		t.Errorf("a set that disagreed with Casbin let a denied call pass: %v", err)
	}
	j.Use(nil)
	if g, err := j.Judge(payCall()); denial(t, g, err).Reason != NoPolicy {
		t.Errorf("without a policy: %v", err)
	}
}

func TestUnknownModeIsNoPolicy(t *testing.T) {
	for _, m := range []mesh.FileMode{{File: "access.csv", Mode: "off"}, {File: "tokens.yaml", Mode: mesh.Observe}, {File: "access.csv"}} {
		snap := rows(t, "")
		snap.Modes = []mesh.FileMode{m}
		if _, err := Compile(snap); err == nil {
			t.Errorf("%v was compiled", m)
		}
	}
}

func TestReaches(t *testing.T) {
	const all = `p, pay-1, in, spiffe://corp.example/ns/shop/sa/payment, spiffe://corp.example/ns/shop/sa/billing, 8443, POST, /v1/**, when=Mon-Fri/09:00-17:00, allow
`
	const guard = `p, guard-1, in, spiffe://corp.example/ns/shop/sa/payment, spiffe://corp.example/ns/shop/sa/billing, *, *, **, -, deny
`
	for _, c := range []struct {
		name, csv     string
		access, guard mesh.Mode
		want          bool
	}{
		{"a row, whatever its conditions", all, mesh.Enforce, mesh.Enforce, true},
		{"a guardrail over all of it", all + guard, mesh.Enforce, mesh.Enforce, false},
		{"a guardrail over part of it", all + strings.Replace(guard, "*, **", "*, /v1/x", 1), mesh.Enforce, mesh.Enforce, true},
		{"a guardrail under a condition", all + strings.Replace(guard, "-, deny", "until=2027-01-01T00:00:00Z, deny", 1), mesh.Enforce, mesh.Enforce, true},
		{"a guardrail that is not enforced", all + guard, mesh.Enforce, mesh.Observe, true},
		{"for another port", strings.Replace(all, "8443", "9443", 1), mesh.Enforce, mesh.Enforce, false},
		{"for others", strings.Replace(all, "payment", "web", 1), mesh.Enforce, mesh.Enforce, false},
		{"for others, and not enforced", strings.Replace(all, "payment", "web", 1), mesh.Warn, mesh.Enforce, true},
		{"no policy", "", mesh.Enforce, mesh.Enforce, false},
	} {
		j := judgeWith(t, recorder(func(*audit.Record) error { return nil }), compileModal(t, rows(t, c.csv), c.access, c.guard))
		if got := j.Reaches(mesh.In, pay, bill.String(), 8443); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// TestModeOfDestination has the mode of a host go before that of access.csv, for
// calls to it alone, and never before guardrails.
func TestModeOfDestination(t *testing.T) {
	out := func(file, mode mesh.Mode) *Set {
		snap := rows(t, `p, pay-1, out, spiffe://corp.example/ns/shop/sa/payment, host:api.example.com, 443, CONNECT, -, -, allow
p, guard-1, out, **, host:bad.example.com, *, *, **, -, deny
`)
		snap.Destinations = []mesh.Destination{{Host: "*.example.com", Proto: "tls", SNI: "strict", Mode: mode}, {Host: "held.example.com", Proto: "tls", SNI: "strict", Mode: mesh.Enforce}}
		return compileModal(t, snap, file, mesh.Enforce)
	}
	for _, c := range []struct {
		file, host mesh.Mode
		name       string
		want       Reason // of an allowed call; empty: denied
	}{
		{mesh.Enforce, mesh.Observe, "api", ByRule}, {mesh.Enforce, mesh.Observe, "new", Observed}, {mesh.Enforce, mesh.Warn, "new", Warned},
		{mesh.Enforce, mesh.Observe, "bad", ""}, {mesh.Enforce, mesh.Observe, "held", ""}, {mesh.Enforce, mesh.Observe, "x.y", ""},
		{mesh.Observe, mesh.Enforce, "new", ""}, {mesh.Observe, mesh.Enforce, "api", ByRule}, {mesh.Observe, mesh.Enforce, "x.y", Observed},
		{mesh.Warn, mesh.Observe, "new", Observed}, {mesh.Observe, "", "new", Observed}, {mesh.Observe, mesh.Enforce, "bad", ""},
	} {
		s, host := out(c.file, c.host), c.name+".example.com"
		call := &Call{Dir: mesh.Out, Src: pay, Dst: "host:" + host, Port: 443, Verb: "CONNECT", Path: "-"}
		for how, d := range map[string]Decision{"calls": s.soften(call, s.Decide(call)), "names": s.Resolves(pay, host)} {
			if d.Allow != (c.want != "") || d.Allow && d.Reason != c.want {
				t.Errorf("%s of %s under file %s and host %s: %+v, want %q", how, host, c.file, c.host, d, c.want)
			}
		}
		if c.want == Observed && !s.reaches(mesh.Out, pay, "host:"+host, 443) {
			t.Errorf("%s is not reached", host)
		}
	}
}

// A route says how calls are recorded that go on, and makes a service's records of
// denials more, never fewer.
func TestARouteThinsNoDenialsOfItsService(t *testing.T) {
	for _, c := range []struct {
		service, route string
		allowed        bool
		want           bool // a record of its own, whatever comes
	}{
		{"full", "", true, true},
		{"full", "counted", true, false},
		{"full", "full", true, true},
		{"counted", "full", true, true},
		{"counted", "", true, false},
		{"", "", true, false},
		{"full", "", false, true},
		{"full", "counted", false, true},
		{"full", "full", false, true},
		{"counted", "full", false, true},
		{"counted", "counted", false, false},
		{"counted", "", false, false},
		{"", "counted", false, false},
		{"", "", false, false},
	} {
		snap := rows(t, `p, pay-1, in, spiffe://corp.example/ns/shop/sa/payment, spiffe://corp.example/ns/shop/sa/billing, 8443, POST, /v1/**, -, allow
`)
		snap.Services = []mesh.Service{{Name: "billing", ID: bill, Port: 8443, Protocol: "http", Audit: c.service}}
		s, err := Compile(snap)
		if err != nil {
			t.Fatal(err)
		}
		var kept []audit.Record
		j := judgeWith(t, recorder(func(r *audit.Record) error {
			r.ID = "x-1"
			kept = append(kept, *r)
			return nil
		}), s)
		call := payCall()
		if call.Route = (&mesh.Route{Audit: c.route}); !c.allowed {
			call.Path = "/v2"
		}
		onConn := *call
		if _, err := j.Judge(call); (err == nil) != c.allowed {
			t.Errorf("%+v: %v", c, err)
		}
		if _, err := j.Conn(mesh.In, pay, bill.String(), 8443).Judge(&onConn); (err == nil) != c.allowed {
			t.Errorf("%+v: on a connection %v", c, err)
		}
		for _, r := range kept {
			if r.Full != c.want {
				t.Errorf("%+v: recorded with full %t", c, r.Full)
			}
		}
		if len(kept) != 2 {
			t.Errorf("%+v: %d records", c, len(kept))
		}
	}
}
