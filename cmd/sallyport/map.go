package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/chart"
	"sallyport/internal/mesh"
)

// mapOptions are the flags of the commands that read the map.
type mapOptions struct {
	since, ago time.Duration
	focus      string
	group      bool
	all        bool
}

func (o *mapOptions) flags(cmd *cobra.Command) {
	cmd.Flags().DurationVar(&o.since, "since", time.Hour, "how long a stretch of time to count")
	cmd.Flags().DurationVar(&o.ago, "ago", 0, "how long ago it ended")
	cmd.Flags().StringVar(&o.focus, "focus", "", "only what goes from and to this workload or host")
	cmd.Flags().BoolVar(&o.group, "group", false, "sum workloads up by namespace")
	cmd.Flags().BoolVar(&o.all, "all", false, "also what the policy allows and nobody calls")
}

// readMap asks the issuer for a graph that ended some time ago.
func (c *cli) readMap(ctx context.Context, o *mapOptions, ago time.Duration) (*chart.Graph, error) {
	if o.since <= 0 || ago < 0 {
		return nil, usage(fmt.Errorf("--since %s and --ago %s are no stretch of time: use such as --since 1h --ago 24h", o.since, ago))
	}
	a, err := c.admin()
	if err != nil {
		return nil, err
	}
	defer a.Close()
	to := time.Now().Add(-ago)
	got, err := a.Edges(ctx, to.Add(-o.since), to)
	if err != nil {
		return nil, c.unreachable(err)
	}
	return o.graph(got)
}

// graph is a chart as the flags want it.
func (o *mapOptions) graph(got mesh.Chart) (*chart.Graph, error) {
	if !o.all {
		got.Unused = nil
	}
	g := chart.New(got)
	if o.focus != "" {
		end, ok := g.Find(o.focus)
		if !ok && len(g.Links) > 0 {
			return nil, usage(fmt.Errorf("--focus %q names nobody in this stretch of time, or several: write the whole SPIFFE ID", o.focus))
		}
		g = g.Focus(end)
	}
	if o.group {
		g = g.Merge(chart.Group)
	}
	return g, nil
}

// mapCommand is "sallyport map".
func (c *cli) mapCommand() *cobra.Command {
	var o mapOptions
	var than time.Duration
	var asJSON, dot, mermaid bool
	cmd := &cobra.Command{
		Use:   "map",
		Short: "Say who calls whom, as the proxies have counted it",
		Long: "Say who calls whom, as the proxies have counted it. The issuer keeps that for 30\n" +
			"days, by the minute for three hours and by the hour before. A link that was tried\n" +
			"and never let through is \"refused\"; one that a row allows and nobody calls is\n" +
			"\"unused\" (--all). --diff 24h says what changed since the same stretch a day before.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if asJSON {
				c.format = "json"
			}
			g, err := c.readMap(cmd.Context(), &o, o.ago)
			if err != nil {
				return err
			}
			if than > 0 {
				before, err := c.readMap(cmd.Context(), &o, o.ago+than)
				if err != nil {
					return err
				}
				return c.printChanges(chart.Diff(before, g))
			}
			switch {
			case dot:
				return g.DOT(c.stdout)
			case mermaid:
				return g.Mermaid(c.stdout)
			}
			return c.printMap(g)
		},
	}
	o.flags(cmd)
	cmd.Flags().DurationVar(&than, "diff", 0, "say what changed since the same stretch so long before")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON, like -o json")
	cmd.Flags().BoolVar(&dot, "dot", false, "as Graphviz reads it")
	cmd.Flags().BoolVar(&mermaid, "mermaid", false, "as Mermaid reads it")
	cmd.MarkFlagsMutuallyExclusive("json", "dot", "mermaid")
	cmd.MarkFlagsMutuallyExclusive("diff", "dot", "mermaid")
	return cmd
}

func (c *cli) printMap(g *chart.Graph) error {
	g.Busiest()
	rows := make([][]string, 0, len(g.Links))
	for _, l := range g.Links {
		row := []string{chart.Name(l.Src), chart.Name(l.Dst), string(l.State), "-", "-", "-", "-", "-", "-"}
		if l.State == chart.Unused {
			row[2] += " (" + l.Rule + ")"
		} else {
			carried := l.Proto
			if l.MTLS {
				carried += ", mTLS"
			}
			row = append(row[:3], strconv.FormatUint(l.Allowed, 10), chart.RateText(l.Rate(g.Span())), shareText(l.Failed()), quantile(l.Took, 0.5), quantile(l.Took, 0.99), strconv.FormatUint(l.Denied, 10), carried)
		}
		rows = append(rows, row)
	}
	return c.emit(g, []string{"CALLER", "CALLED", "STATE", "CALLS", "RATE", "ERRORS", "P50", "P99", "DENIED", "CARRIED"}, rows)
}

func (c *cli) printChanges(list []chart.Change) error {
	rows := make([][]string, 0, len(list))
	for _, x := range list {
		rows = append(rows, []string{string(x.Kind), chart.Name(x.Src), chart.Name(x.Dst), chart.RateText(x.Before), chart.RateText(x.After), shareText(x.ErrorsBefore), shareText(x.ErrorsAfter), shareText(x.DeniedBefore), shareText(x.DeniedAfter)})
	}
	if list == nil {
		list = []chart.Change{}
	}
	return c.emit(list, []string{"CHANGE", "CALLER", "CALLED", "BEFORE", "NOW", "ERRORS BEFORE", "NOW", "DENIED BEFORE", "NOW"}, rows)
}

func shareText(f float64) string { return strconv.FormatFloat(100*f, 'f', 2, 64) + "%" }

