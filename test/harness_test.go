package test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"sallyport/bench/rig"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/policies"
)

// bin is the folder of the programs under test, built once.
var bin string

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	if role := os.Getenv(envRole); role != "" {
		return playRole(role)
	}
	if bin = os.Getenv(envBin); bin != "" {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "sp-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = dir
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", dir+"/", "sallyport/cmd/issuer", "sallyport/cmd/sidecar", "sallyport/cmd/gateway", "sallyport/cmd/sallyport")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as the Makefile builds them
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build the programs:", err)
		return 1
	}
	code := m.Run()
	conformed.print()
	interop.print()
	strictness.print()
	h2spec.print()
	hostile.print()
	readersSum.print()
	return code
}

const trustDomain = "demo.sallyport"

// within bounds everything that a test waits for.
const within = 30 * time.Second

// A world is a trust domain of real processes in a directory of its own.
type world struct {
	t       *testing.T
	dir     string
	issuer  string   // its address
	policy  string   // the policy folder
	flags   []string // of every sidecar that has a workload
	program string   // this one, where other users may execute it
	// older are the processes that run programs of the directory in envSkew.
	older []string
}

// newWorld starts an issuer with the demo's policies. SVIDs live for svidTTL.
func newWorld(t *testing.T, svidTTL time.Duration) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "sp-") // t.TempDir is too long a path for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, dir: dir, issuer: freePort(t), policy: filepath.Join(dir, "policies")}
	if err := os.CopyFS(w.policy, policies.FS); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(w.policy, "routes")); err != nil { // many tests have other services
		t.Fatal(err)
	}
	w.write("issuer", fmt.Sprintf(`trust_domain: %s
data_dir: %s/issuer
listen: %s
policies: %s
ca: {x509_ttl: %s, agent_ttl: 1m, allow_short_ttl: true}
`, trustDomain, dir, w.issuer, w.policy, svidTTL))
	return w
}

func (w *world) path(parts ...string) string {
	return filepath.Join(append([]string{w.dir}, parts...)...)
}

// write makes the configuration file of a process.
func (w *world) write(name, conf string) string {
	w.t.Helper()
	if err := os.MkdirAll(w.path(name), 0o700); err != nil {
		w.t.Fatal(err)
	}
	file := w.path(name, "config.yaml")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return file
}

// startIssuer starts the issuer and waits until it is ready.
func (w *world) startIssuer() *proc {
	p := w.start("issuer", nil, "issuer", "run", "--config", w.path("issuer", "config.yaml"))
	w.awaitReady(p)
	return p
}

// token makes a join token for an agent.
func (w *world) token(agent string) string {
	w.t.Helper()
	a := w.admin()
	defer a.Close()
	tok, err := a.CreateJoinToken(w.t.Context(), agent, time.Minute)
	if err != nil {
		w.t.Fatal(err)
	}
	return tok.Value
}

