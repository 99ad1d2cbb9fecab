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
	err := (&Config{X509PoP: &X509PoPConfig{}}).Validate()
	for _, want := range []string{"attestors.x509pop.ca_file: missing"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
	if _, err := NewVerifiers(td, Config{X509PoP: &X509PoPConfig{CAFile: "/nowhere"}}, nil); err == nil {
		t.Error("a file that is not there is no mistake")
	}
}
