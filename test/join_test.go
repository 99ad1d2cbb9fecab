package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestInitAndJoin brings up a trust domain and a node of it as a person would,
// with the files that init and join write and no others.
func TestInitAndJoin(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 0) // for its directory; its configuration is not used
	etc, state := w.path("etc"), w.path("state")
	run := func(code int, args ...string) string {
		t.Helper()
		out := command(t, filepath.Join(bin, "sallyport"), args...)
		if out.Code != code {
			t.Fatalf("sallyport %s ended with %d, want %d:\n%s", strings.Join(args, " "), out.Code, code, out.Output)
		}
		return out.Output
	}
	run(0, "init", "corp.example", "--dir", etc, "--data", state, "--listen", w.issuer, "--issuer", w.issuer)
	for _, c := range []struct{ program, file string }{{"issuer", "issuer.yaml"}, {"sidecar", "nodes/sidecar.yaml"}, {"gateway", "nodes/gateway.yaml"}} {
		checkExamples(t, c.program, filepath.Join(etc, c.file))
	}
	w.start("issuer", nil, "issuer", "run", "--config", filepath.Join(etc, "issuer.yaml"))
	socket := filepath.Join(state, "issuer", "run", "api.sock")
	// Its keys are encrypted, which costs it seconds of a processor.
	w.awaitFor(4*within, "reach the issuer", func() bool {
		return command(t, filepath.Join(bin, "sallyport"), "status", "--socket", socket).Code == 0
	})

	invitation := strings.Fields(run(0, "token", "create", "web", "--join", w.issuer, "--socket", socket))[0]
	node := w.path("node")
	out := run(0, "join", invitation, "--dir", filepath.Join(node, "etc"), "--data", filepath.Join(node, "web"), "--outbound", freePort(t))
	if want := "sidecar run --config " + filepath.Join(node, "etc", "sidecar.yaml"); !strings.Contains(out, want) {
		t.Errorf("join says\n%swithout %q", out, want)
	}
	if out := run(1, "join", invitation, "--dir", filepath.Join(node, "etc"), "--data", filepath.Join(node, "web")); !strings.Contains(out, "is there already, and nothing was written") {
		t.Errorf("a second join says %s", out)
	}
	sidecar := w.start("web", nil, "sidecar", "run", "--config", filepath.Join(node, "etc", "sidecar.yaml"), "--", "sleep", "600")
	w.awaitReadyAt(sidecar, filepath.Join(node, "web", "run", "admin.sock"))
	w.await("see the sidecar with its SVID", func() bool {
		return regexp.MustCompile(`(?m)^spiffe://corp\.example/ns/default/sa/web +sidecar +in .*SYNCED`).MatchString(run(0, "status", "--socket", socket))
	})
	w.examined(run, etc, filepath.Join(node, "etc"), filepath.Join(node, "web"))

	// The token is used up: another node gets nowhere with it.
	run(0, "join", invitation, "--dir", w.path("thief", "etc"), "--data", w.path("thief", "web"), "--outbound", freePort(t))
	thief := w.start("thief", nil, "sidecar", "run", "--config", w.path("thief", "etc", "sidecar.yaml"))
	<-thief.done
	if !strings.Contains(thief.out.String(), "already used") {
		t.Errorf("the second node with one token says %s", thief.out)
	}

	// The first admin, from afar.
	admin := w.path("admin")
	run(0, "svid", "mint", "spiffe://corp.example/ns/ops/sa/admin", "--ttl", "12h", "--write", admin, "--socket", socket)
	if out := run(0, "status", "--address", w.issuer, "--identity", admin); !strings.Contains(out, "ns/default/sa/web") {
		t.Errorf("the first admin sees\n%s", out)
	}

	// Whoever answers at the address and is not the issuer that invited is found
	// out before anything is written.
	other := newWorld(t, 0)
	other.write("issuer", fmt.Sprintf("trust_domain: corp.example\ndata_dir: %s/issuer\nlisten: %s\npolicies: %s\n", other.dir, other.issuer, filepath.Join(etc, "policies")))
	other.startIssuer()
	stranger := strings.Fields(run(0, "token", "create", "web", "--join", w.issuer, "--socket", other.path("issuer", "run", "api.sock")))[0]
	if out := run(1, "join", stranger, "--dir", w.path("fooled"), "--data", w.path("fooled", "web")); !strings.Contains(out, "no root with the expected fingerprint") {
		t.Errorf("join at another issuer says %s", out)
	}
	if _, err := os.Stat(w.path("fooled")); err == nil {
		t.Error("join at another issuer wrote something")
	}
}

// examined has the doctor look at an issuer and a node that are well, and at a
// node that was harmed.
func (w *world) examined(run func(int, ...string) string, issuer, node, data string) {
	w.t.Helper()
	find := func(code int, dir string) map[string]string {
		w.t.Helper()
		var r struct {
			OK       bool
			Cases    map[string]int
			Findings []struct{ Code, State, Detail string }
		}
		out := run(code, "doctor", "--dir", dir, "--json")
		line, _, _ := strings.Cut(out, "\n")
		if err := json.Unmarshal([]byte(line), &r); err != nil || r.OK != (code == 0) {
			w.t.Fatalf("the doctor says, with %v:\n%s", err, out)
		}
		states := map[string]string{}
		for _, f := range r.Findings {
			states[f.Code] = f.State
		}
		return states
	}
	for _, dir := range []string{issuer, node} {
		for code, state := range find(0, dir) {
			// What a machine in a container has: no clock of its own, and no capture.
			if state != "ok" && !slices.Contains([]string{"SP002", "SP003", "SP014", "SP015", "SP016", "SP017"}, code) {
				w.t.Errorf("%s of %s is %s", code, dir, state)
			}
		}
	}
	key := filepath.Join(data, "svids.json")
	if err := errors.Join(os.Chmod(key, 0o644), os.Chmod(data, 0o755)); err != nil {
		w.t.Fatal(err)
	}
	sick := find(1, node)
	if sick["SP004"] != "fail" || sick["SP005"] != "fail" || sick["SP008"] != "ok" {
		w.t.Errorf("a node whose keys are open to others: %v", sick)
	}
	if out := run(1, "doctor", "--dir", node); !strings.Contains(out, "next: chmod 600 "+key) {
		w.t.Errorf("the doctor does not say what to do:\n%s", out)
	}
	if err := errors.Join(os.Chmod(key, 0o600), os.Chmod(data, 0o700)); err != nil {
		w.t.Fatal(err)
	}
}

// example matches a line of a configuration that is commented out.
var example = regexp.MustCompile(`(?m)^( *)#([a-z])`)

// checkExamples has a program check a configuration as it is, and with every
// setting in it that is commented out.
func checkExamples(t *testing.T, program, file string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	whole := filepath.Join(t.TempDir(), "whole.yaml")
	text := example.ReplaceAllString(string(b), "$1$2")
	// Settings that exclude each other.
	if strings.Contains(text, "\n  attest:") {
		text = regexp.MustCompile(`(?m)^  join_token_file:.*\n`).ReplaceAllString(text, "")
	}
	if err := os.WriteFile(whole, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{file, whole} {
		if out := command(t, filepath.Join(bin, program), "run", "--check-config", "--config", f); out.Code != 0 {
			t.Errorf("%s refuses %s:\n%s%s", program, f, out.Output, text)
		}
	}
}
