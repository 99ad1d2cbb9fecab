package chart

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

func id(name string) string { return "spiffe://corp.example/ns/shop/sa/" + name }

// TestPairs expands rows to who there is.
func TestPairs(t *testing.T) {
	p := &mesh.Policies{
		Rules: []mesh.Rule{
			{ID: "one", Dir: mesh.In, Src: id("web"), Dst: id("payment"), Effect: mesh.Allow},
			{ID: "again", Dir: mesh.In, Src: id("web"), Dst: id("payment"), Effect: mesh.Allow},
			{ID: "group", Dir: mesh.In, Src: "group:all", Dst: "svcs:some", Effect: mesh.Allow},
			{ID: "no", Dir: mesh.In, Src: id("batch"), Dst: id("web"), Effect: mesh.Deny},
			{ID: "gone", Dir: mesh.In, Src: id("nobody"), Dst: id("web"), Effect: mesh.Allow},
			{ID: "out", Dir: mesh.Out, Src: id("payment"), Dst: "hosts:pay", Effect: mesh.Allow},
		},
		Memberships: []mesh.Membership{
			{Kind: mesh.CallerGroup, Member: "spiffe://corp.example/ns/shop/**", Group: "group:all"},
			{Kind: mesh.DestinationGroup, Member: id("payment"), Group: "svcs:some"},
			{Kind: mesh.DestinationGroup, Member: "host:*.stripe.test", Group: "hosts:pay"},
		},
		Destinations: []mesh.Destination{{Host: "api.stripe.test"}, {Host: "*.stripe.test"}, {Host: "other.test"}},
	}
	for _, name := range []string{"web", "payment", "batch"} {
		p.Entries = append(p.Entries, mesh.Entry{SPIFFEID: spiffeid.RequireFromString(id(name))})
		p.Services = append(p.Services, mesh.Service{ID: spiffeid.RequireFromString(id(name))})
	}
	want := []mesh.Unused{
		{Src: id("web"), Dst: id("payment"), Rule: "one"},
		{Src: id("batch"), Dst: id("payment"), Rule: "group"},
		{Src: id("payment"), Dst: "host:api.stripe.test", Rule: "out"},
	}
	got := Pairs(p)
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	left := NotCalled(got, []mesh.Edge{{Src: id("web"), Dst: id("payment"), Allowed: 1}, {Src: id("batch"), Dst: id("payment"), Denied: 1}})
	if d := cmp.Diff(want[1:], left); d != "" {
		t.Error(d)
	}
	if Pairs(nil) != nil {
		t.Error("pairs without policies")
	}
}

func TestDiff(t *testing.T) {
	at := func(span time.Duration, edges ...mesh.Edge) *Graph {
		return New(mesh.Chart{To: time.Unix(0, 0).Add(span), From: time.Unix(0, 0), Edges: edges})
	}
	e := func(src string, allowed, denied, errors uint64) mesh.Edge {
		return mesh.Edge{Src: src, Dst: "d", Proto: "http", Allowed: allowed, Denied: denied, Errors: errors}
	}
	before := at(time.Hour, e("same", 100, 0, 1), e("gone", 1, 0, 0), e("opened", 0, 5, 0), e("closed", 5, 0, 0), e("failing", 100, 0, 0), e("busier", 100, 0, 0), e("mended", 100, 0, 50))
	after := at(2*time.Hour, e("same", 210, 0, 2), e("new", 1, 0, 0), e("opened", 5, 0, 0), e("closed", 0, 5, 0), e("failing", 200, 0, 100), e("busier", 900, 0, 0), e("mended", 200, 0, 0))
	for _, c := range Diff(before, after) {
		if string(c.Kind) != c.Src {
			t.Errorf("%s is told as %s", c.Src, c.Kind)
		}
	}
	if n := len(Diff(before, after)); n != 7 {
		t.Errorf("%d changes, want 7", n)
	}
	if n := len(Diff(before, before)); n != 0 {
		t.Errorf("%d changes to itself", n)
	}
}

