package mesh

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// withRoutes is the good folder with one file of routes more, and a stream.
func withRoutes(yaml string) fstest.MapFS {
	return fstest.MapFS{
		"access.csv": {Data: []byte("g, spiffe://demo.sallyport/ns/ci/sa/runner, group:ci\n" +
			"p, a, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, *, **, -, allow\n")},
		"services.yaml": {Data: []byte(`services:
  - {name: billing, identity: "spiffe://demo.sallyport/ns/shop/sa/billing", port: 8443}
  - {name: ledger, identity: "spiffe://demo.sallyport/ns/shop/sa/ledger", port: 8443}
  - {name: db, identity: "spiffe://demo.sallyport/ns/shop/sa/db", port: 5432, protocol: tcp}
`)},
		"egress.yaml":   {Data: []byte("destinations:\n  - host: api.stripe.test\n")},
		"routes/a.yaml": {Data: []byte(yaml)},
	}
}

func TestRoutesSayEveryMistake(t *testing.T) {
	const fault = "share: 1%, callers: [\"**\"], since: 2026-11-27T12:00:00Z, until: 2026-11-27T13:00:00Z"
	for _, tt := range []struct{ route, want string }{
		{"service: nobody", `no service is called "nobody"`},
		{"service: biling", `did you mean "billing"?`},
		{"routes: [{name: a}]", "service is missing"},
		{"host: other.test", "is no destination"},
		{"host: UP.test", "capital letters"},
		{"service: billing\nhost: api.stripe.test", "both there"},
		{"service: billing\nrotues: []", `unknown field "rotues": did you mean "routes"?`},
		{"service: billing\nsubsets: [{name: v1}]", "has no labels"},
		{"service: billing\nsubsets: [{name: v1, labels: {a: b}}, {name: v1, labels: {a: c}}]", `subset "v1" is written twice`},
		{"service: billing\nsubsets: [{name: v1, labels: {a: \"b c\"}}]", "is not 1 to 63"},
		{"host: api.stripe.test\nsubsets: [{name: v1, labels: {a: b}}]", "a host has none"},
		{"service: billing\nroutes: [{matches: [{method: GET}]}]", "name is missing"},
		{"service: billing\nroutes: [{name: a}, {name: a}]", `route "a" is written twice`},
		{"service: billing\nbalance: {policy: p2c}", `unknown "p2c"`},
		{"service: billing\nbalance: {policy: ring_hash}", "needs hash"},
		{"service: billing\nbalance: {hash: {by: caller}}", "are of policy: ring_hash"},
		{"service: billing\nbreaker: {slow: 1s}", "stand together"},
		{"service: billing\nbreaker: {success: 101%}", "is no share"},
		{"service: billing\nbreaker: {success: 10}", "is no share"},
		{"service: billing\noutlier: {consecutive: -1}", "consecutive: -1 is not from 0"},
		{"service: billing\nhealth: {}", "0 ways to ask"},
		{"service: billing\nhealth: {http: healthz}", `does not start with "/"`},
		{"service: db\nhealth: {http: /healthz}", "ask it by tcp: true"},
		{"service: billing\nretry_budget: {floor: 100000}", "retry_budget.floor: 100000 is not from 0 to 10000"},
		{"matches: [{}]", "says nothing"},
		{"matches: [{path: {}}]", "0 comparisons"},
		{"matches: [{path: {exact: /a, prefix: /b}}]", "2 comparisons"},
		{"matches: [{path: {exact: a}}]", `does not start with "/"`},
		{"matches: [{path: {prefix: /a//b}}]", "never matches"},
		{"matches: [{path: {suffix: /a}}]", "want one of exact, prefix and regex"},
		{"matches: [{path: {regex: \"(\"}}]", "missing closing"},
		{"matches: [{path: {regex: \"((a{100}){100}){9}\"}}]", "regex"},
		{"matches: [{method: get}]", `did you mean "GET"?`},
		{"matches: [{headers: [{name: \"a b\", exact: c}]}]", "is not the name of a header field"},
		{"matches: [{headers: [{name: a, exact: c}, {name: A, exact: d}]}]", "written twice"},
		{"matches: [{headers: [{name: a}]}]", "headers: a: 0 comparisons"},
		{"matches: [{grpc: {}}]", "service and method are missing"},
		{"matches: [{grpc: {service: a/b}}]", "is not the name of a service"},
		{"matches: [{grpc: {service: a}, path: {exact: /}}]", "a method of gRPC is a path"},
		{"matches: [{from: [web]}]", "it starts with spiffe://"},
		{"matches: [{from: [\"group:cii\"]}]", `did you mean "group:ci"?`},
		{"matches: [{claims: {a: b}}]", `claims: no token counts at service "billing"`},
		{"host: api.stripe.test", "a route to a host outside is not looked at"},
		{"sticky: {by: claim, name: sub}", "sticky: no token counts"},
		{"matches: [{region: {in: [eu]}}]", "0 sources"},
		{"matches: [{region: {in: [], header: x}}]", "names no region"},
		{"matches: [{region: {in: [ue], ranges: {eu: [10.0.0.0/8]}}}]", `did you mean "eu"?`},
		{"matches: [{region: {in: [eu], ranges: {eu: [10.0.0.1/8]}}}]", "is not a range"},
		{"matches: [{region: {in: [eu], database: /geo.mmdb}}]", "sidecars say under regions which file"},
		{"backends: [{subset: v1}]", "define none"},
		{"backends: [{service: nobody}]", "no service is called"},
		{"backends: [{service: db}]", "speaks another protocol"},
		{"backends: [{weight: 0}]", "all weights are 0"},
		{"backends: [{weight: -1}]", "weight"},
		{"backends: [{}, {service: billing}]", "written twice"},
		{"backends: [{address: \"api.stripe.test:443\"}]", "leads out of the mesh"},
		{"redirect: {}", "to where the call came"},
		{"redirect: {path: /x, status: 200}", "status 200 is none of"},
		{"redirect: {scheme: ftp}", `unknown "ftp"`},
		{"redirect: {prefix: /x}", "not every match of the route has one"},
		{"redirect: {path: /x}\n    respond: {status: 200}", "more than one"},
		{"respond: {status: 99}", "respond.status: 99 is not from 200 to 599"},
		{"respond: {status: 200}\n    sticky: {by: caller}", "respond answers every call itself"},
		{"sticky: {by: cookie}", "name is missing"},
		{"sticky: {by: caller, name: x}", "has no meaning for by: caller"},
		{"sticky: {by: ip}", `unknown "ip"`},
		{"rewrite: {path: /a, prefix: /b}", "both there"},
		{"rewrite: {headers: {set: {Host: x}}}", "not a route's to change"},
		{"rewrite: {headers: {set: {X_Forwarded_For: x}}}", "not a route's to change"},
		{"rewrite: {headers: {set: {a: x}, remove: [A]}}", "named twice"},
		{"answer: {set: {a: \"x\\r\\ny\"}}", "is no value of a header field"},
		{"cors: {}", "allow_origins is missing"},
		{"cors: {allow_origins: [\"*\"], allow_credentials: true}", "would let every site"},
		{"cors: {allow_origins: [shop.test]}", "is not an origin"},
		{"cors: {allow_origins: [\"https://shop.test/\"]}", "is not an origin"},
		{"timeouts: {request: 1s, backend_request: 2s}", "is longer than request"},
		{"timeouts: {request: 1}", "is not a duration"},
		{"retry: {attempts: 9}", "retry.attempts: 9 is not from 0 to 5"},
		{"retry: {codes: [404]}", "nothing to try again for"},
		{"retry: {grpc: [unavailable]}", `did you mean "UNAVAILABLE"?`},
		{"hedge: {after: 2m}", "hedge.after"},
		{"hedge: {}", "want exactly one of after and of"},
		{"hedge: {after: 1s, of: 95%, max: 1s}", "want exactly one of after and of"},
		{"hedge: {after: 1s, max: 1s}", "max has no meaning beside after"},
		{"hedge: {of: 95%}", "hedge.max: 0s is not from 1ms"},
		{"hedge: {of: 20%, max: 1s}", "of 20% is not from 50%"},
		{"limit: {rate: 1, by: \"claim:team\"}", "limit: no token counts"},
		{"limit: {rate: 1, shared: true, by: \"claim:team\"}", "is counted by each sidecar"},
		{"faults: [{name: a, " + fault + "}]", "does nothing"},
		{"faults: [{name: a, status: 503, reset: true, " + fault + "}]", "more than one"},
		{"faults: [{name: a, reset: true, " + strings.Replace(fault, "T13", "T11", 1) + "}]", "want more than 0 and at most 24h"},
		{"faults: [{name: a, reset: true, " + strings.Replace(fault, "until: 2026-11-27", "until: 2026-11-28", 1) + "}]", "want more than 0 and at most 24h"},
		{"faults: [{name: a, reset: true, share: 1%, callers: [\"**\"]}]", "a fault ends by itself"},
		{"faults: [{name: a, reset: true, share: 1%, since: 2026-11-27T12:00:00Z, until: 2026-11-27T13:00:00Z}]", "whom may it touch"},
		{"shadows: [{name: a, backend: {}, share: 1%}]", "gets the calls themselves"},
		{"shadows: [{name: a, backend: {service: nobody}, share: 1%}]", "no service is called"},
		{"shadows: [{name: a, backend: {service: ledger}}]", "share is missing"},
		{"shadows: [{name: a, backend: {service: ledger}, share: 1%, noise: {}}]", "without compare"},
		{"translate: {to: grpc}", "exactly one of descriptors and reflection"},
		{"translate: {to: rest, reflection: true}", "has no reflection"},
		{"translate: {to: grpc, reflection: true}\n  - name: b\n    translate: {to: grpc, reflection: true, services: [a.B]}", "a service has one"},
		{"translate: {to: soap, reflection: true}", `unknown "soap"`},
		{"translate: {to: grpc, descriptors: a.binpb}", "does not stand beside"},
		{"translate: {to: grpc, descriptors: ../services.yaml}", "is no file *.binpb"},
		{"audit: all", `audit: unknown "all"`},
		{"fail: soft", `fail: unknown "soft"`},
		{"audit: full\n    fail: open", "contradicts audit"},
		{"audit: full\n    backends: [{service: ledger}]", `audit: "ledger" is another service`},
		{"audit: full\n    rewrite: {path: /x}", "the service sees the path that rewrite makes"},
		{"audit: full\n    respond: {status: 200}", "respond answers every call itself"},
		{"fail: open\n    matches: [{headers: [{name: X-Quiet, present: true}]}]", "fail: goes by path, method, grpc and from"},
		{"fail: open\n    matches: [{query: [{name: q, present: true}]}]", "fail: goes by path, method, grpc and from"},
		{"audit: counted\n    matches: [{path: {prefix: /v1}}]\n  - name: b\n    translate: {to: grpc, reflection: true}", "match them by grpc"},
		{plan("canary: {subset: v2}"), "canary \"billing (v2)\" is none of the backends"},
		{plan("canary: {}"), "canary is missing"},
		{plan("canary: {service: ledger}", "steps: []"), "steps are missing"},
		{plan("canary: {service: ledger}", "steps: [{share: 50%, for: 1m}]"), "the last step has a share of 50%: write 100%"},
		{plan("canary: {service: ledger}", "steps: [{share: 50%, for: 1m}, {share: 10%, for: 1m}, {share: 100%, for: 1m}]"), "10% after 50%: shares rise"},
		{plan("canary: {service: ledger}", "steps: [{for: 1m}, {share: 100%, for: 1m}]"), "step 1 has no share"},
		{plan("canary: {service: ledger}", "steps: [{share: 100%}]"), "for is missing"},
		{plan("canary: {service: ledger}", "steps: [{share: 100%, for: -1m}]"), "rollout.for: -1m0s is not from"},
		{plan("canary: {service: ledger}", "steps: [{share: 100%, for: 1m, gate: true}]"), "a gate at the last step"},
		{plan("canary: {service: ledger}", "judge: {widnow: 1m}"), `did you mean "window"?`},
		{plan("canary: {service: ledger}", "judge: {window: 1ms}"), "judge.window: 1ms is not from 1s"},
		{plan("canary: {service: ledger}", "judge: {min_requests: 1}"), "judge.min_requests: 1 is not from 10"},
		{plan("canary: {service: ledger}", "judge: {errors: 51%}"), "more than 50%"},
		{plan("canary: {service: ledger}", "judge: {confidence: 50%}"), "is not from 80%"},
		{plan("canary: {service: ledger}", "judge: {latency: {quantile: 10%}}"), "is not from 50%"},
		{plan("canary: {service: ledger}", "judge: {latency: {ratio: 0.9}}"), "neither 0 nor from 1.05"},
		{"backends: [{weight: 0}, {service: ledger}]\n    rollout: {canary: {service: ledger}, steps: [{share: 100%, for: 1m}]}", "no backend but the canary has a weight"},
		{"backends: [{}, {service: ledger, priority: 1}]\n    rollout: {canary: {service: ledger}, steps: [{share: 100%, for: 1m}]}", "have priorities"},
		{"respond: {status: 200}\n    rollout: {canary: {service: ledger}, steps: [{share: 100%, for: 1m}]}", "respond answers every call itself"},
		{"service: db\nroutes: [{name: a, rollout: {canary: {subset: v2}}}]", "the service speaks tcp"},
	} {
		yaml := tt.route
		if !strings.HasPrefix(yaml, "service:") && !strings.HasPrefix(yaml, "host:") && !strings.HasPrefix(yaml, "routes:") {
			yaml = "service: billing\nroutes:\n  - name: a-route\n    " + tt.route
		}
		_, err := ParseFS(withRoutes(yaml), demoDomain)
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "routes/a.yaml:") {
			t.Errorf("%s:\ngot  %v\nwant %s", tt.route, err, tt.want)
		}
		if errs, ok := err.(Errors); ok && len(errs) > 1 {
			t.Errorf("%s: %d mistakes:\n%v", tt.route, len(errs), err)
		}
	}
}

