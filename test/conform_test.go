package test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/internal/conform"
	"sallyport/policies"
)

// A conformResult is the last line of sallyport conform.
type conformResult struct {
	Name  string `json:"name"`
	OK    bool   `json:"ok"`
	Cases struct {
		Tried   int `json:"tried"`
		Passed  int `json:"passed"`
		Failed  int `json:"failed"`
		Skipped int `json:"skipped"`
	} `json:"cases"`
	Figures  map[string]float64 `json:"figures,omitempty"`
	Verdicts []conformVerdict   `json:"verdicts,omitempty"`
}

type conformVerdict struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}

// conformed is the sum of all runs of sallyport conform, the last line that the
// tests print.
var conformed = &conformSum{conformResult: conformResult{Name: "conform", OK: true}}

type conformSum struct {
	mu sync.Mutex // guards what follows
	conformResult
}

func (s *conformSum) add(r conformResult) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.OK = s.OK && r.OK
	s.Cases.Tried += r.Cases.Tried
	s.Cases.Passed += r.Cases.Passed
	s.Cases.Failed += r.Cases.Failed
	s.Cases.Skipped += r.Cases.Skipped
	for _, v := range r.Verdicts {
		v.Name = strings.TrimPrefix(r.Name, "conform ") + ": " + v.Name
		s.Verdicts = append(s.Verdicts, v)
	}
}

// print writes the sum, if there was a run.
func (s *conformSum) print() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.Cases.Tried == 0 {
		return
	}
	if line, err := json.Marshal(s.conformResult); err == nil {
		fmt.Printf("%s\n", line)
	}
}

// ownProof is the demand on an endpoint of the profile https_web; that of our
// issuer has https_spiffe here. docs/conformance.md names the test that shows it.
const ownProof = 88

// holds reads what a run printed, and fails the test when a demand was not met,
// or was not looked at though docs/conformance.md says that this form does.
func holds(t *testing.T, form string, r runReply) {
	t.Helper()
	text := strings.TrimSpace(r.Output)
	last := text[strings.LastIndexByte(text, '\n')+1:]
	var got conformResult
	if err := json.Unmarshal([]byte(last), &got); err != nil {
		t.Fatalf("the last line is no result: %v\n%s", err, text)
	}
	if r.Code != 0 || !got.OK || got.Cases.Failed != 0 || len(got.Verdicts) != 134 || got.Cases.Tried != got.Cases.Passed {
		t.Errorf("it ended with %d: %+v", r.Code, got.Cases)
	}
	for i, m := range conform.Musts() {
		v := got.Verdicts[i]
		switch {
		case !v.OK:
			t.Errorf("%s: %s", v.Name, v.Detail)
		case strings.HasPrefix(v.Detail, "not applicable: ") && m.Absent == "" && slices.Contains(m.Forms, form) && m.Number != ownProof:
			t.Errorf("%s: %s", v.Name, v.Detail)
		}
	}
	conformed.add(got)
	t.Logf("%s: %+v", got.Name, got.Cases)
}

// TestConformWorkloadAPI runs the product's own check as a workload of a real
// sidecar that federates with the check's throw-away trust domain.
func TestConformWorkloadAPI(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 10*time.Second)
	domain := w.path("lies")
	if r := command(t, filepath.Join(bin, "sallyport"), "conform", "domain", domain); r.Code != 0 {
		t.Fatal(r.Output)
	}
	conf, err := os.ReadFile(w.path("issuer", "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	w.write("issuer", string(conf)+fmt.Sprintf(`federation:
  - trust_domain: conform.example
    url: https://%s
    profile: https_spiffe
    endpoint_spiffe_id: spiffe://conform.example/endpoint
    bundle: %s
`, freePort(t), filepath.Join(domain, conform.BundleFile)))
	w.federate("payment", "conform.example")
	w.startIssuer()
	n := &node{name: "payment"}
	w.join(n)
	h := w.startNode(n)
	// The address comes from SPIFFE_ENDPOINT_SOCKET, which the sidecar set.
	holds(t, conform.WorkloadForm, ask[runReply](h, "/run", []string{
		filepath.Join(bin, "sallyport"), "conform", "workload-api", "--domain", domain, "--wait", "10s", "--json",
	}))
}

// federate lets the entry of a demo agent name another trust domain.
func (w *world) federate(agent, td string) {
	w.t.Helper()
	entries, err := policies.FS.ReadFile("entries.yaml")
	if err != nil {
		w.t.Fatal(err)
	}
	who := "    parent_id: spiffe://" + trustDomain + "/spire/agent/join_token/" + agent + "\n"
	edited := strings.Replace(string(entries), who, who+"    federates_with: ["+td+"]\n", 1)
	if edited == string(entries) {
		w.t.Fatalf("the demo has no entry for %s", agent)
	}
	if err := os.WriteFile(filepath.Join(w.policy, "entries.yaml"), []byte(edited), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// TestConformServer runs the product's own check against a real issuer, with an
// operator's rights and with an endpoint of its own that the issuer follows.
func TestConformServer(t *testing.T) {
	t.Parallel()
	w := newWorld(t, time.Minute)
	public := freePort(t)
	conf, err := os.ReadFile(w.path("issuer", "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	w.write("issuer", string(conf)+fmt.Sprintf(`bundle_endpoint: {listen: %s}
oidc: {listen: %s, issuer: "https://%s"}
`, public, public, public))
	w.startIssuer()
	holds(t, conform.ServerForm, w.sallyport("conform", "server", "--address", w.issuer, "--bundle", w.path("issuer", "bundle.pem"),
		"--bundle-endpoint", "https://"+public+"/", "--oidc", "https://"+public, "--listen", freePort(t), "--json"))
}
