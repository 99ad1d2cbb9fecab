package review

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/policies"
)

var (
	domain = spiffeid.RequireTrustDomainFromString("demo.sallyport")
	// now is a Sunday.
	now = time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
)

const (
	servicesYAML = `services:
  - {name: web, identity: spiffe://demo.sallyport/ns/shop/sa/web, port: 8443}
  - {name: billing, identity: spiffe://demo.sallyport/ns/shop/sa/billing, port: 8443}
`
	entriesYAML = `entries:
  - {spiffe_id: spiffe://demo.sallyport/ns/shop/sa/web, parent_id: spiffe://demo.sallyport/spire/agent/join_token/web, selectors: ["child:true"]}
  - {spiffe_id: spiffe://demo.sallyport/ns/shop/sa/billing, parent_id: spiffe://demo.sallyport/spire/agent/join_token/billing, selectors: ["child:true"]}
`
	egressYAML = "destinations:\n  - host: api.stripe.test\n"
)

func parse(t testing.TB, access, tests string) *mesh.Policies {
	t.Helper()
	access = strings.NewReplacer("$web", "spiffe://demo.sallyport/ns/shop/sa/web", "$billing", "spiffe://demo.sallyport/ns/shop/sa/billing", "$td", "spiffe://demo.sallyport").Replace(access)
	files := fstest.MapFS{
		"access.csv":    {Data: []byte(access)},
		"services.yaml": {Data: []byte(servicesYAML)},
		"entries.yaml":  {Data: []byte(entriesYAML)},
		"egress.yaml":   {Data: []byte(egressYAML)},
	}
	if tests != "" {
		files["tests/a.yaml"] = &fstest.MapFile{Data: []byte(tests)}
	}
	p, err := mesh.ParseFS(files, domain)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestDemoPoliciesAreGreenAndClean(t *testing.T) {
	p, err := mesh.ParseFS(policies.FS, domain)
	if err != nil {
		t.Fatal(err)
	}
	rep := Test(p)
	if err := rep.Err(); err != nil {
		t.Error(err)
	}
	if len(rep.Results) < 14 || rep.Covered() != len(rep.Rows) {
		t.Errorf("%d cases cover %d of %d rows", len(rep.Results), rep.Covered(), len(rep.Rows))
	}
	for _, f := range Lint(p, now) {
		t.Error(f)
	}
}

const call = "tests:\n  - name: web may charge\n    from: web\n    to: billing\n    verb: %VERB\n    path: %PATH\n    want: %WANT\n"

func TestTestSaysWhyACaseIsRed(t *testing.T) {
	const row = "p, pay-1, in, $web, $billing, 8443, POST, /v1/charges, %COND, %EFT\n"
	for _, c := range []struct {
		name, cond, eft, verb, path, want, extra, why string
	}{
		{name: "another verb", verb: "GET", want: "allow", why: "want allow, got deny (no row matches: nearest is pay-1, verb differs)"},
		{name: "another path and verb", verb: "GET", path: "/v2", want: "allow", why: "want allow, got deny (no row matches: nearest is pay-1, verb and path differ)"},
		{name: "a deny", eft: "deny", want: "allow", why: "want allow, got deny (denied by pay-1)"},
		{name: "an allow", want: "deny", why: "want deny, got allow (allowed by pay-1)"},
		{name: "a condition", cond: "env.name=prod", want: "allow", why: `want allow, got deny (no row matches: nearest is pay-1, whose condition "env.name=prod" does not hold)`},
		{name: "another row", want: "allow", extra: "    rule: other\n", why: "want allow by row other, got allow (allowed by pay-1)"},
		{name: "a path with two spellings", path: "/v1/../x", want: "allow", why: "want allow, got deny (no row can speak of such a call: it is refused before rows are asked)"},
		{name: "as wanted", want: "allow"},
		{name: "as wanted with the condition", cond: "env.name=prod", want: "allow", extra: "    env: prod\n"},
		{name: "as wanted with a token", cond: "iss=https://ci.example scope~pay acr>=2 claim.a=b bound aud=x", want: "allow", extra: "    token: {iss: https://ci.example, scope: [pay], acr: 3, claims: {a: b}, bound: true, aud: [x]}\n"},
		{name: "a token without the scope", cond: "scope~pay", want: "deny", extra: "    token: {scope: [read]}\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			or := func(s, d string) string {
				if s == "" {
					return d
				}
				return s
			}
			access := strings.NewReplacer("%COND", or(c.cond, "-"), "%EFT", or(c.eft, "allow")).Replace(row) +
				"p, other, in, $billing, $web, 8443, GET, /x, -, allow\n"
			tests := strings.NewReplacer("%VERB", or(c.verb, "POST"), "%PATH", or(c.path, "/v1/charges"), "%WANT", c.want).Replace(call) + c.extra
			rep := Test(parse(t, access, tests))
			want := ""
			if c.why != "" {
				want = `tests/a.yaml:2: "web may charge": ` + c.why
			}
			got := ""
			if err := rep.Err(); err != nil {
				got = err.Error()
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if len(rep.Failed()) != strings.Count(want, "want ") && c.why != "" {
				t.Errorf("%d failed", len(rep.Failed()))
			}
		})
	}
}

