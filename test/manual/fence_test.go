package manual

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A fence is a fenced block of a page.
type fence struct {
	page string // such as docs/audit.md
	line int
	// lang is the first word behind the fence, and mark what stands behind it:
	// "run" for commands that are carried out, "excerpt" for what is only shown.
	lang, mark string
	text       string
}

// pages are the README and everything under docs/, in order.
func pages(t *testing.T) []string {
	t.Helper()
	all := []string{"README.md"}
	err := filepath.WalkDir(filepath.Join(root, "docs"), func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() && strings.HasSuffix(path, ".md") {
			rel, _ := filepath.Rel(root, path)
			all = append(all, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

func fences(t *testing.T, page string) (out []fence) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, page))
	if err != nil {
		t.Fatal(err)
	}
	var open *fence
	for i, l := range strings.Split(string(b), "\n") {
		switch {
		case open == nil && strings.HasPrefix(l, "```"):
			words := append(strings.Fields(l[3:]), "", "")
			open = &fence{page: page, line: i + 1, lang: words[0], mark: words[1]}
		case open != nil && strings.HasPrefix(l, "```"):
			out = append(out, *open)
			open = nil
		case open != nil:
			open.text += l + "\n"
		}
	}
	if open != nil {
		t.Errorf("%s:%d: a fence is not closed", page, open.line)
	}
	return out
}

// ours are the programs whose commands are held against their own help.
var ours = []string{"issuer", "sidecar", "gateway", "sallyport", "injector"}

// A command is one simple command of a block, as words.
type command struct {
	line  int
	words []string
}

// commands are those of a block. In a session they stand behind a "$ ", and all
// else is what was printed.
func (f fence) commands() (out []command) {
	session := f.lang == "console"
	for _, l := range strings.Split(f.text, "\n") {
		session = session || strings.HasPrefix(l, "$ ")
	}
	joined, start := "", 0
	for i, l := range strings.Split(f.text, "\n") {
		if joined == "" {
			start = f.line + 1 + i
			if session {
				prompt, rest, ok := strings.Cut(l, "$ ")
				if !ok || strings.ContainsAny(prompt, " \t\"'") {
					continue
				}
				l = rest
			}
		}
		joined += l
		if cut, ok := strings.CutSuffix(joined, "\\"); ok {
			joined = cut + " "
			continue
		}
		for _, words := range simple(joined) {
			out = append(out, command{start, words})
		}
		joined = ""
	}
	return out
}

// simple takes a line of shell apart: commands, without what redirects them.
func simple(line string) (out [][]string) {
	var words []string
	var word strings.Builder
	quote, has := rune(0), false
	flush := func() {
		if has {
			words = append(words, word.String())
		}
		word.Reset()
		has = false
	}
	end := func() {
		flush()
		if len(words) > 0 {
			out = append(out, words)
		}
		words = nil
	}
	for _, r := range line {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(r)
		case r == '\'' || r == '"':
			quote, has = r, true
		case r == '#' && !has:
			end()
			return plain(out)
		case strings.ContainsRune("|;&()", r):
			end()
		case r == '<' || r == '>':
			flush()
			words = append(words, ">")
		case r == ' ' || r == '\t':
			flush()
		default:
			word.WriteRune(r)
			has = true
		}
	}
	end()
	return plain(out)
}

// plain drops redirections, assignments before a command, and words of the
// shell itself.
func plain(all [][]string) (out [][]string) {
	for _, words := range all {
		var kept []string
		for i := 0; i < len(words); i++ {
			switch w := words[i]; {
			case w == ">":
				i++ // its file
			case len(kept) == 0 && (strings.Contains(w, "=") || slices.Contains([]string{"sudo", "exec", "if", "then", "do", "while", "!", "for", "fi", "done", "$"}, w)):
			default:
				kept = append(kept, w)
			}
		}
		if len(kept) > 0 {
			kept[0] = strings.TrimPrefix(kept[0], "bin/")
			out = append(out, kept)
		}
	}
	return out
}
