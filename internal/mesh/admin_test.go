package mesh

import (
	"testing"
	"testing/fstest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const adminRows = `# who may do what
p, shop-desk, spiffe://corp.example/ns/ops/sa/desk, entry.*, spiffe://corp.example/ns/shop/**, allow
p, no-billing, spiffe://corp.example/**, *, spiffe://corp.example/ns/shop/sa/billing, deny
p, no-mint, local, svid.MintX509SVID, **, deny
p, count, spiffe://corp.example/ns/ops/*/desk, agent.CountAgents, **, allow
`

func TestAdminRowsDecideByDenyOverrides(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("corp.example")
	p, err := ParseFS(fstest.MapFS{"access.csv": {Data: []byte{}}, "admin.csv": {Data: []byte(adminRows)}}, td)
	if err != nil {
		t.Fatal(err)
	}
	id := func(path string) spiffeid.ID {
		if path == "" {
			return spiffeid.ID{}
		}
		return spiffeid.RequireFromPath(td, path)
	}
	const desk = "/ns/ops/sa/desk"
	for _, tc := range []struct {
		caller, method, on string
		effect             Effect
		rule               string
	}{
		{desk, "entry.BatchCreateEntry", "/ns/shop/sa/pay", Allow, "shop-desk"},
		{desk, "entry.BatchCreateEntry", "/ns/shop/sa/billing", Deny, "no-billing"},
		{desk, "entry.BatchCreateEntry", "/ns/ops/sa/pay", "", ""},
		{desk, "entry.BatchCreateEntry", "", "", ""},
		{desk, "agent.CountAgents", "", Allow, "count"},
		{desk, "agent.BanAgent", "/ns/shop/sa/pay", "", ""},
		{"/ns/ops/sa/other", "entry.ListEntries", "/ns/shop/sa/pay", "", ""},
		{"", "svid.MintX509SVID", "/ns/shop/sa/pay", Deny, "no-mint"},
		{"", "svid.MintJWTSVID", "/ns/shop/sa/billing", "", ""},
	} {
		effect, rule := p.JudgeAdmin(id(tc.caller), tc.method, id(tc.on))
		if effect != tc.effect || rule != tc.rule {
			t.Errorf("%s %s on %s: %q by %q, want %q by %q", tc.caller, tc.method, tc.on, effect, rule, tc.effect, tc.rule)
		}
	}
	if !p.MayAdmin(id(desk), "entry.GetEntry") || p.MayAdmin(id(desk), "svid.MintX509SVID") || p.MayAdmin(id("/x"), "entry.GetEntry") || p.MayAdmin(spiffeid.ID{}, "entry.GetEntry") {
		t.Error("MayAdmin does not follow the allow rows")
	}
	with := p.Hash()
	again, err := DecodePolicies(p.Encode())
	if err != nil || again.Hash() != with {
		t.Errorf("the rows do not survive the store: %v", err)
	}
	p.Admin = nil
	if p.Hash() == with {
		t.Error("the hash does not cover the rows")
	}
}

func FuzzAdminRows(f *testing.F) {
	f.Add([]byte(adminRows))
	td := spiffeid.RequireTrustDomainFromString("corp.example")
	f.Fuzz(func(t *testing.T, src []byte) {
		p, err := ParseFS(fstest.MapFS{"access.csv": {Data: []byte{}}, "admin.csv": {Data: src}}, td)
		if err != nil {
			return
		}
		for _, r := range p.Admin {
			if r.Effect != Allow && r.Effect != Deny {
				t.Fatalf("accepted %+v", r)
			}
		}
	})
}
