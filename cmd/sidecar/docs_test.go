package main

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"sallyport/internal/daemon"
)

// TestTheManualOfCaptureWorks reads every example of docs/capture.md and dns.md as
// the sidecar does.
func TestTheManualOfCaptureWorks(t *testing.T) {
	var page []byte
	for _, name := range []string{"capture", "dns"} {
		one, err := os.ReadFile("../../docs/" + name + ".md")
		if err != nil {
			t.Fatal(err)
		}
		page = append(page, one...)
	}
	const rest = "trust_domain: corp.example\ndata_dir: /var/lib/sallyport\nissuer: {addresses: [\"127.0.0.1:1\"], bundle: bundle.pem}\n"
	examples := regexp.MustCompile("(?s)```yaml\n(# sidecar.yaml.*?)```").FindAllSubmatch(page, -1)
	for _, m := range examples {
		file := filepath.Join(t.TempDir(), "sidecar.yaml")
		if err := os.WriteFile(file, []byte(rest+string(m[1])), 0o600); err != nil {
			t.Fatal(err)
		}
		var c Config
		if err := daemon.LoadConfig(file, nil, nil, &c); err != nil {
			t.Errorf("%s\n%v", m[1], err)
		}
		c.fill()
		if !c.Capture.Enabled() {
			t.Errorf("it captures nobody:\n%s", m[1])
		}
	}
	if len(examples) < 3 {
		t.Errorf("the page has %d examples", len(examples))
	}
}

// TestTheManualOfShadowsWorks reads the examples of docs/shadow.md that are of
// a sidecar.
func TestTheManualOfShadowsWorks(t *testing.T) {
	page, err := os.ReadFile("../../docs/shadow.md")
	if err != nil {
		t.Fatal(err)
	}
	const rest = "trust_domain: corp.example\ndata_dir: /var/lib/sallyport\nissuer: {addresses: [\"127.0.0.1:1\"], bundle: bundle.pem}\n"
	examples := regexp.MustCompile("(?s)```yaml\n(# sidecar.yaml.*?)```").FindAllSubmatch(page, -1)
	for _, m := range examples {
		file := filepath.Join(t.TempDir(), "sidecar.yaml")
		if err := os.WriteFile(file, []byte(rest+string(m[1])), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := daemon.LoadConfig(file, nil, nil, new(Config)); err != nil {
			t.Errorf("%s\n%v", m[1], err)
		}
	}
	if len(examples) != 2 {
		t.Errorf("the page has %d examples", len(examples))
	}
}
