package test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// runApp runs a program as the child of payment's sidecar.
func (w *world) runApp(env []string, app ...string) *proc {
	w.t.Helper()
	return w.start("payment", env, "sidecar", append([]string{"run", "--config", w.path("payment", "config.yaml"), "--"}, app...)...)
}

// end waits until a process has ended by itself and returns its exit code.
func (p *proc) end() int {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(within):
		p.t.Fatalf("%s did not end within %s:\n%s", p.name, within, p.out)
	}
	return p.cmd.ProcessState.ExitCode()
}

func TestSidecarRun(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, time.Minute)
	w.startIssuer()
	pay, bill := &node{name: "payment"}, &node{name: "billing"}
	w.join(bill)
	w.startNode(bill)
	w.join(pay)

	t.Run("the program runs behind the proxy and its output comes through", func(t *testing.T) {
		p := w.runApp(nil, curl("--retry", "20", "--retry-all-errors", "--retry-delay", "1", "-f", "http://billing.mesh.internal/v1/charges/5")...)
		if code := p.end(); code != 0 || !strings.Contains(p.out.String(), `"path":"/v1/charges/5"`) {
			t.Errorf("it ended with %d and printed:\n%s", code, p.out)
		}
	})
	t.Run("the status of the program is the sidecar's", func(t *testing.T) {
		for want, app := range map[int][]string{
			0:                          {"true"},
			7:                          {"sh", "-c", "exit 7"},
			128 + int(syscall.SIGTERM): {"sh", "-c", "kill -TERM $$"},
			128 + int(syscall.SIGKILL): {"sh", "-c", "kill -KILL $$"},
			22:                         curl("-f", "http://inventory.mesh.internal/"), // curl's word for a refusal
		} {
			p := w.runApp(nil, app...)
			if got := p.end(); got != want {
				t.Errorf("%v: status %d, want %d:\n%s", app, got, want, p.out)
			}
		}
	})
	t.Run("the environment has the way out and no secret", func(t *testing.T) {
		p := w.runApp([]string{"SALLYPORT_LOG_LEVEL=warn", "HTTP_PROXY=http://other", "MINE=kept"}, "env")
		if code := p.end(); code != 0 {
			t.Fatalf("env ended with %d:\n%s", code, p.out)
		}
		env := strings.Split(p.out.String(), "\n")
		for _, want := range []string{
			"http_proxy=http://" + pay.out, "HTTP_PROXY=http://" + pay.out, "https_proxy=http://" + pay.out, "HTTPS_PROXY=http://" + pay.out,
			"no_proxy=localhost,127.0.0.1,::1", "SPIFFE_ENDPOINT_SOCKET=unix://" + w.path("payment", "run", "workload.sock"), "MINE=kept",
		} {
			if !slices.Contains(env, want) {
				t.Errorf("the program's environment has no %s", want)
			}
		}
		for _, kv := range env {
			if strings.HasPrefix(kv, "SALLYPORT_") || strings.Contains(kv, "http://other") {
				t.Errorf("the program's environment has %s", kv)
			}
		}
	})
	t.Run("a token in the environment stays with the sidecar", func(t *testing.T) {
		token := w.token("payment")
		p := w.runApp([]string{"SALLYPORT_ISSUER_JOIN_TOKEN=" + token}, "sh", "-c", "env; cat /proc/$$/cmdline")
		if code := p.end(); code != 0 || strings.Contains(p.out.String(), token) {
			t.Errorf("it ended with %d; the token is seen:\n%s", code, p.out)
		}
	})
	t.Run("the program may end in its own way on SIGTERM", func(t *testing.T) {
		up, down := w.path("up"), w.path("down")
		p := w.runApp(nil, "sh", "-c", fmt.Sprintf(`trap 'echo asked > %s; exit 3' TERM; : > %s; while :; do sleep 0.1; done`, down, up))
		p.await("start its program", func() bool { return exists(up) })
		if code := p.stop(); code != 3 || !exists(down) {
			t.Errorf("status %d, want 3; the program was asked: %v", code, exists(down))
		}
	})
	t.Run("a program that does not end is killed after the drain timeout", func(t *testing.T) {
		up := w.path("up2")
		p := w.runApp(nil, "sh", "-c", fmt.Sprintf(`trap '' TERM; : > %s; while :; do sleep 60; done`, up))
		p.await("start its program", func() bool { return exists(up) })
		if code := p.stop(); code != 128+int(syscall.SIGKILL) {
			t.Errorf("status %d, want %d", code, 128+int(syscall.SIGKILL))
		}
	})
	t.Run("a program that cannot be started is one sentence", func(t *testing.T) {
		p := w.runApp([]string{"SALLYPORT_LOG_LEVEL=error"}, "no-such-program")
		if code := p.end(); code != 1 || strings.Count(p.out.String(), "\n") != 1 || !strings.Contains(p.out.String(), "; next: ") {
			t.Errorf("status %d and:\n%s", code, p.out)
		}
	})
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}
