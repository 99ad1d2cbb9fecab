package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"sallyport/internal/meshtest"
)

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"issuer": main}) }

func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script", RequireExplicitExec: true, RequireUniqueNames: true,
		Condition: func(cond string) (bool, error) {
			if cond != "race" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			return meshtest.Race, nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"fails": fails, "taken": taken},
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

// taken listens on a port and writes a configuration with its address in it:
// "taken IN OUT" replaces TAKEN.
func taken(ts *testscript.TestScript, _ bool, args []string) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { ln.Close() })
	text := strings.ReplaceAll(ts.ReadFile(args[0]), "TAKEN", ln.Addr().String())
	ts.Check(write(ts.MkAbs(args[1]), text))
}

func write(file, text string) error { return os.WriteFile(file, []byte(text), 0o600) }
