package attest

import (
	"bytes"
	"os"
	"regexp"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// TestTheManualWorks decodes every example of docs/attest.md as the programs
// do, and wants one for each kind.
func TestTheManualWorks(t *testing.T) {
	b, err := os.ReadFile("../../docs/attest.md")
	if err != nil {
		t.Fatal(err)
	}
	issuers, nodes := map[string]bool{}, map[string]bool{}
	for _, m := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllSubmatch(b, -1) {
		var c struct {
			Attestors Config
			Issuer    struct{ Attest NodeConfig }
			Workload  struct{ Kubelet KubeletConfig }
			Selectors []string
		}
		if bytes.HasPrefix(m[1], []byte("entries:")) {
			files := fstest.MapFS{"access.csv": {}, "entries.yaml": {Data: m[1]}}
			if _, err := mesh.ParseFS(files, spiffeid.RequireTrustDomainFromString("corp.example")); err != nil {
				t.Errorf("%s\n%v", m[1], err)
			}
			continue
		}
		if err := mesh.DecodeYAML("attest.md", m[1], &c); err != nil {
			t.Errorf("%s\n%v", m[1], err)
			continue
		}
		for _, v := range []interface{ Validate() error }{&c.Attestors, c.Issuer.Attest, c.Workload.Kubelet} {
			if err := v.Validate(); err != nil {
				t.Errorf("%s\n%v", m[1], err)
			}
		}
		for _, s := range c.Selectors {
			if _, err := mesh.ParseSelector(s); err != nil {
				t.Error(err)
			}
		}
		for kind, has := range map[string]bool{
			X509PoP: c.Attestors.X509PoP != nil, OIDC: c.Attestors.OIDC != nil, K8sPSAT: c.Attestors.K8sPSAT != nil,
			AWSIID: c.Attestors.AWSIID != nil, GCPIIT: c.Attestors.GCPIIT != nil, AzureIMDS: c.Attestors.AzureIMDS != nil,
		} {
			issuers[kind] = issuers[kind] || has
		}
		nodes[c.Issuer.Attest.Kind] = true
	}
	for kind := range nodeKinds {
		if !issuers[kind] || !nodes[kind] || !strings.Contains(string(b), "\n### "+kind+"\n") {
			t.Errorf("docs/attest.md has no section with examples for %s", kind)
		}
	}
}
