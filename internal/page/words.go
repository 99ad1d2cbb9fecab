package page

import (
	"fmt"
	"html/template"
	"net/url"
	"strconv"
	"strings"
	"time"

	"sallyport/internal/chart"
	"sallyport/internal/mesh"
)

// funcs are what the templates may call.
var funcs = template.FuncMap{
	"name": chart.Name, "group": chart.Group, "count": countText, "percent": percentText, "bytes": bytesText, "took": tookText,
	"rate": func(l chart.Link, seconds float64) string {
		return chart.RateText(l.Rate(time.Duration(seconds * float64(time.Second))))
	},
	"perSecond": chart.RateText,
	"quantile":  func(h mesh.Histogram, q float64) string { return tookText(h.Quantile(q)) },
	"stamp":     func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
	"clock":     clockText,
	"service":   func(end string) string { return "/service?end=" + url.QueryEscape(end) },
	"audited":   func(id string) string { return "/audit?span=24h&id=" + url.QueryEscape(id) },
	"words":     func(s any) string { return strings.ReplaceAll(strings.ToLower(fmt.Sprint(s)), "_", " ") },
	"short":     func(s string) string { return s[:min(len(s), 16)] },
	"add":       func(a, b int) int { return a + b },
	"text":      func(s any) string { return fmt.Sprint(s) },
	"workload":  func(end string) bool { return strings.HasPrefix(end, "spiffe://") },
}

// countText groups the digits of a number.
func countText(n any) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "\u2009" + s[i:] // a thin space
	}
	return s
}

func percentText(f float64) string {
	switch {
	case f == 0:
		return "0 %"
	case f < 0.0001:
		return "<0.01 %"
	case f < 0.1:
		return fmt.Sprintf("%.2f %%", 100*f)
	}
	return fmt.Sprintf("%.1f %%", 100*f)
}

func bytesText(n int64) string {
	f, unit := float64(n), "B"
	for _, u := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if f < 1024 {
			break
		}
		f, unit = f/1024, u
	}
	if unit == "B" {
		return strconv.FormatInt(n, 10) + " B"
	}
	return fmt.Sprintf("%.1f %s", f, unit)
}

// tookText is a duration with three digits at most.
func tookText(d time.Duration) string {
	switch {
	case d <= 0:
		return "–"
	case d < time.Millisecond:
		return fmt.Sprintf("%d µs", d.Microseconds())
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	}
	return fmt.Sprintf("%d h", int(d.Hours()))
}

func clockText(t time.Time) string {
	if t.IsZero() {
		return "–"
	}
	return t.UTC().Format("15:04:05")
}

// A curve is the calls to an end over time, in a box of curveWidth by
// curveHeight.
type curve struct {
	Line, Area, Bad string
	Top             string // the highest rate, in words
	From, To        time.Time
}

const curveWidth, curveHeight = 600, 80

// A beat is a step of a curve.
type beat struct{ calls, bad, seconds float64 }

// rate is v a second.
func (b beat) rate(v float64) float64 {
	if b.seconds == 0 {
		return 0
	}
	return v / b.seconds
}

// beatsOf adds windows up in steps of the longest of them.
func beatsOf(windows []mesh.Window, end string) (beats map[int64]beat, step time.Duration, from, to time.Time) {
	for _, w := range windows {
		step = max(step, w.To.Sub(w.From))
	}
	beats = map[int64]beat{}
	counted := map[int64]bool{} // several issuers have windows of the same time
	for _, w := range windows {
		at := w.From.Truncate(step)
		b := beats[at.Unix()]
		for _, e := range w.Edges {
			if e.Dst == end || e.Src == end {
				b.calls += float64(e.Allowed + e.Denied)
				b.bad += float64(e.Errors + e.Denied)
			}
		}
		if !counted[w.From.Unix()] {
			b.seconds += w.To.Sub(w.From).Seconds()
		}
		counted[w.From.Unix()] = true
		beats[at.Unix()] = b
		if from.IsZero() || at.Before(from) {
			from = at
		}
		if end := at.Add(step); end.After(to) {
			to = end
		}
	}
	return beats, step, from, to
}

// curveOf draws the calls to and from an end; nil when there is no curve.
func curveOf(windows []mesh.Window, end string) *curve {
	beats, step, from, to := beatsOf(windows, end)
	top := 0.0
	for _, b := range beats {
		top = max(top, b.rate(b.calls))
	}
	if top == 0 || len(beats) < 2 {
		return nil
	}
	c := &curve{Top: chart.RateText(top), From: from, To: to}
	var line, bad strings.Builder
	for t := from; t.Before(to); t = t.Add(step) {
		b := beats[t.Unix()]
		x := curveWidth * float64(t.Sub(from)) / float64(to.Sub(from)-step)
		sep := "L"
		if t.Equal(from) {
			sep = "M"
		}
		fmt.Fprintf(&line, "%s%.1f %.1f", sep, x, curveHeight-(curveHeight-4)*b.rate(b.calls)/top)
		fmt.Fprintf(&bad, "%s%.1f %.1f", sep, x, curveHeight-(curveHeight-4)*b.rate(b.bad)/top)
	}
	c.Line, c.Bad = line.String(), bad.String()
	c.Area = fmt.Sprintf("M0 %d%sL%d %dZ", curveHeight, strings.Replace(c.Line, "M", "L", 1), curveWidth, curveHeight)
	return c
}
