package main

import (
	"bytes"
	"context"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/ca"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

func TestHoldersAreWhoMayStillServe(t *testing.T) {
	now := time.Unix(1e9, 0)
	at := func(name string, connected bool, left time.Duration) mesh.Proxy {
		return mesh.Proxy{Workload: spiffeid.RequireFromString("spiffe://x/" + name), Connected: connected, SVIDExpires: now.Add(left)}
	}
	says := at("says", true, time.Hour)
	says.Authorities = &mesh.Authorities{Trusts: []string{"r"}, Shows: []string{"s"}}
	got := holders([]mesh.Proxy{says, at("silent", true, -time.Hour), at("away", false, time.Hour), at("gone", false, -time.Hour)}, now)
	want := []ca.Holder{
		{Name: "spiffe://x/says", Trusts: []string{"r"}, Shows: []string{"s"}},
		{Name: "spiffe://x/silent"},
		{Name: "spiffe://x/away (not connected)"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestRootIsReplacedOffline has a CA whose root has expired refuse to open, and
// the command make another.
func TestRootIsReplacedOffline(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("corp.example")
	dir := t.TempDir()
	file := filepath.Join(dir, "issuer.yaml")
	data := filepath.Join(dir, "data")
	conf := "trust_domain: corp.example\ndata_dir: " + data + "\nlisten: 127.0.0.1:0\npolicies: " + dir + "\n"
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	command := func(args ...string) (string, error) {
		var out bytes.Buffer
		err := run(context.Background(), append(args, "--config", file), &out, &out)
		return out.String(), err
	}
	refused := func(want string, args ...string) {
		t.Helper()
		if _, err := command(args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
	refused("asks no proxy", "ca", "rotate")
	refused("there is no CA", "ca", "rotate", "--emergency")
	if _, err := os.Stat(data); err == nil {
		t.Error("a wrong data_dir was made")
	}
	if err := os.MkdirAll(data, 0o700); err != nil {
		t.Fatal(err)
	}
	cfg := ca.Config{TrustDomain: td, Dir: filepath.Join(data, "ca"), Audit: audit.NewMemory()}
	c, err := ca.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	refused("another process has it open", "ca", "rotate", "--emergency")
	c.Close()
	refused("the root is still good", "ca", "rotate", "--emergency")

	if err := os.RemoveAll(cfg.Dir); err != nil {
		t.Fatal(err)
	}
	cfg.Now = func() time.Time { return time.Now().Add(-400 * 24 * time.Hour) }
	if c, err = ca.Open(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	old := c.Bundle().X509[0]
	c.Close()
	out, err := command("ca", "rotate", "--emergency")
	if err != nil || !strings.Contains(out, "next: start the issuer; copy "+filepath.Join(data, "bundle.pem")) {
		t.Fatalf("%v: %s", err, out)
	}
	cfg.Now = nil
	if c, err = ca.Open(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	bundle, err := os.ReadFile(filepath.Join(data, "bundle.pem"))
	block, _ := pem.Decode(bundle)
	if err != nil || block == nil || !bytes.Equal(block.Bytes, c.Bundle().X509[0].Raw) || c.Bundle().X509[0].Equal(old) {
		t.Errorf("bundle.pem is not the new root: %v", err)
	}
	if code := daemon.Code(func() error { _, err := command("ca", "rotate"); return err }()); code != daemon.Usage {
		t.Errorf("exit status %d", code)
	}
}
