package manual

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport/policies"
)

// A mesh is a demo that runs as long as commands are carried out.
type mesh struct {
	dir   string
	tools string // the programs, as a page's commands find them
}

// open starts it.
func open(t *testing.T) *mesh {
	t.Helper()
	tmp, err := os.MkdirTemp("", "sp-m-") // t.TempDir is too long a path for a socket
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(tmp, "log")
	out, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command(filepath.Join(bin, "sallyport"), "demo")
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGINT)
		select {
		case <-ended:
		case <-time.After(30 * time.Second):
			_ = cmd.Process.Kill()
		}
		os.RemoveAll(tmp)
	})
	m := &mesh{tools: filepath.Join(tmp, "bin")}
	for end := time.Now().Add(2 * time.Minute); !m.there(tmp); {
		select {
		case err := <-ended:
			b, _ := os.ReadFile(log)
			t.Fatalf("the demo ended: %v\n%s", err, b)
		case <-time.After(100 * time.Millisecond):
		}
		if time.Now().After(end) {
			t.Fatal("the demo does not come up")
		}
	}
	// The programs, of which sallyport knows where this issuer is.
	if err := os.Mkdir(m.tools, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, p := range ours {
		text := fmt.Sprintf("#!/bin/sh\nexec %s \"$@\"\n", filepath.Join(bin, p))
		if p == "sallyport" {
			text = fmt.Sprintf("#!/bin/sh\nexec %s --socket %s \"$@\"\n", filepath.Join(bin, p), m.socket())
		}
		if err := os.WriteFile(filepath.Join(m.tools, p), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

func (m *mesh) socket() string { return filepath.Join(m.dir, "issuer", "run", "api.sock") }

// there says whether the mesh is up: its issuer has signed the logs of payment
// and billing, and has the record of a call that billing has refused to batch.
func (m *mesh) there(tmp string) bool {
	dirs, _ := filepath.Glob(filepath.Join(tmp, "sallyport-demo-*"))
	if len(dirs) != 1 {
		return false
	}
	m.dir = dirs[0]
	out, err := exec.Command(filepath.Join(bin, "sallyport"), "audit", "heads", "-o", "json", "--socket", m.socket()).Output()
	if err != nil || !bytes.Contains(out, []byte("/sa/payment@")) || !bytes.Contains(out, []byte("/sa/billing@")) {
		return false
	}
	out, err = exec.Command(filepath.Join(bin, "sallyport"), "audit", "query", filepath.Join(m.dir, "issuer", "received"),
		"--decision", "deny", "--src", "spiffe://demo.sallyport/ns/shop/sa/batch", "--dst", "spiffe://demo.sallyport/ns/shop/sa/billing", "-o", "json").Output()
	return err == nil && bytes.Contains(out, []byte(`"id"`))
}

// folder makes the place where a page's commands are carried out, and puts what
// pages speak of into it: policies in a repository, OLD and NEW, a proxy's audit
// log and the issuer's copies.
func (m *mesh) folder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"policies", "OLD", "NEW", "policies-in-force"} {
		if err := os.CopyFS(filepath.Join(dir, d), policies.FS); err != nil {
			t.Fatal(err)
		}
	}
	logs, err := filepath.Glob(filepath.Join(m.dir, "billing", "audit.jsonl*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"received", "bundle.pem", "witness.vkey"} {
		logs = append(logs, filepath.Join(m.dir, "issuer", name))
	}
	for _, file := range logs {
		if err := os.Symlink(file, filepath.Join(dir, filepath.Base(file))); err != nil {
			t.Fatal(err)
		}
	}
	git := exec.Command("sh", "-ec", `git init -q . && git add policies && git -c user.name=shown -c user.email=shown@corp.example commit -qm policies && git update-ref refs/remotes/origin/main HEAD`)
	git.Dir = dir
	git.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
	if out, err := git.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return dir
}

// carryOut runs the commands of a block, as one script that ends with the first
// that fails.
func (r *reader) carryOut(f fence, dir *string) {
	r.t.Helper()
	r.once.Do(func() { r.demo = open(r.t) })
	if *dir == "" {
		*dir = r.demo.folder(r.t)
	}
	script := f.text
	if f.lang == "console" {
		script = regexp.MustCompile(`(?m)^(?:\$ (.*)|.*)$`).ReplaceAllString(script, "$1")
	}
	// Where a page says a place of an installed mesh, this one has another.
	script = strings.NewReplacer(
		"/var/lib/sallyport/", r.demo.dir+"/",
		"/run/sallyport/issuer/", r.demo.dir+"/issuer/run/",
		"/run/sallyport/billing/", r.demo.dir+"/billing/run/",
		"/run/sallyport/payment/", r.demo.dir+"/payment/run/",
		"spiffe://corp.example/", "spiffe://demo.sallyport/",
	).Replace(script)
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", script)
	cmd.Dir = *dir
	cmd.Env = append(os.Environ(), "PATH="+r.demo.tools+":"+os.Getenv("PATH"))
	cmd.WaitDelay = time.Second
	r.tally.carriedOut += len(f.commands())
	if out, err := cmd.CombinedOutput(); err != nil {
		r.errorf(f, f.line, "%v:\n%s", err, out)
	}
}
