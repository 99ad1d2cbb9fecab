package main

import (
	"bytes"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport/internal/chart"
	"sallyport/internal/mesh"
)

// aChart is a shop an hour long.
func aChart() mesh.Chart {
	id := func(name string) string { return "spiffe://corp.example/ns/shop/sa/" + name }
	to := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	took := func(n uint32, d time.Duration) (h mesh.Histogram) { h.Count(mesh.Bucket(d), n); return h }
	return mesh.Chart{
		From: to.Add(-time.Hour), To: to,
		Edges: []mesh.Edge{
			{Src: "", Dst: id("billing"), Proto: "http", Denied: 3, First: to, Last: to},
			{Src: id("batch"), Dst: id("billing"), Proto: "http", Allowed: 60, Denied: 12, MTLS: true, First: to, Last: to, Took: took(60, time.Millisecond)},
			{Src: id("billing"), Dst: "host:api.stripe.test", Proto: "tcp", Allowed: 9, MTLS: true, First: to, Last: to},
			{Src: id("payment"), Dst: id("billing"), Proto: "http", Allowed: 36000, Errors: 360, MTLS: true, First: to, Last: to, Took: took(36000, 5*time.Millisecond)},
		},
		Unused: []mesh.Unused{{Src: id("web"), Dst: id("inventory"), Rule: "web-stock-1"}},
	}
}

// TestMapIsPrinted compares what the commands print with what they printed
// before (testdata/map_*.txt).
func TestMapIsPrinted(t *testing.T) {
	before := aChart()
	before.Edges = append([]mesh.Edge(nil), before.Edges[:3]...)
	before.Edges[1].Errors = 30
	for name, do := range map[string]func(c *cli, g *chart.Graph) error{
		"table":   (*cli).printMap,
		"dot":     func(c *cli, g *chart.Graph) error { return g.DOT(c.stdout) },
		"mermaid": func(c *cli, g *chart.Graph) error { return g.Mermaid(c.stdout) },
		"stat":    func(c *cli, g *chart.Graph) error { return c.printStats(stats(g)) },
		"diff":    func(c *cli, g *chart.Graph) error { return c.printChanges(chart.Diff(chart.New(before), g)) },
		"json":    func(c *cli, g *chart.Graph) error { c.format = "json"; return c.printMap(g) },
	} {
		var out bytes.Buffer
		o := mapOptions{all: true}
		g, err := o.graph(aChart())
		if err == nil {
			err = do(&cli{stdout: &out, format: "table"}, g)
		}
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "testdata/map_"+name+".txt", out.Bytes())
	}
	o := mapOptions{focus: "billing", group: true}
	if g, err := o.graph(aChart()); err != nil || len(g.Links) != 3 {
		t.Errorf("grouped around billing: %+v, %v", g, err)
	}
	o.focus = "nobody-else"
	if _, err := o.graph(aChart()); err == nil {
		t.Error("focus on who is not there")
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	want, err := os.ReadFile(name)
	if os.Getenv("UPDATE") != "" {
		want, err = got, os.WriteFile(name, got, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s, -want +got:\n%s", name, d)
	}
}
