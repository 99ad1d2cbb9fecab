package route

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var domain = spiffeid.RequireTrustDomainFromString("demo.sallyport")

// compiled is the set of one file of routes of the service billing.
func compiled(t testing.TB, f mesh.Routes, members ...mesh.Membership) *Set {
	t.Helper()
	f.Service = "billing"
	table, err := Compile(&mesh.Snapshot{TrustDomain: domain, Routes: []mesh.Routes{f}, Memberships: members}, Options{Region: func(db string, a netip.Addr) string {
		return map[string]string{"10.9.0.1": "DE"}[a.String()]
	}})
	if err != nil {
		t.Fatal(err)
	}
	return table.Of("billing")
}

func call(method, target string, fields ...string) *Call {
	path, query, _ := strings.Cut(target, "?")
	c := &Call{Method: []byte(method), Path: []byte(path), Query: []byte(query), Caller: "spiffe://demo.sallyport/ns/shop/sa/web"}
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		c.Fields = append(c.Fields, http1.Field{Name: []byte(name), Value: []byte(value)})
	}
	binary.BigEndian.PutUint64(c.Trace[:], rand.Uint64())
	return c
}

func nameOf(c Choice) string {
	if c.Route == nil {
		return ""
	}
	return c.Route.Name
}

func TestTheMostSpecificMatchWins(t *testing.T) {
	text := func(name, value string) mesh.NamedText {
		return mesh.NamedText{Name: name, Text: mesh.Text{Exact: value}}
	}
	path := func(kind, s string) *mesh.Text {
		switch kind {
		case "exact":
			return &mesh.Text{Exact: s}
		case "regex":
			return &mesh.Text{Regex: s}
		}
		return &mesh.Text{Prefix: s}
	}
	// The least specific stand first: the order of the file is the last resort.
	s := compiled(t, mesh.Routes{Routes: []mesh.Route{
		{Name: "any"},
		{Name: "any-again"},
		{Name: "from", Matches: []mesh.Match{{From: []string{"spiffe://demo.sallyport/ns/ops/**"}}}},
		{Name: "group", Matches: []mesh.Match{{From: []string{"group:ci"}, Query: []mesh.NamedText{text("q", "a b")}}}},
		{Name: "header", Matches: []mesh.Match{{Headers: []mesh.NamedText{text("X-A", "1")}}}},
		{Name: "headers", Matches: []mesh.Match{{Headers: []mesh.NamedText{text("x-a", "1"), text("x-b", "1")}}}},
		{Name: "delete", Matches: []mesh.Match{{Method: "DELETE"}}},
		{Name: "v1", Matches: []mesh.Match{{Path: path("prefix", "/v1")}}},
		{Name: "v1-slash", Matches: []mesh.Match{{Path: path("prefix", "/v1/")}}},
		{Name: "v1-charges", Matches: []mesh.Match{{Path: path("prefix", "/v1/charges")}}},
		{Name: "numbers", Matches: []mesh.Match{{Path: path("regex", "/v1/charges/[0-9]+")}}},
		{Name: "one", Matches: []mesh.Match{{Path: path("exact", "/v1/charges/1")}}},
		{Name: "one-post", Matches: []mesh.Match{{Path: path("exact", "/v1/charges/1"), Method: "POST"}}},
		{Name: "rpc-service", Matches: []mesh.Match{{GRPC: &mesh.GRPCMethod{Service: "shop.v1.Billing"}}}},
		{Name: "rpc-method", Matches: []mesh.Match{{GRPC: &mesh.GRPCMethod{Method: "Charge"}}}},
		{Name: "rpc", Matches: []mesh.Match{{GRPC: &mesh.GRPCMethod{Service: "shop.v1.Billing", Method: "Refund"}}}},
		{Name: "gold", Matches: []mesh.Match{{Path: path("exact", "/lounge"), Claims: map[string]string{"tier": "gold"}}}},
		{Name: "eu", Matches: []mesh.Match{{Path: path("exact", "/region"), Region: &mesh.Region{In: []string{"eu"}, Ranges: map[string][]netip.Prefix{
			"eu": {netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00:1::/32")}, "us": {netip.MustParsePrefix("10.2.0.0/16")}}}}}},
		{Name: "de", Matches: []mesh.Match{{Path: path("exact", "/region"), Region: &mesh.Region{In: []string{"DE"}, Database: "geo"}}}},
		{Name: "edge", Matches: []mesh.Match{{Path: path("exact", "/region"), Region: &mesh.Region{In: []string{"asia"}, Header: "X-Region"}}}},
		{Name: "no-debug", Matches: []mesh.Match{{Path: path("exact", "/debug"), Headers: []mesh.NamedText{{Name: "x-debug", Text: mesh.Text{Present: true, Not: true}}}}}},
	}}, mesh.Membership{Kind: mesh.CallerGroup, Member: "group:robots", Group: "group:ci"}, mesh.Membership{Kind: mesh.CallerGroup, Member: "spiffe://demo.sallyport/ns/ci/sa/r", Group: "group:robots"})
	at := func(c *Call, addr string) *Call { c.Addr = netip.MustParseAddr(addr); return c }
	by := func(c *Call, id string) *Call { c.Caller = "spiffe://demo.sallyport" + id; return c }
	gold := call("GET", "/lounge")
	gold.Claim = func(name string) string { return map[string]string{"tier": "gold"}[name] }
	for _, tt := range []struct {
		c    *Call
		want string
	}{
		{call("GET", "/"), "any"},
		{call("OPTIONS", "*"), "any"},
		{by(call("GET", "/"), "/ns/ops/sa/x/y"), "from"},
		{by(call("GET", "/?q=a+b"), "/ns/ci/sa/r"), "group"},
		{by(call("GET", "/?x=1&q=%61%20b&q=c"), "/ns/ci/sa/r"), "group"},
		{by(call("GET", "/?q=c&q=a+b"), "/ns/ci/sa/r"), "any"},
		{call("GET", "/?q=a+b"), "any"},
		{call("GET", "/", "x-A: 1"), "header"},
		{call("GET", "/", "x-A: 2", "x-a: 1"), "any"},
		{call("GET", "/", "X-B: 1", "X-A: 1"), "headers"},
		{call("DELETE", "/", "X-A: 1"), "delete"},
		{call("DELETE", "/v1"), "v1"},
		{call("GET", "/v1/"), "v1"},
		{call("GET", "/v1/x"), "v1"},
		{call("GET", "/v1x"), "any"},
		{call("GET", "/v1/charges/a"), "v1-charges"},
		{call("GET", "/v1/charges/22"), "numbers"},
		{call("GET", "/v1/charges/22/"), "v1-charges"},
		{call("GET", "/v1/charges/1"), "one"},
		{call("POST", "/v1/charges/1"), "one-post"},
		{call("POST", "/shop.v1.Billing/Get"), "rpc-service"},
		{call("POST", "/shop.v1.Billing/Refund"), "rpc"},
		{call("POST", "/other.Service/Charge"), "rpc-method"},
		{call("POST", "/a/b/Charge"), "any"},
		{call("POST", "//Charge"), "any"},
		{call("GET", "/lounge"), "any"},
		{gold, "gold"},
		{at(call("GET", "/region"), "10.1.2.3"), "eu"},
		{at(call("GET", "/region"), "::ffff:10.1.2.3"), "eu"},
		{at(call("GET", "/region"), "fd00:1::7"), "eu"},
		{at(call("GET", "/region"), "10.2.2.3"), "any"},
		{at(call("GET", "/region"), "10.9.0.1"), "de"},
		{call("GET", "/region", "x-region: asia"), "edge"},
		{call("GET", "/region"), "any"},
		{call("GET", "/debug"), "no-debug"},
		{call("GET", "/debug", "X-Debug: "), "any"},
	} {
		got, steps := s.Explain(tt.c)
		if nameOf(got) != tt.want {
			t.Errorf("%s %s?%s: %s, want %s", tt.c.Method, tt.c.Path, tt.c.Query, nameOf(got), tt.want)
		}
		if last := steps[len(steps)-1]; last.Fails != "" || last.Route != nameOf(got) {
			t.Errorf("%s %s is explained by %+v", tt.c.Method, tt.c.Path, steps)
		}
	}
}

func TestACallThatNothingMatchesHasNoRoute(t *testing.T) {
	s := compiled(t, mesh.Routes{Routes: []mesh.Route{{Name: "a", Matches: []mesh.Match{{Path: &mesh.Text{Exact: "/a"}}}}}})
	c := s.Match(call("GET", "/b"))
	if c.Route != nil || c.Levels() != 0 || c.Backend(0) != nil {
		t.Errorf("%+v", c)
	}
	none := &Table{}
	if none.Of("billing") != nil {
		t.Error("routes of nobody")
	}
}

func TestCompileRefusesWhatMeansNothing(t *testing.T) {
	for _, r := range []mesh.Route{{}, {Name: "a", Matches: []mesh.Match{{Path: &mesh.Text{Regex: "("}}}}, {Name: "a", Faults: []mesh.Fault{{Name: "x"}}}} {
		if _, err := Compile(&mesh.Snapshot{TrustDomain: domain, Routes: []mesh.Routes{{Service: "billing", Routes: []mesh.Route{r}}}}, Options{}); err == nil {
			t.Errorf("%+v is compiled", r)
		}
	}
}

// oracle is what the documentation says, without any care for speed: every match
// of every route is looked at, and the best kept.
func oracle(f *mesh.Routes, c *Call) string {
	type rank [6]int
	best, name, found := rank{}, "", false
	order := 0
	for _, r := range f.Routes {
		matches := r.Matches
		if len(matches) == 0 {
			matches = []mesh.Match{{}}
		}
		for _, m := range matches {
			order++
			kind, length := 0, 0
			p := string(c.Path)
			switch {
			case m.Path == nil:
			case m.Path.Exact != "":
				if p != m.Path.Exact {
					continue
				}
				kind = 2
			case m.Path.Regex != "":
				if !regexp.MustCompile(`^(?:` + m.Path.Regex + `)$`).MatchString(p) {
					continue
				}
				kind = 1
			default:
				want := strings.TrimRight(m.Path.Prefix, "/")
				if p != want && !strings.HasPrefix(p, want+"/") && want != "" {
					continue
				}
				length = len(want)
			}
			if m.Method != "" && m.Method != string(c.Method) {
				continue
			}
			all := true
			for _, h := range m.Headers {
				i := slices.IndexFunc(c.Fields, func(f http1.Field) bool { return strings.EqualFold(string(f.Name), h.Name) })
				all = all && i >= 0 && string(c.Fields[i].Value) == h.Exact
			}
			if !all {
				continue
			}
			method := 0
			if m.Method != "" {
				method = 1
			}
			now := rank{kind, length, method, len(m.Headers), len(m.Query), -order}
			if !found || slices.Compare(now[:], best[:]) > 0 {
				best, name, found = now, r.Name, true
			}
		}
	}
	return name
}

// randomRoutes draws from few words, so that much collides.
func randomRoutes(r *rand.Rand) mesh.Routes {
	segments := []string{"a", "b", "ab", "a.b", "%20"}
	path := func() string {
		var b strings.Builder
		for range 1 + r.IntN(3) {
			b.WriteString("/" + segments[r.IntN(len(segments))])
		}
		return b.String()
	}
	var f mesh.Routes
	for i := range 1 + r.IntN(12) {
		rt := mesh.Route{Name: fmt.Sprintf("r%d", i)}
		for range r.IntN(3) {
			var m mesh.Match
			switch r.IntN(5) {
			case 0:
				m.Path = &mesh.Text{Exact: path()}
			case 1:
				m.Path = &mesh.Text{Prefix: path()}
			case 2:
				m.Path = &mesh.Text{Prefix: path() + "/"}
			case 3:
				m.Path = &mesh.Text{Regex: "/a(/b)?"}
			default:
				m.Method = "GET"
			}
			if r.IntN(3) == 0 {
				m.Method = []string{"GET", "POST"}[r.IntN(2)]
			}
			for _, h := range []string{"x-a", "x-b"} {
				if r.IntN(3) == 0 {
					m.Headers = append(m.Headers, mesh.NamedText{Name: h, Text: mesh.Text{Exact: "1"}})
				}
			}
			rt.Matches = append(rt.Matches, m)
		}
		f.Routes = append(f.Routes, rt)
	}
	return f
}

func TestPrecedenceIsThatOfAnObviousOracle(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 400 {
		f := randomRoutes(r)
		s := compiled(t, f)
		for range 60 {
			p := randomRoutes(r).Routes[0].Matches
			target := "/a/b"
			if len(p) > 0 && p[0].Path != nil && p[0].Path.Regex == "" {
				target = p[0].Path.Exact + p[0].Path.Prefix
			}
			c := call([]string{"GET", "POST"}[r.IntN(2)], target)
			for _, h := range []string{"X-A", "x-b"} {
				if r.IntN(2) == 0 {
					c.Fields = append(c.Fields, http1.Field{Name: []byte(h), Value: []byte{"012"[r.IntN(3)]}})
				}
			}
			if got, want := nameOf(s.Match(c)), oracle(&f, c); got != want {
				t.Fatalf("%s %s %s: %s, want %s, of\n%+v", c.Method, c.Path, fmt.Sprint(c.Fields), got, want, f.Routes)
			}
		}
	}
}

func backends(weights ...uint32) []mesh.Backend {
	var out []mesh.Backend
	for i, w := range weights {
		out = append(out, mesh.Backend{Service: mesh.ServiceName(fmt.Sprintf("b%d", i)), Weight: w})
	}
	return out
}

func TestEachBackendGetsItsPart(t *testing.T) {
	for _, weights := range [][]uint32{{9900, 100}, {9999, 1}, {1, 1}, {5, 3, 2}, {0, 1}} {
		s := compiled(t, mesh.Routes{Routes: []mesh.Route{{Name: "a", Backends: backends(weights...)}}})
		const n = 100_000
		got := make([]int, len(weights))
		r := rand.New(rand.NewPCG(3, 4))
		c := call("GET", "/")
		for range n {
			binary.BigEndian.PutUint64(c.Trace[:], r.Uint64())
			ch := s.Match(c)
			got[ch.Backend(0).Index]++
		}
		total := uint32(0)
		for _, w := range weights {
			total += w
		}
		for i, w := range weights {
			part, want := float64(got[i])/n, float64(w)/float64(total)
			if math.Abs(part-want) > 0.002*max(1, 3*min(want, 1-want)/0.3) {
				t.Errorf("weights %d: backend %d got %.4f of the calls, want %.4f", weights, i, part, want)
			}
		}
	}
}

func TestALargerWeightMovesKeysToItsBackendOnly(t *testing.T) {
	choose := func(weights []uint32) []int {
		s := compiled(t, mesh.Routes{Routes: []mesh.Route{{Name: "a", Backends: backends(weights...), Sticky: &mesh.Sticky{By: "header", Name: "X-User"}}}})
		out := make([]int, 20_000)
		for i := range out {
			ch := s.Match(call("GET", "/", fmt.Sprintf("x-user: user-%d", i)))
			out[i] = ch.Backend(0).Index
		}
		return out
	}
	r := rand.New(rand.NewPCG(5, 6))
	for range 12 {
		weights := []uint32{uint32(r.IntN(1000)), uint32(1 + r.IntN(1000)), uint32(r.IntN(1000))}
		raised := r.IntN(3)
		before := choose(weights)
		if again := choose(weights); !slices.Equal(before, again) {
			t.Fatal("a key does not stay where it is")
		}
		more := slices.Clone(weights)
		more[raised] += uint32(1 + r.IntN(500))
		for i, now := range choose(more) {
			if now != before[i] && now != raised {
				t.Fatalf("%d to %d: user %d went from %d to %d", weights, more, i, before[i], now)
			}
		}
	}
}

func TestBackendsOfALaterPriorityWait(t *testing.T) {
	b := backends(1, 1, 1)
	b[0].Priority, b[1].Priority = 2, 1
	s := compiled(t, mesh.Routes{Routes: []mesh.Route{{Name: "a", Backends: b}}})
	c := s.Match(call("GET", "/"))
	if c.Levels() != 3 || c.Backend(0).Name != "b2" || c.Backend(1).Name != "b1" || c.Backend(2).Name != "b0" || c.Backend(3) != nil {
		t.Errorf("%d levels, %v", c.Levels(), c.Backend(0))
	}
}

func TestCallsStayByWhatTheRouteSays(t *testing.T) {
	claims := map[string]string{"sub": "u1"}
	for _, tt := range []struct {
		sticky mesh.Sticky
		field  string
		same   bool
	}{
		{mesh.Sticky{By: "header", Name: "x-user"}, "X-User: u1", true},
		{mesh.Sticky{By: "header", Name: "x-user"}, "X-User: ", false},
		{mesh.Sticky{By: "cookie", Name: "sid"}, "cookie: a=b; sid=u1; c=d", true},
		{mesh.Sticky{By: "cookie", Name: "sid"}, "Cookie: xsid=u1", false},
		{mesh.Sticky{By: "cookie", Name: "sid"}, "Cookie: sid=", false},
		{mesh.Sticky{By: "claim", Name: "sub"}, "", true},
		{mesh.Sticky{By: "claim", Name: "none"}, "", false},
		{mesh.Sticky{By: "caller"}, "", true},
		{mesh.Sticky{By: "trace"}, "", false},
	} {
		s := compiled(t, mesh.Routes{Routes: []mesh.Route{{Name: "a", Backends: backends(1, 1), Sticky: &tt.sticky}}})
		seen := map[int]bool{}
		for range 200 {
			c := call("GET", "/")
			if tt.field != "" {
				c = call("GET", "/", tt.field)
			}
			c.Claim = func(n string) string { return claims[n] }
			ch := s.Match(c)
			seen[ch.Backend(0).Index] = true
		}
		if (len(seen) == 1) != tt.same {
			t.Errorf("%+v with %q: %d backends", tt.sticky, tt.field, len(seen))
		}
	}
}

func TestAppendPath(t *testing.T) {
	for _, tt := range []struct {
		path, whole, prefix, want string
		n                         int
	}{
		{"/a/b", "/x", "", "/x", 0},
		{"/a/b", "", "/x", "/x/b", 2},
		{"/a/b", "", "/x/", "/x/b", 2},
		{"/a/b", "", "/", "/b", 2},
		{"/a", "", "/", "/", 2},
		{"/a/", "", "/x", "/x/", 2},
		{"/a", "", "/x", "/x/a", 0},
	} {
		if got := AppendPath(nil, []byte(tt.path), tt.whole, tt.prefix, tt.n); string(got) != tt.want {
			t.Errorf("%+v: %s", tt, got)
		}
	}
}

func TestDisturbancesAreOfTheirShareAndCallers(t *testing.T) {
	s := compiled(t, mesh.Routes{Routes: []mesh.Route{{Name: "a",
		Faults:  []mesh.Fault{{Name: "f", Share: 500, Reset: true, Callers: []string{"spiffe://demo.sallyport/ns/shop/sa/web"}, Match: []mesh.Match{{Path: &mesh.Text{Prefix: "/v1"}}}, Since: when, Until: when.Add(3600e9)}},
		Shadows: []mesh.Shadow{{Name: "s", Share: 2500, Service: mesh.Backend{Service: "other"}, Match: []mesh.Match{{Method: "GET"}}}},
	}}})
	r := s.Routes[0]
	faults, copies := 0, 0
	for range 20_000 {
		c := call("GET", "/v1/x")
		if r.Faults[0].Touches(c) {
			faults++
		}
		if r.Shadows[0].Copies(c) {
			copies++
		}
		c.Caller = "spiffe://demo.sallyport/ns/shop/sa/other"
		if r.Faults[0].Touches(c) {
			t.Fatal("a fault touches whom it does not name")
		}
		if d := call("POST", "/v1x"); r.Shadows[0].Copies(d) || r.Faults[0].Touches(d) {
			t.Fatal("a disturbance of what it does not match")
		}
	}
	if faults < 800 || faults > 1200 || copies < 4600 || copies > 5400 { // six standard deviations
		t.Errorf("%d faults, want about 1000; %d copies, want about 5000", faults, copies)
	}
}

func TestAMatchAllocatesNothing(t *testing.T) {
	s := compiled(t, manyRoutes(1000))
	c := call("GET", "/svc7/items/42?currency=e%75r", "Cookie: sid=abc", "X-Canary: 1")
	if n := testing.AllocsPerRun(100, func() {
		ch := s.Match(c)
		if ch.Backend(0) == nil {
			t.Fatal("no backend")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzMatch(f *testing.F) {
	f.Add("/a/b", "q=%41&b", "sid=1; a", []byte("GET"))
	f.Add("/a//b", "%", "sid", []byte(""))
	f.Add("*", "&&=", ";;=", []byte("\xff"))
	routes := randomRoutes(rand.New(rand.NewPCG(7, 8)))
	routes.Routes = append(routes.Routes, mesh.Route{Name: "sticky", Backends: backends(1, 2), Sticky: &mesh.Sticky{By: "cookie", Name: "sid"},
		Matches: []mesh.Match{{Query: []mesh.NamedText{{Name: "q", Text: mesh.Text{Regex: "A+"}}}}}})
	s := compiled(f, routes)
	f.Fuzz(func(t *testing.T, path, query, cookie string, method []byte) {
		c := &Call{Method: method, Path: []byte(path), Query: []byte(query), Fields: []http1.Field{{Name: []byte("Cookie"), Value: []byte(cookie)}}}
		before := bytes.Clone(c.Query)
		a, steps := s.Explain(c)
		if b := s.Match(c); a.Route != b.Route || a.key != b.key {
			t.Errorf("%q is matched twice, otherwise", path)
		}
		if (a.Route == nil) != (len(steps) == 0 || steps[len(steps)-1].Fails != "") {
			t.Errorf("%q: %v is explained by %+v", path, a.Route, steps)
		}
		a.Backend(0)
		if !bytes.Equal(before, c.Query) {
			t.Error("the call was changed")
		}
		if len(query) == 0 && len(path) < 40 && strings.HasPrefix(path, "/") {
			if want := oracle(s.File, c); want != nameOf(a) && want != "sticky" {
				t.Errorf("%q: %s, want %s", path, nameOf(a), want)
			}
		}
	})
}

// A rollout's share is exact, and raising it moves callers to the canary only.
func TestTheShareOfACanary(t *testing.T) {
	file := mesh.Routes{Service: "billing", Subsets: []mesh.Subset{{Name: "v2", Labels: map[string]string{"version": "v2"}}, {Name: "v0", Labels: map[string]string{"version": "v0"}}}, Routes: []mesh.Route{{
		Name: "all", Backends: []mesh.Backend{{Weight: 3}, {Subset: "v0", Weight: 1}, {Subset: "v2", Weight: 0}},
		Plan: &mesh.Plan{Canary: mesh.Ref{Subset: "v2"}, Steps: []mesh.Step{{Share: mesh.Whole, For: 1}}},
	}}}
	const callers = 100_000
	sides := func(shares ...mesh.CanaryShare) (out []string) {
		snap := &mesh.Snapshot{TrustDomain: domain, Services: []mesh.Service{{Name: "billing", ID: spiffeid.RequireFromPath(domain, "/billing"), Port: 1, Protocol: mesh.HTTP}}, Routes: []mesh.Routes{file}, Shares: shares}
		table, err := Compile(snap, Options{})
		if err != nil {
			t.Fatal(err)
		}
		c := call("GET", "/")
		for i := range callers {
			binary.BigEndian.PutUint64(c.Trace[:], uint64(i))
			ch := table.Of("billing").Match(c)
			if b := ch.Backend(0); b.Canary != (b.Subset == "v2") || ch.Route.Watched != (len(shares) > 0 && shares[0].Watch) {
				t.Fatalf("%+v", b)
			} else {
				out = append(out, b.Subset)
			}
		}
		return out
	}
	before := sides()
	for _, share := range []mesh.Share{0, 1, 100, 500, 2500, 5000, 9999, mesh.Whole, 2500, 0} {
		now := sides(mesh.CanaryShare{Service: "billing", Route: "all", Share: share, Watch: share > 0})
		n := 0
		for i, side := range now {
			if side == "v2" {
				n++
			} else if before[i] != "v2" && before[i] != side {
				t.Fatalf("a caller moves from %q to %q at %s", before[i], side, share)
			}
		}
		if want := float64(share) / mesh.Whole; math.Abs(float64(n)/callers-want) > 0.002 || share == 0 && n > 0 || share == mesh.Whole && n < callers {
			t.Errorf("%s: %d of %d calls go to the canary", share, n, callers)
		}
		before = now
	}
	if _, err := Compile(&mesh.Snapshot{TrustDomain: domain, Routes: []mesh.Routes{file}, Shares: []mesh.CanaryShare{{Service: "billing", Route: "none"}}}, Options{}); err == nil {
		t.Error("a share of no route is taken")
	}
}
