// Package manual holds the README and docs/ to the programs: every
// configuration on a page is loaded by the program it is for, every command of
// ours is held against that program's help, and those that say so are carried
// out in a mesh.
//
// What stands behind the three backquotes says what becomes of a block:
//
//	yaml         a configuration or a policy file; checked by the program itself
//	csv          rows of access.csv or admin.csv; checked by policy lint
//	ini          a unit of systemd; checked by systemd-analyze
//	sh, console  commands (in console those behind "$ "): each command, argument and
//	             flag of ours must exist, each target of make too
//	sh run       the same, and carried out, in order, in the page's own folder
//	text, ...    an excerpt: shown, and counted as that; so is what has the mark excerpt
package manual

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

// root is the folder of the repository, bin that of the programs.
var root, bin string

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	var err error
	if root, err = filepath.Abs("../.."); err != nil {
		panic(err)
	}
	if bin = os.Getenv("MANUAL_BIN"); bin != "" {
		return m.Run()
	}
	if bin, err = os.MkdirTemp("", "sp-manual-bin-"); err != nil {
		panic(err)
	}
	defer os.RemoveAll(bin)
	args := []string{"build", "-trimpath", "-ldflags", "-s -w", "-o", bin + "/"}
	for _, p := range ours {
		if _, err := os.Stat(filepath.Join(root, "cmd", p)); err == nil {
			args = append(args, "sallyport/cmd/"+p)
		}
	}
	build := exec.Command("go", args...)
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as the Makefile builds them
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build the programs:", err)
		return 1
	}
	return m.Run()
}

// A tally is what a run has looked at.
type tally struct {
	commands, carriedOut, foreign, configs, excerpts, failed int
}

// A reader goes through the pages.
type reader struct {
	t     *testing.T
	tally tally
	help  map[string]string // of a command, by its words
	demo  *mesh             // where commands are carried out
	once  sync.Once
}

func TestManual(t *testing.T) {
	t.Parallel()
	r := &reader{t: t, help: map[string]string{}}
	for _, page := range pages(t) {
		dir := ""
		for _, f := range fences(t, page) {
			r.read(f, &dir)
		}
	}
	n := r.tally
	t.Logf("%d excerpts, %d commands of others", n.excerpts, n.foreign)
	out, err := json.Marshal(map[string]any{
		"name": "docs", "ok": !t.Failed(),
		"cases":   map[string]int{"tried": n.commands + n.carriedOut + n.configs, "passed": n.commands + n.carriedOut + n.configs - n.failed, "failed": n.failed},
		"figures": map[string]int{"commands": n.commands, "commands_run": n.carriedOut, "configs": n.configs, "excerpts": n.excerpts, "failed": n.failed},
	})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println(string(out))
}

func (r *reader) errorf(f fence, line int, format string, args ...any) {
	r.t.Helper()
	r.tally.failed++
	r.t.Errorf("%s:%d: %s", f.page, line, fmt.Sprintf(format, args...))
}

// read does with a block what its fence says. dir is the folder in which the
// commands of this page are carried out, once there is one.
func (r *reader) read(f fence, dir *string) {
	lang := f.lang
	if lang == "" && looksLikeCommands(f) {
		lang = "sh"
	}
	switch {
	case f.mark == "excerpt", slices.Contains([]string{"", "text", "json", "go", "proto", "promql", "mermaid", "dockerfile"}, lang):
		r.tally.excerpts++
	case lang == "yaml":
		r.config(f)
	case lang == "csv":
		r.rows(f)
	case lang == "ini":
		r.unit(f)
	case lang == "sh" || lang == "console":
		for _, c := range f.commands() {
			r.check(f, c)
		}
		if f.mark == "run" {
			r.carryOut(f, dir)
		}
	default:
		r.errorf(f, f.line, "%q is no language that the manual knows; see test/manual", f.lang)
	}
}

func looksLikeCommands(f fence) bool {
	first, _, _ := strings.Cut(f.text, "\n")
	word, _, _ := strings.Cut(strings.TrimPrefix(first, "$ "), " ")
	return strings.HasPrefix(first, "$ ") || slices.Contains(ours, word)
}

// check holds one command against what there is.
func (r *reader) check(f fence, c command) {
	r.tally.commands++
	switch name := c.words[0]; {
	case name == "make":
		for _, target := range c.words[1:] {
			if !strings.Contains(target, "=") && !regexp.MustCompile(`(?m)^([a-z0-9 -]+ )?`+regexp.QuoteMeta(target)+`( [a-z0-9 -]+)?:`).MatchString(contents(r.t, "Makefile")) {
				r.errorf(f, c.line, "the Makefile has no target %q", target)
			}
		}
	case slices.Contains(ours, name):
		r.checkOurs(f, c)
	default:
		r.tally.foreign++
	}
}

// checkOurs follows the words through the help of the program.
func (r *reader) checkOurs(f fence, c command) {
	path, rest := c.words[:1], c.words[1:]
	if i := slices.Index(rest, "--"); i >= 0 {
		if inner := rest[i+1:]; len(inner) > 0 && slices.Contains(ours, inner[0]) {
			r.check(f, command{c.line, inner})
		}
		rest = rest[:i]
	}
	help := r.helpOf(path)
	for len(rest) > 0 && !strings.HasPrefix(rest[0], "-") && regexp.MustCompile(`(?m)^  `+regexp.QuoteMeta(rest[0])+` `).MatchString(help) {
		path, rest = append(slices.Clone(path), rest[0]), rest[1:]
		help = r.helpOf(path)
	}
	if strings.Contains(help, "Available Commands:") && len(rest) > 0 && !strings.HasPrefix(rest[0], "-") {
		r.errorf(f, c.line, "%s has no command %q", strings.Join(path, " "), rest[0])
		return
	}
	for _, w := range rest {
		name, _, _ := strings.Cut(w, "=")
		if len(name) < 2 || name[0] != '-' {
			continue
		}
		if name[1] != '-' {
			name = name[:2]
		}
		if !regexp.MustCompile(`(?m)(^|[\s,])` + regexp.QuoteMeta(name) + `([\s,]|$)`).MatchString(help) {
			r.errorf(f, c.line, "%s has no flag %s", strings.Join(path, " "), name)
		}
	}
}

func (r *reader) helpOf(path []string) string {
	key := strings.Join(path, " ")
	if h, ok := r.help[key]; ok {
		return h
	}
	out, err := exec.Command(filepath.Join(bin, path[0]), append(slices.Clone(path[1:]), "--help")...).CombinedOutput()
	if err != nil {
		r.t.Errorf("%s --help: %v\n%s", key, err, out)
	}
	r.help[key] = string(out)
	return string(out)
}

func contents(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
