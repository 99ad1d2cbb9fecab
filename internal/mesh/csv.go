package mesh

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// Columns of a rule row, counted from the kind.
const (
	colKind = 1 + iota
	colID
	colDir
	colSrc
	colDst
	colPort
	colVerb
	colPath
	colCond
	colEffect
	ruleFields = iota
)

// maxRows is the size of the largest file of rows, in bytes: more than 100,000 rows
// of ordinary length, which are twice as large in a store and in a message.
const maxRows = 16 << 20

const memberFields = 3 // kind, member, group

// parseRows reads access.csv or guardrails.csv: rows of fields separated by
// commas, blanks around a field ignored, no quotes, "#" as the first character
// of a line for a comment. It checks the form; Validate checks the values.
func parseRows(file string, src []byte, guard bool) ([]Rule, []Membership, Errors) {
	var (
		rules   []Rule
		members []Membership
		errs    Errors
	)
	if len(src) > maxRows {
		return nil, nil, Errors{{File: file, Msg: fmt.Sprintf("file has more than %d bytes", maxRows)}}
	}
	for i, text := range splitLines(src) {
		if strings.TrimSpace(text) == "" || text[0] == '#' {
			continue
		}
		o := Origin{File: file, Line: i + 1}
		fields, p := splitRow(text)
		if p == nil {
			p = checkRow(fields, guard)
		}
		if p != nil {
			p.File, p.Line, p.Text = o.File, o.Line, text
			if p.field > 0 {
				p.Col = columnOfField(text, p.field)
			}
			errs = append(errs, p)
			continue
		}
		if fields[0] != "p" {
			members = append(members, Membership{Kind: GroupKind(fields[0]), Member: fields[1], Group: fields[2], Origin: o})
			continue
		}
		rules = append(rules, Rule{
			ID: fields[colID-1], Dir: Direction(fields[colDir-1]),
			Src: fields[colSrc-1], Dst: fields[colDst-1], Port: fields[colPort-1],
			Verb: fields[colVerb-1], Path: fields[colPath-1], Cond: fields[colCond-1],
			Effect: Effect(fields[colEffect-1]), Origin: o,
		})
	}
	return rules, members, errs
}

// splitRow cuts a line into trimmed fields.
func splitRow(text string) ([]string, *Problem) {
	if at := badByte(text); at >= 0 {
		return nil, &Problem{Col: 1 + utf8.RuneCountInString(text[:at]), Msg: "character is not printable UTF-8 text"}
	}
	if at := strings.IndexAny(text, "\"'`"); at >= 0 {
		return nil, &Problem{Col: 1 + utf8.RuneCountInString(text[:at]), Msg: "quotes are not supported: fields hold no comma and need none"}
	}
	if strings.HasPrefix(strings.TrimLeft(text, " \t"), "#") {
		return nil, &Problem{Col: 1 + strings.IndexByte(text, '#'), Msg: "a comment starts in the first column"}
	}
	fields := strings.Split(text, ",")
	for i, f := range fields {
		fields[i] = strings.Trim(f, " \t")
		if at := strings.IndexByte(fields[i], '#'); at >= 0 {
			return nil, &Problem{field: i + 1, Msg: "# inside a row: a comment stands on its own line"}
		}
	}
	return fields, nil
}

// checkRow checks the kind, the number of fields and that none is empty.
func checkRow(fields []string, guard bool) *Problem {
	want, form := 0, ""
	switch fields[0] {
	case "p":
		want, form = ruleFields, "p, id, dir, src, dst, port, verb, path, cond, effect"
	case string(CallerGroup), string(DestinationGroup):
		want, form = memberFields, fields[0]+", member, group"
		if guard {
			return &Problem{field: colKind, Msg: "guardrails hold only deny rows: define groups in access.csv"}
		}
	default:
		kinds := []string{"p", string(CallerGroup), string(DestinationGroup)}
		return &Problem{field: colKind, Msg: fmt.Sprintf("unknown kind of row %q%s", clip(fields[0]), didYouMean(strings.ToLower(fields[0]), kinds))}
	}
	if len(fields) != want {
		return &Problem{field: min(len(fields), want+1), Msg: fmt.Sprintf("row has %d fields, want %d: %s", len(fields), want, form)}
	}
	for i, f := range fields {
		if f == "" {
			return &Problem{field: i + 1, Msg: fmt.Sprintf("field %d is empty: %s", i+1, form)}
		}
	}
	if guard && fields[colEffect-1] == string(Allow) {
		return &Problem{field: colEffect, Msg: "guardrails hold only deny rows: an allow belongs in access.csv"}
	}
	return nil
}

// didYouMean ends a message about an unknown word.
func didYouMean(s string, known []string) string {
	if n := nearest(s, known); n != "" {
		return fmt.Sprintf(": did you mean %q?", n)
	}
	return "; known are " + strings.Join(known, ", ")
}

// columnOfField is where the n-th field of a row begins, in characters.
func columnOfField(text string, n int) int {
	at := 0
	for ; n > 1; n-- {
		i := strings.IndexByte(text[at:], ',')
		if i < 0 {
			break
		}
		at += i + 1
	}
	rest := strings.TrimLeft(text[at:], " \t")
	return 1 + utf8.RuneCountInString(text[:len(text)-len(rest)])
}
