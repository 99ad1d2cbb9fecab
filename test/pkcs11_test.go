package test

import (
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

const hsmPIN = "30495817"

// TestPKCS11 keeps every key of the issuer in a SoftHSM token.
func TestPKCS11(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "openssl")
	meshtest.Need(t, "gcc") // without which the issuer cannot load a module
	util := meshtest.Need(t, "softhsm2-util")
	w := newWorld(t, time.Minute)
	env := w.softHSM(util)
	w.put(w.path("pin"), hsmPIN+"\n")
	w.put(w.path("wrong"), "66666666\n")
	kms := func(pin string) string {
		return "pkcs11:module-path=/usr/lib/softhsm/libsofthsm2.so;token=sallyport?pin-source=" + w.path(pin)
	}
	write := func(kms string) {
		w.write("issuer", fmt.Sprintf(`trust_domain: %s
data_dir: %s/issuer
listen: %s
policies: %s
ca: {x509_ttl: 1m, agent_ttl: 1m, allow_short_ttl: true, kms: %q}
`, trustDomain, w.dir, w.issuer, w.policy, kms))
	}
	start := func() *proc {
		p := w.start("issuer", env, "issuer", "run", "--config", w.path("issuer", "config.yaml"))
		w.awaitReady(p)
		return p
	}
	refused := func(want string) {
		t.Helper()
		p := w.start("issuer", env, "issuer", "run", "--config", w.path("issuer", "config.yaml"))
		<-p.done
		out := p.out.String()
		if p.cmd.ProcessState.ExitCode() == 0 || !strings.Contains(out, want) || strings.Contains(out, "66666666") || strings.Contains(out, hsmPIN) {
			t.Errorf("want %q in:\n%s", want, out)
		}
	}

	write(kms("wrong"))
	if !usesC(t, filepath.Join(bin, "issuer")) {
		refused("this issuer was built without PKCS#11")
		return
	}
	refused("open ca.kms: the token refused the PIN")

	write(kms("pin"))
	first := start()
	bill := &node{name: "billing"}
	w.join(bill)
	workload := w.startNode(bill)
	verify := func() {
		t.Helper()
		got := ask[svidReply](workload, "/svid", struct{}{})
		w.put(w.path("leaf.pem"), got.Leaf)
		w.put(w.path("rest.pem"), got.Rest)
		if r := command(t, "openssl", "verify", "-x509_strict", "-CAfile", w.path("issuer", "bundle.pem"), "-untrusted", w.path("rest.pem"), w.path("leaf.pem")); r.Code != 0 {
			t.Errorf("openssl verify: %s", r.Output)
		}
	}
	verify()
	before := w.roots()
	first.kill()
	second := start()
	if after := w.roots(); after.Authorities[0].ID != before.Authorities[0].ID {
		t.Errorf("another root after the crash: %+v, was %+v", after, before)
	}
	pay := &node{name: "payment"}
	w.join(pay)
	workload = w.startNode(pay)
	verify()
	w.moves(t, "tainted", "ca", "rotate", "--emergency")
	w.moves(t, "steady", "ca", "rotate", "--force")

	if found, err := filepath.Glob(w.path("issuer", "ca", "*.key")); err != nil || len(found) > 0 {
		t.Errorf("key files: %v, %v", found, err)
	}
	for _, p := range []*proc{first, second} {
		if strings.Contains(p.out.String(), hsmPIN) {
			t.Errorf("the PIN is in the log of %s", p.name)
		}
	}
}

// usesC says whether a program was built with cgo.
func usesC(t *testing.T, program string) bool {
	t.Helper()
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	return slices.Contains(info.Settings, debug.BuildSetting{Key: "CGO_ENABLED", Value: "1"})
}

// softHSM makes the token "sallyport" and returns what makes programs find it.
func (w *world) softHSM(util string) (env []string) {
	w.t.Helper()
	conf := w.path("softhsm2.conf")
	if err := os.Mkdir(w.path("tokens"), 0o700); err != nil {
		w.t.Fatal(err)
	}
	w.put(conf, fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", w.path("tokens")))
	env = []string{"SOFTHSM2_CONF=" + conf}
	cmd := exec.Command(util, "--init-token", "--free", "--label", "sallyport", "--so-pin", "91827364", "--pin", hsmPIN)
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		w.t.Fatalf("make the token: %v\n%s", err, out)
	}
	return env
}
