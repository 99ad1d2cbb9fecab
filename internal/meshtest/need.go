package meshtest

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
)

// Need finds a program that a test talks to. With CI=true a missing one fails
// the test: .ci/run has installed it. Elsewhere the test is skipped, so that
// the rest runs on a machine that has nothing but Go.
func Need(t testing.TB, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		Missing(t, program)
	}
	return path
}

// Missing ends a test that lacks a Debian package, by the rule of Need.
func Missing(t testing.TB, pkg string) {
	t.Helper()
	Unable(t, fmt.Sprintf("%s is missing; next: apt-get install %s", pkg, pkg))
}

// Unable ends a test for which this machine has no means, by the rule of Need.
func Unable(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}
