package chart

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// DOT writes the graph for Graphviz.
func (g *Graph) DOT(w io.Writer) error {
	p := &printer{w: w}
	p.say("digraph mesh {\n  rankdir=LR;\n  node [shape=box, fontname=\"sans-serif\"];\n")
	names := g.names()
	for _, end := range g.ends() {
		p.say("  %s [label=%s];\n", quoteDOT(end), quoteDOT(names[end]))
	}
	for _, l := range g.Links {
		style := map[State]string{Open: "solid", Mixed: "solid", Refused: "dashed", Unused: "dotted"}[l.State]
		color := ""
		if l.State == Refused || l.State == Mixed {
			color = ", color=red"
		}
		p.say("  %s -> %s [label=%s, style=%s%s];\n", quoteDOT(l.Src), quoteDOT(l.Dst), quoteDOT(g.label(&l)), style, color)
	}
	p.say("}\n")
	return p.err
}

// Mermaid writes the graph as Mermaid does flow charts.
func (g *Graph) Mermaid(w io.Writer) error {
	p := &printer{w: w}
	p.say("flowchart LR\n")
	at := map[string]int{}
	names := g.names()
	for i, end := range g.ends() {
		at[end] = i
		p.say("  n%d[\"%s\"]\n", i, quoteMermaid(names[end]))
	}
	for _, l := range g.Links {
		arrow := "-->"
		switch l.State {
		case Refused:
			arrow = "--x"
		case Unused:
			arrow = "-.->"
		}
		p.say("  n%d %s|\"%s\"| n%d\n", at[l.Src], arrow, quoteMermaid(g.label(&l)), at[l.Dst])
	}
	return p.err
}

// label is what stands at a link.
func (g *Graph) label(l *Link) string {
	switch l.State {
	case Unused:
		return "unused, " + l.Rule
	case Refused:
		return fmt.Sprintf("%d denied", l.Denied)
	}
	s := RateText(l.Rate(g.Span()))
	if l.Denied > 0 {
		s += fmt.Sprintf(", %d denied", l.Denied)
	}
	if l.Errors > 0 {
		s += fmt.Sprintf(", %d failed", l.Errors)
	}
	return s
}

// RateText is a rate of calls for people.
func RateText(r float64) string {
	switch {
	case r == 0:
		return "0/s"
	case r < 0.01:
		return "<0.01/s"
	case r < 10:
		return fmt.Sprintf("%.2f/s", r)
	case r < 100:
		return fmt.Sprintf("%.1f/s", r)
	}
	return fmt.Sprintf("%.0f/s", r)
}

// ends are all there are, in order.
func (g *Graph) ends() (all []string) {
	for _, l := range g.Links {
		all = append(all, l.Src, l.Dst)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// names shortens each end as far as no other has the same name.
func (g *Graph) names() map[string]string {
	count := map[string]int{}
	all := g.ends()
	for _, end := range all {
		count[Name(end)]++
	}
	out := make(map[string]string, len(all))
	for _, end := range all {
		if out[end] = Name(end); count[out[end]] > 1 {
			out[end] = Group(end) + "/" + Name(end)
		}
	}
	return out
}

// quoteDOT and quoteMermaid let no name, which proxies report, end its quotes.
func quoteDOT(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", " ").Replace(s) + `"`
}

func quoteMermaid(s string) string {
	return strings.NewReplacer("#", "#35;", `"`, "#quot;", "\n", " ", "<", "#lt;", ">", "#gt;").Replace(s)
}

// A printer keeps the first error.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) say(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, args...)
	}
}
