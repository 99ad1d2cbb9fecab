package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
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
	issuer := w.start("issuer", nil, "issuer", "run", "--config", filepath.Join(etc, "issuer.yaml"))
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
	sidecar := w.start("web", nil, "sidecar", "run", "--config", filepath.Join(node, "etc", "sidecar.yaml"), "--", "sh", "-c", "echo program $$; exec sleep 600")
	w.awaitReadyAt(sidecar, filepath.Join(node, "web", "run", "admin.sock"))
	w.await("see the sidecar with its SVID", func() bool {
		return regexp.MustCompile(`(?m)^spiffe://corp\.example/ns/default/sa/web +sidecar +in .*SYNCED`).MatchString(run(0, "status", "--socket", socket))
	})
	w.examined(run, etc, filepath.Join(node, "etc"), filepath.Join(node, "web"))
	w.whoIsWho(run, sidecar, filepath.Join(node, "web", "run", "admin.sock"), socket)
	w.reported(run, etc, filepath.Join(state, "issuer"))
	w.reported(run, filepath.Join(node, "etc"), filepath.Join(node, "web"))
	if out := run(0, "upgrade", "check", "--dir", etc, "--bin", bin); !strings.Contains(out, "UP004  ok") {
		t.Errorf("upgrade check says\n%s", out)
	}
	w.restored(run, issuer, etc, filepath.Join(state, "issuer"))
	w.await("see the sidecar at the issuer that was put back", func() bool {
		return regexp.MustCompile(`(?m)^spiffe://corp\.example/ns/default/sa/web +sidecar +in .*SYNCED +now`).MatchString(run(0, "status", "--socket", socket))
	})

	// The token is used up, as the issuer that was put back knows too: another
	// node gets nowhere with it.
	run(0, "join", invitation, "--dir", w.path("thief", "etc"), "--data", w.path("thief", "web"), "--outbound", freePort(t))
	thief := w.start("thief", nil, "sidecar", "run", "--config", w.path("thief", "etc", "sidecar.yaml"))
	<-thief.done
	if !strings.Contains(thief.out.String(), "already used") {
		t.Errorf("the second node with one token says %s", thief.out)
	}

	// A node is taken away once it does not run, and not before.
	gone := []string{"uninstall", "--dir", filepath.Join(node, "etc"), "--purge"}
	if out := run(0, gone...); !strings.Contains(out, "nothing was taken away") {
		t.Errorf("uninstall without --yes says\n%s", out)
	}
	if out := run(1, append(gone, "--yes")...); !strings.Contains(out, "sidecar still runs") {
		t.Errorf("uninstall of what runs says\n%s", out)
	}
	sidecar.stop()
	run(0, append(gone, "--yes")...)
	for _, f := range []string{filepath.Join(node, "web"), filepath.Join(node, "etc", "sidecar.yaml"), filepath.Join(node, "etc", "join-token")} {
		if _, err := os.Stat(f); err == nil {
			t.Errorf("%s is left", f)
		}
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

// whoIsWho asks the sidecar of web who it is, who its processes are, and whether
// it can call a service that then joins.
func (w *world) whoIsWho(run func(int, ...string) string, web *proc, socket, issuer string) {
	w.t.Helper()
	if out := run(0, "id", "--proxy", socket); !regexp.MustCompile(`(?m)^spiffe://corp\.example/ns/default/sa/web +in \d+m +/spire/agent/join_token/web`).MatchString(out) {
		w.t.Errorf("id says\n%s", out)
	}
	pid := web.cmd.Process.Pid
	if out := run(1, "id", "explain", strconv.Itoa(pid), "--proxy", socket); !strings.Contains(out, "NO: it lacks child:true") {
		w.t.Errorf("of the sidecar itself id explain says\n%s", out)
	}
	var child string
	w.await("hear which process the program is", func() bool {
		if m := regexp.MustCompile(`(?m)^program (\d+)$`).FindStringSubmatch(web.out.String()); m != nil {
			child = m[1]
		}
		return child != ""
	})
	if out := run(0, "id", "explain", child, "--proxy", socket); !strings.Contains(out, "yes, and its calls go out as this") {
		w.t.Errorf("of the program %s id explain says\n%s", child, out)
	}
	if out := run(1, "tls", "check", socket, "api"); !strings.Contains(out, "no endpoint of api is known") {
		w.t.Errorf("before there is an endpoint tls check says\n%s", out)
	}
	app, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { app.Close() })
	go func() {
		for c, err := app.Accept(); err == nil; c, err = app.Accept() {
			c.Close()
		}
	}()
	invitation := strings.Fields(run(0, "token", "create", "api", "--join", w.issuer, "--socket", issuer))[0]
	run(0, "join", invitation, "--dir", w.path("api", "etc"), "--data", w.path("api", "state"), "--outbound", freePort(w.t), "--app", app.Addr().String(), "--listen", freePort(w.t))
	api := w.start("api", nil, "sidecar", "run", "--config", w.path("api", "etc", "sidecar.yaml"), "--", "sleep", "600")
	w.awaitReadyAt(api, w.path("api", "state", "run", "admin.sock"))
	var out string
	w.await("shake hands with api", func() bool {
		r := command(w.t, filepath.Join(bin, "sallyport"), "tls", "check", socket, "api.mesh.internal")
		out = r.Output
		return r.Code == 0
	})
	for _, want := range []string{"proved to be spiffe://corp.example/ns/default/sa/api, by a certificate that ends in ", "TLS 1.3, TLS_AES_128_GCM_SHA256, keys by X25519MLKEM768; speaks sallyport/1", "it took the caller's certificate as well"} {
		if !strings.Contains(out, want) {
			w.t.Errorf("tls check does not say %q:\n%s", want, out)
		}
	}
	api.stop()
	w.await("miss api", func() bool {
		r := command(w.t, filepath.Join(bin, "sallyport"), "tls", "check", socket, "api")
		return r.Code == 1
	})
}