func (w *world) admin() *control.Admin {
	w.t.Helper()
	a, err := control.DialAdmin(w.path("issuer", "run", "api.sock"))
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

// proxyConfig is what the configurations of all proxies begin with. Without a
// token the node must have been attested before.
func (w *world) proxyConfig(name, token string) string {
	if token != "" {
		token = "\n  join_token: " + token
	}
	return fmt.Sprintf(`trust_domain: %s
data_dir: %s
issuer:
  addresses: [%q]
  bundle: %s%s
drain: {timeout: 2s}
`, trustDomain, w.path(name), w.issuer, w.path("issuer", "bundle.pem"), token)
}

// A proc is a running program under test.
type proc struct {
	t    *testing.T
	name string
	cmd  *exec.Cmd
	out  *lockedBuffer
	done chan struct{}
	err  error
}

// start runs a program; it is stopped when the test ends. What it printed is
// shown when the test failed.
func (w *world) start(name string, env []string, program string, args ...string) *proc {
	w.t.Helper()
	return w.launch(name, env, exec.Command(w.programOf(name, program), args...))
}

// programOf is where the program of a process is.
func (w *world) programOf(name, program string) string {
	if slices.Contains(w.older, name) {
		return filepath.Join(os.Getenv(envSkew), program)
	}
	return filepath.Join(bin, program)
}

// launch is start of any command.
func (w *world) launch(name string, env []string, cmd *exec.Cmd) *proc {
	w.t.Helper()
	p := &proc{t: w.t, name: name, cmd: cmd, out: &lockedBuffer{}, done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	if p.cmd.SysProcAttr == nil {
		p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	}
	p.cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	p.cmd.WaitDelay = 5 * time.Second
	if err := p.cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	p.t.Cleanup(func() { // w.t may be another by then
		p.stop()
		if p.t.Failed() {
			p.t.Logf("%s printed:\n%s", name, p.out)
		}
	})
	return p
}

// stop ends the process in order and returns its exit code.
func (p *proc) stop() int {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(within):
		p.t.Errorf("%s did not end %s after SIGTERM", p.name, within)
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
	}
	return p.cmd.ProcessState.ExitCode()
}

// kill ends the process as a crash does.
func (p *proc) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// awaitReady waits until the process says on its admin socket that it is.
func (w *world) awaitReady(p *proc) {
	w.t.Helper()
	w.awaitReadyAt(p, w.path(p.name, "run", "admin.sock"))
}

// awaitReadyAt is awaitReady of a process whose admin socket is elsewhere.
func (w *world) awaitReadyAt(p *proc, socket string) {
	w.t.Helper()
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	defer c.CloseIdleConnections()
	p.await("be ready", func() bool {
		resp, err := c.Get("http://admin/readyz")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
}

// await waits until ok, and fails the test when the process ends before.
func (p *proc) await(what string, ok func() bool) {
	p.t.Helper()
	deadline := time.After(within)
	for !ok() {
		select {
		case <-p.done:
			p.t.Fatalf("%s ended (%v) before it could %s:\n%s", p.name, p.err, what, p.out)
		case <-deadline:
			p.t.Fatalf("%s did not %s within %s:\n%s", p.name, what, within, p.out)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// freePort returns a loopback address that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	addr, err := rig.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

// command runs a program to its end.
func command(t *testing.T, name string, args ...string) runReply {
	t.Helper()
	return ran(t, exec.CommandContext(t.Context(), name, args...))
}

func ran(t *testing.T, cmd *exec.Cmd) runReply {
	t.Helper()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Fatalf("%s: %v", cmd.Path, err)
	}
	return runReply{out.String(), cmd.ProcessState.ExitCode()}
}

// sallyport runs the CLI against the world's issuer.
func (w *world) sallyport(args ...string) runReply {
	w.t.Helper()
	args = append(args, "--socket", w.path("issuer", "run", "api.sock"))
	cmd := exec.CommandContext(w.t.Context(), filepath.Join(bin, "sallyport"), args...)
	// What is signed is recorded there.
	cmd.Env = append(os.Environ(), "XDG_STATE_HOME="+w.path("state"))
	return ran(w.t, cmd)
}

// auditLine is what tests read of an audit record.
type auditLine struct {
	Kind, ID, Decision, Reason, Rule, Src, Dst, Verb, Path, Detail, Peer string
}

// audit reads the log of a process. A line that is being written is left out.
func (w *world) audit(name string) (out []auditLine) {
	w.t.Helper()
	b, err := os.ReadFile(w.path(name, "audit.jsonl"))
	if err != nil {
		w.t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		var r auditLine
		if json.Unmarshal(line, &r) == nil {
			out = append(out, r)
		}
	}
	return out
}

// awaitAudit waits for a record.
func (w *world) awaitAudit(name, what string, ok func(auditLine) bool) {
	w.t.Helper()
	w.await("find in the audit log of "+name+" "+what, func() bool { return slices.ContainsFunc(w.audit(name), ok) })
}

// await waits for something in the world.
func (w *world) await(what string, ok func() bool) {
	w.t.Helper()
	w.awaitFor(within, what, ok)
}

// awaitFor waits for something that takes longer than others.
func (w *world) awaitFor(within time.Duration, what string, ok func() bool) {
	w.t.Helper()
	deadline := time.After(within)
	for !ok() {
		select {
		case <-deadline:
			w.t.Fatalf("could not %s within %s", what, within)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// metrics are those of a process.
func (w *world) metrics(name string) string {
	w.t.Helper()
	c := daemon.AdminClient(w.path(name, "run", "admin.sock"))
	defer c.CloseIdleConnections()
	resp, err := c.Get("http://admin/metrics")
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		w.t.Fatal(resp.Status, err)
	}
	return string(b)
}

// A lockedBuffer takes what several writers print.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