func TestTestOfEgress(t *testing.T) {
	rep := Test(parse(t, "p, out-1, out, $billing, host:api.stripe.test, 443, CONNECT, -, env.sni=same, allow\n", `tests:
  - {name: same name, from: billing, to: "host:api.stripe.test", port: 443, sni: api.stripe.test, want: allow, rule: out-1}
  - {name: other name, from: billing, to: "host:api.stripe.test", port: 443, sni: evil.test, want: deny}
  - {name: other caller, from: web, to: "host:api.stripe.test", port: 443, sni: api.stripe.test, want: deny}
`))
	if err := rep.Err(); err != nil {
		t.Error(err)
	}
	if rep.Rows[0].Cases != 1 {
		t.Errorf("row decided %d cases, want 1", rep.Rows[0].Cases)
	}
}

func TestNothingIsTestedThatIsInvalid(t *testing.T) {
	if err := Test(&mesh.Policies{}).Err(); err == nil {
		t.Error("policies without trust domain were accepted")
	}
	p := parse(t, "", "")
	c, err := mesh.Check(p, nil)
	if err == nil {
		err = Red(c)
	}
	if err != nil {
		t.Errorf("no tests: %v", err)
	}
	p.Rules = append(p.Rules, mesh.Rule{ID: "x"})
	if _, ok := errors.AsType[mesh.Errors](Test(p).Err()); !ok {
		t.Error("an empty row was accepted")
	}
}

