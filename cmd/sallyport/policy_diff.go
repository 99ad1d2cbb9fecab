package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/review"
)

// diffed is what "policy diff" found, as JSON has it.
type diffed struct {
	// Access has the calls that are decided otherwise, Changes everything else.
	Access  []review.Cell   `json:"access"`
	Changes []review.Change `json:"changes"`
}

// policyDiff is "sallyport policy diff".
func (c *cli) policyDiff(td *string) *cobra.Command {
	var (
		rev       string
		candidate bool
	)
	cmd := &cobra.Command{
		Use:   "diff OLD NEW | diff --git REV DIR | diff --candidate DIR",
		Short: "Show exactly the calls that NEW decides otherwise than OLD",
		Long: "Show exactly the calls that NEW decides otherwise than OLD, each set of them\n" +
			"with one call as a witness, and what else changed: services, entries, egress\n" +
			"destinations, tokens and tests. With --git, OLD is DIR at a revision of the\n" +
			"repository it is in; with --candidate, NEW is DIR with the rows of its candidate\n" +
			"in force. --output markdown is for a pull request.",
		Args: func(_ *cobra.Command, args []string) error {
			switch want := 2; {
			case rev != "" && candidate:
				return fmt.Errorf("--git and --candidate exclude each other")
			case (rev != "" || candidate) && len(args) != 1:
				return fmt.Errorf("needs one folder beside --git or --candidate")
			case rev == "" && !candidate && len(args) != want:
				return fmt.Errorf("needs the folders OLD and NEW, or --git REV and one folder, or --candidate and one folder")
			}
			return nil
		},
		Annotations: map[string]string{alsoMarkdown: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case candidate:
				return c.diffCandidate(args[0], *td)
			case rev == "":
				return c.diff(args[0], args[1], *td)
			}
			old, err := atRevision(cmd.Context(), rev, args[0])
			if err != nil {
				return err
			}
			defer os.RemoveAll(old)
			return c.diff(old, args[0], *td)
		},
	}
	cmd.Flags().StringVar(&rev, "git", "", "compare DIR with itself at this git revision, such as origin/main")
	cmd.Flags().BoolVar(&candidate, "candidate", false, "compare DIR with itself as its candidate would make it")
	return cmd
}

// diffCandidate prints what the candidate would change.
func (c *cli) diffCandidate(dir, td string) error {
	was, err := parsePolicies(dir, td)
	if err != nil {
		return err
	}
	is := was.WithCandidate()
	if is == nil {
		return failed(fmt.Errorf("%s has no candidate: write the rows to try into %s", dir, filepath.Join(dir, "candidate", "access.csv")))
	}
	now := *was
	now.Candidate = nil
	return c.printDiff(&now, is)
}

// diff prints what NEW changes.
func (c *cli) diff(old, new, td string) error {
	was, err := parsePolicies(old, td)
	if err != nil {
		return fmt.Errorf("old policies: %w", err)
	}
	is, err := parsePolicies(new, td)
	if err != nil {
		return err
	}
	return c.printDiff(was, is)
}

func (c *cli) printDiff(was, is *mesh.Policies) error {
	cells, err := review.Diff(was, is, time.Now())
	if err != nil {
		return failed(err)
	}
	d := diffed{cells, review.Changes(was, is)}
	switch c.format {
	case "json":
		return c.emit(d, nil, nil)
	case "markdown":
		_, err := io.WriteString(c.stdout, d.markdown(was, is))
		return err
	}
	_, err = io.WriteString(c.stdout, d.text())
	return err
}

func (d diffed) text() string {
	var b strings.Builder
	for _, x := range d.Access {
		fmt.Fprintf(&b, "now %-5s  %s\n           such as %s: was %s, is %s\n", x.Effect, x.Calls(), x.Witness, x.Was, x.Is)
		if x.Way != nil {
			fmt.Fprintf(&b, "           way: %s\n", x.Way)
		}
	}
	for _, x := range d.Changes {
		fmt.Fprintf(&b, "%-9s  %s %s\n", x.What, x.Kind, x.Name)
		for _, f := range x.Fields {
			fmt.Fprintf(&b, "           %s\n", fieldText(x.What, f, func(s string) string { return s }))
		}
	}
	fmt.Fprintf(&b, "%s changed", count(len(d.Access), "cell"))
	if n := len(d.Changes); n > 0 {
		fmt.Fprintf(&b, ", %s beside", count(n, "thing"))
	}
	return b.String() + "\n"
}

