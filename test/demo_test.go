package test

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestDemoKeepsItsPromises(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 0)
	if v := w.demo(t, "--for", "15s"); v.Cases.Passed < 50 || len(v.UseCases) != 15 {
		t.Errorf("%d promises and %d use cases only", v.Cases.Passed, len(v.UseCases))
	}
}

// The scenarios of the demo, each with all that it promises.
func TestDemoScenarios(t *testing.T) {
	t.Parallel()
	for name, promises := range map[string]int{"canary": 6, "bad-canary": 4, "breaker": 6, "fault": 7, "shadow": 3, "archive": 6} {
		t.Run(name, func(t *testing.T) {
			if v := newWorld(t, 0).demo(t, "--scenario", name); v.Cases.Passed != promises {
				t.Errorf("%d promises, want %d", v.Cases.Passed, promises)
			}
		})
	}
}

// demoVerdicts is what a demo says of itself.
type demoVerdicts struct {
	OK       bool
	Cases    struct{ Tried, Passed, Failed, Skipped int }
	UseCases []struct {
		Name, Detail string
		OK           bool
	} `json:"use_cases"`
	Verdicts []struct {
		Name, Detail string
		OK           bool
	}
}

// demo runs a demo that judges itself, and sees that all was kept.
func (w *world) demo(t *testing.T, args ...string) demoVerdicts {
	t.Helper()
	p := w.start("demo", []string{"TMPDIR=" + w.dir}, "sallyport", append([]string{"demo", "--json"}, args...)...)
	select {
	case <-p.done: // it bounds itself
	case <-time.After(4 * time.Minute):
		p.stop()
	}
	lines := strings.Split(strings.TrimSpace(p.out.String()), "\n")
	var v demoVerdicts
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &v); err != nil {
		t.Fatalf("the last line is not the verdicts: %v:\n%s", err, p.out)
	}
	for _, x := range v.Verdicts {
		t.Logf("%-65s %s", x.Name, x.Detail)
		if !x.OK {
			t.Errorf("broken: %s: %s", x.Name, x.Detail)
		}
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 0 || !v.OK || v.Cases.Tried != v.Cases.Passed || v.Cases.Skipped != 0 {
		t.Errorf("status %d, cases %+v", code, v.Cases)
	}
	for _, u := range v.UseCases {
		if !u.OK {
			t.Errorf("the use case %s was not shown: %s", u.Name, u.Detail)
		}
	}
	w.nothingLeft(p)
	return v
}

func TestDemoInterrupted(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 0)
	p := w.start("demo", []string{"TMPDIR=" + w.dir}, "sallyport", "demo")
	p.await("show a denial", func() bool {
		return strings.Contains(p.out.String(), "deny")
	})
	p.looksAtThePage()
	if err := p.cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code := p.end(); code != 0 {
		t.Errorf("status %d after Ctrl-C:\n%s", code, p.out)
	}
	w.nothingLeft(p)
}

// nothingLeft looks for what a demo may have left behind: processes, files
// and ports.
func (w *world) nothingLeft(demo *proc) {
	w.t.Helper()
	if left, err := filepath.Glob(w.path("sallyport-demo-*")); err != nil || len(left) > 0 {
		w.t.Errorf("files are left: %v %v", left, err)
	}
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range procs {
		line, err := os.ReadFile(f)
		if err == nil && strings.Contains(string(line), w.dir) {
			w.t.Errorf("a process is left: %q", line)
		}
		env, err := os.ReadFile(filepath.Join(filepath.Dir(f), "environ"))
		if err == nil && strings.Contains(string(env), "TMPDIR="+w.dir+"\x00") {
			w.t.Errorf("a process is left: %q", line)
		}
	}
	addrs := regexp.MustCompile(`127\.0\.0\.1:[0-9]+`).FindAllString(demo.out.String(), -1)
	if len(addrs) < 5 {
		w.t.Errorf("the demo printed %d addresses:\n%s", len(addrs), demo.out)
	}
	for _, a := range addrs {
		if c, err := net.Dial("tcp", a); err == nil {
			c.Close()
			w.t.Errorf("port %s is open", a)
		}
	}
}

func contents(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// lineOf is the number of the line that begins with prefix.
func lineOf(text, prefix string) string {
	for i, l := range strings.Split(text, "\n") {
		if strings.HasPrefix(l, prefix) {
			return strconv.Itoa(i + 1)
		}
	}
	return "?"
}
