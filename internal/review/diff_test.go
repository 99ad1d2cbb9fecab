package review

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
)

// moment is a Wednesday, so that a window of the week lies on both sides of it.
var moment = time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)

func rules(t testing.TB, rows ...string) *mesh.Policies {
	t.Helper()
	p := &mesh.Policies{TrustDomain: meshtest.TD}
	for i, row := range rows {
		f := strings.Split(row, ",")
		for j := range f {
			f[j] = strings.TrimSpace(f[j])
		}
		switch f[0] {
		case "g", "g2":
			p.Memberships = append(p.Memberships, mesh.Membership{Kind: mesh.GroupKind(f[0]), Member: f[1], Group: f[2]})
		default:
			p.Rules = append(p.Rules, mesh.Rule{
				ID: fmt.Sprintf("r%d", i), Dir: mesh.Direction(f[0]), Src: f[1], Dst: f[2], Port: f[3],
				Verb: f[4], Path: f[5], Cond: f[6], Effect: mesh.Effect(f[7]),
			})
		}
	}
	return p
}

const (
	idA = "spiffe://demo.sallyport/ns/a/sa/x"
	idB = "spiffe://demo.sallyport/ns/b/sa/y"
)

func TestDiffTellsWhatChanged(t *testing.T) {
	base := "in, " + idA + ", " + idB + ", 8443, GET, /v1/**, -, allow"
	for _, tt := range []struct {
		name     string
		old, new []string
		want     []string
	}{
		{"nothing", []string{base}, []string{base}, nil},
		{"a row that another one covers", []string{base}, []string{base, "in, " + idA + ", " + idB + ", 8443, GET, /v1/a, -, allow"}, nil},
		{"one more verb", []string{base}, []string{"in, " + idA + ", " + idB + ", 8443, GET|POST, /v1/**, -, allow"},
			[]string{"allow in " + idA + " -> " + idB + ":8443 POST /v1/** []"}},
		{"verbs that no row tells apart", nil, []string{"in, " + idA + ", " + idB + ", 8443, GET|POST, /v1/**, -, allow"},
			[]string{"allow in " + idA + " -> " + idB + ":8443 GET|POST /v1/** []"}},
		{"all but such verbs", []string{"in, " + idA + ", " + idB + ", 8443, *, /v1/**, -, allow"},
			[]string{"in, " + idA + ", " + idB + ", 8443, *, /v1/**, -, allow", "in, " + idA + ", " + idB + ", *, PUT|POST, /**, -, deny"},
			[]string{"deny in " + idA + " -> " + idB + ":8443 POST|PUT /v1/** []"}},
		{"a deny inside", []string{base}, []string{base, "in, **, " + idB + ", *, *, /v1/secret, -, deny"},
			[]string{"deny in " + idA + " -> " + idB + ":8443 GET /v1/secret []"}},
		{"a narrower path", []string{base}, []string{"in, " + idA + ", " + idB + ", 8443, GET, /v1/*, -, allow"},
			[]string{"deny in " + idA + " -> " + idB + ":8443 GET /v1/** except /v1/* []"}},
		{"a new member of a group",
			[]string{"g, " + idA + ", group:g", "in, group:g, " + idB + ", 8443, GET, /, -, allow"},
			[]string{"g, " + idA + ", group:g", "g, " + idB + ", group:g", "in, group:g, " + idB + ", 8443, GET, /, -, allow"},
			[]string{"allow in " + idB + " -> " + idB + ":8443 GET / []"}},
		{"a group written out", []string{"g, " + idA + ", group:g", "in, group:g, " + idB + ", 8443, GET, /, -, allow"},
			[]string{"in, " + idA + ", " + idB + ", 8443, GET, /, -, allow"}, nil},
		{"a condition", []string{base}, []string{"in, " + idA + ", " + idB + ", 8443, GET, /v1/**, iss=https://ci.example scope~deploy, allow"},
			[]string{
				"deny in " + idA + " -> " + idB + ":8443 GET /v1/** [no token]",
				"deny in " + idA + " -> " + idB + ":8443 GET /v1/** [not iss=https://ci.example]",
				"deny in " + idA + " -> " + idB + ":8443 GET /v1/** [iss=https://ci.example; not scope~deploy]",
			}},
		{"an end that has passed", []string{base}, []string{base, "in, " + idB + ", " + idA + ", 8443, GET, /, until=2026-01-01T00:00:00Z, allow"}, nil},
		{"an end to come", nil, []string{"in, " + idA + ", " + idB + ", 8443, GET, /, until=2027-01-01T00:00:00Z, allow"},
			[]string{"allow in " + idA + " -> " + idB + ":8443 GET / [until=2027-01-01T00:00:00Z]"}},
		{"a row between rows of the other direction",
			[]string{"out, " + idA + ", host:x.example, 443, CONNECT, -, -, allow"},
			[]string{"out, " + idA + ", host:x.example, 443, CONNECT, -, -, allow", base},
			[]string{"allow in " + idA + " -> " + idB + ":8443 GET /v1/** []"}},
		{"a host outside", nil, []string{"out, " + idA + ", host:*.example.com, 443, CONNECT, -, env.sni=same, allow"},
			[]string{"allow out " + idA + " -> host:*.example.com:443 CONNECT - [env.sni=same]"}},
		{"everybody but one", nil, []string{"in, **, " + idB + ", 8443, GET, /, unless.src=" + idA + ", allow"},
			[]string{"allow in any except " + idA + " -> " + idB + ":8443 GET / []"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cells, err := Diff(rules(t, tt.old...), rules(t, tt.new...), moment)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, c := range cells {
				got = append(got, fmt.Sprintf("%s %s %s -> %s:%s %s %s [%s]", c.Effect, c.Dir, c.Src, c.Dst, c.Port, c.Verb, c.Path, c.When))
				if !c.Covers(&c.Witness.call) {
					t.Errorf("the witness %s is not in its cell", c.Witness)
				}
			}
			slices.Sort(got)
			slices.Sort(tt.want)
			if !slices.Equal(got, tt.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
			}
		})
	}
}

