package authz

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// rows reads a table as it stands in access.csv. The real parser is mesh's and
// reads folders; here a row is split at its commas.
func rows(t testing.TB, csv string) *mesh.Snapshot {
	t.Helper()
	s := &mesh.Snapshot{PolicyRevision: 7, TrustDomain: spiffeid.RequireTrustDomainFromString("corp.example")}
	for line := range strings.Lines(csv) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		f := strings.Split(line, ",")
		for i := range f {
			f[i] = strings.TrimSpace(f[i])
		}
		switch {
		case f[0] == "p" && len(f) == 10:
			s.Rules = append(s.Rules, mesh.Rule{ID: f[1], Dir: mesh.Direction(f[2]), Src: f[3], Dst: f[4], Port: f[5],
				Verb: f[6], Path: f[7], Cond: f[8], Effect: mesh.Effect(f[9])})
		case len(f) == 3:
			s.Memberships = append(s.Memberships, mesh.Membership{Kind: mesh.GroupKind(f[0]), Member: f[1], Group: f[2]})
		default:
			t.Fatalf("row %q", line)
		}
	}
	return s
}

func compile(t testing.TB, csv string) *Set {
	t.Helper()
	s, err := Compile(rows(t, csv))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func id(s string) spiffeid.ID { return spiffeid.RequireFromString(s) }

// decide asks the index, a slice and Casbin, and fails when they disagree.
func decide(t testing.TB, s *Set, c *Call) Decision {
	t.Helper()
	got := s.Decide(c)
	if sl := s.Slice(c.Dir, c.Src, c.Dst, c.Port).Decide(c); sl != got {
		t.Errorf("slice says %+v, index %+v: %+v", sl, got, c)
	}
	want, err := s.Oracle(c)
	if err != nil {
		t.Errorf("casbin: %v: %+v", err, c)
	}
	if got.Reason == FailedCond || got.Reason == FailedToken {
		want.Reason = got.Reason // Casbin cannot tell
	}
	if want != got {
		t.Errorf("casbin says %+v, index %+v: %+v", want, got, c)
	}
	x := s.Explain(c)
	if x.Decision != got {
		t.Errorf("explanation says %+v, index %+v: %+v", x.Decision, got, c)
	}
	return got
}

const shop = `
g,  spiffe://corp.example/ns/ci/sa/runner-a, group:ci
g2, host:api.stripe.com, hosts:payments
g2, host:files.stripe.com, hosts:payments
p, pay-bill-1,  in,  spiffe://corp.example/ns/shop/sa/payment, spiffe://corp.example/ns/shop/sa/billing, 8443, GET|POST, /v1/charges/**, -, allow
p, ci-deploy-1, in,  group:ci, spiffe://corp.example/ns/ops/sa/deployer, 8443, POST, /v1/deploy, iss=https://ci.example scope~deploy claim.ref=refs/heads/main when=Mon-Fri/08:00-18:00, allow
p, health-1,    in,  spiffe://corp.example/ns/**, **, *, GET, /healthz, -, allow
p, guard-admin, in,  **, *, *, *, /admin/**, unless.src=spiffe://corp.example/ns/ops/**, deny
p, eg-stripe-1, out, spiffe://corp.example/ns/shop/sa/billing, hosts:payments, 443, CONNECT, -, env.sni=same, allow
p, eg-stripe-2, out, spiffe://corp.example/ns/shop/sa/billing, hosts:payments, 443, GET|POST, /v1/**, -, allow
p, eg-github-1, out, group:ci, host:*.github.com, 443, *, /repos/*, env.name=prod, allow
p, eg-any-1,    out, spiffe://corp.example/ns/shop/sa/billing, host:169.254.169.254, 80, *, **, -, allow
p, guard-meta,  out, **, host:169.254.169.254, *, *, **, -, deny
`

var (
	pay  = id("spiffe://corp.example/ns/shop/sa/payment")
	bill = id("spiffe://corp.example/ns/shop/sa/billing")
	inv  = id("spiffe://corp.example/ns/shop/sa/inventory")
	ci   = id("spiffe://corp.example/ns/ci/sa/runner-a")
	dep  = id("spiffe://corp.example/ns/ops/sa/deployer")
	mon  = time.Date(2026, 11, 23, 10, 0, 0, 0, time.UTC)
	sun  = time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
)

func ciToken(scopes ...string) *Token {
	t := &Token{Issuer: "https://ci.example", Scopes: map[string]bool{}, Claims: map[string]string{"ref": "refs/heads/main"}}
	for _, s := range scopes {
		t.Scopes[s] = true
	}
	return t
}

func TestDecisionTable(t *testing.T) {
	s := compile(t, shop)
	deploy, read := ciToken("deploy"), ciToken("read")
	for _, tc := range []struct {
		name string
		want string // rule that allows, "-rule" that denies, or a reason
		call Call
	}{
		{"a row allows", "pay-bill-1", Call{Dir: "in", Src: pay, Dst: bill.String(), Port: 8443, Verb: "POST", Path: "/v1/charges/42"}},
		{"** stands for no segment", "pay-bill-1", Call{Dir: "in", Src: pay, Dst: bill.String(), Port: 8443, Verb: "GET", Path: "/v1/charges"}},
		{"a prefix ends at a slash", "no_row", Call{Dir: "in", Src: pay, Dst: bill.String(), Port: 8443, Verb: "GET", Path: "/v1/chargesX"}},
		{"another verb", "no_row", Call{Dir: "in", Src: pay, Dst: bill.String(), Port: 8443, Verb: "DELETE", Path: "/v1/charges/42"}},
		{"another port", "no_row", Call{Dir: "in", Src: pay, Dst: bill.String(), Port: 9000, Verb: "GET", Path: "/v1/charges/42"}},
		{"another destination", "no_row", Call{Dir: "in", Src: pay, Dst: inv.String(), Port: 8443, Verb: "GET", Path: "/v1/charges/42"}},
		{"another direction", "bad_request", Call{Dir: "out", Src: pay, Dst: bill.String(), Port: 8443, Verb: "GET", Path: "/v1/charges/42"}},
		{"a token opens", "ci-deploy-1", Call{Dir: "in", Src: ci, Dst: dep.String(), Port: 8443, Verb: "POST", Path: "/v1/deploy", Token: deploy, Now: mon}},
		{"a token without the scope", "token", Call{Dir: "in", Src: ci, Dst: dep.String(), Port: 8443, Verb: "POST", Path: "/v1/deploy", Token: read, Now: mon}},
		{"no token", "token", Call{Dir: "in", Src: ci, Dst: dep.String(), Port: 8443, Verb: "POST", Path: "/v1/deploy", Now: mon}},
		{"a Sunday", "cond", Call{Dir: "in", Src: ci, Dst: dep.String(), Port: 8443, Verb: "POST", Path: "/v1/deploy", Token: deploy, Now: sun}},
		{"a trailing slash", "no_row", Call{Dir: "in", Src: ci, Dst: dep.String(), Port: 8443, Verb: "POST", Path: "/v1/deploy/", Token: deploy, Now: mon}},
		{"not in the group", "no_row", Call{Dir: "in", Src: pay, Dst: dep.String(), Port: 8443, Verb: "POST", Path: "/v1/deploy", Token: deploy, Now: mon}},
		{"patterns on both sides", "health-1", Call{Dir: "in", Src: pay, Dst: inv.String(), Port: 8443, Verb: "GET", Path: "/healthz"}},
		{"a foreign trust domain", "no_row", Call{Dir: "in", Src: id("spiffe://evil.example/ns/x"), Dst: inv.String(), Port: 8443, Verb: "GET", Path: "/healthz"}},
		{"an identity without path", "no_row", Call{Dir: "in", Src: id("spiffe://corp.example"), Dst: dep.String(), Port: 8443, Verb: "POST", Path: "/v1/deploy", Token: deploy, Now: mon}},
		{"egress by group", "eg-stripe-1", Call{Dir: "out", Src: bill, Dst: "host:api.stripe.com", Port: 443, Verb: "CONNECT", Path: "-", SNI: "api.stripe.com"}},
		{"another SNI", "cond", Call{Dir: "out", Src: bill, Dst: "host:api.stripe.com", Port: 443, Verb: "CONNECT", Path: "-", SNI: "evil.example"}},
		{"a longer host", "no_row", Call{Dir: "out", Src: bill, Dst: "host:api.stripe.com.evil.example", Port: 443, Verb: "CONNECT", Path: "-", SNI: "api.stripe.com.evil.example"}},
		{"egress of another", "no_row", Call{Dir: "out", Src: pay, Dst: "host:api.stripe.com", Port: 443, Verb: "CONNECT", Path: "-", SNI: "api.stripe.com"}},
		{"egress with a path", "eg-stripe-2", Call{Dir: "out", Src: bill, Dst: "host:files.stripe.com", Port: 443, Verb: "POST", Path: "/v1/charges/1"}},
		{"a host pattern", "eg-github-1", Call{Dir: "out", Src: ci, Dst: "host:api.github.com", Port: 443, Verb: "GET", Path: "/repos/x", Environment: "prod"}},
		{"another environment", "cond", Call{Dir: "out", Src: ci, Dst: "host:api.github.com", Port: 443, Verb: "GET", Path: "/repos/x", Environment: "test"}},
		{"two labels", "no_row", Call{Dir: "out", Src: ci, Dst: "host:a.b.github.com", Port: 443, Verb: "GET", Path: "/repos/x", Environment: "prod"}},
		{"the apex", "no_row", Call{Dir: "out", Src: ci, Dst: "host:github.com", Port: 443, Verb: "GET", Path: "/repos/x", Environment: "prod"}},
		{"deny overrides", "-guard-meta", Call{Dir: "out", Src: bill, Dst: "host:169.254.169.254", Port: 80, Verb: "GET", Path: "/latest"}},
		{"a guardrail", "-guard-admin", Call{Dir: "in", Src: pay, Dst: bill.String(), Port: 8443, Verb: "GET", Path: "/admin/x"}},
		{"outside of the guardrail", "no_row", Call{Dir: "in", Src: dep, Dst: bill.String(), Port: 8443, Verb: "GET", Path: "/admin/x"}},
		{"nothing", "bad_request", Call{}},
		{"no caller", "bad_request", Call{Dir: "in", Dst: bill.String(), Port: 8443, Verb: "GET", Path: "/healthz"}},
		{"port 0", "bad_request", Call{Dir: "in", Src: pay, Dst: inv.String(), Verb: "GET", Path: "/healthz"}},
		{"a lower-case verb", "no_row", Call{Dir: "in", Src: pay, Dst: inv.String(), Port: 1, Verb: "get", Path: "/healthz"}},
		{"a rare verb under *", "eg-github-1", Call{Dir: "out", Src: ci, Dst: "host:api.github.com", Port: 443, Verb: "PROPFIND", Path: "/repos/x", Environment: "prod"}},
		{"a rare verb elsewhere", "no_row", Call{Dir: "in", Src: pay, Dst: inv.String(), Port: 1, Verb: "PROPFIND", Path: "/healthz"}},
		{"* is one segment", "no_row", Call{Dir: "out", Src: ci, Dst: "host:api.github.com", Port: 443, Verb: "GET", Path: "/repos/x/y", Environment: "prod"}},
		{"* is not empty", "no_row", Call{Dir: "out", Src: ci, Dst: "host:api.github.com", Port: 443, Verb: "GET", Path: "/repos/", Environment: "prod"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := decide(t, s, &tc.call)
			got := d.Rule
			switch {
			case !d.Allow && d.Rule != "":
				got = "-" + d.Rule
			case !d.Allow:
				got = string(d.Reason)
			}
			if got != tc.want {
				t.Errorf("got %s, want %s (%+v)", got, tc.want, d)
			}
		})
	}
}

func TestPathsHaveOneForm(t *testing.T) {
	for p, want := range map[string]bool{
		"/": true, "-": true, "/a/b": true, "/a/": true, "/a.b/.well-known/..x/x..": true, "/a%20b%C3%A9": true, "/~a_b-c!$&'()*+,=:@": true,
		"": false, "a": false, "*": false, "//": false, "/a//b": false, "/.": false, "/..": false, "/a/./b": false, "/a/../b": false,
		"/a/..": false, "/a?b": false, "/a#b": false, "/a;b": false, "/a\\b": false, "/a b": false, "/a\x00": false, "/a\x7f": false, "/é": false,
		"/%": false, "/%2": false, "/%zz": false, "/%2f": false, "/%2F": false, "/%5C": false, "/%00": false, "/%61": false, "/%2E%2E": false,
		"/%c3%a9": false, "/%7E": false, "/%0A": false, "/a\n": false,
	} {
		if got := cleanPath(p); got != want {
			t.Errorf("%q: %v, want %v", p, got, want)
		}
	}
}

func TestConditions(t *testing.T) {
	call := Call{
		Dir: mesh.Out, Src: pay, Dst: "host:a.example", Port: 443, Verb: "CONNECT", Path: "-", SNI: "a.example", Now: mon, Environment: "prod",
		Token: &Token{Issuer: "https://i", Audience: []string{"x", "billing"}, Scopes: map[string]bool{"deploy": true, "no": false},
			Claims: map[string]string{"team": "a", "empty": ""}, Bound: true, ACR: 2},
	}
	for cond, want := range map[string]bool{
		"-": true, "iss=https://i": true, "iss=https://j": false, "aud=billing": true, "aud=bill": false,
		"scope~deploy": true, "scope~no": false, "scope~dep": false, "claim.team=a": true, "claim.team=b": false, "claim.none=a": false,
		"acr>=2": true, "acr>=3": false, "bound": true, "env.name=prod": true, "env.name=test": false, "env.sni=same": true,
		"when=Mon-Fri/08:00-18:00": true, "when=Mon/10:01-18:00": false, "when=Mon/00:00-10:00": false, "when=Sat-Mon/10:00-10:01": true,
		"until=2026-11-23T10:00:01Z": true, "until=2026-11-23T10:00:00Z": false, "until=2026-11-23T12:00:01+02:00": true,
		"unless.src=spiffe://corp.example/ns/shop/**": false, "unless.src=spiffe://corp.example/ns/ci/**": true,
		"iss=https://i scope~deploy": true, "iss=https://i scope~x": false,
	} {
		s := compile(t, "p, r, out, **, host:a.example, 443, CONNECT, -, "+cond+", allow")
		if got := decide(t, s, &call); got.Allow != want {
			t.Errorf("%s: %+v", cond, got)
		}
		parsed, err := mesh.ParseCond(cond)
		if err != nil {
			t.Fatal(err)
		}
		for i := range parsed {
			bare := call
			bare.Token = nil
			if parsed[i].NeedsToken() && decide(t, s, &bare).Allow {
				t.Errorf("%s holds without a token", cond)
			}
		}
	}
	if s := compile(t, "p, r, out, **, host:a.example, 443, CONNECT, -, until=2026-11-23T10:00:00Z, allow"); true {
		late := call
		late.Now = time.Time{} // means the present, not the year 1
		if decide(t, s, &late).Allow && time.Now().After(mon) {
			t.Error("until= holds for a call without a time")
		}
	}
}

func TestGroupsInGroups(t *testing.T) {
	s := compile(t, `
g, spiffe://corp.example/a, group:one
g, group:one, group:two
g, group:two, group:three
g, spiffe://corp.example/b, group:three
g2, spiffe://corp.example/x, svcs:x
g2, svcs:x, svcs:all
p, r1, in, group:three, svcs:all, *, GET, /**, -, allow
p, r2, in, group:one, svcs:all, *, *, /secret/**, -, deny
`)
	for _, tc := range []struct {
		src, path string
		want      bool
	}{{"a", "/x", true}, {"a", "/secret/x", false}, {"b", "/secret/x", true}, {"c", "/x", false}} {
		c := Call{Dir: mesh.In, Src: id("spiffe://corp.example/" + tc.src), Dst: "spiffe://corp.example/x", Port: 1, Verb: "GET", Path: tc.path}
		if got := decide(t, s, &c); got.Allow != tc.want {
			t.Errorf("%s %s: %+v", tc.src, tc.path, got)
		}
	}
}

func TestCompileRefuses(t *testing.T) {
	good := "p, r, in, **, *, 1, GET, /a, -, allow"
	for name, csv := range map[string]string{
		"an unknown direction":   strings.Replace(good, " in,", " inn,", 1),
		"an unknown effect":      strings.Replace(good, "allow", "Allow", 1),
		"an unknown condition":   strings.Replace(good, " -,", " eval=x,", 1),
		"two rows with one id":   good + "\n" + good,
		"no path":                strings.Replace(good, "/a", "", 1),
		"a path in another form": strings.Replace(good, "/a", "/a/../b", 1),
		"a port out of range":    strings.Replace(good, " 1,", " 65536,", 1),
		"a regular expression":   strings.Replace(good, "/a", "/.*|/a", 1),
		"a group in itself":      good + "\ng, group:a, group:b\ng, group:b, group:a",
		"a wild trust domain":    strings.Replace(good, "**", "spiffe://*/x", 1),
		"a short wildcard":       strings.Replace(good, "**", "spiffe://corp.example/x*", 1),
		"a host called inside":   strings.Replace(good, " *,", " host:a,", 1),
	} {
		if _, err := Compile(rows(t, csv)); err == nil {
			t.Errorf("%s was compiled", name)
		}
	}
	if _, err := Compile(nil); err == nil {
		t.Error("no snapshot was compiled")
	}
}

func TestNoPolicyDenies(t *testing.T) {
	c := Call{Dir: mesh.In, Src: pay, Dst: bill.String(), Port: 8443, Verb: "GET", Path: "/"}
	var none *Set
	empty := compile(t, "")
	for name, s := range map[string]*Set{"no set": none, "an empty set": empty} {
		if d := decide(t, s, &c); d != (Decision{Reason: NoPolicy}) {
			t.Errorf("%s: %+v", name, d)
		}
		if s.Len() != 0 || s.Slice(mesh.In, pay, "x", 1).Decide(&c) != (Decision{Reason: NoPolicy}) {
			t.Errorf("%s has rows", name)
		}
	}
}

func TestSliceIsForItsEnds(t *testing.T) {
	s := compile(t, shop)
	sl := s.Slice(mesh.In, pay, bill.String(), 8443)
	ok := Call{Dir: mesh.In, Src: pay, Dst: bill.String(), Port: 8443, Verb: "GET", Path: "/v1/charges"}
	if !sl.Decide(&ok).Allow {
		t.Fatal("denied")
	}
	for name, change := range map[string]func(*Call){
		"direction": func(c *Call) { c.Dir = mesh.Out }, "source": func(c *Call) { c.Src = inv },
		"destination": func(c *Call) { c.Dst = inv.String() }, "port": func(c *Call) { c.Port = 1 },
	} {
		c := ok
		change(&c)
		if d := sl.Decide(&c); d != (Decision{Reason: BadRequest}) {
			t.Errorf("another %s: %+v", name, d)
		}
	}
}

func TestExplain(t *testing.T) {
	s := compile(t, shop)
	x := s.Explain(&Call{Dir: mesh.In, Src: ci, Dst: dep.String(), Port: 8443, Verb: "POST", Path: "/v1/deploy", Now: mon, Token: ciToken("read")})
	if x.Nearest == nil || x.Nearest.Rule.ID != "ci-deploy-1" || x.Nearest.Field != FieldCond || x.Nearest.Want != "scope~deploy" {
		t.Errorf("nearest %+v", x.Nearest)
	}
	x = s.Explain(&Call{Dir: mesh.In, Src: pay, Dst: bill.String(), Port: 8443, Verb: "DELETE", Path: "/v1/charges/1"})
	if x.Nearest == nil || x.Nearest.Rule.ID != "pay-bill-1" || x.Nearest.Field != FieldVerb || x.Nearest.Want != "GET|POST" {
		t.Errorf("nearest %+v", x.Nearest)
	}
	var tried []string
	for _, tr := range x.Tried {
		tried = append(tried, fmt.Sprint(tr.Rule.ID, ":", tr.Field))
	}
	if got := strings.Join(tried, " "); got != "pay-bill-1:verb health-1:verb guard-admin:path" {
		t.Errorf("tried %s", got)
	}
}

func TestPatternsOfDestinations(t *testing.T) {
	s := compile(t, `
p, one,  in, **, spiffe://corp.example/a/*/b,    *, GET, **, -, allow
p, tree, in, **, spiffe://corp.example/t/*/**,   *, GET, **, -, allow
p, all,  in, **, spiffe://corp.example/s/**,     *, GET, **, -, allow
p, top,  in, **, spiffe://corp.example/*,        *, GET, **, -, allow
`)
	for dst, want := range map[string]string{
		"a/x/b": "one", "a//b": "", "a/x/y/b": "", "a/b": "", "a/x/b/": "",
		"t/x": "tree", "t/x/y/z": "tree", "t": "top", "t/": "", "t//x": "",
		"s": "all", "s/": "all", "s/x": "all", "sx": "top", "": "", "/": "", "*": "top",
	} {
		c := get("/")
		c.Dst = "spiffe://corp.example/" + dst
		if d := decide(t, s, c); d.Rule != want {
			t.Errorf("%q: %+v, want row %q", dst, d, want)
		}
	}
	c := get("/")
	for _, c.Dst = range []string{"spiffe://corp.example", "spiffe://other.example/s/x", "spiffe://corp.example.evil/s/x", "host:s"} {
		if d := decide(t, s, c); d.Allow {
			t.Errorf("%q: %+v", c.Dst, d)
		}
	}
}

// The row that RowFor gives allows the call, and no other one.
func TestRowForAllowsExactlyTheCall(t *testing.T) {
	s := compile(t, shop)
	call := Call{Dir: mesh.In, Src: pay, Dst: bill.String(), Port: 8443, Verb: "DELETE", Path: "/v1/charges/1", Now: mon}
	row, err := s.RowFor(&call)
	if err != nil {
		t.Fatal(err)
	}
	if want := "p, payment-billing-1, in, " + pay.String() + ", " + bill.String() + ", 8443, DELETE, /v1/charges/1, -, allow"; row.Row() != want {
		t.Errorf("got  %s\nwant %s", row.Row(), want)
	}
	after := compile(t, shop+"\n"+row.Row()+"\n")
	if d := after.Decide(&call); d.Rule != row.ID {
		t.Errorf("with the row: %+v", d)
	}
	for _, edit := range []func(*Call){
		func(c *Call) { c.Src = ci }, func(c *Call) { c.Dst = dep.String() }, func(c *Call) { c.Port++ },
		func(c *Call) { c.Verb = "PUT" }, func(c *Call) { c.Path = "/v1/charges/2" }, func(c *Call) { c.Path += "/" },
	} {
		other := call
		edit(&other)
		if b, a := s.Decide(&other), after.Decide(&other); b.Allow != a.Allow {
			t.Errorf("the row changes %+v, too", other)
		}
	}
}

func TestRowForWhenNoRowHelps(t *testing.T) {
	s := compile(t, shop)
	base := Call{Dir: mesh.In, Src: pay, Dst: bill.String(), Port: 8443, Verb: "DELETE", Path: "/v1/charges/1", Now: mon}
	for _, tt := range []struct {
		name, want string
		edit       func(*Call)
	}{
		{"it is allowed", "row pay-bill-1 allows it", func(c *Call) { c.Verb = "GET" }},
		{"a row denies it", "row guard-admin denies it", func(c *Call) { c.Path = "/admin/x" }},
		{"a condition does not hold", "row ci-deploy-1 allows it when scope~deploy holds", func(c *Call) {
			*c = Call{Dir: mesh.In, Src: ci, Dst: dep.String(), Port: 8443, Verb: "POST", Path: "/v1/deploy", Now: mon, Token: ciToken("read")}
		}},
		{"no row speaks of such a path", "refused before rows are asked", func(c *Call) { c.Path = "/a/../b" }},
		{"a segment that is a pattern", `segment "*"`, func(c *Call) { c.Path = "/a/*" }},
		{"a comma", "','", func(c *Call) { c.Path = "/a,b" }},
		{"a verb that rows cannot name", "unknown verb", func(c *Call) { c.Verb = "PROPFIND" }},
	} {
		c := base
		tt.edit(&c)
		if row, err := s.RowFor(&c); !errors.Is(err, ErrNoRow) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got row %q, error %v, want %q", tt.name, row.Row(), err, tt.want)
		}
	}
	if row, err := (*Set)(nil).RowFor(&base); err != nil || row.ID == "" {
		t.Errorf("without a policy: %+v, %v", row, err)
	}
}
