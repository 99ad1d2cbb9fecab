package test

import (
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// ordinary hands the folders of the nodes over to an ordinary user, and returns
// the command by which that user runs a program. Without a right to change users
// it is the one who runs the test.
func (w *world) ordinary(nodes ...string) []string {
	w.t.Helper()
	if os.Getuid() != 0 {
		return nil
	}
	const uid = 65534
	check := func(err error) {
		if err != nil {
			w.t.Fatal(err)
		}
	}
	check(os.Chmod(w.dir, 0o755))
	check(os.Chmod(bin, 0o755))
	bundle, err := os.ReadFile(w.path("issuer", "bundle.pem"))
	check(err)
	check(os.WriteFile(w.path("bundle.pem"), bundle, 0o644))
	for _, n := range nodes {
		conf, err := os.ReadFile(w.path(n, "config.yaml"))
		check(err)
		w.rewrite(w.path(n, "config.yaml"), strings.ReplaceAll(string(conf), w.path("issuer", "bundle.pem"), w.path("bundle.pem")))
		check(filepath.WalkDir(w.path(n), func(path string, _ fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			return os.Chown(path, uid, uid)
		}))
	}
	self, err := os.ReadFile("/proc/self/exe")
	check(err)
	w.program = w.path("workload")
	check(os.WriteFile(w.program, self, 0o755))
	id := strconv.Itoa(uid)
	return []string{meshtest.Need(w.t, "setpriv"), "--reuid", id, "--regid", id, "--clear-groups", "--"}
}

// TestCaptureIsolate gives both programs a network namespace of their own, as
// an ordinary user does.
func TestCaptureIsolate(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	bash := meshtest.Need(t, "bash")
	w := newWorld(t, time.Minute)
	w.startIssuer()
	pay, bill := &node{name: "payment"}, &node{name: "billing"}
	w.join(bill)
	w.join(pay)
	user := w.ordinary("payment", "billing")
	w.flags = []string{"--isolate"}
	w.startWorkloadBy(bill.name, user, envListen+"="+bill.app)
	payment := w.startWorkloadBy(pay.name, user, envListen+"="+pay.app)
	run := func(args ...string) runReply {
		t.Helper()
		return ask[runReply](payment, "/run", args)
	}
	v4, v6 := w.addresses("billing.mesh.internal")
	bare := func(address, url string) runReply {
		return run(curl("--noproxy", "*", "--resolve", "billing.mesh.internal:80:"+address, url)...)
	}
	const charges = "http://billing.mesh.internal/v1/charges/5"
	w.await("call billing", func() bool { return strings.Contains(bare(v4, charges).Output, `"path":"/v1/charges/5"`) })
	t.Run("services are reached", func(t *testing.T) {
		for name, r := range map[string]runReply{
			"by virtual address": bare(v4, charges), "by virtual IPv6 address": bare("["+v6+"]", charges),
			"by the proxy in the environment": run(curl(charges)...), "by the port of a service": run(curl("--noproxy", "*", "http://"+pay.billing+"/v1/charges/5")...),
		} {
			if p := read(t, r); p.status != "200" || !strings.Contains(p.body, id("/ns/shop/sa/payment")) {
				t.Errorf("%s: %s, the application was told %s", name, p.status, p.body)
			}
		}
		if p := read(t, bare(v4, "http://billing.mesh.internal/admin")); p.status != "403" || p.decision == "" {
			t.Errorf("what no row allows: %s, decision %q", p.status, p.decision)
		}
	})
	t.Run("nothing else is", func(t *testing.T) {
		outside := httptest.NewServer(http.HandlerFunc(echo))
		defer outside.Close()
		for name, r := range map[string]runReply{
			"a program on this machine": run(curl("--noproxy", "*", outside.URL)...), "the other sidecar": run(curl("--noproxy", "*", "-k", "https://"+bill.in)...),
			"an address": run(curl("--noproxy", "*", "http://203.0.113.7/")...), "an IPv6 address": run(curl("--noproxy", "*", "http://[2001:db8::7]/")...),
			"UDP": run(bash, "-c", "echo secret > /dev/udp/203.0.113.7/53"), "UDP over IPv6": run(bash, "-c", "echo secret > /dev/udp/2001:db8::7/53"),
			"another interface": run("ip", "link", "add", "out", "type", "dummy"), "the rules": run("nft", "flush", "ruleset"),
			"a namespace of somebody else": run("nsenter", "-t", fmt.Sprint(os.Getpid()), "-n", "true"),
			"a namespace within":           run("unshare", "-Urn", "curl", "-sS", "--max-time", "5", "http://203.0.113.7/"),
		} {
			if r.Code == 0 {
				t.Errorf("%s is reached: %s", name, r.Output)
			}
		}
		w.awaitAudit("payment", "the refusal", func(r auditLine) bool { return r.Reason == "no_route" && r.Dst == "host:203.0.113.7:80" })
	})
	t.Run("the program has no capability, and cannot get one", func(t *testing.T) {
		r := run("grep", "-E", "^(Cap|NoNewPrivs)", "/proc/self/status")
		for _, want := range []string{"CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "CapInh:\t0000000000000000", "CapBnd:\t0000000000000000", "CapAmb:\t0000000000000000", "NoNewPrivs:\t1"} {
			if !strings.Contains(r.Output, want) {
				t.Errorf("want %q in:\n%s", want, r.Output)
			}
		}
	})
}

// TestCaptureIsolatedProgram holds that a program in a namespace of its own
// lives and ends as any other.
func TestCaptureIsolatedProgram(t *testing.T) {
	t.Parallel()
	w := newWorld(t, time.Minute)
	w.startIssuer()
	w.write("payment", w.proxyConfig("payment", w.token("payment"))+"outbound: {listen: 127.0.0.1:15001}\n")
	user := w.ordinary("payment")
	start := func(app ...string) *proc {
		t.Helper()
		args := append(append(user[:len(user):len(user)], filepath.Join(bin, "sidecar"), "run", "--config", w.path("payment", "config.yaml"), "--isolate", "--"), app...)
		return w.launch("payment", nil, exec.Command(args[0], args[1:]...))
	}
	for want, script := range map[int]string{0: "true", 7: "exit 7", 128 + 15: "kill -TERM $$", 128 + 9: "kill -KILL $$"} {
		if p := start("sh", "-c", script); p.end() != want {
			t.Errorf("%s: status %d, want %d:\n%s", script, p.cmd.ProcessState.ExitCode(), want, p.out)
		}
	}
	up, down := w.path("payment", "up"), w.path("payment", "down")
	p := start("sh", "-c", fmt.Sprintf(`trap 'echo asked > %s; exit 3' TERM; : > %s; while :; do sleep 0.1; done`, down, up))
	p.await("start its program", func() bool { return exists(up) })
	if code := p.stop(); code != 3 || !exists(down) {
		t.Errorf("status %d, want 3; the program was asked: %v", code, exists(down))
	}
	for name, tt := range map[string]struct {
		app  []string
		want string
	}{
		"a program that is not there": {[]string{"no-such-program"}, "; next: check the program after --"},
		"one that cannot be executed": {[]string{w.write("broken", "no program")}, "; next: check the program after --"},
	} {
		if p := start(tt.app...); p.end() != 1 || !strings.Contains(p.out.String(), tt.want) {
			t.Errorf("%s: status %d:\n%s", name, p.cmd.ProcessState.ExitCode(), p.out)
		}
	}
	forbid := append([]string{meshtest.Need(t, "unshare"), "-Ur", "sh", "-c", `echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"`, "sh"},
		filepath.Join(bin, "sidecar"), "run", "--config", w.path("payment", "config.yaml"), "--isolate", "--", "true")
	args := append(user[:len(user):len(user)], forbid...)
	p = w.launch("payment", nil, exec.Command(args[0], args[1:]...))
	if p.end() != 1 || !strings.Contains(p.out.String(), "this kernel lets this user have no network namespace of its own") || !strings.Contains(p.out.String(), "; next: let users have namespaces") {
		t.Errorf("without namespaces: status %d:\n%s", p.cmd.ProcessState.ExitCode(), p.out)
	}
}
