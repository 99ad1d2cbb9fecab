package packages

import (
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestDockerfile holds the image to what is promised of it, where nothing can
// build it: the five programs, no root, and nothing else.
func TestDockerfile(t *testing.T) {
	b, err := os.ReadFile("../../deploy/docker/Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	var last [][]string // the instructions of the last stage
	for line := range strings.Lines(strings.ReplaceAll(string(b), "\\\n", " ")) {
		words := strings.Fields(line)
		if len(words) == 0 || strings.HasPrefix(words[0], "#") {
			continue
		}
		if !slices.Contains([]string{"FROM", "WORKDIR", "COPY", "RUN", "USER"}, words[0]) {
			t.Errorf("%q is not needed here", words[0])
		}
		if words[0] == "FROM" {
			last = nil
		}
		last = append(last, words)
	}
	if len(last) == 0 || !slices.Equal(last[0], []string{"FROM", "scratch"}) {
		t.Fatalf("the image is made from %v", last)
	}
	copied, user := "", ""
	for _, words := range last[1:] {
		switch words[0] {
		case "COPY":
			copied += strings.Join(words[1:], " ") + " "
		case "USER":
			user = words[1]
		default:
			t.Errorf("the image has a %s", words[0])
		}
	}
	for _, p := range []string{"issuer", "sidecar", "gateway", "sallyport", "injector"} {
		if !strings.Contains(copied, "/src/bin/"+p+" ") {
			t.Errorf("%s is not in the image", p)
		}
	}
	if n, err := strconv.Atoi(strings.Split(user, ":")[0]); err != nil || n == 0 {
		t.Errorf("it runs as %q, which may be root", user)
	}
	mod, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	want := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindSubmatch(mod)
	if got := regexp.MustCompile(`(?m)^FROM golang:(\S+) `).FindSubmatch(b); got == nil || string(got[1]) != string(want[1]) {
		t.Errorf("it is built by Go %q, and go.mod asks for %s", got, want[1])
	}
}
