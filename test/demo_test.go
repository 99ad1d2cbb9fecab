package test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/internal/meshtest"
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
	w.nothingLeft()
	return v
}

// TestDemoTour takes the guided tour at a terminal, looks at the page on the way,
// and ends the demo by Ctrl-C.
func TestDemoTour(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 0)
	keyboard, terminal := openTerminal(t)
	before := modeOf(t, terminal)
	cmd := exec.Command(filepath.Join(bin, "sallyport"), "demo", "--tour")
	cmd.Stdin = terminal
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	p := w.launch("demo", []string{"TMPDIR=" + w.dir}, cmd)
	press := func(key byte) {
		t.Helper()
		if _, err := keyboard.Write([]byte{key}); err != nil {
			t.Fatal(err)
		}
	}
	steps := []string{"policy edit", "egress allow", "fault", "canary", "bad canary", "rotate CA", "kill"}
	for i, name := range steps {
		t.Run(name, func(t *testing.T) {
			p.await("offer the step "+name, func() bool {
				return strings.Contains(p.out.String(), fmt.Sprintf("step %d of %d, %s\n", i+1, len(steps), name))
			})
			press(' ')
			w.awaitFor(2*time.Minute, "do the step "+name, func() bool {
				return strings.Contains(p.out.String(), "seen, "+name+": ") || strings.Contains(p.out.String(), "NOT SEEN, "+name)
			})
			if strings.Contains(p.out.String(), "NOT SEEN, "+name) {
				t.Errorf("%s\n", p.out)
			}
		})
		if i == 3 { // there is something of everything now
			p.looksAtThePage()
		}
	}
	p.await("end the tour", func() bool { return strings.Contains(p.out.String(), "that was the tour: 7 steps, 0 not seen") })
	if !strings.Contains(p.out.String(), "in a network namespace of its own, and knows of no proxy") && os.Getenv("CI") == "true" {
		t.Errorf("no program knows of no proxy:\n%s", p.out)
	}
	p.await("show a denial", func() bool { return strings.Contains(p.out.String(), "  deny ") })
	press('?')
	p.await("show the keys", func() bool { return strings.Contains(p.out.String(), "the guided tour through all of these") })
	press(3) // Ctrl-C
	if code := p.end(); code != 0 {
		t.Errorf("status %d after Ctrl-C:\n%s", code, p.out)
	}
	if after := modeOf(t, terminal); after != before {
		t.Errorf("the terminal has mode %+v, and had %+v", after, before)
	}
	w.nothingLeft()
}

// openTerminal opens a terminal, and the end at which keys are pressed.
func openTerminal(t *testing.T) (keyboard, terminal *os.File) {
	t.Helper()
	keyboard, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		meshtest.Unable(t, err.Error())
	}
	t.Cleanup(func() { keyboard.Close() })
	n, err := unix.IoctlGetInt(int(keyboard.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(keyboard.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	return keyboard, terminal
}

func modeOf(t *testing.T, terminal *os.File) unix.Termios {
	t.Helper()
	mode, err := unix.IoctlGetTermios(int(terminal.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *mode
}

// nothingLeft looks for what a demo may have left behind: files, and processes
// with what they listen on. A port by itself says nothing: another test may have
// it by now.
func (w *world) nothingLeft() {
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
