package capture

import (
	"os"
	"strings"
	"testing"
)

func TestForgetProgram(t *testing.T) {
	before := mapped(t)
	if err := ForgetProgram(); err != nil {
		t.Fatal(err)
	}
	if after := mapped(t); after == before {
		t.Errorf("as much of files is mapped as before: %s", after)
	}
	TestDirectIsAConnection(t) // the program goes on
}

// mapped is what the kernel says of mapped files.
func mapped(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\nRssFile:")
	line, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(line)
}