func TestMergeAddsUp(t *testing.T) {
	g := New(mesh.Chart{
		Edges: []mesh.Edge{
			{Src: id("a"), Dst: id("b"), Proto: "http", Allowed: 2, MTLS: true, Took: mesh.Histogram{2}},
			{Src: id("a"), Dst: id("b"), Proto: "tcp", Allowed: 1, Errors: 1, MTLS: true},
			{Src: id("c"), Dst: id("b"), Proto: "http", Denied: 4, MTLS: false},
		},
		Unused: []mesh.Unused{{Src: id("d"), Dst: id("b"), Rule: "r"}},
	})
	got := g.Merge(Group).Links
	if len(got) != 1 {
		t.Fatalf("%+v", got)
	}
	if l := got[0]; l.Src != "shop" || l.State != Mixed || l.Allowed != 3 || l.Denied != 4 || l.Errors != 1 || l.Proto != "http,tcp" || l.MTLS || l.Took.Total() != 2 {
		t.Errorf("%+v", l)
	}
	if g.Links[0].Allowed != 3 || g.Links[0].Took.Total() != 2 {
		t.Errorf("Merge changed what it was made of: %+v", g.Links[0])
	}
}

// TestDrawing holds drawings to their size, and their nodes apart.
func TestDrawing(t *testing.T) {
	for name, edges := range map[string][]mesh.Edge{
		"nothing":    nil,
		"a circle":   {{Src: "a", Dst: "b", Allowed: 1}, {Src: "b", Dst: "c", Allowed: 1}, {Src: "c", Dst: "a", Allowed: 1}, {Src: "a", Dst: "a", Allowed: 1}},
		"many":       many(3000, func(i int) string { return fmt.Sprintf("spiffe://corp.example/ns/n%d/sa/s%d", i%400, i) }),
		"few groups": many(1000, func(i int) string { return fmt.Sprintf("spiffe://corp.example/ns/n%d/sa/s%d", i%9, i) }),
	} {
		d := New(mesh.Chart{Edges: edges}).Draw()
		if len(d.Nodes) > MaxDrawn {
			t.Errorf("%s: %d nodes", name, len(d.Nodes))
		}
		seen := map[[2]int]string{}
		for _, n := range d.Nodes {
			at := [2]int{n.X, n.Y}
			if seen[at] != "" {
				t.Errorf("%s: %s and %s are at the same place", name, n.End, seen[at])
			}
			if seen[at] = n.End; n.X < 0 || n.Y < 0 || n.X+n.W > d.W || n.Y+n.H > d.H {
				t.Errorf("%s: %s is outside of the drawing", name, n.End)
			}
		}
		for _, p := range d.Paths {
			if !strings.HasPrefix(p.D, "M") || p.Width < 1 || p.Width > 5 {
				t.Errorf("%s: path %q, %d", name, p.D, p.Width)
			}
		}
	}
}

func many(n int, name func(int) string) (out []mesh.Edge) {
	for i := 1; i < n; i++ {
		out = append(out, mesh.Edge{Src: name(i / 3), Dst: name(i), Allowed: uint64(n - i)}, mesh.Edge{Src: name(i), Dst: name((i * 7) % n), Allowed: 1})
	}
	return out
}

// TestNamesEndNoQuotes: proxies report names.
func TestNamesEndNoQuotes(t *testing.T) {
	var out strings.Builder
	g := New(mesh.Chart{Edges: []mesh.Edge{{Src: `x"];evil["`, Dst: `\`, Allowed: 1}}})
	if err := g.DOT(&out); err != nil || strings.Contains(out.String(), `x"]`) {
		t.Errorf("%v\n%s", err, &out)
	}
	out.Reset()
	if err := g.Mermaid(&out); err != nil || strings.Contains(out.String(), `x"]`) {
		t.Errorf("%v\n%s", err, &out)
	}
}

func TestFind(t *testing.T) {
	g := New(mesh.Chart{Edges: []mesh.Edge{{Src: id("web"), Dst: "host:api.test"}, {Src: "", Dst: "spiffe://corp.example/ns/other/sa/web"}}})
	for text, want := range map[string]string{"api.test": "host:api.test", "shop/web": id("web"), id("web"): id("web"), "nobody": ""} {
		if end, ok := g.Find(text); !ok || end != want {
			t.Errorf("Find(%q) = %q, %v", text, end, ok)
		}
	}
	for _, text := range []string{"web", "else"} {
		if end, ok := g.Find(text); ok {
			t.Errorf("Find(%q) = %q", text, end)
		}
	}
}
