package authz

import (
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

const resolveRows = `g,  spiffe://corp.example/ns/shop/sa/payment, group:payers
g2, host:api.a.example, hosts:a
p, a-1,     out, group:payers, hosts:a,                443, CONNECT, -, -, allow
p, b-1,     out, group:payers, host:*.b.example,       443, CONNECT, -, -, allow
p, c-1,     out, **,           host:api.c.example,     443, CONNECT, -, env.name=prod, allow
p, d-1,     out, group:payers, host:api.d.example,     443, CONNECT, -, -, allow
p, d-2,     out, group:payers, host:api.d.example,     80,  GET, /x/**, -, allow
p, d-no,    out, group:payers, host:api.d.example,     443, *, **, -, deny
p, e-1,     out, group:payers, host:api.e.example,     443, CONNECT, -, -, allow
p, e-no,    out, **,           host:api.e.example,     443, CONNECT, -, -, deny
p, f-1,     out, group:payers, host:api.f.example,     443, CONNECT, -, -, allow
p, f-when,  out, **,           host:api.f.example,     *, *, **, env.name=dev, deny
p, guard-g, out, **,           host:bad.b.example,     *, *, **, -, deny
p, l-1,     out, group:payers, host:203.0.113.9,       443, CONNECT, -, -, allow
p, in-1,    in,  **, spiffe://corp.example/ns/shop/sa/billing, 8443, GET, /**, -, allow
`

func TestResolves(t *testing.T) {
	payment := spiffeid.RequireFromString("spiffe://corp.example/ns/shop/sa/payment")
	web := spiffeid.RequireFromString("spiffe://corp.example/ns/shop/sa/web")
	set := compileModal(t, rows(t, resolveRows), mesh.Enforce, mesh.Enforce)
	for _, c := range []struct {
		why    string
		src    spiffeid.ID
		host   string
		rule   string
		allow  bool
		reason Reason
	}{
		{"a member of a group, in full", payment, "api.a.example", "a-1", true, ByRule},
		{"a pattern", payment, "x.b.example", "b-1", true, ByRule},
		{"a pattern does not speak of its apex", payment, "b.example", "", false, NoRow},
		{"nor of two labels", payment, "x.y.b.example", "", false, NoRow},
		{"somebody else", web, "api.a.example", "", false, NoRow},
		{"a condition may hold when the call is made", web, "api.c.example", "c-1", true, ByRule},
		{"one of two rows is denied", payment, "api.d.example", "d-2", true, ByRule},
		{"the only row is denied", payment, "api.e.example", "e-no", false, ByRule},
		{"a denial with a condition need not hold", payment, "api.f.example", "f-1", true, ByRule},
		{"a guardrail beats the pattern", payment, "bad.b.example", "guard-g", false, ByRule},
		{"a guardrail alone", web, "bad.b.example", "guard-g", false, ByRule},
	} {
		if d := set.Resolves(c.src, c.host); d.Allow != c.allow || d.Rule != c.rule || d.Reason != c.reason {
			t.Errorf("%s: %+v, want %v by %q (%s)", c.why, d, c.allow, c.rule, c.reason)
		}
	}
	want := []string{"203.0.113.9", "api.a.example", "api.c.example", "api.d.example", "api.e.example", "api.f.example", "bad.b.example"}
	if got := set.Hosts(); !slices.Equal(got, want) {
		t.Errorf("hosts %v, want %v", got, want)
	}
	if d := (*Set)(nil).Resolves(payment, "api.a.example"); d.Allow || d.Reason != NoPolicy {
		t.Errorf("without a policy: %+v", d)
	}
	observed := compileModal(t, rows(t, resolveRows), mesh.Observe, mesh.Enforce)
	if d := observed.Resolves(web, "anything.example"); !d.Allow || d.Reason != Observed {
		t.Errorf("rows that are not enforced: %+v", d)
	}
	if d := observed.Resolves(web, "bad.b.example"); d.Allow || d.Rule != "guard-g" {
		t.Errorf("a guardrail beside rows that are not enforced: %+v", d)
	}
	warned := compileModal(t, rows(t, resolveRows), mesh.Enforce, mesh.Warn)
	if d := warned.Resolves(payment, "bad.b.example"); !d.Allow || d.Reason != Warned {
		t.Errorf("a guardrail that is not enforced: %+v", d)
	}
	if d := warned.Resolves(web, "bad.b.example"); d.Allow {
		t.Errorf("what no row allows: %+v", d)
	}
}

// TestResolvesAgrees has no call allowed to a host whose name is of no use.
func TestResolvesAgrees(t *testing.T) {
	set := compileModal(t, rows(t, resolveRows), mesh.Enforce, mesh.Enforce)
	for _, src := range []string{"payment", "web"} {
		id := spiffeid.RequireFromString("spiffe://corp.example/ns/shop/sa/" + src)
		for _, host := range append(set.Hosts(), "x.b.example", "b.example") {
			any := false
			for _, port := range []uint16{80, 443} {
				for _, env := range []string{"prod", "dev"} {
					for _, verb := range []struct{ verb, path string }{{"CONNECT", "-"}, {"GET", "/x/y"}} {
						any = any || set.Decide(&Call{Dir: mesh.Out, Src: id, Dst: "host:" + host, Port: port, Verb: verb.verb, Path: verb.path, Environment: env}).Allow
					}
				}
			}
			if got := set.Resolves(id, host).Allow; got != any {
				t.Errorf("%s and %s: a call is possible: %v, the name resolves: %v", src, host, any, got)
			}
		}
	}
}
