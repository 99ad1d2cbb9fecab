package mesh

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A Problem is one mistake in a reviewed or configured file.
type Problem struct {
	File string
	// Line and Col count from 1; zero when the mistake has no such place. Col
	// counts characters.
	Line, Col int
	// Text is the source line, empty when it is not at hand or is secret.
	Text string
	Msg  string

	// field is the column of a CSV row, and near a text of a YAML item, where
	// the caret belongs; both are resolved once the source is at hand.
	field int
	near  string
}

// Error is "file:line:col: message", then the source line and a caret.
func (p *Problem) Error() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
		if p.Col > 0 {
			fmt.Fprintf(&b, ":%d", p.Col)
		}
	}
	if b.Len() > 0 {
		b.WriteString(": ")
	}
	b.WriteString(p.Msg)
	if p.Text == "" {
		return b.String()
	}
	text, col := window(p.Text, p.Col)
	b.WriteString("\n    ")
	b.WriteString(text)
	if col > 0 {
		b.WriteString("\n    ")
		for _, r := range prefixRunes(text, col-1) {
			if r != '\t' {
				r = ' '
			}
			b.WriteRune(r)
		}
		b.WriteByte('^')
	}
	return b.String()
}

// window cuts a long line so that the place of the mistake stays in sight.
func window(text string, col int) (string, int) {
	const width = 160
	text = strings.Map(func(r rune) rune {
		if !plainRune(r) {
			return '?'
		}
		return r
	}, text)
	runes := []rune(text)
	start := 0
	if col > width {
		start = col - width/2
	}
	start = min(start, len(runes))
	end := min(start+width, len(runes))
	if col > 0 {
		col -= start
	}
	return string(runes[start:end]), col
}

// plainRune reports whether a reviewed file may hold r: not a control, not what
// reorders or hides text, not what stands for broken UTF-8.
func plainRune(r rune) bool {
	return r == '\t' || r != utf8.RuneError && unicode.IsPrint(r)
}

// badByte returns the place of the first rune that is not plain, -1 when there
// is none.
func badByte(line string) int {
	return strings.IndexFunc(line, func(r rune) bool { return !plainRune(r) })
}

func prefixRunes(s string, n int) string {
	for i := range s {
		if n == 0 {
			return s[:i]
		}
		n--
	}
	return s + strings.Repeat(" ", n)
}

// Errors is every mistake found, in the order of files and lines.
type Errors []*Problem

// Error shows the first hundred: whoever has more has one mistake in common.
func (e Errors) Error() string {
	const most = 100
	s := make([]string, 0, most+1)
	for i, p := range e {
		if i == most {
			s = append(s, fmt.Sprintf("and %d more mistakes", len(e)-most))
			break
		}
		s = append(s, p.Error())
	}
	return strings.Join(s, "\n")
}

// Unwrap lets errors.As find the single Problems.
func (e Errors) Unwrap() []error {
	s := make([]error, len(e))
	for i, p := range e {
		s[i] = p
	}
	return s
}

func (e Errors) orNil() error {
	if len(e) == 0 {
		return nil
	}
	return e
}

// oneLine is the message of a cause, which must not bring its own lines.
func oneLine(err error) string {
	if p, ok := errors.AsType[*Problem](err); ok {
		return p.Msg
	}
	s, _, _ := strings.Cut(err.Error(), "\n")
	return s
}

// sources are the files as read, to show lines of.
type sources map[string][]string

func splitLines(src []byte) []string {
	lines := strings.Split(string(src), "\n")
	for i, l := range lines {
		lines[i] = strings.TrimSuffix(l, "\r")
	}
	return lines
}

// place fills Text and Col of a problem that knows only its row or item.
func (s sources) place(p *Problem) {
	lines := s[p.File]
	if p.Text != "" || p.Line < 1 || p.Line > len(lines) {
		return
	}
	p.Text = lines[p.Line-1]
	switch {
	case p.field > 0:
		p.Col = columnOfField(p.Text, p.field)
		return
	case p.near != "":
		if line, col := findInItem(lines, p.Line, p.near); line > 0 {
			p.Line, p.Col, p.Text = line, col, lines[line-1]
			return
		}
	}
	if p.Col == 0 {
		p.Col = 1 + len(p.Text) - len(strings.TrimLeft(p.Text, " \t"))
	}
}

// findInItem looks for text from the first line of a YAML list item to its
// last.
func findInItem(lines []string, first int, text string) (line, col int) {
	indent := len(lines[first-1]) - len(strings.TrimLeft(lines[first-1], " -"))
	for i := first - 1; i < len(lines); i++ {
		l := lines[i]
		trimmed := strings.TrimLeft(l, " ")
		if i > first-1 && trimmed != "" && len(l)-len(trimmed) < indent {
			return 0, 0
		}
		if strings.HasPrefix(trimmed, "#") {
			continue
		}
		if at := indexWord(l, text); at >= 0 {
			return i + 1, 1 + utf8.RuneCountInString(l[:at])
		}
	}
	return 0, 0
}

// indexWord finds text, which as a key ("id:") must not be the end of another
// one ("spiffe_id:").
func indexWord(line, text string) int {
	for from := 0; ; {
		i := strings.Index(line[from:], text)
		if i < 0 {
			return -1
		}
		i += from
		if !strings.HasSuffix(text, ":") || i == 0 || strings.IndexByte(" -{,", line[i-1]) >= 0 {
			return i
		}
		from = i + 1
	}
}
