package mesh

import (
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const tokenRowsCSV = `p, web-1, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, GET, /v1/**, -, allow
`

// withTokens parses the good tokens.yaml beside two services and these rows.
func withTokens(t *testing.T, rows string, edit func(string) string) *Policies {
	t.Helper()
	b, err := os.ReadFile("testdata/good/full/tokens.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	if edit != nil {
		text = edit(text)
	}
	p, err := ParseFS(fstest.MapFS{
		tokensFile: {Data: []byte(text)},
		accessFile: {Data: []byte(tokenRowsCSV + rows)},
		servicesFile: {Data: []byte(`services:
  - {name: billing, identity: spiffe://demo.sallyport/ns/shop/sa/billing, port: 8443}
  - {name: web, identity: spiffe://demo.sallyport/ns/shop/sa/web, port: 8443}
`)},
	}, demoDomain)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// known says which issuers and keys a proxy got.
func known(s *Snapshot) string {
	if s.Tokens == nil {
		return ""
	}
	var out []string
	for i := range s.Tokens.Issuers {
		out = append(out, s.Tokens.Issuers[i].Name())
	}
	for _, k := range s.Tokens.APIKeys {
		out = append(out, "key "+k.Name)
	}
	return strings.Join(out, ", ")
}

func TestTokensGoToTheProxiesThatCheckThem(t *testing.T) {
	const row = "p, t-1, in, **, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, POST, /v1/**, "
	for _, tt := range []struct {
		name, rows, billing string
		edit                func(string) string
	}{
		{name: "no row asks for a token"},
		{name: "a row names an issuer", rows: row + "iss=https://ci.example scope~pay, allow\n", billing: "https://ci.example"},
		{name: "a row names a trust domain", rows: row + "iss=spiffe://partner.example, allow\n", billing: "spiffe://partner.example"},
		{name: "a row asks for an API key", rows: row + "iss=apikey claim.sub=acme, allow\n", billing: "key acme, key old-batch"},
		{name: "a row asks for a token of anybody", rows: row + "scope~pay, allow\n", billing: "https://ci.example, https://login.example, local, spiffe://partner.example, key acme, key old-batch"},
		{name: "a deny row asks", rows: row + "iss=local, deny\n", billing: "local"},
		{name: "the issuer names the service", billing: "https://login.example", edit: func(s string) string {
			return strings.Replace(s, "    single_audience: true\n", "    single_audience: true\n    services: [billing]\n", 1)
		}},
		{name: "a key names the service", billing: "key acme", edit: func(s string) string {
			return strings.Replace(s, "    - name: acme\n", "    - name: acme\n      services: [billing]\n", 1)
		}},
		{name: "a key is for another service", rows: row + "iss=apikey, allow\n", billing: "key old-batch", edit: func(s string) string {
			return strings.Replace(s, "    - name: acme\n", "    - name: acme\n      services: [web]\n", 1)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := Compile(withTokens(t, tt.rows, tt.edit), 1, 1, nil)
			if err != nil {
				t.Fatal(err)
			}
			billing := s.Project(spiffeid.RequireFromString("spiffe://demo.sallyport/ns/shop/sa/billing"))
			if got := known(billing); got != tt.billing {
				t.Errorf("billing knows %q, want %q", got, tt.billing)
			}
			if err := billing.Validate(); err != nil {
				t.Errorf("the projection is invalid: %v", err)
			}
			again, err := DecodeSnapshot(billing.Encode())
			if diff := cmp.Diff(billing, again, cmp.AllowUnexported(spiffeid.ID{}, spiffeid.TrustDomain{}), cmpopts.EquateEmpty()); err != nil || diff != "" {
				t.Errorf("over the wire: %v\n%s", err, diff)
			}
			if got := known(s.ProjectGateway()); got != "" {
				t.Errorf("the gateway knows %q", got)
			}
			if got := known(s.Project(spiffeid.RequireFromString("spiffe://demo.sallyport/ns/shop/sa/nobody"))); got != "" {
				t.Errorf("a stranger knows %q", got)
			}
		})
	}
}

// The sidecar of a caller learns whose tokens count at the services whose routes ask
// for a claim, and checks what is shown to itself by nothing of that.
func TestIssuersGoToTheProxiesWhoseRoutesAskForClaims(t *testing.T) {
	const row = "p, t-1, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, POST, /v1/**, iss=https://ci.example, allow\n" +
		"p, t-2, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, PUT, /v1/**, iss=apikey, allow\n"
	for name, tt := range map[string]struct {
		routes Routes
		want   string
	}{
		"no claim":    {Routes{Routes: []Route{{Name: "a", Sticky: &Sticky{By: "caller"}, Limit: &RateLimit{Rate: 1, By: "caller"}}}}, ""},
		"a match":     {Routes{Routes: []Route{{Name: "a", Matches: []Match{{Claims: map[string]string{"tier": "gold"}}}}}}, "https://ci.example"},
		"a region":    {Routes{Routes: []Route{{Name: "a", Matches: []Match{{Region: &Region{In: []string{"eu"}, Claim: "region"}}}}}}, "https://ci.example"},
		"a sticky":    {Routes{Routes: []Route{{Name: "a", Sticky: &Sticky{By: "claim", Name: "sub"}}}}, "https://ci.example"},
		"a limit":     {Routes{Routes: []Route{{Name: "a", Limit: &RateLimit{Rate: 1, By: "claim:sub"}}}}, "https://ci.example"},
		"an endpoint": {Routes{Balance: Balance{Policy: "ring_hash", Hash: &Sticky{By: "claim", Name: "sub"}}}, "https://ci.example"},
	} {
		p := withTokens(t, row, nil)
		tt.routes.Service = "billing"
		p.Routes = []Routes{tt.routes}
		s, err := Compile(p, 1, 1, nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		web, billing := s.Project(spiffeid.RequireFromString("spiffe://demo.sallyport/ns/shop/sa/web")), s.Project(spiffeid.RequireFromString("spiffe://demo.sallyport/ns/shop/sa/billing"))
		if got := known(&Snapshot{Tokens: web.Shown}); got != tt.want || web.Tokens != nil {
			t.Errorf("%s: web knows %q for its routes and %q for itself, want %q", name, got, known(web), tt.want)
		}
		if billing.Shown != nil {
			t.Errorf("%s: billing, which does not call itself, knows %q", name, known(&Snapshot{Tokens: billing.Shown}))
		}
		if err := web.Validate(); err != nil {
			t.Errorf("%s: the projection is invalid: %v", name, err)
		}
		if again, err := DecodeSnapshot(web.Encode()); err != nil || !cmp.Equal(web.Shown, again.Shown, cmp.AllowUnexported(spiffeid.ID{}, spiffeid.TrustDomain{}), cmpopts.EquateEmpty()) {
			t.Errorf("%s: over the wire: %v", name, err)
		}
	}
}

// A set without tokens has the bytes and the hash that it always had.
func TestNoTokensLeaveNoTrace(t *testing.T) {
	p := withTokens(t, "", func(string) string { return "issuers: []\n" })
	if p.Tokens != nil {
		t.Errorf("an empty tokens.yaml gives %+v", p.Tokens)
	}
	s, err := Compile(p, 1, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(s.Encode()), "tokens") || strings.Contains(string(p.Encode()), "tokens") {
		t.Error("a set without tokens speaks of tokens")
	}
}

func TestHashSeesTokensButNotTheirLines(t *testing.T) {
	was := withTokens(t, "", nil).Hash()
	if withTokens(t, "", func(s string) string { return "# a comment\n" + s }).Hash() != was {
		t.Error("a comment changes the hash")
	}
	for what, edit := range map[string][2]string{
		"an audience": {"audiences: [billing]", "audiences: [billing2]"}, "a scope": {"orders:read", "orders:write"},
		"a revocation": {"jti: 6c0d1c2f", "jti: 6c0d1c20"}, "a window": {"window: 30s", "window: 31s"},
	} {
		if withTokens(t, "", func(s string) string { return strings.Replace(s, edit[0], edit[1], 1) }).Hash() == was {
			t.Errorf("%s does not change the hash", what)
		}
	}
}

func TestTokenDefaults(t *testing.T) {
	p := withTokens(t, "", nil)
	byName := map[string]TokenIssuer{}
	for _, i := range p.Tokens.Issuers {
		byName[i.Name()] = i
	}
	if got := slices.Sorted(maps.Keys(byName)); len(got) != 4 {
		t.Fatalf("issuers are %q", got)
	}
	i := byName["local"]
	if i.Leeway != defaultLeeway || i.MaxLifetime != defaultLifetime || i.MaxBytes != 8192 || i.MaxClaims != 64 || i.Binding != BindNone || !slices.Equal(i.Algorithms, DefaultAlgorithms) {
		t.Errorf("defaults are %+v", i)
	}
	if i := byName["spiffe://partner.example"]; i.MaxLifetime != svidLifetime || slices.Contains(i.Algorithms, "EdDSA") {
		t.Errorf("defaults of a JWT-SVID are %+v", i)
	}
	if r := p.Tokens.APIKeys[0].Rate; r.Calls != 50 || r.Per.Seconds() != 1 {
		t.Errorf("rate is %+v", r)
	}
}

// What docs/tokens.md shows is what a reader copies.
func TestTokensPageParses(t *testing.T) {
	page, err := os.ReadFile("../../docs/tokens.md")
	if err != nil {
		t.Fatal(err)
	}
	block := func(lang string) string {
		_, rest, ok := strings.Cut(string(page), "```"+lang+"\n")
		text, _, ends := strings.Cut(rest, "```")
		if !ok || !ends {
			t.Fatalf("the page has no block of %s", lang)
		}
		return text
	}
	p := withTokens(t, block("csv"), func(string) string { return block("yaml") })
	if len(p.Tokens.Issuers) != 2 || len(p.Tokens.APIKeys) != 1 || len(p.Tokens.Revoked) != 2 {
		t.Errorf("the page gives %+v", p.Tokens)
	}
	s, err := Compile(p, 1, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := known(s.Project(spiffeid.RequireFromString("spiffe://demo.sallyport/ns/shop/sa/billing"))); got != "https://login.example, key acme" {
		t.Errorf("billing knows %q", got)
	}
}
