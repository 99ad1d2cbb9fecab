package attest

import (
	"strings"
	"testing"
)

func TestNodeConfigNamesEveryMistake(t *testing.T) {
	for _, c := range []struct {
		name string
		c    NodeConfig
		want []string
	}{
		{"nothing is a join token", NodeConfig{}, nil},
		{"a field without a kind", NodeConfig{KeyFile: "k"}, []string{"issuer.attest.kind: missing beside key_file"}},
		{"an unknown kind", NodeConfig{Kind: "x509pot"}, []string{`"x509pot" is unknown`, `did you mean "x509pop"?`}},
		{"fields that are missing", NodeConfig{Kind: X509PoP}, []string{"issuer.attest.certificate_file: missing", "issuer.attest.key_file: missing"}},
		{"a field of another kind", NodeConfig{Kind: AWSIID, TokenFile: "t"}, []string{"issuer.attest.token_file: has no meaning for kind aws_iid"}},
		{"all that is needed", NodeConfig{Kind: X509PoP, CertificateFile: "c", KeyFile: "k"}, nil},
	} {
		err := c.c.Validate()
		if (err == nil) != (len(c.want) == 0) {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q does not say %q", c.name, err, w)
			}
		}
	}
}

func TestConfigNamesEveryMistake(t *testing.T) {
	c := &Config{
		X509PoP: &X509PoPConfig{},
		OIDC: &OIDCConfig{Issuers: map[string]OIDCIssuer{
			"a b": {Issuer: "http://x", JWKSFile: "f", JWKSURL: "http://x"},
			"c":   {Issuer: "https://same", Audience: "a", Require: map[string]string{"x": "y"}},
			"d":   {Issuer: "https://same", Audience: "a", Require: map[string]string{"x": "y"}},
		}},
		K8sPSAT:   &K8sPSATConfig{Clusters: map[string]K8sCluster{"blue": {ServiceAccounts: []string{"nobody"}, JWKSFile: "f", APIServer: "http://x"}}},
		AWSIID:    &AWSIIDConfig{},
		GCPIIT:    &GCPIITConfig{},
		AzureIMDS: &AzureIMDSConfig{Subscriptions: map[string]string{"x": "y"}},
	}
	err := c.Validate()
	for _, want := range []string{
		"attestors.x509pop.ca_file: missing", `attestors.oidc.issuers.a b: "a b" cannot be`, "issuers.a b.issuer: missing or not", "issuers.a b.audience: missing",
		"issuers.a b.require: missing", "issuers.a b.jwks_file: given beside", "issuers.a b.jwks_url: is not", "issuers.d.issuer: is that of c too",
		"clusters.blue.issuer: missing", `service_accounts[0]: "nobody" is not`, "clusters.blue.jwks_file: write one of", "api_server: is not", "token_file: belongs to",
		"aws_iid.accounts: missing", "aws_iid.certificates: missing", "gcp_iit.projects: missing", "azure_imds.subscriptions.x: want", "azure_imds.ca_file: missing",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no mistake %q in:\n%v", want, err)
		}
	}
	if err := (&Config{}).Validate(); err != nil {
		t.Errorf("no attestors: %v", err)
	}
	if _, err := NewVerifiers(td, Config{X509PoP: &X509PoPConfig{CAFile: "/nowhere"}}, nil); err == nil {
		t.Error("a file that is not there is no mistake")
	}
}
