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

func TestAdminRowsSurviveTheStore(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("corp.example")
	p, err := ParseFS(fstest.MapFS{"access.csv": {Data: []byte{}}, "admin.csv": {Data: []byte(adminRows)}}, td)
	if err != nil {
		t.Fatal(err)
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