func TestAFileOfRoutesIsOfOneService(t *testing.T) {
	files := withRoutes("service: billing")
	files["routes/b.yaml"] = &fstest.MapFile{Data: []byte("service: billing")}
	if _, err := ParseFS(files, demoDomain); err == nil || !strings.Contains(err.Error(), `routes/b.yaml:1:10: routes of "billing" is written twice, first at routes/a.yaml:1`) {
		t.Error(err)
	}
	delete(files, "routes/b.yaml")
	files["routes/b.yml"] = &fstest.MapFile{}
	if _, err := ParseFS(files, demoDomain); err == nil || !strings.Contains(err.Error(), "routes are *.yaml") {
		t.Error(err)
	}
}

func TestStreamsHaveNoRoutesOfHTTP(t *testing.T) {
	for _, route := range []string{
		"matches: [{method: GET}]", "matches: [{region: {in: [eu], header: x}}]", "respond: {status: 200}", "cors: {allow_origins: [\"*\"]}",
		"rewrite: {path: /x}", "sticky: {by: cookie, name: x}", "shadows: [{name: a, backend: {service: db}, share: 1%}]", "audit: full",
	} {
		_, err := ParseFS(withRoutes("service: db\nroutes:\n  - name: a\n    "+route), demoDomain)
		if err == nil || !strings.Contains(err.Error(), "speaks tcp") {
			t.Errorf("%s: %v", route, err)
		}
	}
	good := "service: db\nsubsets: [{name: v2, labels: {version: v2}}]\nroutes:\n  - name: a\n    matches: [{from: [\"group:ci\"]}]\n    backends: [{weight: 99}, {subset: v2}]\n    sticky: {by: caller}"
	if _, err := ParseFS(withRoutes(good), demoDomain); err != nil {
		t.Error(err)
	}
}

