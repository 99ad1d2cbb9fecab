package test

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"testing"
	"time"
)

// TestTwoTrustDomainsFederate runs two real issuers. One follows the other's
// bundle endpoint, and hands the bundle to the one workload whose entry names
// the other trust domain.
func TestTwoTrustDomainsFederate(t *testing.T) {
	t.Parallel()
	w := newWorld(t, time.Minute)
	endpoint := freePort(t)
	if err := os.MkdirAll(w.path("far-policies"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.path("far-policies", "access.csv"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	w.write("far", fmt.Sprintf(`trust_domain: far.example
data_dir: %s
listen: %s
policies: %s
bundle_endpoint: {listen: %s}
oidc: {listen: %s, issuer: "https://oidc.far.example"}
`, w.path("far"), freePort(t), w.path("far-policies"), endpoint, endpoint))
	far := w.start("far", nil, "issuer", "run", "--config", w.path("far", "config.yaml"))
	w.awaitReady(far)

	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	defer c.CloseIdleConnections()
	get := func(path string) []byte {
		t.Helper()
		r, err := c.Get("https://" + endpoint + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil || r.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s, %v", path, r.Status, err)
		}
		return b
	}
	if doc := get("/.well-known/openid-configuration"); !bytes.Contains(doc, []byte(`"issuer":"https://oidc.far.example"`)) {
		t.Errorf("discovery: %s", doc)
	}
	if err := os.WriteFile(w.path("far.json"), get("/"), 0o600); err != nil {
		t.Fatal(err)
	}

	conf, err := os.ReadFile(w.path("issuer", "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	w.write("issuer", string(conf)+fmt.Sprintf(`federation:
  - trust_domain: far.example
    url: https://%s
    profile: https_spiffe
    endpoint_spiffe_id: spiffe://far.example/spire/server
    bundle: %s
`, endpoint, w.path("far.json")))
	w.federate("billing", "far.example")
	w.startIssuer()
	type held struct {
		Federated []struct {
			TrustDomain string            `json:"trust_domain"`
			Bundle      [][]byte          `json:"bundle"`
			JWTKeys     map[string][]byte `json:"jwt_keys"`
		} `json:"federated"`
	}
	for name, want := range map[string]int{"billing": 1, "payment": 0} {
		n := &node{name: name}
		w.join(n)
		w.startNode(n)
		b, err := os.ReadFile(w.path(name, "svids.json"))
		if err != nil {
			t.Fatal(err)
		}
		var h held
		if err := json.Unmarshal(b, &h); err != nil {
			t.Fatal(err)
		}
		if len(h.Federated) != want {
			t.Errorf("%s has %d federated bundles, want %d", name, len(h.Federated), want)
		}
		for _, f := range h.Federated {
			if f.TrustDomain != "far.example" || len(f.Bundle) != 1 || len(f.JWTKeys) == 0 {
				t.Errorf("%s has of %s %d authorities and %d keys", name, f.TrustDomain, len(f.Bundle), len(f.JWTKeys))
			}
		}
	}
}
