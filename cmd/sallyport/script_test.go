package main

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"sallyport/policies"
)

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"sallyport": main}) }

func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script", RequireExplicitExec: true, RequireUniqueNames: true,
		// The policy files of the demo, to edit, and the manual.
		Setup: func(e *testscript.Env) error {
			text, err := nobody().text()
			e.Setenv("NOBODY", text)
			return errors.Join(err, os.CopyFS(filepath.Join(e.WorkDir, "demo"), policies.FS), os.CopyFS(filepath.Join(e.WorkDir, "docs"), os.DirFS("../../docs")))
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"edit": edit, "fails": fails, "taken": taken, "example": example, "archived": archived, "answers": answers, "tunnelled": tunnelled},
	})
}

// fails runs a command that must end with a code: "fails CODE PROGRAM ARGS".
// What it says begins with the program's name, and is no panic.
func fails(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	if e := (*exec.ExitError)(nil); !errors.As(err, &e) || e.ExitCode() != want {
		ts.Fatalf("%q: %v, want exit status %d", args[1:], err, want)
	}
	said := ts.ReadFile("stderr")
	if !strings.HasPrefix(said, args[1]+": ") || strings.Contains(said, "goroutine ") || strings.Contains(said, "panic") {
		ts.Fatalf("%q does not say in a sentence why:\n%s", args[1:], said)
	}
}

// edit replaces a text, which must be there once, in a file:
// "edit FILE OLD NEW", where "\\n" begins a line.
func edit(ts *testscript.TestScript, _ bool, args []string) {
	text := ts.ReadFile(args[0])
	if n := strings.Count(text, args[1]); n != 1 {
		ts.Fatalf("%q is in %s %d times, want once", args[1], args[0], n)
	}
	ts.Check(write(ts.MkAbs(args[0]), strings.Replace(text, args[1], strings.ReplaceAll(args[2], `\n`, "\n"), 1)))
}

// taken listens on a port and writes a configuration with its address in it:
// "taken IN OUT" replaces TAKEN.
func taken(ts *testscript.TestScript, _ bool, args []string) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { ln.Close() })
	text := strings.ReplaceAll(ts.ReadFile(args[0]), "TAKEN", ln.Addr().String())
	ts.Check(write(ts.MkAbs(args[1]), text))
}

// example writes what a manual tells to run: "example FILE MARK OUT" takes the
// block of FILE in which MARK is, and of the job of a pull request its commands.
func example(ts *testscript.TestScript, _ bool, args []string) {
	for i, block := range strings.Split(ts.ReadFile(args[0]), "```") {
		if i%2 == 0 || !strings.Contains(block, args[1]) {
			continue
		}
		lang, text, _ := strings.Cut(block, "\n")
		if strings.HasPrefix(lang, "yaml") { // what follows is said to another test
			text = commands(text)
		}
		ts.Check(write(ts.MkAbs(args[2]), text))
		return
	}
	ts.Fatalf("%s shows nothing with %q", args[0], args[1])
}

// commands are those of a job: its lines "- run: COMMAND", the lines below
// "run: |", and those below "script:", of which "- >-" folds what follows.
func commands(job string) string {
	out, below, folds := "set -e", -1, false
	for line := range strings.Lines(job) {
		text := strings.TrimSpace(line)
		indent := len(line) - len(strings.TrimLeft(line, " "))
		if indent <= below {
			below = -1
		}
		folds = folds && !strings.HasPrefix(text, "- ")
		switch one, ok := strings.CutPrefix(text, "- run: "); {
		case text == "run: |" || text == "script:":
			below = indent
		case ok:
			out += "\n" + one
		case below >= 0 && text == "- >-":
			folds = true
			out += "\n"
		case below >= 0 && folds:
			out += text + " "
		case below >= 0:
			out += "\n" + strings.TrimPrefix(text, "- ")
		}
	}
	return out + "\n"
}

func write(file, text string) error { return os.WriteFile(file, []byte(text), 0o600) }