// reported makes a report and looks for the secrets of the programs in it.
func (w *world) reported(run func(int, ...string) string, dir, data string) {
	w.t.Helper()
	file := filepath.Join(w.t.TempDir(), "report.tar.gz")
	run(0, "bug-report", "--dir", dir, "--write", file)
	listed := command(w.t, "tar", "xzOf", file)
	if listed.Code != 0 || !strings.Contains(listed.Output, `"name": "doctor"`) || !strings.Contains(listed.Output, "trust_domain: corp.example") || !strings.Contains(listed.Output, "go_goroutines") {
		w.t.Fatalf("the report of %s lacks what helps:\n%.2000s", dir, listed.Output)
	}
	found := 0
	look := func(file, secret string) {
		found++
		if strings.Contains(listed.Output, secret) {
			w.t.Errorf("a secret of %s is in the report", file)
		}
	}
	for _, root := range []string{dir, data} {
		err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			switch name := e.Name(); {
			case name == "ca.passphrase", name == "join-token":
				look(p, strings.TrimSpace(string(b)))
			case strings.HasSuffix(name, ".key"):
				for _, line := range strings.Fields(string(b)) {
					if len(line) == 64 {
						look(p, line)
					}
				}
			case name == "svids.json", name == "node.json":
				var st struct{ Identities []struct{ Key string } }
				if err := json.Unmarshal(b, &st); err != nil {
					return err
				}
				for _, id := range st.Identities {
					look(p, id.Key)
				}
			}
			return nil
		})
		if err != nil {
			w.t.Fatal(err)
		}
	}
	if found == 0 {
		w.t.Error("nothing was looked for")
	}
}

// restored backs an issuer up while it runs, loses it, and puts it back.
func (w *world) restored(run func(int, ...string) string, issuer *proc, etc, data string) {
	w.t.Helper()
	key, file := w.path("backup.key"), w.path("issuer.age")
	recipient := regexp.MustCompile(`age1[0-9a-z]+`).FindString(run(0, "archive", "keygen", key))
	if out := run(0, "backup", "--dir", etc, "--to", file, "--recipient", recipient); !strings.Contains(out, "not in it: audit records") {
		w.t.Errorf("backup says\n%s", out)
	}
	if b, err := os.ReadFile(file); err != nil || bytes.Contains(b, []byte("corp.example")) {
		w.t.Errorf("the backup can be read by anybody (%v)", err)
	}
	root, err := os.ReadFile(filepath.Join(data, "bundle.pem"))
	if err != nil {
		w.t.Fatal(err)
	}
	if out := run(1, "restore", file, "--key", key, "--dir", etc, "--data", data); !strings.Contains(out, "is not empty, and nothing was put back") {
		w.t.Errorf("restore over an issuer says\n%s", out)
	}
	if out := run(1, "restore", file, "--key", key); !strings.Contains(out, "belongs into "+etc+" and "+data) {
		w.t.Errorf("restore to where it was not says\n%s", out)
	}
	issuer.stop()
	if err := errors.Join(os.RemoveAll(etc), os.RemoveAll(data)); err != nil {
		w.t.Fatal(err)
	}
	wrong := w.path("other.key")
	run(0, "archive", "keygen", wrong)
	run(1, "restore", file, "--key", wrong, "--dir", etc, "--data", data)
	if _, err := os.Stat(data); err == nil {
		w.t.Error("restore with a wrong key left something")
	}
	run(0, "restore", file, "--key", key, "--dir", etc, "--data", data)
	w.start("issuer", nil, "issuer", "run", "--config", filepath.Join(etc, "issuer.yaml"))
	w.awaitFor(4*within, "reach the issuer that was put back", func() bool {
		return command(w.t, filepath.Join(bin, "sallyport"), "status", "--socket", filepath.Join(data, "run", "api.sock")).Code == 0
	})
	if b, err := os.ReadFile(filepath.Join(data, "bundle.pem")); err != nil || !bytes.Equal(b, root) {
		w.t.Errorf("the issuer that was put back has another root (%v)", err)
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