func quantile(h mesh.Histogram, q float64) string {
	d := h.Quantile(q)
	switch {
	case d == 0:
		return "-"
	case d < time.Millisecond:
		return d.Round(time.Microsecond).String()
	}
	return d.Round(d / 100 / time.Microsecond * time.Microsecond).Truncate(10 * time.Microsecond).String()
}

// edges is "sallyport edges".
func (c *cli) edges() *cobra.Command {
	var o mapOptions
	cmd := &cobra.Command{
		Use:   "edges",
		Short: "List who calls whom with whole identities, each protocol by itself",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := c.admin()
			if err != nil {
				return err
			}
			defer a.Close()
			to := time.Now().Add(-o.ago)
			got, err := a.Edges(cmd.Context(), to.Add(-o.since), to)
			if err != nil {
				return c.unreachable(err)
			}
			rows := make([][]string, 0, len(got.Edges))
			for _, e := range got.Edges {
				rows = append(rows, []string{e.Src, e.Dst, e.Proto, strconv.FormatUint(e.Allowed, 10), strconv.FormatUint(e.Denied, 10), strconv.FormatUint(e.Errors, 10), yesNo(e.MTLS), e.First.UTC().Format(time.RFC3339), e.Last.UTC().Format(time.RFC3339)})
			}
			return c.emit(got.Edges, []string{"SRC", "DST", "PROTO", "ALLOWED", "DENIED", "ERRORS", "MTLS", "FIRST", "LAST"}, rows)
		},
	}
	cmd.Flags().DurationVar(&o.since, "since", time.Hour, "how long a stretch of time to count")
	cmd.Flags().DurationVar(&o.ago, "ago", 0, "how long ago it ended")
	return cmd
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// A stat sums up what came to one end.
type stat struct {
	Name    string  `json:"name"`
	End     string  `json:"end"`
	Rate    float64 `json:"rate"`
	Calls   uint64  `json:"calls"`
	Denied  uint64  `json:"denied"`
	Errors  float64 `json:"errors"`
	P50     string  `json:"p50"`
	P99     string  `json:"p99"`
	Callers int     `json:"callers"`
}

// stats are the golden signals of everybody who was called, the busiest first.
func stats(g *chart.Graph) (out []stat) {
	callers := map[string]int{}
	for _, l := range g.Links {
		if l.State != chart.Unused {
			callers[l.Dst]++
		}
	}
	in := g.Into()
	in.Busiest()
	for _, l := range in.Links {
		out = append(out, stat{
			Name: chart.Name(l.Dst), End: l.Dst, Rate: l.Rate(g.Span()), Calls: l.Allowed, Denied: l.Denied, Errors: l.Failed(),
			P50: quantile(l.Took, 0.5), P99: quantile(l.Took, 0.99), Callers: callers[l.Dst],
		})
	}
	return out
}

// stat is "sallyport stat".
func (c *cli) stat() *cobra.Command {
	var o mapOptions
	cmd := &cobra.Command{
		Use:   "stat",
		Short: "Show the golden signals of each service: rate, errors, latency, denials",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			g, err := c.readMap(cmd.Context(), &o, o.ago)
			if err != nil {
				return err
			}
			return c.printStats(stats(g))
		},
	}
	o.flags(cmd)
	return cmd
}

func (c *cli) printStats(list []stat) error {
	rows := make([][]string, 0, len(list))
	for _, s := range list {
		rows = append(rows, []string{s.Name, chart.RateText(s.Rate), shareText(s.Errors), s.P50, s.P99, strconv.FormatUint(s.Denied, 10), strconv.Itoa(s.Callers)})
	}
	return c.emit(list, []string{"SERVICE", "RATE", "ERRORS", "P50", "P99", "DENIED", "CALLERS"}, rows)
}

// top is "sallyport top".
func (c *cli) top() *cobra.Command {
	var o mapOptions
	var every time.Duration
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show the busiest links, again and again",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if every < time.Second {
				return usage(fmt.Errorf("--every %s is too often: use at least 1s", every))
			}
			for {
				g, err := c.readMap(cmd.Context(), &o, 0)
				if err != nil {
					return err
				}
				if err := c.printTop(g); err != nil {
					return err
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(every):
				}
			}
		},
	}
	o.flags(cmd)
	cmd.Flags().Lookup("since").DefValue = "1m0s"
	o.since = time.Minute
	cmd.Flags().DurationVar(&every, "every", 5*time.Second, "how often")
	return cmd
}

// printTop prints one screen; as JSON one line.
func (c *cli) printTop(g *chart.Graph) error {
	g.Busiest()
	g.Links = g.Links[:min(len(g.Links), 20)]
	if c.format == "json" {
		return json.NewEncoder(c.stdout).Encode(g)
	}
	if _, err := io.WriteString(c.stdout, "\n"+time.Now().UTC().Format(time.TimeOnly)+" UTC, the last "+g.Span().Round(time.Second).String()+"\n"); err != nil {
		return err
	}
	return c.printMap(g)
}

// page is "sallyport page".
func (c *cli) page() *cobra.Command {
	return &cobra.Command{
		Use:   "page",
		Short: "Print a link that opens the operator's page once",
		Long: "Print a link that opens the operator's page once, on this machine. It is good for\n" +
			"ten minutes. The issuer serves the page when page.listen is in its configuration;\n" +
			"a page on another address than the loopback's asks for a client certificate instead.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := c.admin()
			if err != nil {
				return err
			}
			defer a.Close()
			link, expires, err := a.PageLink(cmd.Context())
			if err != nil {
				return err
			}
			if c.format == "json" {
				return c.emit(map[string]any{"url": link, "expires": expires.UTC()}, nil, nil)
			}
			fmt.Fprintln(c.stdout, link)
			fmt.Fprintf(c.stderr, "opens the page once, until %s\n", expires.UTC().Format(time.RFC3339))
			return nil
		},
	}
}
