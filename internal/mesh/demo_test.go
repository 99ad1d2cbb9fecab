package mesh

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// demoDomain is the trust domain of the documents in policies/.
var demoDomain = spiffeid.RequireTrustDomainFromString("demo.sallyport")

func TestDemoPoliciesParse(t *testing.T) {
	p, err := ParseDir("../../policies", demoDomain)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Services) != 4 || len(p.Entries) != 6 || len(p.Rules) != 7 || len(p.Cases) < 20 {
		t.Errorf("got %d services, %d entries, %d rules, %d tests", len(p.Services), len(p.Entries), len(p.Rules), len(p.Cases))
	}
	if _, err := Compile(p, 1, 1, nil); err != nil {
		t.Error(err)
	}
}
