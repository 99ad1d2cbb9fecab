package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"sallyport/internal/scripttest"
	"sallyport/policies"
)

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"sallyport": main}) }

func TestScript(t *testing.T) {
	scripttest.Run(t, testscript.Params{
		// The policy files of the demo, to edit, and the manual.
		Setup: func(e *testscript.Env) error {
			text, err := nobody().text()
			e.Setenv("NOBODY", text)
			return errors.Join(err, os.CopyFS(filepath.Join(e.WorkDir, "demo"), policies.FS), os.CopyFS(filepath.Join(e.WorkDir, "docs"), os.DirFS("../../docs")))
		},
		Cmds: map[string]scripttest.Command{"edit": edit, "example": example, "archived": archived, "answers": answers, "tunnelled": tunnelled},
	})
}

// edit replaces a text, which must be there once, in a file:
// "edit FILE OLD NEW", where "\\n" begins a line.
func edit(ts *testscript.TestScript, _ bool, args []string) {
	text := ts.ReadFile(args[0])
	if n := strings.Count(text, args[1]); n != 1 {
		ts.Fatalf("%q is in %s %d times, want once", args[1], args[0], n)
	}
	scripttest.Write(ts, args[0], strings.Replace(text, args[1], strings.ReplaceAll(args[2], `\n`, "\n"), 1))
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
		scripttest.Write(ts, args[2], text)
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