func TestLintFinds(t *testing.T) {
	for _, c := range []struct {
		name, access string
		check        Check
		subject      string
	}{
		{"an allow that a deny covers", "p, a, in, $web, $billing, 8443, GET, /v1/x, -, allow\np, d, in, $td/**, **, *, GET|POST, /v1/**, -, deny\n", Shadowed, "a"},
		{"an allow that a deny covers through groups", "g, $web, group:g\ng, $billing, group:g\np, a, in, $web, $billing, 8443, GET, /v1/x, bound, allow\np, d, in, group:g, $billing, *, *, **, -, deny\n", Shadowed, "a"},
		{"the second of two equal rows", "p, a, in, $web, $billing, 8443, GET, /v1, -, allow\np, b, in, $web, $billing, 8443, GET, /v1, -, allow\n", Redundant, "b"},
		{"a narrower row", "p, a, in, $web, $billing, 8443, GET, /v1/a, -, allow\np, b, in, $web, $billing, 8443, GET|POST, /v1/**, -, allow\n", Redundant, "a"},
		{"a caller nobody can be", "p, a, in, $td/ns/shop/sa/wob, $billing, 8443, GET, /v1, -, allow\n", Unreachable, "a"},
		{"a destination that is no service", "p, a, in, $web, $td/ns/shop/sa/x, 8443, GET, /v1, -, allow\n", Unreachable, "a"},
		{"a port no service has", "p, a, in, $web, $billing, 9000, GET, /v1, -, allow\n", Unreachable, "a"},
		{"a host without destination", "p, a, out, $web, host:files.stripe.test, 443, CONNECT, -, -, allow\n", NoDestination, "a"},
		{"a host in a group without destination", "g2, host:files.stripe.test, hosts:x\np, a, out, $web, hosts:x, 443, CONNECT, -, -, allow\n", NoDestination, "a"},
		{"a group nobody names", "g, $web, group:idle\n", UnusedGroup, "group:idle"},
		{"a destination nobody may reach", "", UnusedDestination, "api.stripe.test"},
		{"an allow for everyone", "p, a, in, **, $billing, 8443, GET, /v1, -, allow\n", Broad, "a"},
		{"an allow to everything", "p, a, in, $web, *, 8443, GET, /v1, -, allow\n", Broad, "a"},
		{"an allow of everything", "p, a, in, $web, $billing, 8443, *, **, -, allow\n", Broad, "a"},
		{"a row that has ended", "p, a, in, $web, $billing, 8443, GET, /v1, until=2026-11-22T10:00:00Z, allow\n", Expired, "a"},
		{"a deny that asks for a token", "p, d, in, $web, $billing, 8443, GET, /v1, scope~admin, deny\n", Leaky, "d"},
		{"a deny that asks for a server name", "p, d, out, $web, host:api.stripe.test, *, CONNECT, -, env.sni=same, deny\n", Leaky, "d"},
		{"a deny of names below that leaves the apex", "p, a, out, $web, host:stripe.test, 443, CONNECT, -, -, allow\np, d, out, **, host:*.stripe.test, *, *, **, -, deny\n", Leaky, "d"},
		{"a deny of names below that leaves the deeper ones", "g2, host:a.b.stripe.test, hosts:x\np, a, out, $web, hosts:x, 443, CONNECT, -, -, allow\np, d, out, **, host:*.stripe.test, *, *, **, -, deny\n", Leaky, "d"},
		{"a row for tokens without an issuer", "p, a, in, $web, $billing, 8443, GET, /v1, iss=https://ci.example, allow\n", Unreachable, "a"},
		{"a row without test", "p, a, in, $web, $billing, 8443, GET, /v1, -, allow\n", Untested, "a"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var all []string
			for _, f := range Lint(parse(t, c.access, ""), now) {
				if f.Check == c.check && f.Subject == c.subject {
					return
				}
				all = append(all, f.String())
			}
			t.Errorf("no finding %s about %s in:\n%s", c.check, c.subject, strings.Join(all, "\n"))
		})
	}
}

func TestLintFindsRowsThatNoTokenFulfils(t *testing.T) {
	for cond, want := range map[string]Check{
		"iss=https://ci.example": "", "iss=apikey": Unreachable, "iss=https://ci.example/": Unreachable, "scope~pay": Broad, "until=2036-11-22T10:00:00Z": "",
	} {
		p := parse(t, "p, a, in, $web, $billing, 8443, GET, /v1, "+cond+", allow\n", "")
		p.Tokens = &mesh.Tokens{Issuers: []mesh.TokenIssuer{{
			Issuer: "https://ci.example", Profile: mesh.ProfileJWT, Audiences: []string{"billing"}, Algorithms: []string{"ES256"}, Keys: mesh.KeySet{File: "/keys"},
			MaxLifetime: time.Hour, MaxBytes: 8192, MaxClaims: 64, Binding: mesh.BindNone,
		}}}
		var got []Check
		for _, f := range Lint(p, now) {
			if f.Subject == "a" && f.Check != Untested {
				got = append(got, f.Check)
			}
		}
		if want == "" && len(got) > 0 || want != "" && !slices.Equal(got, []Check{want}) {
			t.Errorf("%s: %v, want %s", cond, got, want)
		}
	}
}

func TestLintFindsTestsThatDependOnTheHour(t *testing.T) {
	access := "p, a, in, $web, $billing, 8443, GET, /v1, when=Mon-Fri/08:00-18:00, allow\n"
	tests := "tests:\n  - {name: timed, from: web, to: billing, verb: GET, path: /v1, want: allow%s}\n"
	has := func(at string) bool {
		for _, f := range Lint(parse(t, access, strings.Replace(tests, "%s", at, 1)), now) {
			if f.Check == TimeDependent {
				return true
			}
		}
		return false
	}
	if !has("") || has(", now: 2026-11-23T10:00:00Z") {
		t.Error("a test without a time is not found, or one with a time is")
	}
}

func TestLintFindsServicesWithoutEntry(t *testing.T) {
	p := parse(t, "", "")
	p.Entries = p.Entries[:1]
	for _, f := range Lint(p, now) {
		if f.Check == NoEntry && f.Subject == "billing" {
			return
		}
	}
	t.Error("not found")
}