// universe has calls for every value that randomRules writes, and for values
// that no row writes.
func universe() []authz.Call {
	var out []authz.Call
	tokens := []*authz.Token{
		nil, {},
		{Issuer: "i", Scopes: map[string]bool{"s": true}, ACR: 1},
		{Issuer: "j", Audience: []string{"a"}, Claims: map[string]string{"k": "v"}, ACR: 3, Bound: true},
		{Issuer: "i", Audience: []string{"a"}, Claims: map[string]string{"k": "w"}, Scopes: map[string]bool{"s": true}, Bound: true},
	}
	moments := []time.Time{moment, moment.AddDate(0, 0, 3), moment.AddDate(1, 0, 0), moment.AddDate(1, 0, 3)}
	srcs := []string{idA, idB, "spiffe://demo.sallyport/ns/a/sa/z", "spiffe://demo.sallyport/ns", "spiffe://other.example/ns/a/sa/x"}
	ends := []struct {
		dir  mesh.Direction
		dst  string
		more []string // "verb path" or a server name
	}{
		{mesh.In, idA, []string{"GET /", "POST /a", "GET /a/b", "GET /a/", "PUT /a/b/c", "GET /c"}},
		{mesh.In, idB, []string{"GET /", "POST /a", "GET /a/b", "CONNECT -"}},
		{mesh.Out, "host:x.example", []string{"", "x.example"}},
		{mesh.Out, "host:y.x.example", []string{"", "y.x.example"}},
		{mesh.Out, "host:example", []string{"", "example"}},
	}
	for _, s := range srcs {
		src := spiffeid.RequireFromString(s)
		for _, e := range ends {
			for _, m := range e.more {
				for i, tok := range tokens {
					for j, at := range moments {
						c := authz.Call{Dir: e.dir, Src: src, Dst: e.dst, Port: uint16(80 + (i+j)%2*363), Token: tok, Now: at}
						c.Environment = []string{"", "prod", "test"}[(i+2*j)%3]
						if e.dir == mesh.In {
							c.Verb, c.Path, _ = strings.Cut(m, " ")
						} else {
							c.Verb, c.Path, c.SNI = "CONNECT", "-", m
						}
						out = append(out, c)
					}
				}
			}
		}
	}
	return out
}

