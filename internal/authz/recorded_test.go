package authz

import (
	"strings"
	"testing"

	"sallyport/internal/audit"
)

func TestRecorded(t *testing.T) {
	s := compile(t, `p, pay-1, in, spiffe://corp.example/ns/shop/sa/payment, spiffe://corp.example/ns/shop/sa/billing, 8443, POST, /v1/charges, iss=https://ci.example scope~pay, allow
p, guard-1, in, **, spiffe://corp.example/ns/shop/sa/billing, *, *, /admin/**, -, deny
`)
	record := func(change func(*audit.Record)) *audit.Record {
		r := &audit.Record{
			ID: "x-1", Kind: audit.KindDecision, Decision: audit.Deny, Reason: string(NoRow), Dir: "in",
			Src: "spiffe://corp.example/ns/shop/sa/payment", Dst: "spiffe://corp.example/ns/shop/sa/billing",
			Port: 8443, Verb: "GET", Path: "/v1/charges", Revision: 3, Time: mon,
		}
		change(r)
		return r
	}
	for name, c := range map[string]struct {
		change func(*audit.Record)
		check  func(Recorded) bool
	}{
		"a default denial has a row to add": {func(*audit.Record) {}, func(x Recorded) bool {
			return !x.Allow && x.Reason == NoRow && x.Nearest != nil && x.Nearest.Field == FieldVerb && strings.Contains(x.Add, ", GET, /v1/charges, -, allow") && x.DecidedBy == 3 && x.Revision == 7
		}},
		"a deny row is named": {func(r *audit.Record) { r.Reason, r.Rule, r.Path = "rule", "guard-1", "/admin/x" }, func(x Recorded) bool {
			return x.Rule == "guard-1" && x.Add == "" && x.NoAdd != ""
		}},
		"a condition on the token is left open": {func(r *audit.Record) { r.Reason, r.Verb = "token", "POST" }, func(x Recorded) bool {
			return len(x.Tried) == 2 && x.Tried[0].Want == "iss=https://ci.example" && x.Tried[0].Got == unkept
		}},
		"of an allowed call the conditions held": {func(r *audit.Record) { r.Decision, r.Reason, r.Rule, r.Verb = audit.Allow, "rule", "pay-1", "POST" }, func(x Recorded) bool {
			return x.Allow && x.Conds == "iss=https://ci.example scope~pay" && len(x.Tried) == 2 && x.Tried[0].Field == "" && x.Add == "" && x.NoAdd == "" && x.Nearest == nil
		}},
		"of a count only the row is told": {func(r *audit.Record) {
			r.Kind, r.Decision, r.Reason, r.Rule, r.Path, r.Count = audit.KindRollup, audit.Allow, "rule", "pay-1", "/v1/{}", 9
		}, func(x Recorded) bool { return x.Allow && x.Counted == 9 && x.Conds != "" && len(x.Tried) == 0 }},
		"a row that is gone": {func(r *audit.Record) { r.Decision, r.Reason, r.Rule = audit.Allow, "rule", "old-1" }, func(x Recorded) bool {
			return x.Allow && x.Rule == "old-1" && x.Conds == "" && x.Add == ""
		}},
		"a caller without an identity": {func(r *audit.Record) { r.Src, r.Reason = "", "not_workload" }, func(x Recorded) bool { return !x.Allow && x.Reason == "not_workload" && len(x.Tried) == 0 }},
	} {
		t.Run(name, func(t *testing.T) {
			if x := s.Recorded(record(c.change)); !c.check(x) {
				t.Errorf("got %+v", x)
			}
		})
	}
	var none *Set
	if x := none.Recorded(record(func(*audit.Record) {})); x.Allow || x.Reason != NoRow {
		t.Errorf("without a policy: %+v", x)
	}
}