func TestLintLeavesDifferentRowsAlone(t *testing.T) {
	p := parse(t, `p, a, in, $web, $billing, 8443, GET, /v1/x, -, allow
p, b, in, $web, $billing, 8443, GET, /v1/*/y, -, allow
p, c, in, $web, $billing, 8443, POST, /v1/x, -, allow
p, d, in, $web, $billing, 8443, GET, /v1/x/**, env.name=prod, deny
p, e, in, $billing, $web, 8443, GET, /v1/x, -, deny
p, f, out, $web, host:api.stripe.test, 443, CONNECT, -, -, allow
p, g, out, $web, host:*.stripe.test, 80, CONNECT, -, -, deny
`, "")
	for _, f := range Lint(p, now) {
		if f.Check != Untested {
			t.Error(f)
		}
	}
}

// What covers says must agree with what the matchers say.
func TestCoversIsSound(t *testing.T) {
	patterns := []string{"/", "/a", "/a/", "/a/b", "/*", "/*/b", "/a/*", "/a/**", "/**", "/*/**", "**", "/a/*/**", "-"}
	paths := []string{"/", "/a", "/a/", "/a/b", "/b", "/b/b", "/a/b/c", "/a//", "-", "/c/d/e/f"}
	for _, a := range patterns {
		for _, b := range patterns {
			if !coversPath(a, b) {
				continue
			}
			for _, p := range paths {
				if mesh.MatchPath(b, p) && !mesh.MatchPath(a, p) {
					t.Errorf("%q is said to cover %q but not %q", a, b, p)
				}
			}
		}
	}
	refs := []string{"**", "spiffe://td/**", "spiffe://td/a", "spiffe://td/*", "spiffe://td/a/*", "spiffe://td/a/**", "spiffe://other/**"}
	ids := []string{"spiffe://td/a", "spiffe://td/b", "spiffe://td/a/b", "spiffe://td/a/b/c", "spiffe://other/a", "spiffe://td"}
	for _, a := range refs {
		for _, b := range refs {
			for _, id := range ids {
				if coversRef(a, b) && mesh.MatchSrc(b, id) && !mesh.MatchSrc(a, id) {
					t.Errorf("%q is said to cover %q but not %q", a, b, id)
				}
			}
		}
	}
}

func TestCoverageOfConditions(t *testing.T) {
	const rows = "p, a, in, $web, $billing, 8443, GET, /a, iss=i scope~s, allow\np, b, in, $web, $billing, 8443, GET, /b, unless.src=$td/x, allow\n"
	header := "tests:\n  - {name: one, from: web, to: billing, verb: GET, path: /a, token: {iss: i, scope: [s]}, want: allow}\n"
	for _, tt := range []struct {
		name, cases string
		want        []int // of iss=i, scope~s, unless.src
		coverage    int
	}{
		{"nothing fails", "", []int{0, 0, 0}, 20},
		{"one condition alone fails", "  - {name: two, from: web, to: billing, verb: GET, path: /a, token: {iss: i}, want: deny}\n", []int{0, 1, 0}, 40},
		{"two fail at once, which shows neither", "  - {name: two, from: web, to: billing, verb: GET, path: /a, want: deny}\n", []int{0, 0, 0}, 20},
		{"another column fails too", "  - {name: two, from: web, to: billing, verb: POST, path: /a, token: {iss: i}, want: deny}\n", []int{0, 0, 0}, 20},
		{"the other issuer", "  - {name: two, from: web, to: billing, verb: GET, path: /a, token: {iss: j, scope: [s]}, want: deny}\n", []int{1, 0, 0}, 40},
		{"another row", "  - {name: two, from: web, to: billing, verb: GET, path: /b, want: allow}\n", []int{0, 0, 0}, 40},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rep := Test(parse(t, rows, header+tt.cases))
			if err := rep.Err(); err != nil {
				t.Fatal(err)
			}
			var got []int
			for _, row := range rep.Rows {
				for _, c := range row.Conds {
					got = append(got, c.Cases)
				}
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
			if got := rep.Coverage(); got != tt.coverage {
				t.Errorf("coverage %d%%, want %d%%", got, tt.coverage)
			}
		})
	}
}
