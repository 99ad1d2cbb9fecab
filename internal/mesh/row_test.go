package mesh

import (
	"strings"
	"testing"
)

func TestRowsAreReadBack(t *testing.T) {
	p, err := ParseDir("../../policies", demoDomain)
	if err != nil {
		t.Fatal(err)
	}
	for i := range p.Rules {
		if err := p.Rules[i].Writable(demoDomain); err != nil {
			t.Errorf("%s: %v", p.Rules[i].Row(), err)
		}
	}
	good := p.Rules[0]
	for name, edit := range map[string]func(*Rule){
		"a comma in a field":      func(r *Rule) { r.Path = "/a,b" },
		"a line feed":             func(r *Rule) { r.Path = "/a\np, x" },
		"a blank that is trimmed": func(r *Rule) { r.Path = "/a " },
		"a comment":               func(r *Rule) { r.Path = "/a#b" },
		"a verb that is not one":  func(r *Rule) { r.Verb = "LOOK" },
		"an id with a slash":      func(r *Rule) { r.ID = "a/b" },
		"another trust domain":    func(r *Rule) { r.Dst = "spiffe://other.example/x" },
		"an empty field":          func(r *Rule) { r.Cond = "" },
	} {
		r := good
		edit(&r)
		if err := r.Writable(demoDomain); err == nil {
			t.Errorf("%s: %q is writable", name, r.Row())
		}
	}
}

func TestRuleID(t *testing.T) {
	taken := map[string]bool{"web-pay-1": true, "web-pay-2": true}
	for _, tt := range []struct{ src, dst, want string }{
		{"spiffe://a/ns/x/sa/web", "spiffe://a/ns/x/sa/pay", "web-pay-3"},
		{"spiffe://a/web", "host:api.stripe.test", "web-api.stripe.test-1"},
		{"**", "*", "row-1"},
		{"spiffe://a/" + strings.Repeat("w", 100), "spiffe://a/" + strings.Repeat("d", 100), strings.Repeat("w", 24) + "-" + strings.Repeat("d", 24) + "-1"},
		{"group:ci", "hosts:pay", "group-ci-hosts-pay-1"},
	} {
		got := RuleID(&Rule{Src: tt.src, Dst: tt.dst}, func(id string) bool { return taken[id] })
		if got != tt.want || !plainWord(got, 64) {
			t.Errorf("%s -> %s: got %q, want %q", tt.src, tt.dst, got, tt.want)
		}
	}
}