func randomRules(r *rand.Rand) *mesh.Policies {
	pick := func(s ...string) string { return s[r.IntN(len(s))] }
	p := &mesh.Policies{TrustDomain: meshtest.TD}
	for range r.IntN(3) {
		p.Memberships = append(p.Memberships,
			mesh.Membership{Kind: mesh.CallerGroup, Member: pick(idA, idB), Group: "group:g"},
			mesh.Membership{Kind: mesh.DestinationGroup, Member: pick("host:x.example", "host:y.x.example"), Group: "hosts:h"})
	}
	slices.SortFunc(p.Memberships, func(a, b mesh.Membership) int { return strings.Compare(a.Group+a.Member, b.Group+b.Member) })
	p.Memberships = slices.CompactFunc(p.Memberships, func(a, b mesh.Membership) bool { return a == b })
	for i := range r.IntN(5) {
		rule := mesh.Rule{ID: fmt.Sprintf("r%d", i), Dir: mesh.In, Port: pick("*", "80", "443"), Effect: mesh.Effect(pick("allow", "allow", "deny"))}
		rule.Src = pick(mesh.Any, idA, idB, "spiffe://demo.sallyport/**", "spiffe://demo.sallyport/ns/*/sa/x", "spiffe://demo.sallyport/ns/a/**", "spiffe://other.example/**")
		if len(p.Memberships) > 0 && r.IntN(3) == 0 {
			rule.Src = "group:g"
		}
		conds := []string{"iss=i", "iss=j", "aud=a", "scope~s", "claim.k=v", "claim.k=w", "acr>=1", "acr>=2", "bound",
			"env.name=prod", "env.name=test", "when=Sat-Sun/08:00-18:00", "when=Wed/11:00-13:00",
			"until=2027-01-01T00:00:00Z", "unless.src=" + idA, "unless.src=spiffe://demo.sallyport/ns/b/**"}
		if r.IntN(3) == 0 {
			rule.Dir, rule.Verb, rule.Path = mesh.Out, "CONNECT", "-"
			rule.Dst = pick("host:x.example", "host:*.x.example", "host:*.y.x.example", "host:example")
			if len(p.Memberships) > 0 && r.IntN(3) == 0 {
				rule.Dst = "hosts:h"
			}
			conds = append(conds, "env.sni=same", "env.sni=same")
		} else {
			rule.Dst = pick("*", idA, idB, "spiffe://demo.sallyport/ns/b/**")
			rule.Verb, rule.Path = pick("*", "GET", "GET|POST", "PUT|POST"), pick("**", "/", "/a", "/a/**", "/*", "/a/*", "/a/", "/*/b")
		}
		rule.Cond = "-"
		if n := r.IntN(3); n > 0 {
			words := map[string]string{}
			for range n {
				w := pick(conds...)
				words[strings.FieldsFunc(w, func(c rune) bool { return c == '=' || c == '~' })[0]] = w
			}
			var ws []string
			for _, w := range words {
				ws = append(ws, w)
			}
			slices.Sort(ws)
			rule.Cond = strings.Join(ws, " ")
		}
		p.Rules = append(p.Rules, rule)
	}
	return p
}

// TestDiffAgreesWithBruteForce judges every call of a small universe by both
// sets: what changed is in a cell of the same effect, what did not is in none.
func TestDiffAgreesWithBruteForce(t *testing.T) {
	calls := universe()
	pairs := 10_000
	if testing.Short() || meshtest.Race { // make test compares all of them without
		pairs = 500
	}
	r := rand.New(rand.NewPCG(1, 2))
	cellCount, changes := 0, 0
	for i := range pairs {
		old, new := randomRules(r), randomRules(r)
		if r.IntN(2) == 0 { // an edit, as people make them
			new = &mesh.Policies{TrustDomain: old.TrustDomain, Memberships: old.Memberships, Rules: slices.Clone(old.Rules)}
			extra := randomRules(r)
			for _, rule := range extra.Rules {
				if !mesh.IsGroup(rule.Src) && !mesh.IsGroup(rule.Dst) {
					rule.ID = "new"
					new.Rules = append(new.Rules, rule)
					break
				}
			}
		}
		cells, err := Diff(old, new, moment)
		if err != nil {
			t.Fatalf("pair %d: %v\nold %s\nnew %s", i, err, written(old), written(new))
		}
		cellCount += len(cells)
		was, err := judgeOf(old)
		if err != nil {
			t.Fatal(err)
		}
		is, err := judgeOf(new)
		if err != nil {
			t.Fatal(err)
		}
		for j := range calls {
			c := &calls[j]
			a, b := was.Decide(c).Allow, is.Decide(c).Allow
			var in []mesh.Effect
			for k := range cells {
				if cells[k].Covers(c) {
					in = append(in, cells[k].Effect)
				}
			}
			var want []mesh.Effect
			if a != b {
				changes++
				want = []mesh.Effect{mesh.Deny}
				if b {
					want[0] = mesh.Allow
				}
			}
			if !slices.Equal(in, want) {
				t.Fatalf("pair %d: %+v (token %+v) was %v, is %v, but is in cells %v\nold %s\nnew %s", i, c, c.Token, a, b, in, written(old), written(new))
			}
		}
	}
	t.Logf("%d pairs, %d calls each, %d changed decisions, %d cells", pairs, len(calls), changes, cellCount)
	if changes == 0 {
		t.Error("no decision changed: the test shows nothing")
	}
}

func written(p *mesh.Policies) string {
	var b strings.Builder
	for _, m := range p.Memberships {
		fmt.Fprintf(&b, "\n  %s in %s", m.Member, m.Group)
	}
	for _, r := range p.Rules {
		fmt.Fprintf(&b, "\n  %s %s %s %s %s %s %s %s", r.Dir, r.Src, r.Dst, r.Port, r.Verb, r.Path, r.Cond, r.Effect)
	}
	return b.String()
}