func TestWhatIsLeftOutOfARouteIsItsDefault(t *testing.T) {
	p, err := ParseFS(withRoutes("service: billing\nroutes:\n  - name: a\n    backends: [{}, {service: ledger, weight: 0}]\n    retry: {codes: [503]}\n  - name: b\n    redirect: {path: /x}"), demoDomain)
	if err != nil {
		t.Fatal(err)
	}
	r := p.Routes[0].Routes
	if got := r[0].Backends; got[0].Weight != 1 || got[1].Weight != 0 {
		t.Errorf("weights %+v", got)
	}
	if r[0].Retry.Attempts != 1 || r[1].Redirect.Status != 302 {
		t.Errorf("retry %+v, redirect %+v", r[0].Retry, r[1].Redirect)
	}
	if want := (Origin{File: "routes/a.yaml", Line: 3}); r[0].Origin != want {
		t.Errorf("the route stands at %v", r[0].Origin)
	}
}

func TestRoutesAreInTheHashAndInTheSnapshot(t *testing.T) {
	without := parseFiles(t, withRoutes("service: billing"))
	with := parseFiles(t, withRoutes("service: billing\nroutes: [{name: a}]"))
	moved := parseFiles(t, withRoutes("# a comment\nservice: billing\nroutes:\n  - name: a\n"))
	if without.Hash() == with.Hash() {
		t.Error("a route more is the same set")
	}
	if with.Hash() != moved.Hash() {
		t.Error("a comment makes another set")
	}
	s, err := Compile(parseGood(t, "full"), 1, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	back, err := DecodeSnapshot(s.Encode())
	if err != nil {
		t.Fatal(err)
	}
	prefixes := cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
	if diff := cmp.Diff(s.Routes, back.Routes, prefixes); diff != "" {
		t.Errorf("(-sent +got):\n%s", diff)
	}
	if err := back.Validate(); err != nil {
		t.Error(err)
	}
	back.RoutesOf("billing").Routes[0].Backends[0].Weight = 1
	if s.ContentHash() == back.ContentHash() {
		t.Error("another weight is the same content")
	}
}

func TestARouteGoesToThoseWhoMayCallItsService(t *testing.T) {
	s, err := Compile(parseGood(t, "full"), 1, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	id := func(path string) spiffeid.ID { return spiffeid.RequireFromString("spiffe://demo.sallyport" + path) }
	web := s.Project(id("/ns/shop/sa/web"))
	if web.RoutesOf("billing") == nil || len(web.Routes) != 1 {
		t.Errorf("web calls billing, and has %d files of routes", len(web.Routes))
	}
	if !slices.ContainsFunc(web.Memberships, func(m Membership) bool { return m.Group == "group:ci" }) {
		t.Error("the group that a match names has no members")
	}
	if err := web.Validate(); err != nil {
		t.Error(err)
	}
	if own := s.Project(id("/ns/shop/sa/billing")); own.RoutesOf("billing") == nil {
		t.Error("billing does not know its own routes")
	}
	if other := s.Project(id("/ns/shop/sa/nobody")); other.RoutesOf("billing") != nil && len(other.Services) == 0 {
		t.Error("routes to a service that it may not call")
	}
	s.Routes = append(s.Routes, Routes{Host: "api.stripe.test", Routes: []Route{{Name: "a"}}})
	gw := s.ProjectGateway()
	if len(gw.Routes) != 1 || gw.Routes[0].Host != "api.stripe.test" {
		t.Errorf("a gateway has %+v", gw.Routes)
	}
	if err := gw.Validate(); err != nil {
		t.Error(err)
	}
}

func TestShares(t *testing.T) {
	for n := range Share(Whole + 1) {
		var back Share
		if err := back.UnmarshalText([]byte(n.String())); err != nil || back != n {
			t.Fatalf("%s is read as %d: %v", n, back, err)
		}
	}
	for _, bad := range []string{"", "%", "1", ".5%", "1.%", "1.234%", "100.01%", "-1%", "+1%", "1 %", "1e1%", "0x1%", "1_0%", "9999999999%"} {
		var s Share
		if len(bad) > 0 && s.UnmarshalText([]byte(bad)) == nil {
			t.Errorf("%q is read as %d", bad, s)
		}
	}
	b, err := json.Marshal(struct{ S Share }{25})
	if err != nil || string(b) != `{"S":"0.25%"}` {
		t.Errorf("%s, %v", b, err)
	}
}

func TestLabels(t *testing.T) {
	var l Labels
	if err := l.UnmarshalText([]byte("zone=eu-1, version=v2")); err != nil || l != "version=v2,zone=eu-1" {
		t.Fatalf("%q, %v", l, err)
	}
	if l.Get("version") != "v2" || l.Get("zone") != "eu-1" || l.Get("vers") != "" || l.Get("") != "" {
		t.Error("values are not found by name")
	}
	if !l.Has(map[string]string{"zone": "eu-1"}) || l.Has(map[string]string{"zone": "eu"}) || !l.Has(nil) || Labels("").Has(map[string]string{"a": "b"}) {
		t.Error("subsets are not told apart")
	}
	for _, bad := range []string{"a", "a=", "=b", "a=b,a=c", "a=b,", "a=b c", strings.Repeat("a", 64) + "=b"} {
		if err := l.UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q is read as %q", bad, l)
		}
	}
	for _, bad := range []Labels{"b=1,a=2", "a=1,a=2", "a", ","} {
		if bad.Check() == nil {
			t.Errorf("%q is good", bad)
		}
	}
}

func parseFiles(t *testing.T, files fstest.MapFS) *Policies {
	t.Helper()
	p, err := ParseFS(files, demoDomain)
	if err != nil {
		t.Fatal(fmt.Errorf("%w", err))
	}
	return p
}

// What the manual shows is read.
func TestTheManualsRoutesParse(t *testing.T) {
	b, err := os.ReadFile("../../docs/routes.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := strings.Split(string(b), "```yaml\n")[1:]
	if len(blocks) < 3 {
		t.Errorf("%d examples", len(blocks))
	}
	for _, block := range blocks {
		yaml, _, _ := strings.Cut(block, "```")
		if !strings.HasPrefix(yaml, "service:") && !strings.HasPrefix(yaml, "host:") {
			continue // of a sidecar
		}
		if _, err := ParseFS(withRoutes(yaml), demoDomain); err != nil {
			t.Errorf("%v\n%s", err, yaml)
		}
	}
}

// plan is a route to billing and ledger with a rollout of these parts.
func plan(parts ...string) string {
	if len(parts) == 1 || !strings.HasPrefix(parts[1], "ste") {
		parts = append(parts, "steps: [{share: 1%, for: 1m}, {share: 100%, for: 1m}]")
	}
	return "backends: [{}, {service: ledger, weight: 0}]\n    rollout: {" + strings.Join(parts, ", ") + "}"
}

func TestSharesOfRollouts(t *testing.T) {
	p, err := ParseFS(withRoutes("service: billing\nroutes:\n  - name: a\n    "+plan("canary: {service: ledger}")), demoDomain)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, ok := p.PlanOf("billing", "b"); ok {
		t.Error("a route that is not there has a plan")
	}
	got, hash, ok := p.PlanOf("billing", "a")
	if !ok || got.Canary.Service != "ledger" || len(got.Steps) != 2 {
		t.Fatalf("%+v %t", got, ok)
	}
	snap, err := Compile(p, 1, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	before := snap.ContentHash()
	snap.Shares = []CanaryShare{{Service: "billing", Route: "a", Share: 50, Watch: true}}
	if snap.ContentHash() == before {
		t.Error("a share changes nothing of the hash")
	}
	web := spiffeid.RequireFromString("spiffe://demo.sallyport/ns/shop/sa/web")
	sent, err := DecodeSnapshot(snap.Project(web).Encode())
	if err != nil || sent.Validate() != nil {
		t.Fatalf("%v %v", err, sent.Validate())
	}
	if s, ok := sent.ShareOf("billing", "a"); !ok || s.Share != 50 {
		t.Errorf("%+v %t", s, ok)
	}
	if s, ok := snap.Project(spiffeid.RequireFromString("spiffe://demo.sallyport/ns/shop/sa/ledger")).ShareOf("billing", "a"); ok {
		t.Errorf("whoever calls nobody is told %+v", s)
	}
	if got := fmt.Sprint(p.Callees(web)); got != "[billing]" {
		t.Errorf("web calls %s", got)
	}
	for name, shares := range map[string][]CanaryShare{
		"of no route":           {{Service: "billing", Route: "b"}},
		"of no service":         {{Route: "a"}},
		"twice":                 {{Service: "billing", Route: "a"}, {Service: "billing", Route: "a"}},
		"more than there is":    {{Service: "billing", Route: "a", Share: Whole + 1}},
		"of a route without it": {{Service: "ledger", Route: "a"}},
	} {
		snap.Shares = shares
		if snap.Validate() == nil {
			t.Errorf("a share %s is taken", name)
		}
	}
	// An edit of what a rollout goes by is another plan, one of its file is not.
	p.Routes[0].Routes[0].Origin.Line++
	if _, again, _ := p.PlanOf("billing", "a"); again != hash {
		t.Error("the place in the file is part of the plan")
	}
	p.Routes[0].Routes[0].Backends[0].Weight++
	if _, again, _ := p.PlanOf("billing", "a"); again == hash {
		t.Error("the weights are no part of the plan")
	}
}