// fieldText writes one field of a change; quote wraps its values.
func fieldText(what string, f review.Field, quote func(string) string) string {
	short := func(s string) string {
		if s == "" {
			return "none"
		}
		if len(s) > 120 {
			s = strings.ToValidUTF8(s[:120], "") + "…"
		}
		return quote(s)
	}
	switch what {
	case review.Added:
		return f.Name + " " + short(f.Is)
	case review.Removed:
		return f.Name + " " + short(f.Was)
	}
	return fmt.Sprintf("%s %s, was %s", f.Name, short(f.Is), short(f.Was))
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// markdown is the form for a pull request.
func (d diffed) markdown(was, is *mesh.Policies) string {
	var b strings.Builder
	b.WriteString("## Policy change\n\n")
	if len(d.Access)+len(d.Changes) == 0 {
		b.WriteString("Every call is decided as before, and nothing else changed.\n")
		return b.String()
	}
	opened, closed := 0, 0
	for _, x := range d.Access {
		if x.Effect == mesh.Allow {
			opened++
		} else {
			closed++
		}
	}
	fmt.Fprintf(&b, "%s newly allowed, %s newly denied, %s beside. Calls that are in no cell below are decided as before.\n",
		count(opened, "cell"), count(closed, "cell"), count(len(d.Changes), "change"))
	d.access(&b, "Newly allowed", mesh.Allow, is)
	d.access(&b, "Newly denied", mesh.Deny, was)
	if len(d.Changes) > 0 {
		b.WriteString("\n### What else changed\n\n| | what | fields |\n|---|---|---|\n")
		for _, x := range d.Changes {
			fields := make([]string, len(x.Fields))
			for i, f := range x.Fields {
				fields[i] = fieldText(x.What, f, code)
			}
			fmt.Fprintf(&b, "| %s | %s %s | %s |\n", x.What, x.Kind, code(x.Name), strings.Join(fields, "<br>"))
		}
	}
	return b.String()
}

// access writes the cells of one effect. The rows that decide are those of p
// where it allows.
func (d diffed) access(b *strings.Builder, title string, effect mesh.Effect, p *mesh.Policies) {
	begun := false
	for _, x := range d.Access {
		if x.Effect != effect {
			continue
		}
		if !begun {
			fmt.Fprintf(b, "\n### %s\n\n| | caller | destination | port | verb | path | when | such as | was | is |\n|---|---|---|---|---|---|---|---|---|---|\n", title)
			begun = true
		}
		when := ""
		if x.When != "" {
			when = code(x.When)
		}
		such := code(x.Witness.String())
		if x.Way != nil {
			such += "<br>way: " + code(x.Way.String())
		}
		fmt.Fprintf(b, "| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |\n", x.Dir, code(x.Src), code(x.Dst), code(x.Port), code(x.Verb), code(x.Path), when,
			such, rowRef(p, x.Was), rowRef(p, x.Is))
	}
}

// rowRef names a row and, when p has it, where it is written.
func rowRef(p *mesh.Policies, id string) string {
	for i := range p.Rules {
		if p.Rules[i].ID == id {
			return code(id) + " (" + p.Rules[i].Origin.String() + ")"
		}
	}
	return code(id)
}

// code makes text a code span that can stand in a table. A policy file cannot
// write its own Markdown: a back tick ends a span, and a bar a column.
func code(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == '`' {
			return '\''
		}
		return r
	}, s)
	return "`" + strings.ReplaceAll(s, "|", `\|`) + "`"
}

// atRevision writes a folder as git has it at a revision into a new folder.
func atRevision(ctx context.Context, rev, dir string) (string, error) {
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return "", usage(fmt.Errorf("%s is not a folder of policy files", dir))
	}
	id, err := git(ctx, dir, "rev-parse", "--verify", "--quiet", "--end-of-options", rev+"^{commit}")
	if err != nil {
		return "", usage(fmt.Errorf("--git %s: no such revision in the repository of %s (in CI, fetch the target branch first): %w", rev, dir, err))
	}
	// Not "git archive", which leaves out what .gitattributes say.
	list, err := git(ctx, dir, "ls-tree", "-r", "-z", strings.TrimSpace(string(id)))
	if err != nil || len(list) == 0 {
		return "", usage(errors.Join(fmt.Errorf("--git %s: %s was not there", rev, dir), err))
	}
	tmp, err := os.MkdirTemp("", "sallyport-policy-*")
	if err != nil {
		return "", err
	}
	if err := writeTree(ctx, dir, string(list), tmp); err != nil {
		os.RemoveAll(tmp)
		return "", failed(fmt.Errorf("--git %s: %w", rev, err))
	}
	return tmp, nil
}

// writeTree writes the files that "git ls-tree" listed below a folder. A link
// is left out: it would be read from wherever it leads.
func writeTree(ctx context.Context, dir, list, into string) error {
	for line := range strings.SplitSeq(strings.TrimSuffix(list, "\x00"), "\x00") {
		what, name, _ := strings.Cut(line, "\t")
		f := strings.Fields(what) // mode, type, object
		if len(f) != 3 || f[1] != "blob" || f[0] == "120000" {
			continue
		}
		if !filepath.IsLocal(name) {
			return fmt.Errorf("%q leads out of the folder", name)
		}
		b, err := git(ctx, dir, "cat-file", "blob", f[2])
		if err != nil {
			return err
		}
		path := filepath.Join(into, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// git runs git in a folder.
func git(ctx context.Context, dir string, args ...string) ([]byte, error) {
	var out, said bytes.Buffer
	cmd := exec.CommandContext(ctx, "git", append([]string{"-C", dir}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		if text := strings.TrimSpace(said.String()); text != "" {
			err = errors.New(firstLine(text))
		}
		return nil, fmt.Errorf("git %s: %w", args[0], err)
	}
	return out.Bytes(), nil
}

// failed gives a check that failed its exit code; nil stays nil.
func failed(err error) error {
	if err == nil {
		return nil
	}
	return &daemon.ExitError{Code: daemon.Failed, Err: err}
}
