package test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"sallyport/internal/meshtest"
)

const (
	envBin    = "E2E_BIN"    // the programs, built by the test that runs this one
	envInside = "E2E_INSIDE" // this test runs in a network namespace of its own
)

// inNamespace runs the test once more as root of a user and a network namespace
// of its own, where it may change the rules of the kernel, and reports whether
// this is that run. Several users are there only when the test runs as root.
func inNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(envInside) != "" {
		for _, args := range [][]string{{"link", "set", "lo", "up"}, {"addr", "add", "203.0.113.7/32", "dev", "lo"}} {
			if out, err := exec.CommandContext(t.Context(), meshtest.Need(t, "ip"), args...).CombinedOutput(); err != nil {
				t.Fatalf("ip %v: %v %s", args, err, out)
			}
		}
		return true
	}
	t.Parallel()
	meshtest.Need(t, "ip")
	if os.Getuid() != 0 {
		meshtest.Unable(t, "this needs several users; run the test as root")
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), envInside+"=1", envBin+"="+bin)
	all := []syscall.SysProcIDMap{{Size: 65536}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL,
		UidMappings: all, GidMappings: all, GidMappingsEnableSetgroups: true,
	}
	out, err := cmd.CombinedOutput()
	switch {
	case cmd.ProcessState == nil:
		meshtest.Unable(t, fmt.Sprintf("the kernel gives no namespaces: %v", err))
	case err != nil:
		t.Errorf("in a namespace of its own: %v\n%s", err, failures(string(out)))
	case bytes.Contains(out, []byte("--- SKIP")):
		t.Skipf("%s", out)
	default:
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, "_test.go:") {
				t.Log(strings.TrimSpace(line))
			}
		}
	}
	return false
}

// failures are what the tests that failed have said in an output of go test -v,
// subtests before those that they are in; all of it where none did or all ended.
func failures(out string) string {
	var failed []string
	said := map[string][]string{}
	name := ""
	for line := range strings.Lines(out) {
		plain := strings.TrimSpace(line)
		if strings.HasPrefix(plain, "panic: ") || strings.HasPrefix(plain, "fatal error: ") {
			return out
		}
		if of, ok := strings.CutPrefix(plain, "--- FAIL: "); ok {
			failed = append(failed, of)
		} else if word := strings.Fields(plain); len(word) == 3 && word[0] == "===" {
			name = word[2]
		} else if !strings.HasPrefix(plain, "--- ") && plain != "FAIL" {
			said[name] = append(said[name], line)
		}
	}
	if len(failed) == 0 {
		return out
	}
	slices.SortStableFunc(failed, func(a, b string) int { return strings.Count(b, "/") - strings.Count(a, "/") })
	var text strings.Builder
	for _, of := range failed {
		name, _, _ := strings.Cut(of, " ")
		fmt.Fprintf(&text, "--- FAIL: %s\n%s", of, strings.Join(said[name], ""))
	}
	return text.String()
}

// TestFailuresOfTheInside shows what a test in a namespace leaves of an output.
func TestFailuresOfTheInside(t *testing.T) {
	const out = `=== RUN   TestX
=== RUN   TestX/one
=== PAUSE TestX/one
=== RUN   TestX/two
=== NAME  TestX
    x_test.go:1: before
=== CONT  TestX/one
=== CONT  TestX/two
    x_test.go:2: it is wrong
        and on another line
=== NAME  TestX/one
    x_test.go:3: it is well
=== NAME  TestX
    x_test.go:4: the gateway printed: much
--- FAIL: TestX (1.00s)
    --- PASS: TestX/one (0.10s)
    --- FAIL: TestX/two (0.20s)
FAIL
`
	const want = `--- FAIL: TestX/two (0.20s)
    x_test.go:2: it is wrong
        and on another line
--- FAIL: TestX (1.00s)
    x_test.go:1: before
    x_test.go:4: the gateway printed: much
`
	if got := failures(out); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for _, whole := range []string{"=== RUN TestX\nexit status 2\n", "=== RUN TestX\n--- FAIL: TestX (0s)\npanic: x\n"} {
		if got := failures(whole); got != whole {
			t.Errorf("of %q is left %q", whole, got)
		}
	}
}

// as runs a program as a user, without any setting for a proxy.
func as(t *testing.T, uid uint32, args ...string) runReply {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}, Pdeathsig: syscall.SIGKILL}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Fatalf("%s: %v", args[0], err)
	}
	return runReply{out.String(), cmd.ProcessState.ExitCode()}
}
