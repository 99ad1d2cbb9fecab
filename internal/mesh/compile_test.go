package mesh

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func parseGood(t testing.TB, name string) *Policies {
	t.Helper()
	p, err := ParseDir("testdata/good/"+name, demoDomain)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func endpoint(service ServiceName, port uint16) Endpoint {
	return Endpoint{
		Service: service, Address: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port),
		Agent: spiffeid.RequireFromString("spiffe://demo.sallyport/spire/agent/join_token/" + string(service)),
	}
}

func demoSnapshot(t testing.TB) *Snapshot {
	t.Helper()
	p, err := ParseDir("../../policies", demoDomain)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Compile(p, 7, 3, []Endpoint{endpoint("payment", 2), endpoint("inventory", 3), endpoint("billing", 1), endpoint("web", 4), endpoint("gone", 5)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestCompileIsCanonical(t *testing.T) {
	p := parseGood(t, "full")
	eps := []Endpoint{endpoint("web", 2), endpoint("billing", 9), endpoint("billing", 1), endpoint("billing", 9)}
	a, err := Compile(p, 1, 1, eps)
	if err != nil {
		t.Fatal(err)
	}
	q := parseGood(t, "full")
	slices.Reverse(q.Rules)
	slices.Reverse(q.Memberships)
	slices.Reverse(q.Services)
	slices.Reverse(q.Destinations)
	slices.Reverse(eps)
	b, err := Compile(q, 1, 1, eps)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(a.Encode()), string(b.Encode())); diff != "" {
		t.Errorf("order changed the snapshot:\n%s", diff)
	}
	if len(a.Endpoints) != 3 {
		t.Errorf("got %d endpoints, want 3 without the repeated one", len(a.Endpoints))
	}
	if len(p.Rules) == 0 || p.Rules[0].ID != "exact" {
		t.Error("Compile reordered the policies it was given")
	}
}

func TestCompileRefusesWhatIsInvalid(t *testing.T) {
	p := parseGood(t, "full")
	p.Rules[0].Effect = "permit"
	if _, err := Compile(p, 1, 1, nil); err == nil || !strings.Contains(err.Error(), "permit") {
		t.Errorf("got %v", err)
	}
	if _, err := Compile(&Policies{}, 1, 1, nil); err == nil {
		t.Error("no trust domain was accepted")
	}
}

func TestHashIsOfTheMeaning(t *testing.T) {
	read := func(access string) string {
		p, err := ParseFS(fstest.MapFS{accessFile: {Data: []byte(access)}}, demoDomain)
		if err != nil {
			t.Fatal(err)
		}
		return p.Hash()
	}
	row := "p, a, in, " + web + ", " + billing + ", 8443, GET, /v1, -, allow\n"
	other := "p,b,in," + web + "," + billing + ",8443,GET,/v2,-,allow\n"
	same := read(row + other)
	if got := read("# comment\n\n" + other + row); got != same {
		t.Error("a comment or the order changed the hash")
	}
	for name, changed := range map[string]string{
		"effect": strings.Replace(row, "allow", "deny", 1) + other,
		"path":   strings.Replace(row, "/v1", "/v3", 1) + other,
		"a row":  row,
	} {
		if read(changed) == same {
			t.Errorf("%s did not change the hash", name)
		}
	}
}

func TestProjectGivesASidecarWhatItNeedsOnly(t *testing.T) {
	s := demoSnapshot(t)
	for _, c := range []struct {
		who       string
		rules     []string
		services  []ServiceName
		endpoints []uint16
		members   int
	}{
		{"shop/sa/web", []string{"guard-metadata", "web-pay-1", "web-stock-1"}, []ServiceName{"inventory", "payment", "web"}, []uint16{3, 2}, 0},
		{"shop/sa/payment", []string{"guard-metadata", "pay-bill-1", "web-pay-1"}, []ServiceName{"billing", "payment"}, []uint16{1}, 0},
		{"shop/sa/billing", []string{"batch-rep-1", "bill-out-1", "guard-batch-write", "guard-metadata", "pay-bill-1"}, []ServiceName{"billing"}, nil, 1},
		{"shop/sa/inventory", []string{"guard-metadata", "web-stock-1"}, []ServiceName{"inventory"}, nil, 0},
		{"shop/sa/batch", []string{"batch-rep-1", "guard-batch-write", "guard-metadata"}, []ServiceName{"billing"}, []uint16{1}, 0},
		{"none/sa/stranger", []string{"guard-metadata"}, nil, nil, 0},
	} {
		t.Run(c.who, func(t *testing.T) {
			got := s.Project(spiffeid.RequireFromString("spiffe://demo.sallyport/ns/" + c.who))
			var rules []string
			for _, r := range got.Rules {
				rules = append(rules, r.ID)
			}
			var services []ServiceName
			for _, v := range got.Services {
				services = append(services, v.Name)
			}
			var endpoints []uint16
			for _, e := range got.Endpoints {
				endpoints = append(endpoints, e.Address.Port())
			}
			if diff := cmp.Diff([]any{c.rules, c.services, endpoints, c.members}, []any{rules, services, c.endpoints, len(got.Memberships)}); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if len(got.Destinations) != 0 {
				t.Error("a sidecar was told how hosts are reached")
			}
			if got.Revision != 7 || got.PolicyRevision != 3 || got.PolicyHash != s.PolicyHash || got.TrustDomain != demoDomain {
				t.Errorf("head is %+v", got.head())
			}
			if err := got.Validate(); err != nil {
				t.Error(err)
			}
		})
	}
	if got := s.Project(spiffeid.ID{}); len(got.Rules)+len(got.Services)+len(got.Endpoints) != 0 {
		t.Errorf("nobody was given %+v", got)
	}
}

func TestProjectFollowsGroups(t *testing.T) {
	s, err := Compile(parseGood(t, "full"), 1, 1, []Endpoint{endpoint("billing", 1)})
	if err != nil {
		t.Fatal(err)
	}
	has := func(p *Snapshot, id string) bool {
		return slices.ContainsFunc(p.Rules, func(r Rule) bool { return r.ID == id })
	}
	runner := s.Project(spiffeid.RequireFromString("spiffe://demo.sallyport/ns/ci/sa/runner"))
	if !has(runner, "tight") || !has(runner, "no-ci") || len(runner.Endpoints) != 1 {
		t.Errorf("a member of a nested group lacks its rules: %+v", runner.Rules)
	}
	callee := s.Project(spiffeid.RequireFromString(billing))
	if !has(callee, "tight") || !has(callee, "anywhere") || !has(callee, "everyone") || has(callee, "nothing") {
		t.Errorf("a called group lacks its rules: %+v", callee.Rules)
	}
	if err := callee.Validate(); err != nil {
		t.Errorf("members are missing: %v", err)
	}
}

func TestProjectGatewayHoldsEgressOnly(t *testing.T) {
	got := demoSnapshot(t).ProjectGateway()
	if len(got.Rules) != 2 || len(got.Endpoints) != 0 || len(got.Destinations) != 1 || len(got.Services) != 4 || len(got.Memberships) != 1 {
		t.Errorf("got %+v", got)
	}
	if err := got.Validate(); err != nil {
		t.Error(err)
	}
}

func TestContentHashIgnoresRevisionsOnly(t *testing.T) {
	a := demoSnapshot(t)
	b := *a
	b.Revision, b.PolicyRevision, b.PolicyHash = 99, 98, "other"
	if a.ContentHash() != b.ContentHash() {
		t.Error("a revision changed the hash of the content")
	}
	b.Rules = b.Rules[1:]
	if a.ContentHash() == b.ContentHash() {
		t.Error("a rule less has the same hash")
	}
}

func TestDecodeSnapshotIsStrict(t *testing.T) {
	s := demoSnapshot(t)
	good := s.Encode()
	got, err := DecodeSnapshot(good)
	if err != nil {
		t.Fatal(err)
	}
	if string(got.Encode()) != string(good) || got.ContentHash() != s.ContentHash() {
		t.Error("decoding changed the snapshot")
	}
	if _, err := DecodeSnapshot((&Snapshot{}).Encode()); err != nil {
		t.Errorf("an empty snapshot: %v", err)
	}
	text := string(good)
	for name, bad := range map[string]string{
		"nothing":       "",
		"null":          "null",
		"array":         "[]",
		"cut":           text[:len(text)-1],
		"trailing":      text + "{}",
		"blank":         text + " ",
		"unknown field": strings.Replace(text, `{"revision"`, `{"extra":1,"revision"`, 1),
		"repeated key":  strings.Replace(text, `{"revision":7`, `{"revision":8,"revision":7`, 1),
		"capital key":   strings.Replace(text, `"revision"`, `"Revision"`, 1),
		"null list":     strings.Replace(string((&Snapshot{}).Encode()), `"rules":[]`, `"rules":null`, 1),
		"bad identity":  strings.Replace(text, `"identity":"spiffe://demo`, `"identity":"http://demo`, 1),
		"negative":      strings.Replace(text, `"revision":7`, `"revision":-7`, 1),
		"deep":          strings.Repeat("[", 100_000),
	} {
		if bad == text {
			t.Fatalf("%s: the text was not changed", name)
		}
		if _, err := DecodeSnapshot([]byte(bad)); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func TestPoliciesSurviveTheStore(t *testing.T) {
	p := parseGood(t, "full")
	q, err := DecodePolicies(p.Encode())
	if err != nil {
		t.Fatal(err)
	}
	if p.Hash() != q.Hash() || string(p.Encode()) != string(q.Encode()) {
		t.Error("encoding changed the policies")
	}
	if err := q.Validate(); err != nil {
		t.Error(err)
	}
	if _, err := DecodePolicies([]byte(`{"rule":[]}`)); err == nil {
		t.Error("an unknown field was accepted")
	}
}

func TestLookups(t *testing.T) {
	s := demoSnapshot(t)
	if v, ok := s.Service("billing"); !ok || v.ID.String() != billing {
		t.Errorf("got %v, %v", v, ok)
	}
	if v, ok := s.ServiceByID(spiffeid.RequireFromString(billing)); !ok || v.Name != "billing" {
		t.Errorf("got %v, %v", v, ok)
	}
	if _, ok := s.Service("none"); ok {
		t.Error("found a service that is not there")
	}
	if _, ok := (&Snapshot{Services: []Service{{Name: "broken"}}}).ServiceByID(spiffeid.ID{}); ok {
		t.Error("found a service without identity")
	}
	s.Destinations = []Destination{{Host: "*.stripe.test", Proto: "tls"}, {Host: "api.stripe.test", Proto: "tcp"}}
	for host, want := range map[string]string{"api.stripe.test": "tcp", "files.stripe.test": "tls", "a.b.stripe.test": "", "stripe.test": ""} {
		if d, ok := s.DestinationOf(host); d.Proto != want || ok != (want != "") {
			t.Errorf("%s: got %q, %v", host, d.Proto, ok)
		}
	}
}

func TestTarget(t *testing.T) {
	p := parseGood(t, "full")
	for _, c := range []struct {
		to   string
		dir  Direction
		dst  string
		good bool
	}{
		{"billing", In, billing, true},
		{billing, In, billing, true},
		{"host:api.stripe.test", Out, "host:api.stripe.test", true},
		{"host:169.254.169.254", Out, "host:169.254.169.254", true},
		{"host:*.stripe.test", "", "", false},
		{"nobody", "", "", false},
		{"", "", "", false},
		{"spiffe://", "", "", false},
	} {
		dir, dst, err := p.Target(Case{To: c.to})
		if dir != c.dir || dst != c.dst || (err == nil) != c.good {
			t.Errorf("%q: got %q %q %v", c.to, dir, dst, err)
		}
	}
}

func TestEveryMistakeIsReportedAtOnce(t *testing.T) {
	_, err := ParseFS(fstest.MapFS{
		accessFile:     {Data: []byte("p, a, inn, x, y, 0, get, v1, z, yes\nq, b\n")},
		servicesFile:   {Data: []byte("services:\n  - {name: A, port: 70000}\n")},
		"tests/a.yaml": {Data: []byte("tests:\n  - {name: x, from: nobody, want: maybe}\n")},
		"rules.csv":    {Data: nil},
	}, demoDomain)
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{
		`unknown direction "inn"`, `"x" is not a SPIFFE ID`, `"y" is not a SPIFFE ID`, `port "0"`, `unknown verb "get"`,
		`path "v1"`, `unknown condition "z"`, `unknown effect "yes"`, `unknown kind of row "q"`,
		`capital letters`, `"70000" is not a whole number`, `identity is missing`, "unexpected file",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not reported in:\n%v", want, err)
		}
	}
}

func TestParseDirNamesWhatIsMissing(t *testing.T) {
	if _, err := ParseDir("testdata/absent", demoDomain); err == nil || !strings.Contains(err.Error(), "testdata/absent") {
		t.Errorf("got %v", err)
	}
	if _, err := ParseDir("testdata/good/small/access.csv", demoDomain); err == nil || !strings.Contains(err.Error(), "not a folder") {
		t.Errorf("got %v", err)
	}
	if _, err := ParseDir("testdata/good/small", spiffeid.TrustDomain{}); err == nil {
		t.Error("no trust domain was accepted")
	}
	dir := t.TempDir()
	if err := os.Symlink("/dev/zero", dir+"/access.csv"); err != nil {
		t.Fatal(err)
	}
	if _, err := ParseDir(dir, demoDomain); err == nil || !strings.Contains(err.Error(), "bytes") {
		t.Errorf("an endless file: got %v", err)
	}
}

func TestDeepAndCyclicGroupsAreFound(t *testing.T) {
	wide := &Policies{TrustDomain: demoDomain}
	for i := range 60 {
		for j := range 4 {
			for k := range 4 {
				wide.Memberships = append(wide.Memberships, Membership{
					Kind: CallerGroup, Member: fmt.Sprintf("group:a%d-%d", i, j), Group: fmt.Sprintf("group:a%d-%d", i+1, k),
				})
			}
		}
	}
	if err := wide.Validate(); err == nil || !strings.Contains(err.Error(), "nested") {
		t.Error("a lattice sixty groups deep was accepted")
	}
	cycle := &Policies{TrustDomain: demoDomain, Memberships: []Membership{
		{Kind: CallerGroup, Member: web, Group: "group:a"},
		{Kind: CallerGroup, Member: "group:a", Group: "group:b"},
		{Kind: CallerGroup, Member: "group:b", Group: "group:c"},
		{Kind: CallerGroup, Member: "group:c", Group: "group:a"},
	}}
	if err := cycle.Validate(); err == nil || strings.Count(err.Error(), "holds itself") != 3 {
		t.Errorf("got %v", err)
	}
}

func BenchmarkParse10000Rows(b *testing.B) {
	var csv strings.Builder
	for i := range 9_000 {
		fmt.Fprintf(&csv, "p, r-%d, in, %s, %s%d, 8443, GET, /v1/a/**, -, allow\n", i, web, billing, i%500)
	}
	fsys := fstest.MapFS{accessFile: {Data: []byte(csv.String())}}
	for b.Loop() {
		if _, err := ParseFS(fsys, demoDomain); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkProject(b *testing.B) {
	s := demoSnapshot(b)
	id := spiffeid.RequireFromString(billing)
	for b.Loop() {
		s.Project(id)
	}
}

// TestProjectingAProjectionChangesNothing but its endpoints: a proxy keeps that of
// a set and puts in endpoints as they come.
func TestProjectingAProjectionChangesNothing(t *testing.T) {
	dirs, err := filepath.Glob("testdata/good/*")
	if err != nil || len(dirs) == 0 {
		t.Fatal(dirs, err)
	}
	for _, dir := range append(dirs, "../../policies") {
		p, err := ParseDir(dir, demoDomain)
		if err != nil {
			t.Fatal(err)
		}
		var eps []Endpoint
		who := []spiffeid.ID{{}}
		for i, svc := range p.Services {
			eps = append(eps, endpoint(svc.Name, uint16(1000+i)))
			who = append(who, svc.ID)
		}
		for _, e := range p.Entries {
			who = append(who, e.SPIFFEID)
		}
		bare, err := Compile(p, 7, 3, nil)
		if err != nil {
			t.Fatal(err)
		}
		whole, err := Compile(p, 7, 3, eps)
		if err != nil {
			t.Fatal(err)
		}
		again(t, dir+" gateway", (*Snapshot).ProjectGateway, bare, whole)
		for _, id := range who {
			again(t, dir+" "+id.String(), func(s *Snapshot) *Snapshot { return s.Project(id) }, bare, whole)
		}
	}
}

func again(t *testing.T, name string, project func(*Snapshot) *Snapshot, bare, whole *Snapshot) {
	t.Helper()
	want := project(whole)
	with := *project(bare)
	with.Endpoints = want.Endpoints
	got := project(&with)
	if diff := cmp.Diff(string(want.Encode()), string(got.Encode())); diff != "" {
		t.Errorf("%s:\n%s", name, diff)
	}
	if (want.Candidate == nil) != (got.Candidate == nil) || want.Candidate != nil && want.Candidate.ContentHash() != got.Candidate.ContentHash() {
		t.Errorf("%s: another candidate", name)
	}
}

// TestProjectTellsOfRealAddresses: a sidecar learns which of the hosts that its
// workload may reach have their own addresses, and nothing else of them.
func TestProjectTellsOfRealAddresses(t *testing.T) {
	payment := spiffeid.RequireFromString("spiffe://demo.sallyport/ns/shop/sa/payment")
	row := func(dst string, eft Effect) Rule {
		return Rule{ID: dst, Dir: Out, Src: payment.String(), Dst: dst, Port: "443", Verb: "CONNECT", Path: "-", Cond: "-", Effect: eft}
	}
	s := &Snapshot{
		TrustDomain: payment.TrustDomain(),
		Rules: []Rule{
			row("host:exact.example.com", Allow), row("hosts:some", Allow), row("host:*.wild.example.com", Allow),
			row("host:one.wide.example.com", Allow), row("host:denied.example.com", Deny), row("host:virtual.example.com", Allow),
		},
		Memberships: []Membership{{Kind: DestinationGroup, Member: "hosts:more", Group: "hosts:some"}, {Kind: DestinationGroup, Member: "host:member.example.com", Group: "hosts:more"}},
	}
	for _, host := range []string{"exact.example.com", "member.example.com", "a.wild.example.com", "*.wide.example.com", "denied.example.com", "other.example.com"} {
		s.Destinations = append(s.Destinations, Destination{Host: host, Proto: "tls", SNI: "strict", DNS: RealAddresses, Private: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Endpoints: []Outlet{{Address: "10.0.0.1:443"}}})
	}
	s.Destinations = append(s.Destinations, Destination{Host: "virtual.example.com", Proto: "tls", SNI: "strict"})
	got := s.Project(payment)
	var want []Destination
	for _, host := range []string{"*.wide.example.com", "a.wild.example.com", "exact.example.com", "member.example.com"} {
		want = append(want, Destination{Host: host, Proto: "tls", SNI: "strict", DNS: RealAddresses})
	}
	if d := cmp.Diff(want, got.Destinations, cmp.AllowUnexported(Destination{}), cmp.Comparer(func(a, b Origin) bool { return true })); d != "" {
		t.Error(d)
	}
	if other := s.Project(spiffeid.RequireFromString("spiffe://demo.sallyport/ns/shop/sa/web")); len(other.Destinations) != 0 {
		t.Errorf("another workload learns of %+v", other.Destinations)
	}
}

// TestProjectTellsOfModes: where one host has a mode of its own, every sidecar
// learns which have, and which others the mode of a pattern is not for.
func TestProjectTellsOfModes(t *testing.T) {
	payment := spiffeid.RequireFromString("spiffe://demo.sallyport/ns/shop/sa/payment")
	s := &Snapshot{TrustDomain: payment.TrustDomain(), Destinations: []Destination{
		{Host: "*.new.example.com", Proto: "tls", SNI: "strict", Mode: Observe}, {Host: "held.new.example.com", Proto: "tls", SNI: "optional"}, {Host: "other.example.com", Proto: "tls", SNI: "strict"},
	}}
	got := s.Project(payment)
	for dst, want := range map[string]Mode{"host:a.new.example.com": Observe, "host:held.new.example.com": Enforce, "host:other.example.com": Enforce, "hosts:group": Enforce} {
		if s.ModeTo(dst) != want || got.ModeTo(dst) != want {
			t.Errorf("%s is in mode %s, to a sidecar %s, want %s", dst, s.ModeTo(dst), got.ModeTo(dst), want)
		}
	}
	if len(got.Destinations) != 2 {
		t.Errorf("a sidecar learns of %+v", got.Destinations)
	}
}
